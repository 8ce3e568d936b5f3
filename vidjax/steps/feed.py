"""Feeds bring clips to the training step: streamed from the records, or resident on the devices."""

import abc
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices
from vidjax.batch import Array, Batch, Packed
from vidjax.cluster import processes
from vidjax.data import resident
from vidjax.data.clips import BatchPlan
from vidjax.steps import state as state_lib
from vidjax.steps import train_step
from vidjax.steps.columns import ClassAxes
from vidjax.system import System

DISPATCH_SECONDS = 1.0  # duration of a dispatch of resident steps


class DispatchResult(NamedTuple):
    """The result of a dispatch: steps that the host starts at once, and then waits for."""

    states: list[state_lib.TrainState]  # of every group of members
    num_steps: int
    loss: float  # of the last step, averaged over members
    bad_step: int | None  # first step at which a member reached MAX_BAD_STEPS


class Feed(abc.ABC):
    """Brings clips to the training step.

    Attributes:
      mode: `streaming` or `resident`.
      waited: seconds that the devices were idle because they waited for clips.
    """

    mode: str
    waited = 0.0

    def __init__(self, system: System):
        self._find = jax.jit(functools.partial(train_step.find_bad_clips, system))

    @abc.abstractmethod
    def run(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
        most: int,
    ) -> DispatchResult:
        """Trains for one dispatch: 1 to `most` steps after the first `step` steps.

        `states`, which are donated, and `tables` have one entry for each group of members.
        """

    @abc.abstractmethod
    def _batch_of(self, step: int) -> Batch:
        """Returns the batch of a step, which must be the last one for StreamingFeed."""

    def bad_clips(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
    ) -> np.ndarray:
        """Finds the clips of a step whose loss or its derivative is not finite.

        Returns [n] int32, clip_index of these clips, or of all clips of the step if none is bad.
        The states are those after the step, which must be the last one for StreamingFeed.
        """
        batch, groups = self._batch_of(step), zip(states, tables, strict=True)
        found = devices.fetch([self._find(*pair, batch, np.int32(step)) for pair in groups])
        bad, clip_index = np.any(found, axis=0), np.asarray(devices.fetch(batch.clip_index))
        return clip_index[bad] if bad.any() else clip_index


class StreamingFeed(Feed):
    """Streams one batch per step; the host fetches it while the devices work on the one before.

    `waited` is an estimate: fetch time minus the fastest step so far, if the devices finished
    before the fetch.
    """

    mode = "streaming"

    def __init__(
        self, system: System, mesh: Mesh, batches: Iterator[Batch], axes: ClassAxes | None = None
    ):
        """Takes an endless iterator of this process's share of each batch, as numpy arrays."""
        self._mesh, self._share, self._batches = mesh, devices.share(mesh), batches
        super().__init__(system)
        self._step = train_step.make_train_step(system, mesh, axes)
        self._last: Batch | None = None
        self._next: Batch | None = None
        self._fastest = float("inf")

    def _fetch(self) -> Batch:
        return devices.shard_batch(self._mesh, next(self._batches), self._share)

    def run(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
        most: int,
    ) -> DispatchResult:
        """Does one training step."""
        del most
        batch = self._last = self._next or self._fetch()
        began = time.monotonic()
        results = [self._step(*pair, batch) for pair in zip(states, tables, strict=True)]
        losses = [loss for _, loss in results]
        self._next = self._fetch()
        fetched = time.monotonic() - began
        is_done = all(loss.is_ready() for loss in losses)  # pyright: ignore[reportAttributeAccessIssue]
        if is_done and self._fastest < fetched:
            self.waited += fetched - self._fastest
        loss = float(np.mean([np.mean(loss) for loss in losses]))
        self._fastest = min(self._fastest, time.monotonic() - began)
        states = [state for state, _ in results]
        bad = any(np.any(state.bad_steps >= train_step.MAX_BAD_STEPS) for state in states)
        return DispatchResult(states, 1, loss, step if bad else None)

    def _batch_of(self, step: int) -> Batch:
        assert self._last is not None
        return self._last


class ResidentFeed(Feed):
    """Draws batches from clips on the devices, for many steps per dispatch; no device waits."""

    mode = "resident"

    def __init__(
        self,
        system: System,
        mesh: Mesh,
        clips: Mapping[str, Packed],
        plan: BatchPlan,
        axes: ClassAxes | None = None,
    ):
        super().__init__(system)
        self._clips = clips

        def draw(clips: Mapping[str, Packed], step: Array) -> Batch:
            return resident.draw_batch(clips, plan, step)

        self._draw = jax.jit(draw)
        self._loop = train_step.make_train_loop(system, mesh, draw, axes)
        self._compiled = False
        self._step_seconds: float | None = None

    def run(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
        most: int,
    ) -> DispatchResult:
        """Does the training steps of about DISPATCH_SECONDS."""
        del step
        count = 1
        if self._step_seconds:
            count = max(1, min(most, int(DISPATCH_SECONDS / self._step_seconds)))
        count = processes.broadcast_int(count)
        began = time.monotonic()
        results = [
            self._loop(*pair, self._clips, np.asarray(count, np.int32))
            for pair in zip(states, tables, strict=True)
        ]
        outcomes: list[train_step.Outcome] = devices.fetch([outcome for _, outcome in results])
        if self._compiled:
            self._step_seconds = (time.monotonic() - began) / count
        self._compiled = True
        bad_steps = [int(outcome.bad_step) for outcome in outcomes if outcome.bad_step >= 0]
        return DispatchResult(
            states=[state for state, _ in results],
            num_steps=count,
            loss=float(np.mean([outcome.loss for outcome in outcomes])),
            bad_step=min(bad_steps, default=None),
        )

    def _batch_of(self, step: int) -> Batch:
        return self._draw(self._clips, jnp.int32(step))
