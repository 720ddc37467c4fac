"""compare: what it accepts, what it refuses, and that it sees what it should; whole networks are in another file."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax
import probly_torch
from parity_tests import Integers, ParityReport, assert_parity, compare
from parity_tests.kit.exact import Certificate, NotExactError
from parity_tests.standard import Verdict
from parity_tests.suite.subjects.subject import without_draws

X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
QUICK = {"gradients": False, "exact": False, "jit": False, "seeds": 1}


def flax(layer, *sizes, **options):
    """Makes a layer whose weights come from torch, by compare."""
    return without_draws(lambda: layer(*sizes, rngs=nnx.Rngs(0), **options))


def linear(**options):
    return flax(nnx.Linear, 3, 2, **options)


def kinds(report):
    return {each.kind for each in report.comparisons}


def failing(report):
    return sorted((each.kind, each.name) for each in report.comparisons if not each.holds)


class TorchBlock(nn.Module):
    """A convolution with statistics and dropout; outputs in a tree."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x, scale=None):
        y = self.drop(torch.relu(self.bn(self.conv(x))))
        return {"image": y if scale is None else y * scale, "most": (y.argmax(1), y.mean((2, 3)))}


class FlaxBlock(nnx.Module):
    """The twin."""

    def __init__(self, momentum=0.9, rate=0.3, *, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=momentum, epsilon=1e-5, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, scale=None):
        y = self.drop(nnx.relu(self.bn(self.conv(x))))
        return {"image": y if scale is None else y * scale, "most": (y.argmax(-1), y.mean((1, 2)))}


@pytest.fixture(scope="module")
def passed():
    """Makes one comparison of everything that is drawn."""
    return compare(nn.Linear(3, 2), linear(), (5, 3), weights="random", seeds=2)


def test_every_kind_of_tensor_is_compared(passed):
    assert isinstance(passed, ParityReport)
    assert passed
    assert kinds(passed) == {"output", "special value", "exact", "input gradient", "parameter gradient"}
    names = {each.name for each in passed.comparisons if each.kind == "parameter gradient"}
    assert names == {"weight", "bias"}
    assert "exact on integers up to 8" in passed.notes
    rules = {verdict.rule for each in passed.comparisons if each.kind == "output" for verdict in each.verdicts}
    assert rules == {"float32 error of torch", "float32 error of flax", "float64 distance of torch and flax"}


def test_neither_model_is_changed():
    ours, theirs = TorchBlock(), flax(FlaxBlock)
    theirs.eval()
    before = copy.deepcopy(ours.state_dict()), probly_flax.to_arrays(theirs)
    hooks = [len(module._forward_hooks) for module in ours.modules()]
    compare(
        ours, theirs, (3, 3, 4, 4), mode="train", weights="random", gradients=False, exact=False, jit=False, layers=True
    )
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), ours.state_dict().values(), strict=True))
    assert all(np.array_equal(before[1][name], array) for name, array in probly_flax.to_arrays(theirs).items())
    assert [len(module._forward_hooks) for module in ours.modules()] == hooks
    assert theirs.bn.use_running_average
    assert theirs.drop.deterministic
    assert type(theirs.conv) is nnx.Conv
    assert ours.training


@pytest.mark.parametrize(
    "inputs",
    [(X,), (torch.tensor(X),), (jnp.asarray(X, X.dtype),), ((5, 3),), ([5, 3],)],
    ids=lambda i: type(i[0]).__name__,
)
def test_inputs_of_every_form(inputs):
    assert compare(nn.Linear(3, 2), linear(), *inputs, **QUICK)


def test_integers_are_drawn_below_their_bound():
    seen = []

    class Tokens(nn.Embedding):
        def forward(self, ids):
            seen.append(ids.numpy().copy())
            return super().forward(ids)

    assert compare(Tokens(7, 3), flax(nnx.Embed, 7, 3), Integers((4, 50), high=7), **QUICK)
    assert {int(i) for ids in seen for i in ids.reshape(-1)} == set(range(7))


