"""The report of a run: `report.html`, and one page per other split, from the files of its folder.

A page needs no other file, no network and no script. No data is read, and no model is run. A
section is a function of `RunFiles`: it returns the facts that the macro of the same name in
`sections.html.j2` puts into sentences, or None to leave the section out.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from vidjax import config as config_lib
from vidjax import config_io, files, metrics, significance
from vidjax.data import sources
from vidjax.errors import UserError
from vidjax.report import html
from vidjax.run import formats
from vidjax.run import results as results_lib

Facts = dict[str, Any]
Rows = list[tuple[object, ...]]

MAX_MEMBERS = 60  # rows in the table of members
IDENTITY_TOLERANCE = 0.005  # attention that differs less from the unit matrix is said in words
MISFITS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
JOIN_FIELDS = ("join.", "eval.")  # starts of the names of fields that a joined run uses
KINDS = {
    "out_of_fold": "out of fold: every clip is scored by members that were not trained on it",
    "in_sample": "in sample: the run was trained on clips that are scored, and MAP is too high",
}


class RunFiles(NamedTuple):
    """The content of a run's folder; a field is empty where its file is absent.

    Attributes:
      lines: the lines of `metrics.jsonl`.
      identities: the names of class columns 1..C.
      other_metrics: split -> `metrics_<split>.json`, for splits other than the run's own.
      split: the split that the metrics and the analysis are of.
      analysed: the other splits that have an `analysis_<split>.npz`.
      metrics, values: `metrics.json` as a struct, and as a dict, with metrics that users added.
      analysis, arrays: the values and the arrays of `analysis.npz`.
    """

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    identities: list[str]
    data: formats.DataReport
    other_metrics: dict[str, dict[str, Any]]
    split: str
    analysed: tuple[str, ...]
    metrics: formats.Metrics
    values: Mapping[str, Any]
    analysis: formats.Analysis
    arrays: Mapping[str, np.ndarray]
    analysed_split: bool

    def identity(self, column: int) -> str:
        """Returns the name of an identity, given its place in `identities`."""
        return self.identities[column] if column < len(self.identities) else "unknown"

    def averages(self) -> np.ndarray:
        """Returns the average precision of each identity of the ground truth, 0 for unknown."""
        averages = self.arrays["ap"][self.arrays["positives"] > 0]
        return np.concatenate([averages, np.zeros(self.analysis.num_others or 0)])


def title(run: RunFiles) -> str:
    """Returns what a run is: its model, modalities and data."""
    data = _data_of(run) or "unknown data"
    if is_joined(run.config):
        return f"{len(run.config['join']['runs'])} runs joined on {data}"
    model = str(run.config.get("model", {}).get("name", "no model"))
    members = run.metrics.num_members or 1
    count = f"{members} x " if members != 1 else ""
    return f"{count}{model} with {_listed(run.config.get('modalities')) or 'no modality'} on {data}"


def lead(run: RunFiles) -> str:
    """Returns a line on a run: its folder, its splits and its date."""
    words = [f"Folder {run.folder.name}", f"evaluated on {run.split or 'nothing'}"]
    if not is_joined(run.config):
        words.insert(1, f"trained on {_trained_on(run) or 'nothing'}")
    return "; ".join([*words, *([run.metrics.date] if run.metrics.date else [])])


def summary(run: RunFiles) -> Facts:
    """Returns MAP with its interval, tables of results and settings, and the command."""
    kind = run.metrics.map_kind or ""
    interval = significance.map_interval(run.averages()) if "ap" in run.arrays else None
    others = [_split_row(run, *item) for item in run.other_metrics.items()]
    head = ("split", "MAP@100", "kind", "clips", "report")
    analysed = run.analysis.results
    return {
        "unmeasured": results_lib.unmeasured(run.config, run.data),
        "kind": f"{run.split} ({KINDS[kind]})" if kind in KINDS else kind,
        "interval": interval,
        "method": significance.METHOD,
        "differs": run.analysed_split and (analysed and analysed.map) != run.metrics.map,
        "tables": [
            html.table("Results", ("result", "value"), result_rows(run.values)),
            html.table("The run", ("setting", "value"), run_rows(run)),
        ],
        "others": html.table("Other evaluated splits", head, others),
    }


def _split_row(run: RunFiles, split: str, values: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the cells of another evaluated split, with a link to its page if it has one."""
    page = f"report_{split}.html"
    linked = Markup('<a href="{}">{}</a>').format(quote(html.plain(page), safe=""), page)
    return (
        split,
        values.get("map"),
        Markup.escape(values.get("map_kind") or "no ground truth"),
        values.get("num_clips"),
        linked if split in run.analysed else Markup(),
    )


