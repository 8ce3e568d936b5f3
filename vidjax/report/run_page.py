"""A run as one page to look at: files of its folder in, `report.html` out.

The page needs no other file, no network and no script. It is made of what training and evaluation
left: no data is read and nothing is computed by a model.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.report import html
from vidjax.run import results as results_lib
from vidjax.run import workdir as workdir_lib

RESAMPLES = 1000
MOST_ROWS = 60  # of a table of members


class Run(NamedTuple):
    """What lies in a run's folder; empty where a file is absent.

    Attributes:
      folder: the folder.
      config: of `config.json`.
      metrics: of `metrics.json`.
      lines: of `metrics.jsonl`.
      identities: names of the columns 1..C.
      facts: of `analysis.npz`, what is no array.
      arrays: of `analysis.npz`.
      data: of `data_report.json`.
      others: split -> metrics of splits that were evaluated beside the run's own.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    lines: list[dict[str, Any]]
    identities: list[str]
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    data: dict[str, Any]
    others: dict[str, dict[str, Any]]


def write(workdir: Path) -> Path:
    """Writes `report.html` of the run in a folder, whole or not at all; returns its path.

    Raises:
      ValueError: there is no run, or one of its files is damaged.
    """
    path = workdir / results_lib.REPORT
    workdir_lib.write_text(path, render(load(workdir)))
    return path


