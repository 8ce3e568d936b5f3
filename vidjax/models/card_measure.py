"""Measures how similar the vectors of a net are, for clips of one person and of two people.

The statistics of cosines are written to the card of the net, a JSON file. Only people with two or
more clips are used. All people have the same weight, however many clips they have. The intervals
of means and standard deviations are from a bootstrap over people, because clips of a person are not
independent.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FEWEST_PEOPLE = 5  # with two clips each
MOST_CLIPS = 3000  # all pairs of them are compared
DRAWS = 1000
BINS = 20_000  # of the histogram of cosines from which the equal error rate is computed


class Spread(NamedTuple):
    """The mean and the standard deviation of cosines, each with a 95 % interval (low, high)."""

    mean: float
    deviation: float
    mean_interval: tuple[float, float]
    deviation_interval: tuple[float, float]


class Measured(NamedTuple):
    """Statistics of the cosines between the vectors of N clips of P people."""

    same: Spread  # of two clips of a person
    different: Spread  # of clips of two people
    pairs: tuple[int, int]  # number of pairs of each kind
    people: int
    clips: int
    equal_error_rate: float
    mean: np.ndarray  # [D], the mean over people of each person's mean vector


def choose_clips(owner: np.ndarray) -> np.ndarray:
    """Returns the rows of the clips that `measure` can use, [M] int, sorted by person.

    `owner` [N] int is the person of each clip. People with a single clip are left out. If there are
    more than `MOST_CLIPS` clips, only the first clips of each person are used.
    """
    order = np.argsort(owner, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    rows = [clips for clips in rows if len(clips) > 1][: MOST_CLIPS // 2]
    most = max(2, MOST_CLIPS // max(len(rows), 1))
    return np.concatenate([np.zeros(0, int), *(clips[:most] for clips in rows)])


def measure(units: np.ndarray, owner: np.ndarray) -> Measured:
    """Computes statistics of the cosines between clips of one person, and of two people.

    Args:
      units: [N, D] unit vectors of clips, sorted by person. Each person has at least two clips.
      owner: [N] int, the number of the person of each clip, from 0.
    """
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    count = np.diff(first, append=len(owner))
    cosine = units @ units.T
    inside = int((count * (count - 1)).sum())
    means, squares = _average_blocks(cosine, first), _average_blocks(cosine * cosine, first)
    totals = np.add.reduceat(units, first, 0, np.float64) / count[:, None]
    return Measured(
        _describe(lambda x, weight: weight @ x.diagonal() / weight.sum(1), means, squares),
        _describe(_average_different, means, squares),
        (inside // 2, (len(owner) ** 2 - len(owner) - inside) // 2),
        len(first),
        len(owner),
        _compute_equal_error_rate(cosine, owner, count),
        totals.mean(0),
    )


def _average_blocks(x: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Returns the means of the blocks of x [N, N] that belong to pairs of people, [P, P].

    The rows and the columns of x are clips, sorted by person. The clips of person i begin at the
    row `first[i]`. The diagonal of x is left out.
    """
    blocks = np.add.reduceat(np.add.reduceat(x, first, 0, np.float64), first, 1)
    count = np.diff(first, append=len(x))
    pairs = count[:, None] * count
    blocks[np.diag_indices(len(first))] -= np.add.reduceat(x.diagonal(), first, 0, np.float64)
    return blocks / (pairs - np.diag(count))


def _average_different(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x - np.diag(x.diagonal())
    total = ((weight @ x) * weight).sum(1)
    return total / np.maximum(weight.sum(1) ** 2 - (weight**2).sum(1), 1e-9)


def _describe(
    average: Callable[[np.ndarray, np.ndarray], np.ndarray], means: np.ndarray, squares: np.ndarray
) -> Spread:
    """Returns the mean and standard deviation of cosines, with bootstrap intervals.

    `means` [P, P] are the mean cosines between clips of each two of P people, and `squares` the
    mean squared cosines. `average(x, weight)` returns the mean of x, `means` or `squares`, for each
    of B bootstrap samples, [B]. `weight` [B, P] is how often a sample contains each person.
    """
    people = len(means)

    def compute(weight: np.ndarray) -> np.ndarray:
        mean = average(means, weight)
        return np.array([mean, np.sqrt(np.maximum(average(squares, weight) - mean**2, 0))])

    value = compute(np.ones((1, people)))[:, 0]
    drawn = np.random.default_rng(0).multinomial(people, np.full(people, 1 / people), DRAWS)
    ends = np.quantile(compute(drawn.astype(float)), (0.025, 0.975), axis=1).T
    # This is the basic bootstrap, as the deviation of draws is too low. Draws of few people spread
    # too little: the factor is about t(people - 1) / 1.96.
    high, low = (value[:, None] - (1 + 2 / (people - 1)) * (ends - value[:, None])).T
    (a, b), (c, d) = zip(low.tolist(), high.tolist(), strict=True)
    return Spread(float(value[0]), float(value[1]), (a, b), (c, d))


def _compute_equal_error_rate(cosine: np.ndarray, owner: np.ndarray, count: np.ndarray) -> float:
    """Returns the equal error rate of deciding by the cosine whether two clips show one person.

    `cosine` [N, N] are the cosines of N clips. `owner` [N] int is the person of each clip. `count`
    [P] is the number of clips of each of P people. All people have the same weight.
    """
    size = np.repeat(count, count).astype(float)
    bins = np.clip(((cosine + 1) * (BINS / 2)).astype(int), 0, BINS - 1)
    is_same = owner[:, None] == owner
    weight = np.where(is_same, 1 / (size * (size - 1))[:, None], 1 / (size[:, None] * size))
    np.fill_diagonal(weight, 0)
    same, different = (np.bincount(bins[kind], weight[kind], BINS) for kind in (is_same, ~is_same))
    missed = np.cumsum(same) / same.sum()  # share of pairs of a person at or below each cosine
    alarms = 1 - np.cumsum(different) / different.sum()
    at = int(np.argmin(np.maximum(missed, alarms)))
    return float(missed[at] + alarms[at]) / 2
