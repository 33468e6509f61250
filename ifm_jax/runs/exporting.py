"""Writes a frozen backbone as one file that JAX alone runs, without this package: `jax.export`."""

import importlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

import ifm_jax
from ifm_jax import config as configs
from ifm_jax import files
from ifm_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from ifm_jax.errors import UsageError
from ifm_jax.models import Encoder, without_head
from ifm_jax.runs import loading
from ifm_jax.runs.snapshot import Snapshot

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    image_size: int = 0,
    prefix: str = "",
    overwrite: bool = False,
) -> tuple[Snapshot, dict[str, Any]]:
    """Writes the backbone of a run or a PyTorch file as a serialized program, its weights included.

    `jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes())).call(images)` runs it, with nothing but JAX and
    flatbuffers: float32 `(N, image_size, image_size, 3)`, normalized -> float32 `(N, features)`. `path` + `.json` says
    what the images must look like. JAX reads such files for at least six months after the version that wrote them.

    Args:
      source: anything that `loading.read` reads.
      path: file to write.
      batch: N; None: any number, decided by each call.
      platforms: platforms that can run it, of `PLATFORMS`; none of them is needed to write it.
      image_size: side of the images in pixels; 0: the run's `data.image_size` (224 for a PyTorch file).
      prefix: see `torch_interop.reading.read`.
      overwrite: replace existing files.

    Returns:
      The snapshot of the source, and the content of the JSON file.

    Raises:
      UsageError: if the source cannot be read, a platform is unknown, flatbuffers is missing, or the file cannot be
        written.
    """
    try:
        importlib.import_module("flatbuffers")  # JAX needs it to serialize
    except ImportError:
        raise UsageError("writing a program requires flatbuffers: pip install flatbuffers") from None
    path = pathlib.Path(path)
    described = path.with_name(path.name + ".json")
    if unknown := [name for name in platforms if name not in PLATFORMS]:
        raise UsageError(f"--platforms={','.join(platforms)}: {unknown[0]!r} is not one of {', '.join(PLATFORMS)}")
    for existing in (each for each in (path, described) if each.exists() and not overwrite):
        raise UsageError(f"{existing} already exists: name another file, or pass --overwrite")
    found = loading.read(source, prefix=prefix)
    model, size = found.config.model, image_size or found.config.data.image_size
    channels = configs.channels(found.config.data)
    encoder = Encoder(model.arch, dim=0, stem=model.stem, width=model.width, in_channels=channels)
    trees = without_head(found.state.params), without_head(found.state.batch_stats)
    params, batch_stats = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), trees)

    def features(images: jax.Array) -> jax.Array:
        return encoder.bind(params, batch_stats)(images)

    count = batch if batch is not None else jax.export.symbolic_shape("N")[0]
    images = jax.ShapeDtypeStruct((count, size, size, channels), jnp.float32)
    program = jax.export.export(jax.jit(features), platforms=list(platforms))(images)
    content: dict[str, Any] = {
        "input": {"shape": [batch or "N", size, size, channels], "dtype": "float32", "channels": "RGB first"},
        "output": {"shape": [batch or "N", program.out_avals[0].shape[1]], "dtype": "float32"},
        "preprocessing": {
            "resize_shorter_side": round(size * 256 / 224),
            "interpolation": "bilinear",
            "resize_if": f"the image is not {size} x {size} already",
            "center_crop": size,
            "scale": "to [0, 1]",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
        "network": {"arch": model.arch, "stem": model.stem, "width": model.width, "step": int(found.state.step)},
        "versions": {"jax": jax.__version__, "ifm_jax": ifm_jax.__version__},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.write_bytes(program.serialize())
        files.write_json(described, content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}): name a writable file") from None
    return found, json.loads(json.dumps(content))
