"""Sections of the report on the analysis of an evaluation (`analysis.npz`).

Every section is a function from `RunFiles` to parts of HTML. It yields nothing where the analysis
has nothing to show, and the page then leaves the section out.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from vidjax.report import figures, html
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles

LISTS = (
    "Clips lost to: the other identities whose lists rank the clips of this identity highest; "
    "'no list' if no list of 100 has the clip. Mixed with: the identities whose clips take the "
    "first places of the list, as many places as the identity has clips. The number of clips is in "
    "brackets."
)
STRATA = (
    "MAP of some identities, or of some clips. For a kind of clips, the other clips of the same "
    "identity are removed from its list; distractors and clips of other identities stay. "
    "The interval is of 95 %, from a bootstrap over the identities; a group of fewer than {} "
    "identities is too small for one."
)
ROBUSTNESS = (
    "MAP on a sample of {} clips, ranked among themselves, after every clip was changed in the "
    "same way."
)
TOO_FEW = "too few"


def identities(run: RunFiles) -> Iterator[Html]:
    """Yields the distribution of average precision, and a table of the worst identities."""
    if "ap" not in run.arrays:
        return
    values = np.sort(run.averages())[::-1]
    low, median = np.quantile(values, [0.1, 0.5]).tolist()
    perfect = float(np.mean(values == 1))
    yield html.p(
        html.fill(
            "{} of {} identities have an average precision of 1. "
            "The median is {}; 10 % are below {}.",
            html.percent(perfect, 1),
            html.number(len(values)),
            html.number(median, 3),
            html.number(low, 3),
        )
    )
    description = (
        f"{100 * perfect:.1f} % of {len(values):,} identities have an average precision of 1. "
        f"The median is {median:.3f}."
    )
    shown = figures.few(values)
    share = np.arange(1, len(values) + 1) / len(values)
    curve = figures.Plot(x="share of the identities", y="average precision")
    curve.axes.plot(share[shown], values[shown], color=figures.FIRST, marker=figures.marker(shown))
    curve.axes.set_ylim(0, 1.04)
    histogram = figures.Plot(x="average precision", y="identities")
    counts, edges = np.histogram(values, 20, (0, 1))
    histogram.axes.bar(edges[:-1], counts, 0.045, align="edge", color=figures.FIRST)
    histogram.count("y")
    yield html.figures(
        curve.html("sorted", "Average precision, identities in descending order", description),
        histogram.html("histogram", "Histogram of average precision", description),
    )
    yield html.tables(_worst_identities(run), html.note(LISTS))


def _worst_identities(run: RunFiles) -> Html:
    trained = run.arrays.get("train_clips")

    def names(pairs: Sequence[Sequence[int]], nobody: str) -> Html:
        words = [
            html.fill(
                "{} ({})", html.name(nobody if column < 0 else run.identity(column)),
                html.number(count),
            )
            for column, count in pairs
        ]  # fmt: skip
        return html.join(words, ", ") or html.text("nobody")

    rows = []
    for row in run.analysis["worst"]:
        cells = [html.name(run.identity(row["identity"])), html.bar(row["ap"])]
        cells.append(html.number(row["clips"]))
        if trained is not None:
            cells.append(html.number(int(trained[row["identity"]])))
        cells += [names(row["lost_to"], "no list"), names(row["mixed_with"], "distractors")]
        rows.append(cells)
    counts = ["clips"] if trained is None else ["clips", "trained on"]
    head = ("identity", "average precision", *counts, "clips lost to", "mixed with")
    return html.table(f"The {len(rows)} identities with the lowest average precision", head, rows)


def strata(run: RunFiles) -> Iterator[Html]:
    """Yields a table of MAP for every way to divide identities or clips into groups."""
    if "ap" not in run.arrays:
        return
    fewest = run.analysis.get("fewest_identities")
    if fewest is not None:
        yield html.p(html.fill(STRATA, html.number(fewest)))
    tables = []
    for table in run.analysis["strata"]:
        rows = []
        for row in table["rows"]:
            cells = [html.name(row["label"]), html.bar(row["map"])]
            if fewest is not None:
                cells.append(interval(row["low"], row["high"]))
            cells += [html.number(row["identities"]), html.number(row["clips"])]
            rows.append(cells)
        between = () if fewest is None else ("95 % interval",)
        head = (table["by"], "MAP@100", *between, "identities", "clips")
        tables.append(html.table(f"By {table['by']}", head, rows))
    yield html.tables(*tables)


def interval(low: float | None, high: float | None) -> Html:
    """Returns an interval as HTML, `too few` where there is none."""
    if low is None or high is None:
        return html.Number(html.text(TOO_FEW))
    return html.Number(html.fill("{} to {}", html.number(low, 3), html.number(high, 3)))


def robustness(run: RunFiles) -> Iterator[Html]:
    """Yields a table of MAP after changes to every clip, such as a missing modality."""
    changes = run.analysis.get("robustness")
    if not changes:
        return
    yield html.p(html.fill(ROBUSTNESS, html.number(run.analysis["num_sampled"])))
    unchanged = changes[0]["map"]
    rows = [
        (html.name(row["change"]), html.bar(row["map"]), html.signed(row["map"] - unchanged))
        for row in changes
    ]
    half = (len(rows) + 1) // 2
    halves = [part for part in (rows[:half], rows[half:]) if part]
    head = ("change", "MAP@100", "difference")
    yield html.tables(*(html.table("MAP of changed clips", head, part) for part in halves))
