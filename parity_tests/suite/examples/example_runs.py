"""What the tests of the examples share: one fast run of each, and a look at its figures."""

import pytest
import torch


def run_once(main):
    """Returns two fixtures of a test module: the folder that the example writes to, and what one fast run returns."""

    @pytest.fixture(scope="module")
    def out(tmp_path_factory):
        return tmp_path_factory.mktemp(main.__module__.rpartition(".")[2])

    @pytest.fixture(scope="module")
    def results(out):
        threads = torch.get_num_threads()
        yield main(["--fast", "--out", str(out)])
        torch.set_num_threads(threads)

    return out, results


def assert_figures(*paths, size=20_000):
    """Asserts that each file is a figure with something in it."""
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > size, "a figure with nothing in it is smaller"
