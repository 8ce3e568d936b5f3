"""Computes confidence intervals of MAP and of differences in MAP, and p-values of differences.

The interval of a single run comes from a Bayesian bootstrap over the identities. MAP is computed
many times, with random weights of the identities. Two values are added to the average precisions:
0 and 1, each with half of the weight of an identity. So the interval has a width even if all
average precisions are equal. If all are 0 or 1, the interval equals the Jeffreys interval of a
proportion. If the average precisions vary, the interval is hardly wider than a t interval.

The interval of the difference between two runs is the smallest that contains a paired t interval
and a Bayesian bootstrap interval. If most differences are equal and a few lie far away, the t
interval is far too narrow. The interval of the difference between two groups of runs also includes
the variance between seeds.

`tests/benchmarks/README.md` reports how often the intervals contain the true value.

Source: Rubin 1981, The Bayesian bootstrap; Brown, Cai and DasGupta 2001, Interval estimation for a
binomial proportion.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.core.metrics import LEVEL
from vidjax.utils.errors import UserError

DRAWS = 10_000
DRAWS_AT_ONCE = 2**22  # most weights in memory at a time
FEWEST_IDENTITIES = 20  # with fewer identities, the interval of a single run was not tested
EQUAL = 1e-9  # average precisions count as equal below this difference
METHOD = f"Bayesian bootstrap over the identities and an unseen one, {DRAWS:,} draws"
METHOD_OF_GAPS = f"the wider of a t interval and a {METHOD}"
METHOD_OF_SEEDS = "t interval over identities and seeds, at least the interval of the mean runs"
# Average precision of the unseen identity -> weight. A seen identity has the weight 1.
UNSEEN = {0.0: 0.5, 1.0: 0.5}


class Difference(NamedTuple):
    """The difference between a run and the first run of a comparison.

    Attributes:
      mean: MAP of the run minus MAP of the first run.
      low, high: bounds of the 95 % interval of `mean`, within -1..1.
      p, p_holm: two-sided p-value of the null hypothesis of no difference, without and with Holm's
        correction for the number of runs. If groups of runs are compared, both are None.
      better, worse, equal: numbers of identities whose average precision is higher, lower or equal.
      error: standard error of `mean`. It is None if single runs are compared.
    """

    mean: float
    low: float
    high: float
    p: float | None
    p_holm: float | None
    better: int
    worse: int
    equal: int
    error: float | None = None


def map_interval(averages: np.ndarray, *, draws: int = DRAWS) -> tuple[float, float]:
    """Returns the bounds of the 95 % interval of MAP, given average precisions [C] in 0..1."""
    return _compute_bounds(_draw_means(averages, UNSEEN, draws), averages)


def compute_gap_interval(gaps: np.ndarray, *, draws: int = DRAWS) -> tuple[float, float, float]:
    """Returns (low, high, p): the 95 % interval of the mean of `gaps`, and a two-sided p-value.

    `gaps` [C] are the differences in average precision between two runs, one for each identity. The
    p-value tests a mean of 0. It is below 5 % exactly if the interval excludes 0. If the two runs
    are exchanged, (low, high) becomes (-high, -low).

    The interval is the smallest that contains a paired t interval and a Bayesian bootstrap
    interval. The bootstrap adds a guess for the gap of an unseen identity, see `_draw_low_means`.

    Source: Gaffke 2005, Three test statistics for a nonparametric one-sided hypothesis on the mean
    of a nonnegative variable; Learned-Miller and Thomas 2019, A new confidence interval for the
    mean of a bounded random variable. In both articles, the guess is the bound, -1 or 1.
    """
    lows, highs = _draw_low_means(gaps, draws), -_draw_low_means(-gaps, draws)
    low, high = _compute_bounds(lows, gaps)[0], _compute_bounds(highs, gaps)[1]
    beyond = min(np.sum(lows <= 0), np.sum(highs >= 0))
    p = 2 * float(1 + beyond) / (1 + draws)
    mean, num = float(np.mean(gaps)), len(gaps)
    if num > 1 and (error := float(np.std(gaps, ddof=1)) / math.sqrt(num)):
        from scipy import special  # takes 0.2 s, so only when needed

        half = float(special.stdtrit(num - 1, (1 + LEVEL) / 2)) * error
        low, high = min(low, mean - half), max(high, mean + half)
        p = max(p, 2 * float(special.stdtr(num - 1, -abs(mean) / error)))
    return max(low, -1.0), min(high, 1.0), min(p, 1.0)


def _draw_low_means(gaps: np.ndarray, draws: int) -> np.ndarray:
    """Draws randomly weighted means of `gaps` and a low guess, [draws]: a Bayesian bootstrap.

    `gaps` [C] are the differences in average precision between two runs, one for each identity. The
    guess is the gap of an unseen identity. It is low - (1 + low) r, where low is halfway between
    the mean gap and the lowest gap. If s is the share of pairs of equal gaps, r is:

        max(0, 1.5 s - 0.5)    with FEWEST_IDENTITIES or more gaps
        s^2                    with fewer gaps
    """
    # The limit is 1/3, because two good systems rank 60 % of the identities without a mistake.
    low, ties = (np.mean(gaps) + np.min(gaps)) / 2, measure_ties(gaps)
    rare = max(0.0, 1.5 * ties - 0.5) if len(gaps) >= FEWEST_IDENTITIES else ties**2
    return _draw_means(gaps, {float(low - (1 + low) * rare): 1.0}, draws)


def measure_ties(gaps: np.ndarray) -> float:
    """Returns the share of pairs of identities whose `gaps` are equal, or 1 if there is no pair.

    `gaps` [C] are the differences in average precision between two runs, one for each identity.
    """
    _, counts = np.unique(np.round(gaps / EQUAL), return_counts=True)
    pairs = len(gaps) * (len(gaps) - 1)
    return float(np.sum(counts * (counts - 1)) / pairs) if pairs else 1.0


def _draw_means(values: np.ndarray, unseen: Mapping[float, float], draws: int) -> np.ndarray:
    """Returns means of `values` [C] with random weights (Bayesian bootstrap), [draws].

    Each of the C values has an expected weight of 1. `unseen` is additional value -> its expected
    weight, such as {0.0: 0.5}. The means do not depend on the order of the values.
    """
    points, weights = np.unique(np.asarray(values, np.float64), return_counts=True)
    points, weights = np.append(points, list(unseen)), np.append(weights, list(unseen.values()))
    rng = np.random.default_rng(0)
    total, weighted = np.zeros(draws), np.zeros(draws)
    step = max(1, DRAWS_AT_ONCE // draws)
    for start in range(0, len(points), step):
        part = slice(start, start + step)
        drawn = rng.standard_gamma(weights[part], (draws, len(points[part])))
        total += drawn.sum(axis=1)
        weighted += drawn @ points[part]
    return weighted / total


def _compute_bounds(means: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Returns (low, high), the middle 95 % of `means`, widened to contain the mean of `values`."""
    tail, mean = (1 - LEVEL) / 2, np.mean(values)
    low = np.quantile(means, tail, method="lower")
    high = np.quantile(means, 1 - tail, method="higher")
    return float(min(low, mean)), float(max(high, mean))


