"""Weights for others: a folder for timm and the hub, and a program that needs only JAX."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import ifm_jax
from ifm_jax.config import Config
from ifm_jax.errors import RunError, UsageError
from ifm_jax.runs import exporting
from ifm_jax.torch_interop import timm_folder, writing
from tests import small

SIZE = 64


def write_run(directory, arch="resnet18", **model):
    """Writes the workdir of a run of this architecture, 12 steps old."""
    config = Config()
    config.model.arch, config.data.image_size, config.data.source = arch, SIZE, "folder:/home/someone/cats"
    config.moco.queue_size, config.moco.dim, config.batch_size, config.ifm.epsilon = 24, 8, 12, 0.05
    for name, value in model.items():
        setattr(config.model, name, value)
    small.write_run(directory, config, step=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ResNet-18, evaluated; and one of ResNet-8, for which timm has no architecture."""
    root = tmp_path_factory.mktemp("weights")
    write_run(root / "run")
    write_run(root / "small", "resnet8", stem="small_stride2", width=4)
    results = {
        "knn": {"step": 12, "source": "folder:/home/someone/cats", "kind": {"top1": 51.25, "k": 20, "top5": 90.0}},
        "linear_fast": {
            "step": 8,
            "source": "folder:/home/someone/cats",
            "kind": {"top1": 99.0},
        },  # of an earlier state
    }
    (root / "run" / "results.json").write_text(json.dumps(results))
    return root


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((3, SIZE, SIZE, 3), np.float32)


@pytest.fixture(scope="module")
def timm():
    from references import torchvision_peer  # noqa: F401 (first: timm imports torchvision)

    return importlib.import_module("timm")


@pytest.fixture(scope="module")
def folder(run, timm):
    """The run as a folder for timm."""
    _, check = timm_folder.write(run / "run", run / "folder")
    assert check.difference < 1e-5
    return run / "folder"


def features(model, images):
    return np.asarray(nnx.jit(lambda model, x: model(x))(model, jnp.asarray(images)))


@pytest.mark.torch
@pytest.mark.slow
def test_timm_loads_the_folder_and_has_the_same_features(run, folder, images, timm, tmp_path):
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    ours = features(ifm_jax.load(run / "run"), images)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    # What timm takes from config.json.
    assert (model.num_classes, model.num_features) == (0, 512)
    data = timm.data.resolve_data_config(model=model)
    assert [list(data[name]) for name in ("input_size", "mean", "std")] == [
        [3, SIZE, SIZE],
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
    ]
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bilinear")
    # We read it too, and a file of the same tensors.
    np.testing.assert_array_equal(features(ifm_jax.load(folder), images), ours)
    writing.to_torch(run / "run", tmp_path / "x.safetensors", "timm")
    writing.to_torch(run / "run", tmp_path / "y.safetensors", "torchvision")
    written = [load_file(tmp_path / name) for name in ("x.safetensors", "y.safetensors")]
    jax.tree.map(np.testing.assert_array_equal, *written)
    # A classifier, asked for, is new.
    with_classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert torch.equal(with_classifier.conv1.weight, model.conv1.weight)


