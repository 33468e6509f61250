"""The configuration of a run: every field declared once, with type, default, bounds and meaning, and `validate`.

A field is declared by `field(default, meaning, bounds...)` on a dataclass; whatever reads, checks or describes configs
(the flags, config.json, `validate`, help) goes through these declarations (`FIELDS`, `find`). Rules across fields are
code, in `validate`. The dataclasses are not frozen, because recipes set their fields one by one; a field that is not
declared cannot be set. The defaults are the original's (IFM's MoCo-v2 script), whose flags stand in parentheses;
recipes in `configs/` change what differs.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ifm_jax import choices
from ifm_jax.errors import UsageError

COMPUTE_DTYPES = ("auto", "bfloat16", "float32", "float64")
AUGMENTATIONS = ("trifeature", "moco_v1", "moco_v2", "moco_cifar")
# Sources whose images the program draws; the fields of each are a group of its name in `data`.
DRAWN_SOURCES = ("trifeature", "digits")
SOURCES = "trifeature, digits, folder:PATH, tfds:NAME, array:FILE.npz or randbit:BITS:SOURCE"  # for errors
_RANDBIT = re.compile(r"randbit:(\d{1,9}):(.*)", re.DOTALL)
MOST_BITS = 32

_METHODS = {"moco": "MoCo", "simclr": "SimCLR"}
_OBJECTIVES = {"ifm": "IFM", "ifm_only": "IFM only"}

# Limits of the arithmetic: counters, indices and sizes are int32 on the devices, numbers float32.
_INT32 = 2**31 - 1
_FLOAT32 = (1.1754944e-38, 3.4028234e38)
# JAX keeps the low 32 bits of a seed: a larger one would coincide with another.
_SEED = 2**32 - 1
# No machine needs more threads to read images, and no more fit into one process.
_WORKERS = 1024


@dataclasses.dataclass(frozen=True)
class Declared:
    """The declaration of a field.

    Attributes:
      meaning: one line for people, with the original's flag in parentheses.
      least: smallest value.
      above: exclusive lower bound.
      most: largest value.
      below: exclusive upper bound.
      limit: largest value that the machine or the arithmetic allows; not a bound of the method.
      choices: all allowed values.
      empty: whether a tuple may be empty.
      hint: addition to the error for a wrong value.
      expected: description of the expected value in errors, instead of type and bounds.
      free_on_resume: whether the field may change when a run is resumed. These fields set how long a run lasts, how
        closely it is watched and how its images are read, not its computation. The location of the images may change
        too; a separate check ensures that they are the same. Evaluation changes nothing either.
      formerly: former names in the same group, which are still accepted; for each, the new names of its values.
    """

    meaning: str
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    limit: float | None = None
    choices: tuple[str, ...] = ()
    empty: bool = True
    hint: str = ""
    expected: str = ""
    free_on_resume: bool = False
    formerly: Mapping[str, Mapping[Any, Any]] = dataclasses.field(default_factory=dict)


def field(default: Any, meaning: str, **declared: Any) -> Any:
    """Declares a field of a config group.

    Args:
      default: value in `Config()`; the class of a group declares a group.
      meaning: see `Declared`.
      **declared: attributes of `Declared`.
    """
    metadata = {"declared": Declared(meaning, **declared)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Group:
    """Base of the config's dataclasses: rejects an attribute that is not a field and names the nearest field.

    Former names of fields read and set the renamed fields. A list becomes a tuple.
    """

    __slots__ = ()
    if typing.TYPE_CHECKING:  # each of them is a dataclass
        __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, list):
            value = tuple(value)
        try:
            object.__setattr__(self, name, value)
        except AttributeError:
            now, values = self._now(name)
            object.__setattr__(self, now, values.get(value, value) if isinstance(value, str) else value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by copy and pickle
            raise AttributeError(name)
        return object.__getattribute__(self, self._now(name)[0])

    @classmethod
    def _now(cls, name: str) -> tuple[str, Mapping[Any, Any]]:
        """Returns the new name of a former name, and the new names of its values."""
        names = [known.name for known in dataclasses.fields(cls)]
        for known in dataclasses.fields(cls):
            if name in known.metadata["declared"].formerly:
                return known.name, known.metadata["declared"].formerly[name]
        raise AttributeError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, names)}")


@dataclasses.dataclass(slots=True)
class ModelConfig(Group):
    """Query and key encoder."""

    arch: str = field("resnet50", "network architecture (-a)", choices=choices.ARCHITECTURES)
    stem: choices.Stem = field(
        "imagenet",
        "first layers: imagenet, small (3x3, no pooling; for 32 to 64 px) or small_stride2 (5x5 stride 2, no pooling)",
        choices=choices.STEMS,
    )
    width: int = field(0, "channels of the first stage; 0: the architecture's default (64)", least=0, limit=8192)
    bn_groups: int = field(
        0,
        "BatchNorm groups per batch; 0: the method's default, 8 for moco (the original's GPUs) or 1 for simclr",
        least=0,
    )
    running_stats: choices.RunningStats = field(
        "first_group",
        "statistics that the running averages follow: first_group (as in the original) or mean over the groups",
        choices=("first_group", "mean"),
    )
    compute_dtype: str = field(
        "auto",
        "dtype of the network's arithmetic: bfloat16, float32, float64 (for parameters too; enables 64-bit types), or "
        "auto: bfloat16 on an accelerator, float32 on a CPU",
        choices=COMPUTE_DTYPES,
    )
    cpu_convolutions: choices.CPUConvolutions = field(
        "xla",
        "who computes convolutions in training on a CPU: xla, or onednn, which is faster on x86 (one device; extra "
        "onednn); same results but for rounding",
        choices=choices.CPU_CONVOLUTIONS,
        free_on_resume=True,
    )


@dataclasses.dataclass(slots=True)
class MoCoConfig(Group):
    """Momentum contrast."""

    dim: int = field(128, "embedding dimension (--moco-dim)", least=1, limit=65536)
    queue_size: int = field(
        65536,
        "K, the number of keys in the queue; a multiple of the batch size, at most the number of images (--moco-k)",
        least=1,
    )
    queue_beyond_images: bool = field(
        False,
        "accept a queue of more keys than images, in which every image meets its own older keys as negatives",
        free_on_resume=True,
    )
    momentum: float = field(0.999, "m, the momentum of the key encoder's moving average (--moco-m)", least=0, most=1)
    temperature: float = field(0.2, "tau, the temperature of the logits (--moco-t)", above=0, hint="MoCo-v2: 0.2")
    mlp: bool = field(True, "projection head with two layers, as in MoCo-v2, instead of one (--mlp)")
    shuffle_bn: choices.ShuffleBN = field(
        True,
        "shuffle the key images, so that BatchNorm statistics do not reveal which key belongs to a query: true "
        "(uniformly) or balanced (each BatchNorm group sends equally many images to each, which exchanges less)",
    )
    queue_sharded: bool = field(
        False,
        "split the queue over the devices instead of keeping all of it on each; for very large queues, same results",
        free_on_resume=True,
    )


@dataclasses.dataclass(slots=True)
class SimCLRConfig(Group):
    """SimCLR: negatives from the batch."""

    dim: int = field(128, "embedding dimension", least=1, limit=65536)
    temperature: float = field(0.5, "tau, the temperature of the logits", above=0, hint="SimCLR: 0.1 to 0.5")
    head: typing.Literal["simclr", "hcl"] = field(
        "simclr",
        "projection head: simclr (linear, ReLU, linear) or hcl (linear to 512 without bias, BatchNorm, ReLU, linear)",
        choices=("simclr", "hcl"),
    )


@dataclasses.dataclass(slots=True)
class HardConfig(Group):
    """Hard negatives (Robinson et al. 2021, HCL), for any method and objective."""

    beta: float = field(
        0.0, "concentration on hard negatives; 0: all negatives count equally", least=0, hint="HCL: 0.5 to 2"
    )
    tau_plus: float = field(
        0.0, "debiasing: share of the negatives that have the query's own class; 0: no debiasing", least=0, below=1
    )


@dataclasses.dataclass(slots=True)
class IFMConfig(Group):
    """Implicit feature modification."""

    objective: choices.Kind = field(
        "ifm",
        "loss: infonce, ifm (weighted mean of InfoNCE and the shifted loss) or ifm_only (shifted loss) (--method)",
        choices=choices.OBJECTIVES,
        formerly={"method": {"moco": "infonce"}},
    )
    epsilon: float = field(
        0.1,
        "perturbation budget in units of cosine similarity (--epsilon)",
        least=0,
        hint="the paper: 0.05 to 0.2",
    )
    epsilon_negative: float | None = field(
        None,
        "perturbation budget of the negatives; none: the same as epsilon",
        least=0,
        expected="a number of at least 0, or none to use ifm.epsilon",
    )
    alpha: float = field(1.0, "weight of the shifted loss with objective=ifm (--alpha)", least=0)


@dataclasses.dataclass(slots=True)
class OptimConfig(Group):
    """Optimizer and learning rate."""

    name: choices.Optimizer = field(
        "sgd", "optimizer: sgd, adam (as in PyTorch), lars or adamw", choices=choices.OPTIMIZERS
    )
    lr: float = field(0.03, "base learning rate for the global batch (--lr)", above=0)
    momentum: float = field(0.9, "momentum of SGD and LARS (--momentum)", least=0, below=1)
    weight_decay: float = field(
        1e-4, "weight decay, on all parameters; LARS excludes BatchNorm and biases (--wd)", least=0
    )
    schedule: choices.Schedule = field(
        "cosine", "learning-rate schedule: cosine or step (--cos)", choices=choices.SCHEDULES
    )
    milestones: tuple[int, ...] = field(
        (120, 160),
        "epochs at which the step schedule divides the rate by ten (--schedule)",
        above=0,
        expected="epochs above 0, for example 120,160",
    )
    warmup_epochs: float = field(0.0, "epochs of linear warm-up", least=0)
    per_step: bool = field(False, "update the learning rate every step instead of every epoch")
    reduce_dtype: str = field(
        "compute",
        "dtype in which gradients are summed over the devices: compute (that of model.compute_dtype) or float32",
        choices=("compute", "float32"),
    )


@dataclasses.dataclass(slots=True)
class TrifeatureConfig(Group):
    """The embedded images (Hermann and Lampinen 2020): shape, texture and color vary independently."""

    train_size: int = field(8192, "training images", least=1)
    test_size: int = field(2048, "held-out images, for readouts", least=1)
    shapes: int = field(10, "number of shapes, of ten", least=2, most=10)
    textures: int = field(10, "number of textures, of ten", least=2, most=10)
    colors: int = field(10, "number of colors, of ten", least=2, most=10)
    rotation: float = field(45.0, "largest rotation of a shape in either direction, in degrees", least=0, most=180)
    texture_rotation: float = field(
        45.0,
        "largest rotation of its texture, independent of the shape's, in degrees; 180: any angle",
        least=0,
        most=180,
    )
    texture_period: float = field(0.2, "period of a texture, relative to the image's side", least=0.1, most=1)
    scale_min: float = field(
        0.7, "smallest diameter of a shape's circumscribed circle, relative to the image's side", least=0.2, most=1
    )
    scale_max: float = field(0.9, "largest such diameter", least=0.2, most=1)
    noise: float = field(0.06, "amplitude of the noise on the gray background, for pixels in [0, 1]", least=0, most=0.3)
    seed: int = field(
        0,
        "seed of the images; separate from the run's, so that runs with other seeds use the same data",
        least=0,
        limit=_SEED,
    )


@dataclasses.dataclass(slots=True)
class DigitsConfig(Group):
    """The embedded handwritten digits: digit, texture and color vary independently."""

    train_size: int = field(8192, "training images", least=1)
    test_size: int = field(2048, "held-out images, for readouts, of other handwriting", least=1)
    digits: int = field(10, "number of digits, of ten", least=2, most=10)
    textures: int = field(10, "number of textures, of ten", least=2, most=10)
    colors: int = field(10, "number of colors, of ten", least=2, most=10)
    texture_rotation: float = field(
        45.0, "largest rotation of the texture in either direction, in degrees; 180: any angle", least=0, most=180
    )
    texture_period: float = field(0.2, "period of a texture, relative to the image's side", least=0.1, most=1)
    scale_min: float = field(
        0.55, "smallest side of the handwritten image, relative to the image's side", least=0.4, most=1
    )
    scale_max: float = field(0.75, "largest such side", least=0.4, most=1)
    seed: int = field(
        0,
        "seed of the images and of the split of the handwritten ones; separate from the run's",
        least=0,
        limit=_SEED,
    )


@dataclasses.dataclass(slots=True)
class AugmentConfig(Group):
    """Strengths of the "trifeature" augmentation. None of it changes hue, which is one of the features measured."""

    crop_min: float = field(0.36, "smallest area of the random crop, relative to the image's", above=0, most=1)
    flip: float = field(0.5, "probability of a horizontal flip; 0 for digits, which it mirrors", least=0, most=1)
    rotation: float = field(9.0, "largest rotation in either direction, in degrees", least=0, most=180)
    brightness: float = field(0.3, "brightness is scaled by a factor from 1 - this to 1 + this", least=0, most=1)
    contrast: float = field(0.3, "contrast is scaled by a factor from 1 - this to 1 + this", least=0, most=1)
    noise: float = field(0.0, "standard deviation of Gaussian pixel noise, for pixels in [0, 1]", least=0)


@dataclasses.dataclass(slots=True)
class DataConfig(Group):
    """Images and their views."""

    source: str = field(
        "trifeature",
        "images: trifeature, digits, folder:PATH, tfds:NAME (or tfds:PATH), array:FILE.npz; or randbit:BITS:SOURCE, "
        "these with BITS random channels (--dataset, --dataset_root)",
        free_on_resume=True,
    )
    classes: str = field(
        "", "file with the names of the classes to keep, one per line, # for comments; empty: all", free_on_resume=True
    )
    train_split: str = field("", "split of a tfds: source for training, such as train+unlabelled; empty: train")
    test_split: str = field("", "held-out split of a tfds: source; empty: validation, or else test")
    augmentation: str = field(
        "moco_v2",
        "augmentation: trifeature, moco_v1, moco_v2 (--aug-plus) or moco_cifar (for 32 px: no blur)",
        choices=AUGMENTATIONS,
    )
    image_size: int = field(224, "side of a view in pixels", least=8, limit=8192)
    limit: int = field(0, "use only this many training images, the first ones; 0: all", least=0)
    workers: int = field(
        0,
        "threads per process that read images; 0: automatic",
        least=0,
        limit=_WORKERS,
        free_on_resume=True,
    )
    processes: int = field(
        0,
        "worker processes that read images; 0: none, threads of this process read (enough for a dozen processors)",
        least=0,
        limit=_WORKERS,
        free_on_resume=True,
    )
    max_bad: float = field(
        0.01,
        "share of the training images that may be unreadable; each is replaced by a neighbor",
        least=0,
        below=1,
        hint="0.01: one in a hundred",
        free_on_resume=True,
    )
    cache: str = field(
        "",
        "device: hold the whole data set in device memory and crop there, if it fits; empty: read images as they are "
        "needed",
        choices=("", "device"),
        expected="device, or empty",
        free_on_resume=True,
    )
    cache_size: int = field(
        0,
        "side in pixels of the images held on the devices; 0: 256/224 of image_size, or the images' own if smaller",
        least=0,
        limit=16384,
        free_on_resume=True,
    )
    label: str = field("", "label of the source to evaluate; empty: every label", free_on_resume=True)
    trifeature: TrifeatureConfig = field(TrifeatureConfig, "embedded Trifeature images")
    digits: DigitsConfig = field(DigitsConfig, "embedded handwritten digits")
    augment: AugmentConfig = field(AugmentConfig, 'strengths of the "trifeature" augmentation')


@dataclasses.dataclass(slots=True)
class EvalConfig(Group):
    """Evaluation during pre-training, on the frozen features of some images."""

    every: int = field(0, "epochs between two evaluations; 0: none", least=0)
    images: int = field(10_000, "use at most this many training images, and as many held-out ones; 0: all", least=0)
    neighbors: int = field(200, "k, the number of nearest neighbors", least=1)
    temperature: float = field(0.07, "temperature of the neighbors' weights", above=0)


@dataclasses.dataclass(slots=True)
class LinearConfig(Group):
    """Linear evaluation of the frozen backbone (`eval_linear.py`); the defaults are the original's."""

    lr: tuple[float, ...] = field(
        (10.0,),
        "base learning rates; one classifier per combination with weight_decay (original: 10; MoCo's code: 30)",
        above=0,
        empty=False,
        expected="numbers above 0, for example 1,10,30",
    )
    weight_decay: tuple[float, ...] = field(
        (0.0,),
        "weight decay of weights and biases",
        least=0,
        empty=False,
        expected="numbers of at least 0, for example 0,1e-6",
    )
    momentum: float = field(0.9, "momentum of SGD", least=0, below=1)
    batch_size: int = field(128, "batch size, over all devices and hosts", least=1, limit=2**20)
    epochs: int = field(60, "passes over the training images", least=1, limit=10**6)
    milestones: tuple[int, ...] = field(
        (30, 40, 50),
        "epochs at which the learning rate is divided by ten",
        above=0,
        expected="epochs above 0, for example 30,40,50",
    )
    holdout: float = field(
        0.1,
        "share of the training images for choosing the best of several classifiers; not trained on",
        above=0,
        below=1,
    )
    views: int = field(
        8,
        "augmented views per image that the fast protocol trains on; 0: the evaluation view",
        least=0,
        limit=10_000,
    )
    seed: int = field(0, "seed of classifiers, order and views", least=0, limit=_SEED)


