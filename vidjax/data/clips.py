"""The clips of a split, the plans of their batches, and the protocols of sources of clips.

The sources are `Dataset` (records on disk), `Resident` (arrays on the devices) and `MemoryClips`
(arrays in memory). Training and evaluation use only these protocols. This module needs only numpy.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from vidjax.core.batch import BATCHED, Batch, Frames, Packed
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.utils.errors import UserError, closest, suggest

SPLITS = ("train", "val", "test")
BUCKETS = (32, 128, 512)  # frames of the longest configured modality, in evaluation
MAX_EVAL_FRAMES = BUCKETS[-1]
# A modality is padded at most to its longest clip of the split, rounded up to any of these lengths:
# audio with a vector per clip keeps T = 1, and splits of similar clips share compiled programs.
PAD_LENGTHS = (1, 8, *BUCKETS)
# Computing this many frames of padding is faster than compiling a program for another length.
MAX_EXTRA_FRAMES = 1 << 16


class Modality(NamedTuple):
    """The feature width D of a modality, and the name of its stored dtype, such as 'float16'."""

    dim: int
    dtype: str


@dataclass(frozen=True)
class Split:
    """The clips of a split and their labels.

    Attributes:
      name: 'train', 'val' or 'test'.
      clips: N clip names in byte order; `clip_index` is a position in this tuple.
      labels: [N] int32, class column 1..C, or 0 for a distractor or an unlabelled clip.
      labelled: False if the split has no ground truth.
      positives: [C] int64, number of clips that the ground truth lists for each identity. Clips
        without features count, too.
      num_others: number of identities in the ground truth that have no column.
      lengths: modality -> [N] int32, number of frames of each clip, for the modalities of the
        split.
    """

    name: str
    clips: tuple[str, ...]
    labels: np.ndarray
    labelled: bool
    positives: np.ndarray
    num_others: int
    lengths: Mapping[str, np.ndarray]


class EvalPlan(NamedTuple):
    """The evaluated clips of a split, grouped by length.

    Attributes:
      bucket: [N] int, index into BUCKETS for each clip, or -1 for a clip that is left out.
      padded_lengths: modality -> T of each bucket in BUCKETS.
    """

    split: str
    modalities: tuple[str, ...]
    bucket: np.ndarray
    padded_lengths: Mapping[str, tuple[int, ...]]


class BatchPlan(NamedTuple):
    """How clips form training batches. Streaming and resident data share the plan.

    Attributes:
      splits: names of the training splits; `clip_index` counts through their clips, in order.
      batch_size: B.
      num_clips: N, the number of clips of an epoch.
      padded_lengths: modality -> T.
      longer: modalities in which some clip has more than T frames.
      crop: how a longer clip is cut to T frames: 'window' takes consecutive frames from a random
        start, 'quality' takes the best T frames in time order.
      seed: seed of the order of clips and of the windows.
      epoch_clips: [N] int32, the `clip_index` of each clip of an epoch. The last batch of an epoch
        may be short. If it is None, an epoch has all clips, and a batch may span two epochs.
    """

    splits: tuple[str, ...]
    batch_size: int
    num_clips: int
    padded_lengths: Mapping[str, int]
    longer: tuple[str, ...]
    crop: str
    seed: int
    epoch_clips: np.ndarray | None = None

    @property
    def num_places(self) -> int:
        """The number of rows of an epoch: N plus the empty rows of the short batch."""
        if self.epoch_clips is None:
            return self.num_clips
        return math.ceil(self.num_clips / self.batch_size) * self.batch_size

    def num_drawn(self, steps: int) -> int:
        """Returns the number of clips in the batches of the first `steps` steps."""
        epochs, place = divmod(steps * self.batch_size, self.num_places)
        return epochs * self.num_clips + min(place, self.num_clips)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in order."""
        return tuple(self.padded_lengths)

    @property
    def windowed(self) -> tuple[str, ...]:
        """The modalities whose longer clips are cut to a random window."""
        return self.longer if self.crop == "window" else ()


