"""Regression in one dimension, with noise that grows and a gap in the data: what is noise, and what is ignorance?

    python -m examples.regression_1d             the whole experiment
    python -m examples.regression_1d --fast      a small one, to see that everything runs

A deep ensemble and a BatchEnsemble of networks that predict a mean and a variance are trained in PyTorch and in Flax,
from the same weights on the same batches. Aleatoric uncertainty follows the noise, in the gap as well; epistemic
uncertainty grows in the gap, where members have nothing to agree on. What comes out is a table and three figures.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import lightning
import numpy as np
import optax
import torch
from flax import nnx
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

import probly_flax.training
import probly_torch
from probly_torch import metrics, plots
from probly_torch.training import EnsembleRegressor
from probly_torch.uncertainty import regression_uncertainty

NUM_MEMBERS = 5
HIDDEN = 64
BATCH_SIZE = 100
LEARNING_RATE = 3e-3
RANGE, GAP = (-3.0, 3.0), (-0.75, 0.75)
LINE = np.linspace(*RANGE, 400, dtype=np.float32)[:, None]  # where figures are drawn
DEEP, BATCH = "deep ensemble", "BatchEnsemble"

Batches = list[tuple[np.ndarray, np.ndarray]]
History = list[dict[str, Any]]


class Data(NamedTuple):
    """Inputs and targets (N, 1) in float32; none of those for training and validation are in the gap."""

    train: Batches
    val: Batches
    test: tuple[np.ndarray, np.ndarray]


def function(x: np.ndarray) -> np.ndarray:
    return np.sin(2 * x) + 0.3 * x


def noise(x: np.ndarray) -> np.ndarray:
    """The standard deviation of a target."""
    return 0.05 + 0.05 * (x - RANGE[0])


def in_gap(x: np.ndarray) -> np.ndarray:
    return (x > GAP[0]) & (x < GAP[1])


def draw(rng: np.random.Generator, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    x = rng.uniform(*RANGE, (num_points, 1))
    y = function(x) + noise(x) * rng.standard_normal(x.shape)
    return x.astype(np.float32), y.astype(np.float32)


def load_data(num_points: int, seed: int) -> Data:
    rng = np.random.default_rng(seed)

    def batches(num_points: int) -> Batches:
        x, y = draw(rng, 2 * num_points)
        rows = np.flatnonzero(~in_gap(x[:, 0]))[:num_points]
        return [(x[some], y[some]) for some in np.split(rows, num_points // BATCH_SIZE)]

    return Data(batches(num_points), batches(num_points // 2), draw(rng, 4_000))


class TorchMLP(nn.Module):
    """Its two outputs are a mean and what to_gaussian makes a variance."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2)
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class FlaxMLP(nnx.Module):
    """As TorchMLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, rngs=rngs)
        self.net = nnx.Sequential(linear(1, HIDDEN), nnx.tanh, linear(HIDDEN, HIDDEN), nnx.tanh, linear(HIDDEN, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x)


def fit_torch(model: nn.Module, data: Data, epochs: int, out: Path) -> History:
    logger = CSVLogger(out, name="logs")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=RichProgressBar(refresh_rate=10, console_kwargs={"stderr": True}),
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")  # the batches are in memory
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # in Lightning's own code
        module = EnsembleRegressor(model, optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE))
        trainer.fit(module, *(DataLoader(batches, batch_size=None) for batches in (data.train, data.val)))
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def fit_flax(model: nnx.Module, data: Data, epochs: int, out: Path) -> History:
    optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)
    with jax.enable_x64(True):  # for Adam's bias corrections, which torch has in float64; weights stay float32
        return probly_flax.training.fit(model, optimizer, data.train, epochs=epochs, val=data.val, task="regression")


def torch_gaussians(model: nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        mean, variance = probly_torch.losses.to_gaussian(model(torch.from_numpy(x)))
    return mean.numpy(), variance.numpy()


@nnx.jit
def flax_gaussians(model: nnx.Module, x: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return probly_flax.losses.to_gaussian(model(x))


class Framework(NamedTuple):
    """What differs between the two."""

    name: str
    package: ModuleType
    network: Callable[[], Any]
    fit: Callable[[Any, Data, int, Path], History]
    gaussians: Callable[[Any, np.ndarray], tuple[Any, Any]]


TORCH = Framework("torch", probly_torch, TorchMLP, fit_torch, torch_gaussians)
FLAX = Framework("Flax", probly_flax, nnx.jit(lambda: FlaxMLP(nnx.Rngs(0))), fit_flax, flax_gaussians)


@dataclass(frozen=True)
class Result:
    """A trained model, and how it does on the test points outside of the gap, and in it."""

    framework: Framework
    method: str
    model: Any
    history: History
    parameters: int
    outside: dict[str, float]
    inside: dict[str, float]

    @property
    def growth(self) -> dict[str, float]:
        """How many times larger a mean variance is in the gap."""
        return {name: (self.inside[name] / self.outside[name]) ** 2 for name in ("aleatoric", "epistemic")}


def gaussians(framework: Framework, model: Any, x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Members' means and variances (E, N, 1). Both frameworks are judged and drawn by the same functions, torch's."""
    mean, variance = (torch.from_numpy(np.array(values)) for values in framework.gaussians(model, x))
    return mean, variance


