"""A comparison of runs as text for the terminal, Markdown, CSV and a page of HTML."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from vidjax import metrics, significance, tables
from vidjax.report import html, run_page
from vidjax.significance import Difference

MAX_IDENTITIES = 20  # identities in a table of the page
HOLM = "p (Holm)"


class RankedRun(NamedTuple):
    """The results of a run on a split.

    Attributes:
      name: the folder, as the user gave it.
      identities: [C] names of those identities of the ground truth that the run knows.
      ap, positives: [C], their average precision and number of clips.
      num_others: identities of the ground truth that the run does not know.
      map_kind: the key `map_kind` of `metrics.json`: `val`, `out_of_fold` or `in_sample`.
      generated: name, size and seed of a generated dataset, empty for any other.
      seeds: of a group, the name and the MAP of each of its runs.
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
    config: Mapping[str, Any]
    seeds: tuple[tuple[str, float], ...] = ()


def mean_of(seeds: Sequence[RankedRun]) -> RankedRun:
    """Returns a group of seeds as one run: with the means of all that is measured."""
    first, kinds = seeds[0], [run.map_kind for run in seeds]
    measured: dict[str, Any] = {}
    for key in first.metrics:
        values = [run.metrics.get(key) for run in seeds]
        if all(map(_is_number, values)):
            measured[key] = float(np.mean(np.array(values, float)))
    return first._replace(
        name="+".join(run.name for run in seeds),
        ap=np.mean([run.ap for run in seeds], axis=0),
        map_kind=next((one for one in ("in_sample", "out_of_fold") if one in kinds), kinds[0]),
        metrics={k: x for k, x in first.metrics.items() if not _is_number(x)} | measured,
        seeds=tuple((run.name, float(run.ap.mean())) for run in seeds),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


Rows = list[list[str]]
# (key of `metrics.json`, label, digits) of the size and the time of a run.
COSTS = (
    ("num_members", "members", 0),
    ("num_params", "parameters of a member", 0),
    ("step", "steps", 0),
    ("seconds", "seconds in all", 1),
    ("train_clips_per_second", "training, clips per second", 0),
    ("eval_clips_per_second", "evaluation, clips per second", 0),
)


def difference_table(
    runs: Sequence[RankedRun], differences: Sequence[Difference]
) -> tuple[list[str], Rows]:
    """Returns head and rows of the table of MAP and its differences, as plain text."""
    head = ["run", "MAP@100", "difference", "95 % interval"]
    if not runs[0].seeds:
        head += ["p", HOLM] if len(differences) > 1 else ["p"]
    head += ["better", "worse", "equal"]
    rows = [[runs[0].name, f"{runs[0].ap.mean():.4f}", *[""] * (len(head) - 2)]]
    for run, gap in zip(runs[1:], differences, strict=True):
        ps = [gap.p] if len(differences) == 1 else [gap.p, gap.p_holm]
        ps = [p for p in ps if p is not None]
        rows.append(
            [
                run.name,
                f"{run.ap.mean():.4f}",
                f"{gap.mean:+z.4f}",
                f"{gap.low:+z.4f} to {gap.high:+z.4f}",
                *("< 0.001" if p < 0.001 else f"{p:.3f}" for p in ps),
                f"{gap.better:,}",
                f"{gap.worse:,}",
                f"{gap.equal:,}",
            ]
        )
    return head, rows


def metric_table(runs: Sequence[RankedRun]) -> tuple[list[str], Rows]:
    """Returns head and rows of the table of CLIP_METRICS, to which a user's file may add."""
    return value_table(runs, [(k, m.label, m.digits) for k, m in metrics.CLIP_METRICS.items()])


def value_table(
    runs: Sequence[RankedRun], labels: Sequence[tuple[str, str, int]]
) -> tuple[list[str], Rows]:
    """Returns head and rows of the table of `labels`, such as COSTS; no rows if no run has any."""
    head, columns = ["run"], [[run.name for run in runs]]
    for name, label, digits in labels:
        values = [run.metrics.get(name) for run in runs]
        if any(value is not None for value in values):
            head.append(label)
            columns.append(["none" if x is None else f"{x:z,.{digits}f}" for x in values])
    return head, [list(row) for row in zip(*columns, strict=True)] if head[1:] else []


def config_table(runs: Sequence[RankedRun]) -> tuple[list[str], Rows]:
    """Returns head and rows of the fields in which the configurations differ, as plain text."""
    every = [run_page.own_fields(run.config, run.metrics.get("overrides")) for run in runs]
    names = dict.fromkeys(name for values in every for name in values)
    rows = []
    for name in names:
        used = [
            values.get(name, "")
            for run, values in zip(runs, every, strict=True)
            if name in values or not run_page.is_joined(run.config)
        ]
        if len(set(used)) > 1:
            rows.append([name, *(values.get(name, "") for values in every)])
    return ["field", *short_names(runs)], rows


def sentences(runs: Sequence[RankedRun]) -> list[str]:
    """Returns sentences, as plain text, that state the data and the method of a comparison."""
    first = runs[0]
    text = [
        f"{len(first.identities):,} identities and {first.num_clips:,} clips of {first.split}. "
        f"Every run is compared with {first.name}.",
        f"{_method(runs)}, paired. "
        "Better, worse, equal: the number of identities by average precision.",
    ]
    if first.seeds:
        text.append(
            f"A run is the mean of {len(first.seeds)} seeds, paired in the order given. "
            "The interval is wide where few seeds vary more than the identities do; of two seeds "
            "it then holds the true difference in about 9 of 10 cases. "
            "The intervals are not corrected for the number of comparisons."
        )
    elif len(runs) > 2:
        text.append(
            f"{HOLM} is corrected for the number of comparisons. The intervals are not corrected."
        )
    if len(first.identities) < significance.FEWEST_IDENTITIES:
        text.append(
            f"With fewer than {significance.FEWEST_IDENTITIES} identities nothing is known of how "
            "often the interval holds the true difference."
        )
    if first.num_others:
        text.append(
            f"{first.num_others:,} identities of the ground truth that no run knows are left out."
        )
    return text + trained_on(runs)


def _method(runs: Sequence[RankedRun]) -> str:
    if runs[0].seeds:
        return f"Interval: {significance.METHOD_OF_SEEDS}"
    return f"Interval and p: {significance.METHOD}"


def trained_on(runs: Sequence[RankedRun]) -> list[str]:
    """Returns sentences on whether the runs were trained on the clips that they are compared on."""
    folds = [run.name for run in runs if run.map_kind == "out_of_fold"]
    known, text = in_sample(runs), []
    if not folds and not known:
        text.append("No run was trained on these clips.")
    if folds:
        score = f"{', '.join(folds)} {'scores' if len(folds) == 1 else 'score'}"
        text.append(f"Out of fold: {score} every clip by members that were not trained on it.")
    return text + known


def in_sample(runs: Sequence[RankedRun]) -> list[str]:
    """Returns a warning that names the runs that were trained on these clips; [] if none was."""
    known = [run.name for run in runs if run.map_kind == "in_sample"]
    were = f"{', '.join(known)} {'was' if len(known) == 1 else 'were'}"
    return [f"In sample: {were} trained on these clips: the MAP is too high."] if known else []


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
    clips = f"{first.num_clips:,} clips of {first.split}"
    others = f" ({first.num_others:,} that no run knows left out)" if first.num_others else ""
    title = f"{len(first.identities):,} identities{others}, {clips}; compared with {first.name}"
    return "\n".join([title, *(f"  {line}" for line in [*lines, *in_sample(runs)])])


def as_json(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> dict[str, Any]:
    """Returns the numbers of a comparison as JSON; each run but the first has its difference."""
    first = runs[0]
    rows: list[dict[str, Any]] = [
        {"run": run.name, "map": float(run.ap.mean()), "map_kind": run.map_kind} for run in runs
    ]
    for row, run in zip(rows, runs, strict=True):
        if run.seeds:
            row["seeds"] = [{"run": name, "map": value} for name, value in run.seeds]
    for row, gap in zip(rows[1:], differences, strict=True):
        numbers = gap._asdict()
        row |= {"difference": numbers.pop("mean"), **numbers}
    return {
        "split": first.split,
        "num_identities": len(first.identities),
        "num_others": first.num_others,
        "num_clips": first.num_clips,
        "level": significance.LEVEL,
        "method": significance.METHOD_OF_SEEDS if first.seeds else significance.METHOD,
        "runs": rows,
    }


def markdown(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> str:
    """Returns the comparison as Markdown."""
    parts = ["# Comparison", "", *_markdown_table(*difference_table(runs, differences))]
    for head, rows in (metric_table(runs), value_table(runs, COSTS), config_table(runs)):
        if rows:
            parts += ["", *_markdown_table(head, rows)]
    return "\n".join([*parts, "", *map(markdown_text, sentences(runs)), ""])


LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


def latex(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> str:
    """Returns the table of MAP and its differences for LaTeX with the package booktabs."""
    head, rows = difference_table([run._replace(name=n) for run, n in _by_name(runs)], differences)
    lines = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in [head, *rows]]
    body = "\n".join(lines[1:])
    note = "".join(f"% {line}\n" for text in sentences(runs) for line in text.splitlines())
    return (
        f"{note}\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n"
        f"{lines[0]}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
    )


def _by_name(runs: Sequence[RankedRun]) -> list[tuple[RankedRun, str]]:
    return list(zip(runs, short_names(runs), strict=True))


def _latex_cell(text: str) -> str:
    """Returns text for LaTeX; a signed number gets a real minus."""
    if re.fullmatch(r"[+-]\d[\d.]*( to [+-]\d[\d.]*)?", text):
        return re.sub(r"[+-]\d[\d.]*", lambda match: f"${match[0]}$", text)
    return html.plain(text).translate(LATEX).replace("<", r"$<$")


def markdown_text(text: str) -> str:
    """Joins the lines of a text and escapes it: Markdown finds no HTML, table, code or link."""
    return re.sub(r"([\\`|<>\[\]*_])", r"\\\1", " ".join(html.plain(text).splitlines()))


def _markdown_table(head: Sequence[str], rows: Rows) -> list[str]:
    lines = [head, *rows]
    first, *rest = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in lines]
    return [first, "| " + " | ".join(["---", *["---:"] * (len(head) - 1)]) + " |", *rest]


def csv_text(runs: Sequence[RankedRun]) -> str:
    """Returns a CSV file with a row per identity: clips, average precisions, differences."""
    names = short_names(runs)
    gaps = [f"{name} - {names[0]}" for name in names[1:]]
    rows: list[list[object]] = [["identity", "clips", *names, *gaps]]
    columns = [runs[0].identities, runs[0].positives.tolist(), *(run.ap.tolist() for run in runs)]
    for identity, clips, *values in zip(*columns, strict=True):
        rows.append([identity, clips, *values, *(value - values[0] for value in values[1:])])
    return tables.to_text(rows, ".csv")


def short_names(runs: Sequence[RankedRun]) -> list[str]:
    """Returns the last part of every run's path, or the whole paths where these are ambiguous."""
    last = ["+".join(Path(n).absolute().name for n in run.name.split("+")) for run in runs]
    return last if len(set(last)) == len(last) else [run.name for run in runs]


def page(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> str:
    """Returns the comparison as a page of HTML."""
    first, names = runs[0], short_names(runs)
    others = list(zip(runs[1:], names[1:], strict=True))
    head, rows = metric_table(runs)
    shown = [metric for metric in metrics.CLIP_METRICS.values() if metric.label in head]
    tables = [
        _table("Other metrics", head, rows),
        _table("Size and time", *value_table(runs, COSTS)),
    ]
    largest = {name: _largest_gaps(first, run, names[0], name) for run, name in others}
    parts = html.parts("comparison.html.j2")
    caption = f"MAP and its difference to {first.name}"
    contents = (
        ("summary", "Summary", parts.summary(
            table=_table(caption, *difference_table(runs, differences)),
            sentences=sentences(runs),
            parts=[_intervals(names, differences), *tables],
            explained=" ".join(f"{metric.label}: {metric.about}." for metric in shown),
        )),
        ("configuration", "Configurations", parts.configuration(
            html.table("Fields in which the configurations differ", *config_table(runs))
        )),
        ("identities", "Identities", parts.identities(
            drawn=[_sorted_gaps(f"sorted-{i}", run.ap - first.ap, names[0], name)
                      for i, (run, name) in enumerate(others)],
            equal=[name for name, table in largest.items() if not table],
            largest=[table for table in largest.values() if table],
        )),
    )  # fmt: skip
    return html.page(
        f"Comparison of {', '.join(names[:-1])} and {names[-1]}",
        contents,
        lead="",
        nav=False,
        footer="vidjax made this page from the results of these runs. It contains names of "
        "identities, and no features.",
    )


def _table(caption: str, head: Sequence[str], rows: Rows) -> Markup:
    cells = ([row[0], *map(html.Number.escape, row[1:])] for row in rows)
    return html.table(caption, head, cells)


def _intervals(names: Sequence[str], differences: Sequence[Difference]) -> Markup:
    plot = html.Plot(1.2 + 0.35 * len(differences), x="difference of MAP@100, 95 % interval")
    places = np.arange(len(differences))
    lows, highs = [gap.low for gap in differences], [gap.high for gap in differences]
    plot.axes.axvline(0, color=html.MUTED, linewidth=1)
    plot.axes.hlines(places, lows, highs, color=html.FIRST)
    plot.axes.plot([gap.mean for gap in differences], places, "o", color=html.FIRST)
    plot.axes.set_yticks(places, [html.short(name) for name in names[1:]])
    plot.axes.set_ylim(len(differences) - 0.5, -0.5)
    description = " ".join(
        f"{name}: {gap.mean:+z.4f}, from {gap.low:+z.4f} to {gap.high:+z.4f}."
        for name, gap in zip(names[1:], differences, strict=True)
    )
    return plot.html("gaps", f"Difference of MAP to {names[0]}", description)


def _sorted_gaps(key: str, gaps: np.ndarray, first: str, name: str) -> Markup:
    gaps = np.sort(gaps)[::-1]
    plot = html.Plot(x="share of the identities", y="difference of average precision")
    plot.axes.axhline(0, color=html.MUTED, linewidth=1)
    plot.curve(np.arange(1, len(gaps) + 1) / len(gaps), gaps)
    better, worse = (100 * np.mean(x > significance.EQUAL) for x in (gaps, -gaps))
    description = (
        f"{better:.1f} % of the identities are better with {name}, {worse:.1f} % are worse. "
        f"The differences go from {gaps[0]:+z.3f} to {gaps[-1]:+z.3f}."
    )
    return plot.html(key, f"{name} minus {first}, identities in descending order", description)


def _largest_gaps(first: RankedRun, run: RankedRun, own: str, other: str) -> Markup:
    gaps = run.ap - first.ap
    order = np.argsort(-np.abs(gaps), kind="stable")[:MAX_IDENTITIES]
    rows = []
    for i in order[np.abs(gaps[order]) >= significance.EQUAL]:
        both = html.bar(float(first.ap[i])), html.bar(float(run.ap[i]))
        clips = int(first.positives[i])
        rows.append((first.identities[i], clips, *both, html.signed(float(gaps[i]))))
    caption = f"The {len(rows)} identities with the largest difference for {other}"
    head = ("identity", "clips", own, other, "difference")
    return html.table(caption, head, rows)
