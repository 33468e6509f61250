"""The ResNets against torchvision's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ifm_jax import models
from tests.torchvision_peer import torchvision

NAMES = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
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


def from_torch(tree, state_dict, dtype):
    """Fills a tree of our names from a state dict."""

    def fill(path, leaf):
        value = state_dict[torch_name([entry.key for entry in path])].numpy()
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        assert value.shape == leaf.shape
        return jnp.array(value, dtype)  # a copy: PyTorch goes on writing into its own

    return jax.tree_util.tree_map_with_path(fill, tree)


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


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-4), (64, 1e-10)])
@pytest.mark.parametrize("name", NAMES)
def test_same_outputs_as_torchvision(name, bits, tolerance):
    torch.manual_seed(0)
    peer = torchvision.models.get_model(name).to(torch.float64 if bits == 64 else torch.float32)
    random_statistics(peer)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    with jax.enable_x64(bits == 64):
        dtype = "float64" if bits == 64 else "float32"
        encoder = models.Encoder(name, dim=1000, mlp=False, compute_dtype=dtype, param_dtype=dtype)
        shapes = jax.eval_shape(encoder.init, jax.random.key(0))
        params, stats = (from_torch(tree, peer.state_dict(), dtype) for tree in shapes)

        @jax.jit
        def both(params, stats, images):
            module = encoder.bind(params, stats)
            evaluated = module(images, train=False)
            return evaluated, module(images, train=True), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

        evaluated, trained, new_stats = both(params, stats, jnp.asarray(images, dtype))
        torch_images = torch.tensor(images, dtype=getattr(torch, dtype)).permute(0, 3, 1, 2)
        with torch.no_grad():
            expected_evaluated = peer.eval()(torch_images).numpy()
            expected_trained = peer.train()(torch_images).numpy()
        scale = np.abs(expected_evaluated).max()
        np.testing.assert_allclose(evaluated, expected_evaluated, rtol=0, atol=tolerance * scale)
        # At 64 px the last stage is 2x2: with 8 values a statistic, rounding grows; float64 shows the arithmetic.
        if bits == 64:
            np.testing.assert_allclose(
                trained, expected_trained, rtol=0, atol=tolerance * np.abs(expected_trained).max()
            )
            expected_stats = from_torch(shapes[1], peer.state_dict(), dtype)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), new_stats, expected_stats
            )


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
