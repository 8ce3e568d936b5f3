"""Converts a source of frames to records in the cache. Records are checked at every load.

The clips are divided, in their order, into shards of about SHARD_BYTES. Several threads write
shards; the bytes of a shard do not depend on the thread.
"""

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.cache import cache_folder, exclusive, mark_used
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import FRAME_FIELDS, STORED, NonFinite, RecordSource
from vidjax.data.packing import StagedSplit, stage
from vidjax.data.records import shard_files
from vidjax.data.records.data_report import format_report, label_records, report_split
from vidjax.data.records.manifest import (
    NAME,
    VERSION,
    Records,
    SplitRecords,
    load_records,
    remove,
    write_manifest,
)
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError, check_choice
from vidjax.utils.machine import max_open_files, num_cores

MIN_SHARDS = 8
SHARD_BYTES = 256 << 20
CLIPS_AT_ONCE = 256


def convert(
    source: RecordSource,
    cache_dir: str | Path | None = None,
    *,
    non_finite: NonFinite = "drop",
    workers: int | None = None,
) -> Records:
    """Returns the records of a source. If the cache does not have them, the source is converted.

    Args:
      cache_dir: the cache; None: `$VIDJAX_CACHE` or `~/.cache/vidjax`.
      non_finite: 'drop' leaves out and counts frames whose feature contains a NaN or an Inf;
        'error' raises UserError.
      workers: number of threads that write records; None: the number of cores.

    Raises:
      UserError: the source contradicts itself or has a refused feature, or records are damaged.
    """
    check_choice("config.data.non_finite", non_finite, ("drop", "error"))
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers}: wanted 1 or more")
    fingerprint = source.fingerprint()
    folder = cache_folder(cache_dir, source.kind, [VERSION, fingerprint])
    if not (folder / "manifest.json").exists():
        with exclusive(folder):
            if not (folder / "manifest.json").exists():
                remove(folder)  # without a manifest it is incomplete
                with files.atomic_folder(folder) as partial:
                    write_records(source, fingerprint, partial, non_finite, workers)
                    if source.fingerprint() != fingerprint:
                        raise UserError(
                            f"{source.place}: changed during the conversion\n"
                            "run the command again when no program writes to it"
                        )
    records = load_records(folder)
    mark_used(folder)
    skipped = any(
        counts["frames_skipped"].get("non_finite")
        for split in records.report["splits"].values()
        for counts in split["modalities"].values()
    )
    if non_finite == "error" and skipped:
        # An earlier conversion had 'drop'. Reading the source raises an error that names the clip.
        with tempfile.TemporaryDirectory() as scratch:
            source.read(Path(scratch), "error")
    return records


_LOG = logging.getLogger(__name__)


def write_records(
    source: RecordSource,
    fingerprint: list[dict[str, Any]],
    folder: Path,
    non_finite: NonFinite,
    workers: int | None,
) -> None:
    """Writes the records of a source to a folder; see `convert`."""
    # During its import, TFDS replaces the import function of all threads. So it is imported before
    # the threads start.
    from vidjax.data.records import codec

    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    unpacked = source.read(staging, non_finite)
    staged = {split: stage(split, parts) for split, parts in unpacked.items()}
    modalities = _join_modalities(staged, source)
    _refuse_empty_splits(staged, source)
    _refuse_shared_clips(staged, source.place)
    records = folder / NAME / VERSION
    records.mkdir(parents=True)
    # Each thread maps the files of all fields: together at most half of the files of a process.
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
            raise UserError(f"{paths or source.place}: no clip in split {name!r}")


def _join_modalities(
    staged: Mapping[str, StagedSplit], source: RecordSource
) -> dict[str, Modality]:
    """Returns the width of each modality, and a dtype that represents all values exactly.

    Raises:
      UserError: the width of a modality differs between splits, or there are no frames.
    """
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
                    f"{name}: features are {known.dim} wide in {source.path_of(name, first)}\n"
                    f"but {modality.dim} wide in {source.path_of(name, split)}"
                )
            dtype = np.result_type(known.dtype, modality.dtype)
            modalities[name] = Modality(known.dim, dtype.name)
    if not modalities:
        reason = "all are empty"
        if dropped:
            reason = f"all {dropped} frames have a NaN, an Inf or a value beyond float32"
        raise UserError(
            f"{source.place}: no clip has a usable frame: {reason}\n"
            "compute the features again, or name another dataset"
        )
    return dict(sorted(modalities.items()))


