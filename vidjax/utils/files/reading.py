"""Reads files that may come from a stranger, and computes digests.

The functions check the size of a file before they read it. They open only regular files. Only
`open_input` opens a symbolic link. The functions return bytes, JSON, or arrays without Python
objects, and raise UserError or an OSError, such as FileNotFoundError.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar, cast

from vidjax.utils.errors import UserError, prefix_errors
from vidjax.utils.machine import memory_bytes

if TYPE_CHECKING:
    import numpy as np  # slow to import, and many commands read no array

T = TypeVar("T")

MB = 1 << 20
JSON_BYTES = 16 * MB
CONFIG_BYTES = MB
LINE_BYTES = MB // 4  # of a line in a log of JSON lines
ARCHIVE_BYTES = 128 * MB  # of an `.npz`, both packed and unpacked
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Path("s3://b") is s3:/b
PIECE_BYTES = MB  # the most bytes of a zip that are read at once
NPY_START = b"\x93"  # the first byte of an `.npy`
MAX_ENTRIES = 1000  # arrays of an `.npz`
LARGE_BYTES = 64 * MB  # the unpacked size of an archive that is never too large for its size
MAX_ITEMS = 2_000_000  # entries of a list in a file of a stranger
TEXT_FACTOR = 60  # lists of short words take up to this many times the size of the text
INTEGER_LIMIT = 1 << 63  # larger whole numbers overflow in int64 arrays
KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def open_regular(
    path: Path, flags: int = os.O_RDONLY, limit: float = math.inf, below: Path | None = None
) -> io.FileIO:
    """Opens a regular file without a buffer. Never truncates the file.

    Args:
      path: the file. Symbolic links, pipes and other special files raise UserError.
      flags: flags of `os.open`, by default for reading.
      limit: the largest allowed number of bytes. A larger file raises UserError.
      below: a folder that contains the file. If a link on the way to the file leads out of this
        folder, raises UserError.
    """
    if below is not None and not path.parent.resolve().is_relative_to(below.resolve()):
        raise UserError(
            f"'{path.parent}' is a link to a folder outside '{below}', and is not opened\n"
            "replace the link by a copy of that folder"
        )
    try:
        safe = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, safe, 0o666)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:  # ELOOP for a link, EISDIR for a folder, ENXIO for a pipe or a socket
        refuse_special_file(path)
        raise error
    try:
        refuse_special_file(path, descriptor)
        if (size := os.fstat(descriptor).st_size) > limit:
            raise UserError(
                f"'{path}' is too large: it has {size:,} bytes, and the limit is {limit:,}\n"
                "restore the original file"
            )
        mode = "r+b" if flags & os.O_RDWR else "ab" if flags & os.O_WRONLY else "rb"
        # With an opener, the opened file has its path as `name`, which messages show.
        return open(path, mode, buffering=0, opener=lambda *_: descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def refuse_special_file(path: Path, descriptor: int | None = None) -> None:
    """Raises UserError if `path` is not a regular file, but for example a link or a pipe.

    If the file is open, `descriptor` is its file descriptor, and the open file is checked.
    """
    mode = (os.lstat(path) if descriptor is None else os.fstat(descriptor)).st_mode
    if stat.S_ISREG(mode):
        return
    kind = KINDS.get(stat.S_IFMT(mode), "a device")
    remedy = f"name a file, or move the {kind.removeprefix('a ')} elsewhere"
    if kind == "a link":
        remedy = "replace the link by a copy of its target"
    raise UserError(f"'{path}' is {kind}, not a file, and is not opened\n{remedy}")


def open_input(path: Path) -> io.FileIO:
    """Opens a file of the user's data without a buffer. The path may be a symbolic link.

    Raises UserError for a file that is not regular. Files in /proc and /sys may be endless, so they
    raise UserError, too.
    """
    real = Path(os.path.realpath(path))
    if real.parts[1:2] in (("proc",), ("sys",)):
        raise UserError(
            f"'{path}' leads to '{real}', a virtual file of the system, and is not opened\n"
            f"remove '{path}', or replace it by a copy of the data"
        )
    return open_regular(real)


def read_input(path: Path) -> bytes:
    """Returns the content of a text file of the user. The path may be a symbolic link.

    Raises UserError if the file is too large for the memory, or is not a regular file.
    """
    with io.BufferedReader(open_input(path)) as file:
        size, limit = os.fstat(file.fileno()).st_size, memory_bytes() // TEXT_FACTOR
        if size > limit:
            raise UserError(
                f"'{path}' is too large: it has {size:,} bytes, and the memory suffices for "
                f"{limit:,}\nremove lines that are not needed, or use a machine with more memory"
            )
        return file.read()


def _find_mode(path: str | os.PathLike[str]) -> int:
    """Returns the mode of a file or folder, or 0 if it does not exist. Follows links.

    If the disk fails, or if the user may not open the folder, raises OSError. `Path.exists` of
    Python 3.14 would be False in these cases.
    """
    try:
        return os.stat(path).st_mode
    except ValueError:  # no path contains the character NUL
        return 0
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP):
            return 0
        raise


def is_file(path: str | os.PathLike[str]) -> bool:
    """Returns True if `path` is a regular file. If the disk fails, raises OSError."""
    return stat.S_ISREG(_find_mode(path))


def is_present(path: str | os.PathLike[str]) -> bool:
    """Returns True if `path` is a file or folder. If the disk fails, raises OSError."""
    return _find_mode(path) != 0


def walk(folder: Path) -> Iterator[str]:
    """Yields the relative path of each file below a folder. A link or a pipe raises UserError."""
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
                    refuse_special_file(folder / path)
                yield path


def refuse_links(folder: Path) -> None:
    """Raises UserError if a folder contains a link or a pipe, at any depth.

    If the folder does not exist, there is no error.
    """
    if os.path.isdir(folder):
        for _ in walk(folder):
            pass


def read_bytes(path: Path, limit: int, below: Path | None = None) -> bytes:
    """Returns the content of a file of at most `limit` bytes. For `below`, see `open_regular`."""
    with io.BufferedReader(open_regular(path, limit=limit, below=below)) as file:
        return file.read(limit)


def read_json(
    path: Path, kind: type[T] = dict, limit: int = JSON_BYTES, below: Path | None = None
) -> T:
    """Returns the value in a JSON file. If its type is not `kind`, raises UserError.

    For `limit` and `below`, see `open_regular`.
    """
    content = read_bytes(path, limit, below)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}") from error
    if not isinstance(value, kind):
        name = "object" if kind is dict else kind.__name__
        raise UserError(f"'{path}' is damaged: it contains no JSON {name}")
    return value


def parse_json(content: bytes | str) -> object:
    """Returns the value of JSON text.

    Raises ValueError if the text is not JSON, is nested too deeply for Python, or contains an
    integer that does not fit into 64 bits.
    """
    try:
        return json.loads(content, parse_int=_parse_int)
    except RecursionError:
        raise UserError("the JSON text is nested too deeply") from None


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= INTEGER_LIMIT:
        raise UserError(f"the whole number {digits[:20]} does not fit into 64 bits")
    return int(digits)


def parse_line(line: bytes) -> dict[str, object]:
    """Returns the JSON object on a line of a log. Raises UserError for a damaged or long line."""
    value = parse_json(line) if len(line) <= LINE_BYTES else None
    if not isinstance(value, dict):
        raise UserError("the line is too long or not a JSON object")
    return value


def iterate_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, with line ends. A line above 256 kB comes in several pieces."""
    with io.BufferedReader(open_regular(path)) as lines:
        while line := lines.readline(LINE_BYTES):
            yield line


