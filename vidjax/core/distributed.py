"""Several processes that train or evaluate one run together, by `jax.distributed`.

Each process runs the same program on the same clips, and computes on its own devices. Process 0
writes all files of the run; of a checkpoint, Orbax writes the arrays of every process. If a process
ends by an error, JAX ends the others. One process is the usual case.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from vidjax.utils import files
from vidjax.utils.errors import UserError

FLAGS = ("coordinator", "num_processes", "process_id")


def join(args: argparse.Namespace) -> None:
    """Joins the other processes if `args` has FLAGS with values; before JAX looks for devices."""
    given = {name: getattr(args, name, None) for name in FLAGS}
    if all(value is None for value in given.values()):
        return
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        raise UserError(
            f"{', '.join(missing)}: missing; several processes need "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    import jax

    # Its handler of SIGTERM would take the place of ours.
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
    jax = sys.modules.get("jax")  # a process that never imported jax has joined nobody
    return jax.process_count() if jax and jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Returns True in process 0, which writes the files of the run."""
    return count() == 1 or sys.modules["jax"].process_index() == 0


def largest(*values: int) -> list[int]:
    """Returns the largest of each value, magnitude < 2**31, over all processes; waits for them."""
    if count() == 1:
        return list(values)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(values, np.int32)).max(axis=0).tolist()


def barrier() -> None:
    """Waits until all processes are here."""
    largest(0)


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError in all processes if their `facts`, values of JSON, differ."""
    for name, value in facts.items():
        number = int(files.sha256_json(value)[:7], 16)
        if largest(number, -number) != [number, -number]:
            raise UserError(
                f"{name} is not the same in all processes\n"
                "start them with the same command, except --process_id, and the same data"
            )
