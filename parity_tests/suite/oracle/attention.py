"""The oracle of attention: float64 NumPy, one member, one row, one head at a time. It shares no code with the packages.

Weights have torch's names and layouts, see BatchEnsembleMultiHeadAttention.
"""

from __future__ import annotations

import math

import numpy as np


def batch_ensemble_attention(g, query, key, value, num_heads, added, **weights):
    """Returns outputs, attention weights (rows, heads, L, S) and gradients.

    `added` to scores has the shape of the weights.
    """
    num_members = len(weights["q_r"])
    batch, features = len(query) // num_members, weights["q_s"].shape[1]
    size = features // num_heads
    packed = "in_proj_weight" in weights
    if packed:
        w = weights["in_proj_weight"]
        shared = {"q": w[:features], "k": w[features : 2 * features], "v": w[2 * features :]}
    else:
        shared = {name: weights[f"{name}_proj_weight"] for name in "qkv"}
    inputs = {"q": query, "k": key, "v": value}

    output = np.zeros((*query.shape[:2], features))
    attention = np.zeros((len(query), num_heads, query.shape[1], key.shape[1]))
    grads = {name: np.zeros(v.shape) for name, v in {"query": query, "key": key, "value": value, **weights}.items()}
    for i in range(num_members):
        folded = {p: shared[p] * np.outer(weights[f"{p}_s"][i], weights[f"{p}_r"][i]) for p in "qkv"}
        folded_out = weights["out_proj.weight"] * np.outer(weights["out_proj.s"][i], weights["out_proj.r"][i])
        folded_grads = {p: np.zeros(folded[p].shape) for p in "qkv"}
        folded_out_grad = np.zeros(folded_out.shape)
        for row in range(i * batch, (i + 1) * batch):
            projected = {}
            for n, p in enumerate("qkv"):
                projected[p] = inputs[p][row] @ folded[p].T
                if "in_proj_bias" in weights:
                    projected[p] = projected[p] + weights["in_proj_bias"][i, n * features : (n + 1) * features]
            context = np.zeros((query.shape[1], features))
            for head in range(num_heads):
                at = slice(head * size, (head + 1) * size)
                q, k, v = (projected[p][:, at] for p in "qkv")
                for step in range(query.shape[1]):
                    scores = k @ q[step] / math.sqrt(size) + added[row, head, step]
                    exponentials = np.array([math.exp(score - max(scores)) for score in scores])
                    attention[row, head, step] = exponentials / math.fsum(exponentials)
                context[:, at] = attention[row, head] @ v
            output[row] = context @ folded_out.T
            if "out_proj.bias" in weights:
                output[row] += weights["out_proj.bias"][i]
                grads["out_proj.bias"][i] += g[row].sum(0)

            folded_out_grad += g[row].T @ context
            grad_context = g[row] @ folded_out
            grad_projected = {p: np.zeros(projected[p].shape) for p in "qkv"}
            for head in range(num_heads):
                at = slice(head * size, (head + 1) * size)
                q, k, v = (projected[p][:, at] for p in "qkv")
                p = attention[row, head]
                grad_p = grad_context[:, at] @ v.T
                grad_projected["v"][:, at] = p.T @ grad_context[:, at]
                grad_scores = p * (grad_p - (p * grad_p).sum(1, keepdims=True)) / math.sqrt(size)
                grad_projected["q"][:, at] = grad_scores @ k
                grad_projected["k"][:, at] = grad_scores.T @ q
            for n, (p, name) in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
                grads[name][row] = grad_projected[p] @ folded[p]
                folded_grads[p] += grad_projected[p].T @ inputs[p][row]
                if "in_proj_bias" in weights:
                    grads["in_proj_bias"][i, n * features : (n + 1) * features] += grad_projected[p].sum(0)
        unfold = [
            (p, folded_grads[p], shared[p], f"{p}_r", f"{p}_s", "in_proj_weight" if packed else f"{p}_proj_weight")
            for p in "qkv"
        ]
        unfold.append(
            ("out", folded_out_grad, weights["out_proj.weight"], "out_proj.r", "out_proj.s", "out_proj.weight")
        )
        for n, (p, grad, weight, r, s, name) in enumerate(unfold):
            grads[r][i] = (grad * weight * weights[s][i][:, None]).sum(0)
            grads[s][i] = (grad * weight * weights[r][i]).sum(1)
            rows = slice(n * features, (n + 1) * features) if packed and p != "out" else slice(None)
            grads[name][rows] += grad * np.outer(weights[s][i], weights[r][i])
    return output, attention, grads
