"""Makes `report.html` for `eval.split` of a run, and a page for each other evaluated split.

A page needs no other file, no network and no script. To make a page, neither clips nor a model are
needed. A section of the page is made by a function that takes `RunFiles` and returns HTML. If the
function returns None, the section is left out.
"""

import functools
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import NullFormatter

from vidjax.data import sources
from vidjax.evaluation import comparison, significance
from vidjax.evaluation.report import html
from vidjax.runs import config as config_lib, results as results_lib, schemas
from vidjax.runs.run_folder import IDENTITIES, RunFolder
from vidjax.utils import files, json_files
from vidjax.utils.errors import UserError

Rows = list[tuple[object, ...]]

# Errors of the functions that make sections, if the files come from different evaluations.
MISFITS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
KINDS = {
    "out_of_fold": "out of fold: every clip is scored by members that were not trained on it",
    "in_sample": "in sample: the run was trained on clips that are scored, and MAP is too high",
}
NUM_SHOWN = 5  # results under the score; the others are in a table that a reader opens
NUM_BARS = 20  # of the histogram of average precisions
LOGARITHMS = "Scores are natural logarithms of probabilities: 0 is certain."


class RunFiles(NamedTuple):
    """The content of a run's files that a report shows. If a file is absent, its field is empty."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # the lines of `metrics.jsonl`, the metrics during training
    identities: list[str]
    other_metrics: dict[str, dict[str, Any]]  # split -> content of `metrics_<split>.json`
    split: str  # the evaluated split
    analysed: tuple[str, ...]  # the other splits that have an `analysis_<split>.npz`
    metrics: schemas.Metrics  # `metrics.json` as a struct
    values: Mapping[str, Any]  # `metrics.json` as a dict, which includes metrics that users added
    analysis: schemas.Analysis  # the values of `analysis.npz`
    arrays: Mapping[str, np.ndarray]  # the arrays of `analysis.npz`

    def identity(self, column: int) -> str:
        """Returns the name of an identity. `column` is its index in `identities`."""
        return self.identities[column] if column < len(self.identities) else "unknown"

    def averages(self) -> np.ndarray:
        """Returns the average precisions of the identities in the ground truth.

        For an identity that the run was not trained on, the average precision is 0.
        """
        averages = self.arrays["ap"][self.arrays["positives"] > 0]
        return np.concatenate([averages, np.zeros(self.analysis.num_others or 0)])


def title(run: RunFiles) -> str:
    """Returns the title of a page: the folder of the run, and the settings of its command.

    Settings that are already in the name of the folder are left out.
    """
    folder, added = run.folder.name, list[str]()
    for word in (run.metrics.command or "").replace("'", "").split():
        name, _, value = word.partition("=")
        if name == "--config":
            file, _, words = value.partition(":")
            added += [Path(file).stem, *filter(None, words.split(","))]
        elif name.startswith("--config.") and name[9:] not in config_lib.UNNAMED:
            added.append(word[9:])
    added = [text for text in added if text not in folder]
    return f"{folder}: {', '.join(added)}" if added else folder


def describe_system(run: RunFiles) -> str:
    """Returns a line of text with the model, the modalities and the data of a run."""
    section = run.config["data"] | run.values.get("data", {})
    named = {key: value for key, value in section.items() if value is not None}
    folder = Path(str(named.get("dir", ""))).name
    data = " ".join(filter(None, (sources.describe(named), folder))) or "unknown data"
    if joined := run.metrics.runs:
        return f"blend of {len(joined)} runs on {data}"
    model = str(run.config["model"].get("name", "no model"))
    members = run.metrics.num_members or 1
    count = f"{members} x " if members != 1 else ""
    return f"{count}{model} with {_join(run.config['modalities']) or 'no modality'} on {data}"


def summary(run: RunFiles) -> Markup:
    """Returns the MAP with its interval, tables of results and settings, and the command line."""
    parts = [_score(run)]
    if run.values and run.analysis.split is None:
        parts.append(html.paragraph("The evaluation was made without an analysis."))
    head, rows = ("result", "value", "95 % interval"), result_rows(run)
    tables = [
        html.table("Results", head, rows[:NUM_SHOWN]),
        html.table("The run", ("setting", "value"), run_rows(run)),
    ]
    own = comparison.list_fields(run.config, run.values)
    default = comparison.list_fields(config_lib.default().to_dict(), {})
    changed = comparison.make_config_table(("default", "this run"), (default, own))
    folded = [
        html.folded_table("All other results", head, rows[NUM_SHOWN:]),
        html.folded_table("Fields that differ from their defaults", *changed),
    ]
    others = [_split_row(run, *item) for item in run.other_metrics.items()]
    head = ("split", "MAP@100", "kind", "clips", "report")
    parts += [html.beside("tables", tables), *folded, html.table("Other evaluations", head, others)]
    if run.metrics.command:
        words = (Markup("<span>{}</span>").format(word) for word in run.metrics.command.split(" "))
        parts.append(html.paragraph("Command that repeats the run:"))
        parts.append(Markup("<pre><code>{}</code></pre>").format(Markup(" ").join(words)))
    return Markup().join(parts)


def _score(run: RunFiles) -> Markup:
    """Returns the MAP with its interval, or the reason why there is no MAP."""
    if not run.values:
        return html.paragraph("The run has no results yet: there is no metrics.json.")
    if run.metrics.map is None:
        reason = results_lib.explain_unmeasured(run.config, run.folder)
        words = "The split has no ground truth. So its clips are ranked, and there is no MAP."
        return html.paragraph(words + " Nothing is measured: {}." * bool(reason), reason)
    kind = run.metrics.map_kind or ""
    kind = f"{run.split} ({KINDS[kind]})" if kind in KINDS else kind
    between = ""
    if "ap" in run.arrays:
        interval = html.between(*significance.map_interval(run.averages()), 4)
        between = Markup(", 95 % interval {} ({})").format(interval, significance.METHOD)
    over = ""
    if run.metrics.num_map_identities:
        count = html.number(run.metrics.num_map_identities)
        over = Markup(", the mean of {} identities").format(count)
    words = Markup('<p class="lead">MAP@100 <strong>{}</strong> on {}{}{}</p>')
    return words.format(html.number(run.metrics.map), kind, over, between)


def _split_row(run: RunFiles, split: str, values: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the row of a split with its metrics `values`, for the table of evaluated splits."""
    page = f"report_{split}.html"
    linked = Markup('<a href="{}">{}</a>').format(quote(html.plain(page), safe=""), page)
    return (
        split,
        values.get("map"),
        Markup.escape(values.get("map_kind") or "no ground truth"),
        values.get("num_clips"),
        linked if split in run.analysed else Markup(),
    )


