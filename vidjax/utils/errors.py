"""Defines the errors of vidjax, their messages and their exit codes.

| exception | a command prints | exit code |
|---|---|---|
| UserError and its subclasses: a mistake in a flag, the data or a file | its message | 2 |
| CheckpointError: no usable checkpoint | its message | 3 |
| Interrupted: SIGINT, SIGTERM, SIGHUP, SIGUSR1 | its message | 130, 143, 129, 138 |
| an OSError in REMEDIES, for example a full disk | path, reason, remedy | 2 |
| no memory is left, or a package is not installed | a remedy | 2 |
| any other exception: a bug, including a ValueError of numpy or of vidjax | its traceback | 1 |

Code that calls a library catches its errors, and raises a UserError that names the file, clip or
field.
"""

import contextlib
import difflib
import errno
import importlib.util
import itertools
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping


class Expected(Exception):
    """The base class of errors that vidjax raises on purpose. Commands print only the message."""

    exit_code = 2


class UserError(Expected, ValueError):
    """A mistake that a user can correct. The message, of at most three lines, names a remedy."""


class ArgumentError(UserError, TypeError):
    """An argument of a public function has a wrong type."""


class NoFileError(UserError, FileNotFoundError):
    """A path that a user named does not exist, or does not contain the files that are needed."""


class DiskError(UserError, OSError):
    """This process or one of its child processes could not read or write a file."""


class NetError(UserError):
    """A neural net cannot be run, or does not match its card (the JSON file that describes it)."""


class InUseError(UserError):
    """A folder that a command needs is locked by another process of vidjax."""


class VidjaxWarning(UserWarning):
    """A warning for the user. The command continues."""


_THIS_THREAD = threading.local()


def mute_thread() -> None:
    """Hides all messages and warnings of the calling thread. They may contain names of people."""
    _THIS_THREAD.is_muted = True


def is_muted() -> bool:
    """Returns True if the calling thread has called `mute_thread`."""
    return getattr(_THIS_THREAD, "is_muted", False)


def warn(message: str) -> None:
    """Warns the user. A command prints this warning, and hides the warnings of other libraries.

    If a program calls vidjax, the warning shows the line of the program with this call.
    """
    if is_muted():
        return
    stack = [frame for frame, _ in traceback.walk_stack(sys._getframe())]  # this call is first
    inside = stack[0].f_code.co_filename.removesuffix(os.path.join("utils", "errors.py"))
    last = max(i for i, frame in enumerate(stack) if frame.f_code.co_filename.startswith(inside))
    frame = stack[min(last + 1, len(stack) - 1)]
    warnings.warn_explicit(
        message, VidjaxWarning, frame.f_code.co_filename, frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )  # fmt: skip


def check_choice(name: str, value: object, known: Collection[object]) -> None:
    """Raises UserError if `value`, the value of the option `name`, is not in `known`."""
    if value not in known:
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(map(str, known))}")


