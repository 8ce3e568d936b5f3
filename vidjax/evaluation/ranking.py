"""Writes, reads and scores submission files, which list the best 100 clips of each identity.

The organisers of the iQIYI-VID challenge define the format. White space separates names. So white
space within a name is escaped as in a URL: `First%20Last`. A `%` before two hexadecimal digits is
escaped, too.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax.core import metrics
from vidjax.data import labels
from vidjax.evaluation.topk import MAX_NAMES, NO_CLIP, TopK
from vidjax.utils import files, tables
from vidjax.utils.errors import UserError, prefix_errors, warn
from vidjax.utils.names import (
    ENDING,
    check_name,
    clean_name,
    escape,
    normal_form,
    show,
    strip_ending,
    unescape,
)

TABLE_START = r'identity[,\t]rank[,\t]|{"identity": |PAR1'  # of the files of `vidjax rank`
BOM = "\ufeff"  # the byte order mark, with which some editors begin a file


def write_ranking(
    path: str | Path, identities: Sequence[str], clips: Sequence[str], top: TopK
) -> None:
    """Writes a ranking as a submission file, atomically.

    Each identity has a line `{identity} {clip}.mp4 {clip}.mp4 ...` with at most 100 clips, best
    first. If the name of a clip lacks `.mp4`, it is added. `top` has a row for each identity, with
    indices into `clips`. Names must be distinct, and `check_name` must accept them.
    """
    path = Path(path)
    files.write_text(path, to_text(path, identities, clips, top))


def to_text(path: Path, identities: Sequence[str], clips: Sequence[str], top: TopK) -> str:
    """Returns the text that `write_ranking` writes to a file. Messages of errors name `path`."""
    index = np.asarray(top.index)[:, :MAX_NAMES]
    if len(index) != len(identities):
        raise UserError(
            f"{path}: there are {len(identities)} identities, but {len(index)} ranked lists\n"
            "give a list for each identity"
        )
    names = [strip_ending(clip) + ENDING for clip in clips]
    _check_names(path, "clip", names)
    _check_names(path, "identity", identities)
    names = [escape(name) for name in names]
    lines = (
        " ".join((escape(identity), *(names[clip] for clip in row[row != NO_CLIP].tolist())))
        for identity, row in zip(identities, index, strict=True)
    )
    return "".join(f"{line}\n" for line in lines)


def write_lists(path: Path, ranking: tables.Ranking) -> None:
    """Writes a ranking, identity -> list of (clip, score), to the new submission file `path`."""
    clips = sorted({clip for pairs in ranking.values() for clip, _ in pairs})
    place = {clip: number for number, clip in enumerate(clips)}
    index = np.full((len(ranking), MAX_NAMES), NO_CLIP)
    for row, pairs in zip(index, ranking.values(), strict=True):
        row[: len(pairs)] = [place[clip] for clip, _ in pairs]
    text = to_text(path, [*ranking], clips, TopK(index, index))
    files.write_bytes(path, text.encode(), replace=False)


def _check_names(path: Path, kind: str, names: Sequence[str]) -> None:
    with prefix_errors(str(path)):
        for name in names:
            check_name(name, kind)
    if len(set(names)) < len(names):
        repeated = next(name for name, count in Counter(names).items() if count > 1)
        text = f"{kind} '{show(repeated)}' is repeated: list each {kind} only once"
        raise UserError(f"{path}: {text}")


class Submission(NamedTuple):
    """The ranking in a submission file, and the faults of the file. See `read_submission`."""

    ranking: dict[str, list[str]]  # identity -> at most 100 different clip names, best first
    # A sentence for each kind of fault: the first line with the fault, and the number of lines.
    complaints: list[str]


def read_submission(
    path: str | Path, *, positives: Mapping[str, Sequence[str]] | None = None
) -> Submission:
    """Reads a submission file as the scoring script of the challenge does, and lists its faults.

    | fault | how the script reads it |
    |---|---|
    | a line has more than 100 different clips | the file is refused, also by this function |
    | the file or a line is empty | the line is skipped |
    | fields are not separated by a single space | the line is split at white space |
    | lines end as on old Macs | the lines are split there, too |
    | a clip is repeated in a line | only the first place counts |
    | an identity has a second line | only the last line counts |
    | a byte order mark is before the first identity | the mark counts as a letter of the name |
    | an identity is not in `positives` | the identity is not scored |
    | a clip is spelled differently than in `positives` | the clip counts as a wrong answer |
    | bytes are not UTF-8 text | a name with these bytes equals no name in `positives` |

    `positives` is identity -> the clips that show the identity, as `read_ground_truth` returns
    it. If `positives` is None, the names in the file are not compared with the ground truth.

    Source: the rows about more than 100 clips, repeated names and unknown identities are from the
    description of the script. The other rows are our assumptions.

    Raises:
      UserError: a line has more than 100 different clips, or the file is a table of `vidjax rank`.
    """
    spellings = find_spellings(positives or {})
    clips = {_try_clean(text): clip for text, clip in spellings.items()}
    clean = functools.cache(_try_clean)
    ranking: dict[str, list[str]] = {}
    faults: dict[str, list[str]] = {}  # kind of fault -> a sentence about each line with this fault

    def note(kind: str, sentence: str) -> None:
        faults.setdefault(kind, []).append(sentence)

    number, text = 0, _read_text(Path(path))
    if re.match(TABLE_START, text):
        raise UserError(
            f"{path}: this is a table of vidjax rank, not a submission\n"
            "score the ranking.txt that vidjax evaluate writes"
        )
    if re.search(r"\r(?!\n)", text):
        note("line ends", f"{path}: lines end as on old Macs: save the file with Linux line ends")
    for number, line in enumerate(_split(text), 1):
        place, fields = f"{path}: line {number}", line.split()
        if not fields:
            note("empty line", f"{place}: the line is empty: delete it")
            continue
        for kind, problem in _find_faults(line, fields):
            note(kind, f"{place}: {problem}")
        identity, names = normal_form(unescape(fields[0])), list(dict.fromkeys(fields[1:]))
        if len(names) > MAX_NAMES:
            raise UserError(
                f"{place}: the line has {len(names)} clips, so the iQIYI-VID script refuses the "
                f"file: name at most {MAX_NAMES}"
            )
        if identity in ranking:
            text = f"identity '{show(identity)}' already has a line: join the lines"
            note("second line", f"{place}: {text}")
        if identity.startswith(BOM):
            note(
                "byte order mark",
                f"{place}: a byte order mark precedes identity '{show(identity[1:])}', so the "
                "iQIYI-VID script does not find this identity: save the file without the mark",
            )
        elif positives is not None and identity not in positives:
            note(
                "unknown identity",
                f"{place}: identity '{show(identity)}' is not in the ground truth: correct the "
                "name, or delete the line",
            )
        misspelt = (name for name in names if name not in spellings and clean(name) in clips)
        if name := next(misspelt, None):
            clip = clips[clean(name)]
            form = " in another Unicode form" * (normal_form(name) == normal_form(clip))
            note(
                "spelling",
                f"{place}: the iQIYI-VID script does not find '{show(name)}', because the ground "
                f"truth has '{show(clip)}'{form}: write the same name",
            )
        ranking[identity] = names
    if not number:
        note("empty file", f"{path}: the file is empty: write a line for each identity")
    complaints = [
        first + f" ({1 + len(others):,} lines have this fault)" * bool(others)
        for first, *others in faults.values()
    ]
    return Submission(ranking, complaints)


def _find_faults(line: str, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (kind, description) for each fault of a line. Needs no ground truth.

    `fields` are the words of the line: the identity and the clips.
    """
    if line != " ".join(fields):
        yield "separators", "fields are not separated by a single space: type one"
    if re.search("[\udc80-\udcff]", line):  # these letters stand for bytes that are not UTF-8
        yield "encoding", "the line is not UTF-8 text: save the file as UTF-8"
    if len({*fields[1:]}) < len(fields[1:]):
        repeated = next(name for name, count in Counter(fields[1:]).items() if count > 1)
        yield "repeated name", f"'{show(repeated)}' is repeated: name each clip only once"


