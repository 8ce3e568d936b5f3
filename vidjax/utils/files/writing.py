"""Writes files and folders atomically, and makes temporary folders.

A failure raises an OSError that contains the path.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vidjax.utils.errors import DiskError, UserError
from vidjax.utils.files.reading import JSON_BYTES, local, open_regular, read_json, sha256_json

_scratch_folders: set[Path] = set()
_scratch_lock = threading.RLock()


def make_folder(path: str | os.PathLike[str], name: str = "workdir", mode: int = 0o777) -> Path:
    """Makes a folder with the rights `mode` if it does not exist, and returns its absolute path.

    Raises UserError if the folder is not writable, or if `path` is an address such as s3://x. Error
    messages call the folder `name`.
    """
    workdir = local(path).absolute()
    try:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{name} '{workdir}' is a file, not a folder\ngive a folder")
        workdir.mkdir(mode, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write in the {name} '{workdir}': {error.strerror}\n"
            "choose another folder, such as a copy of this folder, or change its permissions"
        ) from error
    return workdir


def open_log(path: Path) -> io.FileIO:
    """Opens a log file without a buffer, to append lines. Makes the file if it does not exist.

    If the file has several hard links, another link may belong to a snapshot of the folder. Then
    the log is first copied to a new file, so that the snapshot does not change.
    """
    if os.path.lexists(path):
        with open_regular(path) as file:
            is_shared = os.fstat(file.fileno()).st_nlink > 1
            if is_shared:
                with atomic_file(path) as copy:
                    shutil.copyfileobj(file, copy)
    return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def remove_tree(folder: Path) -> None:
    """Removes a file, or a folder with all its content. If `folder` is a link, keeps the target."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def remove_ours(folder: Path, ours: str) -> bool:
    """Removes the files of vidjax in a folder, and then the folder if it is empty.

    `ours` is a regular expression that matches the whole names of these files. Also removes
    unfinished versions of these files, left by processes that were killed. If a file is a link,
    only the link is removed. If `folder` is a link, nothing is removed. Returns True if the folder
    does not exist afterwards.
    """
    if not os.path.lexists(folder):
        return True
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        return False
    remove_partials(folder, ours)
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
    """Writes a text file atomically: a reader sees all of the old or all of the new content."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, sync: bool = True, replace: bool = True) -> None:
    """Writes a file atomically. For `sync` and `replace`, see `atomic_file`."""
    with atomic_file(path, sync=sync, replace=replace) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True, replace: bool = True) -> Iterator[BinaryIO]:
    """Yields a new file to write. The new file replaces `path` when the context ends.

    After an error, `path` is unchanged. If `replace` is False and `path` exists, raises UserError.

    If `sync` is True, the context waits until the content is on the disk, so that even a power cut
    leaves no incomplete file. If `sync` is True, the context also removes temporary files that
    killed processes have left for `path`. If `sync` is False, the caller must remove these files
    with `remove_ours`.
    """
    if sync:
        remove_partials(path.parent, re.escape(path.name))
    with disk_errors(path, OSError), _open_partial(path) as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())
        os.replace(file.name, path) if replace else _link_new(file.name, path)


@contextlib.contextmanager
def _open_partial(path: Path) -> Iterator[BinaryIO]:
    """Yields a new temporary file next to `path`, and removes the file afterwards.

    The file is locked, so that other processes do not take it for the file of a killed process.
    """
    while True:
        # The name has random digits, because processes in containers often have equal numbers.
        partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
        try:
            with partial.open("x+b") as file:
                with contextlib.suppress(OSError):  # some drives have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if partial.exists():  # another process may have removed it before it was locked
                    yield file
                    return
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _link_new(partial: str, path: Path) -> None:
    """Renames the file `partial` to `path`. Raises UserError if `path` exists."""
    try:
        try:
            os.link(partial, path)  # unlike a rename, this does not replace an existing file
        except FileExistsError:
            raise
        except OSError:  # some file systems, such as mounted cloud drives, have no hard links
            path.touch(exist_ok=False)
            os.replace(partial, path)
    except FileExistsError:
        raise UserError(describe_existing(path)) from None


def describe_existing(path: Path) -> str:
    """Returns the error message for an existing file that the option --out names."""
    return f"--out={path} exists and is not overwritten: name another file, or delete it"


def foreign_error(path: Path, flag: str = "--out") -> UserError:
    """Returns the error for a file or folder of another program, which a command would replace.

    `flag` is the option with which the user can name another folder.
    """
    return UserError(
        f"'{path}' was not written by vidjax, or is damaged, so it is not replaced\n"
        f"move it away, or name another folder: {flag}=FOLDER"
    )


def append(file: io.FileIO, content: bytes) -> None:
    """Adds `content` to the end of an unbuffered file. An error leaves the file unchanged."""
    before = file.seek(0, os.SEEK_END)
    left = content
    with disk_errors(file.name, OSError):
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@contextlib.contextmanager
def disk_errors(path: object, kind: type[Exception]) -> Iterator[None]:
    """Raises DiskError for an error of the type `kind` in a `with` block that writes `path`."""
    try:
        yield
    except kind as error:
        reason = getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0]
        with_number = DiskError(
            f"cannot write '{path}': {reason[-200:]}\n"
            "choose another folder or disk; if the disk is full, free some space"
        )
        with_number.errno = getattr(error, "errno", None)
        raise with_number from error


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically. The value may contain numpy scalars and arrays."""
    write_text(path, to_json(value))


