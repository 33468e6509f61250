"""The plan for GPUs, without the compiler for them: its figures, and what it makes of a program."""

import importlib.metadata
import json
import types

import jax
import pytest
from jax.experimental import topologies

from benchmarks import gpu_plan, planning, reporting
from benchmarks.collectives import Collective
from benchmarks.gpu_plan import GPUS, Compiled, Machine
from benchmarks.traffic import Kernel
from ifm_jax.errors import UsageError
from tests import small


def test_machines():
    assert list(GPUS) == ["h100", "h200", "a100", "l4"]
    assert Machine.parse("h100") == Machine(GPUS["h100"], 1)
    assert str(Machine.parse("a100:4")) == "a100:4"
    for text in ("", "b100", "h100:", "h100:0", "h100:9", "h100:x", "h100:08", "H100:2"):
        with pytest.raises(UsageError, match=f"--device={text}: expected one of h100, h200, a100, l4, and how many"):
            Machine.parse(text)
    for gpu in GPUS.values():
        # The compiler's description and the published figures are of the same device.
        described = int(gpu.target.partition("memory_bandwidth: ")[2].split()[0])
        assert described == pytest.approx(gpu.bandwidth, rel=0.01)
        assert 20e9 < gpu.memory_bytes < 160e9
        assert gpu.float32 < gpu.tf32 < gpu.bfloat16


def kernel(name="conv", moved=0.0, operations=0.0, dtype="bf16", exact=False, source="convolutions"):
    return Kernel(name, "fusion", source, moved, 0.0, operations, dtype, exact)


def test_what_follows_from_a_compilation():
    gpu, machine = GPUS["h100"], Machine.parse("h100:4")
    kernels = (
        kernel(moved=gpu.bandwidth * 2e-3, operations=gpu.bfloat16 * 1e-3),
        kernel(moved=gpu.bandwidth * 1e-3, operations=gpu.bfloat16 * 3e-3),
        kernel(moved=gpu.bandwidth * 4e-3, source="loss"),
        kernel(operations=gpu.tf32 * 1e-3, dtype="f32"),
        kernel(operations=gpu.float32 * 1e-3, dtype="f32", exact=True),
    )
    exchanged = (
        Collective("all-reduce", "f32", 4, 1, int(gpu.link), (10,)),
        Collective("all-to-all", "u8", 4, 1, int(gpu.link), (10,)),
        Collective("all-gather", "u8", 4, 1, int(gpu.link), (10,)),
    )
    work = sum(one.operations for one in kernels)
    row = gpu_plan.summarize(Compiled(kernels, work / 1.1, 50e9, 9.0, exchanged), machine, 256, 36_000)
    assert row["memory_seconds"] == pytest.approx(7e-3)
    assert row["compute_seconds"] == pytest.approx(6e-3)
    assert row["kernels_seconds"] == pytest.approx(2e-3 + 3e-3 + 4e-3 + 2e-3)
    assert [one["seconds"] for one in row["collectives"]] == pytest.approx([1.5, 0.1875, 0.75])
    assert row["hours_compute_bound"] == pytest.approx(0.06)
    assert row["hours_roofline"] == pytest.approx(24.375)
    assert row["images_per_second_kernel_by_kernel"] == pytest.approx(256 / (11e-3 + 2.4375))
    assert row["flops_over_ideal"] == pytest.approx(1.1)
    assert row["bytes_per_chip"] == pytest.approx(7e-3 * gpu.bandwidth)
    assert [one["source"] for one in row["sources"]] == ["convolutions", "loss"]
    assert row["hbm_fits"]
    assert not gpu_plan.summarize(Compiled(kernels, work, 90e9, 9.0, ()), machine, 256, 1)["hbm_fits"]
    assert {name: row[name] for name in planning.SUMMARY}
    json.dumps(row)


def test_it_says_what_to_install(monkeypatch):
    wanted = importlib.metadata.version("jaxlib")
    versions = {"jaxlib": wanted}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(gpu_plan.importlib.metadata, "version", version)
    remedy = r"in the clone, pip install -e '.\[gpu-plan\]'"
    with pytest.raises(UsageError, match=f"jax-cuda12-plugin, the compiler .* is not installed: {remedy}"):
        gpu_plan.require_wheels()
    versions |= {"jax-cuda12-plugin": wanted, "jax-cuda12-pjrt": "0.0.1"}
    with pytest.raises(UsageError, match=f"jax-cuda12-pjrt 0.0.1 does not fit jaxlib {wanted}: .*{remedy}"):
        gpu_plan.require_wheels()
    versions["jax-cuda12-pjrt"] = wanted
    assert gpu_plan.require_wheels() == wanted


@pytest.mark.slow
def test_a_plan(own_names, monkeypatch, tmp_path):
    """Of a small SimCLR step, with simulated devices in place of GPUs and the CPU's compiler in place of CUDA's."""
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: types.SimpleNamespace(devices=jax.devices()[:2]))
    monkeypatch.setattr(gpu_plan, "require_wheels", lambda: "0")
    monkeypatch.setenv("IFM_JAX_CACHE", str(tmp_path / "cache"))
    config = small.config(method="simclr", data__source="folder:")
    config.data.augmentation = "moco_v2"
    said = []
    options = {"images": 160, "given_views": True, "say": said.append, "program": str(tmp_path / "step.hlo")}
    row = gpu_plan.plan(config, Machine.parse("h100:2"), **options)
    assert (row["method"], row["topology"], row["chips"], row["steps"]) == ("simclr", "h100:2", 2, 20)
    assert row["queue_size"] is None
    assert sum(one["bytes"] for one in row["sources"]) == pytest.approx(row["bytes_per_chip"], abs=20)
    assert sum(one["kernels"] for one in row["sources"]) == row["kernels"]
    assert {"convolutions", "BatchNorm forward", "BatchNorm backward", "loss", "optimizer"} <= {
        one["source"] for one in row["sources"]
    }
    assert "augmentation" not in {one["source"] for one in row["sources"] if one["bytes"] > 0.1 * row["bytes_per_chip"]}
    assert 0.99 < row["flops_over_ideal"] < 1.3
    assert {one["kind"] for one in row["collectives"]} <= {"all-reduce", "all-gather"}
    assert (tmp_path / "step.hlo").read_text().startswith("HloModule")
    again = gpu_plan.plan(config, Machine.parse("h100:2"), **options)
    assert again == row
    assert [line.startswith("Using the stored compilation") for line in said] == [False, False, False, True]
    gpu_plan.print_report(reporting.report("gpu_plan", [row], {}))
