"""Starts a run: from a config and a working directory to the images and the first state.

The cases, in order:

1. The working directory holds a checkpoint: continue from the newest readable one, with the next step. The config must
   equal the run's own, which the checkpoint holds; config.json is a copy of it for people.
2. It holds none, and `init_from` names weights: start with these weights, at step 0.
3. Neither: start from scratch.

All hosts decide the same, or all end before the first step: the facts on which they must agree are compared.
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
from ifm_jax.models import onednn, only_head, without_head
from ifm_jax.pretrain import DeviceState, HostState, placements
from ifm_jax.runs import checkpoint, loading, memory, snapshot
from ifm_jax.runs.hosts import together
from ifm_jax.runs.snapshot import Snapshot
from ifm_jax.runs.workdir import Workdir

Answer = TypeVar("Answer")

# Seconds until the others see a file that process 0 has written: NFS caches for a while that it did not exist.
_SHARED_WITHIN = 70.0
# Fields that may differ between hosts: where their images are stored, and how they read them.
_HOSTS_OWN = ("data.source", "data.classes", "data.workers", "data.processes")


@dataclasses.dataclass
class Start:
    """The data with which a run starts.

    Attributes:
      state: state from which to continue, NumPy arrays; None: a new run.
      weights: weights for a new run (`init_from`); None: random ones.
      said: messages for the user.
    """

    state: HostState | None
    weights: Snapshot | None
    said: list[str]

    @property
    def step(self) -> int:
        """Updates done before the start."""
        return 0 if self.state is None else int(self.state.step)


def open_run(config: Config, workdir: Workdir, mesh: jax.sharding.Mesh) -> tuple[Config, Source]:
    """Returns the resolved config and the training images, the same on all hosts; configures JAX.

    Raises:
      UsageError: if the config cannot be run, or hosts differ.
    """
    return together(lambda: _open(config, workdir, mesh), lambda opened: _identity(*opened))


def open_workdir(config: Config, workdir: Workdir, source: Source) -> Start:
    """Inspects the working directory and moves damaged checkpoints out of the way.

    Args:
      config: resolved config.
      workdir: working directory of the run.
      source: source of the training images.

    Raises:
      UsageError: if the directory cannot be written, belongs to another run, or its contents cannot be read.
    """
    together(lambda: _open_workdir(workdir, config, source))  # process 0 writes, then all read
    create = assembly.state_creator(config)
    (state, damaged), weights = together(lambda: _find(workdir, config, create), lambda found: _facts(*found))
    said = workdir.set_aside(damaged)
    return Start(state, weights, said)


def place(begin: Start, config: Config, mesh: jax.sharding.Mesh, method: Method[Any]) -> DeviceState[Any]:
    """Returns the first state of a run, restored or new, on the devices; `begin` drops its arrays.

    Args:
      begin: result of `open_workdir`; a message about the weights is added to it.
      config: resolved config.
      mesh: mesh of the devices.
      method: method of the run.
    """
    state, weights = begin.state, begin.weights
    begin.state = begin.weights = None  # free their memory
    if weights is not None:
        state, notes = started_with(weights, jax.device_get(untrained(config, mesh, method)), config.method)
        begin.said.append(f"Starting with {config.init_from}: {'; '.join([*notes, *weights.notes])}.")
    if state is None:
        return untrained(config, mesh, method)
    return jax.tree.map(lambda where, part: sharding.place(part, where), placements(mesh, method), state)


def untrained(config: Config, mesh: jax.sharding.Mesh, method: Method[Any]) -> DeviceState[Any]:
    """Returns the state with which a run from scratch starts, on the devices; config and seed determine it.

    Args:
      config: resolved config.
      mesh: mesh of the devices.
      method: method of the run.
    """
    create = jax.jit(assembly.state_creator(config, mesh), out_shardings=placements(mesh, method))
    return create(sharding.place_key(mesh, assembly.initial_rngs(config)[0]))


def _open(config: Config, workdir: Workdir, mesh: jax.sharding.Mesh) -> tuple[Config, Source]:
    """Returns the resolved config and the images; configures JAX.

    Raises:
      UsageError: if the config cannot be run.
    """
    configs.validate(config, devices=mesh.size)
    known = workdir.find_config()
    config = assembly.resolve(config, known)
    assembly.configure_jax(config.model.compute_dtype)
    assembly.make_augmentation(config)
    _check_convolutions(config, mesh)
    memory.check(config, mesh)
    # Open the images before the workdir: a workdir created for a wrong image folder would reject the right one.
    source = open_source(config.data, "train")
    size = min(config.data.limit or len(source), len(source))
    memory.check_steps(config, steps_per_epoch(size, config.batch_size))
    if known is None:  # a run that has begun goes on, with a warning
        _check_queue(config, size)
    if workdir.converted.exists() and (missing := loading.read(workdir.path).missing):
        raise UsageError(
            f"workdir {workdir} has a converted checkpoint without {', '.join(missing)}, from which training cannot "
            "resume: expected a complete one (query and key encoder, queue); init_from accepts an incomplete one"
        )
    return config, source


def _check_convolutions(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Checks that oneDNN can be used, if the config asks for it; on accelerators it changes nothing.

    Raises:
      UsageError: if it cannot be used.
    """
    if config.model.cpu_convolutions != "onednn" or mesh.devices.flat[0].platform != "cpu":
        return
    wrong = ""
    if mesh.size > 1:
        wrong = f"oneDNN computes on one device, and there are {mesh.size}"
    elif config.model.compute_dtype not in onednn.DTYPES:
        wrong = f"oneDNN has no {config.model.compute_dtype} convolutions"
    try:
        onednn.require()
    except onednn.UnavailableError as error:
        wrong = wrong or str(error)
    if wrong:
        raise UsageError(f"model.cpu_convolutions='onednn': {wrong}; or use model.cpu_convolutions=xla")


