"""What can be asked over the protocol: a gallery, and the net of a run.

A model answers a batch of questions at once, as it would answer each question without the others.
If a batch fails, each question is answered separately and gets an error of its own.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery, padded_batches
from vidjax.apps.serve.limits import Limits, unprocessable
from vidjax.apps.serve.protocol import DEFAULT_K, Parameters, Spec
from vidjax.core import devices
from vidjax.data.clips import PAD_LENGTHS
from vidjax.data.frame_fields import FRAME_FIELDS, LARGEST
from vidjax.evaluation.predict import SMALL_REQUEST, Predictor
from vidjax.evaluation.scoring import ModelScorer

TABLE = 512  # clips, more than one batch has
Frames = Mapping[str, np.ndarray]  # field -> [T, ...]
FIELD_BYTES = sum(np.dtype(one.dtype).itemsize * one.width for one in FRAME_FIELDS.values())


class Question(NamedTuple):
    """Clips, name -> modality -> frames, and what is asked about them.

    `fpir` and `threshold` are as in `Gallery.identify`, and mean nothing to a run. `k` is the
    number of identities of each clip, at most.
    """

    clips: Mapping[str, Mapping[str, Frames]]
    k: int = DEFAULT_K
    fpir: float | None = None
    threshold: float | None = None


class Identified(NamedTuple):
    """Answers of a gallery for N clips, and their vectors, [N, sum of D] float32."""

    answers: list[Answer]
    vectors: np.ndarray


class Scored(NamedTuple):
    """Scores of a run for N clips, [N, C] float32, and their unit vectors, [N, D] float32."""

    scores: np.ndarray
    vectors: np.ndarray


def inputs(model: "Model") -> list[Spec]:
    """Returns the input tensors of a model: features, quality and mask of each modality."""
    found = []
    for name, width in model.widths.items():
        found.append(Spec(name, "FP32", (-1, -1, width)))
        found.append(Spec(f"{name}_quality", "FP32", (-1, -1)))
        found.append(Spec(f"{name}_mask", "BOOL", (-1, -1)))
    return found


def question(
    model: "Model", tensors: Mapping[str, np.ndarray], asked: Parameters, limits: Limits
) -> Question:
    """Returns the question that input tensors ask; Refused names a wrong one.

    Frames that the mask leaves out are not looked at; all others must be finite.
    """
    present = [name for name in model.widths if name in tensors]
    if not present:
        raise unprocessable(f"no features: wanted one of {', '.join(model.widths)}")
    count = len(tensors[present[0]])
    if not 0 < count <= limits.clips:
        raise unprocessable(f"{count} clips: a request has 1 to {limits.clips}")
    clips: dict[str, dict[str, Frames]] = {str(number): {} for number in range(count)}
    for name in model.widths:
        fields = {"features": name, "quality": f"{name}_quality", "mask": f"{name}_mask"}
        given = {field: tensors[key] for field, key in fields.items() if key in tensors}
        if given and name not in tensors:
            raise unprocessable(f"input '{fields[next(iter(given))]}' without '{name}'")
        for field, array in given.items():
            wanted = (count, *tensors[name].shape[1:2])
            if array.shape[:2] != wanted:
                raise unprocessable(f"input '{fields[field]}': wanted shape {list(wanted)}")
            if array.shape[1] > limits.frames:
                raise unprocessable(f"input '{name}': a clip has {limits.frames:,} frames at most")
        mask = given.pop("mask", None)
        for row, clip in enumerate(clips.values() if given else ()):
            kept = slice(None) if mask is None else mask[row]
            frames = {field: array[row][kept] for field, array in given.items()}
            check_finite(frames, f"clip {row}, {name}")
            if len(frames["features"]):
                clip[name] = frames
    return Question(clips, asked.k, asked.fpir, asked.threshold)


def answer(model: "Model", questions: Sequence[Question]) -> list[Any]:
    """Returns an answer, or an error, for each question."""
    try:
        return [*model.answer_batch(questions)]
    except Exception as error:
        if len(questions) == 1:
            return [error]
        return [found for one in questions for found in answer(model, [one])]


def _ones(model: "Model", length: int, count: int = 1) -> Question:
    """Returns a question about `count` clips of `length` frames."""
    clip = {
        name: {"features": np.ones((length, width), np.float32)}
        for name, width in model.widths.items()
    }
    return Question({str(number): clip for number in range(count)})


def check_finite(frames: Frames, place: str) -> None:
    """Raises Refused for what is no number, or not finite as float32."""
    for field, array in frames.items():
        if array.dtype.kind not in "fiu":
            raise unprocessable(f"{place}: {field} are no numbers")
        wide = array.dtype.itemsize > np.dtype(np.float32).itemsize
        if not (np.abs(array) <= LARGEST if wide else np.isfinite(array)).all():
            raise unprocessable(f"{place}: {field} hold a number that is not finite")


def count_bytes(clips: Mapping[str, Mapping[str, Frames]]) -> int:
    """Returns the bytes of the frames of clips, with all fields that a frame gets."""
    features = [frames["features"] for clip in clips.values() for frames in clip.values()]
    return sum(x.nbytes + FIELD_BYTES * len(x) for x in features)


def _joined(questions: Sequence[Question]) -> Mapping[str, Mapping[str, Frames]]:
    """Returns the clips of all questions; the names of several questions are made different."""
    if len(questions) == 1:  # an error names the clip as its question does
        return questions[0].clips
    return {
        f"{number}/{name}": clip
        for number, question in enumerate(questions)
        for name, clip in question.clips.items()
    }


def _slices(questions: Sequence[Question]) -> list[slice]:
    ends = np.cumsum([0, *(len(question.clips) for question in questions)]).tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


class GalleryModel:
    """The people of a gallery."""

    name = "gallery"

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        _ = self.widths  # restores its run, or says why it cannot

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> width."""
        return self.gallery.reads[0]

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The output tensors; `embedding` is as wide as all parts together."""
        width = sum(self.gallery.backend.widths.values())
        return (
            Spec("identity", "BYTES", (-1,)),
            Spec("identities", "BYTES", (-1, -1)),
            Spec("scores", "FP32", (-1, -1)),
            Spec("embedding", "FP32", (-1, width)),
        )

    def answer_batch(self, questions: Sequence[Question]) -> list[Identified]:
        """Returns who the clips of each question show."""
        found = self.gallery.embed(_joined(questions))
        vectors = np.concatenate(list(found.parts.values()), axis=1)
        rows = _slices(questions)
        answers: list[list[Answer]] = [[] for _ in questions]
        for k, fpir, threshold in {one[1:] for one in questions}:
            own = [n for n, one in enumerate(questions) if one[1:] == (k, fpir, threshold)]
            some = found.only({name for n in own for name in found.names[rows[n]]})
            named = self.gallery.identify(some, k, fpir=fpir, threshold=threshold)
            for n in own:
                answers[n] = [named[name] for name in found.names[rows[n]]]
        return [Identified(a, vectors[r]) for a, r in zip(answers, rows, strict=True)]

    def tensors(self, question: Question, answer: Identified) -> dict[str, np.ndarray]:
        """Returns identity [N], "" for unknown; identities and scores [N, K]; embedding [N, D].

        K is `k`, or the number of people if there are fewer; what a clip lacks is "" and -inf.
        """
        most = max((len(one.best) for one in answer.answers), default=0)
        shape = (len(answer.answers), min(question.k, most))
        names, scores = np.full(shape, "", object), np.full(shape, -np.inf, np.float32)
        for row, one in enumerate(answer.answers):
            for place, (name, probability) in enumerate(one.best):
                names[row, place] = name
                scores[row, place] = one.score if place == 0 else _log(probability)
        identity = np.array([one.identity or "" for one in answer.answers], object)
        return {
            "identity": identity,
            "identities": names,
            "scores": scores,
            "embedding": answer.vectors,
        }

    def warm(self) -> None:
        """Compiles the run's vectors for clips of every padded length, and compares one clip."""
        if not self.gallery.origin.cards:
            for length in PAD_LENGTHS:
                self.gallery.embed(_ones(self, length).clips)
        if self.gallery.index.names:
            self.answer_batch([_ones(self, 1)])


