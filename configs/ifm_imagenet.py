"""IFM on ImageNet, 200 epochs: MoCo-v2's recipe with the perturbed loss added.

    python train.py --config=configs/ifm_imagenet.py --config.data.source=folder:PATH --workdir=runs/ifm_imagenet

PATH and all settings but the loss are as in moco_v2_imagenet.py. For another epsilon: --config.ifm.epsilon=0.05.
Evaluate with

    python eval_linear.py --workdir=runs/ifm_imagenet

Hardware and time: as moco_v2_imagenet.py; IFM adds one scalar per query.
Expected: as an estimate, the accuracy of MoCo-v2 (67.5 % top-1, linear) or up to a point more. IFM's README has figures
for ImageNet-100 only, where epsilon 0.1 added 0.9 points. Not yet run with this code.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("moco_v2_imagenet")
    config.ifm.method = "ifm"
    config.ifm.epsilon = 0.1
    return config
