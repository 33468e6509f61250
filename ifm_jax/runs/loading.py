"""Reads a network from a run, one of its checkpoints or a PyTorch file, as a snapshot or as a live model."""

import os
import pathlib
import warnings

import jax
import jax.numpy as jnp

from ifm_jax import config as configs
from ifm_jax.errors import UsageError
from ifm_jax.models import Encoder, without_head
from ifm_jax.models.resnet import ResNet
from ifm_jax.runs import snapshot
from ifm_jax.runs.snapshot import Snapshot
from ifm_jax.runs.workdir import Workdir


def read(path: str | os.PathLike[str], step: int | None = None, prefix: str = "") -> Snapshot:
    """Reads a checkpoint of this package or of PyTorch.

    Args:
      path: a run's workdir (its newest checkpoint that can be read), its `checkpoints`, or `checkpoints/<step>`; a
        PyTorch file, `.pth`, `.pth.tar` or `.safetensors`; a folder with a `model.safetensors`, as timm has them; or
        `hf://USER/REPO`, such a folder on the Hugging Face hub.
      step: updates done, for a PyTorch file; see `torch_interop.reading.read`.
      prefix: what the network's names begin with in a PyTorch file; likewise.

    Returns:
      The snapshot; its `notes` name damaged checkpoints that were skipped.

    Raises:
      UsageError: if there is nothing to read at `path`.
      RunError: if the hub cannot be reached.
    """
    if os.fspath(path).startswith("hf://"):
        from ifm_jax.torch_interop import hub

        path = hub.fetch(os.fspath(path)) / hub.WEIGHTS
    elif pathlib.Path(path).is_dir():
        weights = pathlib.Path(path) / "model.safetensors"
        if weights.is_file() and not Workdir(path).checkpoints.is_dir():
            path = weights
    if pathlib.Path(path).is_dir():
        if prefix:
            raise UsageError(
                f"--prefix={prefix}: {path} is a directory: a prefix applies to PyTorch files only; leave it out"
            )
        return snapshot.read_run(path)
    from ifm_jax.torch_interop import reading  # only for a PyTorch file

    return reading.read(path, step, prefix)


def load(path: str | os.PathLike[str], *, dtype: str = "float32", prefix: str = "") -> ResNet:
    """Returns the backbone of the query encoder, without its head, as a live Flax NNX module in evaluation mode.

    It normalizes with its running averages and does not update them; nothing in it trains unless you make it.

    Args:
      path: a run's working directory (the newest checkpoint), one of its checkpoints (`DIR/checkpoints/<step>`); a
        `.pth`, `.pth.tar` or `.safetensors` in the original's or torchvision's format, or another library's file that
        holds a ResNet under a prefix; a folder with a `model.safetensors`; or `hf://USER/REPO`, such a folder on the
        Hugging Face hub (`hf://USER/REPO@REVISION`: of a branch, tag or commit).
      dtype: dtype of parameters and arithmetic; "float64" needs JAX's 64-bit types on.
      prefix: what the network's names in a PyTorch file begin with, such as `backbone.`; "": detected if unambiguous
        (`read`).

    Returns:
      `model(images)`: `(N, H, W, 3)` in `dtype`, normalized with ImageNet's mean and standard deviation ->
      `(N, model.num_features)`. For a run on `randbit:BITS:...`, the images have BITS further channels of -1 and 1.

    Raises:
      UsageError: if there is nothing to read at `path`.
      RunError: if the hub cannot be reached.

    Example:
      >>> model = ifm_jax.load("runs/trifeature")              # doctest: +SKIP
      >>> features = nnx.jit(lambda m, x: m(x))(model, images)  # doctest: +SKIP
    """
    found = read(path, prefix=prefix)
    for note in found.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    model = found.config.model
    encoder = Encoder(
        arch=model.arch,
        dim=0,
        stem=model.stem,
        width=model.width,
        compute_dtype=dtype,
        param_dtype=dtype,
        in_channels=configs.channels(found.config.data),
    )
    place = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), without_head(tree))  # noqa: E731
    return encoder.bind(place(found.state.params), place(found.state.batch_stats))
