"""Ensembles of networks in Flax NNX: BatchEnsemble layers, deep ensembles, and their twins in probly_torch.

One contract: a model of E members is called with a batch [B, ...] and returns member outputs [E, B, ...].
"""

from importlib import import_module
from types import ModuleType

from probly_flax import functional, layers, losses, random, uncertainty, weights
from probly_flax.batchensemble import BatchEnsemble, batchensemble, register_batchensemble
from probly_flax.ensemble import Ensemble, ensemble, register_reset
from probly_flax.functional import split_members, tile_members
from probly_flax.layers import (
    BatchEnsembleBatchNorm,
    BatchEnsembleConv,
    BatchEnsembleConvTranspose,
    BatchEnsembleEmbed,
    BatchEnsembleGroupNorm,
    BatchEnsembleGRU,
    BatchEnsembleGRUCell,
    BatchEnsembleLayerNorm,
    BatchEnsembleLinear,
    BatchEnsembleLSTM,
    BatchEnsembleLSTMCell,
    BatchEnsembleMultiHeadAttention,
)
from probly_flax.random import Rngs
from probly_flax.weights import load_arrays, load_weights, save_weights, to_arrays

__all__ = [
    "BatchEnsemble",
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
    "Ensemble",
    "Rngs",
    "batchensemble",
    "ensemble",
    "functional",
    "layers",
    "load_arrays",
    "load_weights",
    "losses",
    "random",
    "register_batchensemble",
    "register_reset",
    "save_weights",
    "split_members",
    "tile_members",
    "to_arrays",
    "uncertainty",
    "weights",
]


def __getattr__(name: str) -> ModuleType:
    """Modules that need more than the framework, or that few need, are imported when they are used."""
    if name in ("metrics", "optimizers", "plots", "port", "training"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