def list_mismatches(
    path: str | Path, positives: Mapping[str, Sequence[str]], ranking: Mapping[str, Sequence[str]]
) -> list[str]:
    """Returns messages if a submission has no identity or no clip in common with the ground truth.

    `positives` is the ground truth, and `ranking` is the submission. Both are identity -> clips.
    `path` is the file of the submission, for the messages. Without a problem, returns [].
    """
    problems = list[str]()
    if positives.keys().isdisjoint(ranking):
        problems.append(
            f"{path} lists no identity of the ground truth: compare the identities of both"
        )
    true_clips = find_spellings(positives).keys()
    ranked_clips = {clip for clips in ranking.values() for clip in clips}
    if true_clips.isdisjoint(ranked_clips):
        problems.append(
            f"{path} lists no clip of the ground truth: compare the names of clips. The ground "
            f"truth has '{show(min(true_clips))}', the submission "
            f"'{show(min(ranked_clips, default='no clip'))}'"
        )
    return problems


def find_spellings(positives: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Returns all names under which a submission may list the clips of a ground truth.

    `positives` is identity -> clips. Returns a dict, name in a submission -> name in the ground
    truth. A clip has two names: the name in the ground truth, and the name that `write_ranking`
    writes for it. The two names differ if the ground truth lacks the ending `.mp4`, or writes a
    blank as `%20`.
    """
    spellings = {clip: clip for clips in positives.values() for clip in clips}
    for clip in [*spellings]:
        for name in (unescape(clip), clip):
            spellings.setdefault(escape(strip_ending(name)) + ENDING, clip)
    return spellings


def _try_clean(name: str) -> str:
    try:
        return normal_form(clean_name(unescape(name)))
    except UserError:
        return ""


def score(positives: Mapping[str, Sequence[str]], ranking: Mapping[str, Sequence[str]]) -> float:
    """Returns MAP@100 of a ranking, as the scoring script of the challenge computes it.

    `positives` is identity -> the clips that show the identity. `ranking` is identity -> its ranked
    clips, best first. An identity that is missing in `ranking` has an average precision of 0. An
    identity that is missing in `positives` is ignored. Names are compared as exact strings, except
    for the spellings in `find_spellings`.
    """
    spellings = find_spellings(positives)
    columns = [column for column, clips in enumerate(positives.values(), 1) for _ in clips]
    clips = [clip for clips in positives.values() for clip in clips]
    rows = {clip: row for row, clip in enumerate(clips)}
    index = np.full((len(positives), MAX_NAMES), NO_CLIP, np.int64)
    for places, identity in zip(index, positives, strict=True):
        names = dict.fromkeys(spellings.get(name, name) for name in ranking.get(identity, []))
        places[: len(names)] = [rows.get(name, NO_CLIP) for name in names]
    counts = np.array([len(clips) for clips in positives.values()])
    return metrics.mean_average_precision(index, np.array(columns), counts)


def read_ground_truth(path: str | Path) -> dict[str, list[str]]:
    """Returns identity -> the clips that show the identity, with names as written in the file.

    The file is read as for training, see `labels.load_ground_truth`. A warning appears if the
    scoring script of the challenge would read the file in another way. The script counts an empty
    line as an identity, and reads a byte order mark as a letter.
    """
    positives: dict[str, list[str]] = {}
    for line in labels.read_truth(path):
        positives.setdefault(line.identity, []).extend(line.clips)
    text = _read_text(Path(path))
    if text.startswith(BOM):
        warn(
            f"{path}: line 1: a byte order mark precedes '{show(text[1:].split()[0])}', so the "
            "iQIYI-VID script does not find this name: save the file without the mark"
        )
    lines = enumerate(_split(text.removeprefix(BOM)), 1)
    if empty := [number for number, line in lines if not line.strip()]:
        warn(
            f"{path}: line {empty[0]}: the line is empty, but the iQIYI-VID script counts it as "
            "an identity: delete it"
        )
    return positives


def _read_text(path: Path) -> str:
    """Reads a text. Bytes that are not UTF-8 become lone surrogates, which `_find_faults` finds."""
    return files.read_input(path).decode(errors="surrogateescape")


def _split(text: str) -> list[str]:
    """Returns all lines of a text, without white space at the end of a line."""
    lines = labels.split_lines(text)
    if not lines[-1]:  # the last line has a line end
        del lines[-1]
    return [line.rstrip(" \t") for line in lines]
