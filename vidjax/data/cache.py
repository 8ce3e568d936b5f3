"""The cache of converted data: a folder is filled under a lock, and gets its name once complete.

Features identify people: only the user may read the files here.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vidjax import files, messages
from vidjax.errors import UserError
from vidjax.machine import num_cores

_LOG = logging.getLogger(__name__)
DIGEST_LETTERS = 64
RECORDS = re.compile("[0-9a-f]{20}")  # names of `cache_folder`
LEFT = re.compile(r"(.+)\.[0-9a-f]{8}\.partial")  # of `files.atomic_folder`
TICK_NS = 2 * 10**9  # the coarsest clocks of file systems have two seconds


def cache_folder(cache_dir: str | Path | None, kind: str, key: object) -> Path:
    """Returns the folder `cache_dir/kind/DIGEST`, where DIGEST is of `key`, any JSON value."""
    return files.cache_root(cache_dir) / kind / files.sha256_json(key)[:20]


class Digests(NamedTuple):
    """Where `digest_files` keeps its results.

    Attributes:
      cache_dir: the cache; None for the default.
      write: False reads digests, but writes none.
    """

    cache_dir: str | Path | None = None
    write: bool = True


IN_DEFAULT = Digests()


def digest_files(paths: Sequence[Path], kept: Digests, workers: int | None = None) -> str:
    """Returns the sha256 of the names and contents of files; reads them only if one has changed.

    The cache finds the digest by the paths and the `_state` of the files. If a file changed less
    than TICK_NS before this call, nothing is kept: another change in the same tick would not show.
    """
    began = time.time_ns()
    states = [_state(path) for path in paths]
    place = cache_folder(kept.cache_dir, "digests", [list(map(str, paths)), states])
    with contextlib.suppress(OSError, ValueError):
        text = files.read_bytes(place, DIGEST_LETTERS).decode()
        if len(text) == DIGEST_LETTERS:
            return text
    sha256 = hashlib.sha256()
    groups = [paths[first : first + 64] for first in range(0, len(paths), 64)]
    with ThreadPoolExecutor(workers or num_cores()) as threads:
        for group, digests in zip(groups, threads.map(_sha256_each, groups), strict=True):
            for path, digest in zip(group, digests, strict=True):
                sha256.update(f"{path.name}\n{digest}\n".encode("utf-8", "surrogateescape"))
    text = sha256.hexdigest()
    newest = max(changed for _, _, *times in states for changed in times)
    unchanged = newest < began - TICK_NS and states == [_state(path) for path in paths]
    if kept.write and unchanged:
        with contextlib.suppress(OSError):  # a cache that cannot be written saves no time
            files.make_private(place.parent)
            files.write_bytes(place, text.encode(), sync=False)
    return text


def _state(path: Path) -> tuple[int, ...]:
    """Returns inode, size and times of a file, at least one of which changes with every write."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _sha256_each(paths: Sequence[Path]) -> list[str]:
    return [files.sha256_file(path) for path in paths]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Waits for and holds a cache folder's lock; deletes what killed processes left unfinished."""
    root = folder.parent
    files.make_private(root)
    path = root / f"{folder.name}.lock"
    with files.open_regular(path, os.O_RDWR | os.O_CREAT, below=root.parent) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process that fills %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in root.glob(f"{folder.name}.*.partial"):
            # A child of a killed process may still write there; the next call clears it then.
            shutil.rmtree(left_over, ignore_errors=True)
        yield


class Entry(NamedTuple):
    """A folder of the cache: bytes of its files, and Unix time of its last use, in s."""

    folder: Path
    size: int
    used: float


def entries(cache_dir: str | Path | None = None) -> list[Entry]:
    """Returns folders of records, synthetic data and broken-off conversions, latest use last."""
    found = []
    for path in files.cache_root(cache_dir).glob("*/*"):
        is_records = RECORDS.fullmatch(path.name) and (path / "manifest.json").is_file()
        is_made = path.parent.name == "synthetic" and any(path.glob("*.pickle"))
        is_left = LEFT.fullmatch(path.name) and path.is_dir()  # by a process that was killed
        if not path.is_symlink() and (is_records or is_made or is_left):
            size = sum(one.lstat().st_size for one in path.rglob("*") if not one.is_dir())
            found.append(Entry(path, size, path.stat().st_mtime))
    return sorted(found, key=lambda one: one.used)


def mark_used(folder: Path) -> None:
    """Sets the time of last use of a folder of the cache to now, if it is writable."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def prune(cache_dir: str | Path | None, days: float) -> list[Entry]:
    """Deletes folders and digests that nobody has used for some days; returns the folders."""
    oldest = time.time() - days * 86400
    gone = [one for one in entries(cache_dir) if one.used < oldest]
    for one in gone:
        left = LEFT.fullmatch(one.folder.name)  # it bears the name of what it should become
        with exclusive(one.folder.with_name(left[1]) if left else one.folder):
            shutil.rmtree(one.folder, ignore_errors=True)
    for path in files.cache_root(cache_dir).glob("digests/*"):
        if RECORDS.fullmatch(path.name) and path.lstat().st_mtime < oldest:
            path.unlink(missing_ok=True)
    return gone


def main(argv: Sequence[str] | None = None) -> int:
    """Lists or prunes the cache and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        parser = messages.Parser(
            "python -m vidjax.data.cache", description="List what is in the cache."
        )
        parser.add_argument("--cache_dir", metavar="C", help="$VIDJAX_CACHE or ~/.cache/vidjax")
        parser.add_argument(
            "--prune", metavar="DAYS", type=float, help="delete what was not used for DAYS days"
        )
        args = parser.parse_args(words)
        if args.prune is not None and not args.prune >= 0:
            raise UserError(f"--prune={args.prune:g}: a number of days, 0 or more")
        days = args.prune
        found = entries(args.cache_dir) if days is None else prune(args.cache_dir, days)
        for one in found:
            age = (time.time() - one.used) / 86400
            place = "/".join(one.folder.parts[-2:])
            messages.say(f"{one.size / 1e6:>10,.1f} MB  used {age:.1f} days ago  {place}")
        total = f"{sum(one.size for one in found) / 1e6:,.1f} MB in {len(found)} folders"
        messages.say(
            f"{total} of {files.cache_root(args.cache_dir)}" + ("" if days is None else " deleted")
        )
        return 0

    return messages.guarded(command, words)


if __name__ == "__main__":
    messages.run(main)
