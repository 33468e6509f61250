"""Images prepared by TensorFlow Datasets as ArrayRecord files, read without TensorFlow: `tfds:NAME`.

    tfds:cifar10, tfds:imagenet2012:5.1.0     below $TFDS_DATA_DIR (~/tensorflow_datasets if unset)
    tfds:/data/cifar10/3.0.2                  the folder that holds dataset_info.json

Records are read one by one (`as_data_source`); the images stay encoded until their views are cut. A data set prepared
as TFRecord, the older default, has no random access; `tfds convert_format` rewrites it once.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from ifm_jax import files
from ifm_jax.data import crops
from ifm_jax.data.classes import chosen, some
from ifm_jax.data.images import EncodedImages, UnreadableImageError
from ifm_jax.data.npz import Npz, NpzError
from ifm_jax.errors import UsageError

_SPLITS = {"train": ("train",), "test": ("validation", "test")}  # the defaults
_FEATURES = "features.json"  # in a prepared data set: the classes of its features
_AT_ONCE = 256  # records per read of the labels


class Tfds(EncodedImages):
    """Random access to the images of a prepared data set.

    Attributes:
      records: result of `as_data_source`, with encoded images.
      full_name: full name of the data set, with its version and split.
      image_key: name of the feature that holds the image.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        full_name: str,
        image_key: str,
        label_names: dict[str, tuple[str, ...]],
        image_size: int,
        random_crops: crops.RandomCrops = crops.TWO_VIEWS,
        memory: str = "",
    ):
        """Wraps an opened data set.

        Args:
          records: result of `as_data_source`.
          full_name: full name of the data set, with its version and split.
          image_key: name of the feature that holds the image.
          label_names: class names of each label.
          image_size: side of a view in pixels.
          random_crops: crops that `views` cuts.
          memory: identity of the prepared files, the key under which their labels are cached; empty: no cache.
        """
        super().__init__(image_size, random_crops, label_names)
        self.records, self.full_name, self.image_key, self._memory = records, full_name, image_key, memory
        self._kept: np.ndarray | None = None  # the records of the chosen classes
        self._labels: dict[str, np.ndarray] | None = None

    def keep(self, label: str, names: Sequence[str]) -> None:
        """Keeps the images of some classes only and renumbers the classes.

        Args:
          label: name of the label.
          names: names of the classes.
        """
        number = np.full(len(self.label_names[label]) + 1, -1, np.int32)  # the last for label -1: unlabeled
        number[[self.label_names[label].index(name) for name in names]] = np.arange(len(names), dtype=np.int32)
        labels = self.labels()
        self._kept = np.flatnonzero(number[labels[label]] >= 0)
        self._labels = {name: values[self._kept] for name, values in labels.items()}
        self._labels[label] = number[self._labels[label]]
        self.label_names = self.label_names | {label: tuple(names)}

    def __len__(self) -> int:
        return len(self.records) if self._kept is None else len(self._kept)

    def name(self, index: int) -> str:
        """Returns the data set and the number of a record."""
        return f"{self.full_name} record {self._record(index)}"

    def labels(self) -> dict[str, np.ndarray]:
        """Returns int32 `(len(self),)` for each label; -1 where a record has none.

        Reading them means reading the whole records, so this happens once and the result is cached.
        """
        if self._labels is None:
            self._labels = self._remembered_labels() if self.label_names else {}
        return self._labels

    def encoded(self, index: int) -> np.ndarray:
        """Returns the bytes of an image; see `EncodedImages`."""
        try:
            return np.frombuffer(self.records[self._record(index)][self.image_key], np.uint8)
        except Exception as error:  # a damaged record can make the reader raise anything
            raise UnreadableImageError(self.name(index), f"{type(error).__name__}: {error}".splitlines()[0]) from None

    def _record(self, index: int) -> int:
        return int(index if self._kept is None else self._kept[index])

    def _fingerprint(self) -> list[str | bytes]:
        return [self.full_name, str(len(self.records)), b"" if self._kept is None else self._kept.tobytes()]

    def _remembered_labels(self) -> dict[str, np.ndarray]:
        name = hashlib.sha256(f"{self._memory}\0{self.full_name}\0{len(self.records)}".encode()).hexdigest()[:24]
        path = files.cache_directory("tfds") / f"{name}.npz"
        if self._memory:
            try:
                with Npz(path) as file:
                    return {label: file[label] for label in self.label_names}
            except (FileNotFoundError, NpzError, KeyError):  # missing or incomplete
                pass
        labels = self._read_labels()
        if self._memory:
            # If the cache cannot be written, the next start reads the labels again.
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with files.replacing(path) as temporary, temporary.open("wb") as file:
                    arrays: dict[str, Any] = dict(labels)  # for savez's type: a name could be one of its options
                    np.savez_compressed(file, **arrays)
        return labels

    def _read_labels(self) -> dict[str, np.ndarray]:
        from rich.console import Console
        from rich.progress import track

        def read(begin: int) -> list[list[int]]:
            records = [self.records[place] for place in range(begin, min(begin + _AT_ONCE, len(self.records)))]
            return [[int(record[label]) for record in records] for label in self.label_names]

        begins = range(0, len(self.records), _AT_ONCE)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            parts = pool.map(read, begins)
            if sys.stderr.isatty() and len(begins) > 100:
                text = f"Reading the labels of {self.full_name}"
                parts = track(parts, text, len(begins), console=Console(stderr=True), transient=True)
            values = np.concatenate(
                [np.asarray(part, np.int32).reshape(len(self.label_names), -1) for part in parts], 1
            )
        return dict(zip(self.label_names, values, strict=True))


