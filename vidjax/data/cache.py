"""The cache: where converted data is kept, under a lock, and named only when complete."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from vidjax import files
from vidjax.digests import sha256_json
from vidjax.ownership import default_cache_dir

_LOG = logging.getLogger(__name__)


def cache_folder(cache_dir: str | Path | None, kind: str, key: object) -> Path:
    """Returns the folder for one content.

    Args:
      cache_dir: the cache; None for the default.
      kind: the subfolder.
      key: JSON value that differs wherever the content does.
    """
    return Path(cache_dir or default_cache_dir()).expanduser() / kind / sha256_json(key)[:20]


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Holds the lock of a folder, waiting for it, and clears what killed processes left there.

    Raises:
      OSError: the folder cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    with files.open_regular(root / "lock", os.O_RDWR | os.O_CREAT) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process that fills %s", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in root.glob("*.partial"):
            # A child of a killed process may still write there; the next call clears it then.
            shutil.rmtree(left_over, ignore_errors=True)
        yield


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes its final name only if no error is raised.

    Raises:
      OSError: the disk is full or cannot be written; the partial folder is removed.
    """
    # A fresh name each time: a child of a killed process cannot write into this one.
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        if folder.exists():  # it is incomplete: a complete one is never built again
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(partial)) from error
        raise


def disk_error(path: Path, *, full: bool) -> OSError:
    """Returns the error of a full disk, or of another failure to write under `path`."""
    number = errno.ENOSPC if full else errno.EIO
    return OSError(number, os.strerror(number), str(path))