def test_trees_keyword_arguments_and_integer_outputs():
    report = compare(
        TorchBlock(), flax(FlaxBlock), (3, 3, 4, 4), kwargs={"scale": np.float32(2.0)}, weights="random", **QUICK
    )
    assert report, str(report)
    names = {each.name for each in report.comparisons if each.kind == "output"}
    assert names == {"output['image']", "output['most'][0]", "output['most'][1]"}
    assert any("channels last" in note for note in report.notes)


def test_one_integer_that_differs_is_seen():
    class Most(nnx.Linear):
        def __call__(self, x):
            y = super().__call__(x).argmax(-1)
            return y.at[0].set(1 - y[0])

    class TorchMost(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    report = compare(TorchMost(3, 2), flax(Most, 3, 2), (50, 3), **QUICK)
    assert failing(report) == [("output", "output")]
    assert report.comparisons[0].worst.measured == 1


def test_what_cannot_be_compared_does_not_pass():
    ours, theirs = nn.Linear(3, 2), linear()
    theirs.bias = nnx.BatchStat(theirs.bias[...])  # which no optimizer would train
    report = compare(ours, theirs, X, **QUICK | {"gradients": True})
    assert ("parameter gradient", "bias") in failing(report)
    nan = nn.Linear(3, 2)
    nn.init.constant_(nan.bias, torch.nan)
    assert failing(compare(nan, linear(), X, **QUICK)) == [("output", "output")]


def test_statistics_and_equal_masks_in_train_mode():
    gaps = {"bn.running_var": "nnx keeps the biased variance"}
    options = {"mode": "train", "weights": "random", "known_gaps": gaps}
    report = compare(TorchBlock(), flax(FlaxBlock), (3, 3, 4, 4), seeds=2, **options)
    assert report, str(report)
    assert {each.name for each in report.comparisons if each.kind == "statistic"} == {
        "bn.running_mean",
        "bn.running_var",
    }
    wrong = compare(TorchBlock(), flax(FlaxBlock, 0.1), (3, 3, 4, 4), **options, **QUICK)
    assert failing(wrong) == [("statistic", "bn.running_mean")]
    assert wrong.first_divergence.path == "bn"
    assert wrong.first_divergence.what == "statistics"
    assert "momentum" in str(wrong.first_divergence)


def test_a_known_gap_that_starts_to_agree_fails():
    report = compare(nn.Linear(3, 2), linear(), X, known_gaps={"out*": "a reason"}, **QUICK)
    assert failing(report) == [("output", "output")]
    assert "a reason" in str(report)
    with pytest.raises(ValueError, match="known_gaps to name tensors of the report; got 'missing'"):
        compare(nn.Linear(3, 2), linear(), X, known_gaps={"missing": "a reason"}, **QUICK)


def test_the_limit_can_be_tightened_and_not_widened():
    usual = compare(nn.Linear(64, 8), flax(nnx.Linear, 64, 8), (9, 64), **QUICK)
    tight = compare(nn.Linear(64, 8), flax(nnx.Linear, 64, 8), (9, 64), limit=1e-3, **QUICK)
    assert usual
    assert not tight
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="limit to be the part of the bounds"):
            compare(nn.Linear(3, 2), linear(), X, limit=wrong)


def test_an_oracle_judges_both():
    def oracle(weights, x):
        return np.stack([[sum(row * w) for w in weights["weight"]] + weights["bias"] for row in x])

    assert compare(nn.Linear(3, 2), linear(), X, oracle=oracle, **QUICK)
    report = compare(nn.Linear(3, 2), linear(), X, oracle=lambda weights, x: oracle(weights, x) * (1 + 1e-9), **QUICK)
    broken = [verdict.rule for each in report.comparisons for verdict in each.verdicts if not verdict.holds]
    with pytest.raises(ValueError, match="expects an oracle that returns arrays at output, as torch does; got none"):
        compare(nn.Linear(3, 2), linear(), X, oracle=lambda weights, x: None, **QUICK)
    assert broken == ["float64 distance of torch and the oracle", "float64 distance of flax and the oracle"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype):
    report = compare(nn.Linear(3, 2), linear(), (5, 3), dtype=dtype, **QUICK)
    assert report, str(report)


