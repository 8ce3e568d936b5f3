"""Converts the features of files to TFRecord files (shards) in the cache.

The clips are divided, in their order, into at least 8 shards of at most about 256 MB. Several
threads write the shards. Equal datasets give equal files.
"""

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.core.batch import BATCHED, Packed
from vidjax.data.cache_folders import cache_folder, exclusive, mark_used
from vidjax.data.clips import DataSource, Modality, RecordSource
from vidjax.data.packed_clips import (
    PackedClips,
    complete,
    get_dtype,
    map_again,
    measure_quality,
)
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

ORDER_SEED = 0
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
    source: RecordSource, fingerprint: list[dict[str, Any]], folder: Path, workers: int | None
) -> None:
    """Writes the TFRecord files of a dataset, and their manifest, to an empty folder."""
    # Imported before the threads start, because TFDS replaces the import function of all threads.
    from vidjax.data.records import codec

    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    records = make_records(source, source.read(staging), folder, workers)
    shards = {name: split.shards for name, split in records.splits.items()}
    codec.write_info(folder / NAME / VERSION, records.modalities, shards)
    files.remove_tree(staging)
    write_manifest(records, fingerprint)


def hold(source: DataSource, packed: Mapping[str, PackedClips]) -> Records:
    """Returns the clips of a dataset in memory. Nothing is written to the disk."""
    records = make_records(source, packed, None, None)
    splits = {
        name: split._replace(packed=complete(packed[name], records.modalities))
        for name, split in records.splits.items()
    }
    return records._replace(splits=splits)


def make_records(
    source: DataSource,
    packed: Mapping[str, PackedClips],
    folder: Path | None,
    workers: int | None,
) -> Records:
    """Checks the splits of a dataset, and writes its TFRecord files to `folder`.

    If `folder` is None, only the digests of these files are computed.
    """
    modalities = _join_modalities(packed, source)
    _refuse_empty_splits(packed, source)
    _refuse_shared_clips(packed, source.place)
    place = (folder or Path()) / NAME / VERSION
    if folder:
        place.mkdir(parents=True)
    orders = {name: choose_order(name, len(clips.names)) for name, clips in packed.items()}
    # A thread opens a file per field and modality. All threads may open half of the allowed files.
    max_threads = max_open_files() / 2 / (len(BATCHED) * len(modalities))
    with ThreadPoolExecutor(max(1, int(min(workers or num_cores(), max_threads)))) as threads:
        reports = {}
        for name, clips in packed.items():
            paths = {modality: source.path_of(modality, name) for modality in clips.frames}
            reports[name] = threads.submit(report_split, clips, paths)
        cuts = {
            name: cut(clips, orders[name], modalities, place / f"{NAME}-{name}")
            for name, clips in packed.items()
        }
        written = threads.map(
            lambda name, path, order: make_shard(
                path, order, packed[name], modalities, on_disk=folder is not None
            ),
            *zip(*((name, *part) for name, parts in cuts.items() for part in parts), strict=True),
        )
        shards = {
            name: tuple(itertools.islice(written, len(parts))) for name, parts in cuts.items()
        }
        report = {
            "version": VERSION,
            "splits": {name: future.result() for name, future in reports.items()},
        }
    splits = {
        name: SplitRecords(
            clips=clips.names,
            order=orders[name],
            lengths=clips.lengths,
            quality={key: measure_quality(frames) for key, frames in clips.frames.items()},
            shards=shards[name],
        )
        for name, clips in packed.items()
    }
    return Records(folder, modalities, splits, report)


def choose_order(split: str, num_clips: int) -> np.ndarray:
    """Returns [N] int32, the order of the clips in files: random for train, else by name."""
    # Sorted names often group the clips of an identity, and programs that read a few neighbouring
    # records at a time would then see only a few identities.
    shuffled = np.random.default_rng(ORDER_SEED).permutation(num_clips)
    return (shuffled if split == "train" else np.arange(num_clips)).astype(np.int32)


def _refuse_empty_splits(packed: Mapping[str, PackedClips], source: DataSource) -> None:
    for name, clips in packed.items():
        if not clips.names:
            paths = ", ".join(str(source.path_of(modality, name)) for modality in clips.frames)
            raise UserError(
                f"{paths or source.place}: split {name!r} has no clips: "
                "add clips, or remove the split"
            )


