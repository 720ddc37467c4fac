"""Training in Flax: compiled steps, and the loop around them, against loops by hand and against Lightning's."""

import signal
from functools import cache, partial

import jax
import lightning
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from torch import nn
from torch.utils.data import DataLoader

import probly_flax as pf
import probly_torch as pt
from parity_tests.standard import assert_close, assert_same_trajectory
from parity_tests.suite.subjects.subject import jitted, without_draws
from probly_flax.training import TrainState, fast_weight_groups, fit, make_eval_step, make_train_step
from probly_torch.training import EnsembleClassifier

ROWS, BATCH, CLASSES = 48, 16, 3


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Allows promotion, which optax.adam and nnx.BatchNorm ask for. Most users train in float32, so x64 is off."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@cache
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 2)).astype(np.float32)
    return x, ((x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0))


def batches(epoch, rows=ROWS):
    """Returns batches in an order of the epoch's own."""
    x, y = data()
    order = np.random.default_rng(epoch).permutation(rows)
    return [(x[chosen], y[chosen]) for chosen in np.split(order, range(BATCH, rows, BATCH))]


@cache
def base():
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(2, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu, nnx.Dropout(0.2, rngs=rngs)
    return nnx.Sequential(*layers, nnx.Linear(8, CLASSES, rngs=rngs))


@cache
def regression_base():
    """Makes a small layer: three runs for each kind are compiled."""
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


@cache
def drawn(kind, make=base):
    net = make()
    return {"single": lambda: net, "deep": lambda: pf.ensemble(net, 3), "batch": lambda: pf.batchensemble(net, 3)}[
        kind
    ]()


ADAM, SGD = optax.adam(0.01), optax.sgd(0.1)


def new(kind="batch", make=base, transform=ADAM):
    model = nnx.clone(drawn(kind, make))
    return model, nnx.Optimizer(model, transform, wrt=nnx.Param)


def states(*nodes):
    return jax.tree.leaves([nnx.state(node) for node in nodes])


def equal(nodes, others):
    """Compares in NumPy, since JAX compiles a comparison for each shape."""
    return all(np.array_equal(_numpy(a), _numpy(b)) for a, b in zip(states(*nodes), states(*others), strict=True))


def _numpy(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


quiet = partial(fit, progress=False)


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_fit_takes_the_steps_of_a_loop_by_hand(kind):
    trained, by_hand = new(kind), new(kind)
    history = quiet(*trained, batches, epochs=2)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss_of(model):
            logits = model(x)
            return pf.losses.member_cross_entropy(logits if kind != "single" else logits[None], y)

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [[(float(step(*by_hand, x, y)), len(y)) for x, y in batches(epoch)] for epoch in range(2)]
    assert equal(trained, by_hand)
    expected = [sum(loss * rows for loss, rows in epoch) / ROWS for epoch in losses]
    assert_close(np.array([row["train_loss"] for row in history]), np.array(expected), "float32")


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.*", "ignore:.*isinstance.*")
def test_the_same_weights_and_batches_train_alike_in_torch():
    """Through EnsembleClassifier, with what both log for the last epoch."""
    ours = pt.batchensemble(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, CLASSES)), 3).double()
    with jax.enable_x64(True):

        def make():
            linear = partial(nnx.Linear, param_dtype=float, rngs=nnx.Rngs(0))
            return pf.batchensemble(nnx.Sequential(linear(2, 8), nnx.tanh, linear(8, CLASSES)), 3)

        theirs = without_draws(make)
        pf.load_arrays(theirs, pt.to_arrays(ours))
        chain = optax.scale_by_adam(), fast_weight_groups(theirs, 0.1), optax.scale_by_learning_rate(0.01)
        optimizer = nnx.Optimizer(theirs, optax.chain(*chain), wrt=nnx.Param)
        doubled = [(x.astype(float), y) for x, y in batches(0, 40)]
        history = quiet(theirs, optimizer, doubled, epochs=3, val=doubled)
        weights = pf.to_arrays(theirs)

    loader = DataLoader([(torch.tensor(x), torch.tensor(y).long()) for x, y in doubled], batch_size=None)
    module = EnsembleClassifier(ours, optimizer=partial(torch.optim.AdamW, lr=0.01), weight_decay=0.1)
    quiet_ones = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", precision="64-true", **quiet_ones)
    trainer.fit(module, loader, loader)
    for name, value in pt.to_arrays(ours).items():
        assert_same_trajectory(value, weights[name])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "loss"}
    assert logged.keys() == history[-1].keys() - {"epoch"}
    for name, value in logged.items():
        assert_close(np.array(value), np.array(history[-1][name]), "float32")


