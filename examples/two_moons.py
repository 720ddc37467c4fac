"""Two moons: a single network, a deep ensemble and a BatchEnsemble, each trained in PyTorch and in Flax.

    python -m examples.two_moons             the whole experiment
    python -m examples.two_moons --fast      a small one, to see that everything runs

Both frameworks start from the same weights and see the same batches in the same order. What comes out is a table, how
far apart the two frameworks end, proof that each loads the other's weights, and two figures. They do not end at
exactly the same numbers: float32 sums round differently in the two, and training lets the rounding grow.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lightning
import numpy as np
import optax
import safetensors.torch
import torch
from flax import nnx
from lightning.pytorch.callbacks import RichProgressBar
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.calibration import calibration_curve
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

import probly_flax
import probly_torch
from probly_torch.uncertainty import mean_probs, mutual_information

NUM_MEMBERS = 3
HIDDEN = 128
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
NUM_BINS = 15  # of the expected calibration error and of the reliability diagrams

SINGLE, LOOP, STACKED, BATCH = "single network", "deep ensemble (loop)", "deep ensemble", "BatchEnsemble"
METHODS = (SINGLE, LOOP, STACKED, BATCH)
WIDTH = max(map(len, METHODS))


# ---------------------------------------------------------------------------------------------------- data and batches


class Data(NamedTuple):
    """Inputs (N, 2) in float32 and class indices (N,)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_data(num_points: int, seed: int) -> Data:
    x, y = make_moons(num_points, noise=0.2, random_state=seed)
    x, split = x.astype(np.float32), num_points * 4 // 5
    return Data(x[:split], y[:split], x[split:], y[split:])


