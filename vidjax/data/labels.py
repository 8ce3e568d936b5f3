"""Reads labels and weights of clips from ground-truth files, tables or dicts."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.checks import check_file, list_entries, refuse_split
from vidjax.data.clips import SPLITS
from vidjax.data.untrusted.names import clean_identity, clean_name_at, show, unescape
from vidjax.utils import files, messages
from vidjax.utils.errors import NoFileError, UserError, check_argument, prefix_errors, warn

TABLE = "labels.csv"
Truth = Mapping[str, Mapping[str, str]]  # split with labels -> clip -> identity
LabelSource = Mapping[str, Any] | str | Path | None  # clip -> identity, or a file of labels


def load_official_truth(
    directory: str | Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity, from the files `{split}_gt.txt` of a directory.

    `clips` is split -> the clips that have features. A warning appears if a file names other clips.
    """
    truth = {}
    for split, path in find_ground_truth(directory).items():
        truth[split] = load_ground_truth(path, known_clips=clips.get(split, ()))
        if split in clips:
            check_known(path, truth[split], clips[split])
    return truth


def load_folder_truth(
    folder: Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity, from `labels.csv` or the ground-truth files of a folder.

    `clips` is split -> the clips that have features. Raises UserError if the folder has both kinds
    of files, or a misspelt file such as `label.csv`.
    """
    official, table = find_ground_truth(folder), folder / TABLE
    check_file(table)
    if not table.is_file():
        for path in () if official else list_entries(folder):
            # For `errors.closest`, all names with the ending .csv are similar.
            if path.is_file() and get_close_matches(path.name.lower(), [TABLE], cutoff=0.8):
                raise UserError(
                    f"'{path}' would be ignored, because labels are read from {TABLE}: "
                    f"rename it to {TABLE}"
                )
        return load_official_truth(folder, clips)
    if official:
        raise UserError(
            f"'{folder}' contains both {TABLE} and {next(iter(official.values())).name}: "
            "remove one of them"
        )
    return load_label_table(table, clips)


def load_label_table(
    labels: LabelSource, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity, without splits that have no labelled clip.

    `labels` is clip -> identity, a `.csv` file with the columns `clip` and `identity`, or a
    ground-truth file. None means no labels. `clips` is split -> the clips that have features.
    """
    if labels is None:
        return {}
    wanted = "a dict {clip: identity}, or a file of labels"
    check_argument("labels", labels, (Mapping, str, os.PathLike), wanted)
    split_of = {name: split for split, names in clips.items() for name in names}
    place = Path("labels")
    if isinstance(labels, Mapping):
        pairs = _clean_labels((f"{place}:", *pair) for pair in labels.items())
    elif (place := Path(labels).expanduser()).suffix == ".csv":
        pairs = _clean_labels(_read_csv_rows(place))
    else:
        pairs = load_ground_truth(place, known_clips=split_of)
    if pairs:
        check_known(place, pairs, split_of)
    truth: dict[str, dict[str, str]] = {}
    for name, identity in pairs.items():
        if name in split_of:
            truth.setdefault(split_of[name], {})[name] = identity
    return truth


def _read_csv_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (start of an error message, clip, identity) for each row of a `.csv` of labels."""
    _refuse_no_file(path)
    try:
        with io.TextIOWrapper(files.open_text(path), encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            header = tuple(table.fieldnames or ())
            if not {"clip", "identity"} <= set(header):
                raise UserError(
                    f"{path}: line 1: the columns are '{show(','.join(header))}': "
                    "write clip,identity into the first line, and separate columns by commas"
                )
            for row in table:
                more = row.get(None)  # pyright: ignore[reportArgumentType]
                if None in (row["clip"], row["identity"]) or any(more or ()):
                    raise UserError(
                        f"{path}: line {table.line_num}: the line must have as many values as "
                        'line 1\nwrite names that contain a comma in double quotes: "Smith, John"'
                    )
                yield f"{path}: line {table.line_num}:", row["clip"], row["identity"].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"'{path}' is not a table of UTF-8 text: {error}\nsave it as CSV in UTF-8"
        ) from None


def _refuse_no_file(path: Path) -> None:
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise NoFileError(f"'{path}' {problem}: correct the path")


def _clean_labels(rows: Iterable[tuple[str, Any, Any]]) -> dict[str, str]:
    """Returns clip -> identity, from rows of (start of an error message, clip, identity).

    A clip whose identity is None or empty is left out. A warning counts the empty identities.
    """
    pairs: dict[str, str] = {}
    empty = []
    for place, clip, identity in rows:
        name = clean_name_at(place, clip)
        if identity is None:
            continue
        place = f"{place} clip {show(name)}"
        # A NaN is an empty cell of pandas.
        is_nan = isinstance(identity, (float, np.floating)) and np.isnan(identity)
        if is_nan or (isinstance(identity, str) and not identity):
            empty.append(place)
            continue
        if not isinstance(identity, (str, int, np.integer)) or isinstance(identity, bool):
            kind = type(identity).__name__
            raise UserError(
                f"{place}: the identity is of type {kind}, but must be text or int\n"
                "convert it with str(), or use None if the clip shows no known person"
            )
        with prefix_errors(place):
            text = clean_identity(str(identity))
        if re.fullmatch("-[0-9]+", text):
            raise UserError(
                f"{place}: identity {text} is negative: leave out clips that show no known person"
            )
        if pairs.setdefault(name, text) != text:
            raise UserError(
                f"{place} has the labels {show(pairs[name])} and {show(text)}: delete one of them"
            )
    if empty:
        warn(
            f"{empty[0]}: its identity is empty, so the clip shows no known person "
            f"(such clips: {len(empty):,})\n"
            "to avoid this warning, leave out these clips, or use None in Python"
        )
    return pairs


MAX_UNKNOWN_RATE = 0.01  # share of the labelled clips that may be in no feature file


def find_ground_truth(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns split -> path of `{split}_gt.txt`, in the order train, val, test."""
    entries = list_entries(directory)
    words = {
        path.name.removesuffix("_gt.txt"): path for path in entries if path.name.endswith("_gt.txt")
    }
    paths = {split: words.pop(split) for split in SPLITS if split in words}
    for path in paths.values():
        check_file(path)
    for path in entries:
        if path.stem in {f"{split}_gt" for split in {*SPLITS} - {*paths}}:
            raise UserError(
                f"'{path}' would be ignored, because ground truth is read from {path.stem}.txt\n"
                f"write {path.stem}.txt with lines 'NAME.mp4 IDENTITY', or move this file away"
            )
    for word, path in words.items():
        refuse_split(path, word, paths)
    return paths


def load_ground_truth(
    path: str | os.PathLike[str], *, known_clips: Collection[str] = ()
) -> dict[str, str]:
    """Returns clip (without `.mp4`) -> identity, in the order of a ground-truth file.

    There are two forms of files. The direct form has a line `NAME.mp4 ID` for each clip. The
    inverted form has a line `ID NAME.mp4 NAME.mp4 ...` for each identity. If no name ends in
    `.mp4`, train_gt.txt is read as direct, and val_gt.txt and test_gt.txt as inverted. A blank in
    a name is written `%20`. `known_clips` are names in which `%20` does not mean a blank.

    Raises:
      UserError: the form is unclear, a line has another form, a clip comes twice, or a name is
        refused. If most identities are whole numbers, all must be whole numbers above 0.
    """
    path, known = Path(path), frozenset(known_clips)
    lines = _read_lines(path, "NAME.mp4 ID")
    inverted = _is_inverted(path, [fields for _, fields in lines])
    labels: dict[str, str] = {}
    line_of_clip: dict[str, int] = {}
    line_of_identity: dict[str, int] = {}
    for number, fields in lines:
        where = f"{path}: line {number}:"
        others = fields[:1] if inverted else fields[1:]
        if any(name.endswith(".mp4") for name in others):
            raise UserError(
                f"{where} the clip is not in the same column as in the other lines\n"
                "write NAME.mp4 ID in all lines, or ID NAME.mp4 ... in all lines"
            )
        identity, names = (fields[0], fields[1:]) if inverted else (fields[-1], fields[:-1])
        with prefix_errors(where.removesuffix(":")):
            identity = clean_identity(unescape(identity))
        if inverted and not names:
            raise UserError(
                f"{where} identity {show(identity)} has no clips: add a clip or delete the line"
            )
        if not inverted and len(fields) != 2:
            raise UserError(
                f"{where} the line has {messages.count(len(fields), 'word')}: write a clip and its "
                "identity, NAME.mp4 ID"
            )
        if inverted and line_of_identity.setdefault(identity, number) != number:
            raise UserError(
                f"{where} identity {show(identity)} is already in line "
                f"{line_of_identity[identity]}: join the two lines"
            )
        for text in names:
            name = _parse_clip(text, known, where)
            if name in labels:
                raise UserError(
                    f"{where} clip {show(name)} is already in line {line_of_clip[name]}, with the "
                    f"identity {show(labels[name])}: delete one of the two"
                )
            labels[name], line_of_clip[name] = identity, number
    _check_identities(path, labels, line_of_clip)
    return labels


def _is_inverted(path: Path, lines: Sequence[Sequence[str]]) -> bool:
    """Returns True if the lines of a ground-truth file begin with identities instead of clips."""
    for fields in lines:
        for column, name in enumerate(fields):
            if name.endswith(".mp4"):
                return column > 0
    if path.name not in [f"{split}_gt.txt" for split in SPLITS]:
        raise UserError(
            f"{path}: no name ends in .mp4, so clips and identities cannot be distinguished\n"
            "rename the file to train_gt.txt if its lines are 'CLIP ID'\n"
            "rename it to val_gt.txt if its lines are 'ID CLIP CLIP ...'"
        )
    return path.name != "train_gt.txt"


def _parse_clip(text: str, known: Collection[str], where: str) -> str:
    """Returns a clip name without `.mp4`. In a name that is not `known`, `%20` becomes a blank."""
    clean = clean_name_at(where, text)
    return clean if clean in known else clean_name_at(where, unescape(text))


def _read_lines(path: Path, form: str) -> list[tuple[int, list[str]]]:
    """Returns (line number, words) of each line that is not blank. Errors show the line `form`."""
    _refuse_no_file(path)
    with files.open_text(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 text (byte {error.start}): save the file as UTF-8"
        ) from None
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    lines = [(number, line.split()) for number, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty: write one line per clip, '{form}'")
    return lines


def _is_integer(text: str) -> bool:
    # Python refuses to parse a number with thousands of digits.
    return re.fullmatch(r"[+-]?[0-9]{1,100}", text) is not None


def _check_identities(path: Path, labels: Mapping[str, str], lines: Mapping[str, int]) -> None:
    """Raises UserError if most identities are whole numbers, but one is a name or below 1."""
    if 2 * sum(map(_is_integer, labels.values())) <= len(labels):
        return
    for name, identity in labels.items():
        where = f"{path}: line {lines[name]}: identity {show(identity)}"
        if not _is_integer(identity):
            raise UserError(
                f"{where} is not a whole number, unlike most identities\n"
                "correct it, or give all identities names that are not numbers"
            )
        if int(identity) < 1:
            raise UserError(f"{where} is less than 1: number identities from 1")


def load_clip_weights(path: str | os.PathLike[str], clips: Sequence[str]) -> np.ndarray:
    """Returns the weights of N clips, [N] float32, from a text file of lines `NAME.mp4 WEIGHT`.

    A clip that is not in the file has the weight 1. The suffix `.mp4` is optional.

    Raises:
      UserError: a weight is negative or not finite, a clip comes twice, or more than 1 % of the
        clips in the file are not in `clips`.
    """
    path = Path(path)
    lines = _read_lines(path, "NAME.mp4 WEIGHT")
    weights: dict[str, float] = {}
    known = frozenset(clips)
    line_of_clip: dict[str, int] = {}
    for number, fields in lines:
        where = f"{path}: line {number}:"
        if len(fields) != 2:
            raise UserError(
                f"{where} the line has {messages.count(len(fields), 'word')}: write a clip and its "
                "weight, NAME.mp4 1"
            )
        name = _parse_clip(fields[0], known, where)
        if line_of_clip.setdefault(name, number) != number:
            raise UserError(
                f"{where} clip {show(name)} is already in line {line_of_clip[name]}: delete one "
                "of the two"
            )
        try:
            weights[name] = float(fields[1])
        except ValueError:
            weights[name] = np.nan
        if not 0 <= weights[name] <= float(np.finfo(np.float32).max):
            raise UserError(
                f"{where} weight {show(fields[1])} is not a finite number of 0 or more: correct it"
            )
    check_known(path, weights, clips)
    return np.array([weights.get(name, 1.0) for name in clips], np.float32)


def check_known(path: Path, named: Collection[str], clips: Collection[str]) -> None:
    """Warns if a file names clips without features.

    `named` are the clips in the file, and `clips` are the clips with features. Raises UserError if
    more than 1 % of the clips in the file have no features.
    """
    known = frozenset(clips)
    unknown = [name for name in named if name not in known]
    if not unknown:
        return
    if len(unknown) == len(named):
        raise UserError(
            f"{path}: none of its {len(named)} clips has features\n"
            f"the file names {show(unknown[0])}, but the features belong to {show(min(known))}\n"
            "give the clips the same names in both"
        )
    message = (
        f"{path}: {len(unknown)} of {len(named)} clips have no features, for example "
        f"{show(unknown[0])}"
    )
    if len(unknown) > MAX_UNKNOWN_RATE * len(named):
        raise UserError(
            f"{message}\n"
            f"at most {MAX_UNKNOWN_RATE:.0%} is allowed: remove these lines, or add the features"
        )
    warn(f"{message}\nremove these lines, or add the features")


def sort_identities(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct names in alphabetical order, or by value if all are whole numbers.

    Raises UserError if a number is written in two ways, such as 7 and 007.
    """
    distinct = sorted(set(names))
    if not all(map(_is_integer, distinct)):
        return tuple(distinct)
    value, count = Counter(map(int, distinct)).most_common(1)[0] if distinct else (0, 1)
    if count > 1:
        spellings = ", ".join(name for name in distinct if int(name) == value)
        raise UserError(
            f"identity {value} is written in {count} ways, {spellings}: use only one of them"
        )
    return tuple(sorted(distinct, key=int))
