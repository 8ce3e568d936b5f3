"""Answers of a gallery as a table for the terminal, or as a file, see `vidjax.tables`.

The columns of .tsv and .csv are clip, identity, probability, score, best_1, probability_1, ... A
line of .jsonl is {"clip", "identity", "probability", "score", "best": [...]}. The identity of an
unknown person is null, or an empty cell. The score is the logarithm of the probability; for a clip
without a usable frame it is -inf, in .jsonl null.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from vidjax import tables
from vidjax.gallery.calibration import Rule, Threshold
from vidjax.gallery.gallery import Answer

Answers = Mapping[str, Answer]  # clip -> answer
SHOWN = 3  # identities of a line of the table


def table(answers: Answers) -> list[str]:
    """Returns lines of text: clip, answer, and the best identities with their probabilities."""
    rows = [("clip", "identity", "most probable")]
    for clip, answer in answers.items():
        best = ", ".join(f"{name} {share(p)}" for name, p in answer.best[:SHOWN])
        rows.append((clip, answer.identity or "unknown", best or "no usable frame"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]


def share(value: float) -> str:
    """Returns a probability or a rate in per cent: 2 significant digits, from 99 % on 4."""
    percent = 100 * value
    if percent >= 99:
        return f"{percent:.4g} %" if percent < 99.99 else "> 99.99 %"
    return f"{percent:.2g} %" if percent >= 0.01 else "< 0.01 %"


def describe_rule(rule: Rule) -> dict[str, str]:
    """Returns label -> text of the rows that say when a clip gets a name."""
    chosen = " (nothing was chosen: --fpir=R or --threshold=P)" if rule.default else ""
    return {"named if": rule.about + chosen, **(describe(rule.found) if rule.found else {})}


def rule_as_json(rule: Rule) -> dict[str, object]:
    """Returns a rule, which says when a clip gets a name, as plain values for JSON."""
    score = rule.score if math.isfinite(rule.score) else None
    return {"by": rule.by, "score": score, "default": rule.default, "about": rule.about}


def describe(found: Threshold) -> dict[str, str]:
    """Returns label -> text of the rows that describe a threshold."""
    return {
        "threshold": f"{share(math.exp(min(found.score, 0.0)))} (logarithm {found.score:.6g})",
        "people": f"{found.num_identities:,}",
        "strangers": f"{found.num_strangers:,}, of whom {found.num_alarms:,} reach it",
        "rate": f"{share(found.low)} to {share(found.high)} at 95 % confidence",
    }


def write(path: Path, answers: Answers) -> None:
    """Writes answers to a new file, see `vidjax.tables.write`."""
    most = max((len(answer.best) for answer in answers.values()), default=0)
    columns = {"clip": "string", "identity": "string", "probability": "float64", "score": "float64"}
    for place in range(1, most + 1):
        columns |= {f"best_{place}": "string", f"probability_{place}": "float64"}
    tables.write(path, columns, _rows(answers, most), itertools.starmap(as_json, answers.items()))


def _rows(answers: Answers, most: int) -> Iterator[tuple[object, ...]]:
    for clip, answer in answers.items():
        best = [cell for pair in answer.best for cell in pair]
        empty = [None] * (2 * most - len(best))
        yield clip, answer.identity, answer.probability, answer.score, *best, *empty


def as_json(clip: str, answer: Answer) -> dict[str, object]:
    """Returns an answer as plain values for JSON."""
    return {
        "clip": clip,
        "identity": answer.identity,
        "probability": answer.probability,
        "score": answer.score if math.isfinite(answer.score) else None,
        "best": [{"identity": name, "probability": p} for name, p in answer.best],
    }
