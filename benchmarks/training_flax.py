"""`fit` against a loop of jitted steps by hand: `python -m benchmarks.training_flax`.

The model is a deep ensemble of MLPs 2-H-H-2. The limit is the same ensemble by hand, `jax.vmap` and optax under one
`jax.jit` with donated buffers, in the plainest loop over the same batches. `fit` asks for the batches of each epoch:
there the limit, and `make_train_step` in that loop, have their turns. A ratio is a median time of an epoch over the
median of the limit. What comes once has columns of its own, tracing and compiling; and so has an epoch's checkpoint.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from benchmarks._timing import KEEP_FREED_MEMORY

CASES = ((3, 128, 128), (10, 128, 128), (30, 128, 128), (100, 64, 32), (10, 512, 256))
QUICK_CASES = ((3, 16, 8), (10, 16, 8))
COLUMNS = ("limit, us", "make_train_step", "fit", "compiling, s", "by hand, s", "checkpoint, s")


def measure(num_members: int, hidden: int, batch: int, steps: int, seconds: float) -> tuple[float, ...]:
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from probly_flax import ensemble
    from probly_flax.losses import member_cross_entropy
    from probly_flax.training import fit, make_train_step

    def by_hand(params: Any, x: jax.Array) -> jax.Array:
        (w1, b1), (w2, b2), (w3, b3) = params
        return jax.nn.relu(jax.nn.relu(x @ w1 + b1) @ w2 + b2) @ w3 + b3

    @partial(jax.jit, donate_argnums=0)
    def limit_step(state: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        (params, moments), (x, y) = state, batch
        forward = jax.vmap(by_hand, in_axes=(0, None))
        loss, grads = jax.value_and_grad(lambda params: member_cross_entropy(forward(params, x), y))(params)
        updates, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def loop(step: Callable[..., Any], state: Any) -> Callable[[], None]:
        def epoch() -> None:
            nonlocal state
            for each in batches:
                state, logs = step(state, each)
            jax.block_until_ready(logs)

        return epoch

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def with_optimizer() -> tuple[nnx.Module, nnx.Optimizer]:
        own = nnx.clone(model)
        return own, nnx.Optimizer(own, adam, wrt=nnx.Param)

    rng, adam, linear = np.random.default_rng(0), optax.adam(1e-3), partial(nnx.Linear, rngs=nnx.Rngs(0))
    batches = [
        (rng.normal(size=(batch, 2)).astype(np.float32), rng.integers(0, 2, batch, np.int32)) for _ in range(steps)
    ]
    base = nnx.Sequential(linear(2, hidden), nnx.relu, linear(hidden, hidden), nnx.relu, linear(hidden, 2))
    model = ensemble(base, num_members)
    layers = [layer for layer in model.stacked.layers if isinstance(layer, nnx.Linear)]
    params = jax.tree.map(jax.numpy.array, [(layer.kernel[...], layer.bias[...]) for layer in layers])
    loops = {"limit": loop(limit_step, (params, adam.init(params))), "step": loop(*make_train_step(*with_optimizer()))}
    first = {name: timed(run) for name, run in loops.items()}
    times: dict[str, list[float]] = {"limit": [], "step": [], "fit": []}
    started = 0.0

    def train(epoch: int) -> list[Any]:
        nonlocal started
        if epoch:
            times["fit"].append(time.perf_counter() - started)
        for name, run in list(loops.items())[:: -1 if epoch % 2 else 1]:
            times[name].append(timed(run))
        started = time.perf_counter()
        return batches

    fit(*with_optimizer(), train, epochs=6 + int(seconds / timed(loops["limit"]) / 3))
    compiling = times["fit"].pop(0)
    limit, step, fitted = (statistics.median(times[name]) for name in ("limit", "step", "fit"))
    starts: list[float] = []

    def one_step(epoch: int) -> list[Any]:
        starts.append(time.perf_counter())
        return batches[:1]

    with tempfile.TemporaryDirectory() as folder:
        fit(*with_optimizer(), one_step, epochs=6, checkpoint=folder, progress=False)
    saving = statistics.median(end - start for start, end in pairwise(starts[1:]))
    return limit / steps * 1e6, step / limit, fitted / limit, compiling - fitted, first["limit"] - limit, saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that everything runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if KEEP_FREED_MEMORY.items() - os.environ.items():  # malloc reads them when a process starts
        command = [sys.executable, "-m", "benchmarks.training_flax", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=os.environ | KEEP_FREED_MEMORY, check=False).returncode)
    parallel = "true" if args.threads > 1 else "false"
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={parallel} intra_op_parallelism_threads={args.threads}"
    print("".join(f"{name:>8}" for name in "EHB") + "".join(f"{name:>17}" for name in COLUMNS))
    for case in QUICK_CASES if args.quick else CASES:
        limit, step, fitted, *once = measure(
            *case, *((20, 0.1) if args.quick else (10 if case[1] == 512 else 200, 20.0))
        )
        numbers = f"{limit:17.0f}{step:16.2f}x{fitted:16.2f}x" + "".join(f"{seconds:17.2f}" for seconds in once)
        print("".join(f"{number:8}" for number in case) + numbers, flush=True)
    print(f"{platform.platform()}, {args.threads} threads, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
