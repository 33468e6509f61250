"""Trains from a checkpoint on recorded views and compares each quantity with a reference.

The step is the real training step; only its views come from a file instead of a data source. The default is float64,
because in float32 no two programs agree for long (docs/parity.md).

views.npz: `query`, `key` (steps, N, H, W, 3), augmented and normalized; `permutation` (steps, N), optional: place i of
the shuffled key images holds `key[permutation[i]]`; `lr` (steps,), optional. reference.npz, any of: `loss`,
`loss_clean`, `loss_ifm`, `acc1`, `acc5`, `grad_norm`, `queue_ptr` (steps,); `first/query`, `first/key` (N, dim), the
embeddings of the first step; `final/<name>`, the state at the end under PyTorch's names and in its layout.

A quantity holds if its largest absolute error is at most atol + rtol * (largest magnitude in the reference); the
relative error shown is the largest absolute error divided by that magnitude.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ifm_jax import assembly, optim, sharding
from ifm_jax import config as configs
from ifm_jax.config import Config
from ifm_jax.data.npz import Npz, NpzError
from ifm_jax.errors import UsageError
from ifm_jax.pretrain import DeviceState, PretrainStep, TrainState
from ifm_jax.runs.snapshot import Snapshot, StateAtRest
from ifm_jax.torch_interop import writing

DTYPES = ("float64", "float32")
SERIES = ("loss", "loss_clean", "loss_ifm", "acc1", "acc5", "grad_norm", "queue_ptr")
# The parts of the final state that get one line each in the table, by the start and end of their names.
_GROUPS = (
    ("final/encoder_q, parameters", "final/encoder_q.", False),
    ("final/encoder_q, statistics", "final/encoder_q.", True),
    ("final/encoder_k, parameters", "final/encoder_k.", False),
    ("final/encoder_k, statistics", "final/encoder_k.", True),
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Comparison(NamedTuple):
    """The comparison of a quantity with the reference.

    Attributes:
      name: name of the quantity.
      max_abs: largest absolute error.
      max_rel: the same, divided by the largest magnitude in the reference.
      holds: whether the error is within the tolerances.
    """

    name: str
    max_abs: float
    max_rel: float
    holds: bool


def replay(
    config: Config,
    start: Snapshot,
    views: dict[str, np.ndarray],
    *,
    dtype: str = "float64",
    steps_per_epoch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Trains on recorded views, one step each.

    Args:
      config: the recipe; the views' N and `dtype` replace its `batch_size` and `compute_dtype`.
      start: complete state to start from.
      views: recorded views; see the module's docstring.
      dtype: dtype of parameters and arithmetic: "float64", or "float32" at the highest matmul precision.
      steps_per_epoch: updates in an epoch for the schedule, if the views hold no `lr`; None: that of `start`.
      devices: devices to run on; None: all.
      compiler_options: XLA options that differ from the process's.

    Returns:
      Every quantity of a reference file.

    Raises:
      UsageError: if config, start and views do not fit together.
    """
    mesh = sharding.make_mesh(devices)
    config = configs.from_dict(configs.to_dict(config))
    config.batch_size = views["query"].shape[1]
    config.model.compute_dtype = dtype
    config.moco.queue_sharded = False
    if "permutation" in views and config.moco.shuffle_bn == "balanced":
        config.moco.shuffle_bn = True  # nothing is drawn, so that N may be any number
    for of, method in (("the config", config.method), ("the start", start.config.method)):
        if method != "moco":
            raise UsageError(f"{of} has method={method}: replay follows the original: expected method=moco")
    configs.validate(config, devices=mesh.size)
    if start.missing:
        raise UsageError(f"the start has no {', '.join(start.missing)}: expected a complete training state")
    steps, first_step = len(views["query"]), int(start.state.step)
    rates = _learning_rates(config, start, views, steps_per_epoch)

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        encoder = assembly.make_encoder(config)
        optimizer = assembly.make_optimizer(config)
        method = assembly.make_method(config, mesh)
        step_fn, program = PretrainStep(method, optimizer, augment=lambda rngs, images: images).jit(), None
        # Keep the state's own step number, so that the step draws the same random numbers as in the run.
        rates = sharding.place_everywhere(mesh, np.concatenate([np.zeros(first_step), rates]).astype(dtype))
        rng = sharding.place_key(mesh, assembly.initial_rngs(config)[1])
        state = _place(start.state, optimizer, dtype, sharding.replicated(mesh))
        batches = (_batch(views, step, dtype) for step in range(steps))

        embed = jax.jit(
            lambda params, stats, images: encoder(params, stats, images, train=True)[0],
            compiler_options=compiler_options,
        )
        pointer = 0
        first: dict[str, np.ndarray] = {}
        series: dict[str, list[Any]] = {name: [] for name in SERIES}
        for batch in batches:
            batch = sharding.put_batch(mesh, batch)
            if program is None:
                first["first/query"] = np.asarray(embed(state.params, state.batch_stats, batch["views"][:, 0]))
                pointer = int(state.memory.queue_ptr)
                program = step_fn.lower(state, batch, rng, rates).compile(compiler_options)
            state, metrics = program(state, batch, rng, rates)
            if "first/key" not in first:  # the first step's keys are the ones it wrote into the queue
                first["first/key"] = np.asarray(state.memory.queue)[pointer : pointer + config.batch_size]
            for name, value in jax.device_get(metrics | {"queue_ptr": state.memory.queue_ptr}).items():
                if name in series:
                    series[name].append(value)
        final = jax.device_get(state)

    out = {name: np.asarray(values) for name, values in series.items()}
    out |= first
    finished = dataclasses.replace(start, config=config, state=final)
    return out | {f"final/{name}": values for name, values in writing.state_dict(finished)}


