"""Computes confidence intervals of MAP and of differences in MAP, and p-values of differences.

The interval of a single run, or of the difference between two runs, comes from a Bayesian bootstrap
over the identities: MAP is computed many times, each time with random weights of the identities.
The interval of the difference between two groups of runs is a t interval.

The bootstrap adds an unseen identity, so that the interval has a width even if all values are
equal. The average precisions of this identity in two runs are (0, 0), (0, 1), (1, 0) or (1, 1),
each with a quarter of the weight of an identity.

If all values are 0 or 1, the bootstrap interval of MAP equals the Jeffreys interval of a
proportion. If the values vary, the bootstrap interval is hardly wider than a t interval. If most
values are equal and a few lie far away, a t interval is far too narrow.
`tests.benchmarks.intervals` measures how often both intervals contain the true value.

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
FEWEST_IDENTITIES = 20  # with fewer identities, the intervals were not tested
EQUAL = 1e-9  # average precisions count as equal below this difference
METHOD = f"Bayesian bootstrap over the identities and an unseen one, {DRAWS:,} draws"
METHOD_OF_SEEDS = "t interval over identities and seeds, degrees of freedom by Welch-Satterthwaite"
# Average precision of the unseen identity, or its difference between two runs -> weight. A seen
# identity has the weight 1.
UNSEEN = {0.0: 0.5, 1.0: 0.5}
UNSEEN_GAP = {-1.0: 0.25, 0.0: 0.5, 1.0: 0.25}


class Difference(NamedTuple):
    """The difference between a run and the first run of a comparison.

    Attributes:
      mean: MAP of the run minus MAP of the first run.
      low, high: bounds of the 95 % interval of `mean`, within -1..1.
      p, p_holm: two-sided p-value of a difference of 0, without and with Holm's correction for the
        number of compared runs. If groups of runs are compared, both are None.
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
    """Returns the bounds of the 95 % interval of the mean of `gaps`, and its two-sided p-value.

    `gaps` [C] are differences in average precision. The p-value tests a mean of 0. It is below 5 %
    exactly if the interval excludes 0.
    """
    means = _draw_means(gaps, UNSEEN_GAP, draws)
    beyond = min(np.sum(means <= 0), np.sum(means >= 0))
    return *_compute_bounds(means, gaps), min(1.0, 2 * float(1 + beyond) / (1 + draws))


def _draw_means(values: np.ndarray, unseen: Mapping[float, float], draws: int) -> np.ndarray:
    """Returns means of `values` [C] with random weights (Bayesian bootstrap), [draws].

    Each of the C values has an expected weight of 1. `unseen` maps additional values to their
    expected weights. The means do not depend on the order of the values.
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
    """Returns bounds that contain 95 % of `means`, and always contain the mean of `values`."""
    tail, mean = (1 - LEVEL) / 2, np.mean(values)
    low = np.quantile(means, tail, method="lower")
    high = np.quantile(means, 1 - tail, method="higher")
    return float(min(low, mean)), float(max(high, mean))


def differences(averages: Sequence[np.ndarray]) -> list[Difference]:
    """Compares every run with the first run. `averages` has average precisions [C] per run."""
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

    A group has average precisions [C] for each of two or more runs, which differ only in their
    seeds. Runs of two groups are paired in their order. There must be two or more identities.

    The interval is a t interval over identities and seeds. It is too narrow if only a few
    identities differ.

    Source: Satterthwaite 1946, An approximate distribution of estimates of variance components.
    """
    from scipy import special  # takes 0.2 s, so only when needed

    first, results = groups[0], []
    if len(first[0]) < 2:
        raise UserError(
            "the runs were evaluated on a single identity, but a confidence interval needs two\n"
            "compare runs on a split with more identities"
        )
    for own in groups[1:]:
        gaps = [new - old for new, old in zip(own, first, strict=True)]
        squared = squared_errors(gaps)
        mean = float(np.mean([gap.mean() for gap in gaps]))
        error = math.sqrt(sum(squared))
        sizes = len(first[0]), len(first)  # identities and seeds
        spread = sum(x**2 / max(num - 1, 1) for x, num in zip(squared, sizes, strict=True))
        freedom = sum(squared) ** 2 / spread if spread else math.inf
        half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * error
        low, high = max(mean - half, -1.0), min(mean + half, 1.0)
        counts = _count_signs(_compute_gaps(np.mean(own, axis=0), np.mean(first, axis=0)))
        results.append(Difference(mean, low, high, None, None, *counts, error))
    return results


def _compute_gaps(own: np.ndarray, first: np.ndarray) -> np.ndarray:
    gaps = own - first
    return np.where(np.abs(gaps) < EQUAL, 0.0, gaps)


def _count_signs(gaps: np.ndarray) -> tuple[int, int, int]:
    better, worse = int(np.sum(gaps > 0)), int(np.sum(gaps < 0))
    return better, worse, len(gaps) - better - worse


def squared_errors(gaps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the squared standard errors of a mean difference, over identities and over seeds.

    `gaps` has the differences in average precision [C] for each seed. The sum of both results is
    the squared standard error over identities and seeds.
    """
    averaged, means = np.mean(gaps, axis=0), np.array([gap.mean() for gap in gaps])
    return float(averaged.var(ddof=1) / len(averaged)), float(means.var(ddof=1) / len(means))


def holm(ps: Sequence[float]) -> list[float]:
    """Corrects p-values for the number of tests by Holm's method.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, smallest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        smallest = max(smallest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = smallest
    return corrected
