"""IFM on SimCLR, on handwritten digits over textures: simclr_digits.py with the perturbed loss added.

    python train.py --config=configs/ifm_simclr_digits.py --workdir=runs/ifm_simclr_digits

Hardware: as simclr_digits.py.
Expected: no figure is published for these images. One run says nothing about the method: see docs/studies.md.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("simclr_digits")
    config.ifm.objective = "ifm"
    config.ifm.epsilon = 0.1
    return config
