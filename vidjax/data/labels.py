"""Reads labels (the identity that each clip shows) and weights of clips from files or dicts."""

import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.data import parquet
from vidjax.data.checks import check_file, list_entries, refuse_split, warn_of_changed
from vidjax.data.clips import SPLITS
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import NoFileError, UserError, check_argument, prefix_errors, warn
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import (
    clean_identity,
    clean_name,
    clean_name_at,
    has_ending,
    normal_form,
    show,
    unescape,
)

COLUMNS = ("clip", "identity")
TABLES = tuple(f"labels{ending}" for ending in tables.ENDINGS)
Truth = Mapping[str, Mapping[str, str]]  # split with labels -> clip -> identity
LabelSource = Mapping[str, Any] | str | Path | None  # clip -> identity, or a file of labels


def load_official_truth(
    directory: str | Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity, from the files `{split}_gt.txt` of a directory.

    `clips` is split -> names of the clips with features. A warning appears if a file names clips
    without features.
    """
    truth = {}
    for split, path in find_ground_truth(directory).items():
        truth[split] = load_ground_truth(path, known_clips=clips.get(split, ()))
        if split in clips:
            effect = "in the MAP, they count as clips that are not found"
            check_known(path, truth[split], clips[split], effect)
    return truth


def load_folder_truth(
    folder: Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity, from the files `{split}_gt.txt` or a table `labels.csv`.

    The table may also be `labels.tsv`, `labels.jsonl` or `labels.parquet`. `clips` is split ->
    names of the clips with features. Raises UserError if the folder has several files of labels, or
    a file with a misspelt name such as `label.csv`.
    """
    official, entries = find_ground_truth(folder), list_entries(folder)
    found = [path for path in entries if path.name.lower() in TABLES]
    both = [path.name for path in (*found, *official.values())][:2]
    if found and len(both) > 1:
        raise UserError(f"'{folder}' has labels in both {' and '.join(both)}: remove one of them")
    if found:
        check_file(found[0])
        return load_label_table(found[0], clips)
    for path in () if official else entries:
        # For `errors.closest`, all names with the ending .csv are similar.
        like = get_close_matches(path.name.lower(), TABLES, n=1, cutoff=0.8)
        if like and path.is_file():
            raise UserError(f"'{path}' would be ignored: rename it to {like[0]}, or move it away")
    return load_official_truth(folder, clips)


def load_label_table(
    labels: LabelSource, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Returns split -> clip -> identity. Splits without a labelled clip are left out.

    `labels` is a dict, clip -> identity, or the path of a table (see `read_table`) or of a
    ground-truth file. None means no labels. `clips` is split -> names of the clips with features.
    """
    if labels is None:
        return {}
    wanted = "a dict {clip: identity}, or a file of labels"
    check_argument("labels", labels, (Mapping, str, os.PathLike), wanted)
    split_of = {name: split for split, names in clips.items() for name in names}
    place = Path("labels")
    if isinstance(labels, Mapping):
        pairs = clean_labels(((str(place), *pair) for pair in labels.items()), split_of)
    elif (place := files.local(labels)).suffix.lower() in tables.ENDINGS:
        pairs = clean_labels(read_table(place), split_of)
    else:
        pairs = load_ground_truth(place, known_clips=split_of)
    if pairs:
        check_known(place, pairs, split_of)
    known = ((split_of[name], (name, x)) for name, x in pairs.items() if name in split_of)
    groups = group_by_key(known)
    return {split: dict(labels) for split, labels in groups.items()}


def read_table(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yields (place, clip, identity) for each row of a table of labels.

    The place is the file and the line, for error messages. The columns are called `clip` and
    `identity`, in upper or lower case. A line of a .jsonl is an object with these keys. A file that
    does not end in .csv, .jsonl or .parquet is text with tabs. If this text has no line of column
    names, its first two columns are read.
    """
    refuse_no_file(path)
    if path.suffix.lower() == ".jsonl":
        yield from _read_json_lines(path)
        return
    if path.suffix.lower() == ".parquet":
        for row, clip, identity in parquet.read_labels(path):
            yield f"{path}: row {row}", clip, identity
        return
    is_csv, rows = path.suffix.lower() == ".csv", tables.read_text(path)
    number, header = next(rows, (1, []))
    titles = tables.find_columns(f"{path}: line {number}", header, COLUMNS)
    columns = [*map(header.index, titles)]
    if not columns and is_csv:
        raise UserError(
            f"{path}: line {number}: the columns are '{show(','.join(header))}': "
            "write clip,identity into the first line, and separate columns by commas"
        )
    if not columns:
        columns, rows = [0, 1], itertools.chain([(number, header)] * bool(header), rows)
    for number, cells in rows:
        place = f"{path}: line {number}"
        if is_csv and (len(cells) <= max(columns) or any(cells[len(header) :])):
            raise UserError(
                f"{place}: the line must have as many values as line 1\n"
                'write names that contain a comma in double quotes: "Smith, John"'
            )
        if len(cells) <= max(columns):
            remedy = "write the clip, a tab and a name"
            if len(cells) == 1 and re.search("[;,]", cells[0]):
                remedy = "save the table with tabs between the columns, not commas or semicolons"
            raise UserError(f"{place}: the line lacks the clip or the identity\n{remedy}")
        clip, identity = (cells[column] for column in columns)
        yield place, clip if is_csv else clip.strip(), identity.strip()


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any, Any]]:
    for number, line in enumerate(files.read_input(path).splitlines(), 1):
        if line.strip():
            place, value = f"{path}: line {number}", None
            with contextlib.suppress(ValueError):
                value = files.parse_json(line)
            row = value if isinstance(value, dict) else {}
            titles = tables.find_columns(place, row, COLUMNS)
            if not titles:
                raise UserError(
                    f"{place} is not JSON of a clip and its identity\n"
                    'write {"clip": "NAME", "identity": "NAME"}'
                )
            yield place, *(row[title] for title in titles)


