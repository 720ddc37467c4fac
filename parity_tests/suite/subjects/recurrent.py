"""Compares recurrent layers and their cells, by cases of sizes, layers and directions."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from parity_tests.kit.trees import jax_of
from parity_tests.suite.oracle import recurrent as oracle_recurrent
from parity_tests.suite.subjects.subject import without_draws
from probly_flax.layers import recurrent as flax_layers
from probly_torch.layers import recurrent as torch_layers

SEEDS = range(3)
GATES = {"LSTM": 4, "GRU": 3}
CELLS = {"LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell}
KINDS = list(GATES)


@dataclass(frozen=True)
class Case:
    """A layer in both frameworks: a cell, or a sequence layer of any number of layers and directions.

    nnx cells have one bias; `biases=2` gives the base cell a second one, by a Linear layer that has it, as torch's
    cells have. nnx has no layers nor directions: `num_layers` and `bidirectional` stack nnx.Bidirectional by hand.
    """

    kind: str
    is_cell: bool = False
    sizes: tuple[int, int, int, int, int] = (3, 2, 4, 5, 3)  # E, B, T, in, hidden
    num_layers: int = 1
    bidirectional: bool = False
    biases: int = 2
    apart: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("is_cell", "bidirectional", "apart") if getattr(self, name)]
        sizes = "x".join(map(str, self.sizes))
        return "-".join([self.kind, sizes, f"layers{self.num_layers}", f"biases{self.biases}", *flags])

    @property
    def places(self) -> list[str]:
        if self.is_cell:
            return [""]
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{n}{way}" for n in range(self.num_layers) for way in ways]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        members, batch, steps, inputs, hidden = self.sizes
        gates, rows, count = GATES[self.kind] * hidden, members * batch, len(self.places)
        directions = 2 if self.bidirectional else 1
        time, states = ((), (rows, hidden)) if self.is_cell else ((steps,), (count, rows, hidden))
        shapes = {"x": (rows, *time, inputs), "g output": (rows, *time, directions * hidden)}
        for name in ("h", "c") if self.kind == "LSTM" else ("h",):
            shapes |= {f"{name}_0": states, f"g {name}_n": states}
        for at, place in enumerate(self.places):
            width = inputs if at < directions else directions * hidden
            for kind, size in (("ih", width), ("hh", hidden)):
                shapes |= {f"weight_{kind}{place}": (gates, size), f"r_{kind}{place}": (members, size)}
                shapes |= {f"s_{kind}{place}": (members, gates), f"bias_{kind}{place}": (members, gates)}
        return shapes

    def draw(self, seed: int, dtype: str) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, *str(self).encode()])
        arrays = {}
        for name, shape in self.shapes().items():
            values = 0.5 * rng.standard_normal(shape) + (name[:2] in ("r_", "s_"))
            arrays[name] = values.astype(jnp.dtype(dtype)).astype(np.float64)
            if self.biases == 1 and name.startswith("bias_hh"):
                arrays[name] = np.zeros(shape)
        return arrays


CASES = [
    *(Case(kind, is_cell=True, biases=biases) for kind in KINDS for biases in (1, 2)),
    *(Case(kind, biases=1) for kind in KINDS),
    *(Case("LSTM", is_cell, biases=1, apart=True) for is_cell in (True, False)),
    Case("LSTM", sizes=(2, 3, 3, 4, 4)),
    Case("GRU", sizes=(1, 1, 2, 3, 7)),
    *(Case(kind, sizes=(2, 2, 3, 4, 3), num_layers=2, bidirectional=True) for kind in KINDS),
]


def split(arrays):
    """Splits arrays into inputs and states, cotangents, and weights."""
    inputs = {name: v for name, v in arrays.items() if name in ("x", "h_0", "c_0")}
    g = {name[2:]: v for name, v in arrays.items() if name.startswith("g ")}
    return inputs, g, {name: v for name, v in arrays.items() if name not in inputs and not name.startswith("g ")}


def run_oracle(case, arrays):
    inputs, g, weights = split(arrays)
    g = {"c_n": np.zeros_like(g["h_n"])} | g
    run = oracle_recurrent.cell if case.is_cell else oracle_recurrent.recurrent
    options = {} if case.is_cell else {"num_layers": case.num_layers, "bidirectional": case.bidirectional}
    x = inputs.pop("x")
    outputs, grads = run(case.kind, g, x, weights, case.sizes[0], **options, **inputs)
    if case.kind == "GRU":
        del outputs["c_n"], grads["c_0"]
    return compared(case, outputs, grads)


def compared(case, outputs, grads):
    """Returns what is compared. Where one framework has one bias, it is only the one that both have."""
    names = [name for name in grads if case.biases == 2 or not name.startswith("bias_hh")]
    return outputs | {f"gradient by {name}": grads[name] for name in names}


def torch_base(case, dtype="float32", **options):
    _, _, _, inputs, hidden = case.sizes
    options = {"dtype": getattr(torch, dtype)} | options
    if case.is_cell:
        return getattr(nn, case.kind + "Cell")(inputs, hidden, **options)
    options = {"num_layers": case.num_layers, "bidirectional": case.bidirectional, "batch_first": True} | options
    return getattr(nn, case.kind)(inputs, hidden, **options)


def ours(package, case):
    return getattr(package, f"BatchEnsemble{case.kind}{'Cell' * case.is_cell}")


@cache
def torch_layer(case, dtype):
    return ours(torch_layers, case)(torch_base(case, dtype), num_members=case.sizes[0])


def run_torch(case, arrays, dtype):
    layer = torch_layer(case, dtype)
    inputs, g, weights = (
        {name: torch.tensor(v, dtype=getattr(torch, dtype)) for name, v in part.items()} for part in split(arrays)
    )
    layer.load_state_dict(weights)
    inputs = {name: v.requires_grad_() for name, v in inputs.items()}
    states = [inputs[name] for name in ("h_0", "c_0") if name in inputs]
    results = layer(inputs["x"], tuple(states) if len(states) == 2 else states[0])
    if case.is_cell:
        last = results if case.kind == "LSTM" else (results,)
        outputs = {"output": last[0]}
    else:
        outputs, last = {"output": results[0]}, results[1] if case.kind == "LSTM" else (results[1],)
    outputs |= dict(zip(("h_n", "c_n"), last, strict=False))
    leaves = inputs | dict(layer.named_parameters())
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [g[name] for name in outputs])
    results = compared(case, outputs, dict(zip(leaves, grads, strict=True)))
    return {name: v.detach().double().numpy() for name, v in results.items()}


def numpys():
    """Returns an initialiser of weights that NumPy draws, at once.

    JAX compiles a draw of its own for each shape.
    """
    rng = np.random.default_rng(0)

    def init(key, shape, dtype, *_, **__):
        return jax_of(0.4 * rng.standard_normal(shape), dtype)

    return init


def flax_cell(case, width, dtype="float32", **options):
    hidden, rngs, init = case.sizes[4], nnx.Rngs(0), options.pop("kernel_init", numpys())
    options = {"param_dtype": jnp.dtype(dtype), "rngs": rngs} | options
    options |= {"kernel_init": init, "recurrent_kernel_init": init}
    cell = (nnx.LSTMCell if case.apart else CELLS[case.kind])(width, hidden, **options)
    if case.biases == 2:
        options = {"param_dtype": jnp.dtype(dtype), "rngs": rngs, "kernel_init": init}
        cell.dense_i = nnx.Linear(width, GATES[case.kind] * hidden, **options)
        cell.dense_h = nnx.Linear(hidden, GATES[case.kind] * hidden, **options)
    return cell


class Stack(nnx.Module):
    """Layers and directions, with states in torch's layout."""

    def __init__(self, case, dtype):
        members, _, _, inputs, hidden = case.sizes
        directions = 2 if case.bidirectional else 1

        def layer(n):
            width = directions * hidden if n else inputs
            cell = flax_cell(case, width, dtype, kernel_init=nnx.initializers.zeros)
            options = {"num_members": members, "use_base_weights": True}
            return ours(flax_layers, case)(cell if case.is_cell else nnx.RNN(cell), **options)

        self.layers = nnx.List([layer(n) for n in range(case.num_layers) for _ in range(directions)])
        self.case = case

    def __call__(self, x, h_0, c_0=None):
        if self.case.is_cell:
            carry, y = self.layers[0](h_0 if c_0 is None else (c_0, h_0), x)
            return {"output": y} | ({"h_n": carry} if c_0 is None else {"h_n": carry[1], "c_n": carry[0]})
        carries = list(h_0) if c_0 is None else list(zip(c_0, h_0, strict=True))
        last, step = [], 2 if self.case.bidirectional else 1
        for at in range(0, len(self.layers), step):
            if self.case.bidirectional:
                layer, carry = nnx.Bidirectional(self.layers[at], self.layers[at + 1]), tuple(carries[at : at + 2])
            else:
                layer, carry = self.layers[at], carries[at]
            carry, x = layer(x, initial_carry=carry, return_carry=True)
            last += list(carry) if self.case.bidirectional else [carry]
        if c_0 is None:
            return {"output": x, "h_n": jnp.stack(last)}
        return {"output": x, "h_n": jnp.stack([h for _, h in last]), "c_n": jnp.stack([c for c, _ in last])}


