"""Digits, one of them never seen: a single network, MC dropout, a deep ensemble and a BatchEnsemble, in torch and Flax.

    python -m examples.digits_ood               five seeds of each, trained in PyTorch and in Flax
    python -m examples.digits_ood --fast        a small run, to see that everything works
    python -m examples.digits_ood --choose      how the settings below were chosen

Networks learn nine of scikit-learn's ten digits. How good and how calibrated are they on test images, and does their
uncertainty tell the tenth digit (near) and noise (far) from what they know? Two fifths of the images are the test set,
the same for all seeds; each seed splits the rest anew, into 640 images for training and some 330 for validation. The
settings are those of the lowest validation NLL, a mean over the seeds, for each method on its own: neither the test set
nor the tenth digit had a part in it. With --new-writers the test images are the last two fifths, mostly by writers of
whom none are in training: what they write is unfamiliar too, and the tenth digit is harder to tell from it.

All runs are in float64, so that the frameworks, which start from equal weights and see equal batches and dropout masks,
end with the same table. In float32 (--dtype float32) rounding grows until single runs differ.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lightning
import numpy as np
import optax
import torch
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

import probly_flax.metrics
import probly_flax.training
import probly_torch.metrics
from probly_torch.plots import reliability_diagram, risk_coverage_curve
from probly_torch.training import EnsembleClassifier
from probly_torch.uncertainty import mutual_information, predictive_entropy

NUM_MEMBERS = 5  # and passes of MC dropout
NUM_CLASSES = 9
WIDTHS = 64, 128, 128, 128, NUM_CLASSES
NUM_TRAIN, BATCH_SIZE, EPOCHS = 640, 64, 40
LEAST = 1e-9  # score that is drawn
SINGLE, DROPOUT, DEEP, BATCH = "single network", "MC dropout", "deep ensemble", "BatchEnsemble"
METHODS = SINGLE, DROPOUT, DEEP, BATCH

COST = "parameters", "seconds"
QUALITY = "accuracy", "NLL", "ECE"
DETECTION = tuple(f"{where}, {score}" for where in ("near", "far") for score in ("mutual information", "entropy"))

Batches = Callable[[int], list[tuple[np.ndarray, np.ndarray]]]  # the batches of an epoch, given its number


class Settings(NamedTuple):
    learning_rate: float
    weight_decay: float
    dropout: float = 0.0
    init: str = "normal"  # of r and s


SETTINGS = {
    SINGLE: Settings(1e-2, 0.1),
    DROPOUT: Settings(1e-2, 0.1, dropout=0.1),
    DEEP: Settings(1e-2, 0.1),
    BATCH: Settings(1e-2, 0.1, init="normal"),
}
GRID = tuple(product((3e-3, 1e-2), (0.0, 0.1)))  # learning rates and weight decays
CHOICES = {
    SINGLE: [Settings(*each) for each in GRID],
    DROPOUT: [Settings(*each, dropout=dropout) for each, dropout in product(GRID, (0.1, 0.3))],
    DEEP: [Settings(*each) for each in GRID],
    BATCH: [Settings(*each, init=init) for each, init in product(GRID, ("normal", "random_sign"))],
}

# WRN-28-10 on CIFAR-10: parameters over those of a single network, accuracy, NLL, ECE.
PUBLISHED = {
    SINGLE: ("1.000", "0.960", "0.159", "0.023"),
    DEEP: ("4.000", "0.966", "0.114", "0.010"),
    BATCH: ("1.003", "0.963", "0.136", "0.018"),
}


class Data(NamedTuple):
    """Images (N, 64) from 0 to 1, and class indices (N,); those of the class held out, and noise, have none."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    near: np.ndarray
    far: np.ndarray


def load_data(held_out: int, seed: int, dtype: str = "float64", new_writers: bool = False) -> Data:
    """The last two fifths of the images, which are of writers of their own, are the test set; or two fifths of all."""
    images, digits = load_digits(return_X_y=True)
    x, inside = (images / 16).astype(dtype), digits != held_out
    known, labels = x[inside], digits[inside] - (digits[inside] > held_out)
    if not new_writers:
        order = np.random.default_rng(0).permutation(len(known))  # the same for all seeds
        known, labels = known[order], labels[order]
    split, rng = len(known) * 3 // 5, np.random.default_rng(seed)
    train, val = np.split(rng.permutation(split), [NUM_TRAIN])
    far = rng.uniform(size=known[split:].shape).astype(dtype)
    parts = ((known[rows], labels[rows]) for rows in (train, val, slice(split, None)))
    return Data(*(array for pair in parts for array in pair), near=x[~inside], far=far)


