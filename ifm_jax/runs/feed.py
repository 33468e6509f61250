"""Feeds the training step: with batches that the host reads, or with images that are held on the devices."""

import contextlib
import time
from collections.abc import Generator
from typing import Protocol

import jax

from ifm_jax import config as configs
from ifm_jax import sharding
from ifm_jax.config import Config
from ifm_jax.data import Source, steps_per_epoch, training_batches
from ifm_jax.data.on_device import Copies, OnDeviceStep, check_memory, copies_side, on_device_batches, read_all
from ifm_jax.pretrain import PretrainStep
from ifm_jax.runs import loop, memory
from ifm_jax.runs.hosts import together
from ifm_jax.runs.loop import Call, Length
from ifm_jax.runs.session import Session


class Feed(Protocol):
    """The source of a run's batches.

    Attributes:
      images: extra arguments of the program between state and batch: all images, if they are held on the devices.
    """

    images: tuple[jax.Array, ...]

    def step(self, step: PretrainStep) -> PretrainStep | OnDeviceStep:
        """Wraps the step so that it takes this feed's batches."""

    def calls(self, length: Length, session: Session) -> Generator[Call, None, None]:
        """Returns the calls of the step, one after another; close the iterator at the end.

        Args:
          length: length of the loop.
          session: shows lines and records unreadable images.
        """


def make_feed(config: Config, source: Source, size: int, mesh: jax.sharding.Mesh) -> Feed:
    """Returns the feed that a config asks for.

    Args:
      config: resolved config.
      source: source of the images.
      size: how many of them to use, from the first on.
      mesh: mesh of the devices.

    Raises:
      UsageError: if the images are to be held on the devices and do not fit there.
    """
    return (DeviceFeed if config.data.cache else HostFeed)(config, source, size, mesh)


class HostFeed:
    """Each host reads its part of every batch, one at a time."""

    images: tuple[jax.Array, ...] = ()

    def __init__(self, config: Config, source: Source, size: int, mesh: jax.sharding.Mesh):
        self._config, self._source, self._size, self._mesh = config, source, size, mesh

    def step(self, step: PretrainStep) -> PretrainStep:
        """Returns the step unchanged."""
        return step

    def calls(self, length: Length, session: Session) -> Generator[Call, None, None]:
        """Yields the batches; see `Feed`."""
        batches = training_batches(
            self._source,
            self._config.batch_size,
            seed=self._config.seed,
            start=length.first,
            size=self._size,
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=self._config.data.workers,
            processes=self._config.data.processes,
            bad_images=session.bad_images(self._size),
        )
        with contextlib.closing(batches):
            for batch in batches:
                yield Call(sharding.put_batch(self._mesh, batch))


class DeviceFeed:
    """All images are held on every device; a batch is a list of image numbers."""

    def __init__(self, config: Config, source: Source, size: int, mesh: jax.sharding.Mesh):
        self._config, self._source, self._size, self._mesh = config, source, size, mesh
        self._side = together(self._find_side, lambda side: {"side of the images held on the devices": side})
        self.images: tuple[jax.Array, ...] = ()

    def _find_side(self) -> int:
        """Returns the side of the copies that the devices hold, after checking that they fit."""
        side = copies_side(self._source, self._config.data.image_size, self._config.data.cache_size)
        check_memory(self._size, side, memory.of_device(self._mesh), configs.channels(self._config.data))
        return side

    def step(self, step: PretrainStep) -> OnDeviceStep:
        """Returns the step that takes its batch from the images on the devices, several in one call."""
        return OnDeviceStep(step, self._config.data.image_size, self._config.steps_per_call)

    def calls(self, length: Length, session: Session) -> Generator[Call, None, None]:
        """Reads all images and returns the image numbers of the next batches; see `Feed`."""
        session.say(f"Reading {self._size:,} images of {self._side} px into device memory")
        begun = time.perf_counter()
        pixels, copies = read_all(
            self._source,
            self._size,
            self._side,
            threads=self._config.data.workers,
            bad_images=session.bad_images(self._size),
        )
        session.say(f"Read {pixels.nbytes / 1e9:.2f} GB in {time.perf_counter() - begun:.1f} s.")
        self.images = (sharding.place_everywhere(self._mesh, pixels),)
        return self._numbers(copies, length)

    def _numbers(self, copies: Copies, length: Length) -> Generator[Call, None, None]:
        config, most = self._config, self._config.steps_per_call
        evaluate_every = config.eval.every * steps_per_epoch(copies.count, config.batch_size)
        counts = loop.counts(length.first, length.last_step, most, config.checkpoint_every, evaluate_every)
        batches = on_device_batches(copies, config.batch_size, counts, most, seed=config.seed, start=length.first)
        for batch, count in batches:
            yield Call(sharding.place_everywhere(self._mesh, batch), count)
