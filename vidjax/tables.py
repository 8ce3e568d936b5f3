"""Tables as text: the one writer of .csv and .tsv.

A text that a spreadsheet would take for a formula has a `'` before it, and so has one that begins
with `'`: who reads a table in a program drops one `'` at the beginning of a text.
"""

import csv
import io
from collections.abc import Iterable
from typing import Literal

GUARDED = ("=", "+", "-", "@", "\t", "\r", "'")  # a spreadsheet runs what begins so, but for '
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def to_text(rows: Iterable[Iterable[object]], ending: Literal[".csv", ".tsv"]) -> str:
    """Returns rows as text, quoted as Excel does.

    Args:
      rows: the head and the lines; None is an empty cell.
      ending: `.csv`, separated by commas, or `.tsv`, by tabs.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter=SEPARATORS[ending], lineterminator="\n")
    writer.writerows([_guarded(cell) for cell in row] for row in rows)
    return text.getvalue()


def _guarded(cell: object) -> object:
    """Returns a cell; a text that begins like a formula with `'` before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(GUARDED) else cell