class EpochBatches:
    """Batches of an epoch in an order of its own; and when each epoch began."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed
        self.starts: list[float] = []

    def __call__(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        self.starts.append(time.perf_counter())
        order = np.random.default_rng((self.seed, epoch)).permutation(NUM_TRAIN).reshape(-1, BATCH_SIZE)
        return [(self.data.x_train[rows], self.data.y_train[rows]) for rows in order]

    def seconds(self) -> float:
        """Of the training that just ended: all epochs as long as the median one, so without compiling and setup."""
        epochs = np.diff([*self.starts, time.perf_counter()])
        return float(np.median(epochs) * len(epochs))


class Dropout(nn.Module):
    """nnx.Dropout in torch: the masks are those that Flax draws from the same seed."""

    def __init__(self, rate: float, rngs: probly_torch.Rngs) -> None:
        super().__init__()
        self.keep = torch.tensor(1 - rate, dtype=torch.float64)
        self.rngs = rngs.dropout.fork()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask = probly_torch.random.bernoulli(self.rngs(), self.keep, x.shape)
        return torch.where(mask, x / self.keep.item(), 0)


def torch_network(dropout: float, seed: int, dtype: str) -> nn.Sequential:
    rngs = probly_torch.Rngs(dropout=seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs, dtype=getattr(torch, dtype)), nn.ReLU()]
        layers += [Dropout(dropout, rngs)] if dropout and outputs != NUM_CLASSES else []
    return nn.Sequential(*layers[:-1])


def flax_network(dropout: float, seed: int, dtype: str) -> nnx.Sequential:
    rngs, zeros = nnx.Rngs(params=0, dropout=seed), nnx.initializers.zeros  # for torch's weights to fill
    layers: list[Callable[..., jax.Array]] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nnx.Linear(inputs, outputs, kernel_init=zeros, param_dtype=dtype, rngs=rngs), nnx.relu]
        layers += [nnx.Dropout(dropout, rngs=rngs)] if dropout and outputs != NUM_CLASSES else []
    return nnx.Sequential(*layers[:-1])


class TorchBatches(lightning.LightningDataModule):
    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches(self.trainer.current_epoch), batch_size=None)  # they are batches already


def fit_torch(model: nn.Module, batches: Batches, epochs: int, settings: Settings) -> None:
    optimizer = partial(torch.optim.AdamW, lr=settings.learning_rate)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=1,  # each epoch has an order of its own
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # The batches are in memory, so that worker processes, which Lightning advises, would only slow them down.
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*but have no `val_dataloader`")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # in Lightning's own code
        module = EnsembleClassifier(
            model, optimizer=optimizer, lr_scheduler=schedule, weight_decay=settings.weight_decay
        )
        trainer.fit(module, datamodule=TorchBatches(batches))


def fit_flax(model: nnx.Module, batches: Batches, epochs: int, settings: Settings) -> None:
    decay = optax.add_decayed_weights(settings.weight_decay, mask=are_kernels)
    if isinstance(model, probly_flax.BatchEnsemble):
        decay = probly_flax.training.fast_weight_groups(model, settings.weight_decay)
    cosine = optax.cosine_decay_schedule(settings.learning_rate, epochs)
    rate = optax.scale_by_learning_rate(lambda step: cosine(step // (NUM_TRAIN // BATCH_SIZE)))  # of the epoch
    transform = optax.chain(optax.scale_by_adam(), decay, rate)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    probly_flax.training.fit(model, optimizer, batches, epochs=epochs, progress=False)


def are_kernels(params: Any) -> Any:
    """Weights decay and biases do not, as EnsembleClassifier has it."""
    return jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


@torch.no_grad()
def torch_logits(model: nn.Module, x: np.ndarray, passes: int) -> torch.Tensor:
    """Logits (E, B, C): of the members, or of passes through one network."""
    model.train(passes > 1)  # which is what makes passes differ
    outputs = [model(torch.from_numpy(x)) for _ in range(passes)]
    return outputs[0] if hasattr(model, "num_members") else torch.stack(outputs)


jitted = nnx.jit(lambda model, x: model(x))


def flax_logits(model: nnx.Module, x: np.ndarray, passes: int) -> jax.Array:
    if passes > 1:
        model.train()
    else:
        model.eval()
    outputs = [jitted(model, x) for _ in range(passes)]
    return outputs[0] if hasattr(model, "num_members") else jnp.stack(outputs)


def scores_of(package: ModuleType, test: Any, near: Any, far: Any, labels: Any) -> dict[str, Any]:
    """The packages have the same functions. A single network has no mutual information."""
    metrics, uncertainty = package.metrics, package.uncertainty
    scores = {
        "accuracy": metrics.accuracy(test, labels),
        "NLL": metrics.nll(test, labels),
        "ECE": metrics.ece(test, labels),
    }
    kinds = {"mutual information": uncertainty.mutual_information, "entropy": uncertainty.predictive_entropy}
    for (where, logits), (kind, score) in product({"near": near, "far": far}.items(), kinds.items()):
        if len(test) > 1 or kind == "entropy":
            scores[f"{where}, {kind}"] = metrics.ood_auroc(score(test), score(logits))
    return scores


def torch_scores(*arguments: Any) -> dict[str, Any]:
    return scores_of(probly_torch, *map(torch.as_tensor, arguments))


class Framework(NamedTuple):
    """What differs between the two."""

    name: str
    package: ModuleType
    network: Callable[[float, int, str], Any]
    fit: Callable[[Any, Batches, int, Settings], None]
    logits: Callable[[Any, np.ndarray, int], Any]
    scores: Callable[..., dict[str, Any]]


TORCH = Framework("torch", probly_torch, torch_network, fit_torch, torch_logits, torch_scores)
FLAX = Framework("Flax", probly_flax, flax_network, fit_flax, flax_logits, jax.jit(partial(scores_of, probly_flax)))


class Run(NamedTuple):
    """A trained model, and its logits (E, B, C) of what it is judged by."""

    parameters: int
    seconds: float
    val: Any
    test: Any
    near: Any
    far: Any


def new_model(framework: Framework, method: str, settings: Settings, seed: int, dtype: str) -> Any:
    network = framework.network(settings.dropout, seed, dtype)
    if method == DEEP:
        return framework.package.ensemble(network, NUM_MEMBERS, rngs=seed, reset_params=framework is TORCH)
    if method == BATCH:
        return framework.package.batchensemble(network, NUM_MEMBERS, rngs=seed, init=settings.init)
    return network


def train(framework: Framework, method: str, settings: Settings, data: Data, epochs: int, seed: int, dtype: str) -> Run:
    """Weights start as torch's in both frameworks."""
    torch.manual_seed(seed)
    initial = new_model(TORCH, method, settings, seed, dtype)
    model = initial
    if framework is FLAX:
        model = new_model(FLAX, method, settings, seed, dtype)
        probly_flax.load_arrays(model, probly_torch.to_arrays(initial))
    batches = EpochBatches(data, seed)
    framework.fit(model, batches, epochs, settings)
    seconds, parameters = batches.seconds(), sum(a.size for a in framework.package.to_arrays(model).values())
    passes = NUM_MEMBERS if method == DROPOUT else 1
    logits = (framework.logits(model, x, passes) for x in (data.x_val, data.x_test, data.near, data.far))
    return Run(parameters, seconds, *logits)


