"""The folder of a run, and helpers to read and write files.

One process holds the folder at a time. A file is written whole or not at all. The helpers for files
know nothing about runs; any part of vidjax may use them.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def make_workdir(path: str | os.PathLike[str]) -> Path:
    """Makes the folder of a run, if needed, and checks that it can be written.

    Returns:
      The absolute path of the folder.

    Raises:
      ValueError: the path is a file, or the folder cannot be written.
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
    """Locks a run's folder for this process.

    The kernel releases the lock when the process ends, however it ends.

    Raises:
      ValueError: another process holds the lock.
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
        with contextlib.suppress(OSError):  # the lock holds on a full disk, too
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a text file: its path shows either the old content or all of the new."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file: its path shows either the old content or all of the new.

    Raises:
      OSError: the file cannot be written; the message names it.
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
    """Adds bytes to the end of an unbuffered file: all of them, or none if the disk is full.

    Raises:
      OSError: the file cannot be written; the message names it.
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


def _cannot_write(path: object, error: OSError) -> OSError:
    named = OSError(f"cannot write '{path}': {error.strerror}")
    named.errno = error.errno
    return named


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, whole or not at all; the value may hold numpy scalars and arrays."""
    write_text(path, to_json(value))


def to_json(value: object) -> str:
    """Returns a value as JSON text; it may hold numpy scalars and arrays."""
    return json.dumps(value, indent=2, default=_plain) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"no JSON form of {type(value).__name__}")


def read_json(path: Path, kind: type[T] = dict) -> T:
    """Reads a JSON file that may be damaged.

    Args:
      path: the file.
      kind: the type that the file must hold: `dict`, `list`, or `object` for any.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not JSON, or holds another type.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' is damaged: it holds no {kind.__name__}")
    return value
