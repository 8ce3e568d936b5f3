"""Connects processes that train or evaluate a run together, by `jax.distributed`.

Each process runs the same program on the same clips, and computes on its devices. Process 0 writes
the files of the run, except that Orbax writes the arrays of a checkpoint in every process. If a
process ends with an error, JAX ends the other processes.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from vidjax.utils import files
from vidjax.utils.errors import UserError

FLAGS = ("coordinator", "num_processes", "process_id")


def join_processes(args: argparse.Namespace) -> None:
    """Joins the other processes of a run, if --coordinator is set. Call this before using JAX."""
    given = {name: getattr(args, name, None) for name in FLAGS}
    if all(value is None for value in given.values()):
        return
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        raise UserError(
            f"a run of several processes also needs {', '.join(missing)}\n"
            "give each process --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--coordinator={args.coordinator} is not an address: write HOST:PORT, such as "
            "--coordinator=a:9876"
        )
    import jax

    # The service would replace our handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--coordinator={args.coordinator}: cannot join the other processes: {reason}\n"
            "name the machine of process 0 and a free port; use each --process_id once"
        ) from error


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
