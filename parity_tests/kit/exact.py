"""The exact tier: on integers a computation is exact in any order of its sums, where its certificate says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parity_tests.kit.inputs import Inputs
from parity_tests.kit.judge import Comparison, place
from parity_tests.kit.pair import Pair
from parity_tests.kit.runs import Cotangent, FlaxModel, TorchModel
from parity_tests.kit.trees import Arrays, mapped
from parity_tests.standard import SIGNIFICANT_BITS, Verdict

_PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "mul", "addcmul", "convolution", "convolution_backward", "pow"),
    *("linear", "matmul"),
}
_SUMS = {
    *("add", "sub", "rsub", "neg", "sum", "cumsum", "mean", "div", "repeat", "_unsafe_view"),
    *("avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward"),
    *("index_add", "index_put", "_unsafe_index_put", "scatter_add", "embedding_dense_backward"),
    *("slice_backward", "select_backward", "max_pool2d_with_indices_backward"),
}
_MOVES = {
    *("relu", "relu_", "threshold_backward", "clamp_min", "hardtanh", "abs", "minimum", "maximum", "max", "amax"),
    *("embedding", "index_select", "index", "gather", "cat", "stack", "flip", "roll", "tril", "triu"),
    *("clone", "copy_", "_to_copy", "lift_fresh", "detach", "where", "masked_fill", "scalar_tensor", "arange"),
    *("zeros", "zeros_like", "ones_like", "new_zeros", "full", "full_like", "fill_", "zero_"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "upsample_nearest2d", "max_pool2d_with_indices"),
}
_MOST_BITS = 40  # of a fraction that is still looked for
INTEGERS = (8, 3, 1)  # the largest ones that are tried


class NotExactError(Exception):
    """Why sums in another order may differ."""


class Certificate(TorchDispatchMode):
    """Runs a graph of torch on absolute values, every minus turned into plus, and follows how large sums can become.

    Raises:
        NotExactError: at the first operation whose results are rounded, or may be in this dtype.
    """

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        base = name.removesuffix("_") if name not in _MOVES else name
        known = base in _PRODUCTS | _SUMS | _MOVES or func.is_view
        if base in ("sub", "rsub"):
            args, func = (
                args[:2],
                torch.ops.aten.add.Tensor if isinstance(args[1], Tensor) else torch.ops.aten.add.Scalar,
            )
            kwargs.pop("alpha", None)
        elif base == "neg":
            func = torch.ops.aten.clone.default
        out = func(*args, **kwargs)
        floating = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
        if not floating:
            return out
        if not known:
            raise NotExactError(f"{name} rounds")
        if func.is_view or base in _MOVES:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        fractions = [_fraction_bits(t) for t in given]
        bits = sum(fractions) if base in _PRODUCTS else max(fractions, default=0)
        for tensor in floating:
            bits = max(bits, _fraction_bits(tensor))
            if not bits < _MOST_BITS:
                raise NotExactError(f"{name} gives values that are no multiples of a power of two")
            if float(tensor.abs().max()) * 2.0**bits > 2.0 ** SIGNIFICANT_BITS[self.dtype]:
                raise NotExactError(f"sums of {name} need more than {SIGNIFICANT_BITS[self.dtype]} bits")
        return out


def _fraction_bits(tensor: Tensor) -> int:
    """Returns the number of binary places behind the point that the values need."""
    for bits in range(0, _MOST_BITS + 1, 2):
        scaled = tensor * 2.0**bits
        if torch.equal(scaled, scaled.round()):
            return bits
    return _MOST_BITS


def on_integers(pair: Pair, given: Inputs, gradients: bool, notes: list[str], required: bool) -> Iterator[Comparison]:
    """Compares on integers in place of all weights and inputs, if sums are exact then.

    Any difference is one of meaning.
    """
    arrays, low, reason = pair.torch["float64"].to_arrays(), pair.low, ""
    for largest in INTEGERS:
        rng = np.random.default_rng(largest)
        weights = {
            name: a if a.dtype.kind in "iub" else rng.integers(-largest, largest + 1, a.shape).astype(np.float64)
            for name, a in arrays.items()
        }
        inputs = given.dyadic(0, largest)

        def g(name: str, shape: Sequence[int], largest: int = largest) -> np.ndarray:
            return np.random.default_rng([largest, *name.encode()]).integers(-largest, largest + 1, shape) * 1.0

        cotangent = g if gradients else None
        try:
            _certify(pair, weights, inputs, cotangent)
        except NotExactError as error:
            reason = str(error)
            if reason.endswith("rounds"):
                break
            continue
        except ValueError as error:  # masks, or a forward that the absolute values do not fit
            reason = str(error)
            break
        models: list[TorchModel | FlaxModel] = [*pair.torch.values(), *pair.flax.values()]
        own = [model.to_arrays() for model in models]
        for model in models:
            model.set_arrays(weights)
        ours, theirs = pair.run(inputs, cotangent, 0)
        for model, before in zip(models, own, strict=True):
            model.set_arrays(before)
        notes.append(f"exact on integers up to {largest}")
        for key, expected in ours["float64"].items():
            runs = {"torch": ours[low], "flax": theirs[low], "flax in float64": theirs["float64"]}
            if key in theirs[low]:
                verdicts = tuple(
                    Verdict(key[1], f"number of unequal elements of {who}", float((run[key] != expected).sum()), 0.0)
                    for who, run in runs.items()
                )
                kind = "" if key[0] == "output" else f"{key[0]} "
                yield Comparison("exact", f"{kind}{key[1]}", verdicts, *place(ours[low][key], theirs[low][key], low))
        return
    if required:
        raise ValueError(
            f"compare expects a network whose sums can be exact with exact=True; got one where {reason}. Leave it "
            f"out: exact=None compares exactly where that is possible."
        )
    notes.append(f"no exact comparison: {reason}")


def _certify(pair: Pair, weights: Arrays, inputs: Any, cotangent: Cotangent | None) -> None:
    """Runs torch on absolute values, under the certificate of the lower dtype."""
    model = pair.torch["float64"]
    before = model.to_arrays()
    model.set_arrays({name: np.abs(array) for name, array in weights.items()})
    args, kwargs = mapped(inputs, np.abs)
    g = None if cotangent is None else lambda name, shape: np.abs(cotangent(name, shape))
    try:
        with Certificate(pair.low):
            model.run((args, kwargs), g)
    finally:
        model.set_arrays(before)
