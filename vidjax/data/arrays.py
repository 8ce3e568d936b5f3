"""Your own features: arrays in memory, a folder of `.npz` files or of parquet tables.

A folder contains for each split (`train`, `val`, `test`)

    train/CLIP.npz    an array [T, D] per modality, with its name: `face`; and optionally
                      `face_quality`, `face_detection`, `face_number` [T], `face_box` [T, 4]

or

    train.parquet     a row per frame: `clip`, `modality`, `features` (a list), and optionally
                      `quality`, `detection`, `number`

Labels are optional: `labels.csv` with the columns `clip` and `identity`, or official ground truth,
`train_gt.txt` and `val_gt.txt`. The default of the quality is the L2 norm of the feature. The
defaults of other fields are in `vidjax.data.frame_fields`. All features are checked, converted and
reported like official files.

    python -m vidjax.data.arrays DIR [--cache_dir=C] [--workers=N]

converts a folder without training.
"""

import argparse
import contextlib
import hashlib
import os
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data import clip_files
from vidjax.data.cache import digest_files
from vidjax.data.checks import check_file, list_entries, refuse_split
from vidjax.data.clips import SPLITS
from vidjax.data.frame_fields import NonFinite, Origin, Quality, Unpacked
from vidjax.data.labels import LabelSource, load_folder_truth, load_label_table
from vidjax.data.packing import Clip, Clips, locate, pack, read_dict, read_frames
from vidjax.data.untrusted.names import show
from vidjax.utils import messages
from vidjax.utils.errors import NoFileError, UserError, check_choice

QUALITIES = typing.get_args(Quality)
VERSION = 2  # part of the key of a cache folder: increase it if the code reads different frames


class FeatureDict:
    """Features in memory as a `RecordSource`."""

    kind = place = title = "arrays"
    origin = Origin("arrays")

    def __init__(
        self, splits: Mapping[str, Clips], labels: LabelSource = None, quality: Quality = "given"
    ):
        """`splits` is split -> clip -> modality -> features. See `vidjax.load_data`."""
        for split, clips in splits.items():
            if split not in SPLITS or not isinstance(clips, Mapping):
                raise UserError(
                    f"'{show(str(split))}' is not the name of a split, or has no dict as value\n"
                    "wanted {'train': {clip: {modality: features}}, 'val': ..., 'test': ...}"
                )
        check_choice("config.data.quality", quality, QUALITIES)
        self._splits, self._labels = splits, labels
        self._quality: Quality = quality

    def _clips(self, split: str) -> Iterator[Clip]:
        return read_dict(self._splits[split], split)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a digest of the arrays of each split."""
        return [
            {
                "arrays": VERSION,
                "quality": self._quality,
                "split": split,
                "sha256": _digest(self._clips(split)),
            }
            for split in sorted(self._splits)
        ]

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the split as a path for messages, because arrays in memory have no file."""
        del modality
        return Path(split)

    def read(self, scratch: Path, non_finite: NonFinite) -> Unpacked:
        """Reads and checks all clips. Their arrays are written to raw files below `scratch`."""
        return {
            split: pack(self._clips(split), scratch / split, non_finite, self._quality)
            for split in self._splits
        }

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Returns the labels, see `load_label_table`."""
        return load_label_table(self._labels, clips)


class FeatureFolder:
    """A folder of `.npz` files or parquet tables as a `RecordSource`."""

    kind = "arrays"

    def __init__(
        self,
        folder: str | Path,
        labels: LabelSource = None,
        quality: Quality = "given",
        workers: int | None = None,
        cache_dir: str | Path | None = None,
    ):
        """Finds the files of each split.

        Args:
          labels, quality: see `vidjax.load_data`.
          workers: number of processes that read files; None: the number of cores, or fewer
            for little data.
          cache_dir: folder for the digests of files.
        """
        self._folder, self._labels = Path(folder).expanduser(), labels
        check_choice("config.data.quality", quality, QUALITIES)
        self._quality: Quality = quality
        self._workers, self._cache_dir = workers, cache_dir
        self._files = group_files_by_split(self._folder)
        self.origin = Origin.from_folder("arrays", folder)
        self.place = str(self._folder)
        self.title = f"{sum(map(len, self._files.values()))} files of {self._folder}"

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a digest of the files of each split; reads only files that have changed."""
        return [
            {
                "arrays": VERSION,
                "quality": self._quality,
                "split": split,
                "files": len(paths),
                "sha256": digest_files(paths, self._cache_dir, self._workers),
            }
            for split, paths in self._files.items()
        ]

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the path that messages name: the table of a split, or the folder of its files."""
        del modality
        path = self._files[split][0]
        return path if path.suffix == ".parquet" else path.parent

    def read(self, scratch: Path, non_finite: NonFinite) -> Unpacked:
        """Reads and checks all clips. Their arrays are written to raw files below `scratch`."""
        options = non_finite, self._quality
        workers = self._workers or clip_files.choose_num_readers(self._files)
        if workers > 1:
            with contextlib.suppress(clip_files.RetrySerially):
                return clip_files.read_at_once(self._files, scratch / "parts", workers, *options)
        return {
            split: pack(clip_files.read_clips(paths), scratch / split, *options)
            for split, paths in self._files.items()
        }

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Returns split -> clip -> identity; `clips` is split -> clips."""
        if self._labels is None:
            return load_folder_truth(self._folder, clips)
        return load_label_table(self._labels, clips)


