"""Parses the flags of all commands, prints their results and errors, and returns exit codes.

The module imports no slow library, so that a mistake in the flags is reported immediately.
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

from vidjax.utils.errors import (
    Expected,
    UserError,
    VidjaxWarning,
    describe_system_error,
    escape_controls,
)
from vidjax.utils.scratch import remove_scratch_folders

PLURALS = {"person": "people", "identity": "identities"}  # plurals without the usual s
QUIET = "TQDM_DISABLE"  # the environment variable that hides the progress bars of tqdm


class Result(NamedTuple):
    """The result of a command."""

    content: Mapping[str, Any]  # the JSON object that `--json` prints instead of `text` and `rows`
    rows: Mapping[str, str] = {}  # label -> value, printed as lines below a heading
    text: str = ""  # text that is printed before the heading
    note: str = ""  # the end of the heading. The heading begins with the name of the command.
    code: int = 0  # the exit code


class _StoreOnce(argparse.Action):
    """Stores the value of a flag. If the flag is given twice, raises UserError."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if option_string and getattr(namespace, self.dest) is not self.default:
            raise UserError(f"{option_string} is given twice: give one value")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser that accepts no abbreviated flags and raises UserError for a mistake."""

    def __init__(self, prog: str, **options: Any):  # noqa: ANN401 (the options of argparse)
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, formatter_class=layout, allow_abbrev=False, **options)
        self.register("action", None, _StoreOnce)
        self.example = ""
        # The command may override fields that begin with this text, or no field if it is None.
        self.group: str | None = None

    def fields(self, group: str = "", *, example: str) -> None:
        """Lets the command override fields that begin with `group`, e.g. `data.`, or all fields.

        `example` is shown by `--help`, such as `seed=1` for `--config.seed=1`.
        """
        name = f"--config.{group}FIELD"  # only for --help: `split_overrides` removes these words
        about = f"overrides a field, e.g. --config.{example}"
        self.add_argument(name, metavar="VALUE", default=argparse.SUPPRESS, help=about)
        self.group = group

    def command(self, run: Callable[[argparse.Namespace], "Result"], *examples: str) -> None:
        """Sets the function and the `examples` of the command. Adds --quiet, --json and --debug."""
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
        """Raises UserError with the message, and an example of the command."""
        needs = f"{self.prog.removeprefix('vidjax ')} needs"
        message = message.replace("the following arguments are required:", needs)
        message = message.replace("one of the arguments", f"{needs} one of")
        message = message.removeprefix("argument ").removesuffix(" is required")
        example = f"example: {self.example}" if self.example else ""
        remedy = example or f"to see all arguments: {self.prog} --help"
        raise UserError(f"{message}\n{remedy}")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Returns a `type` for `add_argument` that reads a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text[:20]) <= high):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high:,}, not '{text[:20]}'"
            )
        return int(text)

    return read


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words that override no field, and the words that override a field.

    The two words `--config.FIELD VALUE` become a single word, `--config.FIELD=VALUE`.
    """
    flags, overrides = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            flags.append(word)
        elif "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(f"{word}={rest.pop(0)}")
        else:
            overrides.append(word)
    return flags, overrides


def print_result(result: Result, name: str, *, as_json: bool) -> None:
    """Prints the result of the command `name` as text or JSON."""
    if as_json:
        content = _plain({"mode": name, **result.content})
        print_text(json.dumps(content, allow_nan=False, default=str))
        return
    rows = [f"  {key:10}  {value}" for key, value in result.rows.items()]
    heading = [name + result.note] if rows else []
    if lines := [*([result.text] if result.text else []), *heading, *rows]:
        print_text("\n".join(lines))


