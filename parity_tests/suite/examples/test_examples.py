"""The examples run, and show what they say they show."""

import re

import jax
import numpy as np
from safetensors.numpy import load_file

from examples import two_moons
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, assert_close, error
from parity_tests.suite.examples.example_runs import assert_figures, run_once

METHODS = (two_moons.SINGLE, two_moons.LOOP, two_moons.STACKED, two_moons.BATCH)
ROWS = [(framework, method) for method in METHODS for framework in ("torch", "Flax")]


out, outcome = run_once(two_moons.main)


def test_rows(outcome):
    rows = [(result.framework.name, result.method) for pair in outcome[0] for result in pair]
    assert rows == ROWS


def test_forward_calls(outcome):
    """2,560 points make 20 batches an epoch; the loop passes each three times."""
    for pair in outcome[0]:
        for result in pair:
            assert result.fit.forward_calls == 2 * 20 * (3 if result.method == two_moons.LOOP else 1)


def test_batches():
    """Each epoch has every point once, in an order of its own, which is also that of jax.random."""
    data = two_moons.load_data(1000, seed=3)
    epochs = [two_moons.epoch_batches(data, 3, epoch) for epoch in range(2)]
    for epoch, batches in enumerate(epochs):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(3), epoch), 800)
        assert [len(x) for x, _ in batches] == [128] * 6 + [32]
        np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), data.x_train[np.asarray(order)])
        np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), data.y_train[np.asarray(order)])
    assert (epochs[0][0][0] != epochs[1][0][0]).any()


def test_parameters(outcome):
    single, loop, stacked, batch = (pair[0].parameters for pair in outcome[0])
    assert loop == stacked == 3 * single
    assert single < batch < 1.2 * single
    assert all(pair[0].parameters == pair[1].parameters for pair in outcome[0])


def test_members_learn_and_differ(outcome):
    for pair in outcome[0]:
        for result in pair:
            assert result.accuracy > 0.8
            assert (result.mutual_information > 1e-4) == (result.method != two_moons.SINGLE)


def test_frameworks_agree(outcome):
    """40 steps from equal weights are too few for rounding to grow: most runs meet the standard of a single pass.

    Where a ReLU changes sign on the way, as in one run of forty, the distance reaches some hundred roundings. Adam's
    bias corrections in float32 take all methods there, and a learning rate that is off by 0.1 % takes them to 9,000.
    """
    distances = [error(b.probs, a.probs, a.probs, "float32") for a, b in outcome[0]]
    assert np.median(distances) <= MEANING_LIMIT * NOISE_FLOOR
    assert max(distances) <= 16 * MEANING_LIMIT * NOISE_FLOOR


def test_loop_and_stacked_ensemble_agree(outcome):
    """Adam does not see that a stacked member's gradient is a third, but for the epsilon beside the root."""
    _, loop, stacked, _ = outcome[0]
    for a, b in zip(loop, stacked, strict=True):
        assert abs(a.probs - b.probs).max() < 0.01 * abs(a.probs - outcome[0][0][0].probs).max()


def test_weights_are_exchanged(outcome):
    """Loading copies, so that only the frameworks' rounding of one forward pass is left."""
    for pair, changes in zip(*outcome, strict=True):
        assert len(changes) == 3
        for change in changes.values():
            assert_close(pair[0].probs + change, pair[0].probs, "float32")


def test_files(outcome, out):
    for method in ("single_network", "deep_ensemble_loop", "deep_ensemble", "batchensemble"):
        names = [sorted(load_file(out / f"{method}_{framework}.safetensors")) for framework in ("torch", "flax")]
        assert names[0] == names[1] != []
    assert_figures(*(out / f"{name}.png" for name in ("reliability", "risk_coverage", "epistemic_uncertainty")))


def test_table(outcome, capsys):
    """The table is whole in a file too, where rich takes a width of 80."""
    two_moons.print_table(outcome[0])
    cells = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in cells if row[0] in ("torch", "Flax")]
    assert [tuple(row[:2]) for row in rows] == ROWS
    assert all(len(row) == 9 for row in rows)
