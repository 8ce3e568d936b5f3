"""Figures of a report: matplotlib drawings as inline SVG, each with a description in words."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from vidjax.report import html

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
    text = html.plain(value)
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
        return html.parts().figure(key, title, description, caption or title, small, head, rest)

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


def draw_heat_map(
    axes: Axes, matrix: np.ndarray, names: Sequence[str], *, fill: str = BAR, ink: str = INK
) -> None:
    """Draws a matrix [V, V] of numbers >= 0 as coloured cells; larger ones are more opaque."""
    top, size = max(float(matrix.max()), 1e-9), len(matrix)
    axes.grid(False)
    for i, j in np.ndindex(matrix.shape):
        share = float(np.clip(matrix[i, j] / top, 0, 1))
        axes.add_patch(Rectangle((j, i), 1, 1, facecolor=fill, alpha=share, linewidth=0))
        axes.text(j + 0.5, i + 0.5, f"{matrix[i, j]:.2f}", ha="center", va="center", color=ink)
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    middles, labels = np.arange(size) + 0.5, [short(name) for name in names]
    axes.set_xticks(middles, labels, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(middles, labels, parse_math=False)


def heat_map_png(matrix: np.ndarray, names: Sequence[str]) -> tuple[bytes, int, int]:
    """Returns the picture of `draw_heat_map` as a PNG file, its width and height in pixels."""
    size = len(matrix)
    figure = Figure((0.8 * size + 2, 0.8 * size + 1.5), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    axes.set_xlabel("vector j, which takes")
    axes.set_ylabel("vector i, which gives")
    draw_heat_map(axes, matrix, names, fill="#6ea8d8", ink="#000000")
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # names in other scripts
        figure.savefig(content, format="png")
    return content.getvalue(), *figure.canvas.get_width_height()
