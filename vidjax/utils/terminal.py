"""Prints messages and the progress of a run to standard error."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

from vidjax.utils import distributed, messages
from vidjax.utils.errors import escape_controls, is_muted

BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}{postfix}, {remaining} left"
QUIET = "TQDM_DISABLE"  # the environment variable that hides the progress bars of tqdm
LINE_SECONDS = 10  # time between two lines of progress if standard error is not a terminal


def is_quiet() -> bool:
    """Returns True if progress is hidden.

    Progress is hidden if the environment variable TQDM_DISABLE is set, and in all processes of a
    run except the first.
    """
    return os.environ.get(QUIET, "") not in ("", "0") or not distributed.is_first()


@contextlib.contextmanager
def hide_progress() -> Iterator[None]:
    """Hides progress bars and log messages while the context is open. Warnings still appear."""
    log = logging.getLogger("vidjax")
    before, level = os.environ.get(QUIET), log.level
    os.environ[QUIET] = "1"
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
        os.environ.pop(QUIET)
        if before is not None:
            os.environ[QUIET] = before


def say(text: str, *, warning: bool = False) -> None:
    """Prints a line to standard error, above the progress bar.

    If `is_quiet()` is True, only lines with `warning=True` are printed. A thread that has called
    `errors.mute_thread` prints nothing.
    """
    if not is_muted() and (warning or not is_quiet()):
        tqdm = sys.modules.get("tqdm")  # slow to import, and without it there is no bar
        write = tqdm.tqdm.write if tqdm else print
        try:
            write(escape_controls(text), file=sys.stderr)
            sys.stderr.flush()
        except OSError:  # a closed pipe or a full disk; the command must not stop
            messages.drop_output(sys.stderr)


def print_note(note: messages.Note) -> None:
    """Prints a note to standard error, see `say`."""
    say(note.text, warning=note.warning)


def measure_rate(began: float, clips: int) -> dict[str, float]:
    """Returns the entries `seconds` and `clips_per_second` of a result.

    The work on `clips` clips began at the time `began`, as returned by `time.monotonic`.
    """
    seconds = time.monotonic() - began
    return {"seconds": seconds, "clips_per_second": clips / max(seconds, 1e-9)}


def ignore_count(count: int) -> None:
    """Does nothing. This function replaces `Progress.advance` if no progress is displayed."""


class Progress:
    """Displays progress as a bar in a terminal, or as a line every 10 seconds in a file."""

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit: str,
        label: str,
        leave: bool = True,
        compiles: bool = False,
    ):
        """Displays the bar.

        Args:
          total: the number of units.
          initial: the number of units that were finished before.
          unit: the noun for a unit, such as `clip`.
          label: the text before the bar.
          leave: True if the bar stays after `close`.
          compiles: True if a compilation precedes the first `advance`. Until then, the text
            `compiling` replaces the bar.

        The displayed rate does not include the time before the first `advance`, because a program
        may compile, or load nets.
        """
        self._bar = None
        self._label, self._total, self._unit = label, total, unit
        self._initial = self._done = initial
        self._began = self._printed = time.monotonic()
        compiles, self._is_starting = compiles and initial < total, True
        self._kept = ""
        if not sys.stderr.isatty() or is_quiet():
            if compiles:
                say(f"{label}: compiling")
            return
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, initial=initial, unit=f" {unit}s", unit_scale=True, desc=label,
            bar_format="{desc} compiling" if compiles else BAR, dynamic_ncols=True,
            leave=leave,
        )  # fmt: skip

    def keep_text(self, text: str) -> None:
        """Stores a text, such as the MAP of an evaluation, to display next to the progress.

        Each later call of `advance` displays the stored text after the text that `advance` gets.
        The next call of `keep_text` replaces the stored text.
        """
        self._kept = text

    def advance(self, count: int, text: str = "") -> None:
        """Adds `count` finished units, and displays `text`, such as the latest loss."""
        self._done = min(self._done + count, self._total)
        text = ", ".join(part for part in (text, self._kept) if part)
        is_first, self._is_starting = self._is_starting, False
        if is_first and self._bar is not None:
            self._bar.bar_format = BAR
        if is_first and self._done < self._total:
            self._initial, self._began = self._done, time.monotonic()
            if self._bar is not None:
                self._bar.initial = self._done
                self._bar.start_t = self._bar.last_print_t = time.time()
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(min(count, self._total - self._bar.n))
        elif self._done == self._total or time.monotonic() - self._printed > LINE_SECONDS:
            self._printed = time.monotonic()
            say(f"{self._label}: {', '.join(self._parts(text))}")

    def _parts(self, text: str) -> Iterator[str]:
        """Yields the parts of a line of progress: finished units, rate, `text`, remaining time."""
        yield f"{self._done:,} of {self._total:,} {self._unit}s"
        seconds = time.monotonic() - self._began
        rate = (self._done - self._initial) / max(seconds, 1e-3)
        if rate:
            yield f"{rate:,.0f} {self._unit}s/s"
        if text:
            yield text
        if rate and self._done < self._total:
            left = round((self._total - self._done) / rate)
            yield f"{left // 60}:{left % 60:02} left"

    def close(self) -> None:
        """Ends the display of the progress."""
        if self._bar is not None:
            self._bar.close()


def show_clips(label: str, total: int) -> contextlib.closing[Progress]:
    """Returns a display of how many of `total` clips are finished, for a `with` statement.

    `label` is the text before the bar. The block must call `advance`.
    """
    return contextlib.closing(Progress(total, unit="clip", label=label, leave=False))
