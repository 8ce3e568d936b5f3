"""Reads a user's own features: arrays in memory, `.npz` files or parquet tables.

README.md of this folder describes the files, in the section "Features of your own".
"""

import os
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax.data.cache_folders import digest_files
from vidjax.data.checks import check_file, list_entries, refuse_split
from vidjax.data.clip_files import read_clips
from vidjax.data.clips import SPLITS, Origin
from vidjax.data.labels import LabelSource, load_folder_truth, load_label_table
from vidjax.data.packed_clips import PackedClips, Quality
from vidjax.data.packing import Clips, pack, read_dict
from vidjax.utils.errors import NoFileError, UserError, check_choice
from vidjax.utils.files import is_present
from vidjax.utils.names import show

QUALITIES = typing.get_args(Quality)
VERSION = 3  # increase it if new code reads other frames from the same file, to refill the cache


class FeatureDict:
    """Features in memory, which are never written to the disk."""

    kind = place = "arrays"

    def __init__(
        self, splits: Mapping[str, Clips], labels: LabelSource = None, quality: Quality = "given"
    ):
        """Takes split -> clip -> modality -> features [T, D]. See `vidjax.load_data`."""
        for split, clips in splits.items():
            if split not in SPLITS or not isinstance(clips, Mapping):
                raise UserError(
                    f"'{show(str(split))}' is not the name of a split, or its value is not a dict\n"
                    "give {'train': {clip: {modality: features}}, 'val': ..., 'test': ...}"
                )
        check_choice("config.data.quality", quality, QUALITIES)
        self.origin = Origin("arrays", quality=quality)
        self._splits, self._labels = splits, labels
        self._quality: Quality = quality

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the name of the split, because arrays in memory have no file."""
        return Path(split)

    def read(self) -> dict[str, PackedClips]:
        """Checks all clips, and copies their frames. Returns split -> its clips."""
        return {
            split: pack(read_dict(clips, split), quality=self._quality)
            for split, clips in self._splits.items()
        }

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Returns split -> clip -> identity. See `FileSource`."""
        return load_label_table(self._labels, clips)


class FeatureFolder:
    """A folder of `.npz` files or parquet tables, which is converted to flat files."""

    kind = "arrays"

    def __init__(
        self,
        folder: str | Path,
        labels: LabelSource = None,
        quality: Quality = "given",
        cache_dir: str | Path | None = None,
    ):
        """Finds the files of each split. For `labels` and `quality`, see `vidjax.load_data`.

        `cache_dir` keeps the digests of unchanged files.
        """
        self._folder, self._labels = Path(folder).expanduser(), labels
        check_choice("config.data.quality", quality, QUALITIES)
        self._quality: Quality = quality
        self._cache_dir = cache_dir
        self._files = group_files_by_split(self._folder)
        self.origin = Origin.from_folder("arrays", folder, quality)
        self.place = str(self._folder)
        self.title = f"{sum(map(len, self._files.values()))} files of {self._folder}"

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns the sha256 of the files of each split. Unchanged files are not read again."""
        shared, entries = {"arrays": VERSION, "quality": self._quality}, []
        for split, paths in self._files.items():
            digest = digest_files(paths, self._cache_dir)
            entries.append(shared | {"split": split, "files": len(paths), "sha256": digest})
        return entries

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the parquet table of a split, or the folder of its `.npz` files."""
        path = self._files[split][0]
        return path if path.suffix == ".parquet" else path.parent

    def read(self, folder: Path) -> dict[str, PackedClips]:
        """Checks all clips, and copies their frames to `folder`. See `FileSource`."""
        return {
            split: pack(read_clips(paths), folder / split, self._quality)
            for split, paths in self._files.items()
        }

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Returns split -> clip -> identity. See `FileSource`."""
        if self._labels is None:
            return load_folder_truth(self._folder, clips)
        return load_label_table(self._labels, clips)


EXTRACT_FILES = ("extract.json", "thumbnails", "videos")  # `vidjax extract` adds them to a split
NPY_HINT = "a .npy file has no modality: write each clip with numpy.savez('CLIP.npz', face=array)"


def group_files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Returns split -> its files: one parquet table, or `.npz` files.

    Raises:
      UserError: a file with features would be ignored, for example because its name is misspelt.
      NoFileError: the folder does not exist, or has no features.
    """
    if not folder.is_dir():
        problem = "is not a folder" if is_present(folder) else "does not exist"
        raise NoFileError(f"'{folder}' {problem}: name the folder of the features")
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        table, clips = folder / f"{split}.parquet", folder / split
        check_file(table)
        if os.path.lexists(clips) and not clips.is_dir():
            raise UserError(f"'{clips}' is a file, not a folder of CLIP.npz files: move it away")
        if table.is_file() and clips.is_dir():
            raise UserError(
                f"'{folder}' contains both {split}.parquet and a folder {split}: remove one of them"
            )
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
        hint = f"\n{NPY_HINT}" if any(folder.glob("*.npy")) else ""
        raise NoFileError(
            f"'{folder}' contains no features, that is, no SPLIT/CLIP.npz and no SPLIT.parquet\n"
            f"name a folder with files such as train/clip1.npz; splits are train, val, test{hint}"
        )
    return files


def _refuse_parts(tables: Sequence[Path], present: Collection[str]) -> None:
    """Raises UserError if a table is a part of a split, such as train-00000-of-00002.parquet.

    `present` are the splits whose files were found.
    """
    for split in SPLITS:
        parts = [path for path in tables if path.stem.startswith(split) and path.stem != split]
        # A single table is probably the whole split with a misspelt name: see `refuse_split`.
        if parts and (split in present or len(parts) > 1):
            raise UserError(
                f"'{parts[0]}' would be ignored, because a split is one table, {split}.parquet\n"
                f"join the tables, or write a file {split}/CLIP.npz for each clip"
            )


def _list_npz_files(folder: Path) -> list[Path]:
    """Returns the `.npz` files of a split. Raises UserError if there are other files.

    Files that `vidjax extract` adds to a split are ignored.
    """
    with os.scandir(folder) as iterator:  # faster than `list_entries`, for 100 000 clips
        entries = [entry for entry in iterator if entry.name[0] != "."]
    entries.sort(key=lambda entry: entry.name)
    if any(entry.name == EXTRACT_FILES[0] for entry in entries):
        entries = [entry for entry in entries if entry.name not in EXTRACT_FILES]
    for entry in entries:
        if not entry.name.endswith(".npz") or not entry.is_file():
            remedy = NPY_HINT if entry.name.endswith(".npy") else "move it away"
            raise UserError(f"{entry.path}: {folder.name} may contain only .npz files\n{remedy}")
    if not entries:
        raise NoFileError(f"'{folder}' contains no CLIP.npz: add clips, or remove the folder")
    return [folder / entry.name for entry in entries]
