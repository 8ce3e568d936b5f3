"""What this process may use of its machine or container: cores, memory and open files.

A container is a Linux control group, version 1 or 2. Its limits, and those of the groups around it,
hold for all processes in it. `root` is the root of the file system; tests give another folder.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def num_cores(root: Path = ROOT) -> int:
    """Returns the number of cores that this process may use."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    for group in _groups("cpu", root):
        quota, period = _numbers(group / "cpu.max") or (
            *_numbers(group / "cpu.cfs_quota_us"),
            *_numbers(group / "cpu.cfs_period_us"),
        ) or (math.inf, 1)  # fmt: skip
        if 0 < quota < math.inf:
            cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


@functools.cache
def memory_bytes(root: Path = ROOT) -> int:
    """Returns the bytes of memory that this process may use in all, free or not."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min([physical, *(limit for limit, _ in _memory(root))]))


def free_bytes(root: Path = ROOT) -> float:
    """Returns the bytes of memory that are still free for this process; 0 if not known."""
    free = [limit - used for limit, used in _memory(root)]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        free += [1024.0 * int(kilobytes) for kilobytes in found]
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    return max(0.0, min(free, default=0.0))


def most_files() -> float:
    """Returns how many files this process may open at once, as `ulimit -n` sets it, or inf."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def keep_freed_memory() -> None:
    """Lets each batch reuse the memory of the one before, if the C library is glibc.

    By default the kernel maps and clears every array above 32 MB anew, which halves the rate of
    batches. Heaps are as few as compilation allows: each keeps memory of its own, but threads that
    compile and share one wait for each other. For the `vidjax` command only: it affects all code.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 1 << 30), (-1, 1 << 28), (-8, num_cores() + 2)):
            mallopt(option, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX


def _memory(root: Path) -> Iterator[tuple[float, float]]:
    """Yields (limit, use) in bytes of every control group with a limit on memory."""
    for group in _groups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _numbers(group / limit), _numbers(group / used)
            if most and most[0] < 1 << 60:  # version 1 writes no limit as a large number
                yield most[0], (now or [0.0])[0] - _statistic(group / "memory.stat", cached)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yields the folders of the control groups that this process is in, the inner ones first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, names, path = line.split(":", 2)
        if not names or controller in names.split(","):
            top = root / "sys/fs/cgroup" / (names and controller)
            own = top / path.strip("/")
            # A container may see its own group as the uppermost one.
            yield from itertools.takewhile(lambda group, top=top: group != top, (own, *own.parents))
            yield top


def _numbers(path: Path) -> list[float]:
    """Returns the numbers in a file, `max` as infinity; [] if it cannot be read."""
    try:
        return [math.inf if word == "max" else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def _statistic(path: Path, name: str) -> float:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
        return next((float(value) for key, value in pairs if key == name), 0.0)
    except (OSError, ValueError):
        return 0.0
