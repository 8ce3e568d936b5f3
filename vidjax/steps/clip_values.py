"""Computes one value of every training clip, before the first step or between two steps."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vidjax import devices
from vidjax.batch import Array, Frames
from vidjax.config import Config
from vidjax.data.clips import ClipSource, make_eval_plan


def by_split(config: Config, data: ClipSource) -> Sequence[tuple[str, slice]]:
    """Returns the training splits, each with the slice of its clips among all N training clips."""
    splits, start = [], 0
    for split in config.data.train_splits:
        count = len(data.split(split).clips)
        splits.append((split, slice(start, start + count)))
        start += count
    return splits


def values_of_clips(
    config: Config,
    data: ClipSource,
    modality: str,
    value_of: Callable[[Frames], Array],
    wanted: np.ndarray,
) -> np.ndarray:
    """Returns [n, ...], a value of each of the n training clips that are True in `wanted` [N].

    `value_of` maps all frames of clips, [B, T] of one modality, to [B, ...]; see `values_of_split`.
    """

    def value_of_all(frames: Mapping[str, Frames]) -> Array:
        return value_of(frames[modality])

    rows = config.eval.block_size
    return np.concatenate(
        [
            values_of_split(data, split, (modality,), value_of_all, wanted[part], rows=rows)
            for split, part in by_split(config, data)
            if wanted[part].any()
        ]
    )


def values_of_split(
    data: ClipSource,
    split: str,
    modalities: Sequence[str],
    value_of: Callable[[Mapping[str, Frames]], Array],
    wanted: np.ndarray,
    *,
    rows: int,
) -> np.ndarray:
    """Returns [n, ...], a value of each of the n >= 1 wanted clips of a split, in their order.

    `value_of` maps modality -> Frames [B, T] of B = `rows` clips, as evaluation reads, to [B, ...].
    """
    values = None
    plan = make_eval_plan(data.split(split), tuple(modalities), only=wanted)
    for batch in data.eval_batches(plan, rows=rows):
        found = (value_of(batch.frames), batch.clip_index, batch.batch_mask)
        block, clip_index, real = devices.fetch(found)
        if values is None:
            values = np.zeros((len(wanted), *block.shape[1:]), block.dtype)
        values[clip_index[real]] = block[real]
    assert values is not None
    return values[wanted]
