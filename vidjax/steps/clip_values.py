"""Computes one value of every training clip, before the first step or between two steps."""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from vidjax import devices
from vidjax.batch import Array, Batch
from vidjax.cluster.processes import WHOLE
from vidjax.config import Config
from vidjax.data.clips import ClipSource, make_eval_plan


def values_of_clips(
    config: Config,
    data: ClipSource,
    modalities: Sequence[str],
    value_of: Callable[[Batch], Array],
    wanted: np.ndarray,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Returns [n, ...], a value of each of the n >= 1 training clips that are True in `wanted` [N].

    `value_of` maps a block of B clips with all frames, as evaluation reads it, to [B, ...]. With a
    mesh the block is split over its devices, and all processes call this together.
    """
    rows, share = config.eval.block_size, devices.share(mesh) if mesh else WHOLE
    rows = rows * mesh.shape["data"] // share.parts if mesh else rows
    values, start = [], 0
    for name in config.data.train_splits:
        split = data.split(name)
        own = wanted[start : start + len(split.clips)]
        start += len(own)
        if not own.any():
            continue
        found = []
        plan = make_eval_plan(split, modalities, only=own)
        for block in data.eval_batches(plan, rows=rows, share=share):
            batch = devices.shard_block(mesh, block) if mesh else block
            found.append(devices.fetch((value_of(batch), batch.clip_index, batch.batch_mask)))
        value, index, real = (np.concatenate(part) for part in zip(*found, strict=True))
        values.append(value[real][np.argsort(index[real])])
    return np.concatenate(values)
