"""The oracle's losses: float64 NumPy loops over members and inputs, each with the gradients of its inputs."""

from __future__ import annotations

import math

import numpy as np

from parity_tests.suite.oracle.members import softmax, softmax_backward


def _targets(labels, num_classes, weight, label_smoothing, ignore_index):
    """Returns each input's factors for the log-probabilities of each class, so that the sum is the mean.

    The second result is 0. It is NaN, to be added to the mean, where every label is ignored.
    """
    weight = np.ones(num_classes) if weight is None else np.array(weight)
    targets, total = np.zeros((len(labels), num_classes)), 0.0
    for b, label in enumerate(labels):
        if label != ignore_index:
            targets[b] = label_smoothing * weight / num_classes
            targets[b, label] += (1 - label_smoothing) * weight[label]
            total += weight[label]
    return (targets / total, 0.0) if total else (targets, math.nan)


def member_cross_entropy(g, logits, labels, weight=None, label_smoothing=0.0, ignore_index=-100):
    num_members, batch, num_classes = logits.shape
    total, grad = 0.0, np.zeros(logits.shape)
    for i in range(num_members):
        own = labels[i] if labels.ndim == 2 else labels
        targets, nothing = _targets(own, num_classes, weight, label_smoothing, ignore_index)
        total += nothing
        for b in range(batch):
            p = softmax(logits[i, b])
            total -= math.fsum(targets[b] * np.log(p)) / num_members
            grad[i, b] = g * (p * targets[b].sum() - targets[b]) / num_members
    return np.array(total), {"logits": grad}


def mixture_cross_entropy(g, logits, labels, weight=None, label_smoothing=0.0, ignore_index=-100):
    num_members, batch, num_classes = logits.shape
    grad = np.zeros(logits.shape)
    targets, total = _targets(labels, num_classes, weight, label_smoothing, ignore_index)
    for b in range(batch):
        members = [softmax(logits[i, b]) for i in range(num_members)]
        mean = sum(members) / num_members
        total -= math.fsum(targets[b] * np.log(mean))
        for i in range(num_members):
            grad[i, b] = softmax_backward(members[i], -g * targets[b] / mean / num_members)
    return np.array(total), {"logits": grad}


def member_losses(g, logits, labels):
    """Computes the cross-entropy of one network."""
    y, grad = np.zeros(len(logits)), np.zeros(logits.shape)
    for i in range(len(logits)):
        own = labels[i] if labels.ndim == 2 else labels
        y[i], by_own = member_cross_entropy(g[i], logits[i : i + 1], own)
        grad[i] = by_own["logits"][0]
    return y, {"logits": grad}


def member_brier(g, logits, labels):
    num_members, batch, num_classes = logits.shape
    total, grad = 0.0, np.zeros(logits.shape)
    for i in range(num_members):
        for b in range(batch):
            p = softmax(logits[i, b])
            target = np.eye(num_classes)[labels[i, b] if labels.ndim == 2 else labels[b]]
            total += math.fsum((p - target) ** 2) / (num_members * batch)
            grad[i, b] = softmax_backward(p, g * 2 * (p - target) / (num_members * batch))
    return np.array(total), {"logits": grad}


def mixture_brier(g, logits, labels):
    num_members, batch, num_classes = logits.shape
    total, grad = 0.0, np.zeros(logits.shape)
    for b in range(batch):
        members = [softmax(logits[i, b]) for i in range(num_members)]
        apart = sum(members) / num_members - np.eye(num_classes)[labels[b]]
        total += math.fsum(apart**2) / batch
        for i in range(num_members):
            grad[i, b] = softmax_backward(members[i], g * 2 * apart / (num_members * batch))
    return np.array(total), {"logits": grad}


def to_gaussian(g, outputs, min_variance=1e-6):
    """Returns means, then variances, on the last axis, as the outputs have them."""
    y, grad = np.array(outputs), np.array(g)
    num_targets = outputs.shape[-1] // 2
    for at in np.ndindex(outputs.shape):
        if at[-1] >= num_targets:
            y[at] = np.logaddexp(outputs[at], 0.0) + min_variance
            grad[at] = g[at] / (1 + math.exp(-outputs[at]))
    return y, {"outputs": grad}


def member_gaussian_nll(g, mean, variance, targets):
    return member_beta_nll(g, mean, variance, targets, beta=0.0)


def member_beta_nll(g, mean, variance, targets, beta=0.5):
    """Computes the loss. The factor variance**beta is a constant to the gradient."""
    total = 0.0
    grads = {"mean": np.zeros(mean.shape), "variance": np.zeros(mean.shape), "targets": np.zeros(targets.shape)}
    for at in np.ndindex(mean.shape):
        of_target = at if targets.ndim == mean.ndim else at[1:]
        apart, v = targets[of_target] - mean[at], variance[at]
        factor = v**beta / mean.size
        total += factor * 0.5 * (math.log(2 * math.pi * v) + apart**2 / v)
        grads["mean"][at] = -g * factor * apart / v
        grads["variance"][at] = g * factor * 0.5 * (1 / v - apart**2 / v**2)
        grads["targets"][of_target] += g * factor * apart / v
    return np.array(total), grads


def mixture_gaussian_nll(g, mean, variance, targets):
    num_members = len(mean)
    total = 0.0
    grads = {"mean": np.zeros(mean.shape), "variance": np.zeros(mean.shape), "targets": np.zeros(targets.shape)}
    for at in np.ndindex(targets.shape):
        apart = [targets[at] - mean[(i, *at)] for i in range(num_members)]
        v = [variance[(i, *at)] for i in range(num_members)]
        densities = [math.exp(-(a**2) / (2 * b)) / math.sqrt(2 * math.pi * b) for a, b in zip(apart, v, strict=True)]
        total -= math.log(sum(densities) / num_members) / targets.size
        for i in range(num_members):
            share = g * densities[i] / sum(densities) / targets.size
            grads["mean"][(i, *at)] = -share * apart[i] / v[i]
            grads["variance"][(i, *at)] = share * 0.5 * (1 / v[i] - apart[i] ** 2 / v[i] ** 2)
            grads["targets"][at] += share * apart[i] / v[i]
    return np.array(total), grads
