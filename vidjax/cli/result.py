"""The result of a command, and how it is printed."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vidjax.utils.printing import print_text


class Result(NamedTuple):
    """The result of a command."""

    content: Mapping[str, Any]  # the JSON object that `--json` prints instead of `text` and `rows`
    rows: Mapping[str, str] = {}  # label -> value, printed as lines below a heading
    text: str = ""  # text that is printed before the heading
    note: str = ""  # the end of the heading. The heading begins with the name of the command.
    code: int = 0  # the exit code


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
