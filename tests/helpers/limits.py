"""Processes that always end, and commands with few open files or little memory."""

import contextlib
import functools
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
GB = 1 << 30


class Ended(NamedTuple):
    """A command that has ended. If it used too much memory, it was ended by SIGKILL.

    `peak` is the most memory of the command and its children in bytes, without pages of files.
    """

    returncode: int
    stdout: str
    stderr: str
    peak: int


@functools.cache
def slowness() -> float:
    """Returns the time of a fixed sum on this machine, in units of 0.1 s, at least 1.

    Tests multiply their limits of CPU time by it, so that the limits fit slow machines.
    """
    began = time.process_time()
    sum(i * i for i in range(1_500_000))
    return max(1.0, (time.process_time() - began) / 0.1)


@contextlib.contextmanager
def running(words: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Runs a program, and kills it at the end of the context if it is still running.

    The output of the program is text, in pipes. `options` go to `subprocess.Popen`.
    """
    chosen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with subprocess.Popen([str(word) for word in words], **chosen) as process:
        try:
            yield process
        finally:
            process.kill()


def run(
    words: Sequence[str | Path], *, files: int | None = None, memory: int | None = None,
    env: Mapping[str, str] | None = None, timeout: float = 600,
) -> Ended:  # fmt: skip
    """Runs a command in the root of the repository, as under `ulimit -n` and a memory cgroup.

    All processes of the command together may use `memory` bytes. Their memory is measured fifty
    times a second. If they use more, they are killed.
    """
    command = [*map(str, words)]
    if files:
        command = ["sh", "-c", 'ulimit -n "$0" && exec "$@"', str(files), *command]
    env, pipe = {**os.environ, "XLA_FLAGS": "", **(env or {})}, subprocess.PIPE
    more: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
    more |= {"cwd": ROOT, "env": env, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **more) as child:

        def measure() -> int:
            held = held_by(child.pid)
            if memory and held > memory:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            return held

        with peak_of(measure, every_s=0.02) as peak:
            try:
                stdout, stderr = child.communicate(timeout=timeout)
            except BaseException:
                os.killpg(child.pid, signal.SIGKILL)
                raise
    return Ended(child.returncode, stdout, stderr, peak[0])


@contextlib.contextmanager
def peak_of(measure: Callable[[], int], every_s: float) -> Iterator[list[int]]:
    """Calls a function again and again while the context is open; the list has its maximum."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            peak[0] = max(peak[0], measure())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def file_limit(size: int, kind: int = resource.RLIMIT_FSIZE) -> Iterator[None]:
    """Limits the size of files that this process writes, in bytes, or another `kind` of limit."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Fills a small file system, except for `left` bytes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - left // 4096 * 4096)
    try:
        yield
    finally:
        filler.unlink()


def children_of(pid: int) -> list[int]:
    """Returns the child processes of a process, of all its threads."""
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