def result_rows(values: Mapping[str, Any]) -> Rows:
    """Returns name and value of the results in a `metrics.json`."""
    labels = [
        *((name, f"{m.label}: {m.about}", m.digits) for name, m in metrics.CLIP_METRICS.items()),
        ("num_clips", "ranked clips", 0),
        ("num_identities", "identities", 0),
        ("num_distractors", "distractors", 0),
        ("num_ties", "places in lists that only names decide: equal scores", 0),
        ("eval_clips_per_second", "clips per second of evaluation", 0),
        ("eval_seconds", "seconds of the evaluation", 1),
        ("train_clips_per_second", "clips per second of training steps (median)", 0),
        ("train_seconds", "seconds of training steps, with compilation", 1),
        ("seconds", "seconds in all: start, data, training, evaluations", 1),
    ]
    return _labelled(values, labels)


def _labelled(values: Mapping[str, Any], labels: Sequence[tuple[str, str, int]]) -> Rows:
    """Returns rows of those values that are there; labels are (key, label, digits)."""
    return [
        (html.block(label), html.number(values[key], digits))
        for key, label, digits in labels
        if values.get(key) is not None
    ]


def run_rows(run: RunFiles) -> Rows:
    """Returns name and value of the settings of a run."""
    settings = [
        ("data", _data_of(run)),
        ("data digest", (run.metrics.data and run.metrics.data.digest) or ""),
        ("evaluated on", run.split),
        ("scored with", results_lib.describe_overrides(run.values)),
        ("finished", run.metrics.date or ""),
        ("evaluated", run.metrics.eval_date or ""),
    ]
    if not is_joined(run.config):
        trained = [("trained on", _trained_on(run)),
                   ("modalities", _listed(run.config.get("modalities")))]  # fmt: skip
        settings[2:2] = trained
    found: Rows = [(name, html.name(value)) for name, value in settings if value]
    labels = [
        ("seed", "seed", 0),
        ("step", "steps", 0),
        ("best_map", "best MAP@100 in training", 4),
        ("num_members", "members", 0),
        ("num_params", "parameters of a member", 0),
    ]
    found += _labelled(run.values, labels)
    if run.metrics.versions:
        text = ", ".join(f"{name} {version}" for name, version in run.metrics.versions.items())
        found.append(("versions", html.block(html.name(text))))
    return found


def _listed(values: Iterable[object] | None) -> str:
    return ", ".join(map(str, values or ()))


def _trained_on(run: RunFiles) -> str:
    return _listed(run.config.get("data", {}).get("train_splits"))


def _data_of(run: RunFiles) -> str:
    """Returns the name of a dataset; with size and seed if it is generated, else its folder."""
    values = run.config.get("data", {}) | run.values.get("data", {})
    if values.get("title"):
        return str(values["title"])
    folder = Path(str(values["dir"])).name if values.get("dir") else ""
    named = {key: value for key, value in values.items() if value is not None}
    return " ".join(word for word in (sources.describe(named), folder) if word)


def names(run: RunFiles) -> Facts | None:
    """Returns the clips of a split without ground truth with the names that the run gives them."""
    if not run.values or run.metrics.map is not None:
        return None
    named = run.analysis.named or formats.NamedClips(num=0, rows=[])
    rows = [(row.clip, run.identity(row.identity), row.score) for row in named.rows]
    own_split = run.config.get("eval", {}).get("split", run.split)
    head = ("clip", "best identity", "score")
    return {
        "tables": html.halves("Clips and their best identities", head, rows),
        "more": named.num - len(rows),
        "ranking": results_lib.paths(run.folder, run.split, own_split).ranking.name,
    }


def reading(run: RunFiles) -> Facts | None:
    """Returns {} for the explanation of terms, which needs no facts; None without ground truth."""
    return {} if run.metrics.map is not None else None


def learning(run: RunFiles) -> Facts | None:
    """Returns curves over the epochs; None for a model that is trained without an optimiser."""
    train = [line for line in run.lines if "learning_rate" in line]
    if not train:
        return None
    rate = _learning_rate(train, run.arrays.get("schedule"))
    bad_steps = sum(line.get("bad_steps", 0) for line in train)
    return {"figures": [_loss(train), _scores(train, run.lines), rate], "bad_steps": bad_steps}