def test_a_step_is_compiled_once_for_each_shape_and_consumes_its_state():
    traces = []

    def loss(logits, labels):
        traces.append(len(labels))
        return pf.losses.member_cross_entropy(logits, labels)

    smaller = 40 % BATCH
    quiet(*new(), lambda epoch: batches(epoch, 40), epochs=3, val=batches(0, 40), loss=loss)
    assert sorted(traces) == [smaller, smaller, BATCH, BATCH]  # of training, and of validation

    model, optimizer = new()
    step, state = make_train_step(model, optimizer)
    new_state, _ = step(state, batches(0)[0])
    assert isinstance(new_state, TrainState)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new_state))
    assert equal((model, optimizer), new())  # they have their own values


@pytest.mark.parametrize("patience", [None, 3])
def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(patience, tmp_path):
    run = partial(quiet, train=batches, val=batches, patience=patience)
    whole, first, second = new(), new(), new()
    history = run(*whole, epochs=4)
    run(*first, epochs=2, checkpoint=tmp_path / "run")
    resumed = run(*second, epochs=4, checkpoint=tmp_path / "run", resume=True)
    assert resumed == history
    assert [row["epoch"] for row in history] == [0, 1, 2, 3]
    assert equal(second, whole)
    assert not equal(first, whole)


def test_without_its_counts_of_random_numbers_it_would_not_be(tmp_path):
    """The masks of Dropout go on where they were."""
    whole, first, other = new(), new(), new()
    quiet(*whole, batches, epochs=2)
    quiet(*first, batches, epochs=1)
    nnx.update(other[0], nnx.state(first[0], nnx.Not(nnx.RngCount)))
    nnx.update(other[1], nnx.state(first[1]))
    quiet(*first, [*batches(1)], epochs=1)
    quiet(*other, [*batches(1)], epochs=1)
    assert equal(first, whole)
    assert not equal(other, whole)


def test_validation_runs_in_eval_mode_and_leaves_the_model_as_it_is():
    model, _ = new()
    metrics = nnx.MultiMetric(members=pf.metrics.NLL(per_member=True), aurc=pf.metrics.AURC())
    under_jit = nnx.MultiMetric(nll=pf.metrics.NLL(), members=pf.metrics.NLL(per_member=True))
    before = nnx.clone(model)
    for each in (metrics, under_jit):
        step = make_eval_step(model, each)
        losses = [step(batch) for batch in batches(0)]
    assert equal([model], [before])
    assert model.network.layers[3].deterministic is False

    model.eval()
    x, y = (np.concatenate(column) for column in zip(*batches(0), strict=True))
    logits, op_by_op, computed = jitted(model, x), metrics.compute(), under_jit.compute()
    first = jax.jit(pf.losses.member_cross_entropy)(np.asarray(logits)[:, :BATCH], y[:BATCH])
    assert_close(losses[0], first, "float32")
    assert_close(computed["nll"], jax.jit(pf.metrics.nll)(logits, y), "float32")
    assert_close(op_by_op["aurc"], pf.metrics.aurc(logits, y), "float32")
    assert computed["members"].shape == (3,)
    assert_close(computed["members"], op_by_op["members"], "float32")


