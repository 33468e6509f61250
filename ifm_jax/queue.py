"""Former name of `ifm_jax.methods.queue`."""

import sys

from ifm_jax.methods import queue

sys.modules[__name__] = queue
