"""Evaluation: scores of every clip of a split by trained models, and the metrics of the ranking.

`collect` scores clips and keeps what a ranking needs, `conclude` makes the ranking of it, and
`score` does both. In between, what several processes have collected can be joined (`steps.parts`).
"""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, metrics
from vidjax.batch import Array, Batch
from vidjax.data.clips import Split
from vidjax.errors import UserError
from vidjax.evaluation.model_scorer import (
    WINDOW_ROWS,
    ClipScoreBuffer,
    ClipScores,
    ModelScorer,
    TopKMetric,
    TrainedModel,
    map_of,
    positives_in,
    windows,
)
from vidjax.evaluation.pooling import blend
from vidjax.evaluation.poor_clips import PoorClips
from vidjax.run.terminal import Progress
from vidjax.steps import topk
from vidjax.system import System


class Judge(NamedTuple):
    """A model that scores the clips of a split, without its weights.

    Attributes:
      name: name of the run.
      weight: weight of the model in a blend.
      system: the system.
      training_sets: the clips that each member was trained on.
      use: [E, N] bool, True for members that score a clip.
      in_sample: True if members score clips that they were trained on.
    """

    name: str
    weight: float
    system: System
    training_sets: ensemble.TrainingSets
    use: np.ndarray
    in_sample: bool

    @classmethod
    def make(
        cls,
        name: str,
        system: System,
        training_sets: ensemble.TrainingSets,
        clips: Sequence[str],
    ) -> Self:
        """Returns the judge of [N] clips that a run is by itself."""
        use, in_sample = ensemble.scoring_members(training_sets, clips)
        return cls(name, 1.0, system, training_sets, use, in_sample)

    @classmethod
    def of(cls, scorer: ModelScorer) -> Self:
        """Returns the judge that a scorer of all clips of a split is."""
        model = scorer.model
        return cls(
            model.name,
            model.weight,
            model.system,
            model.training_sets,
            scorer.use,
            scorer.in_sample,
        )


def pool_of(judges: Sequence[Judge], split_name: str) -> np.ndarray:
    """Returns [N] bool, the clips of a split that are ranked: some member of every model may score.

    Raises:
      ValueError: no clip can be scored.
    """
    pool = np.all([judge.use.any(axis=0) for judge in judges], axis=0)
    if not pool.any():
        raise UserError(
            f"config.eval.split={split_name}: all members were trained on all of its clips\n"
            "choose another split with --config.eval.split"
        )
    return pool


class Collected(NamedTuple):
    """What was collected while clips were scored, of M models.

    Attributes:
      top: the best 100 clips of every identity, sorted.
      model_tops: [M], the same by every single model of a blend; [] for one model.
      member_tops: [M], the same by every single member of each model; a model may have none.
      clips: the best score of every clip; NaN where any of its scores is.
      poor: [M], the poor clips of each model, and its clips with the modality that decides.
      seconds: time that scoring took, without compilation.
    """

    top: topk.TopK
    model_tops: list[topk.TopK]
    member_tops: Sequence[Iterable[topk.TopK]]
    clips: ClipScores
    poor: list[tuple[int, int]]
    seconds: float


class Evaluation(NamedTuple):
    """The ranking of one split and its metrics.

    Attributes:
      top: the best 100 clips of every identity, sorted.
      model_tops: the best 100 clips by every single model of a blend; [] for one model.
      positives: [C] int, number of ground-truth clips per identity among the ranked clips.
      clips: the best score of every clip.
      results: `map`, `map_kind` and the metrics of `metrics.CLIP_METRICS` if the split has a ground
        truth; counts; `eval_clips_per_second`; and the MAP of single models and members.
    """

    top: topk.TopK
    model_tops: list[topk.TopK]
    positives: np.ndarray
    clips: ClipScores
    results: dict[str, Any]


def conclude(collected: Collected, split: Split, judges: Sequence[Judge]) -> Evaluation:
    """Returns the ranking of a split and its metrics; warns of clips that are poor or score NaN.

    Args:
      collected: what was collected of all clips of the split.
      split: the clips.
      judges: the models that scored them.

    Raises:
      ValueError: all scores are NaN.
    """
    top, pool = collected.top, collected.clips.pool
    for judge, counts in zip(judges, collected.poor, strict=True):
        PoorClips(judge.system, counts).warn(split.name)
    scores, num_nan = _without_nan(split, collected.clips)
    results = _summarise(split, scores, map_of(top, split, pool), judges) | num_nan
    results["num_ties"] = topk.count_ties(top)
    results["eval_clips_per_second"] = len(split.clips) / max(collected.seconds, 1e-9)
    _summarise_models(collected, split, judges, results)
    return Evaluation(top, collected.model_tops, positives_in(split, pool), scores, results)


