"""The README's code runs as shown, in order, in an empty folder; and its commands are those that CI runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_blocks_run_in_order(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for i, block in enumerate(blocks):
        (tmp_path / f"block_{i}.py").write_text(block)
        run = subprocess.run(
            [sys.executable, f"block_{i}.py"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""


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
