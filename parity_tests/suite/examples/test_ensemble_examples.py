"""The examples of deep ensembles in Flax run, and show what they say they show."""

import jax
import numpy as np
import pytest

from examples import custom_lift, flax_ensemble, vmap_over_ensemble
from parity_tests.standard import assert_close

N, D, F, B = (getattr(vmap_over_ensemble, name) for name in "NDFB")


@pytest.fixture(autouse=True)
def _x32():
    """Switches off x64, as the examples ran for the fixtures below.

    So JAX compiles each draw once and not once more for x64.
    """
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def members():
    return flax_ensemble.main([])


@pytest.fixture(scope="module")
def lanes():
    return vmap_over_ensemble.main([])


def test_architectures(members):
    sizes = {r.case.name: (len(r.model), sum(w[0].size for w in flax_ensemble.weights(r.model))) for r in members[0]}
    assert sizes == {
        "three Linear layers": (3, 3 * (2 * 2 + 2)),
        "MLP, 10 outputs": (5, 4 * 64 + 64 + 64 * 10 + 10),
        "MLP, 3 outputs": (5, 4 * 64 + 64 + 64 * 3 + 3),
        "CNN": (3, 9 * 32 + 32 + 9 * 32 * 64 + 64 + 64 * 10 + 10),
    }
    outputs = {r.case.name: r.y.shape for r in members[0]}
    assert list(outputs.values()) == [(3, 5, 2), (5, 5, 10), (5, 5, 3), (3, 5, 10)]


def test_members_are_independent(members):
    """By each way of making them; and the check would see members that are not."""
    for r in members[0]:
        parameters, y = len(flax_ensemble.weights(r.model)), np.asarray(r.y)
        if r.way == flax_ensemble.UNCHANGED:
            assert len(set(r.draws)) * len(r.model) == len(r.draws)
            assert_close(y, y[:1].repeat(len(r.model), 0), "float32")
        else:
            drawn = parameters if r.way == flax_ensemble.RULE else parameters // 2  # biases start as zeros
            assert len(set(r.draws)) == len(r.draws) == drawn * len(r.model)
            assert (y.var(axis=0) > 1e-6).all()


def test_base_is_untouched(members):
    for r in members[0]:
        assert r.base_untouched is (None if r.way == flax_ensemble.CONSTRUCTED else True)


def test_normal_rule_draws_standard_normals(members):
    for r in members[0]:
        if r.way == flax_ensemble.RULE and r.case.name == "CNN":
            values = np.concatenate([w.ravel() for w in flax_ensemble.weights(r.model)])
            assert abs(values.mean()) < 0.02
            assert abs(values.std() - 1) < 0.02


def test_members_taken_out(members):
    results, found = members
    y = np.asarray(results[0].y)
    assert_close(y + found["by index"], y, "float32")
    assert_close(y + found["by iteration"], y, "float32")
    assert found["pruning keeps weights"] is True


def test_recipe(lanes):
    assert len(lanes["recipe"]) == len(vmap_over_ensemble.CASES)
    assert all(lanes["recipe"].values())


# Sizes of the example, whose draws JAX has compiled then.
@pytest.mark.parametrize(("seed", "inputs", "num_models", "features"), [(1.0, 3, 4.0, 2.0), (5.9, 16, 5.0, 3.0)])
def test_recipe_takes_floats(seed, inputs, num_models, features):
    x = jax.device_put(np.linspace(-1, 1, inputs, dtype=np.float32))
    ours = vmap_over_ensemble.vmap_over_ensemble(seed, x, num_models, features)
    assert ours.shape == (int(num_models) * int(features),)
    np.testing.assert_array_equal(ours, vmap_over_ensemble.by_hand(seed, x, num_models, features))
    rows = np.asarray(ours).reshape(int(num_models), -1)
    assert len(np.unique(rows, axis=0)) == num_models


def test_patterns(lanes):
    shapes = {(None, 0): (B, F), (0, None): (N, F), (0, 0): (N, F)}
    assert {in_axes: by_vmap.shape for in_axes, (by_vmap, _) in lanes["patterns"].items()} == shapes
    for by_vmap, ours in lanes["patterns"].values():
        assert_close(ours, by_vmap, "float32")


def test_pitfalls(lanes):
    split, loop, axes = lanes["split"], lanes["loop"], lanes["axes"]
    assert (split["shared"], split["split"]) == (1, N)
    assert "ensemble expects members that differ; got 4 equal ones." in split["errors"][1]
    assert (loop["common"], loop["equal"]) == (0, True)
    assert loop["calls"][0] < loop["calls"][1] == N
    assert_close(np.float32(loop["apart"]) + np.ones(1, np.float32), np.ones(1, np.float32), "float32")
    assert axes["silent"] != (D,)
    assert axes["right"] == ((N, F), (N, B, F))
    assert "leave in_axes out: model(x)." in axes["errors"][2]


def test_another_seed_gives_other_members():
    case, x = flax_ensemble.CASES[0], jax.device_put(np.ones(D, np.float32))
    draws = [set(flax_ensemble.run(case, flax_ensemble.REINITIALISED, seed).draws) for seed in (0, 1)]
    assert not draws[0] & draws[1]
    outputs = [np.asarray(vmap_over_ensemble.vmap_over_ensemble(seed, x, N, F)) for seed in (0, 1)]
    assert (outputs[0] != outputs[1]).all()


@pytest.mark.parametrize("seed", [0, 7])
def test_the_lift_by_hand_and_by_ensemble_agree(seed):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        means = custom_lift.main(["--seed", str(seed)])
    for mean in means.values():
        assert_close(mean, means["loop"], "float32")
