"""From any source of frames to the records of an empty folder."""

import contextlib
import functools
import io
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vidjax.data.clips import Modality
from vidjax.data.frame_fields import NonFinite
from vidjax.data.processes import num_cores
from vidjax.data.record_source import RecordSource, Unpacked
from vidjax.data.records.engines import ALONE, Engine, write_shards
from vidjax.data.records.manifest import (
    VERSION,
    Records,
    SplitRecords,
    describe_shard,
    write_manifest,
)
from vidjax.data.records.report import report_split
from vidjax.data.records.staging import StagedSplit, release_pages, shard_bounds, stage

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
        modalities = _common_modalities(unpacked, source)
        _refuse_empty_splits(unpacked, source)
        _refuse_shared_clips(unpacked, source.place)
        staged = {split: stage(split, packed) for split, packed in unpacked.items()}
        reports = {name: start(_report, source, name, split) for name, split in staged.items()}
        builder = imported.result()(
            modalities=modalities,
            staged=staged,
            write_shards=functools.partial(write_shards, engine, scratch=staging),
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
    report = report_split(split.packed, split.lengths, paths)
    release_pages(split)
    return report


def _refuse_empty_splits(unpacked: Unpacked, source: RecordSource) -> None:
    """Raises ValueError when a split has no clip."""
    for name, packed in unpacked.items():
        if not any(flat.names for flat in packed.values()):
            paths = ", ".join(str(source.file_of(modality, name)) for modality in packed)
            raise ValueError(f"{paths or source.place}: no clip in split {name!r}")


def _common_modalities(unpacked: Unpacked, source: RecordSource) -> dict[str, Modality]:
    """Returns width and dtype of each modality; the dtype holds the values of all splits exactly.

    Raises:
      ValueError: two splits differ in the width, or no clip has a frame.
    """
    modalities: dict[str, Modality] = {}
    first_split: dict[str, str] = {}
    for split, packed in unpacked.items():
        for name, clips in packed.items():
            if not len(clips.features):  # without frames, width and dtype are unknown
                continue
            dim, dtype = clips.features.shape[1], clips.features.dtype
            first = first_split.setdefault(name, split)
            if name in modalities:
                if modalities[name].dim != dim:
                    raise ValueError(
                        f"{name}: features are {modalities[name].dim} wide in "
                        f"{source.file_of(name, first)}\n"
                        f"but {dim} wide in {source.file_of(name, split)}"
                    )
                dtype = np.result_type(dtype, modalities[name].dtype)
            modalities[name] = Modality(dim, dtype.name)
    if not modalities:
        packs = [clips for packed in unpacked.values() for clips in packed.values()]
        dropped = sum(sum(clips.skipped.values()) for clips in packs)
        reason = f": all {dropped} have a NaN, an Inf or a value beyond float32" if dropped else ""
        raise ValueError(f"{source.place}: no clip has a single frame that can be used{reason}")
    return dict(sorted(modalities.items()))


def _refuse_shared_clips(unpacked: Unpacked, place: str) -> None:
    """Raises ValueError when a clip is in two splits: a model would be tested on training clips."""
    owners: dict[str, str] = {}
    shared = []
    for split, packed in sorted(unpacked.items()):
        for name in sorted({name for clips in packed.values() for name in clips.names}):
            if owners.setdefault(name, split) != split:
                shared.append(f"{name} ({owners[name]} and {split})")
    if shared:
        more = ", ..." if len(shared) > 5 else ""
        raise ValueError(
            f"{place}: {len(shared)} clips are in two splits\n{', '.join(shared[:5])}{more}"
        )
