"""Metrics in float64, as loops over inputs that a beginner could have written: nothing is shared with the packages."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from parity_tests.suite.oracle.members import softmax


def mean_prediction(logits):
    num_members, batch, _ = logits.shape
    return np.array([sum(softmax(logits[i, b]) for i in range(num_members)) / num_members for b in range(batch)])


def accuracy(logits, labels):
    probs = mean_prediction(logits)
    return sum(int(np.argmax(p)) == label for p, label in zip(probs, labels, strict=True)) / len(labels)


def nll(logits, labels):
    probs = mean_prediction(logits)
    return -math.fsum(math.log(p[label]) for p, label in zip(probs, labels, strict=True)) / len(labels)


def brier(logits, labels):
    total = 0.0
    for p, label in zip(mean_prediction(logits), labels, strict=True):
        for c in range(len(p)):
            total += (p[c] - (c == label)) ** 2
    return total / len(labels)


def diversity(logits, labels):
    num_members, batch, _ = logits.shape
    differing = wrong = 0.0
    for b in range(batch):
        classes = [int(np.argmax(logits[i, b])) for i in range(num_members)]
        pairs = [(i, j) for i in range(num_members) for j in range(i)]
        differing += sum(classes[i] != classes[j] for i, j in pairs) / len(pairs)
        wrong += sum(c != labels[b] for c in classes) / num_members
    return differing / wrong


def bin_of(confidence, num_bins):
    """Returns k with k/n < confidence <= (k+1)/n, where edges are rounded as any number is. 0 is in the first."""
    for k in range(num_bins):
        if confidence <= (k + 1) / num_bins:
            return k
    raise AssertionError(f"{confidence} is above 1")


def bins(confidences, hits, num_bins):
    """Returns for each bin the sum of confidences, of hits, and the count."""
    sums = [[0.0, 0.0, 0] for _ in range(num_bins)]
    for confidence, hit in zip(confidences, hits, strict=True):
        row = sums[bin_of(confidence, num_bins)]
        row[0] += confidence
        row[1] += hit
        row[2] += 1
    return sums


def calibration_error(confidences, hits, num_bins):
    error = 0.0
    for confidence, hit, count in bins(confidences, hits, num_bins):
        if count:
            error += count / len(hits) * abs(hit / count - confidence / count)
    return error


def top_label(logits, labels):
    probs = mean_prediction(logits)
    hits = [float(np.argmax(p) == label) for p, label in zip(probs, labels, strict=True)]
    return [max(p) for p in probs], hits


def ece(logits, labels, num_bins=15):
    return calibration_error(*top_label(logits, labels), num_bins)


def classwise_ece(logits, labels, num_bins=15):
    probs, num_classes = mean_prediction(logits), logits.shape[2]
    errors = [
        calibration_error(probs[:, c], [float(label == c) for label in labels], num_bins) for c in range(num_classes)
    ]
    return sum(errors) / num_classes


def reliability_bins(logits, labels, num_bins=15):
    rows = bins(*top_label(logits, labels), num_bins)
    confidence = [total / count if count else math.nan for total, _, count in rows]
    accuracy = [hits / count if count else math.nan for _, hits, count in rows]
    return np.array(confidence), np.array(accuracy), np.array([count for *_, count in rows], float)


def expected_among_ties(scores, values):
    """Averages over all orders of inputs of one score: each gets the mean of the values of its score."""
    return [np.mean([v for other, v in zip(scores, values, strict=True) if other == score]) for score in scores]


def adaptive_ece(logits, labels, num_bins=15):
    confidences, hits = top_label(logits, labels)
    hits = expected_among_ties(confidences, hits)
    order = sorted(range(len(hits)), key=lambda b: confidences[b])
    error = 0.0
    for k in range(num_bins):
        inside = [b for position, b in enumerate(order) if position * num_bins // len(order) == k]
        error += abs(sum(hits[b] - confidences[b] for b in inside)) / len(order)
    return error


def aurc(logits, labels, uncertainty=None):
    confidences, hits = top_label(logits, labels)
    uncertainty = [-c for c in confidences] if uncertainty is None else list(uncertainty)
    wrong = expected_among_ties(uncertainty, [1 - hit for hit in hits])
    order = sorted(range(len(wrong)), key=lambda b: uncertainty[b])
    risks = [sum(wrong[b] for b in order[:k]) / k for k in range(1, len(order) + 1)]
    return sum(risks) / len(risks)


def ood_auroc(in_scores, out_scores):
    wins = sum((o > i) + 0.5 * (o == i) for o in out_scores for i in in_scores)
    return wins / len(in_scores) / len(out_scores)


def ood_fpr95(in_scores, out_scores):
    for threshold in sorted(set(out_scores), reverse=True):
        if Fraction(sum(o >= threshold for o in out_scores), len(out_scores)) >= Fraction(95, 100):
            return sum(i >= threshold for i in in_scores) / len(in_scores)
    raise AssertionError


def _each_target(mean, variance, targets):
    num_members = len(mean)
    for position in np.ndindex(*targets.shape):
        members = [(mean[(i, *position)], variance[(i, *position)]) for i in range(num_members)]
        yield members, targets[position]


def gaussian_nll(mean, variance, targets):
    total = 0.0
    for members, y in _each_target(mean, variance, targets):
        density = sum(math.exp(-((y - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v) for m, v in members)
        total -= math.log(density / len(members))
    return total / targets.size


def rmse(mean, variance, targets):
    errors = [
        (sum(m for m, _ in members) / len(members) - y) ** 2 for members, y in _each_target(mean, variance, targets)
    ]
    return math.sqrt(sum(errors) / len(errors))


def _distance(mean, variance):
    """Returns E|X| of a Gaussian, folded."""
    sigma = math.sqrt(variance)
    return sigma * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance)) + mean * math.erf(
        mean / (sigma * math.sqrt(2))
    )


def crps(mean, variance, targets):
    total = 0.0
    for members, y in _each_target(mean, variance, targets):
        total += sum(_distance(m - y, v) for m, v in members) / len(members)
        total -= 0.5 * sum(_distance(m - n, v + w) for m, v in members for n, w in members) / len(members) ** 2
    return total / targets.size


def _moments(members):
    center = sum(m for m, _ in members) / len(members)
    return center, sum(v + (m - center) ** 2 for m, v in members) / len(members)


Z = {0.95: 1.959963984540054, 0.5: 0.6744897501960817}  # tables of the standard normal distribution


def interval_coverage(mean, variance, targets, level=0.95):
    inside = 0
    for members, y in _each_target(mean, variance, targets):
        center, spread = _moments(members)
        inside += abs(y - center) <= Z[level] * math.sqrt(spread)
    return inside / targets.size


def sharpness(mean, variance, targets, level=0.95):
    widths = [2 * Z[level] * math.sqrt(_moments(members)[1]) for members, _ in _each_target(mean, variance, targets)]
    return sum(widths) / len(widths)
