"""Converts the features of a dataset to TFRecord files (shards) in the cache.

The clips are divided, in their order, into at least 8 shards of at most about 256 MB. Several
threads write the shards. Equal datasets give equal files.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.cache_folders import cache_folder, exclusive, mark_used
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS, STORED, RecordSource
from vidjax.data.packing import StagedSplit, stage
from vidjax.data.records import shard_files
from vidjax.data.records.data_report import report_split
from vidjax.data.records.manifest import (
    NAME,
    VERSION,
    Records,
    SplitRecords,
    load_records,
    remove,
    write_manifest,
)
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.machine import max_open_files, num_cores

MIN_SHARDS = 8
SHARD_BYTES = 256 << 20
CLIPS_AT_ONCE = 256


def convert(
    source: RecordSource,
    cache_dir: str | Path | None = None,
    *,
    workers: int | None = None,
) -> Records:
    """Returns the converted clips of a dataset, from TFRecord files in the cache.

    If the cache does not contain the files, they are written.

    Args:
      cache_dir: the cache, by default `$VIDJAX_CACHE` or `~/.cache/vidjax`.
      workers: number of threads that write files, by default one per core.

    Raises:
      UserError: a clip is malformed, a clip is in two splits, files of the dataset change during
        the conversion, or files of the cache are damaged.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers} is less than 1: choose 1 or more")
    fingerprint = source.fingerprint()
    folder = cache_folder(cache_dir, source.kind, [VERSION, fingerprint])
    if not (folder / "manifest.json").exists():
        with exclusive(folder):
            if not (folder / "manifest.json").exists():
                remove(folder)  # a folder without a manifest is incomplete
                with files.atomic_folder(folder) as partial:
                    write_records(source, fingerprint, partial, workers)
                    if source.fingerprint() != fingerprint:
                        raise UserError(
                            f"{source.place}: files were changed while they were converted\n"
                            "run the command again when no program writes to them"
                        )
    records = load_records(folder)
    mark_used(folder)
    return records


_LOG = logging.getLogger(__name__)


def write_records(
    source: RecordSource,
    fingerprint: list[dict[str, Any]],
    folder: Path,
    workers: int | None,
) -> None:
    """Writes the TFRecord files of a dataset, and their manifest, to an empty folder."""
    # Imported before the threads start, because TFDS replaces the import function of all threads.
    from vidjax.data.records import codec

    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    unpacked = source.read(staging)
    staged = {split: stage(split, parts) for split, parts in unpacked.items()}
    modalities = _join_modalities(staged, source)
    _refuse_empty_splits(staged, source)
    _refuse_shared_clips(staged, source.place)
    records = folder / NAME / VERSION
    records.mkdir(parents=True)
    # A thread opens a file per field and modality. All threads may open half of the allowed files.
    max_threads = max_open_files() / 2 / (len(STORED) * len(modalities))
    with ThreadPoolExecutor(max(1, int(min(workers or num_cores(), max_threads)))) as threads:
        reports = {}
        for name, split in staged.items():
            paths = {modality: source.path_of(modality, name) for modality in split.packed}
            reports[name] = threads.submit(report_split, split, paths)
        cuts = {
            name: cut(split, modalities, records / f"{NAME}-{name}")
            for name, split in staged.items()
        }
        written = threads.map(
            lambda name, path, order: write_shard(path, order, staged[name], modalities),
            *zip(*((name, *part) for name, parts in cuts.items() for part in parts), strict=True),
        )
        shards = {
            name: tuple(itertools.islice(written, len(parts))) for name, parts in cuts.items()
        }
        report = {
            "version": VERSION,
            "splits": {name: future.result() for name, future in reports.items()},
        }
    codec.write_info(records, modalities, shards)
    files.remove_tree(staging)
    splits = {
        name: SplitRecords(split.clips, split.order, split.lengths, shards[name])
        for name, split in staged.items()
    }
    write_manifest(Records(folder, modalities, splits, report), fingerprint)


def _refuse_empty_splits(staged: Mapping[str, StagedSplit], source: RecordSource) -> None:
    for name, split in staged.items():
        if not split.clips:
            paths = ", ".join(str(source.path_of(modality, name)) for modality in split.packed)
            raise UserError(
                f"{paths or source.place}: split {name!r} has no clips: "
                "add clips, or remove the split"
            )


