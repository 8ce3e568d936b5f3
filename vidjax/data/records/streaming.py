"""Endless batches of records in the order of training, read ahead while earlier ones are in use.

The order comes from `vidjax.data.order`. tf.data reads the records one by one, at the places that
follow from their lengths, and makes the batches. Records are batched before they are parsed, and
only the configured modalities are decoded, in their stored dtype: parsing clip by clip runs at a
third of the rate.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vidjax.batch import Array, Batch, Frames
from vidjax.data import order
from vidjax.data.clips import BatchPlan, Modality
from vidjax.data.records.manifest import Records, SplitRecords
from vidjax.data.records.shard_files import (
    FRAMING,
    Shard,
    check_changed,
    check_shard,
    encoded_size,
    frame_bytes,
    varint_size,
)
from vidjax.data.records.tensors import decode_batch, parse_batch, tf, windows
from vidjax.errors import UserError

AHEAD = 4  # batches that are known to tf.data before they are asked for
READERS = 16  # records of a batch that are read at once: most wait for a file, not for a core


def train_batches(records: Records, plan: BatchPlan, step: int) -> Iterator[Batch]:
    """Yields batches without end, see `TrainingData.train_batches`."""
    shards = check_changed([one for split in plan.splits for one in records.splits[split].shards])
    count = plan.batch_size
    shapes = [[count], [count], [len(plan.windowed), count]]
    queue = tf.queue.FIFOQueue(AHEAD, [tf.int32, tf.int64, tf.int32], shapes)
    batches = _pipeline(records, plan, shards, queue).as_numpy_iterator()
    places = _places(records, plan, shards, step)
    for added in itertools.chain([AHEAD], itertools.repeat(1)):
        try:
            for values in itertools.islice(places, added):
                queue.enqueue(values)
            decoded, clip_index = next(batches)
        except (tf.errors.OpError, ValueError) as error:
            for shard in shards:
                check_shard(shard)
            reason = " ".join(str(error).split())[:200]
            folder = shards[0].path.parent
            raise UserError(f"{folder}: cannot read the records: {reason}") from error
        frames = {}
        for name, fields in decoded.items():
            dim, dtype = records.modalities[name]
            shape = (*fields["mask"].shape, dim)  # [B, T, D]
            fields["features"] = fields["features"].view(dtype).reshape(shape)
            frames[name] = Frames(**fields)
        # Outside of `try`: when the process ends, TensorFlow may be gone.
        yield Batch(frames, clip_index, np.ones(len(clip_index), bool))


def _places(
    records: Records, plan: BatchPlan, shards: Sequence[Shard], step: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields what tf.data must know of the clips of every step, from `step` on.

    These are: position of the shard [B] int32, first byte of the record in it [B] int64, and for
    each of the M windowed modalities the first frame of the window [M, B] int32.
    """
    shard, start = _find_records(records, plan, shards)
    with jax.default_device(_host()):
        lengths = {
            name: jax.numpy.concatenate([records.splits[s].lengths[name] for s in plan.splits])
            for name in plan.windowed
        }

    @jax.jit
    def draw(step: Array, epoch: Array, place: Array) -> tuple[Array, list[Array]]:
        clip_index, drawn = order.draw(plan, step, epoch, place)
        sizes = plan.padded_lengths
        return clip_index, [
            order.first_frame(drawn[name], lengths[name][clip_index], sizes[name])
            for name in plan.windowed
        ]

    for number in itertools.count(step):
        position = number * plan.batch_size + np.arange(plan.batch_size)
        epoch, place = (part.astype(np.int32) for part in np.divmod(position, plan.num_clips))
        with jax.default_device(_host()):
            clip_index, first = jax.device_get(draw(np.int32(number), epoch, place))
        first = np.array(first, np.int32).reshape(-1, len(place))
        yield shard[clip_index], start[clip_index], first


def _host() -> Any:
    """Returns the processor of this machine, or an accelerator if jax may use nothing else."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _find_records(
    records: Records, plan: BatchPlan, shards: Sequence[Shard]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns position of the shard, int32, and first byte of the record, int64, of N clips.

    They follow from the lengths of the clips, without a look at the files.
    """
    clips, sizes = [], []
    for name in plan.splits:
        split = records.splits[name]
        clips.append(split.order + sum(map(len, clips)))
        sizes.append(FRAMING + _record_sizes(split, records.modalities)[split.order])
    size, found = np.concatenate(sizes), [one.size for one in shards]
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), [one.records for one in shards])
    if not np.array_equal(np.bincount(shard, size), found):
        raise UserError("their sizes do not follow from the lengths of clips")
    begins = np.cumsum(found) - found
    start = np.cumsum(size) - size - begins[shard]
    place = np.argsort(np.concatenate(clips))
    return shard[place], start[place]


def _record_sizes(split: SplitRecords, modalities: Mapping[str, Modality]) -> np.ndarray:
    """Returns [N] int64, the bytes of the record of each clip of a split, by clip index."""
    count = len(split.clips)
    names = [len(clip.encode("utf-8", "surrogateescape")) for clip in split.clips]
    sizes = {"clip": np.array(names), "clip_index": varint_size(np.arange(count))}
    for name, modality in modalities.items():
        length = split.lengths.get(name, np.zeros(count)).astype(np.int64)
        for field, size in frame_bytes(modality).items():
            sizes[f"frames/{name}/{field}"] = length * size
    return encoded_size(sizes)


def _pipeline(records: Records, plan: BatchPlan, shards: Sequence[Shard], queue: Any) -> Any:
    """Returns a tf.data dataset of decoded batches of the clips in `queue`, and clip_index [B]."""
    paths = tf.constant([str(shard.path) for shard in shards])
    # Of shards: the clip_index of a record counts from it.
    splits = [records.splits[name] for name in plan.splits]
    before = np.cumsum([0, *(len(split.clips) for split in splits[:-1])])
    offsets = tf.constant(np.repeat(before, [len(split.shards) for split in splits]), tf.int32)

    def read(shard: Any, start: Any) -> Any:
        found = tf.raw_ops.TFRecordDatasetV2(
            filenames=paths[shard][None],
            compression_type="",
            buffer_size=0,
            byte_offsets=start[None],
        )
        record = tf.data.experimental.from_variant(found, tf.TensorSpec([], tf.string))
        return record.take(1).get_single_element()

    def decode(shard: Any, start: Any, first: Any) -> Any:
        places = tf.data.Dataset.from_tensor_slices((shard, start))
        found = places.map(read, num_parallel_calls=READERS, deterministic=True)
        serialized = found.batch(shard.shape[0], drop_remainder=True).get_single_element()
        clip_index, examples = parse_batch(serialized, plan.modalities)
        firsts = dict(zip(plan.windowed, tf.unstack(first), strict=True))
        decoded = {}
        for name, length in plan.padded_lengths.items():
            modality, fields = records.modalities[name], examples[name]
            if name in firsts:
                fields = windows(fields, modality, length, firsts[name])
            best = name in plan.longer and plan.crop == "quality"
            decoded[name] = decode_batch(fields, modality, length, best=best)
        return decoded, clip_index + tf.gather(offsets, shard)

    batches = tf.data.Dataset.counter().map(lambda _: queue.dequeue())
    return batches.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
