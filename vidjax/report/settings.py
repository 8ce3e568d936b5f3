"""Settings of a run for its report: what it is, its data, its configuration, words explained.

A joined run keeps these of every run that it joins in the rows `runs` of its `metrics.json`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax import config as config_lib
from vidjax import config_io
from vidjax.data import sources
from vidjax.report import html
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles

Rows = list[tuple[str, ...]]

JOIN_FIELDS = ("join.", "eval.")  # starts of the names of fields that a joined run uses
JOINED_HEAD = (
    "model",
    "data",
    "trained on",
    "modalities",
    "members",
    "parameters",
    "steps",
    "seed",
)
WORDS = (
    (
        "MAP@100",
        "mean average precision. Every identity has a list of its 100 best clips. Its average "
        "precision is 1 if all its clips come first in the list, and less the later they come or "
        "the more are missing. MAP is the mean over identities.",
    ),
    ("Distractor", "a clip that shows none of the identities."),
    (
        "FPIR",
        "false-positive identification rate: the share of distractors whose best score reaches the "
        "threshold, so that they are taken for an identity. Lower is better.",
    ),
    (
        "FNIR",
        "false-negative identification rate: the share of clips of known people whose best score "
        "stays below the threshold, or is of another person. Lower is better.",
    ),
    (
        "Threshold",
        "the score from which a clip is identified. A higher one has fewer false alarms (FPIR) and "
        "more misses (FNIR).",
    ),
    ("Top-1", "the share of clips of known people whose best identity is right."),
    (
        "AUROC",
        "the probability that a clip of a known person scores above a distractor: 1 is perfect, "
        "a half is chance.",
    ),
    (
        "95 % interval",
        "where MAP would probably lie for other identities of the same kind; wide if they are few.",
    ),
)


def title(run: RunFiles) -> str:
    """Returns what a run is: its model, modalities and data."""
    data = ", ".join(_distinct(_data_of(run))) or "unknown data"
    joined = joined_runs(run)
    if joined:
        models = ", ".join(_distinct(str(row.get("model", "?")) for row in joined))
        return f"{len(joined)} runs joined ({models}) on {data}"
    model = str(run.config.get("model", {}).get("name", "no model"))
    members = run.metrics.get("num_members") or 1
    count = f"{members} x " if members != 1 else ""
    modalities = ", ".join(map(str, run.config.get("modalities", ())))
    return f"{count}{model} with {modalities or 'no modality'} on {data}"


def lead(run: RunFiles) -> Html:
    """Returns a line on a run: its folder, its splits and its date."""
    trained = ", ".join(_distinct(_trained_on(run))) or "nothing"
    words = [
        html.fill("Folder {}", run.folder.name),
        html.fill("trained on {}", trained),
        html.fill("evaluated on {}", run.split or "nothing"),
    ]
    words += [html.text(date) for date in (run.metrics.get("date"),) if date]
    return html.join(words, "; ")


def joined_runs(run: RunFiles) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.json` on the runs that a run joins."""
    names = run.config.get("join", {}).get("runs", ())
    return run.metrics.get("runs") or [{"name": name} for name in names]