def _join_modalities(packed: Mapping[str, PackedClips], source: DataSource) -> dict[str, Modality]:
    """Returns modality -> the width and the common dtype of its features in all splits."""
    modalities: dict[str, Modality] = {}
    first_split: dict[str, str] = {}
    dropped = 0
    for split, clips in packed.items():
        for name, frames in clips.frames.items():
            dropped += sum(clips.counts[name].skipped.values())
            if not len(frames.quality):  # without frames, width and dtype are unknown
                continue
            first = first_split.setdefault(name, split)
            features = frames.features
            modality = Modality(features.shape[1], np.dtype(features.dtype).name)
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


def _refuse_shared_clips(packed: Mapping[str, PackedClips], place: str) -> None:
    """Raises UserError if a clip is in two splits, for example in train and val."""
    owners: dict[str, str] = {}
    shared = []
    for name, split in sorted(packed.items()):
        for clip in split.names:
            if owners.setdefault(clip, name) != name:
                shared.append(f"{clip} ({owners[clip]} and {name})")
    if shared:
        more = ", ..." if len(shared) > 5 else ""
        raise UserError(
            f"{place}: {len(shared)} clips are in two splits: remove each of them from one split\n"
            f"{', '.join(shared[:5])}{more}"
        )


def cut(
    split: PackedClips, order: np.ndarray, modalities: Mapping[str, Modality], prefix: Path
) -> list[tuple[Path, np.ndarray]]:
    """Divides the clips of a split into files (shards) of up to about 256 MB.

    There are 8 shards or more. If there are fewer than 8 clips, each shard has one clip. Returns a
    pair for each shard: its path, which begins with `prefix`, and [n] int32, its part of `order`.
    """
    size = sum(
        int(lengths.sum(dtype=np.int64))
        * shard_files.count_frame_bytes(modalities[name])["features"]
        for name, lengths in split.lengths.items()
        if name in modalities
    )
    num_shards = min(len(order), max(MIN_SHARDS, -(-size // SHARD_BYTES)))
    bounds = [len(order) * shard // num_shards for shard in range(num_shards + 1)]
    name = f"{prefix.name}.tfrecord-{{:05}}-of-{num_shards:05}"
    return [
        (prefix.with_name(name.format(number)), order[first:last])
        for number, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def make_shard(
    path: Path,
    order: np.ndarray,
    split: PackedClips,
    modalities: Mapping[str, Modality],
    *,
    on_disk: bool,
) -> shard_files.Shard:
    """Writes clips to a TFRecord file, or if `on_disk` is False, only computes its digest.

    `order` [n] are the positions of the clips in `split.names`.
    """
    sha256, size = hashlib.sha256(), 0
    with path.open("wb") if on_disk else contextlib.nullcontext() as file:
        for record in _encode_clips(order, split, modalities):
            sha256.update(record)
            size += len(record)
            if file:
                file.write(record)
    mtime_ns = path.stat().st_mtime_ns if on_disk else 0
    return shard_files.Shard(path, len(order), size, mtime_ns, sha256.hexdigest())


def _encode_clips(
    order: np.ndarray, split: PackedClips, modalities: Mapping[str, Modality]
) -> Iterator[bytes]:
    """Yields the record of each clip."""
    kinds = {(name, f): get_dtype(f, x.dtype) for name, x in modalities.items() for f in BATCHED}
    mapped = dict[str, Packed]()
    for number, clip in enumerate(order.tolist()):
        if number % CLIPS_AT_ONCE == 0:  # maps files again, so that the memory of pages is freed
            mapped = {name: map_again(frames) for name, frames in split.frames.items()}
        values: dict[str, bytes | int] = {"clip": split.names[clip].encode(), "clip_index": clip}
        for (name, field), dtype in kinds.items():
            content = b""
            if name in mapped and (length := mapped[name].length[clip]):
                start = mapped[name].start[clip]
                frames = getattr(mapped[name], field)[start : start + length]
                content = frames.astype(dtype.newbyteorder("<"), copy=False).tobytes()
            values[f"frames/{name}/{field}"] = content
        yield shard_files.make_record(shard_files.encode(values))
