"""Reads the official files of the iQIYI-VID dataset: pickles of features, and ground truth.

This command, or the first training, converts the pickles in DIR to flat files (arrays as raw bytes)
in the cache:

    python -m vidjax.data.iqiyi_vid DIR [--cache_dir=C]

The flat files contain no labels. Each run reads the labels from the ground-truth files, so a
corrected label does not require a new conversion.
"""

import itertools
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax.data.checks import check_file, list_entries, refuse_other_files, refuse_split
from vidjax.data.clips import SPLITS, Origin
from vidjax.data.data_report import format_report
from vidjax.data.dataset import label_clips
from vidjax.data.labels import find_ground_truth, load_official_truth
from vidjax.data.packed_clips import PackedClips, join
from vidjax.data.store import convert, digest_files
from vidjax.data.untrusted import sandbox
from vidjax.utils import exit_codes, messages
from vidjax.utils.errors import NoFileError, UserError
from vidjax.utils.files import absolute, local
from vidjax.utils.groups import group_by_key
from vidjax.utils.machine import memory_bytes, num_cores
from vidjax.utils.parser import Parser
from vidjax.utils.processes import Children, map_children

VERSION = 2  # increase it if new code reads other frames from the same file, to refill the cache


class OfficialFiles:
    """A dataset in a directory of iQIYI-VID files.

    Its features are converted to flat files in the cache.
    """

    kind = "iqiyi_vid"

    def __init__(
        self,
        directory: str | Path,
        cache_dir: str | Path | None = None,
        origin: Origin | None = None,
    ):
        """Finds the feature pickles.

        The folder `cache_dir` keeps the digests of the files, so that unchanged files are not read
        again. `origin` is the name and the folder of the dataset, for the data report.
        """
        self._directory = local(directory)
        self._files = find_pickles(self._directory)
        if not self._files:
            raise NoFileError(
                f"'{self._directory}' contains no feature pickles, such as face_train.pickle\n"
                "give the path of a folder of MODALITY_SPLIT.pickle or MODALITY_SPLIT_v2.pickle"
                + _hint(self._directory)
            )
        find_ground_truth(self._directory)  # so wrong names are reported before features are read
        self._cache_dir = cache_dir
        self.origin = origin or Origin("iqiyi_vid", str(absolute(directory)))
        self.place = str(self._directory)

    @property
    def modalities(self) -> dict[str, int]:
        """A dict with the modalities as keys. All values are 0: the feature width is unknown."""
        return {name: 0 for name, _ in self._files}

    def fingerprint(self) -> list[dict[str, Any]]:
        """Returns a dict for each pickle, with its modality, its split and its sha256.

        Pickles that have not changed since the last call are not read again.
        """
        entries = []
        for (modality, split), path in sorted(self._files.items()):
            entry = {"official": VERSION, "modality": modality, "split": split}
            digest = digest_files([path], self._cache_dir)
            entries.append(entry | {"sha256": digest})
        return entries

    def path_of(self, modality: str, split: str) -> Path:
        """Returns the pickle of a modality in a split."""
        return self._files[modality, split]

    def read(self, folder: Path) -> dict[str, PackedClips]:
        """Reads all pickles in child processes, the largest first.

        Returns split -> its clips. See `FileSource`.
        """
        sizes = {key: path.stat().st_size for key, path in self._files.items()}

        def unpack(children: Children, key: tuple[str, str]) -> PackedClips:
            modality, split = key
            place = folder / split / modality
            return sandbox.unpack(self._files[key], modality, place, children=children)

        keys = sorted(sizes, key=sizes.__getitem__, reverse=True)
        # A pickle that cannot be read in pieces needs about twice its size. The pickles that are
        # read at once may need half of the memory.
        totals = itertools.accumulate(sizes[key] for key in keys)
        fitting = sum(4 * total <= memory_bytes() for total in totals)
        workers = max(1, min(num_cores(), fitting))
        packed = dict(zip(keys, map_children(unpack, keys, workers, progress="read"), strict=True))
        splits = group_by_key((key[1], packed[key]) for key in sorted(packed))
        return {split: join(parts) for split, parts in splits.items()}

    def read_labels(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        """Returns split -> clip -> identity, from the ground-truth files."""
        return load_official_truth(self._directory, clips)


def find_pickles(directory: str | os.PathLike[str]) -> dict[tuple[str, str], Path]:
    """Returns a sorted dict, (modality, split) -> path, of the feature pickles in a directory.

    A pickle is named `{modality}_{split}.pickle` or `{modality}_{split}_v2.pickle`. If both exist,
    the second is used. Raises UserError if a file is not a pickle, or its split is misspelt. The
    name of a modality may only have letters, digits, '-' and '_'.
    """
    files: dict[tuple[str, str], Path] = {}
    pattern = rf"(.*?)_({'|'.join(SPLITS)})(_v2)?\.pickle"
    entries = list_entries(directory)
    # `_v2` files come last, so they replace the first version.
    for path in sorted(entries, key=lambda path: (path.stem.endswith("_v2"), path.name)):
        match = re.fullmatch(pattern, path.name, re.DOTALL)
        if not match:
            continue
        check_file(path)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", match[1]):
            raise UserError(
                f"{path}: the name of a modality may have only letters, digits, '-' and '_': "
                "rename the file"
            )
        with path.open("rb", buffering=0) as file:
            refuse_other_files(file, f"{path}: ")
        files[match[1], match[2]] = path
    for path in entries:
        if match := re.fullmatch(r"(\w+)_([A-Za-z]+?)(_v2)?\.pickle", path.name):
            present = {split for modality, split in files if modality == match[1]}
            refuse_split(path, match[2], present)
    return dict(sorted(files.items()))


def _hint(directory: Path) -> str:
    """Returns a hint where the missing pickles probably are, as a line for an error message.

    If no other place is found, returns "".
    """
    for inner in sorted(directory.glob("*/*_train*.pickle")):
        return f"\nthey are in a folder below: --config.data.dir={inner.parent}"
    for archive in sorted([*directory.glob("*.zip"), *directory.glob("*.tar*")]):
        return f"\nunpack {archive.name} first"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Converts a directory of iQIYI-VID files to files in the cache, and prints the data report.

    `argv` are the words of the command line, by default `sys.argv`. Returns the exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    about = "Convert a directory of iQIYI-VID files to flat files in the cache."
    parser = Parser("python -m vidjax.data.iqiyi_vid", description=about)
    parser.add_argument("directory", metavar="DIR", type=Path)
    about = "folder of the cache; by default $VIDJAX_CACHE or ~/.cache/vidjax"
    parser.add_argument("--cache_dir", metavar="C", type=Path, help=about)

    def command() -> int:
        args = parser.parse_args(words)
        source = OfficialFiles(args.directory, cache_dir=args.cache_dir)
        store = convert(source, args.cache_dir)
        _, _, report = label_clips(store, source.read_labels(store.clips))
        messages.print_text(f"{format_report(report)}\n{store.folder}/data_report.json")
        return 0

    return exit_codes.run_to_exit_code(command, words)


if __name__ == "__main__":
    exit_codes.run_main(main)
