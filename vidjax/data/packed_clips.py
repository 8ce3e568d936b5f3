"""Holds the frames of many clips in arrays without padding, clip after clip.

All readers of datasets return clips in this form. The arrays are in memory, in files, or on the
devices. `clips.pad` makes padded batches of them.

To store another value per frame, add a line to FRAME_FIELDS. To use it in a model, add it to
`vidjax.core.batch.Frames` and `Packed`, too.
"""

import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from vidjax.core.batch import BATCHED, Packed
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.files import hash_opened
from vidjax.utils.json_files import Count
from vidjax.utils.names import clean_name

# The source of the quality of frames. `given` is the quality in the file, or the L2 norm of the
# feature if the file has no quality. `norm` is always the norm.
Quality = Literal["given", "norm"]
LARGEST = float(np.finfo(np.float32).max)  # models compute in float32


class FrameField(NamedTuple):
    """Describes a value that each frame has, such as the quality."""

    dtype: str
    missing: float | None  # the default; None stands for the position of the frame in its clip
    official: str  # the name of the value in the pickles of the iQIYI-VID dataset

    def default(self, num_frames: int) -> np.ndarray:
        """Returns the values [num_frames] of this field for a clip whose values are not given."""
        if self.missing is None:
            return np.arange(num_frames, dtype=self.dtype)
        return np.full(num_frames, self.missing, self.dtype)


FRAME_FIELDS = {
    "number": FrameField("int32", None, official="frame"),  # never decreases within a clip
    "quality": FrameField("float32", 0.0, official="quality_score"),
    "detection": FrameField("float32", 1.0, official="det_score"),  # detection score
}
DType = Literal["float16", "float32", "float64", "int8"]  # of features
DTYPES: tuple[DType, ...] = get_args(DType)
MAX_HALF, NEGATIVE_ZERO = float(np.finfo(np.float16).max), 0x8000  # in float16
CHECKSUM_WORDS = 1 << 16  # words of 64 bits that are added at once
WEIGHTS = ("quality", "detection")  # frames may be weighted with these values
ROWS_AT_ONCE = 1 << 14  # frames whose values are checked at once
REASONS = ("empty", "non_finite", *(f"non_finite_{name}" for name in WEIGHTS))  # see `Counts`

# modality -> field -> a list of n arrays, [t] or [t, D], the frames of n clips
ClipArrays = dict[str, dict[str, list[np.ndarray]]]


class BadValues(NamedTuple):
    """How many frames of a modality have a negative or not finite value in a field."""

    field: str  # such as "quality"
    problem: str  # "negative" or "not finite"
    frames: int  # the number of these frames
    clip: str  # the first clip with such a frame


class Counts(NamedTuple):
    """Counts the clips and frames of a modality in a source, and the frames that were left out."""

    clips: Count
    frames: Count  # includes the frames that were left out
    skipped: Mapping[str, Count]  # {"non_finite": number of frames whose feature is not finite}
    # Number of clips without frames, by reason: `empty` if the source has no frames of the clip,
    # and `non_finite` if all its frames were left out.
    skipped_clips: Mapping[str, Count]
    # {"non_finite_FIELD": number of frames in which a value was not finite and became 0}, where
    # FIELD is `quality` or `detection`.
    warnings: Mapping[str, Count]
    examples: Mapping[str, str]  # for each key of `warnings`, the first clip with such a frame


