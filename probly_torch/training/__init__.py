"""Training ensembles with Lightning: modules to use as they are, and the pieces for a LightningModule of your own."""

from probly_torch.training._callback import EnsembleMetrics
from probly_torch.training._groups import fast_weight_groups
from probly_torch.training._mixin import EnsembleMixin
from probly_torch.training._modules import EnsembleClassifier, EnsembleRegressor

__all__ = ["EnsembleClassifier", "EnsembleMetrics", "EnsembleMixin", "EnsembleRegressor", "fast_weight_groups"]
