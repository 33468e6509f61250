"""IFM on ImageNet-100: the original's main result. MoCo-v2's recipe with the perturbed loss added.

    python train.py --config=configs/ifm_imagenet100.py --config.data.source=folder:PATH --workdir=runs/ifm100

PATH and all settings but the loss are as in moco_v2_imagenet100.py. The epsilon is 0.1; for the original's other values
use --config.ifm.epsilon=0.05 or 0.2 and another workdir. Evaluate with

    python eval_linear.py --workdir=runs/ifm100

Hardware and time: as moco_v2_imagenet100.py; IFM adds one scalar per query.
Expected: top-1, linear (README of github.com/joshr17/IFM; without seeds or spread)

    MoCo-v2    IFM, epsilon 0.05    0.1       0.2
    80.5 %     81.1 %               81.4 %    80.9 %

Not yet run with this code.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("moco_v2_imagenet100")
    config.ifm.method = "ifm"
    config.ifm.epsilon = 0.1
    return config