def _refuse_shared_clips(staged: Mapping[str, StagedSplit], place: str) -> None:
    """Raises UserError if a clip is in two splits, because it would be in training and test."""
    owners: dict[str, str] = {}
    shared = []
    for name, split in sorted(staged.items()):
        for clip in split.clips:
            if owners.setdefault(clip, name) != name:
                shared.append(f"{clip} ({owners[clip]} and {name})")
    if shared:
        more = ", ..." if len(shared) > 5 else ""
        raise UserError(
            f"{place}: {len(shared)} clips are in two splits: remove each from either split\n"
            f"{', '.join(shared[:5])}{more}"
        )


def cut(
    split: StagedSplit, modalities: Mapping[str, Modality], prefix: Path
) -> list[tuple[Path, np.ndarray]]:
    """Divides a split into shards; returns the path and the clip indices [n >= 1] of each."""
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
    """Writes the clips `order` [n] int32 of a split; returns the entry of the manifest."""
    with path.open("wb") as file:
        for at in range(0, len(order), CLIPS_AT_ONCE):
            _write_clips(file, order[at : at + CLIPS_AT_ONCE].tolist(), split, modalities)
    return shard_files.describe_shard(path, len(order))


def _write_clips(
    file: BinaryIO, order: Sequence[int], split: StagedSplit, modalities: Mapping[str, Modality]
) -> None:
    # Each call maps the files again, so that the memory of its pages is freed afterwards.
    mapped = {name: dict(flat.frames) for name, flat in split.packed.items()}
    empty = {name: field.default(0) for name, field in FRAME_FIELDS.items()}

    def read_frames(name: str, clip: int) -> dict[str, np.ndarray]:
        """Returns field -> frames of a clip."""
        length = int(split.lengths[name][clip]) if name in split.lengths else 0
        if not length:
            modality = modalities[name]
            return {"features": np.zeros((0, modality.dim), modality.dtype), **empty}
        start = int(split.starts[name][clip])
        return {field: mapped[name][field][start : start + length] for field in STORED}

    for clip in order:
        frames = {name: read_frames(name, clip) for name in modalities}
        record = _encode_clip(split.clips[clip], clip, frames, modalities)
        file.write(shard_files.make_record(record))


def _encode_clip(
    clip: str,
    index: int,
    frames: Mapping[str, Mapping[str, np.ndarray]],
    modalities: Mapping[str, Modality],
) -> bytes:
    """Returns the message of a clip; `codec.write_info` describes its content for TFDS."""
    values: dict[str, bytes | int] = {"clip": clip.encode(), "clip_index": index}
    for name, fields in frames.items():
        for field, array in fields.items():
            kind = FRAME_FIELDS[field] if field in FRAME_FIELDS else modalities[name]
            dtype = np.dtype(kind.dtype).newbyteorder("<")
            values[f"frames/{name}/{field}"] = array.astype(dtype, copy=False).tobytes()
    return shard_files.encode(values)


def run_command(
    argv: Sequence[str] | None,
    module: str,
    description: str,
    open_source: Callable[[argparse.Namespace], RecordSource],
) -> int:
    """Runs `python -m MODULE DIR`: converts a folder, prints its report, returns the exit code.

    Args:
      argv: the words of the command line; None: `sys.argv`.
      module, description: the name of the module and a sentence, for `--help`.
      open_source: takes the parsed arguments and returns the source.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = messages.Parser(prog=f"python -m {module}", description=description)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--cache_dir", metavar="C", type=Path, help="$VIDJAX_CACHE or ~/.cache/vidjax by default"
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, help="files at once; by default the number of cores"
    )

    def command() -> int:
        args = parser.parse_args(words)
        source = open_source(args)
        records = convert(source, args.cache_dir, workers=args.workers)
        _, _, report = label_records(records, source.read_labels(records.clips))
        messages.print_text(f"{format_report(report)}\n{records.folder / 'data_report.json'}")
        return 0

    return messages.run_to_exit_code(command, words)
