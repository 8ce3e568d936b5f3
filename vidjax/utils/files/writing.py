"""Writes files and folders whole or not at all; an error is an OSError that names the path."""

import contextlib
import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vidjax.utils.errors import DiskError, UserError
from vidjax.utils.files.reading import open_regular, read_json, sha256_json


def make_folder(path: str | os.PathLike[str], name: str = "workdir") -> Path:
    """Makes a folder if needed and returns its absolute path; errors call the folder `name`.

    Raises UserError if the folder is not writable.
    """
    workdir = Path(path).expanduser().absolute()
    try:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{name} '{workdir}' is a file, not a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"cannot write in the {name} '{workdir}': {error.strerror}") from error
    return workdir


def open_log(path: Path) -> io.FileIO:
    """Opens a log to append to, unbuffered; the log need not exist yet.

    If the log has other hard links, as snapshots make them, it is copied first. So the snapshots
    do not change.
    """
    if os.path.lexists(path):
        with open_regular(path) as file:
            is_shared = os.fstat(file.fileno()).st_nlink > 1
            if is_shared:
                with atomic_file(path) as copy:
                    shutil.copyfileobj(file, copy)
    return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all its content; if `folder` is a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def remove_ours(folder: Path, ours: str) -> bool:
    """Removes the files of a folder whose names match `ours`, a regular expression, in full.

    Then removes the folder if it is empty. Links are not followed: a link in the folder is removed
    itself, and a folder that is a link stays. Returns True if the folder is gone afterwards.
    """
    if not os.path.lexists(folder):
        return True
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        return False
    with os.scandir(folder) as entries:
        removable = [entry for entry in entries if re.fullmatch(ours, entry.name)]
    for entry in removable:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: a reader sees the old content or all of the new."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Writes a file atomically; `sync`: see `atomic_file`."""
    with atomic_file(path, sync=sync) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Yields a new file to write. If the context ends without an error, it replaces `path`.

    `sync` waits until the disk has the content, so that even a power cut leaves a whole file.
    """
    # The process number is no use: containers on a shared disk often have equal ones.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _make_disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def append(file: io.FileIO, content: bytes) -> None:
    """Adds bytes to the end of an unbuffered file: all of them, or none if the disk is full."""
    before = file.seek(0, os.SEEK_END)
    left = content
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise _make_disk_error(file.name, error) from error


def _make_disk_error(path: object, error: OSError) -> DiskError:
    with_number = DiskError(f"cannot write '{path}': {error.strerror}")
    with_number.errno = error.errno
    return with_number


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically; the value may contain numpy scalars and arrays."""
    write_text(path, to_json(value))


def to_json(value: object) -> str:
    """Returns a value as JSON text; the value may contain numpy scalars and arrays."""
    return json.dumps(value, indent=2, default=_plain) + "\n"


def write_manifest(path: Path, entries: Mapping[str, object]) -> None:
    """Writes a JSON file of `entries`; adds their digest as the entry `sha256`."""
    plain = json.loads(to_json(dict(entries)))  # the values that a reader will get
    write_json(path, {**plain, "sha256": sha256_json(plain)})


def read_manifest(path: Path, below: Path | None = None) -> dict[str, Any]:
    """Reads the entries that `write_manifest` wrote. Raises UserError if their digest differs."""
    manifest = read_json(path, below=below)
    if manifest.pop("sha256", None) != sha256_json(manifest):
        raise UserError(f"'{path}' is damaged (its sha256 differs)")
    return manifest


def _plain(value: object) -> object:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"no JSON form of {type(value).__name__}")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder to fill. If no error is raised, it becomes `folder` at the end.

    Raises UserError if another process has made `folder` by then: its folder stays.
    """
    # The name is new each time, so that a child of a killed process cannot write into this folder.
    partial = folder.with_name(
        f"{folder.name}.{secrets.token_hex(4)}.partial"
    )  # see `list_partials`
    try:
        partial.mkdir(mode=0o700)
        yield partial
        for path in partial.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        _rename_to_new(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(partial)) from error
        raise


def list_partials(folder: Path) -> list[Path]:
    """Returns the unfinished copies of `folder` that killed processes have left."""
    ours = re.escape(folder.name) + r"\.[0-9a-f]{8}\.partial"
    return [path for path in folder.parent.iterdir() if re.fullmatch(ours, path.name)]


def _rename_to_new(partial: Path, folder: Path) -> None:
    """Renames a folder; replaces only an empty folder."""
    exists = os.path.lexists(folder)
    try:
        if not exists:
            os.rename(partial, folder)
    except OSError as error:  # the target is a folder with content, or a file
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        exists = True
    if exists:
        raise UserError(
            f"'{folder}' was made meanwhile by another process: it is kept\n"
            "move it away, and repeat the command"
        )


def make_private(folder: Path) -> None:
    """Makes a folder and its missing parents, with mode 0700."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)