def _loss(train: Sequence[Mapping[str, Any]]) -> Markup:
    x, loss = _column(train, "epoch"), _column(train, "train_loss")
    plot = html.Plot(x="epoch", y="training loss")
    plot.curve(x, loss, points=True)
    ends = [f"{loss[i]:.3f} at epoch {x[i]:.1f}" for i in (0, -1)]
    return plot.html("loss", "Training loss", f"The training loss goes from {' to '.join(ends)}.")


def _scores(train: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> Markup:
    x, accuracy = _column(train, "epoch"), _column(train, "train_accuracy")
    plot = html.Plot(x="epoch", y="share")
    plot.curve(x, accuracy, points=True, label="training accuracy")
    description = f"Training accuracy ends at {accuracy[-1]:.3f}."
    scored = [line for line in lines if "map" in line]
    if scored:
        epochs = {line["step"]: line["epoch"] for line in train}
        epochs_per_step = x[-1] / max(train[-1]["step"], 1)
        places = [epochs.get(line["step"], line["step"] * epochs_per_step) for line in scored]
        values = [line["map"] for line in scored]
        split = scored[-1].get("split", "")
        label = f"MAP@100 on {html.short(split)}"
        plot.axes.plot(places, values, "o-", color=html.SECOND, ms=4, label=label)
        count = f"{len(values)} evaluations"
        description += f" MAP@100 on {split} ends at {values[-1]:.4f}, after {count}."
    plot.axes.set_ylim(0, 1.04)
    plot.legend()
    heading = "Training accuracy and MAP" if scored else "Training accuracy"
    return plot.html("scores", heading, description)


def _learning_rate(train: Sequence[Mapping[str, Any]], schedule: np.ndarray | None) -> Markup:
    x, rates = _column(train, "epoch"), _column(train, "learning_rate")
    if schedule is not None and len(schedule):
        epochs_per_step = x[-1] / max(train[-1]["step"], 1)
        x, rates = schedule[:, 0] * epochs_per_step, schedule[:, 1]
    plot = html.Plot(x="epoch", y="learning rate")
    plot.curve(x, rates, points=True)
    plot.axes.set_ylim(bottom=0)
    first, peak, last = (f"{rate:.3g}" for rate in (rates[0], rates.max(), rates[-1]))
    description = f"The learning rate starts at {first}, peaks at {peak} and ends at {last}."
    return plot.html("rate", "Learning rate of every step", description)


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], float)


def identities(run: RunFiles) -> Facts | None:
    """Returns the distribution of average precision, and a table of the worst identities."""
    if "ap" not in run.arrays:
        return None
    values = np.sort(run.averages())[::-1]
    low, median = np.quantile(values, [0.1, 0.5]).tolist()
    perfect = float(np.mean(values == 1))
    description = (
        f"{100 * perfect:.1f} % of {len(values):,} identities have an average precision of 1. "
        f"The median is {median:.3f}."
    )
    curve = html.Plot(x="share of the identities", y="average precision")
    curve.curve(np.arange(1, len(values) + 1) / len(values), values, points=True)
    curve.axes.set_ylim(0, 1.04)
    histogram = html.Plot(x="average precision", y="identities")
    counts, edges = np.histogram(values, 20, (0, 1))
    histogram.axes.bar(edges[:-1], counts, 0.045, align="edge", color=html.FIRST)
    histogram.count("y")
    heading = "Average precision, identities in descending order"
    return {
        "count": len(values), "perfect": perfect, "median": median, "low": low,
        "figures": [curve.html("sorted", heading, description),
                    histogram.html("histogram", "Histogram of average precision", description)],
        "worst": _worst_identities(run),
    }  # fmt: skip


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
        counts = () if trained is None else (int(trained[row.identity]),)
        others = named(row.lost_to, "no list"), named(row.mixed_with, "distractors")
        rows.append((run.identity(row.identity), html.bar(row.ap), row.clips, *counts, *others))
    known = () if trained is None else ("trained on",)
    head = ("identity", "average precision", "clips", *known, "clips lost to", "mixed with")
    return html.table(f"The {len(rows)} identities with the lowest average precision", head, rows)


