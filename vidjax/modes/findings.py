"""The lines of a check, each a state, a subject and a text; the verdict and the exit code."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OK, WARNING, FAULT = "ok", "warning", "FAULT"
Findings = Iterator[tuple[str, str]]  # (state, text)


class Item(NamedTuple):
    """One line of a check.

    Attributes:
      state: OK, WARNING or FAULT.
      subject: `environment`, `config`, `data`, `checkpoints` or `run`.
      text: the finding, in one line.
    """

    state: str
    subject: str
    text: str


def exit_code(items: Iterable[Item]) -> int:
    """Returns 3 if a checkpoint is faulty, else 2 if anything is, else 0."""
    subjects = {item.subject for item in items if item.state == FAULT}
    return 3 if "checkpoints" in subjects else 2 if subjects else 0


def verdict(items: Sequence[Item]) -> str:
    """Returns the last line of a check: the numbers of faults and warnings."""
    faults, warned = (sum(item.state == state for item in items) for state in (FAULT, WARNING))
    if not faults:
        return f"all good, {warned} to note" if warned else "all good"
    subjects = dict.fromkeys(item.subject for item in items if item.state == FAULT)
    return f"{faults} FAULT{'S' if faults > 1 else ''}: {', '.join(subjects)}"


def one_line(text: str) -> str:
    """Returns a text with its lines joined by semicolons."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def size_text(count: float) -> str:
    """Returns a number of bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
