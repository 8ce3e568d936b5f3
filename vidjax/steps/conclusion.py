"""The ranking of a split and its metrics, of what was collected while its clips were scored.

Nothing here needs the weights of a model, or a feature: what several processes have collected of
parts of a split can be joined (`steps.parts`) and concluded by another one.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from vidjax import ensemble, metrics
from vidjax.data.clips import Split
from vidjax.errors import UserError
from vidjax.steps import topk
from vidjax.steps.model_scorer import ModelScorer
from vidjax.steps.poor_clips import PoorClips
from vidjax.steps.sinks import ClipScores, map_of, positives_in
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