def mistakes(run: RunFiles) -> Facts | None:
    """Returns the mistakes with the highest scores, and the first clips of some ranked lists."""
    wrong = run.analysis.wrong_clips or formats.WrongClips()
    alarms = [(row.clip, run.identity(row.identity), row.score) for row in wrong.distractors or ()]
    others = [
        (row.clip, run.identity(row.shows), run.identity(row.identity), row.score)
        for row in wrong.known or ()
    ]
    lists = [_ranked_list(run, listed) for listed in run.analysis.lists or ()]
    if not (alarms or others or lists):
        return None
    head, caption = ("distractor", "taken for", "score"), "False alarms with the highest scores"
    tables = [html.table(caption, head, alarms)]
    caption = "Known clips that score highest for another identity"
    tables.append(html.table(caption, ("clip", "shows", *head[1:]), others))
    return {"tables": tables, "lists": lists}


def _ranked_list(run: RunFiles, listed: formats.RankedList) -> Markup:
    def shown(column: int) -> object:
        if column == listed.identity:
            return Markup("this identity")
        return "a distractor" if column < 0 else run.identity(column)

    caption = Markup("{}: average precision {}, {} {}").format(
        html.name(run.identity(listed.identity)),
        html.number(listed.ap),
        html.number(listed.clips),
        "clip" if listed.clips == 1 else "clips",
    )
    rows = [(row.clip, row.score, shown(row.shows)) for row in listed.rows]
    return html.table(caption, ("clip", "score", "shows"), rows)


def strata(run: RunFiles) -> Facts | None:
    """Returns a table of MAP for every way to divide identities or clips into groups."""
    if "ap" not in run.arrays:
        return None
    between = () if run.analysis.fewest_identities is None else ("95 % interval",)

    def interval(row: formats.Stratum) -> Markup:
        if row.low is None or row.high is None:
            return html.Number("too few")
        return html.between(html.number(row.low, 3), html.number(row.high, 3))

    tables = []
    for table in run.analysis.strata or ():
        rows = [
            (row.label, html.bar(row.map), *(interval(row) for _ in between), row.identities,
             row.clips)
            for row in table.rows
        ]  # fmt: skip
        head = (table.by, "MAP@100", *between, "identities", "clips")
        tables.append(html.table(f"By {table.by}", head, rows))
    return {"tables": tables}


def open_set(run: RunFiles) -> Facts | None:
    """Returns histograms of scores, errors by threshold with a table, and the calibration."""
    if "score_edges" not in run.arrays:
        return None
    shown = {"score_edges": _score_histograms, "fpir": _errors, "calibration": _calibration}
    drawn = [draw(run) for name, draw in shown.items() if name in run.arrays]
    found = run.analysis.open_set
    rates = found.rates if found else []
    rows = [
        (
            html.percent(row.rate, 1),
            html.number(row.threshold),
            html.percent(row.fpir, 2),
            html.between(html.percent(row.fpir_low, 2), html.percent(row.fpir_high, 2)),
            html.percent(row.fnir, 1),
            html.between(html.percent(row.fnir_low, 1), html.percent(row.fnir_high, 1)),
        )
        for row in rates
        if row.threshold is not None
    ]
    head = ("FPIR wanted", "threshold", "FPIR", "95 % interval", "FNIR", "95 % interval")
    of_folds = run.metrics.map_kind == "out_of_fold" and run.metrics.num_members != 1
    return {
        "figures": drawn,
        "found": found,
        "few": [row for row in rates if row.threshold is None],
        "rates": html.table("Thresholds from which a clip is named", head, rows),
        "out_of_fold": of_folds,
    }


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
    plot = html.Plot(x="distractors that pass (FPIR)", y="known clips missed (FNIR)")
    drawn = fpir > 0
    plot.axes.plot(fpir[drawn], fnir[drawn], color=html.FIRST)
    plot.axes.set_xscale("log")
    plot.axes.xaxis.set_major_formatter(lambda x, place: f"{x:g}")
    plot.axes.xaxis.set_minor_formatter(lambda x, place: "")
    plot.axes.set_ylim(0, 1.02)
    nearest = int(np.argmin(np.abs(fpir - 0.01)))
    description = (
        f"Where {100 * fpir[nearest]:.1f} % of the distractors pass, "
        f"{100 * fnir[nearest]:.1f} % of the known clips are missed."
    )
    rates = run.analysis.open_set.rates if run.analysis.open_set else []
    for row in rates:
        if row.threshold is None:
            continue
        errors = [[row.fnir - row.fnir_low], [row.fnir_high - row.fnir]]
        plot.axes.errorbar(
            [row.fpir], [row.fnir], np.maximum(errors, 0), fmt="o", color=html.SECOND,
            capsize=3, ms=5,
        )  # fmt: skip
        plot.axes.annotate(
            f"{row.threshold:.3g}", (row.fpir, row.fnir), (6, 6),
            textcoords="offset points", color=html.SECOND,
        )  # fmt: skip
        description += (
            f" The threshold {row.threshold:.3g} for {100 * row.rate:.3g} % misses "
            f"{100 * row.fnir:.1f} % of the known clips."
        )
    heading = "Known clips missed against distractors that pass"
    points = "; points are thresholds of the table, with their intervals."
    return plot.html("errors", heading, description, heading + points if rates else "")


