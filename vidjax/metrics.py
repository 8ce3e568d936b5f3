"""Average precision at 100 as the challenge scores it, and open-set errors.

Source of the first: iQIYI-VID, equation 4, and the organisers' script. It differs from the usual
libraries in one thing: the denominator is the number of all positives of the identity, not
min(positives, 100), so a perfect list for 150 positives scores 0.667.
"""

import math
from typing import NamedTuple

import numpy as np

from vidjax.batch import Array


def average_precision(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Returns the average precision of every identity.

    Args:
      hits: [C, k] bool, True where the clip at that rank shows the identity; best rank first.
      positives: [C] int, all ground-truth positives of the identity, returned or not.

    Returns:
      [C] float64 in 0..1; 0 for an identity without positives.

    Raises:
      ValueError: an identity has more hits than positives.
    """
    if (hits.sum(axis=1) > positives).any():
        raise ValueError("an identity has more hits than positives")
    ranks = np.arange(1, hits.shape[1] + 1, dtype=np.float64)
    precisions = np.where(hits, np.cumsum(hits, axis=1) / ranks, 0.0)  # [C, k]
    # A running sum, unlike a pairwise one, gives the same bits however many misses end the list.
    sums = np.cumsum(precisions, axis=1)[:, -1] if hits.shape[1] else np.zeros(len(hits))
    return sums / np.maximum(positives, 1)


def mean_average_precision(
    index: Array, labels: Array, positives: Array, num_others: int = 0
) -> float:
    """Returns MAP over the identities that have positives, in float64.

    Args:
      index: [C, k] int, the clips of every identity, best first; an index outside 0..N-1 is an
        empty place.
      labels: [N] int, the class column of every clip: 1..C, or 0 for a distractor.
      positives: [C] int, all ground-truth positives of every identity. An identity with none is
        not in the ground truth and is left out of the mean.
      num_others: identities of the ground truth that have no column; they count 0.

    Returns:
      The mean in 0..1, the same whatever the order of the identities.

    Raises:
      ValueError: no identity has a positive, or one has more hits than positives.
    """
    index, labels, positives = np.asarray(index), np.asarray(labels), np.asarray(positives)
    if not (positives > 0).any():
        raise ValueError("no identity has a positive clip: there is nothing to average")
    filled = (index >= 0) & (index < len(labels))
    if len(labels):
        found = np.where(filled, labels[np.where(filled, index, 0)], 0)  # [C, k]
    else:
        found = np.zeros_like(index)
    hits = found == np.arange(1, len(index) + 1)[:, None]
    precisions = average_precision(hits, positives)[positives > 0]
    return math.fsum(precisions) / (len(precisions) + num_others)


def auroc(scores: Array, positive: Array) -> float | None:
    """Returns the chance that a positive clip scores above a negative one, in float64.

    Args:
      scores: [N] float; NaN counts as -inf, as in a ranking.
      positive: [N] bool.

    Returns:
      The area under the ROC curve in 0..1, where of two equal scores each is above by half; None
      where either side is empty.
    """
    scores, positive = _without_nan(scores), np.asarray(positive, bool)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return None
    _, number, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of equal scores, their mean rank
    above = ranks[number][positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


class IdentificationErrors(NamedTuple):
    """How often an open-set identification errs at one threshold.

    Attributes:
      threshold: a clip is identified where its best score is at or above this.
      fpir: share of the distractors that are identified.
      fnir: share of the known clips that are not, or as somebody else.
    """

    threshold: float
    fpir: float
    fnir: float


def identification_errors(
    scores: Array, correct: Array, known: Array, *, fpir: float
) -> IdentificationErrors | None:
    """Returns the errors at the lowest threshold that keeps false identifications to a share.

    Args:
      scores: [N] float below inf, the best identity score of each clip. One of -inf, or NaN, is
        never identified.
      correct: [N] bool, True where the best identity is the right one.
      known: [N] bool, False for distractors.
      fpir: the share of distractors that may be at or above the threshold, 0..1.

    Returns:
      Threshold (in the precision of the scores) and both shares; None without a distractor or
      without a known clip.

    Raises:
      ValueError: fpir outside 0..1.

    Source: ISO/IEC 19795-1, FPIR and FNIR at rank 1.
    """
    if not 0 <= fpir <= 1:
        raise ValueError(f"fpir must be within 0..1, got {fpir}")
    scores, known = _without_nan(scores), np.asarray(known, bool)
    strange = np.sort(scores[~known])[::-1]  # [N - known], best first
    num_known = int(known.sum())
    if not len(strange) or not num_known:
        return None
    # Counts are compared as shares: 0.29 * 100 is less than 29.
    allowed = int(np.sum(np.arange(1, len(strange) + 1) / len(strange) <= fpir))
    refused = strange[allowed] if allowed < len(strange) else np.array(-np.inf, scores.dtype)
    threshold = np.nextafter(refused, np.array(np.inf, scores.dtype))
    hits = known & np.asarray(correct, bool) & (scores >= threshold)
    return IdentificationErrors(
        threshold=float(threshold),
        fpir=float(np.mean(strange >= threshold)),
        fnir=float((num_known - hits.sum()) / num_known),
    )


def _without_nan(scores: Array) -> np.ndarray:
    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    return np.where(np.isnan(scores), np.array(-np.inf, scores.dtype), scores)
