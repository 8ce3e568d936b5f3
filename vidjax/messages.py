"""What commands say: errors and warnings of at most three lines, and their exit codes.

At the top are imports of the standard library alone: a mistake in the words of a command is
reported before the libraries, which take seconds, are loaded.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from vidjax.errors import Expected, UserError, of_the_system, printable

PROGRAM = "python -m vidjax.main"
QUIET = "TQDM_DISABLE"  # the variable of tqdm that leaves bars out


class Parser(argparse.ArgumentParser):
    """A parser of whole flags, whose errors are messages as those of every command."""

    def __init__(
        self,
        prog: str,
        description: str | None,
        usage: str | None = None,
        epilog: str | None = None,
    ):
        """Makes the parser; arguments are those of `argparse.ArgumentParser`."""
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, usage, description, epilog, formatter_class=layout, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print the usage and exit."""
        raise UserError(f"{message}\n--help lists the flags")


def run(main: Callable[[], int]) -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    _open_closed_streams()
    # Before the imports that take seconds; training handles signals by itself.
    signal.signal(signal.SIGINT, stop_at_once)
    signal.signal(signal.SIGTERM, stop_at_once)
    warnings.simplefilter("ignore")  # warnings of libraries are meant for programmers
    warnings.filterwarnings("default", category=UserWarning, module="vidjax")
    warnings.showwarning = show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger().handlers[0].setFormatter(_Printable("%(message)s"))
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    code = main()
    gc.freeze()  # leaves out the last garbage collection, which takes over a second
    sys.exit(code)


def guarded(command: Callable[[], int], words: Sequence[str]) -> int:
    """Runs a command and returns its exit code; says what went wrong.

    0 success, 1 a fault of vidjax, 2 a mistake of the user or in the data, 3 no usable checkpoint
    (in a check: a damaged one), 130 and 143 stopped by SIGINT and SIGTERM; see `vidjax.errors`.

    Args:
      command: the command, which returns its exit code.
      words: its words; with `--debug` an error is shown with its traceback, and with `--json` it is
        the object `{"error": TEXT}` on standard output, too.
    """
    try:
        return command()
    except KeyboardInterrupt:
        code, text = 130, "stopped"
        complain(text)
    except Exception as error:
        code, text = exit_code(error), text_of(error)
        if "--debug" in words or code is None:
            text = f"{type(error).__name__}: {text}" if code is None else text
            _print(traceback.format_exc(), sys.stderr)
        else:
            complain(text)
    if "--json" in words:
        say(json.dumps({"error": text}))
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
    _print(text, sys.stdout)


def complain(text: str) -> None:
    """Prints at most three lines of an error or a warning."""
    lines = [line for line in text.split("\n") if line.strip()] or ["unknown error"]
    _print("\n".join(["vidjax: " + lines[0], *lines[1:3]]), sys.stderr)


def shown(path: Path) -> str:
    """Returns a path as short as it can be written from the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _print(text: str, stream: TextIO) -> None:
    """Prints text of any origin; a stream that cannot write a letter gets its number."""
    encoding = stream.encoding or "utf-8"
    text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `| head -1` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _open_closed_streams() -> None:
    """Opens the streams that the caller has closed, as `2>&-` does.

    The next file that is opened would get the number of the stream, and what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


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
    return of_the_system(error) or str(error)


def is_memory(error: BaseException) -> bool:
    """Returns True if the host or a device has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def exit_code(error: Exception) -> int | None:
    """Returns the exit code of an expected error, None for a fault; see `vidjax.errors`."""
    if isinstance(error, ModuleNotFoundError):
        return None if (error.name or "").startswith("vidjax") else 2
    if isinstance(error, Expected):
        return error.exit_code
    return 2 if is_memory(error) or of_the_system(error) else None


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
