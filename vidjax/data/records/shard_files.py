"""Reads and writes shards without TensorFlow: its import takes longer than reading most datasets.

All records have the same keys in the same order (`encode` sorts them), so each key is found in all
of them at once. The sha256 of the file is compared with the manifest.

Source: the TFRecord format and the messages `Example`, `Features` and `Feature` of TensorFlow; the
wire format of protocol buffers.
"""

import contextlib
import functools
import hashlib
import io
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import google_crc32c
import numpy as np

from vidjax import files
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.errors import UserError
from vidjax.files import sha256_file, sha256_opened

FRAMING = 8 + 4 + 4  # bytes of a record beside its content: length and two checksums
# Tags of message fields: (number of the field << 3) + 2, where 2 stands for a length and bytes.
FIRST, SECOND, THIRD = 0x0A, 0x12, 0x1A
BYTES_LIST, INT64_LIST = FIRST, THIRD

DEPTH = 3  # a shard's path below the folder of the manifest: NAME/VERSION/SHARD


class Shard(NamedTuple):
    """One TFRecord file of `size` bytes; `mtime_ns` is in ns since 1970."""

    path: Path
    records: int
    size: int
    mtime_ns: int
    sha256: str


def describe_shard(path: Path, num_records: int) -> Shard:
    """Returns the entry of the manifest for a file that was just written."""
    stat = path.stat()
    return Shard(path, num_records, stat.st_size, stat.st_mtime_ns, sha256_file(path))


