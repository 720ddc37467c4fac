"""BatchEnsemble layers: a shared ("slow") weight and two rank-one ("fast") factors for each member."""

from probly_torch.layers.linear import BatchEnsembleLinear

__all__ = ["BatchEnsembleLinear"]
