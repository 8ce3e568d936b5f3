"""Locks folders, and finds folders that other users of the machine may change."""

import contextlib
import fcntl
import grp
import os
import pwd
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from vidjax.utils.errors import InUseError, UserError
from vidjax.utils.files.reading import open_regular

RETRY_SECONDS = 0.02  # between two attempts to lock a folder
LOCK_BYTES = 1000  # the longest text of a `.lock`


@contextlib.contextmanager
def lock(
    workdir: Path, name: str = "workdir", file_name: str = ".lock", *, wait: float = 0.0
) -> Iterator[None]:
    """Locks a folder until the context or the process ends.

    If another process still holds the lock after `wait` seconds, raises InUseError. Messages call
    the folder `name`. Only the file `file_name` in the folder is locked. So a folder can have
    several independent locks, with different file names.
    """
    path, end = workdir / file_name, time.monotonic() + wait
    with open_regular(path, os.O_RDWR | os.O_CREAT) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(RETRY_SECONDS)
                    continue
                text = file.read(LOCK_BYTES).decode(errors="replace")
                owner = "".join(filter(str.isprintable, text)).strip() or "another process"
                raise InUseError(
                    f"{name} '{workdir}' is in use by {owner}\nwait for it, or use another folder"
                ) from None
            except OSError as error:
                flag = "workdir" if name == "workdir" else "out"
                raise UserError(
                    f"'{workdir}' is on a drive without locks, like some network and cloud drives "
                    f"({error.strerror})\nchoose a folder on another disk: --{flag}=FOLDER"
                ) from error
        content = file.read(LOCK_BYTES)
        if content and not content.startswith(b"process "):
            raise UserError(f"the lock file '{path}' is not from vidjax\nmove the file elsewhere")
        owner = f"process {os.getpid()} on {socket.gethostname()}".encode().ljust(len(content))
        # A file with several hard links may also belong to another folder, so it is not changed.
        if owner != content and os.fstat(file.fileno()).st_nlink == 1:
            with contextlib.suppress(OSError):  # on a full disk the lock works without the text
                file.seek(0)
                file.write(owner)  # it is padded, because truncation would take milliseconds
        yield


def find_foreign_folder(folder: Path) -> Path | None:
    """Finds a folder in which other users may replace files: `folder` or one of its parents.

    Returns the outermost such folder, or None. If a folder cannot be examined, returns `folder`.
    """
    try:
        real = folder.absolute().resolve()
        for path in (*reversed(real.parents), real):
            if not path.exists():
                break
            if _may_be_changed(path.stat(), last=path == real):
                return path
    except OSError:
        return folder
    return None


def _may_be_changed(status: os.stat_result, *, last: bool) -> bool:
    """Returns True if other users, except root, may replace our files in a folder.

    `status` is the result of `os.stat` for the folder. `last` is False for a parent of the folder
    that vidjax uses, and True for the folder itself, to which other users must not add files.
    """
    user = os.geteuid()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, user):
        return True
    # In a sticky folder, such as /tmp, other users may add files, but not replace our files.
    sticky = status.st_mode & stat.S_ISVTX and not last
    others = status.st_mode & stat.S_IWOTH
    group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)
    return bool((others or group) and not sticky)


def _is_private(group: int) -> bool:
    """Returns True if `group` is the number of root's group, or if only this user is a member."""
    if group == 0:
        return True
    try:
        name, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}
