"""Features of one's own: arrays in memory, a folder of `.npz` files or of parquet tables.

A folder holds, for every split (`train`, `val`, `test`),

    train/CLIP.npz    an array [T, D] a modality, named after it: `face`; beside it, where there are
                      any, `face_quality`, `face_detection`, `face_number` [T], `face_box` [T, 4]

or

    train.parquet     a row a frame: `clip`, `modality`, `features` (a list), and, where there are
                      any, `quality`, `detection`, `number`

and who is seen, which may be absent: `labels.csv` with the columns `clip` and `identity`, or ground
truth as of the official files, `train_gt.txt` and `val_gt.txt`. What a modality lacks is 0 for the
quality, 1 for the detection score, the place in the clip for the number.

All of them become the same records as official files, with the same checks and the same report.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidjax.data.parquet import read_clips
from vidjax.data.untrusted import pickles, sandbox
from vidjax.data.untrusted.packing import (
    Clip,
    Clips,
    NonFinite,
    clean_name,
    pack,
    read_frames,
    where_of,
)
from vidjax.data.untrusted.pickles import SPLITS
from vidjax.data.untrusted.unpickle import show

if TYPE_CHECKING:  # they bring TensorFlow
    from vidjax.data.iqiyi_vid import Source
    from vidjax.data.records.pipeline import Dataset

Labels = Mapping[str, Any] | str | Path | None  # clip -> identity, or a file that says so

LABELS = "labels.csv"
VERSION = 1  # part of the key of a cache folder: raise it whenever other frames come out


def load(
    source: Mapping[str, Clips] | str | Path,
    labels: Labels = None,
    *,
    cache_dir: str | Path | None = None,
    non_finite: NonFinite = "drop",
) -> "Dataset":
    """Returns a dataset of one's own features, for everything that takes one of official files.

    It is converted to records in the cache at the first call, and again where a byte of it changes.

    Args:
      source: split (`train`, `val`, `test`) -> clip -> modality -> features [T, D] or [D], or a
        dict with `features` and, where there are any, `quality` [T], `detection` [T], `number` [T]
        and `box` [T, 4]; or a folder as described above. Features are float16, float32, float64 or
        int8. A clip may lack modalities, or have no frame at all.
      labels: clip -> identity, for all splits; a clip without one (or with None) shows nobody of
        interest. A split of which no clip has one is ranked, not scored. Or a file: `.csv` with
        columns `clip` and `identity`, or ground truth as of the official files. None for the
        files of the folder.
      cache_dir: where records are kept; None for the default.
      non_finite: 'drop' leaves out frames with a feature that is not finite, and counts them;
        'error' refuses them.

    Raises:
      ValueError: something does not fit; names file or split, clip, modality and field.
      FileNotFoundError: no such folder, or nothing of the above in it.
      OSError: the cache cannot be written.
    """
    from vidjax.data.records import pipeline

    records, truth = prepare(source, labels, cache_dir, non_finite=non_finite)
    return pipeline.Dataset(records, truth)


def prepare(
    source: Mapping[str, Clips] | str | Path,
    labels: Labels = None,
    cache_dir: str | Path | None = None,
    *,
    non_finite: NonFinite = "drop",
) -> tuple[Any, dict[str, dict[str, str]]]:
    """Returns the records of `load`, and split -> clip -> identity."""
    from vidjax.data import iqiyi_vid

    found = _of_memory(source) if isinstance(source, Mapping) else of_folder(source)
    records = iqiyi_vid.convert(found, cache_dir, non_finite=non_finite)
    folder = None if isinstance(source, Mapping) else Path(source).expanduser()
    return records, load_truth(folder, labels, records)


def load_truth(folder: Path | None, labels: Labels, records: Any) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity, of the splits that have labels.

    Args:
      folder: where files of labels are looked for when `labels` is None.
      labels: as of `load`.
      records: the clips.

    Raises:
      ValueError: malformed labels, or labels of clips that are not there.
    """
    from vidjax.data import iqiyi_vid

    if labels is None and folder is not None:
        official, table = pickles.find_ground_truth(folder), folder / LABELS
        if not table.is_file():
            return iqiyi_vid.load_truth(folder, records.splits)
        if official:
            raise ValueError(f"{folder}: {LABELS} and {next(iter(official.values())).name}: which?")
        labels = table
    if labels is None:
        return {}
    known = {name: split for split, facts in records.splits.items() for name in facts.clips}
    place = Path("labels")
    if isinstance(labels, Mapping):
        pairs = _clean_labels((f"{place}:", *pair) for pair in labels.items())
    elif (place := Path(labels).expanduser()).suffix == ".csv":
        pairs = _clean_labels(_rows_of_csv(place))
    else:
        pairs = pickles.load_ground_truth(place, known_clips=known)
    if pairs:
        pickles.check_known(place, pairs, known)
    found: dict[str, dict[str, str]] = {}
    for name, identity in pairs.items():
        if name in known:
            found.setdefault(known[name], {})[name] = identity
    return found


