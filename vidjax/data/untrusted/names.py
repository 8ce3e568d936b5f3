"""Clip names, and text of unknown origin in messages."""


def show(text: str | bytes) -> str:
    """Returns text from a file, shortened and escaped for one line of an error message."""
    if isinstance(text, bytes):
        text = text[:400].decode("utf-8", "backslashreplace")
    text = text if len(text) <= 100 else text[:100] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def clean_name(name: str) -> str:
    """Returns a clip name without `.mp4` at its end.

    Raises:
      ValueError: the name is empty, is not valid unicode, or holds white space, which would break
        the lines of a submission.
    """
    end = len(name)
    while name.endswith(".mp4", 0, end):  # no copy: a name may be nothing but suffixes
        end -= 4
    clean = name[:end]
    if not clean:
        raise ValueError(f"clip name '{show(name)}' is empty")
    if clean.split() != [clean]:
        raise ValueError(f"clip name '{show(name)}' holds white space")
    try:
        clean.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"clip name '{show(name)}' is not valid unicode") from None
    return clean


def clean_name_at(place: str, name: object) -> str:
    """Returns a clip name without `.mp4`.

    Args:
      place: file, line or split, with which an error begins.
      name: the name as it was given.

    Raises:
      ValueError: the name is no text, or malformed.
    """
    if not isinstance(name, str):
        raise ValueError(f"{place} a clip name is text, not {type(name).__name__}: {name!r:.40}")
    try:
        return clean_name(name)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from None
