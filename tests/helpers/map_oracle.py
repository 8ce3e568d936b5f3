"""MAP@100 in exact fractions, with which tests compare `vidjax score`.

It follows the description of the organisers' script, and shares no code with vidjax.
"""

from fractions import Fraction
from pathlib import Path


def lines_of(path, encoding="utf-8-sig"):
    """Returns the lines of a text file, without a BOM, CR and blanks at the ends of lines."""
    text = Path(path).read_bytes().decode(encoding).replace("\r\n", "\n")
    return [line.rstrip(" \t") for line in text.removesuffix("\n").split("\n")]


def ground_truth(path):
    """Returns identity -> set of clips. A line has a clip and its identity, or the reverse."""
    rows = [line.split() for line in lines_of(path)]
    if any(len(row) < 2 for row in rows):
        raise ValueError("a blank line, or an identity without a positive")
    direct = all(row[0].endswith(".mp4") for row in rows)
    direct = direct or (all(len(row) == 2 and row[1].isdigit() for row in rows))
    if direct:
        if any(len(row) != 2 for row in rows):
            raise ValueError("a clip with more than one label")
        labels = {row[1] for row in rows}
        rows = [[label, *(row[0] for row in rows if row[1] == label)] for label in labels]
    if len({identity for identity, *_ in rows}) < len(rows):
        raise ValueError("an identity has two lines")
    listed = [clip for _, *clips in rows for clip in clips]
    if len(set(listed)) < len(listed):
        raise ValueError("a clip is listed twice")
    return {identity: set(clips) for identity, *clips in rows}


def submission(path):
    """Returns identity -> its different clips. The last line of an identity counts.

    A BOM belongs to the first identity.
    """
    ranking = {}
    for line in lines_of(path, "utf-8"):
        if line.strip():
            identity, *names = line.split()
            ranking[identity] = list(dict.fromkeys(names))
            if len(ranking[identity]) > 100:
                raise ValueError("a line has more than 100 names")
    return ranking


def mean_average_precision(gt_path, ranking_path):
    pairs, ranking = ground_truth(gt_path), submission(ranking_path)
    total = Fraction(0)
    for identity, positives in pairs.items():
        hits, precisions = 0, Fraction(0)
        for rank, name in enumerate(ranking.get(identity, []), start=1):
            if name in positives:
                hits += 1
                precisions += Fraction(hits, rank)
        total += precisions / len(positives)
    return total / len(pairs)
