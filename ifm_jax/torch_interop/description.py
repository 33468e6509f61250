"""Describes the contents of a snapshot, and returns its parts that PyTorch checkpoints have too."""

from collections.abc import Iterator

import flax.serialization
import numpy as np

from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.methods import MoCoMemory
from ifm_jax.runs.snapshot import Snapshot, StateAtRest
from ifm_jax.torch_interop.names import Tree, architecture_of, num_features

# Parts of a snapshot may be missing.
MemoryAtRest = MoCoMemory[np.ndarray | np.generic | None, Tree | None]


def describe(found: Snapshot) -> dict[str, str]:
    """Describes the contents of a snapshot as rows of a table: name, and value in words."""
    config, state = found.config, found.state
    if found.origin is None:
        kind = f"run of ifm_jax, {config.method}, objective {config.ifm.objective}"
    else:
        names = {"moco": "MoCo/IFM checkpoint", "torchvision": "ResNet state dict"}
        kind = f"PyTorch {names[found.origin.kind]}, {found.origin.file}"
    features = num_features(architecture_of(config))
    if "fc" not in state.params:
        head = "none"
    else:
        dim, head = configs.head(config)
        head = {"mlp": f"MLP {features} -> {features} -> {dim}", "linear": f"linear {features} -> {dim}"}.get(
            head, f"{head} {features} -> 512 -> {dim}"
        )
    memory = moco_memory(state)
    parts = ["query encoder"] + ([] if memory.key_params is None else ["key encoder"])
    parts += [] if memory.queue is None else ["queue"]
    if state.opt_state is not None and config.optim.name != "sgd":
        parts.append(f"state of {config.optim.name}")
    elif has_momentum(found):
        parts.append("momentum buffers")
    rows = {
        "kind": kind,
        "architecture": describe_architecture(config),
        "head": head,
        "parts": ", ".join(parts),
        "epoch": str(found.epoch) if found.epoch is not None else "not known",
        "step": str(int(state.step)),
        "dtype": str(state.params["conv1"]["kernel"].dtype),
        "parameters": f"{sum(np.size(leaf) for leaf in leaves(state.params)):,} in the query encoder",
    }
    if found.origin and found.origin.kind == "torchvision":
        del rows["epoch"], rows["step"]
    if memory.queue is not None and memory.queue_ptr is not None:
        rows["dim"], rows["K"] = str(memory.queue.shape[1]), str(memory.queue.shape[0])
        rows["queue_ptr"] = str(int(memory.queue_ptr))
    return rows


def momentum_of(state: StateAtRest) -> Tree:
    """Returns SGD's momentum buffers: zeros if none have been set yet."""
    return flax.serialization.to_state_dict(state.opt_state)["1"]["trace"]


def has_momentum(found: Snapshot) -> bool:
    """Whether SGD's momentum buffers exist and are not just the initial zeros."""
    state = found.state
    sgd = found.config.optim.name == "sgd" and state.opt_state is not None
    return sgd and any(leaf.any() for leaf in leaves(momentum_of(state)))


def describe_architecture(config: Config) -> str:
    """Returns the name of the network, with its stem and width if they differ from torchvision's."""
    stem = "" if config.model.stem == "imagenet" else f", stem {config.model.stem}"
    width = f", width {config.model.width}" if config.model.width else ""
    return f"{config.model.arch}{stem}{width}"


def leaves(tree: Tree) -> Iterator[np.ndarray]:
    """Yields the arrays of nested dicts."""
    for value in tree.values():
        yield from leaves(value) if isinstance(value, dict) else (value,)


def moco_memory(state: StateAtRest) -> MemoryAtRest:
    """Returns the MoCo memory of a state; for another method's state, one whose parts are all missing."""
    return state.memory if isinstance(state.memory, MoCoMemory) else MoCoMemory(None, None, None, None)