def test_the_weights_of_a_training_loop_are_judged_by_its_state():
    model, optimizer = new()
    metrics = nnx.MultiMetric(nll=pf.metrics.NLL())
    step, state = make_train_step(model, optimizer)
    evaluate = make_eval_step(model, metrics)
    state, _ = step(state, batches(0)[0])
    during = evaluate(batches(0)[1], state.model)
    assert during != evaluate(batches(0)[1])
    nnx.update(model, state.model)
    assert during == evaluate(batches(0)[1])


def test_early_stopping_goes_back_to_the_best_epoch(tmp_path):
    def val(epoch):
        """Returns batches with labels that the model learns, and from epoch 2 on others."""
        return [(x, y if epoch < 2 else (y + 1) % CLASSES) for x, y in batches(epoch)]

    run = partial(quiet, train=batches, val=val, epochs=9)
    stopped, two_epochs, worse = new(), new(), new()
    history = run(*stopped, patience=2, checkpoint=tmp_path)
    assert len(history) == 4
    assert np.argmin([row["val_nll"] for row in history]) == 1
    run(*two_epochs, epochs=2)
    assert equal(stopped, two_epochs)

    again = new()
    assert run(*again, patience=2, checkpoint=tmp_path, resume=True) == history  # it has nothing left to do
    assert equal(again, stopped)
    longest = run(*worse, patience=2, monitor="val_nll", mode="max")
    assert len(longest) > 4


def test_what_is_logged():
    names = ("nll", "accuracy", "brier", "ece", "mutual_information")
    (row,) = quiet(*new(), batches, epochs=1, val=batches)
    assert list(row) == ["epoch", "train_loss", "train_accuracy", "val_loss", *(f"val_{name}" for name in names)]
    assert all(isinstance(value, float) for name, value in row.items() if name != "epoch")
    metrics = nnx.MultiMetric(members=pf.metrics.Accuracy(per_member=True))
    (row,) = quiet(*new(), batches, epochs=1, val=batches, metrics=metrics)
    assert [type(value) for value in row["val_members"]] == [float] * 3
    assert metrics.members.count == 0  # a copy was updated


@pytest.mark.parametrize("kind", ["single", "deep"])
def test_regression_takes_mean_and_variance_or_one_array(kind):
    class Gaussian(nnx.Module):
        def __init__(self, net):
            self.net = net
            if hasattr(net, "num_members"):
                self.num_members = net.num_members

        def __call__(self, x):
            return pf.losses.to_gaussian(self.net(x))

    def targets(epoch):
        return [(x, x[:, :1] ** 2) for x, _ in batches(epoch)]

    make = partial(new, kind, regression_base, SGD)
    one, two = make(), make()
    history = quiet(*one, targets, epochs=1, val=targets, task="regression")
    assert list(history[0])[1:] == [
        "train_loss",
        "val_loss",
        *(f"val_{n}" for n in ("nll", "rmse", "crps", "coverage")),
    ]
    model = Gaussian(two[0])
    two = (model, nnx.Optimizer(model, SGD, wrt=nnx.Param))
    loss = pf.losses.member_gaussian_nll
    assert quiet(*two, targets, epochs=1, val=targets, task="regression", loss=loss) == history
    assert equal([one[0]], [two[0].net])
    quiet(*make(), targets, epochs=1, task="regression", loss=pf.losses.member_beta_nll)


def test_each_member_can_have_batches_of_its_own():
    """A member's step is then that on its own batches: the mean of the losses has 1/E of its gradient."""
    model, optimizer = new("deep", transform=optax.sgd(0.3))
    members = list(model)
    own = [[(x + i, y) for x, y in batches(i)] for i in range(3)]
    stacked = [tuple(map(np.stack, zip(*each, strict=True))) for each in zip(*own, strict=True)]
    (row,) = quiet(model, optimizer, stacked, epochs=1, in_axes=0)
    rows = [
        quiet(member, nnx.Optimizer(member, optax.sgd(0.1), wrt=nnx.Param), own[i], epochs=1)[0]
        for i, member in enumerate(members)
    ]
    for name in ("train_loss", "train_accuracy"):
        assert_close(np.array(row[name]), np.mean([each[name] for each in rows]), "float32")
    model.eval()
    logits = np.asarray(jitted(model, data()[0]))
    for i, member in enumerate(members):
        member.eval()
        assert_close(logits[i], jitted(member, data()[0]), "float32")


