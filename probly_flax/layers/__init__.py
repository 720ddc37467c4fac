"""BatchEnsemble layers: a shared ("slow") weight and two rank-one ("fast") factors for each member."""

from probly_flax.layers.attention import BatchEnsembleMultiHeadAttention
from probly_flax.layers.conv import BatchEnsembleConv, BatchEnsembleConvTranspose
from probly_flax.layers.linear import BatchEnsembleLinear
from probly_flax.layers.recurrent import (
    BatchEnsembleGRU,
    BatchEnsembleGRUCell,
    BatchEnsembleLSTM,
    BatchEnsembleLSTMCell,
)

__all__ = [
    "BatchEnsembleConv",
    "BatchEnsembleConvTranspose",
    "BatchEnsembleGRU",
    "BatchEnsembleGRUCell",
    "BatchEnsembleLSTM",
    "BatchEnsembleLSTMCell",
    "BatchEnsembleLinear",
    "BatchEnsembleMultiHeadAttention",
]
