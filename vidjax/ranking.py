"""The submission file, which lists the best 100 clips of every identity.

`write_ranking` writes it, `load_ranking` reads it, and `python -m vidjax.ranking GT RANKING` scores
it. The lists themselves come from `vidjax.steps.topk`.
"""

import argparse
import codecs
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from vidjax import metrics
from vidjax.run import workdir
from vidjax.steps.topk import MAX_NAMES, NO_CLIP, TopK


def write_ranking(
    path: str | Path, identities: Sequence[str], clips: Sequence[str], top: TopK
) -> None:
    """Writes the submission file, whole or not at all.

    One line an identity, `{identity} {clip}.mp4 {clip}.mp4 ...`, best first, at most 100 clips.
    Every name ends in `.mp4` once, whether or not `clips` carry it.

    Args:
      path: the file to write or replace.
      identities: [C] names, in the order of the rows of `top`.
      clips: [N] names, in the order of the clip indices.
      top: the finished ranking; empty places are left out.

    Raises:
      ValueError: a name is empty, repeated or holds white space, or the rows are not C.
      OSError: the file cannot be written; what was at `path` before is intact.
    """
    path = Path(path)
    index = np.asarray(top.index)[:, :MAX_NAMES]
    if len(index) != len(identities):
        raise ValueError(f"{path}: {len(identities)} identities, {len(index)} ranked lists")
    names = [clip.removesuffix(".mp4") + ".mp4" for clip in clips]
    _check_names(path, "clip", names)
    _check_names(path, "identity", identities)
    lines = (
        " ".join((identity, *(names[clip] for clip in row[row != NO_CLIP].tolist())))
        for identity, row in zip(identities, index, strict=True)
    )
    workdir.write_text(path, "".join(f"{line}\n" for line in lines))


def _check_names(path: Path, what: str, names: Sequence[str]) -> None:
    """Raises ValueError for a name that a submission line could not hold."""
    for name in names:
        if name.split() != [name]:
            raise ValueError(f"{path}: {what} {name!r} is empty or holds white space")
    if len(set(names)) < len(names):
        repeated = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{path}: {what} {repeated!r} is repeated")


def load_ranking(
    path: str | Path, *, identities: Collection[str] | None = None
) -> dict[str, list[str]]:
    """Returns the submission at `path`: identity -> clip names, best first.

    CRLF, a byte order mark and trailing blanks are no faults.

    Args:
      path: a file as `write_ranking` writes it.
      identities: the known identities, any other being a fault; None knows them all.

    Raises:
      ValueError: with line numbers, in at most 3 lines: an empty line, fields that are not
        separated by single spaces, an identity that is repeated or unknown, a name that is
        repeated in its line, more than 100 names.
    """
    ranking, faults = _read_ranking(Path(path), identities)
    if faults:
        raise ValueError(_summary(faults))
    return ranking


def score_files(gt_path: str | Path, ranking_path: str | Path) -> float:
    """Returns MAP@100 of a submission, as the organisers' script computes it.

    What that script is known to bear is scored as it does: names that repeat in a line are dropped,
    first kept, before ranks are counted and before the 100 are; an identity that the submission
    lacks counts 0, one that the ground truth lacks is ignored; names match as exact strings.

    Args:
      gt_path: `NAME.mp4 ID` lines or `ID NAME.mp4 NAME.mp4 ...` lines.
      ranking_path: the submission.

    Raises:
      ValueError: with a line number. Of the submission: all that `load_ranking` refuses but names
        that repeat. Of the ground truth: an empty line, an identity that has two lines or no clip,
        a clip that is listed twice, a form that cannot be told.
    """
    positives = _read_ground_truth(Path(gt_path))
    ranking, _ = _read_ranking(Path(ranking_path))
    return _score(positives, ranking)


def _score(positives: dict[str, list[str]], ranking: dict[str, list[str]]) -> float:
    """Returns MAP@100 of identity -> ranked names against identity -> names that show it."""
    columns = [column for column, clips in enumerate(positives.values(), 1) for _ in clips]
    clips = [clip for clips in positives.values() for clip in clips]
    rows = {clip: row for row, clip in enumerate(clips)}
    index = np.full((len(positives), MAX_NAMES), NO_CLIP, np.int64)
    for places, identity in zip(index, positives, strict=True):
        names = ranking.get(identity, [])
        places[: len(names)] = [rows.get(name, NO_CLIP) for name in names]
    counts = np.array([len(clips) for clips in positives.values()])
    return metrics.mean_average_precision(index, np.array(columns), counts)


