"""Reads files that may come from a stranger, and computes digests.

Readers open regular files only, follow no symbolic link at the path, check sizes first, and return
bytes, JSON, or arrays without objects. They raise ValueError or FileNotFoundError.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar, cast

import numpy as np

from vidjax.utils.errors import UserError, named

T = TypeVar("T")

MB = 1 << 20
JSON_BYTES = 16 * MB
CONFIG_BYTES = MB
LINE_BYTES = MB // 4  # of a log of one JSON value per line
ARCHIVE_BYTES = 128 * MB  # of an `.npz`, packed and unpacked
PIECE_BYTES = MB  # of a zip that are read at once
MOST_ENTRIES = 1000  # arrays of an `.npz`
MAX_DEPTH = 40  # of lists and objects within each other
LARGE_BYTES = 64 * MB  # a file of more must take up room on the disk
MAX_ITEMS = 2_000_000  # values in one JSON file
INTEGER_LIMIT = 1 << 63  # whole numbers of this size or more overflow in int64 arrays
KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def open_regular(
    path: Path, flags: int = os.O_RDONLY, limit: float = math.inf, below: Path | None = None
) -> io.FileIO:
    """Opens a regular file, unbuffered; refuses a symbolic link, and more than `limit` bytes.

    Refuses a file over LARGE_BYTES that is nearly all holes (sparse). Never truncates, whatever
    `flags` of `os.open` say. With `below`, a folder above the file, links on the way may not lead
    out of that folder; None allows all links on the way.
    """
    if below is not None and not path.parent.resolve().is_relative_to(below.resolve()):
        raise UserError(
            f"'{path.parent}' is a link out of '{below}': it is not opened\n"
            "put the folder that it leads to in its place"
        )
    try:
        safe = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, safe, 0o666)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:  # ELOOP of a link, EISDIR of a folder, ENXIO of a pipe or a socket
        refuse_odd(path)
        raise error
    try:
        refuse_odd(path, descriptor)
        status = os.fstat(descriptor)
        size = status.st_size
        if size > limit:
            raise UserError(
                f"'{path}' is too large: {size:,} bytes, where {limit:,} are the most\n"
                "put back the file of the run"
            )
        if size > LARGE_BYTES and 10 * 512 * status.st_blocks < size:
            raise UserError(
                f"'{path}' is damaged: most of its {size:,} bytes are holes\n"
                "put back the file that was there"
            )
        mode = "r+b" if flags & os.O_RDWR else "ab" if flags & os.O_WRONLY else "rb"
        return open(path, mode, buffering=0, opener=lambda *_: descriptor)  # named by its path
    except BaseException:
        os.close(descriptor)
        raise


def refuse_odd(path: Path, descriptor: int | None = None) -> None:
    """Raises UserError unless a path, or its open descriptor, is a regular file."""
    mode = (os.lstat(path) if descriptor is None else os.fstat(descriptor)).st_mode
    if stat.S_ISREG(mode):
        return
    kind = KINDS.get(stat.S_IFMT(mode), "a device")
    remedy = "put a copy of the file it leads to in its place" if kind == "a link" else "remove it"
    raise UserError(f"'{path}' is {kind}, not a file: it is not opened\n{remedy}")


def open_input(path: Path) -> io.FileIO:
    """Opens a file of the user's own data, unbuffered; unlike `open_regular` it follows links.

    Refuses files that the system makes up, which may be endless.
    """
    real = Path(os.path.realpath(path))
    if real.parts[1:2] in (("proc",), ("sys",)):
        raise UserError(f"'{path}' leads to '{real}', no file of data: it is not opened\nremove it")
    return open_regular(real)


def walk(folder: Path) -> Iterator[str]:
    """Yields the path of every file in a folder, relative to it; refuses links and other kinds."""
    folders = [""]
    while folders:
        place = folders.pop()
        with os.scandir(folder / place) as entries:
            for entry in entries:
                path = os.path.join(place, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                    continue
                if not entry.is_file(follow_symlinks=False):
                    refuse_odd(folder / path)
                yield path


def refuse_links(folder: Path) -> None:
    """Raises UserError if there is a link, a pipe or a device in a folder, at any depth.

    Whoever named the folder may have named a link to it. A folder that is absent is in order.
    """
    if os.path.isdir(folder):
        for _ in walk(folder):
            pass


def read_bytes(path: Path, limit: int, below: Path | None = None) -> bytes:
    """Returns the content of a file of at most `limit` bytes; `below` is that of `open_regular`."""
    with io.BufferedReader(open_regular(path, limit=limit, below=below)) as file:
        return file.read(limit)


def read_json(
    path: Path, kind: type[T] = dict, limit: int = JSON_BYTES, below: Path | None = None
) -> T:
    """Returns the value of a JSON file; ValueError if it is damaged or no `kind`; `object`: any."""
    content = read_bytes(path, limit, below)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"'{path}' is damaged: it holds no {kind.__name__}")
    return value


def parse_json(content: bytes | str) -> object:
    """Returns the value of JSON text; refuses deep nesting, many values and huge integers."""
    try:
        value = json.loads(content, parse_int=_parse_int)
    except RecursionError:
        raise UserError(f"lists within lists, more than {MAX_DEPTH} deep") from None
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
            raise UserError(f"more than {MAX_ITEMS:,} values")
        if not inner:
            return value
        level = inner
    raise UserError(f"lists within lists, more than {MAX_DEPTH} deep")


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= INTEGER_LIMIT:
        raise UserError(f"a whole number beyond 64 bits: {digits[:20]}")
    return int(digits)


def parse_line(line: bytes) -> dict[str, object]:
    """Returns the JSON object on a line of a log."""
    value = parse_json(line) if len(line) <= LINE_BYTES else None
    if not isinstance(value, dict):
        raise UserError("no object of JSON")
    return value


def each_line(path: Path, limit: int = LINE_BYTES) -> Iterator[bytes]:
    """Yields lines with their ends; a line of more than `limit` bytes comes in pieces."""
    with io.BufferedReader(open_regular(path)) as lines:
        while line := lines.readline(limit):
            yield line


def read_npz(path: Path, limit: int = ARCHIVE_BYTES) -> dict[str, np.ndarray]:
    """Returns name -> array of an `.npz` file of at most `limit` bytes, packed and unpacked."""
    with open_regular(path, limit=limit) as file, named(f"cannot read '{path}'"):
        return load_npz(file, limit)


def load_npz(file: io.FileIO | io.BytesIO, limit: int, least: int = 1) -> dict[str, np.ndarray]:
    """Reads an open file as `read_npz` does; a number counts for `least` bytes or more."""
    arrays = {}
    with _npz_errors():
        for name, entry, _ in _each_array(file, limit, least):
            entry.seek(0)
            arrays[name] = np.lib.format.read_array(entry, allow_pickle=False)
    return arrays


def most_unpacked(size: int) -> int:
    """Returns how many bytes a file of `size` bytes of numbers may unpack to, unless it is a bomb.

    Features pack to a tenth at best. Only a file of nearly one value packs to a thousandth.
    """
    return max(LARGE_BYTES, 100 * size)


def npz_bytes(content: bytes, limit: int, least: int = 4) -> int:
    """Returns how many bytes the arrays of an `.npz` in memory become; unpacks their headers only.

    A number counts for `least` bytes or more: uint8 becomes float32, and 4 are its bytes. UserError
    if they are more than `limit`, or if the headers are damaged.
    """
    with _npz_errors():
        return sum(size for *_, size in _each_array(io.BytesIO(content), limit, least))


@contextlib.contextmanager
def _npz_errors() -> Iterator[None]:
    """Turns the errors of zlib, zipfile and numpy for a damaged archive into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"damaged, or no .npz file: write it again ({reason})") from error


