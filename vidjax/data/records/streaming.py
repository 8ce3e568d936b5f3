"""Endless, shuffled batches of records, which are read ahead while earlier batches are in use.

Records are batched before they are parsed, and only the configured modalities are decoded, in their
stored dtype: parsing clip by clip runs at a third of the rate. A single process reads whole shards
and shuffles their records. Several processes shuffle record numbers, all in the same way, and each
reads only its own records.
"""

import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vidjax.batch import Batch, Frames
from vidjax.cluster.processes import WHOLE, Share, own_rows
from vidjax.data.clips import BatchPlan
from vidjax.data.records.codec import decode_batch, parse_batch, random_window, tf
from vidjax.data.records.manifest import Records
from vidjax.data.records.shard_files import RecordFiles, Shard, check_changed, check_shard
from vidjax.errors import UserError

OPEN_SHARDS = 16
SHUFFLE_RECORDS = 2048
SHUFFLE_BYTES = 128 << 20
READERS = 2  # threads that read the records of one of several processes


def train_batches(
    records: Records, plan: BatchPlan, start: int, share: Share = WHOLE
) -> Iterator[Batch]:
    """Yields batches without end, see `TrainingData.train_batches`."""
    shards, added, num_clips = [], [], 0
    for split in plan.splits:
        found = records.splits[split]
        shards += found.shards
        added += [num_clips] * len(found.shards)
        num_clips += len(found.clips)
    offsets = np.array(added, np.int32)  # of each shard: added to the clip_index for its split
    rows = own_rows(plan.batch_size, share)
    decode = _decoder(records, plan, rows.stop - rows.start)
    positions = range(start + rows.start, sys.maxsize, plan.batch_size)

    def shuffled(read_shard: Callable[[Any], Any]) -> Any:
        stream = _shuffled(shards, num_clips, plan.seed, start, read_shard)
        return stream.batch(plan.batch_size, drop_remainder=True)

    if share.parts == 1:
        return _batches(_read_whole(shards, offsets, shuffled, decode, positions), records, shards)
    read = _read_own(shards, offsets, shuffled, decode, positions, rows)
    return _batches(read, records, shards)


def _decoder(records: Records, plan: BatchPlan, count: int) -> Callable[[Any, Any, Any], Any]:
    """Returns the function that decodes `count` records.

    It takes the position of the first clip in the stream, [count] serialised records, and [count]
    int32, the number to add to each record's clip_index.
    """

    def decode(position: Any, serialized: Any, offset: Any) -> Any:
        clip_index, examples = parse_batch(serialized, plan.modalities)
        positions = position + tf.range(count, dtype=tf.int64)
        decoded = {}
        for number, (name, length) in enumerate(plan.padded_lengths.items()):
            modality, fields = records.modalities[name], examples[name]
            if name in plan.windowed:
                seed = (plan.seed, number)
                fields = random_window(fields, modality, length, positions, seed)
            best = name in plan.longer and plan.crop == "quality"
            decoded[name] = decode_batch(fields, modality, length, best=best)
        return decoded, clip_index + offset

    return decode


def _read_whole(
    shards: Sequence[Shard],
    offsets: np.ndarray,
    shuffled: Callable[[Callable[[Any], Any]], Any],
    decode: Callable[[Any, Any, Any], Any],
    positions: range,
) -> Iterator[Any]:
    """Yields decoded batches, by a tf.data dataset of (serialised records, offsets)."""
    paths = tf.constant([str(shard.path) for shard in shards])
    counts = tf.constant([shard.records for shard in shards], tf.int64)
    table = tf.constant(offsets)

    def read_shard(shard: Any) -> Any:
        # A TFRecord file that was cut between two records reads without an error.
        records = tf.data.TFRecordDataset(paths[shard], buffer_size=1 << 20).apply(
            tf.data.experimental.assert_cardinality(counts[shard])
        )
        return tf.data.Dataset.zip((records, _repeated(table[shard])))

    counter = tf.data.Dataset.counter(start=positions.start, step=positions.step)
    dataset = tf.data.Dataset.zip((counter, shuffled(read_shard))).map(
        lambda position, batch: decode(position, *batch), num_parallel_calls=2, deterministic=True
    )
    yield from _deterministic(dataset.prefetch(1))


