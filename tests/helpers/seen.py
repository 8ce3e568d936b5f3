"""What a user sees: errors, and files."""

from collections.abc import Callable
from pathlib import Path

import pytest


def refused(action: Callable[[], object], *words: str) -> str:
    """Asserts that an action fails in one to three lines that hold some words; returns them."""
    with pytest.raises((ValueError, OSError)) as caught:
        action()
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Returns path -> bytes of all files below a folder but locks, which name processes."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
