"""Records as endless, shuffled batches, which tf.data reads while others are computed.

Records are batched before they are parsed, and only the configured modalities are decoded, in their
stored dtype: parsing clip by clip runs at a third of the rate.

One process reads the shards from end to end and shuffles records. Each of several processes
shuffles the numbers of the records in the same way, and then reads its own records alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from vidjax.batch import Batch, Frames
from vidjax.data.blocks import own_rows
from vidjax.data.clips import WHOLE, BatchPlan, Share
from vidjax.data.records.codec import decode_batch, parse_batch, random_window, tf
from vidjax.data.records.manifest import Records, Shard, check_changed, check_shard
from vidjax.data.records.random_access import RecordFiles

OPEN_SHARDS = 16
SHUFFLE_RECORDS = 2048
SHUFFLE_BYTES = 128 << 20


def train_batches(
    records: Records, plan: BatchPlan, start: int, share: Share = WHOLE
) -> Iterator[Batch]:
    """Yields batches without end, see `pipeline.Dataset.train_batches`."""
    shards, offsets, num_clips = [], [], 0
    for split in plan.splits:
        found = records.splits[split]
        shards += found.shards
        offsets += [num_clips] * len(found.shards)
        num_clips += len(found.clips)

    rows = own_rows(plan.batch_size, share)
    count = rows.stop - rows.start
    way = _whole(shards, offsets) if share.count == 1 else _shared(shards, offsets, rows)
    stream = _shuffled(shards, num_clips, plan.seed, start, way.read_shard)
    stream = stream.batch(plan.batch_size, drop_remainder=True)
    positions = tf.data.Dataset.counter(start=start + rows.start, step=plan.batch_size)

    def decode(position: Any, batch: tuple[Any, Any]) -> Any:
        serialized, offset = way.fetch(*batch)
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
        return decoded, clip_index + offset, tf.ones([count], tf.bool)

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


class _Way(NamedTuple):
    """A way to read records.

    Attributes:
      read_shard: position of a shard -> tf.data dataset of pairs, one for each record.
      fetch: a batch of pairs, [B] and [B] -> serialised records and offsets of their splits, both
        of the rows of this process.
    """

    read_shard: Callable[[Any], Any]
    fetch: Callable[[Any, Any], tuple[Any, Any]]


def _whole(shards: Sequence[Shard], offsets: Sequence[int]) -> _Way:
    """Returns the way of a process that reads all records: pairs are what is to be fetched."""
    paths = tf.constant([str(shard.path) for shard in shards])
    counts = tf.constant([shard.records for shard in shards], tf.int64)
    offset_table = tf.constant(offsets, tf.int32)

    def read_shard(number: Any) -> Any:
        # A TFRecord file that was cut between two records reads without an error.
        records = tf.data.TFRecordDataset(paths[number], buffer_size=1 << 20).apply(
            tf.data.experimental.assert_cardinality(counts[number])
        )
        offset = tf.data.Dataset.from_tensors(offset_table[number]).repeat()
        return tf.data.Dataset.zip((records, offset))

    return _Way(read_shard, lambda serialized, offset: (serialized, offset))


def _shared(shards: Sequence[Shard], offsets: Sequence[int], rows: slice) -> _Way:
    """Returns the way of one of several processes: pairs are of shard and number of a record."""
    counts = tf.constant([shard.records for shard in shards], tf.int64)
    offset_table = tf.constant(offsets, tf.int32)
    opened = RecordFiles(shards)

    def read_shard(number: Any) -> Any:
        shard = tf.data.Dataset.from_tensors(number).repeat()
        return tf.data.Dataset.zip((shard, tf.data.Dataset.range(counts[number])))

    def fetch(shard: Any, number: Any) -> tuple[Any, Any]:
        shard, number = shard[rows], number[rows]
        serialized = tf.numpy_function(opened.read, [shard, number], tf.string)
        return tf.ensure_shape(serialized, shard.shape), tf.gather(offset_table, shard)

    return _Way(read_shard, fetch)


def _shuffled(
    shards: Sequence[Shard],
    num_clips: int,
    seed: int,
    start: int,
    read_shard: Callable[[Any], Any],
) -> Any:
    """Returns an endless tf.data dataset of what `read_shard` makes of the records.

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
