"""The configuration of a run: typed fields, each default written once, and `validate`.

Plain dataclasses, not frozen, because the flags library sets their fields one by one; `validate` is called once after
parsing, and what it lets through the rest of the package takes as it is. The defaults are the original's (IFM's
MoCo-v2 script); recipes in `configs/` change what differs.
"""

import dataclasses
import json
from typing import Any

from ifm_jax import models, optim, pretrain
from ifm_jax.errors import UsageError

COMPUTE_DTYPES = ("auto", "bfloat16", "float32", "float64")
AUGMENTATIONS = ("trifeature", "moco_v1", "moco_v2", "moco_cifar")

# Fields that say how long and how closely a run is watched, and with what its images are read, not what it computes:
# they may change on resuming. Where the images lie may too; that they are the same ones is checked by themselves.
# Nor does evaluation change anything.
FREE_ON_RESUME = (
    "eval",
    "linear",
    "data.label",
    "steps",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "checkpoint_keep",
    "checkpoint_best",
    "data.source",
    "data.classes",
    "data.workers",
    "data.processes",
    "data.max_bad",
    "data.cache",
    "data.cache_size",
    "steps_per_call",
    "moco.queue_sharded",
)


@dataclasses.dataclass
class ModelConfig:
    """Query and key encoder.

    Attributes:
      arch: one of `models.ARCHITECTURES` (original: -a).
      stem: "imagenet", "small" (3x3, no pooling: 32 to 64 px) or "small_stride2" (5x5 stride 2, no pooling).
      width: channels of the first stage; 0: the architecture's own (64).
      bn_groups: BatchNorm groups a batch is split into; the original's 8 GPUs.
      running_stats: which groups the running averages follow: "first_group" (the original) or "mean".
      compute_dtype: "bfloat16", "float32", "float64" (turns 64-bit types on, parameters too), or "auto": bfloat16 on an
        accelerator, float32 on a CPU.
    """

    arch: str = "resnet50"
    stem: str = "imagenet"
    width: int = 0
    bn_groups: int = 8
    running_stats: str = "first_group"
    compute_dtype: str = "auto"


@dataclasses.dataclass
class MoCoConfig:
    """Momentum contrast.

    Attributes:
      dim: length of an embedding (original: --moco-dim).
      queue_size: K, the number of negatives; a multiple of the batch size (--moco-k).
      momentum: m of the key encoder's moving average (--moco-m).
      temperature: tau (--moco-t).
      mlp: two-layer projection head, MoCo-v2's (--mlp).
      shuffle_bn: keys in a random order of the batch, so that BatchNorm does not tell a key from the negatives.
      queue_sharded: each device holds its part of the queue, not all of it: for very large queues. The same results.
    """

    dim: int = 128
    queue_size: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2
    mlp: bool = True
    shuffle_bn: bool = True
    queue_sharded: bool = False


@dataclasses.dataclass
class IFMConfig:
    """Implicit feature modification.

    Attributes:
      method: "moco" (InfoNCE), "ifm" (mean of InfoNCE and the shifted loss) or "ifm_only" (--method).
      epsilon: perturbation budget in units of cosine similarity (--epsilon).
      epsilon_negative: a budget of their own for the negatives; None: the same.
      alpha: weight of the shifted loss under "ifm" (--alpha).
    """

    method: str = "ifm"
    epsilon: float = 0.1
    epsilon_negative: float | None = None
    alpha: float = 1.0


@dataclasses.dataclass
class OptimConfig:
    """Optimiser and learning rate.

    Attributes:
      name: "sgd" (as PyTorch's), "lars" or "adamw".
      lr: base learning rate, for the global batch (--lr).
      momentum: of SGD and LARS (--momentum).
      weight_decay: on all parameters with SGD and AdamW (--wd).
      schedule: "cosine" or "step" (--cos).
      milestones: epochs at which "step" divides by ten (--schedule).
      warmup_epochs: linear warm-up over so many epochs.
      per_step: the schedule moves every step instead of once an epoch.
    """

    name: str = "sgd"
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = (120, 160)
    warmup_epochs: float = 0.0
    per_step: bool = False


