"""SimCLR on ImageNet-100: moco_v2_imagenet100.py with negatives from the batch instead of a queue.

    python train.py --config=configs/simclr_imagenet100.py --config.data.source=folder:PATH --workdir=runs/simclr100

PATH is as in moco_v2_imagenet100.py. Evaluate with

    python eval_linear.py --workdir=runs/simclr100

ResNet-50, batch 512 and so 1,022 negatives, T = 0.1 and LARS with lr 0.3 * batch / 256, weight decay 1e-6 and ten
epochs of warm-up (Chen et al. 2020, section 2.2 and appendix B.6), MoCo-v2's augmentation, 200 epochs.

Hardware: as moco_v2_imagenet100.py, with twice the memory for activations, since both views are trained on.
Expected: no published figure is known under these settings. Not yet run with this code.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("moco_v2_imagenet100")
    config.method = "simclr"
    config.simclr.temperature = 0.1
    config.model.bn_groups = 1
    config.optim.name = "lars"
    config.optim.lr = 0.3 * config.batch_size / 256
    config.optim.weight_decay = 1e-6
    config.optim.warmup_epochs = 10.0
    config.optim.per_step = True
    return config
