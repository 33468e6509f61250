"""MoCo-v1 on ImageNet, 200 epochs, with the settings of MoCo's code (its defaults).

    python train.py --config=configs/moco_v1_imagenet.py --config.data.source=folder:PATH --workdir=runs/moco_v1

PATH is as in moco_v2_imagenet.py, from which this recipe differs in the head (one linear layer), T = 0.07, the
augmentation (no blur, jitter always and with more hue) and the schedule (a tenth from epoch 120, a hundredth from 160).
Evaluate with

    python eval_linear.py --workdir=runs/moco_v1

Hardware and time: as moco_v2_imagenet.py.
Expected: 60.8 +- 0.2 % top-1, linear, over five runs; the released checkpoint has 60.6 (README of
github.com/facebookresearch/moco). Not yet run with this code.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("moco_v2_imagenet")

    config.moco.temperature = 0.07
    config.moco.mlp = False

    config.optim.schedule = "step"
    config.optim.milestones = (120, 160)

    config.data.augmentation = "moco_v1"
    return config
