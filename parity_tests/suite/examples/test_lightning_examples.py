"""The examples of Lightning run: the module, the five lines that make it an ensemble, and the configuration files."""

import inspect

import pytest
import torch

from examples import lightning_cli, lightning_module
from examples.lightning_module import Digits, DigitsEnsemble
from parity_tests.suite.examples.example_runs import assert_figures


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def modules(out):
    threads = torch.get_num_threads()
    yield lightning_module.main(["--fast", "--out", str(out / "module")])
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def configs(out):
    threads = torch.get_num_threads()
    yield lightning_cli.main(["--fast", "--out", str(out / "cli")])
    torch.set_num_threads(threads)


def test_five_lines():
    changed = [line[1:] for line in lightning_module.difference() if line.startswith("+")]
    removed = [line[1:] for line in lightning_module.difference() if line.startswith("-")]
    assert len(changed) == len(removed) == 5
    source = inspect.getsource(Digits).splitlines()
    assert len(source) <= 40
    assert "EnsembleMixin" not in inspect.getsource(Digits)
    assert set(removed) <= set(source)
    assert set(changed) <= set(inspect.getsource(DigitsEnsemble).splitlines())


def test_module_results(modules, out):
    plain, ensemble = modules["Digits"], modules["DigitsEnsemble"]
    assert plain.parameters == 42_634 < ensemble.parameters < 1.2 * plain.parameters
    for result in modules.values():
        assert result.scores["test_accuracy"] > 0.7
        assert {"train_loss", "val_loss", "val_nll"} <= set().union(*result.history)
        assert result.probs.shape == (359, 10)
        torch.testing.assert_close(result.probs.sum(-1), torch.ones(359))
    assert plain.scores["test_mutual_information"] == 0 < ensemble.scores["test_mutual_information"]
    assert plain.scores["test_nll"] == pytest.approx(plain.scores["test_loss"])
    assert ensemble.scores["test_nll"] < ensemble.scores["test_loss"], "the mixture's is below the members' mean"
    assert_figures(out / "module" / "training.png")


def test_every_configuration(configs, out):
    methods = ("batchensemble", "deep_ensemble", "single")
    assert list(configs) == [f"{data}_{method}" for data in ("digits", "two_moons") for method in methods]
    for data in ("digits", "two_moons"):
        batch, deep, single = (configs[f"{data}_{method}"] for method in methods)
        assert deep.parameters == 4 * single.parameters
        assert single.parameters < batch.parameters < 1.2 * single.parameters
        assert single.scores["test_mutual_information"] == 0
        assert min(batch.scores["test_mutual_information"], deep.scores["test_mutual_information"]) > 1e-4
    for result in configs.values():
        assert result.scores["test_nll"] < 3
        assert {row["epoch"] for row in result.history} == {0, 1}
    assert_figures(out / "cli" / "training.png")
