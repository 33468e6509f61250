"""IFM on a small folder of your own images, from 100 to about 10,000; without labels.

    python train.py --config=configs/ifm_few_images.py --config.data.source=folder:PATH --workdir=runs/own

    python eval_linear.py --workdir=runs/own --neighbors=neighbors.png --map=map.png --features=features.npz

PATH is as for `ifm_own_images`, the recipe for more images. SimCLR needs no queue: its negatives come from the batch,
so that no image is its own negative, however few there are. With fewer than 64 images, add `--config.batch_size=32`.

Hardware: one GPU; for a few hundred images also a CPU, if patient. To see on a CPU whether it runs, add

    --config.model.arch=resnet8 --config.model.stem=small_stride2 --config.data.image_size=64

Expected: no figure; Adam's settings are those of `simclr_cifar10`, T that of MoCo-v2, and none is tuned. A few hundred
images teach an encoder little: with `init_from`, start from one that was trained on more if you have it.
"""

from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = Config()

    config.method = "simclr"
    config.model.arch = "resnet18"
    config.simclr.temperature = 0.2

    config.data.source = "folder:"  # given on the command line
    config.data.image_size = 128
    config.data.augmentation = "moco_v2"

    config.optim.name = "adam"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 1e-6

    config.batch_size = 64
    config.epochs = 200
    return config
