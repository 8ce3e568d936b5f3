"""Which of several processes this is, by its flags, and what it reads; nothing needs jax."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vidjax.errors import UserError


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
        """Returns the place that flags name, None without any."""
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
    """Yields a process's blocks: the bucket, and [n] int places in `bucket`, n from 0 to `rows`.

    `bucket` [N] int has the bucket of each clip in stored order, -1 for one that is left out. The n
    clips of a bucket form ceil(n / (rows * parts)) blocks in every process. A process takes a range
    of them, so that it opens few files: every parts-th block would lie in nearly all files. Hence
    blocks at the end of the last ranges may be empty.
    """
    for number in range(bucket.max(initial=-1) + 1):
        places = np.flatnonzero(bucket == number)
        num_blocks = -(-len(places) // (rows * share.parts))
        first = share.number * num_blocks * rows
        for at in range(first, first + num_blocks * rows, rows):
            yield number, places[at : at + rows]


def own_places(bucket: np.ndarray, rows: int, share: Share) -> np.ndarray:
    """Returns [n] int, places of all clips that a process reads; arguments as of `own_blocks`."""
    none = np.zeros(0, np.intp)
    return np.concatenate([none, *(places for _, places in own_blocks(bucket, rows, share))])


def own_rows(batch_size: int, share: Share) -> slice:
    """Returns the rows of every training batch that a process reads."""
    if batch_size % share.parts:
        raise UserError(
            f"config.batch_size={batch_size} cannot be split over {share.parts} processes: "
            "use a multiple"
        )
    count = batch_size // share.parts
    return slice(share.number * count, (share.number + 1) * count)
