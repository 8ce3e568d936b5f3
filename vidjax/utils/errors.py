"""The errors of vidjax, what a command prints for each, and its exit code.

| exception | a command prints | exit code |
|---|---|---|
| UserError and its subclasses: a mistake in the flags, the data or a file | its message | 2 |
| CheckpointError: no usable checkpoint | its message | 3 |
| Interrupted: SIGINT, SIGTERM | its message | 130, 143 |
| an OSError of REMEDIES, such as a full disk | path, reason, remedy | 2 |
| no memory is left; a package is not installed | what to do | 2 |
| any other: a bug, also a ValueError of numpy or of vidjax | its traceback | 1 |

A UserError never passes on an error of a library as it is: whoever calls the library catches that
error, and says which file, clip or field is wrong.
"""

import contextlib
import difflib
import errno
import importlib.util
import itertools
import os
import re
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Iterator


class Expected(Exception):
    """What vidjax raises on purpose: its message is all that a user needs."""

    exit_code = 2


class UserError(Expected, ValueError):
    """A mistake that a user can mend; at most three lines name its place and its remedy."""


class ArgumentError(UserError, TypeError):
    """An argument of a function has a wrong type."""


class NoFileError(UserError, FileNotFoundError):
    """A file or folder that a user named is not there, or is no folder; the message says which."""


class DiskError(UserError, OSError):
    """A file could not be written, by this process or by one that it started."""


class InUseError(UserError):
    """Another process has locked a folder."""


class VidjaxWarning(UserWarning):
    """Something that a user should know, and that ends nothing."""


def warn(message: str) -> None:
    """Warns of something; a command prints the message, and never the warnings of libraries."""
    warnings.warn(message, VidjaxWarning, stacklevel=3)


def check_choice(name: str, value: object, known: Collection[object]) -> None:
    """Raises UserError if `value` is none of the `known` values of an option."""
    if value not in known:
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(map(str, known))}")


@contextlib.contextmanager
def named(place: str) -> Iterator[None]:
    """Puts `place`, such as a field, before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def need(what: str, *packages: str, extra: str, instead: str = "") -> None:
    """Raises UserError, "`what` needs ...", unless the packages of an extra are installed.

    `instead` says what may be done in place of an installation.
    """
    for problem in missing(what, *packages, extra=extra, instead=instead):
        raise UserError(problem)


def missing(what: str, *packages: str, extra: str, instead: str = "") -> Iterator[str]:
    """Yields the message of `need` if a package is not installed."""
    if absent := [name for name in packages if importlib.util.find_spec(name) is None]:
        names = " and ".join(absent).replace("_", "-")
        yield (
            f"{what} needs {names}, not installed: pip install 'vidjax[{extra}]', "
            f"in a checkout pip install -e '.[{extra}]'" + (f", or {instead}" if instead else "")
        )


def check_argument(
    argument: str, value: object, kinds: type | tuple[type, ...], wanted: str
) -> None:
    """Raises ArgumentError, "`argument` wants `wanted`, not ...", for a value of other `kinds`."""
    if not isinstance(value, kinds):
        shown = f" {value!r}" if isinstance(value, str | int | float | None) else ""
        kind = "" if value is None else f" {type(value).__name__}"
        raise ArgumentError(f"{argument} wants {wanted}, not{kind}{shown[:100]}")


_DISK = "free some space on that disk, or choose a folder on another one"
_RIGHTS = "choose a folder that you may read and write, or change its permissions"
_PATH = "is the path right?"
_FILES = "allow more open files: ulimit -n 4096"
_BROKEN = "the disk, or the network to it, fails: try again, or use another one"
# Number of an error of the system that a user can mend -> how.
REMEDIES = {
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EFBIG: _DISK,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOENT: _PATH,
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.EEXIST: "choose another name: something is there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "name the folder itself: its links lead in a circle",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EIO: _BROKEN,
    errno.ESTALE: _BROKEN,
}
# Errors of this list that writing to an open file raises, without a path.
_WITHOUT_PATH = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO)


def of_the_system(error: BaseException) -> str | None:
    """Returns the message of an error of the system that a user can mend, None for another one."""
    if isinstance(error, UnicodeEncodeError) and not sys.getfilesystemencoding().startswith("utf"):
        return (
            f"the locale of this process has no letter '{printable(error.object)[:100]}'\n"
            "export LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    if not isinstance(error, OSError) or isinstance(error, Expected):
        return None
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None or not (error.filename or error.errno in _WITHOUT_PATH):
        return None
    place = f"'{os.fsdecode(error.filename)}': " if isinstance(error.filename, str | bytes) else ""
    return f"{place}{error.strerror}\n{remedy}"


def printable(text: str) -> str:
    """Escapes control and bidirectional characters, but not line ends and tabs, for a terminal."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


# C0 and C1 but for tab and line end, delete, separators of lines, marks of direction that reorder
# what follows, and halves of characters.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


SUGGESTED_LETTERS = 64  # of the longest words that are compared
SUGGEST_SECONDS = 0.5  # after which no other word is compared


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known word that is spelled most like another one, None if none is close enough.

    One with the same part after its last dot always is. `cutoff`: least similarity, 0 to 1 (equal).
    """
    known, end = list(known), time.monotonic() + SUGGEST_SECONDS
    last = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    short = [name for name in last or known if max(len(name), len(word)) <= SUGGESTED_LETTERS]
    in_time = itertools.takewhile(lambda _: time.monotonic() < end, short)
    candidates = difflib.get_close_matches(word, in_time, n=1, cutoff=cutoff)
    return (candidates or last or [None])[0]


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'optim.decay'?`, or a list of the known words if none is close."""
    known = list(known)
    match = closest(word, known)
    return f"did you mean '{match}'?" if match else f"choose from {', '.join(known) or 'none'}"


def check_entry(field: str, name: object, table: Collection[str]) -> None:
    """Raises UserError if a field names no entry of a table, to which a user's file may add."""
    if name not in table:
        raise UserError(
            f"{field}='{name}': {suggest(str(name), table)}\n"
            "if your own file adds it: --config=FILE; in Python, vidjax.load_config(FILE) before"
        )