def _calibration(run: RunFiles) -> Markup:
    error, after = run.analysis.calibration_error, run.arrays.get("calibration_after")
    plot = html.Plot(x="probability of the best identity", y="share that is right")
    plot.axes.plot([0, 1], [0, 1], color=html.MUTED, linewidth=1, linestyle="--", label="perfect")
    for label, bins, colour in (
        ("this run" if after is None else "before", run.arrays["calibration"], html.FIRST),
        ("after", after, html.SECOND),
    ):
        if bins is not None:
            _, confidence, right = bins[bins[:, 0] > 0].T
            plot.axes.plot(confidence, right, "o-", color=colour, ms=4, label=label)
    plot.legend()
    better = "" if after is None else f", and {run.analysis.calibration_error_after:.3f} after"
    description = f"The expected calibration error is {error:.3f}{better}."
    caption = html.parts("sections.html.j2").calibration(run.analysis, after is not None)
    return plot.html("trust", "Calibration of the probabilities", description, caption)


def attention(run: RunFiles) -> Facts | None:
    """Returns the average attention matrix as a heat map, without one if it is a unit matrix."""
    if "attention" not in run.arrays:
        return None
    matrix, names = run.arrays["attention"], run.analysis.vectors or []
    beside = float(np.max(matrix - np.diag(np.diag(matrix)), initial=0.0))
    if len(matrix) > 1 and np.abs(matrix - np.eye(len(matrix))).max() < IDENTITY_TOLERANCE:
        return {"beside": beside, "names": ", ".join(names), "figures": []}
    size = max(0.42 * len(matrix) + 1.0, 2.2)
    plot = html.Plot(size, x="vector j (takes)", y="vector i (gives)")
    html.draw_heat_map(plot.axes, matrix, names)
    most = [
        f"{name} takes most from {names[int(np.argmax(column))]}"
        for name, column in zip(names, matrix.T, strict=True)
    ]
    return {"figures": [plot.html("gram", "Average attention matrix", "; ".join(most) + ".")]}


def frames(run: RunFiles) -> Facts | None:
    """Returns the sizes of NetVLAD clusters, and the effect of hiding single frames of clips."""
    clusters = [
        _clusters(f"vlad-{i}", *item)
        for i, item in enumerate((run.analysis.assignment or {}).items())
    ]
    clips = [
        _frame_drops(f"clip-{i}", run, clip) for i, clip in enumerate(run.analysis.frames or ())
    ]
    return {"clusters": clusters, "clips": clips} if clusters or clips else None


def _clusters(key: str, name: str, shares: Sequence[float]) -> Markup:
    numbers = np.arange(1, len(shares) + 1)
    plot = html.Plot(2.2, x="cluster", y="share of the frames")
    plot.axes.bar(numbers, shares, color=html.FIRST)
    plot.axes.set_xticks(numbers)
    description = ", ".join(f"{k}: {100 * share:.0f} %" for k, share in enumerate(shares, start=1))
    return plot.html(key, f"Clusters of {name}", description, small=True)


