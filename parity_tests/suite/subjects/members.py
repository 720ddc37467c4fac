"""The subjects of the suite: each public function and network, in torch, in Flax and in the oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.suite.oracle import members as oracle
from parity_tests.suite.subjects import losses as subjects_losses
from parity_tests.suite.subjects.subject import Subject


def _linear(sizes: tuple[int, int, int, int], middle: tuple[int, ...] = (), bias: bool = True) -> Subject:
    num_members, batch, in_features, out_features = sizes
    shapes = {
        "x": (num_members * batch, *middle, in_features),
        "weight": (out_features, in_features),
        "r": (num_members, in_features),
        "s": (num_members, out_features),
    }
    if bias:
        shapes["bias"] = (num_members, out_features)
    name = f"batch_ensemble_linear-E{num_members}-B{batch}-{in_features}to{out_features}{'' if bias else '-no_bias'}"
    return Subject(
        name=name + "".join(f"-{size}" for size in middle),
        shapes=shapes,
        torch=pt.functional.batch_ensemble_linear,
        flax=flax_linear,
        oracle=oracle.batch_ensemble_linear,
        exact=(8, 0.125, 4),
    )


def flax_linear(x: jax.Array, weight: jax.Array, **rest: Any) -> jax.Array:
    """Calls batch_ensemble_linear with torch's weight layout."""
    return pf.functional.batch_ensemble_linear(x, weight.T, **rest)


def _layer() -> Subject:
    num_members, batch, in_features, out_features = 3, 4, 5, 7
    base = _linear((num_members, batch, in_features, out_features))

    def torch_layer(dtype: torch.dtype) -> nn.Module:
        return pt.BatchEnsembleLinear(nn.Linear(in_features, out_features, dtype=dtype), num_members=num_members)

    def flax_layer(dtype: Any) -> nnx.Module:
        linear = nnx.Linear(in_features, out_features, param_dtype=dtype, rngs=nnx.Rngs(0))
        return pf.BatchEnsembleLinear(linear, num_members=num_members)

    return Subject(
        "BatchEnsembleLinear", base.shapes, torch_layer, flax_layer, base.oracle, model=True, exact=base.exact
    )


WIDTHS = (5, 6, 3)


def torch_mlp(dtype: torch.dtype) -> nn.Sequential:
    """Makes a network of linear, relu, linear."""
    return nn.Sequential(nn.Linear(*WIDTHS[:2], dtype=dtype), nn.ReLU(), nn.Linear(*WIDTHS[1:], dtype=dtype))


class WithForward(nn.Sequential):
    """A Sequential whose forward is its own, as most networks' is: Ensemble knows nothing of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def flax_mlp(dtype: Any) -> nnx.Module:
    """Makes a network of linear, relu, linear."""
    rngs = nnx.Rngs(0)
    linear = partial(nnx.Linear, param_dtype=dtype, rngs=rngs)
    return nnx.Sequential(linear(*WIDTHS[:2]), jax.nn.relu, linear(*WIDTHS[1:]))


def _networks() -> list[Subject]:
    num_members, batch = 4, 3
    subjects = []
    for shared in (True, False):
        x = {"x": (batch, WIDTHS[0]) if shared else (num_members, batch, WIDTHS[0])}
        options: dict[str, Any] = {} if shared else {"in_axes": 0}
        suffix = "shared_batch" if shared else "batch_each"
        layers = ((0, WIDTHS[0], WIDTHS[1]), (2, WIDTHS[1], WIDTHS[2]))
        stacked, fast = dict(x), dict(x)
        for layer, fan_in, fan_out in layers:
            stacked |= {
                f"{layer}.weight": (num_members, fan_out, fan_in),
                f"{layer}.bias": (num_members, fan_out),
            }
            fast |= {
                f"network.{layer}.weight": (fan_out, fan_in),
                f"network.{layer}.r": (num_members, fan_in),
                f"network.{layer}.s": (num_members, fan_out),
                f"network.{layer}.bias": (num_members, fan_out),
            }
        ways = [("", nn.Sequential, None), ("-chunks", WithForward, 3)]
        if shared:
            ways += [("-vmap", WithForward, None), ("-loop", WithForward, 1)]
        subjects += [
            *(
                Subject(
                    f"Ensemble-{suffix}{way}",
                    stacked,
                    lambda dtype, kind=kind, size=size: pt.ensemble(
                        kind(*torch_mlp(dtype)), num_members, chunk_size=size
                    ),
                    lambda dtype, size=size: pf.ensemble(flax_mlp(dtype), num_members, chunk_size=size),
                    oracle.ensemble_mlp,
                    model=True,
                    options=options,
                    exact=(4, 1.0, 1),
                )
                for way, kind, size in ways
            ),
            Subject(
                f"BatchEnsemble-{suffix}",
                fast,
                lambda dtype: pt.batchensemble(torch_mlp(dtype), num_members),
                lambda dtype: pf.batchensemble(flax_mlp(dtype), num_members),
                oracle.batch_ensemble_mlp,
                model=True,
                options=options,
                exact=(2, 1.0, 1),
            ),
        ]
    return subjects


def _members(name: str, array: str, shape: tuple[int, ...], num_members: int) -> Subject:
    return Subject(
        name,
        {array: shape},
        getattr(pt, name),
        getattr(pf, name),
        getattr(oracle, name),
        options={"num_members": num_members},
        exact=(8, 0.125, 1),
    )


SUBJECTS = [
    _linear((3, 4, 5, 7)),
    _linear((3, 4, 6, 6)),
    _linear((2, 5, 3, 4), bias=False),
    _linear((1, 3, 4, 2)),
    _linear((4, 1, 1, 1)),
    _linear((2, 3, 5, 4), middle=(2, 3)),
    _linear((3, 5, 37, 19)),
    _linear((3, 16, 5, 7)),
    _linear((2, 12, 6, 6), bias=False),
    _linear((3, 1, 5, 7), middle=(16,)),
    _layer(),
    *_networks(),
    _members("tile_members", "x", (4, 3, 2), 3),
    _members("split_members", "y", (12, 5), 3),
    *subjects_losses.SUBJECTS,
]
EXACT_SUBJECTS = [subject for subject in SUBJECTS if subject.exact]
