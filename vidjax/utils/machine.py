"""Reads how many cores, bytes of memory and open files this process may use.

Linux stores the limits of a container as limits of a control group (cgroup), version 1 or 2. The
limits of all outer control groups apply, too. The functions read the files of Linux below `root`,
which is `/`, except in tests.
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
    """Returns how many processor cores this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0))
    for group in _find_groups("cpu", root):
        quota, period = _read_numbers(group / "cpu.max") or (
            *_read_numbers(group / "cpu.cfs_quota_us"),
            *_read_numbers(group / "cpu.cfs_period_us"),
        ) or (math.inf, 1)  # fmt: skip
        if 0 < quota < math.inf:
            cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


@functools.cache
def memory_bytes(root: Path = ROOT) -> int:
    """Returns how many bytes of memory this process may use, whether they are free or not."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min([physical, *(limit for limit, _ in _read_memory_limits(root))]))


def free_bytes(root: Path = ROOT) -> float:
    """Returns how many bytes of memory this process can still take, or 0 if this is unknown."""
    free = [limit - used for limit, used in _read_memory_limits(root)]
    free += [1024 * kilobytes for kilobytes in _read_entry(root / "proc/meminfo", "MemAvailable:")]
    return max(0.0, min(free, default=0.0))


def max_open_files() -> float:
    """Returns how many files this process may have open at once (`ulimit -n`), or infinity."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def keep_freed_memory() -> None:
    """Makes the C library glibc keep freed memory, so that later batches are made faster.

    With another C library, this function has no effect.
    """
    # By default, glibc returns arrays above 32 MB to the kernel, which clears their memory. This
    # halves the number of batches per second. Each arena keeps its own freed memory, so the number
    # of arenas is limited. With too few arenas, compilation is slow: its threads wait for an arena.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 1 << 30), (-1, 1 << 28), (-8, num_cores() + 2)):
            mallopt(option, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX


def _read_memory_limits(root: Path) -> Iterator[tuple[float, float]]:
    """Yields (limit, used bytes) of every control group of this process that limits memory."""
    for group in _find_groups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _read_numbers(group / limit), _read_numbers(group / used)
            if most and most[0] < 1 << 60:  # without a limit, version 1 writes a huge number
                yield most[0], sum(now) - sum(_read_entry(group / "memory.stat", cached))


def _find_groups(controller: str, root: Path) -> Iterator[Path]:
    """Yields the folders of the control groups of this process, the innermost first.

    `controller` is `cpu` or `memory`, the resource that the groups limit.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, names, path = line.split(":", 2)
        if not names or controller in names.split(","):
            top = root / "sys/fs/cgroup" / (names and controller)
            inner = top / path.strip("/")
            # Inside a container, the group of the container may look like the root.
            outer = (inner, *inner.parents)
            yield from itertools.takewhile(lambda group, top=top: group != top, outer)
            yield top


def _read_numbers(path: Path) -> list[float]:
    """Returns the numbers in a file, or [] if it has none. The word `max` stands for infinity."""
    try:
        return [math.inf if word == "max" else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def _read_entry(path: Path, name: str) -> list[float]:
    """Returns the numbers in lines `name NUMBER` of a file, or [] if there is no such line."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
        return [float(row[1]) for row in rows if row[:1] == [name]]
    except (OSError, ValueError, IndexError):
        return []  # not Linux, for example
