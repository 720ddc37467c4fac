"""BatchEnsemble layers: a shared ("slow") weight and two rank-one ("fast") factors for each member."""

from probly_flax.layers.attention import BatchEnsembleMultiHeadAttention
from probly_flax.layers.conv import BatchEnsembleConv, BatchEnsembleConvTranspose
from probly_flax.layers.embed import BatchEnsembleEmbed
from probly_flax.layers.linear import BatchEnsembleLinear
from probly_flax.layers.norm import BatchEnsembleBatchNorm, BatchEnsembleGroupNorm, BatchEnsembleLayerNorm
from probly_flax.layers.recurrent import (
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
