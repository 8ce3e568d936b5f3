"""From any source of frames to the records of an empty folder."""

import contextlib
import io
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vidjax.data.clips import Modality
from vidjax.data.frame_fields import NonFinite, RecordSource
from vidjax.data.records.engines import ALONE, Engine, write_shards
from vidjax.data.records.manifest import (
    VERSION,
    Records,
    SplitRecords,
    describe_shard,
    write_manifest,
)
from vidjax.data.records.report import report_split
from vidjax.data.records.staging import (
    ShardTask,
    StagedSplit,
    shard_bounds,
    stage,
)
from vidjax.errors import UserError
from vidjax.machine import num_cores

_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


def write_records(
    source: RecordSource,
    fingerprint: list[dict[str, Any]],
    folder: Path,
    non_finite: NonFinite,
    engine: Engine,
) -> None:
    """Fills a folder with the records of a source; see `convert`."""
    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    with ThreadPoolExecutor(1 if engine == ALONE else num_cores()) as threads:

        def start(function: Callable[..., Result], *args: Any) -> Future[Result]:
            """Calls a function while other processes work, or now where there are none."""
            future = threads.submit(function, *args)
            if engine == ALONE:
                wait([future])
            return future

        imported = start(_import_builder)
        unpacked = source.read(staging, non_finite)
        staged = {split: stage(split, parts) for split, parts in unpacked.items()}
        modalities = _common_modalities(staged, source)
        _refuse_empty_splits(staged, source)
        _refuse_shared_clips(staged, source.place)
        reports: dict[str, Future[dict[str, Any]]] = {}

        def write(tasks: Sequence[ShardTask]) -> None:
            """Writes all shards; this process makes the reports while others write."""
            for name, split in staged.items():
                reports[name] = start(_report, source, name, split)
            write_shards(engine, tasks, scratch=staging)

        builder = imported.result()(
            modalities=modalities,
            staged=staged,
            write_shards=write,
            scratch=staging / "memory",
            data_dir=folder,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download
            builder.download_and_prepare(download_dir=staging)
        splits = {}
        for name, split in staged.items():
            counts = [last - first for first, last in shard_bounds(split, modalities)]
            paths = map(Path, builder.info.splits[name].filepaths)
            shards = tuple(threads.map(describe_shard, paths, counts))
            splits[name] = SplitRecords(split.clips, split.order, split.lengths, shards)
        report = {
            "version": VERSION,
            "splits": {name: future.result() for name, future in reports.items()},
        }
    shutil.rmtree(staging)
    write_manifest(Records(folder, modalities, splits, report), fingerprint)


def _import_builder() -> Any:
    """Returns the class `FrameRecords`; imports TensorFlow, which takes seconds."""
    from vidjax.data.records.builder import FrameRecords

    return FrameRecords


def _report(source: RecordSource, name: str, split: StagedSplit) -> dict[str, Any]:
    """Returns the report of the feature files of a split."""
    paths = {modality: source.file_of(modality, name) for modality in split.packed}
    return report_split(split.packed, split.lengths, paths)


def _refuse_empty_splits(staged: Mapping[str, StagedSplit], source: RecordSource) -> None:
    """Raises ValueError when a split has no clip."""
    for name, split in staged.items():
        if not split.clips:
            paths = ", ".join(str(source.file_of(modality, name)) for modality in split.packed)
            raise UserError(f"{paths or source.place}: no clip in split {name!r}")


def _common_modalities(
    staged: Mapping[str, StagedSplit], source: RecordSource
) -> dict[str, Modality]:
    """Returns width and dtype of each modality; the dtype holds the values of all splits exactly.

    Raises:
      ValueError: two splits differ in the width, or no clip has a frame.
    """
    modalities: dict[str, Modality] = {}
    first_split: dict[str, str] = {}
    for split, clips in staged.items():
        for name, parts in clips.packed.items():
            features = next((part.features for part in parts if len(part.features)), None)
            if features is None:  # without frames, width and dtype are unknown
                continue
            dim, dtype = features.shape[1], features.dtype
            first = first_split.setdefault(name, split)
            if name in modalities:
                if modalities[name].dim != dim:
                    raise UserError(
                        f"{name}: features are {modalities[name].dim} wide in "
                        f"{source.file_of(name, first)}\n"
                        f"but {dim} wide in {source.file_of(name, split)}"
                    )
                dtype = np.result_type(dtype, modalities[name].dtype)
            modalities[name] = Modality(dim, dtype.name)
    if not modalities:
        packed = [parts for split in staged.values() for parts in split.packed.values()]
        dropped = sum(sum(part.skipped.values()) for parts in packed for part in parts)
        reason = f": all {dropped} have a NaN, an Inf or a value beyond float32" if dropped else ""
        raise UserError(f"{source.place}: no clip has a single frame that can be used{reason}")
    return dict(sorted(modalities.items()))


def _refuse_shared_clips(staged: Mapping[str, StagedSplit], place: str) -> None:
    """Raises ValueError when a clip is in two splits: a model would be tested on training clips."""
    owners: dict[str, str] = {}
    shared = []
    for name, split in sorted(staged.items()):
        for clip in split.clips:
            if owners.setdefault(clip, name) != name:
                shared.append(f"{clip} ({owners[clip]} and {name})")
    if shared:
        more = ", ..." if len(shared) > 5 else ""
        raise UserError(
            f"{place}: {len(shared)} clips are in two splits\n{', '.join(shared[:5])}{more}"
        )
