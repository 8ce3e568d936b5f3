"""The clips of a split, plans of their batches, and the protocols that sources of clips follow.

Numpy only. The sources are `Dataset` (records on disk), `Resident` (arrays on the devices) and
`MemoryClips` (arrays in memory). Training and evaluation know them by these protocols alone.
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
# A modality is never padded beyond its longest clip of the split, rounded up to one of these:
# audio with one vector per clip keeps T = 1, and splits of similar clips share compiled programs.
PAD_LENGTHS = (1, 8, *BUCKETS)
# Frames of padding that take less time than to compile what evaluates clips of another length.
FEW_FRAMES = 1 << 16


class Modality(NamedTuple):
    """Feature width D and name of the stored dtype, such as 'float16', of one modality."""

    dim: int
    dtype: str


@dataclass(frozen=True)
class Split:
    """The clips of one split and their labels.

    Attributes:
      name: 'train', 'val' or 'test'.
      clips: N clip names in byte order; `clip_index` is a position in this tuple.
      labels: [N] int32, class column 1..C, or 0 for a distractor or an unlabelled clip.
      labelled: False when the split has no ground truth at all.
      positives: [C] int64, number of clips that the ground truth lists for each identity, including
        clips without a record.
      num_others: number of identities in the ground truth that have no column.
      lengths: modality -> [N] int32, number of frames of each clip; only the modalities that the
        split has features of.
    """

    name: str
    clips: tuple[str, ...]
    labels: np.ndarray
    labelled: bool
    positives: np.ndarray
    num_others: int
    lengths: Mapping[str, np.ndarray]


class EvalPlan(NamedTuple):
    """The clips of one split that are evaluated, grouped by length.

    Attributes:
      bucket: [N] int, index into BUCKETS for each clip; -1 for a clip that is left out.
      padded_lengths: modality -> T of each bucket in BUCKETS.
    """

    split: str
    modalities: tuple[str, ...]
    bucket: np.ndarray
    padded_lengths: Mapping[str, tuple[int, ...]]


class BatchPlan(NamedTuple):
    """How clips form the batches of training, whether streamed or resident on the devices.

    Attributes:
      splits: names of the training splits; `clip_index` numbers the clips of all, split by split.
      batch_size: B.
      num_clips: N, the clips of an epoch.
      padded_lengths: modality -> T.
      longer: modalities in which some clip has more than T frames.
      crop: how a longer clip is cut to T frames: 'window' takes consecutive frames from a random
        start, 'quality' the best T frames in time order.
      seed: seed of the order of clips and of the windows.
      examples: [N] int32, the `clip_index` of the clips of an epoch, whose last batch is short;
        None: an epoch has all clips, and batches go on over its end.
    """

    splits: tuple[str, ...]
    batch_size: int
    num_clips: int
    padded_lengths: Mapping[str, int]
    longer: tuple[str, ...]
    crop: str
    seed: int
    examples: np.ndarray | None = None

    @property
    def num_places(self) -> int:
        """Rows of all batches of an epoch: N, and the empty rows of a short batch."""
        if self.examples is None:
            return self.num_clips
        return math.ceil(self.num_clips / self.batch_size) * self.batch_size

    def num_drawn(self, steps: int) -> int:
        """Returns the number of clips in the batches of the first `steps` steps."""
        epochs, place = divmod(steps * self.batch_size, self.num_places)
        return epochs * self.num_clips + min(place, self.num_clips)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that are read."""
        return tuple(self.padded_lengths)

    @property
    def windowed(self) -> tuple[str, ...]:
        """The modalities whose longer clips are cut to a random window."""
        return self.longer if self.crop == "window" else ()


def blocks_of(bucket: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (bucket number, [n] int indices into `bucket`) of the blocks of 1 <= n <= rows clips.

    `bucket` [N] int has the bucket of each clip, -1 for a clip that is left out.
    """
    for number in range(bucket.max(initial=-1) + 1):
        places = np.flatnonzero(bucket == number)
        for at in range(0, len(places), rows):
            yield number, places[at : at + rows]


class ClipSource(Protocol):
    """Clips, labelled or not, that can be scored and evaluated."""

    @property
    def identities(self) -> tuple[str, ...]:
        """Names of the class columns: column c is `identities[c - 1]`."""
        ...

    def split(self, name: str) -> Split:
        """Returns one split; ValueError for an unknown name."""
        ...

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks of `rows` rows from one bucket.

        The last block of a bucket is filled up with rows of batch_mask False. A clip of more than
        512 frames gives its best 512 by quality, in time order; where quality ties, the earlier
        frame is better. T depends on the plan alone, never on `rows`.
        """
        ...


class TrainingData(ClipSource, Protocol):
    """Labelled clips that can be trained on."""

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """Modality -> width and stored dtype of its features."""
        ...

    @property
    def report(self) -> Mapping[str, Any]:
        """Counts of loaded and skipped frames and clips, and of labels: `data_report.json`."""
        ...

    def with_identities(self, identities: Sequence[str]) -> Self:
        """Returns the same clips, labelled for other class columns."""
        ...

    def order(self, split: str) -> np.ndarray:
        """Returns [N] int32, the clip indices of a split in the order in which clips are stored."""
        ...

    def train_batches(self, plan: BatchPlan, *, step: int = 0) -> Iterator[Batch]:
        """Yields the batches of the steps from `step` on, with the clips of `order.draw`.

        Rows of batch_mask False have no frames.
        """
        ...

    def packed(
        self, split: str, modalities: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, Mapping[str, Packed]]]:
        """Yields every clip of a split once, with all its frames, in chunks of n clips.

        A chunk is a pair: clip_index [n] int32, and modality -> Packed of these n clips.
        """
        ...


