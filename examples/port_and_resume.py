"""Port and resume: train a network in PyTorch with Lightning, move it to Flax on the way, and train on.

    python -m examples.port_and_resume             the whole experiment
    python -m examples.port_and_resume --fast      a small one, to see that everything runs

A convolutional network learns scikit-learn's digits with AdamW. Half way, weights and optimizer state are written to
two files. Three runs go on from there, on the same batches in the same order: torch, as if nothing had happened; Flax,
from both files; and Flax from the weights alone, with a new optimizer. What comes out is a table and a figure, of how
far the runs in Flax are from the one that never moved: rounding with the optimizer's state, and far more without.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import lightning
import numpy as np
import optax
import torch
from flax import nnx
from lightning.pytorch.callbacks import Callback, RichProgressBar
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

import probly_flax
import probly_torch
from probly_flax.optimizers import load_optimizer
from probly_torch.optimizers import save_optimizer

BATCH_SIZE = 64
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
FLATTEN = {"fc1": (16, 4, 4)}  # torch flattens channels first and Flax last, which the weights of fc1 need to know
NEVER, MOVED, WEIGHTS_ONLY = "never moved", "moved", "moved without optimizer state"

Batches = Callable[[int], list[tuple[np.ndarray, np.ndarray]]]  # the batches of an epoch, given its number


class Data(NamedTuple):
    """Images (N, 1, 8, 8) and class indices (N,)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_data(seed: int, dtype: str) -> Data:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = (images[order] / 16).reshape(-1, 1, 8, 8).astype(dtype), labels[order]
    split = len(x) * 4 // 5
    return Data(x[:split], y[:split], x[split:], y[split:])


