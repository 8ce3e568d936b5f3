"""A part of the clips of a split, for a process that ranks some of them as parts of the whole."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vidjax.cluster.share import WHOLE, Share
from vidjax.data.clips import BUCKETS, ClipSource, EvalPlan, Split, TrainingData, make_eval_plan
from vidjax.errors import UserError

if TYPE_CHECKING:
    from vidjax.batch import Batch


def bounds(costs: np.ndarray, count: int) -> np.ndarray:
    """Returns [count + 1] int, where each of `count` ranges of about equal cost begins and ends.

    Args:
      costs: [N] int above 0, N at least `count`; no range is empty.
      count: number of ranges.
    """
    ends = np.cumsum(costs, dtype=np.int64)
    number = np.arange(count + 1)
    # In whole numbers, so that all processes find the same.
    wanted = [int(ends[-1]) * i // count for i in range(count + 1)]
    found = np.searchsorted(ends, wanted)
    found[-1] = len(costs)
    found = np.maximum.accumulate(found - number) + number
    return np.minimum(found, len(costs) - count + number)


def choose(
    data: TrainingData, split: str, modalities: Sequence[str], number: int, count: int
) -> np.ndarray:
    """Returns [n] int32, the clips of part `number` of `count` of a split, in ascending order.

    A part is a range of the records: it reads the files that its range lies in and no other one,
    and at most two of them are read by other parts, too. Strided parts would each read all files.
    The ranges cost about the same: the cost of a clip is the number of frames to which evaluation
    pads it, because all rows of a block take the time of its longest one.

    Args:
      data: the clips.
      split: name of the split.
      modalities: the modalities to read.
      number: from 1 to `count`.
      count: number of parts.

    Raises:
      ValueError: there are more parts than clips.
    """
    num_clips = len(data.split(split).clips)
    if count > num_clips:
        raise UserError(
            f"--shard={number}/{count}: {split} has {num_clips:,} clips, and a part needs one\n"
            f"--shard=k/{num_clips} is the most"
        )
    plan, order = make_eval_plan(data.split(split), modalities), data.order(split)
    ends = bounds(np.array(BUCKETS)[plan.bucket[order]], count)
    return np.sort(order[ends[number - 1] : ends[number]])


class Part:
    """Some clips of a split as a source of their own; a `ClipSource` with one split.

    Their `clip_index` counts through the part, in the order of the whole split, so tables of a part
    are as long as the part. They are padded as in the whole split.

    Attributes:
      identities: names of the class columns.
    """

    def __init__(self, data: ClipSource, split: str, chosen: np.ndarray):
        """Takes the clips `chosen` [n] int, in ascending order, of a split."""
        self.identities = data.identities
        self._data, self._chosen = data, chosen
        self._whole = data.split(split)
        self._split = dataclasses.replace(
            self._whole,
            clips=tuple(self._whole.clips[clip] for clip in chosen.tolist()),
            labels=self._whole.labels[chosen],
            lengths={name: lengths[chosen] for name, lengths in self._whole.lengths.items()},
        )

    def split(self, name: str) -> Split:
        """Returns the clips of the part; ValueError for the name of another split."""
        if name != self._split.name:
            raise UserError(f"no split {name!r} in a part of {self._split.name}")
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int, share: Share = WHOLE) -> "Iterator[Batch]":
        """Yields every clip of the plan once, in blocks of `rows` rows; see `ClipSource`."""
        whole = make_eval_plan(self._whole, plan.modalities)
        bucket = np.full_like(whole.bucket, -1)
        bucket[self._chosen] = plan.bucket
        plan = whole._replace(bucket=bucket)
        for batch in self._data.eval_batches(plan, rows=rows, share=share):
            # Rows without a clip have the index 0, which may be outside.
            place = np.searchsorted(self._chosen, np.asarray(batch.clip_index))
            yield batch._replace(clip_index=np.where(batch.batch_mask, place, 0).astype(np.int32))
