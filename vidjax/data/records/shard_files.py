"""Reads and writes TFRecord files (shards) without TensorFlow, which takes long to import.

A record is a serialised `tf.train.Example`. All records have the same keys in the same order, so
the lengths of the values determine the place of each value.

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

from vidjax.core.batch import BATCHED
from vidjax.data.clips import Modality
from vidjax.data.packed_clips import get_dtype
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.files import hash_opened

FRAMING = 8 + 4 + 4  # bytes of a record around its content: length and two checksums
# The tag of a field of a message is (number of the field << 3) + 2, where 2 is the type of bytes.
FIRST_TAG, SECOND_TAG, THIRD_TAG = b"\x0a", b"\x12", b"\x1a"

DEPTH = 3  # a shard is FOLDER/NAME/VERSION/SHARD, where FOLDER contains the manifest


class Shard(NamedTuple):
    """A TFRecord file, and its state when it was written or checked."""

    path: Path
    records: int  # number of records
    size: int  # number of bytes
    mtime_ns: int  # time of the last change, in ns
    sha256: str


def check_changed(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Checks the sha256 of files whose size or time changed. Returns `shards` with new times."""
    checked = []
    for shard in shards:
        # A replaced file has a new time. Files of a copied folder have new times, too.
        stat = os.lstat(shard.path) if files.exists(shard.path) else None
        is_same = stat and (stat.st_size, stat.st_mtime_ns) == (shard.size, shard.mtime_ns)
        if not stat or not is_same or not S_ISREG(stat.st_mode):
            check_shard(shard)
        checked.append(shard._replace(mtime_ns=stat.st_mtime_ns) if stat else shard)
    return tuple(checked)


def check_shard(shard: Shard) -> None:
    """Raises UserError if a file does not match its sha256. The error names a damaged record."""
    hint = f"delete {shard.path.parents[DEPTH - 1]} to convert again"
    if not files.exists(shard.path):
        raise UserError(
            f"'{shard.path}' does not exist, but must have {shard.records} records\n{hint}"
        )
    try:
        with files.open_regular(shard.path, below=shard.path.parents[DEPTH - 1]) as file:
            same_size = os.fstat(file.fileno()).st_size == shard.size
            if same_size and hash_opened(file) == shard.sha256:
                return
    except UserError as error:  # a link, or a pipe for which the code below would wait
        raise UserError(f"{str(error).splitlines()[0]}\n{hint}") from error
    except OSError:
        pass  # the code below counts the readable records
    try:
        count, whole = _count_intact(shard.path)
    except OSError as error:
        raise UserError(f"{shard.path}: {error.strerror}\n{hint}") from error
    if not whole:
        raise UserError(f"{shard.path}: record {count + 1} of {shard.records} is damaged\n{hint}")
    if count != shard.records:
        raise UserError(f"'{shard.path}' has {count} records instead of {shard.records}\n{hint}")
    raise UserError(f"'{shard.path}' does not match its sha256\n{hint}")


def _count_intact(path: Path) -> tuple[int, bool]:
    """Returns the number of records before the first damage, and True if the file is intact."""
    with files.open_regular(path) as file:
        left, count = os.fstat(file.fileno()).st_size, 0
        while left:
            header = file.read(HEADER)
            size = int.from_bytes(header[:8], "little")
            left -= FRAMING + size
            if len(header) < HEADER or left < 0 or size < SUM:
                return count, False
            record = file.read(size + SUM)
            if header != make_header(size) or mask_checksum(record[:size]) != record[size:]:
                return count, False
            count += 1
    return count, True


HEADER = 8 + 4  # bytes before the content of a record: its length, and the checksum of the length
SUM = 4  # bytes after the content: its checksum


def make_record(content: bytes) -> bytes:
    """Returns a record of a TFRecord file: the length and the content, each with its checksum."""
    return b"".join([make_header(len(content)), content, mask_checksum(content)])


def make_header(size: int) -> bytes:
    """Returns the header of a record with a content of `size` bytes: `size` and its checksum."""
    packed = struct.pack("<Q", size)
    return packed + mask_checksum(packed)


def mask_checksum(content: bytes) -> bytes:
    """Returns the checksum of the TFRecord format, a masked CRC-32C of 4 bytes."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def encode(values: Mapping[str, bytes | int]) -> bytes:
    """Serialises a `tf.train.Example` with one value per key.

    The keys are in alphabetical order, as in protobuf's deterministic serialisation. But if a key
    begins with another key, the longer key comes first. Integers must not be negative.
    """
    parts = []
    for key in sorted(values, key=_sort_key):
        value = values[key]
        kind, content = (
            (FIRST_TAG, value) if isinstance(value, bytes) else (THIRD_TAG, _encode_varint(value))
        )
        parts += (_encode_entry(key, kind, len(content)), content)
    features = b"".join(parts)
    return FIRST_TAG + _encode_varint(len(features)) + features


def count_frame_bytes(modality: Modality) -> dict[str, int]:
    """Returns field -> number of bytes per frame in a modality."""
    sizes = {field: get_dtype(field, modality.dtype).itemsize for field in BATCHED}
    return {**sizes, "features": sizes["features"] * modality.dim}


def locate_values(sizes: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns where the values of N clips are in the messages that `encode` returns.

    `sizes` is key -> [N] int64, the number of bytes of each value. Returns key -> [N] int64, the
    position of the first byte of each value, and [N] int64, the number of bytes of each message.
    """
    ends, end = {}, np.zeros(1, np.int64)
    for key in sorted(sizes, key=_sort_key):
        # A value is in a list, which is in a feature, which is in an entry of the message.
        value = _count_field_bytes(_count_field_bytes(_count_field_bytes(sizes[key])))
        end = end + _count_field_bytes(_count_field_bytes(np.array(len(key.encode()))) + value)
        ends[key] = end  # an entry ends with its value
    total = _count_field_bytes(end)
    return {key: total - end + at - sizes[key] for key, at in ends.items()}, total


def _sort_key(key: str) -> str:
    return f"{key}\U0010ffff"


def _count_field_bytes(size: np.ndarray) -> np.ndarray:
    """Returns [N] int64, the bytes of N protobuf fields: tag, length, `size` bytes of content."""
    return 1 + count_varint_bytes(size) + size


def count_varint_bytes(numbers: np.ndarray) -> np.ndarray:
    """Returns [N] int64, the number of bytes of N integers below 2**63 as protobuf varints."""
    return 1 + np.searchsorted(1 << 7 * np.arange(1, 9), numbers, side="right")


@functools.lru_cache(1 << 14)  # many clips have the same number of frames
def _encode_entry(key: str, kind: bytes, size: int) -> bytes:
    """Returns the bytes before a value of `size` bytes: key, tags and lengths.

    `kind` is FIRST_TAG for a string, and THIRD_TAG for an integer.
    """
    message, rest = b"", size
    for tag in (FIRST_TAG, kind, SECOND_TAG):  # the value, its list, its feature
        message = tag + _encode_varint(rest) + message
        rest = len(message) + size
    name = key.encode()
    message = FIRST_TAG + _encode_varint(len(name)) + name + message
    return FIRST_TAG + _encode_varint(len(message) + size) + message


def _encode_varint(number: int) -> bytes:
    """Encodes an integer of 0 or more with 7 bits per byte, the lowest bits first."""
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*content, number])
