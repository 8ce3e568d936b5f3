"""Makes HTML pages from the templates in this folder, with numbers, names, tables and figures.

A page loads no other file and runs no script. It fits a screen, a phone and paper, and has a light
and a dark theme. Finished HTML has the type `Markup`. Templates escape every other text, and
`Markup.format` escapes its arguments. So a name from a file cannot become an element of the page.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
LONGEST_WORD = 16  # letters; a longer word in a table may be broken
STACKED = 5  # on a phone, a table with this many columns or more shows one cell per line
NONE = "none"  # text for an unknown number


class Number(Markup):
    """HTML of a number. A column of a table is aligned to the right if its cells have this type."""


class Bar(Number):
    """HTML of a number with a bar behind it, whose length shows the number."""


def plain(value: object) -> str:
    """Returns a value as text that can be encoded as UTF-8. Lone surrogates become `?`."""
    return str(value).encode(errors="replace").decode()


def name(value: object) -> Markup:
    """Returns a name as HTML, in which a browser may break long words.

    A name in letters from right to left does not change the direction of the text around it. A
    value that is already HTML is returned unchanged.
    """
    if isinstance(value, Markup):
        return value
    long = Markup('<span class="long">{}</span>')
    words = re.split(r"(\s+)", plain(value))
    parts = Markup().join(long.format(x) if len(x) > LONGEST_WORD else x for x in words)
    return Markup("<bdi>{}</bdi>").format(parts)


def paragraph(words: str, *values: object) -> Markup:
    """Returns a paragraph as HTML: `words`, with a value in place of each {}.

    If `words` is empty, returns empty HTML.
    """
    content = Markup.escape(words).format(*values)
    return Markup("<p>{}</p>").format(content) if words else Markup()


def number(value: object, digits: int = 4, *, sign: str = "", percent: bool = False) -> Markup:
    """Returns a number as HTML. A float is shown with `digits` digits after the point.

    An attribute of the HTML element has the exact value. None, NaN and infinity become the text
    `none`. If `sign` is `+`, positive numbers get a plus sign. If `percent` is True, a share in
    0..1 becomes a text such as 95 %.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Number(NONE) if value is None else Markup.escape(plain(value))
    if not math.isfinite(value):
        return Number(NONE)
    if percent:
        shown = f"{100 * value:z.{digits}f} %"
    else:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:{sign}z,.{digits}f}"
    shown = f"{value:.{digits}g}" if len(shown) > LONGEST_WORD else shown
    return Number(Markup('<data value="{}">{}</data>').format(repr(value), shown))


def bar(value: float) -> Number:
    """Returns a number in 0..1 as HTML, with a bar whose length shows the number."""
    share = 100 * min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
    shown = Markup('<span style="--share: {:.1f}%">{}</span>').format(share, number(value))
    return Bar(shown)


def between(low: float, high: float, digits: int, *, percent: bool = False) -> Number:
    """Returns an interval as HTML: `low to high`. For `digits` and `percent`, see `number`."""
    ends = (number(end, digits, percent=percent) for end in (low, high))
    return Number(Markup("{} to {}").format(*ends))


def cell(value: object) -> Markup:
    """Returns a number or a name as HTML, for a cell of a table. HTML is returned unchanged."""
    return number(value) if value is None or isinstance(value, int | float) else name(value)


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """Returns a table as HTML. `head` has the titles of the columns.

    The first value of each row is its header. Without rows, returns empty HTML.
    """
    cells = [[cell(value) for value in row] for row in rows]
    if not cells:
        return Markup()
    kinds = [_column_kind(column) for column in zip(*cells, strict=True)]
    return parts().table(caption, head, kinds, cells)