def to_json(value: object) -> str:
    """Returns a value as JSON text. The value may contain numpy scalars and arrays."""
    return json.dumps(value, indent=2, default=_plain) + "\n"


def write_manifest(path: Path, entries: Mapping[str, object]) -> None:
    """Writes `entries` to a JSON file, with their digest as an additional entry `sha256`."""
    plain = json.loads(to_json(dict(entries)))  # the values that a reader will get
    write_json(path, {**plain, "sha256": sha256_json(plain)})


def read_manifest(path: Path, below: Path | None = None, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Returns the entries of a JSON file that `write_manifest` wrote, without the digest.

    If the digest does not match the entries, raises UserError. For `below` and `limit`, see
    `open_regular`.
    """
    manifest = read_json(path, limit=limit, below=below)
    if manifest.pop("sha256", None) != sha256_json(manifest):
        raise UserError(f"'{path}' is damaged: its sha256 does not match its content")
    return manifest


def _plain(value: object) -> object:
    if convert := getattr(value, "tolist", None):  # of numpy, which is not imported for this
        return convert()
    raise TypeError(f"a value of type {type(value).__name__} cannot be JSON")


@contextlib.contextmanager
def scratch_folder(folder: Path | None = None) -> Iterator[Path]:
    """Makes a folder that only this user can read, yields its path, and removes it at the end.

    `folder` is the path of the new folder. By default, the system chooses a path. The folder may
    contain features of people, so a signal that ends the command removes the folder, too.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp())
    else:
        folder.mkdir(mode=0o700, parents=True)
    _scratch_folders.add(folder)
    try:
        yield folder
    finally:
        with _scratch_lock:
            shutil.rmtree(folder, ignore_errors=True)
            _scratch_folders.remove(folder)


def remove_scratch_folders() -> None:
    """Removes the folders of all open calls of `scratch_folder`, from all threads.

    The caller must then end the process.
    """
    # The lock stays locked. Otherwise an error of another thread, whose files are gone, could end
    # the process before all folders are removed.
    _scratch_lock.acquire()
    for folder in tuple(_scratch_folders):
        # A child process may still write into the folder, but it cannot find a renamed folder.
        with contextlib.suppress(OSError):
            renamed = folder.rename(folder.with_name(f".{os.urandom(8).hex()}.partial"))
            _scratch_folders.add(renamed)  # a second signal interrupts rmtree
            shutil.rmtree(renamed, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder to fill, and renames the new folder to `folder` at the end.

    Missing parents of `folder` are made. After an error, the new folder and these parents are
    removed. Also removes unfinished versions of `folder`, left by processes that were killed. If
    another process makes `folder` in the meantime, raises UserError.
    """
    # The name has random digits, so that a child of a killed process cannot write into this folder.
    partial = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.partial")
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    remove_partials(folder.parent, re.escape(folder.name))
    try:
        with scratch_folder(partial), contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # some file systems cannot lock a folder
                held.enter_context(_lock_partial(partial))
            yield partial
            for path in partial.rglob("*"):
                hide(path)
            _rename_to_new(partial, folder)
    except OSError as error:
        if error.strerror and not error.filename:  # a DiskError contains the path
            raise OSError(error.errno, error.strerror, str(partial)) from error
        raise
    finally:
        for parent in new_parents:
            with contextlib.suppress(OSError):  # without an error, it is not empty
                parent.rmdir()


def remove_partials(folder: Path, ours: str) -> None:
    """Removes unfinished files and folders in `folder`, left by processes that were killed.

    `ours` is a regular expression for the names that these files would have if they were complete.
    """
    with contextlib.suppress(OSError):
        # A folder may contain many thousands of files: most are only compared with the ending.
        for path in (folder / name for name in os.listdir(folder) if name.endswith(".partial")):
            dot = "" if path.is_dir() else r"\."
            if re.fullmatch(rf"{dot}({ours})\.[0-9a-f]{{8}}\.partial", path.name):
                remove_partial(path)


def remove_partial(path: Path) -> bool:
    """Removes an unfinished file or folder. Returns False if a living process still writes it."""
    with contextlib.suppress(OSError), _lock_partial(path):
        # A child of a killed process may still write there. The next call deletes the rest.
        remove_tree(path)
    return not os.path.lexists(path)


@contextlib.contextmanager
def _lock_partial(path: Path) -> Iterator[None]:
    """Locks an unfinished file or folder. Raises OSError if another process has locked it."""
    # NFS locks only files that are open for writing.
    access = os.O_RDWR if path.is_file() else os.O_RDONLY
    descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _rename_to_new(partial: Path, folder: Path) -> None:
    """Renames the folder `partial` to `folder`. Raises UserError if `folder` exists."""
    try:
        if os.path.lexists(folder):  # a rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(partial, folder)
    except OSError as error:  # ENOTEMPTY: a folder with content; ENOTDIR: a file
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"another process has made '{folder}' in the meantime, and it is not replaced\n"
            "move this folder elsewhere, and repeat the command"
        ) from error


def hide(path: Path) -> None:
    """Takes all rights to a file or folder from other users, if the disk stores permissions."""
    with contextlib.suppress(PermissionError):  # a network drive may refuse to change them
        path.chmod(0o700 if path.is_dir() else 0o600)


def make_private(folder: Path) -> None:
    """Makes a folder and its missing parents. Other users get no rights to the new folders."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)
