"""The official iQIYI-VID files: feature pickles and their ground truth as a source of records.

    python -m vidjax.data.iqiyi_vid DIR [--cache_dir=C] [--workers=N]

converts a directory and prints its report. Records contain only features. Labels are read from the
ground-truth files at every load, so a corrected label does not require a new conversion.
"""

import argparse
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax.data.cache import digest_files
from vidjax.data.checks import check_file, list_entries, refuse_split
from vidjax.data.clips import SPLITS
from vidjax.data.frame_fields import NonFinite, Origin, PackedClips, Unpacked
from vidjax.data.labels import find_ground_truth, load_official_truth
from vidjax.data.processes import Children, map_children
from vidjax.data.untrusted import sandbox
from vidjax.data.untrusted.unpickle import refuse_others
from vidjax.utils import messages
from vidjax.utils.errors import NoFileError, UserError
from vidjax.utils.machine import memory_bytes, num_cores

VERSION = 2  # part of the key of a cache folder: increase it if the code reads different frames


class OfficialFiles:
    """A directory of official files as a `RecordSource`."""

    kind = "iqiyi_vid"

    def __init__(
        self,
        directory: str | Path,
        workers: int | None = None,
        cache_dir: str | Path | None = None,
        origin: Origin | None = None,
    ):
        """Finds the feature pickles.

        Args:
          workers: number of pickles that are read at once; None: the number of cores, or fewer if
            the memory is small.
          cache_dir: folder for the digests of files.
          origin: the origin of the dataset; None: the official files in `directory`.
        """
        self._directory = Path(directory).expanduser()
        self._files = find_pickles(self._directory)
        if not self._files:
            raise NoFileError(
                f"{self._directory}: no feature pickles here: looked for\n"
                "MODALITY_SPLIT.pickle or MODALITY_SPLIT_v2.pickle, such as face_train.pickle"
                + _hint(self._directory)
            )
        find_ground_truth(self._directory)  # reports wrong file names before features are read
        self._workers, self._cache_dir = workers, cache_dir
        self.origin = origin or Origin.from_folder("iqiyi_vid", directory)
        self.place = str(self._directory)
        self.title = f"{len(self._files)} files of {self._directory}"

    @property
    def modalities(self) -> dict[str, int]:
        """Modality -> 0: file names do not contain the width (see `sources.read_modalities`)."""
        return {name: 0 for name, _ in self._files}

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a digest of each pickle; reads only pickles that have changed."""
        return [
            {
                "official": VERSION,
                "modality": modality,
                "split": split,
                "sha256": digest_files([path], self._cache_dir, self._workers),
            }
            for (modality, split), path in sorted(self._files.items())
        ]

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the pickle of a modality in a split."""
        return self._files[modality, split]

    def read(self, scratch: Path, non_finite: NonFinite) -> Unpacked:
        """Unpacks all pickles in sandboxes, several at once, the largest first."""
        sizes = {key: path.stat().st_size for key, path in self._files.items()}

        def unpack(children: Children, key: tuple[str, str]) -> PackedClips:
            folder = scratch / "_".join(key)
            path, modality = self._files[key], key[0]
            return sandbox.unpack(path, modality, folder, non_finite=non_finite, children=children)

        keys = sorted(sizes, key=sizes.__getitem__, reverse=True)
        workers = self._workers or _choose_num_readers(sizes.values())
        packed = dict(zip(keys, map_children(unpack, keys, workers, progress="read"), strict=True))
        unpacked: dict[str, dict[str, PackedClips]] = {}
        for modality, split in sorted(packed):
            unpacked.setdefault(split, {})[modality] = packed[modality, split]
        return unpacked

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Reads `{split}_gt.txt`; see `load_official_truth`."""
        return load_official_truth(self._directory, clips)


def _choose_num_readers(sizes: Collection[int]) -> int:
    """Returns the number of pickles of `sizes` bytes that fit into half of the memory at once."""
    largest = sorted(sizes, reverse=True)
    # A reader that cannot read in pieces needs about twice the size of its pickle.
    fitting = [total for total in itertools.accumulate(largest) if 4 * total <= memory_bytes()]
    return max(1, min(num_cores(), len(fitting)))


def find_pickles(directory: str | os.PathLike[str]) -> dict[tuple[str, str], Path]:
    """Returns (modality, split) -> path of each feature pickle, sorted.

    A file is named `{modality}_{split}.pickle` or `{modality}_{split}_v2.pickle`. If both exist,
    `_v2` is used. The name of a modality has letters, digits, '-' and '_'.
    """
    files: dict[tuple[str, str], Path] = {}
    pattern = rf"(.*?)_({'|'.join(SPLITS)})(_v2)?\.pickle"
    # `_v2` files come last, so they replace the first version.
    entries = list_entries(directory)
    for path in sorted(entries, key=lambda path: (path.stem.endswith("_v2"), path.name)):
        match = re.fullmatch(pattern, path.name, re.DOTALL)
        if not match:
            continue
        check_file(path)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", match[1]):
            raise UserError(
                f"{path}: the name of a modality may have letters, digits, '-' and '_': rename it"
            )
        with path.open("rb", buffering=0) as file:
            refuse_others(file, f"{path}: ")
        files[match[1], match[2]] = path
    for path in entries:
        if match := re.fullmatch(r"(\w+)_([A-Za-z]+?)(_v2)?\.pickle", path.name):
            present = {split for modality, split in files if modality == match[1]}
            refuse_split(path, match[2], present)
    return dict(sorted(files.items()))


def _hint(directory: Path) -> str:
    """Returns a line with the probable place of missing pickles, or ""."""
    for inner in sorted(directory.glob("*/*_train*.pickle")):
        return f"\nthey are in {inner.parent}: --config.data.dir={inner.parent}"
    for archive in sorted([*directory.glob("*.zip"), *directory.glob("*.tar*")]):
        return f"\nunpack {archive.name} first"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Converts a directory, prints its report and returns the exit code."""
    from vidjax.data.records.conversion import run_command

    def open_source(args: argparse.Namespace) -> OfficialFiles:
        return OfficialFiles(args.directory, args.workers, args.cache_dir)

    description = "Convert a directory of official files."
    return run_command(argv, "vidjax.data.iqiyi_vid", description, open_source)


if __name__ == "__main__":
    messages.run_main(main)
