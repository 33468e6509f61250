"""The recipes in configs/: each loads from anywhere, holds together, and says how it is run."""

import importlib.machinery
import pathlib
import sys

import pytest

from ifm_jax import recipes
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags
from ifm_jax.config import Config, differences, validate
from ifm_jax.errors import UsageError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.py") if path.stem != "__init__")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Loads a recipe as the scripts do, from another working directory, with flags that change its fields."""
    monkeypatch.chdir(tmp_path)

    def load(name: str, **fields) -> Config:
        changes = [f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()]
        return Flags(config=ConfigFlag()).parse([f"--config={CONFIGS / name}.py", *changes]).config()

    return load


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_holds_together(load, path):
    config = load(path.stem)
    assert isinstance(config, Config)
    if config.data.source == "folder:":
        config = load(path.stem, data__source="folder:/images")
    validate(config, devices=8)


# Training images of the data sets (tfds's catalog; ImageNet-100: the list of classes of Tian et al. 2020).
IMAGES = {"tfds:cifar10": 50_000, "tfds:stl10": 105_000, "ImageNet-100": 126_689, "ImageNet": 1_281_167}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_has_more_keys_than_images(path):
    """`runs.start` refuses such a run; of own images there are ten thousand or more (ifm_own_images)."""
    config = recipes.load(path)
    images = {"trifeature": config.data.trifeature.train_size} | IMAGES
    source = config.data.source
    if source in ("folder:", "tfds:imagenet2012"):
        source = "ImageNet-100" if config.data.classes else "ImageNet"
    count = 10_000 if path.stem == "ifm_own_images" else images.get(source)
    if config.method == "moco":
        assert config.moco.queue_size <= count
        assert not config.moco.queue_beyond_images


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
    expected.model.bn_groups = 8
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
        ("ifm_imagenet100", "moco_v2_imagenet100", {"ifm.objective"}),
        ("ifm_imagenet", "moco_v2_imagenet", {"ifm.objective"}),
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_has_a_name(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path.stem).mkdir()  # a run's folder of that name is not meant
    assert recipes.load(path.stem) == recipes.load(path)
    assert recipes.name_of(path.stem) == recipes.name_of(path) == path.stem


def test_a_named_recipe_is_a_module_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ifm_jax.configs", "ifm_jax.configs.ifm_stl10", "ifm_jax.configs.ifm_cifar10"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    recipes.load("ifm_stl10")
    assert pathlib.Path(sys.modules["ifm_jax.configs.ifm_cifar10"].__file__) == CONFIGS / "ifm_cifar10.py"


def test_a_file_is_read_anew_and_leaves_no_module(tmp_path):
    """Edited within the second to the same length, too; its dataclasses find their module while it runs."""
    inner, outer = tmp_path / "inner.txt", tmp_path / "outer.py"
    inner.write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom ifm_jax.config import Config\n"
        "@dataclasses.dataclass\nclass Sizes:\n    epochs: int = 3\n"
        "def get_config():\n    config = Config()\n    config.epochs = Sizes().epochs\n    return config\n"
    )
    outer.write_text(
        "import pathlib, sys\nfrom ifm_jax import recipes\n"
        "def get_config():\n    config = recipes.load(pathlib.Path(__file__).with_name('inner.txt'))\n"
        "    assert sys.modules[__name__].get_config is get_config\n    return config\n"
    )
    before = set(sys.modules)
    assert recipes.load(outer).epochs == 3
    inner.write_text(inner.read_text().replace("= 3", "= 4"))
    assert recipes.load(outer).epochs == 4
    inner.write_text("1 / 0")
    with pytest.raises(UsageError):
        recipes.load(outer)
    assert set(sys.modules) - before == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner.txt", "outer.py"]


BEGIN = "from ifm_jax.config import Config\nconfig = Config()\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BEGIN + "def get_config():\n    config.moco.temprature = 0.5\n",
            "line 4: .*'temprature': did you mean 'temperature'",
        ),
        (
            BEGIN + "def get_config():\n    config.batch_size = '64'\n    return config",
            "batch_size='64': expected a whole",
        ),
        (
            BEGIN + "def get_config():\n    config.epochs = 6.0\n    return config",
            "epochs=6.0: expected a whole number",
        ),
        (
            BEGIN + "def get_config():\n    config.epochs = True\n    return config",
            "epochs=True: expected a whole number",
        ),
        (BEGIN + "def get_config():\n    config.model = None\n    return config", "model=None: expected a ModelConfig"),
        (
            BEGIN + "def get_config():\n    config.optim.lr = '0.1'\n    return config",
            "optim.lr='0.1': expected a number",
        ),
        (BEGIN + "def get_config():\n    config.linear.lr = 3.0\n    return config", "linear.lr=3.0: expected numbers"),
        (BEGIN + "def get_config():\n    pass", r"returned None: does it end with `return config`\?"),
        (BEGIN + "def get_config():\n    return {}", r"returned \{\}, expected an ifm_jax.config.Config"),
        (BEGIN + "def get_config(batch):\n    return config", r"get_config\(\) takes arguments"),
        (BEGIN + "def get_config():\n    return 1 / 0", "line 4: ZeroDivisionError: division by zero"),
        (BEGIN + "def get_config():\n    return get_config()", "RecursionError"),
        (BEGIN + "import sys\ndef get_config():\n    sys.exit(0)", "line 5: it ends the process"),
        (BEGIN + "raise SystemExit", "it ends the process"),
        (BEGIN + "get_config = 3", r"has no function get_config\(\)"),
        ("", r"has no function get_config\(\)"),
        ("import nothing_like_this", "line 1: ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("def get_config(:\n", "line 1: SyntaxError: "),
        ("a = 'caf\xe9'", "SyntaxError: .*utf-8"),
        ("a = '\0'", "null bytes"),
        ("(" * 3000, "SyntaxError"),
    ],
)
def test_a_broken_recipe_is_one_line(tmp_path, text, message):
    """Everything that its author can have done to it."""
    path = tmp_path / "mine.py"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message) as caught:
        recipes.load(path)
    assert str(caught.value).startswith(f"--config={path}")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "warm.py").write_text(BEGIN + "def get_config():\n    return config\n")
    for given, message in (
        ("folder.py", "folder.py is a directory"),
        ("wram.py", "wram.py does not exist: did you mean warm.py?"),
        ("configs/ifm_cifar.py", "does not exist: did you mean ifm_cifar10?"),
        ("ifm_cifra10", "does not exist: did you mean ifm_cifar10?"),
        ("nowhere.py", "nowhere.py does not exist: expected a recipe, for example trifeature (ifm-jax config --list)"),
        ("x" * 5000, "does not exist"),
        ("a\0b.py", "does not exist"),
    ):
        with pytest.raises(UsageError) as caught:
            recipes.load(given)
        assert message in str(caught.value)
    assert recipes.load("warm.py") == Config()


def test_a_recipe_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(self, path):
        raise PermissionError(13, "Permission denied", path)

    path = tmp_path / "mine.py"
    path.touch()
    monkeypatch.setattr(
        importlib.machinery.SourceFileLoader, "get_data", refuse
    )  # the tests may run as root, who reads everything
    with pytest.raises(UsageError, match=r"mine\.py: it cannot be read \(Permission denied\)"):
        recipes.load(path)
