"""IFM on STL-10's 105,000 training images, of which 5,000 have labels.

    python train.py --config=configs/ifm_stl10.py --workdir=runs/stl10
    python train.py --config=configs/ifm_stl10.py --workdir=runs/stl10_moco --config.ifm.method=moco

Reads tfds:stl10, prepared as in docs/data.md. Evaluate with

    python eval_linear.py --workdir=runs/stl10

The settings are those of ifm_cifar10.py except for 96 px, MoCo-v2's augmentation (crops of 0.2 to 1, with blur),
MoCo-v2's head, and a first convolution of stride 2, after which the maps are 48 pixels wide instead of 96: a quarter of
the work.

Hardware: one GPU with 16 GB. An estimate for a V100: 5 to 6 hours, from the CIFAR-10 demo's 1.1 by images and pixels.
Expected: no published figure is known for MoCo or IFM under these settings. For orientation, SimCLR with ResNet-18
after 40 epochs on the same images has 70.3 %, linear (README of github.com/sthalles/SimCLR). Not tuned, not yet run.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("ifm_cifar10")

    config.model.stem = "small_stride2"
    config.moco.mlp = True

    config.data.source = "tfds:stl10"
    config.data.train_split = "train+unlabelled"
    config.data.test_split = "test"
    config.data.image_size = 96
    config.data.augmentation = "moco_v2"
    return config