def refuse_no_file(path: Path) -> None:
    """Raises NoFileError if a path is not the path of a file."""
    if not path.is_file():
        problem = "is not a file" if files.is_present(path) else "does not exist"
        raise NoFileError(f"'{path}' {problem}: correct the path")


def clean_labels(
    rows: Iterable[tuple[str, Any, Any]], known_clips: Collection[str] = ()
) -> dict[str, str]:
    """Checks labels, and returns clip -> identity as text.

    A row is (place, clip, identity), where the place is a file and a line, for error messages. A
    clip whose identity is None, NaN or empty is left out. A warning counts the clips with NaN or an
    empty identity. Raises UserError if a clip has two identities, or if a name is not allowed. For
    `known_clips` see `load_ground_truth`.
    """
    pairs: dict[str, str] = {}
    places: dict[str, str] = {}
    empty, decimals = list[str](), list[str]()
    for place, clip, identity in rows:
        name = clean_name_at(place, clip)
        if name not in known_clips and (other := unescape(name)) in known_clips:
            name = other
        if identity is None:
            continue
        row, place = place, f"{place}: clip {show(name)}"
        if _is_missing(identity):
            empty.append(f"{place}: its identity is empty, so the clip shows no known person")
            continue
        text = _clean_person(place, identity)
        if isinstance(identity, (float, np.floating)) and text.isdecimal():
            decimals.append(f"{place}: its identity {identity!s} is read as {text}")
        if pairs.setdefault(name, text) != text:
            raise UserError(
                f"{place} has the labels {show(pairs[name])} and {show(text)}: delete one of them"
            )
        places.setdefault(text, row)
    for found, remedy in (
        (empty, "leave out these clips, or use None in Python"),
        (decimals, "write identities as text"),
    ):
        if found:
            warn(f"{found[0]} (such clips: {len(found):,})\nto avoid this warning, {remedy}")
    warn_of_changed(places)
    return pairs


def _clean_person(place: str, identity: object) -> str:
    """Returns an identity (text or a number) as text. The number 100.0 becomes `100`.

    Raises UserError, which begins with `place`, if the type or the name is not allowed.
    """
    if isinstance(identity, (float, np.floating)) and float(identity).is_integer():
        # Larger floats have lost digits. Their text is in scientific notation, with every numpy.
        exact = abs(identity) < 2 ** (np.finfo(type(identity)).nmant + 1)
        identity = int(identity) if exact else np.format_float_scientific(identity, trim="-")
    if not isinstance(identity, (str, int, np.integer)) or isinstance(identity, bool):
        kind = type(identity).__name__
        raise UserError(
            f"{place}: the identity is of type {kind}, but must be text or int\n"
            f"convert it with {'decode' if isinstance(identity, bytes) else 'str'}(), or use "
            "None if the clip shows no known person"
        )
    with prefix_errors(place):
        text = clean_identity(str(identity))
    if re.fullmatch("-[0-9]+", text):
        raise UserError(
            f"{place}: identity {text} is negative: leave out the clip if it shows no known person"
        )
    return text