@dataclasses.dataclass
class TrifeatureConfig:
    """The embedded images (Hermann and Lampinen 2020): shape, texture and colour vary independently.

    Attributes:
      train_size: training images.
      test_size: held-out images, for readouts.
      shapes: how many of the ten shapes.
      textures: how many of the ten textures.
      colors: how many of the ten colours.
      rotation: a shape is turned by up to so many degrees either way.
      texture_rotation: its texture likewise, by an angle of its own; 180: any angle.
      texture_period: one period of a texture, as a share of the image's side.
      scale_min: smallest diameter of the circle around a shape, as a share of the image's side.
      scale_max: largest diameter.
      noise: amplitude of the noise on the grey background, pixels in [0, 1].
      seed: of the images; apart from the run's, so that runs with other seeds see the same data.
    """

    train_size: int = 8192
    test_size: int = 2048
    shapes: int = 10
    textures: int = 10
    colors: int = 10
    rotation: float = 45.0
    texture_rotation: float = 45.0
    texture_period: float = 0.2
    scale_min: float = 0.7
    scale_max: float = 0.9
    noise: float = 0.06
    seed: int = 0


@dataclasses.dataclass
class AugmentConfig:
    """Strengths of the "trifeature" augmentation; none of it touches hue, which is one of the features measured.

    Attributes:
      crop_min: smallest area of the random crop, as a share of the image.
      flip: probability of a horizontal flip.
      rotation: up to so many degrees either way.
      brightness: factor drawn from 1 +- this.
      contrast: factor drawn from 1 +- this.
      noise: standard deviation of Gaussian pixel noise, pixels in [0, 1].
    """

    crop_min: float = 0.36
    flip: float = 0.5
    rotation: float = 9.0
    brightness: float = 0.3
    contrast: float = 0.3
    noise: float = 0.0


@dataclasses.dataclass
class DataConfig:
    """Images and their views.

    Attributes:
      source: "trifeature", "folder:PATH", "tfds:NAME" (or tfds:PATH) or "array:FILE.npz".
      classes: a file of class names to keep, one a line, # for comments; empty: all.
      train_split: of a tfds: source, for training ("train+unlabelled"); empty: train.
      test_split: of a tfds: source, held out; empty: validation, or else test.
      augmentation: "trifeature", "moco_v1", "moco_v2" (original: --aug-plus) or "moco_cifar" (32 px: no blur).
      image_size: side of a view in pixels.
      limit: the first so many training images only; 0: all.
      workers: threads that read images, in each process; 0: automatic.
      processes: worker processes that read images; 0: threads of this process do, enough for a dozen processors.
      max_bad: share of the training images that may be unreadable; each is replaced by a neighbour.
      cache: "device": the whole data set lies in the devices' memory and is cropped there, for those that fit; empty:
        images are read as they are needed.
      cache_size: side in pixels of the copies there; 0: 256/224 of image_size, or the images' own where that is less.
      label: which label of the source an evaluation is about; empty: each of them.
      trifeature: the embedded images.
      augment: strengths of the "trifeature" augmentation.
    """

    source: str = "trifeature"
    classes: str = ""
    train_split: str = ""
    test_split: str = ""
    augmentation: str = "moco_v2"
    image_size: int = 224
    limit: int = 0
    workers: int = 0
    processes: int = 0
    max_bad: float = 0.01
    cache: str = ""
    cache_size: int = 0
    label: str = ""
    trifeature: TrifeatureConfig = dataclasses.field(default_factory=TrifeatureConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)


@dataclasses.dataclass
class EvalConfig:
    """Evaluation while pre-training: frozen features of a part of the images, now and then.

    Attributes:
      every: epochs between two evaluations; 0: none.
      images: at most so many training images, and as many held-out ones; 0: all.
      neighbors: k of the nearest neighbours.
      temperature: of their weights.
    """

    every: int = 0
    images: int = 10_000
    neighbors: int = 200
    temperature: float = 0.07


@dataclasses.dataclass
class LinearConfig:
    """Linear evaluation of the frozen backbone (`eval_linear.py`); the defaults are the original's.

    Attributes:
      lr: base learning rates; with weight_decay, a head for every combination (original: 10; MoCo's own: 30).
      weight_decay: of weights and biases.
      momentum: of SGD.
      batch_size: global.
      epochs: passes over the training images.
      milestones: epochs at which the learning rate is divided by ten.
      holdout: share of the training images on which the best of several heads is chosen; not trained on.
      views: augmented views of each image that the fast protocol trains on; 0: the evaluated view.
      seed: of heads, order and views.
    """

    lr: tuple[float, ...] = (10.0,)
    weight_decay: tuple[float, ...] = (0.0,)
    momentum: float = 0.9
    batch_size: int = 128
    epochs: int = 60
    milestones: tuple[int, ...] = (30, 40, 50)
    holdout: float = 0.1
    views: int = 8
    seed: int = 0


