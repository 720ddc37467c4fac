"""Certificate of the exact tier: a computation on integers is exact in any order of its sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parity_tests.standard import SIGNIFICANT_BITS

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
