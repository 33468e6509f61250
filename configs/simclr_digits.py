"""SimCLR on handwritten digits over textures: ten digits, ten textures, ten colors, negatives from the batch.

    python train.py --config=configs/simclr_digits.py --workdir=runs/simclr_digits

The setting of ifm_simclr_trifeature.py on `data.source=digits` (docs/data.md), without flips, which would mirror the
digits. The digits of the held-out images are in other handwriting than those of training.

Hardware: two CPU cores, two minutes. No download.
Expected: contrast accuracy of 85 to 92 % at the end (768 steps). Readouts of digit/texture/color in one run (seed 0):
66.0/30.2/100.0, of the untrained network 18.2/18.8/90.2; after 300 steps 54.5/27.1/100.0.
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
