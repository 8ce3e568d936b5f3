"""Finds what is probably a mistake in a dataset.

Such mistakes are misspelt file names, features from which no model can learn, and identities that a
spreadsheet or another program has changed.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.clips import SPLITS
from vidjax.data.packed_clips import WEIGHTS, BadValues
from vidjax.utils import files
from vidjax.utils.errors import NoFileError, UserError, closest, warn
from vidjax.utils.names import show


def list_entries(directory: str | os.PathLike[str]) -> list[Path]:
    """Returns the sorted paths in a directory, without hidden files. May raise NoFileError."""
    directory = Path(directory)
    if not files.is_present(directory):
        raise NoFileError(f"'{directory}' does not exist: correct the path")
    if not directory.is_dir():
        raise NoFileError(f"'{directory}' is not a directory: name the directory of the files")
    return sorted(path for path in directory.iterdir() if path.name[0] != ".")


def check_file(path: Path) -> None:
    """Raises UserError if something at `path` is no file, such as a folder or a broken link."""
    if path.is_file() or not os.path.lexists(path):
        return
    kind = "is a folder" if path.is_dir() else "is not a regular file"
    if not path.exists():
        kind = f"is a link to '{path.readlink()}', which does not exist"
    raise UserError(f"'{path}' {kind}: put a file there, or rename it")


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
    """Raises UserError if a file is of a kind that users mistake for pickles, such as `.npz`."""
    start = file.read(64).lstrip()
    for magic, kind in _OTHER_FILES.items():
        if start[: len(magic)].lower() == magic.lower():
            raise UserError(f"{place}the file is not a pickle, but {kind}; write a pickle")


def refuse_split(path: Path, word: str, present: Collection[str]) -> None:
    """Raises UserError if `word` is probably a misspelt split, such as `valid` for `val`.

    `word` is the place of the split in the name of the file `path`. `present` are the splits whose
    files were found. A misspelling of one of these splits raises no error.
    """
    lower = word.lower() if word not in SPLITS else ""
    longer = [split for split in SPLITS if lower.startswith(split)]
    split = next(iter(longer), None) or closest(lower, SPLITS, cutoff=0.75)
    if split and split not in present:
        head, _, tail = path.name.rpartition(word)
        raise UserError(
            f"'{path}' would be ignored, because '{word}' is not one of {', '.join(SPLITS)}\n"
            f"rename it to {head}{split}{tail}, or move it away"
        )


FEATURE_SUFFIXES = (".npz", ".npy", ".parquet")


def refuse_unread(entries: Iterable[Path], wanted: str) -> None:
    """Raises UserError if one of `entries`, which are ignored, contains features.

    `wanted` is the text for the message that names the files to read.
    """
    for path in entries:
        patterns = (f"*{suffix}" for suffix in FEATURE_SUFFIXES)
        has_features = path.is_dir() and any(file for end in patterns for file in path.glob(end))
        if has_features or path.suffix.lower() in FEATURE_SUFFIXES:
            raise UserError(
                f"'{path}' would be ignored, because the folder also contains {wanted}\n"
                "move it away, or run the command on this path"
            )


# In float32, the sum of squares of a feature overflows beyond MAX_NORM, and is 0 below MIN_NORM.
MAX_NORM, MIN_NORM = 1e18, 1e-12
MIN_TRANSPOSED_RATIO = 4  # features look transposed if T is at least this multiple of D
MAX_EQUAL_RANGE = 0.01  # norms within this relative range count as equal


def find_misspelt(splits: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[str]:
    """Yields a message for each pair of similar modalities, such as `face` and `faces`.

    There is no message for a pair if a clip has both. `splits` is split -> modality -> [N] int, the
    number of frames of each clip.
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
    """Yields a message for each modality whose qualities are norms of features, all nearly equal.

    `report` is the data report.
    """
    for modality in modalities:
        reports = [
            split["modalities"][modality]
            for split in report["splits"].values()
            if modality in split["modalities"]
        ]
        if any(_has_equal_norms(part) for part in reports if part["frames_per_clip"]["max"] > 1):
            yield (
                f"{modality}: all frames have the same quality, so blurred frames count as much as "
                "sharp frames\nthe quality is the norm of the features, and all norms are equal\n"
                f"add {modality}_quality, or write the features before they are normalised"
            )