def judge(framework: Framework, run: Run, data: Data) -> dict[str, float]:
    """By the framework's own functions."""
    scores = framework.scores(run.test, run.near, run.far, data.y_test)
    costs = {"parameters": run.parameters, "seconds": run.seconds}
    return costs | {name: float(scores[name]) for name in (*QUALITY, *DETECTION) if name in scores}


Results = dict[tuple[str, str], list[dict[str, float]]]  # by method and framework: the scores of each seed
Runs = dict[str, list[tuple[Run, Data]]]  # of torch, by method: those of each seed


def run_all(
    held_out: int, seeds: Sequence[int], epochs: int, dtype: str, new_writers: bool = False
) -> tuple[Results, Runs]:
    results: Results = {}
    runs: Runs = {}
    for method, framework, seed in progress(tuple(product(METHODS, (TORCH, FLAX), seeds)), "Training"):
        data = load_data(held_out, seed, dtype, new_writers)
        run = train(framework, method, SETTINGS[method], data, epochs, seed, dtype)
        results.setdefault((method, framework.name), []).append(judge(framework, run, data))
        if framework is TORCH:
            runs.setdefault(method, []).append((run, data))
    return results, runs


def choose(held_out: int, seeds: Sequence[int], epochs: int, dtype: str) -> None:
    """Prints the NLL of the validation images, a mean over the seeds, of all settings that were tried."""
    table = Table("method", "learning rate", "weight decay", "dropout", "init", box=box.SIMPLE_HEAD)
    table.add_column("validation NLL", justify="right")
    for method in METHODS:
        nlls: dict[Settings, list[float]] = {}
        for settings, seed in progress(tuple(product(CHOICES[method], seeds)), method):
            data = load_data(held_out, seed, dtype)
            run = train(TORCH, method, settings, data, epochs, seed, dtype)
            nll = probly_torch.metrics.nll(run.val, torch.from_numpy(data.y_val)).item()
            nlls.setdefault(settings, []).append(nll)
        means = {settings: np.mean(each) for settings, each in nlls.items()}
        for settings, mean in means.items():
            mark = "*" if mean == min(means.values()) else " "
            table.add_row(method, *map(str, settings), f"{mean:.4f} {mark}", end_section=settings == [*means][-1])
    Console(width=120).print(table)
    print("* the lowest of its method, and its entry in SETTINGS")


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    return track(items, what, console=Console(stderr=True))


