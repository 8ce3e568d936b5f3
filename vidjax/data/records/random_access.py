"""Single records of TFRecord shards, read by their numbers; the content of others is not read.

Source: the TFRecord format of TensorFlow.
"""

import functools
import io
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vidjax import files
from vidjax.data.records import tfrecord
from vidjax.data.records.manifest import Shard
from vidjax.errors import UserError

HEADER = 8 + 4  # bytes before a record: its length and the checksum of that
SUM = 4  # bytes behind it: its checksum


class Places(NamedTuple):
    """Where the records of a shard lie.

    Attributes:
      start: [N] int64, first byte of each record.
      size: [N] int64, number of bytes.
    """

    start: np.ndarray
    size: np.ndarray


class RecordFiles:
    """Shards of which single records are read.

    No file stays open, as there may be more shards than files that a process may open; and none is
    mapped, as a process ends when a file is cut that it has mapped.
    """

    def __init__(self, shards: Sequence[Shard]):
        """Takes the shards, which `read` names by their positions; reads none of them."""
        self._shards = tuple(shards)
        self._places = functools.cache(lambda number: find_records(self._shards[number]))

    def read(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Returns the content of some records, [n] of bytes; threads may call it at once.

        Args:
          shards: [n] int, the shard of each record.
          numbers: [n] int, the number of each record in its shard, from 0.

        Raises:
          ValueError: a record is damaged or cut.
          OSError: a file cannot be read.
        """
        content = np.empty(len(shards), object)
        sums = [b""] * len(shards)
        for shard in np.unique(shards).tolist():
            start, size = self._places(shard)
            with _open(self._shards[shard]) as file:
                for row in np.flatnonzero(shards == shard).tolist():
                    number = numbers[row]
                    read = _read(file, int(start[number]), int(size[number]) + SUM)
                    content[row], sums[row] = read[:-SUM], read[-SUM:]
        wrong = _first_wrong(content.tolist(), sums)
        if wrong is not None:
            path = self._shards[shards[wrong]].path
            raise UserError(f"{path}: record {numbers[wrong] + 1} is damaged")
        return content


def find_records(shard: Shard) -> Places:
    """Returns where the records of a shard lie; reads nothing of the file but their lengths.

    Raises:
      ValueError: a length is damaged, or the file is shorter or longer than its records.
      OSError: the file cannot be read.
    """
    starts, lengths, sums, at = [], [], [], 0
    with _open(shard) as file:
        while len(starts) < shard.records and at < shard.size:
            header = _read(file, at, HEADER)
            lengths.append(header[:8])
            sums.append(header[8:])
            starts.append(at + HEADER)
            at += HEADER + struct.unpack("<Q", header[:8])[0] + SUM
        actual = os.fstat(file.fileno()).st_size
    wrong = _first_wrong(lengths, sums)
    if wrong is not None:
        raise UserError(f"{shard.path}: record {wrong + 1} is damaged")
    # A file that was cut between two records has no damaged one.
    if not (len(starts) == shard.records and at == shard.size == actual):
        raise UserError(f"{shard.path}: {actual} bytes, expected {shard.size}")
    size = np.frombuffer(b"".join(lengths), "<u8").astype(np.int64)
    return Places(np.array(starts, np.int64), size)


def _open(shard: Shard) -> io.FileIO:
    """Opens a shard to read parts of it."""
    file = files.open_regular(shard.path)
    if hasattr(os, "posix_fadvise"):  # the system would read on behind each part
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _read(file: io.FileIO, start: int, size: int) -> bytes:
    """Returns `size` bytes of a file; ValueError if it ends before."""
    content = os.pread(file.fileno(), size, start)
    if len(content) < size:
        raise UserError(f"{file.name}: ends before byte {start + size}")
    return content


def _first_wrong(messages: Sequence[bytes], sums: Sequence[bytes]) -> int | None:
    """Returns the position of the first message that lacks its checksum, None without one."""
    first = 0
    for batch in tfrecord.batches(messages):  # the sums of all at once take a copy of all
        wanted = np.frombuffer(b"".join(sums[first : first + len(batch)]), "<u4")
        wrong = np.flatnonzero(tfrecord.masked_sums(batch) != wanted)
        if wrong.size:
            return first + int(wrong[0])
        first += len(batch)
    return None
