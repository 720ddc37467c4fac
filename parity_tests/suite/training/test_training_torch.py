"""probly_torch.training under Lightning: what is logged, predicted, restored and resumed, and on several processes."""

import copy
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import lightning
import numpy as np
import pytest
import torch
from flax import nnx
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probly_flax as pf
import probly_torch as pt
from parity_tests.standard import assert_close, assert_same_trajectory
from probly_flax.training import clip_by_member_norm
from probly_torch import losses, metrics
from probly_torch.training import (
    EnsembleClassifier,
    EnsembleMetrics,
    EnsembleMixin,
    EnsembleRegressor,
    fast_weight_groups,
)
from probly_torch.training.__main__ import main
from probly_torch.uncertainty import classification_uncertainty, regression_uncertainty

NOISE = (  # of Lightning, about data in memory, short epochs and checkpoints of another run, and of its own code
    "does not have many workers",
    "smaller than the logging interval",
    "but have no `val_dataloader`",
    "The dirpath has changed",
    "`self.trainer` reference is not registered",
    "isinstance.*LeafSpec",
    "LightningCLI's args parameter",
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{text}") for text in NOISE]
CLASSIFICATION = {"loss", "nll", "accuracy", "brier", "ece", "mutual_information"}
REGRESSION = {"loss", "nll", "rmse", "crps", "coverage"}
MODELS = {
    "single": lambda network: network,
    "Ensemble": lambda network: pt.ensemble(network, 3),
    "BatchEnsemble": lambda network: pt.batchensemble(network, 3),
}
SGD = functools.partial(torch.optim.SGD, lr=0.5)


def mlp(outputs=2, dropout=0.0):
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(8), nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Linear(2, 8), *norm, nn.ReLU(), nn.Linear(8, outputs))