def result_rows(run: RunFiles) -> Rows:
    """Returns the rows (label, value, interval) of the results in `metrics.json`."""
    rows: Rows = []
    for row, value in results_lib.list_rows(run.values, "results"):
        interval = run.analysis.intervals.get(row.key)
        between = html.between(*interval, row.digits) if interval else html.Number()
        rows.append((row.label, html.number(value, row.digits), between))
    return rows


def run_rows(run: RunFiles) -> Rows:
    """Returns the rows (name, value as HTML) of the table of the settings of a run."""
    splits = () if run.metrics.runs else run.config["data"]["train_splits"]
    values = {**run.values, "train_splits": _join(splits)}
    return [
        (row.label, html.name(x) if isinstance(x, str) else html.number(x, row.digits))
        for row, x in results_lib.list_rows(values, "run")
    ]


def _join(values: Iterable[object] | None) -> str:
    return ", ".join(map(str, values or ()))


def reading(run: RunFiles) -> Markup | None:
    """Returns definitions of the terms of a report as HTML, or None if the run has no MAP."""
    return None if run.metrics.map is None else html.parts().terms()


def learning(run: RunFiles) -> Markup | None:
    """Returns HTML with curves of losses and scores by epoch, or None if no step was logged."""
    train = [line for line in run.lines if "learning_rate" in line]
    if not train:
        return None
    loss = _draw_curve(train, "train_loss", "Training loss", run.lines, "eval_loss", "loss")
    accuracy = "train_accuracy", "Training accuracy"
    scores = _draw_curve(train, *accuracy, run.lines, "map", "MAP@100")
    rate = _draw_curve(train, "learning_rate", "Learning rate")
    figures = html.beside("figures", [loss, scores, rate])
    bad_steps = sum(line.get("bad_steps", 0) for line in train)
    words = "{} steps were skipped: loss or gradient was not finite." * bool(bad_steps)
    return figures + html.paragraph(words, html.number(bad_steps, 0))


