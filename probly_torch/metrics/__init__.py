"""How good an ensemble is, judged by its mean prediction: functions of members' outputs, and metrics over batches.

Classification takes logits [E, B, C] and labels [B]; regression takes means and variances [E, B, ...] of Gaussian
members and targets [B, ...]; detection takes a score for each input. For a single network, add the member axis:
logits[None]. Half precision is judged in float32.

The classes are torchmetrics.Metrics, whose keyword arguments they take: they add up over batches and processes, and
fit into a MetricCollection. They count and sum in int64 and float64 (in float32 on mps, which has no float64), on the
device that they are moved to, and their values are float64. With per_member=True compute() gives (E,), each member's
own value (for an ensemble of one member a scalar, as torchmetrics makes of one number).
"""

from probly_torch.metrics._calibration import (
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
from probly_torch.metrics._classification import (
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
from probly_torch.metrics._regression import (
    CRPS,
    RMSE,
    GaussianNLL,
    IntervalCoverage,
    Sharpness,
    crps,
    interval_coverage,
    sharpness,
)
from probly_torch.metrics._selection import (
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
