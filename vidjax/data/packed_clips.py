"""Holds the frames of clips in arrays without padding, clip after clip."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.data.frame_fields import FRAME_FIELDS, STORED, WEIGHTS


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
            dtype, shape = np.dtype(field.dtype), (self.num_frames,)
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
        and became 0}. FIELD is `quality` or `detection`.
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
