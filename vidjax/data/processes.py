"""Child processes of this program, several at once.

The pools of Python import the user's program again in each child, which would run a program without
`if __name__ == "__main__"`. So a child here runs a module of this package.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from vidjax.machine import most_files

LARGEST_BLOCK = 32 << 20  # bytes; the largest threshold that glibc takes from the environment

Item = TypeVar("Item")
Result = TypeVar("Result")


class Children:
    """Child processes that are killed together; several threads may start them."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self, module: str, *words: str | Path, given: bytes = b"", timeout: float | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a module of this package and returns the ended child, whatever its exit status.

        Args:
          module: its name; it gets `words` as arguments and `given` on standard input.
          timeout: seconds after which the child is killed, which raises subprocess.TimeoutExpired.
        """
        # It imports from the same folders as this process, and not from its current directory.
        # Every BLAS thread would reserve address space of its own. The allocator of glibc would
        # give the memory of each batch back, and the system would clear every page of the next.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": str(LARGEST_BLOCK),
            "MALLOC_TRIM_THRESHOLD_": str(LARGEST_BLOCK),
        }
        pipe = subprocess.PIPE
        with self._lock:
            if self._stopped:
                raise InterruptedError("stopped")  # nobody reads this
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *map(str, words)],
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=environment,
            )
            self._started.append(child)
        with child:
            try:
                output, errors = child.communicate(given, timeout)
            except BaseException:
                child.kill()
                raise
        return subprocess.CompletedProcess(child.args, child.returncode, output, errors)

    def stop(self) -> None:
        """Kills all children and lets no other start."""
        with self._lock:
            self._stopped = True
            for child in self._started:
                child.kill()


def map_children(
    function: Callable[[Children, Item], Result],
    items: Sequence[Item],
    workers: int,
    *,
    progress: str = "",
) -> list[Result]:
    """Returns `[function(children, item) for item in items]`, calling `workers` of them at once.

    Each call runs in a thread and waits for a child process. Items begin in their order. The first
    error kills all children. `progress` is the title of a progress bar; empty for none.
    """
    from tqdm import tqdm

    children = Children()
    # A child has three pipes, and some more while it starts.
    with ThreadPoolExecutor(max(1, int(min(workers, most_files() // 8)))) as threads:
        futures = [threads.submit(function, children, item) for item in items]
        try:
            for future in tqdm(
                as_completed(futures),
                progress,
                len(futures),
                leave=False,
                disable=not progress or None,
            ):
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return [future.result() for future in futures]
