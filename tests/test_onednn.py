"""oneDNN's convolutions against XLA's in float64; calls from compiled programs and how they end."""

import pathlib
import platform
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifm_jax
from ifm_jax import assembly, sharding
from ifm_jax.errors import UsageError
from ifm_jax.models import convolution, host_call, onednn
from tests import small
from tests.test_convolution import SHAPES, all_three, arguments, assert_equal, exact

# What is computed by oneDNN of output, input gradient and kernel gradient; elsewhere all three.
COUNTS = dict.fromkeys(SHAPES, 3) | dict.fromkeys([SHAPES[i] for i in (0, 1, 2, 3, 4, 5)], 0)
COUNTS |= dict.fromkeys([SHAPES[i] for i in (6, 16)], 1)


@pytest.fixture(autouse=True)
def _is_installed():
    """The test environment brings it for Linux on x86-64."""
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        onednn.require()
    elif not onednn.is_available():
        pytest.skip("oneDNN is not installed")


def calls(run, values, platforms=("cpu",)):
    return run.trace(*values).lower(lowering_platforms=platforms).as_text().count("custom_call @ifm_jax_onednn")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_xla_in_float64(shape, dtype):
    """In bfloat16 up to the rounding of the result. Twice the same numbers; none of it on another platform."""
    values, options = arguments(shape, dtype)
    run = jax.jit(all_three(convolution.conv_general_dilated_onednn, options))
    number = calls(run, values)
    if dtype == "float32":  # not every processor has bfloat16
        assert number == COUNTS[shape]
    assert calls(run, values, ("tpu",)) == calls(run, values, ("cuda",)) == 0
    if number == 0:  # those of tests/test_convolution.py
        return
    found = run(*values)
    assert_equal(found, exact(shape, dtype), 2e-6 if dtype == "float32" else 2**-8)
    for once, again in zip(found, run(*values), strict=True):
        np.testing.assert_array_equal(once, again)


def test_float64_and_float16_are_xlas():
    with jax.enable_x64(True):
        for dtype in ("float64", "float16"):
            values, options = arguments(SHAPES[8], dtype)
            assert calls(jax.jit(all_three(convolution.conv_general_dilated_onednn, options)), values) == 0


def test_programs_call_it_from_several_threads_at_once():
    values, options = arguments(SHAPES[8], "float32")
    run = jax.jit(all_three(convolution.conv_general_dilated_onednn, options))
    expected, wrong = run(*values), []

    def repeat():
        for _ in range(20):
            for a, b in zip(run(*values), expected, strict=True):
                if not np.array_equal(a, b):
                    wrong.append(a)

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_step_is_that_of_xla():
    """Up to rounding: the same losses, and weights that have moved by the same."""
    mesh, found = sharding.make_mesh(jax.devices()[:1]), {}
    for library in ("xla", "onednn"):
        config = assembly.resolve(small.config(model__cpu_convolutions=library))
        step = assembly.make_step(config, mesh).jit()
        state = assembly.state_creator(config, mesh)(assembly.initial_rngs(config)[0])
        images = np.random.default_rng(0).integers(0, 256, (16, 1, 32, 32, 3), np.uint8)
        others = jax.random.key(0), jnp.full(8, 0.03)
        losses = []
        for _ in range(3):
            state, metrics = step(state, {"views": images}, *others)
            losses.append(float(metrics["loss"]))
        found[library] = losses, jax.device_get(state.params)
    np.testing.assert_allclose(found["onednn"][0], found["xla"][0], rtol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(found[library][1]) for library in ("onednn", "xla")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(1e-2, np.abs(theirs).max()))


def test_an_encoder_that_is_not_trained_on_one_device_has_xlas():
    config = assembly.resolve(small.config(model__cpu_convolutions="onednn"))
    meshes = {number: sharding.make_mesh(jax.devices()[:number]) for number in (1, 2)}
    assert assembly.make_encoder(config, meshes[1]).cpu_convolutions == "onednn"
    assert assembly.make_encoder(config, meshes[2]).cpu_convolutions == "xla"
    assert assembly.make_encoder(config).cpu_convolutions == "xla"


def test_what_it_cannot_do_is_said_before_the_start(tmp_path, monkeypatch):
    config = small.config(model__cpu_convolutions="onednn")
    with pytest.raises(UsageError, match=r"model.cpu_convolutions='onednn': oneDNN computes on one device, .* 2; or"):
        ifm_jax.train(config, tmp_path / "run", devices=jax.devices()[:2])

    def refuse():
        raise onednn.UnavailableError("oneDNN is not found")

    monkeypatch.setattr(onednn, "require", refuse)
    with pytest.raises(UsageError, match=r"oneDNN is not found; or use model\.cpu_convolutions=xla"):
        ifm_jax.train(config, tmp_path / "run", devices=jax.devices()[:1])
    config.model.compute_dtype = "float64"
    with jax.enable_x64(True), pytest.raises(UsageError, match="oneDNN has no float64 convolutions"):
        ifm_jax.train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


def run_python(code):
    root = pathlib.Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_library_that_is_not_there_is_told_with_the_remedy(tmp_path):
    """The environment's own is not looked at in another prefix."""
    ended = run_python(
        f"""
        import sys
        sys.prefix = {str(tmp_path)!r}
        from ifm_jax.models import onednn
        assert not onednn.is_available()
        onednn.require()
        """
    )
    assert "UnavailableError: oneDNN is not found (" in ended.stderr
    assert 'pip install "ifm_jax[onednn]"' in ended.stderr


def test_a_missing_openmp_is_told_apart(monkeypatch):
    def fail(path):
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(onednn._Library, "open", fail)
    with pytest.raises(onednn.UnavailableError, match=r"cannot be loaded \(libgomp.*\): install libgomp1"):
        onednn._load.__wrapped__()


def test_python_ends_while_a_program_runs():
    """An ending Python takes no more calls, and JAX would wait for the program for ever."""
    ended = run_python(
        """
        import jax, jax.numpy as jnp
        from ifm_jax.models import convolution

        @jax.jit
        def run(x, kernel):
            step = lambda i, x: convolution.conv_general_dilated_onednn(x, kernel, (1, 1), ((1, 1), (1, 1)))
            return jax.lax.fori_loop(0, 100, step, x)

        x, kernel = jnp.ones((64, 16, 16, 16)), jnp.ones((3, 3, 16, 16)) / 144
        run(x, kernel).block_until_ready()
        for _ in range(3):
            run(x, kernel)
        print("done")
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_an_error_in_a_function_ends_the_program_with_its_text():
    def fail(key, addresses):
        raise ValueError(f"{key} and {len(addresses)} addresses")

    host_call.register("test_host_call_fails", fail)
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ValueError: \(7, 8\) and 3 addresses"):
        jax.jit(lambda x: host_call.call("test_host_call_fails", (x, x), shape, (7, 8)))(
            jnp.ones(2)
        ).block_until_ready()


def test_an_interface_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(host_call, "_MAJOR", 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="version"):
        host_call.register("test_host_call_version", lambda key, addresses: None)
