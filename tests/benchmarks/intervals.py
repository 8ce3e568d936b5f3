"""Measures how often intervals of MAP and of differences contain the true mean, and exclude 0.

    python -m tests.benchmarks.intervals [--repetitions=1000]

README.md explains the figures. The t interval is limited to the range of the values.
"""

from typing import Any

import numpy as np
from scipy.stats import beta, expon, norm, sem, t

from tests.benchmarks import common
from vidjax.evaluation import significance

DRAWS = 1000  # of each bootstrap; a report uses 10,000

# Name -> for each kind of identities: its share, and its value or distribution.
AVERAGE_PRECISIONS: dict[str, list[tuple[float, Any]]] = {
    "0.5 % zeros": [(0.995, 1), (0.005, 0)], "1 % zeros": [(0.99, 1), (0.01, 0)],
    "3 % zeros": [(0.97, 1), (0.03, 0)], "10 % zeros": [(0.9, 1), (0.1, 0)],
    "5 % .997, 3 % zeros": [(0.92, 1), (0.05, 0.997), (0.03, 0)],
    "10 % .997, 2 % .5": [(0.88, 1), (0.1, 0.997), (0.02, 0.5)],
    "60 % ones, 2 % zeros, beta(4, 1)": [(0.6, 1), (0.02, 0), (0.38, beta(4, 1))],
    "80 % ones, beta(2, 1)": [(0.8, 1), (0.2, beta(2, 1))], "beta(8, 1)": [(1, beta(8, 1))],
    "beta(2, 0.5)": [(1, beta(2, 0.5))], "beta(45, 5)": [(1, beta(45, 5))],
    "uniform": [(1, beta(1, 1))],
}  # fmt: skip
DIFFERENCES: dict[str, list[tuple[float, Any]]] = {
    "normal, sd .1": [(1, norm(0, 0.1))], "t with 3 df, scale .05": [(1, t(3, scale=0.05))],
    "10 % -.45, 90 % +.05": [(0.1, -0.45), (0.9, 0.05)],
    "5 % -.95, 95 % +.05": [(0.05, -0.95), (0.95, 0.05)],
    "two runs of 0 or 1, p = .7": [(0.21, -1), (0.21, 1), (0.58, 0)],
    "1 % -1, 1 % +1": [(0.01, -1), (0.01, 1), (0.98, 0)],
    "5 % -.5, 5 % +.5": [(0.05, -0.5), (0.05, 0.5), (0.9, 0)],
    "1 % -1": [(0.01, -1), (0.99, 0)], "3 % -1": [(0.03, -1), (0.97, 0)],
    "2 % -1, 1 % +1": [(0.02, -1), (0.01, 1), (0.97, 0)],
    "1 % +.5, 19 % ±.001": [(0.01, 0.5), (0.095, 0.001), (0.095, -0.001), (0.8, 0)],
    "5 % +.5, 19 % ±.001": [(0.05, 0.5), (0.095, 0.001), (0.095, -0.001), (0.76, 0)],
    "3 % -.4, 20 % normal(.01, .02)": [(0.03, -0.4), (0.2, norm(0.01, 0.02)), (0.77, 0)],
    "30 % normal(.02, .1)": [(0.3, norm(0.02, 0.1)), (0.7, 0)],
    "exponential, sd .05": [(1, expon(-0.05, 0.05))],
    "10 % -.45, 90 % normal(.05, .02)": [(0.1, -0.45), (0.9, norm(0.05, 0.02))],
    "5 % -.95, 95 % normal(.05, .02)": [(0.05, -0.95), (0.95, norm(0.05, 0.02))],
}  # fmt: skip
# Name -> standard deviation and share of normal gaps. The other gaps are 0.
NORMAL = {"normal, sd .05": (0.05, 1), "normal, sd .1": (0.1, 1)} | {
    f"{share:.0%} normal, sd .1".replace("%", " %"): (0.1, share) for share in (0.7, 0.5, 0.3)
}


def measure(name: str, num_identities: int, repetitions: int) -> str:
    """Returns the figures of a population, such as `0.950 (t 0.930), 1.1`: see README.md."""
    rng = np.random.default_rng(num_identities)
    if name in DIFFERENCES:
        population, interval, lowest = DIFFERENCES[name], significance.compute_gap_interval, -1
    else:
        population, interval, lowest = AVERAGE_PRECISIONS[name], significance.map_interval, 0
    shares, kinds = zip(*population, strict=True)
    true_mean = sum(x * (kind.mean() if hasattr(kind, "mean") else kind) for x, kind in population)
    bounds, t_bounds = [], []
    for _ in range(repetitions):
        counts = rng.multinomial(num_identities, shares / np.sum(shares))
        values = np.concatenate([
            kind.rvs(count, random_state=rng) if hasattr(kind, "rvs") else np.full(count, kind)
            for kind, count in zip(kinds, counts, strict=True)
        ])  # fmt: skip
        bounds.append(interval(values, draws=DRAWS)[:2])
        half = t.ppf(0.975, num_identities - 1) * values.std(ddof=1) / num_identities**0.5
        t_bounds.append(np.clip([values.mean() - half, values.mean() + half], lowest, 1))
    covered, widths = [], []  # share of intervals with the mean, and mean width
    for low, high in np.transpose([bounds, t_bounds], (0, 2, 1)):
        covered.append(np.mean((low <= true_mean + 1e-12) & (true_mean <= high + 1e-12)))
        widths.append(np.mean(high - low))
    wider = f"{widths[0] / widths[1]:.1f}" if widths[0] < 100 * widths[1] else "over 100"
    return f"{covered[0]:.3f} (t {covered[1]:.3f}), {wider}"


def find(name: str, num_identities: int, repetitions: int) -> str:
    """Returns how often a mean of 3 standard errors is found, such as `0.740 (t 0.750)`.

    If the interval excludes 0, the mean is found.
    """
    rng, (deviation, share) = np.random.default_rng(num_identities), NORMAL[name]
    # The mean of the normal gaps, from: share * mean = 3 * sqrt(variance of all gaps / C)
    mean = 3 * deviation / np.sqrt(max(0, share * num_identities - 9 * (1 - share)) or np.nan)
    if np.isnan(mean):
        return ""
    found = []
    for _ in range(repetitions):
        differ = rng.random(num_identities) < share
        gaps = np.where(differ, rng.normal(mean, deviation, num_identities), 0)
        p = significance.compute_gap_interval(gaps, draws=DRAWS)[2]
        found.append((p < 0.05, t.sf(abs(gaps.mean()) / sem(gaps), num_identities - 1) < 0.025))
    return "{:.3f} (t {:.3f})".format(*np.mean(found, axis=0))


if __name__ == "__main__":
    repetitions = common.parse(__doc__, repetitions=1000).repetitions
    for head, names, numbers, figure in (
        ("average precisions", AVERAGE_PRECISIONS, (20, 37, 100, 300, 1000), measure),
        ("differences", DIFFERENCES, (2, 3, 5, 10, 20, 50, 100, 300), measure),
        ("differences found", NORMAL, (10, 20, 50, 100, 413), find),
    ):
        rows = [
            [name, *(figure(name, number, repetitions) for number in numbers)] for name in names
        ]
        common.print_table([head, *(f"{number:,}" for number in numbers)], rows)
