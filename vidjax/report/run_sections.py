"""Sections of the report on the run itself, from its summary to its configuration.

Every section is a function from `RunFiles` to parts of HTML.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vidjax import metrics
from vidjax.data import load
from vidjax.report import figures, html, significance
from vidjax.report.run_files import RunFiles

MAX_MEMBERS = 60  # rows in the table of members
FEW_LINES = 40  # a curve of fewer points shows each of them

NO_RESULTS = "The run has no results yet: there is no <code>metrics.json</code>."
NO_MAP = "The split has no ground truth. Its clips are ranked, and there is no MAP."
OTHER_ANALYSIS = (
    "<strong>The analysis below belongs to another evaluation than this result.</strong> "
    "<code>--mode=evaluate</code> writes both anew."
)
NO_COMMAND = "The command is not known: the run was started from Python."
NO_CURVE = "There is no curve: <code>metrics.jsonl</code> has no line of training."
NO_MEMBERS = "There are no members: the run trained one network, or did not rank its members."
GAIN = "Marginal gain: MAP of all members minus MAP without this member, on a sample of {} clips."
NO_GAINS = (
    "Marginal gains are measured for up to ten members, and only if every clip has two members "
    "or more that may score it."
)
NO_DATA = "There is no <code>data_report.json</code>."

Rows = list[tuple[str, ...]]


def summary(run: RunFiles) -> Iterator[str]:
    """Yields MAP with its interval, tables of results and settings, and the command."""
    yield _headline(run)
    if run.analysis and run.analysis["results"].get("map") != run.metrics.get("map"):
        yield html.p(OTHER_ANALYSIS)
    results = result_rows(run.metrics)
    tables = [html.table("Results", ("result", "value"), results)] if results else []
    yield html.side_by_side(*tables, html.table("The run", ("setting", "value"), run_rows(run)))
    if run.other_metrics:
        rows = [
            (
                html.name(split),
                html.number(values.get("map")),
                html.text(values.get("map_kind", "no ground truth")),
                html.number(values.get("num_clips")),
            )
            for split, values in run.other_metrics.items()
        ]
        yield html.table("Other evaluated splits", ("split", "MAP@100", "kind", "clips"), rows)
    command = _command(run)
    if command:
        words = " ".join(f"<span>{html.text(word)}</span>" for word in command.split(" "))
        yield f"<p>Command that repeats the run:</p><pre><code>{words}</code></pre>\n"
    else:
        yield html.note(NO_COMMAND)


def _headline(run: RunFiles) -> str:
    """Returns MAP with its interval, or the reason why there is none."""
    if not run.metrics:
        return html.p(NO_RESULTS)
    value = run.metrics.get("map")
    if value is None:
        return html.p(NO_MAP)
    interval = ""
    if "ap" in run.arrays:
        low, high = significance.map_interval(run.averages())
        interval = (
            f", 95 % interval {html.number(low)} to {html.number(high)} ({significance.METHOD})"
        )
    kind = html.text(run.metrics.get("map_kind", "").replace("_", " "))
    return f'<p class="lead">MAP@100 <strong>{html.number(value)}</strong> ({kind}){interval}</p>\n'


def result_rows(values: Mapping[str, Any]) -> Rows:
    """Returns (name, value) as HTML of the results in a `metrics.json`."""
    labels = [
        *((name, f"{m.label}: {m.about}", m.digits) for name, m in metrics.CLIP_METRICS.items()),
        ("num_clips", "ranked clips", 0),
        ("num_identities", "identities", 0),
        ("num_distractors", "distractors", 0),
        ("eval_clips_per_second", "clips per second in evaluation", 0),
        ("train_clips_per_second", "clips per second in training", 0),
        ("seconds", "seconds, with evaluations", 1),
    ]
    return _rows(values, labels)


def run_rows(run: RunFiles) -> Rows:
    """Returns (name, value) as HTML of the settings of a run."""
    config = run.config
    data = config.get("data", {})
    settings = [
        ("data", load.describe(data)),
        ("trained on", ", ".join(data.get("train_splits", ()))),
        ("evaluated on", config.get("eval", {}).get("split", "")),
        ("modalities", ", ".join(config.get("modalities", ()))),
    ]
    labels = [
        ("seed", "seed", 0),
        ("step", "steps", 0),
        ("best_map", "best MAP@100", 4),
        ("num_members", "members", 0),
        ("num_params", "parameters", 0),
    ]
    rows: Rows = [(name, html.name(value)) for name, value in settings]
    rows += _rows(run.metrics, labels)
    versions = run.metrics.get("versions", {})
    if versions:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        rows.append(("versions", html.name(text)))
    return rows


def _rows(values: Mapping[str, Any], labels: Sequence[tuple[str, str, int]]) -> Rows:
    """Returns rows of those values that are there; labels are (key, label, digits)."""
    return [
        (html.text(label), html.number(values[key], digits))
        for key, label, digits in labels
        if values.get(key) is not None
    ]


def _command(run: RunFiles) -> str | None:
    """Returns the command line that repeats the run, None where it is not known."""
    runs = run.config.get("join", {}).get("runs", ())
    if run.metrics.get("command") or not runs:
        return run.metrics.get("command")
    words = ["--mode=evaluate", f"--workdir={run.folder}", f"--runs={','.join(runs)}"]
    return " ".join(["python -m vidjax.main", *words])


def learning_curves(run: RunFiles) -> Iterator[str]:
    """Yields curves of loss, accuracy, MAP and learning rate over the epochs."""
    train = [line for line in run.lines if "train_loss" in line]
    if not train:
        yield html.p(NO_CURVE)
        return
    yield html.side_by_side(_loss(train), _scores(train, run.lines), _learning_rate(train))
    bad_steps = sum(line.get("bad_steps", 0) for line in train)
    if bad_steps:
        yield html.p(f"{bad_steps:.0f} steps were skipped: loss or gradient was not finite.")


def _loss(train: Sequence[Mapping[str, Any]]) -> str:
    x, loss = _column(train, "epoch"), _column(train, "train_loss")
    shown = figures.few(x)
    plot = figures.Plot(x="epoch", y="training loss")
    marker = "." if len(shown) < FEW_LINES else ""
    plot.axes.plot(x[shown], loss[shown], color=figures.FIRST, marker=marker)
    description = (
        f"The training loss goes from {loss[0]:.3f} at epoch {x[0]:.1f} to {loss[-1]:.3f} "
        f"at epoch {x[-1]:.1f}."
    )
    return plot.html("loss", "Training loss", description)


def _scores(train: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> str:
    x, accuracy = _column(train, "epoch"), _column(train, "train_accuracy")
    shown = figures.few(x)
    plot = figures.Plot(x="epoch", y="share")
    plot.axes.plot(x[shown], accuracy[shown], color=figures.FIRST, label="training accuracy")
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
    plot.axes.set_ylim(0, 1.02)
    plot.legend()
    return plot.html("scores", "Training accuracy and MAP", description)


def _learning_rate(train: Sequence[Mapping[str, Any]]) -> str:
    x, rates = _column(train, "epoch"), _column(train, "learning_rate")
    shown = figures.few(x)
    plot = figures.Plot(x="epoch", y="learning rate")
    plot.axes.plot(x[shown], rates[shown], color=figures.FIRST)
    description = f"The learning rate peaks at {rates.max():.3g} and ends at {rates[-1]:.3g}."
    return plot.html("rate", "Learning rate", description)


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], float)


def ensemble(run: RunFiles) -> Iterator[str]:
    """Yields tables of the blended runs and of the members, each with its own MAP."""
    members = run.analysis.get("members") or run.metrics.get("members", [])
    runs = run.analysis.get("runs") or run.metrics.get("runs", [])
    if runs:
        rows = [
            (html.name(row["name"]), html.number(row["weight"]), html.number(row.get("map")))
            for row in runs
        ]
        yield html.table("The blended runs", ("run", "weight", "MAP@100 alone"), rows)
    if not members:
        if not runs:
            yield html.p(NO_MEMBERS)
        return
    gains = run.analysis.get("gains")
    head = ("member", "MAP@100 alone", *(("marginal gain",) if gains else ()))
    caption = "The members, each on the clips that it was not trained on"
    yield html.table(caption, head, member_rows(members[:MAX_MEMBERS], gains))
    if len(members) > MAX_MEMBERS:
        yield html.note(f"{len(members) - MAX_MEMBERS} more are in <code>metrics.json</code>.")
    if gains:
        yield html.note(GAIN.format(html.number(run.analysis["num_sampled"])))
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
        cells = [html.name(", ".join(words)), "none" if value is None else html.bar(value)]
        if gains:
            cells.append(f"{gains[i]:+.4f}")
        rows.append(tuple(cells))
    return rows


def data(run: RunFiles) -> Iterator[str]:
    """Yields, for every split, a table of what was loaded and what was skipped."""
    splits = run.data.get("splits", {})
    if not splits:
        yield html.p(NO_DATA)
        return
    head = ("modality", "clips", "frames", "frames per clip", "clips without it", "skipped")
    for name, split in splits.items():
        rows = [modality_row(key, counts) for key, counts in split["modalities"].items()]
        yield f"<h3>{html.text(name)}</h3>\n"
        yield html.p(html.text(_count_labels(split)))
        yield html.table(f"Loaded clips of {name}", head, rows)
    cropped = run.data.get("cropped_in_an_epoch", {})
    lost = [f"{name} {n['frames']:,}" for name, n in cropped.items() if n.get("frames")]
    if lost:
        yield html.note(f"Frames left out of training per epoch: {html.text(', '.join(lost))}.")


def configuration(run: RunFiles) -> Iterator[str]:
    """Yields a table of all fields of `config.json`."""
    yield html.note("<code>--config.FIELD=VALUE</code> sets a field.")
    rows = [(html.name(name), html.name(value)) for name, value in _fields(run.config)]
    if rows:
        yield html.table("Fields of the configuration", ("field", "value"), rows)


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted name, value as text) of every leaf of a configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", "unset" if value is None else shown or "empty"


def modality_row(name: str, counts: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the counts of a modality in a split as HTML cells."""
    skipped = {**counts["frames_skipped"], **counts["clips_skipped"]}
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
    return (
        html.name(name),
        html.number(counts["clips"]),
        html.number(counts["frames"]),
        html.number(float(counts["frames_per_clip"]["mean"]), 1),
        html.percent(counts["missing_rate"], 1),
        html.name(reasons or "nothing"),
    )


def _count_labels(split: Mapping[str, Any]) -> str:
    """Returns a sentence on the clips, identities and distractors of a split."""
    clips = f"{split['clips']:,} clips"
    if not split.get("labelled"):
        return f"{clips}, no ground truth."
    words = [
        clips,
        f"{split['identities']:,} identities",
        f"{split['distractors']:,} distractors",
    ]
    if split.get("unknown_clips"):
        words.append(f"{split['unknown_clips']:,} clips of the ground truth are missing")
    return ", ".join(words) + "."
