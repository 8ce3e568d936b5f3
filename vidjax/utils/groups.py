"""Groups values by their keys."""

from collections.abc import Hashable, Iterable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def group_by_key(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Groups pairs (key, value): returns key -> its values, in the order of `pairs`."""
    values_of: dict[K, list[V]] = {}
    for key, value in pairs:
        values_of.setdefault(key, []).append(value)
    return values_of