@dataclasses.dataclass(slots=True)
class Config(Group):
    """A pre-training run, and its evaluation."""

    model: ModelConfig = field(ModelConfig, "encoders")
    method: str = field("moco", "contrastive method: moco or simclr", choices=choices.METHODS)
    moco: MoCoConfig = field(MoCoConfig, "momentum contrast")
    simclr: SimCLRConfig = field(SimCLRConfig, "SimCLR")
    hard: HardConfig = field(HardConfig, "hard negatives")
    ifm: IFMConfig = field(IFMConfig, "implicit feature modification")
    optim: OptimConfig = field(OptimConfig, "optimizer and learning rate")
    data: DataConfig = field(DataConfig, "images and views")
    eval: EvalConfig = field(EvalConfig, "evaluation during pre-training", free_on_resume=True)
    linear: LinearConfig = field(LinearConfig, "linear evaluation afterwards", free_on_resume=True)
    batch_size: int = field(256, "batch size, over all devices and hosts (-b)", least=1, limit=2**20)
    epochs: int = field(200, "passes over the training images (--epochs)", least=1, limit=10**6)
    steps: int = field(
        0,
        "stop after this many updates, without changing the schedule; 0: after all epochs",
        least=0,
        free_on_resume=True,
    )
    steps_per_call: int = field(
        1,
        "steps per call of the compiled program; more than 1 needs data.cache=device",
        least=1,
        limit=100_000,
        free_on_resume=True,
    )
    seed: int = field(0, "seed of everything random", least=0, limit=_SEED)
    log_to: str = field(
        "",
        "services that also show the lines of metrics.jsonl: wandb, mlflow, trackio, several by comma; empty: none",
        free_on_resume=True,
    )
    log_every: int = field(10, "steps between two lines of metrics.jsonl", least=1, free_on_resume=True)
    verbose: bool = field(
        False,
        "where the output is no terminal, print each line of metrics.jsonl, not one an epoch",
        free_on_resume=True,
    )
    checkpoint_every: int = field(
        1000, "steps between two checkpoints; the last step is always saved", least=1, free_on_resume=True
    )
    checkpoint_minutes: float = field(
        0.0, "save at least every so many minutes; 0: checkpoint_every alone decides", least=0, free_on_resume=True
    )
    checkpoint_keep: int = field(3, "number of newest checkpoints to keep", least=1, free_on_resume=True)
    checkpoint_best: str = field(
        "",
        "measurement whose best checkpoint is kept too: knn, linear, effective_rank, or that of one label, such as "
        "knn/shape; every evaluation is then saved; empty: none",
        free_on_resume=True,
    )
    init_from: str = field(
        "",
        "a run's workdir, one of its checkpoints or a .pth.tar: a new run starts with its weights; empty: none",
    )


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the config, as declared.

    Attributes:
      name: name with its groups, "moco.dim".
      kind: type of the value or of each value in a tuple: bool, int, float or str; for a group its class.
      many: whether the value is a tuple.
      optional: whether None is allowed.
      words: texts that are allowed beside values of the type, "balanced" beside true and false.
      default: value in `Config()`; None for a group.
      declared: meaning and bounds.
      free_on_resume: whether it may change on resuming, by itself or with its group.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    words: tuple[str, ...]
    default: Any
    declared: Declared
    free_on_resume: bool

    @property
    def is_group(self) -> bool:
        """Whether it is a group of fields, not a value."""
        return issubclass(self.kind, Group)

    def expected(self) -> str:
        """Describes the allowed values: `a number above 0 (MoCo-v2: 0.2)`."""
        declared = self.declared
        if declared.expected:
            return declared.expected
        if declared.choices:
            return f"one of {', '.join(choice or '(empty)' for choice in declared.choices)}"
        one = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(self.kind, "a group")
        text = one if not self.many else {int: "whole numbers", float: "numbers"}[self.kind]
        if self.words:
            text = f"{text.replace(' or ', ', ')} or {', '.join(self.words)}"
        least, above, most, below = declared.least, declared.above, declared.most, declared.below
        if least is not None and most is not None:
            text += f" from {least:g} to {most:g}"
        elif least is not None and below is not None:
            text += f" from {least:g} to below {below:g}"
        elif above is not None and below is not None:
            text += f" between {above:g} and {below:g}"
        else:
            bounds = f"above {above:g}" if above is not None else f"of at least {least:g}" if least is not None else ""
            text = f"{text} {bounds}".rstrip() + (f", at most {most:g}" if most is not None else "")
        if self.optional:
            text += ", or none"
        return text + (f" ({declared.hint})" if declared.hint else "")

    def check_type(self, value: Any, shown_as: str = "") -> None:
        """Checks the type of a value.

        Args:
          value: value to check.
          shown_as: the setting as the caller wrote it, `--config.epochs=x`; empty: `epochs='x'`.

        Raises:
          UsageError: if the type is wrong; bounds are not checked.
        """
        if self.is_group:
            good, wanted = isinstance(value, self.kind), f"a {self.kind.__name__}"
        else:
            each = value if self.many and isinstance(value, tuple) else (value,)
            good, wanted = all(map(self._is_of_kind, each)), self.expected()
            good = (good and isinstance(value, tuple) is self.many) or (value is None and self.optional)
        if not good:
            raise UsageError(f"{shown_as or f'{self.name}={shown(value)}'}: expected {wanted}")

    def check(self, value: Any, shown_as: str = "") -> None:
        """Checks type and bounds of a value; arguments and errors as for `check_type`."""
        self.check_type(value, shown_as)
        declared, shown_as = self.declared, shown_as or f"{self.name}={shown(value)}"
        if value is None or self.is_group:
            return
        if declared.choices and value not in declared.choices:
            unknown = "" if declared.expected else " is unknown"
            raise UsageError(f"{shown_as}{unknown}: expected {self.expected()}{did_you_mean(value, declared.choices)}")
        if self.many and not value and not declared.empty:
            raise UsageError(f"{shown_as}: expected {self.expected()}")
        for one in value if self.many else (value,):
            self._check_bounds(one, shown_as)

    def _is_of_kind(self, value: Any) -> bool:
        if isinstance(value, str) and value in self.words:
            return True
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, self.kind) and not (self.kind is int and isinstance(value, bool))

    def _check_bounds(self, value: Any, shown_as: str) -> None:
        declared, expected = self.declared, self.expected()
        if self.kind is str and "\0" in value:
            raise UsageError(f"{shown_as}: expected text without NUL characters")
        if self.kind not in (int, float):
            return
        if self.kind is float and not _is_finite(value):
            raise UsageError(f"{shown_as}: expected {expected}, finite")
        within = (
            (declared.least is None or value >= declared.least)
            and (declared.above is None or value > declared.above)
            and (declared.most is None or value <= declared.most)
            and (declared.below is None or value < declared.below)
        )
        if not within:
            raise UsageError(f"{shown_as}: expected {expected}")
        if self.kind is int:
            limit = _INT32 if declared.limit is None else declared.limit
            if abs(value) > limit:
                raise UsageError(f"{shown_as}: expected {expected}, at most {limit}")
        elif abs(value) > _FLOAT32[1] or (declared.above == 0 and value < _FLOAT32[0]):
            raise UsageError(
                f"{shown_as}: expected {expected}, in the range of float32, {_FLOAT32[0]:.2g} to {_FLOAT32[1]:.2g}"
            )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False


