"""Shared set-up: eight simulated devices, strict numerics, one compilation cache for the whole suite."""

import gc
import logging
import os
import pathlib
import runpy
import sys

# Before JAX is imported: the CPU is split into eight devices, of which a test takes as many as it needs. The suite
# compiles many programs and runs each a few times, so that LLVM's optimizer costs more than it gains. Not so
# --xla_cpu_use_fusion_emitters=false, which compiles in a third of the time: with it MoCo-v2's views come out wrong.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

QUICK = os.environ["XLA_FLAGS"].split("device_count=8 ")[-1]  # for processes that tests start
ROOT = pathlib.Path(__file__).resolve().parent.parent
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "xla-tests"))
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


@pytest.fixture
def own_names():
    """Compiled programs come with the names of this code's functions, not with those of an earlier state's."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture
def in_process(monkeypatch, capsys, tmp_path):
    """Runs a script as `python SCRIPT ...` would, in this process: `(exit status, stdout, stderr)`."""
    from absl import flags

    from ifm_jax import process

    monkeypatch.setattr(process, "keep_memory", lambda: None)
    monkeypatch.setattr(process, "begin", lambda hosts=False: None)  # it is this process that would be supervised
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("absl").level
    modules = flags.FLAGS.flags_by_module_dict()
    known = {flag.name for module in modules if module.startswith("absl") for flag in modules[module]}
    others = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - known}
    for name in others:  # of imported benchmarks, where a process of its own would have none
        delattr(flags.FLAGS, name)

    def run_in_process(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            return ended.code, *capsys.readouterr()
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
            flags.FLAGS.set_gnu_getopt(False)
            logging.getLogger("absl").setLevel(level)

    yield run_in_process
    for name, flag in others.items():
        flags.FLAGS[name] = flag


@pytest.fixture(autouse=True)
def _same_start():
    """A run in float64 turns 64-bit types on for its process; the next test starts without."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True, scope="module")
def _forgotten_programs():
    """Compiled programs and traces of one file are of no use to the next; kept, they slow the garbage collector."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()
