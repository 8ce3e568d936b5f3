"""This process among the others: its number, and values that all of them agree on.

Every process runs the same program on its own devices. What depends on a clock, a file or a signal
differs between them, so one process decides it, or all of them together.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from vidjax.errors import UserError

Value = TypeVar("Value")  # of JSON, without tuples

WAIT_MS = 24 * 3600 * 1000  # `join.Group` ends it long before, if another process is gone
ROUND_SECONDS = 1.0
_serial = itertools.count()  # every process makes the same calls in the same order


def process_count() -> int:
    """Returns the number of processes that work on the run."""
    # What never imported jax has joined nobody, and need not import it.
    jax = sys.modules.get("jax")
    return jax.process_count() if jax and jax.distributed.is_initialized() else 1


def process_index() -> int:
    """Returns the number of this process, from 0."""
    jax = sys.modules.get("jax")
    return jax.process_index() if jax and jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Returns True in the one process that writes the files of the run."""
    return process_index() == 0


class KeyValueStore(Protocol):
    """The table of keys and values that all processes share, in the memory of the first one."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Writes a value."""
        ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Returns a value, as soon as somebody has written it."""
        ...

    def key_value_delete(self, key: str) -> None:
        """Removes a value."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns the keys that begin so, with their values."""
        ...


def key_value_store() -> KeyValueStore:
    """Returns jax's connection to the table."""
    # No public function leads there; Orbax takes the same way.
    from jax._src import distributed

    return cast(KeyValueStore, distributed.global_state.client)


def allgather_json(value: Value) -> list[Value]:
    """Returns the values of all processes, in their order, in every process.

    The processes may arrive hours apart: a collective on the devices would not wait so long.
    """
    if process_count() == 1:
        return [value]
    serial, shared = next(_serial), key_value_store()
    if serial > 1:  # all have read it: they have come as far as the call before this one
        shared.key_value_delete(_key(serial - 2, process_index()))
    shared.key_value_set(_key(serial, process_index()), json.dumps(value))
    found = [
        shared.blocking_key_value_get(_key(serial, n), WAIT_MS) for n in range(process_count())
    ]
    return [json.loads(text) for text in found]


def _key(serial: int, process: int) -> str:
    return f"vidjax/gather/{serial}/{process}"


def barrier() -> None:
    """Waits until all processes are here."""
    allgather_json(None)


def run_on_first(function: Callable[[], Value]) -> Value:
    """Returns what a function returns in the first process; the others do not call it.

    Where it raises, the first process ends, and `join.Group` ends the others with its message.
    """
    if process_count() == 1:
        return function()
    values: list[Any] = allgather_json(function() if is_first() else None)
    return values[0]


def broadcast_int(value: int) -> int:
    """Returns an integer of the first process, by the devices: fast enough for every dispatch."""
    return allgather_ints([value])[0][0]


def allgather_ints(values: list[int]) -> list[list[int]]:
    """Returns integers (below 2**31, equally many in each) of all processes, by the devices."""
    if process_count() == 1:
        return [values]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(values, np.int32)).tolist()


class Rounds:
    """Rounds in which all processes tell each other some integers, about once a second.

    One process needs nobody: every call is a round.
    """

    def __init__(self) -> None:
        self._next = 0
        self._last: tuple[int, float] | None = None  # step and time of the last round

    def exchange(self, step: int, values: list[int]) -> list[list[int]]:
        """Returns all processes' integers (below 2**31) at a same step; [] if it has no round."""
        if step < self._next:
            return []
        if process_count() == 1:
            return [values]
        wait = 1  # a resumed run begins at any step, and its first one compiles
        if self._last:
            steps, seconds = step - self._last[0], time.monotonic() - self._last[1]
            # A round after few steps, which were fast by chance, does not put off the next by many.
            wait = min(2 * steps, max(1, int(steps * ROUND_SECONDS / max(seconds, 1e-3))))
        rows = allgather_ints([wait, *values])
        self._next, self._last = step + rows[0][0], (step, time.monotonic())
        return [row[1:] for row in rows]


def check_same(facts: Mapping[str, Any], remedy: str) -> None:
    """Checks that all processes were started with the same values."""
    plain = json.loads(json.dumps(dict(facts)))
    for other, theirs in enumerate(allgather_json(plain)):
        for name in sorted(plain.keys() | theirs.keys()):
            here, there = plain.get(name), theirs.get(name)
            if here != there:
                raise UserError(
                    f"{name}: {_shown(here)} in process {process_index()}, {_shown(there)} in "
                    f"process {other}\n{remedy}"
                )


def _shown(value: object) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
