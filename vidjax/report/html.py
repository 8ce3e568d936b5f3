"""Pages of HTML from the templates of this folder, and the numbers and names within them.

A page loads no other file and runs no script; it fits a screen, a phone or paper, in light or dark.
Templates escape every text that is no `Markup`, and `Markup.format` escapes its arguments: a name
from a file can not become an element of the page.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

FOLDER = Path(__file__).parent
LONGEST_WORD = 16  # letters of a word in a table; only longer words may break within
STACKED = 5  # columns from which a phone shows a row's cells below each other
# Bidirectional classes of letters, digits and marks that order a text from right to left.
REORDERING = frozenset(
    ["R", "AL", "AN", "RLE", "RLO", "LRE", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"]
)
NONE = "none"  # a number that is not known
BLOCK = Markup('<span class="block">{}</span>')


class Number(Markup):
    """A number as HTML; a column of numbers is aligned at the right."""


class Bar(Number):
    """A number as HTML, with a bar behind it."""


def plain(value: object) -> str:
    """Returns a value as text that can be encoded: lone surrogates become question marks."""
    return str(value).encode(errors="replace").decode()


def name(value: object) -> Markup:
    """Returns a name for a table; words of more than `LONGEST_WORD` letters may break.

    A name in a script from right to left does not reorder what stands beside it.
    """
    if isinstance(value, Markup):
        return value
    long, content = Markup('<span class="long">{}</span>'), plain(value)
    words = re.split(r"(\s+)", content)
    parts = Markup().join(long.format(x) if len(x) > LONGEST_WORD else x for x in words)
    isolated = any(unicodedata.bidirectional(letter) in REORDERING for letter in content)
    return Markup("<bdi>{}</bdi>").format(parts) if isolated else parts


def block(content: object) -> Markup:
    """Returns a text for a table cell that wraps where it is long."""
    return BLOCK.format(content)


def number(value: object, digits: int = 4) -> Markup:
    """Returns a number as HTML: shown rounded, with all digits in an attribute for programs."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown = f"{value:,}" if isinstance(value, int) else f"{value:z,.{digits}f}"
        return _number(value, f"{value:.{digits}g}" if len(shown) > LONGEST_WORD else shown)
    return Number(NONE) if value is None else Markup.escape(plain(value))


def signed(value: float, digits: int = 4) -> Number:
    """Returns a number with its sign, such as a difference."""
    return _number(value, f"{value:+z.{digits}f}")


def percent(share: float | None, digits: int = 0) -> Number:
    """Returns a share in 0..1, such as `95 %`."""
    if share is None:
        return Number(NONE)
    return _number(share, f"{100 * share:z.{digits}f} %")


def bar(value: float | None) -> Number:
    """Returns a number in 0..1 with a bar of that length."""
    if value is None:
        return Number(NONE)
    share = 100 * min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
    shown = Markup('<span style="--share: {:.1f}%">{}</span>').format(share, number(value))
    return Bar(shown)


def _number(value: float, shown: str) -> Number:
    if not math.isfinite(value):
        return Number(NONE)
    return Number(Markup('<data value="{}">{}</data>').format(repr(value), shown))


def between(low: Markup, high: Markup) -> Number:
    """Returns the text of an interval, `low to high`."""
    return Number(Markup("{} to {}").format(low, high))


def cell(value: object) -> Markup:
    """Returns `number` of a number or None, HTML unchanged, and `name` of anything else."""
    if isinstance(value, Markup) or not (value is None or isinstance(value, int | float)):
        return name(value)
    return number(value)


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """Returns a table whose values are shown by `cell`; the first of a row is its header."""
    cells = [[cell(value) for value in row] for row in rows]
    kinds = [_column_kind(column) for column in zip(*cells, strict=True)] or [""] * len(head)
    return parts().table(caption, head, kinds, cells)


def halves(
    caption: str, head: Sequence[object], rows: Sequence[Sequence[object]], *, above: int = 1
) -> list[Markup]:
    """Returns one table, or two with half of the rows each if there are more than `above` rows."""
    half = (len(rows) + 1) // 2 if len(rows) > above else len(rows)
    return [table(caption, head, part) for part in (rows[:half], rows[half:]) if part]


def _column_kind(cells: Sequence[Markup]) -> str:
    """Returns the CSS class of a column: of numbers, of numbers with bars, or "" for text."""
    filled = [value for value in cells if value]
    if not filled or not all(isinstance(value, Number) for value in filled):
        return ""
    return "number bar" if any(isinstance(value, Bar) for value in filled) else "number"


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"cell": cell, "name": name, "number": number, "percent": percent}
ENVIRONMENT.globals |= {"LONGEST_WORD": LONGEST_WORD, "STACKED": STACKED}


def parts(file: str = "parts.html.j2") -> Any:  # noqa: ANN401
    """Returns the macros of a template as attributes: functions that return HTML."""
    return ENVIRONMENT.get_template(file).module


def page(title: str, sections: Iterable[tuple[str, str, str]], **facts: object) -> str:
    """Returns a whole page of sections (identifier, heading, content); an empty one is left out."""
    shown = [section for section in sections if section[2].strip()]
    template = ENVIRONMENT.get_template("page.html.j2")
    return plain(template.render(title=title, sections=shown, **facts))
