"""The ResNets against torchvision's own."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ifm_jax import loading, models, torch_checkpoint
from tests import torch_reference
from tests.torchvision_peer import torchvision

ALL = tuple(name for name in models.ARCHITECTURES if name != "resnet8")


def torch_name(path):
    """The torchvision name of one of our arrays."""
    *module, leaf = path
    renamed = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    parts = {"downsample.conv": "downsample.0", "downsample.norm": "downsample.1"}
    name = ".".join(module)
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return f"{name}.{renamed[leaf]}"


def random_statistics(module):
    """Non-trivial running averages, so that evaluation mode has something to get wrong."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.copy_(0.1 * torch.randn(layer.running_mean.shape, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=generator))


@pytest.mark.parametrize("name", ALL)
def test_same_parameters_as_torchvision(name):
    """Every parameter and statistic of torchvision's has a namesake of the same shape here, and none is left over."""
    encoder = models.Encoder(name, dim=1000, mlp=False)
    params, batch_stats = jax.eval_shape(encoder.init, jax.random.key(0))
    with torch.device("meta"):
        peer = torchvision.models.get_model(name).state_dict()
    ours = {}
    for tree in (params, batch_stats):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            ours[torch_name([entry.key for entry in path])] = sorted(leaf.shape)
    theirs = {key: sorted(v.shape) for key, v in peer.items() if not key.endswith("num_batches_tracked")}
    assert ours == theirs


class Computed(NamedTuple):
    """What a network of ours gives for a batch; parts under torchvision's names and in its layout."""

    features: np.ndarray
    outputs: np.ndarray
    statistics: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call_block(call, graphdef, train, values, x):
    block = nnx.merge(graphdef, values)
    y = call(block, x, train=train)
    return y, nnx.state(block, nnx.BatchStat)


@pytest.fixture
def compiled_by_block(monkeypatch):
    """Each kind of block is compiled once, for all networks that have it, instead of each network as a whole."""
    for block in (models.resnet.BasicBlock, models.resnet.Bottleneck):

        def call(self, x, *, train, original=block.__call__):
            y, statistics = _call_block(original, *_split(self, train), x)
            if train:
                nnx.update(self, statistics)
            return y

        monkeypatch.setattr(block, "__call__", call)


def _split(block, train):
    graphdef, values = nnx.split(block)
    return graphdef, train, values


def compute(path, arch, images, weights):
    """Runs what `ifm_jax.load` gives, and a training step's forward and backward pass of the same file's encoder."""
    found = torch_checkpoint.read(path)
    model = found.config.model
    assert (model.arch, model.width) == (arch, WIDTH)
    encoder = models.Encoder(arch, dim=DIM, mlp=False, width=WIDTH, compute_dtype="float64", param_dtype="float64")
    images, weights = jnp.asarray(images), jnp.asarray(weights)
    place = functools.partial(jax.tree.map, jnp.asarray)
    params, batch_stats = place(found.state.params), place(found.state.batch_stats)

    def objective(params):
        module = encoder.bind(params, batch_stats)
        outputs = module(images, train=True)
        return jnp.sum(outputs * weights), (outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))

    gradients, (outputs, statistics) = jax.grad(objective, has_aux=True)(params)
    trees = {"params": gradients, "batch_stats": statistics}
    named = {"params": {}, "batch_stats": {}}
    for entry in torch_checkpoint.encoder_table(found.config):
        values = torch_checkpoint._get(trees[entry.collection], entry.path)
        named[entry.collection][entry.torch] = torch_checkpoint._to_torch(np.asarray(values), entry.kind)
    features = loading.load(path, dtype="float64")(images)
    return Computed(np.asarray(features), np.asarray(outputs), named["batch_stats"], named["params"])


