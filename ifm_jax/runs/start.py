"""How a run starts: from a config and a working directory to the images and the state that it goes on from.

In the order in which it is decided:

1. The working directory holds a checkpoint: go on from the newest that can be read, with the next step. The config must
   be the run's own, which the checkpoint holds; config.json is a copy of it for people.
2. It holds none, and `init_from` names weights: start with them, at step 0.
3. Neither: start afresh.

Of several hosts each decides the same, or all end before the first step: what they must agree on is compared.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jaxlib
import numpy as np

import ifm_jax
from ifm_jax import assembly, files, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.data import Source, open_source, steps_per_epoch
from ifm_jax.errors import UsageError
from ifm_jax.methods import METHODS, Method
from ifm_jax.methods.method import Tree
from ifm_jax.models import only_head, without_head
from ifm_jax.pretrain import DeviceState, HostState, placements
from ifm_jax.runs import checkpoint, loading, memory, snapshot
from ifm_jax.runs.hosts import together
from ifm_jax.runs.snapshot import Snapshot
from ifm_jax.runs.workdir import Workdir

Answer = TypeVar("Answer")

# Seconds until a file that process 0 has written is visible to the others: NFS remembers for a while that it was not.
_SHARED_WITHIN = 70.0
# What each host may have of its own: where its images lie, and with what it reads them.
_HOSTS_OWN = ("data.source", "data.classes", "data.workers", "data.processes")


@dataclasses.dataclass
class Start:
    """What a run starts with.

    Attributes:
      state: to go on from, NumPy arrays; None: a new run.
      weights: that a new run starts with (`init_from`); None: its own.
      said: what the user is told.
    """

    state: HostState | None
    weights: Snapshot | None
    said: list[str]

    @property
    def step(self) -> int:
        """Updates done before."""
        return 0 if self.state is None else int(self.state.step)


def open_run(config: Config, workdir: Workdir, mesh: jax.sharding.Mesh) -> tuple[Config, Source]:
    """Returns the resolved config and the training images, the same on all hosts; JAX is configured.

    Raises:
      UsageError: for a config that cannot be run, or hosts that differ.
    """
    return together(lambda: _open(config, workdir, mesh), lambda opened: _identity(*opened))


def open_workdir(config: Config, workdir: Workdir, source: Source) -> Start:
    """Looks at what the working directory holds; damaged checkpoints are moved out of the way.

    Args:
      config: resolved.
      workdir: working directory of the run.
      source: source of the training images.

    Raises:
      UsageError: if it cannot be written to, or belongs to another run, or what is there cannot be read.
    """
    together(lambda: _open_workdir(workdir, config, source))  # process 0 writes, then all look
    create = assembly.state_creator(config)
    (state, damaged), weights = together(lambda: _find(workdir, config, create), lambda found: _facts(*found))
    said = workdir.set_aside(damaged)
    return Start(state, weights, said)


def place(begin: Start, config: Config, mesh: jax.sharding.Mesh, method: Method[Any]) -> DeviceState[Any]:
    """Returns the state that a run goes on from, or starts with, on the devices; `begin` lets go of its arrays.

    Args:
      begin: what `open_workdir` found; what the user is told of the weights is added to it.
      config: resolved.
      mesh: the devices.
      method: method of the run.
    """
    placement = placements(mesh, method)
    create = jax.jit(assembly.state_creator(config, mesh), out_shardings=placement)
    rng = sharding.place_key(mesh, assembly.initial_rngs(config)[0])
    state, weights = begin.state, begin.weights
    begin.state = begin.weights = None  # their memory
    if weights is not None:
        state, notes = started_with(weights, jax.device_get(create(rng)), config.method)
        begin.said.append(f"Starting with {config.init_from}: {'; '.join([*notes, *weights.notes])}.")
    if state is None:
        return create(rng)
    return jax.tree.map(lambda where, part: sharding.place(part, where), placement, state)


def _open(config: Config, workdir: Workdir, mesh: jax.sharding.Mesh) -> tuple[Config, Source]:
    """Returns the resolved config and the images; JAX is configured.

    Raises:
      UsageError: for a config that cannot be run.
    """
    configs.validate(config, devices=mesh.size)
    config = assembly.resolve(config, workdir.find_config())
    assembly.configure_jax(config.model.compute_dtype)
    assembly.make_augmentation(config)
    memory.check(config, mesh)
    # The images before the workdir: one made for a mistaken folder would refuse the right one.
    source = open_source(config.data, "train")
    size = min(config.data.limit or len(source), len(source))
    memory.check_steps(config, steps_per_epoch(size, config.batch_size))
    if workdir.converted.exists() and (missing := loading.read(workdir.path).missing):
        raise UsageError(
            f"workdir {workdir} holds a converted checkpoint without {', '.join(missing)}: nothing to go on from; "
            "expected a complete one (query and key encoder, queue)"
        )
    return config, source


def _identity(config: Config, source: Source) -> dict[str, Any]:
    """Returns what all hosts must have in common: code, config, images."""
    values = configs.flatten(configs.to_dict(config))
    return {
        "ifm_jax": ifm_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        **{name: value for name, value in values.items() if name not in _HOSTS_OWN},
        "images of data.source": len(source),
        "fingerprint of data.source": source.fingerprint,
    }


def _find(
    workdir: Workdir, config: Config, create: Callable[[], DeviceState[Any]]
) -> tuple[tuple[HostState | None, dict[int, str]], Snapshot | None]:
    """Returns what the workdir holds, as `checkpoint.newest_whole`, and where that is nothing, what `init_from` does.

    Raises:
      UsageError: if what is there cannot be read, or `init_from` is another network's.
    """
    deadline = time.monotonic() + _SHARED_WITHIN
    while not workdir.config.exists():
        if time.monotonic() > deadline:
            raise UsageError(
                f"workdir {workdir} is not the one that process 0 has made: expected a directory on storage that all "
                "processes share"
            )
        time.sleep(1.0)
    stored, damaged = checkpoint.newest_whole(workdir.checkpoints, jax.eval_shape(create))
    if stored is not None or not config.init_from:
        return (None if stored is None else stored.state, damaged), None
    given = loading.read(config.init_from)
    # Head and memory may be another's; they are made anew then.
    snapshot.check_config(config, given, config.init_from, backbone=True)
    return (None, damaged), given


def _facts(stored: tuple[HostState | None, dict[int, str]], given: Snapshot | None) -> dict[str, Any]:
    """Returns what all hosts must have found in the workdir."""
    state, damaged = stored
    return {
        "step of the checkpoint in the workdir": None if state is None else int(state.step),
        "damaged checkpoints": sorted(damaged),
        "step of init_from": given and int(given.state.step),
    }


def started_with(given: Snapshot, fresh: HostState, method: str) -> tuple[HostState, list[str]]:
    """Returns the state that a new run starts with the weights of another in, and in words what of them it uses.

    Args:
      given: at least the backbone of a network of the same architecture.
      fresh: a new run's state, NumPy arrays; whatever `given` lacks, or has in other shapes, is from here.
      method: the new run's, one of `methods.METHODS`.
    """

    def shapes(tree: Tree) -> Any:
        return jax.tree.map(np.shape, tree)

    state, notes = given.state, ["query encoder"]
    # A head with BatchNorm has statistics as well.
    heads = [tuple(shapes(only_head(tree)) for tree in (of.params, of.batch_stats)) for of in (state, fresh)]
    head = heads[0] == heads[1]
    if not head:
        notes = ["query encoder without its head (a new one)"]
    with_head = state if head else fresh
    params, batch_stats = (
        jax.tree.map(
            lambda x, y: np.asarray(x, y.dtype),
            without_head(getattr(state, part)) | only_head(getattr(with_head, part)),
            getattr(fresh, part),
        )
        for part in ("params", "batch_stats")
    )
    memory, of_memory = METHODS[method].inherit(state.memory, fresh.memory, params, batch_stats, head)
    return fresh._replace(params=params, batch_stats=batch_stats, memory=memory), notes + of_memory


def _open_workdir(workdir: Workdir, config: Config, source: Source) -> None:
    """Writes config.json and data.json, once they are known to be this run's.

    Raises:
      UsageError: if they cannot be written, or belong to a run with another config or on other images.
    """
    known = workdir.find_config()
    if known is not None:
        known = assembly.resolve(known, config)  # one that was converted leaves open what this run has settled
    if known is not None and (differing := configs.differences(config, known)):
        raise UsageError(
            f"workdir {workdir} belongs to a run with another config ({'; '.join(differing)}): "
            "pass another --workdir, or the config it was started with"
        )
    images = {"images": len(source), "fingerprint": source.fingerprint}
    path = workdir.data
    noted = files.read_json(path, "remove it, and its images are not checked")
    earlier = [images | {"fingerprint": fingerprint} for fingerprint in source.earlier_fingerprints]
    if noted is not None and noted not in (images, *earlier):
        if noted.keys() != images.keys():
            raise UsageError(
                f"{path} holds {', '.join(noted) or 'nothing'}, expected images and fingerprint: remove it, and its "
                "images are not checked"
            )
        counts = f"{noted['images']} then, {images['images']} now"
        raise UsageError(
            f"workdir {workdir} belongs to a run on other images than data.source={config.data.source!r} holds "
            f"({counts if noted['images'] != images['images'] else 'as many, others'}): pass another --workdir, or "
            "the images it was started with"
        )
    if jax.process_index() > 0:
        return
    with workdir.writing():
        workdir.remove_leftovers()
        files.write_json(workdir.config, configs.to_dict(config))
        files.write_json(path, images)
