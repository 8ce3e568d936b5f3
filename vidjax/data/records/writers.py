"""Who writes the shards of a conversion: this process, a pool of them, or Apache Beam.

Each calls `write_shard`, a pure function of a shard's task, so all write the same bytes. A process
of the pool, `python -m vidjax.data.records.writers FOLDER FIRST STEP`, writes every STEP-th task of
FOLDER.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.data import processes
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records import shard_files
from vidjax.data.records.staging import ShardTask, feature_bytes
from vidjax.data.untrusted.names import show
from vidjax.errors import DiskError, UserError
from vidjax.machine import num_cores

# Less than this is written before another process has started.
WORKER_BYTES = 64 << 20
LOCAL_RUNNER = "FnApiRunner"
# With or without the end of their names.
DOWNLOADING = {"directrunner", "direct", "prismrunner", "prism", "switchingdirectrunner"}


class Pool(NamedTuple):
    """Processes of this machine: 1 is this one alone; None one per core, fewer for little data."""

    workers: int | None = None


class Beam(NamedTuple):
    """Apache Beam, whose workers must see the cache under the same path.

    `options` are `NAME=VALUE,NAME=VALUE` as in `tfds build --beam_pipeline_options`; without a
    runner, that of this machine runs.
    """

    options: str


Engine = Pool | Beam
ALL_CORES = Pool()
ALONE = Pool(1)


def check_engine(engine: Engine) -> None:
    """Raises ValueError when an engine cannot run here."""
    if isinstance(engine, Pool):
        if engine.workers is not None and engine.workers < 1:
            raise UserError(f"--workers={engine.workers}: wanted 1 or more")
        return
    flags = _beam_flags(engine.options)
    try:
        _make_pipeline(flags)
    except (ValueError, ImportError) as error:  # an unknown runner, or one with an extra of Beam
        reason = f"--beam_options={engine.options}: {show(str(error))}"
        if isinstance(error, ModuleNotFoundError) and error.name == "apache_beam":
            reason = "--beam_options needs the package apache-beam: pip install 'vidjax[beam]'"
        raise UserError(reason) from None


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
        task.save(folder / f"{number:06}.npz")
    if isinstance(engine, Beam):
        _run_beam(folder, engine)
    else:
        _run_pool(folder, workers)


def _num_workers(pool: Pool, tasks: Sequence[ShardTask]) -> int:
    """Returns the number of processes that are worth their start, from 1 to one per shard."""
    if pool.workers is None:
        size = sum(feature_bytes(task.lengths, task.modalities) for task in tasks)
        wanted = min(num_cores(), size // WORKER_BYTES)
    else:
        wanted = pool.workers
    return max(1, min(wanted, len(tasks)))


def _run_pool(folder: Path, workers: int) -> None:
    """Writes the shards of a folder of tasks by child processes, every n-th by one of them."""

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


def _beam_flags(options: str) -> list[str]:
    """Returns the options of Beam as flags, with a runner."""
    flags = [f"--{option.strip()}" for option in options.split(",") if option.strip()]
    for flag in flags:  # Beam ignores the case of these names, and what stands before a dot
        runner = flag.partition("=")[2].rpartition(".")[2].lower()
        if flag.startswith("--runner=") and runner in DOWNLOADING:
            raise UserError(
                f"--beam_options={options}: {flag[2:]} looks for a program on the internet\n"
                f"on this machine: runner={LOCAL_RUNNER}"
            )
    if not any(flag.startswith("--runner=") for flag in flags):
        flags.append(f"--runner={LOCAL_RUNNER}")
    return flags


def _make_pipeline(flags: list[str]) -> Any:
    from apache_beam import Pipeline  # pyright: ignore[reportMissingImports]
    from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]

    return Pipeline(options=pipeline_options.PipelineOptions(flags))


def _run_beam(folder: Path, engine: Beam) -> None:
    """Writes the shards of a folder of tasks by a pipeline that has one element for each."""
    import apache_beam as beam  # pyright: ignore[reportMissingImports]

    paths = [str(path) for path in sorted(folder.glob("*.npz"))]
    try:
        with _make_pipeline(_beam_flags(engine.options)) as pipeline:
            # Reshuffled, or one worker would take all.
            _ = pipeline | beam.Create(paths) | beam.Reshuffle() | beam.Map(write_saved)
    except RuntimeError as error:  # with the traceback of the worker
        last = str(error).strip().rpartition("\n")[2]
        raise DiskError(f"{folder}: Apache Beam stopped: {show(last)}") from error


EXIT_DISK = 2


def write_shard(task: ShardTask) -> None:
    """Writes one shard: the same bytes for the same task, in whichever process and order."""
    with task.path.open("wb") as file:
        shard_files.write(file, (_record(clip, task.modalities) for clip in task()))


def _record(clip: Mapping[str, Any], modalities: Mapping[str, Modality]) -> bytes:
    """Returns the record of a clip; `FrameRecords` tells TFDS what it holds."""
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


def main(argv: Sequence[str]) -> int:
    """Writes shards and returns the exit code; prints the arguments of an OSError as JSON."""
    folder, first, step = argv
    parent = os.getppid()
    try:
        for path in sorted(Path(folder).glob("*.npz"))[int(first) :: int(step)]:
            if os.getppid() != parent:  # it was killed, and nobody waits
                break
            write_saved(str(path))
    except OSError as error:
        sys.stdout.write(json.dumps([error.errno, error.strerror, error.filename]))
        return EXIT_DISK
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
