"""BatchEnsemble layers: a shared ("slow") weight and two rank-one ("fast") factors for each member."""

from probly_torch.layers.attention import BatchEnsembleMultiHeadAttention
from probly_torch.layers.conv import BatchEnsembleConv, BatchEnsembleConvTranspose
from probly_torch.layers.linear import BatchEnsembleLinear
from probly_torch.layers.recurrent import (
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
