"""Writes, checks and reads TFRecord files (shards) without TensorFlow, which takes long to import.

A record is a serialised `tf.train.Example`. All records have the same keys in the same order, so
the lengths of the values determine the place of each value. The number of frames of each clip is
known, so the place of each value in a file can be computed.

Source: the TFRecord format and the messages `Example`, `Features` and `Feature` of TensorFlow; the
wire format of protocol buffers.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from vidjax.core.batch import BATCHED, Packed
from vidjax.data.clips import Modality
from vidjax.data.packed_clips import ClipArrays, PackedClips, get_dtype, map_again
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.files import hash_opened

FRAMING = 8 + 4 + 4  # bytes of a record around its content: length and two checksums
HEADER = 8 + 4  # bytes before the content of a record: its length, and the checksum of the length
SUM = 4  # bytes after the content: its checksum
# The tag of a field of a message is (number of the field << 3) + 2, where 2 is the type of bytes.
FIRST_TAG, SECOND_TAG, THIRD_TAG = b"\x0a", b"\x12", b"\x1a"
DEPTH = 3  # a shard is FOLDER/NAME/VERSION/SHARD, where FOLDER contains the manifest
NAME = "iqiyi_vid"  # the name of every dataset in TFDS
# If the meaning of a record or of the manifest changes, increase the version to refill the cache.
VERSION = "1.4.0"
CLIPS_AT_ONCE = 256  # clips that are encoded before files are mapped again, to free memory


class Shard(NamedTuple):
    """A TFRecord file, and its state when it was written or checked."""

    path: Path
    records: int  # number of records
    size: int  # number of bytes
    mtime_ns: int  # time of the last change, in ns
    sha256: str


class SplitRecords(NamedTuple):
    """The clips of a split, in TFRecord files or in memory."""

    clips: tuple[str, ...]  # N clip names in byte order
    order: np.ndarray  # [N] int32, the order of the clips on disk, as positions in `clips`
    lengths: dict[str, np.ndarray]  # modality -> [N] int32, the number of frames of each clip
    quality: dict[str, np.ndarray]  # modality -> [N] float64, the mean quality of their frames
    # The TFRecord files. If the clips are in memory, these files do not exist. Their digests show
    # that the clips in memory are equal to clips in files.
    shards: tuple[Shard, ...]
    packed: PackedClips | None = None  # the clips in memory, which have all modalities


class Records(NamedTuple):
    """The clips of a dataset, in TFRecord files or in memory."""

    folder: Path | None  # the folder of the TFRecord files, or None for clips in memory
    modalities: dict[str, Modality]  # modality -> width and dtype of its features
    splits: dict[str, SplitRecords]  # split -> its clips and files
    report: dict[str, Any]  # the data report without labels, which counts frames and clips

    @property
    def clips(self) -> dict[str, tuple[str, ...]]:
        """Split -> clip names in byte order."""
        return {name: split.clips for name, split in self.splits.items()}


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
    """Raises UserError if a file does not match its sha256."""
    hint = f"delete {shard.path.parents[DEPTH - 1]} to convert again"
    if not files.exists(shard.path):
        raise UserError(
            f"'{shard.path}' does not exist, but must have {shard.records} records\n{hint}"
        )
    try:
        with files.open_regular(shard.path, below=shard.path.parents[DEPTH - 1]) as file:
            if hash_opened(file) == shard.sha256:
                return
    except UserError as error:  # a link, or a pipe for which the code below would wait
        raise UserError(f"{str(error).splitlines()[0]}\n{hint}") from error
    except OSError as error:
        raise UserError(f"{shard.path}: {error.strerror}\n{hint}") from error
    raise UserError(f"'{shard.path}' does not match its sha256\n{hint}")


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


def make_shard(
    path: Path,
    order: np.ndarray,
    split: PackedClips,
    modalities: Mapping[str, Modality],
    *,
    on_disk: bool,
) -> Shard:
    """Writes clips to a TFRecord file, or if `on_disk` is False, only computes its digest.

    `order` [n] are the positions of the clips in `split.names`.
    """
    sha256, size = hashlib.sha256(), 0
    with path.open("wb") if on_disk else contextlib.nullcontext() as file:
        for record in _encode_clips(order, split, modalities):
            sha256.update(record)
            size += len(record)
            if file:
                file.write(record)
    mtime_ns = path.stat().st_mtime_ns if on_disk else 0
    return Shard(path, len(order), size, mtime_ns, sha256.hexdigest())


def _encode_clips(
    order: np.ndarray, split: PackedClips, modalities: Mapping[str, Modality]
) -> Iterator[bytes]:
    """Yields the record of each clip.

    `order` [n] are the positions of the clips in `split.names`.
    """
    kinds = {(name, f): get_dtype(f, x.dtype) for name, x in modalities.items() for f in BATCHED}
    mapped = dict[str, Packed]()
    for number, clip in enumerate(order.tolist()):
        if number % CLIPS_AT_ONCE == 0:
            mapped = {name: map_again(frames) for name, frames in split.frames.items()}
        values: dict[str, bytes | int] = {"clip": split.names[clip].encode(), "clip_index": clip}
        for (name, field), dtype in kinds.items():
            content = b""
            if name in mapped and (length := mapped[name].length[clip]):
                start = mapped[name].start[clip]
                frames = getattr(mapped[name], field)[start : start + length]
                content = frames.astype(dtype.newbyteorder("<"), copy=False).tobytes()
            values[f"frames/{name}/{field}"] = content
        yield make_record(encode(values))


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
        if number not in self._states and hash_opened(file) == self.shards[number].sha256:
            self._states[number] = state
        if self._states.get(number) != state:
            raise self._damaged(number)

    def _damaged(self, number: int) -> UserError:
        """Returns the error for file `number`, which was changed while it was read.

        If the sha256 of the file is wrong, raises UserError for a damaged file instead.
        """
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
    with contextlib.suppress(OSError):
        for _, start, size in spans:
            os.posix_fadvise(descriptor, start, size + FRAMING, os.POSIX_FADV_WILLNEED)
