"""Metrics against loops over inputs in float64, against torchmetrics and scikit-learn, and against each other."""

import copy
import pickle
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics
from flax import nnx

import probly_flax.metrics as fm
import probly_torch.losses
import probly_torch.metrics as tm
import probly_torch.uncertainty
from parity_tests import standard
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.oracle import members as oracle
from parity_tests.suite.oracle import metrics as oracle_metrics

E, B, C = 4, 60, 5
CLASSES = {
    "accuracy": "Accuracy",
    "nll": "NLL",
    "brier": "Brier",
    "diversity": "Diversity",
    "ece": "ECE",
    "adaptive_ece": "AdaptiveECE",
    "classwise_ece": "ClasswiseECE",
    "reliability_bins": "ReliabilityCurve",
    "aurc": "AURC",
}
NUMBERS = {"crps": "CRPS", "interval_coverage": "IntervalCoverage", "sharpness": "Sharpness"}
OOD = {"ood_auroc": "OODAUROC", "ood_fpr95": "OODFPR95"}
PER_MEMBER = {*CLASSES.values()} - {"Diversity"}


def rounded(array, dtype="float32"):
    return array.astype(dtype).astype(np.float64)


def draw(seed=0):
    """Draws inputs for each kind of metric.

    They are logits, labels; means, variances and targets of two numbers each; scores of two kinds, some of them equal.
    """
    rng = np.random.default_rng(seed)
    logits = rounded(2 * rng.standard_normal((E, B, C)))
    labels = np.where(rng.random(B) < 0.5, logits.mean(0).argmax(-1), rng.integers(0, C, B))
    mean, targets = rounded(rng.standard_normal((E, B, 2))), rounded(rng.standard_normal((B, 2)))
    variance = rounded(rng.uniform(0.05, 0.5, (E, B, 2)))
    inside, outside = rng.integers(0, 30, 37) / 8, rng.integers(10, 40, 41) / 8
    return {"classes": (logits, labels), "numbers": (mean, variance, targets), "ood": (inside, outside)}


def to_torch(arrays, dtype="float64"):
    return [torch.tensor(a, dtype=getattr(torch, dtype) if a.dtype.kind == "f" else None) for a in arrays]


def to_flax(arrays, dtype="float64"):
    return [jax_of(a, dtype if a.dtype.kind == "f" else None) for a in arrays]


def functions(package, classes, numbers, ood):
    """Computes every function of metrics."""
    values = {name: getattr(package, name)(*classes) for name in CLASSES}
    values |= {name: getattr(package, name)(*numbers) for name in ("crps", "interval_coverage")}
    values |= {"sharpness": package.sharpness(*numbers[:2]), "half": package.interval_coverage(*numbers, level=0.5)}
    values |= {name: getattr(package, name)(*ood) for name in OOD}
    values["7 bins"] = package.ece(*classes, num_bins=7)
    values["aurc of a score"] = package.aurc(*classes, uncertainty=classes[0][0, :, 0].round())
    bins = values.pop("reliability_bins")
    return values | {f"reliability_bins {field}": value for field, value in bins._asdict().items()}


def of_oracle(classes, numbers, ood):
    values = {name: getattr(oracle_metrics, name)(*classes) for name in CLASSES if name != "reliability_bins"}
    values |= {name: getattr(oracle_metrics, name)(*numbers) for name in NUMBERS}
    values["half"] = oracle_metrics.interval_coverage(*numbers, level=0.5)
    values |= {name: getattr(oracle_metrics, name)(*ood) for name in OOD}
    values["7 bins"] = oracle_metrics.ece(*classes, num_bins=7)
    values["aurc of a score"] = oracle_metrics.aurc(*classes, uncertainty=classes[0][0, :, 0].round())
    bins = zip(tm.ReliabilityBins._fields, oracle_metrics.reliability_bins(*classes), strict=True)
    return values | {f"reliability_bins {field}": value for field, value in bins}


