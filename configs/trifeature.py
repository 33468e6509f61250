"""IFM on the embedded Trifeature images: the default, for a first run anywhere.

    python train.py

Hardware: two CPU cores, about a minute and a half. No download.
Expected: linear readouts of shape and texture at least 15 points above the untrained network's.
"""

from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = Config()

    config.model.arch = "resnet8"
    config.model.stem = "small_stride2"
    config.model.bn_groups = 2
    config.moco.queue_size = 2048
    config.moco.momentum = 0.99
    config.moco.temperature = 0.07

    config.optim.name = "adamw"
    config.optim.lr = 0.003

    config.data.image_size = 32
    config.data.augmentation = "trifeature"
    config.data.trifeature.shapes = 6
    config.data.trifeature.textures = 6
    config.data.trifeature.colors = 6
    config.data.trifeature.rotation = 18.0
    config.data.trifeature.texture_rotation = 15.0
    config.data.trifeature.scale_min = 0.75
    config.data.trifeature.scale_max = 0.95

    config.batch_size = 64
    config.epochs = 6
    config.log_every = 16
    config.checkpoint_every = 256
    return config
