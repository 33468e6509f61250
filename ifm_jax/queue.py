"""`ifm_jax.methods.queue` under the name that it had before the methods had a folder of their own."""

import sys

from ifm_jax.methods import queue

sys.modules[__name__] = queue
