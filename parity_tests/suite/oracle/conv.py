"""The oracle of convolutions: float64 NumPy, one member, row, position and tap of the kernel at a time.

It shares no code with either package. Arrays have torch's layouts: channels on axis 1. Like the functions of
`oracle.py`, each returns its outputs and, for a cotangent `g`, the gradients by its inputs.
"""

from __future__ import annotations

import numpy as np


def batch_ensemble_conv(g, x, weight, r, s, bias=None, *, stride, padding, dilation, groups=1, padding_mode="zeros"):
    """Computes member i as a convolution with the weight W[o, j] * s[i, o] * r[i, c].

    Padding is a (low, high) for each axis.
    """
    num_members, batch = len(r), len(x) // len(r)
    sizes, taps = x.shape[2:], weight.shape[2:]
    out_sizes = [
        (sizes[a] + sum(padding[a]) - dilation[a] * (taps[a] - 1) - 1) // stride[a] + 1 for a in range(len(sizes))
    ]
    y = np.zeros((len(x), len(weight), *out_sizes))
    grads = _zeros(x, weight, r, s, bias)
    for i in range(num_members):
        scales, in_channels = _scales(r[i], s[i], groups)
        member_weight = weight * scales[(..., *[None] * len(taps))]
        grad_member_weight = np.zeros(weight.shape)
        for row in range(i * batch, (i + 1) * batch):
            for position in np.ndindex(*out_sizes):
                to = (row, slice(None), *position)
                if bias is not None:
                    y[to] += bias[i]
                    grads["bias"][i] += g[to]
                for tap in np.ndindex(*taps):
                    source = [
                        _source(position[a] * stride[a] + tap[a] * dilation[a] - padding[a][0], sizes[a], padding_mode)
                        for a in range(len(sizes))
                    ]
                    if None in source:  # a zero of the padding
                        continue
                    for o in range(len(weight)):
                        at, own = (row, in_channels[o], *source), (o, slice(None), *tap)
                        y[(row, o, *position)] += member_weight[own] @ x[at]
                        grad_member_weight[own] += g[(row, o, *position)] * x[at]
                        np.add.at(grads["x"], at, g[(row, o, *position)] * member_weight[own])
        _grads_of_member(grads, grad_member_weight, i, weight, r, s, in_channels)
    return y, grads


def batch_ensemble_conv_transpose(
    g, x, weight, r, s, bias=None, *, stride, padding, dilation, output_padding, groups=1
):
    """Computes member i, which spreads each input over the outputs by the weight W[c, o] * r[i, c] * s[i, o]."""
    num_members, batch = len(r), len(x) // len(r)
    sizes, taps = x.shape[2:], weight.shape[2:]
    out_sizes = [
        (sizes[a] - 1) * stride[a] - 2 * padding[a] + dilation[a] * (taps[a] - 1) + output_padding[a] + 1
        for a in range(len(sizes))
    ]
    by_output = _by_output(weight, groups)
    y = np.zeros((len(x), len(by_output), *out_sizes))
    grads = _zeros(x, by_output, r, s, bias)
    for i in range(num_members):
        scales, in_channels = _scales(r[i], s[i], groups)
        member_weight = by_output * scales[(..., *[None] * len(taps))]
        grad_member_weight = np.zeros(by_output.shape)
        for row in range(i * batch, (i + 1) * batch):
            if bias is not None:
                for position in np.ndindex(*out_sizes):
                    y[(row, slice(None), *position)] += bias[i]
                    grads["bias"][i] += g[(row, slice(None), *position)]
            for position in np.ndindex(*sizes):
                for tap in np.ndindex(*taps):
                    target = [position[a] * stride[a] + tap[a] * dilation[a] - padding[a] for a in range(len(sizes))]
                    if not all(0 <= target[a] < out_sizes[a] for a in range(len(sizes))):
                        continue
                    for o in range(len(by_output)):
                        at, own = (row, in_channels[o], *position), (o, slice(None), *tap)
                        y[(row, o, *target)] += member_weight[own] @ x[at]
                        grad_member_weight[own] += g[(row, o, *target)] * x[at]
                        np.add.at(grads["x"], at, g[(row, o, *target)] * member_weight[own])
        _grads_of_member(grads, grad_member_weight, i, by_output, r, s, in_channels)
    grads["weight"] = _by_input(grads["weight"], groups)
    return y, grads


def _zeros(x, weight, r, s, bias):
    arrays = {"x": x, "weight": weight, "r": r, "s": s} | ({} if bias is None else {"bias": bias})
    return {name: np.zeros(array.shape) for name, array in arrays.items()}


def _scales(r, s, groups):
    """Returns s[o] * r[c] for the input channels c that output channel o reads, and which channels these are."""
    in_each, out_each = len(r) // groups, len(s) // groups
    channels = [np.arange(in_each) + (o // out_each) * in_each for o in range(len(s))]
    return np.array([s[o] * r[channels[o]] for o in range(len(s))]), channels


def _source(index, size, mode):
    """Returns the index of the input that is read, or None for a zero."""
    if 0 <= index < size:
        return index
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    return None


def _grads_of_member(grads, grad_member_weight, i, weight, r, s, in_channels):
    for o in range(len(weight)):
        for j, c in enumerate(in_channels[o]):
            grads["weight"][o, j] += grad_member_weight[o, j] * s[i, o] * r[i, c]
            grads["r"][i, c] += (grad_member_weight[o, j] * weight[o, j]).sum() * s[i, o]
            grads["s"][i, o] += (grad_member_weight[o, j] * weight[o, j]).sum() * r[i, c]


def _by_output(weight, groups):
    """Rearranges (in, out / groups, ...) to (out, in / groups, ...), group by group."""
    return np.concatenate([group.swapaxes(0, 1) for group in np.split(weight, groups)])


def _by_input(weight, groups):
    return _by_output(weight, groups)
