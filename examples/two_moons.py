"""Two moons: a single network, a deep ensemble and a BatchEnsemble, each trained in PyTorch and in Flax.

    python -m examples.two_moons             the whole experiment
    python -m examples.two_moons --fast      a small one, to see that everything runs

Both frameworks start from the same weights and see the same batches in the same order. What comes out is a table, how
far apart the two frameworks end, proof that each loads the other's weights, and three figures. They do not end at
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
from rich.table import Table
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader

import probly_flax.training
import probly_torch
from probly_torch import metrics, plots
from probly_torch.training import EnsembleClassifier
from probly_torch.uncertainty import mean_probs, mutual_information

NUM_MEMBERS = 3
HIDDEN = 128
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
SINGLE, LOOP, STACKED, BATCH = "single network", "deep ensemble (loop)", "deep ensemble", "BatchEnsemble"

Batches = Callable[[int], list[tuple[np.ndarray, np.ndarray]]]  # the batches of an epoch, given its number


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


def member_logits(model: Any, x: Any) -> Any:
    """Logits (E, B, C), in either framework: a network that is no ensemble counts as an ensemble of one."""
    logits = model(x)
    return logits if logits.ndim == 3 else logits[None]


class Fit(NamedTuple):
    """What a training run took. A forward call is one batch through one model."""

    forward_calls: int
    seconds: float


class TorchMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Batched(lightning.LightningDataModule):
    """The same batches as in Flax: each epoch has an order of its own."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches(self.trainer.current_epoch), batch_size=None)  # they are batches already


def fit_torch(model: nn.Module, batches: Batches, epochs: int) -> Fit:
    """Trains the model in place."""
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
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")  # the test set has the last word
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # in Lightning's own code
        trainer.fit(EnsembleClassifier(model, optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE)), Batched(batches))
    return Fit(trainer.global_step, time.perf_counter() - start)


def torch_logits(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return member_logits(model.eval(), torch.from_numpy(x)).numpy()


class FlaxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, rngs=rngs)
        self.net = nnx.Sequential(linear(2, HIDDEN), nnx.relu, linear(HIDDEN, HIDDEN), nnx.relu, linear(HIDDEN, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x)


def fit_flax(model: nnx.Module, batches: Batches, epochs: int) -> Fit:
    """Trains the model in place."""
    optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)
    start = time.perf_counter()
    # Weights stay float32, but optax takes Adam's bias corrections, 1 - 0.999**t, in float64, as torch does. In float32
    # they would be off by 1e-5, for hundreds of steps in the same direction.
    with jax.enable_x64(True):
        probly_flax.training.fit(model, optimizer, batches, epochs=epochs)
    return Fit(int(optimizer.step[...]), time.perf_counter() - start)


jitted_logits = nnx.jit(member_logits)


