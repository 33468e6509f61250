"""Trains from a checkpoint on recorded views and compares with a reference, quantity by quantity.

    python -m ifm_jax.replay --start=FILE.pth.tar --views=views.npz --reference=reference.npz
    python -m ifm_jax.replay --config=configs/x.py --start=DIR --views=views.npz --out=out.npz

The step is the one that trains; only its views come from a file instead of from a data source. In float64 unless told
otherwise, because in float32 no two programs stay together for long (docs/parity.md).

views.npz: `query`, `key` (steps, N, H, W, 3), augmented and normalized; `permutation` (steps, N), optional: place i of
the shuffled key images holds `key[permutation[i]]`; `lr` (steps,), optional. reference.npz, any of: `loss`,
`loss_clean`, `loss_ifm`, `acc1`, `acc5`, `grad_norm`, `queue_ptr` (steps,); `first/query`, `first/key` (N, dim), the
embeddings of the first step; `final/<name>`, the state at the end under PyTorch's names and in its layout. --out writes
all of them.

A quantity holds if the largest absolute error is at most atol + rtol * (largest magnitude in the reference); the
relative error shown is the largest absolute error over that magnitude. Exit status 0 if all hold, 1 if not.
"""

if __name__ == "__main__":
    from ifm_jax import process

    process.begin()  # first: the imports below take seconds

    from ifm_jax.cli import replay as command

    command.run(__doc__)

from ifm_jax.torch_interop.replay import Comparison, check_views, compare, load_npz, replay

__all__ = ["Comparison", "check_views", "compare", "load_npz", "replay"]
