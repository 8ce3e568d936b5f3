"""Labels and weights of clips, from ground-truth files, tables or dicts; and class columns."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.checks import check_file, list_entries, refuse_split
from vidjax.data.clips import SPLITS
from vidjax.data.untrusted.names import clean_identity, clean_name_at, show, unescape
from vidjax.utils import files
from vidjax.utils.errors import NoFileError, UserError, check_argument, closest, named, warn

TABLE = "labels.csv"
Truth = Mapping[str, Mapping[str, str]]  # labelled split -> clip -> identity
LabelSource = Mapping[str, Any] | str | Path | None  # clip -> identity, or a file of that


def load_official_truth(
    directory: str | Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Reads `{split}_gt.txt` as split -> clip -> identity; `clips` is split -> its known clips."""
    truth = {}
    for split, path in find_ground_truth(directory).items():
        truth[split] = load_ground_truth(path, known_clips=clips.get(split, ()))
        if split in clips:
            check_known(path, truth[split], clips[split])
    return truth


def load_folder_truth(
    folder: Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Reads `labels.csv` of a folder, or else its ground-truth files; ValueError for both kinds."""
    official, table = find_ground_truth(folder), folder / TABLE
    check_file(table)
    if not table.is_file():
        if not official:
            _refuse_near_table(folder)
        return load_official_truth(folder, clips)
    if official:
        raise UserError(f"{folder}: {TABLE} and {next(iter(official.values())).name}: keep one")
    return load_label_table(table, clips)


def _refuse_near_table(folder: Path) -> None:
    """Raises ValueError for a file such as `label.csv`, which would not be read."""
    for path in list_entries(folder):
        if path.is_file() and closest(path.name.lower(), [TABLE], cutoff=0.8):
            raise UserError(f"{path}: labels are read from {TABLE}: rename it to {TABLE}")


def load_label_table(
    labels: LabelSource, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Returns labelled split -> clip -> identity; `clips`, split -> clips, tells each one's split.

    `labels` is clip -> identity, or a file: `.csv` with the columns `clip` and `identity`, any
    other is official ground truth (`load_ground_truth`). None stands for no labels.
    """
    if labels is None:
        return {}
    wanted = "a dict {clip: identity}, or a file of them"
    check_argument("labels", labels, (Mapping, str, os.PathLike), wanted)
    split_of = {name: split for split, names in clips.items() for name in names}
    place = Path("labels")
    if isinstance(labels, Mapping):
        pairs = _clean_labels((f"{place}:", *pair) for pair in labels.items())
    elif (place := Path(labels).expanduser()).suffix == ".csv":
        pairs = _clean_labels(_rows_of_csv(place))
    else:
        pairs = load_ground_truth(place, known_clips=split_of)
    if pairs:
        check_known(place, pairs, split_of)
    truth: dict[str, dict[str, str]] = {}
    for name, identity in pairs.items():
        if name in split_of:
            truth.setdefault(split_of[name], {})[name] = identity
    return truth


def _rows_of_csv(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields place (the start of a message), clip and identity of every row of a table."""
    if not path.exists():
        raise NoFileError(f"{path}: no such file")
    try:
        with io.TextIOWrapper(
            io.BufferedReader(files.open_input(path)), encoding="utf-8-sig", newline=""
        ) as file:
            table = csv.DictReader(file, skipinitialspace=True)
            header = tuple(table.fieldnames or ())
            if not {"clip", "identity"} <= set(header):
                raise UserError(
                    f"{path}: line 1: wanted the columns clip,identity; "
                    f"got {show(','.join(header)) or 'nothing'}"
                )
            for row in table:
                if row["clip"] is None or row["identity"] is None:
                    raise UserError(f"{path}: line {table.line_num}: fewer fields than columns")
                if any(row.get(None) or ()):  # pyright: ignore[reportArgumentType]
                    raise UserError(
                        f"{path}: line {table.line_num}: more fields than columns\n"
                        'put a name that holds a comma into double quotes: "Smith, John"'
                    )
                yield f"{path}: line {table.line_num}:", row["clip"], row["identity"].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of UTF-8 text: {error}") from None


def _clean_labels(rows: Iterable[tuple[str, Any, Any]]) -> dict[str, str]:
    """Returns clip -> identity from rows of place (the start of a message), clip and identity.

    A warning counts clips with an empty identity; None means nobody and gives no warning.
    """
    pairs: dict[str, str] = {}
    empty = []
    for place, clip, identity in rows:
        name = clean_name_at(place, clip)
        if identity is None:
            continue
        place = f"{place} clip {show(name)}"
        if identity == "" or identity != identity:  # NaN stands for nothing in a column of pandas
            empty.append(place)
            continue
        if not isinstance(identity, (str, int, np.integer)) or isinstance(identity, bool):
            kind = type(identity).__name__
            raise UserError(
                f"{place}: an identity is text or int, not {kind}: use str(), or None for nobody"
            )
        with named(place):
            text = clean_identity(str(identity))
        if re.fullmatch("-[0-9]+", text):
            raise UserError(
                f"{place}: identity {text} is negative: leave out clips of nobody on the list"
            )
        if pairs.setdefault(name, text) != text:
            raise UserError(f"{place} is labelled {show(pairs[name])} and {show(text)}")
    if empty:
        warn(
            f"{empty[0]}: {len(empty)} clips have an empty identity and count as nobody's\n"
            "if that is meant, leave out these clips, or give None in Python"
        )
    return pairs


MAX_UNKNOWN_RATE = 0.01  # share of the named clips that may be in no feature file


def find_ground_truth(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns split -> `{split}_gt.txt` of a directory, in the order train, val, test."""
    entries = list_entries(directory)
    words = {
        path.name.removesuffix("_gt.txt"): path for path in entries if path.name.endswith("_gt.txt")
    }
    found = {split: words.pop(split) for split in SPLITS if split in words}
    for path in found.values():
        check_file(path)
    for path in entries:
        if path.stem in {f"{split}_gt" for split in {*SPLITS} - {*found}}:
            raise UserError(
                f"{path}: ground truth is read from {path.stem}.txt, of lines 'NAME.mp4 IDENTITY'\n"
                "write it so, or move this file away"
            )
    for word, path in words.items():
        refuse_split(path, word, found)
    return found


def load_ground_truth(
    path: str | os.PathLike[str], *, known_clips: Collection[str] = ()
) -> dict[str, str]:
    """Returns clip (without `.mp4`) -> identity (as written) of a ground-truth file, in its order.

    The direct form is `NAME.mp4 ID`, one clip per line; the inverted form `ID NAME.mp4 NAME.mp4
    ...`, one identity per line. The suffix `.mp4` tells the forms apart. If no name has it, the
    file name decides: train_gt is direct, val_gt and test_gt are inverted. A byte order mark, CRLF,
    tabs, blank lines and additional spaces are ignored. White space within a name is written as in
    a URL, `First%20Last`, unless `known_clips` (without `.mp4`) has the name as it is written.

    Raises:
      ValueError: not UTF-8, an ambiguous form, a line of the other form, a clip twice, an identity
        twice or without clips (inverted), or a label that is no whole number from 1 up where most
        are; names the line.
    """
    path, known = Path(path), frozenset(known_clips)
    lines = _lines(path, "NAME.mp4 ID")
    inverted = _is_inverted(path, [fields for _, fields in lines])
    labels: dict[str, str] = {}
    first: dict[str, int] = {}  # line of a clip
    first_of: dict[str, int] = {}  # and of an identity, in the inverted form
    for number, fields in lines:
        where = f"{path}: line {number}:"
        others = fields[:1] if inverted else fields[1:]
        if any(name.endswith(".mp4") for name in others):
            raise UserError(
                f"{where} the clip is not in the same column as in other lines\n"
                "write NAME.mp4 ID in all lines, or ID NAME.mp4 ... in all"
            )
        identity, names = (fields[0], fields[1:]) if inverted else (fields[-1], fields[:-1])
        with named(where.removesuffix(":")):
            identity = clean_identity(unescape(identity))
        if inverted and not names:
            raise UserError(f"{where} identity {show(identity)} has no clips")
        if not inverted and len(fields) != 2:
            raise UserError(f"{where} {len(fields)} fields, wanted a clip and its identity")
        if inverted and first_of.setdefault(identity, number) != number:
            raise UserError(
                f"{where} identity {show(identity)} is already in line "
                f"{first_of[identity]}: join the two lines"
            )
        for text in names:
            name = _clip_of(text, known, where)
            if name in labels:
                raise UserError(
                    f"{where} clip {show(name)} is already in line {first[name]}, with label "
                    f"{show(labels[name])}: delete one"
                )
            labels[name], first[name] = identity, number
    _check_identities(path, labels, first)
    return labels


def _is_inverted(path: Path, lines: Sequence[Sequence[str]]) -> bool:
    """Returns True for the inverted form: by the first `.mp4`, else by the name of the file."""
    for fields in lines:
        for column, name in enumerate(fields):
            if name.endswith(".mp4"):
                return column > 0
    if path.name not in [f"{split}_gt.txt" for split in SPLITS]:
        raise UserError(
            f"{path}: 'CLIP ID' or 'ID CLIP CLIP ...'? No name ends in .mp4;\n"
            "name the file train_gt.txt (the first form) or val_gt.txt (the second)"
        )
    return path.name != "train_gt.txt"


def _clip_of(text: str, known: Collection[str], where: str) -> str:
    """Returns the clip that `text` names: `text` itself if `known`, else with `%20` as a blank.

    Its ValueError begins with the place `where`.
    """
    clean = clean_name_at(where, text)
    return clean if clean in known else clean_name_at(where, unescape(text))


def _lines(path: Path, form: str) -> list[tuple[int, list[str]]]:
    """Returns line number and fields of every line that is not blank; refuses an empty file."""
    if not path.exists():
        raise NoFileError(f"{path}: no such file")
    with files.open_input(path) as file:
        data = file.readall()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: not UTF-8 text (byte {error.start})") from None
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    lines = [(number, line.split()) for number, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"{path}: is empty; write one line per clip, '{form}'")
    return lines


def _is_integer(text: str) -> bool:
    """Returns True for a whole number of few digits: Python refuses to read thousands of them."""
    return re.fullmatch(r"[+-]?[0-9]{1,100}", text) is not None


def _check_identities(path: Path, labels: Mapping[str, str], lines: Mapping[str, int]) -> None:
    """Raises ValueError for a label that is no whole number from 1 up where most are.

    `labels` and `lines` are clip -> identity and clip -> number of its line.
    """
    if 2 * sum(map(_is_integer, labels.values())) <= len(labels):
        return
    for name, identity in labels.items():
        where = f"{path}: line {lines[name]}: label {show(identity)}"
        if not _is_integer(identity):
            raise UserError(f"{where} is not a whole number, as others are")
        if int(identity) < 1:
            raise UserError(f"{where} is out of range: identities count from 1")


def load_clip_weights(path: str | os.PathLike[str], clips: Sequence[str]) -> np.ndarray:
    """Returns [N] float32 weights from a text file of `NAME.mp4 WEIGHT` lines, 1 for other clips.

    As in the ground truth, a byte order mark, CRLF, tabs, blank lines, additional spaces and a
    missing `.mp4` are ignored. ValueError for an empty file, a line without a finite weight of 0 or
    more, a clip that comes twice, or clips that `check_known` refuses.
    """
    path = Path(path)
    lines = _lines(path, "NAME.mp4 WEIGHT")
    given: dict[str, float] = {}
    known = frozenset(clips)
    at: dict[str, int] = {}
    for number, fields in lines:
        where = f"{path}: line {number}:"
        if len(fields) != 2:
            raise UserError(f"{where} {len(fields)} fields, wanted a clip and its weight")
        name = _clip_of(fields[0], known, where)
        if at.setdefault(name, number) != number:
            raise UserError(f"{where} clip {show(name)} is already in line {at[name]}: delete one")
        try:
            given[name] = float(fields[1])
        except ValueError:
            raise UserError(f"{where} weight {show(fields[1])} is not a number") from None
        if not 0 <= given[name] <= float(np.finfo(np.float32).max):
            raise UserError(f"{where} weight {show(fields[1])} is negative or not finite")
    check_known(path, given, clips)
    return np.array([given.get(name, 1.0) for name in clips], np.float32)


def check_known(path: Path, named: Collection[str], clips: Collection[str]) -> None:
    """Warns of clips that a text file names and no feature file holds.

    Raises ValueError if more than 1 % of the named clips are unknown, or all are.
    """
    known = frozenset(clips)
    unknown = [name for name in named if name not in known]
    if not unknown:
        return
    if len(unknown) == len(named):
        raise UserError(
            f"{path}: none of its {len(named)} clips is in a feature file\n"
            f"it names {show(unknown[0])}, the feature files name {show(min(known))}\n"
            "give the clips the same names in both"
        )
    message = (
        f"{path}: {len(unknown)} of {len(named)} clips are in no feature file, for example "
        f"{show(unknown[0])}"
    )
    if len(unknown) > MAX_UNKNOWN_RATE * len(named):
        raise UserError(
            f"{message}\n"
            f"at most {MAX_UNKNOWN_RATE:.0%} may be: remove these lines, or add the features"
        )
    warn(message)


def sort_identities(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct identities, ordered by number if all are whole numbers, else by name.

    ValueError for one number written in two ways, such as 7 and 007.
    """
    distinct = sorted(set(names))
    if not all(map(_is_integer, distinct)):
        return tuple(distinct)
    value, count = Counter(map(int, distinct)).most_common(1)[0] if distinct else (0, 1)
    if count > 1:
        spellings = ", ".join(name for name in distinct if int(name) == value)
        raise UserError(
            f"identity {value} is written in {count} ways: {spellings}; use one of them"
        )
    return tuple(sorted(distinct, key=int))