def epoch_batches(data: Data, seed: int, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of one epoch, in an order of its own, but for the points that fill no batch."""
    order = np.random.default_rng((seed, epoch)).permutation(len(data.x_train))
    rows = np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE))[:-1]
    return [(data.x_train[own], data.y_train[own]) for own in rows]


class TorchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(16 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Classifier(lightning.LightningModule):
    """Trains the network and keeps the loss of every step."""

    def __init__(self, net: nn.Module, batches: Batches) -> None:
        super().__init__()
        self.net, self.batches = net, batches
        self.losses: list[float] = []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches(self.current_epoch), batch_size=None)  # they are batches already

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


class SaveAfter(Callback):
    """Writes weights and optimizer state after some epochs."""

    def __init__(self, epochs: int, weights: Path, optimizer: Path) -> None:
        self.epochs, self.weights, self.optimizer = epochs, weights, optimizer

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            probly_torch.save_weights(module.net, self.weights, flatten=FLATTEN)
            save_optimizer(module.net, trainer.optimizers[0], self.optimizer, flatten=FLATTEN)


def train_torch(net: nn.Module, batches: Batches, epochs: int, save: SaveAfter) -> list[float]:
    """Trains the network in place; returns the loss of every step."""
    classifier = Classifier(net, batches)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=1,  # each epoch has an order of its own
        callbacks=[save, RichProgressBar(refresh_rate=10, console_kwargs={"stderr": True})],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # The batches are in memory, so that worker processes, which Lightning advises, would only slow them down.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # in Lightning's own code
        trainer.fit(classifier)
    return classifier.losses


class FlaxNet(nnx.Module):
    """The twin, for images (N, 8, 8, 1)."""

    def __init__(self, dtype: str) -> None:
        options = {"rngs": nnx.Rngs(0), "param_dtype": dtype}
        self.conv1 = nnx.Conv(1, 8, (3, 3), padding=1, **options)
        self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, padding=1, **options)
        self.fc1 = nnx.Linear(16 * 4 * 4, 32, **options)
        self.fc2 = nnx.Linear(32, 10, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.fc2(nnx.relu(self.fc1(x.reshape(len(x), -1))))


ADAMW = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def new_optimizer(net: nnx.Module) -> nnx.Optimizer:
    return nnx.Optimizer(net, ADAMW, wrt=nnx.Param)


@nnx.jit
def train_step(net: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    def loss_of(net: nnx.Module) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_of)(net)
    optimizer.update(net, grads)
    return loss


def train_flax(net: nnx.Module, optimizer: nnx.Optimizer, batches: Batches, epochs: range, name: str) -> list[float]:
    """Trains the network in place; returns the loss of every step."""
    steps = [batch for epoch in epochs for batch in batches(epoch)]
    progress = track(steps, f"Flax, {name}", console=Console(stderr=True))
    return [float(train_step(net, optimizer, x.transpose(0, 2, 3, 1), y)) for x, y in progress]


@dataclass(frozen=True)
class Run:
    """One run: the loss of each of its steps, from the first or from the move on, and the weights that it ends with."""

    name: str
    dtype: str
    losses: np.ndarray
    weights: dict[str, np.ndarray]
    accuracy: float
    nll: float

    def distances(self, other: Run) -> np.ndarray:
        """How far the losses are apart, over the steps that both have."""
        return np.abs(self.losses - other.losses[-len(self.losses) :])

    def weight_distance(self, other: Run) -> float:
        """The largest difference of a weight, in units of the largest weight of its array."""
        return max(np.abs(w - self.weights[name]).max() / np.abs(w).max() for name, w in other.weights.items())


def evaluated(name: str, dtype: str, losses: list[float], weights: dict[str, np.ndarray], data: Data) -> Run:
    """Judges all runs by one network, torch's."""
    net = TorchNet().to(getattr(torch, dtype))
    probly_torch.load_arrays(net, weights)
    with torch.no_grad():
        logits = net(torch.from_numpy(data.x_test))
    labels = torch.from_numpy(data.y_test)
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return Run(name, dtype, np.array(losses), weights, accuracy, F.cross_entropy(logits, labels).item())


def run_all(dtype: str, epochs: int, seed: int, out: Path) -> list[Run]:
    """Trains in torch, moves half way, and trains on in Flax, with and without the optimizer's state."""
    data = load_data(seed, dtype)
    batches, half = partial(epoch_batches, data, seed), epochs // 2
    weights, state = out / f"weights_{dtype}.safetensors", out / f"optimizer_{dtype}.safetensors"

    torch.manual_seed(seed)
    net = TorchNet().to(getattr(torch, dtype))
    losses = train_torch(net, batches, epochs, SaveAfter(half, weights, state))
    runs = [evaluated(NEVER, dtype, losses, probly_torch.to_arrays(net), data)]

    # Weights keep their dtype under x64, but optax takes Adam's bias corrections in float64, as torch does.
    with jax.enable_x64(True):
        for name in (MOVED, WEIGHTS_ONLY):
            twin = FlaxNet(dtype)
            optimizer = new_optimizer(twin)
            probly_flax.load_weights(twin, weights)
            if name == MOVED:
                load_optimizer(twin, optimizer, state)
            losses = train_flax(twin, optimizer, batches, range(half, epochs), f"{name}, {dtype}")
            runs.append(evaluated(name, dtype, losses, probly_flax.to_arrays(twin, flatten=FLATTEN), data))
    return runs


def print_table(groups: Sequence[Sequence[Run]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("dtype", "run"):
        table.add_column(header)
    for header in (
        "test\naccuracy",
        "test\nNLL",
        "losses apart,\nfirst step",
        "losses apart,\nat most",
        "weights\napart",
    ):
        table.add_column(header, justify="right")
    for runs in groups:
        for run in runs:
            scores = f"{run.accuracy:.4f}", f"{run.nll:.5f}"
            apart = run.distances(runs[0])
            distances = [f"{d:.1e}" for d in (apart[0], apart.max(), run.weight_distance(runs[0]))]
            table.add_row(run.dtype, run.name, *scores, *(distances if run.name != NEVER else ["-"] * 3))
        table.add_section()
    Console(width=120).print(table)  # whole in a file too, for which rich takes a width of 80


def plot(groups: Sequence[Sequence[Run]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, apart = figure.subplots(1, 2)
    colors = dict(zip((NEVER, MOVED, WEIGHTS_ONLY), ("0.5", "#0072B2", "#D55E00"), strict=True))
    never, *others = groups[0]
    steps = np.arange(1, len(never.losses) + 1)
    moved_at = len(never.losses) - len(others[0].losses) + 0.5
    losses.plot(steps, never.losses, color=colors[NEVER], linewidth=3, alpha=0.5, label=f"{NEVER} (torch)")
    for run, style in zip(others, ("-", ":"), strict=True):
        label = f"{run.name} (Flax)"
        losses.plot(steps[-len(run.losses) :], run.losses, style, color=colors[run.name], linewidth=1, label=label)
    losses.set(xlabel="step", ylabel="training loss", yscale="log", title=never.dtype)
    for (never, *others), style in zip(groups, ("-", "--"), strict=True):
        for run in others:
            distances = run.distances(never)
            distances = np.where(distances > 0, distances, np.nan)  # equal losses leave a gap
            label = f"{run.name}, {run.dtype}"
            apart.plot(steps[-len(distances) :], distances, style, color=colors[run.name], linewidth=1, label=label)
    apart.set(xlabel="step", ylabel="distance from the loss of never moved", yscale="log", ylim=(1e-17, 1))
    for panel in (losses, apart):
        panel.axvline(moved_at, color="0.7", linewidth=0.8)
    losses.legend(fontsize="small")
    apart.legend(fontsize="small", loc="center", bbox_to_anchor=(0.5, 0.4))
    return figure


def main(argv: Sequence[str] | None = None) -> list[list[Run]]:
    """Returns the runs in float32 and in float64: never moved, moved, and moved without the optimizer's state."""
    parser = argparse.ArgumentParser(description="Train in PyTorch, move on the way, and train on in Flax.")
    parser.add_argument("--fast", action="store_true", help="2 epochs instead of 12")
    parser.add_argument("--seed", type=int, default=42, help="of the data, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("out/port_and_resume"), help="folder of files and figure")
    args = parser.parse_args(argv)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what hardware there is does not matter here
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    args.out.mkdir(parents=True, exist_ok=True)
    groups = [run_all(dtype, 2 if args.fast else 12, args.seed, args.out) for dtype in ("float32", "float64")]
    print_table(groups)
    print("Apart: from the run that never moved, which is torch's. Weights in units of the largest one of their array.")
    plot(groups).savefig(args.out / "losses.png", dpi=150)
    print(f"\nWeights, optimizer states and the figure are in {args.out}.")
    return groups


if __name__ == "__main__":
    main()
