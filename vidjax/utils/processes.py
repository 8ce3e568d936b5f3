"""Runs functions in child processes with limits, so that they can read untrusted files.

A child process runs a module of vidjax that ends with `processes.serve(work)`. `run_limited` starts
the module, and returns the result of its function `work`. Arguments and result are JSON values.
Arrays are passed in files. The child has limits of CPU time, address space, output, and size of
each written file. The child can use only files that it needs, and no connections or programs, see
`confinement`. The child gets only environment variables that it needs.

A hostile file may take over the child, and then chooses the result. So `run_limited` raises an
error if the result does not fit the class `kind`. If the child has written files, the caller reads
them in a block `with doubt(path)`, which turns errors into a UserError.

Process pools of Python are not used, because their processes import the user's program. A program
without `if __name__ == "__main__"` would then run again.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from vidjax.utils import confinement
from vidjax.utils.errors import DiskError, NetError, UserError, describe_system_error
from vidjax.utils.machine import max_open_files
from vidjax.utils.names import show

MALLOC_THRESHOLD = 32 << 20  # bytes; the largest threshold that glibc takes from the environment
MB = 1 << 20
# The elapsed time exceeds the CPU time if the disk is slow or other processes use the cores.
WALL_SECONDS, WALL_PER_CPU = 60, 20  # the limit of the elapsed time is 60 s + 20 x the CPU time
OUTPUT_BYTES = 64 * MB  # the results of 50 photos, or of a film with many tracks, take a few MB
KEPT_ERROR_BYTES = 1 << 16  # of the end of standard error
READ_BYTES = 1 << 16
# Environment variables that a child gets. All others may be secrets, such as AWS_SECRET_ACCESS_KEY.
VARIABLES = re.compile(
    "PATH|HOME|LANG|LANGUAGE|TZ|TZDIR|TMPDIR|TMP|TEMP|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH"
    "|LD_PRELOAD|GLIBC_TUNABLES|PYTHON.*"
    "|(LC|VIDJAX|OMP|GOMP|KMP|MKL|OPENBLAS|MALLOC|ORT|ARROW)_.*"
)

_PARENT_DEATH = 1
CHILD = "VIDJAX_CHILD"  # an environment variable that is set only in a child process
# Key of an answer -> the error that `work` raised.
_ERRORS = {"error": UserError, "os_error": DiskError, "net_error": NetError}
# Errors of the system that the files of a child can cause.
_OF_FILES = (None, errno.ENOENT, errno.EACCES)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Children:
    """Starts child processes, and can kill all of them. Several threads may use one object."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self, module: str, *, given: bytes, timeout: float, output_bytes: int = OUTPUT_BYTES
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a module in a child process with the standard input `given`, and waits for its end.

        After `timeout` seconds, raises TimeoutExpired. If the output becomes longer than
        `output_bytes`, the child is killed. Then the returned output is longer than `output_bytes`,
        too.
        """
        # PYTHONPATH makes the child import from the same folders as this process. The child has one
        # BLAS thread, because each thread would reserve address space. The MALLOC variables make
        # glibc keep freed memory, because the system would clear its pages before they are reused.
        environment = {name: x for name, x in os.environ.items() if VARIABLES.fullmatch(name)} | {
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
                output, errors = _exchange(child, given, timeout, output_bytes)
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


def _exchange(
    child: "subprocess.Popen[bytes]", given: bytes, timeout: float, output_bytes: int
) -> tuple[bytes, bytes]:
    """Sends `given` to a child process. Returns its output, and the end of its standard error.

    `Popen.communicate` would keep an output of any size in memory. Here, the output is limited. For
    `timeout` and `output_bytes`, see `Children.run`.
    """
    assert child.stdin and child.stdout and child.stderr
    left, end = memoryview(given), time.monotonic() + timeout
    output, errors = bytearray(), bytearray()
    with selectors.DefaultSelector() as pipes:
        pipes.register(child.stdin, selectors.EVENT_WRITE)
        pipes.register(child.stdout, selectors.EVENT_READ, output)
        pipes.register(child.stderr, selectors.EVENT_READ, errors)
        while pipes.get_map():
            if (seconds := end - time.monotonic()) <= 0:
                raise subprocess.TimeoutExpired(child.args, timeout, bytes(output))
            for key, _ in pipes.select(seconds):
                if key.data is None:
                    try:
                        left = left[os.write(key.fd, left[: select.PIPE_BUF]) :]
                    except BrokenPipeError:  # the child has ended
                        left = left[:0]
                    if not left:
                        pipes.unregister(child.stdin)
                        child.stdin.close()
                elif piece := os.read(key.fd, READ_BYTES):
                    key.data.extend(piece)
                else:
                    pipes.unregister(key.fileobj)
            del errors[:-KEPT_ERROR_BYTES]
            if len(output) > output_bytes:
                child.kill()
                break
    child.wait(max(0.0, end - time.monotonic()))
    return bytes(output), bytes(errors)


def map_children(
    function: Callable[[Children, Item], Result],
    items: Sequence[Item],
    workers: int,
    *,
    progress: str = "",
) -> list[Result]:
    """Calls `function(children, item)` for each item, and returns the results in their order.

    Up to `workers` calls run at once, in threads. The function must start its child processes with
    `children`. After the first error, all child processes are killed, and the error is raised.
    `progress` is the title of a progress bar, or "" for none.
    """
    children = Children()
    # A child needs three open files, and a few more during its start.
    with ThreadPoolExecutor(max(1, int(min(workers, max_open_files() // 8)))) as threads:
        futures = [threads.submit(function, children, item) for item in items]
        done = as_completed(futures)
        if progress:
            from tqdm import tqdm

            # If standard error is not a terminal, None hides the bar.
            done = tqdm(done, progress, len(futures), leave=False, disable=None)
        try:
            for future in done:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return [future.result() for future in futures]


def limit_resources(memory_bytes: int, cpu_seconds: int, calls: int) -> None:
    """Limits the memory, the CPU time and the size of written files of this process.

    Call this function before each job (a file to read). `memory_bytes` limits the address space and
    each written file. The soft limit of CPU time is `cpu_seconds`, for the next job. The hard limit
    is `calls` x `cpu_seconds` + 1, for all jobs that are left, whose number is `calls`.
    """
    import resource

    now = int(time.process_time())
    limits = {  # one more second, because the signal of the last limit does not name the limit
        resource.RLIMIT_CPU: (now + cpu_seconds, now + cpu_seconds * calls + 1),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_FSIZE: (memory_bytes, memory_bytes),
    }
    for kind, (soft, last) in limits.items():
        _, hard = resource.getrlimit(kind)
        last = last if hard == resource.RLIM_INFINITY else min(last, hard)
        resource.setrlimit(kind, (min(soft, last), last))


def serve(work: Callable[[dict[str, Any]], object]) -> NoReturn:
    """Calls `work` with each job that `run_limited_each` sends to this child process.

    Reads the jobs as JSON from standard input, and writes the results to standard output. Text that
    libraries print goes to standard error. Finally ends the process with the exit code 0.
    """
    os.environ[CHILD] = "1"
    # Kills this process when its parent process ends.
    ctypes.CDLL(None).prctl(_PARENT_DEATH, ctypes.c_ulong(signal.SIGKILL))
    with open(0, "rb", closefd=False) as given:
        jobs = json.load(given)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    confinement.confine([path for path, _ in jobs["given"]] + jobs["reads"], jobs["writes"])
    limit = f"{jobs['memory_bytes'] // MB:,} MB"
    with answers:
        for number, (path, arguments) in enumerate(jobs["given"]):
            calls = len(jobs["given"]) - number
            limit_resources(jobs["memory_bytes"], jobs["cpu_seconds"], calls)
            print(json.dumps(_answer(work, path, arguments, limit)), file=answers, flush=True)
    sys.stderr.flush()
    # In Python 3.14, a thread of Arrow that frees an array late would wait for ever, and the end of
    # the process for the thread.
    os._exit(0)


def _answer(
    work: Callable[[dict[str, Any]], object], path: str, given: dict[str, Any], limit: str
) -> dict[str, Any]:
    """Calls `work` with the arguments `given`, and returns its result or its error.

    The returned dict is a JSON value for `_parse_answer`. `path` is the file that `work` reads.
    `limit` is the limit of the memory as text, for the message of an error.
    """
    try:
        return {"result": msgspec.to_builtins(work(given))}
    except MemoryError:
        return {"error": _explain_refusal(path, f"needs more memory than {limit}")}
    except UserError as error:
        (*_, key) = (name for name, kind in _ERRORS.items() if isinstance(error, kind))
        return {key: str(error), "errno": getattr(error, "errno", None)}
    except OSError as error:
        if error.errno == errno.EFBIG:
            return {"error": _explain_refusal(path, f"would write a file of more than {limit}")}
        return {"os_error": describe_system_error(error) or str(error), "errno": error.errno}


def _explain_refusal(path: str | Path, need: str) -> str:
    """Returns the message for a file that needs more than the limits of the child process.

    `need` is the end of the sentence "reading it ...", such as "needs more than 30 s".
    """
    return f"'{path}' is refused, because reading it {need}: split it into smaller files"


def _make_hostile_error(path: Path, event: str) -> UserError:
    """Returns the error for a file that made the child process fail.

    `event` is the end of "the process that reads it ...", such as "gave no usable result".
    """
    return UserError(
        f"'{path}' is damaged or hostile: the process that reads it {event}: "
        "write the file again, or leave it out"
    )


def run_limited(
    module: str,
    path: Path,
    arguments: Mapping[str, object],
    kind: type[Result],
    **limits: Any,  # noqa: ANN401  (the other arguments of `run_limited_each`)
) -> Result:
    """Runs the function `work` of a module in a child process, and returns its result.

    `path` is the file that `work` reads. `arguments` are the arguments of `work`, JSON values. For
    `kind` and `limits`, see `run_limited_each`.

    Raises:
      UserError: `work` raised UserError, exceeded a limit, or crashed.
      DiskError: `work` could not read or write a file.
    """
    (answer,) = run_limited_each(module, [(path, arguments)], kind, **limits)
    if isinstance(answer, UserError):
        raise answer
    return answer


def run_limited_each(
    module: str,
    given: Sequence[tuple[Path, Mapping[str, object]]],
    kind: type[Result],
    *,
    memory_bytes: int,
    cpu_seconds: int,
    output_bytes: int = OUTPUT_BYTES,
    reads: Sequence[Path] = (),
    writes: Sequence[Path] = (),
    children: Children | None = None,
) -> list[Result | UserError]:
    """Calls the function `work` of a module several times, if possible in one child process.

    Args:
      module: the name of a module that ends with `processes.serve(work)`.
      given: a pair for each call: the file that `work` reads, and the arguments of `work`.
      kind: the class of the results. A result that does not fit is an error.
      memory_bytes: limit of the address space, and of each file that `work` writes.
      cpu_seconds: limit of the CPU time of each call. The elapsed time is limited to 60 seconds +
        20 times this value.
      output_bytes: limit of the JSON of the results.
      reads: files and folders that `work` may read, besides the files in `given`.
      writes: folders in which `work` may write and delete files.
      children: an object through which another thread can kill the child.

    Returns the result or the error of each call.

    If the child exceeds a limit or crashes, a new child repeats the unfinished call and does the
    remaining calls. But if the unfinished call was the first call of the child, it gets an error,
    because no other call can be the cause.
    """
    answers: list[Result | UserError] = []
    children = children or Children()
    limits = {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds}
    jobs = {**limits, "reads": [*map(str, reads)], "writes": [*map(str, writes)]}
    while left := given[len(answers) :]:
        jobs["given"] = [(os.fspath(path), dict(arguments)) for path, arguments in left]
        seconds = WALL_SECONDS + WALL_PER_CPU * cpu_seconds * len(left)
        try:
            child = children.run(
                module, given=json.dumps(jobs).encode(), timeout=seconds, output_bytes=output_bytes
            )
            output = child.stdout
        except subprocess.TimeoutExpired as expired:
            child, output = None, expired.output or b""
        lines = output.split(b"\n", len(left))
        if len(output) <= output_bytes:
            lines.pop()  # it is empty, or the process has not finished it
        pairs = zip(left, lines, strict=False)
        answers += [_parse_answer(path, line, kind) for (path, _), line in pairs]
        if not lines:
            answers.append(_describe_end(left[0][0], child, seconds, cpu_seconds))
    return answers


def _describe_end(
    path: Path, child: subprocess.CompletedProcess[bytes] | None, seconds: int, cpu_seconds: int
) -> UserError:
    """Returns the error if the child process that reads `path` has ended without an answer.

    `child` is the ended process, or None if the process was killed after `seconds`.
    """
    if child is None or child.returncode == -signal.SIGXCPU:
        limit = f"{cpu_seconds} s of CPU time" if child else f"{seconds} s"
        return UserError(_explain_refusal(path, f"needs more than {limit}"))
    if child.returncode == -signal.SIGKILL:
        return UserError(
            f"{path}: the process that reads it was killed, perhaps for lack of memory: "
            "close other programs, and run the command again"
        )
    if child.returncode < 0:
        name = f"signal {-child.returncode}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-child.returncode).name
        return _make_hostile_error(path, f"ended with {name}")
    last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return UserError(
        f"{path}: the process that reads it failed: {show(last)}\n"
        "install vidjax again; if that does not help, report it"
    )


@contextlib.contextmanager
def doubt(path: Path) -> Iterator[None]:
    """Turns errors in a `with` block, which uses the result of a child process, into a UserError.

    `path` is the file that the child has read. A hostile file may have taken over the child, so the
    result may contain anything. If the disk fails, the OSError stays unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in _OF_FILES:
            raise
        raise _make_hostile_error(path, "gave no usable result") from error


def _parse_answer(path: Path, line: bytes, kind: type[Result]) -> Result | UserError:
    """Returns the result or the error that a child process has printed in a line.

    `path` is the file that the child has read, and `kind` is the class of the result.
    """
    try:
        with doubt(path):
            answer = json.loads(line)
            if "result" in answer:
                return msgspec.convert(answer["result"], kind)
            key, text = next((key, answer[key]) for key in _ERRORS if key in answer)
            lines = msgspec.convert(text, str)[:KEPT_ERROR_BYTES].split("\n")
            failed = _ERRORS[key]("\n".join(lines[:3]))
            if isinstance(failed, DiskError):
                failed.errno = msgspec.convert(answer.get("errno"), int | None)
            return failed
    except UserError as error:
        return error