class PackedClips(NamedTuple):
    """N clips and their frames.

    Attributes:
      names: N clip names without `.mp4`.
      frames: modality -> the frames of all clips. The dtype of features is float16, float32,
        float64 or int8. If no clip has frames, the width of the features may be 0.
      counts: modality -> how many clips and frames were read or left out.
      checksums: modality -> [N] uint64, a checksum of each clip (see `compute_checksum`), by which
        `Reader` detects damaged files. For clips in memory, the dict may be empty.
    """

    names: tuple[str, ...]
    frames: Mapping[str, Packed]
    counts: Mapping[str, Counts]
    checksums: Mapping[str, np.ndarray] = {}

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """The number of frames of each clip: modality -> [N] int32."""
        return {name: np.asarray(frames.length) for name, frames in self.frames.items()}

    def find_bad_values(self, modality: str) -> Iterator[BadValues]:
        """Yields an item for each field of a modality and each kind of unusual values in it.

        The fields are quality and detection. There are two kinds of unusual values: values that
        were not finite (and were replaced by 0), and negative values.
        """
        frames, counts = self.frames[modality], self.counts[modality]
        for reason, count in sorted(counts.warnings.items()):
            field = reason.removeprefix("non_finite_")
            yield BadValues(field, "not finite", count, counts.examples[reason])
        for field in WEIGHTS:
            rows = np.flatnonzero(np.asarray(getattr(frames, field)) < 0)
            if len(rows):
                has_row = (frames.start <= rows[0]) & (rows[0] < frames.start + frames.length)
                yield BadValues(field, "negative", len(rows), self.names[int(np.argmax(has_row))])


class StoredFile(NamedTuple):
    """A file of a dataset in the cache, with its size, time and sha256 when it was written."""

    path: Path  # FOLDER/SPLIT/MODALITY/FIELD.bin, where FOLDER contains the manifest
    size: int  # number of bytes
    mtime_ns: int  # time of the last change, in ns
    sha256: str

    @property
    def folder(self) -> Path:
        """The folder of the dataset in the cache."""
        return self.path.parents[2]

    def check(self) -> None:
        """Raises UserError if the file does not match its sha256."""
        problem = f"'{self.path}' does not match its sha256"
        try:
            with files.open_regular(self.path, below=self.folder) as file:
                if hash_opened(file) == self.sha256:
                    return
        except FileNotFoundError:
            problem = f"'{self.path}' does not exist"
        except UserError as error:  # a link, or a pipe for which the code above would wait
            problem = str(error).splitlines()[0]
        except OSError as error:
            problem = f"{self.path}: {error.strerror}"
        raise UserError(f"{problem}\ndelete {self.folder} to convert again")


