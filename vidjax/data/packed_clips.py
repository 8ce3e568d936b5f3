"""Holds clips in arrays without padding, clip after clip.

All sources return clips in this form. The arrays are in memory, in files that are mapped into
memory, or on the devices. `clips.pad` makes batches of them.

To store another value per frame, add a line to FRAME_FIELDS. To use it in a model, add it to
`vidjax.core.batch.Frames` and `Packed`, too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vidjax.core.batch import BATCHED, Packed

# The source of the quality of frames. `given` is the quality in the file, or the L2 norm of the
# feature if the file has no quality. `norm` is always the norm.
Quality = Literal["given", "norm"]
LARGEST = float(np.finfo(np.float32).max)  # models compute in float32


class FrameField(NamedTuple):
    """A value that is stored with each frame, in addition to its feature."""

    dtype: str
    missing: float | None  # the default; None stands for the position of the frame in its clip
    official: str  # the name of the value in the pickles of the iQIYI-VID dataset

    def default(self, num_frames: int) -> np.ndarray:
        """Returns the default values of `num_frames` frames."""
        if self.missing is None:
            return np.arange(num_frames, dtype=self.dtype)
        return np.full(num_frames, self.missing, self.dtype)


FRAME_FIELDS = {
    "number": FrameField("int32", None, official="frame"),  # never decreases within a clip
    "quality": FrameField("float32", 0.0, official="quality_score"),
    "detection": FrameField("float32", 1.0, official="det_score"),  # detection score
}
IGNORED = ("box",)  # may be given with each frame, but is not stored, because no model reads it
DTYPES = ("float16", "float32", "float64", "int8")  # of features
WEIGHTS = ("quality", "detection")  # frames may be weighted with these values

# modality -> field -> a list of n arrays, [t] or [t, D], the frames of n clips
ClipArrays = dict[str, dict[str, list[np.ndarray]]]


class BadValues(NamedTuple):
    """Frames of a modality in which the value of a field is unusual."""

    field: str  # such as "quality"
    problem: str  # "negative" or "not finite"
    frames: int  # the number of these frames
    clip: str  # the first clip with such a frame


class Counts(NamedTuple):
    """The number of clips and frames that a source has in a modality, and what was left out."""

    clips: int
    frames: int  # includes the frames that were left out
    skipped: Mapping[str, int]  # {"non_finite": number of frames whose feature is not finite}
    # Number of clips without frames, by reason: `empty` if the source has no frames of the clip,
    # and `non_finite` if all its frames were left out.
    skipped_clips: Mapping[str, int]
    # {"non_finite_FIELD": number of frames in which a value was not finite and became 0}, where
    # FIELD is `quality` or `detection`.
    warnings: Mapping[str, int]
    examples: Mapping[str, str]  # for each key of `warnings`, the first clip with such a frame


class PackedClips(NamedTuple):
    """N clips and their frames.

    Attributes:
      names: N clip names without `.mp4`.
      frames: modality -> the frames of all clips. Features are float16, float32, float64 or int8,
        and have the width 0 if there are no frames. `start` is [N] int64.
      counts: modality -> the counts of clips and frames.
    """

    names: tuple[str, ...]
    frames: Mapping[str, Packed]
    counts: Mapping[str, Counts]

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """Modality -> [N] int32, the number of frames of each clip."""
        return {name: np.asarray(frames.length) for name, frames in self.frames.items()}

    def find_bad_values(self, modality: str) -> Iterator[BadValues]:
        """Yields the values of frames that were not finite, and the negative weights of frames."""
        frames, counts = self.frames[modality], self.counts[modality]
        for reason, count in sorted(counts.warnings.items()):
            field = reason.removeprefix("non_finite_")
            yield BadValues(field, "not finite", count, counts.examples[reason])
        for field in WEIGHTS:
            rows = np.flatnonzero(np.asarray(getattr(frames, field)) < 0)
            if len(rows):
                has_row = (frames.start <= rows[0]) & (rows[0] < frames.start + frames.length)
                yield BadValues(field, "negative", len(rows), self.names[int(np.argmax(has_row))])


def pack_arrays(arrays: Mapping[str, np.ndarray], length: Sequence[int]) -> Packed:
    """Returns the frames of clips, whose numbers of frames are `length`, from field -> array."""
    counts = np.array(length, np.int32)
    fields = {name: arrays[name] for name in BATCHED}
    return Packed(**fields, start=np.cumsum(counts, dtype=np.int64) - counts, length=counts)


def get_dtype(field: str, features: str | np.dtype) -> np.dtype:
    """Returns the dtype of a field of frames. `features` is the dtype of features."""
    return np.dtype(features if field == "features" else FRAME_FIELDS[field].dtype)


def map_files(folder: Path, width: int, dtype: str, num_frames: int) -> dict[str, np.ndarray]:
    """Returns field -> the values of all frames, from the files `FIELD.bin` of a folder.

    The files stay open while the arrays exist.
    """
    arrays = dict[str, np.ndarray]()
    for name in BATCHED:
        shape, kind = (num_frames, width)[: 1 + (name == "features")], get_dtype(name, dtype)
        path = folder / f"{name}.bin"
        empty = not all(shape)
        arrays[name] = np.empty(shape, kind) if empty else np.memmap(path, kind, "r", shape=shape)
    return arrays


def map_again(frames: Packed) -> Packed:
    """Maps files again, as plain arrays. If an array is freed, the pages that it has read are, too.

    Plain arrays are faster to slice than `np.memmap`. Arrays in memory are not changed.
    """
    fields = {
        name: np.asarray(np.memmap(x.filename, x.dtype, "r", shape=x.shape))
        for name in BATCHED
        if isinstance(x := getattr(frames, name), np.memmap) and x.filename
    }
    return frames._replace(**fields)


def summarise(modality: str, packed: PackedClips) -> dict[str, Any]:
    """Returns all but the values of frames as JSON, for `open_packed`."""
    frames = packed.frames[modality]
    return {
        "names": list(packed.names),
        "lengths": np.asarray(frames.length).tolist(),
        "width": frames.features.shape[1],
        "dtype": np.dtype(frames.features.dtype).name,
        "counts": packed.counts[modality]._asdict(),
    }


def open_packed(modality: str, folder: Path, summary: Mapping[str, Any]) -> PackedClips:
    """Maps the clips of a modality in `folder`. `summary` is the result of `summarise`."""
    lengths = summary["lengths"]
    arrays = map_files(folder, summary["width"], summary["dtype"], sum(lengths))
    counts = Counts(**summary["counts"])
    return PackedClips(
        tuple(summary["names"]), {modality: pack_arrays(arrays, lengths)}, {modality: counts}
    )


def join(parts: Iterable[PackedClips]) -> PackedClips:
    """Joins clips of different modalities.

    The result has every clip that is in any of `parts`, sorted by name (byte order). A clip has no
    frames in a modality that it lacks.
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
    """Returns the same clips in exactly these modalities.

    `modalities` is modality -> width and dtype of features. Features of another dtype are
    converted. In a new modality, all clips are without frames.
    """
    frames = {}
    for name, (dim, dtype) in modalities.items():
        given = packed.frames.get(name)
        if given is None or not len(given.quality):
            shapes = {field: (0,) for field in BATCHED} | {"features": (0, dim)}
            arrays = {f: np.empty(shape, get_dtype(f, dtype)) for f, shape in shapes.items()}
            given = pack_arrays(arrays, [0] * len(packed.names))
        features = np.asarray(given.features).astype(dtype, copy=False)
        frames[name] = given._replace(features=features)
    return packed._replace(frames=frames)