def warn_of_bad_values(
    place: str, values: Iterable[BadValues], frames: int, *, official: bool
) -> None:
    """Warns of unusual values of some of `frames` frames, and describes how they count.

    `place` is the modality. If `official` is True, the data have the official format, in which some
    qualities are negative. Then a warning appears only if all qualities are negative.
    """
    for bad in values:
        effect = "it is replaced by 0"
        if bad.problem == "negative":
            if official and bad.frames < frames:
                continue
            effect = "as a weight, it counts as 0. If all weights of a clip are 0, they count as "
            effect += "equal"
        more = " of 0 or more" * (bad.field in WEIGHTS)
        warn(
            f"{place}: {bad.frames:,} of {frames:,} frames have a {bad.field} that is "
            f"{bad.problem}, such as in clip {show(bad.clip)}: {effect}\n"
            f"to use the {bad.field}, write finite numbers{more}"
        )


def _has_equal_norms(report: Mapping[str, Any]) -> bool:
    """Returns True if the qualities of a modality are norms of features, all nearly equal."""
    norm = report["norm"]
    if report["quality"] != norm or not norm["counts"] or not MIN_NORM < norm["mean"] < MAX_NORM:
        return False
    # The histogram of a constant extends to both sides of the value, so its first bin is empty.
    width = norm["edges"][-1] - norm["edges"][0]
    return not norm["counts"][0] or width < MAX_EQUAL_RANGE * norm["mean"]


def find_unusable(
    report: Mapping[str, Any], splits: Sequence[str], modalities: Sequence[str]
) -> Iterator[str]:
    """Yields a message for each modality without usable features. `report` is the data report."""
    place = ", ".join(splits)
    for modality in modalities:
        counts = [
            report["splits"][split]["modalities"][modality]
            for split in splits
            if modality in report["splits"][split]["modalities"]
        ]
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
    """Yields a message if the squares of features overflow or become 0 in float32."""
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

Names = Collection[str]  # the identities of a table

_MONTH = "(jan|feb|mar|mär|mrz|apr|may|mai|jun|jul|aug|sept?|oct|okt|nov|dec|dez)"
# What an identity looks like -> a pattern, which ignores upper and lower case.
_FORMS = {
    # Upper and lower case matter, because Nan, Na and Nat are names of people.
    "a word for a missing value": (
        r"(?-i:-?nan|-?NaN|NAN|null|NULL|Null|\(null\)|[Nn]one|NONE|nil|NIL|undefined|n/a|N/A|n\.a\."
        r"|na|NA|<NA>|<na>|#N/A|#NA|#NV|#N/D|NaT|\\N|--?|\.|\?|-?1\.#(QNAN|IND)|-nan\(ind\))"
    ),
    "a number in scientific notation": r"[+-]?\d([.,]\d+)?e[+-]?\d{1,3}",
    "a date or a time": (
        r"\d{4}-\d\d-\d\d([ t]\d\d:\d\d(:\d\d(\.\d+)?)?)?|\d{1,2}:\d\d:\d\d( ?[ap]m)?"
        r"|\d{1,2}/\d{1,2}/(\d\d|\d{4})|\d{1,2}\.\d{1,2}\.\d{4}"
        rf"|\d{{1,2}}\.?[- ]{_MONTH}([- ]\d\d|[- ]\d{{4}})?|{_MONTH}-\d\d"
    ),
    "a truth value": "true|false",
    "an error of a spreadsheet": r"#¡?\w+(/0)?[!?]|##+|err:\d+",
    "a number with separators of thousands": r"[+-]?\d{1,3}([,'\u2019\xa0\u202f]\d{3})+([.,]\d+)?",
    "a number after an apostrophe": r"['\u2019]\d+",
    "text of a Python object": (
        r"b'.*'|b\".*\"|(np|numpy)\.\w+\(.*\)|(tensor|array)\(.*\)|[\[({]['\"].*['\"],?[\])}]"
    ),
}
_DIGITS = 15  # a spreadsheet replaces further digits of a number by zeros


