"""Sections of the report on the analysis of an evaluation (`analysis.npz`).

Every section is a function from `RunFiles` to parts of HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from vidjax.report import figures, html
from vidjax.report.run_files import RunFiles

NO_ANALYSIS = (
    "There is no <code>analysis.npz</code>. <code>--mode=evaluate</code> of this folder writes it."
)
BLEND = "A blend has no such analysis: see the reports of its runs."
NO_TRUTH = "The split has no ground truth."
LISTS = (
    "Clips lost to: the other identities whose lists rank the clips of this identity highest. "
    "Mixed with: the identities whose clips take the first places of the list, as many places as "
    "the identity has clips. The number of clips is in brackets."
)
STRATA = (
    "MAP of some identities, or of some clips. For a kind of clips, the other clips of the same "
    "identity are removed from its list; distractors and clips of other identities stay."
)
NO_DISTRACTORS = "There are no errors by threshold: the split has no distractor."
NO_PROBABILITIES = "There is no calibration: the scores of this run are not probabilities."
NO_ATTENTION = "This system has no attention between modalities."
ATTENTION = (
    "The mean over the split of the softmax of the Gram matrix, as in figure 10 of the iQIYI-VID "
    "paper. Column j says how much vector j takes from each vector i, on average over the clips "
    "that have vector j; it sums to 1. For an ensemble, this is the first member."
)
NO_NETVLAD = "There are no clusters: this system has no NetVLAD."
NO_FRAMES = "No clip with ground truth and several frames was scored."
FRAMES = (
    "How much each frame contributes: the drop in the {} of the clip's identity when the frame is "
    "hidden. Below 0, the score is higher without the frame."
)
ROBUSTNESS = (
    "MAP on a sample of {} clips, ranked among themselves, after every clip was changed in the "
    "same way."
)


def reason(run: RunFiles, *, blend: bool = False, other: str = NO_TRUTH) -> str:
    """Returns a paragraph on why a part of the analysis is absent.

    Args:
      run: the files of the run.
      blend: True if blends never have this part.
      other: the reason to give if the run has an analysis and is not a blend.
    """
    if not run.analysis:
        return html.p(NO_ANALYSIS)
    return html.p(BLEND if blend and run.analysis["runs"] else other)


def identities(run: RunFiles) -> Iterator[str]:
    """Yields the distribution of average precision, and a table of the worst identities."""
    if "ap" not in run.arrays:
        yield reason(run)
        return
    values = np.sort(run.averages())[::-1]
    low, median = np.quantile(values, [0.1, 0.5])
    perfect = html.percent(float(np.mean(values == 1)), 1)
    description = (
        f"{perfect} of {len(values):,} identities have an average precision of 1. "
        f"The median is {median:.3f}; 10 % are below {low:.3f}."
    )
    shown = figures.few(values)
    share = np.arange(1, len(values) + 1) / len(values)
    curve = figures.Plot(x="share of the identities", y="average precision")
    curve.axes.plot(share[shown], values[shown], color=figures.FIRST)
    curve.axes.set_ylim(0, 1.02)
    histogram = figures.Plot(x="average precision", y="identities")
    counts, edges = np.histogram(values, 20, (0, 1))
    histogram.axes.bar(edges[:-1], counts, 0.045, align="edge", color=figures.FIRST)
    yield html.p(html.text(description))
    yield html.side_by_side(
        curve.html("sorted", "Average precision, identities in descending order", description),
        histogram.html("histogram", "Histogram of average precision", description),
    )
    yield _worst_identities(run)
    yield html.note(LISTS)


def _worst_identities(run: RunFiles) -> str:
    trained = run.arrays.get("train_clips")

    def names(pairs: Sequence[Sequence[int]], nobody: str) -> str:
        words = [
            f"{html.name(nobody if column < 0 else run.identity(column))} ({count})"
            for column, count in pairs
        ]
        return ", ".join(words) or "nobody"

    rows = []
    for row in run.analysis["worst"]:
        clips = html.number(row["clips"])
        if trained is not None:
            clips += f" ({trained[row['identity']]})"
        rows.append(
            (
                html.name(run.identity(row["identity"])),
                html.bar(row["ap"]),
                clips,
                names(row["lost_to"], "no list"),
                names(row["mixed_with"], "distractors"),
            )
        )
    count = "clips" if trained is None else "clips (trained on)"
    head = ("identity", "average precision", count, "clips lost to", "mixed with")
    return html.table(f"The {len(rows)} identities with the lowest average precision", head, rows)


def strata(run: RunFiles) -> Iterator[str]:
    """Yields a table of MAP for every way to divide identities or clips into groups."""
    if "ap" not in run.arrays:
        yield reason(run)
        return
    yield html.p(STRATA)
    for table in run.analysis["strata"]:
        rows = [
            (
                html.name(row["label"]),
                html.bar(row["map"]),
                html.number(row["identities"]),
                html.number(row["clips"]),
            )
            for row in table["rows"]
        ]
        head = (table["by"], "MAP@100", "identities", "clips")
        yield html.table(f"By {table['by']}", head, rows)


def open_set(run: RunFiles) -> Iterator[str]:
    """Yields histograms of scores, errors by threshold, and the calibration."""
    if "score_edges" not in run.arrays:
        yield reason(run)
        return
    parts = [_score_histograms(run)]
    if "fpir" in run.arrays:
        parts.append(_errors(run))
    if "calibration" in run.arrays:
        parts.append(_calibration(run))
    yield html.side_by_side(*parts)
    if "fpir" not in run.arrays:
        yield html.p(NO_DISTRACTORS)
    if "calibration" not in run.arrays:
        yield html.p(NO_PROBABILITIES)


def _score_histograms(run: RunFiles) -> str:
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
                f"with {html.percent(share[top])} of them."
            )
    plot.legend()
    title = "Best scores of known clips and of distractors"
    return plot.html("best", title, " ".join(sentences))


def _errors(run: RunFiles) -> str:
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
        f"Where {html.percent(fpir[nearest], 1)} of the distractors pass, "
        f"{html.percent(fnir[nearest], 1)} of the known clips are missed."
    )
    return plot.html("errors", "Known clips missed against distractors that pass", description)


def _calibration(run: RunFiles) -> str:
    count, confidence, right = run.arrays["calibration"].T
    filled = count > 0
    error = run.analysis["calibration_error"]
    plot = figures.Plot(x="probability of the best identity", y="share that is right")
    plot.axes.plot(
        [0, 1], [0, 1], color=figures.MUTED, linewidth=1, linestyle="--", label="perfect"
    )
    plot.axes.plot(
        confidence[filled], right[filled], "o-", color=figures.FIRST, ms=4, label="this run"
    )
    plot.legend()
    return plot.html(
        "trust",
        "Calibration of the probabilities",
        f"The expected calibration error is {error:.3f}.",
        f"Calibration: the expected calibration error is {html.number(error)}. "
        "A distractor is never right.",
    )


def attention(run: RunFiles) -> Iterator[str]:
    """Yields the average attention matrix as a heat map and as a table."""
    if "attention" not in run.arrays:
        yield reason(run, blend=True, other=NO_ATTENTION)
        return
    matrix, names = run.arrays["attention"], run.analysis["vectors"]
    plot = figures.Plot(
        0.55 * len(matrix) + 1.0, x="vector j (receives)", y="vector i (contributes)"
    )
    figures.draw_heat_map(plot.axes, matrix, names)
    most = [
        f"{name} takes most from {names[int(np.argmax(column))]}"
        for name, column in zip(names, matrix.T, strict=True)
    ]
    yield html.p(ATTENTION)
    yield plot.html("gram", "Average attention matrix", "; ".join(most) + ".")
    rows = [
        (html.name(name), *(html.number(float(value), 3) for value in row))
        for name, row in zip(names, matrix, strict=True)
    ]
    yield html.table("The same matrix as numbers", ("from / to", *names), rows)


def frames(run: RunFiles) -> Iterator[str]:
    """Yields the NetVLAD clusters, and how much single frames of some clips contribute."""
    if not run.analysis or run.analysis["runs"]:
        yield reason(run, blend=True)
        return
    for i, (name, shares) in enumerate(run.analysis["assignment"].items()):
        yield html.p(f"Share of the frames of {html.text(name)} in each NetVLAD cluster:")
        yield _clusters(f"vlad-{i}", name, shares)
    if not run.analysis["assignment"]:
        yield html.p(NO_NETVLAD)
    clips = run.analysis.get("frames")
    if not clips:
        yield html.p(NO_FRAMES)
        return
    unit = "logarithm of the probability" if run.analysis["logs"] else "score"
    yield html.p(FRAMES.format(unit))
    yield html.side_by_side(
        *(_frame_drops(f"clip-{i}", run.identity(c["identity"]), c) for i, c in enumerate(clips))
    )


def _clusters(key: str, name: str, shares: Sequence[float]) -> str:
    numbers = np.arange(1, len(shares) + 1)
    plot = figures.Plot(2.2, x="cluster", y="share of the frames")
    plot.axes.bar(numbers, shares, color=figures.FIRST)
    plot.axes.set_xticks(numbers)
    description = ", ".join(
        f"{k}: {html.percent(share)}" for k, share in enumerate(shares, start=1)
    )
    return plot.html(key, f"Clusters of {name}", description)


def _frame_drops(key: str, identity: str, clip: Mapping[str, Any]) -> str:
    """Returns a figure of the drop in score per hidden frame of a clip, with frame quality."""
    drops, quality = np.array(clip["falls"]), np.array(clip["quality"])
    places = np.arange(1, len(drops) + 1)
    modality = figures.short(clip["modality"])
    plot = figures.Plot(1.9, x=f"frame of {modality}, in time order", y="drop")
    plot.axes.bar(places, drops, color=figures.FIRST, label="drop in the score")
    plot.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if quality.any():
        plot.twin("quality").plot(places, quality, ".", color=figures.SECOND, label="quality")
        plot.legend()
    plot.axes.set_xlim(0.3, len(drops) + 0.7)
    state = "identified correctly" if clip["right"] else "not identified correctly"
    most = int(np.argmax(drops))
    description = (
        f"Frame {most + 1} of {len(drops)} contributes most: hiding it lowers the score by "
        f"{drops[most]:.3g}."
    )
    caption = f"{html.text(clip['clip'])}, identity {html.text(identity)}, {state}."
    return plot.html(key, f"Frames of clip {clip['clip']}", description, caption)


def robustness(run: RunFiles) -> Iterator[str]:
    """Yields a table of MAP after changes to every clip, such as a missing modality."""
    changes = run.analysis.get("robustness")
    if not changes:
        yield reason(run, blend=True)
        return
    yield html.p(ROBUSTNESS.format(html.number(run.analysis["num_sampled"])))
    unchanged = changes[0]["map"]
    rows = [
        (html.name(row["change"]), html.bar(row["map"]), f"{row['map'] - unchanged:+.4f}")
        for row in changes
    ]
    yield html.table("MAP of changed clips", ("change", "MAP@100", "difference"), rows)
