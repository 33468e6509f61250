"""IFM on ImageNet in batches of 4096, on a TPU slice of 64 chips: LARS, warm-up, the rate scaled with the batch.

    python train.py --config=configs/ifm_imagenet_pod.py --config.data.source=tfds:imagenet2012 --workdir=runs/ifm_pod

on every host of the slice (docs/pods.md, launch/). Evaluate with

    python eval_linear.py --workdir=runs/ifm_pod

UNTESTED AT SCALE: compiled for its topology, never run. LARS, its base rate (0.3 for 256 images, scaled linearly to
4.8), weight decay 1e-6 and ten epochs of warm-up come from MoCo-v3's code for ResNet-50 at this batch
(github.com/facebookresearch/moco-v3, CONFIG.md and the defaults of main_moco.py), which has another loss and no queue.
There are 64 BatchNorm groups of 64 images, one per chip, and m = 0.99, for a sixteenth of the updates. The shuffle is
balanced: a chip receives 64 key images instead of all 4096 (docs/pods.md). The rest is as in MoCo-v2 and IFM. For
another batch size set --config.batch_size, --config.model.bn_groups (64 images each), and
--config.optim.lr=0.3 * batch_size / 256; with more than 64 groups of 64 images also --config.moco.shuffle_bn=true,
because a balanced shuffle needs a batch size that is a multiple of the number of groups squared.

Hardware: 64 chips of TPU v5e (8x8), or any slice whose number of chips divides 4096 and whose memory suffices:

    python -m benchmarks.tpu_plan --config=configs/ifm_imagenet_pod.py --topology=v5e:8x8

It predicts 4.2 of 16 GiB per chip, and for 200 epochs 0.2 hours at peak compute or 1.4 by the roofline; neither is
measured. 64 chips at this speed need some 40,000 images per second from 8 or 16 hosts (docs/data.md: `data_wait`).
Expected: no figure. Compare with --config.ifm.method=moco before you rely on IFM, and tune the rate first.
"""

from ifm_jax import optim
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = Config()

    config.model.arch = "resnet50"
    # 64 images a group, as in the recipe for ImageNet-100 (512 in 8 groups).
    config.model.bn_groups = 64
    config.moco.queue_size = 65536  # 16 batches
    config.moco.momentum = 0.99
    config.moco.temperature = 0.2
    config.moco.shuffle_bn = "balanced"
    config.ifm.method = "ifm"
    config.ifm.epsilon = 0.1

    config.optim.name = "lars"
    config.optim.lr = optim.scaled_learning_rate(0.3, 4096)  # 4.8
    config.optim.weight_decay = 1e-6
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 10.0
    config.optim.per_step = True

    config.data.source = "folder:"  # given on the command line
    config.data.image_size = 224
    config.data.augmentation = "moco_v2"

    config.batch_size = 4096
    config.epochs = 200
    return config