def _without_nan(split: Split, clips: ClipScores) -> tuple[ClipScores, dict[str, int]]:
    """Ranks clips with a NaN among their scores last, and counts them.

    Args:
      split: the clips.
      clips: their best scores; a NaN where any score is one.

    Returns:
      The scores with -inf for NaN, and `num_nan_clips` for `results` where there are any.

    Raises:
      ValueError: All scores are NaN.
    """
    nan = np.isnan(clips.best) & clips.pool
    if not nan.any():
        return clips, {}
    count, total = int(nan.sum()), int(clips.pool.sum())
    first = [split.clips[clip] for clip in np.flatnonzero(nan)[:3]]
    message = (
        f"{count} of {total} clips of {split.name} have scores of NaN, such as {', '.join(first)}\n"
        "their features, or those of the training clips, are too large for float32: divide them by "
        "a constant"
    )
    if count == total:
        raise UserError(message)
    warnings.warn(f"{message}; they are ranked last", stacklevel=3)
    best = np.where(nan, np.float32(-np.inf), clips.best)
    return clips._replace(best=best, right=clips.right & ~nan), {"num_nan_clips": count}


def _summarise(
    split: Split, clips: ClipScores, value: float | None, judges: Sequence[Judge]
) -> dict[str, Any]:
    """Returns the metrics of the whole ranking; `value` is its MAP, None without ground truth."""
    results: dict[str, Any] = {}
    if value is not None:
        results["map"] = value
        results["map_kind"] = _map_kind(split.name, judges)
        for name, metric in metrics.CLIP_METRICS.items():
            results[name] = metric.fn(clips, split.labels)
    num_distractors = int(np.sum(split.labels[clips.pool] == 0)) if split.labelled else None
    return results | {
        "num_clips": int(np.sum(clips.pool)),
        "num_identities": len(split.positives),
        "num_distractors": num_distractors,
    }


def _map_kind(split_name: str, judges: Sequence[Judge]) -> str:
    """Returns the kind of clips that MAP is computed on.

    It is `in_sample` if a model scores clips it was trained on, the name of the split if all
    members score all clips, and `out_of_fold` otherwise.
    """
    if any(judge.in_sample for judge in judges):
        return "in_sample"
    return split_name if all(judge.use.all() for judge in judges) else "out_of_fold"


def _summarise_models(
    collected: Collected, split: Split, judges: Sequence[Judge], results: dict[str, Any]
) -> None:
    """Adds the MAP of single models and members to `results`."""
    pool = collected.clips.pool
    for number, (judge, member_tops) in enumerate(zip(judges, collected.member_tops, strict=True)):
        run: dict[str, Any] = {}
        if collected.model_tops:
            value = map_of(collected.model_tops[number], split, pool)
            row = {"name": judge.name, "weight": judge.weight, "map": value}
            results.setdefault("runs", []).append(row)
            run = {"run": judge.name}
        members = judge.training_sets.members
        for member, used, top in zip(members, judge.use, member_tops, strict=False):
            row = {**run, **_describe(member), "map": map_of(top, split, used & pool)}
            results.setdefault("members", []).append(row)


def _describe(member: ensemble.Member) -> dict[str, Any]:
    """Returns the number of a member, and its fields that differ from their defaults."""
    defaults = ensemble.Member._field_defaults
    fields = member._asdict()
    number = fields.pop("number")
    changed = {name: value for name, value in fields.items() if value != defaults[name]}
    return {"member": number, **changed}