def as_arrays(values):
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def run_torch(arrays, dtype):
    return as_arrays(functions(tm, **{kind: to_torch(each, dtype) for kind, each in arrays.items()}))


def run_flax(arrays, dtype):
    jitted = jax.jit(lambda **arrays: functions(fm, **arrays))  # one program
    return as_arrays(jitted(**{kind: to_flax(each, dtype) for kind, each in arrays.items()}))


def test_functions_agree_with_a_loop_over_inputs():
    arrays = draw()
    runs = [{dtype: [run(arrays, dtype)] for dtype in ("float32", "float64")} for run in (run_torch, run_flax)]
    standard.assert_holds(standard.bounded(*runs, [as_arrays(of_oracle(**arrays))]))


def saturated_votes():
    """Makes ten members: k = 1..10 are certain of class 0 and each other one of a class of its own.

    So the confidence is k/10.
    """
    logits = np.zeros((10, 10, 10))
    for b in range(10):
        for i in range(10):
            logits[i, b, 0 if i <= b else i] = 300.0
    return logits, np.zeros(10, np.int64)


def torch_in_tenths(*classes):
    """Computes functions of classes in ten bins, and what is to be seen in the order of uncertainty."""
    *classes, uncertainty = to_torch(classes)
    values = {name: getattr(tm, name)(*classes, num_bins=10) for name in CLASSES if "ece" in name or "bins" in name}
    return values | {"aurc": tm.aurc(*classes), "aurc of a score": tm.aurc(*classes, uncertainty=uncertainty)}


@jax.jit
def _flax_in_tenths(*classes):
    *classes, uncertainty = classes
    values = {name: getattr(fm, name)(*classes, num_bins=10) for name in CLASSES if "ece" in name or "bins" in name}
    return values | {"aurc": fm.aurc(*classes), "aurc of a score": fm.aurc(*classes, uncertainty=uncertainty)}


def flax_in_tenths(*classes):
    """Computes the same, one program for all tests of ten members, inputs and classes."""
    return _flax_in_tenths(*to_flax(classes))


BOTH_IN_TENTHS = (torch_in_tenths, flax_in_tenths)


def test_a_confidence_on_an_edge_is_in_the_bin_below_it_and_1_is_in_the_last():
    logits, labels = saturated_votes()
    for in_tenths in BOTH_IN_TENTHS:
        bins = in_tenths(logits, labels, np.zeros(10))["reliability_bins"]
        np.testing.assert_array_equal(np.asarray(bins.count), np.ones(10))
        assert_close(np.asarray(bins.confidence), np.arange(1, 11) / 10, "float64")
    bins = fm.reliability_bins(*to_flax((logits, labels)), num_bins=10)  # op by op, too
    np.testing.assert_array_equal(bins.count, np.ones(10))


def test_errors_on_edges():
    logits, labels = saturated_votes()
    labels[5:8] = 3
    for in_tenths in BOTH_IN_TENTHS:
        values = in_tenths(logits, labels, np.zeros(10))
        for name in ("ece", "classwise_ece", "adaptive_ece"):
            expected = getattr(oracle_metrics, name)(logits, labels, num_bins=10)
            assert_close(np.asarray(values[name]), expected, "float64")


def test_a_confidence_of_1_counts():
    """Without it, a model that is always certain and always wrong has no error."""
    logits, labels = 300.0 * np.stack([np.eye(10)] * 10), np.roll(np.arange(10), 1)
    for in_tenths in BOTH_IN_TENTHS:
        values = in_tenths(logits, labels, np.zeros(10))
        assert values["ece"] == values["adaptive_ece"] == values["aurc"] == 1
        assert_close(np.asarray(values["classwise_ece"]), 0.2, "float64")


