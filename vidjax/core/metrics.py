"""Metrics in NumPy: average precision at 100, open-set errors, and the table of metrics per clip.

A new metric per clip is one function and one line in `CLIP_METRICS`; `metrics.json`, the report and
the comparison then have it.

Source: average precision follows iQIYI-VID, equation 4, and the organisers' script. The usual
libraries differ in one thing: here the denominator is the number of all positives of the identity,
not min(positives, 100). A perfect list for 150 positives scores 0.667.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vidjax.utils.errors import UserError

LEVEL = 0.95  # of all intervals


def average_precision(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Returns AP of every identity: sum of the precision at each hit, divided by `positives`.

    Args:
      hits: [C, k] bool, True where the clip at that rank shows the identity; best rank first.
      positives: [C] int, ground-truth positives of the identity, listed or not.

    Returns:
      [C] float64 in 0..1; 0 for an identity without positives.
    """
    if (hits.sum(axis=1) > positives).any():
        raise ValueError("an identity has more hits than positives")
    ranks = np.arange(1, hits.shape[1] + 1, dtype=np.float64)
    precisions = np.where(hits, np.cumsum(hits, axis=1) / ranks, 0.0)  # [C, k]
    # A running sum, unlike a pairwise one, gives the same bits however many misses end the list.
    sums = np.cumsum(precisions, axis=1)[:, -1] if hits.shape[1] else np.zeros(len(hits))
    return sums / np.maximum(positives, 1)


def mean_average_precision(
    index: ArrayLike, labels: ArrayLike, positives: ArrayLike, num_others: int = 0
) -> float:
    """Returns MAP over the identities that have positives, in float64.

    Args:
      index: [C, k] int, the clips of every identity, best first; empty places lie outside 0..N-1.
      labels: [N] int, the class column of every clip: 1..C, or 0 for a distractor.
      positives: [C] int, ground-truth positives; the mean leaves out identities without any.
      num_others: identities of the ground truth without a column; each counts 0.

    Returns:
      The mean in 0..1, to the bit in any order of identities; ValueError if all lack positives.
    """
    index, labels, positives = np.asarray(index), np.asarray(labels), np.asarray(positives)
    if not (positives > 0).any():
        raise UserError("no identity has a positive clip: there is nothing to average")
    filled = (index >= 0) & (index < len(labels))
    if len(labels):
        listed = np.where(filled, labels[np.where(filled, index, 0)], 0)  # [C, k]
    else:
        listed = np.zeros_like(index)
    hits = listed == np.arange(1, len(index) + 1)[:, None]
    precisions = average_precision(hits, positives)[positives > 0]
    return math.fsum(precisions) / (len(precisions) + num_others)


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Returns the area under the ROC curve, in float64.

    The area is the probability that a positive clip scores above a negative one, in 0..1; a tie
    counts 0.5. None without a positive or without a negative. NaN counts as -inf, as in a ranking.
    """
    scores, positive = _without_nan(scores), np.asarray(positive, bool)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return None
    _, number, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # ties share their mean rank
    above = ranks[number][positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


class IdentificationErrors(NamedTuple):
    """The errors of open-set identification at one threshold.

    Attributes:
      threshold: a clip is identified if its best score is at or above this score.
      fpir: false-positive identification rate, the share of distractors that are identified.
      fnir: false-negative identification rate, the share of known clips missed or misnamed.
    """

    threshold: float
    fpir: float
    fnir: float


def identification_errors(
    scores: ArrayLike, correct: ArrayLike, known: ArrayLike, *, fpir: float
) -> IdentificationErrors | None:
    """Returns the errors at the lowest threshold that keeps FPIR of new clips at or below a limit.

    Args:
      scores: [N] float below inf, best identity scores; -inf and NaN are never identified.
      correct: [N] bool, True where the best identity is the right one.
      known: [N] bool, False for distractors.
      fpir: the limit, a share of the distractors in 0..1; else ValueError.

    Returns:
      The errors; None without a known clip, or with so few distractors that they cannot show the
        limit. The threshold has the precision of the scores.

    Source: ISO/IEC 19795-1, FPIR and FNIR at rank 1.
    """
    if not 0 <= fpir <= 1:
        raise UserError(f"fpir must be within 0..1, got {fpir}")
    scores, known = _without_nan(scores), np.asarray(known, bool)
    distractors, num_known = scores[~known], int(known.sum())
    if not len(distractors) or not num_known:
        return None
    if (threshold := threshold_of(distractors, fpir=fpir)) is None:
        return None
    hits = known & np.asarray(correct, bool) & (scores >= threshold)
    return IdentificationErrors(
        threshold=threshold,
        fpir=float(np.mean(distractors >= threshold)),
        fnir=float((num_known - hits.sum()) / num_known),
    )


def num_allowed(num_distractors: int, fpir: float) -> int:
    """Returns how many of S distractors may reach a threshold; -1 if S is below 1 / fpir - 1.

    If r of them do, a new one does with probability (r + 1) / (S + 1), on average over all samples
    of S distractors. That is `fpir` at most, a share in 0..1.
    """
    # 1 - 0.9 is less than 0.1 in floating point, and means the same rate.
    most = fpir * (1 + 1e-9)
    return int(np.sum(np.arange(1, num_distractors + 2) / (num_distractors + 1) <= most)) - 1


def threshold_of(distractors: np.ndarray, *, fpir: float) -> float | None:
    """Returns the lowest threshold that new distractors reach with probability `fpir` at most.

    `distractors` [S] are their best scores, without NaN; the threshold has their dtype's precision.
    It is None where S is too small, see `num_allowed`.
    """
    ordered = np.sort(distractors)[::-1]  # best first
    if (allowed := num_allowed(len(ordered), fpir)) < 0:
        return None
    refused = ordered[allowed] if allowed < len(ordered) else np.array(-np.inf, ordered.dtype)
    return float(np.nextafter(refused, np.array(np.inf, ordered.dtype)))


def fpir_interval(num_passing: int, num_distractors: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of FPIR on new distractors, (low, high).

    The threshold was set on S = `num_distractors`, of which r = `num_passing` reach it; it lies
    just above the best of the others. So FPIR on new ones is distributed as Beta(r + 1, S - r).

    Source: Wilks 1941, Determination of sample sizes for setting tolerance limits.
    """
    from scipy import special  # a fifth of a second, for those alone who need it

    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = special.betaincinv(num_passing + 1, num_distractors - num_passing, tails)
    return float(low), float(high)