def loader(batch_size=16, rows=32, shuffle=False, dtype=torch.float32, regression=False):
    x = torch.randn(rows, 2, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y = x[:, :1] ** 2 if regression else (x[:, 0] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=shuffle)


def trainer(folder=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": folder is not None, "default_root_dir": folder, "max_epochs": 2}
    return lightning.Trainer(**quiet | options)


def weights(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()]).numpy()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_what_is_logged_and_predicted_is_what_metrics_and_uncertainty_say(make, task):
    kind, names = (EnsembleRegressor, REGRESSION) if task == "regression" else (EnsembleClassifier, CLASSIFICATION)
    regression = task == "regression"
    module, t, data = kind(make(mlp())), trainer(), loader(regression=regression)
    t.fit(module, data, loader(12, regression=regression))
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    train = {"train_loss"} if regression else {"train_loss", "train_accuracy"}
    assert logged.keys() == {"loss", *train, *(f"val_{name}" for name in names)}
    assert "loss" in t.progress_bar_metrics
    (tested,) = t.test(module, loader(12, regression=regression), verbose=False)
    assert tested == {f"test_{name}": pytest.approx(logged[f"val_{name}"], abs=0) for name in names}

    x, y = data.dataset.tensors
    with torch.no_grad():
        outputs = module.eval().member_outputs(x)
        first = outputs[0] if regression else outputs
        assert first.shape[:2] == (3 if hasattr(module.model, "num_members") else 1, 32)
        functions = {"nll": losses.mixture_gaussian_nll, "crps": metrics.crps, "loss": losses.member_gaussian_nll}
        functions |= {"coverage": metrics.interval_coverage}
        if not regression:
            functions = {"nll": metrics.nll, "ece": metrics.ece, "brier": metrics.brier, "accuracy": metrics.accuracy}
            functions |= {"loss": losses.member_cross_entropy}
        for name, function in functions.items():
            value = function(*outputs, y) if regression else function(outputs, y)
            assert_close(torch.tensor(logged[f"val_{name}"]), value, "float32")
        expected = regression_uncertainty(*outputs) if regression else classification_uncertainty(outputs)
        for batches in (data, DataLoader(x, 16), DataLoader(TensorDataset(x), 16)):
            predicted = t.predict(module, batches)
            for name in ("mean", "total", "aleatoric", "epistemic"):
                assert_close(torch.cat([getattr(p, name) for p in predicted]), getattr(expected, name), "float32")


def test_several_dataloaders_are_judged_apart():
    (small, large), t = (loader(rows=8), loader(12)), trainer(callbacks=[EnsembleMetrics()])
    module = EnsembleClassifier(pt.ensemble(mlp(), 3))
    apart = [t.validate(module, each, verbose=False)[0] for each in (small, large)]
    for kind in (EnsembleClassifier(module.model), Own(module.model)):
        t = trainer(callbacks=[] if isinstance(kind, EnsembleClassifier) else [EnsembleMetrics()])
        for i, logged in enumerate(t.test(kind, [small, large], verbose=False)):
            for name in CLASSIFICATION - {"loss"}:
                assert logged[f"test_{name}/dataloader_idx_{i}"] == apart[i][f"val_{name}"]
        assert t.test(kind, small, verbose=False)[0]["test_nll"] == apart[0]["val_nll"]


def test_training_loss_and_accuracy_are_of_the_epoch():
    module, t = (
        EnsembleClassifier(pt.ensemble(mlp(), 3), optimizer=functools.partial(torch.optim.SGD, lr=0.0)),
        trainer(),
    )
    data = loader(12)  # 12, 12, 8
    t.fit(module, data)
    x, y = data.dataset.tensors
    logits = module.member_outputs(x).detach()
    assert_close(t.callback_metrics["train_loss"], losses.member_cross_entropy(logits, y), "float32")
    assert_close(t.callback_metrics["train_accuracy"], metrics.accuracy(logits, y), "float32")


def test_the_loss_of_the_mean_and_batches_of_each_member():
    x, y = loader().dataset.tensors
    model = pt.ensemble(mlp(), 3)
    mixture = EnsembleClassifier(model, loss=losses.mixture_cross_entropy)
    assert torch.equal(mixture.training_step((x, y)), losses.mixture_cross_entropy(model(x), y))
    own = EnsembleClassifier(model, in_axes=0)
    xs, ys = x[:30].reshape(3, 10, 2), y[:30].reshape(3, 10)
    assert torch.equal(own.training_step((xs, ys)), losses.member_cross_entropy(model(xs, in_axes=0), ys))
    assert_close(own._sums["accuracy"] / 10, (model(xs, in_axes=0).argmax(-1) == ys).double().mean(), "float32")
    single = EnsembleClassifier(mlp(), in_axes=0)
    assert torch.equal(single.training_step((x[None], y[None])), losses.member_cross_entropy(mlp()(x)[None], y))
    two = EnsembleRegressor(Heads())
    assert torch.equal(two.member_outputs(x)[1], model(x)[..., 1:].exp())
    beta = EnsembleRegressor(Heads(), loss=losses.member_beta_nll)
    assert torch.equal(beta.training_step((x, x[:, :1])), losses.member_beta_nll(*two.member_outputs(x), x[:, :1]))


class Heads(nn.Module):
    """Members that return a mean and a variance."""

    def __init__(self):
        super().__init__()
        self.members = pt.ensemble(mlp(), 3)

    def forward(self, x):
        outputs = self.members(x)
        return outputs[..., :1], outputs[..., 1:].exp()


class Own(EnsembleMixin, lightning.LightningModule):
    """A person's module, with the three lines that make it train an ensemble."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch):
        return self.ensemble_loss(batch)

    def validation_step(self, batch):
        pass

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.optimizer_groups(weight_decay=0.1), lr=0.01)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_module_of_ones_own_trains_and_is_judged_alike(make, precision):
    adamw = functools.partial(torch.optim.AdamW, lr=0.01)
    ours = EnsembleClassifier(make(mlp()), optimizer=adamw, weight_decay=0.1)
    theirs, runs = Own(make(mlp())), []
    for module, callbacks in ((ours, []), (theirs, [EnsembleMetrics()])):
        runs.append(trainer(callbacks=callbacks, precision=precision))
        runs[-1].fit(module, loader(), loader(12))
    assert same(ours.model, theirs.model)
    logged = [{k: float(v) for k, v in t.callback_metrics.items() if k[:4] == "val_"} for t in runs]
    loss = logged[0].pop("val_loss")
    assert logged[0] == logged[1]
    assert logged[1].keys() == {f"val_{name}" for name in CLASSIFICATION - {"loss"}}
    assert loss < 0.8
    (tested,) = runs[1].test(theirs, loader(12), verbose=False)
    assert tested == {name.replace("val", "test"): value for name, value in logged[1].items()}
    with runs[0].precision_plugin.forward_context():
        assert theirs.member_outputs(torch.ones(4, 2)).dtype == torch.float32
        assert ours.model(torch.ones(4, 2)).dtype == (torch.float32 if precision[:2] == "32" else torch.bfloat16)


def test_the_callback_judges_regression_and_says_what_it_needs():
    data = loader(regression=True)
    ours, t = EnsembleRegressor(Heads()), trainer(callbacks=[EnsembleMetrics("regression")])

    class Elsewhere(Own):
        def __init__(self):
            super().__init__(None)
            del self.model
            self.network = Heads()

        def training_step(self, batch):
            return losses.member_gaussian_nll(*self.network(batch[0]), batch[1])

    theirs, elsewhere = Elsewhere(), trainer(callbacks=[EnsembleMetrics("regression", "network")])
    elsewhere.validate(theirs, data, verbose=False)
    t.validate(ours, data, verbose=False)
    for name in REGRESSION - {"loss"}:
        assert t.callback_metrics[f"val_{name}"] == elsewhere.callback_metrics[f"val_{name}"]
    with pytest.raises(ValueError, match=r"network in model; got Elsewhere.*EnsembleMetrics\(attribute='network'\)"):
        trainer(callbacks=[EnsembleMetrics()]).validate(theirs, data, verbose=False)


def test_accumulated_gradients_are_those_of_a_large_batch():
    def fit(batch_size, steps):
        module = EnsembleClassifier(pt.batchensemble(mlp().double(), 3), optimizer=SGD)
        t = trainer(precision="64-true", accumulate_grad_batches=steps)
        t.fit(module, loader(batch_size, dtype=torch.float64))
        return weights(module)

    assert_same_trajectory(fit(8, 2), fit(16, 1))
    assert abs(fit(8, 2) - fit(8, 1)).max() > 1e-3


def test_compiled_fast_dev_run_and_early_stopping():
    compiled, plain = (EnsembleClassifier(pt.ensemble(mlp(), 3), optimizer=SGD) for _ in range(2))
    compiled.model = torch.compile(compiled.model, backend="eager")
    for module in (compiled, plain):
        trainer(max_epochs=1).fit(module, loader(), loader())
    assert_close(weights(compiled), weights(plain), "float32")
    whole = EnsembleClassifier(pt.ensemble(mlp(), 3), optimizer=SGD)
    t = trainer(max_epochs=1)
    t.fit(torch.compile(whole, backend="eager"), loader(), loader())
    assert_close(weights(whole), weights(plain), "float32")
    assert {"loss", "train_accuracy", "val_nll"} < t.callback_metrics.keys()
    trainer(fast_dev_run=True).fit(plain, loader(), loader())
    still = EnsembleClassifier(pt.ensemble(mlp(), 3), optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    t = trainer(max_epochs=9, callbacks=[EarlyStopping("val_nll", patience=1)])
    t.fit(still, loader(), loader())
    assert t.current_epoch == 2


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("options", [{"monitor": "val_nll"}, {"save_on_train_epoch_end": True}], ids=["val", "train"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(make, options, tmp_path, monkeypatch):
    def fit(folder, resumed_from=None, seed=0):
        module = EnsembleClassifier(make(mlp(dropout=0.5)), weight_decay=0.1)
        torch.manual_seed(seed)
        checkpoint = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **options)
        t = trainer(folder, max_epochs=4, callbacks=[checkpoint])
        t.fit(module, loader(shuffle=True), loader(12), ckpt_path=resumed_from)
        return module, t

    module, t = fit(tmp_path / "a")
    resumed, u = fit(tmp_path / "b", tmp_path / "a/epoch=1.ckpt", seed=7)
    assert same(module, resumed)
    assert t.callback_metrics == u.callback_metrics
    assert (t.global_step, u.global_step, t.current_epoch, u.current_epoch) == (8, 8, 4, 4)
    monkeypatch.setattr(EnsembleMixin, "on_fit_start", lambda self: None)
    drifted, _ = fit(tmp_path / "c", tmp_path / "a/epoch=1.ckpt", seed=7)
    assert not same(module, drifted)


class Net(nn.Module):
    """A class that torch does not know."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        return self.layers(x)


class Wide(EnsembleClassifier):
    """A module that makes its own network."""

    def __init__(self, width):
        super().__init__(pt.ensemble(nn.Linear(2, width), 3), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


class Harm:
    """The code that a hostile file would run."""

    def __reduce__(self):
        return os.system, ("touch harm",)


def saved(module, path):
    t = trainer(max_epochs=1)
    t.fit(module, loader(regression=isinstance(module, EnsembleRegressor)))
    t.save_checkpoint(path)
    return path


@pytest.mark.parametrize("kind", [EnsembleClassifier, EnsembleRegressor])
def test_a_checkpoint_restores_class_network_and_functions(kind, tmp_path):
    x = torch.randn(5, 2)
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    encoder = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
    for i, network in enumerate((mlp(dropout=0.5), nn.Sequential(nn.Unflatten(1, (1, 2)), encoder, nn.Flatten()))):
        for make in MODELS.values():
            module = kind(
                make(network).train(), optimizer=SGD, lr_scheduler=schedule, weight_decay=0.1, fast_lr_multiplier=0.3
            )
            path = saved(module, tmp_path / f"{i}.ckpt")
            loaded = kind.load_from_checkpoint(path)
            assert same(module, loaded)
            assert type(loaded) is kind
            for a, b in zip(module.eval().predict_step(x), loaded.eval().predict_step(x), strict=True):
                assert torch.equal(a, b)
            assert (loaded.loss, loaded.weight_decay, loaded.fast_lr_multiplier) == (module.loss, 0.1, 0.3)
            ours, theirs = module.configure_optimizers(), loaded.configure_optimizers()
            assert ours["optimizer"].state_dict() == theirs["optimizer"].state_dict()
            assert ours["lr_scheduler"]["scheduler"].state_dict() == theirs["lr_scheduler"]["scheduler"].state_dict()
        assert torch.load(path)["state_dict"].keys() == module.state_dict().keys()


def test_a_checkpoint_with_other_classes_is_read_when_they_are_given_or_trusted(tmp_path, monkeypatch):
    x, load = torch.randn(5, 2), EnsembleClassifier.load_from_checkpoint
    module = EnsembleClassifier(pt.ensemble(Net(), 3), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    path = saved(module, tmp_path / "net.ckpt")
    predicted = module.eval()(x)
    with pytest.raises(
        ValueError, match=rf"got {Net.__module__}.Net. Pass it: .*\(path, model=...\); or, if you trust"
    ):
        load(path)
    loaded = load(path, weights_only=False)
    assert torch.equal(loaded.eval()(x), predicted)
    with pytest.raises(ValueError, match=r"a file with its optimizer .*\.load_from_checkpoint\(path, optimizer="):
        loaded.configure_optimizers()
    again = trainer()
    again.strategy.connect(loaded)
    again.save_checkpoint(tmp_path / "again.ckpt")
    with pytest.raises(ValueError, match="a file with its optimizer"):
        load(tmp_path / "again.ckpt", weights_only=False).configure_optimizers()
    loaded = load(path, model=pt.ensemble(Net(), 3), optimizer=SGD)
    assert torch.equal(loaded.eval()(x), predicted)
    assert loaded.configure_optimizers().defaults["lr"] == 0.5
    with torch.serialization.safe_globals([Net]):
        assert torch.equal(load(path).eval()(x), predicted)

    monkeypatch.chdir(tmp_path)
    checkpoint, pickled = torch.load(path), io.BytesIO()
    torch.save(Harm(), pickled)
    checkpoint["probly_torch_arguments"]["model"] = pickled.getvalue()
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"got posix\.system"):
        load(path)
    assert not Path("harm").exists()

    wide = Wide(4)
    assert torch.equal(Wide.load_from_checkpoint(saved(wide, tmp_path / "wide.ckpt")).eval()(x), wide.eval()(x))


def test_groups_give_fast_weights_their_own_learning_rate():
    model = pt.batchensemble(mlp(dropout=0.1), 3)
    groups = fast_weight_groups(model, 1e-2)
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("slow", 0.01, 1e-2),
        ("fast", 0.005, 0.0),
        ("undecayed", 0.01, 0.0),
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    assert [{names[id(p)].split(".")[-1] for p in g["params"]} for g in groups][:2] == [{"weight"}, {"r", "s"}]
    assert sum(len(g["params"]) for g in groups) == len(names)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [g["lr"] for g in copied.param_groups] == [0.01, 0.005, 0.01]
        copied.add_param_group(copied.param_groups.pop().copy())
        assert copied.param_groups[-1]["lr"] == 0.01
    assert (
        torch.optim.SGD([group.copy() for group in fast_weight_groups(model, 0.1)], lr=0.1).param_groups[1]["lr"]
        == 0.05
    )
    optimizer.load_state_dict(torch.optim.AdamW(fast_weight_groups(model, 1e-2), lr=0.02).state_dict())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.005, 0.01]


def test_a_compiled_optimizer_takes_plain_groups():
    module = EnsembleClassifier(pt.batchensemble(mlp(), 3), optimizer=SGD, weight_decay=0.1)
    optimizers = module.configure_optimizers(), torch.optim.SGD(fast_weight_groups(module.model, 0.1), lr=0.5)
    assert [g["lr"] for g in optimizers[0].param_groups] == [0.5, 0.25, 0.5]
    optimizers[1].param_groups = [dict(group) for group in optimizers[1].param_groups]
    for optimizer in optimizers:
        before = weights(module)
        module.training_step(loader().dataset.tensors).backward()
        torch.compile(optimizer.step, backend="eager")()
        assert (weights(module) != before).any()


LAYERS = {
    "BatchEnsembleConv": (nn.Conv2d(2, 3, 1), 1, 2, 1),
    "BatchEnsembleConvTranspose": (nn.ConvTranspose1d(2, 3, 1), 1, 2, 1),
    "BatchEnsembleEmbed": (nn.Embedding(4, 3), 1, 2, 0),
    "BatchEnsembleGRU": (nn.GRU(2, 3, batch_first=True), 2, 4, 2),
    "BatchEnsembleLSTMCell": (nn.LSTMCell(2, 3), 2, 4, 2),
    "BatchEnsembleMultiHeadAttention": (nn.MultiheadAttention(2, 1, batch_first=True), 2, 8, 2),
    "BatchEnsembleMultiHeadAttention of sizes": (
        nn.MultiheadAttention(2, 1, kdim=3, add_bias_kv=True, batch_first=True),
        4,
        8,
        4,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_groups_know_every_layer(name):
    layer, *sizes = LAYERS[name]
    model = pt.batchensemble(nn.Sequential(layer, nn.Sequential(nn.Linear(2, 2), nn.PReLU())), 2, exclude="1.0")
    groups = fast_weight_groups(model, 0.1)
    assert [len(g["params"]) for g in groups] == [sizes[0] + 1, sizes[1], sizes[2] + 2]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_groups_of_what_is_not_known_are_asked_for():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

    model = pt.batchensemble(nn.Sequential(nn.Linear(2, 2), Scale()), 2)
    with pytest.raises(
        ValueError, match=r"got 'network.1.scale' of a Scale and 1 more.*0.1, decay=\(Scale,\)\), or no_"
    ):
        fast_weight_groups(model, 0.1)
    assert [len(g["params"]) for g in fast_weight_groups(model, 0.1, decay=(Scale,))] == [2, 2, 2]
    assert [len(g["params"]) for g in fast_weight_groups(model, 0.1, no_decay=(Scale,))] == [1, 2, 3]

    class Layer(nn.Module):  # as register_batchensemble takes them
        num_members = 2

        def __init__(self):
            super().__init__()
            self.r, self.s, self.kernel = (nn.Parameter(torch.ones(2)) for _ in range(3))

        def member(self, i):
            """Returns nothing, as a plain layer does."""

        def keep_members(self, indices):
            """Drops others."""

    with pytest.raises(ValueError, match="got 'kernel' of a Layer"):
        fast_weight_groups(Layer(), 0.1)
    assert [len(g["params"]) for g in fast_weight_groups(Layer(), 0.1, decay=(Layer,))] == [1, 2]
    with pytest.raises(ValueError, match=r"Say it: self.optimizer_groups\(0.1, decay=\(Scale,\)\)"):
        Own(Scale()).optimizer_groups(0.1)
    groups = Own(pt.ensemble(mlp(dropout=0.1), 2)).optimizer_groups(0.1)
    assert [(g["name"], len(g["params"])) for g in groups] == [("slow", 2), ("undecayed", 4)]
    linear = Own(pt.ensemble(nn.Linear(2, 2), 2)).optimizer_groups(0.1)  # whose parameters the Ensemble holds itself
    assert [(g["name"], len(g["params"])) for g in linear] == [("slow", 1), ("undecayed", 1)]


def test_a_schedule_that_loses_the_fast_rate_is_refused():
    def configure(schedule):
        options = {"optimizer": SGD, "lr_scheduler": schedule, "weight_decay": 0.1}
        return EnsembleClassifier(pt.batchensemble(mlp(), 2), **options).configure_optimizers()["lr_scheduler"]

    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    with pytest.raises(ValueError, match=r"ratios of the groups' learning rates, \[1.0, 0.5, 1.0\]; got OneCycleLR"):
        configure(functools.partial(one_cycle, max_lr=0.1, total_steps=10))
    kept = configure(lambda o: one_cycle(o, [group["lr"] for group in o.param_groups], total_steps=10))
    assert kept["interval"] == "step"
    plateau = configure(torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert (plateau["interval"], plateau["monitor"]) == ("epoch", "val_nll")


class Shares(lightning.LightningDataModule):
    """Batches of 16 rows. Each process has every other one, and Lightning's own sampler would shuffle them."""

    def train_dataloader(self):
        rank, count = self.trainer.global_rank, self.trainer.world_size
        rows = loader(rows=48, dtype=torch.float64).dataset.tensors
        return DataLoader(TensorDataset(*(each[rank::count] for each in rows)), 16 // count)

    val_dataloader = train_dataloader


def fit_in_processes(folder, **options):
    module = EnsembleClassifier(pt.batchensemble(mlp().double(), 3), optimizer=SGD, weight_decay=0.1)
    t = trainer(folder, precision="64-true", use_distributed_sampler=False, **options)
    t.fit(module, datamodule=Shares())
    t.save_checkpoint(Path(folder, "last.ckpt"))
    return module, {name: float(value) for name, value in t.callback_metrics.items() if name != "loss"}


def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import json, os, warnings
        warnings.simplefilter("ignore")
        from parity_tests.suite.training.test_training_torch import fit_in_processes
        _, logged = fit_in_processes({str(tmp_path)!r}, strategy="ddp", devices=2)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            open({str(tmp_path / "logged.json")!r}, "w").write(json.dumps(logged))
        os._exit(0)  # gloo may abort at exit
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)}
    subprocess.run([sys.executable, script], check=True, env=environment, capture_output=True)
    checkpoint, logged = torch.load(tmp_path / "last.ckpt"), json.loads((tmp_path / "logged.json").read_text())
    assert [state["torch"].dtype for state in checkpoint["probly_torch_random_states"]] == [torch.uint8] * 2
    both = EnsembleClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    module, alone = fit_in_processes(tmp_path)
    assert_same_trajectory(weights(both), weights(module))
    assert logged.keys() == alone.keys()
    assert_close(torch.tensor(list(logged.values())), torch.tensor(list(alone.values())), "float32")


CONFIG = """
seed_everything: 0
trainer: {{max_epochs: 1, accelerator: cpu, enable_progress_bar: false, default_root_dir: {folder}}}
model:
  class_path: EnsembleClassifier
  init_args:
    model:
      class_path: probly_torch.batchensemble
      init_args:
        base: {{class_path: torch.nn.Linear, init_args: {{in_features: 2, out_features: 2}}}}
        num_members: 3
    weight_decay: 0.01
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.1}}}}
    lr_scheduler: {{class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {{T_max: 1}}}}
data: parity_tests.suite.training.test_training_torch.Data
"""


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_the_command_line_trains_and_its_checkpoint_restores(tmp_path):
    config = tmp_path / "linear.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    command = [sys.executable, "-m", "probly_torch.training", "fit", "--config", config]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    for cls in (EnsembleClassifier, lightning.LightningModule):
        module = cls.load_from_checkpoint(path)
        assert type(module) is EnsembleClassifier
        assert (type(module.model), module.weight_decay) == (pt.BatchEnsemble, 0.01)
        assert [g["lr"] for g in module.configure_optimizers()["optimizer"].param_groups] == [0.1, 0.05, 0.1]
    main(["test", "--config", str(config), "--ckpt_path", str(path), "--trainer.logger", "false"])


def test_members_are_clipped_by_their_own_norms_in_both_packages():
    """Norms of 203, .57 and .41 become 1, .57 and .41, as they would alone; the head is clipped by its own."""

    class Headed(EnsembleMixin):
        def __init__(self):
            super().__init__()
            self.model, self.head = pt.Ensemble([nn.Linear(2, 3) for _ in range(3)]), nn.Linear(3, 1)

    class FlaxHeaded(nnx.Module):
        def __init__(self):
            self.model = pf.Ensemble([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(3)])
            self.head = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    module, flax_module = Headed(), FlaxHeaded()
    rows = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    rows *= np.array([203, 0.57, 0.41], np.float32)[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
    weight, bias = rows[:, :6].reshape(3, 3, 2), rows[:, 6:]
    module.model.weight.grad, module.model.bias.grad = torch.tensor(weight), torch.tensor(bias)
    for parameter in module.head.parameters():
        parameter.grad = torch.full_like(parameter, 5)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    norms = torch.cat([module.model.weight.grad.flatten(1), module.model.bias.grad], dim=1).norm(dim=1)
    assert_close(norms, torch.tensor([1, 0.57, 0.41]), "float32")
    assert_close(module.head.weight.grad, torch.full((1, 3), 0.5), "float32")

    gradients = nnx.state(flax_module, nnx.Param)
    gradients["model"]["stacked"]["kernel"].set_value(jnp.asarray(weight.swapaxes(1, 2)))
    gradients["model"]["stacked"]["bias"].set_value(jnp.asarray(bias))
    for name in ("kernel", "bias"):
        gradients["head"][name].set_value(jnp.full_like(gradients["head"][name].get_value(), 5))
    clip = clip_by_member_norm(flax_module, 1.0)
    clipped, _ = clip.update(gradients, clip.init(gradients))
    ours = np.swapaxes(clipped["model"]["stacked"]["kernel"].get_value(), 1, 2)
    assert_close(ours, module.model.weight.grad, "float32")
    assert_close(clipped["model"]["stacked"]["bias"].get_value(), module.model.bias.grad, "float32")
    assert_close(clipped["head"]["kernel"].get_value()[:, 0], module.head.weight.grad[0], "float32")
