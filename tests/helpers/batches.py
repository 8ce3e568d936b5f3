"""Functions that make a plan and return its batches, and functions for frames in batches."""

from functools import partial
from typing import Any

import jax
import numpy as np

from vidjax.core import fusion
from vidjax.core.batch import Frames
from vidjax.data.clips import make_batch_plan, make_eval_plan
from vidjax.data.dataset import Dataset
from vidjax.data.labels import load_official_truth


def labelled(store, directory):
    """Returns a dataset of stored clips, with the ground truth of a directory of official files."""
    return Dataset(store, load_official_truth(directory, store.clips))


def eval_batches(data, *, split, modalities, rows, **chosen):
    """Yields all clips of a split in batches of `rows`; `chosen` goes to `make_eval_plan`."""
    plan = make_eval_plan(data.split(split), modalities, **chosen)
    return data.eval_batches(plan, rows=rows)


def train_batches(data, *, splits, modalities, step=0, **options):
    """Yields the batches of a training from a step on; `options` go to `make_batch_plan`."""
    plan = make_batch_plan([data.split(name) for name in splits], modalities, **options)
    return data.train_batches(plan, step=step)


def rows_of(batches):
    """Returns number of a clip -> modality -> frames [T, ...]. Asserts that no clip is repeated."""
    found: dict[int, Any] = {}
    for batch in batches:
        frames = {k: Frames(fusion.read(x.features), *x[1:]) for k, x in batch.frames.items()}
        frames, mask = jax.device_get((frames, batch.batch_mask))
        for row, clip in enumerate(np.asarray(batch.clip_index).tolist()):
            one = jax.tree.map(lambda x, row=row: x[row], frames)
            if mask[row]:
                assert clip not in found
                found[clip] = one
            else:
                assert clip == 0 and not any(x.any() for x in jax.tree.leaves(one))
    return found


def assert_equal(left, right):
    """Asserts that two trees contain the same arrays with the same dtypes."""
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), left, right)


def real_frames(data, split, modality="face"):
    """Yields the number of each clip of a split, and its frames [T, ...] without padding."""
    blocks = eval_batches(data, split=split, modalities=(modality,), rows=7)
    for clip, frames in rows_of(blocks).items():
        one = frames[modality]
        yield clip, Frames(*(x[one.mask] for x in one))
