"""The fields of a frame: one table, which all code that reads or writes frames goes by.

To store another attribute per frame, add a line to FRAME_FIELDS. To bring it to a model, add it to
`vidjax.core.batch.Frames` and `Packed`, too.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vidjax.utils import files

NonFinite = Literal["drop", "error"]  # treatment of a frame that fails `usable_rows`
# Quality of a frame of your own features: `norm` is the L2 norm of the feature (`feature_norms`);
# `given` is the quality in the file, or the norm where the file has none.
Quality = Literal["given", "norm"]
LARGEST = float(np.finfo(np.float32).max)  # systems compute in float32, in which more is infinite


class FrameField(NamedTuple):
    """A field that every frame has beside its feature.

    Attributes:
      dtype: numpy dtype.
      width: number of values per frame.
      missing: the value where a modality has no such field; None for the frame's position in its
        clip.
      official: name of the field in the official feature pickles.
    """

    dtype: str
    width: int
    missing: float | None
    official: str

    def shape(self, num_frames: int) -> tuple[int, ...]:
        """Returns [F] for one value per frame, [F, width] for several."""
        return (num_frames,) if self.width == 1 else (num_frames, self.width)

    def default(self, num_frames: int) -> np.ndarray:
        """Returns the values of a clip whose modality has no such field."""
        if self.missing is None:
            return np.arange(num_frames, dtype=self.dtype)
        return np.full(self.shape(num_frames), self.missing, self.dtype)


# The order is part of the cache key of in-memory features: append, never reorder.
FRAME_FIELDS = {
    "number": FrameField("int32", 1, None, official="frame"),  # frame number, non-decreasing
    "quality": FrameField("float32", 1, 0.0, official="quality_score"),
    "detection": FrameField("float32", 1, 1.0, official="det_score"),  # detection score
    "box": FrameField("float32", 4, 0.0, official="bbox"),  # x1, y1, x2, y2 in pixels
}
STORED = ("features", *FRAME_FIELDS)  # the feature comes first; its modality gives dtype and width


class FlatFiles(Mapping[str, np.ndarray]):
    """Maps a field to its frames [F, ...] in the flat file `FIELD.bin` of a folder.

    Each look-up memory-maps the file for as long as the array lives. A mapped file counts among
    the files that the process may open.
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


COUNTS = ("seen", "skipped", "skipped_clips", "warnings")