def shown(value: Any) -> str:
    """Formats a value for a message: short, on one line."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # an int of thousands of digits
        return f"{type(value).__name__} too long to show"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 3


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns `: did you mean 'x'?` for the nearest of the names; empty if none is near."""
    names = list(names)
    # The same name in another group is a better guess than a similar one in this group: moco.lr is optim.lr.
    same = [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, same or names, n=1, cutoff=0.0 if same else 0.6)
    return f": did you mean {near[0]!r}?" if near else ""


@functools.cache
def fields(group: type[Group] = Config) -> Mapping[str, Field]:
    """Returns every field of a group by name, groups among them, in the order of declaration."""
    return types.MappingProxyType({each.name: each for each in _fields(group, "", False)})


def _fields(group: type[Group], prefix: str, free: bool) -> Iterator[Field]:
    annotations = typing.get_type_hints(group)
    for each in dataclasses.fields(group):
        declared, kind = each.metadata["declared"], annotations[each.name]
        kind = str if typing.get_origin(kind) is typing.Literal else kind  # the type of its choices
        parts = [part for part in typing.get_args(kind) if part not in (Ellipsis, types.NoneType)]
        words = tuple(word for part in parts for word in typing.get_args(part))  # of a Literal
        many, optional = typing.get_origin(kind) is tuple, types.NoneType in typing.get_args(kind)
        free_too = free or declared.free_on_resume
        default = None if each.default is dataclasses.MISSING else each.default
        name = prefix + each.name
        yield Field(name, parts[0] if parts else kind, many, optional, words, default, declared, free_too)
        if isinstance(kind, type) and issubclass(kind, Group):
            yield from _fields(kind, f"{name}.", free_too)


