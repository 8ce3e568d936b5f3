"""Sections of the report on single clips: their names, false alarms, mistaken identities, lists."""

from collections.abc import Iterator

from vidjax.report import html
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles
from vidjax.run import results

SCORES = "Scores are natural logarithms of probabilities: 0 is certain. "
LISTED = (
    "The first clips in the lists of the identities with the lowest, the median and the highest "
    "average precision."
)
DISTRACTOR = "a distractor"
RIGHT = "this identity"
NAMED = (
    "The clips with the highest scores, each with the identity that suits it best. Nothing here "
    "says whether a clip shows anybody known: a gallery of this run (<code>vidjax gallery "
    "create</code>) answers unknown where it does not."
)
NAMES_IN = "<code>{}</code> has the 100 best clips of every identity."


def names(run: RunFiles) -> Iterator[Html]:
    """Yields the clips of a split without ground truth with the names that the run gives them."""
    if not run.metrics or run.metrics.get("map") is not None:
        return
    named = run.analysis.get("named") or {"num": 0, "rows": []}
    rows = [
        (html.name(row["clip"]), html.name(run.identity(row["identity"])),
         html.number(row["score"]))
        for row in named["rows"]
    ]  # fmt: skip
    if rows:
        yield html.p(html.fill(NAMED))
        if run.analysis.get("logs"):
            yield html.note(SCORES)
        half = (len(rows) + 1) // 2
        head, caption = ("clip", "best identity", "score"), "Clips and their best identities"
        halves = [part for part in (rows[:half], rows[half:]) if part]
        yield html.tables(*(html.table(caption, head, part) for part in halves))
    if named["num"] > len(rows):
        more = html.number(named["num"] - len(rows))
        yield html.note(html.fill("{} more clips are ranked.", more))
    own_split = run.config.get("eval", {}).get("split", run.split)
    ranking = results.paths(run.folder, run.split, own_split).ranking
    yield html.note(html.fill(NAMES_IN, ranking.name))


def mistakes(run: RunFiles) -> Iterator[Html]:
    """Yields the mistakes with the highest scores, and the first clips of some lists."""
    wrong = run.analysis.get("wrong_clips", {})
    lists = run.analysis.get("lists", ())
    if run.analysis.get("logs") and (any(wrong.values()) or lists):
        yield html.note(SCORES)
    yield html.tables(*_wrong_clips(run))
    if lists:
        yield html.p(LISTED)
        yield html.tables(*_lists(run))


def _wrong_clips(run: RunFiles) -> Iterator[Html]:
    """Yields tables of the distractors and of the known clips with the highest wrong scores."""
    wrong = run.analysis.get("wrong_clips", {})
    alarms = [
        (html.name(row["clip"]), html.name(run.identity(row["identity"])),
         html.number(row["score"]))
        for row in wrong.get("distractors", ())
    ]  # fmt: skip
    if alarms:
        head = ("distractor", "taken for", "score")
        yield html.table("False alarms with the highest scores", head, alarms)
    others = [
        (html.name(row["clip"]), html.name(run.identity(row["shows"])),
         html.name(run.identity(row["identity"])), html.number(row["score"]))
        for row in wrong.get("known", ())
    ]  # fmt: skip
    if others:
        head = ("clip", "shows", "taken for", "score")
        yield html.table("Known clips that score highest for another identity", head, others)


def _lists(run: RunFiles) -> Iterator[Html]:
    """Yields a table for each of the kept lists."""
    for listed in run.analysis["lists"]:
        rows = []
        for row in listed["rows"]:
            if row["shows"] == listed["identity"]:
                shown = html.text(RIGHT)
            else:
                shown = html.name(DISTRACTOR if row["shows"] < 0 else run.identity(row["shows"]))
            rows.append((html.name(row["clip"]), html.number(row["score"]), shown))
        caption = html.fill(
            "{}: average precision {}, {} {}",
            html.name(run.identity(listed["identity"])),
            html.number(listed["ap"]),
            html.number(listed["clips"]),
            "clip" if listed["clips"] == 1 else "clips",
        )
        yield html.table(caption, ("clip", "score", "shows"), rows)
