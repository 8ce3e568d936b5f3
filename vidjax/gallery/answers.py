"""Answers of a gallery as a table for the eye, or as a file.

The ending of the file's name decides its format:

    .jsonl      an object per clip: {"clip", "identity", "probability", "score", "best": [...]}
    .tsv, .csv  a line per clip: clip, identity, probability, score, best_1, probability_1, ...;
                see `vidjax.tables`
    .parquet    the columns of .tsv; needs pyarrow

Where a clip is unknown, its identity is null in .jsonl and .parquet, and empty in .tsv and .csv.
The score is the logarithm of the probability; a clip without a usable frame has -inf, null in
.jsonl.
"""

import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from typing import Literal

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
    """Returns a probability or a rate in per cent, with two digits that count."""
    percent = 100 * value
    if percent >= 99:
        return f"{percent:.4g} %" if percent < 99.99 else "> 99.99 %"
    return f"{percent:.2g} %" if percent >= 0.01 else "< 0.01 %"


def describe_rule(rule: Rule) -> list[tuple[str, str]]:
    """Returns the rows (name, value) that tell when a clip gets a name."""
    chosen = " (nothing was chosen: --fpir=R or --threshold=P)" if rule.default else ""
    return [("named if", rule.about + chosen), *(describe(rule.found) if rule.found else [])]


def rule_as_json(rule: Rule) -> dict[str, object]:
    """Returns when a clip gets a name as plain values for JSON."""
    score = rule.score if math.isfinite(rule.score) else None
    return {"by": rule.by, "score": score, "default": rule.default, "about": rule.about}


def describe(found: Threshold) -> list[tuple[str, str]]:
    """Returns the rows (name, value) that tell of a threshold."""
    return [
        ("threshold", f"{share(math.exp(min(found.score, 0.0)))} (logarithm {found.score:.6g})"),
        ("people", f"{found.num_identities:,}"),
        ("strangers", f"{found.num_strangers:,}, of whom {found.num_alarms:,} reach it"),
        ("rate", f"{share(found.low)} to {share(found.high)} at 95 % confidence"),
    ]


def _columns(answers: Answers) -> dict[str, list[object]]:
    """Returns column -> a value for every clip."""
    most = max((len(answer.best) for answer in answers.values()), default=0)
    columns: dict[str, list[object]] = {
        "clip": list(answers),
        "identity": [answer.identity for answer in answers.values()],
        "probability": [answer.probability for answer in answers.values()],
        "score": [answer.score for answer in answers.values()],
    }
    for place in range(most):
        bests = [one.best[place] if place < len(one.best) else None for one in answers.values()]
        columns[f"best_{place + 1}"] = [best and best[0] for best in bests]
        columns[f"probability_{place + 1}"] = [best and best[1] for best in bests]
    return columns


def to_table(ending: Literal[".csv", ".tsv"], answers: Answers) -> bytes:
    """Returns answers as a table of commas or of tabs."""
    columns = _columns(answers)
    return tables.to_text([columns, *zip(*columns.values(), strict=True)], ending).encode()


def as_json(clip: str, answer: Answer) -> dict[str, object]:
    """Returns an answer as plain values for JSON."""
    return {
        "clip": clip,
        "identity": answer.identity,
        "probability": answer.probability,
        "score": answer.score if math.isfinite(answer.score) else None,
        "best": [{"identity": name, "probability": p} for name, p in answer.best],
    }


def to_jsonl(answers: Answers) -> bytes:
    """Returns answers as lines of JSON, one per clip."""
    lines = (json.dumps(as_json(*pair), ensure_ascii=False) for pair in answers.items())
    return "".join(f"{line}\n" for line in lines).encode()


def to_parquet(answers: Answers) -> bytes:
    """Returns answers as a parquet table."""
    import pyarrow
    from pyarrow import parquet

    columns = _columns(answers)
    named = ("clip", "identity", "best")
    kinds = [pyarrow.string() if n.startswith(named) else pyarrow.float64() for n in columns]
    arrays = [pyarrow.array(x, kind) for x, kind in zip(columns.values(), kinds, strict=True)]
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays, list(columns)), content)
    return content.getvalue()


FORMATS: Mapping[str, Callable[[Answers], bytes]] = {
    ".jsonl": to_jsonl,
    ".tsv": functools.partial(to_table, ".tsv"),
    ".csv": functools.partial(to_table, ".csv"),
    ".parquet": to_parquet,
}