@pytest.mark.torch
def test_card(folder):
    card = (folder / "README.md").read_text()
    for part in (
        "library_name: timm",
        "IFM (epsilon = 0.05) on MoCo-v2 (T = 0.2)",
        "12 steps of 12 images",
        "`ifm.epsilon` | `0.05`",
        "`folder:cats`, without labels",
        "| kind | 51.25 | k 20, top5 90, images folder:cats |",
        "timm 1.",
    ):
        assert part in card, part
    assert "99.00" not in card
    everything = card + (folder / "config.json").read_text()
    assert "/home" not in everything
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.torch
@pytest.mark.slow
def test_the_command_uploads_and_the_hub_is_read(run, folder, images, in_process, monkeypatch, tmp_path):
    calls = []

    class Api:
        def create_repo(self, repo, private, exist_ok):
            calls.append(("create", repo, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            found = sorted(path.name for path in pathlib.Path(folder_path).iterdir())
            calls.append(("upload", repo_id, found, allow_patterns))
            return f"there/{repo_id}"

    def snapshot_download(repo, revision, allow_patterns):
        calls.append(("download", repo, revision))
        if repo == "me/none":
            raise ConnectionError("no network")
        return str(folder)

    fake = types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setattr(timm_folder, "compare", lambda folder, size: (_ for _ in ()).throw(ImportError("No timm")))
    command = ["convert_checkpoints.py", "to-torch", run / "run", "out-0.1", "--for=timm", "--push=me/net"]
    status, said, wrong = in_process(*command, "--private")
    assert status == 0, wrong
    assert "there/me/net" in said
    assert "timm cannot be imported (No timm)" in wrong
    assert calls[0] == ("create", "me/net", True, True)
    assert calls[1][:3] == ("upload", "me/net", ["README.md", "config.json", "model.safetensors"])
    assert "has not been compared" in (tmp_path / "out-0.1" / "README.md").read_text()

    ours = features(ifm_jax.load(run / "run"), images)
    np.testing.assert_array_equal(features(ifm_jax.load("hf://me/net@main"), images), ours)
    assert calls[2] == ("download", "me/net", "main")
    with pytest.raises(RunError, match=r"hf://me/none could not be fetched.*no network"):
        ifm_jax.load("hf://me/none")
    with pytest.raises(UsageError, match="hf://net: expected USER/REPO"):
        ifm_jax.load("hf://net")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small", "out", "--for=timm"], "timm has no architecture for resnet8, stem small_stride2, width 4"),
        (["run", "run", "--for=timm", "--overwrite"], "is the workdir of a run and is not overwritten"),
        (["run", "other", "--for=timm", "--overwrite"], "is not timm's and is not overwritten"),
        (["run", "other", "--for=timm"], "already has config.json: name another folder, or pass --overwrite"),
        (["run", "out", "--for=timm", "--push=net"], "--push=net: expected USER/REPO"),
        (["run", "out.pth", "--push=me/net"], "--push=me/net uploads a folder"),
    ],
)
def test_mistakes_write_nothing(run, in_process, monkeypatch, arguments, message):
    (run / "other").mkdir(exist_ok=True)
    (run / "other" / "config.json").write_text("{}")
    monkeypatch.chdir(run)
    before = {path.name for path in run.rglob("*")}
    status, _, said = in_process("convert_checkpoints.py", "to-torch", *arguments)
    assert status == 2, said
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert {path.name for path in run.rglob("*")} == before


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub"):
        ifm_jax.load("hf://me/net")


ALONE = """
import json, pathlib, sys
sys.modules |= dict.fromkeys(["ifm_jax", "flax"])  # importing them is an error
import jax, jax.export, numpy as np
program = jax.export.deserialize(bytearray(pathlib.Path("encoder.jax").read_bytes()))
for name in ("one", "three"):
    np.save(f"{name}.found.npy", program.call(np.load(f"{name}.npy")))
print(json.dumps(program.platforms))
"""


@pytest.mark.slow
def test_exported_program_runs_without_this_package(run, images, in_process, tmp_path):
    status, said, wrong = in_process("convert_checkpoints.py", "export", run / "small", "encoder.jax")
    assert status == 0, wrong
    assert "N x 64 x 64 x 3" in said
    for name, count in (("one", 1), ("three", 3)):
        np.save(tmp_path / f"{name}.npy", images[:count])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["cpu", "cuda", "tpu"]
    ours = features(ifm_jax.load(run / "small"), images)
    for name, count in (("one", 1), ("three", 3)):
        found = np.load(tmp_path / f"{name}.found.npy")
        np.testing.assert_allclose(found, ours[:count], rtol=0, atol=1e-6 * np.abs(ours).max())
    described = json.loads((tmp_path / "encoder.jax.json").read_text())
    assert described["input"]["shape"] == ["N", 64, 64, 3]
    assert described["preprocessing"]["mean"] == [0.485, 0.456, 0.406]


def test_export_of_a_fixed_batch_and_mistakes(run, tmp_path, in_process):
    _, described = exporting.export(run / "small", tmp_path / "a", batch=2, platforms=("cpu",), image_size=32)
    assert described["input"]["shape"] == [2, 32, 32, 3]
    for arguments, message in (
        ([run / "small", "a"], "already exists"),
        ([run / "small", "b", "--batch=0"], "--batch=0: expected a whole number of at least 1, or polymorphic"),
        ([run / "small", "b", "--platforms=cpu,gpu"], "'gpu' is not one of cpu, cuda, rocm, tpu"),
    ):
        status, _, said = in_process("convert_checkpoints.py", "export", *arguments)
        assert (status, message in said) == (2, True), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.json"]
