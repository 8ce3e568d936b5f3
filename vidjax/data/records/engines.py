"""Engines that write the shards of a conversion: this process, a pool of them, or Apache Beam.

Each calls `worker.write_shard`, a pure function of a shard's task, so all write the same bytes.
"""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidjax.data import processes
from vidjax.data.records import worker
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
    """Processes of this machine.

    Attributes:
      workers: their number; 1 for this process alone, which does one thing after another; None for
        one per core, or fewer where there is little to write.
    """

    workers: int | None = None


class Beam(NamedTuple):
    """Apache Beam, whose workers must see the cache under the same path.

    Attributes:
      options: `NAME=VALUE,NAME=VALUE` as in `tfds build --beam_pipeline_options`; without a runner,
        that of this machine.
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
    """Writes all shards.

    Args:
      engine: what writes them.
      tasks: one for each shard.
      scratch: a folder for the files of other processes.

    Raises:
      OSError: the disk is full, or a process was killed.
    """
    workers = _num_workers(engine, tasks) if isinstance(engine, Pool) else 0
    if workers == 1:
        for task in tasks:
            worker.write_shard(task)
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
        child = children.run(worker.__name__, folder, str(first), str(workers))
        if child.returncode == worker.EXIT_DISK:
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
    """Returns an empty pipeline of Beam."""
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
            _ = pipeline | beam.Create(paths) | beam.Reshuffle() | beam.Map(worker.write_saved)
    except RuntimeError as error:  # with the traceback of the worker
        last = str(error).strip().rpartition("\n")[2]
        raise DiskError(f"{folder}: Apache Beam stopped: {show(last)}") from error