class FlatFile:
    """An array [F] or [F, D] in a file. Slices of the array are read when they are needed.

    The file is not mapped into memory, because the system kills a process if a mapped file is
    truncated.

    Attributes:
      file: the file.
      shape: [F] or [F, D].
      dtype: a reader must convert slices to this dtype. The file may have another dtype.
    """

    def __init__(self, file: StoredFile, shape: tuple[int, ...], stored: np.dtype, dtype: np.dtype):
        """Opens the file. If its size or time has changed since it was written, checks its sha256.

        `stored` is the dtype in the file. For the other arguments, see the attributes.
        """
        self.file, self.shape, self.dtype = file, shape, dtype
        self._stored = stored
        self._row_bytes = stored.itemsize * math.prod(shape[1:])
        # A replaced file has a new time. Files of a copied folder have new times, too.
        stat = os.lstat(file.path) if files.exists(file.path) else None
        if not stat or (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
            file.check()
        if file.size != len(self) * self._row_bytes:
            raise UserError(f"'{file.path}' has {file.size:,} bytes, not the size in index.npz")
        with files.open_regular(file.path, below=file.folder) as opened:
            self._descriptor = os.dup(opened.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._whole: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Returns a slice of rows, without rows that are missing at the end of an array [F, D]."""
        if len(self.shape) > 1:
            return self._read(rows.start, rows.stop)
        if self._whole is None:
            self.file.check()
            self._whole = self._read(0, len(self))
        return self._whole[rows]

    def _read(self, start: int, stop: int) -> np.ndarray:
        size = self._row_bytes
        content = os.pread(self._descriptor, (stop - start) * size, start * size)
        array = np.frombuffer(content[: len(content) // size * size], self._stored)
        return array.reshape(-1, *self.shape[1:])


def compute_checksum(features: np.ndarray) -> int:
    """Returns a checksum of 64 bits of the features [T, D] of a clip.

    If bytes of the features change by chance, the checksum stays the same with a probability of
    about 2**-64.
    """
    content = np.ascontiguousarray(features).reshape(-1).view(np.uint8)
    if content.size % 8:
        content = np.pad(content, (0, -content.size % 8))
    words = content.view(np.uint64)
    total = 0
    for at in range(0, len(words), CHECKSUM_WORDS):
        block = words[at : at + CHECKSUM_WORDS]
        total = (31 * total + int(np.dot(block, FACTORS[: len(block)]))) % 2**64
    return total


def scramble(numbers: np.ndarray) -> np.ndarray:
    """Hashes each of `numbers` [N] uint64 to a number that looks random. 0 stays 0.

    Source: the finaliser of MurmurHash3.
    """
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(33))


# Odd numbers that look random, the factors of words in checksums and fingerprints.
FACTORS = scramble(np.arange(1, CHECKSUM_WORDS + 1, dtype=np.uint64)) | np.uint64(1)


def fingerprint_frames(features: np.ndarray) -> np.ndarray:
    """Returns a fingerprint of each frame of features [F, D], [F] uint64.

    Equal frames have equal fingerprints. Features are rounded to float16 first, so that copies in
    another dtype count as equal. The fingerprint of a frame of zeros is 0.
    """
    rows = 512  # of a block, which fits into the cache of the processor
    prints = [np.zeros(0, np.uint64)]
    for start in range(0, len(features), rows):
        block = features[start : start + rows]
        if block.dtype != np.float16:
            largest = np.abs(block).max(axis=1).astype(np.float32)
            _, exponent = np.frexp(np.where(largest > MAX_HALF, largest, 0))
            block = np.ldexp(block.astype(np.float32), -exponent[:, None]).astype(np.float16)
        bits = np.ascontiguousarray(block).view(np.uint16)
        bits = np.where(bits == NEGATIVE_ZERO, np.uint16(0), bits)
        words = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4))).view(np.uint64)
        prints.append(scramble(np.einsum("fw,w->f", words, np.resize(FACTORS, words.shape[1]))))
    return np.concatenate(prints)


def is_finite(values: np.ndarray) -> np.ndarray:
    """Returns a bool array of the same shape: True for values that are finite in float32."""
    if values.dtype.itemsize <= np.dtype(np.float32).itemsize:
        return np.isfinite(values)
    return np.asarray(np.abs(values) <= LARGEST)  # a NaN compares as False


def pack_arrays(arrays: Mapping[str, Any], length: ArrayLike) -> Packed:
    """Makes a `Packed` object (the frames of N clips, clip after clip) from arrays.

    `arrays` is field -> the values of all F frames, such as `features` [F, D] and `quality` [F].
    `length` [N] is the number of frames of each clip.
    """
    counts = np.array(length, np.int32)
    fields = {name: arrays[name] for name in BATCHED}
    return Packed(**fields, start=np.cumsum(counts, dtype=np.int64) - counts, length=counts)


def get_dtype(field: str, features: str | np.dtype) -> np.dtype:
    """Returns the dtype of a field. For the field `features`, it is the argument `features`."""
    return np.dtype(features if field == "features" else FRAME_FIELDS[field].dtype)


def map_files(folder: Path, width: int, dtype: str, num_frames: int) -> dict[str, np.ndarray]:
    """Maps the files `FIELD.bin` of a folder into memory. Returns field -> values of all frames.

    `width` and `dtype` are the width and the dtype of the features. The files stay open while the
    arrays exist.
    """
    arrays = dict[str, np.ndarray]()
    for name in BATCHED:
        shape, kind = (num_frames, width)[: 1 + (name == "features")], get_dtype(name, dtype)
        path = folder / f"{name}.bin"
        empty = not all(shape)
        arrays[name] = np.empty(shape, kind) if empty else np.memmap(path, kind, "r", shape=shape)
    return arrays


def map_again(frames: Packed) -> Packed:
    """Returns the same frames, in which memory maps of files are replaced by new maps.

    What was read from a file through a map stays in memory until the map is freed. So a loop that
    makes new maps in each step needs little memory. The new maps are plain arrays, which are faster
    to slice than `np.memmap`. Arrays in memory stay as they are.
    """
    fields = {
        name: np.asarray(np.memmap(x.filename, x.dtype, "r", shape=x.shape))
        for name in BATCHED
        if isinstance(x := getattr(frames, name), np.memmap) and x.filename
    }
    return frames._replace(**fields)


class Summary(Struct):
    """What `open_packed` needs to know about the clips of a modality, such as their names.

    A child process, which may be hostile, makes the summary. So the constructor raises ValueError
    if the attributes contradict each other.
    """

    names: list[str]
    lengths: list[Count]
    width: Count
    dtype: DType
    counts: Counts

    def __post_init__(self) -> None:
        clips, frames, skipped, skipped_clips, warnings, examples = self.counts
        names, count, total = {*self.names}, len(self.lengths), sum(self.lengths)
        sizes = [len(self.names), len(names), clips, sum(skipped_clips.values())]
        sizes += [frames - sum(skipped.values()), self.width > 0 or not total]
        wrong = {*skipped, *skipped_clips, *warnings} - {*REASONS} | {*warnings} ^ {*examples}
        wrong |= ({*examples.values()} | {*map(clean_name, self.names)}) - names
        if wrong or sizes != [count] * 3 + [self.lengths.count(0), total, True]:
            raise ValueError("the names, lengths and counts of the clips contradict each other")


def summarise(modality: str, packed: PackedClips) -> Summary:
    """Returns all that `open_packed` needs to open the files of the clips in a modality."""
    frames = packed.frames[modality]
    lengths, dtype = np.asarray(frames.length).tolist(), np.dtype(frames.features.dtype).name
    facts = [*packed.names], lengths, frames.features.shape[1], cast(DType, dtype)
    return Summary(*facts, packed.counts[modality])


def open_packed(modality: str, folder: Path, summary: Summary) -> PackedClips:
    """Maps the files of a modality in `folder` into memory, and returns the clips.

    Another process has written the files, and has made `summary` with the function `summarise`. If
    the files do not fit `summary`, or have values that are not finite, raises an error.
    """
    files.refuse_links(folder)
    arrays = map_files(folder, summary.width, summary.dtype, sum(summary.lengths))
    frames = pack_arrays(arrays, summary.lengths)
    for at in range(0, sum(summary.lengths), ROWS_AT_ONCE):
        mapped = map_again(frames)  # frees the memory of the rows before
        rows = (getattr(mapped, name)[at : at + ROWS_AT_ONCE] for name in BATCHED)
        if not all(is_finite(row).all() for row in rows):
            raise ValueError(f"{folder}: a file of frames has values that are not finite")
    return PackedClips(tuple(summary.names), {modality: frames}, {modality: summary.counts})


def join(parts: Iterable[PackedClips]) -> PackedClips:
    """Joins `parts`, each with the clips of one modality, to clips with all modalities.

    The result has every clip of any part, sorted by name (byte order). If a part lacks a clip, the
    clip has no frames in the modality of the part.
    """
    parts = list(parts)
    # Python orders str by code point, which is the byte order of UTF-8.
    names = tuple(sorted({name for part in parts for name in part.names}))
    index = {name: place for place, name in enumerate(names)}
    joined, counts = dict[str, Packed](), dict[str, Counts]()
    for part in parts:
        rows = np.fromiter((index[name] for name in part.names), np.int64, len(part.names))
        for modality, frames in part.frames.items():
            start, length = np.zeros(len(names), np.int64), np.zeros(len(names), np.int32)
            start[rows], length[rows] = frames.start, frames.length
            joined[modality] = frames._replace(start=start, length=length)
        counts |= part.counts
    return PackedClips(names, joined, counts)


def complete(packed: PackedClips, modalities: Mapping[str, tuple[int, str]]) -> PackedClips:
    """Returns the same clips in exactly the modalities `modalities`.

    `modalities` is modality -> (width, dtype) of the features. Features of another dtype are
    converted. If the clips lack a modality, they have no frames in it. Other modalities are
    dropped.
    """
    frames = {}
    for name, (dim, dtype) in modalities.items():
        given = packed.frames.get(name)
        if given is None or not len(given.quality):
            shapes = {field: (0,) for field in BATCHED} | {"features": (0, dim)}
            arrays = {f: np.empty(shape, get_dtype(f, dtype)) for f, shape in shapes.items()}
            given = pack_arrays(arrays, [0] * len(packed.names))
        if given.features.dtype != dtype:
            given = given._replace(features=np.asarray(given.features).astype(dtype))
        frames[name] = given
    return packed._replace(frames=frames)


def measure_quality(frames: Packed) -> np.ndarray:
    """Returns [N] float64, the mean quality of the frames of each clip, or 0 without frames."""
    start, length = np.asarray(frames.start), np.asarray(frames.length)
    quality = np.zeros(len(length))
    filled = np.flatnonzero(length)
    filled = filled[np.argsort(start[filled], kind="stable")]
    if len(filled):
        sums = np.add.reduceat(np.asarray(frames.quality), start[filled], dtype=np.float64)
        quality[filled] = sums / length[filled]
    return quality


class Reader:
    """Reads the clips of several splits, in memory or in files.

    Attributes:
      order: [N] int32, the numbers of all clips, in the order in which the frames of the largest
        modality are stored. Clips are numbered from 0, split after split, and by name within a
        split.
    """

    def __init__(self, splits: Sequence[PackedClips]):
        """Makes a reader of `splits`, which must have the same modalities."""
        self._splits = splits
        sizes = [len(split.names) for split in splits]
        self._owner = np.repeat(np.arange(len(splits)), sizes)  # [N], the split of each clip
        self._begins = np.cumsum(sizes) - sizes
        orders = []
        for split, begin in zip(splits, self._begins, strict=True):
            largest = max(
                split.frames.values(), key=lambda frames: math.prod(frames.features.shape)
            )
            orders.append(np.argsort(largest.start, kind="stable") + begin)
        self.order = np.concatenate(orders).astype(np.int32)

    def read(self, clips: np.ndarray, names: Iterable[str]) -> ClipArrays:
        """Returns modality -> field -> a list with the array of each of n clips.

        `clips` [n] are the numbers of the clips, and `names` the modalities to read. For clips in
        memory, the arrays are views. If a file is damaged, raises UserError.
        """
        result: ClipArrays = {name: {field: [] for field in BATCHED} for name in names}
        owners = self._owner[clips]
        places = [*zip(owners.tolist(), (clips - self._begins[owners]).tolist(), strict=True)]
        for name, fields in result.items():
            for owner, clip in places:
                frames = self._splits[owner].frames[name]
                start, length = int(frames.start[clip]), int(frames.length[clip])
                for field, arrays in fields.items():
                    arrays.append(getattr(frames, field)[start : start + length])
                if isinstance(frames.features, FlatFile):
                    features = fields["features"]
                    if compute_checksum(features[-1]) != self._splits[owner].checksums[name][clip]:
                        raise _find_damage(frames.features.file)
                    features[-1] = features[-1].astype(frames.features.dtype, copy=False)
        return result


def _find_damage(file: StoredFile) -> UserError:
    file.check()  # raises UserError if the file is damaged
    return UserError(
        f"{file.path}: the file was changed while it was read\n"
        "run the command again when no program writes to it"
    )