@dataclass(frozen=True, eq=False)
class PackedClips:
    """One modality of one split, flat: N clips, F frames of width D.

    Attributes:
      names: N clip names without `.mp4`, in the order of the file.
      lengths: [N] int32, number of frames of each clip.
      frames: field -> [F, ...]: `features` [F, D] in the stored dtype (float16, float32, float64 or
        int8, native byte order), and the fields of FRAME_FIELDS. D is 0 where no clip has a frame.
      seen: number of frames in the file: F + sum(skipped.values()).
      skipped: reason -> number of frames left out; the reason is `non_finite`.
      skipped_clips: reason -> number of clips of length 0: `empty` in the file, or `non_finite`
        throughout.
      warnings: `non_finite_quality`, `non_finite_detection` or `non_finite_box` -> number of frames
        with such a value, which is now 0.
    """

    names: tuple[str, ...]
    lengths: np.ndarray
    frames: Mapping[str, np.ndarray]
    seen: int
    skipped: dict[str, int]
    skipped_clips: dict[str, int]
    warnings: dict[str, int]

    @classmethod
    def of_flat_files(cls, folder: Path, summary: Mapping[str, Any]) -> "PackedClips":
        """Returns the clips in flat files of another process, which also gave their `summary`."""
        lengths = np.array(summary["lengths"], np.int32)
        num_frames = int(lengths.sum())
        return cls(
            names=tuple(summary["names"]),
            lengths=lengths,
            frames=FlatFiles(folder, summary["dtype"], summary["width"], num_frames),
            **{name: summary[name] for name in COUNTS},
        )

    def summary(self) -> dict[str, Any]:
        """Returns all attributes that are not in flat files, as JSON, for `of_flat_files`."""
        return {
            "names": list(self.names),
            "lengths": self.lengths.tolist(),
            "width": self.features.shape[1],
            "dtype": self.features.dtype.name,
            **{name: getattr(self, name) for name in COUNTS},
        }

    @property
    def features(self) -> np.ndarray:
        """The features, [F, D]."""
        return self.frames["features"]

    def starts(self) -> np.ndarray:
        """Returns [N] int64, the first frame of each clip."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths


def usable_rows(features: np.ndarray) -> np.ndarray:
    """Returns [F] bool, False for frames [F, D] with a NaN, an Inf, or a value beyond float32."""
    if features.dtype != np.float64:
        return np.asarray(np.isfinite(features).all(axis=1))
    return np.asarray((np.abs(features) <= LARGEST).all(axis=1))  # a NaN compares as False


def feature_norms(features: np.ndarray, rows: int = 512) -> np.ndarray:
    """Returns [F] float32, the L2 norms of features [F, D], computed `rows` frames at a time.

    Face nets give blurred faces and side views short vectors, so the norm measures quality.

    Source: iQIYI-VID paper, section 5.1, after Ranjan et al.
    """
    norms = np.empty(len(features), np.float32)
    for start in range(0, len(features), rows):
        block = features[start : start + rows].astype(np.float64, order="C")  # squares stay finite
        length = np.sqrt(np.einsum("fd,fd->f", block, block))
        norms[start : start + rows] = np.minimum(length, LARGEST)
    return norms


def counts(seen: np.ndarray, kept: np.ndarray, warnings: Mapping[str, int]) -> dict[str, Any]:
    """Returns the COUNTS of `PackedClips`; clips [N] have `seen` frames in the file, `kept` now."""
    without = {"empty": seen == 0, "non_finite": (seen > 0) & (kept == 0)}
    dropped = int(seen.sum() - kept.sum())
    return {
        "seen": int(seen.sum()),
        "skipped": {"non_finite": dropped} if dropped else {},
        "skipped_clips": {name: int(clips.sum()) for name, clips in without.items() if clips.any()},
        "warnings": dict(warnings),
    }


# Split -> modality -> its clips, as `pack` returns them.
Unpacked = Mapping[str, Mapping[str, PackedClips]]


class Origin(NamedTuple):
    """The origin of a dataset, as results name it: a key of `sources.DATASETS` and its folder.

    `dir` is an absolute path; None for generated clips and for arrays in memory.
    """

    name: str
    dir: str | None = None

    @classmethod
    def of_folder(cls, name: str, folder: str | Path | None) -> "Origin":
        """Returns the origin of a dataset; `folder` is None for a dataset without a folder."""
        return cls(name, str(files.absolute(folder)) if folder else None)


class RecordSource(Protocol):
    """Frames that can become records, and their labels.

    A dataset is one class of this kind and one line in `vidjax.data.sources.DATASETS`.
    """

    @property
    def kind(self) -> str:
        """Subfolder of the cache for its records."""
        ...

    @property
    def place(self) -> str:
        """Folder or name, for messages."""
        ...

    @property
    def title(self) -> str:
        """What is converted, for the log."""
        ...

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a JSON value that is different for any other content; it is the cache key."""
        ...

    def file_of(self, modality: str, split: str) -> Path:
        """Returns the file with a modality of a split, for messages and the report."""
        ...

    def read(self, scratch: Path, non_finite: NonFinite) -> Unpacked:
        """Reads all frames; those of one modality in a split have one width and dtype.

        Args:
          scratch: a folder for flat files; it must outlive the arrays.
          non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
            refuses them.
        """
        ...

    def truth(self, clips: Mapping[str, Collection[str]]) -> Mapping[str, Mapping[str, str]]:
        """Returns labelled split -> clip -> identity; `clips` is split -> names of its clips."""
        ...
