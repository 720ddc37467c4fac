"""The oracle: every function and network again, in float64 NumPy, as loops over members and inputs.

It shares no code with either package and no cleverness with anybody. Weights have torch's layouts. Each
function returns its outputs and, for a cotangent `g` (the gradient of some loss by the outputs), the gradient
of that loss by each of its inputs.
"""

from __future__ import annotations

import math

import numpy as np


def batch_ensemble_linear(g, x, weight, r, s, bias=None):
    """Computes one row at a time: the weight of member i is W[o, j] * s[i, o] * r[i, j]."""
    num_members, batch = len(r), len(x) // len(r)
    out_features = weight.shape[0]
    y = np.zeros((*x.shape[:-1], out_features))
    grads = {name: np.zeros(v.shape) for name, v in (("x", x), ("weight", weight), ("r", r), ("s", s))}
    if bias is not None:
        grads["bias"] = np.zeros(bias.shape)
    for i in range(num_members):
        member_weight = weight * np.outer(s[i], r[i])
        for row in range(i * batch, (i + 1) * batch):
            for position in np.ndindex(*x.shape[1:-1]):
                at = (row, *position)
                y[at] = member_weight @ x[at]
                if bias is not None:
                    y[at] += bias[i]
                    grads["bias"][i] += g[at]
                outer = np.outer(g[at], x[at])
                grads["x"][at] = member_weight.T @ g[at]
                grads["weight"] += outer * np.outer(s[i], r[i])
                grads["r"][i] += (outer * weight * s[i][:, None]).sum(0)
                grads["s"][i] += (outer * weight * r[i]).sum(1)
    return y, grads


def tile_members(g, x, num_members):
    y = np.concatenate([x for _ in range(num_members)])
    return y, {"x": sum(g[i * len(x) : (i + 1) * len(x)] for i in range(num_members))}


def split_members(g, y, num_members):
    batch = len(y) // num_members
    out = np.stack([y[i * batch : (i + 1) * batch] for i in range(num_members)])
    return out, {"y": np.concatenate([g[i] for i in range(num_members)])}


def mlp(g, x, weights, biases):
    """Computes one network: linear, relu, linear, ...; weights and biases are lists."""
    hidden, inputs, before = x, [], []
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs.append(hidden)
        hidden = hidden @ weight.T + bias
        before.append(hidden)
        if layer < len(weights) - 1:
            hidden = np.maximum(hidden, 0.0)
    y = hidden
    grad_weights, grad_biases = [], []
    for layer in reversed(range(len(weights))):
        if layer < len(weights) - 1:
            g = g * (before[layer] > 0)
        grad_weights.insert(0, g.T @ inputs[layer])
        grad_biases.insert(0, g.sum(0))
        g = g @ weights[layer]
    return y, g, grad_weights, grad_biases


def ensemble_mlp(g, x, **parameters):
    """Computes a deep ensemble of networks. Parameters are `0.weight`, `0.bias`, ... stacked over members."""
    layers = sorted({int(name.split(".")[-2]) for name in parameters})
    prefix = next(iter(parameters)).rpartition(f"{layers[0]}.")[0]
    num_members = len(g)
    y, grad_x = np.zeros(g.shape), np.zeros(x.shape)
    grads = {name: np.zeros(value.shape) for name, value in parameters.items()}
    for i in range(num_members):
        own_x = x[i] if x.ndim == g.ndim else x
        weights = [parameters[f"{prefix}{n}.weight"][i] for n in layers]
        biases = [parameters[f"{prefix}{n}.bias"][i] for n in layers]
        y[i], member_grad_x, grad_weights, grad_biases = mlp(g[i], own_x, weights, biases)
        if x.ndim == g.ndim:
            grad_x[i] = member_grad_x
        else:
            grad_x += member_grad_x
        for n, grad_weight, grad_bias in zip(layers, grad_weights, grad_biases, strict=True):
            grads[f"{prefix}{n}.weight"][i] = grad_weight
            grads[f"{prefix}{n}.bias"][i] = grad_bias
    return y, {"x": grad_x, **grads}


def batch_ensemble_mlp(g, x, **parameters):
    """Computes a BatchEnsemble: each member is a network of its own, with the weights W * s_i r_i^T."""
    layers = sorted({int(name.split(".")[-2]) for name in parameters})
    prefix = next(iter(parameters)).rpartition(f"{layers[0]}.")[0]
    num_members = len(g)
    y, grad_x = np.zeros(g.shape), np.zeros(x.shape)
    grads = {name: np.zeros(value.shape) for name, value in parameters.items()}
    for i in range(num_members):
        own_x = x[i] if x.ndim == g.ndim else x
        weight, r, s, bias = (
            [parameters[f"{prefix}{n}.{name}"] for n in layers] for name in ("weight", "r", "s", "bias")
        )
        folded = [weight[n] * np.outer(s[n][i], r[n][i]) for n in range(len(layers))]
        y[i], member_grad_x, grad_weights, grad_biases = mlp(g[i], own_x, folded, [b[i] for b in bias])
        if x.ndim == g.ndim:
            grad_x[i] = member_grad_x
        else:
            grad_x += member_grad_x
        for n, layer in enumerate(layers):
            grads[f"{prefix}{layer}.weight"] += grad_weights[n] * np.outer(s[n][i], r[n][i])
            grads[f"{prefix}{layer}.r"][i] = (grad_weights[n] * weight[n] * s[n][i][:, None]).sum(0)
            grads[f"{prefix}{layer}.s"][i] = (grad_weights[n] * weight[n] * r[n][i]).sum(1)
            grads[f"{prefix}{layer}.bias"][i] = grad_biases[n]
    return y, {"x": grad_x, **grads}


