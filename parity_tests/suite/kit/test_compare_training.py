"""Steps of training side by side: twins agree, and what differs is named by step and tensor, and why."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.training import compare_training
from parity_tests.suite.subjects.subject import without_draws

SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
ROWS, FEATURES, HIDDEN, CLASSES = 11, 5, 7, 3


@pytest.fixture(autouse=True)
def _promotion():
    """Allows promotion. optax.adam and nnx.BatchNorm ask for it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class TorchNet(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.drop = nn.Dropout(rate)

    def forward(self, x):
        return self.fc2(self.drop(torch.tanh(self.fc1(x))))


class FlaxNet(nnx.Module):
    def __init__(self, rate=0.0, backward=lambda x: x):
        rngs = nnx.Rngs(0)
        self.fc1, self.fc2 = nnx.Linear(FEATURES, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, CLASSES, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.backward = backward

    def __call__(self, x):
        return self.fc2(self.drop(self.backward(jnp.tanh(self.fc1(x)))))


def batches(count=2, shape=(FEATURES,)):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(ROWS, *shape)), rng.integers(0, CLASSES, ROWS)) for _ in range(count)]


def train(optimizer, transform, steps=2, ours=None, theirs=None, data=None, jit=False, **options):
    """Trains both with jit=False, which has little to compile. Flax gets the weights of torch."""
    ours = TorchNet() if ours is None else ours
    theirs = without_draws(FlaxNet) if theirs is None else theirs
    return compare_training(ours, theirs, optimizer, transform, data or batches(), steps, jit=jit, **options)


def decayed(weight_decay, transform):
    return optax.chain(optax.add_decayed_weights(weight_decay), transform)


TWINS = {
    "SGD": (partial(SGD, lr=0.1), optax.sgd(0.1)),
    "Nesterov": (
        partial(SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05),
        decayed(0.05, optax.sgd(0.1, momentum=0.8, nesterov=True)),
    ),
    "Adam": (partial(ADAM, lr=0.01, weight_decay=0.05), decayed(0.05, optax.adam(0.01))),
    "AdamW": (partial(ADAMW, lr=0.01, betas=(0.8, 0.95)), optax.adamw(0.01, 0.8, 0.95, weight_decay=0.01)),
    "RMSprop": (partial(RMSPROP, lr=0.01), optax.rmsprop(0.01, 0.99, eps_in_sqrt=False)),
}


@pytest.mark.parametrize("twins", TWINS)
def test_optimizers_agree(twins):
    report = train(*TWINS[twins], steps=5)
    assert report.passed, report
    assert [step.number for step in report.steps] == [1, 2, 3, 4, 5]
    assert {c.kind for c in report.comparisons} == {"loss", "gradient", "update"}
    assert len(report.comparisons) == 1 + 4 + 4
    assert all(0 < step.twin_distance < 1e-14 for step in report.steps)
    assert all(step.distance < 1e-13 for step in report.steps)


