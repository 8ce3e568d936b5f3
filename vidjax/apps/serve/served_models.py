"""The two models of the Open Inference Protocol: a gallery, and the net of a run.

A model answers a batch of questions at once. The answer to a question does not depend on the other
questions.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery, pad_batches
from vidjax.apps.serve.limits import Limits, unprocessable
from vidjax.apps.serve.protocol import DEFAULT_K, Parameters, Spec
from vidjax.data.clips import PAD_LENGTHS
from vidjax.data.frame_fields import FRAME_FIELDS, LARGEST

if TYPE_CHECKING:  # imports JAX, and a gallery of models needs no JAX
    from vidjax.evaluation.predict import Predictor

TABLE_CLIPS = 512  # see `RunModel.answer_batch`
Frames = Mapping[str, np.ndarray]  # field, such as `features` -> array [T, ...] of T frames
FIELD_BYTES = sum(np.dtype(field.dtype).itemsize for field in FRAME_FIELDS.values())


class Question(NamedTuple):
    """Clips to identify or to score."""

    clips: Mapping[str, Mapping[str, Frames]]  # name of the clip -> modality -> frames
    k: int = DEFAULT_K  # the largest number of identities per clip
    # When a clip gets a name, see `Gallery.identify`.
    fpir: float | None = None
    threshold: float | None = None


class Identified(NamedTuple):
    """The answer of a gallery to a question about N clips."""

    answers: list[Answer]
    vectors: np.ndarray  # [N, D] float32, the vectors of all modalities, one after the other


class Scored(NamedTuple):
    """The answer of the net of a run to a question about N clips."""

    scores: np.ndarray  # [N, C] float32, for C identities
    vectors: np.ndarray  # [N, D] float32 of unit length


def list_inputs(model: "Model") -> list[Spec]:
    """Lists the input tensors of a model."""
    specs = []
    for name, width in model.widths.items():
        specs.append(Spec(name, "FP32", (-1, -1, width)))
        specs.append(Spec(f"{name}_quality", "FP32", (-1, -1)))
        specs.append(Spec(f"{name}_mask", "BOOL", (-1, -1)))
    return specs


def make_question(
    model: "Model", tensors: Mapping[str, np.ndarray], parameters: Parameters, limits: Limits
) -> Question:
    """Makes a question from the input tensors of a request, name -> array [clips, frames, ...].

    Frames whose mask is False are left out. Raises Refused for too many clips or frames, for a
    missing tensor, a wrong shape, a value that is not finite, or a parameter that the model lacks.
    """
    if isinstance(model, RunModel) and (parameters.fpir or parameters.threshold):
        raise unprocessable("the model 'run' has no fpir and no threshold: leave them out")
    present = [name for name in model.widths if name in tensors]
    if not present:
        raise unprocessable(f"the request has no features: send any of {', '.join(model.widths)}")
    count = len(tensors[present[0]])
    if not 0 < count <= limits.clips:
        raise unprocessable(f"the request has {count} clips: send 1 to {limits.clips}")
    clips: dict[str, dict[str, Frames]] = {str(number): {} for number in range(count)}
    for name in model.widths:
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


def answer(model: "Model", questions: Sequence[Question]) -> list[Any]:
    """Answers a batch of questions; returns an answer or an exception for each question.

    If the batch fails, each question is answered separately. So only wrong questions get an error.
    """
    try:
        return [*model.answer_batch(questions)]
    except Exception as error:
        if len(questions) == 1:
            return [error]
        return [result for question in questions for result in answer(model, [question])]


def _make_test_question(model: "Model", length: int, count: int = 1) -> Question:
    frames = {name: np.ones((length, width), np.float32) for name, width in model.widths.items()}
    clip = {name: {"features": features} for name, features in frames.items()}
    return Question({str(number): clip for number in range(count)})


def check_finite(frames: Frames, place: str) -> None:
    """Raises Refused if a value is not finite in float32. `place` names the clip in the message."""
    for field, array in frames.items():
        if array.dtype.kind not in "fiu":
            raise unprocessable(f"{place}: the values of {field} must be numbers")
        wide = array.dtype.itemsize > np.dtype(np.float32).itemsize
        if not (np.abs(array) <= LARGEST if wide else np.isfinite(array)).all():
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


def _slice_rows(questions: Sequence[Question]) -> list[slice]:
    ends = np.cumsum([0, *(len(question.clips) for question in questions)]).tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


class GalleryModel:
    """The model that identifies people with a gallery."""

    name = "gallery"

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        _ = self.widths  # loads the run of the gallery, so that errors appear at the start

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> width of the features."""
        return self.gallery.reads[0]

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

    def answer_batch(self, questions: Sequence[Question]) -> list[Identified]:
        """Identifies the clips of all questions; returns the answer to each question."""
        embedded = self.gallery.embed(_join_clips(questions))
        vectors = np.concatenate(list(embedded.parts.values()), axis=1)
        rows = _slice_rows(questions)
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
                self.gallery.embed(_make_test_question(self, length).clips)
        if self.gallery.index.names:
            self.answer_batch([_make_test_question(self, 1)])