def _learning_rates(
    config: Config, start: Snapshot, views: dict[str, np.ndarray], steps_per_epoch: int | None
) -> np.ndarray:
    """Returns the learning rate of each recorded step."""
    steps, first = len(views["query"]), int(start.state.step)
    if "lr" in views:
        return np.asarray(views["lr"], np.float64)
    opt = config.optim
    schedule = {
        "schedule": opt.schedule,
        "epochs": config.epochs,
        "milestones": tuple(opt.milestones),
        "warmup_epochs": opt.warmup_epochs,
        "per_step": opt.per_step,
    }
    steps_per_epoch = steps_per_epoch or start.steps_per_epoch
    if steps_per_epoch:
        rates = optim.learning_rates(opt.lr, steps_per_epoch=steps_per_epoch, **schedule)[first : first + steps]
    elif start.epoch is not None and start.epoch < config.epochs and not opt.per_step and not opt.warmup_epochs:
        # Assume that the recorded steps lie within one epoch, the one after the start.
        rates = np.full(steps, optim.learning_rates(opt.lr, steps_per_epoch=1, **schedule)[start.epoch])
    else:
        raise UsageError(
            f"the learning rate of step {first + 1} is unknown: put lr into the views, or pass --steps_per_epoch"
        )
    if len(rates) < steps:
        raise UsageError(
            f"epochs={config.epochs}: the schedule ends {steps - len(rates)} steps before the views "
            f"(start at step {first}, {steps_per_epoch} steps per epoch): raise epochs, or put lr into the views"
        )
    return rates


def _place(
    state: StateAtRest, optimizer: optax.GradientTransformation, dtype: str, placement: jax.sharding.Sharding
) -> DeviceState[Any]:
    """Returns the state on the devices, with floats in `dtype` and the optimizer's part in its own structure."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), state.params)
    opt_state = jax.eval_shape(optimizer.init, shapes)
    try:
        opt_state = flax.serialization.from_state_dict(opt_state, state.opt_state or {})
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UsageError(
            "the start's optimizer state does not belong to the config's optim.name: expected the same optimizer"
        ) from None
    whole = TrainState(state.step, state.params, state.batch_stats, opt_state, state.memory)
    return jax.tree.map(lambda x: jax.device_put(_cast(np.asarray(x), dtype), placement), whole)


def _batch(views: dict[str, np.ndarray], step: int, dtype: str) -> dict[str, np.ndarray]:
    """Returns the batch of a recorded step."""
    batch = {"views": _cast(np.stack([views["query"][step], views["key"][step]], axis=1), dtype)}
    if "permutation" in views:
        batch["permutation"] = _cast(views["permutation"][step], dtype)
    return batch


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Casts floats to `dtype` and integers to int32."""
    return np.asarray(values, dtype if np.issubdtype(values.dtype, np.floating) else np.int32)


