"""SIGINT and SIGTERM: the first lets a run save its state, the second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interruption:
    """What a signal asked for.

    Attributes:
      signum: None until SIGINT or SIGTERM arrives.
      at_once: whether nothing is lost if the process ends now; the command then does (see
        `end_on_signals`).
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_once = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Notes the first signal; ends the process at once on the second."""
        del frame
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum

    def raise_if_asked(self, step: int) -> None:
        """Raises Interrupted if a signal arrived; `step` is the last one that was saved."""
        if self.signum is not None:
            raise Interrupted(self.signum, step)


class Interrupted(Exception):
    """A run stopped on a signal with its state saved; `exit_code` is what the shell expects."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.exit_code = 128 + signum


_interruption: Interruption | None = None  # of the loop that is running


@contextlib.contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Turns SIGINT and SIGTERM into a note that the loop reads after each step."""
    global _interruption
    interruption = _interruption = Interruption()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, interruption.handle) for number in signals}
    try:
        yield interruption
    finally:
        _interruption = None
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_on_signals() -> None:
    """Lets SIGINT and SIGTERM end this process at once, but for the first that a loop waits for.

    A thread sees to it: Python runs handlers between two of its own instructions only, and a
    compiler, which is none of them, takes minutes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_on_signals, args=(reader,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: None)  # the thread is told of it


def _end_on_signals(reader: int) -> None:
    noted = None
    while True:
        signum = os.read(reader, 1)[0]
        interruption = _interruption
        if signum not in (signal.SIGINT, signal.SIGTERM):
            continue
        if interruption is None or interruption.at_once or noted is interruption:
            os.write(2, b"vidjax: stopped\n")
            os._exit(128 + signum)
        noted = interruption
