"""Writes, reads and scores submission files, which list the best 100 clips of each identity.

The organisers of the iQIYI-VID challenge define the format. White space separates names. So white
space within a name is escaped as in a URL: `First%20Last`. A `%` before two hexadecimal digits is
escaped, too.
"""

import codecs
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax.core import metrics
from vidjax.data.untrusted.names import check_name, escape, normal_form, show
from vidjax.evaluation.topk import MAX_NAMES, NO_CLIP, TopK
from vidjax.utils import files
from vidjax.utils.errors import UserError


def write_ranking(
    path: str | Path, identities: Sequence[str], clips: Sequence[str], top: TopK
) -> None:
    """Writes a ranking as a submission file, atomically.

    Each identity has a line `{identity} {clip}.mp4 {clip}.mp4 ...` with at most 100 clips, best
    first. If the name of a clip lacks `.mp4`, it is added. `top` has a row for each identity, with
    indices into `clips`. Names must be distinct, and valid as in `check_name`.
    """
    path = Path(path)
    files.write_text(path, to_text(path, identities, clips, top))


def to_text(path: Path, identities: Sequence[str], clips: Sequence[str], top: TopK) -> str:
    """Returns the text of a submission file. For the arguments see `write_ranking`."""
    index = np.asarray(top.index)[:, :MAX_NAMES]
    if len(index) != len(identities):
        raise UserError(
            f"{path}: there are {len(identities)} identities, but {len(index)} ranked lists\n"
            "give a list for each identity"
        )
    names = [clip.removesuffix(".mp4") + ".mp4" for clip in clips]
    _check_names(path, "clip", names)
    _check_names(path, "identity", identities)
    names = [escape(name) for name in names]
    lines = (
        " ".join((escape(identity), *(names[clip] for clip in row[row != NO_CLIP].tolist())))
        for identity, row in zip(identities, index, strict=True)
    )
    return "".join(f"{line}\n" for line in lines)


def _check_names(path: Path, kind: str, names: Sequence[str]) -> None:
    for name in names:
        try:
            check_name(name, kind)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    if len(set(names)) < len(names):
        repeated = next(name for name, count in Counter(names).items() if count > 1)
        text = f"{kind} '{show(repeated)}' is repeated: list each {kind} only once"
        raise UserError(f"{path}: {text}")


class Submission(NamedTuple):
    """The content of a submission file, as the scoring script of the challenge reads it."""

    ranking: dict[str, list[str]]  # identity -> at most 100 different clip names, best first
    # A sentence for each kind of fault: the first line with the fault, and the number of lines.
    complaints: list[str]


def read_submission(path: str | Path, *, identities: Collection[str] | None = None) -> Submission:
    """Reads a submission file as the scoring script of the challenge does, and lists its faults.

    | fault | how the script reads it |
    |---|---|
    | empty file or line | the line is skipped |
    | fields are not separated by a single space | the line is split at white space |
    | a name is repeated in a line | only the first place counts |
    | more than 100 different names | only the first 100 count |
    | an identity has a second line | the last line counts |
    | an identity is not in `identities` | it is not scored |
    | bytes are not UTF-8 text | a name with these bytes equals no other name |

    If `identities` is None, no identity counts as unknown.

    Source: the description of the script, for repeated names, the limit of 100 different names, and
    unknown identities. The other rows are our assumptions.
    """
    ranking: dict[str, list[str]] = {}
    first: dict[str, str] = {}  # kind of fault -> a sentence about the first line with this fault
    counts: Counter[str] = Counter()

    def note(kind: str, sentence: str) -> None:
        first.setdefault(kind, sentence)
        counts[kind] += 1

    number = 0
    for number, line in _read_lines(Path(path)):
        place, fields = f"{path}: line {number}", line.split()
        if not fields:
            note("empty line", f"{place}: the line is empty: delete it")
            continue
        if line != " ".join(fields):
            note("separators", f"{place}: fields are not separated by a single space: type one")
        if not _is_text(line):
            note("encoding", f"{place}: the line is not UTF-8 text: save the file as UTF-8")
        identity, given = normal_form(fields[0]), fields[1:]
        names = list(dict.fromkeys(given))
        if len(names) < len(given):
            repeated = next(name for name, count in Counter(given).items() if count > 1)
            text = f"'{show(repeated)}' is repeated: name each clip only once"
            note("repeated name", f"{place}: {text}")
        if len(names) > MAX_NAMES:
            note("too many", f"{place}: the line has {len(names)} clips: name at most {MAX_NAMES}")
        if identity in ranking:
            text = f"identity '{show(identity)}' already has a line: join both"
            note("second line", f"{place}: {text}")
        if identities is not None and identity not in identities:
            note(
                "unknown identity",
                f"{place}: identity '{show(identity)}' is not in the ground truth: correct the "
                "name, or delete the line",
            )
        ranking[identity] = names[:MAX_NAMES]
    if not number:
        note("empty file", f"{path}: the file is empty: write a line for each identity")
    more = {kind: f" ({n:,} lines have this fault)" if n > 1 else "" for kind, n in counts.items()}
    return Submission(ranking, [sentence + more[kind] for kind, sentence in first.items()])


