"""A comparison of runs as text for the terminal, Markdown, CSV and a page of HTML."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax import metrics
from vidjax.report import figures, html, significance
from vidjax.report.significance import Difference

MAX_IDENTITIES = 20  # identities in a table of the page
HOLM = "p (Holm)"


class RankedRun(NamedTuple):
    """The results of a run on a split.

    Attributes:
      name: the folder, as the user gave it.
      split: the name of the split.
      identities: [C] names of those identities of the ground truth that the run knows.
      ap: [C] float, their average precision.
      positives: [C] int, their number of clips.
      num_others: identities of the ground truth that the run does not know.
      map_kind: `val`, `out_of_fold` or `in_sample`.
      num_clips: the number of ranked clips.
      generated: name, size and seed of a generated dataset, empty for any other.
      metrics: `metrics.json` of the split.
    """

    name: str
    split: str
    identities: tuple[str, ...]
    ap: np.ndarray
    positives: np.ndarray
    num_others: int
    map_kind: str
    num_clips: int
    generated: str
    metrics: Mapping[str, Any]


Rows = list[list[str]]


def difference_table(
    runs: Sequence[RankedRun], differences: Sequence[Difference]
) -> tuple[list[str], Rows]:
    """Returns head and rows of the table of MAP and its differences, as plain text."""
    head = ["run", "MAP@100", "difference", "95 % interval", "p"]
    if len(differences) > 1:
        head.append(HOLM)
    head += ["better", "worse", "equal"]
    rows = [[runs[0].name, f"{runs[0].ap.mean():.4f}", *[""] * (len(head) - 2)]]
    for run, gap in zip(runs[1:], differences, strict=True):
        ps = [gap.p] if len(differences) == 1 else [gap.p, gap.p_holm]
        rows.append(
            [
                run.name,
                f"{run.ap.mean():.4f}",
                f"{gap.mean:+.4f}",
                f"{gap.low:+.4f} to {gap.high:+.4f}",
                *("< 0.001" if p < 0.001 else f"{p:.3f}" for p in ps),
                f"{gap.better:,}",
                f"{gap.worse:,}",
                f"{gap.equal:,}",
            ]
        )
    return head, rows


def metric_table(runs: Sequence[RankedRun]) -> tuple[list[str], Rows]:
    """Returns head and rows of the table of `metrics.CLIP_METRICS`; no rows where none is known."""
    names = [
        name
        for name in metrics.CLIP_METRICS
        if any(run.metrics.get(name) is not None for run in runs)
    ]
    if not names:
        return [], []
    rows = []
    for run in runs:
        values = [(run.metrics.get(name), metrics.CLIP_METRICS[name].digits) for name in names]
        cells = ["none" if value is None else f"{value:.{digits}f}" for value, digits in values]
        rows.append([run.name, *cells])
    return ["run", *(metrics.CLIP_METRICS[name].label for name in names)], rows


def sentences(runs: Sequence[RankedRun]) -> list[str]:
    """Returns sentences on the data and the method of a comparison, as plain text."""
    first = runs[0]
    kinds = sorted({run.map_kind.replace("_", " ") for run in runs})
    text = [
        f"{len(first.identities):,} identities and {first.num_clips:,} clips of {first.split} "
        f"(MAP: {', '.join(kinds)}). Every run is compared with {first.name}.",
        f"Interval and p: {significance.METHOD}, paired. "
        "Better, worse, equal: the number of identities by average precision.",
    ]
    if len(runs) > 2:
        text.append(
            f"{HOLM} is corrected for the number of comparisons. The intervals are not corrected."
        )
    if len(first.identities) < significance.FEW_IDENTITIES:
        text.append(
            f"With fewer than {significance.FEW_IDENTITIES} identities the interval is too narrow."
        )
    if first.num_others:
        text.append(
            f"{first.num_others:,} identities of the ground truth that no run knows are left out."
        )
    if "in sample" in kinds:
        text.append(
            "In sample: a run was trained on clips that are scored here. Its MAP is too high."
        )
    return text


def printed(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> str:
    """Returns the table for the terminal, without the uncorrected p if there is a corrected one."""
    head, rows = difference_table(runs, differences)
    if HOLM in head:
        uncorrected = head.index("p")
        for row in [head, *rows]:
            del row[uncorrected]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in [head, *rows]
    ]
    first = runs[0]
    title = (
        f"{len(first.identities):,} identities, {first.num_clips:,} clips of {first.split}; "
        f"compared with {first.name}"
    )
    return "\n".join([title, *(f"  {line}" for line in lines)])


def markdown(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> str:
    """Returns the comparison as Markdown."""
    parts = ["# Comparison", "", *_markdown_table(*difference_table(runs, differences))]
    head, rows = metric_table(runs)
    if rows:
        parts += ["", *_markdown_table(head, rows)]
    return "\n".join([*parts, "", *sentences(runs), ""])


def _markdown_table(head: Sequence[str], rows: Rows) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in cells]


def csv_text(runs: Sequence[RankedRun]) -> str:
    """Returns a CSV file with a row per identity: clips, average precisions, differences."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    names = short_names(runs)
    gaps = [f"{name} - {names[0]}" for name in names[1:]]
    writer.writerow(["identity", "clips", *names, *gaps])
    for i, (identity, clips) in enumerate(
        zip(runs[0].identities, runs[0].positives.tolist(), strict=True)
    ):
        values = [float(run.ap[i]) for run in runs]
        writer.writerow([identity, clips, *values, *(value - values[0] for value in values[1:])])
    return content.getvalue()


