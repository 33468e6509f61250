"""Conversion of checkpoints: names and shapes, bit-exact round trips, features, and what is refused."""

import dataclasses
import os
import pathlib
import pickle
import re
import stat
import subprocess
import sys
import tarfile
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from ifm_jax import models, optim, pretrain
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import pretrained
from ifm_jax.methods import MoCo, Objective
from ifm_jax.models import Encoder
from ifm_jax.runs import checkpoint, loading, snapshot, training
from ifm_jax.runs.snapshot import Snapshot
from ifm_jax.torch_interop import names, reading, writing
from ifm_jax.torch_interop.description import describe
from references.moco import Reference, ReferenceMoCo, resnet
from references.torchvision_peer import torchvision
from tests import small

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = next(iter(models.ARCHITECTURES))  # the one that torchvision does not have
TORCHVISION = list(models.ARCHITECTURES)[1:]

pytestmark = pytest.mark.torch


NARROW = 8  # channels of the first stage, instead of 64


def moco_file(path, *, arch="resnet18", width=NARROW, mlp=True, dtype=torch.float32, steps=3, **options):
    """Writes a checkpoint of the original's layout after `steps` updates with random gradients; returns its content."""
    reference = Reference(arch, dim=16, width=width, queue_size=32, mlp=mlp, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in reference.model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(steps)
        elif "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    reference.model.queue_ptr[0] = 24
    for _ in range(steps):
        for parameter in reference.model.encoder_q.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        reference.optimizer.step()
    reference.save_checkpoint(path, epoch=1)
    content = torch.load(path, weights_only=True)
    torch.save(content, path, **options)
    return content


def tensors_of(content, prefix=""):
    """All tensors of a checkpoint's nested dicts, by path."""
    found = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= tensors_of(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
    return found


def assert_same_tensors(actual, expected):
    actual, expected = tensors_of(actual), tensors_of(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# --- The table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", TORCHVISION)
def test_table_has_torchvisions_names_shapes_and_order(arch):
    with torch.device("meta"):
        network = torchvision.models.get_model(arch, num_classes=7)
    config = Config()
    config.model.arch, config.moco.dim, config.moco.mlp = arch, 7, False
    table = names.encoder_table(config)
    found = {entry.torch: entry.shape for entry in table}
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == {name: shape for name, shape in expected.items() if "num_batches" not in name}
    parameters = [entry.torch for entry in table if entry.collection == "params"]
    assert parameters == [name for name, _ in network.named_parameters()]


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        (SMALL, {"stem": "small_stride2"}),
        ("resnet18", {"stem": "small", "width": 16}),
        ("resnext50_32x4d", {"mlp": False}),
    ],
)
def test_table_has_our_names_and_shapes(arch, options):
    encoder = Encoder(arch, dim=7, **options)
    expected = jax.eval_shape(encoder.init, jax.random.key(0))
    config = Config()
    config.model.arch, config.model.stem = arch, encoder.stem
    config.model.width, config.moco.dim, config.moco.mlp = encoder.width, 7, encoder.head == "mlp"
    found = {"params": {}, "batch_stats": {}}
    for entry in names.encoder_table(config):
        shape = names.to_jax_layout(np.empty(entry.shape), entry.kind).shape
        names.set_(found[entry.collection], entry.path, shape)
    assert found == {name: jax.tree.map(lambda x: x.shape, tree) for name, tree in zip(found, expected, strict=True)}


# --- Round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "mlp", "dtype", "legacy"),
    [(64, True, torch.float32, False), (NARROW, False, torch.float64, False), (NARROW, True, torch.float32, True)],
)
def test_torch_to_jax_to_torch_is_bit_exact(width, mlp, dtype, legacy, tmp_path):
    options = {"_use_new_zipfile_serialization": False} if legacy else {}
    content = moco_file(tmp_path / "a.pth.tar", width=width, mlp=mlp, dtype=dtype, **options)
    found = reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run")
    assert (int(found.state.step), found.epoch, found.missing, found.notes) == (3, 1, [], ())
    writing.to_torch(tmp_path / "run", tmp_path / "b.pth.tar")
    back = torch.load(tmp_path / "b.pth.tar", weights_only=True)

    assert_same_tensors(back, content)
    assert list(back["state_dict"]) == list(content["state_dict"])
    assert (back["epoch"], back["arch"]) == (1, "resnet18")
    group, expected = back["optimizer"]["param_groups"][0], content["optimizer"]["param_groups"][0]
    assert {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "dampening", "params")} == {
        name: expected[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "dampening", "params")
    }
    # As the original loads it: strictly, module and optimizer.
    model = torch.nn.DataParallel(ReferenceMoCo("resnet18", 16, 32, mlp, width))
    model.load_state_dict(back["state_dict"], strict=True)
    torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).load_state_dict(back["optimizer"])
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth.tar", "b.pth.tar", "run"}


