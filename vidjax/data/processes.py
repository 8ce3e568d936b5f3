"""Child processes of this program, several at once, and limits for those that read unknown bytes.

The pools of Python import the user's program again in each child, which would run a program without
`if __name__ == "__main__"`. So a child here runs a module of this package.

A job is such a module, and ends with `sys.exit(processes.serve(work))`. `run_limited` starts it,
gives `work` its arguments, and returns its answer, both as JSON; arrays go through files.
`run_limited_each` calls `work` several times in one process. A job has three limits: address space
(on Linux), CPU time, and that it may open no connection and start no program (on Linux). There it
also ends with the process that started it.
"""

import contextlib
import ctypes
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from vidjax.data.untrusted.names import show
from vidjax.utils.errors import DiskError, UserError, of_the_system
from vidjax.utils.machine import most_files

LARGEST_BLOCK = 32 << 20  # bytes; the largest threshold that glibc takes from the environment
MB = 1 << 20
# A process waits on a slow disk, or for a core that others use.
WALL_SECONDS = 60
WALL_PER_CPU = 20

# Machine -> its number in the headers of Linux, and the calls socket, execve, execveat, ptrace and
# io_uring_setup, which opens sockets, too.
_CALLS = {
    "x86_64": (0xC000003E, (41, 59, 322, 101, 425)),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 425)),
}
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER, _PARENT_DEATH = 38, 22, 2, 1
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # EPERM
_OTHER_CALLS = 0x40000000  # x86_64 has a second list of the same calls from here on

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


def limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    """Limits this process: its address space, and its CPU time from now on."""
    import resource

    cpu = int(time.process_time()) + cpu_seconds
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, cpu)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, memory_bytes))
    for kind, wanted in limits:
        _, hard = resource.getrlimit(kind)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (soft, hard))


def forbid_connections() -> bool:
    """Lets this process open no socket and start no program; returns whether the system can.

    Source: seccomp(2) of Linux, a filter of system calls that no process can take off again.
    """
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return False
    machine, calls = _CALLS[platform.machine()]
    refuse = len(calls) + 1  # the last step but one allows, the last one refuses
    steps = [
        (_LOAD, 0, 0, 4),  # the machine
        (_IF_EQUAL, 0, refuse + 2, machine),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_IF_AT_LEAST, refuse, 0, _OTHER_CALLS),
        *((_IF_EQUAL, refuse - 1 - n, 0, call) for n, call in enumerate(calls)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    held = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(held)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    return (
        prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero) == 0
        and prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), program, zero, zero) == 0
    )


def end_with_parent() -> None:
    """Lets this process be killed when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, ctypes.c_ulong(signal.SIGKILL))


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Does the jobs on standard input under their limits, prints the answers, returns 0.

    `work` gets the arguments of a job and returns its answer, both for JSON. What libraries print
    goes to standard error.
    """
    end_with_parent()
    with open(0, "rb", closefd=False) as given:
        jobs = json.load(given)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    limit_resources(jobs["memory_bytes"], jobs["cpu_seconds"])
    forbid_connections()
    most = f"{jobs['memory_bytes'] // MB:,} MB"
    with answers:
        json.dump([_answer(work, path, given, most) for path, given in jobs["given"]], answers)
    return 0


def _answer(
    work: Callable[[dict[str, Any]], dict[str, Any]], path: str, given: dict[str, Any], most: str
) -> dict[str, Any]:
    """Returns what `work` finds, or its error; `most` is the memory that it may take."""
    try:
        return {"found": work(given)}
    except MemoryError:
        return {"error": f"{path}: refused: reading it needs more memory than {most}"}
    except UserError as error:
        kind = "os_error" if isinstance(error, OSError) else "error"
        return {kind: str(error), "errno": getattr(error, "errno", None)}
    except OSError as error:
        return {"os_error": of_the_system(error) or str(error), "errno": error.errno}


def run_limited(
    module: str,
    path: Path,
    arguments: Mapping[str, object],
    *,
    memory_bytes: int,
    cpu_seconds: int,
    children: Children | None = None,
) -> dict[str, Any]:
    """Runs a module that calls `serve` in a child process with limits, and returns its answer.

    Args:
      module: its name.
      path: the file that the job reads, for messages; `arguments` name it, too, where needed.
      arguments: what `work` gets, for JSON.
      memory_bytes, cpu_seconds: its limits. Elapsed time is limited to WALL_PER_CPU times as much.
      children: the group that the child joins, so that another thread can kill it.

    Raises:
      UserError: the job raised one, or met a limit, or its process crashed.
      DiskError: it could not read or write a file.
    """
    limits = {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds}
    (found,) = run_limited_each(module, [(path, arguments)], **limits, children=children)
    if isinstance(found, UserError):
        raise found
    return found


def run_limited_each(
    module: str,
    given: Sequence[tuple[Path, Mapping[str, object]]],
    *,
    memory_bytes: int,
    cpu_seconds: int,
    children: Children | None = None,
) -> list[dict[str, Any] | UserError]:
    """Runs a module as `run_limited` does, with several pairs of a path and arguments, in turn.

    Returns what each call of `work` returned or raised. The limits are of the process: it raises
    UserError if the process meets one or crashes, in the name of the first path.
    """
    path = given[0][0]
    limits = {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds}
    jobs = {"given": [(os.fspath(path), dict(one)) for path, one in given], **limits}
    seconds = WALL_SECONDS + WALL_PER_CPU * cpu_seconds
    try:
        input_ = json.dumps(jobs).encode()
        child = (children or Children()).run(module, given=input_, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: refused: reading it needs more than {seconds} s") from None
    if child.returncode == -signal.SIGXCPU:
        raise UserError(f"{path}: refused: reading it needs more than {cpu_seconds} s of CPU time")
    if child.returncode == -signal.SIGKILL:
        raise UserError(f"{path}: its reader was killed from outside: is memory short?")
    if child.returncode < 0:
        name = f"signal {-child.returncode}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-child.returncode).name
        raise UserError(f"{path}: damaged or hostile: its reader ended with {name}")
    if child.returncode:
        last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(
            f"{path}: the process that reads it failed: {show(last)}\n"
            "install vidjax again; if that does not help, report it"
        )
    return [_found(answer) for answer in json.loads(child.stdout)]


def _found(answer: Mapping[str, Any]) -> dict[str, Any] | UserError:
    """Returns what a job found, or its error."""
    if "os_error" in answer:
        failed = DiskError(answer["os_error"])
        failed.errno = answer.get("errno")
        return failed
    return UserError(answer["error"]) if "error" in answer else answer["found"]
