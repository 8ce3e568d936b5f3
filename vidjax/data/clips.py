"""The clips of a split, and how they are cut into blocks to be evaluated: no TensorFlow here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BUCKETS = (32, 128, 512)  # frames of the longest configured modality, in evaluation
MAX_EVAL_FRAMES = BUCKETS[-1]
# A modality is never padded beyond its longest clip of the split, rounded up to one of these: one
# audio vector a clip stays one, and splits of similar clips share their compiled programs.
SIZES = (1, 8, *BUCKETS)


@dataclass(frozen=True)
class Split:
    """The clips of one split and what the ground truth says of them.

    Attributes:
      name: 'train', 'val' or 'test'.
      clips: clip names in byte order; clip_index is the position here.
      labels: [N] int32, column 1..C, or 0 for a distractor or an unlabelled clip.
      labelled: False when the split has no ground truth at all.
      positives: [C] int64, ground-truth clips of each identity, in the records or not.
      num_others: identities of the ground truth that have no column.
      lengths: modality -> [N] int32 frames.
    """

    name: str
    clips: tuple[str, ...]
    labels: np.ndarray
    labelled: bool
    positives: np.ndarray
    num_others: int
    lengths: dict[str, np.ndarray]


class Blocks(NamedTuple):
    """How a split is cut into blocks of clips of similar length.

    Attributes:
      bucket: [N] int, which of the BUCKETS a clip is evaluated in; -1 for none.
      sizes: modality -> T of each bucket.
    """

    bucket: np.ndarray
    sizes: dict[str, tuple[int, ...]]


def longest(split: Split, modalities: Sequence[str]) -> np.ndarray:
    """Returns [N] int32, the frames of each clip in whichever of the modalities has most."""
    return np.max([split.lengths[name] for name in modalities], axis=0)


def padded(longest: int, limit: int) -> int:
    """Returns T for clips of up to `longest` frames: the least of SIZES, but at most `limit`."""
    return min(limit, next((size for size in SIZES if size >= longest), limit))


def make_blocks(
    split: Split,
    modalities: Sequence[str],
    lengths: np.ndarray | None = None,
    only: np.ndarray | None = None,
) -> Blocks:
    """Returns which clips are evaluated together.

    Args:
      split: the clips.
      modalities: those in use.
      lengths: [N] int, what chooses the bucket of each clip; None for `longest`.
      only: [N] bool, the clips that are evaluated; None for all.

    Raises:
      ValueError: lengths or only not one a clip; a clip with more frames than `lengths` says.
    """
    most = longest(split, modalities)
    lengths = most if lengths is None else np.asarray(lengths)
    wanted = np.ones(most.shape, bool) if only is None else np.asarray(only)
    if wanted.shape != most.shape or wanted.dtype != bool:
        raise ValueError(
            f"only: got {wanted.dtype} {wanted.shape}, wanted bool for {len(most)} clips"
        )
    if lengths.shape != most.shape:
        raise ValueError(f"lengths: got {lengths.shape}, wanted one for {len(most)} clips")
    if (lengths < most).any():
        clip = int(np.argmax(lengths < most))
        raise ValueError(
            f"lengths: clip {split.clips[clip]} has {most[clip]} frames, not {lengths[clip]}"
        )
    bucket = np.searchsorted(BUCKETS, np.minimum(lengths, MAX_EVAL_FRAMES))
    sizes = {
        name: tuple(padded(int(split.lengths[name].max()), size) for size in BUCKETS)
        for name in modalities
    }
    return Blocks(np.where(wanted, bucket, -1), sizes)


def best_frames(quality: np.ndarray, size: int) -> np.ndarray:
    """Returns [size] places of the best frames of a clip, in time order; of equals the earlier.

    Args:
      quality: [T]; what is not a number is the lowest.
      size: how many, at most T.
    """
    ordered = np.where(np.isnan(quality), -np.inf, quality)
    return np.sort(np.argsort(-ordered, kind="stable")[:size])
