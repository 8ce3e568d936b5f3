"""Reads a user's own features: arrays in memory, `.npz` files or parquet tables.

README.md of this folder describes the files, in the section "Features of your own".
"""

import os
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax.data.checks import check_file, check_folder, explain_unread, list_entries, refuse_split
from vidjax.data.clip_files import read_clips
from vidjax.data.clips import SPLITS, Origin
from vidjax.data.labels import LabelSource, load_folder_truth, load_label_table
from vidjax.data.packed_clips import PackedClips, Quality
from vidjax.data.packing import Clips, pack, read_dict
from vidjax.data.store import digest_files
from vidjax.utils.errors import NoFileError, UserError, check_choice
from vidjax.utils.files import absolute, local, sha256_json
from vidjax.utils.names import show

QUALITIES = typing.get_args(Quality)
VERSION = 3  # increase it if new code reads other frames from the same file, to refill the cache


class FeatureDict:
    """A dataset of features in memory, which is never written to the disk."""

    kind = place = "arrays"

    def __init__(
        self, splits: Mapping[str, Clips], labels: LabelSource = None, quality: Quality = "given"
    ):
        """Makes a dataset from `splits`, split -> clip -> modality -> features [T, D].

        For `labels` and `quality`, see `vidjax.load_data`.
        """
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
        """Returns the name of the split as a path, for messages: arrays in memory have no file."""
        return Path(split)

    def read(self) -> dict[str, PackedClips]:
        """Returns split -> its clips, checked and copied to arrays without padding."""
        return {
            split: pack(read_dict(clips, split), quality=self._quality)
            for split, clips in self._splits.items()
        }

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Returns split -> clip -> identity. `clips` is split -> names of clips with features."""
        return load_label_table(self._labels, clips)


class FeatureFolder:
    """A dataset in a folder of `.npz` files or parquet tables.

    Its features are converted to flat files in the cache.
    """

    kind = "arrays"

    def __init__(
        self,
        folder: str | Path,
        labels: LabelSource = None,
        quality: Quality = "given",
        cache_dir: str | Path | None = None,
    ):
        """Finds the files of each split. For `labels` and `quality`, see `vidjax.load_data`.

        The folder `cache_dir` keeps the digests of the files, so that unchanged files are not read
        again.
        """
        self._folder, self._labels = local(folder), labels
        check_choice("config.data.quality", quality, QUALITIES)
        self._quality: Quality = quality
        self._cache_dir = cache_dir
        self._files = group_files_by_split(self._folder)
        self.origin = Origin("arrays", str(absolute(folder)), quality)
        self.place = str(self._folder)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a dict for each split, with digests of the names and the contents of its files.

        Files that have not changed since the last call are not read again.
        """
        shared, entries = {"arrays": VERSION, "quality": self._quality}, []
        for split, paths in self._files.items():
            names = sha256_json([str(path.relative_to(self._folder)) for path in paths])
            digest = digest_files(paths, self._cache_dir)
            entries.append(shared | {"split": split, "names": names, "sha256": digest})
        return entries

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the parquet table of a split, or the folder of its `.npz` files."""
        path = self._files[split][0]
        return path if path.suffix == ".parquet" else self._folder / split

    def read(self, folder: Path) -> dict[str, PackedClips]:
        """Returns split -> its clips, checked and copied to files in `folder`. See `FileSource`."""
        return {
            split: pack(read_clips(paths, self._folder / split), folder / split, self._quality)
            for split, paths in self._files.items()
        }

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Returns split -> clip -> identity. `clips` is split -> names of clips with features."""
        if self._labels is None:
            return load_folder_truth(self._folder, clips)
        return load_label_table(self._labels, clips)


EXTRACT_FILES = ("extract.json", "thumbnails", "videos")  # `vidjax extract` adds them to a split


def group_files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Returns split -> its files: one parquet table, or files `CLIP.npz`, also in subfolders.

    `folder` contains, for example, `train.parquet` or the folder `train`.

    Raises:
      UserError: a file with features would be ignored, for example because its name is misspelt.
      NoFileError: the folder does not exist, or has no features.
    """
    check_folder(folder, "name the folder of the features")
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
            files[split], others = list_npz_files(clips)
            if others:
                raise UserError(
                    f"{others[0]}: {split} may contain only .npz files, or folders of them\n"
                    f"{explain_unread(others[0], clips) or 'move it away'}"
                )
            if not files[split]:
                raise NoFileError(f"'{clips}' contains no .npz file: add clips, or remove {split}")
    entries = list_entries(folder)
    _refuse_parts([path for path in entries if path.suffix == ".parquet"], files)
    for path in entries:
        if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.npz"))):
            refuse_split(path, path.name.removesuffix(".parquet"), files)
    if not files:
        raise NoFileError(
            f"'{folder}' contains no features, that is, no SPLIT/CLIP.npz and no SPLIT.parquet\n"
            "name a folder with files such as train/clip1.npz; splits are train, val, test\n"
            "make files with numpy.savez('train/clip1.npz', face=x), see vidjax/data/README.md"
        )
    return files


def _refuse_parts(tables: Sequence[Path], present: Collection[str]) -> None:
    """Raises UserError if parts of a split, such as train-00000-of-00002.parquet, would be ignored.

    `tables` are the paths of all tables. `present` are the splits whose files were found.
    """
    for split in SPLITS:
        parts = [path for path in tables if path.stem.startswith(split) and path.stem != split]
        # A single table is probably the whole split with a misspelt name: see `refuse_split`.
        if parts and (split in present or len(parts) > 1):
            raise UserError(
                f"'{parts[0]}' would be ignored, because a split is one table, {split}.parquet\n"
                f"join the tables of {split}, or write a file {split}/CLIP.npz for each clip"
            )


def list_npz_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns two lists: the files `CLIP.npz` in a folder and its subfolders, and other paths.

    Files of `vidjax extract` that are not clips, such as `extract.json`, are in neither list.
    """
    clips, others = list[Path](), list[Path]()
    for entry in _scan(folder):
        for inner in _scan(entry.path) if entry.is_dir() else [entry]:
            is_clip = inner.name.endswith(".npz") and inner.is_file()
            (clips if is_clip else others).append(Path(inner.path))
    return clips, others


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as iterator:  # faster than `list_entries`, for 100 000 clips
        entries = sorted((x for x in iterator if x.name[0] != "."), key=lambda entry: entry.name)
    is_extracted = any(entry.name == EXTRACT_FILES[0] for entry in entries)
    return [x for x in entries if not (is_extracted and x.name in EXTRACT_FILES)]