def differences(averages: Sequence[np.ndarray]) -> list[Difference]:
    """Compares the MAP of runs with the MAP of the first run. Returns an item for each other run.

    `averages` has an array [C] for each run, the average precisions of the identities.
    """
    first, results, ps = averages[0], [], []
    for own in averages[1:]:
        gaps = _compute_gaps(own, first)
        low, high, p = compute_gap_interval(gaps)
        mean = float(own.mean() - first.mean())
        results.append(Difference(mean, low, high, p, 1.0, *_count_signs(gaps)))
        ps.append(p)
    return [result._replace(p_holm=p) for result, p in zip(results, holm(ps), strict=True)]


def differences_of_seeds(groups: Sequence[Sequence[np.ndarray]]) -> list[Difference]:
    """Compares every group of runs with the first group, by their mean MAP.

    A group is a list of two or more runs that differ only in their seeds. Each run is an array [C],
    the average precisions of two or more identities. Run i of a group is paired with run i of the
    first group. Returns an item for each group except the first.

    The interval of a difference is the smallest interval that contains two intervals:

    - the interval of `compute_gap_interval`, after averaging over the runs of each group.
    - a t interval. The squared standard error is the sum of two parts, from identities and from
      seeds. The t quantile is the mean of the t quantiles for identities and for seeds, weighted by
      the two parts (Cochran and Cox 1950, Experimental designs).
    """
    from scipy import special  # takes 0.2 s, so only when needed

    first, results = groups[0], []
    if len(first[0]) < 2:
        raise UserError(
            "the runs were evaluated on a single identity, but a confidence interval needs two\n"
            "compare runs on a split with more identities"
        )
    sizes = np.array([len(first[0]), len(first)])  # identities and seeds
    quantiles = special.stdtrit(sizes - 1, (1 + LEVEL) / 2)
    for own in groups[1:]:
        squared = squared_errors([new - old for new, old in zip(own, first, strict=True)])
        error = math.sqrt(sum(squared))
        # Satterthwaite's degrees of freedom give too narrow intervals for two or three seeds.
        half = float(quantiles @ squared) / error if error else 0.0
        gaps = _compute_gaps(np.mean(own, axis=0), np.mean(first, axis=0))
        low, high, _ = compute_gap_interval(gaps)
        mean = float(gaps.mean())
        low, high = max(min(low, mean - half), -1.0), min(max(high, mean + half), 1.0)
        results.append(Difference(mean, low, high, None, None, *_count_signs(gaps), error))
    return results


def _compute_gaps(own: np.ndarray, first: np.ndarray) -> np.ndarray:
    gaps = own - first
    return np.where(np.abs(gaps) < EQUAL, 0.0, gaps)


def _count_signs(gaps: np.ndarray) -> tuple[int, int, int]:
    better, worse = int(np.sum(gaps > 0)), int(np.sum(gaps < 0))
    return better, worse, len(gaps) - better - worse


def squared_errors(gaps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the parts of the squared standard error of a mean: from identities and from seeds.

    `gaps` has an array [C] for each seed: the differences in average precision between two runs,
    for C identities.
    """
    averaged, means = np.mean(gaps, axis=0), np.array([gap.mean() for gap in gaps])
    return float(averaged.var(ddof=1) / len(averaged)), float(means.var(ddof=1) / len(means))


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p-values that are corrected for the number of tests by Holm's method.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, smallest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        smallest = max(smallest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = smallest
    return corrected
