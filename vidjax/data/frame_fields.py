"""The fields of a frame, in a table that all code for reading and writing frames uses.

To store another attribute per frame, add a line to FRAME_FIELDS. To use it in a model, add it to
`vidjax.core.batch.Frames` and `Packed`, too.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vidjax.utils import files

NonFinite = Literal["drop", "error"]  # treatment of a frame that fails `find_usable_rows`
# Quality of a frame of your own features: `norm` is the L2 norm of the feature; `given` is the
# quality in the file, or the norm if the file has no quality.
Quality = Literal["given", "norm"]
LARGEST = float(np.finfo(np.float32).max)  # systems compute in float32


class FrameField(NamedTuple):
    """A field of a frame, in addition to the feature.

    Attributes:
      dtype: numpy dtype.
      width: number of values per frame.
      missing: the default value; None: the position of the frame in its clip.
      official: name of the field in the official feature pickles.
    """

    dtype: str
    width: int
    missing: float | None
    official: str

    def shape(self, num_frames: int) -> tuple[int, ...]:
        """Returns the shape of F frames: [F] if the width is 1, or [F, width]."""
        return (num_frames,) if self.width == 1 else (num_frames, self.width)

    def default(self, num_frames: int) -> np.ndarray:
        """Returns the default values of `num_frames` frames."""
        if self.missing is None:
            return np.arange(num_frames, dtype=self.dtype)
        return np.full(self.shape(num_frames), self.missing, self.dtype)


# The order is part of the cache key of features in memory: append new fields at the end.
FRAME_FIELDS = {
    "number": FrameField("int32", 1, None, official="frame"),  # frame number, non-decreasing
    "quality": FrameField("float32", 1, 0.0, official="quality_score"),
    "detection": FrameField("float32", 1, 1.0, official="det_score"),  # detection score
    "box": FrameField("float32", 4, 0.0, official="bbox"),  # x1, y1, x2, y2 in pixels
}
STORED = ("features", *FRAME_FIELDS)  # the modality decides dtype and width of the feature


class FlatFiles(Mapping[str, np.ndarray]):
    """Maps each field to its frames [F, ...] in the flat file `FIELD.bin` of a folder.

    Each look-up memory-maps the file as long as the array exists. Mapped files count towards the
    limit of open files.
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


COUNT_NAMES = ("seen", "skipped", "skipped_clips", "warnings")


