"""The threshold of a gallery: the score that strangers reach at a rate that the user chose."""

import math
from typing import NamedTuple

import numpy as np
import scipy

from vidjax import metrics

CONFIDENCE = 0.95


class Threshold(NamedTuple):
    """A threshold and what is known of its rate.

    Attributes:
      fpir: the rate of false alarms that was asked for: the share of strangers who get a name.
      score: logarithm of the lowest probability at which the best identity is named.
      num_identities: N, the number of people that a stranger was compared with.
      num_strangers: clips of strangers that the threshold was set on.
      num_alarms: how many of them reach it.
      low, high: interval of the rate for clips like these, at 95 % confidence.
    """

    fpir: float
    score: float
    num_identities: int
    num_strangers: int
    num_alarms: int
    low: float
    high: float


def threshold(best: np.ndarray, fpir: float, num_identities: int) -> Threshold:
    """Sets a threshold on the best scores of strangers.

    Args:
      best: [S] float64, the logarithm of the best identity's probability of every stranger.
      fpir: the rate, above 0 and below 1.
      num_identities: the number of identities that they were compared with.

    Raises:
      ValueError: the rate is no such number, or fewer than 1 / fpir strangers cannot show it.

    Source: FPIR of ISO/IEC 19795-1; the interval of Clopper and Pearson 1934.
    """
    if not 0 < fpir < 1:
        raise ValueError(f"--fpir={fpir:g}: name a rate above 0 and below 1, e.g. 0.01")
    if len(best) * fpir < 1 - 1e-9:
        needed = math.ceil(1 / fpir - 1e-9)
        raise ValueError(
            f"--fpir={fpir:g} needs {needed:,} clips of strangers or more, the gallery has "
            f"{len(best):,}\nask for a higher rate, or add strangers: enrol G --strangers --split=S"
        )
    score = metrics.threshold_of(best, fpir=fpir)
    alarms = int(np.sum(best >= score))
    low, high = interval(alarms, len(best))
    return Threshold(fpir, score, num_identities, len(best), alarms, low, high)


def interval(hits: int, count: int) -> tuple[float, float]:
    """Returns the Clopper-Pearson interval of a rate of which `hits` of `count` were seen."""
    tail = (1 - CONFIDENCE) / 2
    low = float(scipy.stats.beta.ppf(tail, hits, count - hits + 1)) if hits else 0.0
    high = float(scipy.stats.beta.ppf(1 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return low, high