def _draw_curve(
    train: Sequence[Mapping[str, Any]],
    field: str,
    title: str,
    lines: Iterable[Mapping[str, Any]] = (),
    scored_field: str = "",
    scored_title: str = "",
) -> Markup:
    """Returns a figure as HTML: a curve of `field` by epoch, and a point for each evaluation.

    `train` and `lines` are lines of `metrics.jsonl`. All lines in `train` have `field`. Each line
    in `lines` that has `scored_field` gives a point. `title` and `scored_title` are labels.
    """
    x, y, last = _column(train, "epoch"), _column(train, field), train[-1]
    plot = html.Plot(x="epoch", y=title.lower())
    plot.curve(x, y, label="training")
    if field == "train_accuracy":
        plot.axes.set_ylim(0, 1.04)
    first, most, end = (f"{value:.3g}" for value in (y[0], y.max(), y[-1]))
    words = f"{title} starts at {first}, is {most} at most, and ends at {end}."
    if scored := [line for line in lines if scored_field in line]:
        values = _column(scored, scored_field)
        label = f"{scored_title} on {html.short(scored[-1].get('split', ''))}"
        epochs = _column(scored, "step") * last["epoch"] / max(last["step"], 1)
        plot.axes.plot(epochs, values, "o-", color=html.SECOND, ms=4, label=label)
        plot.legend()
        title = f"{title} and {label}"
        words += f" {label} ends at {values[-1]:.4g}, after {len(values)} evaluations."
    return plot.html(field, title, words)


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], float)


def identities(run: RunFiles) -> Markup | None:
    """Returns HTML about the average precision of each identity, or None if there is no MAP."""
    if "ap" not in run.arrays:
        return None
    values = run.averages()
    low, median = np.quantile(values, [0.1, 0.5]).tolist()
    perfect = float(np.mean(values == 1))
    words = html.paragraph(
        "{} of {} identities have an average precision of 1. The median is {}, and the 10 % "
        "quantile is {}.",
        html.number(perfect, 1, percent=True), html.number(len(values)), html.number(median, 3),
        html.number(low, 3),
    )  # fmt: skip
    counts, edges = np.histogram(values, NUM_BARS, (0, 1))
    plot = html.Plot(2.0, x="average precision", y="identities")
    plot.axes.stairs(counts, edges, color=html.FIRST, fill=True)
    plot.axes.locator_params("y", integer=True)
    description = (
        f"{counts[-1]:,} of {len(values):,} identities have an average precision of "
        f"{edges[-2]:.2f} or more, and {counts[0]:,} of less than {edges[1]:.2f}."
    )
    figure = plot.html("averages", "Identities by average precision", description)
    return words + html.beside("figures", [figure]) + _worst_identities(run)


def _worst_identities(run: RunFiles) -> Markup:
    trained = run.arrays.get("train_clips")

    def named(pairs: Sequence[tuple[int, int]], nobody: str) -> Markup:
        words = [
            Markup("{} ({})").format(
                html.name(nobody if column < 0 else run.identity(column)), html.number(count)
            )
            for column, count in pairs
        ]
        return Markup(", ").join(words) or Markup("nobody")

    rows = []
    for row in run.analysis.worst or ():
        if row.ap == 1:
            continue  # no mistakes
        counts = () if trained is None else (int(trained[row.identity]),)
        others = named(row.lost_to, "no list"), named(row.mixed_with, "distractors")
        rows.append((run.identity(row.identity), html.bar(row.ap), row.clips, *counts, *others))
    known = () if trained is None else ("trained on",)
    head = ("identity", "average precision", "clips", *known, "clips lost to", "mixed with")
    if not rows:
        return Markup()
    caption = f"The {len(rows)} identities with the lowest average precision"
    return html.table(caption, head, rows) + html.paragraph(
        "Clips lost to: clips of the identity that score highest for another identity. 'No list': "
        "the clip is not among the best 100 of its best identity. Mixed with: clips of other "
        "identities among the first n places of the list, where n is the number of clips of the "
        "identity. The numbers in brackets are numbers of clips."
    )


