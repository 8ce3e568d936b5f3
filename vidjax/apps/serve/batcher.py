"""Scores requests that arrive together, together: a queue, and a thread for each kind of work.

While a batch is scored, requests wait, and form the next one. So a lone request waits for nobody,
and the batches grow with the load. Changes have a thread of their own: answers do not wait for a
back end that is fitted anew.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Generic, NamedTuple, TypeVar

from vidjax.apps.serve.limits import Limits, Metrics, Refused

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")
# Seconds that the next batch waits for company at most, after one of several requests.
LINGER = 0.01


class _Waiting(NamedTuple, Generic[Q, A]):
    question: Q
    size: int
    answer: "asyncio.Future[A]"


class Batcher(Generic[Q, A]):
    """Answers questions in batches, in a thread; its methods belong to an event loop."""

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Sequence[A | Exception]],
        limits: Limits,
        metrics: Metrics,
    ):
        """Takes the function that answers a batch: an answer, or an error, for each question."""
        self._answer, self._limits, self._metrics = answer, limits, metrics
        self._waiting: deque[_Waiting[Q, A]] = deque()
        self._thread = ThreadPoolExecutor(1, "vidjax-answers")
        self._batch: asyncio.Task[None] | None = None
        self.size = 0  # clips that wait
        self._wanted, self._enough = 0, asyncio.Event()

    async def ask(self, question: Q, size: int) -> A:
        """Returns the answer to a question of `size` clips; Refused with 429 if too many wait."""
        if self.size + size > self._limits.waiting_clips and self._waiting:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many clips wait: try again", 1)
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(question, size, future))
        self.size += size
        if self.size >= self._wanted:
            self._enough.set()
        if self._batch is None:
            self._batch = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Answers batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next():
                questions = [one.question for one in batch]
                try:
                    found = await loop.run_in_executor(self._thread, self._answer, questions)
                except Exception as error:
                    found = [error] * len(batch)
                self._metrics.clips.observe(sum(one.size for one in batch))
                for one, answer in zip(batch, found, strict=True):
                    if one.answer.done():
                        continue
                    if isinstance(answer, Exception):
                        one.answer.set_exception(answer)
                    else:
                        one.answer.set_result(answer)
                if len(batch) > 1:
                    await self._return(sum(one.size for one in batch))
        finally:
            self._batch = None

    async def _return(self, answered: int) -> None:
        """Waits a little for those who got an answer, who may ask again, and for all others.

        Else a batch of one would go before the rest: a product with few clips costs nearly as much.
        """
        self._wanted = min(self.size + answered, self._limits.batch_clips)
        self._enough.clear()
        if self.size < self._wanted:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._enough.wait(), LINGER)

    def _next(self) -> list[_Waiting[Q, A]]:
        """Takes the next batch from those who still wait for their answer."""
        batch: list[_Waiting[Q, A]] = []
        clips = 0
        while self._waiting and (
            not batch or clips + self._waiting[0].size <= self._limits.batch_clips
        ):
            one = self._waiting.popleft()
            self.size -= one.size
            if not one.answer.done():
                batch.append(one)
                clips += one.size
        return batch

    async def run(self, function: Callable[[], T]) -> T:
        """Returns what a function returns, called between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def settle(self) -> None:
        """Waits until all that was begun before is answered: a batch, or a function of `run`."""
        await self.run(lambda: None)
        await asyncio.sleep(0)  # its answers are handed out before

    def stop(self) -> None:
        """Ends the thread, after the batch that it works at."""
        self._thread.shutdown()


class Changes:
    """Makes one change after another, in a thread of their own."""

    def __init__(self, limits: Limits):
        self._limits, self._thread = limits, ThreadPoolExecutor(1, "vidjax-changes")
        self.waiting = 0

    async def make(self, change: Callable[[], T]) -> T:
        """Returns what a change returns; it is made even if the client hangs up.

        Refused with 429 if too many wait, with 503 if it takes too long: it is then made later.
        """
        if self.waiting >= self._limits.waiting_changes:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many changes wait: try again", 2)
        self.waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self._thread, change)
        work.add_done_callback(self._done)
        await asyncio.wait([work], timeout=self._limits.change_seconds)
        if not work.done():
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "the change takes long: look whether it was made", 5
            )
        return work.result()

    def _done(self, work: "asyncio.Future[T]") -> None:
        self.waiting -= 1
        if not work.cancelled():
            work.exception()  # somebody else may have hung up

    def stop(self) -> None:
        """Waits for the changes under way, and ends the thread."""
        self._thread.shutdown()