def _log(probability: float) -> np.float32:
    return np.float32(np.log(probability)) if probability > 0 else np.float32(-np.inf)


class RunModel:
    """The net of a run: scores of its classes, and embeddings.

    A clip is padded to the least of PAD_LENGTHS that its longest modality needs, in blocks of as
    many rows as `Predictor.scores` takes. So there are few programs, which `warm` compiles.
    """

    name = "run"

    def __init__(self, run: Predictor):
        self.run = run
        self._width = self.answer_batch([_ones(self, 1)])[0].vectors.shape[1]

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> width."""
        return dict(self.run.modalities)

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The output tensors."""
        return (
            Spec("scores", "FP32", (-1, len(self.run.identities))),
            Spec("identities", "BYTES", (-1, -1)),
            Spec("embedding", "FP32", (-1, self._width)),
        )

    def answer_batch(self, questions: Sequence[Question]) -> list[Scored]:
        """Returns the scores of each question's clips."""
        run, request = self.run, self.run.request(_joined(questions), None)
        data = request.data
        split = data.split(request.split)
        # Tables of members have a row for each name: as many as no other batch compiles for.
        rest = -len(split.clips) % TABLE
        names = [*split.clips, *(f"none/{number}" for number in range(rest))]
        scorer = ModelScorer(run.model_for(request), names, run.mesh)
        scores = np.full((len(request.names), len(run.identities)), -np.inf, np.float32)
        vectors: np.ndarray | None = None
        rows = request.block_size * run.mesh.size
        for host in padded_batches(data, request.split, tuple(run.modalities), rows):
            block = devices.shard_batch(run.mesh, host)
            (found,), (embedded,) = scorer.score([block]), run.embed_blocks([block])
            real = np.asarray(host.batch_mask)
            places = np.asarray(host.clip_index)[real]
            scores[places] = np.asarray(found)[real][:, : scores.shape[1]]
            norms = np.linalg.norm(embedded[real], axis=1, keepdims=True)
            if vectors is None:
                vectors = np.zeros((len(scores), embedded.shape[1]), np.float32)
            vectors[places] = embedded[real] / np.where(norms > 0, norms, 1.0)
        assert vectors is not None  # there is at least one clip
        scores, vectors = scores[request.clip_index], vectors[request.clip_index]
        return [Scored(scores[rows], vectors[rows]) for rows in _slices(questions)]

    def tensors(self, question: Question, answer: Scored) -> dict[str, np.ndarray]:
        """Returns scores [N, C], the best identities [N, K], "" for none, and embedding [N, D]."""
        k = min(question.k, answer.scores.shape[1])
        best = np.argsort(-answer.scores, axis=1, kind="stable")[:, :k]
        names = np.array(self.run.identities, object)[best]
        names[np.take_along_axis(answer.scores, best, axis=1) == -np.inf] = ""
        return {"scores": answer.scores, "identities": names, "embedding": answer.vectors}

    def warm(self) -> None:
        """Compiles the programs for both sizes of blocks, and every padded length."""
        for length in PAD_LENGTHS:
            self.answer_batch([_ones(self, length)])
            self.answer_batch([_ones(self, length, SMALL_REQUEST + 1)])


Model = GalleryModel | RunModel
