"""The example of a regression runs, and shows what it says it shows."""

import csv

import numpy as np

from examples import regression_1d
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, error
from parity_tests.suite.examples.example_runs import assert_figures, run_once

ROWS = [(framework, method) for method in (regression_1d.DEEP, regression_1d.BATCH) for framework in ("torch", "Flax")]


out, results = run_once(regression_1d.main)


def test_the_data_has_a_gap_and_noise_that_grows():
    data = regression_1d.load_data(4_000, seed=1)
    for batches in (data.train, data.val):
        assert not any(regression_1d.in_gap(x).any() for x, _ in batches)
    x, y = data.test
    left, right = (np.std((y - regression_1d.function(x))[rows]) for rows in (x < -1, x > 1))
    assert right > 1.5 * left
    assert regression_1d.in_gap(x).mean() > 0.1


def test_rows(results):
    assert [(result.framework.name, result.method) for result in results] == ROWS
    assert results[0].parameters == results[1].parameters == 5 * (128 + 64 * 65 + 130)
    assert results[2].parameters == results[3].parameters < 2 * results[0].parameters / 5


def test_epistemic_uncertainty_grows_in_the_gap_and_aleatoric_does_not(results):
    for result in results:
        assert result.growth["epistemic"] > 2
        assert result.growth["aleatoric"] < 1.5


def test_training_helps(results):
    for result in results:
        history = [row["val_nll"] for row in result.history if "val_nll" in row]
        assert len(history) == 30
        assert history[-1] < history[0] - 0.5


def test_frameworks_agree(results):
    """180 steps from equal weights on the same batches."""
    for ours, theirs in (results[:2], results[2:]):
        for a, b in zip((ours.outside, ours.inside), (theirs.outside, theirs.inside), strict=True):
            values, others = np.array(list(a.values())), np.array(list(b.values()))
            assert error(values, others, values, "float32") <= 16 * MEANING_LIMIT * NOISE_FLOOR


def test_files(results, out):
    assert_figures(*(out / f"{name}.png" for name in ("predictive_bands", "member_spread", "training_curves")))
    with open(out / "logs" / "version_1" / "metrics.csv") as file:
        assert {"train_loss", "val_nll", "val_rmse", "val_crps", "val_coverage"} <= set(next(csv.reader(file)))


def test_table(results, capsys):
    regression_1d.print_table(results, regression_1d.load_data(600, seed=0))
    printed = capsys.readouterr().out
    for name in ("NLL", "RMSE", "CRPS", "coverage", "aleatoric", "epistemic", "in the gap", "outside"):
        assert name in printed
    assert f"epistemic {results[0].growth['epistemic']:.2f}" in printed
