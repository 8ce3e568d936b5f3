"""Identifies the clips of several requests together, which is faster than one request at a time.

The answer to a request does not depend on the other requests.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery
from vidjax.data.clips import PAD_LENGTHS
from vidjax.data.packed_clips import FRAME_FIELDS
from vidjax.utils.groups import group_by_key

DEFAULT_K = 5
Frames = Mapping[str, np.ndarray]  # field, such as `features` -> array [T, ...] of T frames
FIELD_BYTES = sum(np.dtype(field.dtype).itemsize for field in FRAME_FIELDS.values())


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


class GalleryModel:
    """Answers requests to identify clips. The gallery contains the known people."""

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self.check()  # loads the run of the gallery, so that errors appear at the start

    def check(self) -> None:
        """Raises an error if the gallery or the model that makes its embeddings cannot be read."""
        self.gallery.refresh()
        _ = self.widths

    @property
    def widths(self) -> dict[str, int]:
        """The modalities that the gallery reads: modality -> width of the features of a frame."""
        return self.gallery.source.reads[0]

    def answer(self, questions: Sequence[Question]) -> list[Any]:
        """Answers a batch of questions; returns an answer or an exception for each question.

        If the batch fails, each question is answered separately. So only wrong questions get an
        error.
        """
        try:
            return [*self.answer_batch(questions)]
        except Exception as error:
            if len(questions) == 1:
                return [error]
            return [result for question in questions for result in self.answer([question])]

    def answer_batch(self, questions: Sequence[Question]) -> list[list[Answer]]:
        """Identifies the clips of all questions at once; returns the answers of each question."""
        embedded = self.gallery.embed(_join_clips(questions))
        left = iter(embedded.names)
        names_of = [[*itertools.islice(left, len(question.clips))] for question in questions]
        pairs = ((x[1:], names) for x, names in zip(questions, names_of, strict=True))
        answers: dict[str, Answer] = {}
        for (k, fpir, threshold), names in group_by_key(pairs).items():
            subset = embedded.only({*itertools.chain.from_iterable(names)})
            answers |= self.gallery.identify(subset, k, fpir=fpir, threshold=threshold)
        return [[answers[name] for name in names] for names in names_of]

    def warm(self) -> None:
        """Answers test questions, so that JAX compiles all programs before the first request."""
        if not self.gallery.origin.cards:
            for length in PAD_LENGTHS:
                self.gallery.embed(self._make_test_question(length).clips)
        if self.gallery.index.names:
            self.answer_batch([self._make_test_question(1)])

    def _make_test_question(self, length: int) -> Question:
        frames = {name: np.ones((length, width), np.float32) for name, width in self.widths.items()}
        return Question({"0": {name: {"features": features} for name, features in frames.items()}})
