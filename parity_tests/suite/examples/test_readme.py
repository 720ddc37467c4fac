"""The README's code runs as shown, in order, in an empty folder; and its commands are those that CI runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


def test_blocks_run_in_order(tmp_path):
    blocks = re.findall(r"```python( training)?\n(.*?)```", README, re.DOTALL)
    kinds = [kind for kind, _ in blocks]
    assert sorted(kinds) == [""] * 4 + [" training"] * 2
    names = [f"block_{i}{kind.strip()}.py" for i, kind in enumerate(kinds)]
    for name, (_, block) in zip(names, blocks, strict=True):
        (tmp_path / name).write_text(block)
    # In one process, since importing both frameworks takes seconds; but no block sees the names of another.
    program = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    shows_progress = contextlib.redirect_stderr(io.StringIO()) if "training" in name else contextlib.nullcontext()
    with shows_progress:
        runpy.run_path(name, run_name="__main__")
"""
    run = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_members_spread_over_devices_and_processes(tmp_path):
    blocks = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    frameworks = {
        "jax": (
            "import jax, jax.numpy as jnp\nfrom flax import nnx\nimport probly_flax as probly\n"
            "deep, x = probly.ensemble(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 8), jnp.ones((5, 2))\n",
            "assert len({shard.device for shard in deep(x).addressable_shards}) == 8\n",
            [],
        ),
        "torch": (
            "import torch\nfrom torch import nn\nimport probly_torch as probly\n"
            "deep, x = probly.ensemble(nn.Linear(2, 3), 8), torch.ones(5, 2)\n",
            "import os\nassert torch.allclose(logits, deep(x))\ntorch.distributed.barrier()\nos._exit(0)\n",
            ["-m", "torch.distributed.run", "--nproc-per-node=2"],
        ),
    }
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    for block, (name, (before, after, launch)) in zip(blocks, frameworks.items(), strict=True):
        (tmp_path / f"{name}_block.py").write_text(before + block + after)
        command = [sys.executable, *launch, f"{name}_block.py"]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


def test_commands_are_those_of_ci():
    install = 'pip install -c constraints.txt -e ".[test]" && pytest'
    assert install in README
    assert install in (ROOT / "CONTRIBUTING.md").read_text()
    assert install.replace("pip install", "pip install --quiet") in (ROOT / ".ci" / "run").read_text()


def test_constraints_name_every_dependency_of_the_tests():
    names = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open()}
    required = re.findall(r'"([A-Za-z][\w-]*)>=', (ROOT / "pyproject.toml").read_text())
    benchmarks_only = {"tabm", "torch-uncertainty"}
    assert {name.lower().replace("_", "-") for name in required} - benchmarks_only <= names
