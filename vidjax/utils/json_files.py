"""Reads JSON files as objects of a class, and defines types of values with a limited range.

If a value does not fit the class, the functions raise UserError. The message has the path of the
file, the place of the wrong value, such as `$.members[2].map`, and `remedy`, what the user can do.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from vidjax.utils import files
from vidjax.utils.errors import UserError

T = TypeVar("T")

LOWEST_FLOAT = -sys.float_info.max  # NaN is not `>= LOWEST_FLOAT`
Text = Annotated[str, Meta(max_length=10_000)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Whole = Annotated[int, Meta(gt=-(1 << 53), lt=1 << 53)]
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Size = Annotated[int, Meta(ge=1, lt=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
NotNaN = Annotated[float, Meta(ge=LOWEST_FLOAT)]


def parse(path: Path, value: object, kind: type[T], remedy: str) -> T:
    """Converts `value`, the JSON value in the file `path`, to an object of the class `kind`.

    If the value does not fit, raises UserError. The last line of the message is `remedy`, what the
    user can do.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # a key may be "\ud800"
        text = str(error).replace(f"`float` >= {LOWEST_FLOAT}", "a number, not NaN")
        raise UserError(f"'{path}' is damaged: {text}\n{remedy}") from error


def load(path: Path, kind: type[T], remedy: str, limit: int = files.JSON_BYTES) -> tuple[Any, T]:
    """Reads a JSON file of at most `limit` bytes.

    Returns the JSON value, and the same value as an object of the class `kind`. For `remedy`, see
    `parse`.
    """
    try:
        value = files.read_json(path, object, limit)
    except ValueError as error:
        text = str(error)
        raise UserError(text if "\n" in text else f"{text}\n{remedy}") from error
    return value, parse(path, value, kind, remedy)


def read(path: Path, kind: type[T], remedy: str, limit: int = files.JSON_BYTES) -> T:
    """Reads a JSON file of at most `limit` bytes as an object of the class `kind`. See `parse`."""
    return load(path, kind, remedy, limit)[1]
