"""Compares the outputs of exported files with the outputs of vidjax."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from vidjax.utils.errors import UserError

TOLERANCE = 1e-5  # largest allowed difference, relative to max(1, |value|)


def difference(outputs: Mapping[str, ArrayLike], expected: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference between outputs and expected outputs, both name -> array.

    Differences are relative for values above 1, and absolute for smaller values. The result is inf
    if shapes differ, if an output is NaN, or if an infinite value differs.
    """
    worst = 0.0
    for name, output in outputs.items():
        value, target = np.asarray(output, np.float64), np.asarray(expected[name], np.float64)
        if value.shape != target.shape or np.isnan(value).any():
            return float("inf")
        finite = np.isfinite(target)
        if not np.array_equal(value[~finite], target[~finite]):
            return float("inf")
        gap = np.abs(value[finite] - target[finite])
        worst = max(worst, float(np.max(gap / np.maximum(1, np.abs(target[finite])), initial=0.0)))
    return worst


def check_tolerance(format_name: str, worst: float) -> None:
    """Raises UserError if `worst`, the largest difference of an output, is NaN or too large."""
    if not worst <= TOLERANCE:
        raise UserError(
            f"--format={format_name}: nothing was exported, because the outputs differ from vidjax "
            f"by {worst:.1e}, more than {TOLERANCE:.0e}\nchoose another format"
        )
