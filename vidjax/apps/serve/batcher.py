"""Collects requests into batches.

While a batch is scored, new requests wait and form the next batch. So a single request does not
wait, and batches grow with the load. Changes run in another thread, so that answers do not wait
until a back end is fitted again.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Generic, NamedTuple, TypeVar

from vidjax.apps.serve.limits import Limits, Refused, ServerMetrics

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")
LINGER_SECONDS = 0.01  # the longest wait for more requests, after a batch of several requests


class _Waiting(NamedTuple, Generic[Q, A]):
    question: Q
    size: int
    answer: "asyncio.Future[A]"


class Batcher(Generic[Q, A]):
    """Answers questions in batches, in a thread. Its methods are called in an event loop."""

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Sequence[A | Exception]],
        limits: Limits,
        metrics: ServerMetrics,
    ):
        """Takes a function that answers a batch: it returns an answer or an error per question."""
        self._answer, self._limits, self._metrics = answer, limits, metrics
        self._waiting: deque[_Waiting[Q, A]] = deque()
        self._thread = ThreadPoolExecutor(1, "vidjax-answers")
        self._batch: asyncio.Task[None] | None = None
        self.size = 0  # clips that wait
        self._target, self._enough = 0, asyncio.Event()  # clips of the next batch

    async def ask(self, question: Q, size: int) -> A:
        """Returns the answer to a question about `size` clips.

        Raises:
          Refused: too many clips are waiting (status 429).
        """
        if self.size + size > self._limits.waiting_clips and self._waiting:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many clips are waiting: try again", 1)
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(question, size, future))
        self.size += size
        if self.size >= self._target:
            self._enough.set()
        if self._batch is None:
            self._batch = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Answers batch after batch until no request waits."""
        loop = asyncio.get_running_loop()
        try:
            while batch := self._take_batch():
                questions = [request.question for request in batch]
                try:
                    answers = await loop.run_in_executor(self._thread, self._answer, questions)
                except Exception as error:
                    answers = [error] * len(batch)
                self._metrics.clips.observe(sum(request.size for request in batch))
                for request, answer in zip(batch, answers, strict=True):
                    if request.answer.done():
                        continue
                    if isinstance(answer, Exception):
                        request.answer.set_exception(answer)
                    else:
                        request.answer.set_result(answer)
                if len(batch) > 1:
                    await self._linger(sum(request.size for request in batch))
        finally:
            self._batch = None

    async def _linger(self, answered: int) -> None:
        """Waits a little for more requests, because clients with an answer often ask again.

        Without the wait, the first of these requests would form a batch by itself, which takes
        nearly as long as a batch of many clips.
        """
        self._target = min(self.size + answered, self._limits.batch_clips)
        self._enough.clear()
        if self.size < self._target:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._enough.wait(), LINGER_SECONDS)

    def _take_batch(self) -> list[_Waiting[Q, A]]:
        """Removes the next batch from the queue, without requests whose clients have gone."""
        batch: list[_Waiting[Q, A]] = []
        clips = 0
        while self._waiting and (
            not batch or clips + self._waiting[0].size <= self._limits.batch_clips
        ):
            request = self._waiting.popleft()
            self.size -= request.size
            if not request.answer.done():
                batch.append(request)
                clips += request.size
        return batch

    async def run(self, function: Callable[[], T]) -> T:
        """Calls a function between two batches, and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def settle(self) -> None:
        """Waits until the current batch or function has ended, and its answers are delivered."""
        await self.run(lambda: None)
        await asyncio.sleep(0)  # the event loop delivers the answers

    def stop(self) -> None:
        """Ends the thread after the current batch."""
        self._thread.shutdown()


class Changes:
    """Makes changes in turn, in a thread."""

    def __init__(self, limits: Limits):
        self._limits, self._thread = limits, ThreadPoolExecutor(1, "vidjax-changes")
        self.waiting = 0

    async def make(self, change: Callable[[], T]) -> T:
        """Makes a change and returns its result. The change is made even if the client hangs up.

        Raises:
          Refused: too many changes are waiting (429), or the change takes too long (503). In the
            second case it is still made later.
        """
        if self.waiting >= self._limits.waiting_changes:
            status = HTTPStatus.TOO_MANY_REQUESTS
            raise Refused(status, "too many changes are waiting: try again", 2)
        self.waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self._thread, change)
        work.add_done_callback(self._done)
        await asyncio.wait([work], timeout=self._limits.change_seconds)
        if not work.done():
            status = HTTPStatus.SERVICE_UNAVAILABLE
            raise Refused(status, "the change takes long: check later whether it was made", 5)
        return work.result()

    def _done(self, work: "asyncio.Future[T]") -> None:
        self.waiting -= 1
        if not work.cancelled():
            work.exception()  # marks it as read, because the client may have gone

    def stop(self) -> None:
        """Waits for all changes, and ends the thread."""
        self._thread.shutdown()
