"""Writes a frozen backbone as a folder that timm loads: `local-dir:FOLDER`, and after an upload `hf-hub:USER/REPO`.

- `model.safetensors`: the backbone under timm's names, which are torchvision's; float32.
- `config.json`: the architecture, and what the images must look like, in timm's form.
- `README.md`: a model card with recipe, images, evaluation and the check of the conversion.
"""

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import ifm_jax
from ifm_jax import config as configs
from ifm_jax import files
from ifm_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.models import ARCHITECTURES, without_head
from ifm_jax.runs import loading
from ifm_jax.runs.snapshot import Snapshot
from ifm_jax.runs.workdir import Workdir
from ifm_jax.torch_interop import writing
from ifm_jax.torch_interop.description import describe_architecture
from ifm_jax.torch_interop.hub import CARD, CONFIG, WEIGHTS
from ifm_jax.torch_interop.names import architecture_of, num_features

_CROP = 224 / 256  # the share of the shorter side that the evaluation view keeps; see `data.crops.central_view`
_METHODS = {"moco": "MoCo-v2", "simclr": "SimCLR"}
_PROTOCOLS = {
    "linear_full": "linear probe, full protocol (SGD on random crops)",
    "linear_fast": "linear probe, fast protocol (SGD on stored features of a few crops)",
    "logistic_regression": "logistic regression (L-BFGS) on standardized features",
    "knn": "nearest neighbors, weighted by exp(cosine similarity / T)",
}
# Fields that name places of the machine, which are nobody else's business, or that say nothing about the encoder.
_PRIVATE = ("data.source", "data.classes", "data.workers", "data.processes", "data.cache", "init_from")


@dataclasses.dataclass(frozen=True)
class Check:
    """The comparison of timm's features of an exported folder with ours.

    Attributes:
      images: number of random images.
      size: their side in pixels.
      difference: largest absolute difference of a feature, relative to the largest absolute feature.
      timm: version of timm.
    """

    images: int
    size: int
    difference: float
    timm: str


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a folder to write for timm: an existing one, or a name without the suffix of a file."""
    path = pathlib.Path(path)
    return path.is_dir() or not path.name.endswith(writing.SUFFIXES)


def write(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, prefix: str = "", overwrite: bool = False
) -> tuple[Snapshot, Check | None]:
    """Writes the backbone of a run or a PyTorch file as a folder for timm.

    If timm is installed, it loads the folder, and its features of random images are compared with ours; the result is
    in the model card. Paths of this machine are not written: of a folder of images only its name.

    Args:
      source: workdir of a run, one of its checkpoints, or a PyTorch file.
      folder: folder to write; created if it does not exist. Other files in it, such as `.git`, stay.
      prefix: see `reading.read`, if the source is a PyTorch file.
      overwrite: replace the files of an earlier export.

    Returns:
      The snapshot of the source with remarks as its `notes`, and the comparison; None without timm.

    Raises:
      UsageError: if timm has no such architecture, the source cannot be read, or the folder holds something else.
    """
    folder = pathlib.Path(folder)
    _check_folder(folder, overwrite)
    found = loading.read(source, prefix=prefix)
    arch, size = timm_architecture(found.config), found.config.data.image_size
    tensors = {
        name: values.astype(np.float32) if values.dtype.kind in "fV" else values
        for name, values in writing.backbone_tensors(found).items()
        if not name.startswith("fc.")
    }
    known = _describe(found, arch, size)
    writing.write_file(folder / CONFIG, lambda file: file.write_text(json.dumps(known, indent=2) + "\n"))
    writing.write_file(folder / WEIGHTS, lambda file: writing.save_safetensors(tensors, arch, file))
    notes = list(found.notes)
    try:
        check = compare(folder, size)
    except ImportError as error:
        check = None
        notes.append(f"timm cannot be imported ({str(error).splitlines()[0]}): the folder is not compared with timm")
    card = _card(found, arch, size, _evaluations(source, found), check)
    writing.write_file(folder / CARD, lambda file: file.write_text(card))
    return dataclasses.replace(found, notes=tuple(notes)), check


def timm_architecture(config: Config) -> str:
    """Returns timm's name of the network that a config describes, which is also torchvision's.

    Raises:
      UsageError: if timm has no such network.
    """
    own = ARCHITECTURES[config.model.arch]
    if (
        config.model.stem != "imagenet"
        or architecture_of(config) != own
        or len(own.depths) != 4
        or configs.channels(config.data) != 3
    ):
        raise UsageError(
            f"timm has no architecture for {describe_architecture(config)}: expected one of torchvision's networks, "
            "with its own stem and width; `export` writes any network as a program, --for=torchvision its tensors"
        )
    return config.model.arch


def compare(folder: str | os.PathLike[str], size: int, images: int = 2) -> Check:
    """Compares timm's features of an exported folder with ours, on images of normal noise.

    Args:
      folder: folder that `write` has made.
      size: side of the images in pixels.
      images: number of images.

    Raises:
      ImportError: if timm or what it needs cannot be imported.
    """
    try:
        import torch

        timm = importlib.import_module("timm")  # so, because not everyone who checks types has it
    except (RuntimeError, AttributeError) as error:  # torchvision beside a torch that it does not fit
        raise ImportError(str(error)) from None
    noise = np.random.default_rng(0).standard_normal((images, size, size, 3), np.float32)
    ours = np.asarray(nnx.jit(lambda model, x: model(x))(loading.load(folder), jax.numpy.asarray(noise)))
    model = timm.create_model(f"local-dir:{pathlib.Path(folder).absolute()}", pretrained=True).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))).numpy()
    difference = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    return Check(images, size, difference, timm.__version__)


def _check_folder(folder: pathlib.Path, overwrite: bool) -> None:
    """Raises a `UsageError` if the folder holds something that must not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder, or a file that ends in {', '.join(writing.SUFFIXES)}")
    if Workdir(folder).checkpoints.exists():
        raise UsageError(f"{folder} is the workdir of a run and is not overwritten: name another folder")
    if there := [name for name in (CONFIG, WEIGHTS, CARD) if (folder / name).exists()]:
        if not overwrite:
            raise UsageError(f"{folder} already has {', '.join(there)}: name another folder, or pass --overwrite")
        if CONFIG in there and "architecture" not in (files.read_json(folder / CONFIG, "name another folder") or {}):
            raise UsageError(f"{folder / CONFIG} is not timm's and is not overwritten: name another folder")


