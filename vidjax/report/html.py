"""Pages of HTML from the templates of this folder, and the numbers, names and figures within them.

A page loads no other file and runs no script; it fits a screen, a phone or paper, in light or dark.
Templates escape every text that is no `Markup`, and `Markup.format` escapes its arguments: a name
from a file can not become an element of the page.
"""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

FOLDER = Path(__file__).parent
LONGEST_WORD = 16  # letters of a word in a table; only longer words may break within
STACKED = 5  # columns from which a phone shows a row's cells below each other
# Bidirectional classes of letters, digits and marks that order a text from right to left.
REORDERING = frozenset(
    ["R", "AL", "AN", "RLE", "RLO", "LRE", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"]
)
NONE = "none"  # a number that is not known


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
    return Markup('<span class="block">{}</span>').format(content)


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
    """Returns a table whose values are shown by `cell`, empty without rows.

    The first value of a row is its header.
    """
    cells = [[cell(value) for value in row] for row in rows]
    if not cells:
        return Markup()
    kinds = [_column_kind(column) for column in zip(*cells, strict=True)]
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


# Figures: matplotlib drawings as inline SVG, each with a description in words.

MAX_POINTS = 300  # points per curve
FEW_POINTS = 20  # a curve of at most so many points shows each of them
MAX_LETTERS = 20  # letters of a name within a figure
WIDTH = 4.8  # inches: the text of a figure is still readable on a phone
# Placeholders in the drawing; the page replaces them by colours of its light or dark theme.
INK, MUTED, LINE, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
BAR = "#060606"
THEME = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    BAR: "var(--bar)",
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
    """Returns a value as text, cut to `MAX_LETTERS` letters."""
    text = plain(value)
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 3] + "..."


def few(values: np.ndarray) -> np.ndarray:
    """Returns the indices of at most `MAX_POINTS` evenly spaced values, with the first and last."""
    return np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).astype(int))


class Plot:
    """One figure with one pair of axes."""

    def __init__(self, height: float = 3.0, *, x: str = "", y: str = ""):
        """Makes empty axes of a height in inches, with labels; the width is `WIDTH`."""
        with matplotlib.rc_context(STYLE):
            self.figure = Figure((WIDTH, height), layout="constrained")
            self.axes = self.figure.add_subplot()
            self.axes.set_xlabel(x)
            self.axes.set_ylabel(y)

    def curve(
        self, x: np.ndarray, y: np.ndarray, *, points: bool = False, label: str | None = None
    ) -> None:
        """Draws a curve of at most MAX_POINTS; `points` marks each of FEW_POINTS or fewer."""
        shown = few(x)
        marker = "o" if points and len(shown) <= FEW_POINTS else ""
        self.axes.plot(x[shown], y[shown], color=FIRST, marker=marker, label=label)

    def twin(self, name: str) -> Axes:
        """Returns axes with the same x and a second y axis at the right, labelled `name`."""
        with matplotlib.rc_context(STYLE):
            axes = self.axes.twinx()
            axes.set_ylabel(name)
            axes.grid(False)
            axes.spines["right"].set_visible(True)
        return axes

    def count(self, axis: str) -> None:
        """Makes the ticks of an axis, `x` or `y`, whole numbers."""
        with matplotlib.rc_context(STYLE):
            locator = MaxNLocator(integer=True, min_n_ticks=1)
            getattr(self.axes, f"{axis}axis").set_major_locator(locator)

    def legend(self) -> None:
        """Adds the names of the lines above the axes, where they cover nothing."""
        with matplotlib.rc_context(STYLE):
            self.figure.legend(loc="outside upper left", ncols=3, frameon=False)

    def html(
        self, key: str, title: str, description: str, caption: str = "", *, small: bool = False
    ) -> Markup:
        """Returns the figure as HTML; `key` is unique on the page, a caption stands below it.

        The description is for a reader who cannot see the figure. A `small` figure takes less than
        half of the page's width.
        """
        head, rest = map(Markup, self._svg(key).split(">", 1))
        return parts().figure(key, title, description, caption or title, small, head, rest)

    def _svg(self, key: str) -> str:
        """Returns the drawing as SVG. matplotlib has escaped the texts in it."""
        content = io.BytesIO()
        for patch in (self.figure.patch, *(axes.patch for axes in self.figure.axes)):
            patch.set(facecolor="none", edgecolor="none")
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # glyphs that the reader's fonts have
            FigureCanvasSVG(self.figure).print_svg(content)  # `savefig` draws everything twice
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


def draw_heat_map(axes: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    """Draws a matrix [V, V] of numbers >= 0 as coloured cells; larger ones are more opaque."""
    top, size = max(float(matrix.max()), 1e-9), len(matrix)
    axes.grid(False)
    for i, j in np.ndindex(matrix.shape):
        share = float(np.clip(matrix[i, j] / top, 0, 1))
        axes.add_patch(Rectangle((j, i), 1, 1, facecolor=BAR, alpha=share, linewidth=0))
        axes.text(j + 0.5, i + 0.5, f"{matrix[i, j]:.2f}", ha="center", va="center", color=INK)
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    middles, labels = np.arange(size) + 0.5, [short(name) for name in names]
    axes.set_xticks(middles, labels, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(middles, labels, parse_math=False)