def find(name: str, group: type[Group] = Config) -> tuple[Field, Mapping[Any, Any]] | None:
    """Returns the field of a name, "moco.dim", and if the name is a former one, the new names of its values.

    Args:
      name: current or former name of a field (`Declared.formerly`).
      group: group in which to look it up.

    Returns:
      None if there is no such field.
    """
    known = fields(group)
    if name in known:
        return known[name], {}
    holder, _, last = name.rpartition(".")
    for each in known.values():
        if each.name.rpartition(".")[0] == holder and last in each.declared.formerly:
            return each, each.declared.formerly[last]
    return None


def set_field(config: Group, name: str, value: Any) -> None:
    """Sets the field of that name, "moco.dim", of a config."""
    holder, _, last = name.rpartition(".")
    setattr(get_field(config, holder) if holder else config, last, value)


def get_field(config: Group, name: str) -> Any:
    """Returns the value of the field of that name, "moco.dim", of a config."""
    return functools.reduce(getattr, name.split("."), config)


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dicts of JSON's types."""
    # Through JSON, so that it compares equal to a config read back (tuples become lists).
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a config from the `values` of `to_dict`; fields that `values` lacks keep their defaults.

    Args:
      values: nested dicts, or a flat one with names like "moco.dim"; former names are accepted too.

    Raises:
      UsageError: if a field does not exist or a value has the wrong type; `validate` checks bounds.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"a config is {shown(values)}: expected fields by name, such as {{'batch_size': 256}}")
    config = Config()
    pending = list(values.items())
    while pending:  # no deeper than the declared groups
        name, value = pending.pop(0)
        found = find(name) if isinstance(name, str) else None
        if found is None:
            near = did_you_mean(str(name)[:100], fields())
            raise UsageError(
                f"config field {shown(name)} is unknown{near or ': written by another version of ifm_jax?'}"
            )
        known, renamed = found
        if known.is_group and isinstance(value, Mapping):
            pending = [(f"{name}.{key}", each) for key, each in value.items()] + pending
            continue
        value = tuple(value) if isinstance(value, list) else value
        if known.is_group:
            raise UsageError(f"{name}={shown(value)}: expected a group of fields by name")
        value = renamed.get(value, value) if isinstance(value, str) else value
        known.check_type(value)
        set_field(config, known.name, value)
    return config


