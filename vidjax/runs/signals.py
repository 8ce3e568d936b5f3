"""Makes a signal, such as Ctrl-C (SIGINT) or SIGTERM, save and stop a run.

The signals are listed in `exit_codes.SIGNALS`. A second SIGINT or SIGTERM ends a command. In a
program of a user, the second signal has its usual effect: in a notebook, Ctrl-C raises
KeyboardInterrupt. SIGHUP and SIGUSR1 may be repeated without an effect: if a terminal is closed,
the shell and the system both send SIGHUP.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from vidjax.utils import distributed
from vidjax.utils.errors import Expected
from vidjax.utils.exit_codes import SIGNALS, stop_at_once

ENDING = (signal.SIGINT, signal.SIGTERM)  # as a second signal, these end the process


class Interruption:
    """Remembers the signal that asks a run to stop.

    Attributes:
      signum: the number of the signal, or None. If several processes train the run, the method
        `agree` sets `signum` in all of them.
      at_once: True while the process may end without saving, because no training would be lost.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_once = False
        self._received: int | None = None
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Stores a signal. A second SIGINT or SIGTERM has its usual effect."""
        if signum in ENDING:
            self.restore_handlers()
        self._received = signum
        if distributed.count() == 1:
            self.signum = signum

    def replace_handlers(self) -> None:
        """Makes `handle` the handler of all signals in SIGNALS."""
        for number in self._handlers:
            signal.signal(number, self.handle)

    def restore_handlers(self) -> None:
        """Restores the signal handlers that were set before `replace_handlers`."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def agree(self, *, save_due: bool) -> bool:
        """Returns True if the processes of the run must save a checkpoint now.

        All processes must save if one process got a signal, or passes `save_due=True`. All
        processes must call the method at the same step, and get the same answer.
        """
        signum, due = distributed.max_over_processes(self._received or 0, int(save_due))
        self.signum = signum or None
        return bool(signum or due)

    def raise_if_interrupted(self, step: int) -> None:
        """Raises Interrupted if a signal arrived. `step` is the last step that was saved."""
        if self.signum is not None:
            raise Interrupted(self.signum, step)


class Interrupted(Expected):
    """A signal stopped a run after its state was saved. `exit_code` is 128 plus `signum`."""

    def __init__(self, signum: int, step: int):
        super().__init__(signum, step)  # for pickle, which calls `__init__` with these arguments
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        return f"the run stopped at step {self.args[1]}\nto resume, run the same command"


_interruption: Interruption | None = None  # of the training loop that runs now


@contextlib.contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Yields an `Interruption` that stores the signals of this process.

    If the caller is not the main thread, no signals are stored, because Python allows signal
    handlers only in the main thread.
    """
    global _interruption
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return
    interruption = _interruption = Interruption()
    interruption.replace_handlers()
    try:
        yield interruption
    finally:
        _interruption = None
        interruption.restore_handlers()


def end_on_signals() -> None:
    """Makes the signals in `exit_codes.SIGNALS` end this process immediately.

    In a `with` block of `catch_interruption`, the first signal saves the run, and only a second
    signal ends the process. A thread waits for the signals, because XLA can compile for minutes,
    and Python runs no signal handler in this time.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def read() -> None:
        stored = None
        while True:
            signum = os.read(reader, 1)[0]
            interruption = _interruption
            if signum not in SIGNALS:
                continue
            is_second = stored is interruption and signum in ENDING
            if interruption is None or interruption.at_once or is_second:
                stop_at_once(signum)
            stored = interruption

    threading.Thread(target=read, daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, lambda signum, frame: None)  # the thread reads it from the pipe
