"""The folder of a run: its lock, files written whole or not at all, the signals that end it."""

import contextlib
import fcntl
import io
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np


def make_workdir(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a run's folder, which exists and can be written.

    Raises:
      ValueError: the path is a file, or cannot be written.
    """
    workdir = Path(path).expanduser().absolute()
    try:
        if workdir.exists() and not workdir.is_dir():
            raise ValueError(f"--workdir: '{workdir}' is a file, not a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--workdir: cannot write in '{workdir}': {error.strerror}") from error
    return workdir


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds a run's folder for this process; the kernel lets go of it however the process ends.

    Raises:
      ValueError: another process holds it.
    """
    path = workdir / ".lock"
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            raise ValueError(f"--workdir: '{workdir}' is in use by {owner}") from None
        except OSError as error:
            raise ValueError(f"cannot lock '{path}': {error.strerror}") from error
        with contextlib.suppress(OSError):  # a full disk: it is held all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a file so that its name shows either what was there before or the whole new text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that its name shows what was there before or all of the new content.

    Raises:
      OSError: it cannot be written; the message names it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def append(file: io.FileIO, content: bytes) -> None:
    """Writes at the end of an unbuffered file: all of it or, where the disk is full, nothing.

    Raises:
      OSError: it cannot be written; the message names the file.
    """
    before = file.seek(0, os.SEEK_END)
    left = content
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise _cannot_write(file.name, error) from error


def _cannot_write(path: Any, error: OSError) -> OSError:
    named = OSError(f"cannot write '{path}': {error.strerror}")
    named.errno = error.errno
    return named


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all; numpy scalars and arrays are allowed."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Returns a value as JSON; numpy scalars and arrays are allowed."""
    return json.dumps(value, indent=2, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"no JSON form of {type(value).__name__}")


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