def _rows_of_csv(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields what a message begins with, clip and identity of every row of a table."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            header = tuple(table.fieldnames or ())
            if not {"clip", "identity"} <= set(header):
                raise ValueError(
                    f"{path}: line 1: wanted the columns clip,identity; "
                    f"got {show(','.join(header)) or 'nothing'}"
                )
            for row in table:
                if row["clip"] is None or row["identity"] is None:
                    raise ValueError(f"{path}: line {table.line_num}: fewer fields than columns")
                yield f"{path}: line {table.line_num}:", row["clip"], row["identity"].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table of UTF-8 text: {error}") from None


def _clean_labels(rows: Iterable[tuple[str, Any, Any]]) -> dict[str, str]:
    """Returns clip -> identity of (what a message begins with, clip, identity)."""
    pairs: dict[str, str] = {}
    for where, clip, identity in rows:
        name = clean_name(clip, where)
        if identity is None or identity == "":
            continue
        if not isinstance(identity, (str, int, np.integer)) or isinstance(identity, bool):
            kind = type(identity).__name__
            raise ValueError(f"{where} clip {show(name)}: an identity is text or int, not {kind}")
        text = str(identity)
        if text.split() != [text]:
            raise ValueError(
                f"{where} clip {show(name)}: identity '{show(text)}' holds white space, "
                "which would break the lines of a ranking"
            )
        if re.fullmatch("-[0-9]+", text):
            raise ValueError(
                f"{where} clip {show(name)}: identity {text}: leave out a clip of nobody"
            )
        if pairs.setdefault(name, text) != text:
            raise ValueError(
                f"{where} clip {show(name)} is labelled {show(pairs[name])} and {show(text)}"
            )
    return pairs


# What a source is made of.


def _of_memory(splits: Mapping[str, Clips]) -> "Source":
    """Returns clips in memory as a source of records."""
    from vidjax.data.iqiyi_vid import Source

    for split, clips in splits.items():
        if split not in SPLITS or not isinstance(clips, Mapping):
            raise ValueError(
                f"'{show(str(split))}' is no split with its clips\n"
                "wanted {'train': {clip: {modality: features}}, 'val': ..., 'test': ...}"
            )

    def clips_of(split: str) -> Iterator[Clip]:
        for name, modalities in splits[split].items():
            if not isinstance(modalities, Mapping):
                raise ValueError(
                    f"{split}: clip '{show(str(name))}' is of type {type(modalities).__name__}, "
                    "wanted {modality: features}"
                )
            yield Clip(clean_name(name, f"{split}:"), split, modalities)

    def facts() -> list[dict[str, Any]]:
        return [
            {"arrays": VERSION, "split": split, "sha256": _digest(clips_of(split))}
            for split in sorted(splits)
        ]

    return Source(
        kind="arrays",
        place="arrays",
        title="arrays",
        files=lambda modality, split: Path(split),
        facts=facts,
        read=lambda scratch, non_finite: {
            split: pack(clips_of(split), scratch / split, non_finite=non_finite) for split in splits
        },
    )


def of_folder(folder: str | Path) -> "Source":
    """Returns a folder of `.npz` files or parquet tables as a source of records.

    Raises:
      FileNotFoundError: no such folder, or nothing to read in it.
      ValueError: a split is there twice, or not as it should be.
    """
    from vidjax.data.iqiyi_vid import Source

    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}")
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        table, clips = folder / f"{split}.parquet", folder / split
        if table.is_file() and clips.is_dir():
            raise ValueError(f"{folder}: {split}.parquet and a folder {split}: which?")
        if table.is_file():
            found[split] = [table]
        elif clips.is_dir():
            found[split] = _npz_files(clips)
    if not found:
        raise FileNotFoundError(
            f"{folder}: no features here: looked for SPLIT/CLIP.npz and SPLIT.parquet,\n"
            "such as train/one.npz; splits are train, val and test"
        )

    def clips_of(split: str) -> Iterator[Clip]:
        paths = found[split]
        return read_clips(paths[0]) if paths[0].suffix == ".parquet" else _of_npz(paths)

    def facts() -> list[dict[str, Any]]:
        return [
            {
                "arrays": VERSION,
                "split": split,
                "files": len(paths),
                "sha256": _digest_files(paths),
            }
            for split, paths in found.items()
        ]

    return Source(
        kind="arrays",
        place=str(folder),
        title=f"{sum(map(len, found.values()))} files of {folder}",
        files=lambda modality, split: _path_of(found[split]),
        facts=facts,
        read=lambda scratch, non_finite: {
            split: pack(clips_of(split), scratch / split, non_finite=non_finite) for split in found
        },
    )


