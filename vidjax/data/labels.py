"""Reads labels of clips from ground-truth files, tables or dicts; maps them to class columns."""

import csv
import io
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax import files
from vidjax.data.folder_names import check_file, list_entries
from vidjax.data.ground_truth import (
    check_known,
    find_ground_truth,
    load_ground_truth,
    sort_identities,
)
from vidjax.data.untrusted.names import check_identity, clean_name_at, show
from vidjax.errors import NoFileError, UserError, check_argument, closest

TABLE = "labels.csv"
Truth = Mapping[str, Mapping[str, str]]  # labelled split -> clip -> identity
LabelSource = Mapping[str, Any] | str | Path | None  # clip -> identity, or a file of that


class SplitLabels(NamedTuple):
    """The labels of one split as class columns.

    Attributes:
      labels: [N] int32, column 1..C by clip index, or 0 for a distractor.
      labelled: False when the split has no ground truth at all.
      positives: [C] int64, number of clips that the ground truth lists for each identity, including
        clips without a record.
      num_others: number of identities in the ground truth that have no column.
    """

    labels: np.ndarray
    labelled: bool
    positives: np.ndarray
    num_others: int


def load_official_truth(
    directory: str | Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Reads the `{split}_gt.txt` files of a directory.

    Args:
      directory: the folder of the files.
      clips: split -> names of its clips.

    Returns:
      split -> clip -> identity, for the splits that have a file.

    Raises:
      ValueError: a file is malformed or does not fit the clips of its split.
    """
    truth = {}
    for split, path in find_ground_truth(directory).items():
        truth[split] = load_ground_truth(path, known_clips=clips.get(split))
        if split in clips:
            check_known(path, truth[split], clips[split])
    return truth


def load_folder_truth(
    folder: Path, clips: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Reads `labels.csv` of a folder, or else its ground-truth files.

    Args and returns are those of `load_official_truth`.

    Raises:
      ValueError: malformed labels, labels of unknown clips, or both kinds of files.
    """
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
    """Reads labels that do not say which split a clip is in.

    Args:
      labels: clip -> identity; or a file: `.csv` with the columns `clip` and `identity`, any other
        is ground truth in an official form. None for no labels.
      clips: split -> names of its clips.

    Returns:
      split -> clip -> identity, for the splits with a labelled clip.

    Raises:
      ValueError: malformed labels, or labels of unknown clips.
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


def label_splits(
    truth: Truth,
    clips: Mapping[str, Sequence[str]],
    identities: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], dict[str, SplitLabels]]:
    """Turns the labels of all splits into class columns.

    Args:
      truth: split -> clip -> identity.
      clips: split -> names of its clips, by clip index.
      identities: names of the columns 1..C; None for the identities of the train and val ground
        truth, with or without a clip.

    Returns:
      the identities, and split -> labels.
    """
    if identities is None:
        identities = sort_identities(
            identity for split in ("train", "val") for identity in truth.get(split, {}).values()
        )
    column = {identity: position for position, identity in enumerate(identities, 1)}
    labels = {}
    for split, names in clips.items():
        pairs = truth.get(split)
        columns = {name: column.get(identity, 0) for name, identity in (pairs or {}).items()}
        positives = np.bincount(list(columns.values()), minlength=len(identities) + 1)
        labels[split] = SplitLabels(
            labels=np.array([columns.get(name, 0) for name in names], np.int32),
            labelled=pairs is not None,
            positives=positives[1:].astype(np.int64),
            num_others=len(set((pairs or {}).values()) - column.keys()),
        )
        if positives[0]:
            warnings.warn(
                f"the labels of {split} name identities without a class column: "
                f"{positives[0]} clips",
                stacklevel=2,
            )
    return tuple(identities), labels


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
                yield f"{path}: line {table.line_num}:", row["clip"], row["identity"].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of UTF-8 text: {error}") from None


def _is_nan(value: object) -> bool:
    """Returns True for the NaN that stands for nothing in a column of pandas."""
    return isinstance(value, float) and value != value


def _clean_labels(rows: Iterable[tuple[str, Any, Any]]) -> dict[str, str]:
    """Returns clip -> identity from rows of place (the start of a message), clip and identity.

    It warns of clips whose identity is empty, which may be an oversight; None is said on purpose.
    """
    pairs: dict[str, str] = {}
    empty = []
    for place, clip, identity in rows:
        name = clean_name_at(place, clip)
        if identity is None:
            continue
        if identity == "" or _is_nan(identity):
            empty.append(f"{place} clip {show(name)}")
            continue
        place = f"{place} clip {show(name)}"
        if not isinstance(identity, (str, int, np.integer)) or isinstance(identity, bool):
            kind = type(identity).__name__
            raise UserError(
                f"{place}: an identity is text or int, not {kind}: use str(), or None for nobody"
            )
        text = str(identity)
        try:
            check_identity(text)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if re.fullmatch("-[0-9]+", text):
            raise UserError(
                f"{place}: identity {text} is negative: leave out clips of nobody on the list"
            )
        if pairs.setdefault(name, text) != text:
            raise UserError(f"{place} is labelled {show(pairs[name])} and {show(text)}")
    if empty:
        warnings.warn(
            f"{empty[0]}: {len(empty)} clips have an empty identity and count as nobody's\n"
            "if that is meant, leave out these clips, or give None in Python",
            stacklevel=3,
        )
    return pairs
