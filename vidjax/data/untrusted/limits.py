"""Limits of a child process that reads bytes of unknown origin, and how it tells what it found.

A job is a module of this package that ends with `sys.exit(limits.serve(work))`. `run_limited`
starts it, gives `work` its arguments, and returns its answer, both as JSON; arrays go through
files. A job has three limits: address space (on Linux), CPU time, and that it may open no
connection and start no program (on Linux). There it also ends with the process that started it.
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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vidjax.data.processes import Children
from vidjax.data.untrusted.names import show
from vidjax.errors import DiskError, UserError, of_the_system

EXIT_REFUSED = 2
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
    """Does the job on standard input under its limits, prints the answer, returns the exit status.

    `work` gets the arguments and returns the answer, both for JSON. What libraries print goes to
    standard error.
    """
    end_with_parent()
    with open(0, "rb", closefd=False) as given:
        job = json.load(given)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    limit_resources(job["memory_bytes"], job["cpu_seconds"])
    forbid_connections()
    try:
        answer = {"found": work(job["arguments"])}
    except MemoryError:
        most = f"{job['memory_bytes'] // MB:,} MB"
        answer = {"error": f"{job['path']}: refused: reading it needs more memory than {most}"}
    except UserError as error:
        kind = "os_error" if isinstance(error, OSError) else "error"
        answer = {kind: str(error), "errno": getattr(error, "errno", None)}
    except OSError as error:
        answer = {"os_error": of_the_system(error) or str(error), "errno": error.errno}
    with answers:
        json.dump(answer, answers)
    return 0 if "found" in answer else EXIT_REFUSED


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
    job = json.dumps({"path": os.fspath(path), "arguments": dict(arguments), **limits})
    seconds = WALL_SECONDS + WALL_PER_CPU * cpu_seconds
    try:
        child = (children or Children()).run(module, given=job.encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: refused: reading it needs more than {seconds} s") from None
    answer = answer_of(path, child, cpu_seconds)
    if "os_error" in answer:
        failed = DiskError(answer["os_error"])
        failed.errno = answer.get("errno")
        raise failed
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["found"]


def answer_of(
    path: Path, child: subprocess.CompletedProcess[bytes], cpu_seconds: int
) -> dict[str, Any]:
    """Returns the JSON object that an ended child printed; UserError if it crashed or was killed.

    `path` is the file that it read.
    """
    if child.returncode == -signal.SIGXCPU:
        raise UserError(f"{path}: refused: reading it needs more than {cpu_seconds} s of CPU time")
    if child.returncode == -signal.SIGKILL:
        raise UserError(f"{path}: its reader was killed from outside: is memory short?")
    if child.returncode < 0:
        name = f"signal {-child.returncode}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-child.returncode).name
        raise UserError(f"{path}: damaged or hostile: its reader ended with {name}")
    if child.returncode not in (0, EXIT_REFUSED):
        last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(
            f"{path}: the process that reads it failed: {show(last)}\n"
            "install vidjax again; if that does not help, report it"
        )
    return json.loads(child.stdout)
