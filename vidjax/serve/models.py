"""What can be asked over the protocol: a gallery, and the net of a run.

A model answers a batch of questions at once, as it would answer each alone, to the bit. The clips
of one question are named apart from those of others; of an error, each question gets its own.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from vidjax import devices
from vidjax.data.clips import BUCKETS, MAX_EVAL_FRAMES, PAD_LENGTHS, EvalPlan, longest
from vidjax.data.untrusted.names import show
from vidjax.evaluation.scoring import ModelScorer, TrainedModel
from vidjax.gallery.answers import Answer, Rule
from vidjax.gallery.gallery import Gallery
from vidjax.predict import SMALL_REQUEST, Predictor
from vidjax.serve.limits import Limits, unprocessable
from vidjax.serve.protocol import Spec

DEFAULT_K = 5
MOST_K = 1000
TABLE = 512  # clips, more than one batch has
PARAMETERS = ("binary_data_output", "fpir", "threshold", "k")
Frames = Mapping[str, np.ndarray]  # field -> [T, ...]


class Question(NamedTuple):
    """Clips, each modality -> frames, and what is asked about them.

    `fpir` and `threshold` are as in `Gallery.identify`, and mean nothing to a run. `k` is the
    number of identities of each clip, at most.
    """

    clips: Sequence[Mapping[str, Frames]]
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


class Model(Protocol):
    """What the protocol serves: a name, the widths of its modalities, and its outputs."""

    name: str

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> width."""
        ...

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The outputs."""
        ...

    def answer(self, questions: Sequence[Question]) -> list[Any]:
        """Returns an answer, or an error, for each question."""
        ...

    def tensors(self, question: Question, answer: Any) -> dict[str, np.ndarray]:  # noqa: ANN401
        """Returns an answer as the model's outputs."""
        ...

    def warm(self) -> None:
        """Compiles all that a question may need."""
        ...


def inputs_of(widths: Mapping[str, int]) -> list[Spec]:
    """Returns the input tensors for modalities of these widths: features, quality and mask."""
    found = []
    for name, width in widths.items():
        found.append(Spec(name, "FP32", (-1, -1, width)))
        found.append(Spec(f"{name}_quality", "FP32", (-1, -1)))
        found.append(Spec(f"{name}_mask", "BOOL", (-1, -1)))
    return found


def question_of(
    tensors: Mapping[str, np.ndarray],
    widths: Mapping[str, int],
    parameters: Mapping[str, object],
    limits: Limits,
) -> Question:
    """Returns the question that tensors ask, see `inputs_of`; Refused names a wrong one.

    Frames that the mask leaves out are not looked at; all others must be finite.
    """
    if unknown := [name for name in parameters if name not in PARAMETERS and name != "timeout"]:
        raise unprocessable(
            f"no parameter '{show(unknown[0])}': choose from {', '.join(PARAMETERS)}"
        )
    present = [name for name in widths if name in tensors]
    if not present:
        raise unprocessable(f"no features: wanted one of {', '.join(widths)}")
    count = len(tensors[present[0]])
    if not 0 < count <= limits.clips:
        raise unprocessable(f"{count} clips: a request has 1 to {limits.clips}")
    clips: list[dict[str, Frames]] = [{} for _ in range(count)]
    for name in widths:
        extra = [key for key in (f"{name}_quality", f"{name}_mask") if key in tensors]
        if name not in tensors:
            if extra:
                raise unprocessable(f"input '{extra[0]}' without '{name}'")
            continue
        features = tensors[name]
        if len(features) != count:
            raise unprocessable(f"input '{name}' has {len(features)} clips, others {count}")
        for key in extra:
            if tensors[key].shape != features.shape[:2]:
                raise unprocessable(f"input '{key}': wanted shape {list(features.shape[:2])}")
        quality, mask = tensors.get(f"{name}_quality"), tensors.get(f"{name}_mask")
        for row, clip in enumerate(clips):
            frames = {"features": features[row]}
            if quality is not None:
                frames["quality"] = quality[row]
            if mask is not None:
                frames = {field: x[mask[row]] for field, x in frames.items()}
            check_finite(frames, name)
            if len(frames["features"]):
                clip[name] = frames
    k = parameters.get("k", DEFAULT_K)
    return ask(clips, k, parameters.get("fpir"), parameters.get("threshold"))