def mistakes(run: RunFiles) -> Markup | None:
    """Returns tables of the mistakes with the highest scores, or None if there are no mistakes."""
    wrong = run.analysis.wrong_clips or schemas.WrongClips()
    alarms = [(clip, *rest) for clip, _, *rest in _list_mistakes(run, wrong.distractors)]
    others = _list_mistakes(run, wrong.known)
    if not alarms and not others:
        return None
    head, caption = ("distractor", "taken for", "score"), "False alarms with the highest scores"
    tables = [html.table(caption, head, alarms)]
    caption = "Known clips that score highest for another identity"
    tables.append(html.table(caption, ("clip", "shows", *head[1:]), others))
    return html.paragraph(LOGARITHMS if run.analysis.logs else "") + html.beside("tables", tables)


def _list_mistakes(run: RunFiles, mistakes: schemas.Mistakes | None) -> Rows:
    """Returns rows (clip, person in the clip, person with the highest score, this score)."""
    return [
        (row.clip, run.identity(row.shows), run.identity(row.identity), row.score)
        for row in mistakes or ()
    ]


def errors(run: RunFiles) -> Markup | None:
    """Returns tables of confused identities and doubtful labels, or None if the run has no MAP."""
    pairs, suspects = run.analysis.pairs, run.analysis.suspects
    if pairs is None:
        return None
    return _confused_pairs(run, pairs) + (_suspects(run, suspects) if suspects else "")


def _confused_pairs(run: RunFiles, pairs: Sequence[schemas.ConfusedPair]) -> Markup:
    counted = {"clips": run.arrays.get("positives"), "trained on": run.arrays.get("train_clips")}
    known = {name: numbers for name, numbers in counted.items() if numbers is not None}

    def both(first: int, second: int) -> html.Number:
        return html.Number(Markup("{} + {}").format(html.number(first), html.number(second)))

    rows = [
        (
            run.identity(pair.first),
            run.identity(pair.second),
            both(*pair.counts),
            *(both(int(x[pair.first]), int(x[pair.second])) for x in known.values()),
        )
        for pair in pairs
        if sum(pair.counts) > 1  # a single clip may be chance
    ]
    if not rows:
        return html.paragraph(
            "No person has two clips that score highest for the same other person."
        )
    head = ("identity", "other identity", "confused clips", *known)
    return html.table("Pairs of identities that are confused most", head, rows) + html.paragraph(
        "Confused clips: clips of the first identity that score highest for the other identity, + "
        "clips of the other identity that score highest for the first."
    )


def _suspects(run: RunFiles, suspects: schemas.Suspects) -> Markup:
    rule = html.paragraph(
        "A label is suspected to be wrong if another identity has a probability of {} or more, and "
        "{} or more identities score above the label.",
        html.number(suspects.sure, 0, percent=True), html.number(suspects.above),
    )  # fmt: skip
    if not suspects.count:
        return rule + html.paragraph("No label is suspected.")
    words = html.paragraph(
        "Suspected labels: {}. Without their clips, the MAP of the {} identities that keep a clip "
        "changes by {} (95 % interval {}). The clips were chosen because the run contradicts their "
        "labels, so the gain is too high if some of the labels are right: look at the clips.",
        html.number(suspects.count), html.number(suspects.identities),
        html.number(suspects.gain, sign="+"), html.between(suspects.low, suspects.high, 4),
    )  # fmt: skip
    rows = _list_mistakes(run, suspects.clips)
    head = ("clip", "label", "best identity", "score")
    return rule + words + html.table("Suspected labels with the highest scores", head, rows)


def strata(run: RunFiles) -> Markup | None:
    """Returns tables of MAP by groups of identities and by groups of clips, or None without MAP."""
    if "ap" not in run.arrays:
        return None

    def interval(row: schemas.Stratum) -> Markup:
        if row.low is None or row.high is None:
            return html.Number("too few")
        return html.between(row.low, row.high, 3)

    tables = []
    for table in run.analysis.strata or ():
        rows = [
            (row.label, html.bar(row.map), interval(row), row.identities, row.clips)
            for row in table.rows
        ]
        head = (table.by, "MAP@100", "95 % interval", "identities", "clips")
        tables.append(html.table(f"By {table.by}", head, rows))
    words = html.paragraph(
        "MAP of groups of identities, and of groups of clips. For a group of clips, the other "
        "clips of an identity are removed from its list. Distractors and clips of other identities "
        "stay. The interval is from a bootstrap over the identities. Fewer than {} identities "
        "are too few for an interval.",
        html.number(run.analysis.fewest_identities),
    )
    return words + html.beside("tables", tables)


