"""Coordinates processes that train or evaluate a run together, by `jax.distributed`.

Each process runs the same program on the same clips, and computes on its own devices. Process 0
writes the files of the run, except that Orbax writes the arrays of a checkpoint in every process.
If a process ends with an error, `rendezvous` ends the other processes.
"""

import sys
from collections.abc import Mapping
from typing import Any

from vidjax.utils import files, rendezvous
from vidjax.utils.errors import UserError

MAX_WAIT_SECONDS = 7 * 24 * 3600


def join(coordinator: str, num_processes: int, process_id: int, coordinator_timeout: float) -> None:
    """Joins the other processes of a run. Call this before using JAX.

    Args:
      coordinator: the address of the first process, `HOST:PORT`.
      num_processes: the number of processes.
      process_id: the index of this process; the first has 0.
      coordinator_timeout: how long to wait for the other processes, in seconds.

    Raises:
      UserError: an argument is wrong, or the other processes cannot be reached.
    """
    count, index, seconds = num_processes, process_id, coordinator_timeout
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--coordinator={coordinator} is not an address: write HOST:PORT, such as "
            "--coordinator=a:9876"
        )
    if count < 1:
        raise UserError(f"--num_processes={count}: give the number of all processes, 1 or more")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index}: must be from 0 to {count - 1} for {count} processes\n"
            "give each process a different number"
        )
    if not 0 < seconds <= MAX_WAIT_SECONDS:
        raise UserError(
            f"--coordinator_timeout={seconds:g} is not a duration: give seconds, up to a week"
        )
    rendezvous.meet(coordinator, count, index, seconds)
    import jax

    # The service would replace our handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--coordinator={coordinator}: cannot join the other processes: {reason}\n"
            "give the machine of process 0 and a free port"
        ) from error


def count() -> int:
    """Returns the number of processes that work on the run."""
    jax = sys.modules.get("jax")  # a process without jax has not joined others
    return jax.process_count() if jax and jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Returns True in process 0. Process 0 writes the files of the run."""
    return count() == 1 or sys.modules["jax"].process_index() == 0


def max_over_processes(*values: int) -> list[int]:
    """Returns the maximum over all processes of each of `values`, which are int32.

    Every process must call this function. The call waits for the other processes.
    """
    if count() == 1:
        return list(values)
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(values, np.int32)).max(axis=0).tolist()


def barrier() -> None:
    """Waits until all processes have called this function."""
    max_over_processes(0)


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError in all processes if the processes have different `facts`.

    `facts` is a dict, name of a setting -> JSON value.
    """
    for name, value in facts.items():
        number = int(files.sha256_json(value)[:7], 16)
        if max_over_processes(number, -number) != [number, -number]:
            raise UserError(
                f"{name} is not the same in all processes\n"
                "start all processes with the same data and command, except for --process_id"
            )
