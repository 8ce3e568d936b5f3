"""Reads batches of clips, and runs training steps on them.

Resident clips stay in the memory of the devices during training. Streamed clips are read from disk.
The host starts several training steps with one call to the devices, a dispatch, because each call
takes time.
"""

import abc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices
from vidjax.core.batch import Batch, Packed
from vidjax.data import resident
from vidjax.data.clips import BatchPlan
from vidjax.training.train_step import Loop, LoopResult, MemberConstants, TrainState
from vidjax.utils import distributed

DISPATCH_SECONDS = 1.0  # the time that a dispatch should take
# These lists have an entry for each group of members (nets of an ensemble) that train together.
States = Sequence[TrainState]
AllConstants = Sequence[MemberConstants]
# The new states, and the results of the last calls of the compiled loop, see `Feed._dispatch`.
Dispatched = tuple[list[TrainState], list[list[LoopResult]]]


class DispatchResult(NamedTuple):
    """The result of `Feed.advance`: new states of the nets, and the loss of the last step."""

    states: list[TrainState]  # of every group of members (nets of an ensemble)
    num_steps: int
    loss: float  # the loss of the last step, averaged over members
    bad_step: int | None  # first step at which a member reached MAX_BAD_STEPS, or None


class Feed(abc.ABC):
    """Reads batches of clips, and runs training steps on them.

    Attributes:
      mode: `streaming` (clips are read from the disk) or `resident` (clips stay on the devices).
      waited: the seconds in which the devices waited for clips.
    """

    mode: str
    waited = 0.0
    _most = 1 << 31  # number of steps of a dispatch
    _step_seconds = 0.0  # of a step of the last dispatch; 0 before the first dispatch
    _fastest = float("inf")  # seconds of a step of the fastest dispatch

    def advance(
        self, states: States, constants: AllConstants, step: int, most: int
    ) -> DispatchResult:
        """Runs training steps for about a second, at least 1 and at most `most` steps.

        `states` and `constants` have an entry for each group of members (nets of an ensemble) that
        train together. `step` is the number of finished steps. The memory of `states` is reused
        (donated to JAX), so the caller must use the returned states.
        """
        count = int(DISPATCH_SECONDS / self._step_seconds) if self._step_seconds else 1
        (count,) = distributed.max_over_processes(max(1, min(most, self._most, count)))
        began = time.monotonic()
        states, dispatched = self._dispatch(states, constants, count)
        outcomes = devices.fetch(dispatched)
        count = int(states[0].step) - step
        self._step_seconds = (time.monotonic() - began) / count
        self._fastest = min(self._fastest, self._step_seconds)
        bad_steps = [int(x.bad_step) for groups in outcomes for x in groups if x.bad_step >= 0]
        loss = float(np.mean([outcome.loss for outcome in outcomes[-1]]))
        return DispatchResult(states, count, loss, min(bad_steps, default=None))

    @abc.abstractmethod
    def _dispatch(self, states: States, constants: AllConstants, count: int) -> Dispatched:
        """Runs at most `count` training steps with one or more calls of the compiled loop.

        The lists `states` and `constants` have an entry for each group of members (nets) that train
        together. Returns the new states, and the results of the last two calls of the loop, or of
        the only call. The result of a call is a list with a LoopResult for each group.
        """


class StreamingFeed(Feed):
    """Streams clips. The host reads the next batch while the devices train on the present batch.

    The devices store at most two batches. `waited`, the seconds without a batch, is an estimate.
    """

    mode = "streaming"
    _next: Batch | None = None

    def __init__(self, loop: Loop, mesh: Mesh, batches: Iterator[Batch]):
        """Makes a feed from `batches`, an endless iterator of batches with numpy arrays."""
        self._loop, self._mesh, self._batches = loop, mesh, batches

    def _dispatch(self, states: States, constants: AllConstants, count: int) -> Dispatched:
        outcomes: list[list[LoopResult]] = []
        first, is_single = time.monotonic(), distributed.count() == 1
        for _ in range(count):
            batch = self._next or devices.shard_batch(self._mesh, next(self._batches))
            began = time.monotonic()
            pairs = zip(states, constants, strict=True)
            results = [self._loop(*pair, batch, None) for pair in pairs]
            states = [state for state, _ in results]
            outcomes = [*outcomes[-1:], [outcome for _, outcome in results]]
            after = next(self._batches)
            fetched = time.monotonic() - began
            # The step ended while the batch was read, so the devices waited. The fastest step is an
            # estimate of the time of the step.
            if self._fastest < fetched and all(x.is_ready() for x in jax.tree.leaves(outcomes[-1])):
                self.waited += fetched - self._fastest
            # This waits until the devices have finished the previous step. A bad step is found one
            # step later, so the last two results suffice.
            before = devices.fetch(outcomes[0]) if len(outcomes) > 1 else []
            self._next = devices.shard_batch(self._mesh, after)
            if any(x.bad_step >= 0 for x in before):
                break
            if is_single and time.monotonic() - first > 2 * DISPATCH_SECONDS:  # reading has slowed
                break
        return list(states), outcomes


class ResidentFeed(Feed):
    """Gathers batches from clips that stay on the devices, so that no step waits for the host."""

    mode = "resident"

    def __init__(
        self, loop: Loop, mesh: Mesh, clips: Mapping[str, Packed], plan: BatchPlan, step: int
    ):
        """Makes a feed. Its first training step is step `step`.

        `clips` is modality -> all training clips, on the devices. `plan` decides which clips are in
        the batch of a step.
        """
        self._loop, self._mesh, self._clips, self._plan = loop, mesh, clips, plan
        self._step, self._most = step, resident.count_steps(plan)

    def _dispatch(self, states: States, constants: AllConstants, count: int) -> Dispatched:
        drawn = resident.draw_steps(self._plan, self._step, count), np.asarray(count, np.int32)
        drawn, number = devices.replicate(self._mesh, drawn)
        self._step += count
        pairs = zip(states, constants, strict=True)
        results = [self._loop(*pair, (self._clips, drawn), number) for pair in pairs]
        return [state for state, _ in results], [[outcome for _, outcome in results]]
