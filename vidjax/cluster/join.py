"""Joins this process to the others of a run, watches them, and ends all of them together."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax

from vidjax.cluster import processes
from vidjax.cluster.processes import AUTO, Place
from vidjax.errors import UserError

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 40.0  # after which a process counts as gone: more than a machine under load needs
# The same once a collective has failed, so that it is known that some process is gone.
FAILED_SILENCE_SECONDS = 8.0
GONE = 4  # exit code: another process is gone
REMEDY = "run the same command in every process: a run goes on from its last checkpoint"
_KEY = "vidjax/alive"
START_SECONDS = 300  # within which all processes must have started
# Far more than `Group` waits: jax ends a process by an abort, without a message.
JAX_SECONDS = 300
# What is said where jax aborts this process.
LOST = f"vidjax: process 0, which coordinates the others, is gone\n{REMEDY}"


class Beat(NamedTuple):
    """A process's sign of life: its number, the machine and PID, and why the process ends if so."""

    beat: int
    where: str
    end: str = ""


class Group:
    """The processes of a run that this one has joined; each of them watches the others.

    If the coordinator is gone, jax aborts a process with a stack trace; if another process is gone,
    a collective waits for it for ever. So every process writes a sign of life to the shared store
    once a second, and reads those of the others. All of them report an error that ends one.
    """

    def __init__(self, count: int, number: int, complain: Callable[[str], None]):
        self._count, self._number, self._complain = count, number, complain
        self._where = f"{socket.gethostname()}, process ID {os.getpid()}"
        self._heard = dict.fromkeys(set(range(count)) - {number}, time.monotonic())
        self._last: dict[int, Beat] = {}
        self._beats = 0
        self._ended = self._failed = False
        self._writing = threading.Lock()  # a beat under way must not follow the reason of the end
        # Two threads: a call to a stopped coordinator may never return.
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True).start()

    def end(self) -> None:
        """Waits until all processes are done, and disconnects from them."""
        processes.barrier()
        self.stop()
        jax.distributed.shutdown()

    def stop(self) -> None:
        """Stops watching the other processes."""
        self._ended = True

    def fail(self, error: Exception, text: str) -> None:
        """Tells the others `text`, why this process ends, unless one of them is gone."""
        if _is_of_connection(error):
            self.find_gone()
        lines = text.splitlines() or [type(error).__name__]
        self.tell("\n".join(lines[:2]))

    def tell_of_signal(self, signum: int) -> None:
        """Tells the others that a signal ends this process at once."""
        self.tell(f"stopped by {signal.Signals(signum).name}\n{REMEDY}")

    def tell(self, end: str) -> None:
        """Tells the others why this process ends; process 0 also waits until they write no more."""
        self._ended = True
        writer = threading.Thread(target=self._write, args=(end,), daemon=True)
        writer.start()
        writer.join(BEAT_SECONDS)
        if self._number == 0:  # the table is lost with this process
            self._wait_for_silence()

    def find_gone(self) -> None:
        """Waits for `_look` to end this process because another one is gone; returns if none is."""
        self._failed = True
        time.sleep(FAILED_SILENCE_SECONDS + 4 * BEAT_SECONDS)

    def _wait_for_silence(self) -> None:
        """Waits until no other process writes any more, some seconds at most."""
        for _ in range(5):
            before = dict(self._last)
            time.sleep(2 * BEAT_SECONDS)
            with contextlib.suppress(Exception):
                self._read()
            if self._last == before:
                return

    def _write(self, end: str = "") -> None:
        with self._writing:
            if self._ended and not end:
                return
            self._beats += 1
            beat = json.dumps(Beat(self._beats, self._where, end))
            processes.key_value_store().key_value_set(
                f"{_KEY}/{self._number}", beat, allow_overwrite=True
            )

    def _beat(self) -> None:
        """Writes that this process is there, and reads who else is."""
        while not self._ended:
            with contextlib.suppress(Exception):  # the coordinator is gone: `_look` finds it silent
                self._write()
                self._read()
            time.sleep(BEAT_SECONDS)

    def _read(self) -> None:
        for key, text in processes.key_value_store().key_value_dir_get(f"{_KEY}/"):
            other, beat = int(key.rpartition("/")[2]), Beat(*json.loads(text))
            if beat != self._last.get(other) and other != self._number:
                self._last[other], self._heard[other] = beat, time.monotonic()

    def _look(self) -> None:
        """Ends this process when another one has ended or is silent."""
        while not self._ended:
            time.sleep(BEAT_SECONDS / 2)
            for other, beat in sorted(dict(self._last).items()):
                if beat.end:
                    self._give_up(f"process {other} ended: {beat.end}")
            limit = FAILED_SILENCE_SECONDS if self._failed else SILENCE_SECONDS
            heard = dict(self._heard)  # `_beat` changes it meanwhile
            silent = [n for n, at in heard.items() if time.monotonic() - at > limit]
            if silent:
                # Where the coordinator is gone, nothing is heard of anybody.
                other = min(silent)
                where = self._last[other].where if other in self._last else "never heard of"
                self._give_up(
                    f"process {other} of {self._count} ({where}) is gone: "
                    f"nothing was heard of it for {limit:.0f} s\n{REMEDY}"
                )

    def _give_up(self, reason: str) -> None:
        """Ends this process, unless the main thread does so and says why."""
        if not self._ended:
            self._complain(reason)
            os._exit(GONE)


def join(place: Place, complain: Callable[[str], None]) -> Group:
    """Joins this process to the others within START_SECONDS; call it before jax finds devices."""
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
    return Group(jax.process_count(), jax.process_index(), complain)


def _arguments(place: Place) -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize`; {} if the launcher provides them."""
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
    """Raises ValueError if a port of this machine is in use: jax might crash then."""
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
    """Returns True if the error may mean that a collective failed because a process is gone."""
    if error is None or "RESOURCE_EXHAUSTED" in str(error):
        return False
    names = ("Gloo", "DEADLINE_EXCEEDED", "UNAVAILABLE", "Connection")
    if isinstance(error, RuntimeError) or any(name in str(error) for name in names):
        return True
    return _is_of_connection(error.__cause__)