def expect(peer, images, weights):
    """The same of torchvision's network."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    seen = []
    handle = peer.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    with torch.no_grad():
        peer.eval()(images)
    handle.remove()
    outputs = peer.train()(images)
    torch.sum(outputs * torch.from_numpy(weights)).backward()
    statistics = {name: value.numpy() for name, value in peer.named_buffers() if "running" in name}
    gradients = {name: value.grad.numpy() for name, value in peer.named_parameters()}
    return Computed(seen[0], outputs.detach().numpy(), statistics, gradients)


WIDTH, DIM = 16, 10  # the fewest channels for which every group of a ResNeXt has one


@pytest.mark.parametrize("arch", ALL)
def test_same_as_torchvision(arch, compiled_by_block, one_thread, x64, tmp_path):
    """Features of the loaded file, then outputs, statistics and gradients in training, all in float64."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        peer = torch_reference.resnet(arch, DIM, WIDTH).double()
        random_statistics(peer)
    torch.save(peer.state_dict(), tmp_path / "network.pth")
    rng = np.random.default_rng(0)
    # Smaller ones leave BatchNorm in the last stage with a few values, and rounding grows.
    images, weights = rng.normal(size=(2, 48, 48, 3)), rng.normal(size=(2, DIM))
    found = compute(tmp_path / "network.pth", arch, images, weights)
    expected = expect(peer, images, weights)
    worst = {}
    for name, ours, theirs in zip(Computed._fields, found, expected, strict=True):
        if not isinstance(ours, dict):
            ours, theirs = {"": ours}, {"": theirs}
        assert ours.keys() == theirs.keys()
        worst[name] = max(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max() for key in theirs)
    print(f"{arch}: {', '.join(f'{name} {error:.0e}' for name, error in worst.items())}")
    assert {name for name, error in worst.items() if not error <= 1e-10} == set()


def test_initial_distributions_are_torchvision_s():
    """Standard deviations of fresh weights agree with a fresh torchvision model's, layer by layer."""
    torch.manual_seed(0)
    peer = torchvision.models.resnet18().state_dict()
    params, _ = jax.jit(models.Encoder("resnet18", dim=1000, mlp=False).init)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        theirs = peer[torch_name([entry.key for entry in path])].numpy()
        if leaf.size > 1000:
            assert float(jnp.std(leaf)) == pytest.approx(theirs.std(), rel=0.1)
            assert float(jnp.max(jnp.abs(leaf))) == pytest.approx(np.abs(theirs).max(), rel=0.4)


def test_projection_head_and_no_head():
    rngs = nnx.Rngs(0)
    images = jnp.ones((2, 32, 32, 3))
    with_head = models.ResNet(models.ARCHITECTURES["resnet8"], num_classes=16, mlp=True, stem="small", rngs=rngs)
    assert with_head(images).shape == (2, 16)
    assert isinstance(with_head.fc, models.MLPHead)
    headless = models.create("resnet8", num_classes=0, stem="small", rngs=rngs)
    assert headless(images).shape == (2, headless.num_features) == (2, 64)


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 8), ("small", 32), ("small_stride2", 16)])
def test_stems_keep_the_resolution_they_say(stem, size):
    model = models.create("resnet8", num_classes=0, stem=stem, rngs=nnx.Rngs(0))
    seen = []
    block = model.layer1["0"]
    model.layer1["0"] = _Spy(block, seen)
    model(jnp.ones((1, 32, 32, 3)))
    assert seen == [(1, size, size, 16)]


class _Spy(nnx.Module):
    """Notes the shape it is called with."""

    def __init__(self, inner, seen):
        self.inner = inner
        self.seen = nnx.static(seen)

    def __call__(self, x, *, train):
        self.seen.append(x.shape)
        return self.inner(x, train=train)


def test_width_is_a_field():
    params, _ = jax.eval_shape(models.Encoder("resnet18", width=8).init, jax.random.key(0))
    assert params["layer4"]["1"]["conv2"]["kernel"].shape == (3, 3, 64, 64)


def test_embeddings_are_normalised_as_torch_does():
    encoder = models.Encoder("resnet8", dim=16, stem="small_stride2", bn_groups=2)
    params, stats = encoder.init(jax.random.key(0))
    embeddings, new_stats = encoder(params, stats, jnp.ones((4, 32, 32, 3)), train=True)
    assert embeddings.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    assert jax.tree.structure(new_stats) == jax.tree.structure(stats)
    # A zero output has norm 0 and a finite gradient.
    zero = jax.tree.map(jnp.zeros_like, params)
    gradient = jax.grad(lambda p: jnp.sum(encoder(p, stats, jnp.ones((4, 32, 32, 3)), train=True)[0]))(zero)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown architecture 'resnet19': expected one of resnet8"):
        models.create("resnet19", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown stem 'tiny'"):
        models.create("resnet8", stem="tiny", rngs=nnx.Rngs(0))
