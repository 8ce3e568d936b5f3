"""Words of messages: numbers with nouns, shortened names and paths, columns."""

from collections.abc import Sequence
from pathlib import Path

PLURALS = {"person": "people", "identity": "identities"}  # plurals without the usual s


def relative_path(path: Path) -> str:
    """Returns `path` relative to the working directory, or unchanged if it lies elsewhere."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


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
