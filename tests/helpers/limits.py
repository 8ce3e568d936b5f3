"""Limits of time, memory and disk space, and measurements of processes."""

import contextlib
import functools
import os
import re
import resource
import shutil
import subprocess
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@functools.cache
def slowness() -> float:
    """Returns a factor for limits of CPU time: 1, or more on a slow machine."""
    began = time.process_time()
    sum(i * i for i in range(1_500_000))
    return max(1.0, (time.process_time() - began) / 0.1)


@contextlib.contextmanager
def running(words: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Runs a program with text pipes, and kills it at the end of the context if it still runs."""
    chosen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with subprocess.Popen([str(word) for word in words], **chosen) as process:
        try:
            yield process
        finally:
            process.kill()


def run(words: Sequence[str | Path], **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the root of the repository."""
    env = {**os.environ, "XLA_FLAGS": "", **env}
    options: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(words, cwd=ROOT, env=env, timeout=600, **options)


@contextlib.contextmanager
def traced_memory() -> Iterator[list[int]]:
    """Yields a list that gets the peak of the memory that Python allocates in the context."""
    peak = list[int]()
    tracemalloc.start()
    try:
        yield peak
    finally:  # otherwise, the next test would include the memory of all tests before it
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Limits the size in bytes of files that this process writes while the context is open."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Fills a file system, except for `left` bytes, while the context is open."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - left))
    yield
    filler.unlink()


def children_of(pid: int) -> list[int]:
    """Returns the ids of the child processes of a process."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        return [int(word) for text in tasks for word in text.split()]
    return []


def held_by(pid: int) -> int:
    """Returns the memory of a process and all its descendants in bytes, without pages of files."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        status = Path(f"/proc/{pid}/status").read_text()
        kilobytes = map(int, re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status))
        return (sum(kilobytes) << 10) + sum(map(held_by, children_of(pid)))
    return 0
