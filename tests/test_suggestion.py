"""What is recommended for a number of images and an accelerator: by the rules that it states, and as documented."""

import pathlib
import re

import pytest

from ifm_jax import config as configs
from ifm_jax import recipes
from ifm_jax.errors import UsageError
from ifm_jax.runs import memory, suggestion

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs" / "data.md"


@pytest.fixture
def cheap(monkeypatch):
    """A GB for a batch of 256, for any network: tracing takes seconds."""
    monkeypatch.setattr(
        memory, "estimate", lambda config, mesh, held=None: (2 * 10**8, 8 * 10**8 * config.batch_size // 256)
    )


@pytest.mark.parametrize(
    "images", [32, 50, 63, 64, 100, 300, 1000, 4097, 9_999, 10_000, 65_536, 126_689, 499_999, 500_000, 10**6, 10**8]
)
def test_what_is_recommended_runs_and_follows_the_rules(cheap, images):
    found = suggestion.suggest(images, 16e9)
    recipe = recipes.load(found.recipe)
    for name, value in found.changes.items():
        configs.set_field(recipe, name, value)
    recipe.data.source = "folder:PATH"
    assert recipe == found.config  # what the command line says is what is meant
    configs.validate(recipe)
    batch = recipe.batch_size
    assert batch <= images
    if recipe.method == "moco":
        assert recipe.moco.queue_size % batch == 0
        assert recipe.moco.queue_size <= max(images / 4, batch)
        assert recipe.optim.lr == pytest.approx(0.03 * batch / 256)
    assert ("moco.queue_size" in found.reasons) == (recipe.method == "moco")
    updates = recipe.epochs * (images // batch)
    assert 10 <= recipe.epochs <= 1000
    assert updates >= 10_000 or recipe.epochs == 1000
    assert updates <= 1_010_000 or recipe.epochs == 10
    assert set(found.changes) <= set(found.reasons)


def test_less_memory_is_a_smaller_batch_and_with_it_queue_and_rate(cheap):
    whole, half = (suggestion.suggest(100_000, memory_bytes) for memory_bytes in (16e9, 1e9))
    assert (whole.config.batch_size, half.config.batch_size) == (256, 128)
    assert half.config.optim.lr == whole.config.optim.lr / 2
    assert half.bytes <= 0.8e9
    with pytest.raises(UsageError, match=r"--memory=0.1: even a batch of 16 needs about 0.2 GB with ifm_own_images"):
        suggestion.suggest(100_000, 1e8)
    with pytest.raises(UsageError, match="--images=31: expected at least 32"):
        suggestion.suggest(31, 16e9)


def test_the_command_that_it_prints(cheap, in_process):
    door = "ifm_jax/__main__.py"
    status, out, err = in_process(door, "config", "--suggest", "--images=20000", "--memory=1")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "For 20,000 images and an accelerator with 1 GB (rules of thumb, not tuned):"
    assert re.search(r"^  batch_size +128 +the largest power of two", out, re.MULTILINE)
    (command,) = [line.split() for line in lines if line.startswith("    ifm-jax train ")]
    assert command[2:4] == ["--config=ifm_own_images", "--config.data.source=folder:PATH"]
    assert "--config.batch_size=128" in command
    for arguments, said in (
        (["--suggest"], "--suggest needs the number of your images: expected --images=N as well"),
        (["--suggest", "--images=9999", "--config=trifeature"], "--suggest chooses the recipe: expected no --config"),
        (["--suggest", "--images=99", "--memory=0"], "--memory=0: expected a number above 0"),
    ):
        status, out, err = in_process(door, "config", *arguments)
        assert (status, out) == (2, "")
        assert err.startswith(f"ifm-jax config: {said}")


@pytest.mark.slow
def test_the_table_in_the_docs():
    rows = re.findall(
        r"^\| ([\d,]+) \| (\S+) \| (\d+) \| (\S+) \| (\S+) \| (\d+) \| ([\d.]+) \|$", DOCS.read_text(), re.M
    )
    assert len(rows) >= 6
    for images, recipe, batch, queue, rate, epochs, gigabytes in rows:
        found = suggestion.suggest(int(images.replace(",", "")), 16e9)
        config = found.config
        keys = f"{config.moco.queue_size:,}" if config.method == "moco" else "-"
        assert (recipe, batch, queue) == (f"`{found.recipe}`", str(config.batch_size), keys)
        assert (float(rate), int(epochs)) == (config.optim.lr, config.epochs)
        assert float(gigabytes) == pytest.approx(found.bytes / 1e9, abs=0.051)
