"""The subjects of convolutions: each dimension and option that both frameworks have, as functions and as layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from parity_tests.suite.oracle import conv as oracle_conv
from parity_tests.suite.subjects.subject import Subject
from probly_flax.functional import conv as flax_functional
from probly_flax.layers import conv as flax_layers
from probly_torch.functional import conv as torch_functional
from probly_torch.layers import conv as torch_layers

Sizes = tuple[int, ...]
EXACT = (4, 0.125, 4)


def channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def channels_last(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


class ChannelsFirstConv(flax_layers.BatchEnsembleConv):
    """Called with torch's layout."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return channels_first(super().__call__(channels_last(inputs), out_sharding))


class ChannelsFirstConvTranspose(flax_layers.BatchEnsembleConvTranspose):
    """Called with torch's layout."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return channels_first(super().__call__(channels_last(inputs)))


def flax_conv(x: jax.Array, weight: jax.Array, **rest: Any) -> jax.Array:
    """Calls batch_ensemble_conv with torch's layouts."""
    kernel = jnp.moveaxis(weight, (0, 1), (-1, -2))
    return channels_first(flax_functional.batch_ensemble_conv(channels_last(x), kernel, **rest))


def flax_conv_transpose(x: jax.Array, weight: jax.Array, transpose_kernel: bool, **rest: Any) -> jax.Array:
    """Calls batch_ensemble_conv_transpose with torch's layouts."""
    if transpose_kernel:
        kernel = jnp.moveaxis(weight, (0, 1), (-1, -2))
    else:
        kernel = jnp.flip(jnp.moveaxis(weight, (0, 1), (-2, -1)), range(weight.ndim - 2))
    y = flax_functional.batch_ensemble_conv_transpose(
        channels_last(x), kernel, transpose_kernel=transpose_kernel, **rest
    )
    return channels_first(y)


