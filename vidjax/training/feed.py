"""Feeds give batches of clips to the training step: streamed from the records, or resident.

Resident clips all stay in the memory of the devices. A dispatch is a group of training steps that
the host starts at once.
"""

import abc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, distributed
from vidjax.core.batch import Array, Batch, Packed
from vidjax.data import resident
from vidjax.data.clips import BatchPlan
from vidjax.models.system import System
from vidjax.training import train_step
from vidjax.training.train_step import LoopResult, MemberConstants, TrainState

DISPATCH_SECONDS = 1.0  # wanted duration of a dispatch
# An entry for each group of members that a single program trains.
States = Sequence[TrainState]
AllConstants = Sequence[MemberConstants]


class DispatchResult(NamedTuple):
    """The result of a dispatch. A dispatch is a group of steps that the host starts at once."""

    states: list[TrainState]  # of every group of members
    num_steps: int
    loss: float  # of the last step, averaged over members
    bad_step: int | None  # first step at which a member reached MAX_BAD_STEPS


class Feed(abc.ABC):
    """Gives batches of clips to the training step, and runs it.

    Attributes:
      mode: `streaming` or `resident`.
      waited: seconds in which the devices waited for clips.
    """

    mode: str
    waited = 0.0

    def __init__(self) -> None:
        self._compiled = False
        self._step_seconds: float | None = None  # of the last dispatch
        self._fastest = float("inf")  # of all dispatches

    def advance(
        self, states: States, constants: AllConstants, step: int, most: int
    ) -> DispatchResult:
        """Runs training steps for about DISPATCH_SECONDS: at least 1, at most `most`.

        `step` is the number of steps before the call. The arrays of `states` are donated to the
        program: they cannot be used afterwards.
        """
        count = int(DISPATCH_SECONDS / self._step_seconds) if self._step_seconds else 1
        (count,) = distributed.max_over_processes(max(1, min(most, count)))
        began = time.monotonic()
        states, dispatched = self._dispatch(states, constants, count)
        outcomes = devices.fetch(dispatched)
        count = int(states[0].step) - step
        if self._compiled:
            self._step_seconds = (time.monotonic() - began) / count
            self._fastest = min(self._fastest, self._step_seconds)
        self._compiled = True
        bad_steps = [int(x.bad_step) for groups in outcomes for x in groups if x.bad_step >= 0]
        loss = float(np.mean([outcome.loss for outcome in outcomes[-1]]))
        return DispatchResult(states, count, loss, min(bad_steps, default=None))

    @abc.abstractmethod
    def _dispatch(
        self, states: States, constants: AllConstants, count: int
    ) -> tuple[list[TrainState], list[list[LoopResult]]]:
        """Dispatches `count` steps or fewer. Returns the states, and results of the training loop.

        The inner list has a result for each group of members. The outer list has the results of the
        last call of the loop, or the last two calls: a bad step in an earlier call would have ended
        the dispatch.
        """


class StreamingFeed(Feed):
    """Streams a batch per step; the host reads it while the devices work on the last batch.

    The host reads the result of a step after it has started the next step, so no device waits for
    the host. Then the batch of the finished step is free: the devices store at most two batches.
    `waited` is an estimate: if the devices finish before the host has read the next batch, it grows
    by the time of that read minus the fastest step time so far.
    """

    mode = "streaming"

    def __init__(self, system: System, mesh: Mesh, batches: Iterator[Batch]):
        """Takes `batches`, an endless iterator of batches with numpy arrays."""
        self._mesh, self._batches = mesh, batches
        super().__init__()
        self._loop = train_step.make_train_loop(system, mesh, lambda batch, _: batch)
        self._next: Batch | None = None

    def _put(self, batch: Batch) -> Batch:
        return devices.shard_batch(self._mesh, batch)

    def _dispatch(
        self, states: States, constants: AllConstants, count: int
    ) -> tuple[list[TrainState], list[list[LoopResult]]]:
        outcomes: list[list[LoopResult]] = []
        first, is_single = time.monotonic(), distributed.count() == 1
        for _ in range(count):
            batch = self._next or self._put(next(self._batches))
            began = time.monotonic()
            pairs = zip(states, constants, strict=True)
            results = [self._loop(*pair, batch, None) for pair in pairs]
            states = [state for state, _ in results]
            outcomes = [*outcomes[-1:], [outcome for _, outcome in results]]
            after = next(self._batches)
            fetched = time.monotonic() - began
            if self._fastest < fetched and all(x.is_ready() for x in jax.tree.leaves(outcomes[-1])):
                self.waited += fetched - self._fastest
            before = devices.fetch(outcomes[0]) if len(outcomes) > 1 else []  # waits for that step
            self._next = self._put(after)
            if any(x.bad_step >= 0 for x in before):
                break
            if is_single and time.monotonic() - first > 2 * DISPATCH_SECONDS:  # fetches have slowed
                break
        return list(states), outcomes


class ResidentFeed(Feed):
    """Draws batches from clips in device memory. A dispatch has many steps; no device waits."""

    mode = "resident"

    def __init__(self, system: System, mesh: Mesh, clips: Mapping[str, Packed], plan: BatchPlan):
        super().__init__()
        self._clips = clips

        def draw(clips: Mapping[str, Packed], step: Array) -> Batch:
            return resident.draw_batch(clips, plan, step)

        self._loop = train_step.make_train_loop(system, mesh, draw)

    def _dispatch(
        self, states: States, constants: AllConstants, count: int
    ) -> tuple[list[TrainState], list[list[LoopResult]]]:
        pairs = zip(states, constants, strict=True)
        results = [self._loop(*pair, self._clips, np.asarray(count, np.int32)) for pair in pairs]
        return [state for state, _ in results], [[outcome for _, outcome in results]]