def from_json(text: str | bytes) -> Config:
    """Returns a config from JSON.

    Raises:
      UsageError: if the text is not JSON, or not a config.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise UsageError("it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"it is not JSON: {error}") from None
    return from_dict(values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts: `{"moco.dim": 128, ...}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def differences(config: Config, other: Config) -> list[str]:
    """Returns the differences of two configs, `field: ours, not theirs`, except in fields free on resuming."""
    ours, theirs = flatten(to_dict(config)), flatten(to_dict(other))
    return [
        f"{name}: {ours[name]!r}, not {theirs[name]!r}"
        for name, each in fields().items()
        if not each.is_group and not each.free_on_resume and ours[name] != theirs[name]
    ]


def check_fields(config: Config) -> None:
    """Checks type and bounds of every field by itself.

    Raises:
      UsageError: at the first mistake; the message names the field, its value and the expectation.
    """
    if not isinstance(config, Config):
        raise UsageError(f"config={shown(config)}: expected an ifm_jax.Config")
    for name, each in fields().items():
        each.check(get_field(config, name))


def validate(config: Config, devices: int = 1) -> None:
    """Checks every field by itself and the rules across fields.

    Args:
      config: parsed config.
      devices: number of devices over which a batch will be split.

    Raises:
      UsageError: at the first mistake; the message names the field, its value and the expectation.
    """
    check_fields(config)
    moco, data, best = config.moco, config.data, config.checkpoint_best

    def check(good: Any, name: str, value: Any, expected: str) -> None:
        if not good:
            raise UsageError(f"{name}={value!r}: expected {expected}")

    check(
        config.steps_per_call == 1 or data.cache,
        "steps_per_call",
        config.steps_per_call,
        "1, or data.cache=device, since the images of all these steps must be on the device",
    )
    check(
        not best or best == "effective_rank" or best.split("/")[0] in ("knn", "linear"),
        "checkpoint_best",
        best,
        "knn, linear, effective_rank, or that of one label, for example knn/shape",
    )
    check(
        all(name in choices.LOGGERS for name in loggers(config)),
        "log_to",
        config.log_to,
        f"{', '.join(choices.LOGGERS)}, several by comma, or empty",
    )
    check(
        not best or config.eval.every, "checkpoint_best", best, "eval.every of at least 1, since evaluations measure it"
    )
    check(
        config.optim.warmup_epochs <= config.epochs,
        "optim.warmup_epochs",
        config.optim.warmup_epochs,
        f"a number from 0 to epochs={config.epochs}",
    )
    groups = bn_groups(config)
    if config.batch_size % groups:
        raise UsageError(
            f"batch_size={config.batch_size} is not a multiple of model.bn_groups={groups}: "
            "each BatchNorm group needs the same number of images"
        )
    check(
        config.batch_size > groups,
        "model.bn_groups",
        groups,
        f"a number below batch_size={config.batch_size}: a group of one image has no statistics",
    )
    if config.method == "simclr":
        check(
            config.batch_size > 1, "batch_size", config.batch_size, "at least 2 with method=simclr, for its negatives"
        )
    elif moco.queue_size % config.batch_size:
        raise UsageError(
            f"moco.queue_size={moco.queue_size} is not a multiple of batch_size={config.batch_size}: "
            f"use {max(moco.queue_size // config.batch_size, 1) * config.batch_size}"
        )
    if config.method == "moco" and moco.shuffle_bn == "balanced":
        check(
            config.batch_size % groups**2 == 0,
            "moco.shuffle_bn",
            moco.shuffle_bn,
            f"a batch_size that is a multiple of {groups**2}, the square of model.bn_groups={groups}, not "
            f"{config.batch_size}; or moco.shuffle_bn=true",
        )
    if config.batch_size % devices:
        raise UsageError(
            f"batch_size={config.batch_size} is not a multiple of the {devices} devices: "
            "change batch_size or run on fewer devices"
        )
    _validate_data(data, check)


def _validate_data(data: DataConfig, check: Callable[[Any, str, Any, str], None]) -> None:
    """Checks the data source's own fields."""
    bits, source = random_bits(data)
    kind, _, rest = source.partition(":")
    if source == "folder:":
        raise UsageError("data.source='folder:' names no folder: expected --config.data.source=folder:PATH with images")
    drawn = drawn_source(data)
    if not drawn and (kind not in ("folder", "tfds", "array") or not rest):
        raise UsageError(f"data.source={data.source!r}: expected {SOURCES}")
    check(bits <= MOST_BITS, "data.source", data.source, f"at most {MOST_BITS} bits in randbit:BITS:SOURCE")
    for name in ("train_split", "test_split"):
        check(
            kind == "tfds" or not getattr(data, name), f"data.{name}", getattr(data, name), "empty, except with tfds:"
        )
    if drawn:
        scales = drawn.scale_min, drawn.scale_max
        check(not data.classes, "data.classes", data.classes, f"empty with {source}")
        check(32 <= data.image_size <= 224, "data.image_size", data.image_size, f"32 to 224 with {source}")
        check(scales[0] <= scales[1], f"data.{source}.scale_min, scale_max", scales, "scale_min <= scale_max")


