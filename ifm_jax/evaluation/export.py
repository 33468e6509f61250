"""Features for other programs: writes them with labels and names, or maps them to two dimensions."""

import os
import pathlib
from typing import Any

import numpy as np

from ifm_jax import files
from ifm_jax.data.protocols import ViewSource
from ifm_jax.errors import UsageError

_MAP_IMAGES = 5000  # more would take long and hide each other


def write(path: str | os.PathLike[str], features: np.ndarray, source: ViewSource) -> None:
    """Writes the features of a source's images.

    `.npz`: `features` `(N, D)`, `names` text `(N,)`, and for each label int32 `label_<name>` `(N,)` with its classes,
    text, as `classes_<name>`. `.array_record`: a record for each image, a dict without the classes that
    `flax.serialization.msgpack_restore` reads: `features` `(D,)`, `name`, `label_<name>`.

    Args:
      path: path of the file; its suffix decides.
      features: `(N, D)`.
      source: source of the N images.

    Raises:
      UsageError: if the suffix is another, or the file cannot be written.
    """
    path = pathlib.Path(path)
    check_suffix(path, (".npz", ".array_record"), "--features")
    names = [source.name(index) for index in range(len(source))]
    labels = {f"label_{name}": values for name, values in source.labels().items()}
    try:
        with files.replacing(path) as temporary:
            if path.suffix == ".npz":
                classes = {f"classes_{name}": np.array(each) for name, each in source.label_names.items()}
                with temporary.open("wb") as file:
                    arrays: dict[str, Any] = labels | classes  # for savez's type: a name could be one of its options
                    np.savez(file, features=features, names=np.array(names), **arrays)
            else:
                _write_records(temporary, features, names, labels)
    except OSError as error:
        raise UsageError(
            f"--features={path} cannot be written ({error.strerror or error}): name a writable file"
        ) from None


def _write_records(path: pathlib.Path, features: np.ndarray, names: list[str], labels: dict[str, np.ndarray]) -> None:
    from array_record.python import array_record_module
    from flax import serialization

    path.touch()  # raises errors that the writer would only print
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        for index, name in enumerate(names):
            of_image = {label: int(values[index]) for label, values in labels.items()}
            writer.write(serialization.msgpack_serialize({"features": features[index], "name": name} | of_image))
    finally:
        writer.close()


def check_suffix(path: pathlib.Path, suffixes: tuple[str, ...], flag: str) -> None:
    """Raises a `UsageError` if the file has another suffix or its folder does not exist."""
    if path.suffix not in suffixes:
        raise UsageError(f"{flag}={path}: expected a name that ends in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag}={path}: {path.absolute().parent} does not exist; name a file in an existing folder")


def two_dimensions(features: np.ndarray, method: str = "tsne", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps images, at most 5,000 drawn at random, to two dimensions.

    Args:
      features: `(N, D)`; compared by cosine similarity.
      method: "tsne" (scikit-learn's t-SNE) or "umap" (needs umap-learn).
      seed: seed of the draw and of the method.

    Returns:
      The rows of the images in `features`, int `(n,)`, and their positions, float `(n, 2)`.

    Raises:
      UsageError: if the method's package is missing, or there are fewer than four images.
    """
    if len(features) < 4:
        raise UsageError(f"{len(features)} images are too few for a map: expected at least 4")
    shown = np.sort(np.random.default_rng(seed).permutation(len(features))[:_MAP_IMAGES])
    chosen = features[shown]
    if method == "umap":
        try:
            import umap  # pyrefly: ignore[missing-import] (where it is not installed)
        except ImportError:
            raise UsageError(
                "--map_method=umap needs umap-learn: pip install umap-learn, or use --map_method=tsne"
            ) from None
        return shown, umap.UMAP(metric="cosine", random_state=seed).fit_transform(chosen)
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(chosen) - 1) / 3)
    return shown, TSNE(metric="cosine", perplexity=perplexity, random_state=seed).fit_transform(chosen)
