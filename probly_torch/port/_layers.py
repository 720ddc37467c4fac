"""How layers are built and called in flax.nnx. A rule takes the scope, torch's layer, its name, its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from probly_torch.port._functions import OPERATIONS
from probly_torch.port._source import Make, Option, Value, make, sized
from probly_torch.port._translate import Missing, Scope, UnknownError, dtype_source

LAYERS: dict[type[nn.Module], Callable[..., Any]] = {}
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}


def layer(*types: type[nn.Module], layout: str = "torch") -> Callable[..., Any]:
    """Registers how a layer with a twin in nnx is built; its input is in torch's layout, channels last, or either."""

    def register(constructor: Callable[[Any], Make]) -> Callable[[Any], Make]:
        def rule(s: Scope, module: Any, access: str, x: Value | None) -> Any:
            s.translator.made[id(module)] = _typed(constructor(module), module)
            if x is None:
                return None
            x = x if layout == "any" else x.to(layout == "last")
            if layout == "last" and x.example.ndim == 2 and not isinstance(module, _NORMS):
                raise UnknownError("an array without batch")
            return called(s, module, access, x, x.last)

        LAYERS.update(dict.fromkeys(types, rule))
        return constructor

    return register


def called(s: Scope, module: nn.Module, access: str, x: Value, last: bool) -> Value:
    """Writes a call of a layer of one input and output."""
    result = s.value(f"{access}({x})", last)
    s.translator.calls.append((module, (x,), {}, result))
    return result


