"""Runs functions in child processes with limits, so that they can read files from strangers.

A child process runs a module of this package that ends with `processes.serve(work)`.
`run_limited` starts the module, and returns the result of its function `work`. Arguments and result
are JSON values; arrays are passed in files. The CPU time and the address space of the child are
limited, and it can neither open connections nor start programs.

Process pools of Python are not used, because their processes import the user's program. A program
without `if __name__ == "__main__"` would then run again.
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
from typing import Any, NoReturn, TypeVar

from vidjax.utils.errors import DiskError, UserError, describe_system_error
from vidjax.utils.machine import max_open_files
from vidjax.utils.names import show

MALLOC_THRESHOLD = 32 << 20  # bytes; the largest threshold that glibc takes from the environment
MB = 1 << 20
# The elapsed time exceeds the CPU time if the disk is slow or other processes use the cores.
WALL_SECONDS, WALL_PER_CPU = 60, 20  # the limit of the elapsed time is 60 s + 20 x the CPU time

# Machine -> its number in the headers of Linux, and the numbers of the forbidden system calls:
# socket, execve, execveat, ptrace and io_uring_setup (which can open sockets, too).
# Linux 6.12 on an emulated aarch64 refused all of them. The rest of vidjax was never run there.
_CALLS = {
    "x86_64": (0xC000003E, (41, 59, 322, 101, 425)),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 425)),
}
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER, _PARENT_DEATH = 38, 22, 2, 1
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # EPERM
_SECOND_CALL_LIST = 0x40000000  # x86_64 numbers the same calls again from here on

Item = TypeVar("Item")
Result = TypeVar("Result")


class Children:
    """Starts child processes, and can kill all of them. Several threads may share an object."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self, module: str, *, given: bytes, timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a module with the input `given`. Raises TimeoutExpired after `timeout` seconds."""
        # PYTHONPATH makes the child import from the same folders as this process. The child has one
        # BLAS thread, because each thread would reserve address space. The MALLOC variables make
        # glibc keep freed memory, because the system would clear its pages before they are reused.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": str(MALLOC_THRESHOLD),
            "MALLOC_TRIM_THRESHOLD_": str(MALLOC_THRESHOLD),
        }
        command, pipe = [sys.executable, "-P", "-m", module], subprocess.PIPE
        with self._lock:
            if self._stopped:
                raise InterruptedError("stopped")  # `map_children` ignores this error
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
            self._started.append(child)
        with child:
            try:
                output, errors = child.communicate(given, timeout)
            except BaseException:
                child.kill()
                raise
        return subprocess.CompletedProcess(child.args, child.returncode, output, errors)

    def stop(self) -> None:
        """Kills all children. After this call, `run` starts no more children."""
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
    """Calls `function(children, item)` for each item, and returns the results in their order.

    Up to `workers` calls run at once, in threads. `children` is an object with which the function
    starts child processes. After the first error, all child processes are killed, and the error is
    raised. `progress` is the title of a progress bar, or "".
    """
    from tqdm import tqdm

    children = Children()
    # A child needs three open files, and a few more during its start.
    with ThreadPoolExecutor(max(1, int(min(workers, max_open_files() // 8)))) as threads:
        futures = [threads.submit(function, children, item) for item in items]
        hidden = not progress or None  # None hides the bar if standard error is not a terminal
        done = as_completed(futures)
        try:
            for future in tqdm(done, progress, len(futures), leave=False, disable=hidden):
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return [future.result() for future in futures]


def limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    """Limits the address space of this process, and its CPU time from now on."""
    import resource

    cpu = int(time.process_time()) + cpu_seconds
    limits = {
        resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: cpu, resource.RLIMIT_AS: memory_bytes,
    }  # fmt: skip
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (soft, hard))


def forbid_connections() -> None:
    """Prevents this process from opening sockets and starting programs, if the system supports it.

    Source: seccomp(2) of Linux, a filter of system calls that a process cannot remove.
    """
    if platform.machine() not in _CALLS:
        return
    machine, calls = _CALLS[platform.machine()]
    refuse = len(calls) + 1  # steps to skip from here to the last step, which refuses the call
    steps = [
        (_LOAD, 0, 0, 4),  # loads the machine
        (_IF_EQUAL, 0, refuse + 2, machine),
        (_LOAD, 0, 0, 0),  # loads the number of the call
        (_IF_AT_LEAST, refuse, 0, _SECOND_CALL_LIST),
        *((_IF_EQUAL, refuse - 1 - n, 0, call) for n, call in enumerate(calls)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero)
    prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), program, zero, zero)


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> NoReturn:
    """Calls `work` with each job that `run_limited_each` sends to this child process.

    Jobs come as JSON from standard input, and results go to standard output. Text that libraries
    print goes to standard error. Ends the process with the exit code 0.
    """
    # Kills this process when its parent process ends.
    ctypes.CDLL(None).prctl(_PARENT_DEATH, ctypes.c_ulong(signal.SIGKILL))
    with open(0, "rb", closefd=False) as given:
        jobs = json.load(given)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    limit_resources(jobs["memory_bytes"], jobs["cpu_seconds"])
    forbid_connections()
    limit = f"{jobs['memory_bytes'] // MB:,} MB"
    with answers:
        json.dump([_answer(work, path, given, limit) for path, given in jobs["given"]], answers)
    sys.stderr.flush()
    # In Python 3.14, a thread of Arrow that frees an array late would wait for ever, and the end of
    # the process for the thread.
    os._exit(0)


def _answer(
    work: Callable[[dict[str, Any]], dict[str, Any]], path: str, given: dict[str, Any], limit: str
) -> dict[str, Any]:
    """Calls `work`, and returns its result or its error as JSON, for `_parse_answer`."""
    try:
        return {"result": work(given)}
    except MemoryError:
        return {
            "error": f"'{path}' is refused, because reading it needs more memory than {limit}: "
            "split it into smaller files"
        }
    except UserError as error:
        kind = "os_error" if isinstance(error, OSError) else "error"
        return {kind: str(error), "errno": getattr(error, "errno", None)}
    except OSError as error:
        return {"os_error": describe_system_error(error) or str(error), "errno": error.errno}


def run_limited(
    module: str,
    path: Path,
    arguments: Mapping[str, object],
    *,
    memory_bytes: int,
    cpu_seconds: int,
    children: Children | None = None,
) -> dict[str, Any]:
    """Runs the function `work` of a module in a child process, and returns its result.

    Args:
      module: the name of a module that ends with `processes.serve(work)`.
      path: the file that `work` reads, for messages.
      arguments: the arguments of `work`, JSON values.
      memory_bytes: limit of the address space.
      cpu_seconds: limit of the CPU time. The elapsed time is limited to 60 seconds + 20 times this
        value.
      children: an object with which another thread can kill the child.

    Raises:
      UserError: `work` raised UserError, exceeded a limit, or crashed.
      DiskError: `work` could not read or write a file.
    """
    limits = {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds}
    (answer,) = run_limited_each(module, [(path, arguments)], **limits, children=children)
    if isinstance(answer, UserError):
        raise answer
    return answer


def run_limited_each(
    module: str,
    given: Sequence[tuple[Path, Mapping[str, object]]],
    *,
    memory_bytes: int,
    cpu_seconds: int,
    children: Children | None = None,
) -> list[dict[str, Any] | UserError]:
    """Calls the function `work` of a module several times in one child process.

    `given` has a pair for each call: the file that `work` reads, and the arguments of `work`. The
    limits apply to all calls together. For the other arguments, see `run_limited`. Returns the
    result or the error of each call. Raises UserError if the process exceeded a limit or crashed.
    """
    path = given[0][0]
    limits = {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds}
    jobs = {"given": [(os.fspath(path), dict(arguments)) for path, arguments in given], **limits}
    seconds = WALL_SECONDS + WALL_PER_CPU * cpu_seconds
    try:
        input_ = json.dumps(jobs).encode()
        child = (children or Children()).run(module, given=input_, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"'{path}' is refused, because reading it needs more than {seconds} s: "
            "split it into smaller files"
        ) from None
    if child.returncode == -signal.SIGXCPU:
        raise UserError(
            f"'{path}' is refused, because reading it needs more than {cpu_seconds} s of CPU time: "
            "split it into smaller files"
        )
    if child.returncode == -signal.SIGKILL:
        raise UserError(
            f"{path}: the process that reads it was killed, perhaps for lack of memory: "
            "close other programs, and run the command again"
        )
    if child.returncode < 0:
        name = f"signal {-child.returncode}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-child.returncode).name
        raise UserError(
            f"'{path}' is damaged or hostile: the process that reads it ended with {name}: "
            "write the file again, or leave it out"
        )
    if child.returncode:
        last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(
            f"{path}: the process that reads it failed: {show(last)}\n"
            "install vidjax again; if that does not help, report it"
        )
    return [_parse_answer(answer) for answer in json.loads(child.stdout)]


def _parse_answer(answer: Mapping[str, Any]) -> dict[str, Any] | UserError:
    if "os_error" in answer:
        failed = DiskError(answer["os_error"])
        failed.errno = answer.get("errno")
        return failed
    return UserError(answer["error"]) if "error" in answer else answer["result"]
