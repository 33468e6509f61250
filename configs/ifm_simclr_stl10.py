"""IFM on SimCLR, STL-10's 105,000 training images, in the setting of the hard-negatives paper.

    python train.py --config=configs/ifm_simclr_stl10.py --workdir=runs/ifm_simclr_stl10
    python train.py --config=configs/ifm_simclr_stl10.py --workdir=runs/simclr_stl10 --config.ifm.objective=infonce
    python train.py --config=configs/ifm_simclr_stl10.py --workdir=runs/hard_stl10 --config.ifm.objective=infonce
        --config.hard.beta=1 --config.hard.tau_plus=0.1

Reads tfds:stl10, prepared as in docs/data.md. Evaluate with

    python eval_linear.py --workdir=runs/ifm_simclr_stl10

As simclr_cifar10.py (image/main.py in github.com/joshr17/HCL: ResNet-50, first convolution 3x3 without pooling, Adam
1e-3, weight decay 1e-6, T = 0.5, batch 256, 400 epochs, head "hcl"), on crops of 32 px, with blur. The differences
named there apply here too. In addition, MoCo-v2's blur replaces that code's blur of 3 pixels, and MoCo-v2's crops of
0.2 to 1 of the area replace its 0.08 to 1.

Hardware: one GPU with 16 GB. No time is known.
Expected: for orientation, linear accuracy in the README of that code, one run each: SimCLR 80.15 %, debiased (tau+ of
0.1) 84.26, beta 0.5, 1, 2, 6 with tau+ 0.1: 86.38, 87.44, 87.09, 83.09. None is published for IFM. Not yet run with
this code.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("ifm_simclr_cifar10")
    config.data.source = "tfds:stl10"
    config.data.train_split = "train+unlabelled"
    config.data.test_split = "test"
    config.data.augmentation = "moco_v2"
    return config
