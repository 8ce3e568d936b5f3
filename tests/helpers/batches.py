"""Batches of a dataset in one call: the plan is made on the way."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.batch import Batch, Frames
from vidjax.data.clips import ClipSource, TrainingData, make_batch_plan, make_eval_plan
from vidjax.data.labels import load_official_truth
from vidjax.data.records.dataset import Dataset
from vidjax.data.records.manifest import Records


def labelled(records: Records, directory: Path) -> Dataset:
    """Returns records with the ground truth of a directory of official files."""
    return Dataset(records, load_official_truth(directory, records.clips))


def eval_batches(
    data: ClipSource,
    *,
    split: str,
    modalities: Sequence[str],
    rows: int,
    **chosen: Any,
) -> Iterator[Batch]:
    """Yields the blocks of a split; `chosen` goes to `make_eval_plan`."""
    plan = make_eval_plan(data.split(split), modalities, **chosen)
    return data.eval_batches(plan, rows=rows)


def train_batches(
    data: TrainingData,
    *,
    splits: Sequence[str],
    modalities: Sequence[str],
    step: int = 0,
    **options: Any,
) -> Iterator[Batch]:
    """Yields the batches of training; `options` go to `make_batch_plan`."""
    plan = make_batch_plan([data.split(name) for name in splits], modalities, **options)
    return data.train_batches(plan, step=step)


def real_frames(
    data: ClipSource, split: str, modality: str = "face"
) -> Iterator[tuple[int, Frames]]:
    """Yields the number of every clip of a split, and its real frames [T, ...]."""
    for batch in eval_batches(data, split=split, modalities=(modality,), rows=7):
        one = batch.frames[modality]
        for row in np.flatnonzero(batch.batch_mask).tolist():
            real = np.asarray(one.mask[row])
            yield int(batch.clip_index[row]), Frames(*(np.asarray(x[row])[real] for x in one))


def weighted_means(data: ClipSource, split: str) -> dict[int, np.ndarray]:
    """Returns clip -> mean face by quality x detection, in float64, of clips that have a face."""
    found = {}
    for clip, frames in real_frames(data, split):
        if len(frames.features):
            weight = np.maximum(np.float64(frames.quality * frames.detection), 0)
            weight = weight if weight.any() else np.ones(len(weight))
            found[clip] = weight @ np.float64(frames.features) / weight.sum()
    return found
