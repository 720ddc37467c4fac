"""The subjects of losses and uncertainties: functions of logits and labels, or of means, variances and targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.nn import functional

import probly_flax as pf
import probly_torch as pt
from parity_tests.suite.oracle import losses as oracle_losses
from parity_tests.suite.oracle import members as oracle
from parity_tests.suite.subjects.subject import Arrays, Subject

OPTIONS = {"weight": (0.5, 2.0, 1.0, 0.25), "label_smoothing": 0.125, "ignore_index": 1}


def _of_logits(name: str, labels: tuple[int, ...] | None = None, logits=(3, 5, 4), **options: Any) -> Subject:
    module, of_oracle = ("losses", oracle_losses) if labels else ("uncertainty", oracle)
    suffix = f"-labels{len(labels)}d" if labels else ""
    return Subject(
        f"{name}-{'x'.join(map(str, logits))}{suffix}{'-options' * bool(options)}",
        {"logits": logits},
        partial(_torch, getattr(getattr(pt, module), name)),
        partial(_flax, getattr(getattr(pf, module), name)),
        getattr(of_oracle, name),
        options=options,
        integers={"labels": (labels, logits[2])} if labels else {},
        scale={"logits": 3.0},
    )


def _torch(function: Callable[..., Any], logits: torch.Tensor, weight: Any = None, **rest: Any) -> torch.Tensor:
    """Calls the function with the weight of each class as a tensor. What is returned is one too."""
    options = rest if weight is None else {**rest, "weight": torch.tensor(weight, dtype=logits.dtype)}
    returned = function(logits, **options)
    return (
        returned if isinstance(returned, torch.Tensor) else torch.cat([returned[0], torch.stack(returned[1:], -1)], -1)
    )


def _flax(function: Callable[..., Any], logits: jax.Array, weight: Any = None, **rest: Any) -> jax.Array:
    """Calls the function as `_torch` does."""
    options = rest if weight is None else {**rest, "weight": jnp.array(weight, logits.dtype)}
    returned = function(logits, **options)
    return (
        returned if isinstance(returned, jax.Array) else jnp.concatenate([returned[0], jnp.stack(returned[1:], -1)], -1)
    )


def torch_member_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes the cross-entropy of one network."""
    return pt.losses.member_losses(functional.cross_entropy, logits, labels, in_axes=0 if labels.ndim == 2 else None)


def flax_member_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the cross-entropy of one network."""

    def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    return pf.losses.member_losses(cross_entropy, logits, labels, in_axes=0 if labels.ndim == 2 else None)


def _member_losses(labels: tuple[int, ...]) -> Subject:
    return Subject(
        f"member_losses-labels{len(labels)}d",
        {"logits": (3, 5, 4)},
        torch_member_losses,
        flax_member_losses,
        oracle_losses.member_losses,
        integers={"labels": (labels, 4)},
        scale={"logits": 3.0},
    )


def _of_gaussian(name: str, targets: tuple[int, ...] | None = None, **options: Any) -> Subject:
    """Computes with variances of 0.5 + root**2, so that every draw of the root gives some."""
    module, of_oracle = ("losses", oracle_losses) if targets else ("uncertainty", oracle)

    def run(function: Callable[..., Any], stack: Callable[..., Any], mean: Any, root: Any, **rest: Any) -> Any:
        returned = function(mean, 0.5 + root * root, **rest)
        return stack(returned) if isinstance(returned, tuple) else returned

    def run_oracle(g: Any, mean: Any, root: Any, **rest: Any) -> tuple[Any, Arrays]:
        output, grads = getattr(of_oracle, name)(g, mean, 0.5 + root * root, **rest)
        grads["root"] = 2 * root * grads.pop("variance")
        return output, grads

    return Subject(
        f"{name}" + (f"-targets{len(targets)}d" if targets else ""),
        {"mean": (3, 5, 2), "root": (3, 5, 2)} | ({"targets": targets} if targets else {}),
        partial(run, getattr(getattr(pt, module), name), torch.stack),
        partial(run, getattr(getattr(pf, module), name), jnp.stack),
        run_oracle,
        options=options,
    )


def _to_gaussian() -> Subject:
    return Subject(
        "to_gaussian",
        {"outputs": (3, 5, 4)},
        lambda outputs, **options: torch.cat(pt.losses.to_gaussian(outputs, **options), -1),
        lambda outputs, **options: jnp.concatenate(pf.losses.to_gaussian(outputs, **options), -1),
        oracle_losses.to_gaussian,
        options={"min_variance": 0.125},
    )


SUBJECTS = [
    *(
        _of_logits(name)
        for name in ("log_mean_probs", "mean_probs", "predictive_entropy", "expected_entropy", "mutual_information")
    ),
    _of_logits("mutual_information", logits=(4, 3, 2)),
    _of_logits("pairwise_kl", unit="bits"),
    _of_logits("classification_uncertainty", unit="bits"),
    _of_logits("member_cross_entropy", (5,)),
    _of_logits("member_cross_entropy", (3, 5)),
    _of_logits("member_cross_entropy", (3, 5), **OPTIONS),
    _member_losses((5,)),
    _member_losses((3, 5)),
    _of_logits("mixture_cross_entropy", (5,)),
    _of_logits("mixture_cross_entropy", (5,), **OPTIONS),
    _of_logits("member_brier", (3, 5)),
    _of_logits("mixture_brier", (5,)),
    _to_gaussian(),
    _of_gaussian("member_gaussian_nll", (5, 2)),
    _of_gaussian("member_beta_nll", (3, 5, 2), beta=0.25),
    _of_gaussian("mixture_gaussian_nll", (5, 2)),
    _of_gaussian("regression_uncertainty"),
]
