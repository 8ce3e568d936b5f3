"""Clips as padded batches: of records and of clips in memory."""

from collections.abc import Mapping, Sequence

import numpy as np

from vidjax.batch import BATCHED, Batch, Frames
from vidjax.data.clips import Modality, best_frames
from vidjax.data.frame_fields import FRAME_FIELDS


def batch_of(frames: Mapping[str, Frames], clip_index: np.ndarray, rows: int) -> Batch:
    """Returns a batch of `rows` rows, of which the first are the clips of `clip_index`."""
    count = len(clip_index)
    return Batch(frames, np.pad(clip_index, (0, rows - count)), np.arange(rows) < count)


def pad(
    frames: Mapping[str, Sequence[np.ndarray]], shape: tuple[int, int], modality: Modality
) -> Frames:
    """Returns Frames [B, T] = `shape`; a clip of more than T frames gives its best T by quality.

    `frames` are field -> the frames of each of n <= B clips, [t] or [t, D]. Padding is 0.
    """
    size = shape[1]
    mask = np.zeros(shape, bool)
    padded = {"features": np.zeros((*shape, modality.dim), modality.dtype)}
    padded |= {f: np.zeros(shape, FRAME_FIELDS[f].dtype) for f in BATCHED if f != "features"}
    for row, quality in enumerate(frames["quality"]):
        count = len(quality)
        chosen = best_frames(quality, size) if count > size else slice(None)
        mask[row, :count] = True
        for field, values in frames.items():
            padded[field][row, :count] = values[row][chosen]
    return Frames(mask=mask, **padded)