def open_set(run: RunFiles) -> Markup | None:
    """Returns the section on distractors and calibration, or None without histograms of scores."""
    if "score_edges" not in run.arrays:
        return None
    shown = {"score_edges": _score_histograms, "fpir": _errors, "calibration": _calibration}
    figures = [draw(run) for name, draw in shown.items() if name in run.arrays]
    parts = [html.beside("figures", figures)]
    if open_set := run.analysis.open_set:
        parts.append(_thresholds(run, open_set))
    absent = {
        "fpir": "There are no errors by threshold: the split has no distractor.",
        "calibration": "There is no calibration: the scores of this run are not probabilities.",
    }
    parts += [html.paragraph(words) for name, words in absent.items() if name not in run.arrays]
    return Markup().join(parts)


def _thresholds(run: RunFiles, open_set: schemas.OpenSet) -> Markup:
    share = functools.partial(html.number, percent=True)
    rows, notes = [], []
    words = "{} distractors are too few for a threshold at an FPIR of {}: {} or more are needed."
    for row in open_set.rates:
        if row.threshold is None:
            counts = html.number(open_set.num_strange), share(row.rate, 1), html.number(row.fewest)
            notes.append(html.paragraph(words, *counts))
            continue
        fpir = share(row.fpir, 2), html.between(row.fpir_low, row.fpir_high, 2, percent=True)
        fnir = share(row.fnir, 1), html.between(row.fnir_low, row.fnir_high, 1, percent=True)
        rows.append((share(row.rate, 1), html.number(row.threshold), *fpir, *fnir))
    counts = open_set.num_known, open_set.num_people, open_set.num_strange, open_set.num_identities
    words = (
        "{} clips of {} known people and {} distractors, each compared with {} identities. The "
        "best score of a distractor depends on the number of identities, so a gallery of this run "
        "sets its own threshold."
    )
    parts = [html.paragraph(words, *map(html.number, counts)), *notes]
    if not rows:
        return Markup().join(parts)
    head = ("FPIR wanted", "threshold", "FPIR", "95 % interval", "FNIR", "95 % interval")
    parts.append(html.table("Thresholds from which a clip is named", head, rows))
    if run.metrics.map_kind == "out_of_fold" and run.metrics.num_members != 1:
        words = (
            "Each of these clips was scored only by the members that were not trained on it. A new "
            "clip is scored by all members. The thresholds are too strict for a new clip."
        )
        parts.append(html.paragraph(words))
    words = (
        "The interval of FPIR is exact, from the beta distribution of the order statistic. The "
        "interval of FNIR is from {} bootstrap samples of the people and an unseen person, with "
        "all their clips, and of the distractors. Each sample has its own threshold. If fewer than "
        "four distractors pass, the interval is too narrow."
    )
    return Markup().join([*parts, html.paragraph(words, html.number(open_set.resamples))])


def _score_histograms(run: RunFiles) -> Markup:
    edges = run.arrays["score_edges"]
    unit = " (natural logarithm of a probability)" if run.analysis.logs else ""
    plot = html.Plot(x=f"best score of a clip{unit}", y="share of the clips")
    sentences = []
    for name, key, colour in (
        ("known people", "score_known", html.FIRST),
        ("distractors", "score_strange", html.SECOND),
    ):
        counts = run.arrays[key]
        if counts.sum():
            share = counts / counts.sum()
            plot.axes.stairs(share, edges, color=colour, label=name, linewidth=1.5)
            top = int(np.argmax(share))
            sentences.append(
                f"The most frequent score among {counts.sum():,} clips of {name} is "
                f"{edges[top]:.2f} to {edges[top + 1]:.2f}, "
                f"with {100 * share[top]:.0f} % of them."
            )
    plot.legend()
    heading = "Best scores of known clips and of distractors"
    return plot.html("best", heading, " ".join(sentences))


