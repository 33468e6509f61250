"""Recommends a config for a number of images and an accelerator's memory, by stated rules that are not tuned.

docs/data.md shows the rules as a table, which a test compares with this.
"""

import dataclasses
import math

import jax

from ifm_jax import recipes, sharding
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.runs import memory

LEAST_IMAGES = 32
_FEW = 10_000  # images, below which negatives come from the batch
_MANY = 500_000  # images, from which the network is ImageNet's
_RECIPES = {"few": "ifm_few_images", "own": "ifm_own_images", "many": "ifm_imagenet"}
_BATCHES = (16, 256)
_MOST_KEYS = 65536
_UPDATES = (10_000, 1_000_800)  # the latter: ImageNet's 200 epochs in batches of 256
_EPOCHS = (10, 1000)
_SHARE = 0.8  # of an accelerator's memory that the estimate may take; the compiler and cuDNN take some too
# ResNet-50, MoCo, 256 images of 224 px: 10.8 GB, where the compiler for an H100 plans 11.1 (docs/benchmarks.md).
_HELD = 1.0


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A recommended config.

    Attributes:
      recipe: name of the recipe.
      config: its config with the changes.
      changes: changed fields by name, for the command line.
      reasons: the rule behind the recipe and behind each of `batch_size`, `moco.queue_size`, `optim.lr`, `epochs` and
        `memory`, in a line each; no `moco.queue_size` without a queue.
      bytes: estimated memory of a step on one accelerator, in bfloat16.
    """

    recipe: str
    config: Config
    changes: dict[str, int | float]
    reasons: dict[str, str]
    bytes: int


def suggest(images: int, memory_bytes: float) -> Suggestion:
    """Recommends a config.

    Args:
      images: number of training images.
      memory_bytes: memory of the accelerator.

    Raises:
      UsageError: if there are too few images, or too little memory for the smallest batch.
    """
    if images < LEAST_IMAGES:
        raise UsageError(
            f"--images={images}: expected at least {LEAST_IMAGES}; with fewer, use a network trained on other images "
            "(ifm-jax eval --pretrained=FILE)"
        )
    kind = "few" if images < _FEW else "own" if images < _MANY else "many"
    recipe = _RECIPES[kind]
    base = recipes.load(recipe)
    base.data.source, base.model.compute_dtype = "folder:PATH", "bfloat16"
    reasons = {
        "recipe": {
            "few": f"fewer than {_FEW:,} images: ResNet-18 on SimCLR, whose negatives come from the batch",
            "own": f"{_FEW:,} images or more: ResNet-18 on MoCo, at {base.data.image_size} px",
            "many": f"{_MANY:,} images or more: MoCo-v2's ResNet-50 for ImageNet, at {base.data.image_size} px",
        }[kind]
    }
    least, most = _BATCHES
    batch = min(max(_power_of_two(images // 4), least), most)
    reasons["batch_size"] = f"the largest power of two up to a quarter of the images, {least} to {most}, that fits"
    while (needed := _estimate(base, batch, images)) > _SHARE * memory_bytes:
        batch //= 2
        if batch < least:
            raise UsageError(
                f"--memory={memory_bytes / 1e9:g}: even a batch of {least} needs about {needed / 1e9:.1f} GB with "
                f"{recipe} ({base.model.arch} at {base.data.image_size} px): expected more, or a smaller "
                "data.image_size or network, as in --config=trifeature"
            )
    config = _sized(base, batch, images)
    if config.method == "moco":
        reasons["moco.queue_size"] = (
            f"K, a multiple of the batch up to a quarter of the images, at most {_MOST_KEYS:,}: an image's last key is "
            "then in the queue with a probability of (K / images)^2 / 2, at most 3 %"
        )
    if config.optim.name == "sgd":
        reasons["optim.lr"] = "0.03 * batch_size / 256, MoCo's rate for SGD"
    else:
        reasons["optim.lr"] = f"the recipe's, for any batch: {config.optim.name} scales its steps itself"
    updates = config.epochs * (images // batch)
    reasons["epochs"] = (
        f"200, but at least {_UPDATES[0]:,} updates and at most {_UPDATES[1]:,}, in {_EPOCHS[0]} to {_EPOCHS[1]:,} "
        f"epochs: {updates:,} updates"
    )
    reasons["memory"] = f"estimate in bfloat16, at most {_SHARE:.0%} of the accelerator's"
    recipe_config = recipes.load(recipe)
    changes: dict[str, int | float] = {}
    for name, value, usual in (
        ("batch_size", config.batch_size, recipe_config.batch_size),
        ("moco.queue_size", config.moco.queue_size, recipe_config.moco.queue_size),
        ("optim.lr", config.optim.lr, recipe_config.optim.lr),
        ("epochs", config.epochs, recipe_config.epochs),
    ):
        if value != usual and name in reasons:
            changes[name] = value
    config.model.compute_dtype = recipe_config.model.compute_dtype
    return Suggestion(recipe, config, changes, reasons, needed)


def _sized(base: Config, batch: int, images: int) -> Config:
    """Returns the config with that batch size, and the queue, rate and epochs that follow from it."""
    config = dataclasses.replace(
        base, moco=dataclasses.replace(base.moco), optim=dataclasses.replace(base.optim), batch_size=batch
    )
    if config.method == "moco":
        config.moco.queue_size = min(batch * _power_of_two(max(images // 4 // batch, 1)), _MOST_KEYS)
    if config.optim.name == "sgd":
        config.optim.lr = 0.03 * batch / 256
    steps = images // batch
    least, most = (math.ceil(_UPDATES[0] / steps), _UPDATES[1] // steps)
    epochs = min(max(200, least), max(most, 1))
    epochs = math.ceil(epochs / 10) * 10 if epochs < most else epochs
    config.epochs = min(max(epochs, _EPOCHS[0]), _EPOCHS[1])
    return config


def _estimate(base: Config, batch: int, images: int) -> int:
    """Returns the bytes of a step on one accelerator."""
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    return sum(memory.estimate(_sized(base, batch, images), mesh, held=_HELD))


def _power_of_two(number: int) -> int:
    """Returns the largest power of two up to a number of at least 1."""
    return 1 << (number.bit_length() - 1)
