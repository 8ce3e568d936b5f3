"""Metrics in NumPy: average precision of rankings, AUROC, and errors of open-set identification.

To add a metric that is computed from the scores of clips, write a function and add a line to
`CLIP_METRICS`. For example, the top-5 accuracy of known clips is `np.mean(clips.rank[known] < 5)`.
The metric then appears in `metrics.json`, in the report and in comparisons of runs.

Source: average precision follows iQIYI-VID, equation 4, and the organisers' script. Unlike in the
usual libraries, the denominator is the number of all positives of the identity, not
min(positives, 100). A perfect list of 100 clips for 150 positives scores 0.667.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vidjax.utils.errors import UserError

LEVEL = 0.95  # the confidence level of all intervals


def average_precision(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Computes the average precision of each identity: sum of precisions at hits / `positives`.

    Args:
      hits: [C, k] bool, True where the clip at that rank shows the identity; best rank first.
      positives: [C] int, number of clips that show the identity, ranked or not.

    Returns:
      [C] float64 from 0 to 1; 0 for an identity without positives.
    """
    if (hits.sum(axis=1) > positives).any():
        raise ValueError("an identity has more hits than positives")
    ranks = np.arange(1, hits.shape[1] + 1, dtype=np.float64)
    precisions = np.where(hits, np.cumsum(hits, axis=1) / ranks, 0.0)  # [C, k]
    # Unlike a pairwise sum, a running sum gives the same bits for any number of misses at the end.
    sums = np.cumsum(precisions, axis=1)[:, -1] if hits.shape[1] else np.zeros(len(hits))
    return sums / np.maximum(positives, 1)