def measure_quality(frames: Packed) -> np.ndarray:
    """Returns [N] float64, the mean quality of the frames of each clip. Without frames, it is 0."""
    start, length = np.asarray(frames.start), np.asarray(frames.length)
    quality = np.zeros(len(length))
    filled = np.flatnonzero(length)
    filled = filled[np.argsort(start[filled], kind="stable")]
    if len(filled):
        sums = np.add.reduceat(np.asarray(frames.quality), start[filled], dtype=np.float64)
        quality[filled] = sums / length[filled]
    return quality


class PackedReader:
    """Reads clips in memory, as `records.shards.Reader` reads clips on the disk."""

    def __init__(self, splits: Sequence[PackedClips]):
        """Numbers the clips of `splits`, which have the same modalities, split after split."""
        self._splits = splits
        sizes = [len(split.names) for split in splits]
        self._owner = np.repeat(np.arange(len(splits)), sizes)  # [N], the split of each clip
        self._begins = np.cumsum(sizes) - sizes
        self.clip_index = np.arange(sum(sizes), dtype=np.int32)

    def read(self, places: np.ndarray, names: Iterable[str]) -> ClipArrays:
        """Returns the frames of the clips with the numbers `places` [n] in the modalities `names`.

        The arrays are views.
        """
        result: ClipArrays = {name: {field: [] for field in BATCHED} for name in names}
        for place in places.tolist():
            owner = int(self._owner[place])
            split, clip = self._splits[owner], place - self._begins[owner]
            for name, fields in result.items():
                frames = split.frames[name]
                rows = slice(frames.start[clip], frames.start[clip] + frames.length[clip])
                for field, arrays in fields.items():
                    arrays.append(getattr(frames, field)[rows])
        return result
