"""What importing each package costs over importing its framework: `python -m benchmarks.import_time`.

Each import runs in a process of its own, framework and package in turn, after one round that warms the disk.
"""

import statistics
import subprocess
import sys
import time

PAIRS = (("import torch", "import probly_torch"), ("import jax, flax.nnx", "import probly_flax"))
ROUNDS = 7


def seconds(statement: str) -> float:
    """Wall time of an interpreter that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints a line for each package."""
    for framework, package in PAIRS:
        rounds = [(seconds(framework), seconds(package)) for _ in range(ROUNDS + 1)][1:]
        base, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
        over = statistics.median(b - a for a, b in rounds)
        print(f"{package}: {ours:.2f} s, {framework}: {base:.2f} s, over it: {over:+.2f} s (median of {ROUNDS} pairs)")


if __name__ == "__main__":
    main()
