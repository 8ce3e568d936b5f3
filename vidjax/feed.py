"""How clips reach the training step: streamed from the records, or resident on the devices."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax import mesh as mesh_lib
from vidjax import resident, steps
from vidjax.batch import Batch, Packed
from vidjax.system import System

DISPATCH_SECONDS = 1.0  # how long the devices work without the host


class Done(NamedTuple):
    """What some training steps came to.

    Attributes:
      states: of every group of members, after them.
      num_steps: how many they were.
      loss: of the last of them, the mean over members.
      bad_step: the first step whose loss was not finite, or None.
    """

    states: list[steps.TrainState]
    num_steps: int
    loss: float
    bad_step: int | None


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
        self._step = steps.make_train_step(system, mesh)
        self._next: Batch | None = None
        self._fastest = float("inf")
        self.waited = 0.0

    def _fetch(self) -> Batch:
        return mesh_lib.shard_batch(self._mesh, next(self._batches))

    def run(
        self,
        states: Sequence[steps.TrainState],
        tables: Sequence[steps.Tables],
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
        batch = self._next or self._fetch()
        began = time.monotonic()
        results = [self._step(*pair, batch) for pair in zip(states, tables, strict=True)]
        losses = [loss for _, loss in results]
        self._next = self._fetch()
        fetched = time.monotonic() - began
        if all(loss.is_ready() for loss in losses) and self._fastest < fetched:
            self.waited += fetched - self._fastest
        loss = float(np.mean([np.mean(loss) for loss in losses]))
        self._fastest = min(self._fastest, time.monotonic() - began)
        bad_step = None if np.isfinite(loss) else step
        return Done([state for state, _ in results], 1, loss, bad_step)


class ResidentFeed:
    """Batches that are drawn on the devices, many steps at a time.

    Attributes:
      waited: 0.
    """

    mode = "resident"
    waited = 0.0

    def __init__(
        self, system: System, mesh: Mesh, clips: Mapping[str, Packed], plan: resident.Plan
    ):
        """Takes the clips to train on and how they make batches."""
        self._clips = clips
        self._loop = steps.make_train_loop(
            system, mesh, lambda clips, step: resident.draw_batch(clips, plan, step)
        )
        self._compiled = False
        self._seconds: float | None = None  # of a step

    def run(
        self,
        states: Sequence[steps.TrainState],
        tables: Sequence[steps.Tables],
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
        outcomes: list[steps.Outcome] = jax.device_get([outcome for _, outcome in results])
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
