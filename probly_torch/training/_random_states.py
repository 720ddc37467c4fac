"""The states of all generators of random numbers that a training run draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from probly_torch.ensemble import Ensemble


def random_states(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the state of each process, in a form that torch.load reads with weights_only=True."""
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "dropout": [each._seeds and each._seeds.getstate() for each in _ensembles(module)],
    }
    if not (distributed.is_available() and distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return states


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))


def set_dropout_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Restores the state of the ensembles' own masks, which belong to the model.

    Another model has other masks, or none.
    """
    for each, seeds in zip(_ensembles(module), state["dropout"], strict=False):
        if seeds is not None:
            each._seeds = random.Random()
            each._seeds.setstate(seeds)


def _ensembles(module: nn.Module) -> list[Ensemble]:
    return [each for each in module.modules() if isinstance(each, Ensemble)]
