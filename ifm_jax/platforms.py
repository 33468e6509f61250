"""What is computed in another form on CPUs, GPUs or TPUs, and why.

The results are the same; the forms differ in time or in memory traffic:

- Convolutions (`models/convolution.py`): on a CPU some as matrix products, one for each tap, instead of XLA's plain
  loop: up to 120 times faster. The gradients of most kernels as one product, 1x1 or of shifted copies: 2 to 10 times.
  Groups some at a time: a step of a ResNeXt in a twentieth of the time. Or by oneDNN, if the caller chooses it.
- Blur (`augment.py`): on a TPU as products with banded matrices instead of shifted sums: half of its cycles on a v5e.
  On a CPU they take two to four times as long, on a GPU the same time.
- The last ReLU of a residual block (`models/activation.py`): on a GPU with the gradient's mask from its result instead
  of the sum before it: 4.7 % fewer bytes per step on an H100.
- BatchNorm with a ReLU (`models/batch_norm.py`): on a GPU the gradient computes the ReLU's mask in both of its passes;
  otherwise the first one writes the masked gradient for the second: 127.9 instead of 131.1 GB per step on an H100.
- The gradient of max-pooling (`models/pooling.py`): on a GPU by the number of the first maximum instead of a second
  search: the stem moves 5.2 instead of 7.9 GB per step on an H100. On a TPU it moves five times as much.

(Bytes and cycles are those of compiled programs: ResNet-50, 224 px, 256 images, bfloat16.)

What decides is the platform that the program is *compiled* for, not the one that runs Python: `benchmarks.tpu_plan`
and `benchmarks.gpu_plan` compile for absent accelerators.
"""

from collections.abc import Callable
from typing import Any

import jax


def select(
    *operands: Any,
    default: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
    tpu: Callable[..., Any] | None = None,
) -> Any:
    """Returns the result of the form for the platform that the program is compiled for.

    Args:
      *operands: arrays, the arguments of every form.
      default: form for the platforms without one of their own.
      cpu: form for CPUs, if it is another.
      gpu: form for GPUs, if it is another.
      tpu: form for TPUs, if it is another.
    """
    forms = {"cpu": cpu, "cuda": gpu, "rocm": gpu, "tpu": tpu}
    return jax.lax.platform_dependent(
        *operands, default=default, **{name: form for name, form in forms.items() if form is not None}
    )
