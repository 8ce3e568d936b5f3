"""Reads and writes shards without TensorFlow: its import takes longer than reading most datasets.

All records have the same keys in the same order (`encode` sorts them), so the place of each value
follows from the lengths of the values (`layout`).

Source: the TFRecord format and the messages `Example`, `Features` and `Feature` of TensorFlow; the
wire format of protocol buffers.
"""

import functools
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import google_crc32c
import numpy as np

from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.files import sha256_file, sha256_opened

FRAMING = 8 + 4 + 4  # bytes of a record beside its content: length and two checksums
# Tags of message fields: (number of the field << 3) + 2, where 2 stands for a length and bytes.
FIRST_TAG, SECOND_TAG, THIRD_TAG = b"\x0a", b"\x12", b"\x1a"

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
            if header != header_of(size) or masked_sum(record[:size]) != record[size:]:
                return count, False
            count += 1
    return count, True


HEADER = 8 + 4  # bytes before a record: its length and the checksum of that
SUM = 4  # bytes behind it: its checksum


def framed(content: bytes) -> bytes:
    """Returns a message as a record of a TFRecord file: length, checksum, message, checksum."""
    return b"".join([header_of(len(content)), content, masked_sum(content)])


def header_of(size: int) -> bytes:
    """Returns what precedes a message of `size` bytes: the size and its checksum."""
    packed = struct.pack("<Q", size)
    return packed + masked_sum(packed)


def masked_sum(content: bytes) -> bytes:
    """Returns the masked CRC-32C of TFRecord, 4 bytes."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def encode(values: Mapping[str, bytes | int]) -> bytes:
    """Returns a serialised `Example` of one value per key, in protobuf's deterministic key order.

    That order is alphabetical, but a key comes after all longer keys that begin with it. Whole
    numbers must not be negative.
    """
    parts = []
    for key in sorted(values, key=_sorting):
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


def layout(sizes: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns key -> first byte of its value in messages by `encode`, and the bytes of messages.

    `sizes` and all results are [N] int64; `sizes` are the bytes of the values of N messages.
    """
    ends, end = {}, np.zeros(1, np.int64)
    for key in sorted(sizes, key=_sorting):
        value = _field_size(_field_size(_field_size(sizes[key])))  # in a list, a feature, its entry
        end = end + _field_size(_field_size(np.array(len(key.encode()))) + value)
        ends[key] = end  # an entry ends with its value
    total = _field_size(end)
    return {key: total - end + at - sizes[key] for key, at in ends.items()}, total


def _sorting(key: str) -> str:
    return f"{key}\U0010ffff"


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