def read_npz(path: Path, limit: int = ARCHIVE_BYTES) -> "dict[str, np.ndarray]":
    """Reads an `.npz` file, and returns name -> array.

    If the file has more than `limit` bytes, or its arrays need more than `limit` bytes of memory,
    raises UserError.
    """
    with open_regular(path, limit=limit) as file, prefix_errors(f"cannot read '{path}'"):
        return load_npz(file, limit)


def load_npz(file: io.FileIO | io.BytesIO, limit: int, least: int = 1) -> "dict[str, np.ndarray]":
    """Reads an open `.npz` file, and returns name -> array.

    Raises UserError if the arrays need more than `limit` bytes of memory. A caller that converts
    the numbers to float32 passes `least` = 4. Then a number counts as at least 4 bytes.
    """
    import numpy as np

    arrays = {}
    with damaged_file(_describe_npz):
        for name, entry, _ in _open_arrays(file, limit, least):
            entry.seek(0)
            arrays[name] = np.lib.format.read_array(entry, allow_pickle=False)
            if entry.read(1):
                raise UserError(f"more bytes follow the array '{name[:50]}': write the file again")
    return arrays


def max_unpacked_bytes(size: int) -> int:
    """Returns how many bytes an archive of `size` bytes may have after it is unpacked.

    This limit is 100 x `size`, but at least 64 MB.
    """
    # The limit stops zip bombs. Compression makes real features at most 10 times smaller.
    return max(LARGE_BYTES, 100 * size)


