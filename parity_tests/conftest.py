"""Settings that every comparison needs: float64 in JAX, one thread and one seed in torch, no silent promotion."""

import jax
import pytest
import torch


@pytest.fixture(autouse=True)
def _comparable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert torch.get_float32_matmul_precision() == "highest"
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
    torch.set_num_threads(threads)