def _without_nan(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    return np.where(np.isnan(scores), np.array(-np.inf, scores.dtype), scores)


class ClipScores(NamedTuple):
    """The best score of every clip of a split, by clip index.

    Attributes:
      pool: [N] bool, the clips that are ranked.
      best: [N] float32, the highest score for any identity; -inf outside the pool.
      right: [N] bool, True if that identity is the label of the clip.
    """

    pool: np.ndarray
    best: np.ndarray
    right: np.ndarray


def top1(clips: ClipScores, labels: np.ndarray) -> float:
    """Returns the share of the labelled clips whose best identity is right, in 0..1.

    `labels` are [N] int class columns; 0 for a distractor.
    """
    known = labels[clips.pool] > 0
    return float(clips.right[clips.pool].sum() / max(known.sum(), 1))


def clip_auroc(clips: ClipScores, labels: np.ndarray) -> float | None:
    """Returns the AUROC of best scores, labelled clips against distractors; arguments of `top1`."""
    return auroc(clips.best[clips.pool], labels[clips.pool] > 0)


def open_set(clips: ClipScores, labels: np.ndarray, *, value: str, fpir: float) -> float | None:
    """Returns the `fnir` or the `threshold` of `identification_errors`; None where it has none.

    The threshold is a logarithm unless the run ranks by logits. Arguments are those of `top1`.
    """
    pool = clips.pool
    known = labels[pool] > 0
    errors = identification_errors(clips.best[pool], clips.right[pool], known, fpir=fpir)
    return getattr(errors, value, None)


class Metric(NamedTuple):
    """One row of the table of metrics.

    Attributes:
      label, about: the metric's name for a reader, and half a sentence that explains it.
      fn: (clip scores, labels [N]) -> value, None where it is not defined.
      digits: digits after the decimal point that a reader sees.
      log: True to write it to `metrics.jsonl`, TensorBoard and the terminal at every evaluation.
    """

    label: str
    about: str
    fn: Callable[[ClipScores, np.ndarray], float | None]
    digits: int = 4
    log: bool = False


# Key in `metrics.json` -> metric. These need the best score of every clip; MAP needs the ranking.
CLIP_METRICS: dict[str, Metric] = {
    "top1": Metric("top-1", "labelled clips whose best identity is right", top1, log=True),
    "auroc": Metric("AUROC", "known clips against distractors", clip_auroc),
    "fnir_at_fpir_0.01": Metric(
        "FNIR at FPIR 1 %",
        "known clips missed or misnamed where 1 % of the distractors pass",
        functools.partial(open_set, value="fnir", fpir=0.01),
    ),
    "threshold_at_fpir_0.01": Metric(
        "threshold at FPIR 1 %",
        "lowest score at which a clip counts as identified, for that FNIR",
        functools.partial(open_set, value="threshold", fpir=0.01),
    ),
    "fnir_at_fpir_0.1": Metric(
        "FNIR at FPIR 10 %",
        "known clips missed or misnamed where 10 % of the distractors pass",
        functools.partial(open_set, value="fnir", fpir=0.1),
    ),
    "threshold_at_fpir_0.1": Metric(
        "threshold at FPIR 10 %",
        "lowest score at which a clip counts as identified, for that FNIR",
        functools.partial(open_set, value="threshold", fpir=0.1),
    ),
}


def logged(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns MAP and the metrics with `log=True` of a `metrics.json`, where they are defined."""
    names = ("map", *(name for name, metric in CLIP_METRICS.items() if metric.log))
    return {name: results[name] for name in names if results.get(name) is not None}


def describe(results: Mapping[str, Any]) -> list[str]:
    """Returns the metrics with `log=True` as text, such as `top-1 0.8582`, without MAP."""
    return [
        f"{metric.label} {results[name]:.{metric.digits}f}"
        for name, metric in CLIP_METRICS.items()
        if metric.log and results.get(name) is not None
    ]
