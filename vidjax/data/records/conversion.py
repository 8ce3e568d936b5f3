"""Converts the features of files to TFRecord files (shards) in the cache.

The clips are divided, in their order, into at least 8 shards of at most about 256 MB. Several
threads write the shards. Equal datasets give equal files.

A folder of the cache contains the shards, `index.npz` (names, order, lengths and quality of clips),
`data_report.json` and `manifest.json`. The manifest is written last, and contains the sha256 of
all other files and of its other entries. Without the manifest, a shard that was cut between two
records would be read without an error.
"""

import contextlib
import io
import itertools
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.core.batch import BATCHED
from vidjax.data.cache_folders import cache_folder, exclusive, mark_used
from vidjax.data.clips import DataSource, Modality, RecordSource
from vidjax.data.packed_clips import (
    PackedClips,
    complete,
    measure_quality,
)
from vidjax.data.records.data_report import report_split
from vidjax.data.records.shards import (
    NAME,
    VERSION,
    Records,
    Shard,
    SplitRecords,
    check_changed,
    count_frame_bytes,
    make_shard,
)
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.files import hash_opened, sha256_file
from vidjax.utils.machine import max_open_files, num_cores

ORDER_SEED = 0
MIN_SHARDS = 8
SHARD_BYTES = 256 << 20
MAX_INDEX_BYTES = 4096  # the most bytes of `index.npz` per clip


def convert(source: RecordSource, cache_dir: str | Path | None = None) -> Records:
    """Returns the converted clips of a dataset, from TFRecord files in the cache.

    If the cache does not contain the files, they are written.

    Args:
      cache_dir: the cache, by default `$VIDJAX_CACHE` or `~/.cache/vidjax`.

    Raises:
      UserError: a clip is malformed, a clip is in two splits, files of the dataset change during
        the conversion, or files of the cache are damaged.
    """
    fingerprint = source.fingerprint()
    folder = cache_folder(cache_dir, source.kind, [VERSION, fingerprint])
    if not (folder / "manifest.json").exists():
        with exclusive(folder):
            if not (folder / "manifest.json").exists():
                remove(folder)  # a folder without a manifest is incomplete
                with files.atomic_folder(folder) as partial:
                    write_records(source, fingerprint, partial)
                    if source.fingerprint() != fingerprint:
                        raise UserError(
                            f"{source.place}: files were changed while they were converted\n"
                            "run the command again when no program writes to them"
                        )
    records = load_records(folder)
    mark_used(folder)
    return records


_LOG = logging.getLogger(__name__)


def write_records(source: RecordSource, fingerprint: list[dict[str, Any]], folder: Path) -> None:
    """Writes the TFRecord files of a dataset, and their manifest, to an empty folder."""
    # Imported before the threads start, because TFDS replaces the import function of all threads.
    from vidjax.data.records import codec

    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    records = make_records(source, source.read(staging), folder)
    shards = {name: split.shards for name, split in records.splits.items()}
    codec.write_info(folder / NAME / VERSION, records.modalities, shards)
    files.remove_tree(staging)
    write_manifest(records, fingerprint)


