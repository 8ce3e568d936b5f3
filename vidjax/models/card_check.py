"""Checks whether the vectors of enrolled people fit the card of the net that computed the vectors.

The card, a JSON file, gives two variances: W between clips of one person, and B between people. See
`card_backend`. Both variances are also estimated from the vectors, where each person has the same
weight. A card counts as wrong only if an estimate is improbable under the card, and differs from
the card by a large factor.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from vidjax.models.card_backend import Distances

# A card is blamed outside these quantiles of the Gaussian distribution. They are far out, because
# real people vary more than a card says.
LOW, HIGH = -3.0, 3.0
CLOSE, VARIED, FAR = 0.75, 2.0, 2.5  # smaller deviations from the card do no harm
MIRRORED = 0.3  # see `Comparison.is_blind`
SAME = 0.1  # people who differ less than this share of what the card says look like one person
APART, MOST_FAR = (0.75, 2.0), 0.05  # see `differ`
FEWEST_PEOPLE = 3  # with two clips each, from whom W and B = 0 can be seen

# How people contradict a card:
#   few: too few people show whether the net fits, see `card_notes.compare`.
#   blind: the vectors do not separate the people.
#   closer: people differ less than the card says.
#   varied: the clips of a person differ more than the card says.
#   farther: people differ more than the card says.
Problem = Literal["", "few", "blind", "closer", "varied", "farther"]


class Comparison(NamedTuple):
    """Variances of vectors within and between people, divided by those in the net's JSON file."""

    problem: Problem  # "" if the people do not contradict the card
    between: float  # estimate of B / B of the card
    within: float  # median over people of W / W of the card; 1 if nobody has two clips
    cosine: float  # mean cosine of two clips of two people; of one person, as the card says
    # The standard deviation of cosines of two people / the same of the card; 0 if it is unknown.
    deviation: float = 0.0

    def is_blind(self, mirrored: Sequence[float]) -> bool:
        """Returns True if mirror images show that the net does not separate people.

        `mirrored` are the cosines between the vectors of photos and of their mirror images. The
        mean distance (1 - cosine) of a photo and its mirror image is 5 % of the mean distance of
        two people for dlib's net, and 40 to 70 % for most nets with random weights. If it is over
        30 %, the result is True. Random nets that average over the photo are not found.
        """
        # If people have only one or two photos, `compare` misses most nets with random weights.
        if self is NO_PROBLEM:
            return False
        return 1 - float(np.mean(mirrored)) > MIRRORED * (1 - self.cosine)


NO_PROBLEM = Comparison("", 1.0, 1.0, 0.0)


def compare(
    distances: Distances,
    total: np.ndarray,
    squares: np.ndarray,
    counts: np.ndarray,
    deviation: float = 0.0,
) -> Comparison:
    """Compares the variances of the vectors of P people with the variances in the net's card.

    Args:
      distances: the variances W and B in the card, a JSON file, and shapes of distributions.
      total: [D], the sum of all people's mean vectors (each the mean of a person's unit vectors).
      squares: [P], the squared length of each person's mean vector.
      counts: [P], the number of clips of each person. People without clips are ignored.
      deviation: standard deviation of the inner products of people's mean vectors; 0 if unknown.
    """
    squares, counts = np.asarray(squares)[counts > 0], np.asarray(counts, float)[counts > 0]
    repeated, people = counts > 1, len(counts)
    between, within = distances.between, distances.within
    if people < 2:
        return Comparison("", 1.0, 1.0, 1 - within - between) if people else NO_PROBLEM
    k, noise, spread = counts[repeated], float(np.mean(1 / counts)), 0.0
    varied = 1.0
    if len(k):
        each = k * (1 - squares[repeated]) / (k - 1)  # 1 - the mean cosine of two clips of a person
        within = float(each.mean())
        # A wrong photo of a person does not change the median.
        varied = float(np.median(each)) / distances.within
        spread = float(distances.within**2 / distances.same * np.mean(1 / (k - 1)) / len(k))
    # The variance of the means of people is B + W x the mean of 1 / k.
    cosine = float(total @ total - squares.sum()) / (people * (people - 1))
    estimate = float(squares.mean()) - cosine - noise * within
    share = estimate / between

    # If the card is right, `estimate` is like the mean of (P - 1) x n squared Gaussians.
    exact = between + noise * distances.within
    variance = 2 * exact**2 / ((people - 1) * 2 * distances.different) + noise**2 * spread
    low, high = (quantile(2 * between**2 / variance, z) for z in (LOW, HIGH))
    free = 2 * distances.within**2 / spread if spread else math.inf
    problem: Problem = ""
    if share > max(high, FAR):
        problem = "farther"
    if len(k) >= FEWEST_PEOPLE and varied > max(quantile(free, HIGH), VARIED):
        problem = "varied"
    # With one clip each, W + B shows a small B better than W + B - W.
    full, n_same, n_different = 1 - cosine, 2 * distances.same, 2 * distances.different
    is_near = full < quantile((people - 1) * n_different, LOW) * (between + distances.within)
    if share < CLOSE and (share < low or is_near):
        problem = "closer"
    # Only two people may be one person with two names.
    is_same = max(share, (full - distances.within) / between) < SAME
    if problem == "closer" and is_same and people >= FEWEST_PEOPLE:
        problem = "blind"
    # Two photos of twins differ by W. A net without any sense often gives equal vectors.
    is_equal = full < quantile((people - 1) * n_same, -2) * distances.within
    if is_equal or (len(k) >= FEWEST_PEOPLE and estimate < 0.07 * within):
        problem = "blind"
    usual = (distances.within + between) / math.sqrt(distances.different)
    return Comparison(problem, share, varied, cosine, deviation / usual)


def differ(distances: Distances, cosines: np.ndarray, clarity: np.ndarray) -> bool | None:
    """Checks with N pairs of faces of different people whether a net separates people.

    Returns the first of these values that applies:

        False:  more than 5 % of the pairs are too far apart even for two people. The net may see
                colours instead of faces.
        True:   at least half of the pairs are about as far apart as usual for two people.
        None:   otherwise. The net may be good: twins, mirrors and split screens show similar faces.

    Args:
      distances: the distributions of distances, according to the card (a JSON file) of the net.
      cosines: [N] float, the cosine between the vectors of the two faces of each pair.
      clarity: [N] float, the clarity of the better face of each pair, see `align.measure_clarity`.
        For unclear faces, a smaller distance is enough for True.
    """
    # Without within, the squared distance is B on average, and B x clarity for unclear faces.
    gap = (1 - cosines - distances.within) / distances.between
    if np.sum(gap >= APART[1]) > MOST_FAR * len(gap):
        return False
    return bool(2 * np.sum(gap > APART[0] * clarity) >= len(gap) > 0) or None


def quantile(free: float, z: float) -> float:
    """Returns a quantile of the mean of n squared standard normal variables, where n is `free`.

    `z` is the quantile of the standard normal distribution for the same probability.

    Source: Wilson and Hilferty 1931, The distribution of chi-square.
    """
    return max(1 - 2 / (9 * free) + z * math.sqrt(2 / (9 * free)), 0.0) ** 3
