"""Why two steps of training differ: the usual suspects, each of them tried on what torch's optimizer was fed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import torch

from parity_tests.kit.trees import Arrays, jax_of
from parity_tests.standard import UNIT_ROUNDOFF, error, meaning_limit

KEPT = 2**28  # bytes of weights and gradients, for steps that are tried again
CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_
OPTIONS = ("lr", "betas", "eps", "alpha", "momentum", "dampening", "nesterov", "weight_decay", "centered", "amsgrad")
Choice = tuple[str, optax.GradientTransformation]  # how it is written, and the transformation


@dataclass(frozen=True)
class Fed:
    """The inputs of torch's optimizer at a step: weights, gradients, and what hooks scaled those by."""

    weights: Arrays
    gradients: Arrays
    rate: float
    scale: float


@dataclass
class History:
    """The inputs of torch's optimizer from the first step on. They are forgotten where that is too much to keep."""

    steps: list[Fed] = field(default_factory=list)
    is_whole: bool = True

    def add(self, fed: Fed) -> None:
        """Adds another step."""
        size = sum(array.nbytes for arrays in (fed.weights, fed.gradients) for array in arrays.values())
        self.is_whole = self.is_whole and size * (len(self.steps) + 1) <= KEPT
        self.steps = [*self.steps, fed] if self.is_whole else []


def cause_of_loss(torch_loss: float, flax_loss: float, sizes: Mapping[str, int]) -> str | None:
    """Recognises a sum for a mean, over one of these sizes."""
    for more, less, many, few in (("Flax", "torch", flax_loss, torch_loss), ("torch", "Flax", torch_loss, flax_loss)):
        for name, size in sizes.items():
            if size > 1 and np.isfinite(many) and _agree(np.array(many), np.array(few * size)):
                return f"the loss of {more} is {size} times that of {less}, the number of {name}: a sum for a mean"
    return None


def cause_of_statistic(name: str, old: np.ndarray, ours: np.ndarray, theirs: np.ndarray, module: Any) -> str | None:
    """Recognises the unbiased variance, which torch keeps and nnx does not."""
    path, _, own = name.rpartition(".")
    momentum = getattr(module.get_submodule(path), "momentum", None)
    if own != "running_var" or momentum is None:
        return None
    torch_share, flax_share = (values - (1 - momentum) * old for values in (ours, theirs))
    with np.errstate(all="ignore"):
        ratio = float(np.median(torch_share / flax_share))
    count = round(ratio / (ratio - 1)) if np.isfinite(ratio) and ratio > 1 else 0
    if count < 2 or not _agree(ours, theirs + flax_share / (count - 1)):
        return None
    return (
        f"torch keeps the unbiased variance of {count} values for each channel, {count}/{count - 1} times that of nnx; "
        f'to leave it out, known_gaps={{"{name}": "unbiased in torch"}}'
    )


def cause_of_update(
    name: str, optimizer: torch.optim.Optimizer, history: History, ours: np.ndarray, theirs: np.ndarray, summed: bool
) -> str | None:
    """Explains what takes torch's steps in optax, and which steps Flax takes.

    The last step of the history is in question.
    """
    if not history.is_whole:
        return None
    old = history.steps[-1].weights[name]
    if np.array_equal(ours, old) or np.array_equal(theirs, old):
        still, moves = ("torch", "Flax") if np.array_equal(ours, old) else ("Flax", "torch")
        return f"{still} leaves it as it was, and {moves} trains it: freeze it in both, or in none"
    if summed and _agree(ours, old + 2 * (theirs - old)):
        return "torch trains two biases, whose sum is one parameter in Flax, and moves by both of their steps"
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return _explained(name, optimizer, history, ours, theirs)


def _explained(
    name: str, optimizer: torch.optim.Optimizer, history: History, ours: np.ndarray, theirs: np.ndarray
) -> str | None:
    choices = list(_choices(optimizer, [fed.rate for fed in history.steps]))
    scales = [fed.scale for fed in history.steps]
    norms = [_norm(fed.gradients) for fed in history.steps]
    largest = [scale * (norm + CLIP_EPSILON) for scale, norm in zip(scales, norms, strict=True)][-1]
    clipped = [min(1.0, largest / norm) for norm in norms]

    def takes(choice: Choice, scales: Sequence[float], new: np.ndarray) -> bool:
        return _agree(_step(choice[1], name, history, scales), new)

    described = _described(optimizer)
    twin = choices[0] if choices and takes(choices[0], scales, ours) else None
    if twin is not None and scales[-1] < 1 and takes(twin, clipped, theirs):
        return (
            f"clip_grad_norm_ scales gradients by {largest:.6g} / (norm + {CLIP_EPSILON:g}), optax.clip_by_global_norm "
            f"by {largest:.6g} / norm; optax.stateless with a function that adds {CLIP_EPSILON:g} is torch's"
        )
    other = next((choice for choice in choices if takes(choice, [1.0] * len(scales), theirs)), None)
    sentences = []
    if twin is not None:
        off = error(_step(twin[1], name, history, scales), ours, ours, "float64") * UNIT_ROUNDOFF["float64"]
        to = f"to {off:.0e}" if off else "exactly"
        before = "" if scales[-1] == 1 else f", after gradients are scaled by {scales[-1]:.6g},"
        sentences.append(f"torch's {described}{before} is {twin[0]}, which agrees {to}")
    if other is not None and other is not twin:
        sentences.append(f"Flax takes the step of {other[0]}" + ("" if twin else f", torch that of {described}"))
    return "; ".join(sentences) or None


