"""How good an ensemble is, judged by its mean prediction: functions of members' outputs, and metrics over batches.

Classification takes logits [E, B, C] and labels [B]; regression takes means and variances [E, B, ...] of Gaussian
members and targets [B, ...]; detection takes a score for each input. For a single network, add the member axis:
logits[None]. Half precision is judged in float32.

The classes are nnx.Metrics: update takes what it needs by name and ignores the rest, so they fit into an
nnx.MultiMetric. Their sums keep what rounding takes from them, so float32 does for any number of inputs. With
per_member=True compute() gives (E,), each member's own value. All work under jit but those that keep every score:
AdaptiveECE, AURC, OODAUROC and OODFPR95.
"""

from probly_flax.metrics._calibration import (
    ECE,
    AdaptiveECE,
    ClasswiseECE,
    ReliabilityBins,
    ReliabilityCurve,
    adaptive_ece,
    classwise_ece,
    ece,
    reliability_bins,
)
from probly_flax.metrics._classification import (
    NLL,
    Accuracy,
    Brier,
    Disagreement,
    Diversity,
    MutualInformation,
    accuracy,
    brier,
    diversity,
    nll,
)
from probly_flax.metrics._regression import (
    CRPS,
    RMSE,
    GaussianNLL,
    IntervalCoverage,
    Sharpness,
    crps,
    interval_coverage,
    sharpness,
)
from probly_flax.metrics._selection import (
    AURC,
    OODAUROC,
    OODFPR95,
    aurc,
    ood_auroc,
    ood_fpr95,
)

__all__ = [  # noqa: RUF022, in the order of sorted()
    "AURC",
    "Accuracy",
    "AdaptiveECE",
    "Brier",
    "CRPS",
    "ClasswiseECE",
    "Disagreement",
    "Diversity",
    "ECE",
    "GaussianNLL",
    "IntervalCoverage",
    "MutualInformation",
    "NLL",
    "OODAUROC",
    "OODFPR95",
    "RMSE",
    "ReliabilityBins",
    "ReliabilityCurve",
    "Sharpness",
    "accuracy",
    "adaptive_ece",
    "aurc",
    "brier",
    "classwise_ece",
    "crps",
    "diversity",
    "ece",
    "interval_coverage",
    "nll",
    "ood_auroc",
    "ood_fpr95",
    "reliability_bins",
    "sharpness",
]