def judge(mean: torch.Tensor, variance: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Scores, and the roots of mean variances, in units of y."""
    uncertainty = regression_uncertainty(mean, variance)
    scores = {
        "NLL": metrics.GaussianNLL()(mean, variance, y),
        "RMSE": metrics.RMSE()(mean, variance, y),
        "CRPS": metrics.crps(mean, variance, y),
        "coverage": metrics.interval_coverage(mean, variance, y),
        "aleatoric": uncertainty.aleatoric.mean().sqrt(),
        "epistemic": uncertainty.epistemic.mean().sqrt(),
    }
    return {name: value.item() for name, value in scores.items()}


def train(framework: Framework, method: str, model: Any, data: Data, epochs: int, out: Path) -> Result:
    print(f"Training: {method}, {framework.name}", file=sys.stderr)
    history = framework.fit(model, data, epochs, out)
    x, y = data.test
    mean, variance = gaussians(framework, model, x)
    gap, targets = torch.from_numpy(in_gap(x[:, 0])), torch.from_numpy(y)
    return Result(
        framework,
        method,
        model,
        history,
        parameters=sum(array.size for array in framework.package.to_arrays(model).values()),
        outside=judge(mean[:, ~gap], variance[:, ~gap], targets[~gap]),
        inside=judge(mean[:, gap], variance[:, gap], targets[gap]),
    )


def run_method(method: str, data: Data, epochs: int, seed: int, out: Path) -> list[Result]:
    """Draws weights in torch, hands them to Flax, and trains and judges both."""
    torch.manual_seed(seed)
    convert = {DEEP: "ensemble", BATCH: "batchensemble"}[method]
    models = [getattr(each.package, convert)(each.network(), NUM_MEMBERS, rngs=seed) for each in (TORCH, FLAX)]
    probly_flax.load_arrays(models[1], probly_torch.to_arrays(models[0]))
    return [
        train(framework, method, model, data, epochs, out)
        for framework, model in zip((TORCH, FLAX), models, strict=True)
    ]


def print_table(results: Sequence[Result], data: Data) -> None:
    table = Table("framework", "method", "points", box=box.SIMPLE_HEAD)
    for header in ("parameters", *results[0].outside):
        table.add_column(header, justify="right")
    for result in results:
        row = result.framework.name, result.method, "outside", f"{result.parameters:,}"
        table.add_row(*row, *(f"{value:.4f}" for value in result.outside.values()))
        table.add_row("", "", "in the gap", "", *(f"{value:.4f}" for value in result.inside.values()), end_section=True)
    Console(width=120).print(table)
    x = data.test[0]
    outside, inside = (np.sqrt((noise(x[rows]) ** 2).mean()) for rows in (~in_gap(x), in_gap(x)))
    print("Points outside of the gap and in it. NLL in nats; coverage of the 95 % interval. The last two columns are")
    print(f"roots of mean variances, in units of y; that of the noise is {outside:.4f} outside and {inside:.4f} in it.")
    print("\nHow many times larger a mean variance is in the gap:")
    for result in results:
        growth = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result.growth.items())
        print(f"  {result.method:<14}{result.framework.name:<6} {growth}")


def plot_bands(results: Sequence[Result], data: Data) -> Figure:
    points = tuple(np.concatenate(arrays) for arrays in zip(*data.train, strict=True))
    figure = Figure(figsize=(11, 8), layout="constrained")
    for panel, result in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, results, strict=True):
        uncertainty = regression_uncertainty(*gaussians(result.framework, result.model, LINE))
        plots.predictive_band(LINE, uncertainty, data=(points[0][:400], points[1][:400]), ax=panel)
        panel.set_title(f"{result.method}, {result.framework.name}")
    return figure


def plot_members(results: Sequence[Result]) -> Figure:
    """Above, what members predict; below, the two uncertainties by themselves."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    of_torch = [result for result in results if result.framework is TORCH]
    for (above, below), result in zip(figure.subplots(2, 2, sharey="row").T, of_torch, strict=True):
        mean, variance = gaussians(result.framework, result.model, LINE)
        plots.member_spread(mean[..., 0], x=LINE, ax=above)
        above.set(title=f"{result.method}, {result.framework.name}", ylabel="mean of each member")
        uncertainty = regression_uncertainty(mean, variance)
        below.axvspan(*GAP, color="0.9", label="no data")
        below.plot(LINE, noise(LINE), color="black", linestyle=":", label="noise")
        below.plot(LINE, uncertainty.aleatoric.sqrt(), color="#0072B2", label="aleatoric")
        below.plot(LINE, uncertainty.epistemic.sqrt(), color="#D55E00", linestyle="--", label="epistemic")
        below.set(xlabel="$x$", ylabel="standard deviation (units of $y$)")
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_training(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(11, 8), layout="constrained")
    for panel, result in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, results, strict=True):
        plots.training_curves(result.history, names=["train_loss", "val_nll"], ax=panel)
        panel.set_title(f"{result.method}, {result.framework.name}")
    return figure


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Returns the results of both methods, each in torch and in Flax."""
    parser = argparse.ArgumentParser(description="Noise and ignorance in a regression, in PyTorch and in Flax.")
    parser.add_argument("--fast", action="store_true", help="600 points and 30 epochs instead of 1,600 and 80")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the weights")
    parser.add_argument("--out", type=Path, default=Path("out/regression_1d"), help="folder of logs and figures")
    args = parser.parse_args(argv)
    num_points, epochs = (600, 30) if args.fast else (1_600, 80)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what hardware there is does not matter here
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_data(num_points, args.seed)
    results = [each for method in (DEEP, BATCH) for each in run_method(method, data, epochs, args.seed, args.out)]
    print_table(results, data)
    plot_bands(results, data).savefig(args.out / "predictive_bands.png", dpi=150)
    plot_members(results).savefig(args.out / "member_spread.png", dpi=150)
    plot_training(results).savefig(args.out / "training_curves.png", dpi=150)
    print(f"\nLogs and figures are in {args.out}.")
    return results


if __name__ == "__main__":
    main()
