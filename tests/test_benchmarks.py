"""The benchmarks run, at sizes that say nothing about speed, and report what others rely on."""

import json

import cv2
import jax
import pytest

from benchmarks import input as input_benchmark
from benchmarks import reporting
from ifm_jax.errors import UsageError


@pytest.mark.slow
@pytest.mark.torch
def test_input(tmp_path, capsys):
    network = input_benchmark.Network("resnet8", "small_stride2", 32, 16, queue_size=64, width=4)
    jpeg, decoded = (input_benchmark.Case("ifm_jax", images, "crops", 32) for images in ("JPEG", "decoded"))
    peer = input_benchmark.Case("torchvision", "JPEG", "MoCo-v2", 32)
    settings = input_benchmark.Settings(
        images=40,
        cases=(jpeg, decoded, peer),
        size=32,
        batch_size=8,
        decoded=8,
        rounds=1,
        seconds=0.0,
        networks=(network,),
        run=network,
        steps=15,
    )
    made = input_benchmark.benchmark(tmp_path / "data", settings, say=lambda line: None)
    input_benchmark.print_report(made)
    assert "torchvision" in capsys.readouterr().out
    reporting.write(made, tmp_path / "input.json")
    made = json.loads((tmp_path / "input.json").read_text())
    assert made.keys() == {"benchmark", "date", "device", "versions", "results", "summary"}
    assert made["versions"]["jax"] == jax.__version__
    files, memory, *pipelines, device, run = made["results"]
    assert files["images"] == 40
    assert [row["pipeline"] for row in pipelines] == ["ifm_jax", "ifm_jax", "torchvision"]
    for row in pipelines:
        assert row["images_per_cpu_second"] > 0
    summary = made["summary"]
    assert summary["vs_torchvision_per_core"] == (
        pipelines[0]["images_per_cpu_second"] / pipelines[2]["images_per_cpu_second"]
    )
    assert summary["vs_torchvision_crops"] is None  # not among these
    assert summary["device_share"] == device["share"] > 0
    assert run["steps"] == 5
    assert 0 <= summary["data_wait_share"] == run["data_wait"] <= 1
    assert summary["memory_growth_bytes"] == memory["growth_bytes"]


def test_generated_images_are_as_large_as_imagenets(tmp_path):
    input_benchmark.generate(tmp_path, 30)
    files = input_benchmark.files(tmp_path)
    assert len(files) == 30
    assert cv2.imread(str(files[0])).shape == (375, 500, 3)
    assert 90e3 < sum(path.stat().st_size for path in files) / 30 < 130e3


def test_a_report_that_cannot_be_written(tmp_path):
    reporting.check_path(str(tmp_path / "x.json"))
    for path in (tmp_path, tmp_path / "missing" / "x.json"):
        with pytest.raises(UsageError, match=r"--json=.* cannot be written: expected a file in an existing"):
            reporting.check_path(str(path))
