"""Writes texts for the user: numbers with nouns, lists of names, columns, results and problems.

When a text is printed, control characters are escaped.
"""

import difflib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vidjax.utils.errors import escape_controls
from vidjax.utils.names import show

PLURALS = {"person": "people", "identity": "identities"}  # plurals without the usual s


class Result(NamedTuple):
    """The result of a command."""

    content: Mapping[str, Any]  # the JSON object that `--json` prints instead of `text` and `rows`
    # Label -> value, printed as lines below a heading. Empty values are left out.
    rows: Mapping[str, object] = {}
    text: str = ""  # text that is printed before the heading
    table: Iterable[Sequence[str]] = ()  # rows of cells, printed after the text as columns
    note: str = ""  # the end of the heading. The heading begins with the name of the command.
    code: int = 0  # the exit code


class Note(NamedTuple):
    """A message about a call that continues. The program that made the call prints it."""

    text: str
    warning: bool = True


Tell = Callable[[Note], object]  # a function that is called with each note


def ignore_note(note: Note) -> None:
    """Does nothing. It is the default of arguments of the type `Tell`."""


def print_text(text: str) -> bool:
    """Prints text to standard output. Returns False if standard output is a closed pipe."""
    return print_escaped(text, sys.stdout)


def print_problem(text: str) -> None:
    """Prints the first three lines of an error or a warning to standard error."""
    lines = [line for line in text.split("\n") if line.strip()] or ["unknown error"]
    print_escaped("\n".join(["vidjax: " + lines[0], *lines[1:3]]), sys.stderr)


def print_escaped(text: str, stream: TextIO) -> bool:
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


def print_result(result: Result, name: str, *, as_json: bool) -> None:
    """Prints the result of the command `name` as text or JSON."""
    if as_json:
        content = _plain({"mode": name, **result.content})
        print_text(json.dumps(content, allow_nan=False, default=str))
        return
    texts = {key: _show(value) for key, value in result.rows.items()}
    rows = [f"  {key:10}  {text}" for key, text in texts.items() if text]
    heading = [name + result.note] if rows else []
    table = [f"  {line}" for line in align_columns([*result.table])]
    if lines := [*([result.text] if result.text else []), *table, *heading, *rows]:
        print_text("\n".join(lines))


def _show(value: object) -> str:
    """Returns a value as the text of a row: `1,234` for a number, several lines as one line."""
    text = f"{value:,}" if isinstance(value, int) else str(value or "")
    return text.strip().replace("\n", "; ")


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
    """Returns a line that suggests a similar path, or "" if the folder has no similar name."""
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


def describe_failed(failed: Mapping[str, str]) -> dict[str, str]:
    """Returns rows about files that were not used: their number and names, and remedies.

    `failed` is path of a file -> remedy, or "". Of different remedies, three are listed, with the
    names of their files.
    """
    if not failed:
        return {}
    files_of = dict[str, str]()
    for path, remedy in failed.items():
        files_of.setdefault(remedy, show(Path(path).name))
    files_of.pop("", None)
    texts = [f"{name}: {x}" if len(files_of) > 1 else x for x, name in files_of.items()]
    used = f"{len(failed):,}: {list_some(sorted(failed), 3)}"
    return {"not used": used, "remedy": "; ".join(texts[:3])}
