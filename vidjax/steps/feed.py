"""How clips reach the training step: streamed from the records, or resident on the devices."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices
from vidjax.batch import Array, Batch, Packed
from vidjax.data import resident
from vidjax.data.clips import BatchPlan
from vidjax.steps import state as state_lib
from vidjax.steps import train_step
from vidjax.system import System

DISPATCH_SECONDS = 1.0  # how long the devices work without the host


class Done(NamedTuple):
    """What some training steps came to.

    Attributes:
      states: of every group of members, after them.
      num_steps: how many they were.
      loss: of the last of them, the mean over members.
      bad_step: the first step that was one too many without a finite loss and gradient, or None.
    """

    states: list[state_lib.TrainState]
    num_steps: int
    loss: float
    bad_step: int | None


class Feed(Protocol):
    """Brings clips to the training step.

    Attributes:
      mode: `streaming` or `resident`.
      waited: seconds that the devices sat idle waiting for clips.
    """

    mode: str
    waited: float

    def run(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
        most: int,
    ) -> Done:
        """Trains for one dispatch.

        Args:
          states: state of every group of members; donated.
          tables: tables of every group.
          step: number of steps done before.
          most: number of steps to do at the most, 1 or more.
        """
        ...

    def bad_clips(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
    ) -> np.ndarray:
        """Returns [n] int32 clip_index of the clips of `step` that have no finite loss.

        Where no single clip is to blame, these are all clips of the step.
        """
        ...


class StreamingFeed:
    """A batch a step, fetched by the host while the devices work on the one before.

    Attributes:
      waited: seconds in which the devices had no batch, as far as can be told: of a fetch that
        ended after the step, what the fastest step so far does not account for.
    """

    mode = "streaming"

    def __init__(self, system: System, mesh: Mesh, batches: Iterator[Batch]):
        """Takes endless batches of numpy arrays, beginning with that of the step to come."""
        self._mesh, self._batches = mesh, batches
        self._step = train_step.make_train_step(system, mesh)
        self._find = _make_finder(system)
        self._last: Batch | None = None
        self._next: Batch | None = None
        self._fastest = float("inf")
        self.waited = 0.0

    def _fetch(self) -> Batch:
        return devices.shard_batch(self._mesh, next(self._batches))

    def run(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
        most: int,
    ) -> Done:
        """Does one training step.

        Args:
          states: of every group of members; donated.
          tables: of every group.
          step: how many steps came before.
          most: the most steps to do, 1 or more.
        """
        del most
        batch = self._last = self._next or self._fetch()
        began = time.monotonic()
        results = [self._step(*pair, batch) for pair in zip(states, tables, strict=True)]
        losses = [loss for _, loss in results]
        self._next = self._fetch()
        fetched = time.monotonic() - began
        if all(loss.is_ready() for loss in losses) and self._fastest < fetched:
            self.waited += fetched - self._fastest
        loss = float(np.mean([np.mean(loss) for loss in losses]))
        self._fastest = min(self._fastest, time.monotonic() - began)
        states = [state for state, _ in results]
        bad = any(np.any(state.bad_steps >= train_step.MAX_BAD_STEPS) for state in states)
        return Done(states, 1, loss, step if bad else None)

    def bad_clips(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
    ) -> np.ndarray:
        """Returns the clip_index of those that spoil the step just done, or of all its clips."""
        assert self._last is not None
        return self._find(states, tables, self._last, step)


class ResidentFeed:
    """Batches that are drawn on the devices, many steps at a time.

    Attributes:
      waited: 0.
    """

    mode = "resident"
    waited = 0.0

    def __init__(self, system: System, mesh: Mesh, clips: Mapping[str, Packed], plan: BatchPlan):
        """Takes the clips to train on and how they make batches."""
        self._clips = clips
        self._find = _make_finder(system)

        def draw(clips: Mapping[str, Packed], step: Array) -> Batch:
            return resident.draw_batch(clips, plan, step)

        self._draw = jax.jit(draw)
        self._loop = train_step.make_train_loop(system, mesh, draw)
        self._compiled = False
        self._seconds: float | None = None  # of a step

    def run(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
        most: int,
    ) -> Done:
        """Does as many training steps as take about a second; arguments as of `StreamingFeed`."""
        del step
        count = max(1, min(most, int(DISPATCH_SECONDS / self._seconds))) if self._seconds else 1
        began = time.monotonic()
        results = [
            self._loop(*pair, self._clips, np.int32(count))
            for pair in zip(states, tables, strict=True)
        ]
        outcomes: list[train_step.Outcome] = jax.device_get([outcome for _, outcome in results])
        if self._compiled:
            self._seconds = (time.monotonic() - began) / count
        self._compiled = True
        bad = [int(one.bad_step) for one in outcomes if one.bad_step >= 0]
        return Done(
            states=[state for state, _ in results],
            num_steps=count,
            loss=float(np.mean([one.loss for one in outcomes])),
            bad_step=min(bad) if bad else None,
        )

    def bad_clips(
        self,
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        step: int,
    ) -> np.ndarray:
        """Returns the clip_index of those that spoil some step, or of all its clips."""
        return self._find(states, tables, self._draw(self._clips, jnp.int32(step)), step)


def _make_finder(system: System) -> Callable[..., np.ndarray]:
    """Returns the function that `bad_clips` of both feeds calls with a batch and its step."""
    find = jax.jit(functools.partial(train_step.find_bad_clips, system))

    def bad_clips(
        states: Sequence[state_lib.TrainState],
        tables: Sequence[state_lib.Tables],
        batch: Batch,
        step: int,
    ) -> np.ndarray:
        bad = [find(*pair, batch, np.int32(step)) for pair in zip(states, tables, strict=True)]
        bad, clip_index = np.any(bad, axis=0), np.asarray(batch.clip_index)
        return clip_index[bad] if bad.any() else clip_index

    return bad_clips