def compare(
    found: dict[str, np.ndarray], reference: dict[str, np.ndarray], rtol: float, atol: float
) -> list[Comparison]:
    """Compares every quantity of the reference.

    Raises:
      UsageError: if quantities of the reference are missing or have another shape; all in one message.
    """
    wrong = [f"{name} (unknown)" for name in reference if name not in found]
    wrong += [
        f"{name} {reference[name].shape}, here {found[name].shape}"
        for name in reference
        if name in found and reference[name].shape != found[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UsageError(f"the reference does not fit this run: {', '.join(wrong[:6])}{more}")
    comparisons = []
    for name, expected in reference.items():
        a, b = np.asarray(found[name], np.float64), np.asarray(expected, np.float64)
        error, magnitude = (float(np.max(np.abs(x), initial=0.0)) for x in (a - b, b))
        relative = error / magnitude if magnitude else (0.0 if error == 0 else float("inf"))
        # Written so that a NaN on either side fails.
        comparisons.append(Comparison(name, error, relative, error <= atol + rtol * magnitude))
    return comparisons


def load_npz(path: str | os.PathLike[str], what: str) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file without executing anything in it.

    Args:
      path: the file.
      what: expected contents, for the message.

    Raises:
      UsageError: if it cannot be read.
    """
    try:
        with Npz(path) as file:
            return dict(file)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: expected {what}") from None
    except NpzError as error:
        raise UsageError(f"{path} is not a .npz of plain arrays ({error}): expected {what}") from None


def check_views(views: dict[str, np.ndarray], path: str | os.PathLike[str] = "views") -> None:
    """Checks names, shapes and types of recorded views.

    Raises:
      UsageError: if there is a mistake; the message names the first.
    """
    for name in ("query", "key"):
        if name not in views:
            raise UsageError(f"{path} contains {', '.join(views) or 'nothing'}: expected query and key")
        shape = views[name].shape
        if views[name].ndim != 5 or shape[-1] != 3 or 0 in shape or not np.issubdtype(views[name].dtype, np.floating):
            raise UsageError(
                f"{path}: {name} is {views[name].dtype} {shape}, expected floating point (steps, N, H, W, 3)"
            )
    steps, N = views["query"].shape[:2]
    if views["key"].shape[:2] != (steps, N):
        raise UsageError(f"{path}: key is {views['key'].shape}, expected as many steps and images as query, {steps, N}")
    if "permutation" in views and (
        views["permutation"].shape != (steps, N)
        or not np.issubdtype(views["permutation"].dtype, np.integer)
        or (np.sort(views["permutation"], axis=1) != np.arange(N)).any()
    ):
        raise UsageError(f"{path}: permutation: expected integers {steps, N}, each row a permutation of 0 to {N - 1}")
    if "lr" in views and views["lr"].shape != (steps,):
        raise UsageError(f"{path}: lr is {views['lr'].shape}, expected {(steps,)}")


def summarize(comparisons: list[Comparison]) -> list[tuple[str, Comparison, int]]:
    """Returns the lines of the table: label, worst comparison, number of quantities."""
    lines: list[tuple[str, Comparison, int]] = []
    rest = list(comparisons)
    for label, prefix, statistics in _GROUPS:
        group = [c for c in rest if c.name.startswith(prefix) and c.name.endswith(_STATISTICS) == statistics]
        if group:
            rest = [c for c in rest if c not in group]
            worst = max(group, key=lambda c: (not c.holds, math.isnan(c.max_rel), c.max_rel))
            lines.append((label, worst, len(group)))
    order = {name: i for i, name in enumerate((*SERIES, "first/query", "first/key", "final/queue"))}
    rest.sort(key=lambda c: order.get(c.name, len(order)))
    return [(c.name, c, 1) for c in rest] + lines
