"""Trains from a checkpoint on recorded views and compares with a reference, quantity by quantity.

    python -m ifm_jax.replay --start=FILE.pth.tar --views=views.npz --reference=reference.npz
    python -m ifm_jax.replay --config=configs/x.py --start=DIR --views=views.npz --out=out.npz

The training step is the usual one, but its views come from a file instead of a data source. The default is float64,
because in float32 no two programs stay together for long (docs/parity.md).

views.npz holds `query` and `key` (steps, N, H, W, 3), augmented and normalized; optionally `permutation` (steps, N),
where shuffled key image i is `key[permutation[i]]`; optionally `lr` (steps,).

reference.npz holds any of `loss`, `loss_clean`, `loss_ifm`, `acc1`, `acc5`, `grad_norm`, `queue_ptr` (steps,); the
embeddings of the first step, `first/query` and `first/key` (N, dim); and the final state, `final/<name>`, under
PyTorch's names and in its layout. --out writes all of them.

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