EXTRACT_FILES = ("extract.json", "thumbnails", "videos")  # see `apps.video.features_folder`
NPY_HINT = "\nan .npy file has no modality; write a clip by numpy.savez('CLIP.npz', face=array)"


def group_files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Returns split -> its parquet table or `.npz` files. Raises UserError if a file is ignored."""
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise NoFileError(f"{folder}: {problem}")
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        table, clips = folder / f"{split}.parquet", folder / split
        check_file(table)
        if os.path.lexists(clips) and not clips.is_dir():
            raise UserError(f"{clips}: a file, not a folder of CLIP.npz files: move it elsewhere")
        if table.is_file() and clips.is_dir():
            raise UserError(f"{folder}: it has {split}.parquet and a folder {split}: keep one")
        if table.is_file():
            files[split] = [table]
        elif clips.is_dir():
            files[split] = _list_npz_files(clips)
    entries = list_entries(folder)
    _refuse_parts([path for path in entries if path.suffix == ".parquet"], files)
    for path in entries:
        if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.npz"))):
            refuse_split(path, path.name.removesuffix(".parquet"), files)
    if not files:
        hint = NPY_HINT if any(folder.glob("*.npy")) else ""
        raise NoFileError(
            f"{folder}: no features here: looked for SPLIT/CLIP.npz and SPLIT.parquet,\n"
            f"such as train/clip1.npz; splits are train, val and test{hint}"
        )
    return files


def _refuse_parts(tables: Sequence[Path], present: Collection[str]) -> None:
    """Refuses tables that look like parts of a split, such as train-00000-of-00002.parquet."""
    for split in SPLITS:
        parts = [path for path in tables if path.stem.startswith(split) and path.stem != split]
        if parts and (split in present or len(parts) > 1):
            raise UserError(
                f"{parts[0]}: is not read: a split is a single table, {split}.parquet\n"
                f"join the tables, or write a file {split}/CLIP.npz for each clip"
            )


def _list_npz_files(folder: Path) -> list[Path]:
    """Returns the `.npz` files of a split.

    Raises:
      UserError: the folder has a file that is neither a clip nor written by `vidjax extract`.
    """
    with os.scandir(folder) as iterator:  # a split may have a hundred thousand clips
        entries = [entry for entry in iterator if entry.name[0] != "."]
    entries.sort(key=lambda entry: entry.name)
    if any(entry.name == EXTRACT_FILES[0] for entry in entries):
        entries = [entry for entry in entries if entry.name not in EXTRACT_FILES]
    for entry in entries:
        if not entry.name.endswith(".npz") or not entry.is_file():
            hint = NPY_HINT if entry.name.endswith(".npy") else ""
            raise UserError(
                f"{entry.path}: not a clip: the folder {folder.name} may contain only CLIP.npz\n"
                f"move this file away{hint}"
            )
    if not entries:
        raise NoFileError(f"{folder}: the folder contains no CLIP.npz")
    return [folder / entry.name for entry in entries]


def _digest(clips: Iterable[Clip]) -> str:
    """Returns the sha256 of clips in memory. It does not depend on their order."""
    digests = []
    for clip in clips:
        sha256 = hashlib.sha256(clip.name.encode())
        for modality, value in sorted(clip.modalities.items()):
            frames = read_frames(value, locate(clip, modality))
            if not frames:  # a modality without frames counts, too
                sha256.update(repr((modality, None)).encode())
            for field, array in frames.items():
                sha256.update(repr((modality, field, array.dtype.str, array.shape)).encode())
                sha256.update(np.ascontiguousarray(array).data)
        digests.append(sha256.hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Converts a folder, prints its report and returns the exit code."""
    from vidjax.data.records.conversion import run_command

    def open_source(args: argparse.Namespace) -> FeatureFolder:
        return FeatureFolder(args.directory, workers=args.workers, cache_dir=args.cache_dir)

    description = "Convert a folder of your own features."
    return run_command(argv, "vidjax.data.arrays", description, open_source)


if __name__ == "__main__":
    messages.run_main(main)