def make_records(
    source: DataSource,
    packed: Mapping[str, PackedClips],
    folder: Path | None = None,
) -> Records:
    """Checks the splits of a dataset, and writes its TFRecord files to `folder`.

    If `folder` is None, nothing is written: only the digests of these files are computed, and the
    clips stay in memory.
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
    with ThreadPoolExecutor(max(1, int(min(num_cores(), max_threads)))) as threads:
        reports = {}
        for name, clips in packed.items():
            paths = {modality: source.path_of(modality, name) for modality in clips.frames}
            reports[name] = threads.submit(report_split, clips, paths)
        parts = [
            (name, *part)
            for name, clips in packed.items()
            for part in cut(clips, orders[name], modalities, place / f"{NAME}-{name}")
        ]

        def make(name: str, path: Path, order: np.ndarray) -> Shard:
            return make_shard(path, order, packed[name], modalities, on_disk=folder is not None)

        shards = [*threads.map(make, *zip(*parts, strict=True))]
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
            shards=tuple(x for (of, *_), x in zip(parts, shards, strict=True) if of == name),
            packed=None if folder else complete(clips, modalities),
        )
        for name, clips in packed.items()
    }
    return Records(folder, modalities, splits, report)


def choose_order(split: str, num_clips: int) -> np.ndarray:
    """Returns [N] int32, the clips in the order of the files: random for train, else by name."""
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
        clips = f"{messages.count(len(shared), 'clip')} {'are' if shared[1:] else 'is'}"
        raise UserError(
            f"{place}: {clips} in two splits: remove each of them from one split\n"
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
        int(lengths.sum(dtype=np.int64)) * count_frame_bytes(modalities[name])["features"]
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


def write_manifest(records: Records, fingerprint: list[dict[str, Any]]) -> None:
    """Writes `index.npz`, `data_report.json`, and then `manifest.json`, which lists all files."""
    folder = records.folder
    assert folder
    _write_index(folder / "index.npz", records.splits)
    files.write_json(folder / "data_report.json", records.report)
    splits = {}
    for name, split in records.splits.items():
        shards = [{**x._asdict(), "path": str(x.path.relative_to(folder))} for x in split.shards]
        splits[name] = {"records": len(split.clips), "shards": shards}
    manifest = {
        "sources": fingerprint,
        "modalities": {name: kind._asdict() for name, kind in records.modalities.items()},
        "files": {name: sha256_file(folder / name) for name in ("index.npz", "data_report.json")},
        "splits": splits,
    }
    files.write_manifest(folder / "manifest.json", manifest)


def remove(folder: Path) -> bool:
    """Removes converted clips. Returns False if files of other programs stay in the folder."""
    place = folder / NAME
    # Without the manifest, which is removed first, the folder counts as incomplete.
    if folder.is_symlink() or files.remove_ours(folder, r"manifest\.json"):
        return not files.exists(folder)
    if place.is_dir() and not place.is_symlink():
        for version in sorted(place.iterdir()):
            files.remove_ours(version, rf"{NAME}-.+|dataset_info\.json|features\.json")
    files.remove_ours(place, "")
    return files.remove_ours(folder, r"index\.npz|data_report\.json")


def load_records(folder: Path) -> Records:
    """Loads the list of converted clips. Checks TFRecord files whose size or time changed."""
    try:
        manifest = files.read_manifest(folder / "manifest.json", below=folder.parents[1])
        modalities = {name: Modality(**kind) for name, kind in manifest["modalities"].items()}
        clips = sum(split["records"] for split in manifest["splits"].values())
        with _open(folder / "data_report.json", manifest) as file:
            report: Any = files.parse_json(file.readall())
        with _open(folder / "index.npz", manifest) as file:
            index = files.load_npz(file, files.JSON_BYTES + MAX_INDEX_BYTES * clips)
        splits = {
            name: _load_split(folder, name, split, index)
            for name, split in manifest["splits"].items()
        }
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        is_clear = isinstance(error, (FileNotFoundError, UserError))
        reason = str(error).splitlines()[0] if is_clear else "a file has an unknown layout"
        raise UserError(
            f"{folder}: the converted data are damaged: {reason}\n"
            "delete this folder to convert again"
        ) from error
    splits = {
        name: split._replace(shards=check_changed(split.shards)) for name, split in splits.items()
    }
    return Records(folder, modalities, splits, report)


@contextlib.contextmanager
def _open(path: Path, manifest: Mapping[str, Any]) -> Iterator[io.FileIO]:
    """Opens a file in a `with` block. Raises UserError if its sha256 is not as in the manifest."""
    with files.open_regular(path, below=path.parents[2]) as file:
        if hash_opened(file) != manifest["files"][path.name]:
            raise UserError(f"{path.name} does not match its sha256")
        file.seek(0)
        yield file


def _load_split(
    folder: Path, name: str, manifest: Mapping[str, Any], index: Mapping[str, np.ndarray]
) -> SplitRecords:
    """Returns the clips of a split from its entry in the manifest and the arrays of the index."""
    names = index[f"{name}/clips"].tobytes().decode("utf-8", "surrogateescape")
    lengths, quality = (
        {key.removeprefix(prefix): index[key] for key in index if key.startswith(prefix)}
        for prefix in (f"{name}/lengths/", f"{name}/quality/")
    )
    return SplitRecords(
        clips=tuple(names.split("\n")),
        order=index[f"{name}/order"],
        lengths=lengths,
        quality=quality,
        shards=tuple(
            Shard(**{**shard, "path": folder / shard["path"]}) for shard in manifest["shards"]
        ),
    )


def _write_index(path: Path, splits: Mapping[str, SplitRecords]) -> None:
    arrays = {}
    for name, split in splits.items():
        # Names are joined by newlines, because an array of str pads all names to the longest name.
        clips = "\n".join(split.clips).encode("utf-8", "surrogateescape")
        arrays[f"{name}/clips"] = np.frombuffer(clips, np.uint8)
        arrays[f"{name}/order"] = split.order
        for modality, lengths in split.lengths.items():
            arrays[f"{name}/lengths/{modality}"] = lengths
            arrays[f"{name}/quality/{modality}"] = split.quality[modality]
    np.savez(path, **arrays)
