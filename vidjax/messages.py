"""What all commands share: flags, results, errors of at most three lines, exit codes.

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

from vidjax.errors import Expected, UserError, closest, of_the_system, printable

PROGRAM = "python -m vidjax.main"
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


class Command(NamedTuple):
    """A command, `vidjax NAME` or `vidjax gallery NAME`; each `example` has the flags of a call."""

    about: str
    add_flags: "Callable[[Parser], None]"
    run: Callable[[argparse.Namespace], Result]
    example: tuple[str, ...]


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated flags, and raises UserError for mistakes."""

    def __init__(
        self,
        prog: str,
        description: str | None,
        usage: str | None = None,
        epilog: str | None = None,
    ):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, usage, description, epilog, formatter_class=layout, allow_abbrev=False
        )
        self.flags = {"--help": ""}  # flag -> what it needs to be given, empty if nothing
        self.takes_fields = False

    def flag(self, name: str, metavar: str, about: str, *, needed: bool = False) -> None:
        """Adds a flag with a value; `about` is its help, and `needed` makes it required."""
        self.add_argument(name, metavar=metavar, help=f"{about} (needed)" if needed else about)
        self.flags[name] = f"{name}={metavar}: {about}" if needed else ""

    def switch(self, name: str, about: str) -> None:
        """Adds a flag without a value."""
        self.add_argument(name, action="store_true", help=about)
        self.flags[name] = ""

    def fields(self, group: str = "") -> None:
        """Lets `--config.FIELD=VALUE` override fields; only help shows `group`, e.g. `data.`."""
        name = f"--config.{group}FIELD"  # for the help alone: `split_overrides` takes these words
        about = f"overrides a field, e.g. --config.{group or 'seed=1'}{'dir=PATH' * bool(group)}"
        self.add_argument(name, metavar="VALUE", default=argparse.SUPPRESS, help=about)
        self.flags[f"{name}=VALUE"] = ""
        self.takes_fields = True

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print the usage and exit."""
        raise UserError(f"{message.removeprefix('argument ')}\n--help lists the flags")


def make_parser(prog: str, name: str, command: Command) -> Parser:
    """Returns the parser of a command, with `--quiet`, `--json` and `--debug`."""
    examples = []
    for flags in command.example:
        line = f"  {prog} {name} {flags}"
        if len(line) > 80:
            first, _, others = flags.partition(" --")
            line = f"  {prog} {name} {first} \\\n      --{others}"
        examples.append(line)
    about = f"{command.about[0].upper()}{command.about[1:]}."
    head = "examples" if examples[1:] else "example"
    parser = Parser(f"{prog} {name}", about, epilog="\n".join([f"{head}:", *examples]))
    command.add_flags(parser)
    parser.switch("--quiet", "prints the result alone, no progress")
    parser.switch("--json", "prints the result as a JSON object")
    parser.switch("--debug", "shows tracebacks")
    return parser


def parse(
    prog: str,
    commands: Mapping[str, Command],
    name: str,
    words: Sequence[str],
    near: Callable[[str], str | None] = lambda word: None,
    stray: Callable[[str], str | None] = lambda word: None,
) -> argparse.Namespace:
    """Returns the flags of a command, with its name, `command`, and `overrides` of fields.

    Args:
      words: the command line without `prog` and the command's name.
      near: a misspelt flag without its dashes -> the flag that it may mean, or None.
      stray: a word that is no flag -> a hint for the error message, or None.
    """
    own, overrides = split_overrides(words)
    parser = make_parser(prog, name, commands[name])
    args, strays = parser.parse_known_args(own)
    for word in [*([] if parser.takes_fields else overrides), *strays]:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            raise UserError(_about_flag(prog, commands, name, flag, near))
        hint = stray(word)
        hint = f": {hint}" if hint else f"\n{prog} {name} --help lists the flags"
        raise UserError(f"stray word '{word}'{hint}")
    if missing := [
        about for flag, about in parser.flags.items()
        if about and not getattr(args, flag.lstrip("-"))
    ]:  # fmt: skip
        raise UserError(f"{name} needs " + "\n".join(missing[:3]))
    args.command, args.overrides = name, tuple(overrides)
    return args


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


def _about_flag(
    prog: str,
    commands: Mapping[str, Command],
    name: str,
    flag: str,
    near: Callable[[str], str | None],
) -> str:
    """Returns the message for a flag that the command `name` does not take; others may."""
    parsers = {one: make_parser(prog, one, command) for one, command in commands.items()}
    has = [
        one for one, parser in parsers.items()
        if flag in parser.flags or (flag.startswith("--config.") and parser.takes_fields)
    ]  # fmt: skip
    own = parsers[name].flags
    if has:
        those = " and ".join(filter(None, [", ".join(has[:-1]), has[-1]]))
        do = "do" if has[1:] else "does"
        takes = ", ".join(one for one in own if one not in ("--help", "--debug"))
        return f"{name} takes no {flag}, but {those} {do}\nit takes {takes}"
    word = flag.lstrip("-").replace("-", "_")
    close = closest(word, [known.lstrip("-") for known in own if "." not in known], cutoff=0.7)
    match = f"--{close}" if close else near(word) if parsers[name].takes_fields else None
    hint = f": did you mean {match}?" if match else f"\n{prog} {name} --help lists the flags"
    return f"no flag {flag}{hint}"


def no_command(name: str, commands: Mapping[str, Command]) -> UserError:
    """Returns the error of an unknown command; it says what the nearest does: some delete data."""
    match = closest(name.lower(), commands, cutoff=0.6)
    if match is None:
        return UserError(f"no command '{name}': choose from {', '.join(commands)}")
    return UserError(
        f"no command '{name}': did you mean '{match}'?\n{match} {commands[match].about}"
    )


def show(result: Result, name: str, *, as_json: bool, named: bool = True) -> None:
    """Prints the result of a command; with `named`, its JSON has the command's name as `mode`."""
    if as_json:
        content = {"mode": name, **result.content} if named else result.content
        say(json.dumps(_plain(content), allow_nan=False))
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
    warnings.filterwarnings("default", category=UserWarning, module="vidjax")
    warnings.showwarning = show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger().handlers[0].setFormatter(_Printable("%(message)s"))
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    code = main()
    gc.freeze()  # leaves out the last garbage collection, which takes over a second
    sys.exit(code)


def run_command(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str]], argparse.Namespace],
    commands: Mapping[str, Command],
    *,
    named: bool = True,
) -> int:
    """Runs the command that `parse` finds in words, and returns the exit code of `guarded`.

    `argv` are the words, None those of the process; `named` is that of `show`.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args = parse(words)
        with quietly() if args.quiet else contextlib.nullcontext():
            result = commands[args.command].run(args)
            show(result, args.command, as_json=args.json, named=named)
        return result.code

    return guarded(command, words)


def guarded(command: Callable[[], int], words: Sequence[str]) -> int:
    """Runs a command, prints its error if it fails, and returns its exit code.

    Codes: see `vidjax.errors`; of `check`, 3 is a damaged checkpoint. With `--debug` in `words`,
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
    """Returns the exit code of an expected error, None for a bug; see `vidjax.errors`."""
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
