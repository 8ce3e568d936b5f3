"""Runs a command, and ends its process. Errors and signals become messages and exit codes.

The module imports no slow library, so that a mistake in the flags is reported immediately.
"""

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from vidjax.utils import files
from vidjax.utils.errors import Expected, VidjaxWarning, describe_system_error, escape_controls
from vidjax.utils.messages import print_escaped, print_problem, print_text

# The signals that end a command, or make training save and stop. SIGUSR1 comes from a cluster
# before the time of a job is over (`--signal=USR1@120` of Slurm). SIGHUP comes if a terminal is
# closed. `nohup` makes the process ignore SIGHUP, which then stays ignored.
_HANGUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *_HANGUP)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Runs the function `main` of a program. Ends the process with the exit code from `main`."""
    _open_closed_streams()
    # Set before the slow imports. Training installs its own handlers.
    for number in SIGNALS:
        signal.signal(number, stop_at_once)
    warnings.simplefilter("ignore")  # the warnings of libraries are meant for programmers
    warnings.filterwarnings("default", category=VidjaxWarning)
    warnings.showwarning = show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger().handlers[0].setFormatter(_Printable("%(message)s"))
    logging.getLogger("vidjax").setLevel(logging.INFO)
    # The errors of absl, TensorFlow and XLA also arrive as exceptions.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # By default, Python would search for garbage 800 times in a short training, and find little.
    gc.set_threshold(100_000, 20, 50)
    code = main()
    gc.freeze()  # skips the last garbage collection, which would take over a second
    sys.exit(code)


def run_to_exit_code(command: Callable[[], int], words: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. If the command fails, prints the error.

    `words` is the command line, by default `sys.argv`. With `--debug`, the traceback is printed.
    With `--json`, the error is printed to standard output as `{"error": TEXT}`. `utils.errors`
    lists the exit codes.
    """
    words = sys.argv if words is None else words
    try:
        return command()
    except KeyboardInterrupt:
        code, text = 130, "stopped"
        print_problem(text)
    except Exception as error:
        code, text = get_exit_code(error), describe_error(error)
        if "--debug" in words or code is None:
            print_escaped(traceback.format_exc(), sys.stderr)
        else:
            print_problem(text)
    if "--json" in words:
        with contextlib.suppress(OSError):  # the disk of standard output may be full
            print_text(json.dumps({"error": text}))
    return code or 1


class _Printable(logging.Formatter):
    """Formats log messages, with escaped control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def _open_closed_streams() -> None:
    """Opens /dev/null in place of each closed standard stream.

    Otherwise, the next opened file would get the number of the stream, and output would be written
    into this file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def describe_error(error: Exception) -> str:
    """Returns the message of an error. If the user can correct the error, adds a remedy."""
    if get_exit_code(error) is None:
        return f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package '{error.name}' is missing or broken\n"
            "install the packages of training, evaluation and reports: pip install 'vidjax[train]'"
        )
    if is_out_of_memory(error):
        reason = (str(error) or "a request failed").splitlines()[0][:200]
        return (
            f"no memory is left: {reason}\n"
            "to train, or to resume a run: --config.data.mode=streaming; in a new run (another "
            "--workdir) also --config.batch_size=32 --config.data.max_frames=32\n"
            "to evaluate: --config.eval.block_size=64; for other commands, use fewer clips"
        )
    return describe_system_error(error) or str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if an error means that the host or a device has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def get_exit_code(error: Exception) -> int | None:
    """Returns the exit code for an error, or None for a bug. `utils.errors` lists the codes."""
    if isinstance(error, ModuleNotFoundError):
        return None if (error.name or "").startswith("vidjax") else 2
    if isinstance(error, Expected):
        return error.exit_code
    return 2 if is_out_of_memory(error) or describe_system_error(error) else None


def show_warning(message: object, *args: object, **kwargs: object) -> None:
    """Prints a warning without the line of code. This function replaces `warnings.showwarning`."""
    del args, kwargs
    print_problem(f"warning: {message}")


def stop_at_once(signum: int, frame: object = None) -> NoReturn:
    """Handles a signal: ends the process immediately with exit code 128 + `signum`."""
    del frame
    # An exception would be lost during an import or in the callback of a library.
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, b"vidjax: stopped\n")
    files.remove_scratch_folders()
    os._exit(128 + signum)
