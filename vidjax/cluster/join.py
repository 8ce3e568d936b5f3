"""Joins this process to the others of a run, and ends all of them together."""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from vidjax import messages
from vidjax.cluster import chatter, watch

AUTO = "auto"  # the address that stands for what the launcher of the cluster says
START_SECONDS = 300  # within which all processes must have started
# Far more than `watch` waits: jax ends a process by an abort, without a message.
JAX_SECONDS = 300
LOST = (
    "vidjax: process 0, which coordinates the others, is gone or cannot be reached\n" + watch.REMEDY
)

_tried = False  # to join
_watch: watch.Watch | None = None  # that of the joined process


class Place(NamedTuple):
    """The place of this process among those of a run: the flags of the command.

    Attributes:
      coordinator: `HOST:PORT` of process 0, or AUTO.
      count: number of processes; None with AUTO.
      number: number of this process, from 0; None with AUTO.
    """

    coordinator: str
    count: int | None
    number: int | None

    @classmethod
    def parse(
        cls, coordinator: str | None, count: str | None, number: str | None
    ) -> "Place | None":
        """Returns the place that flags name, None without any.

        Raises:
          ValueError: a flag is missing, or is no number or no address.
        """
        flags = {"--coordinator": coordinator, "--num_processes": count, "--process_id": number}
        given = [flag for flag, value in flags.items() if value is not None]
        if not given:
            return None
        if coordinator == AUTO and given == ["--coordinator"]:
            return cls(AUTO, None, None)
        missing = [flag for flag in flags if flag not in given]
        if missing or coordinator == AUTO:
            raise ValueError(
                f"{', '.join(given)}: several processes need all of {', '.join(flags)},\n"
                "or --coordinator=auto alone under Slurm, Open MPI, Kubernetes or on a TPU pod"
            )
        host, colon, port = str(coordinator).rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(
                f"--coordinator={coordinator}: not HOST:PORT\n"
                "name the machine of process 0 and a free port: --coordinator=10.0.0.1:9876"
            )
        numbers = []
        for flag, value in (("--num_processes", count), ("--process_id", number)):
            if not str(value).isdecimal():
                raise ValueError(f"{flag}={value}: not a number from 0 on")
            numbers.append(int(str(value)))
        if numbers[1] >= numbers[0]:
            raise ValueError(
                f"--process_id={number}: must be below --num_processes={count}\n"
                "the processes have the numbers 0, 1, ... of one each"
            )
        return cls(str(coordinator), *numbers)


@contextmanager
def joined(place: Place | None, *, debug: bool = False) -> Iterator[None]:
    """Joins this process to the others; at the end waits until all of them are done.

    Where this process fails, the others are told why, and end. Where another one is gone, this one
    ends with the exit code `watch.GONE`.

    Args:
      place: the place of this process; None for one process, which needs nothing of this.
      debug: True to print what C++ libraries print, too.

    Raises:
      ValueError: the address is in use or unknown, or another process has the same number.
    """
    if place is None:
        yield
        return
    if not debug:
        chatter.divert(LOST)
    _start(place)
    try:
        yield
    except Exception as error:
        from vidjax.run.signals import Interrupted  # it needs nothing of jax

        if isinstance(error, Interrupted):  # of all processes, at the same step
            _end()
        else:
            _fail(error)
        raise
    _end()


def tell_of_signal(name: str) -> None:
    """Tells the others that a signal ends this process at once.

    Args:
      name: the name of the signal.
    """
    if _watch:
        _watch.tell(f"stopped by {name}\n{watch.REMEDY}")


def leave(code: int) -> None:
    """Ends this process with an exit code where it would wait for the others, which are ending."""
    if _tried and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start(place: Place) -> None:
    """Connects to the others, and starts to watch them."""
    global _tried, _watch
    import jax

    _tried = True
    # Its handler of SIGTERM would take the place of ours: `TrainingRun` agrees on a step itself.
    jax.config.update("jax_enable_preemption_service", False)
    host = place.coordinator.rpartition(":")[0]
    is_local = host in ("localhost", "127.0.0.1", "[::1]")
    timer = threading.Timer(START_SECONDS, _too_late, [place])
    timer.daemon = True
    timer.start()
    if place.number == 0 and is_local:
        _check_free(place.coordinator)
    known = {} if place.coordinator == AUTO else {
        "coordinator_address": place.coordinator,
        "num_processes": place.count,
        "process_id": place.number,
        "cluster_detection_method": "deactivate",
        # By default the port is open to all machines.
        "coordinator_bind_address": place.coordinator if is_local else None,
    }  # fmt: skip
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=START_SECONDS + 60,
            heartbeat_timeout_seconds=JAX_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"--coordinator={place.coordinator}: cannot join the other processes: {reason}\n"
            "is the port free, and is each --process_id used once?"
        ) from error
    timer.cancel()
    _watch = watch.Watch(jax.process_count(), jax.process_index())


def _check_free(address: str) -> None:
    """Raises ValueError if a port of this machine is in use."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise ValueError(
            f"--coordinator={address}: {error.strerror}\n"
            "choose another port, the same in every process"
        ) from error


def _too_late(place: Place) -> NoReturn:
    who = "all processes" if place.count is None else f"all {place.count} processes"
    messages.complain(
        f"--coordinator={place.coordinator}: not {who} have started within {START_SECONDS} s\n"
        "start each with the same --coordinator and --num_processes, and its own --process_id,\n"
        "where it can reach the machine of process 0"
    )
    os._exit(2)


def _end() -> None:
    """Waits until all processes are done, and leaves them."""
    import jax

    from vidjax.cluster import members

    global _tried, _watch
    members.barrier()
    assert _watch
    _watch.stop()
    jax.distributed.shutdown()
    _tried, _watch = False, None


def _fail(error: Exception) -> None:
    """Tells the others of an error, unless it is that another process is gone."""
    assert _watch
    if _is_of_connection(error):
        _watch.find_gone()
    lines = messages.text_of(error).splitlines() or [type(error).__name__]
    _watch.tell("\n".join(lines[:2]))


def _is_of_connection(error: BaseException | None) -> bool:
    """Returns True if a collective may have failed, since another process is gone."""
    if error is None or messages.is_memory(error):
        return False
    names = ("Gloo", "DEADLINE_EXCEEDED", "UNAVAILABLE", "Connection")
    if isinstance(error, RuntimeError) or any(name in str(error) for name in names):
        return True
    return _is_of_connection(error.__cause__)
