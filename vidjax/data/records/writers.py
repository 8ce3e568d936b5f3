"""Conversion to shards: joins clips by name, orders them, cuts them into shards, and writes these.

A shard is a function of its task alone, and a task is small, as it points into the flat files. So
any process that sees these files can write any shard, and all write the same bytes: this process, a
pool of processes, or Apache Beam. A process of the pool, `python -m vidjax.data.records.writers
FOLDER FIRST STEP`, writes the shards of tasks FIRST, FIRST + STEP, ... of FOLDER.
"""

import bisect
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.data import processes
from vidjax.data.beam import Beam
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS, STORED, FlatFiles, PackedClips
from vidjax.data.records import shard_files
from vidjax.data.untrusted.names import show
from vidjax.errors import DiskError, UserError
from vidjax.machine import most_files, num_cores

MIN_SHARDS = 8
SHARD_BYTES = 256 << 20
ORDER_SEED = 0


class StagedSplit(NamedTuple):
    """One split before it is cut into shards: N clip names in byte order, and their frames.

    Attributes:
      order: [N] int32, clip index of each record.
      packed: modality -> the parts of its clips, flat.
      starts: modality -> [N] int64, first frame by clip index, counted over all parts.
      lengths: modality -> [N] int32, number of frames of each clip, by clip index.
    """

    clips: tuple[str, ...]
    order: np.ndarray
    packed: dict[str, list[PackedClips]]
    starts: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]


