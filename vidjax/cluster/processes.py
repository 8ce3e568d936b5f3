"""This process among the others: its number, its share of the data, and values that all agree on.

Every process runs the same program on its own devices. What depends on a clock, a file or a signal
differs between them, so one process decides it, or all of them together.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from vidjax.errors import UserError

Value = TypeVar("Value")  # of JSON, without tuples
KeyValueStore: TypeAlias = Any  # a class of jax that has no types

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


def key_value_store() -> KeyValueStore:
    """Returns the client of the texts that all processes share, in the memory of process 0."""
    # No public function leads there; Orbax takes the same way.
    from jax._src import distributed

    return distributed.global_state.client


def allgather_json(value: Value) -> list[Value]:
    """Returns the `value` of every process, by process number; all processes get the same list.

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
    """Calls a function in process 0 alone, and returns its result in all processes.

    If it raises, process 0 ends, and `join.Group` ends the others with its message.
    """
    if process_count() == 1:
        return function()
    values: list[Any] = allgather_json(function() if is_first() else None)
    return values[0]


def allgather_ints(values: list[int]) -> list[list[int]]:
    """Returns the `values` of every process, equally many ints < 2**31, sent over the devices."""
    if process_count() == 1:
        return [values]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(values, np.int32)).tolist()


class Rounds:
    """Exchanges integers between all processes about once a second, at steps that all agree on.

    A single process has nobody to wait for: every call of `exchange` returns its own integers.
    """

    def __init__(self) -> None:
        self._next = 0
        self._last: tuple[int, float] | None = None  # step and time of the last round

    def exchange(self, step: int, values: list[int]) -> list[list[int]]:
        """Returns the `values` (< 2**31) of every process; [] if this step has no exchange."""
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
    """Raises ValueError, ending in `remedy`, unless all processes have the same `facts`."""
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


class Share(NamedTuple):
    """The part of every batch that a process reads: part `number`, from 0, of `parts`."""

    number: int = 0
    parts: int = 1


WHOLE = Share()


AUTO = "auto"  # the address that stands for what the launcher of the cluster says
FLAGS = ("--coordinator", "--num_processes", "--process_id")


class Place(NamedTuple):
    """`HOST:PORT` of process 0 (or AUTO alone), number of processes, number of this one."""

    coordinator: str
    num_processes: int | None
    process_id: int | None

    @classmethod
    def parse(
        cls, coordinator: str | None, count: str | None, number: str | None
    ) -> "Place | None":
        """Returns the place that the values of FLAGS name; None if no flag is given."""
        flags = dict(zip(FLAGS, (coordinator, count, number), strict=True))
        given = [flag for flag, value in flags.items() if value is not None]
        if not given:
            return None
        if coordinator == AUTO and given == ["--coordinator"]:
            return cls(AUTO, None, None)
        missing = [flag for flag in flags if flag not in given]
        if missing or coordinator == AUTO:
            raise UserError(
                f"{', '.join(given)}: several processes need all of {', '.join(FLAGS)},\n"
                "or --coordinator=auto alone under Slurm, Open MPI, Kubernetes or on a TPU pod"
            )
        host, colon, port = str(coordinator).rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(
                f"--coordinator={coordinator}: not HOST:PORT\n"
                "name the machine of process 0 and a free port: --coordinator=10.0.0.1:9876"
            )
        numbers = []
        for flag, value in (("--num_processes", count), ("--process_id", number)):
            if not str(value).isdecimal():
                raise UserError(f"{flag}={value}: not a number from 0 on")
            numbers.append(int(str(value)))
        if numbers[1] >= numbers[0]:
            raise UserError(
                f"--process_id={number}: must be below --num_processes={count}\n"
                "the processes have the numbers 0, 1, ... of one each"
            )
        return cls(str(coordinator), *numbers)


def own_blocks(bucket: np.ndarray, rows: int, share: Share) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (bucket number, [n] int indices into `bucket`) of a process's blocks, 0 <= n <= rows.

    `bucket` [N] int has the bucket of each clip in stored order, -1 for one that is left out. The M
    clips of a bucket form ceil(M / (rows * parts)) blocks in every process. A process takes blocks
    that follow each other, so that it opens few files: every parts-th block would lie in nearly all
    files. Hence the last blocks of the last processes may be empty.
    """
    for number in range(bucket.max(initial=-1) + 1):
        places = np.flatnonzero(bucket == number)
        num_blocks = -(-len(places) // (rows * share.parts))
        first = share.number * num_blocks * rows
        for at in range(first, first + num_blocks * rows, rows):
            yield number, places[at : at + rows]


def own_places(bucket: np.ndarray, rows: int, share: Share) -> np.ndarray:
    """Returns [n] int, indices into `bucket` of all clips that a process reads (`own_blocks`)."""
    none = np.zeros(0, np.intp)
    return np.concatenate([none, *(places for _, places in own_blocks(bucket, rows, share))])


def own_rows(batch_size: int, share: Share) -> slice:
    """Returns the rows of every training batch that a process reads; ValueError if uneven."""
    if batch_size % share.parts:
        raise UserError(
            f"config.batch_size={batch_size} cannot be split over {share.parts} processes: "
            "use a multiple"
        )
    count = batch_size // share.parts
    return slice(share.number * count, (share.number + 1) * count)
