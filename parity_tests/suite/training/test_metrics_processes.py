"""Metrics whose batches are spread unevenly over two processes that talk by gloo, against one process."""

import os

import torch
import torch.distributed as dist
import torchmetrics

from parity_tests.standard import assert_close
from probly_torch import metrics

PROCESSES, E, B, C = 2, 3, 20, 4
ROWS = (slice(0, 5), slice(5, 6), slice(6, B))


def collections(**options):
    kinds = {
        "classes": ("NLL", "Accuracy", "ECE", "ClasswiseECE", "AdaptiveECE", "AURC", "Diversity", "ReliabilityCurve"),
        "numbers": ("RMSE", "CRPS", "IntervalCoverage"),
        "scores": ("OODAUROC", "OODFPR95"),
    }
    members = ("NLL", "ECE", "ClasswiseECE", "AdaptiveECE")
    made = {kind: [getattr(metrics, name)(**options) for name in names] for kind, names in kinds.items()}
    made["members"] = [getattr(metrics, name)(per_member=True, **options) for name in members]
    return {kind: torchmetrics.MetricCollection(each) for kind, each in made.items()}


def batch(kind, rows):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(E, B, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (B,), generator=generator)
    mean, targets = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((E, B), (B,)))
    return {
        "numbers": (mean[:, rows], mean[:, rows].exp(), targets[rows]),
        "scores": (targets[rows], labels[rows] > 1),
    }.get(kind, (logits[:, rows], labels[rows]))


def flat(values):
    bins = values.pop("ReliabilityCurve", None)
    return values | ({} if bins is None else bins._asdict())


def alone(kind, *shares):
    """Returns what one process gives."""
    metric = collections(sync_on_compute=False)[kind]
    for rows in shares:
        metric.update(*batch(kind, rows))
    return flat(metric.compute())


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_close(value.numpy(), theirs[name].numpy(), "float64")


def process(rank, path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=PROCESSES)
    for shares in (((0, 2), (1,)), ((0, 1, 2), ()), ((), (0, 1, 2))):  # the last two leave a process without a batch
        for kind, metric in collections().items():
            for share in shares[rank]:
                metric.update(*batch(kind, ROWS[share]))
            assert_same(flat(metric.compute()), alone(kind, slice(0, B)))
            metric.reset()
            metric.update(*batch(kind, ROWS[2]))  # both processes the same rows
            assert_same(flat(metric.compute()), alone(kind, ROWS[2], ROWS[2]))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that takes its time to end


def test_two_processes_with_uneven_batches_or_none_give_what_one_does(tmp_path):
    """All in one pair of processes, which take seconds to start."""
    torch.multiprocessing.spawn(process, (tmp_path / "store",), nprocs=PROCESSES)
