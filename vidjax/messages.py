"""What commands say: errors and warnings of at most three lines, and their exit codes.

At the top are imports of the standard library alone: a mistake in the words of a command is
reported before the libraries, which take seconds, are loaded.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

QUIET = "TQDM_DISABLE"  # the variable of tqdm that leaves bars out


def run(main: Callable[[], int]) -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    # Before the imports that take seconds; training handles signals by itself.
    signal.signal(signal.SIGINT, stop_at_once)
    signal.signal(signal.SIGTERM, stop_at_once)
    warnings.simplefilter("ignore")  # warnings of libraries are meant for programmers
    warnings.filterwarnings("default", category=UserWarning, module="vidjax")
    warnings.showwarning = show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    code = main()
    gc.freeze()  # leaves out the last garbage collection, which takes over a second
    sys.exit(code)


def guarded(command: Callable[[], int], words: Sequence[str]) -> int:
    """Runs a command and returns its exit code; says what went wrong.

    0 success, 2 a mistake of the user or in the data, 3 no usable checkpoint (in a check: a damaged
    one), 130 and 143 stopped by SIGINT and SIGTERM.

    Args:
      command: the command, which returns its exit code.
      words: its words; with `--debug` an error is shown with its traceback.
    """
    try:
        return command()
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    except Exception as error:
        code = exit_code(error)
        if "--debug" in words or code is None:
            traceback.print_exc()
        else:
            complain(text_of(error))
        return code or 1


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leaves out progress and messages, but no warning."""
    log = logging.getLogger("vidjax")
    before, level = os.environ.get(QUIET), log.level
    os.environ[QUIET] = "1"
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
        os.environ.pop(QUIET)
        if before is not None:
            os.environ[QUIET] = before


def say(text: str) -> None:
    """Prints the result of a command."""
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader has seen enough, as `| head -1` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Prints at most three lines of an error or a warning."""
    lines = [line for line in text.splitlines() if line.strip()] or ["unknown error"]
    print("\n".join(["vidjax: " + lines[0], *lines[1:3]]), file=sys.stderr)  # noqa: T201


def text_of(error: Exception) -> str:
    """Returns what a user is told of an error; `complain` prints the first three lines."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package '{error.name}' is missing or broken: pip install 'vidjax[train]' "
            "installs what training, evaluation and reports need"
        )
    if is_memory(error):
        reason = (str(error) or "no more is free").splitlines()[0][:200]
        return (
            f"the memory is exhausted: {reason}\n"
            "take fewer clips at a time: --config.batch_size=32, --config.eval.block_size=64,\n"
            "fewer frames: --config.data.max_frames=32, or clips from disk: "
            "--config.data.mode=streaming"
        )
    return str(error)


def is_memory(error: BaseException) -> bool:
    """Returns True if the host or a device has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def exit_code(error: Exception) -> int | None:
    """Returns the exit code of an expected error, None for a fault of the program."""
    if isinstance(error, ModuleNotFoundError):
        return None if (error.name or "").startswith("vidjax") else 2
    if isinstance(error, (ValueError, OSError)) or is_memory(error):
        return 2  # before the imports below, which take a second

    from vidjax.run.checkpoint import CheckpointError
    from vidjax.run.signals import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_code
    return 3 if isinstance(error, CheckpointError) else None


def show_warning(message: object, *args: object, **kwargs: object) -> None:
    """Prints a warning; arguments are those of `warnings.showwarning`."""
    del args, kwargs  # the place in the code
    complain(f"warning: {message}")


def stop_at_once(signum: int, frame: object) -> None:
    """Ends the process; a handler of signals."""
    del frame
    # Not an exception: one that is raised within an import or a library's callback is lost there.
    os.write(2, b"vidjax: stopped\n")
    os._exit(128 + signum)
