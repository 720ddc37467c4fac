"""Planted faults: each is a plausible slip in one twin, and the suite has to see it.

A parity test that these would pass is not a parity test.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import probly_flax as pf
from parity_tests.subject import Subject
from parity_tests.subjects import SUBJECTS, flax_linear
from parity_tests.test_parity import bounded_verdicts, exact_verdicts

BY_NAME = {subject.name: subject for subject in SUBJECTS}


@dataclass(frozen=True)
class Fault:
    """A subject of the suite, and a wrong twin for it."""

    name: str
    subject: str
    flax: Any

    def planted(self) -> Subject:
        """The subject with the fault in it."""
        return replace(BY_NAME[self.subject], flax=self.flax)


def swapped_r_and_s(x, weight, r, s, bias):
    return flax_linear(x, weight, r=s, s=r, bias=bias)


def bias_before_s(x, weight, r, s, bias):
    members = x.reshape(len(r), -1, x.shape[-1])
    return (((members * r[:, None]) @ weight.T + bias[:, None]) * s[:, None]).reshape(len(x), -1)


def batch_major_rows(x, weight, r, s, bias):
    members = x.reshape(-1, len(r), x.shape[-1])
    return (((members * r[None]) @ weight.T) * s[None] + bias[None]).reshape(len(x), -1)


def weight_not_transposed(x, weight, r, s, bias):
    return pf.functional.batch_ensemble_linear(x, weight, r, s, bias)


def first_member_for_all(x, weight, r, s, bias):
    return flax_linear(x, weight, r=jnp.tile(r[:1], (len(r), 1)), s=s, bias=bias)


def repeated_rows(x, num_members):
    return jnp.repeat(x, num_members, 0)


def batch_major_split(y, num_members):
    return y.reshape(-1, num_members, y.shape[-1]).swapaxes(0, 1)


def sum_of_members(logits):
    return pf.uncertainty.mean_probs(logits) * len(logits)


def member_loss_not_averaged(logits, labels):
    return pf.losses.member_cross_entropy(logits, labels) * len(logits)


def mean_of_logits(logits):
    return jax.nn.softmax(logits.mean(0))


def guarded_logarithm(logits):
    mean = jnp.log(pf.uncertainty.mean_probs(logits) + 1e-8)
    return -(jnp.exp(mean) * mean).sum(-1)


SQUARE = "batch_ensemble_linear-E3-B4-6to6"
FAULTS = [
    Fault("r and s swapped", SQUARE, swapped_r_and_s),
    Fault("bias before s", SQUARE, bias_before_s),
    Fault("[B, E] rows", SQUARE, batch_major_rows),
    Fault("square weight not transposed", SQUARE, weight_not_transposed),
    Fault("r of the first member for all", SQUARE, first_member_for_all),
    Fault("[B, E] tiling", "tile_members", repeated_rows),
    Fault("[B, E] splitting", "split_members", batch_major_split),
    Fault("no mean over members", "mean_probs-3x5x4", sum_of_members),
    Fault("no mean over members in the loss", "member_cross_entropy-3x5x4-labels1d", member_loss_not_averaged),
    Fault("softmax of the mean logits", "mean_probs-4x3x2", mean_of_logits),
    Fault("log(p + 1e-8)", "predictive_entropy-3x5x4", guarded_logarithm),
]
by_name = {"ids": lambda fault: fault.name}


def broken(verdicts, rule):
    return [verdict for verdict in verdicts if rule in verdict.rule and not verdict.holds]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if BY_NAME[fault.subject].exact], **by_name)
def test_the_exact_tier_sees(fault, dtype):
    assert broken(exact_verdicts(fault.planted(), dtype, seed=0), "flax and the oracle")


@pytest.mark.parametrize("fault", FAULTS, **by_name)
def test_the_bounded_tier_sees(fault):
    verdicts = bounded_verdicts(fault.planted(), ("float32", "float64"), seeds=(0,))
    assert broken(verdicts, "float64 distance of torch and flax")
    assert broken(verdicts, "float64 distance of flax and the oracle")
    if fault.name != "log(p + 1e-8)":  # 1e-8 is below what float32 resolves: this one needs the float64 tier
        assert broken(verdicts, "float32 error of flax")
    assert not broken(verdicts, "torch and the oracle"), "the twin without the fault is blamed"
