"""Joins this process to the others of a run, and ends all of them together."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from vidjax.cluster import processes, watch
from vidjax.cluster.share import AUTO, Place
from vidjax.errors import UserError

START_SECONDS = 300  # within which all processes must have started
# Far more than `watch` waits: jax ends a process by an abort, without a message.
JAX_SECONDS = 300
# What is said where jax aborts this process.
LOST = f"vidjax: process 0, which coordinates the others, is gone\n{watch.REMEDY}"


class Group:
    """The processes of a run, which this one has joined."""

    def __init__(self, complain: Callable[[str], None]):
        """Starts to watch the others, for whose errors `complain` prints at most three lines."""
        self._watch = watch.Watch(jax.process_count(), jax.process_index(), complain)

    def end(self) -> None:
        """Waits until all processes are done, and leaves them."""
        processes.barrier()
        self._watch.stop()
        jax.distributed.shutdown()

    def fail(self, error: Exception, text: str) -> None:
        """Tells the others why this process ends.

        Where a collective failed, since another process is gone, this one ends here.
        """
        if _is_of_connection(error):
            self._watch.find_gone()
        lines = text.splitlines() or [type(error).__name__]
        self._watch.tell("\n".join(lines[:2]))

    def tell_of_signal(self, signum: int) -> None:
        """Tells the others that a signal ends this process at once."""
        self._watch.tell(f"stopped by {signal.Signals(signum).name}\n{watch.REMEDY}")


def join(place: Place, complain: Callable[[str], None]) -> Group:
    """Joins this process to the others. Call it before jax looks for devices.

    The process ends where not all have started within START_SECONDS.
    """
    # Its handler of SIGTERM would take the place of ours: the processes agree on a step themselves.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(START_SECONDS, _too_late, [place, complain])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **_arguments(place),
            initialization_timeout=START_SECONDS + 60,
            heartbeat_timeout_seconds=JAX_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        if place.coordinator == AUTO:
            raise UserError(
                f"--coordinator=auto: no launcher of a cluster says who the others are: {reason}\n"
                "name them: --coordinator=HOST:PORT --num_processes=N --process_id=I"
            ) from error
        raise UserError(
            f"--coordinator={place.coordinator}: cannot join the other processes: {reason}\n"
            "is the port free, and is each --process_id used once?"
        ) from error
    finally:
        timer.cancel()
    return Group(complain)


def _arguments(place: Place) -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize`, none where the launcher knows them."""
    if place.coordinator == AUTO:
        return {}
    host, _, port = place.coordinator.rpartition(":")
    is_local = host in ("localhost", "127.0.0.1", "[::1]")
    if place.process_id == 0:
        _check_free("127.0.0.1" if is_local else "", int(port))
    return {
        "coordinator_address": place.coordinator,
        "num_processes": place.num_processes,
        "process_id": place.process_id,
        "cluster_detection_method": "deactivate",
        # By default the port is open to all machines.
        "coordinator_bind_address": place.coordinator if is_local else None,
    }


def _check_free(host: str, port: int) -> None:
    """Raises ValueError if a port of this machine is in use, where jax may crash."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--coordinator: cannot listen on port {port}: {error.strerror}\n"
                "choose another port, the same in every process"
            ) from error


def _too_late(place: Place, complain: Callable[[str], None]) -> NoReturn:
    who = "all processes" if place.num_processes is None else f"all {place.num_processes} processes"
    complain(
        f"--coordinator={place.coordinator}: not {who} have started within {START_SECONDS} s\n"
        "start each with the same --coordinator and --num_processes, and its own --process_id,\n"
        "where it can reach the machine of process 0"
    )
    os._exit(2)


def _is_of_connection(error: BaseException | None) -> bool:
    """Returns True if a collective may have failed, since another process is gone."""
    if error is None or "RESOURCE_EXHAUSTED" in str(error):
        return False
    names = ("Gloo", "DEADLINE_EXCEEDED", "UNAVAILABLE", "Connection")
    if isinstance(error, RuntimeError) or any(name in str(error) for name in names):
        return True
    return _is_of_connection(error.__cause__)
