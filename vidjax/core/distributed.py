"""Coordinates processes that train or evaluate a run together, by `jax.distributed`.

Each process runs the same program on the same clips, and computes on its devices. Process 0 writes
the files of the run, except that Orbax writes the arrays of a checkpoint in every process. If a
process ends with an error, `rendezvous` ends the other processes.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from vidjax.utils import files
from vidjax.utils.errors import UserError


def count() -> int:
    """Returns the number of processes that work on the run."""
    jax = sys.modules.get("jax")  # a process without jax has not joined others
    return jax.process_count() if jax and jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Returns True in process 0, which writes the files of the run."""
    return count() == 1 or sys.modules["jax"].process_index() == 0


def max_over_processes(*values: int) -> list[int]:
    """Waits for all processes. Returns the maximum of each int32 value over all processes."""
    if count() == 1:
        return list(values)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(values, np.int32)).max(axis=0).tolist()


def barrier() -> None:
    """Waits until all processes have called this function."""
    max_over_processes(0)


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError in all processes if their `facts` (setting -> JSON value) differ."""
    for name, value in facts.items():
        number = int(files.sha256_json(value)[:7], 16)
        if max_over_processes(number, -number) != [number, -number]:
            raise UserError(
                f"{name} is not the same in all processes\n"
                "start all processes with the same data and command, except for --process_id"
            )