def npz_bytes(content: bytes, limit: int) -> int:
    """Returns how many bytes of memory the arrays of an `.npz` need, without unpacking them.

    `content` is the content of the file. A number counts as at least 4 bytes. If the arrays need
    more than `limit` bytes, raises UserError.
    """
    with damaged_file(_describe_npz):
        return sum(size for *_, size in _open_arrays(io.BytesIO(content), limit, least=4))


@contextlib.contextmanager
def damaged_file(make_error: Callable[[str], UserError]) -> Iterator[None]:
    """Turns an error in a `with` block, where a library reads a file, into a UserError.

    `make_error` makes the UserError from the message of the library. If the block raises UserError,
    MemoryError or an error of the operating system, the error stays unchanged.
    """
    try:
        yield
    except Exception as error:
        is_of_system = isinstance(error, OSError) and error.errno
        if is_of_system or isinstance(error, UserError | MemoryError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise make_error(reason) from error


def _describe_npz(reason: str) -> UserError:
    return UserError(f"the file is damaged or not an .npz ({reason}): write it again")


def _open_arrays(
    file: io.FileIO | io.BytesIO, limit: int, least: int
) -> Iterator[tuple[str, IO[bytes], int]]:
    """Yields a tuple for each array of an `.npz` file. For `limit` and `least`, see `load_npz`.

    The tuple is (name of the array, entry of the archive, number of bytes of the array in memory).
    The entry is open, and its position is after the header of the array.
    """
    if file.read(1) == NPY_START:
        raise UserError("the file is an .npy, without names of arrays: use numpy.savez")
    left = limit
    with open_zip(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > limit or len(entries) > MAX_ENTRIES:
            raise UserError(
                f"the file unpacks to more than {limit:,} bytes or {MAX_ENTRIES:,} arrays: "
                "save fewer or smaller arrays"
            )
        names = Counter(entry.filename.removesuffix(".npy") for entry in entries)
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"the array '{twice[0][:50]}' occurs twice: write the file again")
        for entry in entries:
            entry.file_size += 1  # so that a byte after the declared end can be read
            with open_entry(archive, entry) as opened:
                shape, dtype = _read_header(opened)
                if dtype.hasobject:
                    raise UserError("the file contains Python objects: save arrays of numbers")
                if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise UserError(
                        f"array '{entry.filename[:50]}' is damaged: its header has a wrong size; "
                        "write the file again"
                    )
                size = math.prod(shape) * max(dtype.itemsize, least)
                left -= size
                if left < 0:
                    raise UserError(
                        f"the arrays of the file need more than {limit:,} bytes of memory: "
                        "save fewer or smaller arrays"
                    )
                yield entry.filename.removesuffix(".npy"), opened, size


def _read_header(file: IO[bytes]) -> "tuple[tuple[int, ...], np.dtype]":
    """Reads the shape and the dtype in the header of an `.npy` file."""
    import numpy as np

    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, _, dtype = read_header(file)
    return shape, dtype


class _InPieces(io.BufferedReader):
    """A file of which at most PIECE_BYTES (1 MB) can be read at once. More raises UserError."""

    # `zipfile` reads the list of entries of a zip at once, however long the list is. It also trusts
    # the places of entries, which may lie outside of the file.
    def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_SET and not 0 <= target < 1 << 63:
            raise zipfile.BadZipFile("an entry begins before the start or after the end of the zip")
        return super().seek(target, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = PIECE_BYTES + 1 if size is None or size < 0 else min(size, PIECE_BYTES + 1)
        content = super().read(wanted)
        if len(content) > PIECE_BYTES:
            about = f"the list of entries of the zip has over {PIECE_BYTES:,} bytes"
            raise UserError(f"{about}: unpack the zip, or pack fewer files or arrays")
        return content


@contextlib.contextmanager
def open_zip(file: io.FileIO | io.BytesIO) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive. If its list of entries has more than 1 MB, raises UserError.

    The entries must be opened with `open_entry`.
    """
    content = _InPieces(cast(io.RawIOBase, file))
    try:
        with zipfile.ZipFile(content) as archive:
            yield archive
    finally:
        content.detach()


def open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    """Opens an entry of a zip archive.

    Raises UserError if the entry has a password, or is packed by another method than deflate.
    """
    # With other compression, such as LZMA, Python may unpack a short piece to gigabytes at once.
    is_locked = bool(entry.flag_bits & 1)
    if is_locked or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        about = "has a password" if is_locked else "has an unsupported method of compression"
        name = entry.filename[:50]
        raise UserError(f"entry '{name}' {about}: unpack the zip, or pack it again with deflate")
    return archive.open(entry)


def local(path: str | os.PathLike[str]) -> Path:
    """Returns a path with `~` expanded. Raises UserError for an address such as s3://x.

    If a folder is really named `s3:`, the user can write `./s3:/x`.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z]:[\\/]", text):
        raise UserError(f"'{text}' is for Windows: use a Linux path; in WSL, /mnt/c is the drive C")
    if ADDRESS.match(text):
        url = urllib.parse.urlsplit(text)
        copied = "copy or mount the files, and give the path of the copy or of the mounted folder"
        remedy = f"write '{urllib.parse.unquote(url.path)}'" if url.scheme == "file" else copied
        raise UserError(f"'{text}' is an address, not a file or folder of this machine\n{remedy}")
    place = Path(text).expanduser()
    return place.absolute() if ADDRESS.match(str(place)) else place


def absolute(path: str | os.PathLike[str]) -> Path:
    """Returns an absolute path without `~` and `..`. Raises UserError for an address like s3://x."""
    place = local(path)
    return place.resolve() if ".." in place.parts else place.absolute()


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal. The path may be a symbolic link."""
    with open_input(path) as file:
        return hash_opened(file)


def hash_opened(file: io.FileIO) -> str:
    """Returns the sha256 of an open file in hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Returns the sha256 of the JSON text of a value. The order of keys matters."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256_folder(folder: Path) -> dict[str, str]:
    """Returns relative path -> sha256 for every file in a folder, at any depth."""
    return {path: sha256_file(folder / path) for path in sorted(walk(folder))}


def cache_root(given: str | Path | None = None) -> Path:
    """Returns the cache folder: `given`, by default `$VIDJAX_CACHE`, or else `~/.cache/vidjax`."""
    if path := given or os.environ.get("VIDJAX_CACHE"):
        return local(path)
    try:
        return Path.home() / ".cache/vidjax"
    except RuntimeError as error:  # for example in a container whose user has no account
        raise UserError(
            "there is no place for the cache, because the home folder of this user is not known\n"
            "set the variable VIDJAX_CACHE to a folder that you can write to"
        ) from error
