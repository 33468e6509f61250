"""The recipes in configs/: each loads from anywhere, holds together, and says how it is run."""

import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from ifm_jax.config import Config, differences, validate

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.py"))

# How the flags library loads a recipe is deprecated; ours to bear, not to mend.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Loads a recipe as the scripts do, from another working directory, with flags that change its fields."""
    monkeypatch.chdir(tmp_path)

    def load(name: str, **fields) -> Config:
        arguments = ["train.py", f"--config={CONFIGS / name}.py"]
        arguments += [f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()]
        monkeypatch.setattr(sys, "argv", arguments)  # where the library looks for them already as it defines the flag
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", flag_values=values)
        values(arguments)
        return holder.value

    return load


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_holds_together(load, path):
    config = load(path.stem)
    assert isinstance(config, Config)
    if config.data.source == "folder:":
        config = load(path.stem, data__source="folder:/images")
    validate(config, devices=8)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_run(path):
    text = compile(path.read_text(), path, "exec").co_consts[0]
    command = "python train.py" if path.stem == "trifeature" else f"python train.py --config=configs/{path.name} "
    assert command in text
    for word in ("Hardware", "Expected"):
        assert f"\n{word}" in text


def test_imagenet100_is_the_originals(load):
    """The command in the README of IFM's code, and the defaults of its script."""
    config = load("ifm_imagenet100", data__source="folder:/imagenet")
    expected = Config()
    expected.optim.lr, expected.batch_size, expected.moco.momentum = 0.8, 512, 0.99
    assert differences(config, expected) == []
    assert (config.model.arch, config.model.bn_groups, config.epochs) == ("resnet50", 8, 200)
    assert (config.moco.queue_size, config.moco.temperature, config.moco.mlp) == (65536, 0.2, True)
    assert (config.optim.schedule, config.optim.momentum, config.optim.weight_decay) == ("cosine", 0.9, 1e-4)
    assert (config.ifm.method, config.ifm.epsilon, config.ifm.alpha) == ("ifm", 0.1, 1.0)
    assert config.data.augmentation == "moco_v2"
    for epsilon in (0.05, 0.2):
        assert load("ifm_imagenet100", ifm__epsilon=epsilon).ifm.epsilon == epsilon
    assert pathlib.Path(config.data.classes) == CONFIGS / "imagenet100_classes.txt"


def test_imagenet100s_classes_are_a_hundred_ids():
    lines = (CONFIGS / "imagenet100_classes.txt").read_text().splitlines()
    ids = [line for line in lines if not line.startswith("#")]
    assert len(ids) == 100
    assert ids == sorted(set(ids))
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in ids)


@pytest.mark.parametrize(
    ("ours", "theirs", "fields"),
    [
        ("ifm_imagenet100", "moco_v2_imagenet100", {"ifm.method"}),
        ("ifm_imagenet", "moco_v2_imagenet", {"ifm.method"}),
        (
            "moco_v1_imagenet",
            "moco_v2_imagenet",
            {"moco.temperature", "moco.mlp", "optim.schedule", "data.augmentation"},
        ),
        (
            "ifm_stl10",
            "ifm_cifar10",
            {"model.stem", "moco.mlp", "data.augmentation", "data.image_size", "data.train_split", "data.test_split"},
        ),
    ],
)
def test_recipes_differ_in_what_they_say_only(load, ours, theirs, fields):
    assert {line.split(":")[0] for line in differences(load(ours), load(theirs))} == fields
