"""Notices that another process is gone, and ends this one with a message that says which.

jax would end it by an abort with a stack trace, or leave it waiting: a collective on the devices
has no limit of time. Here every process writes to the shared table once a second that it is there,
and reads what the others wrote. An error that ends one is told by all.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from vidjax.cluster import processes

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 40.0  # after which a process counts as gone: more than a machine under load needs
# The same once a collective has failed, so that it is known that some process is gone.
FAILED_SILENCE_SECONDS = 8.0
GONE = 4  # exit code: another process is gone
REMEDY = "run the same command in every process: a run goes on from its last checkpoint"
_KEY = "vidjax/alive"


class Beat(NamedTuple):
    """What a process writes of itself.

    Attributes:
      beat: a number that grows as long as the process is there.
      where: its machine and process ID.
      end: why it ends; "" while it works.
    """

    beat: int
    where: str
    end: str = ""


class Watch:
    """The threads that tell the others of this process, and notice when one of them is gone."""

    def __init__(self, count: int, number: int, complain: Callable[[str], None]):
        """Starts to watch."""
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

    def stop(self) -> None:
        """Ends the watch: all processes are done."""
        self._ended = True

    def tell(self, end: str) -> None:
        """Tells the others why this process ends, and waits until they have read it."""
        self._ended = True
        writer = threading.Thread(target=self._write, args=(end,), daemon=True)
        writer.start()
        writer.join(BEAT_SECONDS)
        if self._number == 0:  # the table is lost with this process
            self._wait_for_silence()

    def find_gone(self) -> None:
        """Waits until it is known which process is gone, after a collective has failed.

        It returns only if none is: then the collective failed for another reason.
        """
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
