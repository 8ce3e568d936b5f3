"""Finds what is probably a mistake in a dataset.

Such mistakes are misspelt file names, features from which no model can learn, and identities that a
spreadsheet has changed, such as 1-Mar instead of MARCH1.
"""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.clips import SPLITS
from vidjax.data.packed_clips import WEIGHTS, BadValues
from vidjax.utils import files
from vidjax.utils.errors import NoFileError, UserError, closest, warn
from vidjax.utils.names import show


def list_entries(directory: str | os.PathLike[str]) -> list[Path]:
    """Returns the sorted paths in a directory, without hidden files.

    If there is no such directory, raises NoFileError.
    """
    check_folder(Path(directory), "correct the path")
    return sorted(path for path in Path(directory).iterdir() if path.name[0] != ".")


def check_folder(folder: Path, remedy: str) -> None:
    """Raises NoFileError if `folder` is not a folder. The message ends with `remedy`."""
    if not folder.is_dir():
        problem = "is not a folder" if files.is_present(folder) else "does not exist"
        raise NoFileError(f"'{folder}' {problem}: {remedy}")


def check_file(path: Path) -> None:
    """Raises UserError if `path` is a folder, a broken link, or something else that is not a file.

    If there is nothing at `path`, there is no error.
    """
    if path.is_file() or not os.path.lexists(path):
        return
    kind = "is a folder" if path.is_dir() else "is not a regular file"
    if not path.exists():
        kind = f"is a link to '{path.readlink()}', which does not exist"
    raise UserError(f"'{path}' {kind}: replace it by a file, or rename it")


# First bytes of a file that users mistake for a pickle -> its kind. No pickle begins with them.
_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive, as .npz and PyTorch files are",
    b"\x93NUMPY": "a .npy file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"version https://git-lfs": "a Git LFS pointer: its content was not downloaded (git lfs pull)",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
}


def refuse_other_files(file: BinaryIO, place: str = "") -> None:
    """Raises UserError if the first bytes of a file show another format than pickle.

    Such formats are `.npz` and HDF5, for example. The message begins with `place`.
    """
    start = file.read(64).lstrip()
    for magic, kind in _OTHER_FILES.items():
        if start[: len(magic)].lower() == magic.lower():
            raise UserError(f"{place}the file is not a pickle, but {kind}; write a pickle")


def refuse_split(path: Path, word: str, present: Collection[str]) -> None:
    """Raises UserError if `word` is probably a misspelt split, such as `valid` for `val`.

    `word` is the part of the name of the file `path` where the split is expected. `present` are the
    splits whose files were found. If `val` is in `present`, `valid` is probably not meant as `val`,
    and there is no error.
    """
    lower = word.lower() if word not in SPLITS else ""
    longer = (split for split in SPLITS if lower.startswith(split))
    split = next(longer, None) or closest(lower, SPLITS, cutoff=0.75)
    if split and split not in present:
        head, _, tail = path.name.rpartition(word)
        raise UserError(
            f"'{path}' would be ignored, because '{word}' is not one of {', '.join(SPLITS)}\n"
            f"rename it to {head}{split}{tail}, or move it away"
        )


# Ending of files that are not read -> code that reads such a file `p`, as arguments of numpy.savez.
_READERS = {
    ".npy": "face=numpy.load(p)",
    ".pt": 'face=torch.load(p, map_location="cpu").detach().float().numpy()',
    ".pkl": "face=pickle.loads(p.read_bytes())",
    ".h5": "**{name: array[()] for name, array in h5py.File(p).items()}",
}
_READERS |= {".pth": _READERS[".pt"], ".hdf5": _READERS[".h5"]}


def explain_unread(path: Path, folder: Path | None = None) -> str:
    """Returns a command that converts a file such as `.npy`, `.pt` or `.h5` to `.npz`.

    If `folder` is given, the command converts all files with the same ending in this folder. For a
    folder, or a file of another kind, returns "".
    """
    if path.is_dir() or not (reader := _READERS.get(path.suffix.lower())):
        return ""
    root, files = (folder, f"**/*{path.suffix}") if folder else (path.parent, path.name)
    modules = sorted({"numpy", "pathlib", *re.findall("torch|pickle|h5py", reader)})
    code = (
        f"import {', '.join(modules)}; [numpy.savez(new, {reader}) "
        f"for p in pathlib.Path({json.dumps(str(root))}).glob({json.dumps(files)}) "
        'if not (new := p.with_suffix(".npz")).exists()]'
    )
    return f"convert to .npz, then move away (face is the modality): python3 -c {shlex.quote(code)}"


def refuse_unread(entries: Iterable[Path], wanted: str) -> None:
    """Raises UserError if a file or folder in `entries` has features that would be ignored.

    `wanted` describes the files that are read, for the message.
    """
    for path in entries:
        inside = path.iterdir() if path.is_dir() else [path]
        if any(file.suffix.lower() in (".npz", ".parquet", *_READERS) for file in inside):
            raise UserError(
                f"'{path}' would be ignored, because the folder also contains {wanted}\n"
                f"move {path.name} away, or run the command on {path.name}"
            )