def _read_own(
    shards: Sequence[Shard],
    offsets: np.ndarray,
    shuffled: Callable[[Callable[[Any], Any]], Any],
    decode: Callable[[Any, Any, Any], Any],
    positions: range,
    rows: slice,
) -> Iterator[Any]:
    """Yields the decoded `rows` of batches, whose records threads read ahead by their numbers.

    The threads are Python's: if tf.data called Python functions, a process that ends while a batch
    is read ahead would wait for itself.
    """
    counts = tf.constant([shard.records for shard in shards], tf.int64)
    numbers = shuffled(
        lambda shard: tf.data.Dataset.zip((_repeated(shard), tf.data.Dataset.range(counts[shard])))
    )
    strings = tf.TensorSpec([None], tf.string)
    signature = [tf.TensorSpec([], tf.int64), strings, tf.TensorSpec([None], tf.int32)]
    compiled = tf.function(decode, input_signature=signature)
    opened = RecordFiles(shards)

    def read(position: int, shard: np.ndarray, number: np.ndarray) -> Any:
        serialized = tf.constant(opened.read(shard, number), tf.string)
        offset = tf.constant(offsets[shard])
        decoded = compiled(tf.constant(position, tf.int64), serialized, offset)
        return tf.nest.map_structure(np.asarray, decoded)

    waiting = collections.deque()
    with ThreadPoolExecutor(READERS) as threads:
        for position, (shard, number) in zip(positions, _deterministic(numbers), strict=False):
            waiting.append(threads.submit(read, position, shard[rows], number[rows]))
            if len(waiting) > READERS:
                yield waiting.popleft().result()


def _repeated(value: Any) -> Any:
    return tf.data.Dataset.from_tensors(value).repeat()


def _deterministic(dataset: Any) -> Iterator[Any]:
    """Yields the elements of a tf.data dataset as numpy arrays, without a copy."""
    options = tf.data.Options()
    options.deterministic = True
    yield from dataset.with_options(options).as_numpy_iterator()


def _batches(found: Iterator[Any], records: Records, shards: Sequence[Shard]) -> Iterator[Batch]:
    """Yields decoded clips as batches; ValueError, with file and record, if they are damaged."""
    check_changed(shards)
    while True:
        try:
            decoded, clip_index = next(found)
        except (tf.errors.OpError, ValueError, OSError) as error:
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


def _shuffled(
    shards: Sequence[Shard], num_clips: int, seed: int, start: int, read_shard: Callable[[Any], Any]
) -> Any:
    """Returns an endless tf.data dataset of the elements of `read_shard`, from number `start` on.

    Every epoch reads the shards in another order, OPEN_SHARDS at a time, through a shuffle buffer.
    The order does not depend on what the elements are.
    """
    mean_bytes = sum(shard.size for shard in shards) // num_clips + 1
    buffer = min(num_clips, SHUFFLE_RECORDS, max(1, SHUFFLE_BYTES // mean_bytes))
    first_epoch, skipped = divmod(start, num_clips)

    def read_epoch(epoch: Any) -> Any:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(shards)), seed=tf.stack([seed, 2 * epoch])
        )
        buffer_seed = tf.random.stateless_uniform(
            [], seed=tf.stack([seed, 2 * epoch + 1]), minval=None, maxval=None, dtype=tf.int64
        )
        records = tf.data.Dataset.from_tensor_slices(order).interleave(
            read_shard, cycle_length=min(OPEN_SHARDS, len(shards)), block_length=1
        )
        records = records.shuffle(buffer, seed=buffer_seed, reshuffle_each_iteration=False)
        return records.skip(tf.where(epoch == first_epoch, tf.constant(skipped, tf.int64), 0))

    return tf.data.Dataset.counter(start=first_epoch).flat_map(read_epoch)
