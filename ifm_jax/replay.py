"""Trains from a checkpoint on recorded views and compares with a reference, quantity by quantity.

    python -m ifm_jax.replay --start=FILE.pth.tar --views=views.npz --reference=reference.npz

The same as `ifm-jax replay`, whose --help describes the files; `torch_interop/replay.py` does the work.
"""

if __name__ == "__main__":
    from ifm_jax.cli.main import run

    run("replay")

from ifm_jax.torch_interop.replay import Comparison, check_views, compare, load_npz, replay

__all__ = ["Comparison", "check_views", "compare", "load_npz", "replay"]