def _join_modalities(
    staged: Mapping[str, StagedSplit], source: RecordSource
) -> dict[str, Modality]:
    """Returns modality -> the width and the common dtype of its features in all splits."""
    modalities: dict[str, Modality] = {}
    first_split: dict[str, str] = {}
    dropped = 0
    for split, clips in staged.items():
        for name, flat in clips.packed.items():
            dropped += sum(flat.skipped.values())
            if not len(flat.features):  # without frames, width and dtype are unknown
                continue
            first = first_split.setdefault(name, split)
            modality = Modality(flat.features.shape[1], flat.features.dtype.name)
            known = modalities.get(name, modality)
            if known.dim != modality.dim:
                raise UserError(
                    f"{name}: features have width {known.dim} in {source.path_of(name, first)}, "
                    f"but width {modality.dim} in {source.path_of(name, split)}\n"
                    "compute the features of all splits with the same program"
                )
            dtype = np.result_type(known.dtype, modality.dtype)
            modalities[name] = Modality(known.dim, dtype.name)
    if not modalities:
        reason = "no clip has a frame"
        if dropped:
            reason = f"all {dropped} frames have a NaN, an Inf or a value beyond float32"
        raise UserError(
            f"{source.place}: {reason}\ncompute the features again, or name another dataset"
        )
    return dict(sorted(modalities.items()))


def _refuse_shared_clips(staged: Mapping[str, StagedSplit], place: str) -> None:
    """Raises UserError if a clip is in two splits, for example in train and val."""
    owners: dict[str, str] = {}
    shared = []
    for name, split in sorted(staged.items()):
        for clip in split.clips:
            if owners.setdefault(clip, name) != name:
                shared.append(f"{clip} ({owners[clip]} and {name})")
    if shared:
        more = ", ..." if len(shared) > 5 else ""
        raise UserError(
            f"{place}: {len(shared)} clips are in two splits: remove each of them from one split\n"
            f"{', '.join(shared[:5])}{more}"
        )


def cut(
    split: StagedSplit, modalities: Mapping[str, Modality], prefix: Path
) -> list[tuple[Path, np.ndarray]]:
    """Divides the clips of a split into files (shards) of up to about 256 MB.

    There are 8 shards or more. If there are fewer than 8 clips, each shard has one clip. Returns a
    pair for each shard: its path, which begins with `prefix`, and [n] int32, the positions of its
    n clips in `split.clips`.
    """
    size = sum(
        int(lengths.sum(dtype=np.int64))
        * shard_files.count_frame_bytes(modalities[name])["features"]
        for name, lengths in split.lengths.items()
        if name in modalities
    )
    num_shards = min(len(split.clips), max(MIN_SHARDS, -(-size // SHARD_BYTES)))
    bounds = [len(split.clips) * shard // num_shards for shard in range(num_shards + 1)]
    name = f"{prefix.name}.tfrecord-{{:05}}-of-{num_shards:05}"
    return [
        (prefix.with_name(name.format(number)), split.order[first:last])
        for number, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def write_shard(
    path: Path, order: np.ndarray, split: StagedSplit, modalities: Mapping[str, Modality]
) -> shard_files.Shard:
    """Writes clips to a TFRecord file. `order` [n] are their positions in `split.clips`."""
    with path.open("wb") as file:
        for at in range(0, len(order), CLIPS_AT_ONCE):
            _write_clips(file, order[at : at + CLIPS_AT_ONCE].tolist(), split, modalities)
    stat, sha256 = path.stat(), files.sha256_file(path)
    return shard_files.Shard(path, len(order), stat.st_size, stat.st_mtime_ns, sha256)


def _write_clips(
    file: BinaryIO, order: Sequence[int], split: StagedSplit, modalities: Mapping[str, Modality]
) -> None:
    """Appends a record for each clip to a file. `order` are positions in `split.clips`."""
    # Each call maps the files of frames again, so that the memory of their pages is freed.
    mapped = {name: dict(flat.frames) for name, flat in split.packed.items()}
    for clip in order:
        values: dict[str, bytes | int] = {"clip": split.clips[clip].encode(), "clip_index": clip}
        for name, modality in modalities.items():
            length = split.lengths[name][clip] if name in mapped else 0
            for field in STORED:
                content = b""
                if length:
                    start = split.starts[name][clip]
                    kind = FRAME_FIELDS.get(field, modality)
                    dtype = np.dtype(kind.dtype).newbyteorder("<")
                    frames = mapped[name][field][start : start + length]
                    content = frames.astype(dtype, copy=False).tobytes()
                values[f"frames/{name}/{field}"] = content
        file.write(shard_files.make_record(shard_files.encode(values)))
