"""A page of HTML and its parts: text, numbers, tables.

The page loads no other file, uses no network and runs no script. It fits a screen, a phone or
paper, in light or dark colours.

Escaping is a matter of types. Parts that are HTML have the type `Html`, and every function here
escapes what has not. A name from a file can therefore not become an element of the page.
"""

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import LiteralString

from vidjax.report.style import CSS

LONGEST_WORD = 16  # letters of a word in a table; only longer words may break within
STACKED = 5  # columns from which a phone shows a row's cells below each other
# Bidirectional classes of letters, digits and marks that order a text from right to left.
REORDERING = frozenset(
    ["R", "AL", "AN", "RLE", "RLO", "LRE", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"]
)
NONE = "none"  # a number that is not known


class Html(str):
    """HTML, which is written as it is. `fill` and the functions of this module make it."""


class Number(Html):
    """A number as HTML; a column of numbers is aligned at the right."""


class Bar(Number):
    """A number as HTML, with a bar behind it."""


def text(value: object) -> Html:
    """Returns a value as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(html.escape(plain(value)))


def attribute(value: object) -> Html:
    """Returns a value as the content of an attribute in quotes: text, without its elements."""
    return Html(re.sub("<[^>]*>", "", text(value)))


def fill(template: LiteralString, *values: object) -> Html:
    """Returns a template of HTML with every `{}` replaced by a value, escaped if it is no HTML."""
    return Html(template.format(*map(text, values)))


def join(parts: Iterable[object], separator: LiteralString = "") -> Html:
    """Returns the parts as one, each escaped if it is no HTML; the separator is HTML."""
    return Html(separator.join(map(text, parts)))


def page(
    title: str,
    sections: Iterable[tuple[str, str, Iterable[str]]],
    *,
    lead: str = "",
    nav: bool = False,
    footer: str,
) -> Html:
    """Returns a whole page of HTML. A section without parts is left out.

    Args:
      title: the title.
      sections: (identifier, heading, parts).
      lead: a line below the title.
      nav: True for links to the sections.
      footer: the part below the sections.
    """
    made = [(key, heading, join(parts)) for key, heading, parts in sections]
    made = [part for part in made if part[2]]
    links = join(fill('<li><a href="#{}">{}</a></li>', *part[:2]) for part in made)
    body = join(
        fill(
            '<section id="{}" aria-labelledby="{}-title"><h2 id="{}-title">{}</h2>{}</section>\n',
            key, key, key, heading, parts,
        )
        for key, heading, parts in made
    )  # fmt: skip
    return fill(
        """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{}</title>
<style>{}</style>
</head>
<body>
<header><h1>{}</h1>{}</header>
{}<main>
{}</main>
<footer><p class="muted">{}</p></footer>
</body>
</html>
""",
        title,
        Html(CSS),
        title,
        note(lead) if lead else "",
        fill('<nav aria-label="Contents"><ul>{}</ul></nav>\n', links) if nav else "",
        body,
        footer,
    )


def plain(value: object) -> str:
    """Returns a value as text that can be encoded: lone surrogates become question marks."""
    return str(value).encode(errors="replace").decode()


def name(value: object) -> Html:
    """Returns a name as HTML for a table, in which words over `LONGEST_WORD` may break.

    A name in a script from right to left does not reorder what stands beside it.
    """
    if isinstance(value, Html):
        return value
    content = plain(value)
    parts = join(
        fill('<span class="long">{}</span>', part) if len(part) > LONGEST_WORD else part
        for part in re.split(r"(\s+)", content)
    )
    isolated = any(unicodedata.bidirectional(letter) in REORDERING for letter in content)
    return fill("<bdi>{}</bdi>", parts) if isolated else parts


def block(content: str) -> Html:
    """Returns a text for a table that takes several lines where it is long."""
    return fill('<span class="block">{}</span>', content)


def p(content: str) -> Html:
    """Returns a paragraph."""
    return fill("<p>{}</p>\n", content)


def note(content: str) -> Html:
    """Returns a paragraph in muted colour, for remarks."""
    return fill('<p class="muted">{}</p>\n', content)


def heading(content: str) -> Html:
    """Returns a heading within a section."""
    return fill("<h3>{}</h3>\n", content)


def number(value: object, digits: int = 4) -> Html:
    """Returns a number as HTML: rounded for a reader, with all digits for a program."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        whole = isinstance(value, int)
        shown = f"{value:,}" if whole else f"{value:z,.{digits}f}"
        return _number(value, f"{value:.{digits}g}" if len(shown) > LONGEST_WORD else shown)
    return Number(NONE) if value is None else text(value)


def signed(value: float, digits: int = 4) -> Html:
    """Returns a number as HTML with its sign, such as a difference."""
    return _number(value, f"{value:+z.{digits}f}")


def percent(share: float, digits: int = 0) -> Html:
    """Returns a share in 0..1 as HTML, such as `95 %`."""
    return _number(share, f"{100 * share:z.{digits}f} %")


def _number(value: float, shown: str) -> Number:
    if not math.isfinite(value):
        return Number(NONE)
    return Number(fill('<data value="{}">{}</data>', repr(value), shown))


def bar(value: float) -> Html:
    """Returns a number in 0..1 with a bar of that length."""
    share = 100 * min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
    return Bar(fill('<span style="--share: {}%">{}</span>', f"{share:.1f}", number(value)))


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """Returns a table. Columns of numbers are aligned at the right.

    Args:
      caption: what the table shows.
      head: titles of the columns.
      rows: the cells, such as those of `name`, `number` and `bar`. The first cell of a row is its
        header.
    """
    kinds = [_column_kind(cells) for cells in zip(*rows, strict=True)] or [""] * len(head)
    columns = join(
        fill('<th scope="col"{}>{}</th>', kind, title)
        for kind, title in zip(kinds, head, strict=True)
    )
    lines = []
    for first, *rest in rows:
        cells = join(
            fill('<td{} data-label="{}">{}</td>', kind, attribute(title), cell)
            for kind, title, cell in zip(kinds[1:], head[1:], rest, strict=True)
        )
        short = fill(' class="short"') if len(attribute(first)) <= LONGEST_WORD else ""
        lines.append(fill('<tr><th scope="row"{}>{}</th>{}</tr>\n', short, first, cells))
    return fill(
        '<div class="wide" role="region" aria-label="{}" tabindex="0"><table{}>'
        "<caption>{}</caption><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>\n",
        attribute(caption),
        fill(' class="stacked"') if len(head) >= STACKED else "",
        caption,
        columns,
        join(lines),
    )


def _column_kind(cells: Sequence[object]) -> Html:
    """Returns the class of a column: numbers, numbers with bars, or text."""
    filled = [cell for cell in cells if cell != ""]
    if not filled or not all(isinstance(cell, Number) for cell in filled):
        return Html("")
    bars = any(isinstance(cell, Bar) for cell in filled)
    return fill(' class="number bar"') if bars else fill(' class="number"')


def fold(summary: str, content: str) -> Html:
    """Returns a part that is folded until a reader opens it."""
    return fill("<details><summary>{}</summary>{}</details>\n", summary, content)


def link(address: str, content: str) -> Html:
    """Returns a link to another page of the folder; `address` is escaped as a URL already."""
    return fill('<a href="{}">{}</a>', address, content)


def figures(*parts: str) -> Html:
    """Returns figures side by side, where the page is wide enough: two or three in a row."""
    kind = fill(" three") if len(parts) % 3 == 0 else ""
    return fill('<div class="figures{}">{}</div>\n', kind, join(parts)) if parts else Html("")


def tables(*parts: str) -> Html:
    """Returns tables side by side, as many as fit into the width of the page."""
    return fill('<div class="tables">{}</div>\n', join(parts)) if parts else Html("")
