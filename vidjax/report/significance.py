"""Intervals of the MAP of a run, and intervals and p-values of the difference between two runs.

Report and comparison use the same method, a studentised bootstrap over the identities.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
DRAWS_AT_ONCE = 2**22  # resampled identities held in memory at a time
LEVEL = 0.95
FEW_IDENTITIES = 50  # with fewer identities the intervals are too narrow
EQUAL = 1e-9  # average precisions closer than this count as equal
METHOD = f"studentised bootstrap over the identities, {RESAMPLES:,} resamples"  # for a page


class Difference(NamedTuple):
    """The difference between a run and the first run of a comparison.

    Attributes:
      mean: MAP of the run minus MAP of the first run.
      low, high: bounds of the 95 % interval of `mean`, within -1..1.
      p: two-sided p-value of the hypothesis that the difference is 0.
      p_holm: `p` after Holm's correction for the number of runs.
      better, worse, equal: the number of identities by their average precision.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    better: int
    worse: int
    equal: int


def map_interval(averages: np.ndarray, *, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Returns the bounds of the 95 % interval of MAP, within 0..1.

    Args:
      averages: [C] average precision of every identity, 0..1.
      resamples: the number of resamples of the bootstrap.
    """
    (low,), (high,), _ = bootstrap(averages, resamples=resamples)
    return max(float(low), 0.0), min(float(high), 1.0)


def differences(averages: Sequence[np.ndarray]) -> list[Difference]:
    """Returns the difference from the first run, for every other run.

    Args:
      averages: for each run [C], the average precision of the same identities.
    """
    first, results = averages[0], []
    for own in averages[1:]:
        gaps = own - first
        gaps = np.where(np.abs(gaps) < EQUAL, 0.0, gaps)
        (low,), (high,), (p,) = bootstrap(gaps)
        better, worse = int(np.sum(gaps > 0)), int(np.sum(gaps < 0))
        results.append(
            Difference(
                mean=float(own.mean() - first.mean()),
                low=max(float(low), -1.0),
                high=min(float(high), 1.0),
                p=float(p),
                p_holm=1.0,
                better=better,
                worse=worse,
                equal=len(gaps) - better - worse,
            )
        )
    corrected = holm([result.p for result in results])
    return [result._replace(p_holm=p) for result, p in zip(results, corrected, strict=True)]


def bootstrap(
    values: np.ndarray, *, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the 95 % interval of a mean, and the p-value of the hypothesis that it is 0.

    The bootstrap resamples the values. It is studentised: it measures how far a resample's mean
    lies from the sample's mean in standard errors of that resample. It is symmetric: the interval
    reaches equally far to both sides. For few and skewed values it covers the true mean more often
    than percentiles of the resampled means. In simulations with 50 skewed differences or more it
    covers in 95 +- 2 % of cases. Equal input gives equal results.

    Args:
      values: [C] float; or [R, C] for R independent experiments.
      resamples: the number of resamples.

    Returns:
      low [R], high [R] and the two-sided p-value [R]; R = 1 for one experiment.

    Source: P. Hall, On symmetric bootstrap confidence intervals, 1988.
    """
    values = np.atleast_2d(np.asarray(values, np.float64))
    num = values.shape[1]
    mean = values.mean(axis=1)
    centred = values - mean[:, None]
    spread = np.sqrt(np.mean(centred**2, axis=1))
    rng = np.random.default_rng(0)
    rows = max(1, DRAWS_AT_ONCE // num)
    means, variances = [], []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(0, num, (count, num)) + num * np.arange(count)[:, None]
        share = np.bincount(drawn.ravel(), minlength=count * num).reshape(count, num) / num
        means.append(centred @ share.T)
        variances.append(centred**2 @ share.T - means[-1] ** 2)
    t_star = np.abs(np.concatenate(means, axis=1))  # [R, resamples]
    variance = np.concatenate(variances, axis=1)
    # Equal values in a resample have no variance: use the smallest of the other resamples.
    degenerate = variance <= 1e-9 * spread[:, None] ** 2
    smallest = np.min(variance, axis=1, where=~degenerate, initial=np.inf)
    smallest = np.where(np.isfinite(smallest), smallest, 1.0)
    variance = np.where(degenerate, smallest[:, None], variance)
    t_star /= np.sqrt(variance)
    half = np.quantile(t_star, LEVEL, axis=1) * spread
    observed = np.abs(mean) / np.where(spread > 0, spread, 1.0)
    observed = np.where((spread == 0) & (mean != 0), np.inf, observed)
    p = (1 + np.sum(t_star >= observed[:, None], axis=1)) / (1 + resamples)
    return mean - half, mean + half, p


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p-values corrected by Holm's method for the number of tests.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, smallest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        smallest = max(smallest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = smallest
    return corrected