def load(workdir: Path) -> Run:
    """Returns what the files of a run say.

    Raises:
      ValueError: there is no run, or one of its files is damaged.
    """
    if not (workdir / "config.json").is_file():
        raise ValueError(f"--workdir: no run in '{workdir}' (no config.json)")
    own = results_lib.paths(workdir, "", "")
    facts, arrays = results_lib.load_analysis(own.analysis) if own.analysis.exists() else ({}, {})
    identities = workdir / "identities.json"
    data = workdir / "data_report.json"
    return Run(
        workdir,
        workdir_lib.read_json(workdir / "config.json"),
        results_lib.read_metrics(workdir),
        results_lib.read_lines(workdir / "metrics.jsonl"),
        workdir_lib.read_json(identities, list) if identities.exists() else [],
        facts,
        arrays,
        workdir_lib.read_json(data) if data.exists() else {},
        results_lib.read_other_metrics(workdir),
    )


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of [n] values, by the percentiles of 1,000 resamples.

    The same values give the same interval.
    """
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def render(run: Run) -> str:
    """Returns the page."""
    sections = [
        ("summary", "Summary", _summary),
        ("learning", "Learning curves", _learning),
        ("identities", "Identities", _identities),
        ("strata", "Kinds of clips", _strata),
        ("strangers", "Strangers and trust", _strangers),
        ("attention", "Attention between modalities", _attention),
        ("frames", "Frames", _frames),
        ("robustness", "Robustness", _robustness),
        ("ensemble", "Ensemble", _ensemble),
        ("data", "Data", _data),
    ]
    made = [(key, title, make(run)) for key, title, make in sections]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in made)
    name, model = run.folder.name, _model(run)
    return html.make(
        html.text(name if name == model else f"{name}: {model}"),
        made,
        nav=f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n',
        footer="Made by vidjax from the files of this run. It holds names of clips and\n"
        "identities, and no feature.",
    )


def _model(run: Run) -> str:
    runs = run.config.get("join", {}).get("runs", ())
    if runs:
        return f"{len(runs)} runs joined"
    return str(run.config.get("model", {}).get("name", "no model"))


# The sections: each yields HTML.


def _summary(run: Run) -> Iterator[str]:
    metrics, config = run.metrics, run.config
    if not metrics:
        yield html.p("The run has no results yet: <code>metrics.json</code> is absent.")
    elif metrics.get("map") is None:
        yield html.p("The split has no ground truth, so it is ranked and has no MAP.")
    else:
        interval = ""
        if "ap" in run.arrays:
            low, high = bootstrap(_averages(run))
            interval = (
                f", 95 % interval {html.number(low)} to {html.number(high)} "
                "(identities resampled 1,000 times)"
            )
        kind = html.text(metrics.get("map_kind", "").replace("_", " "))
        yield f'<p class="lead">MAP@100 <strong>{html.number(metrics["map"])}</strong> ({kind})'
        yield f"{interval}</p>\n"
    if run.facts and run.facts["results"].get("map") != metrics.get("map"):
        yield html.p(
            "<strong>The analysis below is of another evaluation than this result.</strong> "
            "Evaluate the run again to bring them together."
        )
    rows: list[tuple[str, ...]] = []

    def add(name: str, key: str, digits: int = 4) -> None:
        if metrics.get(key) is not None:
            rows.append((html.text(name), html.number(metrics[key], digits)))

    add("top-1 of labelled clips", "top1")
    add("AUROC, known clips against distractors", "auroc")
    for key in metrics:
        if key.startswith("fnir_at_fpir_"):
            share = 100 * float(key.removeprefix("fnir_at_fpir_"))
            add(f"known clips missed where {share:g} % of the distractors pass", key)
    add("clips ranked", "num_clips")
    add("identities", "num_identities")
    add("distractors", "num_distractors")
    add("clips a second in evaluation", "eval_clips_per_second", 0)
    add("clips a second in training", "train_clips_per_second", 0)
    add("seconds, evaluations included", "seconds", 1)
    results, rows = rows, []
    data = config.get("data", {})
    what = data.get("name", "")
    what += f", {data.get('size')}, seed {data.get('seed')}" if what == "synthetic" else ""
    rows.append(("data", html.text(what)))
    rows.append(("trained on", html.text(", ".join(data.get("train_splits", ())))))
    rows.append(("evaluated on", html.text(config.get("eval", {}).get("split", ""))))
    rows.append(("modalities", html.text(", ".join(config.get("modalities", ())))))
    add("seed", "seed")
    add("steps", "step")
    add("best MAP@100", "best_map")
    add("members", "num_members")
    add("parameters", "num_params")
    versions = metrics.get("versions", {})
    if versions:
        words = ", ".join(f"{name} {value}" for name, value in versions.items())
        rows.append(("versions", html.text(words)))
    tables = [html.table("Results", ("result", "value"), results)] if results else []
    yield html.figures(*tables, html.table("The run", ("fact", "value"), rows))
    if run.others:
        rows = [
            (
                html.text(split),
                html.number(facts.get("map")),
                html.text(facts.get("map_kind", "no ground truth")),
                html.number(facts.get("num_clips")),
            )
            for split, facts in run.others.items()
        ]
        yield html.table(
            "Other splits that were evaluated", ("split", "MAP@100", "kind", "clips"), rows
        )
    command = metrics.get("command")
    runs = config.get("join", {}).get("runs", ())
    if not command and runs:
        names = ",".join(runs)
        command = f"python -m vidjax.main --mode=evaluate --workdir={run.folder} --runs={names}"
    if command:
        words = " ".join(f"<span>{html.text(word)}</span>" for word in command.split(" "))
        yield f"<p>The command to repeat it:</p><pre><code>{words}</code></pre>\n"
    else:
        yield html.note("The command is not known: the run was started from Python.")


def _averages(run: Run) -> np.ndarray:
    """Returns the average precision of every identity of the ground truth."""
    known = run.arrays["ap"][run.arrays["positives"] > 0]
    return np.concatenate([known, np.zeros(run.facts["num_others"])])


def _learning(run: Run) -> Iterator[str]:
    train = [line for line in run.lines if "train_loss" in line]
    scored = [line for line in run.lines if "map" in line]
    if not train:
        yield html.p("There is no curve: <code>metrics.jsonl</code> has no line of training.")
        return
    epochs = {line["step"]: line["epoch"] for line in train}
    x = np.array([line["epoch"] for line in train])
    kept = html.few(x)
    loss = np.array([line["train_loss"] for line in train], float)
    plot = html.Plot(x="epoch", y="training loss")
    plot.axes.plot(x[kept], loss[kept], color=html.FIRST, marker="." if len(kept) < 40 else "")
    figures = [
        plot.html(
            "loss",
            "Training loss",
            f"A line from {loss[0]:.3f} at epoch {x[0]:.1f} to {loss[-1]:.3f} at {x[-1]:.1f}.",
        )
    ]
    plot = html.Plot(x="epoch", y="share")
    accuracy = np.array([line["train_accuracy"] for line in train], float)
    plot.axes.plot(x[kept], accuracy[kept], color=html.FIRST, label="training accuracy")
    told = f"Training accuracy ends at {accuracy[-1]:.3f}."
    if scored:
        per_step = x[-1] / max(train[-1]["step"], 1)
        at = [epochs.get(line["step"], line["step"] * per_step) for line in scored]
        values = [line["map"] for line in scored]
        split = scored[-1].get("split", "")
        plot.axes.plot(
            at, values, "o-", color=html.SECOND, ms=4, label=f"MAP@100 on {html.short(split)}"
        )
        told += f" MAP@100 on {split} ends at {values[-1]:.4f}, after {len(values)} evaluations."
    plot.axes.set_ylim(0, 1.02)
    plot.legend()
    figures.append(plot.html("scores", "Accuracy and MAP", told))
    rates = np.array([line["learning_rate"] for line in train], float)
    plot = html.Plot(x="epoch", y="learning rate")
    plot.axes.plot(x[kept], rates[kept], color=html.FIRST)
    told = f"The learning rate peaks at {rates.max():.3g} and ends at {rates[-1]:.3g}."
    figures.append(plot.html("rate", "Learning rate", told))
    yield html.figures(*figures)
    bad = sum(line.get("bad_steps", 0) for line in train)
    if bad:
        yield html.p(f"{bad:.0f} steps were left out: loss or gradient not finite.")


NO_ANALYSIS = (
    "Nothing is known: <code>analysis.npz</code> is absent. "
    "<code>--mode=evaluate</code> of this folder writes it."
)
JOINED = "Nothing is measured here: the runs that are joined have reports of their own."
NO_TRUTH = "Nothing is known: the split has no ground truth."


def _absent(run: Run, name: str) -> str | None:
    """Returns why an array is absent, None where it is there."""
    if name in run.arrays:
        return None
    return html.p(NO_TRUTH if run.facts else NO_ANALYSIS)


def _identities(run: Run) -> Iterator[str]:
    if absent := _absent(run, "ap"):
        yield absent
        return
    values = np.sort(_averages(run))[::-1]
    share = np.arange(1, len(values) + 1) / len(values)
    kept = html.few(values)
    plot = html.Plot(x="share of the identities", y="average precision")
    plot.axes.plot(share[kept], values[kept], color=html.FIRST)
    plot.axes.set_ylim(0, 1.02)
    low, middle = np.quantile(values, [0.1, 0.5])
    told = (
        f"{np.mean(values == 1):.1%} of {len(values):,} identities have an average precision of 1; "
        f"the median is {middle:.3f}, and one tenth is below {low:.3f}."
    )
    first = plot.html("sorted", "Average precision, identities sorted", told)
    plot = html.Plot(x="average precision", y="identities")
    counts, edges = np.histogram(values, 20, (0, 1))
    plot.axes.bar(edges[:-1], counts, 0.045, align="edge", color=html.FIRST)
    second = plot.html("histogram", "How many identities reach what", told)
    yield html.p(html.text(told))
    yield html.figures(first, second)

    def name(identity: int) -> str:
        return html.text(_name(run, identity))

    def names(pairs: Sequence[Sequence[int]], nobody: str) -> str:
        found = [f"{nobody if i < 0 else name(i)} ({count})" for i, count in pairs]
        return ", ".join(found) or "nobody"

    trained = run.arrays.get("train_clips")
    rows = [
        (
            name(one["identity"]),
            html.bar(one["ap"]),
            html.number(one["clips"])
            + ("" if trained is None else f" ({trained[one['identity']]})"),
            f'<td class="name">{names(one["lost_to"], "no list")}</td>',
            f'<td class="name">{names(one["mixed_with"], "distractors")}</td>',
        )
        for one in run.facts["worst"]
    ]
    count = "clips" if trained is None else "clips (trained on)"
    head = ("identity", "average precision", count, "clips lost to", "mixed with")
    yield html.table(f"The {len(rows)} identities of least average precision", head, rows)
    yield html.note(
        "Lost to: in whose list of 100 its clips score best, where not in its own. Mixed with: "
        "whose clips stand at the first places of its own list, as many as it has clips."
    )


def _strata(run: Run) -> Iterator[str]:
    if absent := _absent(run, "ap"):
        yield absent
        return
    yield html.p(
        "MAP of the identities or clips of a kind. For a kind of clips, every list is taken "
        "without the other clips of its identity; distractors and clips of others stay in it."
    )
    for table in run.facts["strata"]:
        rows = [
            (
                html.text(r["label"]),
                html.bar(r["map"]),
                html.number(r["identities"]),
                html.number(r["clips"]),
            )
            for r in table["rows"]
        ]
        head = (table["by"], "MAP@100", "identities", "clips")
        yield html.table(f"By {table['by']}", head, rows)


def _strangers(run: Run) -> Iterator[str]:
    if absent := _absent(run, "score_edges"):
        yield absent
        return
    arrays, logs = run.arrays, run.facts["logs"]
    edges = arrays["score_edges"]
    unit = "best score of a clip" + (" (natural logarithm of a probability)" if logs else "")
    plot = html.Plot(x=unit, y="share of the clips")
    told = []
    kinds = (
        ("known people", "score_known", html.FIRST),
        ("distractors", "score_strange", html.SECOND),
    )
    for name, key, colour in kinds:
        counts = arrays[key]
        if counts.sum():
            share = counts / counts.sum()
            plot.axes.stairs(share, edges, color=colour, label=name, linewidth=1.5)
            top = int(np.argmax(share))
            told.append(
                f"Of {counts.sum():,} clips of {name}, most, {share[top]:.0%}, score "
                f"{edges[top]:.2f} to {edges[top + 1]:.2f}."
            )
    plot.legend()
    figures = [plot.html("best", "Best scores of known clips and of distractors", " ".join(told))]
    if "fpir" in arrays:
        fpir, fnir = arrays["fpir"], arrays["fnir"]
        plot = html.Plot(x="distractors that pass (FPIR)", y="known clips missed (FNIR)")
        drawn = fpir > 0
        plot.axes.plot(fpir[drawn], fnir[drawn], color=html.FIRST)
        plot.axes.set_xscale("log")
        plot.axes.xaxis.set_major_formatter(lambda x, place: f"{x:g}")
        plot.axes.xaxis.set_minor_formatter(lambda x, place: "")
        plot.axes.set_ylim(0, 1.02)
        at = int(np.argmin(np.abs(fpir - 0.01)))
        told = [f"Where {fpir[at]:.1%} of the distractors pass, {fnir[at]:.1%} are missed."]
        figures.append(plot.html("errors", "Missed people against strangers that pass", told[0]))
    if "calibration" in arrays:
        count, confidence, right = arrays["calibration"].T
        seen = count > 0
        gap = run.facts["calibration_error"]
        plot = html.Plot(x="probability that the run gives", y="share that is right")
        plot.axes.plot(
            [0, 1], [0, 1], color=html.MUTED, linewidth=1, linestyle="--", label="perfect"
        )
        plot.axes.plot(
            confidence[seen], right[seen], "o-", color=html.FIRST, ms=4, label="this run"
        )
        plot.legend()
        figures.append(
            plot.html(
                "trust",
                "How far a probability can be trusted",
                f"Probability and share of right answers differ by {gap:.3f} on average.",
                f"How far a probability can be trusted: it is off by {html.number(gap)} on average "
                "(expected calibration error; a distractor is never right).",
            )
        )
    yield html.figures(*figures)
    if "fpir" not in arrays:
        yield html.p("There are no errors by threshold: the split has no distractor.")
    if "calibration" not in arrays:
        yield html.p("There is no calibration: the scores of this run are no probabilities.")


def _attention(run: Run) -> Iterator[str]:
    if "attention" not in run.arrays:
        if not run.facts:
            yield html.p(NO_ANALYSIS)
        elif run.facts["runs"]:
            yield html.p(JOINED)
        else:
            yield html.p(
                "There is no attention matrix: this system has no attention of modalities."
            )
        return
    matrix, names = run.arrays["attention"], run.facts["vectors"]
    size = len(matrix)
    plot = html.Plot(0.55 * size + 1.0, x="vector j, that takes", y="vector i, that is taken from")
    axes, top = plot.axes, max(float(matrix.max()), 1e-9)
    axes.grid(False)
    from matplotlib import colormaps

    colours = colormaps["Blues"]
    axes.pcolormesh(matrix, cmap=colours, vmin=0, vmax=top, edgecolors=html.MUTED, linewidth=0.4)
    axes.invert_yaxis()
    middles = np.arange(size) + 0.5
    axes.set_xticks(middles, [html.short(name) for name in names], rotation=30, ha="right")
    axes.set_yticks(middles, [html.short(name) for name in names])
    for i, j in np.ndindex(matrix.shape):
        red, green, blue, _ = colours(matrix[i, j] / top)
        dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
        shade = "#ffffff" if dark else "#000001"
        axes.text(j + 0.5, i + 0.5, f"{matrix[i, j]:.2f}", ha="center", va="center", color=shade)
    most = [
        f"{names[j]} takes most from {names[int(np.argmax(matrix[:, j]))]}" for j in range(size)
    ]
    told = "; ".join(most) + "."
    yield html.p(
        "The mean over the split of the softmax of the Gram matrix, as figure 10 of the iQIYI-VID "
        "paper shows it: column j says from which vectors i the vector j is completed. It is the "
        "mean over the clips that have vector j, and sums to 1. Of an ensemble it is the first "
        "member's."
    )
    yield plot.html("gram", "Average attention matrix", told)
    rows = [
        (html.text(name), *(html.number(float(value), 3) for value in row))
        for name, row in zip(names, matrix, strict=True)
    ]
    yield html.table("The same as numbers", ("from / to", *names), rows)


def _frames(run: Run) -> Iterator[str]:
    facts = run.facts
    if not facts:
        yield html.p(NO_ANALYSIS)
        return
    if facts["runs"]:
        yield html.p(JOINED)
        return
    for number, (name, shares) in enumerate(facts["assignment"].items()):
        plot = html.Plot(2.2, x="cluster", y="share of the frames")
        plot.axes.bar(np.arange(1, len(shares) + 1), shares, color=html.FIRST)
        plot.axes.set_xticks(np.arange(1, len(shares) + 1))
        told = ", ".join(f"{k + 1}: {share:.0%}" for k, share in enumerate(shares))
        yield html.p(f"How NetVLAD spreads the frames of {html.text(name)} over its clusters:")
        yield plot.html(f"vlad-{number}", f"Clusters of {name}", told)
    if not facts["assignment"]:
        yield html.p("There are no clusters to show: this system has no NetVLAD.")
    clips = facts.get("frames")
    if not clips:
        yield html.p(
            "No frame can be weighed: no clip with ground truth and several frames was scored."
        )
        return
    unit = "logarithm of the probability" if facts["logs"] else "score"
    yield html.p(
        f"Which frames carried the score: the fall of the {unit} of the clip's identity when one "
        "frame is hidden. Below 0, the clip is better without the frame."
    )
    from matplotlib.ticker import MaxNLocator

    figures = []
    for number, one in enumerate(clips):
        falls, quality = np.array(one["falls"]), np.array(one["quality"])
        at = np.arange(1, len(falls) + 1)
        plot = html.Plot(1.9, x=f"frame of {html.short(one['modality'])}, in time order", y="fall")
        plot.axes.bar(at, falls, color=html.FIRST, label="fall of the score")
        plot.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if quality.any():
            plot.twin("quality").plot(at, quality, ".", color=html.SECOND, label="quality")
            plot.legend()
        plot.axes.set_xlim(0.3, len(falls) + 0.7)
        name = _name(run, one["identity"])
        state = "named rightly" if one["right"] else "not named rightly"
        most = int(np.argmax(falls))
        told = f"Frame {most + 1} of {len(falls)} counts most: without it {falls[most]:.3g} less."
        title = f"Frames of clip {one['clip']}"
        caption = f"{html.text(one['clip'])}, identity {html.text(name)}, {state}."
        figures.append(plot.html(f"clip-{number}", title, told, caption))
    yield html.figures(*figures)


def _name(run: Run, identity: int) -> str:
    return run.identities[identity] if identity < len(run.identities) else "unknown"


def _robustness(run: Run) -> Iterator[str]:
    rows = run.facts.get("robustness")
    if not rows:
        if not run.facts:
            yield html.p(NO_ANALYSIS)
        elif run.facts["runs"]:
            yield html.p(JOINED)
        else:
            yield html.p(NO_TRUTH)
        return
    yield html.p(
        f"MAP on a sample of {html.number(run.facts['num_sampled'])} clips that are ranked among "
        "themselves, after something was taken from every clip or added to it."
    )
    plain = rows[0]["map"]
    cells = [
        (html.text(row["change"]), html.bar(row["map"]), f"{row['map'] - plain:+.4f}")
        for row in rows
    ]
    yield html.table("MAP of changed clips", ("change", "MAP@100", "difference"), cells)


def _ensemble(run: Run) -> Iterator[str]:
    members = run.facts.get("members") or run.metrics.get("members", [])
    runs = run.facts.get("runs") or run.metrics.get("runs", [])
    if runs:
        rows = [
            (html.text(one["name"]), html.number(one["weight"]), html.number(one.get("map")))
            for one in runs
        ]
        yield html.table("The runs that are joined", ("run", "weight", "MAP@100 alone"), rows)
    if not members:
        if not runs:
            yield html.p("There are no members: the run trained one net, or did not rank them.")
        return
    gains = run.facts.get("gains")
    kinds = sorted({key for one in members for key in one} - {"map", "member", "run"})
    rows = []
    for number, one in enumerate(members[:MOST_ROWS]):
        name = " ".join(str(one[key]) for key in ("run", "member") if key in one)
        what = ", ".join([name, *(f"{key} {one[key]}" for key in kinds if key in one)])
        value = one.get("map")
        cells = [html.text(what), "none" if value is None else html.bar(value)]
        if gains:
            cells.append(f"{gains[number]:+.4f}")
        rows.append(tuple(cells))
    head = ("member", "MAP@100 alone", *(("marginal gain",) if gains else ()))
    yield html.table("The members, each on the clips that it was not trained on", head, rows)
    if len(members) > MOST_ROWS:
        yield html.note(f"{len(members) - MOST_ROWS} more are in <code>metrics.json</code>.")
    if gains:
        yield html.note(
            "Marginal gain: MAP of all members less MAP without this one, on the sample of "
            f"{html.number(run.facts['num_sampled'])} clips."
        )
    elif run.facts:
        yield html.note(
            "Marginal gains are not measured with more than ten members, or where a clip would be "
            "left without a member that may score it."
        )


def _data(run: Run) -> Iterator[str]:
    splits = run.data.get("splits", {})
    if not splits:
        yield html.p("Nothing is known: <code>data_report.json</code> is absent.")
        return
    for split, facts in splits.items():
        rows = []
        for name, one in facts["modalities"].items():
            skipped = {**one["frames_skipped"], **one["clips_skipped"]}
            reasons = ", ".join(f"{n:,} {why}" for why, n in skipped.items() if n)
            rows.append(
                (
                    html.text(name),
                    html.number(one["clips"]),
                    html.number(one["frames"]),
                    html.number(float(one["frames_per_clip"]["mean"]), 1),
                    f"{100 * one['missing_rate']:.1f} %",
                    html.text(reasons or "nothing"),
                )
            )
        head = ("modality", "clips", "frames", "frames a clip", "clips without", "skipped")
        yield f"<h3>{html.text(split)}</h3>\n"
        yield html.p(html.text(_labels_of(facts)))
        yield html.table(f"What was loaded of {split}", head, rows)
    cropped = run.data.get("cropped_in_an_epoch", {})
    lost = [f"{n['frames']:,} of {name}" for name, n in cropped.items() if n.get("frames")]
    if lost:
        yield html.note(
            f"Frames that training leaves out in an epoch: {html.text(', '.join(lost))}."
        )


def _labels_of(facts: Mapping[str, Any]) -> str:
    clips = f"{facts['clips']:,} clips"
    if not facts.get("labelled"):
        return f"{clips}, no ground truth."
    words = [
        clips,
        f"{facts['identities']:,} identities",
        f"{facts['distractors']:,} clips without one",
    ]
    if facts.get("unknown_clips"):
        words.append(f"{facts['unknown_clips']:,} clips of the ground truth are not there")
    return ", ".join(words) + "."