def flax_logits(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    model.eval()
    return np.array(jitted_logits(model, x))


class Framework(NamedTuple):
    """What differs between the two. The packages do not: their functions have the same names and arguments."""

    name: str
    package: ModuleType
    network: Callable[[], Any]
    fit: Callable[[Any, Batches, int], Fit]
    logits: Callable[[Any, np.ndarray], np.ndarray]


TORCH = Framework("torch", probly_torch, TorchMLP, fit_torch, torch_logits)
FLAX = Framework("Flax", probly_flax, nnx.jit(lambda: FlaxMLP(nnx.Rngs(0))), fit_flax, flax_logits)


@dataclass(frozen=True)
class Result:
    """A trained model and its test points: members' `logits` (E, N, 2), their mean `probs` (N, 2), and scores."""

    framework: Framework
    method: str
    model: Any
    fit: Fit
    parameters: int
    logits: np.ndarray
    probs: np.ndarray
    accuracy: float
    nll: float
    ece: float
    mutual_information: float


Pair = tuple[Result, Result]  # of torch and Flax


def new_model(framework: Framework, method: str, seed: int) -> Any:
    network = framework.network()
    if method == SINGLE:
        return network
    if method == BATCH:
        return framework.package.batchensemble(network, NUM_MEMBERS, rngs=seed)
    return framework.package.ensemble(network, NUM_MEMBERS, rngs=seed)


def train(framework: Framework, method: str, model: Any, batches: Batches, epochs: int) -> tuple[Any, Fit]:
    print(f"Training: {method}, {framework.name}", file=sys.stderr)
    if method != LOOP:
        return model, framework.fit(model, batches, epochs)
    members = list(model)  # ordinary networks, trained one after the other
    fits = [framework.fit(member, batches, epochs) for member in members]
    return framework.package.Ensemble(members), Fit(*map(sum, zip(*fits, strict=True)))


def evaluate(framework: Framework, method: str, model: Any, fit: Fit, data: Data) -> Result:
    """Judges both frameworks by the same functions, torch's."""
    logits, labels = torch.from_numpy(framework.logits(model, data.x_test)), torch.from_numpy(data.y_test)
    probs = mean_probs(logits)
    return Result(
        framework,
        method,
        model,
        fit,
        parameters=sum(array.size for array in framework.package.to_arrays(model).values()),
        logits=logits.numpy(),
        probs=probs.numpy(),
        accuracy=metrics.accuracy(logits, labels).item(),
        nll=metrics.nll(logits, labels).item(),
        ece=metrics.ece(logits, labels).item(),
        mutual_information=mutual_information(logits).mean().item(),
    )


def run_method(method: str, data: Data, epochs: int, seed: int) -> Pair:
    """Draws weights in torch, hands them to Flax, and trains and judges both."""
    torch.manual_seed(seed)
    torch_model, flax_model = new_model(TORCH, method, seed), new_model(FLAX, method, seed)
    probly_flax.load_arrays(flax_model, probly_torch.to_arrays(torch_model))

    def run(framework: Framework, model: Any) -> Result:
        trained, fit = train(framework, method, model, partial(epoch_batches, data, seed), epochs)
        return evaluate(framework, method, trained, fit, data)

    return run(TORCH, torch_model), run(FLAX, flax_model)


def exchange_weights(pair: Pair, data: Data, seed: int, out: Path) -> dict[str, float]:
    """Loads each framework's file in the other; how far the test probabilities move, at most."""
    torch_file, flax_file = (out / f"{file_name(result)}.safetensors" for result in pair)
    probly_torch.save_weights(pair[0].model, torch_file)
    probly_flax.save_weights(pair[1].model, flax_file)

    method = pair[0].method
    in_flax, in_torch, plainly = (new_model(framework, method, seed + 1) for framework in (FLAX, TORCH, TORCH))
    probly_flax.load_weights(in_flax, torch_file)
    probly_torch.load_weights(in_torch, flax_file)
    plainly.load_state_dict(safetensors.torch.load_file(flax_file))  # without this library

    def change(source: Result, framework: Framework, model: Any) -> float:
        loaded = evaluate(framework, method, model, source.fit, data)
        return float(np.abs(loaded.probs - source.probs).max())

    return {
        "torch to Flax": change(pair[0], FLAX, in_flax),
        "Flax to torch": change(pair[1], TORCH, in_torch),
        "by load_state_dict alone": change(pair[1], TORCH, plainly),
    }


def file_name(result: Result) -> str:
    return re.sub("[^a-z]+", "_", f"{result.method} {result.framework.name}".lower())


def print_table(pairs: Sequence[Pair]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("framework", "method"):
        table.add_column(header)
    for header in (
        "parameters",
        "forward\ncalls",
        "training\nseconds",
        "accuracy",
        "NLL",
        "ECE",
        "mutual\ninformation",
    ):
        table.add_column(header, justify="right")
    for pair in pairs:
        for r in pair:
            counts = f"{r.parameters:,}", f"{r.fit.forward_calls:,}", f"{r.fit.seconds:.1f}"
            scores = f"{r.accuracy:.4f}", f"{r.nll:.4f}", f"{r.ece:.4f}", f"{r.mutual_information:.5f}"
            table.add_row(r.framework.name, r.method, *counts, *scores, end_section=r.framework is FLAX)
    Console(width=120).print(table)  # whole in a file too, for which rich takes a width of 80


def print_notes(pairs: Sequence[Pair], exchanges: Sequence[dict[str, float]]) -> None:
    print("NLL and mutual information in nats; ECE with 15 bins. Seconds are those of Trainer.fit, with torch on one")
    print("thread, and of probly_flax.training.fit, where XLA chose its own threads and had to compile the step first.")

    print("\nHow far apart the two frameworks' test probabilities are. They started equal and saw the same batches;")
    print("float32 sums round differently in the two, and training lets that grow.")
    for torch_result, flax_result in pairs:
        gaps = np.abs(torch_result.probs - flax_result.probs)
        print(f"  {torch_result.method:<20}  at most {gaps.max():.1e}, {gaps.mean():.1e} on average")

    print("\nHow far test probabilities move, at most, when a file of trained weights is loaded elsewhere:")
    for (result, _), changes in zip(pairs, exchanges, strict=True):
        print(f"  {result.method:<20}  {', '.join(f'{way} {change:.1e}' for way, change in changes.items())}")


def plot_reliability(pairs: Sequence[Pair], labels: np.ndarray) -> Figure:
    figure = Figure(figsize=(3.2 * len(pairs), 4), layout="constrained")
    for panel, pair in zip(figure.subplots(1, len(pairs), sharex=True, sharey=True), pairs, strict=True):
        for result in pair:
            plots.reliability_diagram(result.logits, labels, label=result.framework.name, ax=panel)
        panel.set_title(pair[0].method)
        panel.label_outer()
    return figure


def plot_risk_coverage(pairs: Sequence[Pair], labels: np.ndarray) -> Figure:
    figure = Figure(layout="constrained")
    panel = figure.subplots()
    for result, _ in pairs:
        plots.risk_coverage_curve(result.logits, labels, label=result.method, ax=panel)
    panel.set_title(f"Leaving the least certain to others ({TORCH.name})")
    return figure


def plot_epistemic_uncertainty(pairs: Sequence[Pair], data: Data) -> Figure:
    low, high = data.x_test.min(0) - 1, data.x_test.max(0) + 1
    grid = np.stack(np.meshgrid(*np.linspace(low, high, 200, dtype=np.float32).T), -1)
    results = [result for pair in zip(*pairs, strict=True) for result in pair if result.method in (STACKED, BATCH)]
    maps = [map_uncertainty(result, grid) for result in results]

    figure = Figure(figsize=(10, 8), layout="constrained")
    for panel, result, values in zip(figure.subplots(2, 2).flat, results, maps, strict=True):
        points = data.x_test[:300], data.y_test[:300]
        label, vmax = "mutual information (nats)", float(np.max(maps))
        plots.uncertainty_map(grid, values, data=points, label=label, vmax=vmax, ax=panel)
        panel.set_title(f"{result.method}, {result.framework.name}")
    return figure


def map_uncertainty(result: Result, grid: np.ndarray) -> np.ndarray:
    """Mutual information at each point of a grid (H, W, 2): (H*W,)."""
    return mutual_information(torch.from_numpy(result.framework.logits(result.model, grid.reshape(-1, 2)))).numpy()


def main(argv: Sequence[str] | None = None) -> tuple[list[Pair], list[dict[str, float]]]:
    """Returns, for each method, its results in torch and in Flax, and what the exchange of weights showed."""
    parser = argparse.ArgumentParser(description="Ensembles on two moons, trained alike in PyTorch and in Flax.")
    parser.add_argument("--fast", action="store_true", help="3,200 points and 2 epochs instead of 30,000 and 10")
    parser.add_argument("--seed", type=int, default=42, help="of the data, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("out/two_moons"), help="folder of the weights and the figures")
    args = parser.parse_args(argv)
    num_points, epochs = (3_200, 2) if args.fast else (30_000, 10)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what hardware there is does not matter here
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_data(num_points, args.seed)
    pairs = [run_method(method, data, epochs, args.seed) for method in (SINGLE, LOOP, STACKED, BATCH)]
    exchanges = [exchange_weights(pair, data, args.seed, args.out) for pair in pairs]
    print_table(pairs)
    print_notes(pairs, exchanges)
    plot_reliability(pairs, data.y_test).savefig(args.out / "reliability.png", dpi=150)
    plot_risk_coverage(pairs, data.y_test).savefig(args.out / "risk_coverage.png", dpi=150)
    plot_epistemic_uncertainty(pairs, data).savefig(args.out / "epistemic_uncertainty.png", dpi=150)
    print(f"\nWeights and figures are in {args.out}.")
    return pairs, exchanges


if __name__ == "__main__":
    main()