def random_state(encoder, optimizer, queue_size):
    """A training state with nothing at its starting value."""
    abstract = jax.eval_shape(
        lambda: pretrain.create(jax.random.key(0), MoCo(encoder, Objective(), queue_size), optimizer)
    )
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), abstract)
    return values._replace(step=np.int32(12), memory=values.memory._replace(queue_ptr=np.int32(8)))


@pytest.mark.parametrize(
    ("arch", "options"),
    [("resnet18", {}), ("resnet18", {"mlp": False, "width": NARROW}), (SMALL, {"stem": "small_stride2"})],
)
def test_jax_to_torch_to_jax_is_bit_exact(arch, options, tmp_path):
    optimizer = optim.sgd()
    encoder = Encoder(arch, dim=16, **options)
    saved = random_state(encoder, optimizer, 24)
    config = Config()
    config.model.arch, config.model.stem, config.model.width = arch, encoder.stem, encoder.width or 0
    config.moco.dim, config.moco.queue_size, config.moco.mlp = 16, 24, encoder.head == "mlp"
    snapshot.write(Snapshot(config, saved), tmp_path / "run")
    notes = writing.to_torch(tmp_path / "run", tmp_path / "a.pth.tar", epoch=3).notes
    assert bool(notes) == (arch == SMALL or "width" in options)  # which torchvision does not have
    again = reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "again", config=config)
    assert (again.epoch, again.steps_per_epoch) == (3, 4)

    # As a run is resumed.
    like = jax.eval_shape(lambda: pretrain.create(jax.random.key(0), MoCo(encoder, Objective(), 24), optimizer))
    restored = checkpoint.newest_whole(tmp_path / "again" / "checkpoints", like)[0].state
    assert restored.step == 12
    assert_same_tree(restored, saved)


def test_no_momentum_yet_stays_so(tmp_path):
    moco_file(tmp_path / "a.pth.tar", steps=0)
    found = reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run")
    assert not any(leaf.any() for leaf in jax.tree.leaves(found.state.opt_state))
    writing.to_torch(tmp_path / "run", tmp_path / "b.pth.tar")
    assert torch.load(tmp_path / "b.pth.tar", weights_only=True)["optimizer"]["state"] == {}


def test_momentum_that_is_not_there_is_not_listed(tmp_path):
    for steps, listed in ((0, False), (3, True)):
        moco_file(tmp_path / "a.pth.tar", steps=steps)
        rows = describe(loading.read(tmp_path / "a.pth.tar"))
        assert ("momentum buffers" in rows["parts"]) == listed
        notes = writing.to_torch(tmp_path / "a.pth.tar", tmp_path / "b.safetensors", overwrite=True).notes
        assert any("momentum buffers" in note for note in notes) == listed


def test_counters_move_with_the_steps(tmp_path):
    moco_file(tmp_path / "a.pth.tar", steps=3)
    found = loading.read(tmp_path / "a.pth.tar")
    later = dataclasses.replace(found, state=found.state._replace(step=np.int32(10)))
    counters = {name: value for name, value in writing.state_dict(later) if name.endswith("tracked")}
    assert len(counters) == 40
    assert set(map(int, counters.values())) == {10}
    assert later.epoch == 3  # three steps were an epoch


def test_state_of_another_optimizer_is_left_out(tmp_path):
    config = Config()
    config.model.arch, config.optim.name, config.moco.dim, config.moco.queue_size = "resnet18", "adamw", 16, 24
    config.model.width = NARROW
    saved = random_state(Encoder("resnet18", dim=16, width=NARROW), optim.adamw(), 24)
    snapshot.write(Snapshot(config, saved), tmp_path / "run")
    notes = writing.to_torch(tmp_path / "run", tmp_path / "a.pth.tar").notes
    assert any("adamw" in note for note in notes)
    assert any("epoch" in note for note in notes)
    assert torch.load(tmp_path / "a.pth.tar", weights_only=True)["optimizer"]["state"] == {}


