"""Checks of what metrics are given, and the sentences they raise.

The same file, byte for byte, in probly_torch and probly_flax. It imports no framework.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def check_num_bins(what: str, num_bins: Any) -> None:
    if isinstance(num_bins, bool) or not isinstance(num_bins, int):
        raise TypeError(
            f"{what} expects num_bins to be an integer of at least 1; got {num_bins!r} ({type(num_bins).__name__}). "
            f"Pass num_bins=15."
        )
    if num_bins < 1:
        raise ValueError(f"{what} expects num_bins to be an integer of at least 1; got {num_bins}. Pass num_bins=15.")


def check_level(what: str, level: Any) -> None:
    sentence = f"{what} expects level to be a number above 0 and below 1; got {level!r}. Pass level=0.95."
    if isinstance(level, bool) or not isinstance(level, (int, float)):
        raise TypeError(sentence)
    if not 0 < level < 1:
        raise ValueError(sentence)


def check_uncertainty(what: str, expected: Sequence[int], uncertainty: Sequence[int]) -> None:
    if tuple(uncertainty) != tuple(expected):
        raise ValueError(
            f"{what} expects uncertainty of shape {tuple(expected)}, one number for each prediction; got "
            f"{tuple(uncertainty)}. To use the largest probability, leave it out: uncertainty=None."
        )


def check_scores(what: str, in_scores: Sequence[int], out_scores: Sequence[int]) -> None:
    if len(in_scores) != 1 or len(out_scores) != 1:
        raise ValueError(
            f"{what} expects in_scores and out_scores of one axis, one number for each input; got {tuple(in_scores)} "
            f"and {tuple(out_scores)}. Pass such as mutual_information(logits)."
        )
    if 0 in (*in_scores, *out_scores):
        raise ValueError(
            f"{what} expects at least one input of each kind; got {in_scores[0]} in-distribution and {out_scores[0]} "
            f"out-of-distribution. Give both: ood_auroc(in_scores, out_scores), or metric.update(scores, is_ood)."
        )


def check_is_ood(what: str, scores: Sequence[int], is_ood: Sequence[int], boolean: bool) -> None:
    if len(scores) != 1 or tuple(scores) != tuple(is_ood):
        raise ValueError(
            f"{what} expects scores and is_ood of one shape [B], one number for each input; got {tuple(scores)} and "
            f"{tuple(is_ood)}. For a batch of one kind, pass full_like(scores, True, dtype=bool)."
        )
    if not boolean:
        raise TypeError(f"{what} expects is_ood to be booleans; got another dtype. Pass is_ood == 1.")


def check_same_members(what: str, before: Sequence[int], now: Sequence[int]) -> None:
    """Sums over inputs are of one ensemble; nothing is broadcast."""
    if tuple(before) != tuple(now):
        raise ValueError(
            f"{what} expects the members and classes of its first update, sums of shape {tuple(before)}; got "
            f"{tuple(now)}. For other members, make another metric: {what}()."
        )


def check_updated(what: str, num_inputs: int) -> None:
    if not num_inputs:
        raise RuntimeError(f"{what} expects at least one input; got none. Call metric.update first.")


def check_ignored(what: str, ignored: Iterable[str]) -> None:
    """What update ignores is for other metrics, but a mask is for all of them."""
    if "mask" in ignored:
        raise ValueError(
            f"{what} expects a batch without inputs to leave out; got a mask. Leave them out: logits[:, mask], "
            f"labels[mask]."
        )


def check_outside_jit(what: str, traced: bool) -> None:
    if traced:
        raise ValueError(
            f"{what} expects arrays of values, as it keeps every score; got traced ones. Return the outputs from jit, "
            f"and call metric.update with them."
        )
