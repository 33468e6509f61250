"""The package as a Python user meets it: names and signatures, preprocess, evaluate."""

import inspect
import json
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ifm_jax
from ifm_jax import models
from ifm_jax.augment import normalize
from ifm_jax.data import open_source
from ifm_jax.errors import UsageError
from ifm_jax.evaluation import evaluate as evaluation
from ifm_jax.evaluation.features import extract
from ifm_jax.models.resnet import ResNet
from tests import small


def test_public_names():
    assert {"Config", "evaluate", "load", "models", "preprocess", "train"} <= set(dir(ifm_jax))
    for name in ifm_jax.__all__:
        assert getattr(ifm_jax, name) is not None
    assert (ifm_jax.evaluate.__name__, ifm_jax.preprocess.__name__) == ("evaluate", "preprocess")


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_factories_name_their_arguments(name):
    build = getattr(models, name)
    assert build.__name__ == name
    assert name in build.__doc__
    found, expected = inspect.signature(build).parameters, inspect.signature(ResNet.__init__).parameters
    assert set(found) - {"width"} == set(expected) - {"self", "arch"}
    for each in set(found) - {"width"}:
        assert (found[each].default, found[each].annotation) == (expected[each].default, expected[each].annotation)
    assert all(f"\n      {each}: " in build.__doc__ for each in found)
    made = nnx.eval_shape(lambda: build(num_classes=7, stem="small", width=16, rngs=nnx.Rngs(0)))
    assert made.arch == models.ARCHITECTURES[name]._replace(width=16)
    assert made.fc.kernel.shape == (made.num_features, 7)
    with pytest.raises(TypeError, match="num_clases"):
        build(num_clases=7, rngs=nnx.Rngs(0))


TYPED = """
import numpy as np
import ifm_jax
from flax import nnx

model = ifm_jax.load("run")
features: np.ndarray = np.asarray(model(ifm_jax.preprocess(np.zeros((1, 8, 8, 3), np.uint8), 8)))
top1: float = ifm_jax.evaluate(model, "trifeature")["knn"]["shape"]["top1"]
net: ifm_jax.models.ResNet = ifm_jax.models.resnet18(num_classes=10, rngs=nnx.Rngs(0))
"""


@pytest.mark.slow
def test_a_type_checker_sees_them(tmp_path):
    wrong = ["ifm_jax.models.resnet18(num_clases=10, rngs=nnx.Rngs(0))", "ifm_jax.evaluate(3)", "ifm_jax.trian"]
    (tmp_path / "a.py").write_text(TYPED + "\n".join(wrong) + "\n")
    command = [sys.executable, "-m", "pyrefly", "check", "a.py", "--python-interpreter-path", sys.executable]
    command += ["--output-format=json", "--preset=strict", f"--search-path={ifm_jax.__path__[0]}/.."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    lines = [error["line"] for error in json.loads(done.stdout)["errors"] if error["severity"] == "error"]
    first = len(TYPED.splitlines()) + 1
    assert sorted(set(lines)) == list(range(first, first + len(wrong))), done.stdout


# --- preprocess ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    rough = random.integers(0, 256, (6, 9, 12, 3), np.uint8)
    return np.stack([cv2.resize(image, (96, 72)) for image in rough])


def test_preprocess_is_what_evaluation_does(images, tmp_path):
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(6) % 2)
    config = small.config(data__source=f"array:{tmp_path}/a.npz", data__image_size=32)
    seen = open_source(config.data, "train").examples(np.arange(6))["image"]
    expected = np.asarray(jax.jit(lambda x: normalize(x.astype(jnp.float32) / 255))(seen))
    found = ifm_jax.preprocess(images, 32)
    assert (found.shape, found.dtype) == ((6, 32, 32, 3), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    # Images of the size stay as they are; lists of several sizes; JAX's arrays.
    np.testing.assert_array_equal(ifm_jax.preprocess(seen, 32), found)
    np.testing.assert_array_equal(ifm_jax.preprocess([images[0], seen[1]], 32), found[:2])
    np.testing.assert_array_equal(ifm_jax.preprocess(jnp.asarray(images), 32), found)
    assert ifm_jax.preprocess(images).shape == (6, 224, 224, 3)


def test_preprocess_of_floats_differs_by_rounding_alone(images):
    found = ifm_jax.preprocess(images, 32)
    for dtype in (np.float64, np.float32):
        floats = ifm_jax.preprocess(images.astype(dtype) / 255, 32)
        assert floats.dtype == np.float32
        # Three roundings to bytes on the way, of half a byte each.
        np.testing.assert_allclose(floats, found, rtol=0, atol=1.5 / 255 / 0.224)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"images of shape \(8, 8, 3\): expected \(N, H, W, 3\)"),
        ([np.zeros((8, 8), np.uint8)], r"image 0 has shape \(8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.int64), "image 0 has dtype int64: expected uint8"),
        (np.full((2, 8, 8, 3), 255.0), r"values from 255 to 255: expected floats in \[0, 1\]"),
        (np.full((2, 8, 8, 3), np.nan), "values from nan to nan"),
        (np.full((2, 8, 8, 3), -1.0), "not normalized yet"),
    ],
)
def test_preprocess_refuses(wrong, message):
    with pytest.raises(UsageError, match=message):
        ifm_jax.preprocess(wrong, 8)


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluate_is_what_the_command_finds(tmp_path, capsys):
    config = small.config(data__trifeature__train_size=32, eval__neighbors=5)
    small.write_run(tmp_path / "run", config)
    devices = jax.devices()[:1]
    found = ifm_jax.evaluate(tmp_path / "run", devices=devices)
    assert set(found) == {"knn", "logistic_regression"}
    assert set(found["knn"]) == {"shape", "texture", "color"}
    assert capsys.readouterr().out == ""
    wanted = evaluation.Wanted(knn=True, untrained=False)
    evaluation.evaluate(tmp_path / "run", config, tmp_path / "run", wanted, devices=devices, quiet=True)
    written = json.loads((tmp_path / "run" / "results.json").read_text())["knn"]
    assert {name: written[name] for name in found["knn"]} == found["knn"]

    live = ifm_jax.load(tmp_path / "run")
    again = ifm_jax.evaluate(live, config=config, label="shape", devices=devices, quiet=False)
    assert again == {name: {"shape": of["shape"]} for name, of in found.items()}
    assert "5 nearest neighbors of 'shape'" in capsys.readouterr().out
    # Our preprocessing gives the features that are evaluated.
    source = open_source(config.data, "test")
    pixels = source.examples(np.arange(8))["image"]
    ours = nnx.jit(lambda model, x: model(x))(live, jnp.asarray(ifm_jax.preprocess(pixels, 32)))
    of = evaluation.pretrained.load(tmp_path / "run")
    np.testing.assert_allclose(ours, extract(of.frozen(devices), source)[:8], rtol=0, atol=1e-5)


def test_evaluate_refuses(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        ifm_jax.evaluate(tmp_path / "none.pth", "trifeature")