def _check_queue(config: Config, images: int) -> None:
    """Checks that an image does not meet its own older keys in the queue.

    Raises:
      UsageError: if the queue holds more keys than there are images, and the config does not accept that.
    """
    moco, batch_size = config.moco, config.batch_size
    if config.method == "moco" and moco.queue_size > images and not moco.queue_beyond_images:
        raise UsageError(
            f"moco.queue_size={moco.queue_size} is more than the {images:,} images, each of which would meet its own "
            f"older keys as negatives: use {images // batch_size * batch_size} or less (ifm-jax config --suggest "
            f"--images={images}), or accept it with --config.moco.queue_beyond_images"
        )


def _identity(config: Config, source: Source) -> dict[str, Any]:
    """Returns the facts on which all hosts must agree: code, config, images."""
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
    """Returns the contents of the workdir, as `checkpoint.newest_whole`, or if there is nothing, those of `init_from`.

    Raises:
      UsageError: if the contents cannot be read, or `init_from` belongs to another network.
    """
    deadline = time.monotonic() + _SHARED_WITHIN
    while not workdir.config.exists():
        if time.monotonic() > deadline:
            raise UsageError(
                f"workdir {workdir} is not the one that process 0 has created: expected a directory on storage that "
                "all processes share"
            )
        time.sleep(1.0)
    stored, damaged = checkpoint.newest_whole(workdir.checkpoints, jax.eval_shape(create))
    if stored is not None or not config.init_from:
        return (None if stored is None else stored.state, damaged), None
    given = loading.read(config.init_from)
    # Head and memory may differ; then they are created anew.
    snapshot.check_config(config, given, config.init_from, backbone=True)
    return (None, damaged), given


def _facts(stored: tuple[HostState | None, dict[int, str]], given: Snapshot | None) -> dict[str, Any]:
    """Returns the facts about the workdir on which all hosts must agree."""
    state, damaged = stored
    return {
        "step of the checkpoint in the workdir": None if state is None else int(state.step),
        "damaged checkpoints": sorted(damaged),
        "step of init_from": given and int(given.state.step),
    }


def started_with(given: Snapshot, fresh: HostState, method: str) -> tuple[HostState, list[str]]:
    """Returns the first state of a new run that uses another's weights, and a description of the parts it uses.

    Args:
      given: state with at least the backbone of a network of the same architecture.
      fresh: state of a new run, NumPy arrays; parts that `given` lacks, or has in other shapes, come from here.
      method: method of the new run, one of `methods.METHODS`.
    """

    def shapes(tree: Tree) -> Any:
        return jax.tree.map(np.shape, tree)

    state, notes = given.state, ["query encoder"]
    # A head with BatchNorm has statistics as well.
    heads = [tuple(shapes(only_head(tree)) for tree in (of.params, of.batch_stats)) for of in (state, fresh)]
    head = heads[0] == heads[1]
    if not head:
        notes = ["query encoder with a new head"]
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
    """Writes config.json and data.json after checking that the directory belongs to this run.

    Raises:
      UsageError: if they cannot be written, or belong to a run with another config or on other images.
    """
    known = workdir.find_config()
    if known is not None:
        known = assembly.resolve(known, config)  # a converted one leaves open some fields that this run has settled
    if known is not None and (differing := configs.differences(config, known)):
        raise UsageError(
            f"workdir {workdir} belongs to a run with another config ({'; '.join(differing)}): "
            "pass another --workdir, or the original config"
        )
    images = {"images": len(source), "fingerprint": source.fingerprint}
    path = workdir.data
    noted = files.read_json(path, "delete it to skip the check of the images")
    earlier = [images | {"fingerprint": fingerprint} for fingerprint in source.earlier_fingerprints]
    if noted is not None and noted not in (images, *earlier):
        if noted.keys() != images.keys():
            raise UsageError(
                f"{path} contains {', '.join(noted) or 'nothing'}, expected images and fingerprint: delete it to "
                "skip the check of the images"
            )
        counts = f"{noted['images']} then, {images['images']} now"
        raise UsageError(
            f"workdir {workdir} belongs to a run on other images than those of data.source={config.data.source!r} "
            f"({counts if noted['images'] != images['images'] else 'as many, but others'}): pass another --workdir, or "
            "the original images"
        )
    if jax.process_index() > 0:
        return
    with workdir.writing():
        workdir.remove_leftovers()
        files.write_json(workdir.config, configs.to_dict(config))
        files.write_json(path, images)