def mean_average_precision(
    index: ArrayLike, labels: ArrayLike, positives: ArrayLike, num_others: int = 0
) -> float:
    """Computes MAP, the mean of the average precision over the identities that have clips.

    Args:
      index: [C, k] int, the clips that are ranked for every identity, best first. A number outside
        0..N-1 marks a rank without a clip.
      labels: [N] int, the identity that each clip shows: 1..C, or 0 for none.
      positives: [C] int, number of clips that show the identity. Identities with 0 are left out. At
        least one number must be above 0.
      num_others: number of further identities in the ground truth, each with an AP of 0.

    Returns:
      The mean from 0 to 1, with the same bits for any order of identities.
    """
    index, labels, positives = np.asarray(index), np.asarray(labels), np.asarray(positives)
    if not (positives > 0).any():
        raise UserError(
            "MAP is undefined: no identity has a clip in the ground truth of this split\n"
            "add labels of clips of this split, or choose another split with --config.eval.split"
        )
    filled = (index >= 0) & (index < len(labels))
    listed = np.append(labels, 0)[np.where(filled, index, len(labels))]  # [C, k], 0 if empty
    hits = listed == np.arange(1, len(index) + 1)[:, None]
    precisions = average_precision(hits, positives)[positives > 0]
    return math.fsum(precisions) / (len(precisions) + num_others)


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Computes the area under the ROC curve, in float64.

    The area is the probability, from 0 to 1, that a positive clip scores above a negative clip. A
    tie counts 0.5. NaN counts as -inf, as in a ranking. Returns None if there are no positive or no
    negative clips.
    """
    scores, positive = _without_nan(scores), np.asarray(positive, bool)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return None
    _, number, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # tied scores share their mean rank
    above = ranks[number][positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


class IdentificationErrors(NamedTuple):
    """The errors of open-set identification at a threshold, see `identification_errors`."""

    threshold: float  # a clip is identified if its best score is at least this score
    fpir: float  # false-positive identification rate, the share of distractors that get a name
    fnir: float  # false-negative identification rate, share of known clips without the right name


def identification_errors(
    scores: ArrayLike, correct: ArrayLike, known: ArrayLike, *, fpir: float
) -> IdentificationErrors | None:
    """Computes the errors of open-set identification, at a threshold that is found from `fpir`.

    Args:
      scores: [N] float below inf, score of the best identity for each clip. -inf and NaN are never
        identified.
      correct: [N] bool, True where the best identity is right.
      known: [N] bool, False for distractors (clips of unknown people).
      fpir: the largest share of new distractors that may get a name, from 0 to 1.

    Returns:
      The errors at the lowest threshold that a new distractor reaches with probability <= `fpir`.
        If no clip is known, or if there are too few distractors for `fpir`, returns None.

    Source: ISO/IEC 19795-1, FPIR and FNIR at rank 1.
    """
    if not 0 <= fpir <= 1:
        raise UserError(f"fpir must be from 0 to 1, not {fpir}")
    scores, known = _without_nan(scores), np.asarray(known, bool)
    distractors, num_known = scores[~known], int(known.sum())
    threshold = find_threshold(distractors, fpir=fpir)
    if threshold is None or not len(distractors) or not num_known:
        return None
    hits = known & np.asarray(correct, bool) & (scores >= threshold)
    return IdentificationErrors(
        threshold=threshold,
        fpir=float(np.mean(distractors >= threshold)),
        fnir=float((num_known - hits.sum()) / num_known),
    )


def count_allowed(num_distractors: int, fpir: float) -> int:
    """Returns how many of S (`num_distractors`) distractors may reach a threshold.

    A distractor is a clip of an unknown person. If r distractors reach the threshold, a new
    distractor reaches it with probability (r + 1) / (S + 1), on average over all samples. The
    result is the largest r for which this probability is at most `fpir`. If the probability is
    above `fpir` even for r = 0, the result is -1.
    """
    # In floating point 1 - 0.9 is slightly less than 0.1, but means the same rate.
    most = fpir * (1 + 1e-9)
    return int(np.sum(np.arange(1, num_distractors + 2) / (num_distractors + 1) <= most)) - 1


def find_threshold(distractors: np.ndarray, *, fpir: float) -> float | None:
    """Returns the lowest threshold that a new distractor reaches with probability `fpir` at most.

    `distractors` [S] are the best scores of clips of unknown people, without NaN. The threshold has
    the precision of their dtype. If there are too few distractors for `fpir`, returns None.
    """
    ordered = np.sort(distractors)[::-1]  # best first
    if (allowed := count_allowed(len(ordered), fpir)) < 0:
        return None
    refused = ordered[allowed] if allowed < len(ordered) else np.array(-np.inf, ordered.dtype)
    return float(np.nextafter(refused, np.array(np.inf, ordered.dtype)))


def fpir_interval(num_passing: int, num_distractors: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval (low, high) of the false-positive identification rate.

    `num_passing` of `num_distractors` distractors (clips of unknown people) reach the threshold.
    The threshold depends on the scores of the same distractors, as in `find_threshold`.

    Source: Wilks 1941, Determination of sample sizes for setting tolerance limits.
    """
    # The rate on new distractors is distributed as Beta(r + 1, S - r), where r of S pass.
    counts = np.arange(num_passing + 1)
    steps = np.log((num_distractors + 1 - counts[1:]) / counts[1:])
    coefficients = np.concatenate([[0.0], np.cumsum(steps)])  # logs of binomial coefficients

    def find_rate(share: float) -> float:
        low, high, others = 0.0, 1.0, num_distractors - counts
        while low < (middle := (low + high) / 2) < high:
            logs = coefficients + counts * math.log(middle) + others * math.log1p(-middle)
            above = float(np.exp(logs).sum())  # the probability that the rate is above `middle`
            low, high = (middle, high) if above > share else (low, middle)
        return middle

    # scipy has the inverse of this distribution, but a gallery of models works without scipy.
    return find_rate((1 + LEVEL) / 2), find_rate((1 - LEVEL) / 2)


