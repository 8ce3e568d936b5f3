"""Records as batches of padded frames: endless and shuffled for training, once each to evaluate.

Records are batched before they are parsed, and only the configured modalities are decoded, in their
stored dtype: parsing clip by clip runs at a third of the rate.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.batch import Batch, Frames, Packed
from vidjax.data.clips import (
    MAX_EVAL_FRAMES,
    BatchPlan,
    EvalPlan,
    Modality,
    Split,
    check_modalities,
)
from vidjax.data.frame_fields import NonFinite
from vidjax.data.labels import Truth
from vidjax.data.record_source import Origin, RecordSource
from vidjax.data.records.codec import (
    decode_batch,
    flatten_batch,
    parse_batch,
    random_window,
    tf,
)
from vidjax.data.records.convert import convert
from vidjax.data.records.manifest import Records, Shard, SplitRecords, check_changed, check_shard
from vidjax.data.records.report import digest_data, label_records
from vidjax.data.usable import equal_quality, misspelt

OPEN_SHARDS = 16
PACKED_CLIPS = 256
SHUFFLE_RECORDS = 2048
SHUFFLE_BYTES = 128 << 20


class Dataset:
    """Converted clips with their labels; a `TrainingData`.

    Attributes:
      identities: names of the class columns: column c is `identities[c - 1]`.
      modalities: modality -> width and stored dtype.
      report: counts of loaded and skipped frames and clips, and of labels; under `data` the
        origin of the clips and the digest of clips and labels.
    """

    def __init__(
        self,
        records: Records,
        truth: Truth,
        *,
        identities: Sequence[str] | None = None,
        origin: Origin | None = None,
    ):
        """Labels records.

        Args:
          records: the clips.
          truth: labelled split -> clip -> identity.
          identities: names of the class columns; None for the identities of the train and val
            ground truth.
          origin: the origin of the clips; None if it is not known.
        """
        self._records = records
        self._truth = truth
        self._origin = origin or Origin("records")
        self.modalities: dict[str, Modality] = records.modalities
        self.identities, labels, self.report = label_records(records, truth, identities)
        self.report["data"] = self._origin._asdict() | {"digest": digest_data(records, truth)}
        self._splits: dict[str, Split] = {}
        for name, split in records.splits.items():
            _warn_of_gaps(name, split, self.modalities, self.report["splits"][name]["modalities"])
            self._splits[name] = Split(name, split.clips, *labels[name], split.lengths)
        lengths = {name: split.lengths for name, split in records.splits.items()}
        for problem in (*misspelt(lengths), *equal_quality(self.report, list(self.modalities))):
            warnings.warn(problem, stacklevel=2)

    @classmethod
    def from_source(
        cls,
        source: RecordSource,
        *,
        cache_dir: str | Path | None = None,
        non_finite: NonFinite = "drop",
        origin: Origin | None = None,
    ) -> "Dataset":
        """Returns the clips and labels of a source, converting it unless the cache has it.

        Args:
          source: the frames and their labels.
          cache_dir: folder of the cache; None for `$VIDJAX_CACHE` or `~/.cache/vidjax`.
          non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
            refuses them.
          origin: the origin of the clips; None for one that bears the source's kind.

        Raises:
          ValueError: bad data, malformed labels, or labels of unknown clips.
          OSError: the cache cannot be written.
        """
        records = convert(source, cache_dir, non_finite=non_finite)
        truth = source.truth(records.clips)
        return cls(records, truth, origin=origin or Origin(source.kind))

    def split(self, name: str) -> Split:
        """Returns one split.

        Raises:
          ValueError: there are no records of that split.
        """
        if name not in self._splits:
            raise ValueError(f"no split {name!r} in the data, only {', '.join(self._splits)}")
        return self._splits[name]

    def with_identities(self, identities: Sequence[str]) -> "Dataset":
        """Returns the same clips, labelled for other class columns."""
        if tuple(identities) == self.identities:
            return self
        return Dataset(self._records, self._truth, identities=identities, origin=self._origin)

    def train_batches(self, plan: BatchPlan, *, start: int = 0) -> Iterator[Batch]:
        """Yields batches without end; every clip comes once per epoch.

        Batches run on across epochs: none is short and no clip is dropped. The order of clips
        depends on the plan's seed and the epoch alone.

        Args:
          plan: the batches, from `make_batch_plan`.
          start: number of clips in the batches before; the stream continues after them.

        Raises:
          ValueError: an unknown split, a split without one of the modalities, a negative `start`,
            or, while reading, damaged records.
        """
        if start < 0:
            raise ValueError(f"start={start}: must be 0 or more")
        shards, offsets, num_clips = [], [], 0
        for split in plan.splits:
            check_modalities(self.split(split), plan.modalities)
            shards += self._records.splits[split].shards
            offsets += [num_clips] * len(self._records.splits[split].shards)
            num_clips += len(self.split(split).clips)

        records = _shuffled(shards, offsets, num_clips, plan.seed, start)
        records = records.batch(plan.batch_size, drop_remainder=True)
        positions = tf.data.Dataset.counter(start=start, step=plan.batch_size)

        def decode(position: Any, batch: tuple[Any, Any]) -> Any:
            serialized, offset = batch
            clip_index, examples = parse_batch(serialized, plan.modalities)
            positions = position + tf.range(plan.batch_size, dtype=tf.int64)
            decoded = {}
            for number, (name, length) in enumerate(plan.padded_lengths.items()):
                modality, fields = self.modalities[name], examples[name]
                if name in plan.windowed:
                    seed = (plan.seed, number)
                    fields = random_window(fields, modality, length, positions, seed)
                best = name in plan.longer and plan.crop == "quality"
                decoded[name] = decode_batch(fields, modality, length, best=best)
            return decoded, clip_index + offset, tf.ones([plan.batch_size], tf.bool)

        dataset = tf.data.Dataset.zip((positions, records))
        dataset = dataset.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
        return self._batches(dataset, shards)

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks of `rows` rows from one bucket.

        Within a bucket clips come in the order of the records: by name, except in 'train'. See
        `ClipSource.eval_batches`.

        Args:
          plan: the clips, as `make_eval_plan` groups them.
          rows: number of rows per block.

        Raises:
          ValueError: an unknown split, a split without one of the modalities, damaged records, or
            a clip that did not come exactly once.
        """
        clips = self.split(plan.split)
        check_modalities(clips, plan.modalities)
        _, order, _, shards = self._records.splits[plan.split]
        most = {name: int(clips.lengths[name].max()) for name in plan.modalities}
        lengths = {name: tf.constant(padded) for name, padded in plan.padded_lengths.items()}

        def decode(serialized: Any, buckets: Any) -> Any:
            num_rows = tf.shape(serialized)[0]
            # An empty string parses as a clip without frames.
            padded = tf.concat([serialized, tf.fill([rows - num_rows], "")], 0)
            clip_index, examples = parse_batch(padded, plan.modalities)
            decoded = {}
            for name in plan.modalities:
                length = lengths[name][buckets[0]]  # all clips of a block are of one bucket
                best = most[name] > MAX_EVAL_FRAMES
                fields, modality = examples[name], self.modalities[name]
                decoded[name] = decode_batch(fields, modality, length, best=best)
            return decoded, clip_index, tf.range(rows) < num_rows

        buckets = tf.data.Dataset.from_tensor_slices(plan.bucket[order])
        records = tf.data.Dataset.zip((_read_shards(shards), buckets))
        if (plan.bucket < 0).any():  # the filter costs a third of a light modality's rate
            records = records.filter(lambda record, bucket: bucket >= 0)
        blocks = records.group_by_window(
            key_func=lambda record, bucket: bucket,
            reduce_func=lambda bucket, group: group.batch(rows),
            window_size=rows,
        )
        dataset = blocks.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
        return _counted(self._batches(dataset, shards), clips, plan.bucket >= 0, shards)

    def packed(
        self, split: str, modalities: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, dict[str, Packed]]]:
        """Yields every clip of a split once with all its frames, PACKED_CLIPS clips at a time.

        Clips come in the order of the records.

        Args:
          split: name of the split.
          modalities: the modalities to read.

        Yields:
          [n] int32 clip_index, and modality -> Packed of these n clips.

        Raises:
          ValueError: an unknown split, a split without one of the modalities, damaged records, or a
            clip that did not come exactly once.
        """
        clips = self.split(split)
        check_modalities(clips, modalities)
        shards = self._records.splits[split].shards

        def decode(serialized: Any) -> Any:
            clip_index, examples = parse_batch(serialized, modalities)
            frames = {m: flatten_batch(examples[m], self.modalities[m]) for m in modalities}
            return frames, clip_index

        records = _read_shards(shards).batch(PACKED_CLIPS)
        dataset = records.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
        times = np.zeros(len(clips.clips), np.int64)
        for decoded, clip_index in _arrays(dataset, shards):
            np.add.at(times, clip_index, 1)
            frames = {}
            for name, fields in decoded.items():
                length = fields.pop("length")
                dim, dtype = self.modalities[name]
                fields["features"] = fields["features"].view(dtype).reshape(-1, dim)
                start = np.cumsum(length, dtype=np.int32) - length
                frames[name] = Packed(**fields, start=start, length=length)
            yield clip_index, frames
        _check_times(times, clips, np.ones(len(times), bool), shards)

    def _batches(self, dataset: Any, shards: Sequence[Shard]) -> Iterator[Batch]:
        """Yields the decoded clips of a tf.data dataset as batches."""
        for decoded, clip_index, batch_mask in _arrays(dataset, shards):
            frames = {}
            for name, fields in decoded.items():
                dim, dtype = self.modalities[name]
                shape = (*fields["mask"].shape, dim)  # [B, T, D]
                fields["features"] = fields["features"].view(dtype).reshape(shape)
                frames[name] = Frames(**fields)
            yield Batch(frames, clip_index, batch_mask)