def _frame_drops(key: str, run: RunFiles, clip: formats.FrameDrops) -> Markup:
    drops, quality = np.array(clip.falls), np.array(clip.quality)
    places = np.arange(1, len(drops) + 1)
    modality = html.short(clip.modality)
    plot = html.Plot(1.9, x=f"frame of {modality}, in time order", y="drop")
    plot.axes.bar(places, drops, color=html.FIRST, label="drop in the score")
    plot.count("x")
    if quality.any():
        plot.twin("quality").plot(places, quality, ".", color=html.SECOND, label="quality")
        plot.legend()
    plot.axes.set_xlim(0.3, len(drops) + 0.7)
    most = int(np.argmax(drops))
    fall = f"hiding it lowers the score by {drops[most]:.3g}."
    description = f"Frame {most + 1} of {len(drops)} contributes most: {fall}"
    state = "identified correctly" if clip.right else "not identified correctly"
    person = html.name(run.identity(clip.identity))
    caption = Markup("{}, identity {}, {}.").format(html.name(clip.clip), person, state)
    return plot.html(key, f"Frames of clip {clip.clip}", description, caption)


def robustness(run: RunFiles) -> Facts | None:
    """Returns a table of MAP after changes to every clip, such as a missing modality."""
    changes = run.analysis.robustness
    if not changes:
        return None
    unchanged = changes[0].map
    rows = [(row.change, html.bar(row.map), html.signed(row.map - unchanged)) for row in changes]
    head = ("change", "MAP@100", "difference")
    return {"tables": html.halves("MAP of changed clips", head, rows)}


def ensemble(run: RunFiles) -> Facts | None:
    """Returns tables of the blended runs and of the members, each with its own MAP."""
    members = run.analysis.members or run.metrics.members or []
    runs = run.metrics.runs or run.analysis.runs or []
    if not members and not runs:
        return None
    joined = [(row.name, row.weight, html.bar(row.map)) for row in runs]
    gains = run.analysis.gains
    head = ("member", "MAP@100 alone", *(("marginal gain",) if gains else ()))
    caption = "The members, each on the clips that it was not trained on"
    rows = member_rows(members[:MAX_MEMBERS], gains)
    return {
        "runs": html.table("The joined runs", ("run", "weight", "MAP@100 alone"), joined),
        "tables": html.halves(caption, head, rows, above=10),
        "more": len(members) - MAX_MEMBERS,
        "members": members,
        "gains": gains,
    }


def member_rows(members: Sequence[Mapping[str, Any]], gains: Sequence[float] | None) -> Rows:
    """Returns rows of member, MAP and, if `gains` are given, marginal gain."""
    kinds = sorted({key for member in members for key in member} - {"map", "member", "run"})
    rows = []
    for i, member in enumerate(members):
        name = " ".join(str(member[key]) for key in ("run", "member") if key in member)
        words = [name, *(f"{key} {member[key]}" for key in kinds if key in member)]
        gain = (html.signed(gains[i]),) if gains else ()
        rows.append((", ".join(words), html.bar(member.get("map")), *gain))
    return rows


def data(run: RunFiles) -> Facts | None:
    """Returns, for every split, a table of what was loaded and what was skipped."""
    head = ("modality", "clips", "frames", "frames per clip", "clips without it", "skipped")
    count_labels = html.parts("sections.html.j2").count_labels
    tables = [
        html.table(
            count_labels(name, split),
            head,
            [modality_row(key, counts) for key, counts in split.modalities.items()],
        )
        for name, split in (run.data.splits or {}).items()
    ]
    cropped = (run.data.cropped_in_an_epoch or {}).items()
    lost = {name: int(counts.frames) for name, counts in cropped if counts.frames}
    return {"tables": tables, "lost": lost} if tables or lost else None


def modality_row(name: str, counts: formats.ModalityCounts) -> tuple[object, ...]:
    """Returns the counts of a modality in a split."""
    skipped = {**counts.frames_skipped, **counts.clips_skipped}
    reasons = [Markup("{} {}").format(html.number(n), reason) for reason, n in skipped.items() if n]
    return (
        name,
        counts.clips,
        counts.frames,
        html.number(counts.frames_per_clip and counts.frames_per_clip.mean, 1),
        html.percent(counts.missing_rate, 1),
        Markup(", ").join(reasons) or Markup("nothing"),
    )


