"""How often the intervals of MAP and of differences hold the truth, and how wide they are.

    python -m tests.benchmarks.intervals [--repetitions=1000] [--identities=20,37,100,300,1000]

README.md describes the figures. The t interval is cut to the range of the values.
"""

from typing import Any

import numpy as np
from scipy import stats

from tests.benchmarks import common
from vidjax.evaluation import significance

DRAWS = 1000  # of each bootstrap, in place of the 10,000 of a report
Kinds = list[tuple[float, Any]]  # shares of identities, and the distribution or value of each
beta, normal = stats.beta, stats.norm

# Populations of average precisions.
PRECISIONS: dict[str, Kinds] = {
    "0.5 % zeros": [(0.995, 1), (0.005, 0)], "1 % zeros": [(0.99, 1), (0.01, 0)],
    "3 % zeros": [(0.97, 1), (0.03, 0)], "10 % zeros": [(0.9, 1), (0.1, 0)],
    "5 % .997, 3 % zeros": [(0.92, 1), (0.05, 0.997), (0.03, 0)],
    "10 % .997, 2 % .5": [(0.88, 1), (0.1, 0.997), (0.02, 0.5)],
    "60 % ones, 2 % zeros, beta(4, 1)": [(0.6, 1), (0.02, 0), (0.38, beta(4, 1))],
    "80 % ones, beta(2, 1)": [(0.8, 1), (0.2, beta(2, 1))], "beta(8, 1)": [(1, beta(8, 1))],
    "beta(2, 0.5)": [(1, beta(2, 0.5))], "beta(45, 5)": [(1, beta(45, 5))],
    "uniform": [(1, beta(1, 1))],
}  # fmt: skip
# Populations of differences.
GAPS: dict[str, Kinds] = {
    "1 % +.5, 19 % ±.001": [(0.01, 0.5), (0.095, 0.001), (0.095, -0.001), (0.8, 0)],
    "5 % +.5, 19 % ±.001": [(0.05, 0.5), (0.095, 0.001), (0.095, -0.001), (0.76, 0)],
    "3 % -.4, 20 % normal(.01, .02)": [(0.03, -0.4), (0.2, normal(0.01, 0.02)), (0.77, 0)],
    "1 % -1": [(0.01, -1), (0.99, 0)],
    "3 % -1": [(0.03, -1), (0.97, 0)],
    "2 % -1, 1 % +1": [(0.02, -1), (0.01, 1), (0.97, 0)],
    "normal(.02, .1)": [(1, normal(0.02, 0.1))],
    "30 % normal(.02, .1)": [(0.3, normal(0.02, 0.1)), (0.7, 0)],
    "normal(.01, .01)": [(1, normal(0.01, 0.01))],
}


def measure(name: str, num: int, repetitions: int) -> str:
    """Returns the figures of a population as text, from samples of `num` identities each."""
    rng = np.random.default_rng(num)
    if name in GAPS:
        population, interval, lowest = GAPS[name], significance.compute_gap_interval, -1
    else:
        population, interval, lowest = PRECISIONS[name], significance.map_interval, 0
    shares, kinds = zip(*population, strict=True)
    means = [kind.mean() if hasattr(kind, "mean") else kind for kind in kinds]
    true = float(np.dot(shares, means))
    bounds, t_bounds = [], []
    for _ in range(repetitions):
        counts = rng.multinomial(num, shares / np.sum(shares))
        values = np.concatenate([
            kind.rvs(count, random_state=rng) if hasattr(kind, "rvs") else np.full(count, kind)
            for kind, count in zip(kinds, counts, strict=True)
        ])  # fmt: skip
        bounds.append(interval(values, draws=DRAWS)[:2])
        half = stats.t.ppf(0.975, num - 1) * values.std(ddof=1) / num**0.5
        t_bounds.append((max(values.mean() - half, lowest), min(values.mean() + half, 1)))
    (low, high), (t_low, t_high) = np.transpose(bounds), np.transpose(t_bounds)
    held, t_held = (
        np.mean((low <= true + 1e-12) & (true <= high + 1e-12))
        for low, high in ((low, high), (t_low, t_high))
    )
    width = np.mean(high - low) / np.mean(t_high - t_low)
    return f"{held:.3f} (t {t_held:.3f}), {width:.1f}"


def main() -> None:
    args = common.parse(__doc__, repetitions=1000, identities="20,37,100,300,1000")
    numbers = [int(num) for num in args.identities.split(",")]
    rows = [
        [name, *(measure(name, num, args.repetitions) for num in numbers)]
        for name in (*PRECISIONS, *GAPS)
    ]
    common.write_table(["population", *(f"{num:,}" for num in numbers)], rows)


if __name__ == "__main__":
    main()
