"""MoCo-v2 on ImageNet, 200 epochs, with the settings of MoCo's code (--mlp --moco-t 0.2 --aug-plus --cos).

    python train.py --config=configs/moco_v2_imagenet.py --config.data.source=folder:PATH --workdir=runs/moco_v2

PATH has ImageNet's `train` and `val`; tfds:imagenet2012 works too (docs/data.md). Evaluate with

    python eval_linear.py --workdir=runs/moco_v2

ResNet-50, lr 0.03, batch 256 in 8 BatchNorm groups, m = 0.999, T = 0.2, K = 65536, weight decay 1e-4, cosine.

Hardware: 8 GPUs with 16 GB, or an accelerator or a TPU slice with as much memory in all, whose number of chips divides
256.
Expected: 67.5 +- 0.1 % top-1, linear, over five runs; 53 hours on 8 V100s (both: README of
github.com/facebookresearch/moco). Not yet run with this code.
"""

from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = Config()

    config.model.arch = "resnet50"
    config.model.bn_groups = 8
    config.moco.queue_size = 65536
    config.moco.momentum = 0.999
    config.moco.temperature = 0.2
    config.ifm.method = "moco"

    config.optim.lr = 0.03
    config.optim.weight_decay = 1e-4
    config.optim.schedule = "cosine"

    config.data.source = "folder:"  # given on the command line
    config.data.image_size = 224
    config.data.augmentation = "moco_v2"

    config.batch_size = 256
    config.epochs = 200
    return config