def loggers(config: Config) -> list[str]:
    """Returns the names in `log_to`, each once."""
    return list(dict.fromkeys(name.strip() for name in config.log_to.split(",") if name.strip()))


def random_bits(data: DataConfig) -> tuple[int, str]:
    """Returns the number of random bits of each image, and the source of the images without them.

    `(4, "digits")` for `randbit:4:digits`, `(0, "digits")` for `digits`.
    """
    found = _RANDBIT.fullmatch(data.source)
    return (int(found[1]), found[2]) if found else (0, data.source)


def channels(data: DataConfig) -> int:
    """Returns the channels of an image: red, green, blue and the random bits."""
    return 3 + random_bits(data)[0]


def drawn_source(data: DataConfig) -> TrifeatureConfig | DigitsConfig | None:
    """Returns the fields of the source of the images if the program draws them; None: it reads them."""
    source = random_bits(data)[1]
    return getattr(data, source) if source in DRAWN_SOURCES else None


def bn_groups(config: Config) -> int:
    """Returns the number of BatchNorm groups: the config's, or the method's own."""
    return config.model.bn_groups or {"moco": 8, "simclr": 1}[config.method]


def head(config: Config) -> tuple[int, choices.Head]:
    """Returns the length of an embedding and the name of its head in `models.heads`."""
    if config.method == "simclr":
        heads: dict[str, choices.Head] = {"simclr": "mlp", "hcl": "hcl"}
        return config.simclr.dim, heads[config.simclr.head]
    return config.moco.dim, "mlp" if config.moco.mlp else "linear"