def warn_of_changed(places: Mapping[str, str]) -> None:
    """Warns, in one line, of identities that a program has probably changed.

    `places` is identity -> the place of its first clip, such as a file and a line.
    """
    found = [(like, names) for like, find in _TESTS.items() if (names := find(places))]
    if not found:
        return
    texts = []
    for like, names in found:
        count = f" ({len(names):,} identities)" if len(names) > 1 else ""
        texts.append(f"'{show(names[0])}' looks like {like}{count}")
    warn(
        f"{places[found[0][1][0]]}: identity {', '.join(texts)}: if a program has changed "
        "identities, write them as text, and leave missing identities empty"
    )


def _find_form(pattern: str) -> Callable[[Names], list[str]]:
    form = re.compile(pattern, re.IGNORECASE)

    def find(names: Names) -> list[str]:
        matches = [name for name in names if form.fullmatch(name)]
        if not matches:
            return []
        # Next to 1a5, also 1e5 is a code. Next to Ada-01, Jan is a person in Jan-01.
        codes = {_simplify(name) for name in names if not form.fullmatch(name)}
        return [n for n in matches if not re.search(r"\d", n) or _simplify(n) not in codes]

    return find


def _simplify(name: str) -> str:
    """Replaces numbers by 0 and words by a. A word with digits is replaced by its length."""
    if name.isalnum() and re.search(r"\d", name) and re.search(r"[^\W\d]", name):
        return str(len(name))
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", name))


def _find_decimals(names: Names) -> list[str]:
    """Finds decimals such as 100.0, which were probably written as 100.

    A decimal is found if the table also has 100, or if all decimals in the table are like 100.0.
    """
    parts = {n: re.split("[.,]", n) for n in names if re.fullmatch("-?[0-9]+[.,][0-9]+", n)}
    whole = [name for name, (_, decimals) in parts.items() if not decimals.strip("0")]
    return [n for n in whole if len(whole) == len(parts) or parts[n][0] in names]


def _find_rounded(names: Iterable[str]) -> list[str]:
    """Finds long numbers, if all of them end in zeros from the 16th digit on."""
    long = [name for name in names if re.fullmatch(rf"[1-9][0-9]{{{_DIGITS},}}", name)]
    zeros = sum(len(name) - _DIGITS for name in long)
    # A single zero may be chance.
    return long if zeros > 1 and not any(name[_DIGITS:].strip("0") for name in long) else []


def _find_lost_zeros(names: Names) -> list[str]:
    """Finds numbers such as 007, if the table also has 7."""
    return [n for n in names if re.fullmatch("0+[0-9]+", n) and (n.lstrip("0") or "0") in names]


def _find_blanks(names: Names) -> list[str]:
    """Finds names with unusual blanks, such as a no-break space, next to a name with others."""
    usual = {name: " ".join(name.split()) for name in names}
    counts = Counter(usual.values())
    return [name for name in names if usual[name] != name and counts[usual[name]] > 1]


# What an identity looks like -> the function that finds such identities.
_TESTS: Mapping[str, Callable[[Names], list[str]]] = {
    **{like: _find_form(pattern) for like, pattern in _FORMS.items()},
    "a whole number with decimals": _find_decimals,
    "a number that was rounded to 15 digits": _find_rounded,
    "a number that lost zeros in other lines": _find_lost_zeros,
    "a name with other blanks in other lines": _find_blanks,
}