# --- Stripped files, torchvision, load -------------------------------------------------------------------------------


def with_statistics(network, seed=0):
    """Gives a network running statistics and scales that are not those it starts with."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator) + (tensor is module.weight.data))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return network.eval()


def features_of(network, images):
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        return network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize("arch", ["resnet18", "resnet101", "resnext101_32x8d"])
def test_features_equal_torchvisions(arch, one_thread, tmp_path):
    """At full width; test_models.py has every architecture, and training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = with_statistics(torchvision.models.get_model(arch, num_classes=10))
    torch.save(network.state_dict(), tmp_path / "network.pth")
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
    expected = features_of(network.double(), images)
    if arch == "resnet18":
        found = loading.load(tmp_path / "network.pth")(jnp.asarray(images, jnp.float32))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with jax.enable_x64(True):
        ours = loading.load(tmp_path / "network.pth", dtype="float64")
        graphdef, values = nnx.split(ours)

        def call(values, images):
            return nnx.merge(graphdef, values)(images)

        # Optimized: what the library lacks in float64 is a plain loop.
        compiled = jax.jit(call, compiler_options={"xla_backend_optimization_level": 1})
        found = compiled(values, jnp.asarray(images, jnp.float64))
    assert found.shape == (2, expected.shape[1])
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    print(f"{arch}: {error:.0e}")
    assert error <= 1e-10


def test_load_reads_every_kind_alike(tmp_path):
    content = moco_file(tmp_path / "a.pth.tar")
    reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run")
    stripped = {name: value for name, value in content["state_dict"].items() if "encoder_q" in name}
    torch.save({"state_dict": stripped}, tmp_path / "stripped.pth.tar")
    writing.to_torch(tmp_path / "run", tmp_path / "backbone.pth", "torchvision")
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32, 3)), jnp.float32)
    first, *others = (
        np.asarray(loading.load(tmp_path / name)(images))
        for name in ("a.pth.tar", "run", "run/checkpoints/3", "stripped.pth.tar", "backbone.pth")
    )
    assert first.shape == (1, 8 * NARROW)
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbone_loads_strictly_into_torchvisions_network(suffix, tmp_path):
    content = moco_file(tmp_path / "a.pth.tar", width=64)
    writing.to_torch(tmp_path / "a.pth.tar", tmp_path / f"backbone{suffix}", "torchvision")
    path = tmp_path / f"backbone{suffix}"
    tensors = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(tensors, strict=True)
    expected = {n.removeprefix("module.encoder_q."): v for n, v in content["state_dict"].items() if "encoder_q" in n}
    assert_same_tensors(tensors, {name: value for name, value in expected.items() if not name.startswith("fc.")})


def test_torchvision_round_trip_keeps_the_classifier(tmp_path):
    network = with_statistics(torchvision.models.resnet18(num_classes=10))
    torch.save(network.state_dict(), tmp_path / "a.pth")
    found = reading.to_jax(tmp_path / "a.pth", tmp_path / "run")
    assert found.missing == ["key encoder", "queue", "optimizer state"]
    writing.to_torch(tmp_path / "run", tmp_path / "b.pth", "torchvision")
    assert_same_tensors(torch.load(tmp_path / "b.pth", weights_only=True), network.state_dict())