def _read_ranking(
    path: Path, identities: Collection[str] | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """Returns identity -> names without repeats, and the faults that a scorer can live with."""
    ranking: dict[str, list[str]] = {}
    faults = []
    for where, line in _read_lines(path):
        if "" in line.split(" ") or "\t" in line:
            raise ValueError(f"{where}: fields are not separated by single spaces")
        identity, *given = line.split(" ")
        names = list(dict.fromkeys(given))
        if len(names) < len(given):
            repeated = next(name for name, count in Counter(given).items() if count > 1)
            faults.append(f"{where}: {repeated!r} is repeated")
        if len(names) > MAX_NAMES:
            raise ValueError(f"{where}: {len(names)} names, at most {MAX_NAMES} are allowed")
        if identity in ranking:
            raise ValueError(f"{where}: identity {identity!r} has a line already")
        if identities is not None and identity not in identities:
            faults.append(f"{where}: identity {identity!r} is unknown")
        ranking[identity] = names
    return ranking, faults


def _read_ground_truth(path: Path) -> dict[str, list[str]]:
    """Returns identity -> the clips that show it, from either form."""
    lines = [(where, line.split()) for where, line in _read_lines(path)]
    for where, fields in lines:
        if len(fields) < 2:
            raise ValueError(f"{where}: {fields[0]!r} stands alone, without a positive")
    direct = _names_come_first(path, [fields for _, fields in lines])
    positives: dict[str, list[str]] = {}
    seen = set()
    for where, fields in lines:
        if direct and len(fields) > 2:
            raise ValueError(f"{where}: {len(fields)} fields where 'NAME.mp4 ID' is expected")
        identity, clips = (fields[1], fields[:1]) if direct else (fields[0], fields[1:])
        if identity in positives and not direct:
            raise ValueError(f"{where}: identity {identity!r} has a line already")
        for clip in clips:
            if clip in seen:
                raise ValueError(f"{where}: clip {clip!r} is listed twice")
            seen.add(clip)
        positives.setdefault(identity, []).extend(clips)
    return positives


def _names_come_first(path: Path, lines: Sequence[Sequence[str]]) -> bool:
    """Returns True for `NAME ID` lines, False for `ID NAME NAME ...` lines."""
    first = [fields[0] for fields in lines]
    others = [name for fields in lines for name in fields[1:]]
    for is_name in (lambda field: field.endswith(".mp4"), lambda field: not field.isdecimal()):
        if all(map(is_name, first)) != all(map(is_name, others)):
            return all(map(is_name, first))
    if len(others) > len(first):
        return False
    if len(set(others)) < len(others):
        return True
    raise ValueError(f"{path}: which field is the clip? Names that end in .mp4 would tell")


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ("path: line n", the line without its end and trailing blanks).

    Raises:
      ValueError: a line is empty or not UTF-8, or there is none.
    """
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()  # the end of the last line
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            text = line.decode().rstrip(" \t\r")
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8 text") from None
        if not text.strip(" \t"):
            raise ValueError(f"{where}: the line is empty")
        yield where, text


def _summary(faults: Sequence[str]) -> str:
    """Returns at most 3 lines about any number of faults."""
    return "\n".join(faults if len(faults) <= 3 else [*faults[:2], f"and {len(faults) - 2} more"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m vidjax.ranking GT RANKING` and returns the exit code.

    The last line of stdout is the score. A submission with faults that the organisers' script bears
    is scored as well, but the faults go to stderr and the exit code is 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vidjax.ranking",
        description="Validates a submission and prints its MAP@100, last on stdout.",
    )
    parser.add_argument("gt", metavar="GT", type=Path, help="'NAME.mp4 ID' or 'ID NAME.mp4 ...'")
    parser.add_argument("ranking", metavar="RANKING", type=Path, help="'ID NAME.mp4 NAME.mp4 ...'")
    arguments = parser.parse_args(argv)
    try:
        positives = _read_ground_truth(arguments.gt)
        ranking, faults = _read_ranking(arguments.ranking)
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        sys.stderr.write(f"{text}\n")
        return 2
    score = _score(positives, ranking)
    common = len(positives.keys() & ranking.keys())
    sys.stdout.write(
        f"{arguments.gt}: {len(positives)} identities, {sum(map(len, positives.values()))} clips\n"
        f"{arguments.ranking}: {common} of them ranked, {len(positives) - common} missing, "
        f"{len(ranking) - common} others ignored\n"
        f"MAP@{MAX_NAMES}\n{score:.17g}\n"
    )
    if faults:
        sys.stderr.write(f"{_summary(faults)}\n")
        return 2
    wanted = {clip for clips in positives.values() for clip in clips}
    given = {name for names in ranking.values() for name in names}
    if not common:
        sys.stderr.write(f"{arguments.ranking}: no identity of the ground truth is ranked\n")
    if wanted.isdisjoint(given):
        sys.stderr.write(
            f"{arguments.ranking}: no clip of the ground truth is ranked; suffix? "
            f"{min(wanted)!r} is in the one, {min(given, default='nothing')!r} in the other\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