def _without_nan(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    return np.where(np.isnan(scores), np.array(-np.inf, scores.dtype), scores)


class ClipScores(NamedTuple):
    """The scores of the N clips of a split, from which metrics are computed."""

    pool: np.ndarray  # [N] bool, the clips that are ranked
    best: np.ndarray  # [N] float32, the highest score for any identity; -inf outside the pool
    right: np.ndarray  # [N] bool, True if that identity is the label of the clip
    # [N] float32, the log-probability of the label of the clip; not finite for a distractor or a
    # clip without a score. None if scores are not logarithms, or if not all scores are kept.
    own: np.ndarray | None = None
    identity: np.ndarray | None = None  # [N] int32, the class column of the best identity, or 0
    # [N] int32, the number of identities with a higher score than the label of the clip; of no
    # meaning for a distractor
    rank: np.ndarray | None = None
    # [C, 100] int32, the indices of the best clips of each identity, best first; -1 fills a list
    ranking: np.ndarray | None = None


def top1(clips: ClipScores, labels: np.ndarray) -> float:
    """Returns the share of known clips (`labels` [N] int above 0) whose best identity is right."""
    known = labels[clips.pool] > 0
    return float(clips.right[clips.pool].sum() / max(known.sum(), 1))


def mean_loss(clips: ClipScores, labels: np.ndarray) -> float | None:
    """Returns the mean of -log(probability of the right identity) over clips with a label above 0.

    `labels` are [N] int. Clips without a log-probability are left out. None means no clips.
    """
    if clips.own is None:
        return None
    values = clips.own[clips.pool & (labels > 0)].astype(np.float64)
    values = values[np.isfinite(values)]
    return -float(values.mean()) if len(values) else None


def clip_auroc(clips: ClipScores, labels: np.ndarray) -> float | None:
    """Returns how well the best score of a clip separates known clips from distractors (AUROC).

    `labels` [N] int are above 0 for known clips, and 0 for distractors (clips of unknown people).
    """
    return auroc(clips.best[clips.pool], labels[clips.pool] > 0)


def open_set(clips: ClipScores, labels: np.ndarray, *, value: str, fpir: float) -> float | None:
    """Returns the threshold or the FNIR of open-set identification, see `identification_errors`.

    `value` is `threshold`, or `fnir` for the share of clips of identities (label above 0) without
    the right name. `fpir` is the largest share of future distractors, clips of unknown people, that
    may get a name. Returns None if there are too few distractors, or no clips of identities.
    """
    pool = clips.pool
    known = labels[pool] > 0
    errors = identification_errors(clips.best[pool], clips.right[pool], known, fpir=fpir)
    return getattr(errors, value, None)


class Metric(NamedTuple):
    """A metric that is computed from the scores of clips."""

    label: str  # the name of the metric for a reader
    about: str  # half a sentence that explains it
    # (clip scores, labels [N]) -> value, or None if the value is undefined
    fn: Callable[[ClipScores, np.ndarray], float | None]
    digits: int = 4  # number of digits to print after the decimal point
    log: bool = False  # True: every evaluation writes it to the logs and the terminal
    lower: bool = False  # True: a lower value is better


def _make_open_set_metrics(fpir: float) -> dict[str, Metric]:
    share, measure = f"{100 * fpir:g} %", functools.partial(open_set, fpir=fpir)
    return {
        f"fnir_at_fpir_{fpir:g}": Metric(
            f"FNIR at FPIR {share}",
            f"known clips missed or misnamed if at most {share} of new distractors pass",
            functools.partial(measure, value="fnir"),
            lower=True,
        ),
        f"threshold_at_fpir_{fpir:g}": Metric(
            f"threshold at FPIR {share}",
            f"the lowest score of an identified clip; at most {share} of new distractors reach it",
            functools.partial(measure, value="threshold"),
        ),
    }


# Key in `metrics.json` -> metric. MAP is not among them, because it needs the ranking.
CLIP_METRICS: dict[str, Metric] = {
    "top1": Metric("top-1", "labelled clips whose best identity is right", top1, log=True),
    "eval_loss": Metric(
        "loss",
        "mean of minus the log-probability of the right identity, over labelled clips",
        mean_loss,
        log=True,
        lower=True,
    ),
    "auroc": Metric(
        "AUROC", "how well the best scores separate known clips from distractors", clip_auroc
    ),
    **_make_open_set_metrics(0.01),
    **_make_open_set_metrics(0.1),
}


def compute_clip_metrics(clips: ClipScores, labels: np.ndarray) -> dict[str, float | None]:
    """Computes all metrics of the table CLIP_METRICS. Returns name -> number or None.

    `labels` [N] int are the classes of the clips, from 1 on, or 0 for distractors.
    """
    values = {}
    for name, metric in CLIP_METRICS.items():
        value = metric.fn(clips, labels)
        try:  # JSON has no numbers of NumPy
            values[name] = None if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the metric '{name}' returns {type(value).__name__}: return a number, or None"
            ) from error
    return values


def select_logged(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns name -> value of MAP and of the metrics that every evaluation logs.

    `results` is name -> value of all metrics. Names with the value None are left out.
    """
    names = ("map", *(name for name, metric in CLIP_METRICS.items() if metric.log))
    return {name: results[name] for name in names if results.get(name) is not None}
