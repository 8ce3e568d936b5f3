"""Formats and prints texts for the user, such as tables, lists of names, results and errors.

When a text is printed, control characters are escaped.
"""

import difflib
import itertools
import json
import math
import os
import shlex
import shutil
import string
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vidjax.utils.errors import escape_controls
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import show

PLURALS = {"person": "people", "identity": "identities"}  # plurals without the usual s

_PLAIN = string.ascii_letters + string.digits + " /._-"  # never part of a code of a shell


class Result(NamedTuple):
    """What a command prints at its end: with `--json` the `facts`, otherwise text for people.

    The text has three parts: `text`, a table, and a summary with the command's name as heading.
    """

    facts: Mapping[str, Any]  # name -> value, the JSON object that `--json` prints
    # Name of a line of the summary -> its text. If a fact has the same name, the text replaces its
    # value. An empty text hides the fact.
    texts: Mapping[str, object] = {}
    rows: Iterable[Sequence[str]] = ()  # cells of a table above the summary, the titles first
    text: str = ""  # text above the table, which replaces the facts
    note: str = ""  # the end of the heading
    code: int = 0  # the exit code


class Note(NamedTuple):
    """A message of a function that is still running. The function passes it to a callback."""

    text: str
    warning: bool = True


Tell = Callable[[Note], object]  # a function of the caller that receives each note


def ignore_note(note: Note) -> None:
    """Does nothing. This function is the default of arguments that are callbacks for notes."""


def print_text(text: str) -> None:
    """Prints text to standard output."""
    print_escaped(text, sys.stdout)


def print_problem(text: str) -> None:
    """Prints the first three lines of an error or a warning to standard error."""
    lines = [line for line in text.split("\n") if line.strip()] or ["unknown error"]
    print_escaped("\n".join(["vidjax: " + lines[0], *lines[1:3]]), sys.stderr)


def print_escaped(text: str, stream: TextIO) -> None:
    """Prints text to `stream`, with escaped control characters.

    If the reader of the stream, such as `head`, has ended, the text is lost without an error.
    """
    encoding = stream.encoding or "utf-8"
    text = escape_controls(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise  # a lost result is an error; a lost message is none
        drop_output(stream)


def drop_output(stream: TextIO) -> None:
    """Discards all later output of `stream`, because its pipe is closed or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_result(result: Result, name: str, *, as_json: bool) -> None:
    """Prints the result of the command `name` as text or JSON."""
    if as_json:
        content = _plain({"mode": name, **result.facts})
        print_text(json.dumps(content, allow_nan=False, default=str))
        return
    width = measure_width()
    lines = [result.text] if result.text else []
    lines += [f"  {line}" for line in align_columns([*result.rows], width=width - 2)]
    facts = {} if result.text else result.facts
    shown = {key: _show(value) for key, value in {**facts, **result.texts}.items()}
    summary = [(_label(key), text) for key, text in shown.items() if text]
    lines += [name + result.note] if summary else []
    for label, text in summary:
        lines += wrap(f"  {label:10}  {text}", width, indent=4 + max(10, len(label)))
    if lines:
        print_text("\n".join(lines))


def measure_width() -> float:
    """Returns the width of the terminal in columns, or infinity if the output is no terminal."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else math.inf


def wrap(text: str, width: float, *, indent: int = 0) -> list[str]:
    """Breaks text at spaces into lines of at most `width` columns. Longer words stay whole.

    All lines except the first begin with `indent` spaces.
    """
    if len(text) <= width:
        return [text]
    return textwrap.wrap(
        text, int(width), subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _label(name: str) -> str:
    return name.removeprefix("num_").replace("_per_second", "/s").replace("_", " ")


def _show(value: object) -> str:
    """Returns a value as text for the summary, such as `1,234`. Several lines become one line.

    A list, a dict or a bool is not shown, and becomes "".
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"
    return str(value).strip().replace("\n", "; ") if isinstance(value, str | Path) else ""


def _plain(value: object) -> object:
    """Converts a value for JSON. Infinities and NaN become the strings `inf`, `-inf`, `nan`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, Iterator)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def relative_path(path: Path) -> str:
    """Returns `path` relative to the working directory, or unchanged if it lies elsewhere."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def suggest_path(path: Path) -> str:
    """Returns a line, such as "did you mean 'a/b'?", for a path that does not exist.

    If no name in its folder is similar, returns "".
    """
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    # A link to a missing folder has the same name.
    names = [name for name in names if name != path.name]
    if not (similar := difflib.get_close_matches(path.name, names, n=1)):
        return ""
    found = str(path.with_name(similar[0]))
    if shlex.quote(found) == found:
        return f"\ndid you mean '{found}'?"
    return f"\ndid you mean {show(shlex.quote(found))}? Type it with the quotes"


def quote_path(path: Path) -> str:
    """Returns a path quoted for a shell. Bytes that a terminal would not show become codes.

    All usual shells, except for dash, understand these codes.
    """
    if str(path).isprintable():
        return shlex.quote(str(path))
    letters = (chr(byte) if chr(byte) in _PLAIN else f"\\x{byte:02x}" for byte in os.fsencode(path))
    return f"$'{''.join(letters)}'"


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


def format_time(seconds: float, *, short: bool = False) -> str:
    """Returns a time as text, such as 00:03:12.500, or if `short` is True, 3:12."""
    thousandths = 1000 * round(seconds) if short else round(seconds * 1000)
    whole, rest = divmod(thousandths, 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if short:
        return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{hours:02}:{minute:02}:{second:02}.{rest:03}"


def align_columns(
    rows: Sequence[Sequence[str]], *, width: float = math.inf, numbers: bool = False
) -> list[str]:
    """Returns the lines of a table for a terminal. `rows` has the cells of each row.

    If a line would be longer than `width` letters, the cells of the widest columns are broken into
    several lines. If `numbers` is True, all columns except the first are aligned to the right.
    """
    columns = [*zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(x) for cell in column for x in cell.split(" ")) for column in columns]
    room = width - 2 * (len(columns) - 1)
    while sum(widths) > room and (wide := [i for i, x in enumerate(least) if widths[i] > x]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    lines = []
    for row in rows:
        for cells in itertools.zip_longest(*map(wrap, row, widths), fillvalue=""):
            pairs = enumerate(zip(cells, widths, strict=True))
            padded = (x.rjust(n) if numbers and i else x.ljust(n) for i, (x, n) in pairs)
            lines.append("  ".join(padded).rstrip())
    return lines


def describe_failed(failed: Mapping[str, str]) -> dict[str, str]:
    """Returns lines of a summary, label -> text, about files that were not used.

    `failed` is path of a file -> what the user can do, or "". The line `missing` counts and names
    the files that do not exist, the line `not used` the other files. The line `remedy` says what
    the user can do. If the remedies differ, up to three are shown, each with the name of a file.
    """
    if not failed:
        return {}
    files_of = dict[str, str]()
    for path, remedy in failed.items():
        files_of.setdefault(remedy, show(Path(path).name))
    files_of.pop("", None)
    texts = [f"{name}: {x}" if len(files_of) > 1 else x for x, name in files_of.items()]
    rows = group_by_key(
        ("not used" if os.path.isfile(path) else "missing", path) for path in sorted(failed)
    )
    shown = {key: f"{len(paths):,}: {list_some(paths, 3)}" for key, paths in rows.items()}
    return {**shown, "remedy": "; ".join(texts[:3])}
