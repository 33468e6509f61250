"""SimCLR on handwritten digits over textures: ten digits, ten textures, ten colors, negatives from the batch.

    python train.py --config=configs/simclr_digits.py --workdir=runs/simclr_digits

The setting of ifm_simclr_trifeature.py on `data.source=digits` (docs/data.md), without flips, which would mirror the
digits. The digits of the held-out images are in other handwriting than those of training.

Hardware: two CPU cores, two minutes. No download.
Expected: TODO
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("trifeature")
    config.method = "simclr"
    config.simclr.temperature = 0.07
    config.ifm.objective = "infonce"
    config.model.bn_groups = 1
    config.data.source = "digits"
    config.data.augment.flip = 0.0
    return config