def shapes(channels: Sizes, sizes: Sizes, taps: Sizes, groups: int = 1, bias: bool = True, transpose: bool = False):
    """Maps E, B, in and out channels, sizes and taps of the kernel to the shape of each array in torch."""
    num_members, batch, in_channels, out_channels = channels
    weight = (in_channels, out_channels // groups) if transpose else (out_channels, in_channels // groups)
    return {
        "x": (num_members * batch, in_channels, *sizes),
        "weight": (*weight, *taps),
        "r": (num_members, in_channels),
        "s": (num_members, out_channels),
        **({"bias": (num_members, out_channels)} if bias else {}),
    }


def _conv(
    name: str,
    channels: Sizes,
    sizes: Sizes,
    taps: Sizes,
    stride: Sizes = (1,),
    padding: Any = 0,
    dilation: Sizes = (1,),
    groups: int = 1,
    bias: bool = True,
) -> Subject:
    axes = range(len(sizes))
    stride, dilation = (value * len(sizes) if len(value) == 1 else value for value in (stride, dilation))
    pairs = [(padding[a], padding[a]) if isinstance(padding, tuple) else (padding, padding) for a in axes]
    if padding == "same":
        spans = [dilation[a] * (taps[a] - 1) for a in axes]
        pairs = [(span // 2, span - span // 2) for span in spans]
    return Subject(
        f"batch_ensemble_conv-{len(sizes)}d-{name}",
        shapes(channels, sizes, taps, groups, bias),
        partial(torch_functional.batch_ensemble_conv, stride=stride, padding=padding, dilation=dilation, groups=groups),
        partial(
            flax_conv,
            strides=stride,
            padding="SAME" if padding == "same" else padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
        ),
        partial(oracle_conv.batch_ensemble_conv, stride=stride, padding=pairs, dilation=dilation, groups=groups),
        exact=EXACT,
    )


def _conv_transpose(
    transpose_kernel: bool,
    name: str,
    channels: Sizes,
    sizes: Sizes,
    taps: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    output_padding: Sizes,
) -> Subject:
    options: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "output_padding": output_padding,
    }
    return Subject(
        f"batch_ensemble_conv_transpose-{len(sizes)}d-{name}{'-transpose_kernel' if transpose_kernel else ''}",
        shapes(channels, sizes, taps, transpose=True),
        partial(torch_functional.batch_ensemble_conv_transpose, **options),
        partial(
            flax_conv_transpose,
            strides=stride,
            padding=flax_padding(taps, padding, dilation, output_padding),
            kernel_dilation=dilation,
            transpose_kernel=transpose_kernel,
        ),
        partial(oracle_conv.batch_ensemble_conv_transpose, **options),
        exact=EXACT,
    )


def flax_padding(taps: Sizes, padding: Sizes, dilation: Sizes, output_padding: Sizes) -> list[tuple[int, int]]:
    """Returns the padding of nnx.ConvTranspose, which is that of the dilated inputs."""
    low = [d * (k - 1) - p for k, p, d in zip(taps, padding, dilation, strict=True)]
    return [(pad, pad + extra) for pad, extra in zip(low, output_padding, strict=True)]


TORCH_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TORCH_CONV_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _layer(padding_mode: str, channels: Sizes, sizes: Sizes, taps: Sizes, groups: int) -> Subject:
    num_members, _, in_channels, out_channels = channels
    pads = tuple((size - 1) // 2 for size in taps)
    kind: Callable[..., nn.Module] = TORCH_CONV[len(sizes)]

    def torch_layer(dtype: torch.dtype) -> nn.Module:
        base = kind(
            in_channels, out_channels, taps, padding=pads, groups=groups, padding_mode=padding_mode, dtype=dtype
        )
        return torch_layers.BatchEnsembleConv(base, num_members=num_members)  # type: ignore[arg-type]

    def flax_layer(dtype: Any) -> nnx.Module:
        base = nnx.Conv(
            in_channels,
            out_channels,
            taps,
            padding=pads if padding_mode == "zeros" else padding_mode.upper(),
            feature_group_count=groups,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        return ChannelsFirstConv(base, num_members=num_members)

    return Subject(
        f"BatchEnsembleConv-{len(sizes)}d-{padding_mode}",
        shapes(channels, sizes, taps, groups),
        torch_layer,
        flax_layer,
        partial(
            oracle_conv.batch_ensemble_conv,
            stride=(1,) * len(sizes),
            padding=[(pad, pad) for pad in pads],
            dilation=(1,) * len(sizes),
            groups=groups,
            padding_mode=padding_mode,
        ),
        model=True,
        exact=EXACT,
    )


def _transposed_layer(transpose_kernel: bool) -> Subject:
    channels, sizes, taps, stride, padding, extra = (2, 1, 3, 2), (3, 2), (3, 2), (2, 1), (1, 0), (1, 0)

    def torch_layer(dtype: torch.dtype) -> nn.Module:
        base = nn.ConvTranspose2d(
            *channels[2:], taps, stride=stride, padding=padding, output_padding=extra, dtype=dtype
        )
        return torch_layers.BatchEnsembleConvTranspose(base, num_members=channels[0])

    def flax_layer(dtype: Any) -> nnx.Module:
        base = nnx.ConvTranspose(
            *channels[2:],
            taps,
            strides=stride,
            padding=flax_padding(taps, padding, (1, 1), extra),
            transpose_kernel=transpose_kernel,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        return ChannelsFirstConvTranspose(base, num_members=channels[0])

    return Subject(
        f"BatchEnsembleConvTranspose-2d{'-transpose_kernel' if transpose_kernel else ''}",
        shapes(channels, sizes, taps, transpose=True),
        torch_layer,
        flax_layer,
        partial(
            oracle_conv.batch_ensemble_conv_transpose,
            stride=stride,
            padding=padding,
            dilation=(1, 1),
            output_padding=extra,
        ),
        model=True,
        exact=EXACT,
    )


_TRANSPOSED: list[Any] = [
    ("stride", (3, 1, 3, 2), (3,), (3,), (2,), (1,), (1,), (1,)),
    ("dilation", (2, 1, 3, 3), (2, 3), (2, 2), (1, 2), (0, 1), (2, 1), (0, 1)),
    ("plain", (2, 1, 2, 3), (2, 1, 2), (2, 1, 2), (2, 1, 1), (0, 0, 0), (1, 1, 1), (0, 0, 0)),
    ("member_by_member", (2, 2, 2, 2), (3, 3), (1, 2), (2, 1), (0, 1), (1, 1), (1, 0)),
]
SUBJECTS = [
    _conv("stride", (3, 2, 3, 4), (6,), (3,), stride=(2,), padding=(1,)),
    _conv("groups", (2, 1, 4, 6), (4, 5), (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2), groups=2),
    _conv("groups-member_by_member", (2, 1, 4, 4), (4, 4), (2, 1), padding=(1, 0), groups=2),
    _conv("square", (2, 2, 3, 3), (3, 3), (2, 2)),
    _conv("depthwise-no_bias", (2, 2, 3, 3), (4, 3), (2, 2), groups=3, bias=False),
    _conv("same-even", (2, 1, 2, 3), (3, 4), (2, 3), padding="same", dilation=(1, 2)),
    _conv("one_member", (1, 2, 2, 3), (3, 3), (1, 1)),
    _conv("plain", (2, 1, 2, 3), (2, 3, 3), (2, 1, 2), padding=(0, 1, 0)),
    *(_conv_transpose(kind, *case) for kind in (False, True) for case in _TRANSPOSED),
    _layer("zeros", (2, 1, 4, 2), (4,), (3,), 2),
    _layer("zeros", (2, 1, 4, 2), (3, 4), (3, 1), 2),
    _layer("circular", (2, 1, 2, 2), (3, 4), (3, 3), 1),
    _layer("reflect", (2, 1, 2, 2), (3, 2), (3, 1), 1),
    _layer("zeros", (2, 1, 2, 2), (2, 2, 2), (1, 3, 1), 1),
    _transposed_layer(False),
    _transposed_layer(True),
]
