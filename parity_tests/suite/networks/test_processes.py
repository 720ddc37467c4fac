"""Members, or batches, spread over two processes that talk by gloo, against one process."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from parity_tests.standard import assert_close
from probly_torch import Ensemble, ensemble
from probly_torch.losses import member_cross_entropy, mixture_cross_entropy

PROCESSES, MEMBERS, BATCH = 2, 4, 6


class Residual(nn.Module):
    """A network that only vmap can run."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(x + self.first(x).tanh())


NETWORKS = {"MLP": lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), "Residual": Residual}


def whole(name) -> tuple[Ensemble, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    return ensemble(NETWORKS[name]().double(), MEMBERS, rngs=1), x, labels


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def members_over_processes(name) -> None:
    model, x, labels = whole(name)
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("members",))
    size = MEMBERS // PROCESSES
    mine = slice(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size)
    own = model[mine]
    logits = DTensor.from_local(own(x), mesh, [Shard(0)]).full_tensor()
    assert_close(logits.detach(), model(x).detach(), "float64")
    mixture_cross_entropy(logits, labels).backward()
    mixture_cross_entropy(model(x), labels).backward()
    assert len(gradients(own)) == 4
    for ours, all_members in zip(gradients(own), gradients(model), strict=True):
        assert_close(ours, all_members[mine], "float64")


def batches_over_processes(name) -> None:
    model, x, labels = whole(name)
    alone, _, _ = whole(name)
    rows = slice(dist.get_rank() * BATCH // PROCESSES, (dist.get_rank() + 1) * BATCH // PROCESSES)
    parallel = DistributedDataParallel(model)
    member_cross_entropy(parallel(x[rows]), labels[rows]).backward()
    member_cross_entropy(alone(x), labels).backward()
    assert len(gradients(model)) == 4
    for ours, theirs in zip(gradients(model), gradients(alone), strict=True):
        assert_close(ours, theirs, "float64")


def process(rank, path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=PROCESSES)
    for name in NETWORKS:
        members_over_processes(name)
        batches_over_processes(name)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that takes its time to end


def test_two_processes_compute_what_one_does(tmp_path):
    """All in one pair of processes, which take seconds to start."""
    torch.multiprocessing.spawn(process, (tmp_path / "store",), nprocs=PROCESSES)