class RunModel:
    """The model that scores and embeds clips with the net of a run.

    JAX compiles a program for each shape of a batch. So clips are padded to the next of
    PAD_LENGTHS, and batches have one of two numbers of rows. `warm` compiles all programs.
    """

    name = "run"

    def __init__(self, run: "Predictor"):
        self.run = run
        self._width = self.answer_batch([_make_test_question(self, 1)])[0].vectors.shape[1]

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> width of the features."""
        return dict(self.run.modalities)

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The name, datatype and shape of each output tensor."""
        return (
            Spec("scores", "FP32", (-1, len(self.run.identities))),
            Spec("identities", "BYTES", (-1, -1)),
            Spec("embedding", "FP32", (-1, self._width)),
        )

    def answer_batch(self, questions: Sequence[Question]) -> list[Scored]:
        """Scores and embeds the clips of all questions; returns the answer to each question."""
        from vidjax.core import devices
        from vidjax.evaluation.scoring import ModelScorer

        run, request = self.run, self.run.request(_join_clips(questions), None)
        data = request.data
        split = data.split(request.split)
        # `ModelScorer` makes an array with a row for each name. JAX compiles a program for each
        # size of the array, so the number of names is always a multiple of TABLE_CLIPS.
        rest = -len(split.clips) % TABLE_CLIPS
        names = [*split.clips, *(f"none/{number}" for number in range(rest))]
        scorer = ModelScorer(run.model_for(request), names, run.mesh)
        scores = np.full((len(request.names), len(run.identities)), -np.inf, np.float32)
        vectors: np.ndarray | None = None
        rows = request.block_size * run.mesh.size
        for host in pad_batches(data, request.split, tuple(run.modalities), rows):
            block = devices.shard_batch(run.mesh, host)
            (block_scores,), (embedded,) = scorer.score([block]), run.embed_blocks([block])
            real = np.asarray(host.batch_mask)
            places = np.asarray(host.clip_index)[real]
            scores[places] = np.asarray(block_scores)[real][:, : scores.shape[1]]
            norms = np.linalg.norm(embedded[real], axis=1, keepdims=True)
            if vectors is None:
                vectors = np.zeros((len(scores), embedded.shape[1]), np.float32)
            vectors[places] = embedded[real] / np.where(norms > 0, norms, 1.0)
        assert vectors is not None  # there are clips
        scores, vectors = scores[request.clip_index], vectors[request.clip_index]
        return [Scored(scores[rows], vectors[rows]) for rows in _slice_rows(questions)]

    def tensors(self, question: Question, answer: Scored) -> dict[str, np.ndarray]:
        """Converts an answer about N clips to the output tensors, name -> array.

        Returns:
          scores [N, C]: the scores of all identities.
          identities [N, K]: the names of the best K identities, or "" if a score is -inf.
          embedding [N, D]: the vectors.
        """
        k = min(question.k, answer.scores.shape[1])
        best = np.argsort(-answer.scores, axis=1, kind="stable")[:, :k]
        names = np.array(self.run.identities, object)[best]
        names[np.take_along_axis(answer.scores, best, axis=1) == -np.inf] = ""
        return {"scores": answer.scores, "identities": names, "embedding": answer.vectors}

    def warm(self) -> None:
        """Compiles all programs of the run, so that the first requests do not wait."""
        from vidjax.evaluation.predict import SMALL_REQUEST

        for length in PAD_LENGTHS:
            self.answer_batch([_make_test_question(self, length)])
            self.answer_batch([_make_test_question(self, length, SMALL_REQUEST + 1)])


Model = GalleryModel | RunModel
