"""Prints texts and problems. Control characters are escaped."""

import os
import sys
from typing import TextIO

from vidjax.utils.errors import escape_controls


def print_text(text: str) -> bool:
    """Prints text to standard output. Returns False if standard output is a closed pipe."""
    return print_escaped(text, sys.stdout)


def print_problem(text: str) -> None:
    """Prints the first three lines of an error or a warning to standard error."""
    lines = [line for line in text.split("\n") if line.strip()] or ["unknown error"]
    print_escaped("\n".join(["vidjax: " + lines[0], *lines[1:3]]), sys.stderr)


def print_escaped(text: str, stream: TextIO) -> bool:
    """Prints text with escaped control characters. Returns False if the text is lost."""
    encoding = stream.encoding or "utf-8"
    text = escape_controls(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise  # a lost result is an error; a lost message is none
        drop_output(stream)
        return False
    return True


def drop_output(stream: TextIO) -> None:
    """Discards all later output of `stream`, which is a closed pipe or a file on a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
