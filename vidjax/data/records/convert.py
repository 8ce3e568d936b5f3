"""From any source of frames to records in the cache: converted once, checked at every load."""

import contextlib
import io
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.cache import building, cache_folder, disk_error, exclusive
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import NonFinite
from vidjax.data.record_source import RecordSource, Unpacked
from vidjax.data.records.builder import (
    VERSION,
    FrameRecords,
    StagedSplit,
    release_pages,
    shard_bounds,
    stage,
)
from vidjax.data.records.codec import tf
from vidjax.data.records.manifest import (
    Records,
    SplitRecords,
    describe_shard,
    load_records,
    write_manifest,
)
from vidjax.data.records.report import report_split

_LOG = logging.getLogger(__name__)


def convert(
    source: RecordSource,
    cache_dir: str | Path | None = None,
    *,
    non_finite: NonFinite = "drop",
) -> Records:
    """Returns the records of a source, converting it unless the cache has them.

    Args:
      source: the frames.
      cache_dir: folder of the cache; None for `$VIDJAX_CACHE` or `~/.cache/vidjax`.
      non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
        refuses them.

    Raises:
      ValueError: the source contradicts itself, the records are damaged, or, with
        `non_finite='error'`, a feature is not finite.
      OSError: the cache cannot be written.
    """
    if non_finite not in ("drop", "error"):
        raise ValueError(f"config.data.non_finite is 'drop' or 'error', got {non_finite!r}")
    fingerprint = source.fingerprint()
    folder = _folder(source.kind, fingerprint, cache_dir)
    if not (folder / "manifest.json").exists():
        with exclusive(folder.parent):
            if not (folder / "manifest.json").exists():
                with building(folder) as partial:
                    _write_records(source, fingerprint, partial, non_finite)
                    if source.fingerprint() != fingerprint:
                        raise ValueError(
                            f"{source.place}: changed during the conversion\n"
                            "run the command again once no program writes to it"
                        )
    records = load_records(folder)
    if non_finite == "error":  # the records may be those of an earlier conversion with 'drop'
        _refuse_dropped(records, source)
    return records


def records_folder(source: RecordSource, cache_dir: str | Path | None = None) -> Path:
    """Returns the folder of a source's records; a manifest.json in it says that they are there.

    Raises:
      OSError: a file of the source is gone.
    """
    return _folder(source.kind, source.fingerprint(), cache_dir)


def _folder(kind: str, fingerprint: list[dict[str, Any]], cache_dir: str | Path | None) -> Path:
    return cache_folder(cache_dir, kind, [VERSION, fingerprint])


def _refuse_dropped(records: Records, source: RecordSource) -> None:
    """Raises ValueError, with the first clip, when a frame was left out of the records."""
    for split in records.report["splits"].values():
        for counts in split["modalities"].values():
            if counts["frames_skipped"].get("non_finite"):
                with tempfile.TemporaryDirectory() as scratch:  # reading again names the clip
                    source.read(Path(scratch), "error")


def _write_records(
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
