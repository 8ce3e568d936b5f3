"""Reads clips from TFRecord files (shards) without TensorFlow.

The number of frames of each clip is known, so the place of each value in a file can be computed.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

from vidjax.core.batch import BATCHED
from vidjax.data.packed_clips import ClipArrays, get_dtype
from vidjax.data.records.manifest import Records
from vidjax.data.records.shard_files import (
    FRAMING,
    HEADER,
    check_changed,
    check_shard,
    count_frame_bytes,
    count_varint_bytes,
    locate_values,
    make_header,
    mask_checksum,
)
from vidjax.utils import files
from vidjax.utils.errors import UserError


class Reader:
    """Reads the clips of several splits from TFRecord files.

    The N records of all splits are numbered in the order on disk, split after split.

    Attributes:
      clip_index: [N] int32, the clip of each record. Clips are numbered split after split, and by
        name within a split.
      lengths: modality -> [N] int32, number of frames of each record.
      shards: the files.
      shard: [N] int32, the number of the file of each record.
      start: [N] int64, the first byte of each record in its file.
    """

    def __init__(self, records: Records, splits: Sequence[str]) -> None:
        # Files do not stay open, because there may be more files than a process may open. They are
        # not memory-mapped, because the system kills a process if a mapped file is truncated.
        self._modalities = records.modalities
        parts = [records.splits[name] for name in splits]
        before = np.cumsum([0, *(len(split.clips) for split in parts)])
        orders = [split.order + start for split, start in zip(parts, before, strict=False)]
        self.clip_index = np.concatenate(orders).astype(np.int32)
        self._order = np.concatenate([split.order for split in parts])
        names = (split.clips[clip] for split in parts for clip in split.order.tolist())
        self._names = np.array([len(name.encode("utf-8", "surrogateescape")) for name in names])
        self.lengths: dict[str, np.ndarray] = {}
        for name in records.modalities:
            lengths = []
            for split in parts:
                no_frames = np.zeros(len(split.clips), np.int32)
                lengths.append(split.lengths.get(name, no_frames)[split.order])
            self.lengths[name] = np.concatenate(lengths)
        self.shards = check_changed([shard for split in parts for shard in split.shards])
        self._states: dict[int, tuple[int, ...]] = {}
        counts = [shard.records for shard in self.shards]
        self.shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        _, self._size = self._layout(slice(None))
        ends, sizes = np.cumsum(self._size + FRAMING), [shard.size for shard in self.shards]
        if not np.array_equal(np.bincount(self.shard, self._size + FRAMING, len(counts)), sizes):
            for shard in self.shards:
                check_shard(shard)
            raise UserError(
                f"{records.folder}: the sizes of the files do not match the clips in index.npz\n"
                "delete this folder to convert again"
            )
        begins = np.cumsum(sizes) - sizes
        self.start = ends - self._size - FRAMING - begins[self.shard]

    def _layout(self, places: slice | np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns where the values of the records `places` are. See `locate_values`."""
        sizes = {"clip": self._names[places], "clip_index": count_varint_bytes(self._order[places])}
        for name, modality in self._modalities.items():
            length = self.lengths[name][places].astype(np.int64)
            for field, size in count_frame_bytes(modality).items():
                sizes[f"frames/{name}/{field}"] = length * size
        return locate_values(sizes)

    def read(self, places: np.ndarray, names: Iterable[str], *, whole: bool = True) -> ClipArrays:
        """Returns the frames of the records with the numbers `places` [n], see `ClipReader`.

        If `whole` is True, the sha256 of each file is checked. If it is False, only the checksums
        of the records are checked. Raises UserError if a file is damaged.
        """
        messages = self._read_messages(places, whole=whole)
        return {name: self._decode(name, places, messages) for name in names}

    def _read_messages(self, places: np.ndarray, *, whole: bool) -> list[bytes]:
        """Returns the records with the numbers `places` [n], serialised as `tf.train.Example`."""
        messages = [b""] * len(places)
        numbers = self.shard[places]
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            starts, sizes = self.start[places[rows]], self._size[places[rows]]
            if not files.exists(self.shards[number].path):
                check_shard(self.shards[number])
            with files.open_regular(self.shards[number].path) as file:
                descriptor = file.fileno()
                spans = [*zip(rows.tolist(), starts.tolist(), sizes.tolist(), strict=True)]
                if whole:
                    self._check_whole(number, file)
                else:
                    _announce_reads(descriptor, spans)
                for row, start, size in spans:
                    record = os.pread(descriptor, size + FRAMING, start)
                    messages[row] = message = record[HEADER : HEADER + size]
                    sums = record[:HEADER], record[HEADER + size :]
                    right = whole or sums == (make_header(size), mask_checksum(message))
                    if len(message) != size or not right:
                        raise self._damaged(number)
        return messages

    def _check_whole(self, number: int, file: io.FileIO) -> None:
        """Raises UserError if the file `number` was changed.

        The first call checks the sha256 of the file. Later calls check its size and time.
        """
        stat = os.fstat(file.fileno())
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if number not in self._states and files.hash_opened(file) == self.shards[number].sha256:
            self._states[number] = state
        if self._states.get(number) != state:
            raise self._damaged(number)

    def _damaged(self, number: int) -> UserError:
        """Returns the error for a file that changed. If it is damaged, raises another error."""
        check_shard(self.shards[number])
        return UserError(
            f"{self.shards[number].path}: the file was changed while it was read\n"
            "run the command again when no program writes to it"
        )

    def _decode(self, name: str, places: np.ndarray, messages: Sequence[bytes]) -> dict[str, list]:
        """Returns field -> a list of n arrays, the frames of n serialised records in a modality."""
        modality, length = self._modalities[name], self.lengths[name][places]
        starts, _ = self._layout(places)
        columns = {}
        for field in BATCHED:
            shape = (modality.dim,) if field == "features" else ()
            dtype, width = get_dtype(field, modality.dtype), math.prod(shape)
            begin = starts[f"frames/{name}/{field}"]
            spans = zip(messages, begin.tolist(), length.tolist(), strict=True)
            columns[field] = [
                np.frombuffer(message, dtype, width * count, start).reshape(count, *shape)
                for message, start, count in spans
            ]
        return columns


def _announce_reads(descriptor: int, spans: Iterable[tuple[int, int, int]]) -> None:
    """Lets the system read many records at once. `spans` are (row, first byte, size)."""
    with contextlib.suppress(AttributeError, OSError):  # macOS has no `posix_fadvise`
        for _, start, size in spans:
            os.posix_fadvise(descriptor, start, size + FRAMING, os.POSIX_FADV_WILLNEED)