@contextlib.contextmanager
def prefix_errors(place: str) -> Iterator[None]:
    """Puts `place`, such as a path, before the message of a UserError in a `with` block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def require_packages(what: str, *packages: str, extra: str, instead: str = "") -> None:
    """Raises UserError if one of `packages` is not installed.

    The message begins "WHAT needs PACKAGE: install it with pip install 'vidjax[EXTRA]'", with the
    arguments `what` and `extra`. `instead` is another remedy, such as "end the name in .tsv".
    """
    if absent := [name for name in packages if importlib.util.find_spec(name) is None]:
        names = " and ".join(absent).replace("_", "-")
        raise UserError(
            f"{what} needs {names}: install it with pip install 'vidjax[{extra}]', "
            f"or in a checkout with pip install -e '.[{extra}]'"
            + (f", or {instead}" if instead else "")
        )


def check_argument(
    argument: str, value: object, kinds: type | tuple[type, ...], wanted: str
) -> None:
    """Raises ArgumentError if the type of `value` is not in `kinds`.

    The message contains `argument`, the name of the argument, and `wanted`, the allowed types.
    """
    if not isinstance(value, kinds):
        text = f" {value!r}" if isinstance(value, str | int | float | None) else ""
        kind = "" if value is None else f" {type(value).__name__}"
        raise ArgumentError(f"{argument} must be {wanted}, not{kind}{text[:100]}")


# ENOTCONN and EHOSTDOWN: the program or the server of a mounted disk has ended.
_FAILURES = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT)
_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        "free some space on that disk, or choose a folder on another disk",
    (errno.EACCES, errno.EPERM, errno.EROFS):
        "choose a folder that you may read and write, or change its permissions",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR): "correct the path",
    (errno.EEXIST,): "choose another name, because this file or folder exists",
    (errno.ENAMETOOLONG,): "choose a shorter name",
    (errno.ELOOP,): "name the folder itself: its links lead in a circle",
    (errno.EMFILE, errno.ENFILE): "allow more open files: ulimit -n 4096",
    (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        "choose a folder on another disk, because this disk does not support the operation",
    (errno.EINVAL, errno.EILSEQ):
        "choose another name or another disk, because this disk may not allow such names",
    _FAILURES: "the disk or the network fails: try again, or use another disk",
}  # fmt: skip
# Number of a system error -> remedy.
REMEDIES = {number: remedy for numbers, remedy in _REMEDIES.items() for number in numbers}
# Kind of an error that Python or a library raises, and words in its message -> text and remedy.
_OF_LIBRARIES = {
    (RuntimeError, "home directory"):
        "a path begins with ~, and the home folder of the user is not known\n"
        "for your own folder, write ~/; if you have none, set the variable HOME to a folder",
    (RuntimeError, "jaxlib was built using"):
        "jax needs a processor with the instructions AVX\n"
        "in a virtual machine, let the machine use the processor of its host",
    (OSError, "temporary directory"):
        "no folder for temporary files can be written\n"
        "set the variable TMPDIR to a folder that you can write to",
}  # fmt: skip
# An error of writing to an open file has one of these numbers and no path.
_WITHOUT_PATH = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, *_FAILURES,
)  # fmt: skip


def describe_system_error(error: BaseException) -> str | None:
    """Returns a message for an error of the operating system, or None for any other error.

    The first line is the problem. The second line is what the user can do.
    """
    if isinstance(error, UnicodeEncodeError) and not sys.getfilesystemencoding().startswith("utf"):
        return (
            "the locale of this process cannot encode the file name "
            f"'{escape_controls(error.object)[:100]}'\n"
            "set another locale: export LC_ALL=C.UTF-8"
        )
    for (kind, words), text in _OF_LIBRARIES.items():
        if isinstance(error, kind) and words in str(error):
            return text
    if not isinstance(error, OSError) or isinstance(error, Expected):
        return None
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None or not (error.filename or error.errno in _WITHOUT_PATH):
        return None
    place = f"'{os.fsdecode(error.filename)}': " if isinstance(error.filename, str | bytes) else ""
    return f"{place}{error.strerror}\n{remedy}"


def escape_controls(text: str) -> str:
    """Escapes characters that control a terminal or reorder text. Keeps tabs and line ends."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


# Controls except tab and line end, separators of lines, bidirectional marks, unpaired surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


SUGGESTED_LETTERS = 64  # longer words are not compared, because a comparison takes quadratic time
SUGGEST_SECONDS = 0.5  # the search for a similar word ends after this time


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the word of `known` that is spelled most like `word`, or None if none is similar.

    Words are similar if `difflib` computes a ratio of at least `cutoff`. Equal words have ratio 1.
    Words with the same part after the last dot, such as `optim.name` and `name`, are similar, too.
    """
    known, end = list(known), time.monotonic() + SUGGEST_SECONDS
    last = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    short = [name for name in last or known if max(len(name), len(word)) <= SUGGESTED_LETTERS]
    in_time = itertools.takewhile(lambda _: time.monotonic() < end, short)
    candidates = difflib.get_close_matches(word, in_time, n=1, cutoff=cutoff)
    return (candidates or last or [None])[0]


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown word, with the most similar word of `known`.

    If no word is similar, the hint lists all words of `known`.
    """
    known = list(known)
    match = closest(word, known)
    return f"did you mean '{match}'?" if match else f"choose from {', '.join(known) or 'none'}"


def check_entry(
    field: str, name: object, table: Collection[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raises UserError if `name` is not in `table`, such as the table `OPTIMIZERS`.

    `name` is the value of the configuration field `field`. A user's configuration file may add
    names to `table`, so the message explains how to load the file. `elsewhere` is a dict, name in
    another library -> the fields of vidjax with the same effect, which the message shows.
    """
    if not isinstance(name, str) or name not in table:
        fields = (elsewhere or {}).get(str(name).lower())
        remedy = f"write {fields}" if fields else suggest(str(name), table)
        raise UserError(
            f"{field}='{name}' is unknown: {remedy}\n"
            "if your own file adds this name, add --config=FILE (train, evaluate, rank, embed, "
            "export, import); in Python, first call vidjax.load_config(FILE)"
        )