# What is planted: torch's optimizer, the transformation, the first step that differs, and what is said of it.
FAULTS = {
    "rate": (
        partial(SGD, lr=0.1),
        optax.sgd(0.1 * (1 + 1e-6)),
        1,
        "torch's SGD(lr=0.1) is optax.sgd(0.1), which agrees",
    ),
    "epsilon inside": (
        partial(ADAM, lr=0.01),
        optax.adam(0.01, eps=0.0, eps_root=1e-8),
        1,
        "is optax.adam(0.01, b1=0.9, b2=0.999, eps=1e-08), which agrees",
    ),
    "dampening": (
        partial(SGD, lr=0.1, momentum=0.9, dampening=0.1),
        optax.sgd(0.1, momentum=0.9),
        2,
        "Flax takes the step of optax.sgd(0.1, momentum=0.9), torch that of SGD(lr=0.1, momentum=0.9, dampening=0.1)",
    ),
    "Nesterov": (
        partial(SGD, lr=0.1, momentum=0.9),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        1,
        "; Flax takes the step of optax.sgd(0.1, momentum=0.9, nesterov=True)",
    ),
    "coupled": (
        partial(ADAMW, lr=0.01, weight_decay=0.1),
        decayed(0.1, optax.adam(0.01)),
        1,
        "weight_decay=0.1), which agrees to 1e-16; Flax takes the step of optax.chain(optax.add_decayed_weights(0.1)",
    ),
    "default decay": (partial(ADAMW, lr=0.01), optax.adamw(0.01), 1, "b2=0.999, eps=1e-08, weight_decay=0.0001)"),
    "epsilon of RMSprop": (partial(RMSPROP, lr=0.01), optax.rmsprop(0.01, 0.99), 1, "eps_in_sqrt=True"),
    "schedule": (
        partial(SGD, lr=0.1),
        optax.sgd(lambda count: 0.1 * 0.5**count),
        2,
        "is optax.sgd(0.1), which agrees",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_optimizer_that_differs_is_named(fault):
    optimizer, transform, step, said = FAULTS[fault]
    report = train(optimizer, transform, steps=3)
    first = report.first_departure
    assert not report.passed
    assert (first.step, first.kind, first.tensor) == (step, "update", "fc1.weight"), report
    assert said in first.cause
    assert {c.kind for c in report.comparisons if not c.holds} == {"update"}


def clipped(parameters):
    optimizer = SGD(parameters, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(parameters, 0.05) and None)
    return optimizer


def test_a_clip_without_its_epsilon_is_seen():
    """It is less than a rounding in float32."""
    report = train(clipped, optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1)), jit=True)
    first = report.first_departure
    assert (first.step, first.kind, first.tensor) == (1, "update", "fc1.weight")
    assert "by 0.05 / (norm + 1e-06), optax.clip_by_global_norm by 0.05 / norm; optax.stateless" in first.cause

    def clip(gradients, _):
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradients)))
        scale = jnp.minimum(1.0, 0.05 / (norm + 1e-6))
        return jax.tree.map(lambda g: g * scale, gradients)

    assert train(clipped, optax.chain(optax.stateless(clip), optax.sgd(0.1)), jit=True)


def test_a_parameter_that_only_one_trains_is_seen():
    ours = TorchNet()
    ours.fc2.weight.requires_grad_(False)
    first = train(partial(SGD, lr=0.1), optax.sgd(0.1), ours=ours).first_departure
    assert (first.step, first.kind, first.tensor) == (1, "update", "fc2.weight")
    assert first.cause == "torch leaves it as it was, and Flax trains it: freeze it in both, or in none"


def test_a_parameter_that_both_freeze_agrees():
    def is_frozen(tree):
        return jax.tree.map_with_path(lambda path, _: "fc2" in str(path[0]) and "kernel" in str(path[1]), tree)

    ours = TorchNet()
    ours.fc2.weight.requires_grad_(False)
    transform = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), is_frozen))
    report = train(partial(SGD, lr=0.1), transform, ours=ours)
    assert report.passed, report


def squares(outputs, targets):
    return ((outputs - 1.0) ** 2).mean()


def test_a_sum_for_a_mean_is_named():
    def summed(outputs, targets):
        return jnp.square(outputs - 1.0).mean(-1).sum()

    report = train(partial(SGD, lr=0.1), optax.sgd(0.1), loss=(squares, summed))
    first = report.first_departure
    assert (first.step, first.kind) == (1, "loss")
    assert f"the loss of Flax is {ROWS} times that of torch, the number of rows: a sum for a mean" in str(first)


def test_a_backward_pass_that_differs_is_named():
    """The last layer with other gradients is the nearest to the fault; its outputs are the same."""

    @jax.custom_vjp
    def wrong(x):
        return x

    wrong.defvjp(lambda x: (x, None), lambda _, g: (g * (1 + 1e-9),))
    theirs = without_draws(lambda: FlaxNet(backward=wrong))
    first = train(partial(SGD, lr=0.1), optax.sgd(0.1), theirs=theirs).first_departure
    assert (first.step, first.kind, first.tensor) == (1, "gradient", "fc1.bias")


def test_dropout_has_equal_masks():
    theirs = {rate: without_draws(lambda rate=rate: FlaxNet(rate)) for rate in (0.3, 0.4)}
    report = train(partial(ADAM, lr=0.01), optax.adam(0.01), 2, TorchNet(0.4), theirs[0.4])
    assert report.passed, report
    assert report.steps[0].loss != train(partial(ADAM, lr=0.01), optax.adam(0.01), 1).steps[0].loss
    first = train(partial(SGD, lr=0.1), optax.sgd(0.1), 1, TorchNet(0.4), theirs[0.3]).first_departure
    assert str(first).endswith("mask 1: Dropout p is 0.4, nnx rate is 0.3")


class TorchConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class FlaxConv(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_statistics_of_batch_normalisation():
    """torch keeps the unbiased variance; nothing else differs."""
    data = batches(2, (2, 6, 5))
    models = {"ours": TorchConv(), "theirs": without_draws(FlaxConv)}
    pair = partial(train, partial(SGD, lr=0.1), optax.sgd(0.1), data=data, jit=True, **models)
    first = pair(steps=1).first_departure
    assert (first.step, first.kind, first.tensor) == (1, "statistic", "norm.running_var")
    count = ROWS * 6 * 5
    assert f"unbiased variance of {count} values for each channel, {count}/{count - 1} times that of nnx" in first.cause
    gap = {"*.running_var": "unbiased in torch"}
    report = pair(known_gaps=gap)
    assert report.passed, report
    assert "statistic of norm.running_var is known to differ: unbiased in torch" in str(report)
    stale = train(partial(SGD, lr=0.1), optax.sgd(0.1), 1, known_gaps={"fc1.bias": "no reason"})
    assert not stale.passed
    assert "fc1.bias agrees at every step. Remove it from known_gaps." in str(stale)


MEMBERS = {
    "ensemble": lambda: pf.ensemble(without_draws(FlaxNet), 4, reset_params=False),
    "batchensemble": lambda: without_draws(lambda: pf.batchensemble(FlaxNet(), 4)),
}


@pytest.mark.parametrize("wrapper", MEMBERS)
def test_members_agree(wrapper):
    """Each member's loss counts the same."""
    ours = getattr(pt, wrapper)(TorchNet(), 4, rngs=0)
    report = train(partial(SGD, lr=0.1), optax.sgd(0.1), 1, ours, MEMBERS[wrapper](), jit=True)
    assert report.passed, report
    assert report.steps[0].loss > 0.5


class TorchRecurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, CLASSES, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


class FlaxRecurrent(nnx.Module):
    def __init__(self):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(FEATURES, CLASSES, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.rnn(x)[:, -1]


def test_two_biases_move_twice_as_far():
    """torch trains both of a sum; their gradients and all else agree."""
    models = {"ours": TorchRecurrent(), "theirs": without_draws(FlaxRecurrent)}
    report = train(partial(SGD, lr=0.1), optax.sgd(0.1), 1, data=batches(1, (4, FEATURES)), jit=True, **models)
    first = report.first_departure
    assert (first.step, first.kind, first.tensor) == (1, "update", "rnn.bias_ih_l0")
    assert "two biases, whose sum is one parameter in Flax" in first.cause
    assert [(c.kind, c.name) for c in report.comparisons if not c.holds] == [("update", "rnn.bias_ih_l0")]


def test_schedules_agree():
    def halved(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def schedule(count):
        return 0.1 * 0.5 ** count.astype(jnp.result_type(float))

    transform = optax.sgd(schedule)
    assert train(partial(SGD, lr=0.1), transform, 4, torch_scheduler=halved)
    first = train(partial(SGD, lr=0.1), optax.sgd(0.1), 3, torch_scheduler=halved).first_departure
    assert first.step == 2
    assert "is optax.sgd(schedule)" in first.cause


def test_a_chaotic_network_raises_no_alarm():
    """On their own the two part, as torch and its twin do; step by step they agree."""
    report = train(partial(SGD, lr=10.0), optax.sgd(10.0), 25, data=batches(3), jit=True)
    assert report.passed, report
    assert report.steps[-1].twin_distance > 1e-12
    assert report.notes == ()


def test_models_and_optimizer_stay_as_they_are():
    ours, theirs = TorchNet(), without_draws(FlaxNet)
    optimizer = ADAM(ours.parameters(), lr=0.01)
    before = {name: p.clone() for name, p in ours.named_parameters()}, pf.to_arrays(theirs)
    ours.eval()
    assert train(optimizer, optax.adam(0.01), ours=ours, theirs=theirs)
    assert all(torch.equal(p, before[0][name]) and p.grad is None for name, p in ours.named_parameters())
    assert not ours.training
    assert not optimizer.state
    for name, array in pf.to_arrays(theirs).items():
        np.testing.assert_array_equal(array, before[1][name])


def test_weights_of_their_own_are_compared():
    first = train(partial(SGD, lr=0.1), optax.sgd(0.1), weights="own").first_departure
    assert (first.step, first.kind) == (0, "weight")


def test_names_may_differ():
    ours = nn.Sequential(nn.Linear(FEATURES, CLASSES))

    class Net(nnx.Module):
        def __init__(self):
            self.net = nnx.Dict(head=nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(0)))

        def __call__(self, x):
            return self.net.head(x)

    report = train(partial(SGD, lr=0.1), optax.sgd(0.1), 2, ours, without_draws(Net), rename={r"^0\.": "net.head."})
    assert report.passed, report
    assert {c.name for c in report.comparisons if c.kind == "update"} == {"0.weight", "0.bias"}


def test_a_loss_that_overflows_is_no_parity():
    ours, theirs = lambda y, _: y.square().sum() * float("inf"), lambda y, _: jnp.square(y).sum()
    one = train(partial(SGD, lr=0.1), optax.sgd(0.1), 2, loss=(ours, theirs))
    assert (one.first_departure.step, one.first_departure.kind) == (1, "loss")
    both = train(partial(SGD, lr=0.1), optax.sgd(0.1), 2, loss=(ours, lambda y, _: theirs(y, _) * jnp.inf))
    assert not both.passed
    assert both.first_departure is None
    assert "torch's loss is inf at step 1, after which nothing was compared" in str(both)


def test_files(tmp_path):
    report = train(partial(SGD, lr=0.1), optax.sgd(0.2))
    assert len(str(report).splitlines()) <= 25
    assert max(map(len, str(report).splitlines())) <= 120
    assert str(report).splitlines()[-1] == "No parity: 4 of 9 tensors differ."
    for suffix in ("json", "png", "html"):
        report.save(tmp_path / f"training.{suffix}")
    content = json.loads((tmp_path / "training.json").read_text())
    assert content["passed"] is False
    assert content["first_departure"]["tensor"] == "fc1.weight"
    assert "data:image/png" in (tmp_path / "training.html").read_text()
    with pytest.raises(ValueError, match="json"):
        report.save(tmp_path / "training.txt")


def trained(ours):
    """Makes an optimizer that ran."""
    optimizer = SGD(ours.parameters(), lr=0.1, momentum=0.9)
    ours(torch.ones(1, FEATURES)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"optimizer": 0.1}, TypeError, "an optimizer, or to return one"),
        ({"optimizer": torch.optim.LBFGS}, TypeError, "got LBFGS"),
        ({"optimizer": trained(net := TorchNet()), "ours": net}, ValueError, "has not run yet"),
        ({"optimizer": SGD(TorchNet().parameters(), lr=0.1)}, ValueError, "others in its groups"),
        ({"transform": optax.adam}, TypeError, "what nnx.Optimizer is given"),
        ({"data": [1]}, TypeError, "pairs of inputs and targets"),
        ({"data": iter(())}, ValueError, "got none"),
        ({"data": [(np.ones((2, FEATURES)), np.ones(2))]}, ValueError, r"shape \(2,\) for outputs of shape \(2, 3\)"),
        ({"steps": 0}, ValueError, "steps of at least 1"),
        ({"loss": squares}, TypeError, "one function for each framework"),
        ({"dtype": "int8"}, ValueError, "one of float32, float64"),
        ({"limit": 2}, ValueError, "a fraction of the bound"),
        ({"known_gaps": {"fc3.*": "no reason"}}, ValueError, "which none has: fc1.bias, fc1.weight"),
        ({"theirs": without_draws(FlaxConv)}, ValueError, "fc1.weight"),
        ({"ours": TorchNet(0.5)}, ValueError, "as many masks of dropout"),
    ],
)
def test_errors(options, error, said):
    with pytest.raises(error, match=said):
        train(**{"optimizer": partial(SGD, lr=0.1), "transform": optax.sgd(0.1)} | options)


def test_hooks_would_be_lost():
    ours = TorchNet()
    with pytest.raises(ValueError, match="registers them"):
        train(clipped(list(ours.parameters())), optax.sgd(0.1), ours=ours)
