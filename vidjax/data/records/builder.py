"""The TFDS builder that writes flat clips as TFRecord shards."""

import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS, STORED, PackedClips
from vidjax.data.records.codec import PackedFrames, tf, tfds
from vidjax.data.records.manifest import VERSION

MIN_SHARDS = 8
SHARD_BYTES = 256 << 20
ORDER_SEED = 0


class StagedSplit(NamedTuple):
    """One split before it is written: clips joined by name, arrays still flat.

    Attributes:
      clips: N clip names in byte order.
      order: [N] int32, clip index of each record.
      packed: modality -> its flat arrays.
      starts: modality -> [N] int64, first frame of each clip, by clip index.
      lengths: modality -> [N] int32, number of frames of each clip, by clip index.
    """

    clips: tuple[str, ...]
    order: np.ndarray
    packed: dict[str, PackedClips]
    starts: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]


def stage(split: str, packed: Mapping[str, PackedClips]) -> StagedSplit:
    """Joins the clips of one split by name over its modalities."""
    # Python orders str by code point, which is the byte order of UTF-8.
    clips = tuple(sorted({name for flat in packed.values() for name in flat.names}))
    index = {name: position for position, name in enumerate(clips)}
    starts, lengths = {}, {}
    for modality, flat in packed.items():
        rows = np.fromiter((index[name] for name in flat.names), np.int64, len(flat.names))
        starts[modality] = np.zeros(len(clips), np.int64)
        lengths[modality] = np.zeros(len(clips), np.int32)
        starts[modality][rows] = flat.starts()
        lengths[modality][rows] = flat.lengths
    # Ground truth, and often the names with it, is sorted by identity. A shuffle buffer does not
    # undo that; one permutation of all training clips does.
    shuffled = np.random.default_rng(ORDER_SEED).permutation(len(clips))
    order = shuffled if split == "train" else np.arange(len(clips))
    return StagedSplit(clips, order.astype(np.int32), dict(packed), starts, lengths)


def shard_bounds(split: StagedSplit, modalities: Mapping[str, Modality]) -> list[tuple[int, int]]:
    """Returns the first and last + 1 record of each shard; no shard is empty."""
    num_bytes = sum(
        int(split.lengths[name].sum()) * modality.dim * np.dtype(modality.dtype).itemsize
        for name, modality in modalities.items()
        if name in split.lengths
    )
    num_shards = min(len(split.clips), max(MIN_SHARDS, -(-num_bytes // SHARD_BYTES)))
    bounds = [len(split.clips) * shard // num_shards for shard in range(num_shards + 1)]
    return list(itertools.pairwise(bounds))


def release_pages(split: StagedSplit) -> None:
    """Frees the memory of pages that were read: mapped files count as memory of the process."""
    for packed, field in itertools.product(split.packed.values(), STORED):
        owner = packed.frames[field]
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            owner.madvise(mmap.MADV_DONTNEED)


class _SortedWriter(tfds.core.ExampleWriter):
    """Writes the fields of every record in sorted order, so that equal data makes equal files.

    Protocol buffers write a map in an order that differs from process to process.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes one shard of (key, serialised record)."""
        parse = tf.train.Example.FromString
        ordered = (
            (key, parse(record).SerializeToString(deterministic=True)) for key, record in examples
        )
        return super().write(path, ordered)


class FrameRecords(tfds.core.ShardBasedBuilder):
    """Records of frames: clip name, clip index and the packed frames of each modality.

    It gets whole shards rather than a stream to shuffle: the shuffler of TFDS holds up to 1 GB and
    writes the rest to disk once more. `stage` has ordered the records already.
    """

    VERSION = tfds.core.Version(VERSION)
    # TFDS writes both into the files: a change would make other files of the same data.
    name = "iqiyi_vid"
    __module__ = "vidjax.data.iqiyi_vid"

    def __init__(
        self,
        *,
        modalities: Mapping[str, Modality],
        staged: Mapping[str, StagedSplit],
        data_dir: Any,
    ):
        """Makes the builder that writes `staged` under `data_dir`."""
        self._modalities = modalities
        self._staged = staged
        super().__init__(data_dir=data_dir)

    def _info(self) -> Any:
        frames = {
            name: PackedFrames(dim=modality.dim, dtype=modality.dtype)
            for name, modality in self._modalities.items()
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Frame features of video clips, converted from official pickles.",
            features=tfds.features.FeaturesDict(
                {
                    "clip": tfds.features.Text(),
                    "clip_index": tfds.features.Scalar(dtype=np.int64),
                    "frames": tfds.features.FeaturesDict(frames),
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        return {
            name: [
                lambda split=split, first=first, last=last: self._examples(split, first, last)
                for first, last in shard_bounds(split, self._modalities)
            ]
            for name, split in self._staged.items()
        }

    def _example_writer(self) -> _SortedWriter:
        return _SortedWriter(self.info.file_format)

    def _examples(self, split: StagedSplit, first: int, last: int) -> Iterator[tuple[int, dict]]:
        for index in split.order[first:last].tolist():
            frames = {
                name: _clip_frames(split, name, index, modality)
                for name, modality in self._modalities.items()
            }
            yield index, {"clip": split.clips[index], "clip_index": index, "frames": frames}
        release_pages(split)


def _clip_frames(
    split: StagedSplit, name: str, index: int, modality: Modality
) -> dict[str, np.ndarray]:
    """Returns field -> frames of one clip, views of the flat arrays; of length 0 without any."""
    if name not in split.packed or not split.lengths[name][index]:
        features = np.zeros((0, modality.dim), modality.dtype)
        fields = {name: field.default(0) for name, field in FRAME_FIELDS.items()}
        return {"features": features, **fields}
    start = int(split.starts[name][index])
    frames = slice(start, start + int(split.lengths[name][index]))
    return {field: split.packed[name].frames[field][frames] for field in STORED}