@pytest.mark.parametrize("head", [True, False])
def test_stripped_checkpoint_round_trip(head, tmp_path):
    content = moco_file(tmp_path / "a.pth.tar")
    kept = {n: v for n, v in content["state_dict"].items() if "encoder_q" in n and (head or ".fc." not in n)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": kept}, tmp_path / "stripped.pth.tar")
    found = reading.to_jax(tmp_path / "stripped.pth.tar", tmp_path / "run")
    assert ("projection head" in found.missing) == (not head)
    notes = writing.to_torch(tmp_path / "run", tmp_path / "b.pth.tar").notes
    assert any("linear evaluation" in note for note in notes)
    back = torch.load(tmp_path / "b.pth.tar", weights_only=True)
    assert_same_tensors(back["state_dict"], kept)
    assert back["epoch"] == 200


# --- Other libraries' checkpoints ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    """A network, its state dict without the classifier, images, and their features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = with_statistics(resnet("resnet18", 10, NARROW))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    features = features_of(network, images)
    return network, dict(network.state_dict()), images, features


def under(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def numbered(network):
    """As lightly's examples have it: no names but the places of the children."""
    return dict(torch.nn.Sequential(*list(network.children())[:-1]).state_dict())


HEAD = {"projector.0.weight": torch.zeros(3, 3), "predictor.0.weight": torch.zeros(3, 3)}
ASIDE = r"'backbone\.' was read; ignored: predictor, projector$"


@pytest.mark.parametrize(
    ("make", "prefix", "note"),  # from the state dict or the network: a file, how it is read, what is said
    [
        # solo-learn's, as lightning saves it
        (lambda t, n: {"epoch": 9, "state_dict": under("backbone.", t) | HEAD}, "", ASIDE),
        (lambda t, n: {"epoch": 9, "state_dict": under("backbone.", t) | HEAD}, "backbone.", ASIDE),
        (lambda t, n: {"epoch": 9, "state_dict": under("backbone.", t) | HEAD}, "backbone", ASIDE),
        (lambda t, n: {"model": under("module.backbone.", t) | HEAD}, "module.backbone.", ASIDE),
        (lambda t, n: {"state_dict": under("module.backbone.", t) | HEAD}, "", ASIDE),
        # lightly's
        (lambda t, n: {"state_dict": under("backbone.", numbered(n)) | HEAD}, "", ASIDE),
        (lambda t, n: {"state_dict": under("backbone.", numbered(n)) | HEAD}, "backbone.", ASIDE),
        (lambda t, n: numbered(n), "", None),
        (lambda t, n: under("encoder.", t), "", r"begin with 'encoder\.' was read$"),
        (lambda t, n: under("encoder.", t), "encoder.", None),
        (lambda t, n: {"model": under("model.", t)}, "model.", None),
        (lambda t, n: {"model": t}, "", None),
        (lambda t, n: {"backbone": t}, "", None),
        (lambda t, n: {"state_dict": t, "model": t}, "", "entry 'state_dict' was read; ignored: model"),
        # two networks, of which one has a usual name
        (
            lambda t, n: under("backbone.", t) | under("momentum_backbone.", random_like(t)),
            "",
            r"ignored: momentum_backbone \(--prefix=momentum_backbone\. reads",
        ),
        (lambda t, n: under("student.", random_like(t)) | under("teacher.", t), "teacher.", "ignored: student"),
        (lambda t, n: under("model.encoder_q.", t) | {"model.queue_ptr": torch.zeros(1)}, "model.encoder_q.", "model"),
    ],
)
def test_another_librarys_checkpoint(make, prefix, note, backbone, tmp_path):
    network, tensors, images, features = backbone
    torch.save(make(tensors, network), tmp_path / "a.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = loading.load(tmp_path / "a.ckpt", prefix=prefix)
    notes = [str(warning.message) for warning in caught]
    assert len(notes) == (note is not None), notes
    if note:
        assert re.search(note, notes[0]), notes
    np.testing.assert_allclose(model(jnp.asarray(images)), features, rtol=0, atol=1e-4 * np.abs(features).max())


def random_like(tensors):
    return {name: torch.rand(value.shape) for name, value in tensors.items()}


def test_a_whole_moco_under_a_prefix(tmp_path):
    content = moco_file(tmp_path / "a.pth.tar", mlp=False)
    inner = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    torch.save(content | {"state_dict": under("model.", inner) | HEAD}, tmp_path / "b.pth.tar")
    expected, found = (
        loading.read(tmp_path / "a.pth.tar"),
        loading.read(tmp_path / "b.pth.tar", prefix="model."),
    )
    assert found.missing == []
    assert_same_tree(found.state, expected.state)


def test_networks_of_which_one_is_to_be_named(backbone, tmp_path):
    tensors = backbone[1]
    torch.save(under("student.", tensors) | under("teacher.", tensors), tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"2 networks.*begin with 'student\.', 'teacher\.': choose one with --prefix="):
        loading.read(tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"--prefix=net: no tensor .*: expected one of 'student\.', 'teacher\.'"):
        reading.to_jax(tmp_path / "a.pth", tmp_path / "run", prefix="net")
    with pytest.raises(UsageError, match=r"is a directory: a prefix applies to PyTorch files only"):
        loading.read(tmp_path, prefix="student.")
    assert pretrained.load(tmp_path / "a.pth", None, "student.").config.model.arch == "resnet18"
    with pytest.warns(UserWarning, match="ignored: teacher"):
        loading.load(tmp_path / "a.pth", prefix="student.")


def test_solo_learns_cifar_stem(tmp_path):
    """Its first convolution pads by two: as ours does images with one more pixel of zeros around."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = with_statistics(resnet("resnet18", 10, NARROW))
        network.conv1 = torch.nn.Conv2d(3, NARROW, kernel_size=3, padding=2, bias=False)
    network.maxpool = torch.nn.Identity()
    torch.save({"state_dict": under("backbone.", network.state_dict())}, tmp_path / "a.ckpt")
    images = np.random.default_rng(0).standard_normal((1, 16, 16, 3)).astype(np.float32)
    features = features_of(network, images)
    with pytest.warns(UserWarning, match="one more pixel of zeros on every side"):
        model = loading.load(tmp_path / "a.ckpt", prefix="backbone.")
    found = model(jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))))
    np.testing.assert_allclose(found, features, rtol=0, atol=1e-4 * np.abs(features).max())


# --- safetensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_types_of_tensors(dtype, suffix, backbone, tmp_path, monkeypatch):
    tensors = {name: v.to(dtype) if v.is_floating_point() else v for name, v in backbone[1].items()}
    if suffix == ".pth":
        torch.save({"state_dict": tensors, "arch": "resnet34"}, tmp_path / "a.pth")
    else:
        save_file(tensors, tmp_path / "a.safetensors", metadata={"arch": "resnet34"})
        monkeypatch.setitem(sys.modules, "torch", None)  # its import fails
    found = loading.read(tmp_path / f"a{suffix}")
    assert "says resnet34" in found.notes[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kernel = found.state.params["layer4"]["1"]["conv2"]["kernel"]
    expected = tensors["layer4.1.conv2.weight"].to(wide).numpy()
    assert kernel.dtype == expected.dtype
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(found.state.batch_stats["bn1"]["var"], tensors["bn1.running_var"].to(wide).numpy())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_written_file_is_anyones_to_read(suffix, backbone, tmp_path):
    torch.save(backbone[1], tmp_path / "a.pth")
    before = os.umask(0o027)
    try:
        writing.to_torch(tmp_path / "a.pth", tmp_path / f"b{suffix}", "torchvision")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"b{suffix}").stat().st_mode) == 0o640


# --- What is said and refused ----------------------------------------------------------------------------------------


class RunsCode:
    """Its pickle makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_contradiction_with_the_config(tmp_path):
    moco_file(tmp_path / "a.pth.tar", width=64)
    config = Config()
    config.moco.dim, config.moco.queue_size = 16, 32
    with pytest.raises(UsageError, match=r"model.arch='resnet50', but the tensors have 'resnet18'"):
        reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run", config=config)
    config.model.arch = "resnet18"
    reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run", config=config)


def test_all_problems_in_one_message(tmp_path):
    content = moco_file(tmp_path / "a.pth.tar", width=64)
    tensors, momentum = content["state_dict"], content["optimizer"]["state"]
    del tensors["module.encoder_q.bn1.running_mean"], tensors["module.queue_ptr"]
    tensors["module.encoder_k.layer2.0.conv1.weight"] = torch.zeros(3, 3)
    tensors["module.encoder_k.fc.0.bias"] = torch.zeros(512, dtype=torch.int64)
    tensors["module.teacher.weight"] = torch.zeros(3)
    tensors["module.encoder_q.layer9.weight"] = torch.zeros(3)
    momentum[0]["momentum_buffer"] = torch.zeros(7)
    del momentum[1]
    torch.save(content, tmp_path / "a.pth.tar")
    with pytest.raises(UsageError) as caught:
        loading.read(tmp_path / "a.pth.tar")
    message = str(caught.value)
    for part in (
        "2 missing: encoder_q.bn1.running_mean, momentum_buffer of encoder_q.bn1.weight",
        "encoder_k.layer2.0.conv1.weight (3, 3), expected (128, 64, 3, 3)",
        "momentum_buffer of encoder_q.conv1.weight (7,), expected (64, 3, 7, 7)",
        "encoder_k.fc.0.bias (int64",
        "queue_ptr (missing",
        "teacher.weight",
        "encoder_q.layer9.weight",
    ):
        assert part in message


def test_arch_that_the_tensors_belie_is_noted(tmp_path):
    content = moco_file(tmp_path / "a.pth.tar")
    torch.save(content | {"arch": "resnet50"}, tmp_path / "a.pth.tar")
    found = loading.read(tmp_path / "a.pth.tar")
    assert found.config.model.arch == "resnet18"
    assert "resnet50" in found.notes[0]


def test_nothing_half_written(tmp_path, monkeypatch):
    moco_file(tmp_path / "a.pth.tar")

    def fail(content, path):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UsageError, match="No space left"):
        writing.to_torch(tmp_path / "a.pth.tar", tmp_path / "b.pth.tar")
    monkeypatch.setattr(checkpoint.Checkpoints, "save", fail_after_mkdir)
    with pytest.raises(UsageError, match="No space left"):
        reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth.tar"]


def fail_after_mkdir(checkpoints, *_):
    (checkpoints.directory / "half").mkdir()
    raise OSError(28, "No space left on device")


def test_overwrite_replaces_runs_and_nothing_else(tmp_path):
    moco_file(tmp_path / "a.pth.tar")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="not the workdir of a run"):
        reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "photos", overwrite=True)
    (tmp_path / "run").mkdir()  # an empty directory is no obstacle
    reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run")
    with pytest.raises(UsageError, match="--overwrite"):
        reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run")
    reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "run", step=5, overwrite=True)
    assert int(loading.read(tmp_path / "run").state.step) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth.tar", "photos", "run"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of every kind that is refused, and a good one."""
    folder = tmp_path_factory.mktemp("files")
    moco_file(folder / "good.pth.tar", arch="resnet18")
    torch.save({"state_dict": {}, "hook": RunsCode(folder / "executed")}, folder / "code.pth.tar")
    (folder / "pickle.pth.tar").write_bytes(pickle.dumps(RunsCode(folder / "executed")))
    whole = (folder / "good.pth.tar").read_bytes()
    (folder / "truncated.pth.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth.tar").write_text("not a checkpoint\n")
    (folder / "empty.pth.tar").write_bytes(b"")
    vgg = {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    torch.save(vgg, folder / "vgg.pth")
    torch.save({"model": vgg}, folder / "nested.pth")
    densenet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "denseblock1.weight": torch.zeros(3)}
    torch.save(densenet, folder / "densenet.pth")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "file").write_text("")
    (folder / "folder.pth.tar").mkdir()
    os.mkfifo(folder / "pipe.pth.tar")
    tensors = dict(resnet("resnet18", 10, NARROW).state_dict())
    save_file(tensors, folder / "good.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:-1])
    (folder / "header.safetensors").write_bytes(whole[:8] + b"[" + whole[9:])
    (folder / "length.safetensors").write_bytes(b"\xff" * 7 + whole[7:])
    (folder / "empty.safetensors").write_bytes(b"")
    save_file(tensors | {"bn1.bias": torch.zeros(NARROW).to(torch.float8_e4m3fn)}, folder / "float8.safetensors")
    for name, content in hostile(tensors).items():
        torch.save(content, folder / f"{name}.pth")
    packed(folder / "zero.pth", folder / "packed.pth")
    # From before PyTorch 1.6, with a storage that is not there.
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    whole = (folder / "legacy.pth").read_bytes()
    (folder / "legacy.pth").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(folder / "tar.pth", "w") as archive:
        archive.add(folder / "zero.pth", "storages")
    return folder


def packed(source, path):
    with zipfile.ZipFile(source) as parts, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in parts.namelist():
            archive.writestr(name, parts.read(name) + bytes(100_000))


def hostile(tensors):
    """State dicts that torch saves and no network has."""

    def changed(name, value):
        return tensors | {name: value}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch gives them up
        quantized = torch.quantize_per_tensor(torch.zeros(NARROW), 1.0, 0, torch.qint8)
    endless = {"conv1.weight": torch.zeros(1)}
    endless["again"] = endless
    bias = torch.zeros(NARROW)
    optimizer = {"param_groups": [{"params": 3, "momentum": "much", "lr": "high"}], "state": [1]}
    query = under("encoder_q.", tensors)
    return {
        "zero": changed("conv1.weight", torch.tensor(1.0)),
        "zero_d": changed("bn1.bias", torch.tensor(1.0)),
        "huge": changed("bn1.bias", torch.zeros(1).expand(10**12)),
        "huge_queue": query | {"queue": torch.zeros(1).expand(10, 10**12), "queue_ptr": torch.zeros(1).long()},
        "sparse": changed("bn1.bias", bias.to_sparse()),
        "quantized": changed("bn1.bias", quantized),
        "complex": changed("bn1.bias", torch.complex(bias, bias).conj()),
        "meta": changed("bn1.bias", bias.to("meta")),
        "keys": tensors | {3: bias},
        "unprintable": changed("bn1.\x1b[31m\nbias", bias),
        "nested_dict": {"state_dict": tensors | {"layer9": {"weight": bias}}},
        "twice": changed("module.conv1.weight", tensors["conv1.weight"]),
        "endless": endless,
        "counter": changed("bn1.num_batches_tracked", torch.tensor(float("nan"))),
        "counter_high": changed("bn1.num_batches_tracked", torch.tensor(2**40)),
        "pointer": query | {"queue": torch.zeros(10, 4), "queue_ptr": torch.tensor([float("nan")])},
        "optimizer": {"arch": ["a list"], "epoch": "one", "state_dict": query, "optimizer": optimizer},
        "list": [bias],
        "number": 3,
    }


def run(folder, *arguments):
    environment = os.environ | {"COLUMNS": "100", "XLA_FLAGS": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "convert_checkpoints.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("code.pth.tar", r"would run code \(posix.mkdir\) and is refused"),
        ("pickle.pth.tar", "not a complete PyTorch checkpoint"),
        ("truncated.pth.tar", "not a complete PyTorch checkpoint"),
        ("text.pth.tar", "not a complete PyTorch checkpoint"),
        ("empty.pth.tar", "not a complete PyTorch checkpoint"),
        ("vgg.pth", r"has no ResNet \(tensors: features.0.weight"),
        ("nested.pth", r"has no ResNet \(tensors: features.0.weight"),
        ("densenet.pth", "1 unexpected: denseblock1.weight"),
        ("folder.pth.tar", "has no checkpoints"),
        ("pipe.pth.tar", "is not a regular file"),
        ("packed.pth", r"is compressed \(\d+ bytes in a file of \d+\)"),
        ("legacy.pth", "not a complete PyTorch checkpoint"),
        ("tar.pth", "not a complete PyTorch checkpoint"),
        ("truncated.safetensors", "not a complete .safetensors"),
        ("header.safetensors", "not a complete .safetensors"),
        ("length.safetensors", "not a complete .safetensors"),
        ("empty.safetensors", "not a complete .safetensors"),
        ("float8.safetensors", r"of a wrong type: bn1.bias \(F8_E4M3, expected floating point"),
        ("zero.pth", r"has no ResNet \(tensors: conv1.weight"),
        ("zero_d.pth", r"mis-shaped: bn1.bias \(\), expected \(8,\)"),
        ("huge.pth", r"bn1.bias \(\(1000000000000,\), more numbers than the file holds"),
        ("huge_queue.pth", r"queue \(\(10, 1000000000000\), more numbers than the file holds"),
        ("sparse.pth", r"bn1.bias \(sparse torch.float32, expected"),
        ("quantized.pth", r"bn1.bias \(quantized torch.qint8, expected"),
        ("complex.pth", r"bn1.bias \(complex64, expected"),
        ("meta.pth", r"bn1.bias \(meta, without values, expected"),
        ("keys.pth", "int 3 in its state dict cannot name a tensor"),
        ("unprintable.pth", r"'bn1\.\\x1b\[31m\\nbias' in its state dict cannot name"),
        ("nested_dict.pth", "layer9 in its state dict is not a tensor"),
        ("twice.pth", r"1 tensors twice, with and without 'module\.' \(module.conv1.weight\)"),
        ("endless.pth", "again in its state dict is not a tensor"),
        ("counter.pth", r"bn1.num_batches_tracked \(expected one number"),
        ("counter_high.pth", r"bn1.num_batches_tracked \(expected one number from 0 to 2147483647"),
        ("pointer.pth", r"queue_ptr \(not a whole number"),
        ("optimizer.pth", r"optimizer \(1 groups, 0 parameters in the first"),
        ("list.pth", r"has no state dict \(found: list"),
        ("number.pth", r"has no state dict \(found: int"),
        ("none.pth.tar", "none.pth.tar does not exist"),
        ("occupied", "has no checkpoints"),
    ],
)
def test_files_that_are_refused(files, name, message):
    before = {path.name for path in files.iterdir()}
    with pytest.raises(UsageError, match=message) as caught:
        loading.read(files / name)
    with pytest.raises(UsageError):
        reading.to_jax(files / name, files / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in files.iterdir()} == before  # nothing executed, nothing half-written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-jax", "code.pth.tar", "out"], "would run code (posix.mkdir)"),
        (["to-jax", "good.pth.tar", "occupied"], "pass --overwrite"),
        (["to-torch", "good.pth.tar", "code.pth.tar"], "pass --overwrite"),
        (["to-torch", "good.pth.tar", "out.bin"], "expected a name that ends in"),
        (["to-torch", "good.pth.tar", "out.pth", "--for=keras"], "keras"),
        (["inspect", "pipe.pth.tar"], "is not a regular file"),
        (["inspect", "good.pth.tar", "--prefix=net"], "no tensor in good.pth.tar begins with it"),
        (["to-jax", "good.pth.tar"], "expected to-jax FILE.pth.tar DIR"),
        ([], "expected one of to-jax, to-torch, export, inspect"),
    ],
)
def test_mistakes_end_with_status_2(files, in_process, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    before = {path.name for path in files.iterdir()}
    status, _, said = in_process("convert_checkpoints.py", *arguments)
    assert status == 2, said
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert {path.name for path in files.iterdir()} == before


def test_the_three_commands(in_process, tmp_path):
    """The first in a process of its own."""
    content = moco_file(tmp_path / "a.pth.tar")
    content["state_dict"]["module.encoder_q.layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(content, tmp_path / "a.pth.tar")
    done = run(tmp_path, "to-jax", "a.pth.tar", "run")
    assert done.returncode == 0, done.stderr
    assert "encoder_q.layer1.0.conv1.weight contains NaN" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    status, _, said = in_process("convert_checkpoints.py", "to-torch", "run", "b.pth", "--for=torchvision")
    assert status == 0, said
    assert "conv1.weight" in torch.load(tmp_path / "b.pth", weights_only=True)
    status, said, wrong = in_process("convert_checkpoints.py", "inspect", "run")
    assert status == 0, wrong
    for part in ("resnet18", "MLP 64 -> 64 -> 16", "momentum buffers", "a.pth.tar"):
        assert part in said


def test_momentum_is_sgds_trace(tmp_path):
    content = moco_file(tmp_path / "a.pth.tar")
    found = loading.read(tmp_path / "a.pth.tar").state
    buffer = content["optimizer"]["state"][0]["momentum_buffer"].numpy()
    np.testing.assert_array_equal(found.opt_state["1"]["trace"]["conv1"]["kernel"], buffer.transpose(2, 3, 1, 0))
    empty, trace = optim.sgd().init(found.params)
    assert isinstance(empty, optax.EmptyState)
    assert jax.tree.structure(trace.trace) == jax.tree.structure(found.opt_state["1"]["trace"])


@pytest.fixture
def light():
    with small.light():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_training_goes_on_from_a_converted_checkpoint(tmp_path):
    devices = jax.devices()[:1]
    training.train(small.config(steps=6), tmp_path / "whole", devices=devices, quiet=True)
    training.train(small.config(steps=4), tmp_path / "begun", devices=devices, quiet=True)
    writing.to_torch(tmp_path / "begun", tmp_path / "a.pth.tar")
    assert torch.load(tmp_path / "a.pth.tar", weights_only=True)["epoch"] == 1  # of 4 steps, as the metrics tell
    config = loading.read(tmp_path / "begun").config
    reading.to_jax(tmp_path / "a.pth.tar", tmp_path / "again", config=config)
    training.train(small.config(steps=6), tmp_path / "again", devices=devices, quiet=True)
    assert_same_tree(loading.read(tmp_path / "again").state, loading.read(tmp_path / "whole").state)
