"""The step's cost by size, and the page that is written of all benchmarks: at sizes that say nothing about speed."""

import json
import os
import platform

import jax
import numpy as np
import pytest

from benchmarks import report, reporting, scaling, train_step
from benchmarks.train_step import Case
from ifm_jax.errors import UsageError
from ifm_jax.models import resnet
from tests.conftest import ROOT


@pytest.fixture(scope="module", autouse=True)
def one_block():
    """A network that compiles in less time than the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.ARCHITECTURES, "resnet8", resnet.Architecture(False, (1,), width=16))
        yield


@pytest.fixture(scope="module")
def made():
    base = Case("resnet8", 16, 8, "small_stride2", queue_size=64)
    sizes = scaling.Sizes(base, batch=(8, 16), pixels=(16,), queue=(64,), devices=(1, 2))
    rows = scaling.measure(sizes, scaling.AXES, rounds=2, say=lambda line: None)
    rows += scaling.over_devices(sizes, rounds=2, say=lambda line: None)
    return reporting.report("scaling", rows, {"base": str(base)} | scaling.summarize(rows))


@pytest.mark.slow
def test_a_row_for_each_size(made):
    rows = {(row["axis"], row["value"]): row for row in made["results"]}
    assert list(rows) == [("batch", 8), ("batch", 16), ("pixels", 16), ("queue", 64), ("devices", 1), ("devices", 2)]
    small, large = rows["batch", 8], rows["batch", 16]
    assert small["ms"] == rows["pixels", 16]["ms"] == rows["queue", 64]["ms"]  # the base, measured once
    assert len(small["times"]) == 2
    assert small["images_per_sec"] == pytest.approx(8e3 / small["ms"])
    for field in ("flops", "bytes accessed", "bytes"):
        assert 0 < small[field] < large[field] < 2.1 * small[field]
    of_batch = made["summary"]["axes"]["batch"]
    assert (of_batch["from"], of_batch["to"]) == (8, 16)
    assert of_batch["flops_per_doubling"] == pytest.approx(large["flops"] / small["flops"])
    assert "flops_exponent" not in made["summary"]["axes"]["queue"]  # of one size


@pytest.mark.slow
def test_what_two_devices_do_and_exchange(made):
    """Images before augmentation and keys gathered, the gradient reduced; half the work; no times."""
    alone, shared = (row for row in made["results"] if row["axis"] == "devices")
    assert alone["collectives"] == []
    assert alone["simulated"]
    assert "ms" not in alone | shared
    found = {(one["kind"], one["dtype"]): (one["count"], one["bytes"]) for one in shared["collectives"]}
    assert found["all-gather", "u8"] == (1, 8 * 16 * 16 * 3)
    assert found["all-gather", "f32"] == (1, 8 * train_step.DIM * 4)
    assert ("all-gather", "s32") not in found
    case = Case("resnet8", 16, 8, "small_stride2", queue_size=64)
    step = train_step.make_step(case, "ifm")
    state = jax.eval_shape(lambda: train_step.make_state(case, step))
    parameters = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    assert parameters <= found["all-reduce", "f32"][1] < 1.1 * parameters
    assert 1 <= made["summary"]["flops_over_ideal"] < 1.5  # each updates all parameters
    assert "all-gather" in scaling.exchanged(shared)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True])
def test_pytorch_takes_the_same_views(best, monkeypatch):
    """The step that ours is compared with runs, on view 0 as queries and view 1 as keys."""
    import torch

    from references import moco_step

    case, taken = Case("resnet8", 16, 8, "small_stride2", queue_size=64), []
    own = moco_step.Step.__call__
    monkeypatch.setattr(moco_step.Step, "__call__", lambda self, *views: taken.append(views) or own(self, *views))
    run, found = train_step._torchs(case, best)
    run()
    assert found["compile s"] > 0
    images = train_step.views(case)["views"]
    for views in taken:
        for number, view in enumerate(views):
            np.testing.assert_array_equal(view.numpy(), images[:, number].transpose(0, 3, 1, 2))
            assert view.is_contiguous(memory_format=torch.channels_last if best else torch.contiguous_format)
    assert len(taken) == 2


XEON = "model name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
EPYC = "flags\t\t: fpu avx2\nmodel name\t: AMD EPYC 7B13\n"


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (XEON, ", Intel Xeon @ 2.20GHz, AVX-512, bfloat16"),
        (EPYC, ", AMD EPYC 7B13, AVX2, no bfloat16"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", ""),
        ("", ""),
    ],
)
def test_a_report_names_the_processor(described, expected):
    assert reporting.processor(described) == platform.machine() + expected
    found = reporting.device()
    assert f"({reporting.processor()})" in found
    assert report.folder_of(found) == f"cpu-{os.cpu_count()}"


def test_exponents():
    assert scaling.exponent([1, 2, 8], [3, 12, 192]) == pytest.approx(2)


@pytest.mark.slow
def test_the_page(made, tmp_path, monkeypatch):
    """Tables of what there is, what there is not, pictures; the prose stays."""
    loss = {"queries": 256, "keys": 4096, "MoCo ms": 2.0, "IFM ms": 2.5, "IFM / MoCo": 1.25}
    torch_row = {"case": "c", "variant": "PyTorch, bfloat16", "ms": 9.0, "quartiles": [8, 9], "images_per_sec": 7.0}
    step = {"case": "c", "variant": "ifm_jax, IFM", "ms": 1234.5, "quartiles": [1, 2], "times": [1.0], "bytes": 2**20}
    step |= {"images_per_sec": 10.0}
    ratios = {"cases": {"c": {"ifm_over_moco": 1.0, "vs_torch_original": 0.5, "vs_torch_best": 0.75}}}
    gpu = reporting.report("train_step", [step, torch_row, {"case": "c", "loss ms": 3.0}], ratios)
    gpu["device"] = "2 x NVIDIA H200, 16 processors (x86_64)"
    other = reporting.report("something", [], {"answer": 42.0})
    monkeypatch.setitem(made, "device", "1 x cpu, 2 processors (x86_64)")
    for each in (loss_report := reporting.report("loss", [loss], {}), other):
        each["device"] = made["device"]
    kept = tmp_path / "benchmarks"
    paths = [report.keep(each, kept) for each in (made, gpu, loss_report, other)]
    assert [path.parent.name for path in paths] == ["cpu-2", "nvidia-h200-2", "cpu-2", "cpu-2"]
    stored = [report.read(path) for path in paths]
    assert "times" not in paths[0].read_text() + paths[1].read_text()
    text = report.generate(stored, tmp_path)
    assert "No TPU was available" in text
    assert text.index("### 2 x NVIDIA H200") < text.index("### 1 x cpu")
    assert "Not measured on this machine: loss, scaling, loop, input, evaluation." in text
    assert "Not measured on this machine: train_step, loop, input, evaluation." in text
    assert "| 256 | 4,096 | 2.00 | 2.50 | 1.25 |" in text
    assert "| c | ifm_jax, IFM | 1,234.5 | 1.0 to 2.0 | 10 | 1 |" in text
    assert "| c | 1.000 | 0.50 | 0.75 | 0.50 |" in text  # the slower ratio is that over the faster peer
    assert "they say nothing of time" in text
    assert "| `answer` | 42 |" in text
    assert "Not measured, since not installed: torch." in text
    for picture in ("loss_cpu-2", "train_step_nvidia-h200-2", "scaling_cpu-2"):
        assert f"(images/benchmark_{picture}.png)" in text
        assert (tmp_path / "images" / f"benchmark_{picture}.png").stat().st_size > 1000
    assert "No GPU or TPU was available" in report.generate(stored[:1], tmp_path)
    assert report.generate([], tmp_path) == "Nothing has been measured yet.\n"

    page = f"# Prose\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    path = tmp_path / "benchmarks.md"
    replaced = report.replace_generated(page, text, path)
    assert replaced.startswith("# Prose\n\nbefore\n\n" + report.BEGIN)
    assert replaced.endswith(report.END + "\n\nafter\n")
    assert "old" not in replaced
    assert report.replace_generated(replaced, text, path) == replaced
    for broken in ("no markers", report.END + report.BEGIN, page + page):
        with pytest.raises(UsageError, match=r"benchmarks\.md: expected one line '<!-- begin"):
            report.replace_generated(broken, text, path)
    scaling.print_report(made)


def test_what_is_no_report(tmp_path):
    path = tmp_path / "x.json"
    for text in ("{", "[]", json.dumps({"benchmark": "loss"})):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"x\.json .*expected"):
            report.read(path)


@pytest.mark.parametrize(
    ("module", "flag", "message"),
    [
        ("scaling", "--axes=depth", "--axes=depth: expected some of batch, pixels, queue, devices"),
        ("report", "--only=speed", "--only=speed: expected some of loss, train_step"),
        ("report", "--from=missing", "--from=missing: no JSON files"),
    ],
)
def test_mistakes_are_said_in_one_line(in_process, monkeypatch, module, flag, message):
    monkeypatch.chdir(ROOT)
    status, _, said = in_process(f"benchmarks/{module}.py", flag)
    assert status == 2, said
    assert said.count("\n") == 1
    assert message in said
