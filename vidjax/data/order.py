"""Draws the clips of each training step, and the windows that are cut from long clips.

The draw depends only on the seed and the number of the step, so a resumed run continues with the
same clips. Clips on the devices and clips on disk have the same order. The module needs only numpy.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vidjax.data.clips import BatchPlan


class DrawnClips(NamedTuple):
    """The clips in R rows of batches."""

    clip_index: np.ndarray  # [R] int32, the number of each clip in the training splits
    batch_mask: np.ndarray  # [R] bool, False for empty rows of the last batch of an epoch
    # Modality of `BatchPlan.windowed` -> [R] int32, the first frame of the window of each clip. If
    # a clip is shorter than a window, the first frame is 0.
    first: Mapping[str, np.ndarray]


def draw_clips(plan: BatchPlan, step: int, count: int = 1) -> DrawnClips:
    """Draws the clips of `count` training steps from `step` on, in count * B rows.

    Each clip comes once per epoch. All windows within a clip are equally likely.
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
    """Returns a random order of N clips, and random numbers for their windows.

    The order is [num_places] int32, with -1 in empty rows. The random numbers are
    [num_windows, num_places] float64, uniform in [0, 1).
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(num_clips).astype(np.int32)
    order = np.pad(order, (0, num_places - num_clips), constant_values=-1)
    return order, rng.random((num_windows, num_places))
