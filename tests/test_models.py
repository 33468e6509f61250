"""The ResNets and their heads against torchvision's own."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ifm_jax import models, optim, pretrain
from ifm_jax.config import Config
from ifm_jax.evaluation.features import FrozenEncoder
from ifm_jax.methods import MoCo, Objective
from ifm_jax.runs import loading, snapshot, start
from ifm_jax.torch_interop import names, writing
from references import moco
from references.torchvision_peer import torchvision

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
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            layer.running_mean.copy_(0.1 * torch.randn(layer.running_mean.shape, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=generator))


@pytest.mark.torch
@pytest.mark.parametrize("name", ALL)
def test_same_parameters_as_torchvision(name):
    """Every parameter and statistic of torchvision's has a namesake of the same shape here, and none is left over."""
    encoder = models.Encoder(name, dim=1000, head="linear")
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


def _merged(call, graphdef, train, values, x):
    block = nnx.merge(graphdef, values)
    y = call(block, x, train=train)
    return y, nnx.state(block, nnx.BatchStat)


def _pulled_back(call, graphdef, train, saved, gradients):
    return jax.vjp(functools.partial(_merged, call, graphdef, train), *saved)[1](gradients)


@functools.cache
def _block_call(level):
    """The call of a block, compiled with LLVM's optimizer at a level; JAX takes such an option of outer calls only."""
    options = {"static_argnums": (0, 1, 2), "compiler_options": {"xla_backend_optimization_level": level}}
    forward, backward = jax.jit(_merged, **options), jax.jit(_pulled_back, **options)
    call_block = jax.custom_vjp(lambda *arguments: forward(*arguments), nondiff_argnums=(0, 1, 2))
    call_block.defvjp(lambda *arguments: (forward(*arguments), arguments[3:]), backward)
    return call_block


@pytest.fixture
def compiled_by_block(monkeypatch):
    """Each kind of block is compiled once, for all networks that have it, instead of each network as a whole."""
    for block in (models.resnet.BasicBlock, models.resnet.Bottleneck):

        def call(self, x, *, train, original=block.__call__):
            # The gradients of grouped convolutions in float64 are plain loops, which only the optimizer makes fast.
            call_block = _block_call(level=int(self.conv2.feature_group_count > 1))
            y, statistics = call_block(original, *_split(self, train), x)
            if train:
                nnx.update(self, statistics)
            return y

        monkeypatch.setattr(block, "__call__", call)


def _split(block, train):
    graphdef, values = nnx.split(block)
    return graphdef, train, values


def compute(path, arch, images, weights):
    """Runs what `ifm_jax.load` gives, and a training step's forward and backward pass of the same file's encoder."""
    found = loading.read(path)
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
    for entry in names.encoder_table(found.config):
        values = names.get(trees[entry.collection], entry.path)
        named[entry.collection][entry.torch] = names.to_torch_layout(np.asarray(values), entry.kind)
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


@pytest.mark.torch
@pytest.mark.parametrize("arch", ALL)
def test_same_as_torchvision(arch, compiled_by_block, one_thread, x64, tmp_path):
    """Features of the loaded file, then outputs, statistics and gradients in training, all in float64."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        peer = moco.resnet(arch, DIM, WIDTH).double()
        random_statistics(peer)
    torch.save(peer.state_dict(), tmp_path / "network.pth")
    rng = np.random.default_rng(0)
    # Smaller ones leave BatchNorm in the last stage with a few values, and rounding grows.
    images, weights = rng.normal(size=(2, 33, 33, 3)), rng.normal(size=(2, DIM))
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


@pytest.mark.torch
def test_initial_distributions_are_torchvision_s():
    """Standard deviations of fresh weights agree with a fresh torchvision model's, layer by layer."""
    torch.manual_seed(0)
    peer = torchvision.models.resnet18().state_dict()
    params, _ = jax.jit(models.Encoder("resnet18", dim=1000, head="linear").init)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        theirs = peer[torch_name([entry.key for entry in path])].numpy()
        if leaf.size > 1000:
            assert float(jnp.std(leaf)) == pytest.approx(theirs.std(), rel=0.1)
            assert float(jnp.max(jnp.abs(leaf))) == pytest.approx(np.abs(theirs).max(), rel=0.4)