def _warn_of_gaps(
    name: str,
    split: SplitRecords,
    modalities: Mapping[str, Modality],
    report: Mapping[str, Mapping[str, Any]],
) -> None:
    """Warns of modalities that a split lacks, and of frames that were left out."""
    absent = [modality for modality in modalities if modality not in split.lengths]
    if absent:
        warnings.warn(f"{name}: no file of {', '.join(absent)}", stacklevel=3)
    for modality, counts in report.items():
        if dropped := counts["frames_skipped"].get("non_finite"):
            warnings.warn(
                f"{counts['file']}: {dropped} of {counts['frames_seen']} frames have a {modality} "
                "feature with a NaN, an Inf or a value beyond float32: left out",
                stacklevel=3,
            )


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
            _check_all(shards)
            reason = " ".join(str(error.message).split())[:200]
            folder = shards[0].path.parent
            raise ValueError(f"{folder}: cannot read the records: {reason}") from error
        yield decoded


def _counted(
    batches: Iterator[Batch], split: Split, wanted: np.ndarray, shards: Sequence[Shard]
) -> Iterator[Batch]:
    """Yields the batches; ValueError at the end unless each clip of `wanted` came exactly once."""
    times = np.zeros(len(split.clips), np.int64)
    for batch in batches:
        np.add.at(times, batch.clip_index[batch.batch_mask], 1)
        yield batch
    _check_times(times, split, wanted, shards)


def _check_all(shards: Sequence[Shard]) -> None:
    """Raises ValueError, with file and record, when one of the shards is damaged."""
    for shard in shards:
        check_shard(shard)


def _check_times(
    times: np.ndarray, split: Split, wanted: np.ndarray, shards: Sequence[Shard]
) -> None:
    """Raises ValueError unless each clip of `wanted` [N] bool came once, and no other did."""
    wrong = np.flatnonzero(times != wanted)
    if wrong.size:
        _check_all(shards)
        raise ValueError(
            f"split {split.name!r}: {wrong.size} of {wanted.sum()} clips did not come exactly "
            f"once, such as {split.clips[wrong[0]]}"
        )


def _read_shards(shards: Sequence[Shard]) -> Any:
    """Returns a tf.data dataset of the serialised records, in order."""
    paths = [str(shard.path) for shard in shards]
    counts = np.array([shard.records for shard in shards], np.int64)
    return tf.data.Dataset.from_tensor_slices((paths, counts)).flat_map(_read_shard)


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
