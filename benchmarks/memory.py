"""Memory of deep ensembles: of their weights, and of a training step with and without chunk_size.

Each figure is what a second call held at its peak, and with its result afterwards, over what its process (a new one for
each) held before it, as Linux counts it (/proc/self/status), in MiB and in multiples: of the members' weights for
building an ensemble, of the activations of ten members for a step of forward and backward. Freed memory goes back to
Linux at once (MALLOC_MMAP_THRESHOLD_): else the allocator's heap is measured, whose gaps differ from run to run.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS, BATCH, CLASSES = 8, 4096, 10
CASES = {  # what, width of the layers, members, chunk_size
    "build 10 members": ("build", 1024, 10, None),
    "step of 10 members": ("step", 64, 10, None),
    "step of 100 members, chunk_size=10": ("step", 64, 100, 10),
    "step of 100 members, chunk_size=1": ("step", 64, 100, 1),
    "step of 100 members": ("step", 64, 100, None),
}


def torch_run(what: str, width: int, num_members: int, chunk_size: int | None) -> Callable[[], Any]:
    import torch
    from torch import nn

    from probly_torch import ensemble

    class WithForward(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.set_num_threads(1)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.Tanh())]
    base = WithForward(*layers, nn.Linear(width, CLASSES))
    if what == "build":
        return lambda: ensemble(base, num_members)
    model, x = ensemble(base, num_members, chunk_size=chunk_size), torch.ones(BATCH, width)
    return lambda: model(x).mean().backward()


def flax_run(what: str, width: int, num_members: int, chunk_size: int | None) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from probly_flax import ensemble

    rngs = nnx.Rngs(0)
    layers = [layer for _ in range(LAYERS) for layer in (nnx.Linear(width, width, rngs=rngs), jnp.tanh)]
    base = nnx.Sequential(*layers, nnx.Linear(width, CLASSES, rngs=rngs))
    if what == "build":
        return lambda: jax.block_until_ready(nnx.state(ensemble(base, num_members)))
    graph, state = nnx.split(ensemble(base, num_members, chunk_size=chunk_size))
    x = jnp.ones((BATCH, width))
    step = jax.jit(jax.grad(lambda state, x: nnx.merge(graph, state)(x).mean())).lower(state, x).compile()
    return lambda: jax.block_until_ready(step(state, x))


def measure(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes held at most during a second call, and by its result."""
    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = held("VmRSS")
    result = run()
    peak = held("VmHWM") - before
    ctypes.CDLL(None).malloc_trim(0)
    after = held("VmRSS") - before
    del result
    return peak, after


def held(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, metavar=("FRAMEWORK", "CASE"), help="only this one, in this process")
    args = parser.parse_args()
    if args.run:
        framework, name = args.run
        what, width, num_members, chunk_size = CASES[name]
        make = {"torch": torch_run, "flax": flax_run}[framework]
        peak, after = measure(make(what, width, num_members, chunk_size))
        weights = 4 * num_members * (LAYERS * width + CLASSES) * (width + 1)
        activations = 4 * 10 * LAYERS * BATCH * width  # float32 outputs of tanh, of ten members
        unit = weights if what == "build" else activations
        print(f"{framework:6}{name:36}", end="")
        print("".join(f"{size / 2**20:10.0f} MiB {size / unit:5.2f} x" for size in (peak, after)), flush=True)
        return
    print(f"{'':42}{'at its peak':>22}{'afterwards':>22}", flush=True)
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "MALLOC_MMAP_THRESHOLD_": "131072"}
    for framework in ("torch", "flax"):
        for name in CASES:
            command = [sys.executable, "-m", "benchmarks.memory", "--run", framework, name]
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
