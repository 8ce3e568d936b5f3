"""Functions that check what a user sees: errors, and files."""

import pytest


def refused(action, *words):
    """Asserts that an action raises an error of 1 to 3 lines with `words`; returns its message."""
    with pytest.raises((ValueError, OSError)) as caught:
        action()
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, message
    return message


def contents(folder, but=()):
    """Returns path -> bytes of all files of a folder, except locks, and names in `but`."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    left_out = {".lock", *but}
    return {str(x): (folder / x).read_bytes() for x in paths if not left_out & {*x.parts}}