@pytest.fixture
def ctrl_c():
    """Sets the handler as it is in a program of one's own. Workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("during", ["data", "step"])
def test_ctrl_c_leaves_the_trained_weights(during, ctrl_c):
    def interrupt():
        signal.raise_signal(signal.SIGINT)

    def train():
        yield from batches(0)[:2]
        if during == "data":
            interrupt()
        yield from batches(0)

    def loss(logits, labels):
        if during == "step":
            jax.debug.callback(interrupt)
        return pf.losses.member_cross_entropy(logits, labels)

    trained, expected = new(), new()
    with pytest.raises(KeyboardInterrupt):
        quiet(*trained, train(), epochs=1, loss=loss)
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    steps = int(trained[1].step[...])
    assert steps == 2 if during == "data" else steps >= 1
    quiet(*expected, [*batches(0)[:2], *batches(0)][:steps], epochs=1)
    assert equal(trained, expected)


def test_an_error_leaves_the_trained_weights_but_not_those_that_are_not_finite():
    def failing():
        yield from batches(0)[:2]
        raise OSError("no more data")

    trained, expected, diverged = new(), new(), new()
    with pytest.raises(OSError, match=r"no more data"):
        quiet(*trained, failing(), epochs=1)
    quiet(*expected, batches(0)[:2], epochs=1)
    assert equal(trained, expected)

    first, (x, y), *_ = batches(0)
    with pytest.raises(ValueError, match=r"expects finite losses; got nan at step 1 of epoch 0. Look at that batch"):
        quiet(*diverged, [first, (x, y + CLASSES), first], epochs=1)
    assert equal(diverged, new())


def test_the_bar_is_on_stderr_and_can_be_left_out(capsys):
    fit(*new(), batches, epochs=2, val=batches)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 2/2" in shown.err
    assert "val_nll" in shown.err
    quiet(*new(), batches, epochs=1)
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")  # which networks still do
@pytest.mark.parametrize("make", [nnx.clone, lambda net: pf.ensemble(net, 3)])
def test_layers_may_sow_and_promotion_may_be_strict(make):
    class Sowing(nnx.Linear):
        def __call__(self, x):
            y = super().__call__(x)
            self.sow(nnx.Intermediate, "sown", y)
            return y

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        model = make(Sowing(2, CLASSES, rngs=nnx.Rngs(0)))
        optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
        first, second = quiet(model, optimizer, batches(0), epochs=2, val=batches(0))
    assert second["train_loss"] < first["train_loss"]
    assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))


def test_members_stay_on_their_devices():
    model, optimizer = new("deep", transform=SGD)
    mesh = jax.make_mesh((3,), ("members",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:3])
    spread = NamedSharding(mesh, PartitionSpec("members"))
    nnx.update(model, jax.device_put(nnx.state(model), spread))
    quiet(model, optimizer, batches, epochs=1)
    assert all(x.sharding.device_set == spread.device_set for x in states(model))


def test_a_folder_of_another_run_is_refused(tmp_path):
    quiet(*new(), batches, epochs=1, checkpoint=tmp_path)
    with pytest.raises(
        ValueError, match=r"expects a folder without checkpoints .* of a run of 1 epochs. Go on with it"
    ):
        quiet(*new(), batches, epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"differences:\n  model.network.(.|\n)*Make them as they were"):
        quiet(*new("deep"), batches, epochs=2, checkpoint=tmp_path, resume=True)
    with pytest.raises(
        ValueError, match=r"3 differences:\n  patience: a number here, None there\n  monitor: val_nll here"
    ):
        quiet(*new(), batches, epochs=2, val=batches, patience=1, checkpoint=tmp_path, resume=True)
