"""The arithmetic beneath the layers: pure functions of tensors, member axis first."""

from probly_torch.functional.conv import batch_ensemble_conv, batch_ensemble_conv_transpose
from probly_torch.functional.linear import batch_ensemble_linear
from probly_torch.functional.members import split_members, tile_members

__all__ = [
    "batch_ensemble_conv",
    "batch_ensemble_conv_transpose",
    "batch_ensemble_linear",
    "split_members",
    "tile_members",
]