def print_tables(results: Results) -> None:
    single = np.mean([scores["parameters"] for scores in results[SINGLE, TORCH.name]])
    quality, detection = (Table("method", "framework", box=box.SIMPLE_HEAD) for _ in range(2))
    for header in ("parameters", "of a single\nnetwork", "training\nseconds", *QUALITY):
        quality.add_column(header, justify="right")
    for header in DETECTION:
        detection.add_column(header.replace(", ", "\n"), justify="right")
    for (method, framework), scores in results.items():
        parameters, seconds = (np.mean([each[name] for each in scores]) for name in ("parameters", "seconds"))
        cost = f"{parameters:,.0f}", f"{parameters / single:.3f}", f"{seconds:.1f}"
        last = framework == FLAX.name
        quality.add_row(method, framework, *cost, *(spread(scores, name) for name in QUALITY), end_section=last)
        detection.add_row(method, framework, *(spread(scores, name) for name in DETECTION), end_section=last)
    for method, (times, *values) in PUBLISHED.items():
        quality.add_row(method, "published", "", times, "", *values)
    console = Console(width=120)  # whole in a file too, for which rich takes a width of 80
    for table in (quality, detection):
        console.print(table)


def spread(scores: Sequence[dict[str, float]], name: str) -> str:
    """Mean and standard deviation over the seeds."""
    if name not in scores[0]:
        return "-"
    values = [each[name] for each in scores]
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def print_notes(results: Results, held_out: int) -> None:
    print("Means and standard deviations over the seeds. NLL in nats, ECE with 15 bins. Seconds without compiling and")
    print("setting up; those of MC dropout in torch include drawing the masks that Flax draws. Published: WRN-28-10 on")
    print("CIFAR-10, ensembles of 4 (Nado et al. 2021), for the shape of the result. The second table has AUROCs, of")
    print(f"telling the digit {held_out} (near) and noise (far) from the test images. Figures pool the seeds of torch.")

    print("\nAgainst the single network, in torch; and the lowest AUROC of the held-out digit by mutual information:")
    single = results[SINGLE, TORCH.name]
    for method in METHODS[1:]:
        scores, parts = results[method, TORCH.name], []
        for name in QUALITY[1:]:
            changes = np.array([each[name] - alone[name] for alone, each in zip(single, scores, strict=True)])
            parts.append(f"{name} {changes.mean():+.4f}, lower in {(changes < 0).sum()} of {len(changes)} seeds")
        aurocs = [each[DETECTION[0]] for each in scores]
        print(f"  {method:<15} {'; '.join(parts)}; AUROC {min(aurocs):.3f}")

    print("\nHow far apart torch and Flax are, at most: in the scores of a seed, and in the means of the tables.")
    for method in METHODS:
        in_torch, in_flax = (
            np.array([[each[name] for name in each if name not in COST] for each in results[method, framework.name]])
            for framework in (TORCH, FLAX)
        )
        means = abs(in_torch.mean(0) - in_flax.mean(0))
        print(f"  {method:<15} {abs(in_torch - in_flax).max():.1e}  {means.max():.1e}")


