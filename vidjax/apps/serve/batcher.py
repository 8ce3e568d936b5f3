"""Answers the requests to a server in batches, and changes its gallery, one change at a time.

While a batch is answered, new requests wait and form the next batch. So a request to an idle server
does not wait, and batches grow with the load. The gallery is the file of known people. It is
changed in another thread, because a change can take minutes. The answer to a request does not
depend on the other requests of its batch.
"""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.serve.limits import Refused, ServerMetrics
from vidjax.apps.server_limits import Limits
from vidjax.data.clips import PAD_LENGTHS
from vidjax.data.packed_clips import FRAME_FIELDS
from vidjax.utils.errors import mute_thread
from vidjax.utils.groups import group_by_key

T = TypeVar("T")
DEFAULT_K = 5
Frames = Mapping[str, np.ndarray]  # field, such as `features` -> array [T, ...] of T frames
FIELD_BYTES = sum(np.dtype(field.dtype).itemsize for field in FRAME_FIELDS.values())
LINGER_SECONDS = 0.01  # longest wait for more requests after a batch of several requests


class Question(NamedTuple):
    """A request to identify clips: the clips, and the options of `Gallery.identify`."""

    clips: Mapping[str, Mapping[str, Frames]]  # name of the clip -> modality -> frames
    k: int = DEFAULT_K  # the largest number of identities per clip
    # When a clip gets a name, see `Gallery.identify`.
    fpir: float | None = None
    threshold: float | None = None


def count_bytes(clips: Mapping[str, Mapping[str, Frames]]) -> int:
    """Returns the number of bytes that clips take in memory while they are scored.

    `clips` is name of the clip -> modality -> frames.
    """
    features = [frames["features"] for clip in clips.values() for frames in clip.values()]
    return sum(x.nbytes + FIELD_BYTES * len(x) for x in features)


def _join_clips(questions: Sequence[Question]) -> Mapping[str, Mapping[str, Frames]]:
    """Puts the clips of all questions into one mapping: name -> modality -> frames.

    If there are several questions, each name begins with the number of its question, such as `0/a`.
    """
    if len(questions) == 1:  # errors should contain the names that the client has sent
        return questions[0].clips
    return {
        f"{number}/{name}": clip
        for number, question in enumerate(questions)
        for name, clip in question.clips.items()
    }


def answer(gallery: Gallery, questions: Sequence[Question]) -> list[Any]:
    """Answers a batch of questions; returns an answer or an exception for each question.

    If the batch fails, each question is answered separately. So only wrong questions get an error.
    """
    try:
        return [*answer_batch(gallery, questions)]
    except Exception as error:
        if len(questions) == 1:
            return [error]
        return [result for question in questions for result in answer(gallery, [question])]


def answer_batch(gallery: Gallery, questions: Sequence[Question]) -> list[list[Answer]]:
    """Identifies the clips of all questions at once; returns the answers of each question."""
    embedded = gallery.embed(_join_clips(questions))
    left = iter(embedded.names)
    names_of = [[*itertools.islice(left, len(question.clips))] for question in questions]
    pairs = ((x[1:], names) for x, names in zip(questions, names_of, strict=True))
    answers: dict[str, Answer] = {}
    for (k, fpir, threshold), names in group_by_key(pairs).items():
        subset = embedded.only({*itertools.chain.from_iterable(names)})
        answers |= gallery.identify(subset, k, fpir=fpir, threshold=threshold)
    return [[answers[name] for name in names] for names in names_of]


def warm(gallery: Gallery) -> None:
    """Answers test questions, so that JAX compiles all programs before the first request."""

    def make_question(length: int) -> Question:
        widths, _ = gallery.source.reads
        frames = {x: {"features": np.ones((length, n), np.float32)} for x, n in widths.items()}
        return Question({"0": frames})

    if not gallery.origin.cards:
        for length in PAD_LENGTHS:
            gallery.embed(make_question(length).clips)
    if gallery.index.names:
        answer_batch(gallery, [make_question(1)])


def _make_thread(name: str) -> ThreadPoolExecutor:
    """Returns an executor with one thread, whose messages and warnings are discarded.

    They may contain names of people, and the log of a server must contain no such names.
    """
    return ThreadPoolExecutor(1, name, initializer=mute_thread)


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
        self._waiting: deque[tuple[Question, asyncio.Future[Any]]] = deque()
        self.thread = _make_thread("vidjax-answers")
        self._batch: asyncio.Task[None] | None = None
        self.size = 0  # number of clips that wait for an answer or for their vectors
        self._target, self._enough = 0, asyncio.Event()  # the event is set when _target clips wait

    async def ask(self, question: Question) -> list[Answer]:
        """Returns the answers to a question, one for each of its clips.

        Raises Refused (HTTP status 429) if too many clips wait. If the question cannot be answered,
        raises the exception that it caused.
        """
        self._add(len(question.clips))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
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
                questions = [question for question, _ in batch]
                answers = await loop.run_in_executor(self.thread, self._answer, questions)
                clips = sum(len(question.clips) for question in questions)
                self._metrics.clips.observe(clips)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
                if len(batch) > 1:
                    await self._linger(clips)
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

    def _take_batch(self) -> list[tuple[Question, asyncio.Future[Any]]]:
        """Takes the next batch from the queue. Requests whose clients have gone are left out."""
        batch, clips = list[tuple[Question, asyncio.Future[Any]]](), 0
        while self._waiting:
            question, future = self._waiting[0]
            size = len(question.clips)
            if batch and clips + size > self._limits.batch_clips:
                break
            self._waiting.popleft()
            self.size -= size
            if not future.done():
                batch.append((question, future))
                clips += size
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
