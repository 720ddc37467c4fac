"""The kit in pytest: the fixture `assert_parity`, and a marker that runs a test in each dtype, eager and jitted.

```python
@pytest.mark.parity
def test_net(assert_parity):
    assert_parity(TorchNet(), FlaxNet(rngs=nnx.Rngs(0)), (8, 3, 32, 32))
```

Neither framework is imported, and no setting is changed, before a test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from parity_tests.kit.report import ParityReport

DTYPES = ("float32", "float64")
MARKER = (
    f"parity(dtypes={DTYPES}, jit=(True, False)): run the test once for each dtype, with Flax under jax.jit and op by "
    "op; its fixture assert_parity takes them."
)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line("markers", MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test for each dtype and each way to run Flax."""
    marker = metafunc.definition.get_closest_marker("parity")
    if marker is None:
        return
    if "assert_parity" not in metafunc.fixturenames:
        if marker in metafunc.definition.own_markers:  # a mark of the class or module may be for its other tests
            name = metafunc.function.__name__
            pytest.fail(
                f"pytest.mark.parity expects a test that calls its fixture; got {name}, which does not ask for it. "
                f"def {name}(assert_parity): ...",
                pytrace=False,
            )
        return
    try:
        runs = _runs(*marker.args, **marker.kwargs)
    except TypeError as error:
        pytest.fail(f"pytest.mark.parity: {error}", pytrace=False)
    names = [f"{run['dtype']}-{'jit' if run['jit'] else 'eager'}" for run in runs]
    metafunc.parametrize("assert_parity", runs, indirect=True, ids=names)


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., ParityReport]:
    """Returns `parity_tests.assert_parity`, with the dtype and the way to run Flax that the marker gives this test."""
    from parity_tests import assert_parity

    return partial(assert_parity, **getattr(request, "param", {}))


def _runs(dtypes: tuple[str, ...] = DTYPES, jit: tuple[bool, ...] = (True, False)) -> list[dict[str, Any]]:
    for name, values, example in ("dtypes", dtypes, ("float64",)), ("jit", jit, (True,)):
        if not isinstance(values, tuple | list) or not values:
            raise TypeError(f"{name} is to be a tuple of at least one value; got {values!r}. Pass {name}={example}.")
    return [{"dtype": dtype, "jit": each} for dtype in dtypes for each in jit]
