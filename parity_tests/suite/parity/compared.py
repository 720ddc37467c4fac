"""What is compared by a test of its own, having no gradients and so no subject; and what a test runs.

The suite sees that the tests of the table run what they are there for, in both packages: conftest.py asks while they
run, and test_coverage.py asks for every public name.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import probly_flax
import probly_torch.metrics
import probly_torch.plots

PACKAGES = (probly_torch, probly_flax)
METRICS = frozenset(probly_torch.metrics.__all__)
OOD_METRICS = frozenset({"OODAUROC", "OODFPR95"})
FUNCTIONS_OF_METRICS = {name for name in METRICS if name.islower()} | {"ReliabilityBins"}
CLASSES_OF_METRICS = METRICS - FUNCTIONS_OF_METRICS - OOD_METRICS
TORCH_ONLY, FLAX_ONLY = ({package.__name__} for package in PACKAGES)
BOTH = TORCH_ONLY | FLAX_ONLY
# A test, the names that it compares, and the packages in which it runs them.
TABLE = (
    (
        "test_networks.test_the_same_seed_draws_the_same_fast_weights_whatever_the_order_of_definition",
        "batchensemble normal",
        BOTH,
    ),
    ("test_networks.test_a_users_layer_is_converted_when_registered_and_draws_alike", "register_batchensemble", BOTH),
    ("test_ensemble.test_a_rule_for_one_call_gives_twins_the_same_numbers", "ensemble", BOTH),
    ("test_members.test_a_rule_for_a_parameter_type_gives_twins_the_same_numbers", "register_reset", BOTH),
    ("test_uncertainty.test_disagreement_counts_pairs", "disagreement", BOTH),
    (
        "test_uncertainty.test_streams_give_what_the_functions_of_all_members_give[30.0]",
        "ClassificationStream RegressionStream Uncertainty",
        BOTH,
    ),
    ("test_metrics.test_functions_agree_with_a_loop_over_inputs", " ".join(FUNCTIONS_OF_METRICS), BOTH),
    (
        "test_metrics.test_batches_of_any_size_in_any_order_give_what_all_inputs_do_after_a_reset_too",
        " ".join(CLASSES_OF_METRICS),
        TORCH_ONLY,
    ),
    (
        "test_metrics.test_flax_metrics_agree_by_batches_in_another_order_after_a_reset_under_jit",
        " ".join(CLASSES_OF_METRICS),
        FLAX_ONLY,
    ),
    ("test_metrics.test_ood_metrics_over_mixed_batches", " ".join(OOD_METRICS), BOTH),
    ("test_random.test_rngs_gives_the_keys_of_nnx", "Rngs RngStream", BOTH),
    ("test_random.test_keys[0]", "key split fold_in", BOTH),
    ("test_random.test_bits[42]", "bits", BOTH),
    ("test_random.test_integers", "randint", BOTH),
    ("test_random.test_choices", "choice", BOTH),
    ("test_random.test_classes[0-shape2-True]", "categorical", BOTH),
    ("test_random.test_default_dtypes_without_x64", "bernoulli", BOTH),
    ("test_random.test_uniform_takes_bounds_that_broadcast", "uniform", BOTH),
    ("test_random.test_bounds_of_a_truncated_normal_broadcast_and_are_kept[bounds1]", "truncated_normal", BOTH),
    ("test_random.test_permutation_of_an_array[False-0]", "permutation", BOTH),
    (
        "test_weights.test_torch_to_file_to_flax_to_file_to_torch_is_bit_for_bit[layer-float32]",
        "to_arrays save_weights load_weights",
        BOTH,
    ),
    ("test_options.test_every_kind_has_twins", "Inventory", BOTH),
    ("test_weights.test_arrays_are_copies", "load_arrays", BOTH),
    ("test_optimizers.test_a_state_moves_bit_for_bit[momentum-float32]", "optimizer_to_arrays", BOTH),
    ("test_optimizers.test_a_new_optimizer_has_zeros[momentum]", "load_optimizer_arrays", BOTH),
    ("test_optimizers.test_files_are_plain_and_damage_is_named", "save_optimizer", BOTH),
    (
        "test_optimizers.test_moments_follow_the_rows_of_a_layer_that_reads_a_flattened_convolution",
        "load_optimizer",
        BOTH,
    ),
    ("test_training_torch.test_groups_give_fast_weights_their_own_learning_rate", "fast_weight_groups", TORCH_ONLY),
    ("test_fast_weight_groups.test_what_a_parameter_is_follows_from_its_type", "fast_weight_groups", FLAX_ONLY),
    (
        "test_training_torch.test_what_is_logged_and_predicted_is_what_metrics_and_uncertainty_say[classification-single]",
        "EnsembleClassifier EnsembleMixin",
        TORCH_ONLY,
    ),
    (
        "test_training_torch.test_what_is_logged_and_predicted_is_what_metrics_and_uncertainty_say[regression-single]",
        "EnsembleRegressor",
        TORCH_ONLY,
    ),
    (
        "test_training_torch.test_a_module_of_ones_own_trains_and_is_judged_alike[32-true-single]",
        "EnsembleMetrics",
        TORCH_ONLY,
    ),
    (
        "test_training_torch.test_members_are_clipped_by_their_own_norms_in_both_packages",
        "clip_by_member_norm",
        FLAX_ONLY,
    ),
    ("test_training_flax.test_what_is_logged", "TrainState fit make_eval_step make_train_step", FLAX_ONLY),
    ("test_port.test_registered_rules", "port register_rule", TORCH_ONLY),
    ("test_port.test_buffers_and_parameters_of_ones_own", "to_flax_source", TORCH_ONLY),
    *((f"test_plots.test_twins_draw_the_same[{name}]", name, BOTH) for name in sorted(set(probly_torch.plots.__all__))),
)
TESTS: dict[str, set[tuple[str, str]]] = {}  # (package, name) by test
for _test, _names, _packages in TABLE:
    TESTS.setdefault(_test, set()).update((package, name) for package in _packages for name in _names.split())


def public(package: ModuleType) -> dict[str, Any]:
    """Returns the functions and classes of a package and its public modules, by name."""
    names = [name for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith("_")]
    modules = [package, *(importlib.import_module(f"{package.__name__}.{name}") for name in names)]
    found = {name: getattr(module, name) for module in modules for name in getattr(module, "__all__", ())}
    return {name: item for name, item in found.items() if callable(item)}


@cache
def _codes() -> tuple[dict[Any, set[tuple[str, str]]], dict[type, set[tuple[str, str]]], set[Any]]:
    """Returns the names, (package, name), of functions by their code, of classes, and the code of all their methods."""
    functions: dict[Any, set[tuple[str, str]]] = {}
    classes: dict[type, set[tuple[str, str]]] = {}
    for package in PACKAGES:
        for name, item in public(package).items():
            if inspect.isclass(item):
                classes.setdefault(item, set()).add((package.__name__, name))
            elif hasattr(function := inspect.unwrap(item), "__code__"):
                functions.setdefault(function.__code__, set()).add((package.__name__, name))
    methods = {
        function.__code__
        for item in classes
        for base in item.__mro__
        if base is item or base.__module__.startswith("probly_")
        for name, method in vars(base).items()
        if inspect.isfunction(function := _function(method))
        if not name.startswith("_") or name in ("__call__", "__new__")
    }
    return functions, classes, methods


def _function(attribute: Any) -> Any:
    """Returns the function of a method, a class method or a property."""
    return next((own for name in ("__func__", "fget", "func") if (own := getattr(attribute, name, None))), attribute)


def name_of_test(item: Any) -> str:
    """Returns the name that an item of pytest has in the table."""
    return f"{item.module.__name__.rpartition('.')[2]}.{item.name}"


@contextmanager
def calls() -> Iterator[set[tuple[str, str]]]:
    """Yields a set of (package, name), to which is added what runs: functions, and methods of classes."""
    functions, classes, methods = _codes()
    seen: set[tuple[str, str]] = set()

    def see(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if code in functions:
            seen.update(functions[code])
        elif code in methods and frame.f_back.f_code.co_name != "__init__":  # to be made is not to be used
            first = frame.f_locals.get(code.co_varnames[0])
            for base in (first if isinstance(first, type) else type(first)).__mro__:
                seen.update(classes.get(base, ()))

    before = sys.gettrace()
    sys.settrace(see)  # which is asked once for each Python call, where sys.setprofile is asked four times
    try:
        yield seen
    finally:
        sys.settrace(before)
