"""Records as batches of padded frames: endless and shuffled for training, once each to evaluate.

Records are batched before they are parsed, and only the configured modalities are decoded, in their
stored dtype: parsing clip by clip runs at a third of the rate.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidjax.batch import Batch, Frames, Packed
from vidjax.data import arrays, iqiyi_vid, pickle_writer, synthetic
from vidjax.data.clips import MAX_EVAL_FRAMES, Blocks, Split, longest, make_blocks, padded
from vidjax.data.records.codec import (
    Modality,
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
            none = np.zeros(len(facts.clips), np.int32)
            lengths = {m: facts.lengths.get(m, none) for m in self.modalities}
            self._splits[name] = Split(name, facts.clips, *labels[name], lengths)

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

    def num_cropped(
        self, *, splits: Sequence[str], modalities: Sequence[str], max_frames: int
    ) -> dict[str, dict[str, int]]:
        """Returns modality -> the `clips` that lose frames in an epoch, and how many `frames`."""
        self._check(splits, modalities)
        counts = {}
        for name in modalities:
            lengths = np.concatenate([self.split(split).lengths[name] for split in splits])
            lost = np.maximum(lengths.astype(np.int64) - max_frames, 0)
            counts[name] = {"clips": int((lost > 0).sum()), "frames": int(lost.sum())}
        return counts

    def train_batches(
        self,
        *,
        splits: Sequence[str],
        modalities: Sequence[str],
        batch_size: int,
        max_frames: int,
        crop: Literal["window", "quality"],
        seed: int,
        start: int = 0,
    ) -> Iterator[Batch]:
        """Yields batches without end, every clip once an epoch, in an order of (seed, epoch) alone.

        Batches run on across epochs, so none is short and no clip is dropped.

        Args:
          splits: whose clips; clip_index counts through them one after another.
          modalities: which to decode.
          batch_size: clips a batch; may exceed the clips there are.
          max_frames: T of a modality whose clips are longer; others take their longest, rounded up.
          crop: what a clip of more frames gives: 'window', consecutive ones from a random place, or
            'quality', the best ones in time order.
          seed: of order and windows.
          start: clips that earlier batches held; the stream goes on exactly where they ended.

        Raises:
          ValueError: an unknown split, modality or crop; or, while reading, damaged records.
        """
        self._check(splits, modalities)
        if crop not in ("window", "quality"):
            raise ValueError(f"crop is 'window' or 'quality', got {crop!r}")
        if batch_size < 1 or max_frames < 1 or start < 0:
            raise ValueError(
                f"batch_size {batch_size} and max_frames {max_frames} must be 1 or more, "
                f"start {start} 0 or more"
            )
        longest = {name: self._most(splits, name) for name in modalities}
        num_frames = self.train_sizes(splits, modalities, max_frames)
        shards, offsets, num_clips = [], [], 0
        for split in splits:
            shards += self._records.splits[split].shards
            offsets += [num_clips] * len(self._records.splits[split].shards)
            num_clips += len(self.split(split).clips)

        records = _shuffled(shards, offsets, num_clips, seed, start)
        records = records.batch(batch_size, drop_remainder=True)
        positions = tf.data.Dataset.counter(start=start, step=batch_size)

        def decode(position: Any, batch: tuple[Any, Any]) -> Any:
            serialized, offset = batch
            clip_index, examples = parse_batch(serialized, modalities)
            positions = position + tf.range(batch_size, dtype=tf.int64)
            decoded = {}
            for number, name in enumerate(modalities):
                modality, size = self.modalities[name], num_frames[name]
                fields, too_long = examples[name], longest[name] > size
                if too_long and crop == "window":
                    fields = random_window(fields, modality, size, positions, (seed, number))
                best = too_long and crop == "quality"
                decoded[name] = decode_batch(fields, modality, size, best=best)
            return decoded, clip_index + offset, tf.ones([batch_size], tf.bool)

        dataset = tf.data.Dataset.zip((positions, records))
        dataset = dataset.map(decode, num_parallel_calls=2, deterministic=True).prefetch(1)
        return self._batches(dataset, shards)

    def _most(self, splits: Sequence[str], modality: str) -> int:
        return max(int(self.split(split).lengths[modality].max()) for split in splits)

    def train_sizes(
        self, splits: Sequence[str], modalities: Sequence[str], max_frames: int
    ) -> dict[str, int]:
        """Returns modality -> T of training, of clips of which at most `max_frames` are used."""
        return {name: padded(self._most(splits, name), max_frames) for name in modalities}

    def longest(self, split: str, modalities: Sequence[str]) -> np.ndarray:
        """Returns [N] int32, the frames of each clip in whichever of the modalities has most.

        Raises:
          ValueError: an unknown split or modality.
        """
        self._check([split], modalities)
        return longest(self.split(split), modalities)

    def blocks(
        self,
        split: str,
        modalities: Sequence[str],
        lengths: np.ndarray | None = None,
        only: np.ndarray | None = None,
    ) -> Blocks:
        """Returns which clips are evaluated together; arguments as of `eval_batches`.

        Raises:
          ValueError: an unknown split or modality; lengths or only not one a clip; a clip with
            more frames than `lengths` says.
        """
        self._check([split], modalities)
        return make_blocks(self.split(split), modalities, lengths, only)

    def eval_batches(
        self,
        *,
        split: str,
        modalities: Sequence[str],
        rows: int,
        lengths: np.ndarray | None = None,
        only: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """Yields every clip of a split once, in blocks of `rows` rows and of similar length.

        A clip's bucket follows from its own length, and how far each modality is padded there from
        the whole split: T depends on the clip, its split and `lengths` alone, never on `rows`
        or `only`. Within a bucket clips come as the records do: by name, except in 'train'.
        Beyond 512 frames the best 512 by quality are kept, in time order; where quality ties,
        the earlier ones.

        Args:
          split: whose clips.
          modalities: which to decode.
          rows: clips a block; blocks are filled up with rows of batch_mask False.
          lengths: [N] int, what chooses the bucket of each clip; None for `longest` of the
            modalities. Datasets of the same clips give the same blocks where this is the same,
            such as the maximum of what `longest` says of each.
          only: [N] bool, the clips that come, the others are not decoded; None for all.

        Raises:
          ValueError: an unknown split or modality; lengths or only not one a clip; a clip with
            more frames than `lengths` says; damaged records; a clip did not come just once.
        """
        plan = self.blocks(split, modalities, lengths, only)
        facts, clips = self._records.splits[split], self.split(split)
        buckets = plan.bucket
        most = {name: int(clips.lengths[name].max()) for name in modalities}
        sizes = {name: tf.constant(of_bucket) for name, of_bucket in plan.sizes.items()}

        def decode(serialized: Any, buckets: Any) -> Any:
            num_rows = tf.shape(serialized)[0]
            # The parser reads an empty record as a clip of which everything is missing.
            padded = tf.concat([serialized, tf.fill([rows - num_rows], "")], 0)
            clip_index, examples = parse_batch(padded, modalities)
            decoded = {}
            for name in modalities:
                size = sizes[name][buckets[0]]  # all of a block are of one bucket
                best = most[name] > MAX_EVAL_FRAMES
                decoded[name] = decode_batch(examples[name], self.modalities[name], size, best=best)
            return decoded, clip_index, tf.range(rows) < num_rows

        records = tf.data.Dataset.zip(
            (
                _shard_table(facts.shards).flat_map(_read_shard),
                tf.data.Dataset.from_tensor_slices(buckets[facts.order]),
            )
        )
        if only is not None:  # asking every record costs a third of a light modality's rate
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
        self, *, split: str, modalities: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, dict[str, Packed]]]:
        """Yields every clip of a split once: some [n] int32 clip_index and modality -> Packed.

        Clips come as the records do, with all their frames.

        Args:
          split: whose clips.
          modalities: which to decode.

        Raises:
          ValueError: an unknown split or modality; damaged records; a clip did not come just once.
        """
        self._check([split], modalities)
        facts, clips = self._records.splits[split], self.split(split)

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

    def _check(self, splits: Sequence[str], modalities: Sequence[str]) -> None:
        """Raises ValueError unless every split has a file of every modality."""
        for words in (splits, modalities):
            if not words or len(set(words)) < len(words):
                raise ValueError(f"wanted one name or more, none of them twice, got {words}")
        for split in splits:
            self.split(split)
            for name in modalities:
                if name not in self.modalities:
                    raise ValueError(
                        f"no modality {name!r} in the data, only {', '.join(self.modalities)}"
                    )
                if name not in self._records.splits[split].lengths:
                    own = isinstance(self._truth, Mapping)
                    what = f"{name} in {split}" if own else f"{name}_{split}.pickle"
                    raise ValueError(f"there is no {what}, and {name!r} is asked for")

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
