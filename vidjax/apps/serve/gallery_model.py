"""A gallery as a model of the Open Inference Protocol.

The model answers a batch of questions at once. The answer to a question does not depend on the
other questions.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.serve.limits import unprocessable
from vidjax.apps.serve.protocol import DEFAULT_K, Parameters, Spec
from vidjax.apps.server_limits import Limits
from vidjax.data.clips import PAD_LENGTHS
from vidjax.data.packed_clips import FRAME_FIELDS, is_finite

Frames = Mapping[str, np.ndarray]  # field, such as `features` -> array [T, ...] of T frames
FIELD_BYTES = sum(np.dtype(field.dtype).itemsize for field in FRAME_FIELDS.values())


class Question(NamedTuple):
    """Clips to identify."""

    clips: Mapping[str, Mapping[str, Frames]]  # name of the clip -> modality -> frames
    k: int = DEFAULT_K  # the largest number of identities per clip
    # When a clip gets a name, see `Gallery.identify`.
    fpir: float | None = None
    threshold: float | None = None


class Identified(NamedTuple):
    """The answer to a question about N clips."""

    answers: list[Answer]
    vectors: np.ndarray  # [N, D] float32, the vectors of all modalities, one after the other


def make_question(
    widths: Mapping[str, int],
    tensors: Mapping[str, np.ndarray],
    parameters: Parameters,
    limits: Limits,
) -> Question:
    """Makes a question from the input tensors of a request, name -> array [clips, frames, ...].

    `widths` is modality -> width of the features. Frames whose mask is False are left out. Raises
    Refused for too many clips or frames, for a missing tensor, a wrong shape, or a value that is
    not finite.
    """
    present = [name for name in widths if name in tensors]
    if not present:
        raise unprocessable(f"the request has no features: send any of {', '.join(widths)}")
    count = len(tensors[present[0]])
    if not 0 < count <= limits.clips:
        raise unprocessable(f"the request has {count} clips: send 1 to {limits.clips}")
    clips: dict[str, dict[str, Frames]] = {str(number): {} for number in range(count)}
    for name in widths:
        fields = {"features": name, "quality": f"{name}_quality", "mask": f"{name}_mask"}
        arrays = {field: tensors[key] for field, key in fields.items() if key in tensors}
        if arrays and name not in tensors:
            text = f"input '{fields[next(iter(arrays))]}' is useless without '{name}': send both"
            raise unprocessable(text)
        for field, array in arrays.items():
            shape = (count, *tensors[name].shape[1:2])
            if array.shape[:2] != shape:
                raise unprocessable(
                    f"the shape of input '{fields[field]}' must begin with {list(shape)}"
                )
            if array.shape[1] > limits.frames:
                raise unprocessable(
                    f"input '{name}' has too many frames: send at most {limits.frames:,} for a clip"
                )
        mask = arrays.pop("mask", None)
        for row, clip in enumerate(clips.values() if arrays else ()):
            kept = slice(None) if mask is None else mask[row]
            frames = {field: array[row][kept] for field, array in arrays.items()}
            check_finite(frames, f"clip {row}, {name}")
            if len(frames["features"]):
                clip[name] = frames
    return Question(clips, parameters.k, parameters.fpir, parameters.threshold)


def check_finite(frames: Frames, place: str) -> None:
    """Raises Refused if a value is not finite in float32. `place` names the clip in the message."""
    for field, array in frames.items():
        if array.dtype.kind not in "fiu":
            raise unprocessable(f"{place}: the values of {field} must be numbers")
        if not is_finite(array).all():
            raise unprocessable(f"{place}: a value of {field} is not finite: remove the frame")


def count_bytes(clips: Mapping[str, Mapping[str, Frames]]) -> int:
    """Returns the number of bytes that clips take in memory while they are scored."""
    features = [frames["features"] for clip in clips.values() for frames in clip.values()]
    return sum(x.nbytes + FIELD_BYTES * len(x) for x in features)


def _join_clips(questions: Sequence[Question]) -> Mapping[str, Mapping[str, Frames]]:
    """Joins the clips of all questions; returns name -> clip.

    If there are several questions, a name gets the number of its question as a prefix.
    """
    if len(questions) == 1:  # errors should contain the names that the client has sent
        return questions[0].clips
    return {
        f"{number}/{name}": clip
        for number, question in enumerate(questions)
        for name, clip in question.clips.items()
    }


class GalleryModel:
    """The model that identifies people with a gallery."""

    name = "gallery"

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self.check()  # loads the run of the gallery, so that errors appear at the start

    def check(self) -> None:
        """Raises an error if the gallery, or the run that made it, cannot be read."""
        self.gallery.refresh()
        _ = self.widths

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> width of the features."""
        return self.gallery.reads[0]

    @property
    def inputs(self) -> list[Spec]:
        """The name, datatype and shape of each input tensor."""
        specs = []
        for name, width in self.widths.items():
            specs.append(Spec(name, "FP32", (-1, -1, width)))
            specs.append(Spec(f"{name}_quality", "FP32", (-1, -1)))
            specs.append(Spec(f"{name}_mask", "BOOL", (-1, -1)))
        return specs

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The name, datatype and shape of each output tensor."""
        width = sum(self.gallery.backend.widths.values())
        return (
            Spec("identity", "BYTES", (-1,)),
            Spec("identities", "BYTES", (-1, -1)),
            Spec("scores", "FP32", (-1, -1)),
            Spec("embedding", "FP32", (-1, width)),
        )

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

    def answer_batch(self, questions: Sequence[Question]) -> list[Identified]:
        """Identifies the clips of all questions; returns the answer to each question."""
        embedded = self.gallery.embed(_join_clips(questions))
        vectors = np.concatenate(list(embedded.parts.values()), axis=1)
        ends = np.cumsum([0, *(len(question.clips) for question in questions)]).tolist()
        rows = [slice(*pair) for pair in itertools.pairwise(ends)]
        names_of: dict[tuple[int, float | None, float | None], list[str]] = {}
        for question, place in zip(questions, rows, strict=True):
            names_of.setdefault(question[1:], []).extend(embedded.names[place])
        answers: dict[str, Answer] = {}
        for (k, fpir, threshold), names in names_of.items():
            subset = embedded.only({*names})
            answers |= self.gallery.identify(subset, k, fpir=fpir, threshold=threshold)
        ordered = [answers[name] for name in embedded.names]
        return [Identified(ordered[place], vectors[place]) for place in rows]

    def tensors(self, question: Question, answer: Identified) -> dict[str, np.ndarray]:
        """Converts an answer about N clips to the output tensors, name -> array.

        Returns:
          identity [N]: the name of the person, or "" if the person is unknown.
          identities [N, K]: the most probable people, or "" if a clip has fewer than K.
          scores [N, K]: the log-probabilities of these people, or -inf for "".
          embedding [N, D]: the vectors.
        """
        most = max((len(clip.best) for clip in answer.answers), default=0)
        shape = (len(answer.answers), min(question.k, most))
        names, scores = np.full(shape, "", object), np.full(shape, -np.inf, np.float32)
        for row, clip in enumerate(answer.answers):
            for place, (name, probability) in enumerate(clip.best):
                names[row, place] = name
                scores[row, place] = math.log(probability) if probability > 0 else -math.inf
            if clip.best:
                scores[row, 0] = clip.score
        identity = np.array([clip.identity or "" for clip in answer.answers], object)
        outputs = {"identity": identity, "identities": names, "scores": scores}
        return outputs | {"embedding": answer.vectors}

    def warm(self) -> None:
        """Compiles all programs of the gallery's run, so that the first requests do not wait."""
        if not self.gallery.origin.cards:
            for length in PAD_LENGTHS:
                self.gallery.embed(self._make_test_question(length).clips)
        if self.gallery.index.names:
            self.answer_batch([self._make_test_question(1)])

    def _make_test_question(self, length: int) -> Question:
        frames = {name: np.ones((length, width), np.float32) for name, width in self.widths.items()}
        return Question({"0": {name: {"features": features} for name, features in frames.items()}})