@pytest.mark.slow
def test_projection_head_and_no_head():
    rngs = nnx.Rngs(0)
    images = jnp.ones((2, 32, 32, 3))
    with_head = models.ResNet(models.ARCHITECTURES["resnet8"], num_classes=16, mlp=True, stem="small", rngs=rngs)
    assert with_head(images).shape == (2, 16)
    assert isinstance(with_head.fc, models.MLPHead)
    named = models.create("resnet8", num_classes=16, head="mlp", stem="small", rngs=nnx.Rngs(0))
    assert jax.tree.structure(nnx.state(named)) == jax.tree.structure(nnx.state(with_head))
    headless = models.create("resnet8", num_classes=0, stem="small", rngs=rngs)
    assert headless(images).shape == (2, headless.num_features) == (2, 64)


def test_encoder_takes_the_heads_of_old_by_their_old_name():
    assert models.Encoder("resnet18", mlp=True) == models.Encoder("resnet18") == models.Encoder("resnet18", head="mlp")
    linear = models.Encoder("resnet18", mlp=False)
    assert dataclasses.replace(linear, dim=3) == models.Encoder("resnet18", dim=3, head="linear")


HCL = models.Encoder("resnet8", dim=8, head="hcl", stem="small_stride2", width=4, bn_groups=2)


def torch_hcl_head(features, dim):
    """The head of the released code, word for word."""
    return torch.nn.Sequential(
        torch.nn.Linear(features, 512, bias=False),
        torch.nn.BatchNorm1d(512),
        torch.nn.ReLU(inplace=True),
        torch.nn.Linear(512, dim, bias=True),
    )


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
def test_hcl_head_equals_torch_in_groups():
    """Training and evaluation, gradient and running averages; each group normalized on its own."""
    features, dim, groups, n = 16, 8, 2, 12
    torch.manual_seed(0)
    peer = torch_hcl_head(features, dim).double()
    random_statistics(peer)
    tensors = {f"fc.{name}": value.clone() for name, value in peer.state_dict().items()}
    encoder = dataclasses.replace(HCL, dim=dim, bn_groups=groups, compute_dtype="float64", param_dtype="float64")
    module = encoder.module(nnx.Rngs(0))
    assert module.num_features == features
    graph, params, stats = nnx.split(module.fc, nnx.Param, nnx.BatchStat)
    trees = {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}
    for entry in names.head_table(features, dim, "hcl"):
        *holders, leaf = entry.path[1:]  # without "fc"
        tree = trees[entry.collection]
        for name in holders:
            tree = tree[name]
        value = tensors.pop(entry.torch)
        assert value.shape == entry.shape
        assert tree[leaf].shape == entry.shape[::-1]
        tree[leaf] = jnp.asarray(value.numpy().T)
    assert list(tensors) == ["fc.1.num_batches_tracked"]
    nnx.replace_by_pure_dict(params, trees["params"])
    nnx.replace_by_pure_dict(stats, trees["batch_stats"])

    random = np.random.default_rng(0)
    x, weights = random.normal(size=(n, features)), random.normal(size=(n, dim))

    def loss(params, x):
        head = nnx.merge(graph, params, stats, copy=True)
        outputs = head(x, train=True)
        return jnp.sum(outputs * weights), (outputs, nnx.state(head, nnx.BatchStat))

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (outputs, new)), (by_params, by_x) = both(params, jnp.asarray(x))
    evaluated = nnx.merge(graph, params, stats)(jnp.asarray(x), train=False)
    inputs = torch.tensor(x, requires_grad=True)
    np.testing.assert_allclose(evaluated, peer.eval()(inputs).detach().numpy(), rtol=1e-12, atol=1e-12)
    start_of = {name: value.clone() for name, value in peer.state_dict().items()}
    expected, averages = [], []
    for piece, weight in zip(inputs.chunk(groups), torch.tensor(weights).chunk(groups), strict=True):
        # Every group from the same running averages; the first's stay.
        with torch.no_grad():
            for name, buffer in peer.named_buffers():
                buffer.copy_(start_of[name])
        expected.append(peer.train()(piece))
        (expected[-1] * weight).sum().backward()
        averages.append({name: value.clone().numpy() for name, value in peer.named_buffers()})
    np.testing.assert_allclose(outputs, torch.cat(expected).detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(by_x, inputs.grad.numpy(), rtol=1e-10, atol=1e-12)
    ours = nnx.to_pure_dict(by_params)
    assert ours["hidden"].keys() == {"kernel"}  # no bias
    layers = {"hidden": {"kernel": "0.weight"}, "norm": {"scale": "1.weight", "bias": "1.bias"}}
    layers["output"] = {"kernel": "3.weight", "bias": "3.bias"}
    for layer, leaves in layers.items():
        for leaf, theirs in leaves.items():
            gradient = peer.get_parameter(theirs).grad.numpy().T
            np.testing.assert_allclose(ours[layer][leaf], gradient, rtol=1e-10, atol=1e-12, err_msg=theirs)
    for leaf, theirs in (("mean", "1.running_mean"), ("var", "1.running_var")):
        np.testing.assert_allclose(nnx.to_pure_dict(new)["norm"][leaf], averages[0][theirs], rtol=1e-12, atol=1e-12)


def hcl_state(seed=0, dim=8):
    encoder = dataclasses.replace(HCL, dim=dim)
    made = pretrain.create(jax.random.key(seed), MoCo(encoder, Objective(), 16), optim.sgd(0.9, 0.0))
    _, batch_stats = encoder(made.params, made.batch_stats, jnp.ones((4, 32, 32, 3)).at[:2].set(0.5), train=True)
    return jax.device_get(made._replace(batch_stats=batch_stats))


def hcl_snapshot():
    config = Config()
    config.model.arch, config.model.stem, config.model.width = HCL.arch, HCL.stem, HCL.width
    return snapshot.Snapshot(config, hcl_state())


@pytest.mark.slow
def test_a_head_with_statistics_is_left_behind_whole(monkeypatch, tmp_path):
    """Frozen features, `load` and torchvision's format are of the backbone: no statistics of the head come along."""
    found = hcl_snapshot()
    of_run = found.state
    assert "fc" in of_run.batch_stats
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    frozen = FrozenEncoder(HCL, of_run.params, of_run.batch_stats)
    features = frozen(images)
    assert features.shape == (8, 16)
    again = frozen.holding(*jax.device_put((of_run.params, of_run.batch_stats)))
    np.testing.assert_array_equal(again(images), features)
    assert again.digest() == frozen.digest()
    embedded = FrozenEncoder(HCL, of_run.params, of_run.batch_stats, layer="projection")(images)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)

    monkeypatch.setattr(loading, "read", lambda path, prefix="": found)
    model = loading.load("anywhere")
    assert model.fc is None
    np.testing.assert_array_equal(model.conv1.kernel[...], of_run.params["conv1"]["kernel"])

    writing.to_torch(found, tmp_path / "resnet.pth", target="torchvision")
    tensors = torch.load(tmp_path / "resnet.pth", weights_only=True)
    assert "bn1.running_var" in tensors
    assert not [name for name in tensors if name.startswith("fc.")]


