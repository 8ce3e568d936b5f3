"""Describes the clips of a split, draws and pads batches, and defines the interface of a dataset.

Evaluation reads clips through the protocol `ClipSource`. Three classes implement it: `Dataset`
(labelled clips), `Resident` (clips on the devices) and `MemoryClips` (clips in memory, without
labels). This module needs only numpy.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vidjax.core.batch import Batch, Frames
from vidjax.data.packed_clips import FRAME_FIELDS, PackedClips, Quality, Reader
from vidjax.utils.errors import UserError, suggest

SPLITS = ("train", "val", "test")
# In evaluation, clips of similar length form a bucket. These are the largest lengths per bucket.
# The length of a clip is its number of frames in its longest modality.
BUCKETS = (32, 128, 512)
MAX_EVAL_FRAMES = BUCKETS[-1]
# The clips of a modality are padded to the longest clip of the split, rounded up to one of these
# lengths. So audio with a vector per clip keeps T = 1, and similar splits share compiled programs.
PAD_LENGTHS = (1, 8, *BUCKETS)
# Processing this many padding frames is faster than compiling a program for another length.
MAX_EXTRA_FRAMES = 1 << 16


class Modality(NamedTuple):
    """The width and the dtype of the features of a modality."""

    dim: int  # the width D of a feature
    dtype: str  # the dtype on disk, such as 'float16'


@dataclass(frozen=True)
class Split:
    """The clips of a split and their labels."""

    name: str  # 'train', 'val' or 'test'
    clips: tuple[str, ...]  # N names in byte order; `clip_index` is the position in this tuple
    labels: np.ndarray  # [N] int32, the class 1..C of each clip, 0 if it shows no known identity
    labelled: bool  # False if the split has no ground truth
    # [C] int64, number of clips of each identity in the ground truth, with or without features
    positives: np.ndarray
    num_others: int  # number of identities in the ground truth that are not among the C classes
    lengths: Mapping[str, np.ndarray]  # modality -> [N] int32, the number of frames of each clip
    # Modality -> [N] float64, the mean quality of the frames of each clip, 0 without frames. Clips
    # without labels in memory have no such entry.
    quality: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    # [N] uint64, equal for clips with equal frames, and 0 for clips that are no copies. Clips
    # without labels in memory have none.
    fingerprints: np.ndarray | None = None

    def find_copies(self, other: "Split") -> dict[int, int]:
        """Finds clips whose frames are equal to the frames of a clip of the split `other`.

        Returns a dict, index of a clip in this split -> index of the equal clip in `other`.
        """
        own, theirs = self.fingerprints, other.fingerprints
        if own is None or theirs is None:
            return {}
        clips = np.flatnonzero(np.isin(own, theirs) & (own > 0))
        order = np.argsort(theirs, kind="stable")
        places = order[np.searchsorted(theirs, own[clips], sorter=order)]
        return dict(zip(clips.tolist(), places.tolist(), strict=True))


class EvalPlan(NamedTuple):
    """The evaluated clips of a split, grouped by length, so that batches need little padding.

    Attributes:
      bucket: [N] int, the group of each clip: 0 for up to 32 frames, 1 for up to 128, and 2 for
        longer clips. The value is -1 for a clip that is left out.
      padded_lengths: modality -> the number of frames after padding, for each group.
    """

    split: str
    modalities: tuple[str, ...]
    bucket: np.ndarray
    padded_lengths: Mapping[str, tuple[int, ...]]


class BatchPlan(NamedTuple):
    """The settings that determine the clips and frames of each training batch."""

    # The training splits. `clip_index` numbers their clips from 0, split after split.
    splits: tuple[str, ...]
    batch_size: int  # B, the number of clips of a batch
    num_clips: int  # N, the number of clips of an epoch
    padded_lengths: Mapping[str, int]  # modality -> T, the number of frames of a padded clip
    # How a longer clip is cut to T frames. 'window' takes consecutive frames from a random start.
    # 'quality' takes the T frames of the best quality, in time order.
    crop: str
    # The modalities whose longer clips are cut to a random window -> [N] int32, the number of
    # frames of each clip in the training splits.
    windowed: Mapping[str, np.ndarray]
    seed: int  # the seed for the order of the clips and for random windows
    # [N] int32, the `clip_index` of each clip of an epoch. If it is None, an epoch has all clips,
    # and a batch may contain clips of two epochs. Otherwise, the last batch may have empty rows.
    epoch_clips: np.ndarray | None = None

    @property
    def num_places(self) -> int:
        """The number of rows in all batches of an epoch, with the empty rows of the last batch."""
        if self.epoch_clips is None:
            return self.num_clips
        return math.ceil(self.num_clips / self.batch_size) * self.batch_size

    def num_drawn(self, steps: int) -> int:
        """Returns the number of clips in the batches of the first `steps` steps."""
        epochs, place = divmod(steps * self.batch_size, self.num_places)
        return epochs * self.num_clips + min(place, self.num_clips)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities."""
        return tuple(self.padded_lengths)


