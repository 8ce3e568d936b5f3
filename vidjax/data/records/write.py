"""From any source of frames to the records of an empty folder."""

import contextlib
import io
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.cache import disk_error
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import NonFinite
from vidjax.data.record_source import RecordSource, Unpacked
from vidjax.data.records.builder import (
    FrameRecords,
    StagedSplit,
    release_pages,
    shard_bounds,
    stage,
)
from vidjax.data.records.codec import tf
from vidjax.data.records.manifest import (
    VERSION,
    Records,
    SplitRecords,
    describe_shard,
    write_manifest,
)
from vidjax.data.records.report import report_split

_LOG = logging.getLogger(__name__)


def write_records(
    source: RecordSource, fingerprint: list[dict[str, Any]], folder: Path, non_finite: NonFinite
) -> None:
    """Fills a folder with the records of a source."""
    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    unpacked = source.read(staging, non_finite)
    modalities = _common_modalities(unpacked, source)
    _refuse_shared_clips(unpacked, source.place)
    staged = {split: stage(split, packed) for split, packed in unpacked.items()}
    report = {"version": VERSION, "splits": _report(source, staged)}

    builder = FrameRecords(modalities=modalities, staged=staged, data_dir=folder)
    # TFDS announces a download on stdout.
    with contextlib.redirect_stdout(io.StringIO()), _disk_errors(folder):
        builder.download_and_prepare(download_dir=staging)
    splits = {}
    for name, split in staged.items():
        counts = [last - first for first, last in shard_bounds(split, modalities)]
        paths = map(Path, builder.info.splits[name].filepaths)
        shards = tuple(map(describe_shard, paths, counts))
        splits[name] = SplitRecords(split.clips, split.order, split.lengths, shards)
    shutil.rmtree(staging)
    write_manifest(Records(folder, modalities, splits, report), fingerprint)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of a TensorFlow writer into an OSError."""
    try:
        yield
    except tf.errors.OpError as error:
        full = isinstance(error, tf.errors.ResourceExhaustedError)
        raise disk_error(folder, full=full) from error


def _report(source: RecordSource, staged: Mapping[str, StagedSplit]) -> dict[str, Any]:
    """Returns split -> report of its feature files."""
    splits = {}
    for name, split in staged.items():
        paths = {modality: source.file_of(modality, name) for modality in split.packed}
        if not split.clips:
            place = ", ".join(map(str, paths.values())) or source.place
            raise ValueError(f"{place}: no clip in split {name!r}")
        splits[name] = report_split(split.packed, split.lengths, paths)
        release_pages(split)
    return splits


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
