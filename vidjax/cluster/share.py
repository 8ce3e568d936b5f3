"""What one of several processes reads. Nothing here needs jax."""

from typing import NamedTuple


class Share(NamedTuple):
    """The part of every batch that a process reads: part `number`, from 0, of `parts`."""

    number: int = 0
    parts: int = 1


WHOLE = Share()
