"""What is computed once from every training clip, before the first step or between two of them."""

from collections.abc import Callable, Sequence

import numpy as np

from vidjax.batch import Array, Frames
from vidjax.config import Config
from vidjax.data.clips import ClipSource, make_eval_plan


def by_split(config: Config, data: ClipSource) -> Sequence[tuple[str, slice]]:
    """Returns the training splits and their rows in the tables."""
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
    """Computes a value of each wanted training clip from all its frames, as evaluation reads them.

    Args:
      config: the configuration of the run.
      data: the clips.
      modality: the modality that is read.
      value_of: Frames [B, T] -> values [B, ...].
      wanted: [N] bool, the n clips to read; at least one.

    Returns:
      [n, ...] values, in the order of the tables.
    """
    parts = []
    for split, rows in by_split(config, data):
        only = wanted[rows]
        values = None
        plan = make_eval_plan(data.split(split), (modality,), only=only)
        for batch in data.eval_batches(plan, rows=config.eval.block_size) if only.any() else ():
            block = np.asarray(value_of(batch.frames[modality]))
            if values is None:
                values = np.zeros((len(only), *block.shape[1:]), block.dtype)
            values[batch.clip_index[batch.batch_mask]] = block[batch.batch_mask]
        if values is not None:
            parts.append(values[only])
    return np.concatenate(parts)