def test_a_lower_dtype_inside_is_a_loss_of_precision():
    report = compare(nn.Linear(3, 2), linear(dtype=jnp.bfloat16), (5, 3), **QUICK)
    assert not report
    assert report.first_divergence.what == "precision"
    assert "bfloat16" in str(report.first_divergence)


def test_weights_that_differ_are_said():
    ours, theirs = nn.Linear(3, 2), linear()
    probly_flax.load_arrays(theirs, probly_torch.to_arrays(ours))
    assert compare(ours, theirs, X, weights="own", **QUICK)
    theirs.bias[...] = theirs.bias[...].at[1].add(1e-7)
    report = compare(ours, theirs, X, weights="own", **QUICK)
    assert ("weight", "bias") in failing(report)
    assert "1" in str(report)


def test_weights_that_one_side_lacks_are_said():
    report = compare(nn.Linear(3, 2), linear(use_bias=False), X, **QUICK)
    assert ("weight", "bias") in failing(report)
    assert "missing in Flax" in str(report)
    assert "bias" in str(report.first_divergence)
    report = compare(nn.Linear(3, 2, bias=False), linear(), X, **QUICK)
    assert ("weight", "bias") in failing(report)
    report = compare(nn.Linear(3, 4), linear(), X, **QUICK)
    assert ("weight", "weight") in failing(report)
    assert "shape" in str(report)


def test_fresh_weights_are_noted():
    pair = nn.LayerNorm(3), flax(nnx.LayerNorm, 3, epsilon=1e-5)
    assert any('weights="random"' in note for note in compare(*pair, (4, 3), **QUICK).notes)
    assert not compare(*pair, (4, 3), weights="random", **QUICK).notes


def test_a_layout_is_found_or_taken_as_said():
    ours, theirs = nn.Conv2d(3, 3, 3), flax(nnx.Conv, 3, 3, (3, 3), padding="VALID")
    assert compare(ours, theirs, (2, 3, 3, 3), **QUICK)  # where the shapes do not tell
    report = compare(ours, theirs, (2, 3, 3, 3), channels_last=False, **QUICK)
    assert ("output", "output") in failing(report)
    assert compare(nn.Conv1d(3, 4, 3), flax(nnx.Conv, 3, 4, (3,), padding="VALID"), (2, 3, 7), **QUICK)
    assert compare(nn.Linear(3, 2), linear(), (2, 5, 3), **QUICK)


def test_outputs_of_other_shapes_are_a_difference():
    report = compare(
        nn.Linear(3, 2),
        nnx.Sequential(linear(), lambda y: y[:, :1]),
        X,
        rename={"^": "0."},
        **QUICK,
    )
    assert not report
    assert "shape" in str(report)


def test_images_of_other_shapes_are_a_difference_of_their_layer():
    theirs = flax(nnx.Conv, 3, 4, (3, 3), padding="VALID")
    report = compare(nn.Conv2d(3, 4, 3, padding=1), theirs, (2, 3, 7, 6), **QUICK)
    assert "output of shape (2, 4, 7, 6) in torch and (2, 5, 4, 4) in Flax" in str(report)
    assert "padding" in str(report.first_divergence)


