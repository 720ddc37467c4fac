"""Training of ensembles with optax: compiled steps, a loop around them, and groups of parameters."""

from probly_flax.training._clipping import clip_by_member_norm
from probly_flax.training._fit import fit
from probly_flax.training._groups import fast_weight_groups
from probly_flax.training._steps import TrainState, make_eval_step, make_train_step

__all__ = ["TrainState", "clip_by_member_norm", "fast_weight_groups", "fit", "make_eval_step", "make_train_step"]