def short_name(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the last part of a joined run's path, or the path if two runs end alike."""
    last = [Path(row["name"]).name for row in runs]
    short = Path(name).name
    return short if last.count(short) == 1 else name


def joined_cells(row: Mapping[str, Any]) -> tuple[Html, ...]:
    """Returns the cells of `JOINED_HEAD` of a joined run."""
    counts = ("num_members", "num_params", "step", "seed")
    return (
        html.name(row.get("model", "unknown")),
        html.name(describe_data(row.get("data", {})) or "unknown"),
        html.name(", ".join(row.get("train_splits", ())) or "unknown"),
        html.name(", ".join(row.get("modalities", ())) or "unknown"),
        *(html.number(row.get(name)) for name in counts),
    )


def describe_data(data: Mapping[str, Any]) -> str:
    """Returns the name of a dataset; with size and seed if it is generated, else its folder.

    Args:
      data: the entry `data` of a `metrics.json`, or the section `data` of a configuration.
    """
    if data.get("title"):
        return str(data["title"])
    folder = Path(str(data["dir"])).name if data.get("dir") else ""
    return " ".join(word for word in (sources.describe(data), folder) if word)


def run_rows(run: RunFiles) -> Rows:
    """Returns (name, value) as HTML of the settings of a run."""
    settings = [
        ("data", _data_of(run)),
        ("data digest", _digests(run)),
        ("trained on", _trained_on(run)),
        ("evaluated on", [run.split]),
        ("modalities", _of_runs(run, "modalities", run.config.get("modalities", ()))),
        ("scored with", _of_runs(run, "scored_with", ())),
        ("weights fitted on", [str(run.metrics.get("weights_fitted_on", ""))]),
        ("finished", [str(run.metrics.get("date", ""))]),
        ("evaluated", [str(run.metrics.get("eval_date", ""))]),
    ]
    labels = [
        ("seed", "seed", 0),
        ("step", "steps", 0),
        ("best_map", "best MAP@100 in training", 4),
        ("num_members", "members", 0),
        ("num_params", "parameters of a member", 0),
    ]
    found: Rows = [
        (html.text(name), _values(run, values)) for name, values in settings if any(values)
    ]
    found += rows(run.metrics, labels)
    versions = run.metrics.get("versions", {})
    if versions:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        found.append((html.text("versions"), html.block(html.name(text))))
    return found


def _values(run: RunFiles, values: Sequence[str]) -> Html:
    """Returns a value that all runs share, or the value of each joined run."""
    distinct = _distinct(values)
    if len(distinct) == 1:
        return html.name(distinct[0])
    joined = joined_runs(run)
    return html.join(
        (html.fill("{}: {}", html.name(short_name(row["name"], joined)), html.name(value))
         for row, value in zip(joined, values, strict=True)), "<br>",
    )  # fmt: skip


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _of_runs(run: RunFiles, key: str, own: Sequence[str]) -> list[str]:
    """Returns the names under `key` as text: one string per joined run.

    A run that joins none has one string, made of its `own` names.
    """
    joined = joined_runs(run)
    return [", ".join(map(str, row.get(key, ()))) for row in joined] or [", ".join(map(str, own))]


def _trained_on(run: RunFiles) -> list[str]:
    return _of_runs(run, "train_splits", run.config.get("data", {}).get("train_splits", ()))


def _data_of(run: RunFiles) -> list[str]:
    joined = joined_runs(run)
    if joined:
        return [describe_data(row.get("data", {})) for row in joined]
    return [describe_data(run.config.get("data", {}) | run.metrics.get("data", {}))]


def _digests(run: RunFiles) -> list[str]:
    rows = joined_runs(run) or [run.metrics]
    return [str(row.get("data", {}).get("digest", "")) for row in rows]


def rows(values: Mapping[str, Any], labels: Sequence[tuple[str, str, int]]) -> Rows:
    """Returns rows of those values that are there; labels are (key, label, digits)."""
    return [
        (html.block(label), html.number(values[key], digits))
        for key, label, digits in labels
        if values.get(key) is not None
    ]


def reading(run: RunFiles) -> Iterator[Html]:
    """Yields the words of the page, explained; they are about a split with a ground truth."""
    if run.metrics.get("map") is not None:
        yield html.fill(
            "<dl>{}</dl>\n",
            html.join(html.fill("<div><dt>{}</dt><dd>{}</dd></div>\n", *pair) for pair in WORDS),
        )


def configuration(run: RunFiles) -> Iterator[Html]:
    """Yields the fields that differ from their defaults, and all fields of `config.json`."""
    values = own_fields(run.config)
    if not values:
        return
    defaults = own_fields(json.loads(config_io.to_json(config_lib.default())))
    changed = [
        (html.name(name), html.name(value), html.name(defaults.get(name, "")))
        for name, value in values.items()
        if defaults.get(name) != value
    ]
    if changed:
        head = ("field", "value", "default")
        half = (len(changed) + 1) // 2 if len(changed) > 10 else len(changed)
        caption = "Fields that differ from their defaults"
        halves = [part for part in (changed[:half], changed[half:]) if part]
        yield html.tables(*(html.table(caption, head, part) for part in halves))
    every = [(html.name(name), html.name(value)) for name, value in values.items()]
    third = -(-len(every) // 3)
    parts = [every[i : i + third] for i in range(0, len(every), third)]
    caption, head = "Fields of config.json", ("field", "value")
    tables = html.tables(*(html.table(caption, head, part) for part in parts))
    note = html.note(html.fill("<code>--config.FIELD=VALUE</code> sets a field."))
    yield html.fold("All fields of the configuration", html.join([note, tables]))


def own_fields(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns dotted name -> value as text of the fields that a run uses.

    A joined run uses the fields `join` and `eval`. Each run that it joins has its own others.
    """
    found = dict(_fields(config))
    if is_joined(config):
        return {name: value for name, value in found.items() if name.startswith(JOIN_FIELDS)}
    return found


def is_joined(config: Mapping[str, Any]) -> bool:
    """Returns True for the configuration of a run that joins others."""
    return bool(config.get("join", {}).get("runs"))


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted name, value as text) of every leaf of a configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value_text(value)


def _value_text(value: object) -> str:
    """Returns a value as a command line would have it, or a word for no value."""
    if value is None:
        return "unset"
    if isinstance(value, list | tuple) and not any(
        isinstance(item, list | tuple) for item in value
    ):
        return ", ".join(map(str, value)) or "empty"
    return value or "empty" if isinstance(value, str) else json.dumps(value)
