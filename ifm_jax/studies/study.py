"""The description of a study: images, arms, seeds, and the comparisons that are fixed before it is run."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ifm_jax import config as configs
from ifm_jax import recipes
from ifm_jax.config import Config
from ifm_jax.errors import UsageError

# Summaries of a run's readouts that can be compared like a label: their mean, and the lowest.
MEAN, WORST = "mean", "worst"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A question of a study: arm `a` less arm `b`, in points of the readout, paired by seed.

    Attributes:
      a: name of an arm.
      b: name of the arm that it is compared with.
      labels: what is compared: a label of the source, "mean" (over a run's labels) or "worst" (the lowest of them). A
        source that lacks a label is left out.
      sources: names of the sources; empty: all.
      confirmatory: whether the question was fixed before the runs, and counts in the correction for several tests.
    """

    a: str
    b: str
    labels: tuple[str, ...] = (MEAN, WORST)
    sources: tuple[str, ...] = ()
    confirmatory: bool = False

    @property
    def name(self) -> str:
        """The name in reports."""
        return f"{self.a} - {self.b}"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run of a study.

    Attributes:
      source: name of its source.
      arm: name of its arm.
      config: its whole config.
    """

    source: str
    arm: str
    config: Config

    @property
    def seed(self) -> int:
        """The seed, the same in all arms of a pair."""
        return self.config.seed

    @property
    def directory(self) -> str:
        """The run's directory in that of the study, `trifeature/ifm/seed3`."""
        return os.path.join(_as_name(self.source), _as_name(self.arm), f"seed{self.seed}")

    @property
    def config_sha256(self) -> str:
        """A hash of all fields that decide the result; fields that may change on resuming do not, the length does."""
        return config_sha256(self.config)


@dataclasses.dataclass(frozen=True)
class Study:
    """Sources x arms x seeds.

    Runs of the same seed share initial weights, the order of the images and the draws of their views, in every arm that
    leaves the network and the data alone.

    Attributes:
      question: what the study asks, in a sentence or two; part of the report.
      sources: name -> recipe: images, network, optimizer, length.
      arms: name -> the fields in which the arm differs from the recipe, `{"ifm.epsilon": 0.1}`. A dict as a value has
        the value for each source, `{"optim.lr": {"trifeature": 0.003, "digits": 0.001}}`.
      seeds: seeds of the runs in every arm.
      comparisons: the questions.

    Raises:
      UsageError: if an arm names an unknown field, a comparison an unknown arm or source, or there is nothing to run.
    """

    question: str
    sources: Mapping[str, Config]
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    comparisons: Sequence[Comparison] = ()

    def __post_init__(self):
        for what, values in (("sources", self.sources), ("arms", self.arms), ("seeds", self.seeds)):
            if not values:
                raise UsageError(f"a study without {what}: expected at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds={configs.shown(list(self.seeds))}: expected different ones")
        for kind, names in (("source", self.sources), ("arm", self.arms)):
            folders: dict[str, str] = {}
            for name in names:
                if not _as_name(name):
                    raise UsageError(f"{kind} {name!r}: expected a name with letters or digits")
                other = folders.setdefault(_as_name(name), name)
                if other != name:
                    raise UsageError(f"{kind}s {other!r} and {name!r} would share a directory: rename one of them")
        for comparison in self.comparisons:
            for arm in (comparison.a, comparison.b):
                if arm not in self.arms:
                    near = configs.did_you_mean(arm, self.arms) or f": expected one of {', '.join(self.arms)}"
                    raise UsageError(f"comparison {comparison.name!r}: there is no arm {arm!r}{near}")
            for source in comparison.sources:
                if source not in self.sources:
                    raise UsageError(
                        f"comparison {comparison.name!r}: there is no source {source!r}: expected one of "
                        f"{', '.join(self.sources)}"
                    )
        for source in self.sources:
            for arm in self.arms:
                configs.validate(self.config(source, arm, self.seeds[0]))

    def config(self, source: str, arm: str, seed: int) -> Config:
        """Returns the config of a run."""
        config = configs.from_dict(configs.to_dict(self.sources[source]))
        for name, value in self.arms[arm].items():
            if isinstance(value, Mapping):
                if source not in value:
                    raise UsageError(f"arm {arm!r}: {name} has no value for {source!r}: expected one for each source")
                value = value[source]
            if configs.find(name) is None:
                near = configs.did_you_mean(name, configs.fields())
                raise UsageError(f"arm {arm!r}: there is no config field {name!r}{near}")
            configs.set_field(config, name, value)
        config.seed = seed
        return config

    def runs(self) -> list[Run]:
        """Returns all runs, seed by seed, so that a study that is stopped early has pairs."""
        return [
            Run(source, arm, self.config(source, arm, seed))
            for seed in self.seeds
            for source in self.sources
            for arm in self.arms
        ]


def load(path: str | os.PathLike[str]) -> Study:
    """Returns the study of a file or, by name, one of the package's own.

    Args:
      path: path of a Python file with a function `get_study() -> Study`, or a name such as `studies/ifm`.

    Raises:
      UsageError: if there is no such file, it cannot be run, or its result is no study.
    """
    return recipes.load_from(path, "get_study", Study, "a study, for example studies/confirmation")


def number_of(count: int, what: str) -> str:
    """Returns `1 run`, or `2 runs`."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def config_sha256(config: Config) -> str:
    """Returns a hash of the config fields that decide a run's result: those fixed on resuming, images and length.

    Where the images are stored, and how often a run is logged or saved, is not part of it. Nor is a field that has its
    default, so that a field which a later version adds changes nothing.
    """
    flat, default = (configs.flatten(configs.to_dict(each)) for each in (config, Config()))
    kept = {
        name: flat[name]
        for name, each in configs.fields().items()
        if not each.is_group
        and flat[name] != default[name]
        and (not each.free_on_resume or name in ("steps", "data.source", "data.classes"))
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _as_name(text: str) -> str:
    """Returns a name for a directory."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