def ask(
    clips: Sequence[Mapping[str, Frames]], k: object, fpir: object, threshold: object
) -> Question:
    """Returns a question; Refused for a `k`, `fpir` or `threshold` that no gallery takes."""
    if isinstance(k, bool) or not isinstance(k, int | float) or k != k // 1 or not 1 <= k <= MOST_K:
        raise unprocessable(f"k: wanted a number from 1 to {MOST_K}")
    for name, value in (("fpir", fpir), ("threshold", threshold)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise unprocessable(f"{name}: wanted a number")
    as_numbers = [None if value is None else float(value) for value in (fpir, threshold)]  # pyright: ignore
    return Question(clips, int(k), *as_numbers)


def check_finite(frames: Frames, place: str) -> None:
    """Raises Refused for a number that is not finite."""
    for field, array in frames.items():
        if not np.isfinite(array).all():
            raise unprocessable(f"{place}: {field} hold a NaN, or a number that is not finite")


def each_alone(
    answer: Callable[[Sequence[Question]], list[Any]], questions: Sequence[Question]
) -> list[Any]:
    """Returns the answers to a batch; if it fails, those of each question, or its own error."""
    try:
        return answer(questions)
    except Exception:
        found: list[Any] = []
        for question in questions:
            try:
                found += answer([question])
            except Exception as error:
                found.append(error)
        return found


def _joined(
    questions: Sequence[Question], widths: Mapping[str, int]
) -> dict[str, Mapping[str, Frames]]:
    """Returns the clips of all questions under names that no other clip has.

    If all lack a modality, a last clip has it: without one, its dtype would be another, for which
    a run has no program yet.
    """
    clips = [clip for question in questions for clip in question.clips]
    if any(all(name not in clip for clip in clips) for name in widths):
        clips.append(_ones(widths, 1))
    return {f"request/{number}": clip for number, clip in enumerate(clips)}


def _slices(questions: Sequence[Question]) -> list[slice]:
    ends = np.cumsum([0, *(len(question.clips) for question in questions)]).tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


class GalleryModel:
    """The people of a gallery."""

    name = "gallery"

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        inputs_of(self.widths)  # restores its run, or says why it cannot

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> width, at the last look: `Gallery.widen` adds some."""
        return self.gallery.reads[0]

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The outputs; `embedding` is as wide as all parts together."""
        width = sum(self.gallery.backend.widths.values())
        return (
            Spec("identity", "BYTES", (-1,)),
            Spec("identities", "BYTES", (-1, -1)),
            Spec("scores", "FP32", (-1, -1)),
            Spec("embedding", "FP32", (-1, width)),
        )

    def answer(self, questions: Sequence[Question]) -> list[Identified | Exception]:
        """Returns who the clips of each question show."""
        return each_alone(self._answer, questions)

    def _answer(self, questions: Sequence[Question]) -> list[Identified]:
        found = self.gallery.embed(_joined(questions, self.widths))
        parts = list(found.parts.values())
        vectors = np.concatenate(parts, axis=1)
        rows = _slices(questions)
        answers: list[list[Answer]] = [[] for _ in questions]
        kinds = {(one.k, one.fpir, one.threshold) for one in questions}
        for k, fpir, threshold in kinds:
            own = [n for n, one in enumerate(questions) if one[1:] == (k, fpir, threshold)]
            chosen_rule = fpir is not None or threshold is not None
            rule = self.gallery.rule(fpir=fpir, threshold=threshold) if chosen_rule else None
            chosen = np.concatenate([np.arange(rows[n].start, rows[n].stop) for n in own])
            some = self.gallery.answers([x[chosen] for x in parts], k, rule)
            for n in own:
                answers[n] = [next(some) for _ in questions[n].clips]
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

    def rule(self, fpir: float | None, threshold: float | None) -> Rule:
        """Returns when a clip gets a name, as `Gallery.rule`."""
        return self.gallery.rule(fpir=fpir, threshold=threshold)

    def warm(self) -> None:
        """Compiles the run's vectors for clips of every padded length, and compares one clip."""
        if not self.gallery.origin.cards:
            for length in PAD_LENGTHS:
                self.gallery.embed({"warm": _ones(self.widths, length)})
        if self.gallery.index.names:
            self.answer([Question([_ones(self.widths, 1)])])


def _log(probability: float) -> np.float32:
    return np.float32(np.log(probability)) if probability > 0 else np.float32(-np.inf)


def _ones(widths: Mapping[str, int], length: int) -> dict[str, Frames]:
    return {
        name: {"features": np.ones((length, width), np.float32)} for name, width in widths.items()
    }


class RunModel:
    """The net of a run: scores of its classes, and embeddings.

    A clip is padded to the least of PAD_LENGTHS that its longest modality needs, in blocks of as
    many rows as `Predictor.scores` takes: 4, or for larger questions `config.eval.block_size`. So
    there are few programs, which `warm` compiles.
    """

    name = "run"

    def __init__(self, run: Predictor):
        self.run = run
        self.widths = dict(run.modalities)
        self.outputs: tuple[Spec, ...] = (
            Spec("scores", "FP32", (-1, len(run.identities))),
            Spec("identities", "BYTES", (-1, -1)),
            Spec("embedding", "FP32", (-1, self._answer([self._blank(1)])[0].vectors.shape[1])),
        )

    def _blank(self, length: int, count: int = 1) -> Question:
        return Question([_ones(self.widths, length)] * count)

    def answer(self, questions: Sequence[Question]) -> list[Scored | Exception]:
        """Returns the scores of each question's clips."""
        found: list[Any] = [None] * len(questions)
        for small in (True, False):
            own = [n for n, q in enumerate(questions) if (len(q.clips) <= SMALL_REQUEST) == small]
            if own:
                answers = each_alone(self._answer, [questions[n] for n in own])
                for n, answer in zip(own, answers, strict=True):
                    found[n] = answer
        return found

    def _answer(self, questions: Sequence[Question]) -> list[Scored]:
        """Scores questions that are all small, or all larger."""
        request = self.run.request(_joined(questions, self.widths), None)
        size = int(self.run.config.eval.block_size)
        if len(questions[0].clips) <= SMALL_REQUEST:
            size = min(size, SMALL_REQUEST)
        data, run = request.data, self.run
        model = TrainedModel(
            str(run.workdir), run.system, run.score_fn, run.params, run.model_state,
            run.training_sets, data,
        )  # fmt: skip
        split = data.split(request.split)
        # Tables of members have a row for each name: as many as no other batch compiles for.
        rest = -len(split.clips) % TABLE
        names = [*split.clips, *(f"none/{number}" for number in range(rest))]
        scorer = ModelScorer(model, names, run.mesh)
        scores = np.full((len(request.names), len(run.identities)), -np.inf, np.float32)
        vectors: np.ndarray | None = None
        modalities = tuple(run.modalities)
        pad = np.searchsorted(PAD_LENGTHS, np.minimum(longest(split, modalities), MAX_EVAL_FRAMES))
        for number in np.unique(pad).tolist():
            bucket = np.where(pad == number, 0, -1)
            padded = dict.fromkeys(modalities, (PAD_LENGTHS[number],) * len(BUCKETS))
            plan = EvalPlan(request.split, modalities, bucket, padded)
            for host in data.eval_batches(plan, rows=size * run.mesh.size):
                block = devices.shard_block(run.mesh, host)
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
            self._answer([self._blank(length)])
            self._answer([self._blank(length, SMALL_REQUEST + 1)])
