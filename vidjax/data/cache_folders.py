"""Finds and locks folders of the cache, where converted data are kept for later runs.

A folder is filled under a temporary name while a lock is held, and is renamed when it is complete.
Features identify people, so only the user may read the files of the cache.
"""

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.machine import num_cores

_LOG = logging.getLogger(__name__)
DIGEST_LETTERS = 64
TICK_NS = 2 * 10**9  # the coarsest file systems store times in steps of two seconds


def cache_folder(cache_dir: str | Path | None, kind: str, key: object) -> Path:
    """Returns the path `cache_dir/kind/DIGEST`, with a digest of the JSON value `key`."""
    return files.cache_root(cache_dir) / kind / files.sha256_json(key)[:20]


def digest_files(paths: Sequence[Path], cache_dir: str | Path | None = None) -> str:
    """Returns the sha256 of the names and contents of files, in hexadecimal.

    The digest depends on the order of `paths`. The cache stores the digest, so that unchanged files
    are not read again.
    """
    began = time.time_ns()
    states = [_read_file_state(path) for path in paths]
    place = cache_folder(cache_dir, "digests", [list(map(str, paths)), states])
    with contextlib.suppress(OSError, ValueError):
        text = files.read_bytes(place, DIGEST_LETTERS, below=place.parents[1]).decode()
        if len(text) == DIGEST_LETTERS:
            return text
    sha256 = hashlib.sha256()
    groups = [paths[first : first + 64] for first in range(0, len(paths), 64)]  # for small files
    with ThreadPoolExecutor(num_cores()) as threads:
        digests = threads.map(lambda group: [*map(files.sha256_file, group)], groups)
        for path, digest in zip(paths, itertools.chain.from_iterable(digests), strict=True):
            sha256.update(f"{path.name}\n{digest}\n".encode("utf-8", "surrogateescape"))
    text = sha256.hexdigest()
    # A second change of a file within 2 seconds might not change the time of the file.
    newest = max(changed for _, _, *times in states for changed in times)
    unchanged = newest < began - TICK_NS and states == [_read_file_state(path) for path in paths]
    if unchanged and not place.parent.is_symlink():
        with contextlib.suppress(OSError):  # the cache may be read-only
            files.make_private(place.parent)
            files.write_bytes(place, text.encode(), sync=False)
    return text


def _read_file_state(path: Path) -> tuple[int, ...]:
    """Returns inode, size and times of a file. Every write changes at least one of them."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder of the cache in a `with` block, so that only one process fills it."""
    root = folder.parent
    files.make_private(root)
    path = root / f"{folder.name}.lock"
    with files.open_regular(path, os.O_RDWR | os.O_CREAT, below=root.parent) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process to fill %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"the cache '{root}' is on a drive without locks, like some network and cloud "
                f"drives ({error.strerror})\n"
                "set the variable VIDJAX_CACHE to a folder on another disk"
            ) from error
        yield


def mark_used(folder: Path) -> None:
    """Sets the modification time of a cache folder to now, if the folder is writable."""
    with contextlib.suppress(OSError):
        os.utime(folder)