def panels_of(runs: Runs) -> Iterable[tuple[Axes, list[tuple[Run, Data]]]]:
    """Axes for each method, in one new figure."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True)
    for panel, (method, each) in zip(panels, runs.items(), strict=True):
        panel.set_title(method)
        yield panel, each
        panel.label_outer()


def pooled(runs: Sequence[tuple[Run, Data]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (E, B, C) and labels (B,) of the test images of all seeds."""
    labels = [torch.from_numpy(data.y_test) for _, data in runs]
    return torch.cat([run.test for run, _ in runs], 1), torch.cat(labels)


def plot_reliability(runs: Runs) -> Figure:
    for panel, each in panels_of(runs):
        reliability_diagram(*pooled(each), ax=panel)
    return panel.figure


def plot_risk_coverage(runs: Runs) -> Figure:
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    panel = figure.subplots()
    for method, each in runs.items():
        risk_coverage_curve(*pooled(each), label=method, ax=panel)
    panel.set(xlim=(0.5, 1.02))  # below, hardly anything is wrong
    return figure


def plot_detection(runs: Runs, held_out: int) -> Figure:
    """Of each kind of input, the share whose score is below a number: the further apart, the easier to tell."""
    for panel, each in panels_of(runs):
        score, name = mutual_information, "mutual information"
        if len(each[0][0].test) == 1:
            score, name = predictive_entropy, "entropy"
        kinds = ("test", "test images"), ("near", f"held-out digit {held_out}"), ("far", "noise")
        for (kind, label), color, style in zip(kinds, ("#0072B2", "#D55E00", "black"), ("-", "--", ":"), strict=True):
            scores = torch.cat([score(getattr(run, kind)) for run, _ in each]).clamp(min=LEAST)
            panel.ecdf(scores, label=label, color=color, linestyle=style, linewidth=2)
        panel.set(xscale="log", xlabel=f"{name} (nats)", ylabel="share of the inputs below", xlim=(LEAST, 3))
    panel.figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return panel.figure


def main(argv: Sequence[str] | None = None) -> Results | None:
    """Returns the scores of each seed, by method and framework."""
    parser = argparse.ArgumentParser(description="Ensembles on digits, one of which they have never seen.")
    parser.add_argument("--fast", action="store_true", help="2 seeds and 2 epochs instead of 5 and 40")
    parser.add_argument("--seed", type=int, default=42, help="the first one: of the split, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("out/digits_ood"), help="folder of the figures")
    parser.add_argument("--held-out", type=int, default=9, choices=range(10), help="the digit that is not learnt")
    parser.add_argument("--new-writers", action="store_true", help="test on writers that are not in training")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--choose", action="store_true", help="try settings, by the NLL of validation images")
    args = parser.parse_args(argv)
    num_seeds, epochs = (2, 2) if args.fast else (5, EPOCHS)
    seeds = range(args.seed, args.seed + num_seeds)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what hardware there is does not matter here
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    if args.choose:
        choose(args.held_out, seeds, epochs, args.dtype)
        return None
    with jax.enable_x64(True):  # also in float32, for Adam's bias corrections: torch has those in float64
        results, runs = run_all(args.held_out, seeds, epochs, args.dtype, args.new_writers)
    print_tables(results)
    print_notes(results, args.held_out)
    args.out.mkdir(parents=True, exist_ok=True)
    plot_reliability(runs).savefig(args.out / "reliability.png", dpi=150)
    plot_risk_coverage(runs).savefig(args.out / "risk_coverage.png", dpi=150)
    plot_detection(runs, args.held_out).savefig(args.out / "detection.png", dpi=150)
    print(f"\nFigures are in {args.out}.")
    return results


if __name__ == "__main__":
    main()
