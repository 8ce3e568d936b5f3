"""A directory of official files as checked TFRecords, and its ground truth as tables.

    python -m vidjax.data.iqiyi_vid DIR [--cache_dir=C]

converts a directory and prints what is in it. Records hold features alone; labels come from the
ground-truth files each time, so that mending a label never means converting again.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import logging
import mmap
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vidjax.data.records.codec import FIELDS, Modality, PackedFrames, tf, tfds
from vidjax.data.records.manifest import (
    Records,
    SplitRecords,
    building,
    default_cache_dir,
    describe_shard,
    exclusive,
    load_records,
    write_manifest,
)
from vidjax.data.records.report import format_report, report_labels, report_split
from vidjax.data.untrusted import pickles
from vidjax.data.untrusted.packing import NonFinite
from vidjax.data.untrusted.pickles import PackedClips

# Part of the key of a cache folder: raise it whenever a record or the manifest changes its meaning.
VERSION = "1.1.0"
MIN_SHARDS = 8
_LOG = logging.getLogger(__name__)
SHARD_BYTES = 256 << 20
ORDER_SEED = 0

Sources = Mapping[tuple[str, str], Path]  # (modality, split) -> feature pickle
Unpacked = Mapping[str, Mapping[str, PackedClips]]  # split -> modality -> clips
Truth = Mapping[str, Mapping[str, str]]  # split -> clip -> identity, of the splits that have labels


class Source(NamedTuple):
    """Frames that are to become records: official files, or others that can be told as flat arrays.

    Attributes:
      kind: the folder of the cache that its records go to.
      place: where it lies, for messages.
      title: what is converted, for the log.
      files: (modality, split) -> what messages and the report call these frames.
      facts: what tells it from every other source.
      read: gives the clips, flat; arguments: a folder to fill, whose files outlive them, and what
        becomes of frames that are not finite.
    """

    kind: str
    place: str
    title: str
    files: Callable[[str, str], Path]
    facts: Callable[[], list[dict[str, Any]]]
    read: Callable[[Path, NonFinite], Unpacked]


class Labels(NamedTuple):
    """What the ground truth says of one split.

    Attributes:
      labels: [N] int32, column 1..C by clip index, 0 for a distractor.
      labelled: False when the split has no ground truth at all.
      positives: [C] int64, clips that the ground truth gives each identity, whether or not a record
        holds them.
      num_others: identities of the ground truth that have no column.
    """

    labels: np.ndarray
    labelled: bool
    positives: np.ndarray
    num_others: int


class _Staged(NamedTuple):
    """One split between the pickles and the records: clips joined by name, arrays still flat.

    Attributes:
      clips: clip names in byte order.
      order: [N] int32, clip index of each record.
      packed: modality -> its flat arrays.
      starts, lengths: modality -> [N] first frame and number of frames by clip index.
    """

    clips: tuple[str, ...]
    order: np.ndarray
    packed: dict[str, PackedClips]
    starts: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]


class _SortedWriter(tfds.core.ExampleWriter):
    """Writes the fields of every record in one order: equal data makes equal files.

    The order in which protocol buffers write a map is another one in every process.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes one shard of (key, serialised record)."""
        parse = tf.train.Example.FromString
        ordered = ((k, parse(one).SerializeToString(deterministic=True)) for k, one in examples)
        return super().write(path, ordered)


class IqiyiVid(tfds.core.ShardBasedBuilder):
    """Records of frame features: clip name, clip index and the packed frames of each modality.

    It is given shards rather than a shuffled stream because TFDS's shuffler holds up to 1 GB and
    spills the rest once more to disk; the order is ours (`_stage`) anyway.
    """

    VERSION = tfds.core.Version(VERSION)
    __module__ = "vidjax.data.iqiyi_vid"  # TFDS writes it down, be it run as __main__ or not

    def __init__(
        self, *, modalities: Mapping[str, Modality], staged: Mapping[str, _Staged], data_dir: Path
    ):
        """Makes the builder that writes `staged` under `data_dir`."""
        self._modalities = modalities
        self._staged = staged
        super().__init__(data_dir=data_dir)

    def _info(self) -> Any:
        frames = {
            name: PackedFrames(dim=modality.dim, dtype=modality.dtype)
            for name, modality in self._modalities.items()
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Frame features of video clips, converted from official pickles.",
            features=tfds.features.FeaturesDict(
                {
                    "clip": tfds.features.Text(),
                    "clip_index": tfds.features.Scalar(dtype=np.int64),
                    "frames": tfds.features.FeaturesDict(frames),
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        return {
            name: [
                lambda split=split, first=first, last=last: self._examples(split, first, last)
                for first, last in _shard_bounds(split, self._modalities)
            ]
            for name, split in self._staged.items()
        }

    def _example_writer(self) -> _SortedWriter:
        return _SortedWriter(self.info.file_format)

    def _examples(self, split: _Staged, first: int, last: int) -> Iterator[tuple[int, dict]]:
        for index in split.order[first:last].tolist():
            frames = {
                name: _clip_frames(split, name, index, modality)
                for name, modality in self._modalities.items()
            }
            yield index, {"clip": split.clips[index], "clip_index": index, "frames": frames}
        _release(split)


def _clip_frames(split: _Staged, name: str, index: int, modality: Modality) -> dict:
    """Returns the frames of one clip as views of the flat arrays; of length 0 without any."""
    if name not in split.packed or not split.lengths[name][index]:
        return {
            "features": np.zeros((0, modality.dim), modality.dtype),
            "quality": np.zeros(0, np.float32),
            "detection": np.zeros(0, np.float32),
            "number": np.zeros(0, np.int32),
            "box": np.zeros((0, 4), np.float32),
        }
    start = int(split.starts[name][index])
    frames = slice(start, start + int(split.lengths[name][index]))
    return {field: getattr(split.packed[name], field)[frames] for field in FIELDS}


def _release(split: _Staged) -> None:
    """Lets go of the pages that were read: mapped files count as memory of the process."""
    for packed, field in itertools.product(split.packed.values(), FIELDS):
        owner = getattr(packed, field)
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            owner.madvise(mmap.MADV_DONTNEED)


def _shard_bounds(split: _Staged, modalities: Mapping[str, Modality]) -> list[tuple[int, int]]:
    """Returns first and last + 1 record of each shard; every shard has one record or more."""
    num_bytes = sum(
        int(split.lengths[name].sum()) * modality.dim * np.dtype(modality.dtype).itemsize
        for name, modality in modalities.items()
        if name in split.lengths
    )
    num_shards = min(len(split.clips), max(MIN_SHARDS, -(-num_bytes // SHARD_BYTES)))
    bounds = [len(split.clips) * shard // num_shards for shard in range(num_shards + 1)]
    return list(itertools.pairwise(bounds))


def prepare(
    source_dir: str | Path,
    cache_dir: str | Path | None = None,
    *,
    non_finite: NonFinite = "drop",
) -> Records:
    """Returns the records of a directory of official files, converting it unless that is done.

    Args:
      source_dir: the directory with `{modality}_{split}[_v2].pickle` files.
      cache_dir: where records are kept; None for the default.
      non_finite: 'drop' leaves out frames with a feature that is not finite, and counts them.

    Raises:
      FileNotFoundError: no such directory, or no feature pickle in it.
      ValueError: the files contradict each other, or the records are damaged; with
        `non_finite='error'` a feature is not finite.
      OSError: the cache cannot be written.
    """
    source_dir = Path(source_dir).expanduser()
    sources = pickles.find_pickles(source_dir)
    if not sources:
        raise FileNotFoundError(
            f"{source_dir}: no feature pickles here: looked for\n"
            "MODALITY_SPLIT.pickle or MODALITY_SPLIT_v2.pickle, such as face_train.pickle"
            + _hint(source_dir)
        )
    return convert(_of_pickles(sources), cache_dir, non_finite=non_finite)


def _hint(source_dir: Path) -> str:
    """Returns where the pickles may be that a directory lacks, as a line or nothing."""
    for inner in sorted(source_dir.glob("*/*_train*.pickle")):
        return f"\nthey are in {inner.parent}: --config.data.dir={inner.parent}"
    for packed in sorted([*source_dir.glob("*.zip"), *source_dir.glob("*.tar*")]):
        return f"\nunpack {packed.name} first"
    return ""


def convert(
    source: Source, cache_dir: str | Path | None = None, *, non_finite: NonFinite = "drop"
) -> Records:
    """Returns the records of a source, converting it unless that is done.

    Args:
      source: what to convert.
      cache_dir, non_finite: as of `prepare`.

    Raises:
      ValueError: the source contradicts itself, or the records are damaged; with
        `non_finite='error'` a feature is not finite.
      OSError: the cache cannot be written.
    """
    if non_finite not in ("drop", "error"):
        raise ValueError(f"config.data.non_finite is 'drop' or 'error', got {non_finite!r}")
    facts = source.facts()
    folder = folder_of(source.kind, facts, cache_dir)
    if not (folder / "manifest.json").exists():
        with exclusive(folder.parent):
            if not (folder / "manifest.json").exists():
                with building(folder) as partial:
                    _convert(source, facts, partial, non_finite)
                    if source.facts() != facts:
                        raise ValueError(f"{source.place}: changed while it was converted")
    records = load_records(folder)
    if non_finite == "error":  # they may have been converted without a word about it
        _refuse_dropped(records, source)
    return records


def _refuse_dropped(records: Records, source: Source) -> None:
    """Raises ValueError, with the first clip, when a frame was left out of the records."""
    for facts in records.report["splits"].values():
        for counts in facts["modalities"].values():
            if counts["frames_skipped"].get("non_finite"):
                with tempfile.TemporaryDirectory() as scratch:  # read it again for the clip
                    source.read(Path(scratch), "error")


def _of_pickles(sources: Sources) -> Source:
    """Returns official files as a source."""
    folder = next(iter(sources.values())).parent

    def read(scratch: Path, non_finite: NonFinite) -> Unpacked:
        unpacked: dict[str, dict[str, PackedClips]] = {}
        files = tqdm(sorted(sources.items()), desc="read", unit="file", leave=False, disable=None)
        for (modality, split), path in files:
            packed = pickles.unpack(
                path, modality, scratch / f"{modality}_{split}", non_finite=non_finite
            )
            unpacked.setdefault(split, {})[modality] = packed
        return unpacked

    return Source(
        kind="iqiyi_vid",
        place=str(folder),
        title=f"{len(sources)} files of {folder}",
        files=lambda modality, split: sources[modality, split],
        facts=lambda: _source_facts(sources),
        read=read,
    )


def records_folder(sources: Sources, cache_dir: str | Path | None = None) -> Path:
    """Returns where the records of some pickles are, or would be; its manifest says if they are.

    Args:
      sources: what `pickles.find_pickles` found.
      cache_dir: as of `prepare`.

    Raises:
      OSError: a pickle is gone.
    """
    return folder_of("iqiyi_vid", _source_facts(sources), cache_dir)


def folder_of(kind: str, facts: list[dict[str, Any]], cache_dir: str | Path | None = None) -> Path:
    """Returns where the records of a source are, or would be, by its `kind` and its facts."""
    key = hashlib.sha256(json.dumps([VERSION, facts]).encode()).hexdigest()[:20]
    return Path(cache_dir or default_cache_dir()).expanduser() / kind / key


def _source_facts(sources: Sources) -> list[dict[str, Any]]:
    """Returns what tells one set of sources from another without reading them."""
    facts = []
    for (modality, split), path in sorted(sources.items()):
        stat = path.stat()
        facts.append(
            {
                "modality": modality,
                "split": split,
                "path": str(path.resolve()),
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
            }
        )
    return facts


def _convert(
    source: Source, facts: list[dict[str, Any]], folder: Path, non_finite: NonFinite
) -> None:
    """Fills `folder` with the records of a source."""
    staging = folder / "staging"
    _LOG.info("converting %s", source.title)
    unpacked = source.read(staging, non_finite)
    modalities = _common_modalities(unpacked, source)
    _refuse_shared_clips(unpacked, source.place)
    staged = {split: _stage(split, packed) for split, packed in unpacked.items()}
    report = {"version": VERSION, "splits": {}}
    for split, joined in staged.items():
        paths = {name: source.files(name, split) for name in joined.packed}
        if not joined.clips:
            where = ", ".join(map(str, paths.values())) or source.place
            raise ValueError(f"{where}: no clip in split {split!r}")
        report["splits"][split] = report_split(joined.packed, joined.lengths, paths)
        _release(joined)

    builder = IqiyiVid(modalities=modalities, staged=staged, data_dir=folder)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces a download there
        builder.download_and_prepare(download_dir=staging)
    splits = {}
    for split, joined in staged.items():
        counts = [last - first for first, last in _shard_bounds(joined, modalities)]
        paths = map(Path, builder.info.splits[split].filepaths)
        shards = tuple(map(describe_shard, paths, counts))
        splits[split] = SplitRecords(joined.clips, joined.order, joined.lengths, shards)
    shutil.rmtree(staging)
    write_manifest(Records(folder, modalities, splits, report), facts)


def _common_modalities(unpacked: Unpacked, source: Source) -> dict[str, Modality]:
    """Returns width and dtype of each modality; the dtype is one that holds every split exactly.

    Raises:
      ValueError: two splits disagree about the width.
    """
    found: dict[str, tuple[str, Modality]] = {}
    for split, packed in unpacked.items():
        for name, clips in packed.items():
            if not len(clips.features):  # a file of empty lists says nothing of width and dtype
                continue
            dim, dtype = clips.features.shape[1], clips.features.dtype
            if name in found:
                first, other = found[name]
                if other.dim != dim:
                    raise ValueError(
                        f"{name}: features are {other.dim} wide in {source.files(name, first)}\n"
                        f"but {dim} wide in {source.files(name, split)}"
                    )
                dtype = np.result_type(dtype, other.dtype)
            found[name] = (found[name][0] if name in found else split, Modality(dim, dtype.name))
    if not found:
        what = "pickles" if source.kind == "iqiyi_vid" else source.kind
        raise ValueError(f"{source.place}: not one frame in its {what}")
    return {name: modality for name, (_, modality) in sorted(found.items())}


def _refuse_shared_clips(unpacked: Unpacked, place: str) -> None:
    """Raises ValueError when a clip is in two splits: a model would be tested on what it saw."""
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


def _stage(split: str, packed: Mapping[str, PackedClips]) -> _Staged:
    """Returns the clips of one split joined by name over its modalities."""
    # Python orders str by code point, which is the byte order of UTF-8.
    clips = tuple(sorted({name for clips in packed.values() for name in clips.names}))
    index = {name: position for position, name in enumerate(clips)}
    starts, lengths = {}, {}
    for modality, flat in packed.items():
        rows = np.fromiter((index[name] for name in flat.names), np.int64, len(flat.names))
        starts[modality] = np.zeros(len(clips), np.int64)
        lengths[modality] = np.zeros(len(clips), np.int32)
        starts[modality][rows] = np.cumsum(flat.lengths, dtype=np.int64) - flat.lengths
        lengths[modality][rows] = flat.lengths
    # Ground truth, and often the names with it, is sorted by identity: a shuffle buffer does not
    # mend that, a permutation once and for all does.
    shuffled = np.random.default_rng(ORDER_SEED).permutation(len(clips))
    order = shuffled if split == "train" else np.arange(len(clips))
    return _Staged(clips, order.astype(np.int32), dict(packed), starts, lengths)


def load_truth(
    source_dir: str | Path, splits: Mapping[str, SplitRecords]
) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity of the `{split}_gt.txt` files of a directory.

    Raises:
      ValueError: one is malformed or does not fit the clips of its split, where there are such.
    """
    truth = {}
    for split, path in pickles.find_ground_truth(source_dir).items():
        clips = frozenset(splits[split].clips) if split in splits else None
        truth[split] = pickles.load_ground_truth(path, known_clips=clips)
        if clips is not None:
            pickles.check_known(path, truth[split], clips)
    return truth