def split_blocks(bucket: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Splits the clips of each bucket into blocks of at most `rows` clips.

    Args:
      bucket: [N] int, the bucket of each clip, or -1 for a clip that is left out.
      rows: maximum number of clips in a block.

    Yields:
      The number of the bucket, and [n] int, the positions of the n clips of the block in `bucket`.
    """
    for number in range(bucket.max(initial=-1) + 1):
        places = np.flatnonzero(bucket == number)
        for at in range(0, len(places), rows):
            yield number, places[at : at + rows]


class ClipSource(Protocol):
    """Clips, with or without labels, that can be scored and evaluated."""

    @property
    def identities(self) -> tuple[str, ...]:
        """Names of the class columns: column c is `identities[c - 1]`."""
        ...

    def split(self, name: str) -> Split:
        """Returns a split. Raises UserError if no split has this name."""
        ...

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks of `rows` rows from the same bucket.

        The last block of a bucket is filled up with rows whose batch_mask is False. From a clip of
        more than 512 frames, the best 512 by quality are taken, in time order. Among frames of
        equal quality, the earlier frame is preferred. T depends only on the plan, not on `rows`.
        """
        ...


class TrainingData(ClipSource, Protocol):
    """Labelled clips for training."""

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """Modality -> the width and the stored dtype of its features."""
        ...

    @property
    def report(self) -> Mapping[str, Any]:
        """The content of `data_report.json`: counts of frames, clips and labels."""
        ...

    def with_identities(self, identities: Sequence[str]) -> Self:
        """Returns the same clips with labels for the class columns `identities`."""
        ...

    def order(self, split: str) -> np.ndarray:
        """Returns [N] int32, the clip indices of a split in the order of the stored clips."""
        ...

    def train_batches(self, plan: BatchPlan, *, step: int = 0) -> Iterator[Batch]:
        """Yields the batches from `step` on, with the clips that `order.draw_batch_clips` returns.

        Rows whose batch_mask is False have no frames.
        """
        ...

    def packed(
        self, split: str, modalities: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, Mapping[str, Packed]]]:
        """Yields every clip of a split once, with all frames, in chunks.

        Yields:
          clip_index [n] int32 of the n clips of a chunk, and modality -> Packed.
        """
        ...


def select_modalities(names: Sequence[str], known: Mapping[str, Modality]) -> dict[str, int]:
    """Returns name -> feature width of the chosen modalities.

    Raises:
      UserError: `names` is empty, has a name twice, or has a name that is not in `known`.
    """
    _check_distinct(names)
    for name in names:
        if name not in known:
            raise UserError(
                f"config.modalities: the data has no modality '{name}'; {suggest(name, known)}"
            )
    return {name: known[name].dim for name in names}


def _check_distinct(names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise UserError(f"config.modalities={','.join(names)}: name at least one, each only once")


def check_modalities(split: Split, modalities: Sequence[str]) -> None:
    """Raises UserError if `modalities` is empty, or has a name twice or a name not in `split`."""
    _check_distinct(modalities)
    for name in modalities:
        if name not in split.lengths:
            close = closest(name, split.lengths)
            hint = f"; did you mean '{close}'?" if close else ""
            raise UserError(
                f"split '{split.name}' has no features of '{name}'{hint}\n"
                f"choose among {', '.join(split.lengths)} with config.modalities"
            )


def longest(split: Split, modalities: Sequence[str]) -> np.ndarray:
    """Returns [N] int32, the number of frames of each clip in its longest modality."""
    check_modalities(split, modalities)
    return np.max([split.lengths[name] for name in modalities], axis=0)


def padded(longest: int, limit: int) -> int:
    """Returns T: `longest` rounded up to a length of PAD_LENGTHS, but at most `limit`."""
    return min(limit, next((length for length in PAD_LENGTHS if length >= longest), limit))


def make_eval_plan(
    split: Split,
    modalities: Sequence[str],
    *,
    lengths: np.ndarray | None = None,
    only: np.ndarray | None = None,
    join: bool = False,
) -> EvalPlan:
    """Groups the clips of a split by length for evaluation.

    The padding of a modality depends on the whole split, so it is the same for every `only`.

    Args:
      lengths: [N] int, the number of frames that decides the bucket of each clip; at least
        `longest(split, modalities)`, which is the default. Two sources of the same clips form equal
        blocks if they get equal `lengths`.
      only: [N] bool, True for the clips to evaluate; None: all clips.
      join: True to evaluate short clips together with longer clips if that adds at most
        MAX_EXTRA_FRAMES of padding, so that a small split needs only a single compiled program.
        Joining does not help models of single frames: their time grows with the padding.
    """
    num_frames = longest(split, modalities)
    lengths = num_frames if lengths is None else np.asarray(lengths)
    wanted = np.ones(num_frames.shape, bool) if only is None else np.asarray(only)
    bucket = np.searchsorted(BUCKETS, np.minimum(lengths, MAX_EVAL_FRAMES))
    for shorter, longer in itertools.pairwise(np.unique(bucket)) if join else ():
        added = padded(int(lengths.max()), BUCKETS[longer]) - BUCKETS[shorter]
        if np.count_nonzero(bucket == shorter) * added <= MAX_EXTRA_FRAMES:
            bucket[bucket == shorter] = longer
    padded_lengths = {
        name: tuple(padded(int(split.lengths[name].max()), limit) for limit in BUCKETS)
        for name in modalities
    }
    return EvalPlan(split.name, tuple(modalities), np.where(wanted, bucket, -1), padded_lengths)


def make_batch_plan(
    splits: Sequence[Split],
    modalities: Sequence[str],
    *,
    batch_size: int,
    max_frames: int,
    crop: str,
    seed: int,
    epoch_clips: np.ndarray | None = None,
) -> BatchPlan:
    """Plans the batches of training.

    Args:
      splits: the training splits; `clip_index` counts through their clips, in order.
      batch_size: B; may exceed the number of clips.
      max_frames: the largest T. If all clips of a modality are shorter, T is the length of the
        longest clip, rounded up.
      crop, epoch_clips: see BatchPlan.
      seed: seed of the order of clips and of the windows.
    """
    names = tuple(split.name for split in splits)
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"config.data.train_splits={','.join(names)}: name at least one, each only once"
        )
    if batch_size < 1 or max_frames < 1:
        raise UserError(
            f"config.batch_size={batch_size} and config.data.max_frames={max_frames} "
            "must be 1 or more"
        )
    for split in splits:
        check_modalities(split, modalities)
    longest_clip = {
        name: max(int(split.lengths[name].max()) for split in splits) for name in modalities
    }
    padded_lengths = {name: padded(longest_clip[name], max_frames) for name in modalities}
    return BatchPlan(
        splits=names,
        batch_size=batch_size,
        num_clips=sum(len(split.clips) for split in splits)
        if epoch_clips is None
        else len(epoch_clips),
        padded_lengths=padded_lengths,
        longer=tuple(name for name in modalities if longest_clip[name] > padded_lengths[name]),
        crop=crop,
        seed=seed,
        epoch_clips=epoch_clips,
    )