def softmax(z):
    exponentials = [math.exp(v - max(z)) for v in z]
    return np.array([e / math.fsum(exponentials) for e in exponentials])


def entropy(p):
    return -math.fsum(v * math.log(v) for v in p if v > 0)


def softmax_backward(p, grad_p):
    return p * (grad_p - math.fsum(p * grad_p))


def log_mean_probs(g, logits):
    num_members, batch, _ = logits.shape
    y, grad = np.zeros(logits.shape[1:]), np.zeros(logits.shape)
    for b in range(batch):
        members = [softmax(logits[i, b]) for i in range(num_members)]
        mean = sum(members) / num_members
        y[b] = np.log(mean)
        for i in range(num_members):
            grad[i, b] = softmax_backward(members[i], g[b] / mean / num_members)
    return y, {"logits": grad}


def mean_probs(g, logits):
    num_members, batch, _ = logits.shape
    y, grad = np.zeros(logits.shape[1:]), np.zeros(logits.shape)
    for b in range(batch):
        members = [softmax(logits[i, b]) for i in range(num_members)]
        y[b] = sum(members) / num_members
        for i in range(num_members):
            grad[i, b] = softmax_backward(members[i], g[b] / num_members)
    return y, {"logits": grad}


def predictive_entropy(g, logits):
    num_members, batch, _ = logits.shape
    y, grad = np.zeros(batch), np.zeros(logits.shape)
    for b in range(batch):
        members = [softmax(logits[i, b]) for i in range(num_members)]
        mean = sum(members) / num_members
        y[b] = entropy(mean)
        for i in range(num_members):
            grad[i, b] = softmax_backward(members[i], -g[b] * (np.log(mean) + 1) / num_members)
    return y, {"logits": grad}


def expected_entropy(g, logits):
    num_members, batch, _ = logits.shape
    y, grad = np.zeros(batch), np.zeros(logits.shape)
    for b in range(batch):
        members = [softmax(logits[i, b]) for i in range(num_members)]
        y[b] = sum(entropy(p) for p in members) / num_members
        for i, p in enumerate(members):
            grad[i, b] = softmax_backward(p, -g[b] * (np.log(p) + 1) / num_members)
    return y, {"logits": grad}


def mutual_information(g, logits):
    total, grad_total = predictive_entropy(g, logits)
    aleatoric, grad_aleatoric = expected_entropy(g, logits)
    return total - aleatoric, {"logits": grad_total["logits"] - grad_aleatoric["logits"]}


def disagreement(logits):
    num_members, batch, _ = logits.shape
    y = np.zeros(batch)
    for b in range(batch):
        classes = [int(np.argmax(logits[i, b])) for i in range(num_members)]
        pairs = [(i, j) for i in range(num_members) for j in range(num_members) if i != j]
        y[b] = sum(classes[i] != classes[j] for i, j in pairs) / len(pairs) if pairs else 0.0
    return y


def pairwise_kl(g, logits, unit="nats"):
    num_members, batch, _ = logits.shape
    y, grad = np.zeros((num_members, num_members, batch)), np.zeros(logits.shape)
    nats = 1 / math.log(2) if unit == "bits" else 1.0
    for b in range(batch):
        members = [softmax(logits[i, b]) for i in range(num_members)]
        for i in range(num_members):
            for j in range(num_members):
                p, q = members[i], members[j]
                y[i, j, b] = nats * math.fsum(p * np.log(p / q))
                grad[i, b] += softmax_backward(p, nats * g[i, j, b] * np.log(p / q))
                grad[j, b] += softmax_backward(q, -nats * g[i, j, b] * p / q)
    return y, {"logits": grad}


def classification_uncertainty(g, logits, unit="nats"):
    """Returns mean probabilities, total, aleatoric and epistemic on the last axis."""
    num_classes, nats = logits.shape[-1], 1 / math.log(2) if unit == "bits" else 1.0
    mean, by_mean = mean_probs(g[:, :num_classes], logits)
    aleatoric, by_aleatoric = expected_entropy(nats * (g[:, num_classes] + g[:, num_classes + 1]), logits)
    epistemic, by_epistemic = mutual_information(nats * (g[:, num_classes] + g[:, num_classes + 2]), logits)
    parts = [nats * each for each in (aleatoric + epistemic, aleatoric, epistemic)]
    grad = by_mean["logits"] + by_aleatoric["logits"] + by_epistemic["logits"]
    return np.concatenate([mean, np.stack(parts, -1)], -1), {"logits": grad}


def regression_uncertainty(g, mean, variance):
    """Returns mean, total, aleatoric and epistemic on the first axis."""
    num_members = len(mean)
    center = sum(mean) / num_members
    aleatoric = sum(variance) / num_members
    epistemic = sum((m - center) ** 2 for m in mean) / num_members
    grads = {"mean": np.zeros(mean.shape), "variance": np.zeros(variance.shape)}
    for i in range(num_members):
        grads["mean"][i] = (g[0] + 2 * (g[1] + g[3]) * (mean[i] - center)) / num_members
        grads["variance"][i] = (g[1] + g[2]) / num_members
    return np.stack([center, aleatoric + epistemic, aleatoric, epistemic]), grads
