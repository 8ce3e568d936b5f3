"""Windows: a few blocks of clips at a time, with the same clips for several models."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax import devices
from vidjax.batch import Batch, LazyFeatures
from vidjax.data.clips import EvalPlan, longest, make_eval_plan
from vidjax.data.resident import free_bytes
from vidjax.errors import UserError
from vidjax.steps.model_scorer import TrainedModel
from vidjax.system import System

WINDOW_BYTES = 512 << 20  # size of the features that ends a window early


def windows(
    models: Sequence[TrainedModel], split_name: str, block_size: int, mesh: Mesh, rows: int
) -> Iterator[list[list[Batch]]]:
    """Yields windows of a split; a dataset of several models is read only once.

    Args:
      models: models whose datasets have the same clips.
      split_name: the split.
      block_size: number of clips per device and block.
      mesh: the devices.
      rows: number of clips that ends a window.

    Yields:
      For every model a list of blocks, on the devices.

    Raises:
      ValueError: Two datasets have their clips in different orders.
    """
    modalities: dict[int, dict[str, None]] = {}  # dataset -> modalities that its models read
    for model in models:
        modalities.setdefault(id(model.data), {}).update(dict.fromkeys(model.modalities))
    datasets = {id(model.data): model.data for model in models}
    splits = {key: data.split(split_name) for key, data in datasets.items()}
    lengths = np.max([longest(splits[key], tuple(modalities[key])) for key in datasets], axis=0)
    share = devices.share(mesh)
    plans = {
        key: make_eval_plan(splits[key], tuple(modalities[key]), lengths=lengths)
        for key in datasets
    }
    for model in models:
        _check_memory(model.system, plans[id(model.data)], block_size, mesh)
    streams = [
        data.eval_batches(
            plans[key],
            rows=block_size * mesh.shape["data"] // share.parts,
            share=share,
        )
        for key, data in datasets.items()
    ]
    window: list[dict[int, Batch]] = []
    size = 0
    for host in zip(*streams, strict=True):
        for other in host[1:]:
            if not np.array_equal(*map(devices.fetch, (host[0].clip_index, other.clip_index))):
                raise UserError("--runs: the datasets of the runs have different orders of clips")
        batches = [devices.shard_block(mesh, batch) for batch in host]
        window.append(dict(zip(datasets, batches, strict=True)))
        size += sum(_nbytes(batch) for batch in batches)
        if size >= WINDOW_BYTES or len(window) * len(batches[0].clip_index) >= rows:
            yield [[batches[id(model.data)] for batches in window] for model in models]
            window, size = [], 0
    if window:
        yield [[batches[id(model.data)] for batches in window] for model in models]


def _check_memory(system: System, plan: EvalPlan, block_size: int, mesh: Mesh) -> None:
    """Refuses blocks that exceed the free memory of a device by their features and scores alone."""
    frames, widths = plan.padded_lengths, system.modalities
    numbers = [
        sum(widths[name] * frames[name][bucket] for name in system.fuse_eval)
        for bucket in set(plan.bucket[plan.bucket >= 0].tolist())
    ]
    size = 4 * block_size * (max(numbers, default=0) + system.num_columns)
    free = free_bytes(mesh)
    if 0 < free < size:
        raise UserError(
            f"config.eval.block_size={block_size}: a block of clips takes {size / 1e9:,.1f} GB of "
            f"memory, and {free / 1e9:,.1f} GB are free\n"
            f"--config.eval.block_size={max(1, int(block_size * free / size) // 4)}"
        )


def _nbytes(batch: Batch) -> int:
    """Returns the size of a batch in bytes; LazyFeatures count as their indices."""
    frames = [
        modality._replace(features=modality.features.index)
        if isinstance(modality.features, LazyFeatures)
        else modality
        for modality in batch.frames.values()
    ]
    return sum(x.nbytes for x in jax.tree.leaves(frames))
