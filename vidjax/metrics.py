"""Average precision at 100 as the challenge scores it, and top-1 accuracy.

Source: iQIYI-VID, equation 4, and the organisers' script. It differs from the usual libraries in
one thing: the denominator is the number of all positives of the identity, not min(positives, 100),
so a perfect list for 150 positives scores 0.667.
"""

import math

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


def top1(scores: Array, labels: Array, batch_mask: Array) -> tuple[Array, Array]:
    """Returns (sum, count) of the labelled clips whose best identity is the right one.

    Args:
      scores: [B, C] float, the identity columns; a clip without a finite score is a miss.
      labels: [B] int, the class column 1..C, or 0 for a distractor, which does not count.
      batch_mask: [B] bool, True for real clips.

    Returns:
      Two integer scalars, numpy or jax as the arguments are.
    """
    labelled = batch_mask & (labels > 0)
    best = scores.max(axis=-1)
    right = labelled & (best > -math.inf) & (scores.argmax(axis=-1) + 1 == labels)
    return right.sum(), labelled.sum()
