"""The section of the report on newcomers: people whom PLDA was fitted without."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, LiteralString

from vidjax.report import html
from vidjax.report.analysis_sections import interval
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles

LEFT_OUT = (
    "{} of {} people were left out: centre and covariances were fitted to the clips of all others, "
    "with the settings of the run, which are not fitted anew. Then each was enrolled with some of "
    "their own training clips. Enrolling adds a clip to a count and a sum: nothing is trained. The "
    "last row is this run, which was fitted with all their clips."
)
INTERVALS = (
    "MAP is that of the newcomers alone, in a ranking of all clips. FNIR is the share of their {} "
    "clips that are missed or misnamed where the threshold lets a share of the {} distractors "
    "pass (FPIR). The 95 % intervals are from a bootstrap of {} resamples of the newcomers, and "
    "for FNIR of the distractors, the same ones for all rows; fewer than {} newcomers are too few "
    "for them."
)
# `reason` in the analysis -> sentence; others, of later versions, have no section.
REASONS: Mapping[str, LiteralString] = {
    "labels": "What newcomers reach is not measured: the split has no labels.",
    "data": "What newcomers reach is not measured: the training clips are not in this dataset.",
    "people": (
        "What newcomers reach is not measured: there are too few people to leave a tenth of them "
        "out of the fit."
    ),
    "run": (
        "What newcomers reach is not measured: it takes a run in which one member scores each "
        "clip, from all features, by config.eval.scores=log_softmax."
    ),
}
TOO_MANY = (
    "What newcomers reach is not measured: {} training and ranked clips would be read again, more "
    "than {}."
)


def newcomers(run: RunFiles) -> Iterator[Html]:
    """Yields what newcomers reach by their number of clips, and how far that is from the run."""
    found = run.analysis.get("newcomers")
    if not found:
        return
    if found.get("reason") == "clips":
        counts = (html.number(found[name]) for name in ("num_clips", "most_clips"))
        yield html.p(html.fill(TOO_MANY, *counts))
    elif found.get("reason") in REASONS:
        yield html.p(html.fill(REASONS[found["reason"]]))
    if not found.get("rows"):
        return
    counts = (html.number(found[name]) for name in ("num_newcomers", "num_identities"))
    yield html.p(html.fill(LEFT_OUT, *counts))
    yield html.tables(_reached(found), _gaps(found))
    names = ("num_known", "num_strange", "resamples", "fewest_identities")
    yield html.note(html.fill(INTERVALS, *(html.number(found[name]) for name in names)))


def _reached(found: Mapping[str, Any]) -> Html:
    rows = []
    for row in (*found["rows"], found["trained"]):
        clips = html.number(row["clips"], 2) if "shots" in row else html.Number("all")
        cells = [_shots(row), clips]
        for one in (row["map"], *row["fnir"]):
            cells += [html.number(one["value"]), *_bounds(found, one, "")]
        rows.append(cells)
    head = ("enrolled with", "clips on average", *_head(found))
    return html.table("What newcomers reach", head, rows)


def _gaps(found: Mapping[str, Any]) -> Html:
    rows = []
    for row in found["rows"]:
        cells = [_shots(row)]
        for one in (row["map"], *row["fnir"]):
            cells += [html.signed(one["gap"]), *_bounds(found, one, "gap_")]
        rows.append(cells)
    return html.table("Difference from the last row", ("enrolled with", *_head(found)), rows)


def _head(found: Mapping[str, Any]) -> Sequence[Html]:
    """Returns the titles of the columns of MAP and of FNIR at every rate, with intervals."""
    rates = (html.percent(one["rate"]) for one in found["trained"]["fnir"])
    names = ["MAP@100", *(html.fill("FNIR at FPIR {}", rate) for rate in rates)]
    between = [html.text("95 % interval")] if _has_bounds(found) else []
    return [title for name in names for title in (html.text(name), *between)]


def _has_bounds(found: Mapping[str, Any]) -> bool:
    return found["num_newcomers"] >= found["fewest_identities"]


def _bounds(found: Mapping[str, Any], one: Mapping[str, Any], prefix: str) -> Sequence[Html]:
    """Returns the cell with an interval; none where there are too few newcomers for one."""
    low, high = one.get(f"{prefix}low"), one.get(f"{prefix}high")
    return [interval(low, high)] if _has_bounds(found) else []


def _shots(row: Mapping[str, Any]) -> Html:
    if "shots" not in row:
        return html.text("trained with them")
    return html.fill("{} {}", html.number(row["shots"]), "clip" if row["shots"] == 1 else "clips")
