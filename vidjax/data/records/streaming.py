"""Records as endless, shuffled batches, which tf.data reads while others are computed.

Records are batched before they are parsed, and only the configured modalities are decoded, in their
stored dtype: parsing clip by clip runs at a third of the rate.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vidjax.batch import Batch, Frames
from vidjax.data.clips import BatchPlan
from vidjax.data.records.codec import decode_batch, parse_batch, random_window, tf
from vidjax.data.records.manifest import Records, Shard, check_changed, check_shard

OPEN_SHARDS = 16
SHUFFLE_RECORDS = 2048
SHUFFLE_BYTES = 128 << 20


def train_batches(records: Records, plan: BatchPlan, start: int) -> Iterator[Batch]:
    """Yields batches without end, see `pipeline.Dataset.train_batches`."""
    shards, offsets, num_clips = [], [], 0
    for split in plan.splits:
        found = records.splits[split]
        shards += found.shards
        offsets += [num_clips] * len(found.shards)
        num_clips += len(found.clips)

    stream = _shuffled(shards, offsets, num_clips, plan.seed, start)
    stream = stream.batch(plan.batch_size, drop_remainder=True)
    positions = tf.data.Dataset.counter(start=start, step=plan.batch_size)

    def decode(position: Any, batch: tuple[Any, Any]) -> Any:
        serialized, offset = batch
        clip_index, examples = parse_batch(serialized, plan.modalities)
        positions = position + tf.range(plan.batch_size, dtype=tf.int64)
        decoded = {}
        for number, (name, length) in enumerate(plan.padded_lengths.items()):
            modality, fields = records.modalities[name], examples[name]
            if name in plan.windowed:
                seed = (plan.seed, number)
                fields = random_window(fields, modality, length, positions, seed)
            best = name in plan.longer and plan.crop == "quality"
            decoded[name] = decode_batch(fields, modality, length, best=best)
        return decoded, clip_index + offset, tf.ones([plan.batch_size], tf.bool)

    dataset = tf.data.Dataset.zip((positions, stream))
    dataset = dataset.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
    return _batches(dataset, records, shards)


def _batches(dataset: Any, records: Records, shards: Sequence[Shard]) -> Iterator[Batch]:
    """Yields the decoded clips of a tf.data dataset as batches."""
    for decoded, clip_index, batch_mask in _arrays(dataset, shards):
        frames = {}
        for name, fields in decoded.items():
            dim, dtype = records.modalities[name]
            shape = (*fields["mask"].shape, dim)  # [B, T, D]
            fields["features"] = fields["features"].view(dtype).reshape(shape)
            frames[name] = Frames(**fields)
        yield Batch(frames, clip_index, batch_mask)


def _arrays(dataset: Any, shards: Sequence[Shard]) -> Iterator[Any]:
    """Yields the elements of a tf.data dataset as numpy arrays, without a copy.

    Raises:
      ValueError: the records are damaged; names file and record.
    """
    check_changed(shards)
    options = tf.data.Options()
    options.deterministic = True
    iterator = dataset.with_options(options).as_numpy_iterator()
    while True:
        try:
            decoded = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            for shard in shards:
                check_shard(shard)
            reason = " ".join(str(error.message).split())[:200]
            folder = shards[0].path.parent
            raise ValueError(f"{folder}: cannot read the records: {reason}") from error
        yield decoded


def _read_shard(path: Any, num_records: Any) -> Any:
    """Returns the serialised records of a shard; reading fails unless there are `num_records`."""
    # A TFRecord file that was cut between two records reads without an error.
    return tf.data.TFRecordDataset(path, buffer_size=1 << 20).apply(
        tf.data.experimental.assert_cardinality(num_records)
    )


def _shuffled(
    shards: Sequence[Shard], offsets: Sequence[int], num_clips: int, seed: int, start: int
) -> Any:
    """Returns an endless tf.data dataset of (serialised record, offset of its split).

    Every epoch reads the shards in another order, OPEN_SHARDS at a time, through a shuffle buffer.
    """
    paths = tf.constant([str(shard.path) for shard in shards])
    counts = tf.constant([shard.records for shard in shards], tf.int64)
    offset_table = tf.constant(offsets, tf.int32)
    mean_bytes = sum(shard.size for shard in shards) // num_clips + 1
    buffer = min(num_clips, SHUFFLE_RECORDS, max(1, SHUFFLE_BYTES // mean_bytes))
    first_epoch, skipped = divmod(start, num_clips)

    def read(path: Any, count: Any, offset: Any) -> Any:
        return tf.data.Dataset.zip(
            (_read_shard(path, count), tf.data.Dataset.from_tensors(offset).repeat())
        )

    def read_epoch(epoch: Any) -> Any:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(shards)), seed=tf.stack([seed, 2 * epoch])
        )
        buffer_seed = tf.random.stateless_uniform(
            [], seed=tf.stack([seed, 2 * epoch + 1]), minval=None, maxval=None, dtype=tf.int64
        )
        tables = [tf.gather(table, order) for table in (paths, counts, offset_table)]
        records = tf.data.Dataset.from_tensor_slices(tuple(tables)).interleave(
            read, cycle_length=min(OPEN_SHARDS, len(shards)), block_length=1
        )
        records = records.shuffle(buffer, seed=buffer_seed, reshuffle_each_iteration=False)
        return records.skip(tf.where(epoch == first_epoch, tf.constant(skipped, tf.int64), 0))

    return tf.data.Dataset.counter(start=first_epoch).flat_map(read_epoch)