@dataclass(frozen=True, eq=False)
class PackedClips:
    """A modality of a split in flat arrays: N clips, F frames of width D.

    Attributes:
      names: N clip names without `.mp4`, in the order of the file.
      lengths: [N] int32, number of frames of each clip.
      frames: field -> [F, ...]: `features` [F, D] in the stored dtype (float16, float32, float64 or
        int8, native byte order), and the fields of FRAME_FIELDS. Without frames, D is 0.
      seen: number of frames in the file: F + sum(skipped.values()).
      skipped: reason -> number of frames that were left out; the reason is `non_finite`.
      skipped_clips: reason -> number of clips of length 0. The reason is `empty` (no frames in the
        file) or `non_finite` (all frames were left out).
      warnings: `non_finite_quality`, `non_finite_detection` or `non_finite_box` -> number of frames
        whose value was replaced by 0.
    """

    names: tuple[str, ...]
    lengths: np.ndarray
    frames: Mapping[str, np.ndarray]
    seen: int
    skipped: dict[str, int]
    skipped_clips: dict[str, int]
    warnings: dict[str, int]

    @classmethod
    def from_flat_files(cls, folder: Path, summary: Mapping[str, Any]) -> "PackedClips":
        """Opens the arrays that a child process wrote to `folder`, as one raw file per field.

        `summary` has the names, lengths, width, dtype and counts of the clips.
        """
        lengths = np.array(summary["lengths"], np.int32)
        num_frames = int(lengths.sum())
        return cls(
            names=tuple(summary["names"]),
            lengths=lengths,
            frames=FlatFiles(folder, summary["dtype"], summary["width"], num_frames),
            **{name: summary[name] for name in COUNT_NAMES},
        )

    def summary(self) -> dict[str, Any]:
        """Returns the attributes that are not in flat files as JSON values, for another process."""
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

    def starts(self) -> np.ndarray:
        """Returns [N] int64, the first frame of each clip."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths


def find_usable_rows(features: np.ndarray) -> np.ndarray:
    """Returns [F] bool, False for features [F, D] with a NaN, an Inf or a value beyond float32."""
    if features.dtype != np.float64:
        return np.asarray(np.isfinite(features).all(axis=1))
    return np.asarray((np.abs(features) <= LARGEST).all(axis=1))  # a NaN compares as False


def compute_feature_norms(features: np.ndarray, rows: int = 512) -> np.ndarray:
    """Returns [F] float32, the L2 norms of features [F, D], computed `rows` frames at a time.

    Face nets produce short vectors for blurred faces and side views, so the norm measures quality.

    Source: iQIYI-VID paper, section 5.1, after Ranjan et al.
    """
    norms = np.empty(len(features), np.float32)
    for start in range(0, len(features), rows):
        block = features[start : start + rows].astype(np.float64, order="C")  # squares stay finite
        length = np.sqrt(np.einsum("fd,fd->f", block, block))
        norms[start : start + rows] = np.minimum(length, LARGEST)
    return norms


def count_frames(seen: np.ndarray, kept: np.ndarray, warnings: Mapping[str, int]) -> dict[str, Any]:
    """Returns the attributes COUNT_NAMES of `PackedClips`.

    Args:
      seen: [N] int, number of frames of each clip in the file.
      kept: [N] int, number of frames of each clip that were not left out.
      warnings: see `PackedClips`.
    """
    skipped_clips = {"empty": seen == 0, "non_finite": (seen > 0) & (kept == 0)}
    dropped = int(seen.sum() - kept.sum())
    return {
        "seen": int(seen.sum()),
        "skipped": {"non_finite": dropped} if dropped else {},
        "skipped_clips": {
            reason: int(clips.sum()) for reason, clips in skipped_clips.items() if clips.any()
        },
        "warnings": dict(warnings),
    }


# Split -> modality -> its clips.
Unpacked = Mapping[str, Mapping[str, PackedClips]]


class Origin(NamedTuple):
    """The origin of a dataset in result files.

    Attributes:
      name: a key of `sources.DATASETS`.
      dir: the absolute path of its folder; None: generated clips, or arrays in memory.
    """

    name: str
    dir: str | None = None

    @classmethod
    def from_folder(cls, name: str, folder: str | Path | None) -> "Origin":
        """Returns the origin of a dataset in a folder; None: a dataset without a folder."""
        return cls(name, str(files.absolute(folder)) if folder else None)


class RecordSource(Protocol):
    """Frames that can be converted to records, and their labels.

    To add a dataset, write a class of this protocol, and a line in `vidjax.data.sources.DATASETS`.
    """

    @property
    def kind(self) -> str:
        """The subfolder of the cache for the records."""
        ...

    @property
    def place(self) -> str:
        """The folder or the name of the dataset, for messages."""
        ...

    @property
    def title(self) -> str:
        """A description of the files, for the log."""
        ...

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns the key in the cache: a JSON value that changes if the content changes."""
        ...

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the file of a modality in a split, for messages and the report."""
        ...

    def read(self, scratch: Path, non_finite: NonFinite) -> Unpacked:
        """Reads all frames. A modality has the same width and dtype in all clips of a split.

        Args:
          scratch: a folder for flat files; it must outlive the arrays.
          non_finite: 'drop' leaves out and counts frames whose feature contains a NaN or an Inf;
            'error' raises UserError.
        """
        ...

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> Mapping[str, Mapping[str, str]]:
        """Returns split -> clip -> identity for the splits with labels.

        `clips` is split -> the names of its clips.
        """
        ...