# In float32, the sum of squares of a feature overflows beyond MAX_NORM, and is 0 below MIN_NORM.
MAX_NORM, MIN_NORM = 1e18, 1e-12
MIN_TRANSPOSED_RATIO = 4  # features look transposed if T is at least this multiple of D
MAX_EQUAL_RANGE = 0.01  # norms within this relative range count as equal


def find_misspelt(splits: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[str]:
    """Yields a message for each pair of similar modalities, such as `face` and `faces`.

    If a clip has both modalities, there is no message for the pair. `splits` is split -> modality
    -> [N] int, the number of frames of each clip.
    """
    names = sorted({name for lengths in splits.values() for name in lengths})
    for number, name in enumerate(names):
        others = names[number + 1 :]
        if other := closest(name, others, cutoff=0.7):
            together = any(
                np.any((lengths[name] > 0) & (lengths[other] > 0))
                for lengths in splits.values()
                if name in lengths and other in lengths
            )
            if not together:
                yield f"no clip has both '{name}' and '{other}': is one of them misspelt? Rename it"


def find_transposed(
    splits: Mapping[str, Mapping[str, np.ndarray]], widths: Mapping[str, int]
) -> Iterator[str]:
    """Yields a message for each modality whose arrays are probably [D, T] instead of [T, D].

    All clips of such a modality have the same number of frames T, and T >= 4 D. `splits` is
    split -> modality -> [N] int, the number of frames of each clip. `widths` is modality -> D.
    """
    for name, width in widths.items():
        lengths = [split[name] for split in splits.values() if name in split]
        counts = np.unique(np.concatenate([*lengths, [0]]))[1:]
        if (
            len(counts) == 1
            and counts[0] >= MIN_TRANSPOSED_RATIO * width
            and sum(map(np.count_nonzero, lengths)) > 1
        ):
            yield (
                f"{name}: every clip has {counts[0]} frames of {width} numbers\n"
                "are rows and columns swapped? Rows must be frames: use features.T"
            )


def find_equal_quality(report: Mapping[str, Any], modalities: Sequence[str]) -> Iterator[str]:
    """Yields a message for each modality whose feature norms serve as quality and are almost equal.

    `report` is the data report.
    """
    for modality in modalities:
        counts = _list_counts(report, report["splits"], modality)
        if any(_has_equal_norms(x) for x in counts if x["frames_per_clip"]["max"] > 1):
            yield (
                f"{modality}: all frames have the same quality, so blurred frames count as much as "
                "sharp frames\nthe quality is the norm of the features, and all norms are equal\n"
                f"add {modality}_quality, or write the features before they are normalised"
            )


def _list_counts(report: Mapping[str, Any], splits: Iterable[str], modality: str) -> list[Any]:
    """Returns the entries of a modality in the data report, one for each split that has it."""
    found = (report["splits"][split]["modalities"].get(modality) for split in splits)
    return [counts for counts in found if counts]


def warn_of_bad_values(
    place: str, values: Iterable[BadValues], frames: int, *, official: bool
) -> None:
    """Warns of unusual values of frames, such as negative qualities, and says what replaces them.

    `place` is the modality, and `frames` is its number of frames. `official` is True for the
    official files of iQIYI-VID, in which some qualities are negative. For these files, the
    warning about negative qualities appears only if all qualities are negative.
    """
    for bad in values:
        effect = "it is replaced by 0"
        if bad.problem == "negative":
            if official and bad.frames < frames:
                continue
            effect = "as a weight, it counts as 0. If all weights of a clip are 0, they are equal"
        more = " of 0 or more" * (bad.field in WEIGHTS)
        warn(
            f"{place}: {bad.frames:,} of {frames:,} frames have a {bad.field} that is "
            f"{bad.problem}, such as in clip {show(bad.clip)}: {effect}\n"
            f"to use the {bad.field}, write finite numbers{more}"
        )


def _has_equal_norms(report: Mapping[str, Any]) -> bool:
    """Returns True if each frame's quality is the norm of its features, and all norms are similar.

    `report` is the entry of a modality in the data report.
    """
    norm = report["norm"]
    if report["quality"] != norm or not norm["counts"] or not MIN_NORM < norm["mean"] < MAX_NORM:
        return False
    # The histogram of a constant extends to both sides of the value, so its first bin is empty.
    width = norm["edges"][-1] - norm["edges"][0]
    return not norm["counts"][0] or width < MAX_EQUAL_RANGE * norm["mean"]


def find_unusable(
    report: Mapping[str, Any], splits: Sequence[str], modalities: Sequence[str]
) -> Iterator[str]:
    """Yields a message for each modality whose features in `splits` cannot be used.

    Features cannot be used if there are none, if all are NaN, Inf or 0, or if they are too large or
    too small for float32. `report` is the data report.
    """
    place = ", ".join(splits)
    for modality in modalities:
        counts = _list_counts(report, splits, modality)
        seen = sum(count["frames_seen"] for count in counts)
        files = ", ".join(dict.fromkeys(count["file"] for count in counts))
        remedy = f"\ncheck {files or place}, or leave '{modality}' out of config.modalities"
        if not seen:
            yield f"{modality}: no clip of {place} has a frame{remedy}"
        elif not any(count["frames"] for count in counts):
            yield (
                f"{modality}: all {seen} frames of {place} contain a NaN, an Inf or a value "
                f"beyond float32{remedy}"
            )
        else:
            norms = [count["norm"] for count in counts if count["frames"]]
            yield from _check_norms(modality, place, norms)


def _check_norms(modality: str, place: str, norms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a message if the squares of features overflow or become 0 in float32.

    `norms` has a histogram of the norms of the features for each split. `place` names the splits.
    """
    longest, mean = max(norm["edges"][-1] for norm in norms), max(norm["mean"] for norm in norms)
    if longest > MAX_NORM:
        yield (
            f"{modality}: features of {place} have norms up to {longest:.2g}, and their squares "
            "overflow float32\ndivide them by a constant, or leave out the wrong clips"
        )
    elif not mean:
        yield (
            f"{modality}: all features of {place} are 0\n"
            f"write other features, or leave '{modality}' out of config.modalities"
        )
    elif mean < MIN_NORM:
        yield (
            f"{modality}: features of {place} have a mean norm of {mean:.2g}, and their squares "
            "become 0 in float32\nmultiply them by a constant"
        )


# A spreadsheet turns the number 123456789012 into 1.23E+11, and pandas turns a missing value into
# the text nan. Then two people have one name, or clips of nobody have the name of a person. But a
# person may really have such a name. So the identities are not changed, and a warning appears.

# In these words, upper and lower case matter, because Nan, Na and Nat are names of people.
_MISSING = r"-?nan|NaN|NAN|[Nn]ull|NULL|[Nn]one|NONE|na|NA|n/a|N/A|<NA>|#N/A|#NV|#N/D|NaT|\\N|-|\?"
_DAY = r"\d{4}-\d\d-\d\d([ t]\d\d:.*)?|\d\d?:\d\d:\d\d.*|\d\d?(/\d\d?/(\d\d)?|\.\d\d?\.\d\d)\d\d"
_MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
# What an identity looks like -> a pattern, which ignores upper and lower case.
_CHANGED = {
    "a word for a missing value": f"(?-i:{_MISSING})",
    "a number in scientific notation": r"[+-]?\d([.,]\d+)?e[+-]?\d{1,3}",
    "a date or a time": rf"{_DAY}|\d\d?[- ]{_MONTH}([- ]\d+)?|{_MONTH}-\d\d",
    "a truth value": "true|false",
    "an error of a spreadsheet": r"#\S+[!?]|##+|err:\d+",
    "a number with separators of thousands": r"[+-]?\d{1,3}([,'\u2019\xa0\u202f]\d{3})+([.,]\d+)?",
    "a number after an apostrophe": r"['\u2019]\d+",
    "text of a Python object": r"[b\[({]['\"].*['\"],?[\])}]?|(np\.\w+|tensor|array)\(.*\)",
    "a whole number with decimals": r"-?\d+[.,]0+",
    "a number that was rounded to 15 digits": r"[1-9]\d{14}0+",
    "a number that lost zeros in other lines": r"0+\d+",
    "a name with other blanks in other lines": r".*(\s\s|[^\S ]).*",
}


def warn_of_changed(places: Mapping[str, str]) -> None:
    """Warns, in one line, of identities that a spreadsheet or another program probably changed.

    An example is 1-Mar instead of MARCH1. `places` is identity -> the place of its first clip, such
    as a file and a line.
    """
    # Without leading zeros, decimals .0 and unusual blanks, two identities may be equal.
    usual = {n: re.sub(r"^0+(?=\d)|[.,]0+$", "", " ".join(n.split())) for n in places}
    counts, texts, first = Counter(usual.values()), list[str](), ""
    for like, pattern in _CHANGED.items():
        found = dict.fromkeys(filter(re.compile(pattern, re.IGNORECASE).fullmatch, places))
        # If Jan-01 and Ada-01 are identities, Jan-01 is no date.
        codes = {_simplify(name) for name in places if found and name not in found} - {""}
        alone = "in other lines" not in like
        names = [n for n in found if counts[usual[n]] > 1 or (alone and _simplify(n) not in codes)]
        # A single zero at the end of a long number may be chance.
        if names and not re.fullmatch(r"[1-9]\d{15}", "".join(names)):
            count = f" ({len(names):,} identities)" * (len(names) > 1)
            texts.append(f"'{show(names[0])}' looks like {like}{count}")
            first = first or places[names[0]]
    if texts:
        warn(
            f"{first}: identity {', '.join(texts)}: a spreadsheet or pandas may have changed it. "
            "If so, write identities as text, and leave missing identities empty"
        )


def _simplify(name: str) -> str:
    """Replaces words by a and numbers by 0: a-0 for Jan-01. Without digits, returns ""."""
    text = re.sub(r"\w*[^\W\d]\w*", "a", name) if re.search(r"\d", name) else ""
    return re.sub(r"\d{1,15}", "0", text)
