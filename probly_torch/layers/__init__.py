"""BatchEnsemble layers: a shared ("slow") weight and two rank-one ("fast") factors for each member."""

from probly_torch.layers.attention import BatchEnsembleMultiHeadAttention
from probly_torch.layers.conv import BatchEnsembleConv, BatchEnsembleConvTranspose
from probly_torch.layers.embed import BatchEnsembleEmbed
from probly_torch.layers.linear import BatchEnsembleLinear
from probly_torch.layers.norm import BatchEnsembleBatchNorm, BatchEnsembleGroupNorm, BatchEnsembleLayerNorm
from probly_torch.layers.recurrent import (
    BatchEnsembleGRU,
    BatchEnsembleGRUCell,
    BatchEnsembleLSTM,
    BatchEnsembleLSTMCell,
)

__all__ = [
    "BatchEnsembleBatchNorm",
    "BatchEnsembleConv",
    "BatchEnsembleConvTranspose",
    "BatchEnsembleEmbed",
    "BatchEnsembleGRU",
    "BatchEnsembleGRUCell",
    "BatchEnsembleGroupNorm",
    "BatchEnsembleLSTM",
    "BatchEnsembleLSTMCell",
    "BatchEnsembleLayerNorm",
    "BatchEnsembleLinear",
    "BatchEnsembleMultiHeadAttention",
]