def select_modalities(names: Sequence[str], known: Mapping[str, Modality]) -> dict[str, int]:
    """Returns name -> feature width; ValueError for no name, a name twice or one not in `known`."""
    _check_once(names)
    for name in names:
        if name not in known:
            raise UserError(
                f"config.modalities: the data has no modality '{name}'; {suggest(name, known)}"
            )
    return {name: known[name].dim for name in names}


def _check_once(names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise UserError(f"config.modalities={','.join(names)}: name one or more, each once")


def check_modalities(split: Split, modalities: Sequence[str]) -> None:
    """Raises ValueError for no name, a name given twice, or a modality that a split lacks."""
    _check_once(modalities)
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
    """Returns T: the least of PAD_LENGTHS that is `longest` or more, but at most `limit`."""
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

    The padding of a modality depends on the whole split, not on `only`: a clip is padded alike
    whichever other clips are evaluated.

    Args:
      lengths: [N] int, number of frames by which each clip's bucket is chosen, at least and by
        default `longest(split, modalities)`. With it, other sources of the clips form equal blocks.
      only: [N] bool, True for the clips to evaluate; None for all.
      join: True to let clips join longer ones where that adds at most FEW_FRAMES of padding, so
        that one program evaluates a small split. It does not help models that judge every frame by
        itself: a block takes as long as its longest clip.
    """
    most = longest(split, modalities)
    lengths = most if lengths is None else np.asarray(lengths)
    wanted = np.ones(most.shape, bool) if only is None else np.asarray(only)
    bucket = np.searchsorted(BUCKETS, np.minimum(lengths, MAX_EVAL_FRAMES))
    for shorter, longer in itertools.pairwise(np.unique(bucket)) if join else ():
        added = padded(int(lengths.max()), BUCKETS[longer]) - BUCKETS[shorter]
        if np.count_nonzero(bucket == shorter) * added <= FEW_FRAMES:
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
    examples: np.ndarray | None = None,
) -> BatchPlan:
    """Plans the batches of training.

    Args:
      splits: the training splits; `clip_index` numbers the clips of all, split by split.
      batch_size: B; may exceed the number of clips.
      max_frames: T of a modality with longer clips; T of others is their longest clip, rounded up.
      crop, examples: see BatchPlan.
      seed: seed of the order of clips and of the windows.
    """
    names = tuple(split.name for split in splits)
    if not names or len(set(names)) < len(names):
        raise UserError(f"config.data.train_splits={','.join(names)}: name one or more, each once")
    if batch_size < 1 or max_frames < 1:
        raise UserError(
            f"config.batch_size={batch_size} and config.data.max_frames={max_frames} "
            "must be 1 or more"
        )
    for split in splits:
        check_modalities(split, modalities)
    most = {name: max(int(split.lengths[name].max()) for split in splits) for name in modalities}
    padded_lengths = {name: padded(most[name], max_frames) for name in modalities}
    return BatchPlan(
        splits=names,
        batch_size=batch_size,
        num_clips=sum(len(split.clips) for split in splits) if examples is None else len(examples),
        padded_lengths=padded_lengths,
        longer=tuple(name for name in modalities if most[name] > padded_lengths[name]),
        crop=crop,
        seed=seed,
        examples=examples,
    )


def num_cropped(
    splits: Sequence[Split], modalities: Sequence[str], max_frames: int
) -> dict[str, dict[str, int]]:
    """Returns modality -> number of `clips` over `max_frames`, and of their `frames` beyond it."""
    for split in splits:
        check_modalities(split, modalities)
    counts = {}
    for name in modalities:
        lengths = np.concatenate([split.lengths[name] for split in splits])
        lost = np.maximum(lengths.astype(np.int64) - max_frames, 0)
        counts[name] = {"clips": int((lost > 0).sum()), "frames": int(lost.sum())}
    return counts


def best_frames(quality: np.ndarray, count: int) -> np.ndarray:
    """Returns [count] int, positions of a clip's best frames by quality [T], in time order.

    NaN counts as the lowest quality. Where quality ties, the earlier frame is better.
    """
    ordered = np.where(np.isnan(quality), -np.inf, quality)
    return np.sort(np.argsort(-ordered, kind="stable")[:count])


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
