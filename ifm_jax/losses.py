"""Former name of `ifm_jax.methods.losses`."""

import sys

from ifm_jax.methods import losses

sys.modules[__name__] = losses
