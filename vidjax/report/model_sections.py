"""Sections of the report on the inside of a model: attention, NetVLAD clusters, single frames.

Every section is a function from `RunFiles` to parts of HTML, none where there is nothing to show.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vidjax.report import figures, html
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles

ATTENTION = (
    "The mean over the split of the softmax of the Gram matrix, as in figure 10 of the iQIYI-VID "
    "paper. Column j says how much vector j takes from each vector i, on average over the clips "
    "in which it takes anything; it sums to 1. For an ensemble, this is the first member."
)
FRAMES = (
    "How much each frame contributes: the drop in the {} of the clip's identity when the frame is "
    "hidden. Below 0, the score is higher without the frame."
)
OWN = (
    "Every vector takes from itself alone: no entry beside the diagonal of the average attention "
    "matrix is above {}. The modalities {} do not exchange information by attention."
)
UNIT = 0.005  # a matrix that differs less from the unit matrix is said in words


def attention(run: RunFiles) -> Iterator[Html]:
    """Yields the average attention matrix as a heat map; a unit matrix as a sentence."""
    if "attention" not in run.arrays:
        return
    matrix, names = run.arrays["attention"], run.analysis["vectors"]
    beside = float(np.max(matrix - np.diag(np.diag(matrix)), initial=0.0))
    if len(matrix) > 1 and np.abs(matrix - np.eye(len(matrix))).max() < UNIT:
        yield html.p(html.fill(OWN, html.number(beside), html.text(", ".join(names))))
        return
    size = max(0.42 * len(matrix) + 1.0, 2.2)
    plot = figures.Plot(size, x="vector j (receives)", y="vector i (contributes)")
    figures.draw_heat_map(plot.axes, matrix, names)
    most = [
        f"{name} takes most from {names[int(np.argmax(column))]}"
        for name, column in zip(names, matrix.T, strict=True)
    ]
    yield html.p(ATTENTION)
    yield html.figures(plot.html("gram", "Average attention matrix", "; ".join(most) + "."))


def frames(run: RunFiles) -> Iterator[Html]:
    """Yields the NetVLAD clusters, and how much single frames of some clips contribute."""
    clusters = run.analysis.get("assignment", {})
    if clusters:
        yield html.p("Share of the frames in each NetVLAD cluster:")
        yield html.figures(
            *(_clusters(f"vlad-{i}", *item) for i, item in enumerate(clusters.items()))
        )
    clips = run.analysis.get("frames")
    if clips:
        unit = "logarithm of the probability" if run.analysis["logs"] else "score"
        yield html.p(html.fill(FRAMES, unit))
        yield html.figures(
            *(_frame_drops(f"clip-{i}", run.identity(c["identity"]), c)
              for i, c in enumerate(clips))
        )  # fmt: skip


def _clusters(key: str, name: str, shares: Sequence[float]) -> Html:
    numbers = np.arange(1, len(shares) + 1)
    plot = figures.Plot(2.2, x="cluster", y="share of the frames")
    plot.axes.bar(numbers, shares, color=figures.FIRST)
    plot.axes.set_xticks(numbers)
    description = ", ".join(f"{k}: {100 * share:.0f} %" for k, share in enumerate(shares, start=1))
    return plot.html(key, f"Clusters of {name}", description, small=True)


def _frame_drops(key: str, identity: str, clip: Mapping[str, Any]) -> Html:
    """Returns a figure of the drop in score per hidden frame of a clip, with frame quality."""
    drops, quality = np.array(clip["falls"]), np.array(clip["quality"])
    places = np.arange(1, len(drops) + 1)
    modality = figures.short(clip["modality"])
    plot = figures.Plot(1.9, x=f"frame of {modality}, in time order", y="drop")
    plot.axes.bar(places, drops, color=figures.FIRST, label="drop in the score")
    plot.count("x")
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
    words = "{}, identity {}, {}."
    caption = html.fill(words, html.name(clip["clip"]), html.name(identity), state)
    return plot.html(key, f"Frames of clip {clip['clip']}", description, caption)
