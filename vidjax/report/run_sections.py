"""Sections of the report on the run itself: its summary, learning curves, members and data.

Every section is a function from `RunFiles` to parts of HTML, none where there is nothing to show.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from vidjax import metrics, significance
from vidjax.report import figures, html, settings
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles
from vidjax.run import formats
from vidjax.run import results as results_lib

MAX_MEMBERS = 60  # rows in the table of members

NO_RESULTS = html.fill("The run has no results yet: there is no <code>metrics.json</code>.")
NO_MAP = "The split has no ground truth. Its clips are ranked, and there is no MAP."
NO_ANALYSIS = html.fill(
    "There is no <code>analysis.npz</code>. <code>--mode=evaluate</code> of this folder writes it."
)
OTHER_ANALYSIS = html.fill(
    "<strong>The analysis below belongs to another evaluation than this result.</strong> "
    "<code>--mode=evaluate</code> writes both anew."
)
NO_COMMAND = "The command is not known: the run was started from Python."
GAIN = "Marginal gain: MAP of all members minus MAP without this member, on a sample of {} clips."
NO_GAINS = (
    "Marginal gains are measured for up to ten members, and only if every clip has two members "
    "or more that may score it."
)
KINDS = {
    "out_of_fold": "out of fold: every clip is scored by members that were not trained on it",
    "in_sample": "in sample: the run was trained on clips that are scored, and MAP is too high",
}

Rows = list[tuple[str, ...]]


def summary(run: RunFiles) -> Iterator[Html]:
    """Yields MAP with its interval, tables of results and settings, and the command."""
    yield _headline(run)
    if run.metrics and not run.analysis:
        yield html.p(NO_ANALYSIS)
    elif run.analysis and run.analysis["results"].get("map") != run.metrics.get("map"):
        yield html.p(OTHER_ANALYSIS)
    results = result_rows(run.metrics)
    tables = [html.table("Results", ("result", "value"), results)] if results else []
    facts = settings.run_rows(run)
    if facts:
        tables.append(html.table("The run", ("setting", "value"), facts))
    yield html.tables(*tables)
    if run.other_metrics:
        rows = [_split_row(run, *item) for item in run.other_metrics.items()]
        head = ("split", "MAP@100", "kind", "clips", "report")
        yield html.table("Other evaluated splits", head, rows)
    command = run.metrics.get("command")
    if command:
        words = html.join((html.fill("<span>{}</span>", w) for w in str(command).split(" ")), " ")
        yield html.p("Command that repeats the run:")
        yield html.fill("<pre><code>{}</code></pre>\n", words)
    elif run.metrics:
        yield html.note(NO_COMMAND)


def _split_row(run: RunFiles, split: str, values: Mapping[str, Any]) -> tuple[Html, ...]:
    """Returns the cells of another evaluated split, with a link to its page if it has one."""
    page = f"report_{split}.html"
    linked = html.link(quote(page), page) if split in run.analysed else html.text("")
    return (
        html.name(split),
        html.number(values.get("map")),
        html.text(values.get("map_kind", "no ground truth")),
        html.number(values.get("num_clips")),
        linked,
    )


def _headline(run: RunFiles) -> Html:
    """Returns MAP with its interval, or the reason why there is none."""
    if not run.metrics:
        return html.p(NO_RESULTS)
    value = run.metrics.get("map")
    if value is None:
        reason = results_lib.unmeasured(
            run.config, run.metrics, msgspec.convert(run.data, formats.DataReport)
        )
        nothing = [html.p(f"Nothing is measured: {reason}.")] if reason else []
        return html.join([html.p(NO_MAP), *nothing])
    interval = html.text("")
    if "ap" in run.arrays:
        low, high = significance.map_interval(run.averages())
        interval = html.fill(
            ", 95 % interval {} to {} ({})",
            html.number(low), html.number(high), significance.METHOD,
        )  # fmt: skip
    kind = str(run.metrics.get("map_kind", ""))
    return html.fill(
        '<p class="lead">MAP@100 <strong>{}</strong> on {}{}</p>\n',
        html.number(value),
        f"{run.split} ({KINDS[kind]})" if kind in KINDS else kind,
        interval,
    )


def result_rows(values: Mapping[str, Any]) -> Rows:
    """Returns (name, value) as HTML of the results in a `metrics.json`."""
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
    return settings.rows(values, labels)


def learning_curves(run: RunFiles) -> Iterator[Html]:
    """Yields curves of loss, accuracy, MAP and learning rate over the epochs.

    A model that optimises nothing has no learning rate, and no curves.
    """
    train = [line for line in run.lines if "learning_rate" in line]
    if not train:
        return
    schedule = run.arrays.get("schedule")
    yield html.figures(_loss(train), _scores(train, run.lines), _learning_rate(train, schedule))
    bad_steps = sum(line.get("bad_steps", 0) for line in train)
    if bad_steps:
        words = "{} steps were skipped: loss or gradient was not finite."
        yield html.p(html.fill(words, html.number(bad_steps, 0)))


def _loss(train: Sequence[Mapping[str, Any]]) -> Html:
    x, loss = _column(train, "epoch"), _column(train, "train_loss")
    shown = figures.few(x)
    plot = figures.Plot(x="epoch", y="training loss")
    plot.axes.plot(x[shown], loss[shown], color=figures.FIRST, marker=figures.marker(shown))
    description = (
        f"The training loss goes from {loss[0]:.3f} at epoch {x[0]:.1f} to {loss[-1]:.3f} "
        f"at epoch {x[-1]:.1f}."
    )
    return plot.html("loss", "Training loss", description)


def _scores(train: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> Html:
    x, accuracy = _column(train, "epoch"), _column(train, "train_accuracy")
    shown = figures.few(x)
    plot = figures.Plot(x="epoch", y="share")
    plot.axes.plot(
        x[shown], accuracy[shown], color=figures.FIRST, marker=figures.marker(shown),
        label="training accuracy",
    )  # fmt: skip
    description = f"Training accuracy ends at {accuracy[-1]:.3f}."
    scored = [line for line in lines if "map" in line]
    if scored:
        epochs = {line["step"]: line["epoch"] for line in train}
        epochs_per_step = x[-1] / max(train[-1]["step"], 1)
        places = [epochs.get(line["step"], line["step"] * epochs_per_step) for line in scored]
        values = [line["map"] for line in scored]
        split = scored[-1].get("split", "")
        label = f"MAP@100 on {figures.short(split)}"
        plot.axes.plot(places, values, "o-", color=figures.SECOND, ms=4, label=label)
        description += (
            f" MAP@100 on {split} ends at {values[-1]:.4f}, after {len(values)} evaluations."
        )
    plot.axes.set_ylim(0, 1.04)
    plot.legend()
    title = "Training accuracy and MAP" if scored else "Training accuracy"
    return plot.html("scores", title, description)


def _learning_rate(train: Sequence[Mapping[str, Any]], schedule: np.ndarray | None) -> Html:
    """Returns a figure of the learning rate: of the schedule, or else of the logged lines."""
    x, rates = _column(train, "epoch"), _column(train, "learning_rate")
    if schedule is not None and len(schedule):
        epochs_per_step = x[-1] / max(train[-1]["step"], 1)
        x, rates = schedule[:, 0] * epochs_per_step, schedule[:, 1]
    shown = figures.few(x)
    plot = figures.Plot(x="epoch", y="learning rate")
    plot.axes.plot(x[shown], rates[shown], color=figures.FIRST, marker=figures.marker(shown))
    plot.axes.set_ylim(bottom=0)
    description = (
        f"The learning rate starts at {rates[0]:.3g}, peaks at {rates.max():.3g} and ends at "
        f"{rates[-1]:.3g}."
    )
    return plot.html("rate", "Learning rate of every step", description)


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], float)


def ensemble(run: RunFiles) -> Iterator[Html]:
    """Yields tables of the blended runs and of the members, each with its own MAP."""
    members = run.analysis.get("members") or run.metrics.get("members", [])
    runs = run.metrics.get("runs") or run.analysis.get("runs", [])
    if runs:
        rows = [
            (
                html.name(settings.short_name(row["name"], runs)),
                html.number(row.get("weight")),
                html.number(row.get("map")),
                *settings.joined_cells(row),
            )
            for row in runs
        ]
        head = ("run", "weight", "MAP@100 alone", *settings.JOINED_HEAD)
        yield html.table("The joined runs", head, rows)
    if not members:
        return
    gains = run.analysis.get("gains")
    head = ("member", "MAP@100 alone", *(("marginal gain",) if gains else ()))
    caption = "The members, each on the clips that it was not trained on"
    rows = member_rows(members[:MAX_MEMBERS], gains)
    half = (len(rows) + 1) // 2 if len(rows) > 10 else len(rows)
    halves = [part for part in (rows[:half], rows[half:]) if part]
    yield html.tables(*(html.table(caption, head, part) for part in halves))
    if len(members) > MAX_MEMBERS:
        more = html.number(len(members) - MAX_MEMBERS)
        yield html.note(html.fill("{} more are in <code>metrics.json</code>.", more))
    if gains:
        yield html.note(html.fill(GAIN, html.number(run.analysis["num_sampled"])))
    elif run.analysis:
        yield html.note(NO_GAINS)


def member_rows(members: Sequence[Mapping[str, Any]], gains: Sequence[float] | None) -> Rows:
    """Returns (member, MAP, marginal gain if there are any) as HTML."""
    kinds = sorted({key for member in members for key in member} - {"map", "member", "run"})
    rows = []
    for i, member in enumerate(members):
        name = " ".join(str(member[key]) for key in ("run", "member") if key in member)
        words = [name, *(f"{key} {member[key]}" for key in kinds if key in member)]
        value = member.get("map")
        cells = [
            html.name(", ".join(words)),
            html.number(None) if value is None else html.bar(value),
        ]
        if gains:
            cells.append(html.signed(gains[i]))
        rows.append(tuple(cells))
    return rows


def data(run: RunFiles) -> Iterator[Html]:
    """Yields, for every split, a table of what was loaded and what was skipped."""
    splits = run.data.get("splits", {})
    head = ("modality", "clips", "frames", "frames per clip", "clips without it", "skipped")
    tables = []
    for name, split in splits.items():
        rows = [modality_row(key, counts) for key, counts in split["modalities"].items()]
        caption = html.fill("{}: {}", name, _count_labels(split))
        tables.append(html.table(caption, head, rows))
    yield html.tables(*tables)
    cropped = run.data.get("cropped_in_an_epoch", {})
    lost = [
        html.fill("{} {}", name, html.number(counts["frames"]))
        for name, counts in cropped.items()
        if counts.get("frames")
    ]
    if lost:
        words = "Frames left out of training per epoch: {}."
        yield html.note(html.fill(words, html.join(lost, ", ")))


def modality_row(name: str, counts: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the counts of a modality in a split as HTML cells."""
    skipped = {**counts["frames_skipped"], **counts["clips_skipped"]}
    reasons = [html.fill("{} {}", html.number(n), reason) for reason, n in skipped.items() if n]
    return (
        html.name(name),
        html.number(counts["clips"]),
        html.number(counts["frames"]),
        html.number(float(counts["frames_per_clip"]["mean"]), 1),
        html.percent(counts["missing_rate"], 1),
        html.join(reasons, ", ") or html.text("nothing"),
    )


def _count_labels(split: Mapping[str, Any]) -> Html:
    """Returns the number of clips, identities and distractors of a split."""
    clips = html.fill("{} clips", html.number(split["clips"]))
    if not split.get("labelled"):
        return html.fill("{}, no ground truth", clips)
    words = [
        clips,
        html.fill("{} identities", html.number(split["identities"])),
        html.fill("{} distractors", html.number(split["distractors"])),
    ]
    if unknown := split.get("unknown_clips"):
        words.append(html.fill("{} clips of the ground truth are missing", html.number(unknown)))
    return html.join(words, ", ")
