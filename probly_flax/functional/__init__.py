"""The arithmetic beneath the layers: pure functions of arrays, member axis first."""

from probly_flax.functional.conv import batch_ensemble_conv, batch_ensemble_conv_transpose
from probly_flax.functional.linear import batch_ensemble_linear
from probly_flax.functional.members import split_members, tile_members

__all__ = [
    "batch_ensemble_conv",
    "batch_ensemble_conv_transpose",
    "batch_ensemble_linear",
    "split_members",
    "tile_members",
]