def _typed(made: Make, module: nn.Module) -> Make:
    """Adds the dtype of weights where it is another than float32."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float32:
        return made
    i = len(made.items) - (made.items[-1:] == ("rngs=rngs",))
    return replace(made, items=(*made.items[:i], Option("param_dtype", dtype_source(dtype)), *made.items[i:]))


def _flags(**flags: bool) -> dict[str, bool]:
    """Returns the switches that are off."""
    return {name: value for name, value in flags.items() if not value}


@layer(nn.Linear)
def _linear(m: nn.Linear) -> Make:
    sizes = ("in_features", m.in_features), ("out_features", m.out_features)
    return sized("nnx.Linear", *sizes, **_flags(use_bias=m.bias is not None))


@layer(nn.Embedding)
def _embedding(m: nn.Embedding) -> Make:
    if m.max_norm is not None:
        raise UnknownError("max_norm, for which the forward changes weights")
    return sized("nnx.Embed", ("num_embeddings", m.num_embeddings), ("features", m.embedding_dim))


def _conv(s: Scope, m: Any, access: str, x: Value | None) -> Any:
    kernel, dilation = m.kernel_size, m.dilation
    if m.padding == "same" or m.padding == "valid":
        amounts = None
        padding = f'"{m.padding.upper()}"'
    else:
        amounts = m.padding
        padding = repr(tuple((p, p) for p in m.padding)) if any(m.padding) else '"VALID"'
    words = {"zeros": "", "circular": "CIRCULAR", "reflect": "REFLECT", "replicate": "-"}
    if m.padding_mode != "zeros" and (amounts is None or any(amounts)):
        halves = tuple(d * (k - 1) / 2 for k, d in zip(kernel, dilation, strict=True))
        if words[m.padding_mode] == "-" or not (m.padding == "same" or amounts == halves):
            raise UnknownError(f"padding_mode={m.padding_mode!r} of {m.padding!r}; write F.pad before the convolution")
        padding = f'"{words[m.padding_mode]}"'
    options = {"kernel_size": kernel, "strides": m.stride, "padding": padding}
    if any(d != 1 for d in dilation):
        options["kernel_dilation"] = dilation
    if m.groups != 1:
        options["feature_group_count"] = m.groups
    sizes = ("in_features", m.in_channels), ("out_features", m.out_channels)
    made = sized("nnx.Conv", *sizes, **options, **_flags(use_bias=m.bias is not None))
    return _called(s, m, access, x, made)


def _conv_transpose(s: Scope, m: Any, access: str, x: Value | None) -> Any:
    if m.groups != 1:
        raise UnknownError("groups > 1, which nnx.ConvTranspose has not")
    pairs = []
    for k, p, out, d in zip(m.kernel_size, m.padding, m.output_padding, m.dilation, strict=True):
        low = d * (k - 1) - p
        pairs.append((low, low + out))
    options = {"kernel_size": m.kernel_size, "strides": m.stride, "padding": tuple(pairs)}
    if any(d != 1 for d in m.dilation):
        options["kernel_dilation"] = m.dilation
    sizes = ("in_features", m.in_channels), ("out_features", m.out_channels)
    flags = _flags(use_bias=m.bias is not None)
    return _called(s, m, access, x, sized("nnx.ConvTranspose", *sizes, **options, **flags, transpose_kernel=True))


def _called(s: Scope, m: nn.Module, access: str, x: Value | None, made: Make) -> Any:
    s.translator.made[id(m)] = _typed(made, m)
    if x is None:
        return None
    if x.example.ndim < 3 or len(m.kernel_size) != x.example.ndim - 2:  # type: ignore[arg-type]
        raise UnknownError(f"an array of {x.example.ndim} axes")
    return called(s, m, access, x.to(True), True)


LAYERS |= dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv)
LAYERS |= dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv_transpose)


_NORMS = nn.modules.batchnorm._BatchNorm


@layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, layout="last")
def _batch_norm(m: Any) -> Make:
    if not m.track_running_stats or m.momentum is None:
        raise UnknownError("track_running_stats=False, or momentum=None")
    options = {"momentum": round(1 - m.momentum, 12), "epsilon": m.eps, **_flags(use_bias=m.affine, use_scale=m.affine)}
    return sized("nnx.BatchNorm", ("num_features", m.num_features), **options, use_fast_variance=False)


@layer(nn.LayerNorm)
def _layer_norm(m: nn.LayerNorm) -> Make:
    scale, bias = m.elementwise_affine, m.elementwise_affine and m.bias is not None
    options: dict[str, Any] = {"epsilon": m.eps, **_flags(use_bias=bias, use_scale=scale)}
    size = 1
    for n in m.normalized_shape:
        size *= n
    if len(m.normalized_shape) > 1:
        axes = tuple(range(-len(m.normalized_shape), 0))
        options |= {"reduction_axes": axes, "feature_axes": axes}
        shape = f'{{"torch_shape": {m.normalized_shape}, "torch_axes": {axes}}}'  # for files of weights
        options |= {f"{name}_metadata": shape for name, used in (("scale", scale), ("bias", bias)) if used}
    return sized("nnx.LayerNorm", ("num_features", size), **options, use_fast_variance=False)


@layer(nn.GroupNorm, layout="last")
def _group_norm(m: nn.GroupNorm) -> Make:
    options = {"num_groups": m.num_groups, "epsilon": m.eps, **_flags(use_bias=m.affine, use_scale=m.affine)}
    return sized("nnx.GroupNorm", ("num_features", m.num_channels), **options, use_fast_variance=False)


@layer(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, layout="last")
def _instance_norm(m: Any) -> Make:
    if m.track_running_stats:
        raise UnknownError("track_running_stats=True")
    options = {"epsilon": m.eps, **_flags(use_bias=m.affine, use_scale=m.affine)}
    return sized("nnx.InstanceNorm", ("num_features", m.num_features), **options, use_fast_variance=False)


@layer(nn.RMSNorm)
def _rms_norm(m: nn.RMSNorm) -> Make:
    if len(m.normalized_shape) != 1:
        raise UnknownError("several axes")
    epsilon = m.eps
    if epsilon is None:
        epsilon = torch.finfo(m.weight.dtype if m.weight is not None else torch.float32).eps
    flags = _flags(use_scale=m.elementwise_affine)
    return sized("nnx.RMSNorm", ("num_features", m.normalized_shape[0]), epsilon=epsilon, **flags)


def _prelu(s: Scope, m: nn.PReLU, access: str, x: Value | None) -> Any:
    if m.num_parameters == 1:
        made = make("nnx.PReLU", rngs=False)
    else:
        made = sized(s.helper("PReLU"), ("num_parameters", m.num_parameters), rngs=False)
    s.translator.made[id(m)] = _typed(made, m)
    if x is None:
        return None
    x = x if m.num_parameters == 1 else x.to(True)
    return called(s, m, access, x, x.last)


LAYERS[nn.PReLU] = _prelu


@layer(nn.Dropout, layout="any")
def _dropout(m: nn.Dropout) -> Make:
    return sized("nnx.Dropout", ("rate", m.p))


@layer(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, layout="last")
def _channel_dropout(m: Any) -> Make:
    rank = {nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}[type(m)]
    axes = tuple(range(1, rank + 1))
    return sized("nnx.Dropout", ("rate", m.p), broadcast_dims=axes)


# -- attention: torch's encoder and decoder layers are written out, from plain forwards


def _attention(
    s: Scope,
    m: nn.MultiheadAttention,
    access: str,
    query: Value | None,
    key: Value | None = None,
    value: Value | None = None,
    key_padding_mask: Value | None = None,
    need_weights: bool = True,
    attn_mask: Value | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    if m.bias_k is not None or m.add_zero_attn or m.kdim != m.vdim:
        raise UnknownError("add_bias_kv, add_zero_attn, or kdim != vdim")
    options: dict[str, Any] = {"dropout_rate": m.dropout} if m.dropout else {}
    options |= _flags(use_bias=m.in_proj_bias is not None)
    if m.kdim != m.embed_dim:
        options["in_kv_features"] = m.kdim
    if m.dropout:
        options["broadcast_dropout"] = False
    sizes = ("num_heads", m.num_heads), ("in_features", m.embed_dim)
    made = sized("nnx.MultiHeadAttention", *sizes, **options, attention_fn=s.helper("attention"), decode=False)
    s.translator.made[id(m)] = _typed(made, m)
    if query is None:
        return None
    assert key is not None
    assert value is not None
    if query.example.ndim != 3:
        raise UnknownError("an array without batch")
    inputs = [_batch_first(v, m.batch_first).text for v in (query, key, value)]
    if inputs[0] == inputs[1] == inputs[2]:
        inputs = inputs[:1]
    elif inputs[1] == inputs[2]:
        inputs = inputs[:2]
    masks = []
    if attn_mask is not None:
        masks.append((_mask(attn_mask, m), attn_mask))
    if key_padding_mask is not None:
        sign = "~" if key_padding_mask.example.dtype == torch.bool else ""
        masks.append((f"{sign}{key_padding_mask.atom}[:, None, None]", key_padding_mask))
    if masks:
        kinds = {v.example.dtype == torch.bool for _, v in masks}
        if len(kinds) > 1:
            raise UnknownError("one mask of floats and one of booleans")
        inputs.append(f"mask={(' & ' if kinds == {True} else ' + ').join(text for text, _ in masks)}")
    outputs, weights = s.example
    call = f"{access}({', '.join(inputs)})"
    if not m.batch_first:
        call += ".swapaxes(0, 1)"
    origin = s.origin
    result = s.body.assign(s.value(call, example=outputs), None, origin.names[0] if origin.names else None)
    return result, None if weights is None else Missing("the attention weights, which nnx does not return")


def _mask(mask: Value, m: nn.MultiheadAttention) -> str:
    sign = "~" if mask.example.dtype == torch.bool else ""
    if mask.example.ndim == 2:
        return f"{sign}{mask.atom}[None, None]"
    return f"{sign}{mask.atom}.reshape(-1, {m.num_heads}, *{mask.atom}.shape[1:])"


def _batch_first(x: Value, batch_first: bool) -> Value:
    x = x.to(False)
    return x if batch_first else replace(x, text=f"{x.atom}.swapaxes(0, 1)")


LAYERS[nn.MultiheadAttention] = _attention


def _encoder_layer(
    self: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    x = src
    if self.norm_first:
        h = self.norm1(x)
        h, _ = self.self_attn(h, h, h, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False)
        x = x + self.dropout1(h)
        h = self.linear2(self.dropout(self.activation(self.linear1(self.norm2(x)))))
        return x + self.dropout2(h)
    h, _ = self.self_attn(x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False)
    x = self.norm1(x + self.dropout1(h))
    h = self.linear2(self.dropout(self.activation(self.linear1(x))))
    return self.norm2(x + self.dropout2(h))


def _encoder(
    self: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
) -> Any:
    for layer in self.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if self.norm is None else self.norm(src)


FORWARDS[nn.TransformerEncoderLayer] = _encoder_layer
FORWARDS[nn.TransformerEncoder] = _encoder


# -- recurrence: torch's layers and directions are nnx.RNNs of one cell each


def _recurrent(s: Scope, m: Any, access: str, x: Value | None, hx: Any = None) -> Any:
    lstm = isinstance(m, nn.LSTM)
    if m.proj_size or not m.bias:
        raise UnknownError("proj_size, or bias=False")
    made = _recurrent_layers(s, m)
    s.translator.made[id(m)] = made
    if x is None:
        return None
    if x.example.ndim != 3:
        raise UnknownError("an array without batch")
    many = m.num_layers > 1 or m.bidirectional
    given = [x.to(False).text]
    if hx is not None:
        parts = [p.to(False).atom + ("" if many else "[0]") for p in (hx[::-1] if lstm else (hx,))]
        first = ", ".join(parts)
        given.append(f"initial_carry=({first})" if lstm else f"initial_carry={first}")
    if m.num_layers == 1:
        given.append("return_carry=True")
    out, last = s.example
    names = dict(zip(("out", "h", "c"), s.origin.names, strict=False))
    call = f"{access}({', '.join(given)})"
    single = m.num_layers == 1 and not m.bidirectional
    if m.num_layers == 1 and m.bidirectional:
        pick = s.several(call, (False, False), (last, out), names=(None, names.get("out")))
        carry = pick[0].text
        states = [
            s.value(f"jnp.stack([{carry}[0]{end}, {carry}[1]{end}])", example=example)
            for end, example in zip(("[1]", "[0]") if lstm else ("",), last if lstm else (last,), strict=True)
        ]
        return pick[1], tuple(states) if lstm else states[0]
    if lstm:
        wishes = (names.get("c"), names.get("h"), names.get("out"))
        (c, h), y = s.several(call, ((False, False), False), ((last[1], last[0]), out), names=wishes)
        states = [h, c]
    else:
        h, y = s.several(call, (False, False), (last, out), names=(names.get("h"), names.get("out")))
        states = [h]
    if single:
        states = [replace(each, text=f"{each}[None]") for each in states]
    return y, tuple(states) if lstm else states[0]


def _recurrent_layers(s: Scope, m: Any) -> Make:
    options: dict[str, Any] = {} if m.batch_first else {"time_major": True}
    layers = []
    for i in range(m.num_layers):
        size = m.input_size if i == 0 else m.hidden_size * (1 + m.bidirectional)
        sizes = ("in_features", size), ("hidden_features", m.hidden_size)
        if isinstance(m, nn.LSTM):
            cell = sized("nnx.OptimizedLSTMCell", *sizes)
        elif isinstance(m, nn.GRU):
            cell = sized(s.helper("GRUCell"), *sizes)
        else:
            cell = sized("nnx.SimpleCell", *sizes, activation_fn=f"nnx.{m.nonlinearity}", dtype=None)
        rnn = make("nnx.RNN", _typed(cell, m), **options)
        layers.append(make("nnx.Bidirectional", rnn, rnn, **options) if m.bidirectional else rnn)
    if m.num_layers == 1:
        return layers[0]
    dropout = (Make("dropout=", (sized("nnx.Dropout", ("rate", m.dropout)),), ""),) if m.dropout else ()
    s.translator.stacked.append(m)
    return make(s.helper("Stack"), *layers, *dropout, rngs=False)


LAYERS |= dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _recurrent)


# -- layers that are functions in the source


def _function(name: str, *options: str, **renamed: str) -> Callable[..., Any]:
    """Makes the rule of a layer without weights: the operation, with these attributes of the layer as its options."""

    def rule(s: Scope, m: Any, access: str, x: Value | None) -> Any:
        if x is None:
            return None
        given = {option: getattr(m, option) for option in options}
        given |= {option: getattr(m, attribute) for option, attribute in renamed.items()}
        return OPERATIONS[name](s, x, **given)

    return rule


_POOL = ("kernel_size", "stride", "padding")
LAYERS |= {
    nn.Identity: lambda s, m, access, x: x,
    nn.ReLU: _function("relu"),
    nn.ReLU6: _function("relu6"),
    nn.Sigmoid: _function("sigmoid"),
    nn.Tanh: _function("tanh"),
    nn.SiLU: _function("silu"),
    nn.Hardswish: _function("hardswish"),
    nn.Hardsigmoid: _function("hardsigmoid"),
    nn.Softsign: _function("softsign"),
    nn.LogSigmoid: _function("logsigmoid"),
    nn.SELU: _function("selu"),
    nn.Mish: _function("mish"),
    nn.GELU: _function("gelu", "approximate"),
    nn.ELU: _function("elu", "alpha"),
    nn.CELU: _function("celu", "alpha"),
    nn.LeakyReLU: _function("leaky_relu", "negative_slope"),
    nn.Hardtanh: _function("hardtanh", "min_val", "max_val"),
    nn.Softplus: _function("softplus", "beta", "threshold"),
    nn.Threshold: _function("threshold", "threshold", "value"),
    nn.Hardshrink: _function("hardshrink", "lambd"),
    nn.Softshrink: _function("softshrink", "lambd"),
    nn.Tanhshrink: _function("tanhshrink"),
    nn.GLU: _function("glu", "dim"),
    nn.Softmax: _function("softmax", "dim"),
    nn.LogSoftmax: _function("log_softmax", "dim"),
    nn.Flatten: _function("flatten", "start_dim", "end_dim"),
    nn.Unflatten: _function("unflatten", "dim", sizes="unflattened_size"),
    nn.Upsample: _function("interpolate", "size", "scale_factor", "mode", "align_corners"),
    nn.UpsamplingNearest2d: _function("interpolate", "size", "scale_factor", "mode"),
    nn.UpsamplingBilinear2d: _function("interpolate", "size", "scale_factor", "mode", "align_corners"),
    nn.PixelShuffle: _function("pixel_shuffle", "upscale_factor"),
    **{
        getattr(nn, f"MaxPool{rank}d"): _function(f"max_pool{rank}d", *_POOL, "dilation", "ceil_mode", "return_indices")
        for rank in (1, 2, 3)
    },
    nn.AvgPool1d: _function("avg_pool1d", *_POOL, "ceil_mode", "count_include_pad"),
    **{
        getattr(nn, f"AvgPool{rank}d"): _function(
            f"avg_pool{rank}d", *_POOL, "ceil_mode", "count_include_pad", "divisor_override"
        )
        for rank in (2, 3)
    },
    **{
        getattr(nn, f"Adaptive{kind}Pool{rank}d"): _function(f"adaptive_{kind.lower()}_pool{rank}d", "output_size")
        for kind in ("Max", "Avg")
        for rank in (1, 2, 3)
    },
}


def _pad(mode: str) -> Callable[..., Any]:
    def rule(s: Scope, m: Any, access: str, x: Value | None) -> Any:
        return None if x is None else OPERATIONS["pad"](s, x, m.padding, mode, getattr(m, "value", None))

    return rule


for _rank in (1, 2, 3):
    for _kind, _mode in {
        "Zero": "constant",
        "Constant": "constant",
        "Reflection": "reflect",
        "Replication": "replicate",
        "Circular": "circular",
    }.items():
        LAYERS[getattr(nn, f"{_kind}Pad{_rank}d")] = _pad(_mode)