def _choices(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> Iterator[Choice]:
    """Yields the twin of torch's optimizer first, then what is taken for it.

    There are none where groups have options of their own.
    """
    first, *rest = [{k: v for k, v in group.items() if k in OPTIONS} for group in optimizer.param_groups]
    if any(group != first for group in rest):
        return
    constant = len(set(rates)) == 1
    rate: Any = rates[0] if constant else lambda count: jnp.asarray(rates)[count]
    lr = repr(rates[0]) if constant else "schedule"
    decay = first.get("weight_decay", 0)

    def coupled(choice: Choice, w: float) -> Choice:
        text, transform = choice
        if not w:
            return choice
        decayed = optax.chain(optax.add_decayed_weights(w), transform)
        return f"optax.chain(optax.add_decayed_weights({w!r}), {text})", decayed

    if isinstance(optimizer, torch.optim.SGD):

        def sgd(momentum: float, nesterov: bool) -> Choice:
            text = f", momentum={momentum!r}" if momentum else ""
            text += ", nesterov=True" if nesterov else ""
            return f"optax.sgd({lr}{text})", optax.sgd(rate, momentum or None, nesterov)

        m, n = first["momentum"], first["nesterov"]
        yield coupled(sgd(m, n), decay)
        if m:
            yield coupled(sgd(m, not n), decay)
            yield coupled(sgd(0, False), decay)
        if decay:
            yield sgd(m, n)
            text, transform = sgd(m, n)
            if constant:
                after = optax.chain(transform, optax.add_decayed_weights(-decay * rates[0]))
                yield f"optax.chain({text}, optax.add_decayed_weights({-decay * rates[0]:.6g}))", after
    elif isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        (b1, b2), eps = first["betas"], first["eps"]
        decoupled = optimizer.defaults.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))

        def adam(eps: float, root: float = 0.0, w: float | None = None) -> Choice:
            text = (f", eps_root={root!r}" if root else "") + ("" if w is None else f", weight_decay={w!r}")
            text = f"{lr}, b1={b1!r}, b2={b2!r}, eps={eps!r}{text}"
            if w is None:
                return f"optax.adam({text})", optax.adam(rate, b1, b2, eps, root)
            return f"optax.adamw({text})", optax.adamw(rate, b1, b2, eps, root, weight_decay=w)

        def decayed(eps: float, root: float = 0.0) -> Choice:
            return adam(eps, root, decay) if decoupled and decay else coupled(adam(eps, root), decay)

        yield decayed(eps)
        for other_eps, root in ((0.0, eps), (0.0, eps**2), (eps, eps), (1e-8, 0.0)):
            yield decayed(other_eps, root)
        yield coupled(adam(eps), decay) if decoupled and decay else adam(eps, w=decay)
        yield adam(eps, w=1e-4)  # optax's own
        yield adam(eps)
    elif isinstance(optimizer, torch.optim.RMSprop):
        eps, momentum, centered = first["eps"], first["momentum"], first["centered"]

        def rmsprop(alpha: float, in_sqrt: bool) -> Choice:
            more = (", centered=True" if centered else "") + (f", momentum={momentum!r}" if momentum else "")
            text = f"optax.rmsprop({lr}, decay={alpha!r}, eps={eps!r}, eps_in_sqrt={in_sqrt}{more})"
            options: Any = {"eps_in_sqrt": in_sqrt, "centered": centered, "momentum": momentum or None}
            return text, optax.rmsprop(rate, alpha, eps, **options)

        for alpha, in_sqrt in ((first["alpha"], False), (first["alpha"], True), (0.9, False), (0.9, True)):
            yield coupled(rmsprop(alpha, in_sqrt), decay)


def _step(transform: optax.GradientTransformation, name: str, history: History, scales: Sequence[float]) -> np.ndarray:
    """Returns new weights of one tensor, after all that was fed before."""
    new = weights = jax_of(history.steps[0].weights[name])
    state = transform.init(weights)
    for fed, scale in zip(history.steps, scales, strict=True):
        weights = jax_of(fed.weights[name])
        updates, state = transform.update(jax_of(fed.gradients[name] * scale), state, weights)
        new = weights + updates
    return np.asarray(new)


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    return error(a, b, b, "float64") <= meaning_limit()


def _norm(gradients: Arrays) -> float:
    return float(np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values())))


def _described(optimizer: torch.optim.Optimizer) -> str:
    """Describes the class, and its options that are set."""
    group = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in optimizer.param_groups[0].items()}
    options = (f"{k}={group[k]!r}" for k in OPTIONS if group.get(k))
    return f"{type(optimizer).__name__}({', '.join(options)})"
