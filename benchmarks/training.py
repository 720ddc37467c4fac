"""A training step through EnsembleClassifier against a loop by hand: `python -m benchmarks.training`.

The network is an MLP 2-H-H-2 of E members; a step is forward, member cross-entropy, backward and AdamW. The limit is
the plainest loop around the same model. A Trainer's step is timed from the inside: from handing it a batch until it
asks for the next one, and in between the limit has its turn, so that both find the same caches. Trainings of 100 steps
take turns in an order drawn anew. Times are medians, those of a Trainer of its ratio to the limit's step just before.

All have the Trainer's own cost for each step, which "empty" is: a module of one weight, without a network, optimized by
SGD. "plain" is a LightningModule of four lines. The last column is the ratio to the limit of what EnsembleClassifier
costs beyond "empty". Neither progress bar nor logger are on.
"""

import argparse
import logging
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

CASES = ((3, 128, 128), (10, 128, 128), (30, 128, 128), (10, 512, 256))
QUICK_CASES = ((3, 16, 8),)
STEPS = 100


def measure(kind: str, num_members: int, hidden: int, batch: int, seconds: float) -> dict[str, float]:
    """Median seconds of a step of each."""
    import lightning
    import torch
    from torch import Tensor, nn

    import probly_torch
    from probly_torch.losses import member_cross_entropy
    from probly_torch.training import EnsembleClassifier

    class Empty(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Any) -> Tensor:
            return self.weight.clone()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Plain(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any) -> Tensor:
            return member_cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return adamw(self.parameters())

    class Batches:
        """Those of one epoch. Before each is handed out the limit is timed, and then what is done with the batch."""

        def __init__(self, ratios: list[float]) -> None:
            self.ratios = ratios

        def __len__(self) -> int:
            return STEPS

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for i in range(STEPS):
                limit.append(timed(by_hand))
                start = time.perf_counter()
                yield x, y
                if i:  # the first one comes with what starts an epoch
                    self.ratios.append((time.perf_counter() - start) / limit[-1])

    def by_hand() -> None:
        optimizer.zero_grad()
        member_cross_entropy(model(x), y).backward()
        optimizer.step()

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3)

    def new_model() -> nn.Module:
        layers = nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
        make: Callable[..., nn.Module] = getattr(probly_torch, kind)
        return make(nn.Sequential(*layers), num_members)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    x, y = torch.randn(batch, 2), torch.randint(0, 2, (batch,))
    model = new_model()
    optimizer = adamw(model.parameters())
    modules = {"empty": Empty(), "plain": Plain(new_model())}
    modules["EnsembleClassifier"] = EnsembleClassifier(new_model(), optimizer=adamw)
    limit: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in modules}
    order, names, end = random.Random(0), list(modules), time.perf_counter() + seconds
    while time.perf_counter() < end or not limit:
        order.shuffle(names)
        for name in names:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet)
            trainer.fit(modules[name], Batches(ratios[name]))
    median = statistics.median(limit)
    return {"limit": median, **{name: median * statistics.median(each) for name, each in ratios.items()}}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that everything runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)  # before torch is imported
    columns = ("limit", "empty", "plain", "EnsembleClassifier")
    print(f"{'microseconds':15}{'E':>5}{'H':>5}{'B':>5}" + "".join(f"{name:>20}" for name in columns) + f"{'ratio':>9}")
    for case in QUICK_CASES if args.quick else CASES:
        for kind in ("ensemble", "batchensemble"):
            seconds = measure(kind, *case, 1.0 if args.quick else 20.0)
            ratio = (seconds["EnsembleClassifier"] - seconds["empty"]) / seconds["limit"]
            numbers = "".join(f"{number:5}" for number in case)
            times = "".join(f"{seconds[name] * 1e6:20.0f}" for name in columns)
            print(f"{kind:15}{numbers}{times}{ratio:8.2f}x", flush=True)


if __name__ == "__main__":
    main()