@pytest.mark.slow
def test_a_run_starts_with_the_statistics_of_the_head_it_takes():
    given = hcl_snapshot()
    fitting, taken = start.started_with(given, hcl_state(seed=1), "moco")
    assert taken[0] == "query encoder"
    jax.tree.map(np.testing.assert_array_equal, fitting.batch_stats, given.state.batch_stats)
    jax.tree.map(np.testing.assert_array_equal, fitting.params, given.state.params)
    fresh = hcl_state(seed=1, dim=6)
    other, taken = start.started_with(given, fresh, "moco")
    assert taken[0] == "query encoder with a new head"
    for part in ("params", "batch_stats"):
        ours, theirs, new = (getattr(of, part) for of in (other, given.state, fresh))
        jax.tree.map(np.testing.assert_array_equal, models.without_head(ours), models.without_head(theirs))
        jax.tree.map(np.testing.assert_array_equal, ours["fc"], new["fc"])
    # A head without statistics, from which the backbone is taken.
    method = MoCo(dataclasses.replace(HCL, head="linear"), Objective(), 16)
    linear = pretrain.create(jax.random.key(2), method, optim.sgd(0.9, 0.0))
    other, _ = start.started_with(given, jax.device_get(linear), "moco")
    assert "fc" not in other.batch_stats


@pytest.mark.slow
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


@pytest.mark.slow
def test_embeddings_are_normalized_as_torch_does():
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
    with pytest.raises(ValueError, match="unknown head 'simclr': expected one of linear, mlp, hcl"):
        models.create("resnet8", head="simclr", rngs=nnx.Rngs(0))