def check_changed(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Checks shards whose size or time has changed; returns all shards with their present times."""
    checked = []
    for shard in shards:
        # The time changes when a file is replaced; a copied folder is read once more.
        stat = os.lstat(shard.path) if files.exists(shard.path) else None
        is_same = stat and (stat.st_size, stat.st_mtime_ns) == (shard.size, shard.mtime_ns)
        if not stat or not is_same or not S_ISREG(stat.st_mode):
            check_shard(shard)
        checked.append(shard._replace(mtime_ns=stat.st_mtime_ns) if stat else shard)
    return tuple(checked)


def check_shard(shard: Shard) -> None:
    """Reads a shard whole; ValueError, with the first damaged record, unless it is as written."""
    hint = f"delete {shard.path.parents[DEPTH - 1]} to convert again"
    wanted = f"{shard.path}: expected {shard.records} records, found"
    if not files.exists(shard.path):
        raise UserError(f"{shard.path}: no such file, expected {shard.records} records\n{hint}")
    try:
        with files.open_regular(shard.path, below=shard.path.parents[DEPTH - 1]) as file:
            same_size = os.fstat(file.fileno()).st_size == shard.size
            if same_size and sha256_opened(file) == shard.sha256:
                return
    except UserError as error:  # a link, a pipe: the reader below would wait for it
        raise UserError(f"{str(error).splitlines()[0]}\n{hint}") from error
    except OSError:
        pass  # the reader below reports how far it can be read
    try:
        count, whole = _count_intact(shard.path)
    except OSError as error:
        raise UserError(f"{shard.path}: {error.strerror}\n{hint}") from error
    if not whole:
        raise UserError(f"{wanted} {count}: record {count + 1} is damaged\n{hint}")
    if count != shard.records:
        raise UserError(f"{wanted} {count}\n{hint}")
    raise UserError(f"{shard.path}: not the file that was written (sha256)\n{hint}")


def _count_intact(path: Path) -> tuple[int, bool]:
    """Returns the number of records before the first damaged one, and True if none is damaged."""
    with files.open_regular(path) as file:
        left, count = os.fstat(file.fileno()).st_size, 0
        while left:
            header = file.read(HEADER)
            size = int.from_bytes(header[:8], "little")
            left -= FRAMING + size
            if len(header) < HEADER or left < 0 or size < SUM:
                return count, False
            record = file.read(size + SUM)
            if masked_sum(header[:8]) != header[8:] or masked_sum(record[:size]) != record[size:]:
                return count, False
            count += 1
    return count, True


class Spans(NamedTuple):
    """Where records, or the values of a key, lie in a file: first byte and length, [N] int64."""

    start: np.ndarray
    size: np.ndarray


class ShardReader:
    """Knows where all values of a shard lie, and reads any of them; `clip_index` is [N] int32.

    No file stays open: there may be more shards than a process may open files. None is mapped into
    memory: a process is killed if a file that it has mapped is truncated.
    """

    def __init__(self, shard: Shard):
        """Reads the file and finds all values; ValueError if it is not the one that was written."""
        self._shard = shard
        content, self._state = _read_whole(shard)
        starts, sizes = _records(content, shard.records)
        try:
            self._values = _find(content, starts, sizes)
            first, size = self._values["clip_index"]
            index, end = _read_varints(content, first)
            _expect(bool((end == first + size).all()))
        except (IndexError, KeyError, ValueError) as error:
            raise UserError(
                f"{shard.path}: records of another layout\n"
                f"delete {shard.path.parents[DEPTH - 1]} to convert again"
            ) from error
        self.clip_index = index.astype(np.int32)

    def lengths(self, modality: str) -> np.ndarray:
        """Returns the number of frames of each record, [N] int32."""
        size = self._values[f"frames/{modality}/number"].size
        return (size // np.dtype(FRAME_FIELDS["number"].dtype).itemsize).astype(np.int32)

    def frames(
        self, name: str, modality: Modality, fields: Sequence[str], rows: slice | np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns field -> the frames of some records, concatenated: features [F, D], others [F].

        `rows` are the records, a slice or [n] int. Not for `box`, of four numbers per frame.
        """
        values = [self._values[f"frames/{name}/{field}"] for field in fields]
        starts = np.array([one.start[rows] for one in values])  # [fields, records]
        sizes = np.array([one.size[rows] for one in values])
        first, end = starts.min(0), (starts + sizes).max(0)
        flat, place = self._spans(first, end - first)
        found = {}
        for field, start, size in zip(fields, starts - first + place, sizes, strict=True):
            pairs = zip(start.tolist(), size.tolist(), strict=True)
            one = np.concatenate([flat[at : at + count] for at, count in pairs])
            if field == "features":
                found[field] = one.view(modality.dtype).reshape(-1, modality.dim)
            else:
                found[field] = one.view(FRAME_FIELDS[field].dtype)
        return found

    def _spans(self, first: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bytes of n spans of the file, concatenated, and where each begins in them."""
        ends = np.cumsum(size)
        flat = np.empty(int(ends[-1]), np.uint8)
        place = ends - size
        with files.open_regular(self._shard.path) as file:
            spans = zip(first.tolist(), place.tolist(), ends.tolist(), strict=True)
            whole = all(
                os.preadv(file.fileno(), [flat.data[start:end]], at) == end - start
                for at, start, end in spans
            )
            if not whole or _state(file) != self._state:
                raise UserError(f"{self._shard.path}: changed while it was read")
        return flat, place


def _read_whole(shard: Shard) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns a shard's bytes, [n] uint8, and its `_state`; ValueError unless it is as written."""
    with contextlib.suppress(FileNotFoundError), files.open_regular(shard.path) as file:
        state, size = _state(file), 0
        content = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
        while size < len(content) and (count := file.readinto(content.data[size:])):
            size += count
        is_whole = size == shard.size and not file.read(1)
        if is_whole and hashlib.sha256(content.data).hexdigest() == shard.sha256:
            return content, state
    check_shard(shard)  # names the record
    raise UserError(f"{shard.path}: changed while it was read")


def _state(file: io.FileIO) -> tuple[int, ...]:
    """Returns what changes when a byte of a file is written or the file is replaced."""
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _records(content: np.ndarray, num_records: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns first byte and number of bytes of every record, [N] int64 each."""
    starts, sizes, at = [], [], 0
    for _ in range(num_records):
        (size,) = struct.unpack_from("<Q", content.data, at)
        starts.append(at + 12)  # behind the length and its checksum
        sizes.append(size)
        at += size + FRAMING
    return np.array(starts, np.int64), np.array(sizes, np.int64)


def _find(content: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> dict[str, Spans]:
    """Returns key -> where its values lie, in N `Example`s at `starts` of `sizes` [N] int64."""
    values: dict[str, Spans] = {}
    at, end = _message(content, starts, FIRST)  # Features
    _expect(bool((end == starts + sizes).all()))
    while (at < end).any():
        entry, after = _message(content, at, FIRST)  # an entry of the map
        key_at, value_at = _message(content, entry, FIRST)
        letters = content[key_at[:, None] + np.arange(int(value_at[0] - key_at[0]))]
        _expect(bool((value_at - key_at == letters.shape[1]).all()))
        _expect(bool((letters == letters[0]).all()))
        feature, feature_end = _message(content, value_at, SECOND)
        kind = int(content[feature[0]])
        _expect(kind in (BYTES_LIST, INT64_LIST) and bool((feature_end == after).all()))
        one, one_end = _message(content, feature, kind)  # a list of one value
        start, stop = _message(content, one, FIRST)
        _expect(bool((one_end == after).all() and (stop == after).all()))
        values[letters[0].tobytes().decode()] = Spans(start, stop - start)
        at = after
    return values


def _message(content: np.ndarray, at: np.ndarray, tag: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns first and last + 1 byte of the content of N message fields that begin at `at` [N]."""
    _expect(bool((content[at] == tag).all()))
    size, first = _read_varints(content, at + 1)
    return first, first + size


def _read_varints(content: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns N numbers stored as varints at bytes `at` [N], and [N] the byte after each."""
    value, shift, more = np.zeros_like(at), 0, np.ones(len(at), bool)
    while more.any():
        byte = np.where(more, content[at], 0).astype(np.int64)
        value |= (byte & 0x7F) << shift
        at, more, shift = at + more, more & (byte > 0x7F), shift + 7
    return value, at


def _expect(condition: bool) -> None:
    if not condition:
        raise UserError("not what `encode` writes")


HEADER = 8 + 4  # bytes before a record: its length and the checksum of that
SUM = 4  # bytes behind it: its checksum


def framed(content: bytes) -> bytes:
    """Returns a message as a record of a TFRecord file: length, checksum, message, checksum."""
    size = struct.pack("<Q", len(content))
    return b"".join([size, masked_sum(size), content, masked_sum(content)])


def masked_sum(content: bytes) -> bytes:
    """Returns the masked CRC-32C of TFRecord, 4 bytes."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


FIRST_TAG, SECOND_TAG, THIRD_TAG = bytes([FIRST]), bytes([SECOND]), bytes([THIRD])


def encode(values: Mapping[str, bytes | int]) -> bytes:
    """Returns a serialised `Example` of one value per key, in protobuf's deterministic key order.

    That order is alphabetical, but a key comes after all longer keys that begin with it. Whole
    numbers must not be negative.
    """
    parts = []
    for key in sorted(values, key=lambda key: f"{key}\U0010ffff"):
        value = values[key]
        kind, content = (
            (FIRST_TAG, value) if isinstance(value, bytes) else (THIRD_TAG, _varint(value))
        )
        parts += (_entry(key, kind, len(content)), content)
    features = b"".join(parts)
    return FIRST_TAG + _varint(len(features)) + features


def frame_bytes(modality: Modality) -> dict[str, int]:
    """Returns field -> the bytes of one frame in a record."""
    sizes = {"features": np.dtype(modality.dtype).itemsize * modality.dim}
    for name, field in FRAME_FIELDS.items():
        sizes[name] = np.dtype(field.dtype).itemsize * field.width
    return sizes


def encoded_size(sizes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns [N] int64, the bytes of messages by `encode`; `sizes` [N] are those of the values."""
    entries = []
    for key, size in sizes.items():
        value = _field_size(_field_size(_field_size(size)))  # in a list, in a feature, in its entry
        entries.append(_field_size(_field_size(np.array(len(key.encode()))) + value))
    return _field_size(np.sum(entries, axis=0))


def _field_size(size: np.ndarray) -> np.ndarray:
    """Returns [N] int64, the bytes of fields of a message, of `size` [N] bytes of content each."""
    return 1 + varint_size(size) + size


def varint_size(numbers: np.ndarray) -> np.ndarray:
    """Returns [N] int64, the bytes of whole numbers below 2**63 as varints."""
    return 1 + np.searchsorted(1 << 7 * np.arange(1, 9), numbers, side="right")


@functools.lru_cache(1 << 14)  # most clips have as many frames as others
def _entry(key: str, kind: bytes, size: int) -> bytes:
    """Returns the bytes of an entry of `Features` that come before its value of `size` bytes."""
    message, rest = b"", size
    for tag in (FIRST_TAG, kind, SECOND_TAG):  # the value, the list that it is in, its feature
        message = tag + _varint(rest) + message
        rest = len(message) + size
    name = key.encode()
    message = FIRST_TAG + _varint(len(name)) + name + message
    return FIRST_TAG + _varint(len(message) + size) + message


def _varint(number: int) -> bytes:
    """Returns a whole number, 0 or more, as a varint: 7 bits a byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
