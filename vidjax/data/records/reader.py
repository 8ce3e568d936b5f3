"""The records of a shard without TensorFlow, whose import takes longer than reading most datasets.

The file is mapped into memory, and its sha256 is compared with the manifest. All records have the
same keys in the same order (`builder` sorts them), so each key is found in all of them at once.

Source: the TFRecord format and the messages `Example`, `Features` and `Feature` of TensorFlow; the
wire format of protocol buffers.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vidjax import files
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records.manifest import Shard, check_shard

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
    """The records of a shard.

    Attributes:
      clip_index: [N] int32, the clip of each record.
    """

    def __init__(self, shard: Shard):
        """Maps the file and finds all values.

        Raises:
          ValueError: the file is not the one that was written; names file and record.
        """
        content = _map(shard)
        self._bytes = np.frombuffer(content, np.uint8)
        starts, sizes = _records(content, shard.records)
        try:
            self._values = _find(self._bytes, starts, sizes)
            first, size = self._values["clip_index"]
            index, end = _varint(self._bytes, first)
            _expect(bool((end == first + size).all()))
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError(
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
        found = {}
        for field in fields:
            start, size = self._values[f"frames/{name}/{field}"]
            pairs = zip(start[rows].tolist(), size[rows].tolist(), strict=True)
            flat = np.concatenate([self._bytes[first : first + count] for first, count in pairs])
            if field == "features":
                found[field] = flat.view(modality.dtype).reshape(-1, modality.dim)
            else:
                found[field] = flat.view(FRAME_FIELDS[field].dtype)
        return found


def _map(shard: Shard) -> memoryview:
    """Returns the bytes of a shard; ValueError unless they are those that were written."""
    if shard.path.exists():
        content = files.map_bytes(shard.path, max(shard.size, shard.path.stat().st_size))
        if hashlib.sha256(content).hexdigest() == shard.sha256:
            return content
    check_shard(shard)  # names the record
    raise ValueError(f"{shard.path}: changed while it was read")


def _records(content: memoryview, num_records: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns first byte and number of bytes of every record, [N] int64 each."""
    starts, sizes, at = [], [], 0
    for _ in range(num_records):
        (size,) = struct.unpack_from("<Q", content, at)
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
        raise ValueError("not what `builder` writes")
