"""Functions that damage files, and a time limit for the code that reads them."""

import contextlib
import faulthandler
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

SECONDS = 60


class TooLong(BaseException):
    """A command does not end. Commands catch only an Exception, so they do not catch TooLong."""


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"0")
    for _ in range(rng.choice((1, 1, 1, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def insert(path: Path, rng: random.Random) -> None:
    content, junk = path.read_bytes(), rng.randbytes(rng.choice((1, 8, 5000)))
    place = rng.randrange(len(content) + 1)
    path.write_bytes(content[:place] + junk + content[place:])


def repeat(path: Path, rng: random.Random) -> None:
    """Repeats a random part of the file."""
    content = path.read_bytes()
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    path.write_bytes(content[:end] + content[begin:])


def put(path: Path, kind: str, target: Path) -> None:
    """Replaces a file by a "pipe", an empty "folder", a "sparse" file of 30 GB, or a link.

    The link leads to `target` ("link"), to /dev/zero ("zero"), or to a missing file ("nothing").
    """
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 30 << 30)
    else:
        others = {"zero": Path("/dev/zero"), "nothing": target.with_name("absent")}
        path.symlink_to(others.get(kind, target))


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Raises TooLong if the context takes more than SECONDS of elapsed time."""

    def stop(signum: int, frame: object) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2)  # of all threads
        raise TooLong(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
