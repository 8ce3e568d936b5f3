"""MAP@100 of two files in exact rational arithmetic: the oracle of the scorer.

It is written from the description of the organisers' script, shares nothing with the package, and
goes name by name, so that it can be read against the description:

    python tests/helpers/map_oracle.py GT RANKING
"""

import sys
from fractions import Fraction
from pathlib import Path


class Refused(Exception):
    """A ground truth that gives no score."""


def lines_of(path):
    """The lines of a file, without the marks that an editor leaves: BOM, CRLF, trailing blanks."""
    text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    return [line.rstrip(" \t") for line in text.removesuffix("\n").split("\n")]


def ground_truth(path):
    """Pairs (identity, set of clips), one for each identity."""
    lines = lines_of(path)
    if "" in lines:
        raise Refused(f"line {lines.index('') + 1} is blank")
    rows = [line.split() for line in lines]
    if any(len(row) < 2 for row in rows):
        raise Refused("an identity without a positive")
    direct = all(row[0].endswith(".mp4") for row in rows)
    direct = direct or (all(len(row) == 2 and row[1].isdigit() for row in rows))
    pairs = []
    if direct:
        if any(len(row) != 2 for row in rows):
            raise Refused("a clip with more than one label")
        for identity in sorted({row[1] for row in rows}):
            pairs.append((identity, [row[0] for row in rows if row[1] == identity]))
    else:
        pairs = [(row[0], row[1:]) for row in rows]
        if len({identity for identity, _ in pairs}) < len(pairs):
            raise Refused("an identity has two lines")
    listed = [clip for _, clips in pairs for clip in clips]
    if len(set(listed)) < len(listed):
        raise Refused("a clip is listed twice")
    return [(identity, set(clips)) for identity, clips in pairs]


def submission(path):
    """Identity -> its first 100 names without repeats; the last line of an identity counts."""
    ranking = {}
    for line in lines_of(path):
        if line.strip() == "":
            continue
        identity, *names = line.split()
        kept = []
        for name in names:
            if name not in kept and len(kept) < 100:
                kept.append(name)
        ranking[identity] = kept
    return ranking


def mean_average_precision(gt_path, ranking_path):
    """The score, an exact Fraction."""
    pairs, ranking = ground_truth(gt_path), submission(ranking_path)
    total = Fraction(0)
    for identity, positives in pairs:
        hits, precisions = 0, Fraction(0)
        for rank, name in enumerate(ranking.get(identity, []), start=1):
            if name in positives:
                hits += 1
                precisions += Fraction(hits, rank)
        total += precisions / len(positives)
    return total / len(pairs)


if __name__ == "__main__":
    sys.stdout.write(f"{float(mean_average_precision(*sys.argv[1:])):.17g}\n")