def _errors(run: RunFiles) -> Markup:
    fpir, fnir = run.arrays["fpir"], run.arrays["fnir"]
    drawn = fpir > 0
    if not fnir[drawn].any():
        return html.paragraph("No known clip is missed where a distractor passes.")
    plot = html.Plot(x="distractors that pass (FPIR)", y="known clips missed (FNIR)")
    plot.axes.plot(fpir[drawn], fnir[drawn], color=html.FIRST)
    plot.axes.set_xscale("log")
    plot.axes.xaxis.set_major_formatter(lambda x, place: f"{x:g}")
    plot.axes.xaxis.set_minor_formatter(NullFormatter())
    plot.axes.set_ylim(0, 1.02)
    nearest = int(np.argmin(np.abs(fpir - 0.01)))
    description = (
        f"Where {100 * fpir[nearest]:.1f} % of the distractors pass, "
        f"{100 * fnir[nearest]:.1f} % of the known clips are missed."
    )
    return plot.html("errors", "Known clips missed against distractors that pass", description)


def _calibration(run: RunFiles) -> Markup:
    error = run.analysis.calibration_error
    plot = html.Plot(x="probability of the best identity", y="share that is right")
    plot.axes.plot([0, 1], [0, 1], color=html.MUTED, linewidth=1, linestyle="--", label="perfect")
    bins = run.arrays["calibration"]
    _, confidence, right = bins[bins[:, 0] > 0].T
    plot.axes.plot(confidence, right, "o-", color=html.FIRST, ms=4, label="this run")
    plot.legend()
    caption = Markup(
        "Calibration: on average a probability is {} away from the share of clips that are right "
        "(the expected calibration error). A distractor is never right."
    ).format(html.number(error))
    description = f"The expected calibration error is {error:.3f}."
    return plot.html("trust", "Calibration of the probabilities", description, caption)


# Function that makes a section -> heading of the section.
SECTIONS: dict[Callable[[RunFiles], Markup | None], str] = {
    summary: "Summary",
    reading: "How to read it",
    learning: "Learning curves",
    identities: "Identities",
    mistakes: "Mistakes",
    errors: "Error analysis",
    strata: "Kinds of clips",
    open_set: "Distractors and calibration",
}


def write(folder: RunFolder) -> Path:
    """Writes `report.html` for `eval.split`, and a page for each other split that has an analysis.

    Returns the path of `report.html`.
    """
    run = load(folder)
    for split in run.analysed:
        paths = folder.paths(split, apart=True)
        files.write_text(paths.report, render(load(folder, split)))
    page = folder.paths().report
    files.write_text(page, render(run))
    return page


def render(run: RunFiles) -> str:
    """Returns a report as the text of an HTML page.

    If the files of the run come from different evaluations, raises UserError.
    """
    date = run.metrics.eval_date or run.metrics.date  # of the evaluation
    lead = [describe_system(run), f"evaluated on {run.split}", date]
    try:
        shown = [(make.__name__, heading, make(run)) for make, heading in SECTIONS.items()]
        return html.page(
            title(run),
            [(key, heading, content) for key, heading, content in shown if content],
            lead="; ".join(filter(None, lead)),
            footer="vidjax made this page from the files of the run. It contains names of clips "
            "and identities, and no features.",
        )
    except MISFITS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"'{run.folder}' contains results of different evaluations ({reason})\n"
            f"write them again: vidjax evaluate --workdir={shlex.quote(str(run.folder))}"
        ) from error


def load(folder: RunFolder, other: str | None = None) -> RunFiles:
    """Reads the files of a run for a report.

    `other` is the split of the report. None means `config.eval.split`, the split of the main page.
    """
    config, paths = folder.config, folder.paths(other, apart=bool(other))
    others, values = {} if other else folder.other_metrics(), folder.metrics(paths)
    analysis, arrays = folder.analysis(paths) or (schemas.Analysis(), {})
    return RunFiles(
        folder=folder.path,
        config=config.to_dict(),
        lines=[] if other else results_lib.read_lines(folder.path / "metrics.jsonl"),
        identities=folder.identities if folder.has(IDENTITIES) else [],
        other_metrics=others,
        split=other or config.eval.split,
        analysed=tuple(
            split for split in others if files.exists(folder.paths(split, apart=True).analysis)
        ),
        metrics=json_files.parse(paths.metrics, values, schemas.Metrics, results_lib.REMEDY),
        values=values,
        analysis=analysis,
        arrays=arrays,
    )
