"""The example of digits runs, and torch and Flax come to the same table."""

import re

import numpy as np
import pytest
import torch
from flax import nnx
from sklearn.datasets import load_digits

import probly_torch
from examples import digits_ood
from examples.digits_ood import BATCH, DEEP, DROPOUT, METHODS, SINGLE
from parity_tests.standard import assert_close
from parity_tests.suite.examples.example_runs import assert_figures, run_once

out, results = run_once(digits_ood.main)


def test_frameworks_agree(results):
    """In float64 and from equal weights, batches and masks: rounding has nothing to grow from in so few steps."""
    assert list(results) == [(method, framework) for method in METHODS for framework in ("torch", "Flax")]
    for method in METHODS:
        pair = [results[method, framework] for framework in ("torch", "Flax")]
        for in_torch, in_flax in zip(*pair, strict=True):
            assert list(in_torch) == list(in_flax)
            names = [name for name in in_torch if name != "seconds"]
            a, b = (np.array([scores[name] for name in names]) for scores in (in_torch, in_flax))
            assert_close(a, b, "float64")


def test_scores(results):
    single, dropout, deep, batch = (results[method, "torch"] for method in METHODS)
    assert dropout[0]["parameters"] == single[0]["parameters"] == 42_505
    assert deep[0]["parameters"] == 5 * single[0]["parameters"]
    assert single[0]["parameters"] < batch[0]["parameters"] < 1.2 * single[0]["parameters"]
    mutual, entropy = digits_ood.DETECTION[:2]
    for scores in (single, dropout, deep, batch):
        assert len(scores) == 2
        for each in scores:
            assert each["accuracy"] > 0.6
            assert each[entropy] > 0.6
            assert (mutual in each) == (scores is not single)


def test_data():
    """No test image, and none of the digit held out, is in training or validation; seeds share the test set."""
    first, second = (digits_ood.load_data(9, seed) for seed in (0, 1))
    parts = (first.x_train, first.x_val, first.x_test, first.near)
    assert sum(map(len, parts)) == 1797 == len(np.unique(np.concatenate(parts), axis=0))
    assert len(first.near) == 180
    np.testing.assert_array_equal(first.x_test, second.x_test)
    assert (first.x_train != second.x_train).any()
    assert set(first.y_train) == set(first.y_test) == set(range(9))


def test_new_writers():
    """The last images, in the order of the data set."""
    images, digits = load_digits(return_X_y=True)
    data = digits_ood.load_data(9, 0, new_writers=True)
    known = images[digits != 9] / 16
    np.testing.assert_array_equal(data.x_test, known[-len(data.x_test) :])
    assert len(data.x_test) == len(digits_ood.load_data(9, 0).x_test)


def test_held_out_digit_leaves_no_gap_in_the_labels():
    for digit in (0, 4):
        data = digits_ood.load_data(digit, 0)
        assert set(data.y_train) == set(range(9))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_masks_of_dropout_are_those_of_flax(dtype):
    x = np.linspace(0.5, 1.5, 40, dtype=dtype).reshape(8, 5)
    ours = digits_ood.Dropout(0.3, probly_torch.Rngs(dropout=7))
    theirs = nnx.Dropout(0.3, rngs=nnx.Rngs(dropout=7))
    for _ in range(2):
        y = ours(torch.from_numpy(x)).numpy()
        assert_close(y, np.asarray(theirs(x)), dtype)
        assert 0 < (y == 0).mean() < 1
    ours.eval()
    np.testing.assert_array_equal(ours(torch.from_numpy(x)), x)


def test_settings_are_among_those_tried():
    for method in (SINGLE, DROPOUT, DEEP, BATCH):
        assert digits_ood.SETTINGS[method] in digits_ood.CHOICES[method]


def test_choice(monkeypatch, capsys):
    """The lowest of each method has a star."""
    settings = [digits_ood.Settings(rate, 0.1) for rate in (1e-5, 1e-2, 1e-4)]
    monkeypatch.setattr(digits_ood, "METHODS", (SINGLE,))
    monkeypatch.setattr(digits_ood, "CHOICES", {SINGLE: settings})
    digits_ood.main(["--choose", "--fast"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith(SINGLE)]
    assert [row[2] for row in rows] == ["1e-05", "0.01", "0.0001"]
    assert [row[-1] == "*" for row in rows] == [False, True, False]


def test_tables(results, out, capsys):
    """Whole in a file too, where rich takes a width of 80; and the same rows for both frameworks."""
    digits_ood.print_tables(results)
    cells = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in cells if row[0] in METHODS and row[1] != "published"]
    quality, detection = rows[:8], rows[8:]
    assert len(detection) == 8
    for table, values in ((quality, slice(5, None)), (detection, slice(2, None))):
        for in_torch, in_flax in zip(table[::2], table[1::2], strict=True):
            assert (in_torch[1], in_flax[1]) == ("torch", "Flax")
            assert in_torch[values] == in_flax[values] != []
    assert sorted(path.name for path in out.iterdir()) == ["detection.png", "reliability.png", "risk_coverage.png"]
    assert_figures(*out.iterdir())
