"""Endless, shuffled batches of records, which are read ahead while earlier batches are in use.

Records are batched before they are parsed, and only the configured modalities are decoded, in their
stored dtype: parsing clip by clip runs at a third of the rate. A single process reads whole shards
and shuffles their records. Several processes shuffle record numbers, all in the same way, and each
reads only its own records.
"""

import collections
import itertools
from collections.abc import Callable, Iterator
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
    stream = _Stream(records, plan, start, share)
    return stream.batches(stream.read_whole() if share.parts == 1 else stream.read_own())


class _Stream:
    """The records of all batches from clip number `start` on; decoded are the rows of a process."""

    def __init__(self, records: Records, plan: BatchPlan, start: int, share: Share):
        self._records, self._plan = records, plan
        self._shards: list[Shard] = []
        offsets, num_clips = [], 0
        for split in plan.splits:
            found = records.splits[split]
            self._shards += found.shards
            offsets += [num_clips] * len(found.shards)
            num_clips += len(found.clips)
        # Of shards: the clip_index of a record counts from it.
        self._offsets = np.array(offsets, np.int32)
        self._counts = tf.constant([shard.records for shard in self._shards], tf.int64)
        self._num_clips, self._start = num_clips, start
        self._rows = own_rows(plan.batch_size, share)

    def batches(self, found: Iterator[Any]) -> Iterator[Batch]:
        """Yields decoded clips as batches; ValueError, with file and record, if one is damaged."""
        check_changed(self._shards)
        while True:
            try:
                decoded, clip_index = next(found)
            except (tf.errors.OpError, ValueError, OSError) as error:
                for shard in self._shards:
                    check_shard(shard)
                reason = " ".join(str(error).split())[:200]
                folder = self._shards[0].path.parent
                raise UserError(f"{folder}: cannot read the records: {reason}") from error
            frames = {}
            for name, fields in decoded.items():
                dim, dtype = self._records.modalities[name]
                shape = (*fields["mask"].shape, dim)  # [B, T, D]
                fields["features"] = fields["features"].view(dtype).reshape(shape)
                frames[name] = Frames(**fields)
            # Outside of `try`: when the process ends, TensorFlow may be gone.
            yield Batch(frames, clip_index, np.ones(len(clip_index), bool))

    def read_whole(self) -> Iterator[Any]:
        """Yields decoded batches; tf.data reads whole shards."""
        paths = tf.constant([str(shard.path) for shard in self._shards])
        offsets = tf.constant(self._offsets)

        def read_shard(shard: Any) -> Any:
            # A TFRecord file that was cut between two records reads without an error.
            records = tf.data.TFRecordDataset(paths[shard], buffer_size=1 << 20).apply(
                tf.data.experimental.assert_cardinality(self._counts[shard])
            )
            return tf.data.Dataset.zip((records, _repeated(offsets[shard])))

        counter = tf.data.Dataset.counter(start=self._start, step=self._plan.batch_size)
        dataset = tf.data.Dataset.zip((counter, self._shuffled(read_shard))).map(
            lambda position, batch: self._decode(position, *batch),
            num_parallel_calls=2,
            deterministic=True,
        )
        yield from _deterministic(dataset.prefetch(1))

    def read_own(self) -> Iterator[Any]:
        """Yields the decoded rows of one process, which threads read ahead by number of record.

        The threads are Python's: if tf.data called Python functions, a process that ends while a
        batch is read ahead would wait for itself.
        """

        def number_records(shard: Any) -> Any:
            return tf.data.Dataset.zip(
                (_repeated(shard), tf.data.Dataset.range(self._counts[shard]))
            )

        strings = tf.TensorSpec([None], tf.string)
        signature = [tf.TensorSpec([], tf.int64), strings, tf.TensorSpec([None], tf.int32)]
        decode = tf.function(self._decode, input_signature=signature)
        opened = RecordFiles(self._shards)

        def read(position: int, shard: np.ndarray, number: np.ndarray) -> Any:
            serialized = tf.constant(opened.read(shard, number), tf.string)
            offset = tf.constant(self._offsets[shard])
            decoded = decode(tf.constant(position, tf.int64), serialized, offset)
            return tf.nest.map_structure(np.asarray, decoded)

        waiting = collections.deque()
        positions = itertools.count(self._start + self._rows.start, self._plan.batch_size)
        with ThreadPoolExecutor(READERS) as threads:
            for shard, number in _deterministic(self._shuffled(number_records)):
                own = shard[self._rows], number[self._rows]
                waiting.append(threads.submit(read, next(positions), *own))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()

    def _decode(self, position: Any, serialized: Any, offset: Any) -> Any:
        """Decodes B serialised records.

        `position` of the first clip is that in the stream; `offset` [B] int32 are added to the
        clip_index of records.
        """
        clip_index, examples = parse_batch(serialized, self._plan.modalities)
        count = self._rows.stop - self._rows.start
        positions = position + tf.range(count, dtype=tf.int64)
        decoded = {}
        for number, (name, length) in enumerate(self._plan.padded_lengths.items()):
            modality, fields = self._records.modalities[name], examples[name]
            if name in self._plan.windowed:
                seed = (self._plan.seed, number)
                fields = random_window(fields, modality, length, positions, seed)
            best = name in self._plan.longer and self._plan.crop == "quality"
            decoded[name] = decode_batch(fields, modality, length, best=best)
        return decoded, clip_index + offset

    def _shuffled(self, read_shard: Callable[[Any], Any]) -> Any:
        """Returns an endless tf.data dataset of batches of the elements of `read_shard`.

        Every epoch reads the shards in another order, OPEN_SHARDS at a time, through a shuffle
        buffer. The order does not depend on what the elements are.
        """
        mean_bytes = sum(shard.size for shard in self._shards) // self._num_clips + 1
        buffer = min(self._num_clips, SHUFFLE_RECORDS, max(1, SHUFFLE_BYTES // mean_bytes))
        first_epoch, skipped = divmod(self._start, self._num_clips)
        seed, num_shards = self._plan.seed, len(self._shards)

        def read_epoch(epoch: Any) -> Any:
            order = tf.random.experimental.stateless_shuffle(
                tf.range(num_shards), seed=tf.stack([seed, 2 * epoch])
            )
            buffer_seed = tf.random.stateless_uniform(
                [], seed=tf.stack([seed, 2 * epoch + 1]), minval=None, maxval=None, dtype=tf.int64
            )
            records = tf.data.Dataset.from_tensor_slices(order).interleave(
                read_shard, cycle_length=min(OPEN_SHARDS, num_shards), block_length=1
            )
            records = records.shuffle(buffer, seed=buffer_seed, reshuffle_each_iteration=False)
            return records.skip(tf.where(epoch == first_epoch, tf.constant(skipped, tf.int64), 0))

        epochs = tf.data.Dataset.counter(start=first_epoch).flat_map(read_epoch)
        return epochs.batch(self._plan.batch_size, drop_remainder=True)


def _repeated(value: Any) -> Any:
    return tf.data.Dataset.from_tensors(value).repeat()


def _deterministic(dataset: Any) -> Iterator[Any]:
    """Yields the elements of a tf.data dataset as numpy arrays, without a copy."""
    options = tf.data.Options()
    options.deterministic = True
    yield from dataset.with_options(options).as_numpy_iterator()
