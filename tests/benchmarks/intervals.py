"""How often the intervals of MAP and of differences hold the truth, and how wide they are.

    python -m tests.benchmarks.intervals [--repetitions=1000] [--identities=20,37,100,300,1000]

Identities are drawn from populations whose mean is known. `held` is the share of samples whose
95 % interval holds that mean, beside the share for the t interval, cut to the same range; `width`
is the mean width in widths of the t interval.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from tests.benchmarks import common
from vidjax import significance

DRAWS = 1000  # of each bootstrap, in place of the 10,000 of a report
IDENTITIES = (20, 37, 100, 300, 1000)
Kind = tuple[float, float, Callable[[np.random.Generator, int], np.ndarray]]  # share, mean, draw


def always(share: float, value: float) -> Kind:
    """Returns a kind of identities that all have one value."""
    return share, value, lambda rng, num: np.full(num, value)


def beta(share: float, a: float, b: float) -> Kind:
    """Returns a kind of identities whose values have a beta distribution."""
    return share, a / (a + b), lambda rng, num: rng.beta(a, b, num)


def normal(share: float, mean: float, spread: float) -> Kind:
    """Returns a kind of identities whose values have a normal distribution."""
    return share, mean, lambda rng, num: rng.normal(mean, spread, num)


# Populations of average precisions.
PRECISIONS: dict[str, list[Kind]] = {
    "0.5 % zeros": [always(0.995, 1), always(0.005, 0)],
    "1 % zeros": [always(0.99, 1), always(0.01, 0)],
    "3 % zeros": [always(0.97, 1), always(0.03, 0)],
    "10 % zeros": [always(0.9, 1), always(0.1, 0)],
    "5 % .997, 3 % zeros": [always(0.92, 1), always(0.05, 0.997), always(0.03, 0)],
    "10 % .997, 2 % .5": [always(0.88, 1), always(0.1, 0.997), always(0.02, 0.5)],
    "60 % ones, 2 % zeros, beta(4, 1)": [always(0.6, 1), always(0.02, 0), beta(0.38, 4, 1)],
    "80 % ones, beta(2, 1)": [always(0.8, 1), beta(0.2, 2, 1)],
    "beta(8, 1)": [beta(1, 8, 1)],
    "beta(2, 0.5)": [beta(1, 2, 0.5)],
    "beta(45, 5)": [beta(1, 45, 5)],
    "uniform": [beta(1, 1, 1)],
}
# Populations of differences.
GAPS: dict[str, list[Kind]] = {
    "1 % +.5, 19 % ±.001": [
        always(0.01, 0.5), always(0.095, 0.001), always(0.095, -0.001), always(0.8, 0),
    ],
    "5 % +.5, 19 % ±.001": [
        always(0.05, 0.5), always(0.095, 0.001), always(0.095, -0.001), always(0.76, 0),
    ],
    "3 % -.4, 20 % normal(.01, .02)": [
        always(0.03, -0.4), normal(0.2, 0.01, 0.02), always(0.77, 0),
    ],
    "1 % -1": [always(0.01, -1), always(0.99, 0)],
    "3 % -1": [always(0.03, -1), always(0.97, 0)],
    "2 % -1, 1 % +1": [always(0.02, -1), always(0.01, 1), always(0.97, 0)],
    "normal(.02, .1)": [normal(1, 0.02, 0.1)],
    "30 % normal(.02, .1)": [normal(0.3, 0.02, 0.1), always(0.7, 0)],
    "normal(.01, .01)": [normal(1, 0.01, 0.01)],
}  # fmt: skip


class Row(NamedTuple):
    """What was measured of a population at a number of identities."""

    held: float  # share of the samples whose interval holds the true mean
    t_held: float  # the same of the t interval
    width: float  # the mean width in widths of the t interval


def measure(name: str, num: int, *, repetitions: int) -> Row:
    """Draws samples of `num` identities of a population and returns what their intervals do."""
    rng, gaps = np.random.default_rng(num), name in GAPS
    kinds = GAPS[name] if gaps else PRECISIONS[name]
    shares = np.array([share for share, _, _ in kinds])
    true = float(sum(share * mean for share, mean, _ in kinds))
    bounds, t_bounds = [], []
    for _ in range(repetitions):
        counts = rng.multinomial(num, shares / shares.sum())
        drawn = [draw(rng, count) for (_, _, draw), count in zip(kinds, counts, strict=True)]
        values = np.concatenate(drawn)
        interval = significance.gap_interval if gaps else significance.map_interval
        bounds.append(interval(values, draws=DRAWS)[:2])
        half = stats.t.ppf(0.975, num - 1) * values.std(ddof=1) / num**0.5
        t_bounds.append((max(values.mean() - half, -gaps), min(values.mean() + half, 1)))
    (low, high), (t_low, t_high) = np.transpose(bounds), np.transpose(t_bounds)

    def held(low: np.ndarray, high: np.ndarray) -> float:
        return float(np.mean((low <= true + 1e-12) & (true <= high + 1e-12)))

    width = float(np.mean(high - low) / np.mean(t_high - t_low))
    return Row(held(low, high), held(t_low, t_high), width)


def write(cells: Sequence[str]) -> None:
    """Prints a line of the table."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> None:
    """Prints a table."""
    given = ",".join(map(str, IDENTITIES))
    args = common.parse(__doc__, repetitions=1000, identities=given)
    numbers = [int(num) for num in args.identities.split(",")]
    write(["population", *(f"{num:,}" for num in numbers)])
    write(["---"] * (1 + len(numbers)))
    for name in (*PRECISIONS, *GAPS):
        rows = [measure(name, num, repetitions=args.repetitions) for num in numbers]
        cells = [f"{row.held:.3f} (t {row.t_held:.3f}), {row.width:.1f}" for row in rows]
        write([name, *cells])


if __name__ == "__main__":
    main()
