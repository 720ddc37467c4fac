"""A LightningModule of one's own, and the five lines that make it an ensemble.

    python -m examples.lightning_module             trains both on scikit-learn's digits
    python -m examples.lightning_module --fast      a few epochs, to see that everything runs

Digits is a plain module, as anyone has one. DigitsEnsemble is the same module with five lines changed; the program
prints the difference between the two, trains both alike, and compares them. The metrics of the table come from the
callback EnsembleMetrics, which takes a single network as well.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import inspect
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import probly_torch
from probly_torch.plots import training_curves
from probly_torch.training import EnsembleMetrics, EnsembleMixin
from probly_torch.uncertainty import mean_probs

SCORES = "accuracy", "nll", "brier", "ece", "mutual_information"


class Digits(lightning.LightningModule):
    """A plain LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        network = nn.Sequential(*hidden, nn.Linear(128, 10))
        self.model = network

    def loss(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.model(batch[0]).softmax(-1)

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


class DigitsEnsemble(EnsembleMixin, lightning.LightningModule):
    """The same with five lines changed. For a deep ensemble, self.model = probly_torch.ensemble(network, 4)."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        network = nn.Sequential(*hidden, nn.Linear(128, 10))
        self.model = probly_torch.batchensemble(network, 4)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.ensemble_loss(batch)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return mean_probs(self.model(batch[0]))

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.optimizer_groups(weight_decay=0.1), lr=3e-3)


class Data(lightning.LightningDataModule):
    """Three fifths of the images to train, a fifth each to validate and to test."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        x, y = load_digits(return_X_y=True)
        x, y = torch.from_numpy(x / 16).float(), torch.from_numpy(y)
        rows, rest = train_test_split(range(len(x)), train_size=0.6, random_state=seed)
        parts = dict(zip(("train", "val", "test"), (rows, rest[::2], rest[1::2]), strict=True))
        self.parts = {name: TensorDataset(x[part], y[part]) for name, part in parts.items()}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["train"], batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["val"], batch_size=256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["test"], batch_size=256)

    predict_dataloader = test_dataloader


class Result(NamedTuple):
    """Scores are those of the test images; history has a row for each epoch; probs are (N, 10)."""

    parameters: int
    seconds: float
    scores: dict[str, float]
    history: list[dict[str, float]]
    probs: Tensor


def difference() -> list[str]:
    """Of the two modules, without their docstrings."""
    sources = []
    for module in (Digits, DigitsEnsemble):
        head, _, *body = inspect.getsource(module).splitlines()
        sources.append([head, *body])
    return list(difflib.unified_diff(*sources, n=1, lineterm=""))[2:]


def run(module: type[lightning.LightningModule], epochs: int, seed: int, out: Path) -> Result:
    torch.manual_seed(seed)
    model, data = module(), Data(seed)
    logger = CSVLogger(out, name=module.__name__, version="")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=[EnsembleMetrics(), RichProgressBar(console_kwargs={"stderr": True})],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    (scores,) = trainer.test(model, data, verbose=False)
    probs = torch.cat(trainer.predict(model, data))
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        history = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return Result(sum(p.numel() for p in model.parameters()), seconds, scores, history, probs)


def print_table(results: dict[str, Result]) -> None:
    table = Table("module", box=box.SIMPLE_HEAD)
    for header in ("parameters", "training\nseconds", *(name.replace("_", "\n") for name in SCORES)):
        table.add_column(header, justify="right")
    for name, result in results.items():
        scores = (f"{result.scores[f'test_{score}']:.4f}" for score in SCORES)
        table.add_row(name, f"{result.parameters:,}", f"{result.seconds:.1f}", *scores)
    Console(width=120).print(table)  # whole in a file too, for which rich takes a width of 80
    print("Of 359 test images; nll and mutual information in nats. A single network has no mutual information.")
    print("What an ensemble gains is seen over several seeds, and on what it has not learnt: examples/digits_ood.py.")


def plot(results: dict[str, Result]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (name, result) in zip(panels, results.items(), strict=True):
        training_curves(result.history, names=["train_loss", "val_loss", "val_nll"], ax=panel)
        panel.set(title=name, yscale="log")
        panel.label_outer()
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Returns what each module came to."""
    parser = argparse.ArgumentParser(description="A LightningModule, and the five lines that make it an ensemble.")
    parser.add_argument("--fast", action="store_true", help="3 epochs instead of 40")
    parser.add_argument("--seed", type=int, default=42, help="of the split, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("out/lightning_module"), help="folder of the logs and figure")
    args = parser.parse_args(argv)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what hardware there is does not matter here
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    Console(width=120).print(Syntax("\n".join(difference()), "diff", background_color="default"))
    with warnings.catch_warnings():
        # The images are in memory, so that worker processes, which Lightning advises, would only slow it down.
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*than the logging interval")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # in Lightning's own code
        modules = (Digits, DigitsEnsemble)
        results = {module.__name__: run(module, 3 if args.fast else 40, args.seed, args.out) for module in modules}
    print_table(results)
    plot(results).savefig(args.out / "training.png", dpi=150)
    print(f"\nLogs and the figure are in {args.out}.")
    return results


if __name__ == "__main__":
    main()
