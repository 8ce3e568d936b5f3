"""The section of the report on known people, distractors, thresholds and calibration."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vidjax.report import figures, html
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles

NO_DISTRACTORS = "There are no errors by threshold: the split has no distractor."
NO_PROBABILITIES = "There is no calibration: the scores of this run are not probabilities."
SAMPLE = (
    "{} clips of {} known people and {} distractors, each compared with {} identities. A gallery "
    "of this run sets a threshold of its own on the strangers that it holds, since the best score "
    "of a stranger depends on the number of identities: by default one that 1 % of them reach. A "
    "clip that does not reach it is unknown, and so is one that shows somebody new more probably."
)
INTERVALS = (
    "FPIR is the share of these distractors that pass; its interval is where the share of other "
    "such distractors lies in 95 % of samples (exact, from the beta distribution of the order "
    "statistic). FNIR has a 95 % interval from a bootstrap of {} resamples of the people, with all "
    "their clips, and of the distractors, which set the threshold anew; where fewer than "
    "four distractors pass it is too narrow."
)
TOO_FEW = (
    "{} distractors cannot show a rate of {}, which takes {} or more: there is no threshold for it."
)
OUT_OF_FOLD = (
    "These thresholds are of scores out of fold, of few members each. They are too strict for a "
    "new clip, which has the mean of all members."
)
BOTH = (
    "Calibration: on average a probability is {} away from the share of clips that are right (the "
    "expected calibration error), and {} after a correction, which multiplies the log-odds by a "
    "slope and adds an offset. Two corrections were fitted, each on a half of the people and "
    "measured on the other: {}. A slope below 1 says that the run is too sure, one above 1 that it "
    "is not sure enough. A distractor is never right."
)
BEFORE = (
    "Calibration: on average a probability is {} away from the share of clips that are right (the "
    "expected calibration error). A distractor is never right."
)
CORRECTION = "slope {} with offset {}"


def open_set(run: RunFiles) -> Iterator[Html]:
    """Yields histograms of scores, errors by threshold with a table, and the calibration."""
    if "score_edges" not in run.arrays:
        return
    parts = [_score_histograms(run)]
    if "fpir" in run.arrays:
        parts.append(_errors(run))
    if "calibration" in run.arrays:
        parts.append(_calibration(run))
    yield html.figures(*parts)
    yield from _thresholds(run)
    if "fpir" not in run.arrays:
        yield html.p(NO_DISTRACTORS)
    if "calibration" not in run.arrays:
        yield html.p(NO_PROBABILITIES)


def _score_histograms(run: RunFiles) -> Html:
    edges = run.arrays["score_edges"]
    unit = " (natural logarithm of a probability)" if run.analysis["logs"] else ""
    plot = figures.Plot(x=f"best score of a clip{unit}", y="share of the clips")
    sentences = []
    for name, key, colour in (
        ("known people", "score_known", figures.FIRST),
        ("distractors", "score_strange", figures.SECOND),
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
    title = "Best scores of known clips and of distractors"
    return plot.html("best", title, " ".join(sentences))


def _errors(run: RunFiles) -> Html:
    """Returns the open-set curve, with the thresholds of the table as points."""
    fpir, fnir = run.arrays["fpir"], run.arrays["fnir"]
    plot = figures.Plot(x="distractors that pass (FPIR)", y="known clips missed (FNIR)")
    drawn = fpir > 0
    plot.axes.plot(fpir[drawn], fnir[drawn], color=figures.FIRST)
    plot.axes.set_xscale("log")
    plot.axes.xaxis.set_major_formatter(lambda x, place: f"{x:g}")
    plot.axes.xaxis.set_minor_formatter(lambda x, place: "")
    plot.axes.set_ylim(0, 1.02)
    nearest = int(np.argmin(np.abs(fpir - 0.01)))
    description = (
        f"Where {100 * fpir[nearest]:.1f} % of the distractors pass, "
        f"{100 * fnir[nearest]:.1f} % of the known clips are missed."
    )
    for row in _rates(run):
        if row.get("threshold") is None:
            continue
        errors = [[row["fnir"] - row["fnir_low"]], [row["fnir_high"] - row["fnir"]]]
        plot.axes.errorbar(
            [row["fpir"]], [row["fnir"]], np.maximum(errors, 0), fmt="o", color=figures.SECOND,
            capsize=3, ms=5,
        )  # fmt: skip
        plot.axes.annotate(
            f"{row['threshold']:.3g}", (row["fpir"], row["fnir"]), (6, 6),
            textcoords="offset points", color=figures.SECOND,
        )  # fmt: skip
        description += (
            f" The threshold {row['threshold']:.3g} for {100 * row['rate']:.3g} % misses "
            f"{100 * row['fnir']:.1f} % of the known clips."
        )
    return plot.html(
        "errors",
        "Known clips missed against distractors that pass",
        description,
        "Known clips missed against distractors that pass; points are thresholds of the table, "
        "with their intervals."
        if _rates(run)
        else "",
    )


def _rates(run: RunFiles) -> list[Mapping[str, Any]]:
    """Returns the rows of the table of thresholds; none in runs of earlier versions."""
    return (run.analysis.get("open_set") or {}).get("rates", [])


def _thresholds(run: RunFiles) -> Iterator[Html]:
    """Yields the thresholds of some rates of false alarms, with intervals."""
    found = run.analysis.get("open_set")
    if not found:
        return
    counts = ("num_known", "num_people", "num_strange", "num_identities")
    yield html.p(html.fill(SAMPLE, *(html.number(found[name]) for name in counts)))
    shown = [row for row in found["rates"] if row.get("threshold") is not None]
    rows = [
        (
            html.percent(row["rate"], 1),
            html.number(row["threshold"]),
            html.percent(row["fpir"], 2),
            _between(row["fpir_low"], row["fpir_high"], 2),
            html.percent(row["fnir"], 1),
            _between(row["fnir_low"], row["fnir_high"], 1),
        )
        for row in shown
    ]
    for row in found["rates"]:
        if row not in shown:
            numbers = html.number(found["num_strange"]), html.percent(row["rate"], 1)
            yield html.p(html.fill(TOO_FEW, *numbers, html.number(row["fewest"])))
    if not shown:
        return
    head = ("FPIR wanted", "threshold", "FPIR", "95 % interval", "FNIR", "95 % interval")
    yield html.table("Thresholds from which a clip is named", head, rows)
    if run.metrics.get("map_kind") == "out_of_fold" and run.metrics.get("num_members") != 1:
        yield html.note(OUT_OF_FOLD)
    yield html.note(html.fill(INTERVALS, html.number(found["resamples"])))


def _between(low: float, high: float, digits: int) -> Html:
    return html.Number(html.fill("{} to {}", html.percent(low, digits), html.percent(high, digits)))


def _calibration(run: RunFiles) -> Html:
    """Returns the reliability diagram, before and after the map of the log-odds."""
    error, after = run.analysis["calibration_error"], run.arrays.get("calibration_after")
    plot = figures.Plot(x="probability of the best identity", y="share that is right")
    plot.axes.plot(
        [0, 1], [0, 1], color=figures.MUTED, linewidth=1, linestyle="--", label="perfect"
    )
    _draw(plot, run.arrays["calibration"], figures.FIRST, "this run" if after is None else "before")
    description, caption = f"The expected calibration error is {error:.3f}.", ""
    if after is None:
        caption = html.fill(BEFORE, html.number(error))
    else:
        _draw(plot, after, figures.SECOND, "after")
        better = run.analysis["calibration_error_after"]
        maps = html.join(
            (
                html.fill(CORRECTION, html.number(row["slope"], 2), html.number(row["offset"], 2))
                for row in run.analysis["calibration_maps"]
            ),
            ", and ",
        )
        description = f"The expected calibration error is {error:.3f}, and {better:.3f} after."
        caption = html.fill(BOTH, html.number(error), html.number(better), maps)
    plot.legend()
    return plot.html("trust", "Calibration of the probabilities", description, caption)


def _draw(plot: figures.Plot, bins: np.ndarray, colour: str, label: str) -> None:
    """Draws confidence and share that is right of the bins [n, 3] that hold a clip."""
    count, confidence, right = bins.T
    filled = count > 0
    plot.axes.plot(confidence[filled], right[filled], "o-", color=colour, ms=4, label=label)
