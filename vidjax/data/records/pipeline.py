"""Records as batches of padded frames: endless and shuffled for training, once each to evaluate.

Records are batched before they are parsed, and only the configured modalities are decoded, in their
stored dtype: parsing clip by clip runs at a third of the rate.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidjax.batch import Batch, Frames, Packed
from vidjax.data import arrays, iqiyi_vid, pickle_writer, synthetic
from vidjax.data.clips import (
    MAX_EVAL_FRAMES,
    BatchPlan,
    EvalPlan,
    Modality,
    Split,
    check_modalities,
)
from vidjax.data.records.codec import (
    decode_batch,
    flatten_batch,
    parse_batch,
    random_window,
    tf,
)
from vidjax.data.records.manifest import (
    Records,
    Shard,
    building,
    check_changed,
    check_shard,
    default_cache_dir,
    exclusive,
)
from vidjax.data.untrusted.packing import NonFinite

_LOG = logging.getLogger(__name__)
NAMES = ("synthetic", "iqiyi_vid", "arrays")
OPEN_SHARDS = 16
PACKED_CLIPS = 256
SHUFFLE_RECORDS = 2048
SHUFFLE_BYTES = 128 << 20


class Dataset:
    """Converted clips with their labels: tables for the device, batches for the loop.

    Attributes:
      identities: names of the columns: column c is `identities[c - 1]`.
      modalities: name -> width and stored dtype.
      report: what was loaded and what was skipped, the ground truth included.
    """

    def __init__(
        self,
        records: Records,
        truth: str | Path | iqiyi_vid.Truth,
        *,
        identities: Sequence[str] | None = None,
    ):
        """Labels `records` for some list of identities, that of the truth where it is None.

        Args:
          records: the clips.
          truth: split -> clip -> identity, or the folder of the files that say so.
          identities: in the order of their columns.
        """
        self._records = records
        self._truth = truth
        self.modalities: dict[str, Modality] = records.modalities
        self.identities, labels, self.report = iqiyi_vid.load_labels(truth, records, identities)
        self._splits: dict[str, Split] = {}
        for name, facts in records.splits.items():
            absent = [m for m in self.modalities if m not in facts.lengths]
            if absent:
                warnings.warn(f"{name}: no file of {', '.join(absent)}", stacklevel=2)
            for modality, counts in records.report["splits"][name]["modalities"].items():
                if dropped := counts["frames_skipped"].get("non_finite"):
                    message = f"{counts['file']}: {dropped} of {counts['frames_seen']} frames"
                    warnings.warn(
                        f"{message} have a {modality} feature with a NaN or an Inf: left out",
                        stacklevel=2,
                    )
            self._splits[name] = Split(name, facts.clips, *labels[name], facts.lengths)

    def split(self, name: str) -> Split:
        """Returns one split.

        Raises:
          ValueError: there are no records of that split.
        """
        if name not in self._splits:
            raise ValueError(f"no split {name!r} in the data, only {', '.join(self._splits)}")
        return self._splits[name]

    def with_identities(self, identities: Sequence[str]) -> "Dataset":
        """Returns the same clips, labelled for the columns of a trained model."""
        if tuple(identities) == self.identities:
            return self
        return Dataset(self._records, self._truth, identities=identities)

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
        facts, buckets = self._records.splits[plan.split], plan.bucket
        most = {name: int(clips.lengths[name].max()) for name in plan.modalities}
        lengths = {name: tf.constant(padded) for name, padded in plan.padded_lengths.items()}

        def decode(serialized: Any, buckets: Any) -> Any:
            num_rows = tf.shape(serialized)[0]
            # The parser reads an empty record as a clip of which everything is missing.
            padded = tf.concat([serialized, tf.fill([rows - num_rows], "")], 0)
            clip_index, examples = parse_batch(padded, plan.modalities)
            decoded = {}
            for name, modality in ((name, self.modalities[name]) for name in plan.modalities):
                length = lengths[name][buckets[0]]  # all clips of a block are of one bucket
                best = most[name] > MAX_EVAL_FRAMES
                decoded[name] = decode_batch(examples[name], modality, length, best=best)
            return decoded, clip_index, tf.range(rows) < num_rows

        records = tf.data.Dataset.zip(
            (
                _shard_table(facts.shards).flat_map(_read_shard),
                tf.data.Dataset.from_tensor_slices(buckets[facts.order]),
            )
        )
        if (buckets < 0).any():  # the filter costs a third of a light modality's rate
            records = records.filter(lambda record, bucket: bucket >= 0)
        blocks = records.group_by_window(
            key_func=lambda record, bucket: bucket,
            reduce_func=lambda bucket, group: group.batch(rows),
            window_size=rows,
        )
        dataset = blocks.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
        return self._counted(
            self._batches(dataset, facts.shards), clips, buckets >= 0, facts.shards
        )

    def packed(
        self, split: str, modalities: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, dict[str, Packed]]]:
        """Yields every clip of a split once: some [n] int32 clip_index and modality -> Packed.

        Clips come as the records do, with all their frames.

        Args:
          split: whose clips.
          modalities: which to decode.

        Raises:
          ValueError: an unknown split or modality; damaged records; a clip did not come just once.
        """
        clips = self.split(split)
        check_modalities(clips, modalities)
        facts = self._records.splits[split]

        def decode(serialized: Any) -> Any:
            clip_index, examples = parse_batch(serialized, modalities)
            frames = {m: flatten_batch(examples[m], self.modalities[m]) for m in modalities}
            return frames, clip_index

        records = _shard_table(facts.shards).flat_map(_read_shard).batch(PACKED_CLIPS)
        dataset = records.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
        times = np.zeros(len(clips.clips), np.int64)
        for decoded, clip_index in self._arrays(dataset, facts.shards):
            np.add.at(times, clip_index, 1)
            frames = {}
            for name, fields in decoded.items():
                length = fields["length"]
                dim, dtype = self.modalities[name]
                frames[name] = Packed(
                    features=fields["features"].view(dtype).reshape(-1, dim),
                    quality=fields["quality"],
                    detection=fields["detection"],
                    number=fields["number"],
                    start=np.cumsum(length, dtype=np.int32) - length,
                    length=length,
                )
            yield clip_index, frames
        _check_times(times, clips, np.ones(len(times), bool), facts.shards)

    def _arrays(self, dataset: Any, shards: Sequence[Shard]) -> Iterator[Any]:
        """Yields what the dataset decodes as numpy arrays, without a copy."""
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

    def _batches(self, dataset: Any, shards: Sequence[Shard]) -> Iterator[Batch]:
        for decoded, clip_index, batch_mask in self._arrays(dataset, shards):
            frames = {
                name: Frames(
                    features=fields["features"]
                    .view(self.modalities[name].dtype)
                    .reshape(*fields["mask"].shape, self.modalities[name].dim),  # [B, T, D]
                    quality=fields["quality"],
                    detection=fields["detection"],
                    number=fields["number"],
                    mask=fields["mask"],
                )
                for name, fields in decoded.items()
            }
            yield Batch(frames, clip_index, batch_mask)

    def _counted(
        self, batches: Iterator[Batch], split: Split, wanted: np.ndarray, shards: Sequence[Shard]
    ) -> Iterator[Batch]:
        """Yields the batches; ValueError at the end unless each clip of `wanted` came once."""
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
            f"split {split.name!r}: {wrong.size} of {wanted.sum()} clips did not come just "
            f"once, such as {split.clips[wrong[0]]}"
        )


def load(
    name: str,
    *,
    directory: str | Path | None,
    cache_dir: str | Path | None,
    size: Literal["small", "standard"] = "small",
    seed: int = 0,
    non_finite: NonFinite = "drop",
) -> Dataset:
    """Returns a dataset by name, converted or generated first where that is not done yet.

    Args:
      name: 'synthetic', 'iqiyi_vid' or 'arrays'.
      directory: where the official files are, or the features of one's own as
        `vidjax.data.arrays` describes them; of no meaning to 'synthetic'.
      cache_dir: where records are kept; None for `$VIDJAX_CACHE` or `~/.cache/vidjax`.
      size, seed: of the synthetic dataset.
      non_finite: whether frames with a feature that is not finite are left out and counted
        ('drop'), or are an error.

    Raises:
      ValueError: an unknown name, no directory, or bad data.
      FileNotFoundError: nothing to convert in the directory.
      OSError: the cache cannot be written.
    """
    cache_dir = Path(cache_dir or default_cache_dir()).expanduser()
    if name == "synthetic":
        directory = _synthetic_files(cache_dir / "synthetic", size, seed)
    elif name not in NAMES:
        raise ValueError(f"unknown dataset {name!r}: config.data.name is one of {', '.join(NAMES)}")
    elif not directory:
        files = "official files" if name == "iqiyi_vid" else "features"
        raise ValueError(f"config.data.dir is not set: name the directory of the {files}")
    elif name == "arrays":
        return arrays.load(directory, cache_dir=cache_dir, non_finite=non_finite)
    directory = Path(directory).expanduser()
    records = iqiyi_vid.prepare(directory, cache_dir, non_finite=non_finite)
    return Dataset(records, directory)


def _synthetic_files(root: Path, size: Literal["small", "standard"], seed: int) -> Path:
    """Returns the directory of the synthetic set as official files, written at the first call."""
    # Its own source is the version of a generator: nobody can forget to raise it.
    source = b"".join(Path(str(room.__file__)).read_bytes() for room in (synthetic, pickle_writer))
    version = hashlib.sha256(source).hexdigest()[:12]
    folder = root / f"{size}-{seed}-{version}"
    if not folder.exists():
        with exclusive(root):
            if not folder.exists():
                _LOG.info("making the synthetic dataset in %s", folder)
                with building(folder) as partial:
                    synthetic.write(partial, size=size, seed=seed)
    return folder


def _shard_table(shards: Sequence[Shard]) -> Any:
    """Returns a tf.data dataset of (path, number of records)."""
    return tf.data.Dataset.from_tensor_slices(
        ([str(s.path) for s in shards], np.array([s.records for s in shards], np.int64))
    )


def _read_shard(path: Any, num_records: Any) -> Any:
    """Returns the serialised records of a shard; reading fails unless there are `num_records`."""
    # A TFRecord file that was cut between two records reads without an error.
    return tf.data.TFRecordDataset(path, buffer_size=1 << 20).apply(
        tf.data.experimental.assert_cardinality(num_records)
    )


def _shuffled(
    shards: Sequence[Shard], offsets: Sequence[int], num_clips: int, seed: int, start: int
) -> Any:
    """Returns a tf.data dataset of (serialised record, offset of its split) without end."""
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