def count_cropped(
    splits: Sequence[Split], modalities: Sequence[str], max_frames: int
) -> dict[str, dict[str, int]]:
    """Counts what `max_frames` cuts off.

    Returns:
      modality -> the number of `clips` with more than `max_frames` frames, and of the `frames` that
      exceed it.
    """
    for split in splits:
        check_modalities(split, modalities)
    counts = {}
    for name in modalities:
        lengths = np.concatenate([split.lengths[name] for split in splits])
        lost = np.maximum(lengths.astype(np.int64) - max_frames, 0)
        counts[name] = {"clips": int((lost > 0).sum()), "frames": int(lost.sum())}
    return counts


def choose_best_frames(quality: np.ndarray, count: int) -> np.ndarray:
    """Returns [count] int, the positions of the frames of the best `quality` [T], in time order.

    NaN counts as the lowest quality. Among frames of equal quality, the earlier is preferred.
    """
    ordered = np.where(np.isnan(quality), -np.inf, quality)
    return np.sort(np.argsort(-ordered, kind="stable")[:count])


def make_batch(frames: Mapping[str, Frames], clip_index: np.ndarray, rows: int) -> Batch:
    """Returns a batch of `rows` rows: first the clips of `clip_index`, then empty rows."""
    count = len(clip_index)
    return Batch(frames, np.pad(clip_index, (0, rows - count)), np.arange(rows) < count)


def pad(
    frames: Mapping[str, Sequence[np.ndarray]], shape: tuple[int, int], modality: Modality
) -> Frames:
    """Pads clips with 0 to Frames [B, T]; a clip of more than T frames keeps its best by quality.

    Args:
      frames: field -> the values of each of n <= B clips, [t] or [t, D].
      shape: (B, T).
      modality: the width and the dtype of the features.
    """
    size = shape[1]
    mask = np.zeros(shape, bool)
    padded = {"features": np.zeros((*shape, modality.dim), modality.dtype)}
    padded |= {f: np.zeros(shape, FRAME_FIELDS[f].dtype) for f in BATCHED if f != "features"}
    for row, quality in enumerate(frames["quality"]):
        count = len(quality)
        chosen = choose_best_frames(quality, size) if count > size else slice(None)
        mask[row, :count] = True
        for field, values in frames.items():
            padded[field][row, :count] = values[row][chosen]
    return Frames(mask=mask, **padded)
