"""IFM on SimCLR, CIFAR-10: simclr_cifar10.py with the perturbed loss added.

    python train.py --config=configs/ifm_simclr_cifar10.py --workdir=runs/ifm_simclr_cifar10

Evaluate with

    python eval_linear.py --workdir=runs/ifm_simclr_cifar10

The epsilon is 0.1, the paper's middle value; for others use --config.ifm.epsilon=0.05 or 0.2.

Hardware: as simclr_cifar10.py; IFM adds one scalar per query.
Expected: no published figure is known under these settings. Not yet run with this code.
"""

from ifm_jax import recipes
from ifm_jax.config import Config


def get_config() -> Config:
    """Returns the recipe."""
    config = recipes.load("simclr_cifar10")
    config.ifm.objective = "ifm"
    config.ifm.epsilon = 0.1
    return config
