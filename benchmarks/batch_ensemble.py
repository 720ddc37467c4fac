"""BatchEnsembleLinear against one plain linear layer over the same rows: `python -m benchmarks.batch_ensemble`.

A step is forward and backward, with gradients of the input and of all weights. Contenders take turns, and a ratio is a
median time over the median of the plain layer. The layers of tabm and torch-uncertainty take part where installed.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks._timing import LIMIT, Contenders, main

CASES = ((4, 128, 128, 128), (4, 32, 512, 512), (4, 2048, 512, 512), (8, 2048, 256, 256), (4, 8192, 256, 256))
QUICK_CASES = ((4, 8, 8, 8), (2, 64, 4, 4))


def torch_contenders(
    num_members: int, batch: int, in_features: int, out_features: int
) -> Iterator[tuple[str, Contenders]]:
    import torch
    from torch import Tensor, nn

    from probly_torch import BatchEnsembleLinear

    def step(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], Any]:
        leaves = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), leaves, g)

    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features)
    layers: dict[str, tuple[nn.Module, bool]] = {LIMIT: (linear, True)}
    layers["BatchEnsembleLinear"] = BatchEnsembleLinear(linear, num_members=num_members), True
    if tabm := _installed("tabm"):
        layers["tabm"] = (
            tabm.LinearBatchEnsemble(in_features, out_features, k=num_members, scaling_init="random-signs"),
            False,
        )
    if peer := _installed("torch_uncertainty.layers.batch_ensemble"):
        layers["torch-uncertainty"] = peer.BatchLinear(in_features, out_features, num_estimators=num_members), True
    x = torch.randn(num_members * batch, in_features, requires_grad=True)
    g = torch.randn(num_members * batch, out_features)
    rows = (num_members, batch)  # tabm has the members second
    arguments = {
        name: (x, g) if flat else tuple(t.detach().unflatten(0, rows).transpose(0, 1).contiguous() for t in (x, g))
        for name, (_, flat) in layers.items()
    }
    forward = {
        name: torch.no_grad()(lambda layer=layer, x=arguments[name][0]: layer(x)) for name, (layer, _) in layers.items()
    }
    yield "forward", forward
    yield (
        "step",
        {
            name: step(layer, arguments[name][0].requires_grad_(), arguments[name][1])
            for name, (layer, _) in layers.items()
        },
    )


def flax_contenders(
    num_members: int, batch: int, in_features: int, out_features: int
) -> Iterator[tuple[str, Contenders]]:
    import jax
    from flax import nnx

    from probly_flax import BatchEnsembleLinear

    linear = nnx.Linear(in_features, out_features, rngs=nnx.Rngs(0))
    layers = {LIMIT: linear, "BatchEnsembleLinear": BatchEnsembleLinear(linear, num_members=num_members)}
    x = jax.random.normal(jax.random.key(0), (num_members * batch, in_features))
    g = jax.random.normal(jax.random.key(1), (num_members * batch, out_features))

    def compiled(layer: nnx.Module, backward: bool) -> Callable[[], Any]:
        graph, state = nnx.split(layer)

        def forward(state: nnx.State, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(x)

        def step(state: nnx.State, x: jax.Array) -> Any:
            y, pullback = jax.vjp(forward, state, x)
            return y, pullback(g)

        run = jax.jit(step if backward else forward)
        return lambda: jax.block_until_ready(run(state, x))

    for what in ("forward", "step"):
        yield what, {name: compiled(layer, what == "step") for name, layer in layers.items()}


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


if __name__ == "__main__":
    frameworks = {"torch": torch_contenders, "flax": flax_contenders}
    main("benchmarks.batch_ensemble", __doc__, frameworks, ("members", "B", "in", "out"), CASES, QUICK_CASES)
