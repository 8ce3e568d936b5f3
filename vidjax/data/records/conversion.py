"""From any source of frames to records in the cache: converted once, checked at every load.

Clips are cut, in their order, into shards of about SHARD_BYTES. Threads write these in any order,
to the same bytes.
"""

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from vidjax.utils.machine import most_files, num_cores

MIN_SHARDS = 8
SHARD_BYTES = 256 << 20


def convert(
    source: RecordSource,
    cache_dir: str | Path | None = None,
    *,
    non_finite: NonFinite = "drop",
    workers: int | None = None,
) -> Records:
    """Returns the records of a source, converting it unless the cache has them.

    With `non_finite='drop'`, frames whose feature holds a NaN or an Inf are skipped and counted;
    'error' refuses them. `cache_dir=None` is `$VIDJAX_CACHE` or `~/.cache/vidjax`. `workers`
    threads write the records, one per core by default.

    Raises:
      ValueError: the source contradicts itself or has a feature that is refused, or the records are
        damaged.
    """
    check_choice("config.data.non_finite", non_finite, ("drop", "error"))
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers}: wanted 1 or more")
    fingerprint = source.fingerprint()
    folder = cache_folder(cache_dir, source.kind, [VERSION, fingerprint])
    if not (folder / "manifest.json").exists():
        with exclusive(folder):
            if not (folder / "manifest.json").exists():
                remove(folder)  # it is incomplete
                with files.atomic_folder(folder) as partial:
                    write_records(source, fingerprint, partial, non_finite, workers)
                    if source.fingerprint() != fingerprint:
                        raise UserError(
                            f"{source.place}: changed during the conversion\n"
                            "run the command again once no program writes to it"
                        )
    records = load_records(folder)
    mark_used(folder)
    splits = records.report["splits"].values()
    counts = [one for split in splits for one in split["modalities"].values()]
    if non_finite == "error" and any(one["frames_skipped"].get("non_finite") for one in counts):
        # The records are those of an earlier conversion with 'drop': reading again names the clip.
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
    """Fills a folder with the records of a source; see `convert`."""
    # TFDS replaces the import of all threads while it is imported, so no other one is at work yet.
    from vidjax.data.records import codec

    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    unpacked = source.read(staging, non_finite)
    staged = {split: stage(split, parts) for split, parts in unpacked.items()}
    modalities = _joined_modalities(staged, source)
    _refuse_empty_splits(staged, source)
    _refuse_shared_clips(staged, source.place)
    records = folder / NAME / VERSION
    records.mkdir(parents=True)
    # Each thread maps all fields of a split, which takes half of the files of a process at most.
    fitting = most_files() / 2 / (len(STORED) * len(modalities))
    with ThreadPoolExecutor(max(1, int(min(workers or num_cores(), fitting)))) as threads:
        reports = {}
        for name, split in staged.items():
            paths = {modality: source.file_of(modality, name) for modality in split.packed}
            reports[name] = threads.submit(report_split, split, paths)
        cuts = {
            name: cut(split, modalities, records / f"{NAME}-{name}")
            for name, split in staged.items()
        }
        written = threads.map(
            lambda name, path, order: write_shard(path, order, staged[name], modalities),
            *zip(*((name, *one) for name, some in cuts.items() for one in some), strict=True),
        )
        shards = {name: tuple(itertools.islice(written, len(some))) for name, some in cuts.items()}
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
            paths = ", ".join(str(source.file_of(modality, name)) for modality in split.packed)
            raise UserError(f"{paths or source.place}: no clip in split {name!r}")


def _joined_modalities(
    staged: Mapping[str, StagedSplit], source: RecordSource
) -> dict[str, Modality]:
    """Returns width and dtype of each modality of any split; the dtype holds all values exactly.

    UserError if the width of a modality differs between splits.
    """
    modalities: dict[str, Modality] = {}
    first_split: dict[str, str] = {}
    dropped = 0
    for split, clips in staged.items():
        for name, flat in clips.packed.items():
            dropped += sum(flat.skipped.values())
            if not len(flat.features):  # width and dtype are unknown
                continue
            first = first_split.setdefault(name, split)
            found = Modality(flat.features.shape[1], flat.features.dtype.name)
            known = modalities.get(name, found)
            if known.dim != found.dim:
                raise UserError(
                    f"{name}: features are {known.dim} wide in {source.file_of(name, first)}\n"
                    f"but {found.dim} wide in {source.file_of(name, split)}"
                )
            dtype = np.result_type(known.dtype, found.dtype)
            modalities[name] = Modality(known.dim, dtype.name)
    if not modalities:
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


def cut(
    split: StagedSplit, modalities: Mapping[str, Modality], prefix: Path
) -> list[tuple[Path, np.ndarray]]:
    """Returns path and clip indices [n] of each shard, none of them empty."""
    size = sum(
        int(lengths.sum(dtype=np.int64)) * shard_files.frame_bytes(modalities[name])["features"]
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
    """Writes the clips `order` [n] int32 of a split; returns the shard's entry of the manifest."""
    # Mapped anew in each call: what it read of the files leaves the memory afterwards.
    mapped = {name: dict(flat.frames) for name, flat in split.packed.items()}
    none = {name: field.default(0) for name, field in FRAME_FIELDS.items()}

    def frames_of(name: str, clip: int) -> dict[str, np.ndarray]:
        """Returns field -> frames of a clip."""
        length = int(split.lengths[name][clip]) if name in split.lengths else 0
        if not length:
            modality = modalities[name]
            return {"features": np.zeros((0, modality.dim), modality.dtype), **none}
        start = int(split.starts[name][clip])
        return {field: mapped[name][field][start : start + length] for field in STORED}

    with path.open("wb") as file:
        for clip in order.tolist():
            frames = {name: frames_of(name, clip) for name in modalities}
            file.write(shard_files.framed(_record(split.clips[clip], clip, frames, modalities)))
    return shard_files.describe_shard(path, len(order))


def _record(
    clip: str,
    index: int,
    frames: Mapping[str, Mapping[str, np.ndarray]],
    modalities: Mapping[str, Modality],
) -> bytes:
    """Returns the record of a clip; `codec.write_info` tells TFDS what it holds."""
    values: dict[str, bytes | int] = {"clip": clip.encode(), "clip_index": index}
    for name, fields in frames.items():
        for field, array in fields.items():
            wanted = FRAME_FIELDS[field] if field in FRAME_FIELDS else modalities[name]
            dtype = np.dtype(wanted.dtype).newbyteorder("<")
            values[f"frames/{name}/{field}"] = array.astype(dtype, copy=False).tobytes()
    return shard_files.encode(values)


def run_command(
    argv: Sequence[str] | None,
    module: str,
    description: str,
    open_source: Callable[[argparse.Namespace], RecordSource],
) -> int:
    """Runs `python -m MODULE DIR`: converts a folder, prints its report, returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = messages.Parser(prog=f"python -m {module}", description=description)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--cache_dir", metavar="C", type=Path, help="$VIDJAX_CACHE or ~/.cache/vidjax by default"
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, help="files at once; one per core by default"
    )

    def command() -> int:
        args = parser.parse_args(words)
        source = open_source(args)
        records = convert(source, args.cache_dir, workers=args.workers)
        _, _, report = label_records(records, source.truth(records.clips))
        messages.say(f"{format_report(report)}\n{records.folder / 'data_report.json'}")
        return 0

    return messages.guarded(command, words)