def _each_array(
    file: io.FileIO | io.BytesIO, limit: int, least: int
) -> Iterator[tuple[str, IO[bytes], int]]:
    """Yields name, open entry and size in bytes of the arrays of an `.npz`, by their headers.

    Refuses arrays of over `limit` bytes together, of Python objects, or with a false header.
    """
    if file.read(1) == np.lib.format.MAGIC_PREFIX[:1]:
        raise UserError("an .npy file, which does not name its array: use numpy.savez")
    left = limit
    with open_zip(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > limit or len(entries) > MOST_ENTRIES:
            raise UserError(f"it unpacks to more than {limit:,} bytes")
        for entry in entries:
            with open_entry(archive, entry) as opened:
                shape, dtype = _read_header(opened)
                if dtype.hasobject:
                    raise UserError("holds Python objects: save arrays of numbers [T, D]")
                if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise UserError(f"its array '{entry.filename[:50]}' is not what it says")
                size = math.prod(shape) * max(dtype.itemsize, least)
                left -= size
                if left < 0:
                    raise UserError(f"its arrays become more than {limit:,} bytes in memory")
                yield entry.filename.removesuffix(".npy"), opened, size


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and the dtype of an array, from the start of its `.npy` file."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, _, dtype = read(file)
    return shape, dtype


class _InPieces(io.BufferedReader):
    """A file of which nobody reads more than PIECE_BYTES at once, such as a long list of a zip."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns `size` bytes, or all that are left."""
        wanted = PIECE_BYTES + 1 if size is None or size < 0 else min(size, PIECE_BYTES + 1)
        content = super().read(wanted)
        if len(content) > PIECE_BYTES:
            raise UserError(f"a zip with more than {PIECE_BYTES:,} bytes of names: write it again")
        return content


@contextlib.contextmanager
def open_zip(file: io.FileIO | io.BytesIO) -> Iterator[zipfile.ZipFile]:
    """Opens a zip whose list of entries is short; `open_entry` opens an entry."""
    content = _InPieces(cast(io.RawIOBase, file))
    try:
        with zipfile.ZipFile(content) as archive:
            yield archive
    finally:
        content.detach()


def open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    """Opens an entry of a zip, stored or deflated; no read may want more than PIECE_BYTES.

    The entry ends after `entry.file_size` bytes. Python unpacks only these two methods in pieces: a
    piece of bzip2 or LZMA becomes gigabytes, whatever size the entry has.
    """
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"its entry '{entry.filename[:50]}' is neither stored nor deflated: pack it so"
        )
    return archive.open(entry)