def test_special_values_are_compared_op_by_op():
    class TorchNet(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(min=0)

    class FlaxNet(nnx.Linear):
        def __call__(self, x):
            return jnp.where(super().__call__(x) > 0, super().__call__(x), 0.0)  # loses NaN

    options = QUICK | {"jit": True}
    report = compare(TorchNet(3, 2), flax(FlaxNet, 3, 2), (5, 3), **options)
    assert {name for _, name in failing(report)} >= {"output where inputs are NaN"}
    assert {kind for kind, _ in failing(report)} == {"special value"}


def test_a_gradient_that_is_wrong_is_followed_to_its_layer():
    @jax.custom_vjp
    def relu(x):
        return nnx.relu(x)

    relu.defvjp(lambda x: (nnx.relu(x), x), lambda x, g: (jnp.where(x >= -0.5, g, 0),))
    ours = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    theirs = nnx.Sequential(linear(), relu, flax(nnx.Linear, 2, 2))
    report = compare(ours, theirs, (5, 3), **QUICK | {"gradients": True})
    assert {kind for kind, _ in failing(report)} == {"input gradient", "parameter gradient"}
    assert report.first_divergence.path == "1"
    assert report.first_divergence.what == "gradients"


def test_what_differs_below_the_rounding_of_float32_is_seen_on_integers():
    class FlaxNet(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) * (1 + 2.0**-52)  # within the noise of the outputs

    options = QUICK | {"exact": True}
    report = compare(nn.Linear(3, 2), flax(FlaxNet, 3, 2), (5, 3), **options)
    assert {kind for kind, _ in failing(report)} == {"exact"}


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Tanh()), "tanh rounds"),
        (nn.Linear(3, 2), None),
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Unflatten(1, (1, 2)), nn.AvgPool1d(2)), None),
        (nn.AvgPool1d(3), "no multiples of a power of two"),
    ],
)
def test_the_certificate_follows_every_operation(network, reason):
    network = network.double()
    for parameter in network.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter) % 5 + 1
    x = torch.arange(15.0, dtype=torch.float64).reshape(5, 3) ** 2
    certificate = Certificate("float32")
    if reason is None:
        with certificate:
            network(x)
        x[0, 0] = 2.0**30 + 1
        with pytest.raises(NotExactError, match="need more than 24 bits"), Certificate("float32"):
            network(x)
    else:
        with pytest.raises(NotExactError, match=reason), certificate:
            network(x)


def test_assert_parity_raises_with_the_report():
    assert assert_parity(nn.Linear(3, 2), linear(), X, **QUICK).passed
    with pytest.raises(AssertionError, match="No parity"):
        assert_parity(nn.Linear(3, 2), linear(use_bias=False), X, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((linear(), nn.Linear(3, 2), X), {}, TypeError, "expects a torch.nn.Module and then an nnx.Module; got Linear"),
        ((nn.Linear(3, 2), nn.Linear(3, 2), X), {}, TypeError, "got Linear for the nnx.Module"),
        ((nn.Linear(3, 2), linear()), {}, ValueError, "expects inputs of the models"),
        ((nn.Linear(3, 2), linear(), "x"), {}, ValueError, "expects arrays among the inputs; got"),
        ((nn.Linear(3, 2), linear(), np.array(["x"])), {}, TypeError, "real numbers, integers or booleans"),
        ((nn.Linear(3, 2), linear(), X), {"mode": "test"}, ValueError, "mode to be one of eval, train; got 'test'"),
        ((nn.Linear(3, 2), linear(), X), {"dtype": "int8"}, ValueError, "dtype to be one of float32"),
        ((nn.Linear(3, 2), linear(), X), {"weights": "none"}, ValueError, "weights to be one of copy, own, random"),
        ((nn.Linear(3, 2), linear(), X[:, :2]), {}, ValueError, "that the torch model takes"),
        ((nn.Linear(3, 2), flax(nnx.Linear, 4, 2), X), {}, ValueError, "that the Flax model takes"),
        ((nn.Linear(3, 2), linear(), X), {"seeds": 0}, ValueError, "seeds to be a number of inputs"),
        ((nn.Tanh(), nnx.Sequential(nnx.tanh), X), {"exact": True}, ValueError, "got one where tanh rounds"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        compare(*arguments, **options)
    assert str(caught.value).rstrip().endswith(("'.", ").", ".", "`"))


def test_integers_refuse_what_cannot_be_drawn():
    for wrong in ((0, 3), 5), ((2, 3), 0), ((2.0,), 3):
        with pytest.raises(ValueError, match="Pass Integers"):
            Integers(*wrong)


def test_a_verdict_is_a_ratio():
    assert Verdict("t", "r", 1.0, 2.0).ratio == 0.5
    assert Verdict("t", "r", 0.0, 0.0).ratio == 0.0
    assert Verdict("t", "r", 1.0, 0.0).ratio == float("inf")
    assert Verdict("t", "r", float("nan"), 2.0).ratio == float("inf")