@dataclasses.dataclass
class Config:
    """A pre-training run, and its evaluation.

    Attributes:
      model: encoders.
      moco: momentum contrast.
      ifm: implicit feature modification.
      optim: optimiser and learning rate.
      data: images and views.
      eval: evaluation while pre-training.
      linear: linear evaluation afterwards.
      batch_size: global, over all devices and hosts (original: -b).
      epochs: passes over the data (--epochs).
      steps: stop after so many updates, the schedule unchanged; 0: `epochs` decides.
      steps_per_call: with data.cache="device", so many steps are one call of the compiled program.
      seed: of everything random.
      log_every: steps between two lines of metrics.
      checkpoint_every: steps between two checkpoints; the last step is always saved.
      checkpoint_minutes: most minutes between two checkpoints; 0: steps alone decide.
      checkpoint_keep: how many of the newest checkpoints are kept.
      checkpoint_best: the measure of `eval` (knn, linear, effective_rank, or one label's, knn/shape) whose best
        checkpoint is kept beside them; each evaluation is saved then. Empty: none.
      init_from: a run's workdir, one of its checkpoints or a .pth.tar, whose weights a new run starts with, at step 0.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    moco: MoCoConfig = dataclasses.field(default_factory=MoCoConfig)
    ifm: IFMConfig = dataclasses.field(default_factory=IFMConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    linear: LinearConfig = dataclasses.field(default_factory=LinearConfig)
    batch_size: int = 256
    epochs: int = 200
    steps: int = 0
    steps_per_call: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 0.0
    checkpoint_keep: int = 3
    checkpoint_best: str = ""
    init_from: str = ""


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dicts of JSON's types."""
    # Through JSON, so that it compares equal to what is read back (tuples become lists).
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the config that `to_dict` made `values` of; fields that `values` lacks keep their defaults.

    Raises:
      UsageError: for a field that does not exist.
    """
    config = Config()
    for name, value in flatten(values).items():
        holder, _, field = name.rpartition(".")
        target = config
        for part in filter(None, holder.split(".")):
            target = getattr(target, part, None)
        if not hasattr(target, field):
            raise UsageError(f"config field {name!r} is unknown: written by another version of ifm_jax?")
        setattr(target, field, tuple(value) if isinstance(value, list) else value)
    return config


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, `{"moco.dim": 128, ...}`."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def differences(config: Config, other: Config) -> list[str]:
    """Returns what tells two configs apart, `field: ours, not theirs`, apart from fields free on resuming."""
    ours, theirs = flatten(to_dict(config)), flatten(to_dict(other))
    return [
        f"{name}: {ours.get(name)!r}, not {theirs.get(name)!r}"
        for name in ours | theirs
        if not {name, name.split(".")[0]} & set(FREE_ON_RESUME) and ours.get(name) != theirs.get(name)
    ]


def validate(config: Config, devices: int = 1) -> None:
    """Checks every field, alone and together with the others.

    Args:
      config: after parsing.
      devices: over which a batch will be split.

    Raises:
      UsageError: for the first mistake found: the field, its value, what was expected.
    """
    model, moco, ifm, opt, data = config.model, config.moco, config.ifm, config.optim, config.data
    evaluation, linear = config.eval, config.linear

    def one_of(name, value, choices):
        if value not in choices:
            raise UsageError(f"{name}={value!r} is unknown: expected one of {', '.join(choices)}")

    def check(good, name, value, expected):
        if not good:
            raise UsageError(f"{name}={value!r}: expected {expected}")

    one_of("model.arch", model.arch, models.ARCHITECTURES)
    one_of("model.stem", model.stem, models.STEMS)
    one_of("model.running_stats", model.running_stats, ("first_group", "mean"))
    one_of("model.compute_dtype", model.compute_dtype, COMPUTE_DTYPES)
    one_of("ifm.method", ifm.method, pretrain.METHODS)
    one_of("optim.name", opt.name, optim.OPTIMIZERS)
    one_of("optim.schedule", opt.schedule, optim.SCHEDULES)
    one_of("data.augmentation", data.augmentation, AUGMENTATIONS)
    check(data.cache in ("", "device"), "data.cache", data.cache, "device, or nothing")

    for name, value, least in (
        ("batch_size", config.batch_size, 1),
        ("epochs", config.epochs, 1),
        ("steps", config.steps, 0),
        ("steps_per_call", config.steps_per_call, 1),
        ("seed", config.seed, 0),
        ("log_every", config.log_every, 1),
        ("checkpoint_every", config.checkpoint_every, 1),
        ("checkpoint_minutes", config.checkpoint_minutes, 0),
        ("checkpoint_keep", config.checkpoint_keep, 1),
        ("model.width", model.width, 0),
        ("model.bn_groups", model.bn_groups, 1),
        ("moco.dim", moco.dim, 1),
        ("moco.queue_size", moco.queue_size, 1),
        ("data.image_size", data.image_size, 8),
        ("data.limit", data.limit, 0),
        ("data.workers", data.workers, 0),
        ("data.processes", data.processes, 0),
        ("data.cache_size", data.cache_size, 0),
        ("eval.every", evaluation.every, 0),
        ("eval.images", evaluation.images, 0),
        ("eval.neighbors", evaluation.neighbors, 1),
        ("linear.batch_size", linear.batch_size, 1),
        ("linear.epochs", linear.epochs, 1),
        ("linear.views", linear.views, 0),
        ("linear.seed", linear.seed, 0),
    ):
        check(value >= least, name, value, f"at least {least}")
    check(
        config.steps_per_call == 1 or data.cache,
        "steps_per_call",
        config.steps_per_call,
        "1, or data.cache=device with it: the images of all these steps have to be there",
    )
    best = config.checkpoint_best
    check(
        not best or best == "effective_rank" or best.split("/")[0] in ("knn", "linear"),
        "checkpoint_best",
        best,
        "knn, linear, effective_rank, or one label's, for example knn/shape",
    )
    check(not best or evaluation.every, "checkpoint_best", best, "eval.every of at least 1 with it: its epochs")
    check(0.0 <= moco.momentum <= 1.0, "moco.momentum", moco.momentum, "a number from 0 to 1")
    check(moco.temperature > 0, "moco.temperature", moco.temperature, "a number above 0 (MoCo-v2: 0.2)")
    check(ifm.epsilon >= 0, "ifm.epsilon", ifm.epsilon, "a number of at least 0 (the paper: 0.05 to 0.2)")
    check(
        ifm.epsilon_negative is None or ifm.epsilon_negative >= 0,
        "ifm.epsilon_negative",
        ifm.epsilon_negative,
        "a number of at least 0, or none for the same as ifm.epsilon",
    )
    check(ifm.alpha >= 0, "ifm.alpha", ifm.alpha, "a number of at least 0")
    check(opt.lr > 0, "optim.lr", opt.lr, "a number above 0")
    check(0 <= opt.momentum < 1, "optim.momentum", opt.momentum, "a number from 0 to below 1")
    check(opt.weight_decay >= 0, "optim.weight_decay", opt.weight_decay, "a number of at least 0")
    check(
        all(isinstance(m, int) and m > 0 for m in opt.milestones),
        "optim.milestones",
        opt.milestones,
        "epochs above 0, for example 120,160",
    )
    check(evaluation.temperature > 0, "eval.temperature", evaluation.temperature, "a number above 0")

    def numbers(values):
        return len(values) > 0 and all(isinstance(value, int | float) for value in values)

    check(numbers(linear.lr) and min(linear.lr) > 0, "linear.lr", linear.lr, "numbers above 0, for example 1,10,30")
    check(
        numbers(linear.weight_decay) and min(linear.weight_decay) >= 0,
        "linear.weight_decay",
        linear.weight_decay,
        "numbers of at least 0, for example 0,1e-6",
    )
    check(0 <= linear.momentum < 1, "linear.momentum", linear.momentum, "a number from 0 to below 1")
    check(0 < linear.holdout < 1, "linear.holdout", linear.holdout, "a share between 0 and 1")
    check(
        all(isinstance(m, int) and m > 0 for m in linear.milestones),
        "linear.milestones",
        linear.milestones,
        "epochs above 0, for example 30,40,50",
    )
    check(
        0 <= opt.warmup_epochs <= config.epochs,
        "optim.warmup_epochs",
        opt.warmup_epochs,
        f"a number from 0 to epochs={config.epochs}",
    )

    if config.batch_size % model.bn_groups:
        raise UsageError(
            f"batch_size={config.batch_size} is not a multiple of model.bn_groups={model.bn_groups}: "
            "each BatchNorm group takes the same number of images"
        )
    check(
        config.batch_size > model.bn_groups,
        "model.bn_groups",
        model.bn_groups,
        f"below batch_size={config.batch_size}: a group of one image has no statistics",
    )
    if moco.queue_size % config.batch_size:
        raise UsageError(
            f"moco.queue_size={moco.queue_size} is not a multiple of batch_size={config.batch_size}: "
            f"take {max(moco.queue_size // config.batch_size, 1) * config.batch_size}"
        )
    if config.batch_size % devices:
        raise UsageError(
            f"batch_size={config.batch_size} is not a multiple of the {devices} devices: "
            "change batch_size or run on fewer devices"
        )
    _validate_data(data, check)


def _validate_data(data: DataConfig, check) -> None:
    """Checks the data source's own fields."""
    kind, _, rest = data.source.partition(":")
    if data.source == "folder:":
        raise UsageError("data.source='folder:' names no folder: expected --config.data.source=folder:PATH of images")
    if data.source != "trifeature" and (kind not in ("folder", "tfds", "array") or not rest):
        raise UsageError(f"data.source={data.source!r}: expected trifeature, folder:PATH, tfds:NAME or array:FILE.npz")
    for name in ("train_split", "test_split"):
        check(kind == "tfds" or not getattr(data, name), f"data.{name}", getattr(data, name), "none but with tfds:")
    check(0 <= data.max_bad < 1, "data.max_bad", data.max_bad, "a share from 0 to below 1 (0.01: one in a hundred)")
    tri, aug = data.trifeature, data.augment
    if data.source == "trifeature":
        check(not data.classes, "data.classes", data.classes, "none with trifeature")
        check(32 <= data.image_size <= 224, "data.image_size", data.image_size, "32 to 224 with trifeature")
        for name in ("shapes", "textures", "colors"):
            check(2 <= getattr(tri, name) <= 10, f"data.trifeature.{name}", getattr(tri, name), "2 to 10")
        for name in ("train_size", "test_size"):
            check(getattr(tri, name) >= 1, f"data.trifeature.{name}", getattr(tri, name), "at least 1")
        for name in ("rotation", "texture_rotation"):
            check(0 <= getattr(tri, name) <= 180, f"data.trifeature.{name}", getattr(tri, name), "0 to 180 degrees")
        check(0.1 <= tri.texture_period <= 1, "data.trifeature.texture_period", tri.texture_period, "0.1 to 1")
        check(0 <= tri.noise <= 0.3, "data.trifeature.noise", tri.noise, "0 to 0.3")
        check(tri.seed >= 0, "data.trifeature.seed", tri.seed, "at least 0")
        check(
            0.2 <= tri.scale_min <= tri.scale_max <= 1,
            "data.trifeature.scale_min, scale_max",
            (tri.scale_min, tri.scale_max),
            "0.2 <= scale_min <= scale_max <= 1",
        )
    check(0 < aug.crop_min <= 1, "data.augment.crop_min", aug.crop_min, "above 0, at most 1")
    check(0 <= aug.flip <= 1, "data.augment.flip", aug.flip, "a probability")
    check(0 <= aug.rotation <= 180, "data.augment.rotation", aug.rotation, "0 to 180 degrees")
    for name in ("brightness", "contrast"):
        check(0 <= getattr(aug, name) <= 1, f"data.augment.{name}", getattr(aug, name), "0 to 1")
    check(aug.noise >= 0, "data.augment.noise", aug.noise, "at least 0")


def epsilons(config: IFMConfig) -> tuple[float, float]:
    """Returns `(epsilon_positive, epsilon_negative)`."""
    return config.epsilon, config.epsilon if config.epsilon_negative is None else config.epsilon_negative
