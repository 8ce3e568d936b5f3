"""What people reach whom PLDA was fitted without: the entry `newcomers` of the analysis."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidjax import devices, ensemble, metrics
from vidjax.batch import Array, Frames
from vidjax.config import Config
from vidjax.data.clips import Split
from vidjax.models.plda import PLDAIdentifier, unit_mean
from vidjax.modes import open_set
from vidjax.modes.strata import FEWEST_IDENTITIES, hits, ranked_columns
from vidjax.report.significance import bootstrap
from vidjax.steps import examples
from vidjax.steps import newcomers as newcomers_lib
from vidjax.steps.conclusion import Evaluation
from vidjax.steps.model_scorer import TrainedModel
from vidjax.steps.newcomers import Clips, Scores
from vidjax.steps.training_clips import values_of_split
from vidjax.system import System, log_softmax

MOST_CLIPS = 15_000  # training and ranked clips together, which are read once more
SEED = 0  # of the people that are drawn, and of the order in which their clips enrol them


class _Arm(NamedTuple):
    """What newcomers reach, enrolled in one way.

    Attributes:
      ap: [n] float64, average precision of each newcomer.
      best: [Q] float64, the highest score of each clip of newcomers and of each distractor.
      right: [Q] bool, True if that score is the clip's own identity's.
    """

    ap: np.ndarray
    best: np.ndarray
    right: np.ndarray


def newcomers(
    model: TrainedModel, evaluation: Evaluation, split_name: str, trained: Config, rows: int
) -> dict[str, Any] | None:
    """Leaves some people out of the fit of a PLDA run, enrols them with few clips, and ranks.

    Args:
      model: the trained model. Every clip is scored by the member that was not trained on it.
      evaluation: the result of `scoring.score`, which shows what the run itself reaches.
      split_name: the split that was ranked.
      trained: the group `data` of the configuration that the run was trained with.
      rows: clips of a block that is read.

    Returns:
      The entry that `run.results` describes, or `reason` for which there is none. None for a run of
      another model: the weights of a net know the people that would be left out.
    """
    plda = model.system.model
    if type(plda) is not PLDAIdentifier:  # NPLDA learns weights
        return None
    if evaluation.results.get("map") is None:
        return {"reason": "labels"}
    split = model.data.split(split_name)
    use = ensemble.held_out(model.training_sets, split.clips)
    if not _is_plain(model.system) or not _is_one_each(model, use[:, evaluation.clips.pool]):
        return {"reason": "run"}
    splits = _training_splits(model, trained.train_splits)
    if splits is None:
        return {"reason": "data"}
    num_clips = len(model.training_sets.clips) + len(split.clips)
    if num_clips > MOST_CLIPS:
        return {"reason": "clips", "num_clips": num_clips, "most_clips": MOST_CLIPS}
    read = _reader(model, plda, rows)
    train = read(*splits)
    counted = model.training_sets.trained & train.usable
    if trained.distractors == "leave_out":
        counted = counted & (train.labels > 0)
    if not _agrees(model, train, counted):
        return {"reason": "run"}
    labels = train.labels[counted.any(axis=0)]
    people = newcomers_lib.draw(labels, evaluation.positives > 0, SEED)
    if not len(people):
        return {"reason": "people"}
    clips = read(split)
    enrolled, num_enrolled = _enrolled(plda, train, counted, clips, use, people)
    return _entry(evaluation, clips.labels, people, enrolled, num_enrolled)


def _is_plain(system: System) -> bool:
    """Returns whether a clip is scored as `steps.newcomers` scores it."""
    return (
        system.score_fn is log_softmax
        and not system.examples
        and not system.top_classes
        and len(system.class_mask) == 1 + system.num_identities
    )


def _is_one_each(model: TrainedModel, use: np.ndarray) -> bool:
    """Returns whether one member scores each of the ranked clips, use being [E, n] bool.

    No member may see a part of the features or of the frames alone.
    """
    whole = [
        member._replace(number=0, fold=-1, bootstrap=-1) == ensemble.Member()
        for member in model.training_sets.members
    ]
    return all(whole) and bool(np.all(use.sum(axis=0) == 1))


def _training_splits(model: TrainedModel, names: Sequence[str]) -> list[Split] | None:
    """Returns the splits that a model was trained on; None where the data is not theirs."""
    try:
        splits = [model.data.split(name) for name in names]
    except ValueError:
        return None
    clips = tuple(clip for split in splits for clip in split.clips)
    return splits if clips == model.training_sets.clips else None


def _reader(model: TrainedModel, plda: PLDAIdentifier, rows: int) -> Callable[..., Clips]:
    """Returns a function that reads the vectors of all clips of some splits, one after another."""
    system = model.system

    # Modality by modality: those with the same lengths are compiled once.
    @functools.partial(jax.jit, static_argnames="name")
    def vector(frames: Frames, name: str) -> Array:
        fuse_fns = {name: system.fuse_eval[name]}
        fused = examples.fuse(system, fuse_fns, None, {name: frames}, jnp.int32(-1))
        return unit_mean(fused[name])

    def vectors(frames: Mapping[str, Frames]) -> Array:
        parts = [vector(frames[name], name=name) for name in model.modalities]
        return np.concatenate(devices.fetch(parts), axis=1)

    def read(*splits: Split) -> Clips:
        every = [np.ones(len(split.clips), bool) for split in splits]
        found = [
            values_of_split(model.data, split.name, model.modalities, vectors, wanted, rows=rows)
            for split, wanted in zip(splits, every, strict=True)
        ]
        widths = [plda.modalities[name] for name in model.modalities]
        parts = np.split(np.concatenate(found), np.cumsum(widths)[:-1].tolist(), axis=1)
        return Clips(parts, np.concatenate([split.labels for split in splits]))

    return read


def _agrees(model: TrainedModel, train: Clips, counted: np.ndarray) -> bool:
    """Returns whether the members added up these clips, counted being [E, N] bool.

    A file of weights, for example, may leave clips out.
    """
    for name, x in zip(model.modalities, train.vectors, strict=True):
        own = devices.fetch(model.model_state["solved"][name]["count"])
        present = np.any(x != 0, axis=1) & (train.labels > 0)
        for row, chosen in zip(own, counted & present, strict=True):
            if not np.array_equal(row, np.bincount(train.labels[chosen], minlength=len(row))):
                return False
    return True


def _enrolled(
    plda: PLDAIdentifier,
    train: Clips,
    counted: np.ndarray,
    clips: Clips,
    use: np.ndarray,
    people: np.ndarray,
) -> tuple[list[Scores], list[float]]:
    """Scores clips with newcomers enrolled by the first clips of each, in every number of SHOTS.

    Args:
      plda: the model.
      train: N training clips.
      counted: [E, N] bool, those that a member was trained on.
      clips: Q clips to score.
      use: [E, Q] bool, the member that scores a clip.
      people: [n] int, the newcomers.

    Returns:
      For each number of clips the scores, -inf for clips that no member scores; and the mean number
      of clips that a newcomer has.
    """
    size = len(clips.labels)
    found = [
        Scores(np.full((size, len(people)), -np.inf), np.full(size, -np.inf), np.zeros(size, bool))
        for _ in newcomers_lib.SHOTS
    ]
    num_enrolled = np.zeros(len(newcomers_lib.SHOTS))
    for chosen, mine in zip(counted, use, strict=True):
        own = train.take(chosen)
        is_new = np.isin(own.labels, people)
        parts = newcomers_lib.fit(own.take(~is_new), plda.num_classes, plda.settings)
        new = own.take(is_new)
        turn = newcomers_lib.turns(new, SEED)
        enrolments = [
            newcomers_lib.enrol(parts, new.take(turn < shots)) for shots in newcomers_lib.SHOTS
        ]
        num_enrolled += [np.sum(turn < shots) for shots in newcomers_lib.SHOTS]
        some = newcomers_lib.score(enrolments, plda.settings, clips.take(mine), people)
        for whole, part in zip(found, some, strict=True):
            for to, values in zip(whole, part, strict=True):
                to[mine] = values
    return found, (num_enrolled / (len(counted) * len(people))).tolist()


def _entry(
    evaluation: Evaluation,
    labels: np.ndarray,
    people: np.ndarray,
    enrolled: Sequence[Scores],
    num_enrolled: Sequence[float],
) -> dict[str, Any]:
    """Returns the entry of the analysis, from the scores of all clips, labels being [Q]."""
    pool, positives = evaluation.clips.pool, evaluation.positives[people - 1]
    known = np.isin(labels, people)
    chosen = pool & (known | (labels == 0))
    columns = ranked_columns(evaluation.top, labels)
    length = columns.shape[1]
    arms = [
        _Arm(
            metrics.average_precision(
                labels[newcomers_lib.lists(one.of, pool, length)] == people[:, None], positives
            ),
            one.best[chosen],
            one.right[chosen],
        )
        for one in enrolled
    ]
    arms.append(
        _Arm(
            metrics.average_precision(hits(columns)[people - 1], positives),
            evaluation.clips.best[chosen].astype(np.float64),
            evaluation.clips.right[chosen],
        )
    )
    of_clips = labels[chosen]
    maps = _maps(np.stack([arm.ap for arm in arms]))
    rates = [rate for rate in open_set.RATES if np.sum(of_clips == 0) >= open_set.fewest(rate)]
    fnirs = [_fnirs(arms, of_clips, rate) for rate in rates]
    rows: list[dict[str, Any]] = [
        {
            "map": of_map,
            "fnir": [{"rate": rate, **one} for rate, one in zip(rates, row, strict=True)],
        }
        for of_map, *row in zip(maps, *fnirs, strict=True)
    ]
    for row, shots, mean in zip(rows, newcomers_lib.SHOTS, num_enrolled, strict=False):
        row |= {"shots": shots, "clips": mean}
    return {
        "num_newcomers": len(people),
        "num_identities": len(evaluation.positives),
        "num_known": int(np.sum(of_clips > 0)),
        "num_strange": int(np.sum(of_clips == 0)),
        "resamples": open_set.RESAMPLES,
        "fewest_identities": FEWEST_IDENTITIES,
        "rows": rows[:-1],
        "trained": rows[-1],
    }


def _maps(averages: np.ndarray) -> list[dict[str, Any]]:
    """Returns MAP of each arm and how far it is from that of the last, given [A, n] averages."""
    num_arms, num = averages.shape
    bounds = None
    if num >= FEWEST_IDENTITIES:
        both = np.concatenate([averages, averages - averages[-1]])
        low, high, _ = bootstrap(both, resamples=open_set.RESAMPLES)
        least = np.repeat([0.0, -1.0], num_arms)
        bounds = np.maximum(low, least), np.minimum(high, 1.0)
    return _measures(averages.mean(axis=1), bounds)


def _fnirs(arms: Sequence[_Arm], labels: np.ndarray, rate: float) -> list[dict[str, Any]]:
    """Returns FNIR of each arm at a rate of FPIR and how far it is from that of the last.

    Args:
      arms: the arms.
      labels: [Q] int, class columns of their clips.
      rate: the limit of FPIR.
    """
    known = labels > 0
    best, right = (np.stack(x) for x in zip(*((arm.best, arm.right) for arm in arms), strict=True))
    values = []
    for arm in arms:
        errors = metrics.identification_errors(arm.best, arm.right, known, fpir=rate)
        assert errors is not None  # there are distractors, and clips of newcomers
        values.append(errors.fnir)
    bounds = None
    if len(np.unique(labels[known])) >= FEWEST_IDENTITIES:
        drawn = open_set.resampled_fnir(
            best[:, ~known], best[:, known], right[:, known], labels[known], rate
        )
        bounds = open_set.interval(np.concatenate([drawn, drawn - drawn[-1]]))
    return _measures(np.array(values), bounds)


def _measures(
    values: np.ndarray, bounds: tuple[np.ndarray, np.ndarray] | None
) -> list[dict[str, Any]]:
    """Returns {value, low, high, gap, gap_low, gap_high: float} of each arm.

    Args:
      values: [A] float.
      bounds: [2 A] float, bounds of the values and of their gaps to the last one; None for none.
    """
    rows: list[dict[str, Any]] = [
        {"value": float(value), "gap": float(value - values[-1])} for value in values
    ]
    for number, row in enumerate(rows if bounds else ()):
        for name, at in (("", number), ("gap_", len(rows) + number)):
            low, high = (float(bound[at]) for bound in bounds or ())
            row |= {f"{name}low": low, f"{name}high": high}
    return rows
