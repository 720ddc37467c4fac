"""Time and memory of saving and loading a model of 400 MB, beside what safetensors alone takes.

Each line is a process of its own, on a file that is in the page cache: the best of five calls in wall time and in CPU
time, and the peak of memory over what the process held before it made the model, in multiples of the model.
safetensors.torch maps the file into memory and copies it into the model; safetensors.numpy and safetensors.flax return
new arrays, beside which there is no model. load_weights also checks all values and the sha256 of their bytes, which is
measured alone as well; and in Flax it transposes. A JAX model's old arrays are freed one by one, but glibc may keep
their memory: MALLOC_MMAP_THRESHOLD_=131072 gives it back at once, for the true peak, at the cost of time.

    python -m benchmarks.weights
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.memory import held

LAYERS, WIDTH, ROUNDS = 100, 1024, 5
MODEL = LAYERS * WIDTH * WIDTH * 4


def torch_model(layers: int = LAYERS) -> Any:
    from torch import nn

    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def flax_model(layers: int = LAYERS) -> Any:
    from flax import nnx

    return nnx.Sequential(*(nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(layers)))


def no_model(layers: int = LAYERS) -> Any:
    return None


def sha256(model: Any, path: Path) -> None:
    block, digest = bytearray(2**20), hashlib.sha256()
    with open(path, "rb") as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])


def probly_save(model: Any, path: Path) -> None:
    package(model).save_weights(model, path.with_suffix(".saved"))


def probly_load(model: Any, path: Path) -> None:
    package(model).load_weights(model, path)


def torch_save(model: Any, path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(model.state_dict(), path.with_suffix(".saved"))


def torch_load(model: Any, path: Path) -> None:
    import safetensors.torch

    model.load_state_dict(safetensors.torch.load_file(path))


def numpy_load(model: Any, path: Path) -> Any:
    import safetensors.numpy

    return safetensors.numpy.load_file(path)


def flax_load(model: Any, path: Path) -> Any:
    import safetensors.flax

    return safetensors.flax.load_file(path)


def package(model: Any) -> Any:
    return importlib.import_module("probly_torch" if type(model).__module__.startswith("torch") else "probly_flax")


CASES: dict[str, tuple[Callable[..., Any], Callable[[Any, Path], Any]]] = {
    "sha256 of the file": (no_model, sha256),
    "torch: safetensors' save_file": (torch_model, torch_save),
    "torch: save_weights": (torch_model, probly_save),
    "torch: safetensors' load_file, load_state_dict": (torch_model, torch_load),
    "torch: load_weights": (torch_model, probly_load),
    "flax: save_weights": (flax_model, probly_save),
    "flax: safetensors.numpy's load_file": (no_model, numpy_load),
    "flax: safetensors.flax's load_file": (no_model, flax_load),
    "flax: load_weights": (flax_model, probly_load),
}


def measure(name: str, path: Path) -> None:
    """Runs one case in this process."""
    make, call = CASES[name]
    importlib.import_module("probly_flax" if name.startswith("flax") else "probly_torch")
    make(layers=1)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = held("VmRSS")
    model = make()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter(), time.process_time()
        result = call(model, path)
        rounds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        del result
    wall, processor = map(min, zip(*rounds, strict=True))
    peak = (held("VmHWM") - before) / MODEL
    print(f"{name:48} {wall:6.2f} s  {processor:6.2f} s of CPU  {peak:5.2f} x the model", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--path", type=Path)
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case, arguments.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        from probly_torch import save_weights

        save_weights(torch_model(), path)
        for case in CASES:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.weights", "--case", case, "--path", str(path)], check=True
            )


if __name__ == "__main__":
    main()
