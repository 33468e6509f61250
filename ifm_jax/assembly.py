"""Builds the parts of a run from a config: encoder, method, augmentation, optimizer, step and first state."""

from typing import Any

import jax
import jax.numpy as jnp

from ifm_jax import config as configs
from ifm_jax import files, optim, pretrain, sharding
from ifm_jax.augment import (
    MoCoCIFARAugmentation,
    MoCoV1Augmentation,
    MoCoV2Augmentation,
    TrifeatureAugmentation,
    sparing_bits,
)
from ifm_jax.config import Config
from ifm_jax.errors import UsageError
from ifm_jax.methods import Method, MoCo, Objective, SimCLR
from ifm_jax.models import Encoder
from ifm_jax.pretrain import PretrainStep


def configure_jax(compute_dtype: str = "float32") -> None:
    """Configures JAX before the first computation: 64-bit types if requested, and the compilation cache.

    Compiled programs are kept in `$JAX_COMPILATION_CACHE_DIR` (`~/.cache/ifm_jax/xla` if unset), so that only the first
    start of a recipe waits for the compiler.

    Args:
      compute_dtype: "float64" turns 64-bit types on.
    """
    if compute_dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if not jax.config.jax_compilation_cache_dir:  # pyrefly: ignore[missing-attribute] (JAX adds its options later)
        jax.config.update("jax_compilation_cache_dir", str(files.cache_directory("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def resolve(config: Config, stored: Config | None = None) -> Config:
    """Returns a copy of the config with its automatic values resolved: as in `stored`, or for this machine.

    Args:
      config: config as the caller gave it.
      stored: config of the run to resume; it continues as it began, whatever the machine is now.
    """
    config = configs.from_dict(configs.to_dict(config))
    if config.model.compute_dtype == "auto":
        here = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        settled = stored.model.compute_dtype if stored else "auto"
        config.model.compute_dtype = here if settled == "auto" else settled  # "auto": converted, not trained
    config.model.bn_groups = configs.bn_groups(config)
    return config


def make_encoder(config: Config, mesh: jax.sharding.Mesh | None = None) -> Encoder:
    """Returns the encoder of a resolved config.

    Args:
      config: resolved config.
      mesh: mesh of the devices on which it is trained; None: it is not, or arrays stay where they are.
    """
    model, (dim, head) = config.model, configs.head(config)
    several = mesh if mesh is not None and mesh.size > 1 else None
    return Encoder(
        arch=model.arch,
        dim=dim,
        head=head,
        stem=model.stem,
        width=model.width,
        bn_groups=configs.bn_groups(config),
        running_stats=model.running_stats,
        compute_dtype=model.compute_dtype,
        param_dtype="float64" if model.compute_dtype == "float64" else "float32",
        reduce_over=several if config.optim.reduce_dtype == "float32" else None,
        in_channels=configs.channels(config.data),
        cpu_convolutions=model.cpu_convolutions if mesh is not None and mesh.size == 1 else "xla",
    )


def make_augmentation(config: Config):
    """Returns the augmentation that the config names, `(rngs (N,), images (N, H, W, C)) -> views`.

    MoCo's augmentations only cover the steps after the crop: their input is the crops of a `ViewSource`.

    Raises:
      UsageError: if the augmentation does not fit the config's source.
    """
    return sparing_bits(_augmentation(config), configs.random_bits(config.data)[0])


def _augmentation(config: Config):
    """Returns the augmentation of red, green and blue."""
    name, dtype = config.data.augmentation, jnp.float64 if config.model.compute_dtype == "float64" else jnp.float32
    if name != "trifeature":
        of_mocos = {"moco_v1": MoCoV1Augmentation, "moco_v2": MoCoV2Augmentation, "moco_cifar": MoCoCIFARAugmentation}
        return of_mocos[name](dtype=dtype)
    if not configs.drawn_source(config.data):
        raise UsageError(
            f"data.augmentation='trifeature' does not work with data.source={config.data.source!r}: expected moco_v2 "
            "or moco_v1, as in the recipe ifm_own_images"
        )
    strength = config.data.augment
    return TrifeatureAugmentation(
        crop_scale=(strength.crop_min, 1.0),
        rotation=strength.rotation,
        flip=strength.flip,
        brightness=strength.brightness,
        contrast=strength.contrast,
        noise=strength.noise,
        dtype=dtype,
    )


def make_optimizer(config: Config):
    """Returns the optimizer of a config; its `update` takes the `learning_rate`."""
    return optim.make(config.optim.name, config.optim.momentum, config.optim.weight_decay)


def initial_rngs(config: Config) -> tuple[jax.Array, jax.Array]:
    """Returns the random keys of the initialization (weights, queue) and of the steps."""
    start, steps = jax.random.split(jax.random.key(config.seed))
    return start, steps


def make_method(config: Config, mesh: jax.sharding.Mesh | None = None) -> Method[Any]:
    """Returns the method of a resolved config.

    Args:
      config: resolved config.
      mesh: mesh of the devices; None: arrays stay where they are.
    """
    objective = Objective(
        kind=config.ifm.objective,
        temperature=configs.temperature(config),
        epsilon=configs.epsilons(config.ifm),
        alpha=config.ifm.alpha,
        beta=config.hard.beta,
        tau_plus=config.hard.tau_plus,
    )
    encoder = make_encoder(config, mesh)
    if config.method == "simclr":
        return SimCLR(encoder, objective, mesh)
    moco = config.moco
    return MoCo(encoder, objective, moco.queue_size, moco.momentum, moco.shuffle_bn, moco.queue_sharded, mesh)


def make_step(config: Config, mesh: jax.sharding.Mesh) -> PretrainStep:
    """Returns the training step of a resolved config; its seed and learning rates are not part of it.

    Args:
      config: resolved config.
      mesh: mesh of the devices.
    """
    return PretrainStep(make_method(config, mesh), make_optimizer(config), make_augmentation(config))


def step_arguments(config: Config, epoch_steps: int, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Returns a step's arguments beside state and batch: its random key and the run's learning rates, on every device.

    Args:
      config: resolved config.
      epoch_steps: updates in an epoch.
      mesh: mesh of the devices.
    """
    rates = optim.learning_rates(
        config.optim.lr,
        schedule=config.optim.schedule,
        epochs=config.epochs,
        steps_per_epoch=epoch_steps,
        milestones=tuple(config.optim.milestones),
        warmup_epochs=config.optim.warmup_epochs,
        per_step=config.optim.per_step,
    )
    rng = sharding.place_key(mesh, initial_rngs(config)[1])
    return rng, sharding.place_everywhere(mesh, rates.astype(jnp.dtype(make_encoder(config).param_dtype)))


def state_creator(config: Config, mesh: jax.sharding.Mesh | None = None):
    """Returns the function that creates the first state of a run.

    Args:
      config: resolved config.
      mesh: mesh of the devices; None: arrays stay where they are.

    Returns:
      `(rng=...) -> TrainState`; `rng` is a JAX random key, by default the config's own.
    """
    own = initial_rngs(config)[0]
    method, optimizer = make_method(config, mesh), make_optimizer(config)
    return lambda rng=own: pretrain.create(rng, method, optimizer)
