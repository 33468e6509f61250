"""`ifm_jax.methods.losses` under the name that it had before the methods had a folder of their own."""

import sys

from ifm_jax.methods import losses

sys.modules[__name__] = losses