def open_tfds(
    name: str,
    split: str,
    *,
    image_size: int,
    classes: str = "",
    expression: str = "",
    random_crops: crops.RandomCrops = crops.TWO_VIEWS,
) -> Tfds:
    """Opens a prepared data set.

    Args:
      name: name of the data set, or the folder that holds its dataset_info.json.
      split: "train" or "test".
      image_size: side of a view in pixels.
      classes: a file that names the classes to keep, see `classes.read_names`; empty: all.
      expression: which of the data set's splits to use ("train+unlabelled", "train[:90%]"); empty: "train" for
        training; "validation", or else "test", for the held-out images.
      random_crops: crops that `views` of the source cuts.

    Raises:
      UsageError: if the name is unknown, the data set is not prepared as ArrayRecord or has no images, or the split or
        a class does not exist.
    """
    said = f"data.source='tfds:{name}'"
    tfds = _tfds(said)
    builder = _builder(tfds, name, said)
    info, path = builder.info, builder.data_path
    if not (pathlib.Path(path) / "dataset_info.json").exists():
        raise UsageError(
            f"{said} is not prepared: expected it in {path}; with TensorFlow installed, prepare it by python -c "
            f"\"import tensorflow_datasets as tfds; tfds.builder('{name}', file_format='array_record')"
            '.download_and_prepare()", or set TFDS_DATA_DIR to its location'
        )
    formats = sorted(each.value for each in info.available_file_formats())  # a data set converted in place has two
    if "array_record" not in formats:
        raise UsageError(
            f"{said} is prepared as {' and '.join(formats)} in {path}, without random access: expected "
            f"array_record; convert it once, in place, with tfds convert_format --dataset_version_dir={path} "
            "--out_file_format=array_record (it needs tensorflow, apache-beam and mlcroissant)"
        )
    features = dict(info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not images:
        raise UsageError(f"{said} has no images: its features are {some(list(features))}; expected an Image among them")
    expression = expression or next((each for each in _SPLITS[split] if each in info.splits), "")
    try:
        if not expression:
            raise ValueError
        decoders = {key: tfds.decode.SkipDecoding() for key in images}
        records = builder.as_data_source(split=expression, decoders=decoders)
    except (ValueError, KeyError, AttributeError):
        wanted = f"{expression!r}" if expression else f"{split} images: {' or '.join(map(repr, _SPLITS[split]))}"
        raise UsageError(
            f"{said} has no split {wanted}; expected one of {some(sorted(info.splits), 9)}, or an expression such as "
            f"'train[:90%]' in data.{split}_split"
        ) from None
    names = {
        key: tuple(feature.names) for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)
    }
    stamp = (pathlib.Path(path) / "dataset_info.json").stat().st_mtime_ns
    source = Tfds(
        records, f"{info.full_name} {expression}", images[0], names, image_size, random_crops, f"{path} {stamp}"
    )
    if classes:
        if not names:
            raise UsageError(f"data.classes={classes!r}: {said} has no labels; leave data.classes empty")
        label = next(iter(names))
        source.keep(label, chosen(classes, names[label], f"classes of {name}"))
        if not len(source):
            raise UsageError(f"data.classes={classes!r}: {said} has no {split} images of these classes")
    return source


def _tfds(said: str) -> types.ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UsageError(
            f"{said} needs a missing package ({error}): pip install tensorflow-datasets importlib_resources"
        ) from None
    return tensorflow_datasets


def _builder(tfds: types.ModuleType, name: str, said: str) -> Any:
    """Returns the builder of a folder, or of a name."""
    try:
        folder = pathlib.Path(name).expanduser()
        if (folder / "dataset_info.json").exists():
            _check_features(folder / _FEATURES, said)
            return tfds.builder_from_directory(folder)
        if folder.is_dir() and len(folder.parts) > 1:
            raise UsageError(
                f"{said}: {folder} has no dataset_info.json; expected the folder of a prepared version, such as "
                "/data/cifar10/3.0.2"
            )
        from absl import logging

        for path in _features_of_name(tfds, name):
            _check_features(path, said)
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # it warns of an unprepared folder; our own message is clearer
        try:
            return tfds.builder(name)
        finally:
            logging.set_verbosity(verbosity)
    except UsageError:
        raise
    except Exception as error:  # it has many error classes for many kinds of mistakes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{said} cannot be opened ({reason}): expected the name of a data set of TensorFlow Datasets, as in "
            "tfds:cifar10, or the folder of a prepared one"
        ) from None


def _features_of_name(tfds: types.ModuleType, name: str) -> list[pathlib.Path]:
    """Returns the feature files of all prepared versions of a data set in the search path."""
    parts = [part for part in re.split("[:/]", name) if part not in ("", ".", "..")]
    roots = tfds.core.utils.file_utils.list_data_dirs()  # undocumented (tests/test_private_apis.py)
    return [path for root in roots for part in parts for path in (pathlib.Path(root) / part).rglob(_FEATURES)]


def _check_features(path: pathlib.Path, said: str) -> None:
    """Rejects features that are not TensorFlow Datasets' own: it would import any module that they name.

    Raises:
      UsageError: at the first such class.
    """
    try:
        pending = [json.loads(path.read_text())]
    except FileNotFoundError:
        return
    while pending:
        value = pending.pop()
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(ValueError):  # it may be JSON in JSON
                pending.append(json.loads(value))
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            # The last is the older form, beside a "content"; a feature may also be called "type".
            classes = [value.get("pythonClassName"), value.get("python_class_name")]
            classes += [value["type"]] if "content" in value and "type" in value else []
            for each in classes:
                if isinstance(each, str) and "." in each and not each.startswith("tensorflow_datasets."):
                    raise UsageError(
                        f"{said}: {path} names the class {each!r}, which would run code from outside TensorFlow "
                        "Datasets; expected classes of tensorflow_datasets: prepare the data set with those"
                    )