def local(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file or folder of this machine; refuses an address such as s3://x."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        raise UserError(
            f"'{path}' is an address, not a folder of this machine\n"
            "copy what it holds, or mount it, and name the folder"
        )
    return Path(path).expanduser()


def absolute(path: str | os.PathLike[str]) -> Path:
    """Returns `local(path)` as an absolute path without `..`."""
    found = local(path)
    return found.resolve() if ".." in found.parts else found.absolute()


def sha256_file(path: Path) -> str:
    """Returns the sha256 of the bytes of a file, in hexadecimal; opens it by `open_input`."""
    with open_input(path) as file:
        return sha256_opened(file)


def sha256_opened(file: io.FileIO) -> str:
    """Returns the sha256 of an open file's bytes, in hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Returns the sha256 of a value's compact JSON text, in hexadecimal; dicts keep their order."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256_folder(folder: Path) -> dict[str, str]:
    """Returns relative path -> sha256 of every file below a folder."""
    return {path: sha256_file(folder / path) for path in sorted(walk(folder))}


def cache_root(given: str | Path | None = None) -> Path:
    """Returns the cache folder: `given`, else `$VIDJAX_CACHE`, else `~/.cache/vidjax`."""
    return Path(given or os.environ.get("VIDJAX_CACHE") or "~/.cache/vidjax").expanduser()
