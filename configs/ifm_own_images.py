"""IFM on a folder of your own images; MoCo-v2's views.

    python train.py --config=configs/ifm_own_images.py --config.data.source=folder:PATH --workdir=runs/own

PATH has the images (JPEG, PNG, WebP, BMP), or one folder of them for each class, or `train` and `val` with either in
them; docs/data.md describes these and other sources. Training uses no labels. Look at what it has learned, and with
classes evaluate it, with

    python eval_linear.py --workdir=runs/own --neighbors=neighbors.png --map=map.png --features=features.npz
    python eval_linear.py --workdir=runs/own

Hardware: one GPU with 16 GB, and enough processors to decode as fast as it trains (docs/data.md: `data_wait`).
On a CPU, to see whether it runs and learns at all, add

    --config.data.image_size=64 --config.model.arch=resnet8 --config.model.stem=small_stride2
    --config.batch_size=64 --config.model.bn_groups=2 --config.moco.queue_size=2048

Expected: no figure; these settings are the original's for ImageNet-100, scaled to a smaller network, images and batch,
and untested at scale. An estimate of the time: 5 hours on a V100 for 200 epochs of 100,000 images. Use ten
thousand images or more; `ifm_few_images` is for fewer, and `ifm-jax config --suggest --images=20000` recommends sizes
for another number. A moco.queue_size above the number of images is refused, since each would be its own negative.
Compare with --config.ifm.method=moco before you rely on IFM.
"""

from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = Config()

    config.model.arch = "resnet18"
    config.moco.queue_size = 8192
    config.moco.momentum = 0.99

    config.data.source = "folder:"  # given on the command line
    config.data.image_size = 128
    config.data.augmentation = "moco_v2"

    config.batch_size = 256
    config.epochs = 200
    return config