def score(positives: Mapping[str, Sequence[str]], ranking: Mapping[str, Sequence[str]]) -> float:
    """Returns MAP@100 of a ranking, as the scoring script of the challenge computes it.

    `positives` is identity -> the clips that show the identity. `ranking` is identity -> its ranked
    clips, best first. An identity that is missing in `ranking` has an average precision of 0. An
    identity that is missing in `positives` is ignored. Names are compared as exact strings, because
    both files escape names in the same way.
    """
    columns = [column for column, clips in enumerate(positives.values(), 1) for _ in clips]
    clips = [clip for clips in positives.values() for clip in clips]
    rows = {clip: row for row, clip in enumerate(clips)}
    index = np.full((len(positives), MAX_NAMES), NO_CLIP, np.int64)
    for places, identity in zip(index, positives, strict=True):
        names = ranking.get(identity, [])
        places[: len(names)] = [rows.get(name, NO_CLIP) for name in names]
    counts = np.array([len(clips) for clips in positives.values()])
    return metrics.mean_average_precision(index, np.array(columns), counts)


def read_ground_truth(path: str | Path) -> dict[str, list[str]]:
    """Reads a ground truth file and returns identity -> the clips that show the identity.

    All lines have the form `NAME.mp4 ID`, or all lines have the form `ID NAME.mp4 NAME.mp4 ...`. In
    the second form, an identity has only one line. A clip must not be listed twice.
    """
    path = Path(path)
    rows: list[list[str]] = []  # the words of each line
    for number, line in _read_lines(path):
        place, fields = f"{path}: line {number}", line.split()
        if not fields:
            raise UserError(f"{place}: the line is empty: delete it")
        if not _is_text(line):
            raise UserError(f"{place}: the line is not UTF-8 text: save the file as UTF-8")
        if len(fields) < 2:
            raise UserError(
                f"{place}: the line has only one word, '{show(fields[0])}'\n"
                "write NAME.mp4 ID, or ID NAME.mp4 NAME.mp4 ..."
            )
        rows.append(fields)
    if not rows:
        raise UserError(f"{path}: the file is empty: name a file with lines NAME.mp4 ID")
    direct = _names_come_first(path, rows)
    positives: dict[str, list[str]] = {}
    line_of_clip: dict[str, int] = {}
    for number, fields in enumerate(rows, 1):
        place = f"{path}: line {number}"
        if direct and len(fields) > 2:
            raise UserError(f"{place}: the line has {len(fields)} fields: write 'NAME.mp4 ID'")
        identity, clips = (fields[1], fields[:1]) if direct else (fields[0], fields[1:])
        identity = normal_form(identity)
        if identity in positives and not direct:
            raise UserError(f"{place}: identity '{show(identity)}' already has a line: join both")
        for clip in clips:
            if clip in line_of_clip:
                raise UserError(
                    f"{place}: clip '{show(clip)}' is already in line {line_of_clip[clip]}\n"
                    "delete one of the two; the ground truth comes first: vidjax score GT RANKING"
                )
            line_of_clip[clip] = number
        positives.setdefault(identity, []).extend(clips)
    return positives


def _names_come_first(path: Path, lines: Sequence[Sequence[str]]) -> bool:
    """Returns True if the lines are `NAME ID`, and False if they are `ID NAME NAME ...`."""
    first = [fields[0] for fields in lines]
    others = [name for fields in lines for name in fields[1:]]
    for is_name in (lambda field: field.endswith(".mp4"), lambda field: not field.isdecimal()):
        if all(map(is_name, first)) != all(map(is_name, others)):
            return all(map(is_name, first))
    if len(others) > len(first):
        return False
    if len(set(others)) < len(others):
        return True
    raise UserError(
        f"{path}: names of clips cannot be distinguished from identities\n"
        "add .mp4 to the names of clips"
    )


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number and the text of every line. White space at the end of a line is removed.

    Bytes that are not UTF-8 become lone surrogates, so that `_is_text` recognises them.
    """
    with files.open_text(path) as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, text.decode(errors="surrogateescape").rstrip(" \t\r\n")


def _is_text(line: str) -> bool:
    """Returns False if the line has lone surrogates, which stand for bytes that are not UTF-8."""
    return re.search("[\udc80-\udcff]", line) is None
