"""What the benchmarks share: contenders that take turns, one framework for each process, a table and JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Else glibc gives large tensors back and gets them anew at every call, in some runs and not in others: up to 2 x.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
PACKAGES = {"torch": ("torch",), "flax": ("jax", "flax", "optax")}
LIMIT = "limit"
Contenders = dict[str, Callable[[], Any]]  # what each runs, by name


class Table(NamedTuple):
    header: Sequence[str]  # a name for each number of a case
    cases: Sequence[tuple[int, ...]]
    quick_cases: Sequence[tuple[int, ...]]
    contenders_of: dict[str, Callable[..., Iterator[tuple[str, Contenders]]]]  # by framework: what is timed of a case


def medians(contenders: Contenders, seconds: float) -> dict[str, float]:
    """Median seconds of each, in rounds in which each runs once, in an order drawn anew: whoever comes after the
    largest finds the coldest caches.
    """
    for run in list(contenders.values()) * 3:  # compiles, and warms the caches
        run()
    names, times = list(contenders), {name: [] for name in contenders}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[LIMIT]) < 5:
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(column) for name, column in times.items()}


def measure(framework: str, tables: Sequence[Table], threads: int, quick: bool) -> dict[str, Any]:
    """Prints the tables of one framework, and returns what is in them."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)  # before the framework is imported
    parallel = "true" if threads > 1 else "false"
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={parallel} intra_op_parallelism_threads={threads}"
    rows, wall, cpu = [], time.perf_counter(), time.process_time()
    for table in tables:
        columns: list[str] = []
        for case in table.quick_cases if quick else table.cases:
            for what, contenders in table.contenders_of[framework](*case):
                times = medians(contenders, 0.1 if quick else 4.0)
                ratios = {name: t / times[LIMIT] for name, t in times.items() if name != LIMIT}
                if list(ratios) != columns:
                    columns = list(ratios)
                    names = "".join(f"{name:>8}" for name in table.header) + f"{'limit, us':>11}"
                    print(f"{framework:21}{names}" + "".join(f"{name:>22}" for name in columns))
                line = f"{what:21}" + "".join(f"{number:8}" for number in case) + f"{times[LIMIT] * 1e6:11.0f}"
                print(line + "".join(f"{ratio:21.2f}x" for ratio in ratios.values()), flush=True)
                rows.append({"what": what, ", ".join(table.header): case, "seconds": times})
    machine = {"machine": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    machine |= {name: importlib.metadata.version(name) for name in PACKAGES[framework]}
    busy = (time.process_time() - cpu) / (time.perf_counter() - wall)  # above 1 if several threads ran
    machine |= {"threads": threads, "cores busy": round(busy, 2), "load": round(os.getloadavg()[0], 1)}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n", flush=True)
    return {"framework": framework, **machine, "rows": rows}


def main(module: str, description: str | None, *tables: Table) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=PACKAGES, help="only this one; without it, each in a process of its own")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also writes the seconds here, or to PATH_torch, ...")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that everything runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.framework:
        result = measure(args.framework, tables, args.threads, args.quick)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
        return
    for framework in tables[0].contenders_of:
        command = [sys.executable, "-m", module, *sys.argv[1:], "--framework", framework]
        own_file = ["--json", str(args.json.with_stem(f"{args.json.stem}_{framework}"))] if args.json else []
        subprocess.run([*command, *own_file], check=True, env=os.environ | KEEP_FREED_MEMORY)
