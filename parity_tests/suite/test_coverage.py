"""Every public function and class is compared: by a subject of its name, or by the test that the table names."""

import importlib
import inspect
import pkgutil
import sys

import pytest

import probly_flax
import probly_torch.metrics
from parity_tests.suite import (
    draws,
    test_ensemble,
    test_metrics,
    test_networks,
    test_optimizers,
    test_options,
    test_plots,
    test_port,
    test_random,
    test_training_flax,
    test_training_torch,
    test_uncertainty,
    test_weights,
)
from parity_tests.suite.subjects_all import ALL

COMPARED = {twins.public_name: twins for twins in reversed(ALL)}
# What has no gradients to compare, and so no subject: the test that holds the two against each other instead.
ELSEWHERE = {
    "batchensemble": test_networks.test_the_same_seed_draws_the_same_fast_weights_whatever_the_order_of_definition,
    "ensemble": test_ensemble.test_a_rule_for_one_call_gives_twins_the_same_numbers,
    "register_batchensemble": test_networks.test_a_users_layer_is_converted_when_registered_and_draws_alike,
    "register_reset": test_ensemble.test_a_registered_rule_goes_first_and_serves_subclasses,
    "disagreement": test_uncertainty.test_disagreement_counts_pairs,
    **dict.fromkeys(
        ("ClassificationStream", "RegressionStream", "Uncertainty"),
        test_uncertainty.test_streams_give_what_the_functions_of_all_members_give,
    ),
    **dict.fromkeys(probly_torch.metrics.__all__, test_metrics),
    **dict.fromkeys(("Rngs", "RngStream"), test_random.test_rngs_gives_the_keys_of_nnx),
    **dict.fromkeys(("key", "split", "fold_in"), test_random.test_keys),
    "bits": test_random.test_bits,
    "randint": test_random.test_integers,
    "choice": test_random.test_choices,
    "categorical": test_random.test_classes,
    **dict.fromkeys(("bernoulli", "normal", "truncated_normal", "uniform"), draws.draws),
    "permutation": test_random.test_permutation_of_an_array,
    "Inventory": test_options,
    **dict.fromkeys(("to_arrays", "load_arrays", "save_weights", "load_weights"), test_weights),
    **dict.fromkeys(("optimizer_to_arrays", "load_optimizer_arrays"), test_optimizers),
    **dict.fromkeys(("save_optimizer", "load_optimizer"), test_optimizers),
    **dict.fromkeys(
        ("EnsembleClassifier", "EnsembleMetrics", "EnsembleMixin", "EnsembleRegressor", "fast_weight_groups"),
        test_training_torch,
    ),
    **dict.fromkeys(("TrainState", "fit", "make_eval_step", "make_train_step"), test_training_flax),
    **dict.fromkeys(("port", "to_flax_source", "register_rule"), test_port),
    **dict.fromkeys(("confidence_histogram", "member_spread", "predictive_band", "reliability_diagram"), test_plots),
    **dict.fromkeys(("risk_coverage_curve", "training_curves", "uncertainty_map"), test_plots),
}


def public(package):
    """Returns the functions and classes of a package and its public modules, by name."""
    names = [name for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith("_")]
    modules = [package, *(importlib.import_module(f"{package.__name__}.{name}") for name in names)]
    found = {name: getattr(module, name) for module in modules for name in getattr(module, "__all__", ())}
    return {name: item for name, item in found.items() if callable(item)}


def uncompared():
    return {*public(probly_torch), *public(probly_flax)} - COMPARED.keys() - ELSEWHERE.keys()


def test_every_public_name_is_compared():
    assert not uncompared(), "add a subject, see CONTRIBUTING.md"


def test_a_new_name_has_to_be(monkeypatch):
    monkeypatch.setattr(probly_flax.uncertainty, "surprise", lambda probs: probs, raising=False)
    monkeypatch.setattr(probly_flax.uncertainty, "__all__", [*probly_flax.uncertainty.__all__, "surprise"])
    assert uncompared() == {"surprise"}


def test_the_table_has_no_name_that_is_gone_or_has_a_subject():
    assert not ELSEWHERE.keys() - {*public(probly_torch), *public(probly_flax)}
    assert not ELSEWHERE.keys() & COMPARED.keys()
    assert not COMPARED.keys() - public(probly_torch).keys()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_test_in_the_table_is_about_the_name(name):
    source = inspect.getsource(sys.modules[getattr(ELSEWHERE[name], "__module__", ELSEWHERE[name].__name__)])
    assert name in source


@pytest.mark.parametrize("name", COMPARED)
def test_the_subject_runs_what_it_is_named_after(name):
    item, called = public(probly_torch)[name], set()
    function = item.forward if inspect.isclass(item) else item
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        COMPARED[name].torch(COMPARED[name].draw(0, "float32"), "float32")
    finally:
        sys.setprofile(None)
    assert function.__code__ in called
