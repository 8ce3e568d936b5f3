"""Clips as padded batches, every clip once; without TensorFlow, see `shard_files`."""

from collections.abc import Iterator, Mapping

import numpy as np

from vidjax.batch import BATCHED, Batch, Frames
from vidjax.data.clips import EvalPlan, Modality, best_frames, blocks_of
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records.manifest import Records
from vidjax.data.records.shard_files import ShardReader, check_changed


def eval_batches(records: Records, plan: EvalPlan, rows: int) -> Iterator[Batch]:
    """Yields each clip of the plan once; opens only files that hold such a clip."""
    _, order, _, shards = records.splits[plan.split]
    ends = np.cumsum([shard.records for shard in shards])
    # Each block comes as soon as its clips are read.
    blocks = sorted(blocks_of(plan.bucket[order], rows), key=lambda block: block[1][-1])
    shard_of = [np.searchsorted(ends, places, side="right") for _, places in blocks]
    last = {one: block for block, found in enumerate(shard_of) for one in np.unique(found).tolist()}
    own = sorted(last)
    checked = dict(zip(own, check_changed([shards[number] for number in own]), strict=True))
    readers: dict[int, ShardReader] = {}
    for block, ((bucket, places), found) in enumerate(zip(blocks, shard_of, strict=True)):
        parts = []
        for shard in np.unique(found).tolist():
            if shard not in readers:  # a new reader computes a digest, so it is kept
                readers[shard] = ShardReader(checked[shard])
            begin = ends[shard] - shards[shard].records
            parts.append((readers[shard], places[found == shard] - begin))
        frames = {}
        for name in plan.modalities:
            modality, shape = records.modalities[name], (rows, plan.padded_lengths[name][bucket])
            lengths = [reader.lengths(name)[chosen] for reader, chosen in parts]
            read = [reader.frames(name, modality, BATCHED, chosen) for reader, chosen in parts]
            flat = {field: np.concatenate([one[field] for one in read]) for field in BATCHED}
            frames[name] = pad(flat, np.concatenate(lengths), shape, modality)
        clip_index = [reader.clip_index[chosen] for reader, chosen in parts]
        yield batch_of(frames, np.concatenate(clip_index), rows)
        readers = {shard: reader for shard, reader in readers.items() if last[shard] > block}


def batch_of(frames: Mapping[str, Frames], clip_index: np.ndarray, rows: int) -> Batch:
    """Returns a batch of `rows` rows, of which the first are the clips of `clip_index`."""
    count = len(clip_index)
    return Batch(frames, np.pad(clip_index, (0, rows - count)), np.arange(rows) < count)


def best_of_clips(quality: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """Returns [F] bool, the frames of clips of `lengths` [n]: all, or the best `size` of a clip."""
    kept = np.ones(len(quality), bool)
    starts = np.cumsum(lengths) - lengths
    for clip in np.flatnonzero(lengths > size).tolist():
        own = slice(starts[clip], starts[clip] + lengths[clip])
        kept[own] = False
        kept[starts[clip] + best_frames(quality[own], size)] = True
    return kept


def pad(
    flat: Mapping[str, np.ndarray], lengths: np.ndarray, shape: tuple[int, int], modality: Modality
) -> Frames:
    """Returns Frames [B, T] = `shape`; a clip of more than T frames gives its best T by quality.

    `flat` is field -> frames, [F] or [F, D], clip by clip, or empty if there are none. Of these,
    `lengths` [n <= B] int belong to each clip. Padding is 0.
    """
    size = shape[1]
    if (lengths > size).any():
        kept = best_of_clips(flat["quality"], lengths, size)
        flat = {field: values[kept] for field, values in flat.items()}
    mask = np.zeros(shape, bool)
    mask[: len(lengths)] = np.arange(size) < lengths[:, None]
    padded = {"features": np.zeros((*shape, modality.dim), modality.dtype)}
    padded |= {f: np.zeros(shape, FRAME_FIELDS[f].dtype) for f in BATCHED if f != "features"}
    for field, values in flat.items():
        padded[field][mask] = values
    return Frames(mask=mask, **padded)
