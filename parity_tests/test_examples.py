"""The examples run, and show what they say they show."""

import re

import pytest
import torch
from safetensors.numpy import load_file

from examples import two_moons
from parity_tests.standard import assert_close

METHODS = (two_moons.SINGLE, two_moons.LOOP, two_moons.STACKED, two_moons.BATCH)
ROWS = [(framework, method) for method in METHODS for framework in ("torch", "Flax")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("two_moons")


@pytest.fixture(scope="module")
def outcome(out):
    threads = torch.get_num_threads()
    yield two_moons.main(["--fast", "--out", str(out)])
    torch.set_num_threads(threads)


def test_rows(outcome):
    rows = [(result.framework.name, result.method) for pair in outcome[0] for result in pair]
    assert rows == ROWS


def test_forward_calls(outcome):
    """2,400 points make 19 batches an epoch, the last of them smaller; the loop passes each three times."""
    for pair in outcome[0]:
        for result in pair:
            assert result.fit.forward_calls == 2 * 19 * (3 if result.method == two_moons.LOOP else 1)


def test_parameters(outcome):
    single, loop, stacked, batch = (pair[0].parameters for pair in outcome[0])
    assert loop == stacked == 3 * single
    assert single < batch < 1.2 * single
    assert all(pair[0].parameters == pair[1].parameters for pair in outcome[0])


def test_members_learn_and_differ(outcome):
    for pair in outcome[0]:
        for result in pair:
            assert result.accuracy > 0.8
            assert (result.mutual_information > 1e-3) == (result.method != two_moons.SINGLE)


def test_frameworks_agree(outcome):
    """38 steps from equal weights are too few for rounding to grow, so the standard of a single pass still holds.

    It would not with Adam's bias corrections in float32: they move probabilities by 100 roundings and more.
    """
    for torch_result, flax_result in outcome[0]:
        assert_close(flax_result.probs, torch_result.probs, "float32")


def test_loop_and_stacked_ensemble_agree(outcome):
    """Adam does not see that a stacked member's gradient is a third, but for the epsilon beneath the root."""
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
    for figure in ("reliability.png", "epistemic_uncertainty.png"):
        data = (out / figure).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 20_000, "a figure with nothing in it is smaller"


def test_table(outcome, capsys):
    """The table is whole in a file too, where rich takes a width of 80."""
    two_moons.print_table(outcome[0])
    cells = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in cells if row[0] in ("torch", "Flax")]
    assert [tuple(row[:2]) for row in rows] == ROWS
    assert all(len(row) == 9 for row in rows)