def test_the_order_of_inputs_that_tie_does_not_matter():
    rng = np.random.default_rng(0)
    logits, scores = np.repeat(rng.integers(0, 2, (1, 10, 10)).astype(float), 10, 0), rng.integers(0, 3, 10) / 4
    labels, order = logits[0].argmax(-1) * (rng.random(10) < 0.5), rng.permutation(10)
    for in_tenths in BOTH_IN_TENTHS:
        first, other = in_tenths(logits, labels, scores), in_tenths(logits[:, order], labels[order], scores[order])
        for name in ("aurc", "adaptive_ece", "aurc of a score"):
            assert_close(np.asarray(other[name]), np.asarray(first[name]), "float64")
        assert_close(np.asarray(first["aurc"]), oracle_metrics.aurc(logits, labels), "float64")
        assert_close(np.asarray(first["aurc of a score"]), oracle_metrics.aurc(logits, labels, scores), "float64")
        assert_close(np.asarray(first["adaptive_ece"]), oracle_metrics.adaptive_ece(logits, labels, 10), "float64")


def test_a_score_that_is_nan_has_no_order():
    nan, scores = np.array([0.0, np.nan]), np.array([0.0, 1.0])
    ood = jax.jit(lambda *scores: [getattr(fm, name)(*scores) for name in OOD])
    for first, second in ((nan, scores), (scores, nan)):
        assert all(getattr(tm, name)(*to_torch((first, second))).isnan() for name in OOD)
        assert np.isnan(ood(*to_flax((first, second)))).all()
    for in_tenths in BOTH_IN_TENTHS:
        values = in_tenths(*saturated_votes(), np.append(np.zeros(9), np.nan))
        assert np.isnan(np.asarray(values["aurc of a score"]))
        assert values["aurc"] == 0


def test_labels_out_of_range_are_not_counted_as_wrong():
    for label in (-1, 10):
        logits, labels = np.zeros((10, 10, 10)), np.full(10, label)
        for name in CLASSES:
            with pytest.raises(RuntimeError, match=r"index|[Cc]lass values"):
                getattr(tm, name)(*to_torch((logits, labels)))
        values = flax_in_tenths(logits, labels, np.zeros(10))
        assert np.isnan(np.asarray(values.pop("reliability_bins").accuracy)).all()
        assert all(np.isnan(value) for value in values.values())
    nan = jax.jit(lambda *classes: [getattr(fm, name)(*classes) for name in ("accuracy", "nll", "brier", "diversity")])
    assert np.isnan(nan(*to_flax((logits, labels)))).all()


def test_empty_bins_and_one_bin():
    logits, labels = to_torch(draw()["classes"])
    bins = tm.reliability_bins(logits, labels, num_bins=100)
    assert bins.count.sum() == B
    assert (bins.accuracy.isnan() == (bins.count == 0)).all()
    assert_close(tm.ece(logits, labels, num_bins=1), oracle_metrics.ece(logits.numpy(), labels.numpy(), 1), "float64")
    of_flax = jax.jit(fm._calibration._binned, static_argnums=2)(np.zeros(3), np.ones(3), 1)
    assert (np.asarray(of_flax[2]) == 3).all()


def test_torchmetrics_and_scikit_learn():
    arrays = draw()
    logits, labels = to_torch(arrays["classes"])
    probs = probly_torch.uncertainty.mean_probs(logits)
    references = {
        "accuracy": sklearn.metrics.accuracy_score(labels, probs.argmax(-1)),
        "nll": sklearn.metrics.log_loss(labels, probs, labels=range(C)),
        "brier": sklearn.metrics.brier_score_loss(labels, probs, labels=range(C), scale_by_half=False),
    }
    for name, expected in references.items():
        assert_close(getattr(tm, name)(logits, labels), expected, "float64")
    functional = torchmetrics.functional
    for num_bins in (5, 15):  # closed on the left there, which only matters on edges
        expected = functional.classification.multiclass_calibration_error(probs, labels, C, num_bins)
        assert_close(tm.ece(logits, labels, num_bins=num_bins), expected, "float32")
    macro = functional.classification.multiclass_accuracy(probs, labels, C, average="micro")
    assert_close(tm.accuracy(logits, labels), macro, "float32")

    inside, outside = arrays["ood"]
    scores, is_ood = np.concatenate([inside, outside]), np.repeat([0, 1], [len(inside), len(outside)])
    expected = sklearn.metrics.roc_auc_score(is_ood, scores)
    assert_close(tm.ood_auroc(*to_torch((inside, outside))), expected, "float64")
    own = functional.classification.binary_auroc(torch.tensor(scores / 8), torch.tensor(is_ood))
    assert_close(tm.ood_auroc(*to_torch((inside, outside), "float32")), own, "float32")
    false_positives, true_positives, _ = sklearn.metrics.roc_curve(is_ood, scores, drop_intermediate=False)
    expected = false_positives[np.argmax(true_positives >= 0.95)]
    assert_close(tm.ood_fpr95(*to_torch((inside, outside))), expected, "float64")