def _describe(found: Snapshot, arch: str, size: int) -> dict[str, Any]:
    """Returns the content of config.json: timm's, and an entry of ours that timm ignores."""
    return {
        "architecture": arch,
        "num_classes": 0,
        "num_features": num_features(architecture_of(found.config)),
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": "ifm_jax",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": _CROP,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "pool_size": [-(-size // 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "ifm_jax": {
            "version": ifm_jax.__version__,
            "step": int(found.state.step),
            "config": {} if found.origin else _recipe(found.config),
        },
    }


def _recipe(config: Config) -> dict[str, Any]:
    """Returns the fields of a config that differ from their defaults, without those that name places."""
    own, plain = (configs.flatten(configs.to_dict(each)) for each in (config, Config()))
    groups = ("eval.", "linear.", *(() if config.method == "simclr" else ("simclr.",)))
    groups += ("moco.",) if config.method == "simclr" else ()
    groups += () if config.data.source == "trifeature" else ("data.trifeature.",)
    return {
        name: value
        for name, value in own.items()
        if value != plain[name] and name not in _PRIVATE and not name.startswith(groups)
    }


def _evaluations(source: str | os.PathLike[str], found: Snapshot) -> list[tuple[str, str, float, str]]:
    """Returns what results.json says about this state of the run: protocol, label, top-1, and the settings in words."""
    path = pathlib.Path(source).absolute()
    inside = Workdir("").checkpoints.name
    directory = path.parents[1] if path.parent.name == inside else path.parent if path.name == inside else path
    results = files.read_json(Workdir(directory).results, "delete it and evaluate again") or {}
    rows: list[tuple[str, str, float, str]] = []
    for name, kept in results.items():
        for entry in kept if isinstance(kept, list) else [kept]:
            if isinstance(entry, dict) and entry.get("step") == int(found.state.step):
                images = f"images {public(str(entry.get('source', '')))}"
                rows += [
                    (_PROTOCOLS.get(name, name), label, top1, ", ".join([*settings, images]))
                    for label, top1, settings in _accuracies(entry)
                ]
    return rows


def _accuracies(entry: dict[str, Any]) -> Iterator[tuple[str, float, list[str]]]:
    """Yields the label, top-1 and settings of every accuracy in an entry of results.json."""
    for label, value in entry.items():
        if isinstance(value, dict) and isinstance(value.get("top1"), int | float):
            numbers = {name: each for name, each in value.items() if type(each) in (int, float) and name != "chosen"}
            settings = [f"{name.replace('_', ' ')} {each:.6g}" for name, each in numbers.items() if name != "top1"]
            yield label, value["top1"], settings


def public(source: str) -> str:
    """Returns `data.source` without the path on this machine: `folder:cats` for `folder:/home/me/cats`."""
    kind, colon, place = source.partition(":")
    return f"{kind}{colon}{pathlib.PurePath(place).name}" if place else source


def _card(
    found: Snapshot, arch: str, size: int, evaluations: list[tuple[str, str, float, str]], check: Check | None
) -> str:
    """Returns the model card, Markdown with the hub's fields at the top."""
    config, origin = found.config, found.origin
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(without_head(found.state.params)))
    features = num_features(architecture_of(config))
    title = f"{arch}, converted from {origin.file}" if origin else f"{arch}, pre-trained with {_objective(config)}"
    if origin:
        recipe = [
            f"Converted from the PyTorch file `{origin.file}`. A file does not tell the recipe, the images or the "
            "objective of its training."
        ]
        if steps := int(found.state.step):
            recipe.append(f"Its batch counters tell {steps:,} steps.")
    else:
        fields = _recipe(config)
        epochs = f" ({found.epoch:,} epochs)" if found.epoch else ""
        recipe = [
            f"Method: {_objective(config)}. {int(found.state.step):,} steps{epochs} of {config.batch_size:,} images.",
            "",
            "| field of the config that differs from its default | value |",
            "|---|---|",
            *(f"| `{name}` | `{json.dumps(value)}` |" for name, value in fields.items()),
        ]
    images = "not known" if origin else f"`{public(config.data.source)}`, without labels"
    figures = ["Not evaluated yet."]
    if evaluations:
        figures = [
            "Frozen features; every held-out image counts once.",
            "",
            "| protocol | label | top-1, % | settings and further figures |",
            "|---|---|---|---|",
            *(f"| {protocol} | {label} | {top1:.2f} | {settings} |" for protocol, label, top1, settings in evaluations),
        ]
    checked = "The folder has not been compared with timm: timm was not installed where it was written."
    if check is not None:
        checked = (
            f"timm {check.timm} loaded this folder; on {check.images} images of {check.size} x {check.size} random "
            f"pixels its features differ from those of ifm_jax by at most {check.difference:.1e}, relative to the "
            "largest feature."
        )
    return _CARD.format(
        title=title,
        arch=arch,
        parameters=f"{parameters:,}",
        features=f"{features:,}",
        version=ifm_jax.__version__,
        size=size,
        short=round(size / _CROP),
        mean=", ".join(map(str, IMAGENET_MEAN)),
        std=", ".join(map(str, IMAGENET_STD)),
        recipe="\n".join(recipe),
        images=images,
        evaluation="\n".join(figures),
        check=checked,
    )


