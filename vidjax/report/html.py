"""A page of HTML and what it is made of: text, numbers, tables, figures.

It asks for no other file and no network, runs nothing, and is for a screen, a phone or paper, light
or dark. Figures are by matplotlib, inline, with a description for who does not see them.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MOST_POINTS = 300  # of a curve
MOST_LETTERS = 20  # of a name in a figure
WIDTH = 4.8  # inches: text of a figure is still readable on a phone
# Colours of figures, which the page maps to those of its light or dark dress.
INK, MUTED, LINE, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
DRESS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
}
CSS = """
:root { --back: #ffffff; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --soft: #f3f5f7;
  --first: #0b62a8; --second: #b3450b; --bar: #b9d7f0; --link: #0b5cad; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e6e9ec; --muted: #a2abb5;
  --line: #3a424b; --soft: #1f242a; --first: #6cb4ee; --second: #f0a06a; --bar: #27527a;
  --link: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, nav, main, footer { max-width: 72rem; margin: 0 auto; padding: 0 1rem; }
h1 { margin: 1.5rem 0 .25rem; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line);
  font-size: 1.25rem; }
h3 { margin: 1.25rem 0 .25rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0; padding: 0;
  list-style: none; }
.lead { font-size: 1.1rem; } .lead strong { font-size: 1.8rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .875rem; }
.figures { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: .5rem 0; max-width: 36rem; break-inside: avoid; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.name { overflow-wrap: anywhere; min-width: 4rem; max-width: 24rem; }
.bar { min-width: 8rem; background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 50% /
  var(--share) 70%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
pre { background: var(--soft); padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .875rem; }
pre span { display: inline-block; max-width: 100%; }
footer { margin: 3rem auto 2rem; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding-right: .35rem; }
  .bar { min-width: 4rem; } th.name { min-width: 3rem; } td.name { min-width: 4.8rem; } }
@media print { :root { --back: #fff; --ink: #000; --muted: #444; --line: #bbb; --soft: #f3f5f7;
  --first: #0b62a8; --second: #b3450b; --bar: #b9d7f0; --link: #000; } nav { display: none; }
  body { font-size: 10pt; } .figures { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; } h2, h3 { break-after: avoid; } tr { break-inside: avoid; } }
"""


def make(
    title: str,
    sections: Iterable[tuple[str, str, Iterable[str]]],
    *,
    nav: str = "",
    footer: str,
) -> str:
    """Returns a whole page of HTML that asks for nothing and runs nothing.

    Args:
      title: as HTML, like all that follows.
      sections: (identifier, heading, parts).
      nav: what stands above them.
      footer: what stands below.
    """
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{heading}</h2>'
        f"{''.join(parts)}</section>\n"
        for key, heading, parts in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{title}</h1></header>
{nav}<main>
{body}</main>
<footer><p class="muted">{footer}</p></footer>
</body>
</html>
"""


def plain(value: Any) -> str:
    """Returns text whose lone surrogates, which no encoding holds, are question marks."""
    return str(value).encode(errors="replace").decode()


def short(value: Any) -> str:
    """Returns text that fits into a figure."""
    text = plain(value)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 3] + "..."


def text(value: Any) -> str:
    """Returns text as HTML."""
    return html.escape(plain(value))


def p(text: str) -> str:
    """Returns a paragraph of HTML."""
    return f"<p>{text}</p>\n"


def note(text: str) -> str:
    """Returns a paragraph beside the matter, of HTML."""
    return f'<p class="muted">{text}</p>\n'


def number(value: Any, digits: int = 4) -> str:
    """Returns a number for a reader, with all its digits for a program."""
    if value is None or not math.isfinite(value):
        return "none"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"
    return f'<data value="{value!r}">{shown}</data>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of HTML cells; the first of a row is its header."""
    columns = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
        # Only what is longer than a word may break anywhere.
        kind = ' class="name"' if max(map(len, first.split()), default=0) > 16 else ""
        lines.append(f'<tr><th scope="row"{kind}>{first}</th>{cells}</tr>\n')
    return (
        f'<div class="wide" role="region" aria-label="{text(caption)}" tabindex="0"><table>'
        f"<caption>{text(caption)}</caption>"
        f"<thead><tr>{columns}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def bar(value: float) -> str:
    """Returns a table cell that shows a number of 0..1 as a bar, too."""
    share = 100 * min(max(value, 0.0), 1.0)
    return f'<td class="bar" style="--share: {share:.1f}%">{number(value)}</td>'


class Plot:
    """One figure with one pair of axes, plain in its own dress."""

    def __init__(self, height: float = 3.0, *, x: str = "", y: str = ""):
        import matplotlib
        from matplotlib.figure import Figure

        self._style: dict[Any, Any] = {
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
            "grid.color": LINE,
            "grid.linewidth": 0.6,
        }
        self._matplotlib = matplotlib
        with matplotlib.rc_context(self._style):
            self.figure = Figure((WIDTH, height), layout="constrained")
            self.axes = self.figure.add_subplot()
            self.axes.set_xlabel(x)
            self.axes.set_ylabel(y)

    def twin(self, name: str) -> Any:
        """Returns axes with the same x and another y, at the right."""
        with self._matplotlib.rc_context(self._style):
            axes = self.axes.twinx()
            axes.set_ylabel(name)
            axes.grid(False)
            axes.spines["right"].set_visible(True)
        return axes

    def legend(self) -> None:
        """Adds the names of the lines above the axes, where they cover nothing."""
        with self._matplotlib.rc_context(self._style):
            self.figure.legend(loc="outside upper left", ncols=3, frameon=False)

    def html(self, number: str, title: str, description: str, caption: str = "") -> str:
        """Returns the figure as HTML.

        Args:
          number: a word that no other figure of the page has.
          title: what it shows, in some words.
          description: what is to be seen, for who does not see it.
          caption: HTML below it; the title where empty.
        """
        content = io.BytesIO()
        with self._matplotlib.rc_context(self._style), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of glyphs that the reader's fonts have
            self.figure.savefig(content, format="svg", transparent=True)
        svg = content.getvalue().decode()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
        svg = svg.replace("xlink:href", "href")
        svg = re.sub(r'\bid="', f'id="{number}-', svg)
        svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{number}-", svg)
        for colour, dress in DRESS.items():
            svg = svg.replace(colour, dress)
        names = f"{number}-name {number}-what"
        head, rest = svg.split(">", 1)
        inner = (
            f'<title id="{number}-name">{text(title)}</title>'
            f'<desc id="{number}-what">{text(description)}</desc>'
        )
        return (
            f'<figure>{head} role="img" aria-labelledby="{names}">{inner}{rest.strip()}'
            f"<figcaption>{caption or text(title)}</figcaption></figure>\n"
        )


def few(values: np.ndarray) -> np.ndarray:
    """Returns which of n points to draw: all, or some hundred with the first and the last."""
    return np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).astype(int))


def figures(*figures: str) -> str:
    """Returns figures side by side, where there is room."""
    return f'<div class="figures">{"".join(figures)}</div>\n'