class ShardTask(NamedTuple):
    """All that it takes to write one shard of n records.

    Attributes:
      files: modality -> its flat files, in parts; only the modalities that the split has.
      order: [n] int32, the clip index of each record.
      starts: modality -> [n] int64, first frame of each record, counted over all parts.
      lengths: modality -> [n] int32, number of frames of each record.
    """

    path: Path
    modalities: dict[str, Modality]
    files: dict[str, list[FlatFiles]]
    clips: tuple[str, ...]
    order: Sequence[int] | np.ndarray
    starts: Mapping[str, Sequence[int] | np.ndarray]
    lengths: Mapping[str, Sequence[int] | np.ndarray]

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Yields the fields of each record; its frames are views of mapped files.

        Each call maps the files again, so that what it read of them leaves the memory afterwards.
        """
        ends = {
            name: [*itertools.accumulate(flat.num_frames for flat in parts)]
            for name, parts in self.files.items()
        }
        fitting = int(min(sum(map(len, ends.values())), most_files() // 2 // len(STORED)))
        mapped = functools.lru_cache(max(len(ends), fitting))(
            lambda name, number: dict(self.files[name][number])
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

        absent = [0] * len(self.clips)
        for record, (clip, index) in enumerate(zip(self.clips, self.order, strict=True)):
            frames = {}
            for name in self.modalities:
                columns = self.starts.get(name, absent), self.lengths.get(name, absent)
                frames[name] = frames_of(name, *(int(column[record]) for column in columns))
            yield {"clip": clip, "clip_index": int(index), "frames": frames}

    def save(self, path: Path) -> None:
        """Writes the task to a JSON file."""
        files = {
            name: [(str(f.folder.absolute()), f.dtype.name, f.width, f.num_frames) for f in parts]
            for name, parts in self.files.items()
        }
        facts = {**self._asdict(), "path": str(self.path.absolute()), "files": files}
        path.write_text(json.dumps(facts, default=np.ndarray.tolist))

    @classmethod
    def load(cls, path: Path) -> "ShardTask":
        """Reads a task that `save` has written."""
        facts = json.loads(path.read_text())
        facts["path"] = Path(facts["path"])
        facts["modalities"] = {name: Modality(*kind) for name, kind in facts["modalities"].items()}
        facts["files"] = {
            name: [FlatFiles(Path(folder), *rest) for folder, *rest in parts]
            for name, parts in facts["files"].items()
        }
        return cls(**facts)


def stage(split: str, parts: Sequence[Mapping[str, PackedClips]]) -> StagedSplit:
    """Joins the clips of one split by name over parts and modalities; shuffles those of 'train'."""
    modalities = sorted({name for part in parts for name in part})
    packed = {name: [part[name] for part in parts if name in part] for name in modalities}
    # Python orders str by code point, which is the byte order of UTF-8.
    clips = tuple(sorted({name for part in parts for flat in part.values() for name in flat.names}))
    index = {name: position for position, name in enumerate(clips)}
    starts, lengths = {}, {}
    for modality, flats in packed.items():
        starts[modality] = np.zeros(len(clips), np.int64)
        lengths[modality] = np.zeros(len(clips), np.int32)
        before = 0
        for flat in flats:
            rows = np.fromiter((index[name] for name in flat.names), np.int64, len(flat.names))
            starts[modality][rows] = before + flat.starts()
            lengths[modality][rows] = flat.lengths
            before += len(flat.features)
    # Ground truth, and often the names with it, is sorted by identity. A shuffle buffer does not
    # undo that; one permutation of all training clips does.
    shuffled = np.random.default_rng(ORDER_SEED).permutation(len(clips))
    order = shuffled if split == "train" else np.arange(len(clips))
    return StagedSplit(clips, order.astype(np.int32), packed, starts, lengths)


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
    split: StagedSplit, modalities: dict[str, Modality], prefix: Path, scratch: Path
) -> list[ShardTask]:
    """Returns the task of each shard, none of them empty; their files begin with `prefix`.

    Arrays that are in memory alone are written to `scratch`.
    """
    files = {
        name: [_flat_files(flat, scratch / name / str(number)) for number, flat in enumerate(parts)]
        for name, parts in split.packed.items()
    }
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
        tasks.append(ShardTask(path, modalities, files, clips, order, starts, lengths))
    return tasks


def _flat_files(packed: PackedClips, scratch: Path) -> FlatFiles:
    """Returns the flat files of some frames; writes them to `scratch` if they are in memory."""
    if isinstance(packed.frames, FlatFiles):
        return packed.frames
    scratch.mkdir(parents=True)
    for field, values in packed.frames.items():
        values.tofile(scratch / f"{field}.bin")
    num_frames, width = packed.features.shape
    return FlatFiles(scratch, packed.features.dtype, width, num_frames)


# Less than this is written before another process has started.
WORKER_BYTES = 64 << 20


class Pool(NamedTuple):
    """Writes in `workers` local processes; 1 is this one, None one per core or as data needs."""

    workers: int | None = None


Engine = Pool | Beam
ALL_CORES = Pool()
ALONE = Pool(1)


def check_engine(engine: Engine) -> None:
    """Raises ValueError when an engine cannot run here."""
    if isinstance(engine, Pool):
        if engine.workers is not None and engine.workers < 1:
            raise UserError(f"--workers={engine.workers}: wanted 1 or more")
        return
    engine.check()


def write_shards(engine: Engine, tasks: Sequence[ShardTask], scratch: Path) -> None:
    """Writes all shards; OSError if the disk is full or a process was killed."""
    workers = _num_workers(engine, tasks) if isinstance(engine, Pool) else 0
    if workers == 1:
        for task in tasks:
            write_shard(task)
        return
    folder = scratch / "tasks"
    folder.mkdir(parents=True)
    for number, task in enumerate(tasks):
        task.save(folder / f"{number:06}.json")
    if isinstance(engine, Pool):
        _run_pool(folder, workers)
    else:
        engine.run([str(path) for path in sorted(folder.glob("*.json"))], _start)


def _num_workers(pool: Pool, tasks: Sequence[ShardTask]) -> int:
    """Returns how many processes write: as `pool` says, or as data and cores suggest."""
    if pool.workers is None:
        size = sum(feature_bytes(task.lengths, task.modalities) for task in tasks)
        wanted = min(num_cores(), size // WORKER_BYTES)
    else:
        wanted = pool.workers
    return max(1, min(wanted, len(tasks)))


def _run_pool(folder: Path, workers: int) -> None:
    """Writes the shards of a folder of tasks; each of the child processes takes every n-th task."""

    def run(children: processes.Children, first: int) -> None:
        child = children.run(__name__, folder, str(first), str(workers))
        if child.returncode == EXIT_DISK:
            raise OSError(*json.loads(child.stdout))
        if child.returncode == -signal.SIGKILL:
            raise DiskError(
                f"{folder}: a process that wrote records was killed from outside: is memory short?"
                "\nto convert in one process: python -m vidjax.data.iqiyi_vid DIR --workers=1"
                "\n(own features: python -m vidjax.data.arrays DIR --workers=1)"
            )
        if child.returncode:
            last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"{folder}: a process that wrote records failed: {show(last)}")

    processes.map_children(run, range(workers), workers)


EXIT_DISK = 2


def write_shard(task: ShardTask) -> None:
    """Writes one shard: the same bytes for the same task, in whichever process and order."""
    with task.path.open("wb") as file:
        shard_files.write(file, (_record(clip, task.modalities) for clip in task()))


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


def write_saved(path: str) -> None:
    """Writes the shard of a task that was saved to a file."""
    write_shard(ShardTask.load(Path(path)))


def _start() -> Callable[[str], None]:
    """Returns what a worker of Beam calls."""
    return write_saved


def main(argv: Sequence[str]) -> int:
    """Writes shards and returns the exit code; prints the arguments of an OSError as JSON."""
    folder, first, step = argv
    parent = os.getppid()
    try:
        for path in sorted(Path(folder).glob("*.json"))[int(first) :: int(step)]:
            if os.getppid() != parent:  # it was killed, and nobody waits
                break
            write_saved(str(path))
    except OSError as error:
        sys.stdout.write(json.dumps([error.errno, error.strerror, error.filename]))
        return EXIT_DISK
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