@pytest.mark.parametrize("number", [19, 20, 21, 40, 100])
def test_95_percent_of_any_number(number):
    outside, inside = np.arange(1.0, number + 1), np.arange(0.5, number)
    is_ood = np.repeat([0, 1], number)
    false_positives, true_positives, _ = sklearn.metrics.roc_curve(
        is_ood, np.concatenate([inside, outside]), drop_intermediate=False
    )
    expected = false_positives[np.argmax(true_positives >= 0.95)]
    assert_close(tm.ood_fpr95(*to_torch((inside, outside))), expected, "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_scores_of_any_dtype(dtype):
    inside, outside = np.array([0, 1, 1, 3]), np.array([1, 3])
    expected = oracle_metrics.ood_auroc(inside, outside)
    ours = tm.ood_auroc(*(torch.tensor(each, dtype=getattr(torch, dtype)) for each in (inside, outside)))
    assert_close(ours, expected, "float32")
    assert_close(np.asarray(jax.jit(fm.ood_auroc)(jax_of(inside, dtype), jax_of(outside, dtype))), expected, "float32")


def test_large_scores_keep_their_order():
    """torchmetrics' BinaryAUROC takes them through a sigmoid, in which these are equal."""
    inside, outside = np.array([50.0, 60.0]), np.array([70.0, 80.0])
    assert tm.ood_auroc(*to_torch((inside, outside), "float32")) == 1
    assert jax.jit(fm.ood_auroc)(*to_flax((inside, outside), "float32")) == 1
    scores, is_ood = torch.tensor([50.0, 60.0, 70.0, 80.0]), torch.tensor([0, 0, 1, 1])
    assert torchmetrics.functional.classification.binary_auroc(scores, is_ood) == 0.5


def test_regression_against_distributions_and_samples():
    mean, variance, targets = to_torch(draw()["numbers"])
    members = torch.distributions.Normal(mean.movedim(0, -1), variance.movedim(0, -1).sqrt())
    weights = torch.distributions.Categorical(torch.ones(B, 2, E, dtype=torch.float64))
    mixture = torch.distributions.MixtureSameFamily(weights, members)
    assert_close(value(tm.GaussianNLL(), mean, variance, targets), -mixture.log_prob(targets).mean(), "float64")
    assert_close(
        value(tm.GaussianNLL(), mean, variance, targets),
        probly_torch.losses.mixture_gaussian_nll(mean, variance, targets),
        "float64",
    )
    squared = torchmetrics.functional.mean_squared_error(mean.mean(0).flatten(), targets.flatten(), squared=False)
    assert_close(value(tm.RMSE(), mean, variance, targets), squared, "float64")
    points = torchmetrics.regression.ContinuousRankedProbabilityScore()(mean.flatten(1).mT, targets.flatten())
    no_width = tm.crps(mean, torch.zeros_like(mean), targets)
    assert_close(no_width, points, "float32")
    of_flax = jax.jit(fm.crps)(*to_flax((mean.numpy(), 0 * mean.numpy(), targets.numpy())))
    assert_close(np.asarray(of_flax), no_width, "float64")
    y = torch.linspace(-12, 12, 200_001, dtype=torch.float64)  # CRPS is the integral of (F(y) - [y >= target])^2
    f = torch.special.ndtr((y - mean[:, :1, 0]) / variance[:, :1, 0].sqrt()).mean(0)
    integral = torch.trapezoid((f - (y >= targets[0, 0]).double()).square(), y)
    assert abs(tm.crps(mean[:, :1, 0], variance[:, :1, 0], targets[:1, 0]) - integral) < y[1] - y[0]


def value(metric, *batch):
    metric.update(*batch)
    return metric.compute()


BATCHES = (slice(0, 7), slice(7, 7), slice(7, 8), slice(8, B))


def torch_metrics(**options):
    classes = {name: getattr(tm, name)(**options) for name in CLASSES.values() if not options or name in PER_MEMBER}
    if not options:
        classes |= {name: getattr(tm, name)() for name in ("MutualInformation", "Disagreement")}
    names = ("GaussianNLL", "RMSE", "CRPS", "IntervalCoverage", "Sharpness")
    return {
        "classes": torchmetrics.MetricCollection(classes),
        "numbers": torchmetrics.MetricCollection({name: getattr(tm, name)(**options) for name in names}),
    }


def flat(values):
    """Returns values of a MetricCollection or MultiMetric, with those of bins one by one."""
    for name in ("ReliabilityCurve",):
        if name in values:
            bins = values.pop(name)
            values |= {f"{name} {field}": value for field, value in bins._asdict().items()}
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def assert_same(ours, theirs, dtype="float64"):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert_close(array, theirs[name], dtype)


def expected_values(arrays):
    classes, numbers = arrays["classes"], arrays["numbers"]
    bins = zip(tm.ReliabilityBins._fields, oracle_metrics.reliability_bins(*classes), strict=True)
    of_classes = {CLASSES[n]: getattr(oracle_metrics, n)(*classes) for n in CLASSES if n != "reliability_bins"}
    of_classes |= {f"ReliabilityCurve {field}": value for field, value in bins}
    cotangent = np.ones(B)
    of_classes["MutualInformation"] = oracle.mutual_information(cotangent, classes[0])[0].mean()
    of_classes["Disagreement"] = oracle.disagreement(classes[0]).mean()
    of_numbers = {NUMBERS[n]: getattr(oracle_metrics, n)(*numbers) for n in NUMBERS}
    of_numbers |= {"GaussianNLL": oracle_metrics.gaussian_nll(*numbers), "RMSE": oracle_metrics.rmse(*numbers)}
    return {"classes": of_classes, "numbers": of_numbers}


@cache
def expected():
    return {kind: as_arrays(values) for kind, values in expected_values(draw()).items()}


def permuted(arrays, order):
    logits, labels = arrays["classes"]
    mean, variance, targets = arrays["numbers"]
    return arrays | {
        "classes": (logits[:, order], labels[order]),
        "numbers": (mean[:, order], variance[:, order], targets[order]),
    }


def batches(arrays, kind):
    for rows in BATCHES:
        *members, of_inputs = arrays[kind]
        yield *(a[:, rows] for a in members), of_inputs[rows]


def test_batches_of_any_size_in_any_order_give_what_all_inputs_do_after_a_reset_too():
    arrays = permuted(draw(), np.random.default_rng(1).permutation(B))
    for kind, metric in torch_metrics().items():
        metric.update(*(to_torch(draw(2)[kind])))
        metric.reset()
        for batch in batches(arrays, kind):
            metric.update(*to_torch(batch))
        assert_same(flat(metric.compute()), expected()[kind])


def test_forward_gives_the_value_of_the_batch_and_adds_it_up():
    arrays = draw()
    for kind, metric in torch_metrics().items():
        for batch in batches(arrays, kind):
            if len(batch[-1]):
                alone = torch_metrics()[kind]
                alone.update(*to_torch(batch))
                assert_same(flat(metric(*to_torch(batch))), flat(alone.compute()))
        assert_same(flat(metric.compute()), expected()[kind])


KEYWORDS = {"classes": ("logits", "labels"), "numbers": ("mean", "variance", "targets")}
KEEP_SCORES = {"AdaptiveECE", "AURC"}


def run_flax_metrics(kind, arrays, **options):
    """Runs two batches after a reset: sums under jit, scores without.

    The number of times that update was traced comes with the sums.
    """
    names = torch_metrics(**options)[kind].keys()
    metrics = {name: getattr(fm, name)(**options) for name in names}
    sums = nnx.MultiMetric(**{name: metric for name, metric in metrics.items() if name not in KEEP_SCORES})
    scores = nnx.MultiMetric(**{name: metric for name, metric in metrics.items() if name in KEEP_SCORES})
    traced = []

    @nnx.jit
    def update(sums, batch):
        traced.append(1)
        sums.update(**batch, other=None)

    for metrics, step in ((sums, update), (scores, lambda scores, batch: scores.update(**batch))):
        for i, rows in enumerate((slice(0, B // 2), slice(0, B // 2), slice(B // 2, B))):
            *members, of_inputs = arrays[kind]
            batch = to_flax([*(a[:, rows] for a in members), of_inputs[rows]])
            step(metrics, dict(zip(KEYWORDS[kind], batch, strict=True)))
            if i == 0:
                metrics.reset()
    return flat(sums.compute() | scores.compute()), len(traced)


def test_per_member_is_each_member_alone():
    arrays = draw()
    for kind in KEYWORDS:
        metric = torch_metrics(per_member=True)[kind]
        for batch in batches(arrays, kind):
            metric.update(*to_torch(batch))
        together = flat(metric.compute())
        of_flax, traced = run_flax_metrics(kind, arrays, per_member=True)
        assert_same(of_flax, together)
        assert traced == 2  # before the first update, nothing tells how many members there are
        *members, of_inputs = to_torch(arrays[kind])
        for i in range(E):
            alone = torch_metrics()[kind]
            alone.update(*(a[i : i + 1] for a in members), of_inputs)
            alone = flat(alone.compute())
            assert_same({name: each[i] for name, each in together.items()}, {name: alone[name] for name in together})


def test_flax_metrics_agree_by_batches_in_another_order_after_a_reset_under_jit():
    arrays = permuted(draw(), np.random.default_rng(1).permutation(B))
    for kind in KEYWORDS:
        values, traced = run_flax_metrics(kind, arrays)
        assert_same(values, expected()[kind])
        assert traced == (2 if kind == "classes" else 1)  # how many classes ClasswiseECE has, the first update tells


def test_ood_metrics_over_mixed_batches():
    inside, outside = draw()["ood"]
    scores, is_ood = np.concatenate([inside, outside]), np.repeat([False, True], [len(inside), len(outside)])
    order = np.random.default_rng(0).permutation(len(scores))
    for function, name in OOD.items():
        ours, theirs = getattr(tm, name)(), getattr(fm, name)()
        for rows in (order[:30], order[30:]):
            ours.update(torch.tensor(scores[rows]), torch.tensor(is_ood[rows]))
            theirs.update(scores=jax_of(scores[rows]), is_ood=jax_of(is_ood[rows]), logits=None)
        expected = getattr(oracle_metrics, function)(inside, outside)
        assert_close(ours.compute(), expected, "float64")
        assert_close(np.asarray(theirs.compute()), expected, "float64")


def test_half_precision_is_judged_in_float32():
    logits, labels = draw()["classes"]
    logits = rounded(logits, jnp.bfloat16)
    names = ("accuracy", "nll", "brier", "ece", "diversity")
    flax = jax.jit(lambda *classes: [getattr(fm, name)(*classes) for name in names])
    half, single = (flax(*to_flax((logits, labels), dtype)) for dtype in ("bfloat16", "float32"))
    assert half == single
    for name in names:
        half, single = (getattr(tm, name)(*to_torch((logits, labels), dtype)) for dtype in ("bfloat16", "float32"))
        assert half == single


def test_states_keep_their_dtype_and_follow_the_module():
    module = torch.nn.Module()
    module.metric, module.scores = tm.NLL(), tm.AURC()
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("meta")):
        moved = move(copy.deepcopy(module))
        assert moved.metric.nll.dtype == torch.float64
        assert moved.metric.count.dtype == torch.int64
        assert moved.scores.dtype == torch.float64
    assert moved.metric.nll.device.type == moved.metric.device.type == "meta"


def test_states_hold_no_graph_and_go_on_after_inference_mode():
    logits, labels = to_torch(draw()["classes"])
    metric = torch_metrics()["classes"]
    with torch.inference_mode():
        metric.update(logits[:, :30], labels[:30])
    metric(logits[:, 30:].requires_grad_(), labels[30:])
    states = [state for each in metric.values() for state in each.metric_state.values()]
    assert not any(x.requires_grad for state in states for x in (state if isinstance(state, list) else [state]))
    assert_same(flat(metric.compute()), expected()["classes"])


def test_states_are_saved_copied_and_pickled():
    logits, labels = to_torch(draw()["classes"])
    for make in (tm.NLL, tm.ECE, tm.AURC, lambda: tm.Brier(per_member=True)):
        metric = make()
        metric.persistent(True)
        metric.update(logits, labels)
        loaded = make()
        loaded.persistent(True)
        loaded.load_state_dict(metric.state_dict())
        others = (loaded, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)))
        for each in (metric, *others):
            each.update(logits[:, :20], labels[:20])
            assert_close(each.compute(), metric.compute(), "float64")


def test_metrics_whose_first_sums_are_equal_stay_apart_in_a_collection():
    """A MetricCollection updates metrics once whose states have the same names and values."""
    mean, variance = torch.zeros(1, 2), torch.ones(1, 2)
    both = torchmetrics.MetricCollection(
        {"wide": tm.IntervalCoverage(level=0.95), "narrow": tm.IntervalCoverage(level=0.5)}
    )
    both.update(mean, variance, torch.zeros(2))
    both.update(mean, variance, torch.ones(2))
    assert {name: value.item() for name, value in both.compute().items()} == {"wide": 1.0, "narrow": 0.5}
    alike = torchmetrics.MetricCollection([tm.MutualInformation(), tm.Disagreement(), tm.NLL(), tm.Brier()])
    certain, labels = torch.tensor([[[500.0, 0.0]]] * 2, dtype=torch.float64), torch.tensor([0])
    alike.update(certain, labels)
    alike.update(torch.stack([certain[0], -certain[1]]), labels)
    values = {name: round(value.item(), 6) for name, value in alike.compute().items()}
    half = round(np.log(2) / 2, 6)
    assert values == {"MutualInformation": half, "Disagreement": 0.5, "NLL": half, "Brier": 0.25}


def test_counts_do_not_saturate_in_float32():
    with jax.enable_x64(False):
        metric = fm.Accuracy()
        metric.total.set_value(jax_of(np.float32(2.0**24)))  # to which float32 cannot add 1
        metric.count.set_value(jax_of(np.int32(2**24)))
        one = {"logits": jax_of(np.zeros((1, 1, 2), "float32")), "labels": jax_of(np.zeros(1, "int32"))}
        for _ in range(6):
            metric.update(**one)
        assert metric.total.dtype == jnp.float32
        assert metric.compute() == 1
        assert metric._sum("total") == 2**24 + 6
        metric.total.set_value(jax_of(np.float32(np.inf)))
        metric.update(**one)
        assert metric._sum("total") == np.inf


def test_nothing_seen_yet():
    with pytest.warns(UserWarning, match="compute"):
        assert tm.NLL().compute().isnan()
    assert jnp.isnan(fm.NLL().compute())