def temperature(config: Config) -> float:
    """Returns tau of the config's method."""
    return config.simclr.temperature if config.method == "simclr" else config.moco.temperature


def epsilons(config: IFMConfig) -> tuple[float, float]:
    """Returns `(epsilon_positive, epsilon_negative)`."""
    return config.epsilon, config.epsilon if config.epsilon_negative is None else config.epsilon_negative


def method_name(config: Config) -> str:
    """Returns a name for all runs with a config's method: `MoCo, T = 0.2`, `IFM (eps 0.1), T = 0.07`.

    IFM alone means IFM on MoCo, as in the original; `IFM (eps 0.1) on SimCLR, T = 0.5` on another method.
    """
    ifm, name = config.ifm, _METHODS[config.method]
    if ifm.objective != "infonce":
        budget = "/".join(f"{epsilon:g}" for epsilon in sorted(set(epsilons(ifm))))
        on = "" if config.method == "moco" else f" on {name}"
        name = f"{_OBJECTIVES[ifm.objective]} (eps {budget}){on}"
    hard = f", beta {config.hard.beta:g}" if config.hard.beta else ""
    debiased = f", tau+ {config.hard.tau_plus:g}" if config.hard.tau_plus else ""
    return f"{name}{hard}{debiased}, T = {temperature(config):g}"
