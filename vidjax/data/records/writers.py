"""Writes shards: clips in their order, cut into files of about SHARD_BYTES.

A shard is a function of its task: threads write the tasks in any order, to the same bytes.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS, STORED, PackedClips
from vidjax.data.packing import StagedSplit
from vidjax.data.records import shard_files
from vidjax.machine import most_files

MIN_SHARDS = 8
SHARD_BYTES = 256 << 20


class ShardTask(NamedTuple):
    """All that it takes to write one shard of n records.

    Attributes:
      packed: modality -> its clips, in parts; only the modalities that the split has.
      order: [n] int32, the clip index of each record.
      starts: modality -> [n] int64, first frame of each record, counted over all parts.
      lengths: modality -> [n] int32, number of frames of each record.
      threads: how many tasks are written at once, see `num_threads`.
    """

    path: Path
    modalities: dict[str, Modality]
    packed: dict[str, list[PackedClips]]
    clips: tuple[str, ...]
    order: np.ndarray
    starts: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    threads: int = 1

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Yields the fields of each record; its frames are views of mapped files.

        Each call maps the files again, so that what it read of them leaves the memory afterwards.
        """
        ends = {
            name: [*itertools.accumulate(int(part.lengths.sum()) for part in parts)]
            for name, parts in self.packed.items()
        }
        fitting = int(min(sum(map(len, ends.values())), fitting_parts() / self.threads))
        # The record before keeps parts mapped that the cache has dropped.
        mapped = functools.lru_cache(max(len(ends), fitting - len(ends)))(
            lambda name, number: dict(self.packed[name][number].frames)
        )
        none = {name: field.default(0) for name, field in FRAME_FIELDS.items()}

        def frames_of(name: str, start: int, length: int) -> dict[str, np.ndarray]:
            """Returns field -> frames of a clip, which is in one part."""
            if not length:
                modality = self.modalities[name]
                return {"features": np.zeros((0, modality.dim), modality.dtype), **none}
            number = bisect.bisect_right(ends[name], start)
            part = mapped(name, number)
            first = start - (ends[name][number] - len(part["features"]))
            return {field: part[field][first : first + length] for field in STORED}

        absent = np.zeros(len(self.clips), np.int64)
        for record, (clip, index) in enumerate(zip(self.clips, self.order, strict=True)):
            frames = {}
            for name in self.modalities:
                columns = self.starts.get(name, absent), self.lengths.get(name, absent)
                frames[name] = frames_of(name, *(int(column[record]) for column in columns))
            yield {"clip": clip, "clip_index": int(index), "frames": frames}


def fitting_parts() -> float:
    """Returns how many parts may be mapped at once, which takes half of the files of a process."""
    return most_files() / 2 / len(STORED)


def num_threads(workers: int, num_modalities: int) -> int:
    """Returns how many of `workers` may write at once, each mapping the parts of two records."""
    return max(1, int(min(workers, fitting_parts() / (2 * num_modalities))))


def feature_bytes(
    lengths: Mapping[str, Sequence[int] | np.ndarray], modalities: Mapping[str, Modality]
) -> int:
    """Returns the bytes of the features of some clips; `lengths` counts frames, [N] int each."""
    return sum(
        int(np.sum(lengths[name], dtype=np.int64))
        * modality.dim
        * np.dtype(modality.dtype).itemsize
        for name, modality in modalities.items()
        if name in lengths
    )


def shard_tasks(
    split: StagedSplit, modalities: dict[str, Modality], prefix: Path, threads: int
) -> list[ShardTask]:
    """Returns the task of each shard, none of them empty; their files begin with `prefix`."""
    size = feature_bytes(split.lengths, modalities)
    num_shards = min(len(split.clips), max(MIN_SHARDS, -(-size // SHARD_BYTES)))
    bounds = [len(split.clips) * shard // num_shards for shard in range(num_shards + 1)]
    tasks = []
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        order = split.order[first:last]
        path = prefix.with_name(f"{prefix.name}.tfrecord-{number:05}-of-{num_shards:05}")
        clips = tuple(split.clips[clip] for clip in order.tolist())
        starts = {name: starts[order] for name, starts in split.starts.items()}
        lengths = {name: lengths[order] for name, lengths in split.lengths.items()}
        facts = (path, modalities, split.packed, clips, order, starts, lengths, threads)
        tasks.append(ShardTask(*facts))
    return tasks


def write_shard(task: ShardTask) -> shard_files.Shard:
    """Writes one shard and returns its entry of the manifest."""
    with task.path.open("wb") as file:
        for clip in task():
            file.write(shard_files.framed(_record(clip, task.modalities)))
    return shard_files.describe_shard(task.path, len(task.clips))


def _record(clip: Mapping[str, Any], modalities: Mapping[str, Modality]) -> bytes:
    """Returns the record of a clip; `codec.write_info` tells TFDS what it holds."""
    values: dict[str, bytes | int] = {
        "clip": clip["clip"].encode(),
        "clip_index": clip["clip_index"],
    }
    for name, frames in clip["frames"].items():
        for field, array in frames.items():
            wanted = FRAME_FIELDS[field] if field in FRAME_FIELDS else modalities[name]
            dtype = np.dtype(wanted.dtype).newbyteorder("<")
            values[f"frames/{name}/{field}"] = array.astype(dtype, copy=False).tobytes()
    return shard_files.encode(values)
