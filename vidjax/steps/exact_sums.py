"""Sums of what each clip contributes, exact in units of 2**-20: their order does not matter.

A sum of floats depends on the order in which they are added, and so on how clips form blocks and
parts. Here every contribution is rounded to a whole number of units first.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from vidjax import devices
from vidjax.batch import Array

UNIT = 2.0**-20
MOST = 1024  # magnitude of a contribution; larger ones count as this
_DIGITS, _NUM_DIGITS = 10, 3  # a contribution is three digits of 10 bits, which int32 can sum


def add_up(values: Array, mask: Array) -> Array:
    """Returns the sum over the clips of a block, [3, ...] int32: digits of the number of units.

    Values are [B, ...] float with B below 2**21. NaN, Inf and clips outside the mask count as 0.
    """
    counts = mask.reshape(-1, *[1] * (values.ndim - 1)) & jnp.isfinite(values)
    units = jnp.round(jnp.clip(jnp.where(counts, values, 0.0), -MOST, MOST) / UNIT)
    units = units.astype(jnp.int32)
    low = (1 << _DIGITS) - 1
    digits = (units & low, (units >> _DIGITS) & low, units >> 2 * _DIGITS)
    return jnp.stack([jnp.sum(digit, axis=0) for digit in digits])


def add_to(totals: dict[str, np.ndarray], sums: Mapping[str, Array]) -> None:
    """Adds sums of a block, name -> [3, ...], to name -> [...] int64 numbers of units."""
    for name, digits in sums.items():
        units = devices.fetch(digits).astype(np.int64)
        units = sum(units[i] << i * _DIGITS for i in range(_NUM_DIGITS))
        totals[name] = totals.get(name, 0) + np.asarray(units)
