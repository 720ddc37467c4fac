"""Ensembles from configuration files, by LightningCLI: no code but the network and the data, which are below.

    python -m examples.lightning_cli            trains all of examples/configs, and compares them
    python -m examples.lightning_cli --fast     a few epochs of each, to see that everything runs

Each is one command, of which this program runs all in one process:

    python -m probly_torch.training fit --config examples/configs/digits_batchensemble.yaml

Any entry can be given on the command line too: `--trainer.max_epochs 5`, `--model.weight_decay 0.01`,
`--model.model.init_args.num_members 8`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import lightning
import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits, make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from probly_torch.plots import training_curves
from probly_torch.training import __main__ as command

CONFIGS = Path(__file__).parent / "configs"
SCORES = "accuracy", "nll", "brier", "ece", "mutual_information"


class MLP(nn.Sequential):
    """Linear layers of these widths, from inputs to logits, with ReLUs between them."""

    def __init__(self, widths: list[int]) -> None:
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        super().__init__(*[layer for each in linear for layer in (each, nn.ReLU())][:-1])


class _Data(lightning.LightningDataModule):
    """Three fifths of the inputs to train, a fifth each to validate and to test."""

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, seed: int) -> None:
        super().__init__()
        order = np.random.default_rng(seed).permutation(len(x))
        x, y, n = x.astype(np.float32)[order], y[order], len(x) // 5
        self.train, self.val, self.test = (
            TensorDataset(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
            for rows in (slice(2 * n, None), slice(n), slice(n, 2 * n))
        )
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=1024)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=1024)


class TwoMoons(_Data):
    def __init__(self, num_points: int = 5000, noise: float = 0.2, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__(*make_moons(num_points, noise=noise, random_state=seed), batch_size, seed)


class Digits(_Data):
    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        x, y = load_digits(return_X_y=True)
        super().__init__(x / 16, y, batch_size, seed)


class Result(NamedTuple):
    """Scores are those of the test inputs, in the epoch of the lowest validation NLL; history has a row each epoch."""

    parameters: int
    seconds: float
    scores: dict[str, float]
    history: list[dict[str, float]]


def run(config: Path, extra: Sequence[str], out: Path) -> Result:
    """Fits and tests as the command line does, but for the process that it would start."""
    options = [f"--config={config}", f"--trainer.logger.init_args.save_dir={out}", *extra]
    with redirect_stdout(sys.stderr):  # progress bars and summaries
        start = time.perf_counter()
        command.main(["fit", *options])
        seconds, fitted = time.perf_counter() - start, newest(out / config.stem)
        (checkpoint,) = (fitted / "checkpoints").iterdir()
        command.main(["test", *options, f"--ckpt_path={checkpoint}"])
    (scores,) = read(newest(out / config.stem))
    state = torch.load(checkpoint)["state_dict"]
    return Result(sum(x.numel() for x in state.values()), seconds, scores, read(fitted))


def newest(folder: Path) -> Path:
    """CSVLogger gives each run a version of its own."""
    return max(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))


def read(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def print_table(results: dict[str, Result]) -> None:
    table = Table("configuration", box=box.SIMPLE_HEAD)
    for header in ("parameters", "training\nseconds", "epochs", *(name.replace("_", "\n") for name in SCORES)):
        table.add_column(header, justify="right")
    for name, result in results.items():
        epochs = 1 + max(row["epoch"] for row in result.history)
        scores = (f"{result.scores[f'test_{score}']:.4f}" for score in SCORES)
        table.add_row(name, f"{result.parameters:,}", f"{result.seconds:.1f}", f"{epochs:.0f}", *scores)
    Console(width=120).print(table)  # whole in a file too, for which rich takes a width of 80
    print("Of the test inputs, by the checkpoint of the lowest validation NLL; nll and mutual information in nats.")


def plot(results: dict[str, Result]) -> Figure:
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, len(results) // 2, sharey="row", squeeze=False)
    for panel, (name, result) in zip(panels.flat, results.items(), strict=True):
        training_curves(result.history, names=["train_loss", "val_loss", "val_nll"], ax=panel)
        panel.set(title=name, yscale="log")
        if not panel.get_subplotspec().is_first_col():
            panel.set(ylabel="")
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Returns what each configuration came to."""
    parser = argparse.ArgumentParser(description="Ensembles from configuration files.")
    parser.add_argument("--fast", action="store_true", help="2 epochs of 4 batches instead of what the files say")
    parser.add_argument("--seed", type=int, default=42, help="of the split, the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("out/lightning_cli"), help="folder of the logs and the figure")
    args = parser.parse_args(argv)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what hardware there is does not matter here
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    extra = [f"--seed_everything={args.seed}", f"--data.init_args.seed={args.seed}"]
    extra += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4"] if args.fast else []
    with warnings.catch_warnings():
        # The data are in memory, so that worker processes, which Lightning advises, would only slow it down.
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*than the logging interval")
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # that of the test, from that of the fit
        warnings.filterwarnings("ignore", module="lightning.pytorch.cli")  # what it calls in jsonargparse is deprecated
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # in Lightning's own code
        results = {config.stem: run(config, extra, args.out) for config in sorted(CONFIGS.glob("*.yaml"))}
    print_table(results)
    plot(results).savefig(args.out / "training.png", dpi=150)
    print(f"\nLogs, checkpoints and the figure are in {args.out}.")
    return results


if __name__ == "__main__":
    main()
