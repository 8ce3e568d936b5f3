"""Reading of files that a stranger may have made: the files of a run's folder.

Every reader opens a regular file without following a link, and refuses a file that is too large
before it reads it. What it returns is plain data: bytes, JSON, or arrays without objects. An error
of a reader is a ValueError, or FileNotFoundError where there is no file.
"""

import contextlib
import io
import json
import math
import mmap
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")

MB = 1 << 20
JSON_BYTES = 16 * MB
CONFIG_BYTES = MB
LOG_BYTES = 32 * MB  # of `metrics.jsonl` and other files of one JSON value per line
LINE_BYTES = MB // 4
RANKING_BYTES = 128 * MB
RANKING_NAMES = 6_000_000  # identities and clips, repeated ones included
ARCHIVE_BYTES = 128 * MB  # of an `.npz`, packed and unpacked
MAX_DEPTH = 40  # of lists and objects within each other
MAX_ITEMS = 2_000_000  # values in one JSON file


def open_regular(path: Path, flags: int = os.O_RDONLY, limit: float = math.inf) -> io.FileIO:
    """Opens a regular file, unbuffered, without following a link in its place.

    Args:
      path: the file. Its folder may be reached through links.
      flags: of `os.open`. The file is not truncated, whatever they are.
      limit: the largest size, in bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a link, a folder, a pipe or a device, or too large; or it has another name,
        too, and is opened for writing.
      OSError: it cannot be opened.
    """
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags & ~os.O_TRUNC | safe, 0o666)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        # ELOOP of a link, EISDIR of a folder, ENXIO of a pipe or a socket
        kind = _kind(path)
        if kind is None:
            raise
        raise _not_regular(path, kind) from error
    try:
        status = os.fstat(descriptor)
        kind = _kind_of(status.st_mode)
        if kind is not None:
            raise _not_regular(path, kind)
        if status.st_size > limit:
            raise ValueError(
                f"'{path}' is too large: {status.st_size:,} bytes, where {limit:,} are the most\n"
                "vidjax has not written it: put back the file of the run"
            )
        if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
            raise ValueError(
                f"'{path}' is one file with several names (hard links): it is not written\n"
                "copy the folder of the run, and use the copy"
            )
        mode = "r+b" if flags & os.O_RDWR else "ab" if flags & os.O_WRONLY else "rb"
        return open(path, mode, buffering=0, opener=lambda *_: descriptor)  # named by its path
    except BaseException:
        os.close(descriptor)
        raise


def _kind(path: Path) -> str | None:
    try:
        return _kind_of(os.lstat(path).st_mode)
    except OSError:
        return None


def _kind_of(mode: int) -> str | None:
    """Returns the kind of what is not a regular file, None for a regular one."""
    if stat.S_ISREG(mode):
        return None
    for is_kind, name in (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return name
    return "a device"


def _not_regular(path: Path, kind: str) -> ValueError:
    remedy = "put a copy of the file it leads to in its place" if kind == "a link" else "remove it"
    return ValueError(f"'{path}' is {kind}, not a file: it is not opened\n{remedy}")


def exists(path: Path) -> bool:
    """Returns True if something has this name, if only a link to nothing."""
    return os.path.lexists(path)


@contextlib.contextmanager
def _open_to_read(path: Path, limit: int) -> Iterator[tuple[io.FileIO, int]]:
    """Opens a file of at most `limit` bytes and gives its size, too."""
    try:
        with open_regular(path, limit=limit) as file:
            yield file, os.fstat(file.fileno()).st_size
    except PermissionError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Returns the content of a file of at most `limit` bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is larger, no regular file, or cannot be read.
    """
    with _open_to_read(path, limit) as (file, size):
        content = bytearray()
        while len(content) <= size and (part := file.read(size + 1 - len(content))):
            content += part
        return bytes(content)


def map_bytes(path: Path, limit: int) -> memoryview:
    """Maps a file of at most `limit` bytes into memory; the file must not be shortened meanwhile.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is larger, no regular file, or cannot be read.
    """
    with _open_to_read(path, limit) as (file, size):
        if not size:  # what cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_json(path: Path, kind: type[T] = dict, limit: int = JSON_BYTES) -> T:
    """Reads a JSON file that may be damaged.

    Args:
      path: the file.
      kind: the type that the file must hold: `dict`, `list`, or `object` for any.
      limit: the largest size to read, in bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not JSON, too large, or holds another type.
    """
    content = read_bytes(path, limit)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' is damaged: it holds no {kind.__name__}")
    return value


def parse_json(content: bytes | str) -> object:
    """Returns the value of JSON text.

    Raises:
      ValueError: it is not JSON in UTF-8, nested too deeply, or holds too many values or a whole
        number that 64 bits do not hold.
    """
    try:
        value = json.loads(content, parse_int=_parse_int)
    except RecursionError:
        raise ValueError(f"lists within lists, more than {MAX_DEPTH} deep") from None
    count, level = 0, [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        count += len(inner)
        if count > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS:,} values")
        if not inner:
            return value
        level = inner
    raise ValueError(f"lists within lists, more than {MAX_DEPTH} deep")


# From here on a whole number overflows where an array or a float is wanted.
INTEGER_LIMIT = 1 << 63


def _parse_int(digits: str) -> int:
    """Returns a whole number; raises ValueError if it would overflow where a float is wanted."""
    if len(digits) > 20 or abs(int(digits)) >= INTEGER_LIMIT:
        raise ValueError(f"a whole number beyond 64 bits: {digits[:20]}")
    return int(digits)


def read_lines(path: Path, limit: int = LOG_BYTES) -> list[bytes]:
    """Returns the lines of a log, the last of which may be unfinished; none without the file.

    Raises:
      ValueError: the file is too large, or no regular file.
    """
    return read_bytes(path, limit).splitlines() if exists(path) else []


def parse_line(line: bytes) -> dict[str, object]:
    """Returns the JSON object on a line of a log.

    Raises:
      ValueError: the line is too long, or holds something else.
    """
    value = parse_json(line) if len(line) <= LINE_BYTES else None
    if not isinstance(value, dict):
        raise ValueError("no object of JSON")
    return value


def read_ranking(path: Path) -> bytes:
    """Returns the content of a `ranking.txt`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is too large, holds too many names, or is no regular file.
    """
    content = read_bytes(path, RANKING_BYTES)
    if sum(content.count(blank) for blank in b" \t\r\n\v\f") > RANKING_NAMES:
        raise ValueError(
            f"'{path}' holds more than {RANKING_NAMES:,} names\n"
            "vidjax has not written it: put back the file of the run"
        )
    return content


def read_npz(path: Path, limit: int = ARCHIVE_BYTES) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz` file, whose sizes are summed before one is unpacked.

    Args:
      path: the file.
      limit: the most bytes, packed and unpacked.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or too large, or holds Python objects.
    """
    content = io.BytesIO(read_bytes(path, limit))
    try:
        with zipfile.ZipFile(content) as archive:
            _check_sizes(archive, limit)
        content.seek(0)
        with np.load(content, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except Exception as error:  # a damaged archive raises whatever zlib, zipfile or numpy raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"cannot read '{path}': {reason}") from error


def _check_sizes(archive: zipfile.ZipFile, limit: int) -> None:
    """Checks that all arrays together are small, by the directory and by their own headers."""
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > limit or len(entries) > 1000:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    for entry in entries:
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"its array '{entry.filename[:50]}' is not what it says")