def short_names(runs: Sequence[RankedRun]) -> list[str]:
    """Returns the last part of every run's path, or the whole paths where these are ambiguous."""
    last = [Path(run.name).absolute().name for run in runs]
    return last if len(set(last)) == len(last) else [run.name for run in runs]


def page(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> str:
    """Returns the comparison as a page of HTML."""
    names = short_names(runs)
    title = html.text(f"{', '.join(names[:-1])} and {names[-1]}")
    sections = [
        ("summary", "Summary", _summary(runs, names, differences)),
        ("identities", "Identities", _by_identity(runs, names)),
    ]
    return html.page(
        f"Comparison of {title}",
        sections,
        footer="vidjax made this page from the results of these runs. It contains names of\n"
        "identities, and no features.",
    )


def _summary(
    runs: Sequence[RankedRun], names: Sequence[str], differences: Sequence[Difference]
) -> Iterator[str]:
    head, rows = difference_table(runs, differences)
    yield html.table(f"MAP and its difference to {runs[0].name}", head, _cells(rows))
    for sentence in sentences(runs):
        yield html.p(html.text(sentence))
    yield _intervals(names, differences)
    head, rows = metric_table(runs)
    if rows:
        yield html.table("Other metrics", head, _cells(rows))
        explained = [
            f"{metric.label}: {metric.about}."
            for metric in metrics.CLIP_METRICS.values()
            if metric.label in head
        ]
        yield html.note(html.text(" ".join(explained)))


def _cells(rows: Rows) -> Rows:
    return [[html.name(row[0]), *map(html.text, row[1:])] for row in rows]


def _intervals(names: Sequence[str], differences: Sequence[Difference]) -> str:
    """Returns a figure with the interval of every run's difference to the first."""
    plot = figures.Plot(1.2 + 0.35 * len(differences), x="difference of MAP@100, 95 % interval")
    places = np.arange(len(differences))
    lows, highs = [gap.low for gap in differences], [gap.high for gap in differences]
    plot.axes.axvline(0, color=figures.MUTED, linewidth=1)
    plot.axes.hlines(places, lows, highs, color=figures.FIRST)
    plot.axes.plot([gap.mean for gap in differences], places, "o", color=figures.FIRST)
    plot.axes.set_yticks(places, [figures.short(name) for name in names[1:]])
    plot.axes.set_ylim(len(differences) - 0.5, -0.5)
    description = " ".join(
        f"{name}: {gap.mean:+.4f}, from {gap.low:+.4f} to {gap.high:+.4f}."
        for name, gap in zip(names[1:], differences, strict=True)
    )
    return plot.html("gaps", f"Difference of MAP to {names[0]}", description)


def _by_identity(runs: Sequence[RankedRun], names: Sequence[str]) -> Iterator[str]:
    first = runs[0]
    others = list(zip(runs[1:], names[1:], strict=True))
    yield html.side_by_side(
        *(_sorted_gaps(f"sorted-{i}", run.ap - first.ap, names[0], name)
          for i, (run, name) in enumerate(others))
    )  # fmt: skip
    for run, name in others:
        rows = _largest_gaps(first, run)
        if rows:
            caption = f"The {len(rows)} identities with the largest difference for {name}"
            head = ("identity", "clips", names[0], name, "difference")
            yield html.table(caption, head, rows)
        else:
            yield html.p(html.text(f"{name} has the same average precision for every identity."))
    yield html.note("<code>comparison.csv</code> lists all identities.")


def _sorted_gaps(key: str, gaps: np.ndarray, first: str, name: str) -> str:
    """Returns a figure of the differences of average precision in descending order."""
    gaps = np.sort(gaps)[::-1]
    shown = figures.few(gaps)
    share = np.arange(1, len(gaps) + 1) / len(gaps)
    plot = figures.Plot(x="share of the identities", y="difference of average precision")
    plot.axes.axhline(0, color=figures.MUTED, linewidth=1)
    plot.axes.plot(share[shown], gaps[shown], color=figures.FIRST)
    better = float(np.mean(gaps > significance.EQUAL))
    worse = float(np.mean(gaps < -significance.EQUAL))
    description = (
        f"{html.percent(better, 1)} of the identities are better with {name}, "
        f"{html.percent(worse, 1)} are worse. "
        f"The differences go from {gaps[0]:+.3f} to {gaps[-1]:+.3f}."
    )
    return plot.html(key, f"{name} minus {first}, identities in descending order", description)


def _largest_gaps(first: RankedRun, run: RankedRun) -> Rows:
    """Returns the rows of the identities whose average precision differs most, as HTML cells."""
    gaps = run.ap - first.ap
    order = np.argsort(-np.abs(gaps), kind="stable")[:MAX_IDENTITIES]
    return [
        [
            html.name(first.identities[i]),
            html.number(int(first.positives[i])),
            html.bar(float(first.ap[i])),
            html.bar(float(run.ap[i])),
            f"{gaps[i]:+.4f}",
        ]
        for i in order[np.abs(gaps[order]) >= significance.EQUAL]
    ]
