"""The records of a shard without TensorFlow, whose import takes longer than reading most datasets.

The sha256 of the file is compared with the manifest. All records have the
same keys in the same order (`builder` sorts them), so each key is found in all of them at once.

Source: the TFRecord format and the messages `Example`, `Features` and `Feature` of TensorFlow; the
wire format of protocol buffers.
"""

import contextlib
import hashlib
import io
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vidjax import files
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records.manifest import Shard, check_shard
from vidjax.errors import UserError

FRAMING = 8 + 4 + 4  # bytes of a record beside its content: length and two checksums
# Tags of the messages: (number of the field << 3) + 2, which is a length and as many bytes.
FIRST, SECOND, THIRD = 0x0A, 0x12, 0x1A
BYTES_LIST, INT64_LIST = FIRST, THIRD


class Values(NamedTuple):
    """Where the values of a key lie in the file.

    Attributes:
      start: [N] int64, first byte of each record's value.
      size: [N] int64, number of bytes.
    """

    start: np.ndarray
    size: np.ndarray


class ShardReader:
    """The records of a shard, of which it keeps where their values lie.

    No file stays open, as there may be more shards than files that a process may open; and none is
    mapped, as a process ends when a file is cut that it has mapped.

    Attributes:
      clip_index: [N] int32, the clip of each record.
    """

    def __init__(self, shard: Shard):
        """Reads the file and finds all values.

        Raises:
          ValueError: the file is not the one that was written; names file and record.
        """
        self._shard = shard
        content, self._state = _read(shard)
        starts, sizes = _records(content, shard.records)
        try:
            self._values = _find(content, starts, sizes)
            first, size = self._values["clip_index"]
            index, end = _varint(content, first)
            _expect(bool((end == first + size).all()))
        except (IndexError, KeyError, ValueError) as error:
            raise UserError(
                f"{shard.path}: records of another layout\n"
                f"delete {shard.path.parents[2]} to convert again"
            ) from error
        self.clip_index = index.astype(np.int32)

    def lengths(self, modality: str) -> np.ndarray:
        """Returns the number of frames of each record, [N] int32."""
        size = self._values[f"frames/{modality}/number"].size
        return (size // np.dtype(FRAME_FIELDS["number"].dtype).itemsize).astype(np.int32)

    def frames(
        self, name: str, modality: Modality, fields: Sequence[str], rows: slice | np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns field -> the frames of some records one after another, [F] or [F, D].

        Args:
          name: the modality.
          modality: width and dtype of its features.
          fields: names of fields of one number per frame, and `features`.
          rows: the records, a slice or [n] int.
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
        """Returns some bytes of the file, one span after another, and where each span begins."""
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


def _read(shard: Shard) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns the bytes of a shard, [n] uint8, and the state of its file.

    Raises:
      ValueError: they are not those that were written.
    """
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
    """Returns what changes with every byte that is written to a file, and where it is replaced."""
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


def _find(content: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> dict[str, Values]:
    """Returns key -> its values in N messages `Example`.

    Args:
      content: [bytes] uint8, the file.
      starts, sizes: [N] int64, the messages.
    """
    values: dict[str, Values] = {}
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
        values[letters[0].tobytes().decode()] = Values(start, stop - start)
        at = after
    return values


def _message(content: np.ndarray, at: np.ndarray, tag: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns first and last + 1 byte of N fields of a message, which begin at `at` [N]."""
    _expect(bool((content[at] == tag).all()))
    size, first = _varint(content, at + 1)
    return first, first + size


def _varint(content: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns N whole numbers of variable length that begin at `at` [N], and what follows them."""
    value, shift, more = np.zeros_like(at), 0, np.ones(len(at), bool)
    while more.any():
        byte = np.where(more, content[at], 0).astype(np.int64)
        value |= (byte & 0x7F) << shift
        at, more, shift = at + more, more & (byte > 0x7F), shift + 7
    return value, at


def _expect(condition: bool) -> None:
    if not condition:
        raise UserError("not what `builder` writes")
