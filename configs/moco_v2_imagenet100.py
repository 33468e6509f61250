"""MoCo-v2 on ImageNet-100, with the settings of IFM's code: the baseline of IFM.

    python train.py --config=configs/moco_v2_imagenet100.py --config.data.source=folder:PATH --workdir=runs/moco100

PATH has ImageNet's `train` and `val`, of whose classes imagenet100_classes.txt keeps 100, or only those 100 classes;
tfds:imagenet2012 works too (docs/data.md). Evaluate with

    python eval_linear.py --workdir=runs/moco100

ResNet-50, lr 0.8, batch 512 in 8 BatchNorm groups, m = 0.99, T = 0.2, K = 65536, weight decay 1e-4, 200 epochs, cosine.

Hardware: 8 GPUs with 16 GB or 4 with 32 GB (the original: "any 8-gpu machine", or 4 V100s); or an accelerator or a TPU
slice with as much memory in all, whose number of chips divides 512.
Expected: 80.5 % top-1, linear (README of github.com/joshr17/IFM; without seeds or spread). An estimate of the time on
8 V100s: 5 to 6 hours, a tenth of the 53 that MoCo's README gives for ImageNet. Not yet run with this code.
"""

import pathlib

from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = Config()

    config.model.arch = "resnet50"
    config.model.bn_groups = 8
    config.moco.queue_size = 65536
    config.moco.momentum = 0.99
    config.moco.temperature = 0.2
    config.ifm.method = "moco"

    config.optim.lr = 0.8
    config.optim.weight_decay = 1e-4
    config.optim.schedule = "cosine"

    config.data.source = "folder:"  # given on the command line
    config.data.classes = str(pathlib.Path(__file__).resolve().with_name("imagenet100_classes.txt"))
    config.data.image_size = 224
    config.data.augmentation = "moco_v2"

    config.batch_size = 512
    config.epochs = 200
    return config
