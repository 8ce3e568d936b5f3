"""Answers the requests to a server in batches, and changes its gallery, one change at a time.

While a batch is answered, new requests wait and form the next batch. So a request to an idle server
does not wait, and batches grow with the load. The gallery is the file of known people. It is
changed in another thread, because a change can take minutes.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from vidjax.apps.gallery.answers import Answer
from vidjax.apps.serve.gallery_model import Question
from vidjax.apps.serve.limits import Refused, ServerMetrics
from vidjax.apps.server_limits import Limits
from vidjax.utils.errors import mute_thread

T = TypeVar("T")
LINGER_SECONDS = 0.01  # longest wait for more requests after a batch of several requests


def _make_thread(name: str) -> ThreadPoolExecutor:
    """Returns an executor with one thread, whose messages and warnings are discarded.

    They may contain names of people, and the log of a server must contain no such names.
    """
    return ThreadPoolExecutor(1, name, initializer=mute_thread)


class _Waiting(NamedTuple):
    """A question that waits, its number of clips, and the future that gets the answer."""

    question: Question
    size: int
    answer: asyncio.Future[Any]


class Batcher:
    """Answers questions, which are requests to identify clips, in batches.

    A thread computes the answers. The methods must be called in the event loop of the server.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Any]],
        limits: Limits,
        metrics: ServerMetrics,
    ):
        """Makes a batcher.

        `answer` computes an answer or an exception for each question of a batch. `limits` contains
        the largest number of clips in a batch, and of clips that wait. `metrics` counts the clips
        of batches.
        """
        self._answer, self._limits, self._metrics = answer, limits, metrics
        self._waiting: deque[_Waiting] = deque()
        self.thread = _make_thread("vidjax-answers")
        self._batch: asyncio.Task[None] | None = None
        self.size = 0  # number of clips that wait for an answer or for their vectors
        self._target, self._enough = 0, asyncio.Event()  # the event is set when _target clips wait

    async def ask(self, question: Question, size: int) -> list[Answer]:
        """Returns the answers to a question, one for each of its `size` clips.

        Raises Refused (HTTP status 429) if too many clips wait. If the question cannot be answered,
        raises the exception that it caused.
        """
        self._add(size)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(question, size, future))
        if self.size >= self._target:
            self._enough.set()
        if self._batch is None:
            self._batch = asyncio.create_task(self._work())
        return await future

    def _add(self, size: int) -> None:
        """Counts `size` waiting clips. Raises Refused (status 429) if too many clips wait."""
        if self.size and self.size + size > self._limits.waiting_clips:
            raise Refused(429, "too many clips are waiting: try again", 1)
        self.size += size

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._take_batch():
                questions = [request.question for request in batch]
                try:
                    answers = await loop.run_in_executor(self.thread, self._answer, questions)
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
        """Waits a moment for `answered` clips, because clients often ask again after an answer."""
        # Without this wait, the first new request would be the whole next batch. A small batch
        # takes nearly as long as a large batch.
        self._target = min(self.size + answered, self._limits.batch_clips)
        self._enough.clear()
        if self.size < self._target:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._enough.wait(), LINGER_SECONDS)

    def _take_batch(self) -> list[_Waiting]:
        """Takes the next batch from the queue. Requests whose clients have gone are left out."""
        batch: list[_Waiting] = []
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

    async def run(self, function: Callable[[], T], embedded: int = 0) -> T:
        """Calls `function` in the thread that answers, between two batches; returns the result.

        `embedded` is the number of clips whose embeddings `function` computes. Until `function`
        ends, these clips count as waiting. If too many clips wait, raises Refused (status 429).
        """
        if embedded:
            self._add(embedded)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, function)
        finally:
            self.size -= embedded

    async def settle(self) -> None:
        """Waits until the current batch has ended and its answers are delivered."""
        await self.run(lambda: None)
        await asyncio.sleep(0)  # the event loop delivers the answers


class Changes:
    """Makes changes to a gallery one after the other, in a thread."""

    def __init__(self, limits: Limits):
        self._limits, self.thread = limits, _make_thread("vidjax-changes")
        self.waiting = 0

    async def make(self, change: Callable[[], T]) -> T:
        """Calls `change` in the thread that makes all changes; returns the result.

        Raises Refused if too many changes are waiting (status 429), or if the change takes too long
        (status 503). A change that takes too long is still finished, and so is a change whose
        client disconnects.
        """
        if self.waiting >= self._limits.waiting_changes:
            raise Refused(429, "too many changes are waiting: try again", 2)
        self.waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self.thread, change)
        work.add_done_callback(self._done)
        await asyncio.wait([work], timeout=self._limits.change_seconds)
        if not work.done():
            text = "the change is not finished and goes on: check later whether it was made"
            raise Refused(503, text, 5)
        return work.result()

    def _done(self, work: "asyncio.Future[T]") -> None:
        self.waiting -= 1
        if not work.cancelled():
            work.exception()  # otherwise asyncio logs the error if the client has gone
