"""A page of HTML and its parts: text, numbers, tables.

The page loads no other file, uses no network and runs no script. It fits a screen, a phone or
paper, in light or dark colours.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence

LONGEST_WORD = 16  # letters of a word in a table; only longer words may break within
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
.long { display: inline-block; overflow-wrap: anywhere; min-width: 6rem; max-width: 24rem; }
.short { white-space: nowrap; }
.bar { min-width: 8rem; background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 50% /
  var(--share) 70%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
pre { background: var(--soft); padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .875rem; }
pre span { display: inline-block; max-width: 100%; }
footer { margin: 3rem auto 2rem; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding-right: .35rem; }
  .bar { min-width: 4rem; } .long { min-width: 4rem; } }
@media print { :root { --back: #fff; --ink: #000; --muted: #444; --line: #bbb; --soft: #f3f5f7;
  --first: #0b62a8; --second: #b3450b; --bar: #b9d7f0; --link: #000; } nav { display: none; }
  body { font-size: 10pt; } .figures { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; } h2, h3 { break-after: avoid; } tr { break-inside: avoid; } }
"""


def page(
    title: str,
    sections: Iterable[tuple[str, str, Iterable[str]]],
    *,
    nav: str = "",
    footer: str,
) -> str:
    """Returns a whole page of HTML.

    Args:
      title: the title, as HTML like all other arguments.
      sections: (identifier, heading, parts).
      nav: the part above the sections.
      footer: the part below the sections.
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


def plain(value: object) -> str:
    """Returns a value as text that can be encoded: lone surrogates become question marks."""
    return str(value).encode(errors="replace").decode()


def text(value: object) -> str:
    """Returns a value as HTML text."""
    return html.escape(plain(value))


def name(value: object) -> str:
    """Returns a name as HTML text for a table, in which words over `LONGEST_WORD` may break."""
    parts = re.split(r"(\s+)", plain(value))
    return "".join(
        f'<span class="long">{text(part)}</span>' if len(part) > LONGEST_WORD else text(part)
        for part in parts
    )


def p(text: str) -> str:
    """Returns a paragraph of HTML."""
    return f"<p>{text}</p>\n"


def note(text: str) -> str:
    """Returns a paragraph of HTML in muted colour, for remarks."""
    return f'<p class="muted">{text}</p>\n'


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number as HTML: rounded for a reader, with all digits for a program."""
    if value is None or not math.isfinite(value):
        return "none"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return f'<data value="{value!r}">{shown}</data>'


def percent(share: float, digits: int = 0) -> str:
    """Returns a share in 0..1 as text, such as `95 %`."""
    return f"{100 * share:.{digits}f} %"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table.

    Args:
      caption, head: plain text.
      rows: cells of HTML, such as those of `name`, `number` and `bar`. The first cell of a row is
        its header.
    """
    columns = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
        kind = ' class="short"' if len(first) <= LONGEST_WORD else ""
        lines.append(f'<tr><th scope="row"{kind}>{first}</th>{cells}</tr>\n')
    return (
        f'<div class="wide" role="region" aria-label="{text(caption)}" tabindex="0"><table>'
        f"<caption>{text(caption)}</caption>"
        f"<thead><tr>{columns}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def bar(value: float) -> str:
    """Returns a table cell with a number in 0..1 and a bar of that length."""
    share = 100 * min(max(value, 0.0), 1.0)
    return f'<td class="bar" style="--share: {share:.1f}%">{number(value)}</td>'


def side_by_side(*parts: str) -> str:
    """Returns figures or tables side by side, where the page is wide enough."""
    return f'<div class="figures">{"".join(parts)}</div>\n'
