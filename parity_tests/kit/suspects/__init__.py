"""Why a layer differs: the usual suspects, each tested on what the layer was called with.

A suspect is an edit of one side: of the options, weights, inputs or outputs of a copy. It is the cause if the two sides
then agree, and only then: what is named here was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from parity_tests.kit.suspects import between, formulas, inputs, options, precision, weights
from parity_tests.kit.suspects.between import Gap
from parity_tests.kit.suspects.trial import Court, LayerPair, Suspect, attentions

__all__ = ["Gap", "LayerPair", "cause_between", "cause_in_layer", "cause_in_precision", "cause_in_statistics"]


@contextmanager
def _settings() -> Iterator[None]:
    """Sets float64, and the promotions that the layers of nnx rely on."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def cause_in_layer(pair: LayerPair) -> str | None:
    """Explains why the outputs of a layer differ in float64, and what would make them agree.

    The cause is None if no suspect explains it.
    """
    with _settings():
        court = Court(pair)
        cause = court.cause(_suspects(pair))
        matched = court.matched(pair.torch_outputs, pair.flax_outputs)
        if cause is None and matched:
            cause = formulas.cause(pair, *matched[0])
            cause = cause or between.cause(between.gap_of(pair, matched))
        return cause


def _suspects(pair: LayerPair) -> Iterator[Suspect]:
    """Yields the suspects from the most common one on."""
    if attentions(pair.flax):  # which every trial replaces
        said = "nnx.dot_product_attention takes its softmax in float32, whatever the dtype"
        yield Suspect(said, "a softmax in float64", lambda trial: None)
    yield from options.suspects(pair)
    yield from inputs.suspects(pair)
    yield from weights.suspects(pair)
    yield from precision.suspects(pair, "float64")


def cause_in_statistics(pair: LayerPair) -> str | None:
    """Explains why the statistics of a layer differ after an update, given both layers before it."""
    with _settings():
        return formulas.cause_in_statistics(pair)


def cause_in_precision(pair: LayerPair) -> str | None:
    """Explains why a layer is less precise in float32 than torch's, though they agree in float64.

    The pair is captured in float32.
    """
    return precision.cause(pair)


def cause_between(gap: Gap) -> str | None:
    """Explains what a module computes between its layers on either side, where that differs and is recognised."""
    return between.cause(gap)
