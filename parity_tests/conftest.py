"""Settings that every comparison needs: float64 in JAX, one thread in torch, no silent promotion in either."""

import jax
import pytest
import torch


@pytest.fixture(autouse=True)
def _comparable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.get_float32_matmul_precision() == "highest"
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
    torch.set_num_threads(threads)
