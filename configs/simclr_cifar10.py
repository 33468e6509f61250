"""SimCLR on CIFAR-10, with the settings of the hard-negatives code for its small images.

    python train.py --config=configs/simclr_cifar10.py --workdir=runs/simclr_cifar10

Reads tfds:cifar10, prepared as in docs/data.md; array:FILE.npz works too. Evaluate with

    python eval_linear.py --workdir=runs/simclr_cifar10

ResNet-50 without the first pooling and with a first convolution of 3x3, 32 px, head "hcl", T = 0.5, batch 256, one
BatchNorm over both views of the batch, Adam with lr 1e-3 and weight decay 1e-6, constant learning rate, 400 epochs:
from image/main.py and image/model.py in github.com/joshr17/HCL. There are three differences: the released code runs
each view through the network separately, so its BatchNorm sees one view at a time; it blurs with a kernel of 3 pixels,
which is left out here; and it normalizes with CIFAR-10's own mean and standard deviation.

Hardware: one GPU with 16 GB. No time is known.
Expected: the released code gives no figure for CIFAR-10. Not yet run with this code.
"""

from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = Config()

    config.method = "simclr"
    config.simclr.temperature = 0.5
    config.simclr.head = "hcl"
    config.ifm.objective = "infonce"

    config.model.arch = "resnet50"
    config.model.stem = "small"
    config.model.bn_groups = 1

    config.optim.name = "adam"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 1e-6
    config.optim.schedule = "step"
    config.optim.milestones = ()

    config.data.source = "tfds:cifar10"
    config.data.image_size = 32
    config.data.augmentation = "moco_cifar"

    config.batch_size = 256
    config.epochs = 400
    return config
