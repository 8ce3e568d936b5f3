"""Records as padded batches, every clip once; without TensorFlow, see `shard_files`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.batch import Batch, Frames
from vidjax.cluster.processes import WHOLE, Share, own_blocks, own_places
from vidjax.data.clips import EvalPlan, Modality, best_frames
from vidjax.data.frame_fields import FRAME_FIELDS, STORED
from vidjax.data.records.manifest import Records
from vidjax.data.records.shard_files import ShardReader, check_changed

BATCHED = tuple(name for name in Frames._fields if name in STORED)


class Rows(NamedTuple):
    """Some records of a shard: `rows` is [n] int."""

    reader: ShardReader
    rows: np.ndarray


def eval_batches(
    records: Records, plan: EvalPlan, rows: int, share: Share = WHOLE
) -> Iterator[Batch]:
    """Yields each clip of the plan in the share once; opens only files that hold such a clip."""
    if share.parts == 1:
        return _by_shard(records, plan, rows)
    return _by_bucket(records, plan, rows, share)


def _by_shard(records: Records, plan: EvalPlan, rows: int) -> Iterator[Batch]:
    """Yields each block as soon as its clips are read, before other shards are."""
    _, order, _, shards = records.splits[plan.split]
    waiting: dict[int, list[Rows]] = {}  # bucket -> records of a block that is not full
    ends = np.cumsum([shard.records for shard in shards])
    by_shard = np.split(plan.bucket[order], ends[:-1])
    read = [number for number, buckets in enumerate(by_shard) if (buckets >= 0).any()]
    for number, shard in zip(read, check_changed([shards[i] for i in read]), strict=True):
        reader, buckets = ShardReader(shard), by_shard[number]
        for bucket in np.unique(buckets[buckets >= 0]).tolist():
            chosen = np.flatnonzero(buckets == bucket)
            parts = waiting.setdefault(bucket, [])
            missing = rows - sum(len(part.rows) for part in parts)
            while len(chosen) >= missing:
                yield _batch(records, plan, bucket, [*parts, Rows(reader, chosen[:missing])], rows)
                parts.clear()
                chosen, missing = chosen[missing:], rows
            if len(chosen):
                parts.append(Rows(reader, chosen))
    for bucket, parts in sorted(waiting.items()):
        if parts:
            yield _batch(records, plan, bucket, parts, rows)


def _by_bucket(records: Records, plan: EvalPlan, rows: int, share: Share) -> Iterator[Batch]:
    """Yields the blocks of a process in the order of `own_blocks`, which all processes share.

    Readers are kept: every bucket may have clips of each shard, and a new reader computes a digest.
    """
    _, order, _, shards = records.splits[plan.split]
    ends = np.cumsum([shard.records for shard in shards])
    bucket = plan.bucket[order]
    own = np.unique(np.searchsorted(ends, own_places(bucket, rows, share), side="right")).tolist()
    checked = dict(zip(own, check_changed([shards[number] for number in own]), strict=True))
    readers: dict[int, ShardReader] = {}
    for number, places in own_blocks(bucket, rows, share):
        parts = []
        within = np.searchsorted(ends, places, side="right")
        for shard in np.unique(within).tolist():
            if shard not in readers:
                readers[shard] = ShardReader(checked[shard])
            begin = ends[shard] - shards[shard].records
            parts.append(Rows(readers[shard], places[within == shard] - begin))
        yield _batch(records, plan, number, parts, rows)


def _batch(
    records: Records, plan: EvalPlan, bucket: int, parts: Sequence[Rows], rows: int
) -> Batch:
    """Returns a batch of the records of `parts`, filled up with empty rows to `rows` rows."""
    none = np.zeros(0, np.int32)
    clip_index = np.concatenate([none, *(part.reader.clip_index[part.rows] for part in parts)])
    count = len(clip_index)
    frames = {}
    for name in plan.modalities:
        shape = (rows, plan.padded_lengths[name][bucket])
        frames[name] = _frames(parts, name, records.modalities[name], shape)
    return Batch(frames, np.pad(clip_index, (0, rows - count)), np.arange(rows) < count)


def _frames(parts: Sequence[Rows], name: str, modality: Modality, shape: tuple[int, int]) -> Frames:
    """Returns Frames [B, T] = `shape`; a clip of more than T frames gives its best T by quality."""
    mask = np.zeros(shape, bool)
    padded = {"features": np.zeros((*shape, modality.dim), modality.dtype)}
    padded |= {f: np.zeros(shape, FRAME_FIELDS[f].dtype) for f in BATCHED if f != "features"}
    if parts:
        lengths, flat = _read(parts, name, modality, shape[1])
        mask[: len(lengths)] = np.arange(shape[1]) < lengths[:, None]
        for field, values in flat.items():
            padded[field][mask] = values
    return Frames(mask=mask, **padded)


def _read(
    parts: Sequence[Rows], name: str, modality: Modality, size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns lengths [n] int32 of the clips in the records, and field -> frames, [F] or [F, D].

    The frames follow clip by clip; a clip of more than `size` frames gives its best by quality.
    """
    lengths = np.concatenate([part.reader.lengths(name)[part.rows] for part in parts])
    read = [part.reader.frames(name, modality, BATCHED, part.rows) for part in parts]
    flat = {field: np.concatenate([one[field] for one in read]) for field in BATCHED}
    if (lengths > size).any():
        kept = np.ones(len(flat["quality"]), bool)
        starts = np.cumsum(lengths) - lengths
        for clip in np.flatnonzero(lengths > size).tolist():
            own = slice(starts[clip], starts[clip] + lengths[clip])
            kept[own] = False
            kept[starts[clip] + best_frames(flat["quality"][own], size)] = True
        flat = {field: values[kept] for field, values in flat.items()}
    return lengths, flat
