"""What all commands share: parsers, results, errors of at most three lines, exit codes.

It imports nothing slow at the top: a mistake in the flags is reported before libraries load.
"""

import argparse
import contextlib
import gc
import json
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from vidjax.utils.errors import Expected, UserError, VidjaxWarning, of_the_system, printable

QUIET = "TQDM_DISABLE"  # the variable of tqdm that leaves bars out


class Result(NamedTuple):
    """The result of a command, with its exit code.

    Attributes:
      content: what `--json` prints, instead of the rest.
      rows: label -> text, a line each below a heading: the command's name and `note`. Without rows
        there is no heading.
      text: what is printed before the rows.
    """

    content: Mapping[str, Any]
    rows: Mapping[str, str] = {}
    text: str = ""
    note: str = ""
    code: int = 0


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated flags and raises UserError for mistakes."""

    def __init__(
        self,
        prog: str,
        *,
        usage: str | None = None,
        description: str | None = None,
        epilog: str | None = None,
    ):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, usage, description, epilog, formatter_class=layout, allow_abbrev=False
        )
        self.example = ""
        self.group: str | None = None  # the group of the fields that may be overridden

    def fields(self, group: str = "") -> None:
        """Lets `--config.FIELD=VALUE` override fields of `group`, such as `data.`; "" for all."""
        name = f"--config.{group}FIELD"  # only for --help: `split_overrides` takes these words
        about = f"overrides a field, e.g. --config.{group or 'seed=1'}{'dir=PATH' * bool(group)}"
        self.add_argument(name, metavar="VALUE", default=argparse.SUPPRESS, help=about)
        self.group = group

    def command(self, run: Callable[[argparse.Namespace], "Result"], *examples: str) -> None:
        """Makes this the parser of a command that `run` executes.

        It adds `--quiet`, `--json` and `--debug`. `examples` are the flags of typical calls.
        """
        self.example = f"{self.prog} {examples[0]}"
        lines = []
        for flags in examples:
            line = f"  {self.prog} {flags}"
            if len(line) > 80:
                first, _, others = flags.partition(" --")
                line = f"  {self.prog} {first} \\\n      --{others}"
            lines.append(line)
        self.epilog = "\n".join([f"example{'s' * (len(examples) > 1)}:", *lines])
        self.add_argument("--quiet", action="store_true", help="prints only the result")
        self.add_argument("--json", action="store_true", help="prints the result as JSON")
        self.add_argument("--debug", action="store_true", help="shows tracebacks")
        self.set_defaults(execute=run, parser=self)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print the usage and exit."""
        needs = f"{self.prog.removeprefix('vidjax ')} needs"
        message = message.replace("the following arguments are required:", needs)
        message = message.replace("one of the arguments", f"{needs} one of")
        message = message.removeprefix("argument ").removesuffix(" is required")
        example = f"example: {self.example}" if self.example else ""
        remedy = example or f"{self.prog} --help shows what it takes"
        raise UserError(f"{message}\n{remedy}")


def whole(low: int, high: int) -> Callable[[str], int]:
    """Returns the `type` of a flag whose value is a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text[:20]) <= high):
            raise argparse.ArgumentTypeError(
                f"wants a whole number from {low} to {high:,}, not '{text[:20]}'"
            )
        return int(text)

    return read


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits words into flags and overrides; `--config.F V` becomes `--config.F=V`."""
    own, overrides = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            own.append(word)
        elif "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(f"{word}={rest.pop(0)}")
        else:
            overrides.append(word)
    return own, overrides


def show(result: Result, name: str, *, as_json: bool) -> None:
    """Prints the result of the command `name`."""
    if as_json:
        say(json.dumps(_plain({"mode": name, **result.content}), allow_nan=False))
        return
    rows = [f"  {key:10}  {value}" for key, value in result.rows.items()]
    heading = [name + result.note] if rows else []
    if lines := [*([result.text] if result.text else []), *heading, *rows]:
        say("\n".join(lines))


def _plain(value: object) -> object:
    """Returns a value for JSON; floats that JSON lacks become the strings `inf`, `-inf`, `nan`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run(main: Callable[[], int]) -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    _open_closed_streams()
    # Before the imports that take seconds; training handles signals by itself.
    signal.signal(signal.SIGINT, stop_at_once)
    signal.signal(signal.SIGTERM, stop_at_once)
    warnings.simplefilter("ignore")  # warnings of libraries are meant for programmers
    warnings.filterwarnings("default", category=VidjaxWarning)
    warnings.showwarning = show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger().handlers[0].setFormatter(_Printable("%(message)s"))
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    code = main()
    gc.freeze()  # leaves out the last garbage collection, which takes over a second
    sys.exit(code)


def guarded(command: Callable[[], int], words: Sequence[str]) -> int:
    """Runs a command, prints its error if it fails, and returns its exit code.

    Codes: see `utils.errors`; of `check`, 3 is a damaged checkpoint. With `--debug` in `words`,
    the command line, it prints the traceback; with `--json`, `{"error": TEXT}` to standard output.
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
    """Hides progress bars and log messages, but no warning, while the context is open."""
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


def say(text: str) -> bool:
    """Prints the result of a command; returns False if nobody reads it any more."""
    return _print(text, sys.stdout)


def complain(text: str) -> None:
    """Prints at most three lines of an error or a warning."""
    lines = [line for line in text.split("\n") if line.strip()] or ["unknown error"]
    _print("\n".join(["vidjax: " + lines[0], *lines[1:3]]), sys.stderr)


def shown(path: Path) -> str:
    """Returns a path relative to the working directory if it lies below, else unchanged."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def short(text: str, most: int = 40) -> str:
    """Returns text of at most some letters, of which the middle is left out; the end stays."""
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - tail - 3]}...{text[-tail:]}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line for every row of a table; the cells of a column begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _print(text: str, stream: TextIO) -> bool:
    """Prints text of any origin; characters that the stream cannot encode are escaped.

    Returns False if the other end of a pipe was closed.
    """
    encoding = stream.encoding or "utf-8"
    text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `| head -1` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _open_closed_streams() -> None:
    """Opens streams closed by `2>&-`: else the next file opened would get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def text_of(error: Exception) -> str:
    """Returns the message of an error for a user; `complain` prints its first three lines."""
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
    """Returns True if an error says that the host or a device has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def exit_code(error: Exception) -> int | None:
    """Returns the exit code of an expected error, None for a bug; see `vidjax.utils.errors`."""
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
    """Handles a signal: ends the process at once, with exit code 128 + `signum`."""
    del frame
    # Not an exception: one that is raised within an import or a library's callback is lost there.
    os.write(2, b"vidjax: stopped\n")
    os._exit(128 + signum)