def _is_missing(identity: object) -> bool:
    """Returns True if an identity is an empty text, NaN, or an empty cell of pandas."""
    return not identity if isinstance(identity, str) else str(identity) in ("nan", "<NA>", "NaT")


def find_ground_truth(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns split -> path of `{split}_gt.txt` in a directory, in the order train, val, test.

    Raises UserError if the name of such a file is probably misspelt.
    """
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
    `.mp4`, train_gt.txt is read as direct, and val_gt.txt and test_gt.txt as inverted. A blank in a
    name is written `%20`. If a name with `%20` is in `known_clips`, it is not changed. A warning
    appears if a program, such as a spreadsheet, has probably changed identities.

    Raises:
      UserError: the form of the file or of a line is unclear, a clip comes twice, or a name is not
        allowed. If most identities are whole numbers, all must be whole numbers above 0.
    """
    lines = read_truth(path, known_clips=known_clips)
    return {name: line.identity for line in lines for name in line.clips.values()}


class TruthLine(NamedTuple):
    """A line of a ground-truth file: its number, an identity, and the clips of this identity."""

    number: int  # counted from 1, including empty lines
    identity: str
    clips: dict[str, str]  # clip as it is written in the file -> clip without `.mp4`


def read_truth(
    path: str | os.PathLike[str], *, known_clips: Collection[str] = ()
) -> list[TruthLine]:
    """Returns the lines of a ground-truth file that are not empty. See `load_ground_truth`."""
    path, known = Path(path), frozenset(known_clips)
    rows = _read_lines(path, "NAME.mp4 ID")
    inverted = _is_inverted(path, [fields for _, fields in rows])
    lines: list[TruthLine] = []
    line_of_clip: dict[str, TruthLine] = {}
    line_of_identity: dict[str, int] = {}
    for number, fields in rows:
        with prefix_errors(f"{path}: line {number}"):
            identity, names = (fields[0], fields[1:]) if inverted else (fields[-1], fields[:-1])
            if any(map(has_ending, fields[:1] if inverted else fields[1:])):
                raise UserError(
                    "the clip is not in the same column as in the other lines\n"
                    "write NAME.mp4 ID in all lines, or ID NAME.mp4 ... in all lines"
                )
            identity = clean_identity(unescape(identity))
            if not inverted:
                _check_pair(fields, "identity, NAME.mp4 ID")
            elif not names:
                raise UserError(f"identity {show(identity)} has no clips: add clips, or delete it")
            first = line_of_identity.setdefault(identity, number)
            if inverted and first != number:
                raise UserError(f"identity {show(identity)} is already in line {first}: join both")
            lines.append(line := TruthLine(number, identity, {}))
            for text in names:
                name = _parse_clip(text, known)
                if other := line_of_clip.get(name):
                    raise UserError(
                        f"clip {show(name)} is already in line {other.number}, with the identity "
                        f"{show(other.identity)}: delete one of the two"
                    )
                line.clips[text], line_of_clip[name] = name, line
    _check_identities(path, lines)
    warn_of_changed({name: f"{path}: line {n}" for name, n in line_of_identity.items()})
    return lines


def _is_inverted(path: Path, lines: Sequence[Sequence[str]]) -> bool:
    """Returns True if the lines of a ground-truth file begin with identities instead of clips.

    `lines` has the words of each line. If neither the words nor the name of the file show which
    form the file has, raises UserError.
    """
    for fields in lines:
        for column, name in enumerate(fields):
            if has_ending(name):
                return column > 0
    if path.name not in [f"{split}_gt.txt" for split in SPLITS]:
        if any(len(fields) > 2 for fields in lines):
            return True
        # A clip has one identity, but an identity may have several clips.
        if len({fields[-1] for fields in lines}) < len(lines):
            return False
        raise UserError(
            f"{path}: no name ends in .mp4, so clips and identities cannot be distinguished\n"
            "rename the file to train_gt.txt if its lines are 'CLIP ID'\n"
            "rename it to val_gt.txt if its lines are 'ID CLIP CLIP ...'"
        )
    return path.name != "train_gt.txt"


def _check_pair(fields: Sequence[str], form: str) -> None:
    if len(fields) != 2:
        count = messages.count(len(fields), "word")
        raise UserError(f"the line has {count}, not 2: write a clip and its {form}")


def _parse_clip(text: str, known: Collection[str]) -> str:
    """Returns a clip name without `.mp4`. If the name is not in `known`, `%20` becomes a blank."""
    clean = clean_name(text)
    return clean if clean in known else clean_name(unescape(text))


def split_lines(text: str) -> list[str]:
    """Splits a text at the line ends of Linux, Windows and old Macs."""
    return re.split(r"\r\n|\r|\n", text)


def _read_lines(path: Path, form: str) -> list[tuple[int, list[str]]]:
    """Returns (line number, words) for each line of a text file that is not blank.

    `form` is an example of a line, which an error message shows.
    """
    refuse_no_file(path)
    data = files.read_input(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 text (byte {error.start}): save the file as UTF-8"
        ) from None
    numbered = enumerate(split_lines(text), 1)
    lines = [(number, line.split()) for number, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty: write one line per clip, '{form}'")
    return lines


def _is_integer(text: str) -> bool:
    # Python refuses to parse a number with thousands of digits.
    return re.fullmatch(r"[+-]?[0-9]{1,100}", text) is not None


def _check_identities(path: Path, lines: Sequence[TruthLine]) -> None:
    """Raises UserError if most identities are whole numbers, but one is a name or below 1."""
    if 2 * sum(len(x.clips) for x in lines if _is_integer(x.identity)) <= sum(
        len(line.clips) for line in lines
    ):
        return
    for line in lines:
        where = f"{path}: line {line.number}: identity {show(line.identity)}"
        if not _is_integer(line.identity):
            raise UserError(
                f"{where} is not a whole number, unlike most identities\n"
                "correct it, or give all identities names that are not numbers"
            )
        if int(line.identity) < 1:
            raise UserError(f"{where} is less than 1: renumber the identities from 1")


def load_clip_weights(path: str | os.PathLike[str], clips: Sequence[str]) -> np.ndarray:
    """Returns the weights of N clips, [N] float32, from a text file of lines `NAME.mp4 WEIGHT`.

    A clip that is not in the file has the weight 1. The suffix `.mp4` is optional.

    Raises:
      UserError: a weight is negative or not finite, a clip comes twice, or no clip in the
        file is in `clips`.
    """
    path = files.local(path)
    weights: dict[str, float] = {}
    known = frozenset(clips)
    line_of_clip: dict[str, int] = {}
    for number, fields in _read_lines(path, "NAME.mp4 WEIGHT"):
        with prefix_errors(f"{path}: line {number}"):
            _check_pair(fields, "weight, NAME.mp4 1")
            name = _parse_clip(fields[0], known)
            first = line_of_clip.setdefault(name, number)
            if first != number:
                raise UserError(f"clip {show(name)} is already in line {first}: delete one of them")
            weights[name] = np.nan
            with contextlib.suppress(ValueError):
                weights[name] = float(fields[1])
            if not 0 <= weights[name] <= float(np.finfo(np.float32).max):
                raise UserError(
                    f"weight {show(fields[1])} is not a finite number of 0 or more: correct it"
                )
    check_known(path, weights, clips)
    return np.array([weights.get(name, 1.0) for name in clips], np.float32)


def check_known(
    path: Path, named: Collection[str], clips: Collection[str], effect: str = "they are ignored"
) -> None:
    """Warns if a file names clips without features.

    `named` are the clips in the file `path`, and `clips` are the clips with features. `effect` says
    in the warning what happens to the clips without features. Raises UserError if no clip in the
    file has features.
    """
    known = frozenset(clips)
    unknown = [name for name in named if name not in known]
    if not unknown:
        return
    like = [name for name in known if normal_form(name) == normal_form(unknown[0])]
    if len(unknown) == len(named):
        form = ", in another Unicode form" * bool(like)
        raise UserError(
            f"{path}: none of its {len(named)} clips has features\n"
            f"the labels name {show(unknown[0])}, but the features belong to "
            f"{show(min(like or known))}{form}\nuse equal names in labels and features"
        )
    form = " (the features have this name in another Unicode form)" * bool(like)
    warn(
        f"{path}: {len(unknown)} of {len(named)} clips have no features, for example "
        f"{show(unknown[0])}{form}\n{effect}: remove these clips from {path.name}, or add features"
    )


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
        raise UserError(f"identity {value} is written in {count} ways, {spellings}: use only one")
    return tuple(sorted(distinct, key=int))
