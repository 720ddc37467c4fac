"""BatchEnsemble against one plain layer, or network, over the same E*B rows: `python -m benchmarks.batch_ensemble`.

A step is forward and backward, with gradients of a layer's input and of all weights. Contenders take turns, and a ratio
is a median time over the median of the plain layer. The layers of tabm and torch-uncertainty take part where installed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._networks import flax_networks, torch_networks
from benchmarks._timing import LIMIT, Contenders, Table, main

OURS = "probly"


def torch_linear(num_members: int, batch: int, in_features: int, out_features: int) -> Iterator[tuple[str, Contenders]]:
    import torch
    from torch import nn

    from probly_torch import BatchEnsembleLinear

    linear = nn.Linear(in_features, out_features)
    layers: dict[str, nn.Module] = {LIMIT: linear, OURS: BatchEnsembleLinear(linear, num_members=num_members)}
    if peer := _installed("torch_uncertainty", "layers", "batch_ensemble"):
        layers["torch-uncertainty"] = peer.BatchLinear(in_features, out_features, num_estimators=num_members)
    x = torch.randn(num_members * batch, in_features)
    inputs = dict.fromkeys(layers, x)
    if peer := _installed("tabm"):
        layers["tabm"] = peer.LinearBatchEnsemble(in_features, out_features, k=num_members, scaling_init="random-signs")
        inputs["tabm"] = x.unflatten(0, (num_members, batch)).transpose(0, 1).contiguous()  # members second
    yield from _torch_times(layers, inputs)


def torch_conv(num_members: int, batch: int, channels: int, size: int, kernel: int) -> Iterator[tuple[str, Contenders]]:
    import torch
    from torch import nn

    from probly_torch import BatchEnsembleConv

    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
    layers: dict[str, nn.Module] = {LIMIT: conv, OURS: BatchEnsembleConv(conv, num_members=num_members)}
    if peer := _installed("torch_uncertainty", "layers", "batch_ensemble"):
        layers["torch-uncertainty"] = peer.BatchConv2d(
            channels, channels, kernel, num_members, padding=kernel // 2, bias=True
        )
    yield from _torch_times(layers, dict.fromkeys(layers, torch.randn(num_members * batch, channels, size, size)))


def _torch_times(layers: dict[str, Any], inputs: dict[str, Any]) -> Iterator[tuple[str, Contenders]]:
    import torch

    def step(layer: Any, x: Any) -> Callable[[], Any]:
        leaves, g = [x.requires_grad_(), *layer.parameters()], torch.ones_like(layer(x))
        return lambda: torch.autograd.grad(layer(x), leaves, g)

    def forward(layer: Any, x: Any) -> Callable[[], Any]:
        return torch.no_grad()(lambda: layer(x))

    for name, times in {"forward": forward, "step": step}.items():
        yield name, {which: times(layer, inputs[which]) for which, layer in layers.items()}


def torch_whole(num_members: int, batch: int, width: int) -> Iterator[tuple[str, Contenders]]:
    import torch

    from probly_torch import batchensemble
    from probly_torch.functional import tile_members

    def step(network: Any, x: Any) -> Callable[[], Any]:
        parameters = list(network.parameters())
        return lambda: torch.autograd.grad(network(x).square().mean(), parameters)

    for name, (network, shape) in torch_networks(width).items():
        x = torch.randn(batch, *shape)
        plain = step(network, tile_members(x, num_members))
        yield name, {LIMIT: plain, OURS: step(batchensemble(network, num_members), x)}


def flax_linear(num_members: int, batch: int, in_features: int, out_features: int) -> Iterator[tuple[str, Contenders]]:
    from flax import nnx

    from probly_flax import BatchEnsembleLinear

    linear = nnx.Linear(in_features, out_features, rngs=nnx.Rngs(0))
    layers = {LIMIT: linear, OURS: BatchEnsembleLinear(linear, num_members=num_members)}
    yield from _flax_times(layers, (num_members * batch, in_features))


def flax_conv(num_members: int, batch: int, channels: int, size: int, kernel: int) -> Iterator[tuple[str, Contenders]]:
    from flax import nnx

    from probly_flax import BatchEnsembleConv

    conv = nnx.Conv(channels, channels, (kernel, kernel), padding=kernel // 2, rngs=nnx.Rngs(0))
    layers = {LIMIT: conv, OURS: BatchEnsembleConv(conv, num_members=num_members)}
    yield from _flax_times(layers, (num_members * batch, size, size, channels))


def _flax_times(layers: dict[str, Any], shape: tuple[int, ...]) -> Iterator[tuple[str, Contenders]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    x = jax.random.normal(jax.random.key(0), shape)

    def compiled(layer: Any, backward: bool) -> Callable[[], Any]:
        graph, state = nnx.split(layer)

        def forward(state: nnx.State, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(x)

        def step(state: nnx.State, x: jax.Array) -> Any:
            y, pullback = jax.vjp(forward, state, x)
            return y, pullback(jnp.ones_like(y))

        run = jax.jit(step if backward else forward)
        return lambda: jax.block_until_ready(run(state, x))

    for what in ("forward", "step"):
        yield what, {name: compiled(layer, what == "step") for name, layer in layers.items()}


def flax_whole(num_members: int, batch: int, width: int) -> Iterator[tuple[str, Contenders]]:
    import jax
    from flax import nnx

    from probly_flax import batchensemble
    from probly_flax.functional import tile_members

    def step(network: Any, x: jax.Array) -> Callable[[], Any]:
        graph, parameters, others = nnx.split(network, nnx.Param, ...)

        def loss(parameters: nnx.State) -> jax.Array:
            return (nnx.merge(graph, parameters, others, copy=True)(x) ** 2).mean()

        run = jax.jit(jax.grad(loss))
        return lambda: jax.block_until_ready(run(parameters))

    for name, (network, shape) in flax_networks(width).items():
        x = jax.random.normal(jax.random.key(0), (batch, *shape))
        plain = step(network, tile_members(x, num_members))
        yield name, {LIMIT: plain, OURS: step(batchensemble(network, num_members), x)}


def _installed(package: str, *path: str) -> Any:
    """A module of a package that may not be there; alone, since the package itself may want more than it needs."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent.joinpath(*path).with_suffix(".py") if path else found.origin
    spec = importlib.util.spec_from_file_location(".".join((package, *path)), file)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = (
    Table(
        ("members", "B", "in", "out"),
        ((4, 128, 128, 128), (4, 32, 512, 512), (4, 2048, 512, 512), (8, 2048, 256, 256), (4, 8192, 256, 256)),
        ((4, 8, 8, 8), (2, 64, 4, 4)),
        {"torch": torch_linear, "flax": flax_linear},
    ),
    Table(
        ("members", "B", "C", "H, W", "kernel"),
        ((4, 4, 32, 32, 3), (4, 16, 64, 16, 3), (4, 16, 128, 8, 3), (4, 4, 64, 32, 1), (4, 16, 256, 8, 1)),
        ((2, 1, 2, 4, 3), (2, 2, 2, 4, 1)),
        {"torch": torch_conv, "flax": flax_conv},
    ),
    Table(("members", "B", "width"), ((4, 8, 64),), ((2, 1, 4),), {"torch": torch_whole, "flax": flax_whole}),
)

if __name__ == "__main__":
    main("benchmarks.batch_ensemble", __doc__, *TABLES)
