"""The folder of a run, and helpers to read and write files.

One process holds the folder at a time. A file is written whole or not at all. The helpers for files
know nothing about runs; any part of vidjax may use them.
"""

import contextlib
import fcntl
import io
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vidjax import files
from vidjax.cluster import members
from vidjax.errors import DiskError, UserError

LOCK_BYTES = 1000  # the longest text of a `.lock`
LOCK_SECONDS = 0.2
# What lies in a folder of features, and in no folder of a run.
DATA = ("labels.csv", "*_gt.txt", "*_train*.pickle", "train/*.npz", "val/*.npz", "test/*.npz",
        "*.parquet")  # fmt: skip


def make_workdir(path: str | os.PathLike[str], name: str = "workdir") -> Path:
    """Makes the folder of a run, or another one, if needed, and checks that it can be written.

    Args:
      path: the folder.
      name: what an error calls it.

    Returns:
      The absolute path of the folder.

    Raises:
      ValueError: the path is a file, or the folder cannot be written.
    """
    workdir = Path(path).expanduser().absolute()
    try:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{name} '{workdir}' is a file, not a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-test-{secrets.token_hex(4)}"
        _create(probe).close()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{name} cannot write in '{workdir}': {error.strerror}") from error
    return workdir


@contextlib.contextmanager
def lock(workdir: Path, name: str = "workdir") -> Iterator[None]:
    """Locks a run's folder, or another one, for this process.

    The first of several processes that work on a run holds the lock for all of them. The kernel
    releases it when that process ends, however it ends.

    Args:
      workdir: the folder.
      name: what an error calls it.

    Raises:
      ValueError: another process holds the lock, or `.lock` is no file of vidjax's.
    """
    if not members.is_first():
        yield
        return
    path = workdir / ".lock"
    with files.open_regular(path, os.O_RDWR | os.O_CREAT) as file:
        try:
            if not _lock(file):
                raise UserError(f"{name} '{workdir}' is in use by {lock_owner(file)}")
        except OSError as error:
            raise UserError(f"cannot lock '{path}': {error.strerror}") from error
        content = file.read(LOCK_BYTES)
        if content and not content.startswith(b"process "):
            raise UserError(f"'{path}' is not a lock that vidjax wrote\nmove the file elsewhere")
        owner = f"process {os.getpid()} on {socket.gethostname()}".encode().ljust(len(content))
        if owner != content and os.fstat(file.fileno()).st_nlink == 1:  # else it is others', too
            with contextlib.suppress(OSError):  # the lock holds on a full disk, too
                file.seek(0)
                file.write(owner)  # a file that is cut would be waited for, milliseconds
        yield


def _lock(file: io.FileIO) -> bool:
    """Locks an open file; returns False if another process keeps it locked.

    A check of the folder holds the lock for a moment (`check_run`): it is tried again that long.
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(LOCK_SECONDS / 20)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a run's folder and holds its lock; a new one that an error left empty is removed.

    Raises:
      ValueError: as `make_workdir` and `lock` do, or the folder is one of features.
    """
    refuse_data(Path(path).expanduser())
    is_new = members.is_first() and not Path(path).expanduser().exists()
    workdir = make_workdir(path)
    with lock(workdir):
        try:
            yield workdir
        except BaseException:
            if is_new and [file.name for file in workdir.glob("*")] == [".lock"]:
                shutil.rmtree(workdir)
            raise


def refuse_data(folder: Path) -> None:
    """Refuses a folder of features as that of a run, whose files would lie among the clips."""
    if files.exists(folder / "config.json"):
        return
    found = next((path for pattern in DATA for path in folder.glob(pattern)), None)
    if found:
        raise UserError(
            f"workdir '{folder}' is a folder of data: it holds {found.relative_to(folder)}\n"
            "name another one for the run: --workdir=FOLDER"
        )


def check_there(workdir: Path) -> None:
    """Refuses to go on where the folder of a run is no longer where it was, as if it were new.

    Raises:
      ValueError: it has been moved or removed while the run trains.
    """
    if not files.exists(workdir / "config.json"):
        raise UserError(
            f"'{workdir}' is not there any more: was it moved while it trained?\n"
            "run the same command with --workdir=FOLDER, where it is now, to go on from its last "
            "checkpoint"
        )


def lock_owner(file: io.FileIO) -> str:
    """Returns the process that an open `.lock` names, in one line of printable letters."""
    file.seek(0)
    text = file.read(LOCK_BYTES).decode(errors="replace")
    return "".join(filter(str.isprintable, text)).strip() or "another process"


def _create(path: Path) -> BinaryIO:
    """Creates a file under a name that nothing has, and opens it for writing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "wb")


def open_log(path: Path) -> io.FileIO:
    """Opens a log to append to, unbuffered; it need not exist yet.

    A log of several names (hard links), as a snapshot of the folder makes them, is copied first:
    the other names keep what they have.

    Raises:
      ValueError: it is a link, or no regular file.
    """
    if files.exists(path):
        with files.open_regular(path) as file:
            several = os.fstat(file.fileno()).st_nlink > 1
            if several:
                with writing(path) as copy:
                    shutil.copyfileobj(file, copy)
    return files.open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def clear(folder: Path) -> None:
    """Removes a folder with all that is in it; of a link in its place only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a text file: its path shows either the old content or all of the new."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Writes a file: its path shows either the old content or all of the new.

    Args:
      path: the file.
      content: all of it.
      sync: whether to wait until the disk has it: this then holds after a power cut, too.

    Raises:
      OSError: the file cannot be written; the message names it.
    """
    with writing(path, sync=sync) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Opens a file to write piece by piece; its path shows what was there before until the end.

    Args:
      path: the file.
      sync: as `write_bytes` takes it.

    Raises:
      OSError: the file cannot be written; the message names it.
    """
    # Not the number of the process: those of containers on a shared disk are often the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _create(partial) as file:
            yield file
            file.flush()
            if sync:
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


def _cannot_write(path: object, error: OSError) -> DiskError:
    named = DiskError(f"cannot write '{path}': {error.strerror}")
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