def folded_table(caption: str, head: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    """Returns a table as HTML that opens when its caption is clicked. No rows give empty HTML."""
    words = Markup("<details><summary>{}: {}</summary>{}</details>")
    return words.format(caption, len(rows), table(caption, head, rows)) if rows else Markup()


def _column_kind(cells: Sequence[Markup]) -> str:
    """Returns the CSS class of a column: `number`, `number bar` (for a `Bar`), or "" for text."""
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
ENVIRONMENT.globals |= {"LONGEST_WORD": LONGEST_WORD, "STACKED": STACKED}


def parts() -> Any:  # noqa: ANN401
    """Returns the template `parts.html.j2` as a module, whose functions (macros) return HTML."""
    return ENVIRONMENT.get_template("parts.html.j2").module


def beside(kind: str, blocks: Sequence[Markup]) -> Markup:
    """Returns HTML that shows blocks of HTML side by side, if the screen is wide enough.

    `kind` is a CSS class. It says what the blocks contain: `figures` or `tables`.
    """
    return Markup('<div class="{}">{}</div>').format(kind, Markup().join(blocks))


def page(title: str, sections: Sequence[tuple[str, str, Markup]], *, lead: str, footer: str) -> str:
    """Returns a whole page as HTML. A section is (identifier, heading, content).

    `lead` is a line below the title, and `footer` is a line at the end.
    """
    template = ENVIRONMENT.get_template("page.html.j2")
    return plain(template.render(title=title, sections=sections, lead=lead, footer=footer))


# ---- figures: matplotlib drawings as inline SVG, each with a description in words

MAX_POINTS = 300  # points per curve
FEW_POINTS = 20  # most points of a curve with a marker at each point
MAX_LETTERS = 20  # letters of a name in a figure
WIDTH = 4.8  # inches; the text of a figure is readable on a phone
# Placeholders in a drawing. `THEME` maps them to colours of the light or dark theme.
INK, MUTED, LINE, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
THEME = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "vidjax",
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}


def short(value: object) -> str:
    """Returns a value as text. A long text is cut, and ends with `...`."""
    text = plain(value)
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 3] + "..."


class Plot:
    """A figure with a single pair of axes."""

    def __init__(self, height: float = 3.0, *, x: str = "", y: str = ""):
        """Makes empty axes with the labels `x` and `y`. `height` is in inches."""
        with matplotlib.rc_context(STYLE):
            self.figure = Figure((WIDTH, height), layout="constrained")
            self.axes = self.figure.add_subplot()
            self.axes.set_xlabel(x)
            self.axes.set_ylabel(y)

    def curve(self, x: np.ndarray, y: np.ndarray, label: str | None = None) -> None:
        """Draws a curve through the points (x, y).

        If there are more than 300 points, 300 evenly spaced points are drawn. If there are at most
        20 points, each has a marker.
        """
        shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int))
        marker = "o" if len(shown) <= FEW_POINTS else ""
        self.axes.plot(x[shown], y[shown], color=FIRST, marker=marker, label=label)

    def legend(self) -> None:
        """Writes the labels of the curves above the axes, where they cover no curve."""
        with matplotlib.rc_context(STYLE):
            self.figure.legend(loc="outside upper left", ncols=3, frameon=False)

    def html(self, key: str, title: str, description: str, caption: str = "") -> Markup:
        """Returns the figure as HTML, with `caption` below it, by default the title.

        `key` is an identifier of the figure, unique on the page. `description` says in words what
        the figure shows, for a reader who cannot see it.
        """
        head, rest = map(Markup, self._svg(key).split(">", 1))
        return parts().figure(key, title, description, caption or title, head, rest)

    def _svg(self, key: str) -> str:
        """Returns the figure as SVG, whose colours follow the light or dark theme of the page.

        All identifiers in the SVG start with `key`, so that two figures have different identifiers.
        """
        content = io.BytesIO()
        for patch in (self.figure.patch, *(axes.patch for axes in self.figure.axes)):
            patch.set(facecolor="none", edgecolor="none")
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the reader's fonts have the glyphs
            FigureCanvasSVG(self.figure).print_svg(content)  # `savefig` would draw it twice
        svg = content.getvalue().decode()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
        svg = svg.replace("xlink:href", "href")
        svg = re.sub(r'\bid="', f'id="{key}-', svg)
        svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
        for colour, variable in THEME.items():
            svg = svg.replace(colour, variable)
        return svg