def configuration(run: RunFiles) -> Facts | None:
    """Returns the fields that differ from their defaults, and all fields of `config.json`."""
    values = own_fields(run.config)
    if not values:
        return None
    defaults = own_fields(json.loads(config_io.to_json(config_lib.default())))
    changed = [
        (name, value, defaults.get(name, ""))
        for name, value in values.items()
        if defaults.get(name) != value
    ]
    every, third = list(values.items()), -(-len(values) // 3)
    caption, head = "Fields that differ from their defaults", ("field", "value", "default")
    return {
        "changed": html.halves(caption, head, changed, above=10),
        "every": [
            html.table("Fields of config.json", ("field", "value"), every[i : i + third])
            for i in range(0, len(every), third)
        ],
    }


def own_fields(
    config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Returns dotted field -> value as text; of a joined run only JOIN_FIELDS, which it uses.

    `overrides` are values of an evaluation in place of those of `config`.
    """
    values = dict(config_lib.fields(config)) | dict(overrides or {})
    found = {name: _value_text(value) for name, value in values.items()}
    if is_joined(config):
        return {name: value for name, value in found.items() if name.startswith(JOIN_FIELDS)}
    return found


def is_joined(config: Mapping[str, Any]) -> bool:
    """Returns True for the configuration of a run that joins others."""
    return bool(config.get("join", {}).get("runs"))


def _value_text(value: object) -> str:
    """Returns a value as on a command line; `unset` for None, `empty` for no text or items."""
    if value is None:
        return "unset"
    if isinstance(value, list | tuple) and not any(
        isinstance(item, list | tuple) for item in value
    ):
        return ", ".join(map(str, value)) or "empty"
    return value or "empty" if isinstance(value, str) else json.dumps(value)


# Function of a section -> its heading. A macro of `sections.html.j2` has the name of the function.
SECTIONS: dict[Callable[[RunFiles], Facts | None], str] = {
    summary: "Summary",
    names: "Clips and names",
    reading: "How to read it",
    learning: "Learning curves",
    identities: "Identities",
    mistakes: "Mistakes and lists",
    strata: "Kinds of clips",
    open_set: "Distractors and calibration",
    attention: "Attention between modalities",
    frames: "Frames",
    robustness: "Robustness",
    ensemble: "Ensemble",
    data: "Data",
    configuration: "Configuration",
}


def write(workdir: Path) -> Path:
    """Writes a page for every analysed split; returns the path of the run's own, `report.html`.

    A page is written whole or not at all. Missing or damaged files of a run are a UserError.
    """
    run = load(workdir)
    for split in run.analysed:
        page = results_lib.paths(workdir, split, run.split).report
        files.write_text(page, _fitting(load(workdir, split)))
    files.write_text(workdir / results_lib.REPORT, _fitting(run))
    return workdir / results_lib.REPORT


def render(run: RunFiles) -> str:
    """Returns the page as HTML."""
    macros = html.parts("sections.html.j2")
    shown = []
    for make, heading in SECTIONS.items():
        facts, key = make(run), make.__name__
        if facts is not None:
            shown.append((key, heading, getattr(macros, key)(run, facts)))
    return html.page(
        title(run),
        shown,
        lead=lead(run),
        nav=True,
        footer="vidjax made this page from the files of the run. It contains names of clips and "
        "identities, and no features.",
    )


def _fitting(run: RunFiles) -> str:
    """Returns `render(run)`; UserError if the files, each valid, are of different evaluations."""
    try:
        return render(run)
    except MISFITS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"'{run.folder}': its results do not fit each other ({reason})\n"
            "--mode=evaluate of this folder writes them again"
        ) from error


def load(workdir: Path, other: str = "") -> RunFiles:
    """Reads the files of a run, with the results of its own split, or of the split `other`."""
    own = str(config_io.load_workdir(workdir).eval.split)  # refuses values of other types
    others = results_lib.read_other_metrics(workdir)
    values = others[other] if other else results_lib.read_metrics(workdir)
    identities, paths = workdir / "identities.json", results_lib.paths(workdir, other or own, own)
    analysed = files.exists(paths.analysis)
    analysis, arrays = results_lib.load_analysis(paths.analysis) if analysed else (None, {})
    return RunFiles(
        folder=workdir,
        config=files.read_json(workdir / "config.json", limit=files.CONFIG_BYTES),
        lines=[] if other else results_lib.read_lines(workdir / "metrics.jsonl"),
        identities=results_lib.load_identities(identities) if files.exists(identities) else [],
        data=results_lib.read_data_report(workdir),
        other_metrics={} if other else others,
        split=other or own,
        analysed=tuple(
            split
            for split in (() if other else others)
            if files.exists(results_lib.paths(workdir, split, own).analysis)
        ),
        metrics=formats.parse(paths.metrics, values, formats.Metrics, results_lib.REMEDY),
        values=values,
        analysis=analysis or formats.Analysis(),
        arrays=arrays,
        analysed_split=analysed,
    )