class DrawnClips(NamedTuple):
    """The clips in the R rows of one or more training batches. A row is a clip, or empty."""

    clip_index: np.ndarray  # [R] int32, the number of each clip in the training splits
    batch_mask: np.ndarray  # [R] bool, False for empty rows of the last batch of an epoch
    # Modality of `BatchPlan.windowed` -> [R] int32, the first frame of the window of each clip. If
    # a clip is shorter than a window, the first frame is 0.
    first: Mapping[str, np.ndarray]


def draw_clips(plan: BatchPlan, step: int, count: int = 1) -> DrawnClips:
    """Draws the clips of `count` training steps, beginning with `step`.

    The result has count * B rows, where B is the batch size. Each clip comes once per epoch. A long
    clip may be cut to a window of consecutive frames. All windows are equally likely. The draw
    depends only on the seed and the number of the step, so a resumed run continues with the same
    clips. The order is the same for clips on the devices and on disk.
    """
    begin, end, size = step * plan.batch_size, (step + count) * plan.batch_size, plan.num_places
    parts = []
    for epoch in range(begin // size, -(-end // size)):
        drawn = _draw_epoch(plan.seed, epoch, plan.num_clips, size, len(plan.windowed))
        rows = slice(max(0, begin - epoch * size), end - epoch * size)
        parts.append([values[..., rows] for values in drawn])
    order, uniform = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    clip_index = order if plan.epoch_clips is None else plan.epoch_clips[order].astype(np.int32)
    first = {}
    for values, (name, lengths) in zip(uniform, plan.windowed.items(), strict=True):
        places = np.maximum(lengths[clip_index] - plan.padded_lengths[name], 0) + 1
        first[name] = (values * places).astype(np.int32)
    return DrawnClips(clip_index, order >= 0, first)


@functools.lru_cache(maxsize=2)  # a batch may contain clips of two epochs
def _draw_epoch(
    seed: int, epoch: int, num_clips: int, num_places: int, num_windows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a random order of the N clips of an epoch, and random numbers to cut long clips.

    The order is [num_places] int32: the numbers 0 to N - 1, shuffled, and then -1 for empty places.
    The random numbers are [num_windows, num_places] float64, uniform in [0, 1). `num_windows` is
    the number of modalities whose long clips are cut to a random window of consecutive frames.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(num_clips).astype(np.int32)
    order = np.pad(order, (0, num_places - num_clips), constant_values=-1)
    return order, rng.random((num_windows, num_places))


def split_blocks(bucket: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Divides N clips into blocks of up to `rows` clips of the same bucket (group of lengths).

    `bucket` [N] int is the bucket of each clip. Clips with a negative bucket are left out. Yields
    for each block its bucket and the positions of its n clips, [n] int.
    """
    for number in range(bucket.max(initial=-1) + 1):
        places = np.flatnonzero(bucket == number)
        for at in range(0, len(places), rows):
            yield number, places[at : at + rows]


class ClipSource(Protocol):
    """Clips, with or without labels, that a model can score."""

    @property
    def identities(self) -> tuple[str, ...]:
        """The names of the classes. Label c of a clip means `identities[c - 1]`."""
        ...

    def split(self, name: str) -> Split:
        """Returns the clips and labels of a split."""
        ...

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of `plan` once, in batches of `rows` clips of similar length.

        The last batch of each bucket (group of lengths) may have empty rows, where `batch_mask` is
        False. If a clip has more than 512 frames, the 512 frames of the best quality are taken, in
        time order. If two frames have equal quality, the earlier frame is preferred.
        """
        ...


class Origin(NamedTuple):
    """Where a dataset comes from: the fields `name`, `dir` and `quality` of `config.data`."""

    name: str  # such as 'iqiyi_vid'
    dir: str | None = None  # absolute; None if clips were generated or are arrays in memory
    quality: Quality = "given"


class DataSource(Protocol):
    """A dataset, with labels, in memory or in files."""

    kind: str  # the name of the cache folder for all datasets of this class
    place: str  # the folder or the name of the dataset, for messages

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the file of a modality in a split, for messages and the report."""
        ...

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> Mapping[str, Mapping[str, str]]:
        """Returns split -> clip -> identity. `clips` is split -> names of clips with features."""
        ...


class FileSource(DataSource, Protocol):
    """A dataset in files, which are converted to flat files in the cache.

    To add a dataset, write a class with these methods, and a line in `sources.DATASETS`.
    """

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a JSON value that changes if any frame of the dataset changes.

        The cache finds the converted files by this value.
        """
        ...

    def read(self, folder: Path) -> Mapping[str, PackedClips]:
        """Reads the dataset, writes its frames to files in `folder`, and returns split -> clips.

        The returned arrays are memory maps of the files, `SPLIT/MODALITY/FIELD.bin`. In a split,
        the features of a modality have one width and dtype.
        """
        ...


def select_modalities(names: Sequence[str], known: Mapping[str, Modality]) -> dict[str, int]:
    """Returns modality -> feature width for the modalities `names`.

    `known` has the modalities of the data. Raises UserError if a name is repeated, or is not in
    `known`.
    """
    _check_distinct("config.modalities", names)
    for name in names:
        if name not in known:
            words = name.split()
            separated = f"write --config.modalities={','.join(words)}"
            remedy = separated if len(words) > 1 else suggest(name, known)
            raise UserError(f"config.modalities: the data have no modality '{name}': {remedy}")
    return {name: known[name].dim for name in names}


def _check_distinct(field: str, names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise UserError(f"{field}={','.join(names)}: give one or more names, each only once")


def check_modalities(split: Split, modalities: Sequence[str]) -> None:
    """Raises UserError if a split lacks one of `modalities`, or if one of them is repeated."""
    _check_distinct("config.modalities", modalities)
    for name in modalities:
        if name not in split.lengths:
            remedy = suggest(name, split.lengths)
            raise UserError(
                f"split '{split.name}' has no features of '{name}'\nconfig.modalities: {remedy}"
            )


def longest(split: Split, modalities: Sequence[str]) -> np.ndarray:
    """Returns [N] int32, the number of frames of each clip in its longest modality."""
    check_modalities(split, modalities)
    return np.max([split.lengths[name] for name in modalities], axis=0)


def padded(longest: int, limit: int) -> int:
    """Returns the number of frames to which clips of up to `longest` frames are padded.

    It is `longest`, rounded up to 1, 8, 32, 128 or 512, but at most `limit`.
    """
    return min(limit, next((length for length in PAD_LENGTHS if length >= longest), limit))


def make_eval_plan(
    split: Split, modalities: Sequence[str], *, only: np.ndarray | None = None, join: bool = False
) -> EvalPlan:
    """Groups the clips of a split by the length of their longest modality, for evaluation.

    The padding of a modality depends on all clips of the split, even if `only` leaves some out.

    Args:
      split: the clips.
      modalities: the modalities that are evaluated.
      only: [N] bool, True for the clips to evaluate, by default all.
      join: True to join a group with the next longer group if this adds at most 65536 frames of
        padding. This saves the time to compile a program for the group. Models that score each
        frame separately lose more time with the padding, so use False for them.
    """
    lengths = longest(split, modalities)
    bucket = np.searchsorted(BUCKETS, np.minimum(lengths, MAX_EVAL_FRAMES))
    for shorter, longer in itertools.pairwise(np.unique(bucket)) if join else ():
        added = padded(int(lengths.max()), BUCKETS[longer]) - BUCKETS[shorter]
        if np.count_nonzero(bucket == shorter) * added <= MAX_EXTRA_FRAMES:
            bucket[bucket == shorter] = longer
    padded_lengths = {
        name: tuple(padded(int(split.lengths[name].max()), limit) for limit in BUCKETS)
        for name in modalities
    }
    bucket = bucket if only is None else np.where(only, bucket, -1)
    return EvalPlan(split.name, tuple(modalities), bucket, padded_lengths)


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
    """Plans the training batches. For arguments that are not explained here, see BatchPlan.

    `splits` are the training splits. A modality is padded to the length of its longest clip,
    rounded up by the function `padded`, but to at most `max_frames` frames.
    """
    names = tuple(split.name for split in splits)
    _check_distinct("config.data.train_splits", names)
    for split in splits:
        check_modalities(split, modalities)
    lengths = {
        name: np.concatenate([split.lengths[name] for split in splits]) for name in modalities
    }
    padded_lengths = {name: padded(int(x.max()), max_frames) for name, x in lengths.items()}
    longer = {name: x for name, x in lengths.items() if x.max() > padded_lengths[name]}
    return BatchPlan(
        splits=names,
        batch_size=batch_size,
        num_clips=sum(len(split.clips) for split in splits)
        if epoch_clips is None
        else len(epoch_clips),
        padded_lengths=padded_lengths,
        crop=crop,
        windowed=longer if crop == "window" else {},
        seed=seed,
        epoch_clips=epoch_clips,
    )


def count_cropped(
    splits: Sequence[Split], modalities: Sequence[str], max_frames: int
) -> dict[str, dict[str, int]]:
    """Counts the clips that are longer than `max_frames`, and the frames that they lose.

    Returns modality -> {"clips": number of these clips, "frames": number of lost frames}.
    """
    counts = {}
    for name in modalities:
        lengths = np.concatenate([split.lengths[name] for split in splits])
        lost = np.maximum(lengths.astype(np.int64) - max_frames, 0)
        counts[name] = {"clips": int((lost > 0).sum()), "frames": int(lost.sum())}
    return counts


def choose_best_frames(quality: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the `count` frames of the highest quality, in ascending order.

    `quality` is [T], with T >= `count`. A NaN counts as the lowest quality. If two frames have
    equal quality, the earlier frame is preferred.
    """
    ordered = np.where(np.isnan(quality), -np.inf, quality)
    return np.sort(np.argsort(-ordered, kind="stable")[:count])


def make_batch(frames: Mapping[str, Frames], clip_index: np.ndarray, rows: int) -> Batch:
    """Returns a batch of `rows` rows: first the clips `clip_index` [n] int32, then empty rows."""
    count = len(clip_index)
    return Batch(frames, np.pad(clip_index, (0, rows - count)), np.arange(rows) < count)


def pad(
    frames: Mapping[str, Sequence[np.ndarray]],
    shape: tuple[int, int],
    modality: Modality,
    first: np.ndarray | None = None,
) -> Frames:
    """Returns the frames of up to B clips as arrays [B, T] or [B, T, D], padded with zeros.

    Args:
      frames: field -> a list of arrays, one per clip: `features` [t, D], other fields [t].
      shape: (B, T).
      modality: the width and the dtype of the features.
      first: [B] int, the first frame to take from longer clips, or None: see `choose_frames`.
    """
    size = shape[1]
    mask = np.zeros(shape, bool)
    padded = {"features": np.zeros((*shape, modality.dim), modality.dtype)}
    padded |= {name: np.zeros(shape, field.dtype) for name, field in FRAME_FIELDS.items()}
    for row, chosen in enumerate(choose_frames(frames["quality"], size, first)):
        count = min(len(frames["quality"][row]), size)
        mask[row, :count] = True
        for field, values in frames.items():
            padded[field][row, :count] = values[row][chosen]
    return Frames(mask=mask, **padded)


def choose_frames(
    quality: Sequence[np.ndarray], size: int, first: np.ndarray | None = None
) -> Iterator[slice | np.ndarray]:
    """Yields, for each of n clips, a slice or the positions of the frames that a batch contains.

    A batch has room for `size` frames per clip. `quality` is a list of n arrays, [t]. A clip with
    more than `size` frames is cut. If `first` is None, it keeps the frames of the highest quality,
    in time order. Otherwise, it keeps consecutive frames, beginning with frame `first` [n] int.
    """
    for row, values in enumerate(quality):
        if len(values) <= size:
            yield slice(None)
        elif first is None:
            yield choose_best_frames(values, size)
        else:
            yield slice(first[row], first[row] + size)


def eval_batches(
    reader: Reader, modalities: Mapping[str, Modality], plan: EvalPlan, rows: int
) -> Iterator[Batch]:
    """Yields each clip of `plan` once, in batches of `rows` clips. See `ClipSource`."""
    # Batches are sorted by their last clip, so that files are read roughly in order.
    blocks = sorted(split_blocks(plan.bucket[reader.order], rows), key=lambda block: block[1][-1])
    for bucket, places in blocks:
        clips = reader.order[places]
        frames = {
            name: pad(arrays, (rows, plan.padded_lengths[name][bucket]), modalities[name])
            for name, arrays in reader.read(clips, plan.modalities).items()
        }
        yield make_batch(frames, clips, rows)