def epoch_batches(data: Data, seed: int, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of one epoch, in an order of its own; the last one is smaller, and kept."""
    # jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), n) gives the same order.
    key = probly_torch.random.fold_in(probly_torch.random.key(seed), epoch)
    order = probly_torch.random.permutation(key, len(data.x_train))
    return [(data.x_train[rows], data.y_train[rows]) for rows in order.split(BATCH_SIZE)]


Batches = Callable[[int], list[tuple[np.ndarray, np.ndarray]]]  # those of an epoch, given its number


def member_logits(model: Any, x: Any) -> Any:
    """Logits (E, B, C), in either framework: a network that is no ensemble counts as an ensemble of one."""
    logits = model(x)
    return logits if logits.ndim == 3 else logits[None]


class Fit(NamedTuple):
    """What a training run took. One forward call is one batch through one model."""

    forward_calls: int
    seconds: float
    compile_seconds: float = 0.0


# -------------------------------------------------------------------------------------------------------------- torch


class TorchMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def new_torch_mlp(seed: int) -> TorchMLP:
    torch.manual_seed(seed)
    return TorchMLP()


class Classifier(lightning.LightningModule):
    """Trains any network and any ensemble."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__()
        self.model, self.batches = model, batches
        self.forward_calls = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches(self.current_epoch), batch_size=None)  # they are batches already

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        self.forward_calls += 1
        loss = probly_torch.losses.member_cross_entropy(member_logits(self.model, x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)


def fit_torch(model: nn.Module, batches: Batches, epochs: int) -> Fit:
    """Trains the model in place. The seconds include what Lightning does around the steps."""
    classifier = Classifier(model, batches)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=1,
        callbacks=RichProgressBar(refresh_rate=10, console_kwargs={"stderr": True}),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    with warnings.catch_warnings():
        # The batches are in memory, so that worker processes, which Lightning advises, would only slow them down.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own code, torch 2.13
        trainer.fit(classifier)
    return Fit(classifier.forward_calls, time.perf_counter() - start)


def torch_logits(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return member_logits(model.eval(), torch.from_numpy(x)).numpy()


# --------------------------------------------------------------------------------------------------------------- Flax


class FlaxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.net = nnx.Sequential(
            nnx.Linear(2, HIDDEN, rngs=rngs),
            nnx.relu,
            nnx.Linear(HIDDEN, HIDDEN, rngs=rngs),
            nnx.relu,
            nnx.Linear(HIDDEN, 2, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x)


def new_flax_mlp(seed: int) -> FlaxMLP:
    return FlaxMLP(nnx.Rngs(seed))


ADAM = optax.adam(LEARNING_RATE)  # one object: with a new one, nnx.jit would compile the step again for each model


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    def loss_of(model: nnx.Module) -> jax.Array:
        return probly_flax.losses.member_cross_entropy(member_logits(model, x), y)

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def fit_flax(model: nnx.Module, batches: Batches, epochs: int) -> Fit:
    """Trains the model in place. The seconds are those of the steps, without compiling them."""
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    start = time.perf_counter()
    first, trial = batches(0), nnx.clone((model, optimizer))
    for x, y in (*first[:2], first[-1]):  # compiles the step for both sizes of batch, on a copy
        train_step(*trial, x, y)
    compiled = time.perf_counter()
    forward_calls = 0
    steps = (batch for epoch in range(epochs) for batch in batches(epoch))
    for x, y in track(steps, f"{epochs} epochs", total=epochs * len(first), console=Console(stderr=True)):
        forward_calls += 1
        loss = train_step(model, optimizer, x, y)
    jax.block_until_ready(loss)
    return Fit(forward_calls, time.perf_counter() - compiled, compiled - start)


def flax_logits(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    model.eval()
    return np.array(member_logits(model, jnp.asarray(x)))


# ------------------------------------------------------------------------------------------ the same steps for the two


class Framework(NamedTuple):
    """What differs between the two. The packages do not: their functions have the same names and arguments."""

    name: str
    package: ModuleType
    new_mlp: Callable[[int], Any]
    fit: Callable[[Any, Batches, int], Fit]
    logits: Callable[[Any, np.ndarray], np.ndarray]


TORCH = Framework("torch", probly_torch, new_torch_mlp, fit_torch, torch_logits)
FLAX = Framework("Flax", probly_flax, new_flax_mlp, fit_flax, flax_logits)


@dataclass(frozen=True)
class Result:
    """A trained model and how it does on the test points; `probs` (N, C) are the members' mean probabilities."""

    framework: Framework
    method: str
    model: Any
    parameters: int
    fit: Fit
    probs: np.ndarray
    accuracy: float
    nll: float
    ece: float
    mutual_information: float


def new_model(framework: Framework, method: str, seed: int) -> Any:
    network = framework.new_mlp(seed)
    if method == SINGLE:
        return network
    if method == BATCH:
        return framework.package.batchensemble(network, NUM_MEMBERS, rngs=seed)
    return framework.package.ensemble(network, NUM_MEMBERS, rngs=seed)


def start_models(method: str, seed: int) -> tuple[Any, Any]:
    """The same weights twice: drawn in torch, and handed to Flax."""
    torch_model, flax_model = new_model(TORCH, method, seed), new_model(FLAX, method, seed)
    probly_flax.load_arrays(flax_model, probly_torch.to_arrays(torch_model))
    return torch_model, flax_model


def train(framework: Framework, method: str, model: Any, batches: Batches, epochs: int) -> tuple[Any, Fit]:
    if method != LOOP:
        return model, framework.fit(model, batches, epochs)
    members = list(model)  # ordinary networks, trained one after the other
    fits = [framework.fit(member, batches, epochs) for member in members]
    return framework.package.Ensemble(members), Fit(*(sum(column) for column in zip(*fits, strict=True)))


def predict(framework: Framework, model: Any, x: np.ndarray) -> np.ndarray:
    """The members' mean probabilities (N, C)."""
    return mean_probs(torch.from_numpy(framework.logits(model, x))).numpy()


def evaluate(framework: Framework, method: str, model: Any, fit: Fit, data: Data) -> Result:
    """Judges both frameworks by the same functions, torch's."""
    logits, labels = torch.from_numpy(framework.logits(model, data.x_test)), torch.from_numpy(data.y_test)
    probs = mean_probs(logits)
    return Result(
        framework,
        method,
        model,
        parameters=sum(array.size for array in framework.package.to_arrays(model).values()),
        fit=fit,
        probs=probs.numpy(),
        accuracy=(probs.argmax(-1) == labels).float().mean().item(),
        nll=probly_torch.losses.mixture_cross_entropy(logits, labels).item(),
        ece=multiclass_calibration_error(probs, labels, num_classes=2, n_bins=NUM_BINS).item(),
        mutual_information=mutual_information(logits).mean().item(),
    )


def run_method(method: str, data: Data, epochs: int, seed: int) -> tuple[Result, Result]:
    batches = partial(epoch_batches, data, seed)
    results = []
    for framework, start in zip((TORCH, FLAX), start_models(method, seed), strict=True):
        print(f"Training: {method}, {framework.name}", file=sys.stderr)
        model, fit = train(framework, method, start, batches, epochs)
        results.append(evaluate(framework, method, model, fit, data))
    return results[0], results[1]


# ------------------------------------------------------------------------------------------- exchange of weight files


class Exchange(NamedTuple):
    """How far test probabilities move, at most, when a file of trained weights is loaded in a new model."""

    torch_to_flax: float
    flax_to_torch: float
    flax_to_plain_torch: float  # by torch and safetensors alone, as anyone who is sent the file can do it


def exchange_weights(pair: tuple[Result, Result], data: Data, seed: int, out: Path) -> Exchange:
    paths = [weights_path(out, result) for result in pair]
    for result, path in zip(pair, paths, strict=True):
        result.framework.package.save_weights(result.model, path)

    method = pair[0].method
    in_flax, in_torch, in_plain_torch = (new_model(f, method, seed + 1) for f in (FLAX, TORCH, TORCH))  # other weights
    probly_flax.load_weights(in_flax, paths[0])
    probly_torch.load_weights(in_torch, paths[1])
    in_plain_torch.load_state_dict(safetensors.torch.load_file(paths[1]))

    def gap(result: Result, framework: Framework, model: Any) -> float:
        return float(np.abs(result.probs - predict(framework, model, data.x_test)).max())

    return Exchange(gap(pair[0], FLAX, in_flax), gap(pair[1], TORCH, in_torch), gap(pair[1], TORCH, in_plain_torch))


def weights_path(out: Path, result: Result) -> Path:
    name = f"{result.method} {result.framework.name}".lower()
    return out / f"{re.sub('[^a-z]+', '_', name)}.safetensors"


# ------------------------------------------------------------------------------------------------ tables and figures


def print_table(pairs: Sequence[tuple[Result, Result]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("framework", "method"):
        table.add_column(header, no_wrap=True)
    for header in (
        "parameters",
        "forward\ncalls",
        "training\nseconds",
        "accuracy",
        "NLL",
        "ECE",
        "mutual\ninformation",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for pair in pairs:
        for r in pair:
            counts = (f"{r.parameters:,}", f"{r.fit.forward_calls:,}", f"{r.fit.seconds:.1f}")
            scores = (f"{value:.4f}" for value in (r.accuracy, r.nll, r.ece, r.mutual_information))
            table.add_row(r.framework.name, r.method, *counts, *scores, end_section=r.framework is FLAX)
    Console(width=120).print(table)  # the table is narrower, but not than the 80 columns that rich takes for a file


def print_notes(pairs: Sequence[tuple[Result, Result]], exchanges: Sequence[Exchange]) -> None:
    compiling = sum(flax.fit.compile_seconds for _, flax in pairs)
    print(f"NLL and mutual information in nats; ECE with {NUM_BINS} bins. torch ran on one thread, and its seconds are")
    print(f"those of Trainer.fit; XLA chose its own threads, and compiled for {compiling:.1f} s, not in the table.")

    print("\nHow far apart the two frameworks' test probabilities are. They started equal and saw the same batches;")
    print("float32 sums round differently in the two, and training lets that grow.")
    for torch_result, flax_result in pairs:
        gaps = np.abs(torch_result.probs - flax_result.probs)
        print(f"  {torch_result.method:<{WIDTH}}  at most {gaps.max():.1e}, {gaps.mean():.1e} on average")

    print("\nHow far test probabilities move, at most, when a weight file is loaded elsewhere:")
    for (result, _), gaps in zip(pairs, exchanges, strict=True):
        named = zip(("torch to Flax", "Flax to torch", "by load_state_dict alone"), gaps, strict=True)
        print(f"  {result.method:<{WIDTH}}  {', '.join(f'{name} {gap:.1e}' for name, gap in named)}")


def plot_reliability(pairs: Sequence[tuple[Result, Result]], labels: np.ndarray) -> Figure:
    figure = Figure(figsize=(3.2 * len(pairs), 4), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharex=True, sharey=True)
    for panel, pair in zip(panels, pairs, strict=True):
        panel.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="perfectly calibrated")
        for result, style in zip(pair, ("o-", "x--"), strict=True):
            correct = result.probs.argmax(-1) == labels
            confidence = result.probs.max(-1).clip(max=1)  # rounding may take it above
            accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=NUM_BINS)
            color = "#0072B2" if result.framework is TORCH else "#D55E00"
            panel.plot(mean_confidence, accuracy, style, color=color, label=result.framework.name)
        eces = ", ".join(f"{result.ece:.4f} ({result.framework.name})" for result in pair)
        panel.set_title(f"{pair[0].method}\nECE {eces}", fontsize="medium")
        panel.set(xlabel="confidence", aspect="equal")
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def plot_epistemic_uncertainty(pairs: Sequence[tuple[Result, Result]], data: Data) -> Figure:
    low, high = data.x_test.min(0) - 1, data.x_test.max(0) + 1
    axes = [np.linspace(low[i], high[i], 200, dtype=np.float32) for i in (0, 1)]
    grid = np.stack(np.meshgrid(*axes), -1)
    columns = [pair for pair in pairs if pair[0].method in (STACKED, BATCH)]
    maps = [[map_uncertainty(result, grid) for result in pair] for pair in columns]

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, len(columns), sharex=True, sharey=True)
    for column, (pair, pair_maps) in enumerate(zip(columns, maps, strict=True)):
        for panel, result, values in zip(panels[:, column], pair, pair_maps, strict=True):
            extent = (low[0], high[0], low[1], high[1])
            image = panel.imshow(values, cmap="cividis", origin="lower", extent=extent, vmin=0, vmax=np.max(maps))
            for label, marker in ((0, "o"), (1, "^")):
                x, y = data.x_test[data.y_test == label][:150].T
                panel.scatter(
                    x, y, s=8, marker=marker, facecolors="none", edgecolors="white", linewidths=0.5, alpha=0.7
                )
            panel.set(title=f"{result.method}, {result.framework.name}", xlabel="$x_1$", ylabel="$x_2$")
            panel.label_outer()
    figure.colorbar(image, ax=panels, label="mutual information (nats)", shrink=0.8)
    return figure


def map_uncertainty(result: Result, grid: np.ndarray) -> np.ndarray:
    """Mutual information at each point of a grid (H, W, 2): (H, W)."""
    logits = result.framework.logits(result.model, grid.reshape(-1, 2))
    return mutual_information(torch.from_numpy(logits)).numpy().reshape(grid.shape[:2])


# --------------------------------------------------------------------------------------------------------------- main


class Outcome(NamedTuple):
    """For each method, its results in torch and in Flax, and what the exchange of weights showed."""

    results: list[tuple[Result, Result]]
    exchanges: list[Exchange]


def main(argv: Sequence[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description="Ensembles on two moons, trained alike in PyTorch and in Flax.")
    parser.add_argument("--fast", action="store_true", help="3,000 points and 2 epochs instead of 30,000 and 10")
    parser.add_argument("--seed", type=int, default=42, help="of the data, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("out/two_moons"), help="folder of the weights and the figures")
    args = parser.parse_args(argv)
    num_points, epochs = (3_000, 2) if args.fast else (30_000, 10)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_data(num_points, args.seed)
    pairs = [run_method(method, data, epochs, args.seed) for method in METHODS]
    exchanges = [exchange_weights(pair, data, args.seed, args.out) for pair in pairs]
    print_table(pairs)
    print_notes(pairs, exchanges)
    plot_reliability(pairs, data.y_test).savefig(args.out / "reliability.png", dpi=150)
    plot_epistemic_uncertainty(pairs, data).savefig(args.out / "epistemic_uncertainty.png", dpi=150)
    print(f"\nWeights and figures are in {args.out}.")
    return Outcome(pairs, exchanges)


if __name__ == "__main__":
    main()