class ScoreObserver(Protocol):
    """A function that gets all scores of an evaluation, one window at a time."""

    def __call__(self, blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        """Observes one window.

        Args:
          blocks: blocks of clips from the data of the first model, on the devices.
          scores: for each model the scores [B, C] of every block.
        """
        ...


def score(
    models: Sequence[TrainedModel],
    split_name: str,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool = True,
    check: Callable[[], None] = lambda: None,
    observe: ScoreObserver | None = None,
    logarithms: bool = False,
) -> Evaluation:
    """Ranks all clips of a split by the scores of one model, or by a blend of several.

    Every clip is read once. `ModelScorer` selects the members that score it. Clips that no member
    may score are not ranked.

    Args:
      models: one model, or several whose scores are logarithms, on the same clips.
      split_name: the split.
      mesh: the devices.
      block_size: number of clips that a device scores at a time.
      each_member: True to also rank by every single member of an ensemble.
      check: function to call after every window; its exceptions end the evaluation.
      observe: function to call with the scores of every window; None for none.
      logarithms: True to join several models by the mean of their logarithms.

    Raises:
      ValueError: The models differ in clips or identities, or no clip can be scored.
    """
    check_block_size(block_size)
    for other in models[1:]:
        _check_same_clips(models[0], other, split_name)
    split = models[0].data.split(split_name)
    scorers = [ModelScorer(model, split.clips, mesh) for model in models]
    judges = [Judge.of(scorer) for scorer in scorers]
    pool_of(judges, split_name)  # before anything is scored
    collected = collect(
        scorers,
        split,
        mesh,
        block_size=block_size,
        each_member=each_member,
        check=check,
        observe=observe,
        logarithms=logarithms,
    )
    return conclude(collected, split, judges)


def check_block_size(block_size: int) -> None:
    """Raises ValueError if a block would hold no clip."""
    if block_size < 1:
        raise UserError(f"config.eval.block_size={block_size}: must be 1 or more")


def collect(
    scorers: Sequence[ModelScorer],
    split: Split,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool,
    check: Callable[[], None] = lambda: None,
    observe: ScoreObserver | None = None,
    logarithms: bool = False,
) -> Collected:
    """Scores all clips of a split, and keeps what a ranking of them needs.

    Args:
      scorers: one for each model, of all clips of the split.
      split: the clips, which may be those of a part; none of them needs to be ranked.
      mesh: the devices.
      block_size, each_member, check, observe, logarithms: as `score` takes them.
    """
    models = [scorer.model for scorer in scorers]
    pool = np.all([scorer.use.any(axis=0) for scorer in scorers], axis=0)
    rankers = [
        _ModelRanker(scorer, split, pool, by_itself=len(scorers) > 1, each_member=each_member)
        for scorer in scorers
    ]
    columns, single = scorers[0].columns, len(scorers) == scorers[0].num_members == 1
    ranking = TopKMetric(pool, columns)
    clips = ClipScoreBuffer(split, pool, columns)
    voices = [(model.weight, model.knows_strangers) for model in models]
    # A window is one block if there is only one member.
    rows = 1 if single else min(WINDOW_ROWS, columns.most_waiting)
    block_size = min(block_size, columns.most_rows)

    began = time.monotonic()
    with devices.CompileClock() as compiling:
        progress = Progress(len(split.clips), unit="clip", label="evaluate", leave=False)
        for window in windows(models, split.name, block_size, mesh, rows):
            blocks = window[0]
            scores = [
                ranker.score(model_blocks)
                for ranker, model_blocks in zip(rankers, window, strict=True)
            ]
            if observe:
                observe(blocks, scores)
            for block, block_scores in zip(
                blocks, blend(scores, voices, logarithms=logarithms), strict=True
            ):
                for sink in (ranking, clips):
                    sink.add(block_scores, block)
            clips.flush(keep=len(blocks))  # a window behind, so that the devices never wait
            progress.advance(sum(int(np.sum(devices.fetch(block.batch_mask))) for block in blocks))
            check()
        progress.close()
        top = ranking.finish()
    seconds = time.monotonic() - began - compiling.seconds
    clips.flush()
    return Collected(
        top,
        [ranker.metric.finish() for ranker in rankers if ranker.metric],
        [[member.finish() for member in ranker.members] for ranker in rankers],
        clips.clips,
        [ranker.poor.counts() for ranker in rankers],
        seconds,
    )


class _ModelRanker:
    """A model with the metrics of its own ranking and of the rankings of its members.

    Attributes:
      scorer: scorer of the model.
      metric: metric of the model alone; None if it is the only model.
      members: one metric per member; [] for a single member, or if `each_member` is False.
      poor: counter of the poor clips.
    """

    def __init__(
        self,
        scorer: ModelScorer,
        split: Split,
        pool: np.ndarray,
        *,
        by_itself: bool,
        each_member: bool,
    ):
        self.scorer = scorer
        self.metric = TopKMetric(pool, scorer.columns) if by_itself else None
        self.poor = PoorClips(scorer.model.system)
        self.members: list[TopKMetric] = []
        if each_member and scorer.num_members > 1:
            self.members = [TopKMetric(used & pool, scorer.columns) for used in scorer.use]

    def score(self, blocks: Sequence[Batch]) -> list[Array]:
        """Returns the scores [B, C] of every block, and adds them to the metrics."""
        self.poor.add(blocks)
        scores = self.scorer.score(blocks, member_metrics=self.members)
        if self.metric:
            for block, block_scores in zip(blocks, scores, strict=True):
                self.metric.add(block_scores, block)
            self.metric.flush()
        return scores


def _check_same_clips(first: TrainedModel, other: TrainedModel, split_name: str) -> None:
    """Raises ValueError if two models cannot be blended."""
    clips, other_clips = (model.data.split(split_name).clips for model in (first, other))
    if clips != other_clips:
        examples = sorted({*clips} ^ {*other_clips})[:3]
        raise UserError(
            f"--runs: {first.name} and {other.name} have different clips in {split_name}\n"
            f"such as {', '.join(examples)}"
        )
    if tuple(first.data.identities) != tuple(other.data.identities):
        raise UserError(
            f"--runs: {first.name} and {other.name} were trained on different lists of identities\n"
            "blend runs that were trained on the same ground truth"
        )
    for model in (first, other):
        if not model.system.logs:
            raise UserError(
                f"--runs: {model.name} ranks by raw logits, which cannot be blended with others\n"
                "use --config.eval.scores=log_softmax"
            )