def named(case, stack):
    """Yields each variable by its name in torch, and whether it is transposed there."""
    for place, layer in zip(case.places, stack.layers, strict=True):
        cell = layer if case.is_cell else layer.cell
        for kind, dense in (("ih", cell.dense_i), ("hh", cell.dense_h)):
            yield f"weight_{kind}{place}", dense.kernel, True
            yield f"r_{kind}{place}", dense.r, False
            yield f"s_{kind}{place}", dense.s, False
            if dense.bias is not None:
                yield f"bias_{kind if case.biases == 2 else 'ih'}{place}", dense.bias, False


@cache
def flax_call(case, dtype):
    stack = without_draws(lambda: Stack(case, dtype))
    graph, _, rest = nnx.split(stack, nnx.Param, ...)

    def forward_and_backward(g, params, inputs):
        def forward(params, inputs):
            return nnx.merge(graph, params, rest, copy=True)(**inputs)

        output, backward = jax.vjp(forward, params, inputs)
        return output, backward(g)

    return stack, jax.jit(forward_and_backward)


def run_flax(case, arrays, dtype):
    inputs, g, weights = split(arrays)
    stack, run = flax_call(case, dtype)
    seen = {name for name, _, _ in named(case, stack)}
    assert seen == {name for name in weights if case.biases == 2 or not name.startswith("bias_hh")}
    for name, variable, transposed in named(case, stack):
        value = (weights[name].T if transposed else weights[name]).astype(jnp.dtype(dtype))
        assert value.shape == variable.shape
        variable.set_value(jax_of(value))
    g, inputs = ({name: jax_of(v, dtype) for name, v in part.items()} for part in (g, inputs))
    outputs, (params, grads) = run(g, nnx.state(stack, nnx.Param), inputs)
    nnx.update(stack, params)
    for name, variable, transposed in named(case, stack):
        grads[name] = np.asarray(variable[...]).T if transposed else variable[...]
    return {name: np.asarray(v).astype(np.float64) for name, v in compared(case, outputs, grads).items()}
