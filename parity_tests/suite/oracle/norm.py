"""The oracle of embeddings and normalisations: loops over members in float64; see oracle.py. Layouts are torch's."""

from __future__ import annotations

import numpy as np


def embed(g, x, weight, r, s):
    """Computes one token at a time: row t of member i's table is W[t] * r[i, t] * s[i]."""
    batch = len(x) // len(r)
    y = np.zeros((*x.shape, weight.shape[1]))
    grads = {name: np.zeros(v.shape) for name, v in (("weight", weight), ("r", r), ("s", s))}
    for i in range(len(r)):
        for row in range(i * batch, (i + 1) * batch):
            for position in np.ndindex(*x.shape[1:]):
                at = (row, *position)
                t = x[at]
                y[at] = weight[t] * r[i, t] * s[i]
                grads["weight"][t] += g[at] * r[i, t] * s[i]
                grads["r"][i, t] += np.sum(g[at] * weight[t] * s[i])
                grads["s"][i] += g[at] * weight[t] * r[i, t]
    return y, grads


def attend(g, x, weight, r, s):
    """Computes one query at a time: its inner products with the rows of member i's table."""
    batch = len(x) // len(r)
    y = np.zeros((*x.shape[:-1], len(weight)))
    grads = {name: np.zeros(v.shape) for name, v in (("x", x), ("weight", weight), ("r", r), ("s", s))}
    for i in range(len(r)):
        table = weight * np.outer(r[i], s[i])
        for row in range(i * batch, (i + 1) * batch):
            for position in np.ndindex(*x.shape[1:-1]):
                at = (row, *position)
                y[at] = table @ x[at]
                grads["x"][at] = table.T @ g[at]
                grad_table = np.outer(g[at], x[at])
                grads["weight"] += grad_table * np.outer(r[i], s[i])
                grads["r"][i] += (grad_table * weight * s[i]).sum(1)
                grads["s"][i] += (grad_table * weight * r[i][:, None]).sum(0)
    return y, grads


def standardize(g, x, eps):
    """Scales all values of x to mean 0 and variance 1, and returns the gradient by x."""
    mean = x.sum() / x.size
    var = ((x - mean) ** 2).sum() / x.size
    y = (x - mean) / np.sqrt(var + eps)
    return y, (g - g.sum() / x.size - y * (g * y).sum() / x.size) / np.sqrt(var + eps)


def _start(x, weight, bias):
    grads = {"x": np.zeros(x.shape), "weight": np.zeros(weight.shape), "bias": np.zeros(bias.shape)}
    return np.zeros(x.shape), grads


def batch_norm(g, x, weight, bias, eps, mean=None, var=None):
    """Computes one channel of one member at a time, with running statistics where they are given."""
    y, grads = _start(x, weight, bias)
    batch = len(x) // len(weight)
    for i in range(len(weight)):
        rows = slice(i * batch, (i + 1) * batch)
        for c in range(x.shape[1]):
            gc = g[rows, c] * weight[i, c]
            if mean is None:
                z, grads["x"][rows, c] = standardize(gc, x[rows, c], eps)
            else:
                z = (x[rows, c] - mean[i, c]) / np.sqrt(var[i, c] + eps)
                grads["x"][rows, c] = gc / np.sqrt(var[i, c] + eps)
            y[rows, c] = z * weight[i, c] + bias[i, c]
            grads["weight"][i, c] = (g[rows, c] * z).sum()
            grads["bias"][i, c] = g[rows, c].sum()
    return y, grads


def running_statistics(x, mean, var, momentum, unbiased):
    """Returns the statistics after one batch. torch tracks the unbiased variance, Flax the biased one."""
    mean, var = mean.copy(), var.copy()
    batch = len(x) // len(mean)
    for i in range(len(mean)):
        for c in range(x.shape[1]):
            values = x[i * batch : (i + 1) * batch, c]
            m = values.sum() / values.size
            v = ((values - m) ** 2).sum() / (values.size - 1 if unbiased else values.size)
            mean[i, c] = (1 - momentum) * mean[i, c] + momentum * m
            var[i, c] = (1 - momentum) * var[i, c] + momentum * v
    return mean, var


def layer_norm(g, x, weight, bias, eps):
    """Computes one position at a time. The axes of a member's weight are the last ones."""
    y, grads = _start(x, weight, bias)
    batch = len(x) // len(weight)
    for i in range(len(weight)):
        for row in range(i * batch, (i + 1) * batch):
            for position in np.ndindex(*x.shape[1 : x.ndim - weight.ndim + 1]):
                at = (row, *position)
                z, grads["x"][at] = standardize(g[at] * weight[i], x[at], eps)
                y[at] = z * weight[i] + bias[i]
                grads["weight"][i] += g[at] * z
                grads["bias"][i] += g[at]
    return y, grads


def group_norm(g, x, weight, bias, eps, groups):
    """Computes one group of channels of one row at a time."""
    y, grads = _start(x, weight, bias)
    batch, size = len(x) // len(weight), x.shape[1] // groups
    for i in range(len(weight)):
        for row in range(i * batch, (i + 1) * batch):
            for group in range(groups):
                channels = slice(group * size, (group + 1) * size)
                w, b = (v[i, channels].reshape(size, *[1] * (x.ndim - 2)) for v in (weight, bias))
                z, grads["x"][row, channels] = standardize(g[row, channels] * w, x[row, channels], eps)
                y[row, channels] = z * w + b
                for n in range(size):
                    grads["weight"][i, group * size + n] += (g[row, group * size + n] * z[n]).sum()
                    grads["bias"][i, group * size + n] += g[row, group * size + n].sum()
    return y, grads