def _plain(value: object) -> object:
    """Converts a value for JSON. Infinities and NaN become the strings `inf`, `-inf`, `nan`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run_main(main: Callable[[], int]) -> NoReturn:
    """Runs `main`, and ends the process with the exit code that `main` returns."""
    _open_closed_streams()
    # Set before the slow imports. Training installs its own handlers.
    signal.signal(signal.SIGINT, stop_at_once)
    signal.signal(signal.SIGTERM, stop_at_once)
    warnings.simplefilter("ignore")  # the warnings of libraries are meant for programmers
    warnings.filterwarnings("default", category=VidjaxWarning)
    warnings.showwarning = show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger().handlers[0].setFormatter(_Printable("%(message)s"))
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # its errors also arrive as exceptions
    # By default, Python would search for garbage 800 times in a short training, and find little.
    gc.set_threshold(100_000, 20, 50)
    code = main()
    gc.freeze()  # skips the last garbage collection, which would take over a second
    sys.exit(code)


def run_to_exit_code(command: Callable[[], int], words: Sequence[str]) -> int:
    """Runs a command and returns its exit code. If the command fails, prints the error.

    `words` is the command line. With `--debug`, the traceback is printed. With `--json`, the error
    is printed to standard output as `{"error": TEXT}`. `utils.errors` lists the exit codes.
    """
    try:
        return command()
    except KeyboardInterrupt:
        code, text = 130, "stopped"
        print_problem(text)
    except Exception as error:
        code, text = get_exit_code(error), describe_error(error)
        if "--debug" in words or code is None:
            text = f"{type(error).__name__}: {text}" if code is None else text
            _print(traceback.format_exc(), sys.stderr)
        else:
            print_problem(text)
    if "--json" in words:
        with contextlib.suppress(OSError):  # the disk of standard output may be full
            print_text(json.dumps({"error": text}))
    return code or 1


@contextlib.contextmanager
def hide_progress() -> Iterator[None]:
    """Hides progress bars and log messages while the context is open. Warnings still appear."""
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


def print_text(text: str) -> bool:
    """Prints text to standard output. Returns False if standard output is a closed pipe."""
    return _print(text, sys.stdout)


def print_problem(text: str) -> None:
    """Prints the first three lines of an error or a warning to standard error."""
    lines = [line for line in text.split("\n") if line.strip()] or ["unknown error"]
    _print("\n".join(["vidjax: " + lines[0], *lines[1:3]]), sys.stderr)


def relative_path(path: Path) -> str:
    """Returns `path` relative to the working directory, or unchanged if it lies elsewhere."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def shorten(text: str, most: int = 40) -> str:
    """Shortens text to `most` letters. "..." replaces letters from the middle."""
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - tail - 3]}...{text[-tail:]}"


def list_some(names: Sequence[str], most: int = 5) -> str:
    """Joins up to `most` shortened names by commas. "..." shows that there are more names."""
    return ", ".join(map(shorten, names[:most])) + ", ..." * (len(names) > most)


def count(number: int, noun: str) -> str:
    """Returns a number with its noun, such as `1 clip` or `1,234 clips`."""
    return f"{number:,} {noun if number == 1 else PLURALS.get(noun, f'{noun}s')}"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line of text for every row, and pads the cells of a column to equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _print(text: str, stream: TextIO) -> bool:
    """Prints text with escaped control characters. Returns False if the text is lost."""
    encoding = stream.encoding or "utf-8"
    text = escape_controls(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise  # a lost result is an error; a lost message is none
        drop_output(stream)
        return False
    return True


def drop_output(stream: TextIO) -> None:
    """Discards all later output of `stream`, which is a closed pipe or a file on a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def _open_closed_streams() -> None:
    """Opens /dev/null for each closed standard stream, so that no other file takes its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def describe_error(error: Exception) -> str:
    """Returns the message of an error, with a remedy if a user can correct the error."""
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
    """Returns the exit code of an error, as `utils.errors` lists it, or None for a bug."""
    if isinstance(error, ModuleNotFoundError):
        return None if (error.name or "").startswith("vidjax") else 2
    if isinstance(error, Expected):
        return error.exit_code
    return 2 if is_out_of_memory(error) or describe_system_error(error) else None


def show_warning(message: object, *args: object, **kwargs: object) -> None:
    """Prints a warning without the line of code. It replaces `warnings.showwarning`."""
    del args, kwargs
    print_problem(f"warning: {message}")


def stop_at_once(signum: int, frame: object = None) -> NoReturn:
    """Ends the process immediately with exit code 128 + `signum`. It is a signal handler."""
    del frame
    # An exception would be lost during an import or in the callback of a library.
    os.write(2, b"vidjax: stopped\n")
    remove_scratch_folders()
    os._exit(128 + signum)