def load_labels(
    source: str | Path | Truth, records: Records, identities: Sequence[str] | None = None
) -> tuple[tuple[str, ...], dict[str, Labels], dict[str, Any]]:
    """Returns the identities, the labels of each split, and the report with both.

    Args:
      source: the directory with `{split}_gt.txt` files, or what they would say.
      records: its records.
      identities: in the order of their columns; None for those of the train and val ground truth,
        whether or not a record shows them.

    Raises:
      ValueError: a ground-truth file is malformed or does not fit the records.
    """
    truth = source if isinstance(source, Mapping) else load_truth(source, records.splits)
    if identities is None:
        identities = pickles.sort_identities(
            identity for split in ("train", "val") for identity in truth.get(split, {}).values()
        )
    column = {identity: position for position, identity in enumerate(identities, 1)}
    labels, report = {}, copy.deepcopy(records.report)
    report["identities"] = len(identities)
    for split, facts in records.splits.items():
        pairs = truth.get(split)
        columns = {name: column.get(identity, 0) for name, identity in (pairs or {}).items()}
        positives = np.bincount(list(columns.values()), minlength=len(identities) + 1)
        labels[split] = Labels(
            labels=np.array([columns.get(name, 0) for name in facts.clips], np.int32),
            labelled=pairs is not None,
            positives=positives[1:].astype(np.int64),
            num_others=len(set((pairs or {}).values()) - column.keys()),
        )
        if positives[0]:
            warnings.warn(
                f"{split}_gt.txt: {positives[0]} clips show identities that no model "
                "here can name, such as those in neither train_gt.txt nor val_gt.txt",
                stacklevel=2,
            )
        report["splits"][split] |= report_labels(pairs, facts.clips, identities)
    return tuple(identities), labels, report


def main(argv: Sequence[str] | None = None) -> int:
    """Converts a directory, prints its report and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vidjax.data.iqiyi_vid", description="Convert a directory of official files."
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--cache_dir", metavar="C", type=Path, help="$VIDJAX_CACHE or ~/.cache/vidjax by default"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vidjax").setLevel(logging.INFO)
    try:
        records = prepare(args.directory, args.cache_dir)
        _, _, report = load_labels(args.directory, records)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{format_report(report)}\n{records.folder / 'data_report.json'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
