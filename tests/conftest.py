"""Shared set-up: eight simulated devices, strict numerics, one compilation cache for the whole suite."""

import os
import pathlib

# Before JAX is imported: the CPU is split into eight devices, of which a test takes as many as it needs. The suite
# compiles many programs and runs each a few times, so that LLVM's optimizer costs more than it gains.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache"
jax.config.update("jax_compilation_cache_dir", str(_CACHE / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """Float64 on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread: two on shared cores wait for each other more than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_start():
    """A run in float64 turns 64-bit types on for its process; the next test starts without."""
    yield
    jax.config.update("jax_enable_x64", False)
