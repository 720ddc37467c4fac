"""The example that moves on the way: a run that moved is the run that never did."""

import numpy as np

from examples import port_and_resume
from examples.port_and_resume import MOVED, NEVER, WEIGHTS_ONLY
from parity_tests.standard import assert_same_trajectory
from parity_tests.suite.examples.example_runs import assert_figures, run_once

out, groups = run_once(port_and_resume.main)


def test_runs(groups):
    assert [[run.name for run in runs] for runs in groups] == [[NEVER, MOVED, WEIGHTS_ONLY]] * 2
    for runs, dtype in zip(groups, ("float32", "float64"), strict=True):
        assert [len(run.losses) for run in runs] == [2 * 22, 22, 22]
        assert all(array.dtype == dtype for run in runs for array in run.weights.values())
        assert runs[0].losses[-5:].mean() < runs[0].losses[:5].mean()


def test_only_the_run_with_the_optimizer_state_goes_on_as_if_it_had_not_moved(groups):
    never, moved, weights_only = groups[1]
    for name, weights in never.weights.items():
        assert_same_trajectory(moved.weights[name], weights)
    assert_same_trajectory(moved.losses, never.losses[-22:])
    assert_same_trajectory(weights_only.losses[:1], never.losses[-22:-21])
    assert weights_only.distances(never)[1] > 1e-4


def test_files_and_figure(groups, out):
    names = [f"{kind}_{dtype}.safetensors" for kind in ("optimizer", "weights") for dtype in ("float32", "float64")]
    assert sorted(path.name for path in out.iterdir()) == sorted(["losses.png", *names])
    assert_figures(out / "losses.png")


def test_batches():
    """All of one size, without a point twice; each epoch in an order of its own."""
    data = port_and_resume.load_data(3, "float32")
    epochs = [port_and_resume.epoch_batches(data, 3, epoch) for epoch in range(2)]
    assert {x.shape for batches in epochs for x, _ in batches} == {(64, 1, 8, 8)}
    assert (epochs[0][0][0] != epochs[1][0][0]).any()
    distinct = len(np.unique(data.x_train, axis=0))
    assert len(np.unique(np.concatenate([x for x, _ in epochs[0]]), axis=0)) >= distinct - 29


def test_table(groups, capsys):
    port_and_resume.print_table(groups)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip().startswith(("float32", "float64")) for line in lines) == 6