def _path_of(paths: Sequence[Path]) -> Path:
    """Returns the table of a split, or the folder of its clips."""
    return paths[0] if paths[0].suffix == ".parquet" else paths[0].parent


def _npz_files(folder: Path) -> list[Path]:
    """Returns the clips of one split."""
    paths = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    strange = [path for path in paths if path.suffix != ".npz" or not path.is_file()]
    if strange:
        raise ValueError(f"{strange[0]}: not a clip: {folder.name} holds CLIP.npz, nothing else")
    if not paths:
        raise FileNotFoundError(f"{folder}: holds no CLIP.npz")
    return paths


def _digest_files(paths: Sequence[Path]) -> str:
    """Returns the sha256 of names and contents."""
    sha256 = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        sha256.update(f"{path.name}\n{content}\n".encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


def _digest(clips: Iterable[Clip]) -> str:
    """Returns the sha256 of clips in memory, in whatever order they come."""
    digests = []
    for clip in clips:
        sha256 = hashlib.sha256(clip.name.encode())
        for modality, value in sorted(clip.modalities.items()):
            for field, array in read_frames(value, where_of(clip, modality)).items():
                sha256.update(repr((modality, field, array.dtype.str, array.shape)).encode())
                sha256.update(np.ascontiguousarray(array).data)
        digests.append(sha256.hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _of_npz(paths: Sequence[Path]) -> Iterator[Clip]:
    """Yields the clips of `.npz` files, one of them in memory at a time."""
    for path in paths:
        name = clean_name(path.stem, f"{path}:")
        try:
            # No pickles: an array of Python objects is refused.
            with path.open("rb") as raw:
                file = np.load(raw, allow_pickle=False)
                if isinstance(file, np.ndarray):
                    raise ValueError("one array, as .npy files hold: use numpy.savez")
                with file:
                    arrays = {key: file[key] for key in file.files}
        except OSError as error:
            if error.errno:
                raise
            raise ValueError(f"{path}: damaged, or no .npz file: {error}") from None
        except Exception as error:  # a damaged archive raises whatever zlib, zipfile, numpy raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "Object arrays" in reason:
                reason = "holds Python objects: save arrays of numbers [T, D]"
            raise ValueError(f"{path}: {reason}") from None
        yield Clip(name, str(path), _by_modality(arrays))


def _by_modality(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns modality -> field -> array of `face`, `face_quality` and so on."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        name, _, field = key.rpartition("_")
        if name in arrays and field in sandbox.COLUMNS:
            found.setdefault(name, {})[field] = array
        else:
            found.setdefault(key, {})["features"] = array
    return found