def _objective(config: Config) -> str:
    """Returns the method and its objective in words, with their parameters."""
    epsilon, negative = configs.epsilons(config.ifm)
    shift = f"{epsilon:g}" if epsilon == negative else f"{epsilon:g} (negatives {negative:g})"
    method = f"{_METHODS.get(config.method, config.method)} (T = {configs.temperature(config):g})"
    if config.ifm.objective != "infonce":
        only = "IFM's loss alone" if config.ifm.objective == "ifm_only" else "IFM"
        method = f"{only} (epsilon = {shift}) on {method}"
    hard = [f"beta = {config.hard.beta:g}"] if config.hard.beta else []
    hard += [f"tau+ = {config.hard.tau_plus:g}"] if config.hard.tau_plus else []
    return method + (f" with hard negatives ({', '.join(hard)})" if hard else "")


_CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- image-feature-extraction
- self-supervised-learning
- ifm_jax
---

# {title}

The backbone of a {arch}: {parameters} parameters, {features} features, no classifier. Written by ifm_jax {version}.

## Use

```python
import timm

model = timm.create_model("hf-hub:USER/REPO", pretrained=True).eval()    # or local-dir:FOLDER
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg, model=model))
```

```python
import ifm_jax

model = ifm_jax.load("hf://USER/REPO")                        # or the folder
features = model(ifm_jax.preprocess(images, {size}))          # uint8 or [0, 1] -> (N, {features})
```

Images: RGB in [0, 1], shorter side resized to {short} pixels (bilinear), central square of {size}, minus the mean
({mean}), divided by the standard deviation ({std}).

## Training

{recipe}

Images: {images}.

## Evaluation

{evaluation}

## Check of the conversion

{check}
"""
