"""Defines the values that are stored with each frame, such as its number and its quality.

To store another value per frame, add a line to FRAME_FIELDS. To use it in a model, add it to
`vidjax.core.batch.Frames` and `Packed`, too.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vidjax.utils import files

# The source of the quality of frames. `given` is the quality in the file, or the L2 norm of the
# feature if the file has no quality. `norm` is always the norm.
Quality = Literal["given", "norm"]
LARGEST = float(np.finfo(np.float32).max)  # models compute in float32


class FrameField(NamedTuple):
    """A value that is stored with each frame, in addition to its feature."""

    dtype: str
    width: int  # the number of values per frame
    missing: float | None  # the default; None stands for the position of the frame in its clip
    official: str  # the name of the value in the pickles of the iQIYI-VID dataset

    def shape(self, num_frames: int) -> tuple[int, ...]:
        """Returns the shape of the values of F frames, [F, width], or [F] if the width is 1."""
        return (num_frames,) if self.width == 1 else (num_frames, self.width)

    def default(self, num_frames: int) -> np.ndarray:
        """Returns the default values of `num_frames` frames."""
        if self.missing is None:
            return np.arange(num_frames, dtype=self.dtype)
        return np.full(self.shape(num_frames), self.missing, self.dtype)


# The order is part of the cache key of features in memory: append new fields at the end.
FRAME_FIELDS = {
    "number": FrameField("int32", 1, None, official="frame"),  # never decreases within a clip
    "quality": FrameField("float32", 1, 0.0, official="quality_score"),
    "detection": FrameField("float32", 1, 1.0, official="det_score"),  # detection score
    "box": FrameField("float32", 4, 0.0, official="bbox"),  # x1, y1, x2, y2 in pixels
}
DTYPES = ("float16", "float32", "float64", "int8")  # of features
WEIGHTS = ("quality", "detection")  # frames may be weighted with these values
STORED = ("features", *FRAME_FIELDS)  # dtype and width of features depend on the modality


class FlatFiles(Mapping[str, np.ndarray]):
    """A mapping, field -> the values of all frames, from the file `FIELD.bin` of a folder.

    Each access to a field memory-maps the file again. The file stays open while the array exists.
    """

    def __init__(self, folder: Path, dtype: np.dtype | str, width: int, num_frames: int):
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.width, self.num_frames = width, num_frames

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape = self.dtype, (self.num_frames, self.width)
        if name != "features":
            field = FRAME_FIELDS[name]
            dtype, shape = np.dtype(field.dtype), field.shape(self.num_frames)
        if not all(shape):
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(self.folder / f"{name}.bin", dtype, "r", shape=shape))

    def __iter__(self) -> Iterator[str]:
        return iter(STORED)

    def __len__(self) -> int:
        return len(STORED)


class BadValues(NamedTuple):
    """Frames of a modality in which the value of a field is unusual."""

    field: str  # such as "quality"
    problem: str  # "negative" or "not finite"
    frames: int  # the number of these frames
    clip: str  # the first clip with such a frame


COUNT_NAMES = ("seen", "skipped", "skipped_clips", "warnings", "examples")


@dataclass(frozen=True, eq=False)
class PackedClips:
    """The joined frames of N clips in one modality, F frames in total.

    Attributes:
      names: N clip names without `.mp4`, in the order of the file.
      lengths: [N] int32, number of frames of each clip.
      frames: field -> array with a row per frame. `features` is [F, D] float16, float32, float64 or
        int8; D is 0 if there are no frames. The other fields are in FRAME_FIELDS.
      seen: number of frames in the file, which is F plus the number of skipped frames.
      skipped: {"non_finite": number of frames whose feature is not finite in float32}.
      skipped_clips: number of clips without frames, by reason. The reason is `empty` if the file
        has no frames of the clip, and `non_finite` if all its frames were left out.
      warnings: {"non_finite_FIELD": number of frames in which a value of the field was not finite
        and became 0}. FIELD is `quality`, `detection` or `box`.
      examples: for each key of `warnings`, the first clip with such a frame.
    """

    names: tuple[str, ...]
    lengths: np.ndarray
    frames: Mapping[str, np.ndarray]
    seen: int
    skipped: dict[str, int]
    skipped_clips: dict[str, int]
    warnings: dict[str, int]
    examples: dict[str, str]

    @classmethod
    def from_flat_files(cls, folder: Path, summary: Mapping[str, Any]) -> "PackedClips":
        """Opens the frames in `folder`. `summary` is the result of the method `summary`."""
        lengths = np.array(summary["lengths"], np.int32)
        num_frames = int(lengths.sum())
        return cls(
            names=tuple(summary["names"]),
            lengths=lengths,
            frames=FlatFiles(folder, summary["dtype"], summary["width"], num_frames),
            **{name: summary[name] for name in COUNT_NAMES},
        )

    def summary(self) -> dict[str, Any]:
        """Returns all attributes except `frames`, and the width and dtype of features, as JSON."""
        return {
            "names": list(self.names),
            "lengths": self.lengths.tolist(),
            "width": self.features.shape[1],
            "dtype": self.features.dtype.name,
            **{name: getattr(self, name) for name in COUNT_NAMES},
        }

    @property
    def features(self) -> np.ndarray:
        """The features, [F, D]."""
        return self.frames["features"]

    def find_bad_values(self) -> Iterator[BadValues]:
        """Yields the values of frames that were not finite, and the negative weights of frames."""
        for reason, count in sorted(self.warnings.items()):
            field = reason.removeprefix("non_finite_")
            yield BadValues(field, "not finite", count, self.examples[reason])
        for field in WEIGHTS:
            rows = np.flatnonzero(self.frames[field] < 0)
            if len(rows):
                clip = np.searchsorted(np.cumsum(self.lengths), rows[0], side="right")
                yield BadValues(field, "negative", len(rows), self.names[int(clip)])

    def starts(self) -> np.ndarray:
        """Returns [N] int64, the row of the first frame of each clip."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths


def find_usable_rows(features: np.ndarray) -> np.ndarray:
    """Returns [F] bool, True for the frames whose features [F, D] are finite in float32."""
    if features.dtype != np.float64:
        return np.asarray(np.isfinite(features).all(axis=1))
    return np.asarray((np.abs(features) <= LARGEST).all(axis=1))  # a NaN compares as False


def compute_feature_norms(features: np.ndarray) -> np.ndarray:
    """Returns [F] float32, the L2 norms of features [F, D].

    The norm measures the quality of a frame: it is small for blurred faces and for side views.

    Source: iQIYI-VID paper, section 5.1, after Ranjan et al.
    """
    norms, rows = np.empty(len(features), np.float32), 512  # rows of a block, which saves memory
    for start in range(0, len(features), rows):
        block = features[start : start + rows].astype(np.float64, order="C")  # squares stay finite
        length = np.sqrt(np.einsum("fd,fd->f", block, block))
        norms[start : start + rows] = np.minimum(length, LARGEST)
    return norms


# split -> modality -> the frames of its clips
Unpacked = Mapping[str, Mapping[str, PackedClips]]


class Origin(NamedTuple):
    """The values of `config.data.name`, `dir` and `quality` with which a dataset was loaded."""

    name: str  # such as 'iqiyi_vid'
    dir: str | None = None  # None if clips were generated or are arrays in memory
    quality: Quality = "given"

    @classmethod
    def from_folder(cls, name: str, folder: str | Path, quality: Quality = "given") -> "Origin":
        """Returns an Origin with the absolute path of `folder`, the folder of the dataset."""
        return cls(name, str(files.absolute(folder)), quality)


class RecordSource(Protocol):
    """A dataset, with labels, whose frames can be converted to records (TFRecord files).

    To add a dataset, write a class with these methods, and a line in `sources.DATASETS`.
    """

    kind: str  # the name of the cache folder for the records of all datasets of this class
    place: str  # the folder or the name of the dataset, for messages
    title: str  # a description of the files, for the log

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a JSON value that changes if any frame changes. It is the key in the cache."""
        ...

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the file of a modality in a split, for messages and the report."""
        ...

    def read(self, scratch: Path) -> Unpacked:
        """Reads all frames. A modality has the same width and dtype in all clips of a split.

        The returned arrays may be memory maps of files in `scratch`.
        """
        ...

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> Mapping[str, Mapping[str, str]]:
        """Returns split -> clip -> identity. `clips` is split -> names of clips with features."""
        ...
