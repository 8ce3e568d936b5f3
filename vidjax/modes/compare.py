"""Runs side by side: differences of MAP with intervals, identity by identity.

Nothing is computed by a model: the average precisions are those that evaluation left in
`analysis.npz`, or follow from `ranking.txt` and the ground truth.
"""

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax import config as config_lib
from vidjax.data.clips import TrainingData
from vidjax.report import html
from vidjax.run import results as results_lib
from vidjax.run import workdir

RESAMPLES = 10_000
DRAWS = 2**22  # of identities at a time
LEVEL = 0.95
FILES = ("comparison.md", "comparison.csv", "comparison.html")
MOST_SHOWN = 20  # identities of a page
FEW = 50  # identities, below which intervals are too narrow
EQUAL = 1e-9  # average precisions that differ by less do not differ


class Ranked(NamedTuple):
    """What a run reached on a split.

    Attributes:
      name: the folder, as it was given.
      split: which one.
      identities: [C] those of the ground truth that the run knows.
      ap: [C] float, their average precision.
      positives: [C] int, their clips.
      num_others: identities of the ground truth that the run does not know.
      map_kind: `val`, `out_of_fold` or `in_sample`.
      num_clips: how many were ranked.
      made: what a synthetic dataset is made of.
    """

    name: str
    split: str
    identities: tuple[str, ...]
    ap: np.ndarray
    positives: np.ndarray
    num_others: int
    map_kind: str
    num_clips: int
    made: tuple[Any, ...]


class Difference(NamedTuple):
    """How a run compares with the first one.

    Attributes:
      mean: its MAP less that of the first.
      low, high: the 95 % interval of it.
      p: two-sided, of no difference.
      p_holm: the same, corrected for the number of runs.
      better, worse, equal: identities by their average precision.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    better: int
    worse: int
    equal: int


def compare(
    folders: Sequence[str],
    out: Path,
    load: Callable[[Any], Any],
    *,
    split: str | None = None,
    directory: str | None = None,
) -> str:
    """Compares runs with the first of them; writes `comparison.*` and returns a table to print.

    Args:
      folders: of the runs, two or more.
      out: where to write, an existing folder.
      load: configuration -> `Dataset`, for a run without `analysis.npz`.
      split: which one to compare on; None for the one that the runs watched.
      directory: where the data lies now; None for where it lay.

    Raises:
      ValueError: a run has no results on the split, or they are of other clips or identities.
    """
    if len(folders) < 2:
        raise ValueError(f"--runs={','.join(folders)}: a comparison wants two runs or more")
    if len({Path(name).resolve() for name in folders}) < len(folders):
        raise ValueError(f"--runs={','.join(folders)}: a run is named twice")
    runs = [read(name, load, split=split, directory=directory) for name in folders]
    runs = [runs[0], *(align(runs[0], run) for run in runs[1:])]
    found = differences([run.ap for run in runs])
    names = _short([run.name for run in runs])
    contents = (_markdown(runs, found), _csv(runs, names), _html(runs, names, found))
    for file, content in zip(FILES, contents, strict=True):
        workdir.write_text(out / file, html.plain(content))
    return _printed(runs, found)


# What is compared.


def read(
    name: str,
    load: Callable[[Any], Any],
    *,
    split: str | None = None,
    directory: str | None = None,
) -> Ranked:
    """Returns what the run in a folder reached; arguments as of `compare`.

    Raises:
      ValueError: it has no results on the split, or no ground truth, or files of several
        evaluations.
    """
    folder = Path(name).expanduser().absolute()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--runs: no run in '{name}' (no config.json)\nname folders that training has made"
        )
    config = config_lib.load_workdir(folder)
    own: str = config.eval.split
    which = split or own
    paths = results_lib.paths(folder, which, own)
    results = _results(name, paths.metrics, which)
    sources = [config_lib.load_workdir(Path(run)) for run in config.join.runs[:1]]
    if sources and config.data.dir:
        sources[0].data.dir = config.data.dir
    config = (sources or [config])[0]  # the data of joined runs is that of each
    if directory is not None:
        config.data.dir = directory

    names = tuple(_identities(folder, paths.ranking))
    num_others, arrays = 0, {}
    if paths.analysis.exists():
        facts, arrays = results_lib.load_analysis(paths.analysis)
        num_others = facts.get("num_others", 0)
    if "ap" in arrays:
        ap, positives = arrays["ap"], arrays["positives"]
        source = paths.analysis.name
    else:
        ap, positives, num_others = _of_ranking(paths.ranking, names, load(config), which, results)
        source = paths.ranking.name
    if len(names) != len(ap):
        raise ValueError(f"'{name}': {len(names)} identities, but {len(ap)} in {source}")
    known = positives > 0
    value = ap[known].sum() / (known.sum() + num_others)
    if abs(value - results["map"]) > 1e-9:
        raise ValueError(
            f"'{name}': MAP is {value:.4f} by {source} and {results['map']:.4f} by "
            f"{paths.metrics.name}\n{_rank_it(name, which)}"
        )
    return Ranked(
        name=name,
        split=which,
        identities=tuple(itertools.compress(names, known)),
        ap=np.asarray(ap[known], np.float64),
        positives=np.asarray(positives[known], np.int64),
        num_others=num_others,
        map_kind=results["map_kind"],
        num_clips=results["num_clips"],
        made=(config.data.size, config.data.seed) if config.data.name == "synthetic" else (),
    )


def _results(name: str, path: Path, split: str) -> dict[str, Any]:
    try:
        results = workdir.read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"'{name}' has no results on split '{split}' ({path.name})\n{_rank_it(name, split)}"
        ) from None
    if results.get("map") is None:
        raise ValueError(
            f"'{name}' has no MAP on split '{split}', which has no ground truth\n"
            "compare on another: --config.eval.split=val"
        )
    return results


def _rank_it(name: str, split: str) -> str:
    return (
        "this ranks it anew: python -m vidjax.main --mode=evaluate "
        f"--workdir={name} --config.eval.split={split}"
    )


def _identities(folder: Path, ranking: Path) -> list[str]:
    """Returns the identities of the columns; a folder of joined runs has them in its ranking."""
    path = folder / "identities.json"
    if path.exists():
        return workdir.read_json(path, list)
    lines = ranking.read_text().splitlines()
    return [line.split(" ", 1)[0] for line in lines]


def _of_ranking(
    path: Path, names: Sequence[str], data: TrainingData, split_name: str, results: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns average precisions [C], positives [C] and the number of other identities."""
    if results["map_kind"] == "out_of_fold":
        raise ValueError(
            f"'{path.parent}': which clips every member left out is not in its ranking\n"
            "--mode=evaluate of it writes analysis.npz, which says so"
        )
    from vidjax import metrics, ranking

    listed = ranking.load_ranking(path, identities=names)
    split = data.with_identities(names).split(split_name)
    row = {clip.removesuffix(".mp4") + ".mp4": i for i, clip in enumerate(split.clips)}
    hits = np.zeros((len(names), ranking.MAX_NAMES), bool)
    for column, name in enumerate(names):
        for place, clip in enumerate(listed.get(name, ())):
            if clip not in row:
                raise ValueError(f"{path}: clip {clip!r} is not in the data; another folder?")
            hits[column, place] = split.labels[row[clip]] == column + 1
    ap = metrics.average_precision(hits, split.positives)
    return ap, np.asarray(split.positives), split.num_others


def align(first: Ranked, run: Ranked) -> Ranked:
    """Returns a run with its identities in the order of the first.

    Raises:
      ValueError: the two did not rank the same clips for the same identities.
    """
    both = f"'{first.name}' and '{run.name}'"
    if run.split != first.split:
        raise ValueError(
            f"{both} are of two splits, {first.split} and {run.split}\n"
            "compare on one that both have ranked: --config.eval.split=val"
        )
    if run.made != first.made:
        raise ValueError(
            f"{both} ranked different data: {_made(first)} and {_made(run)}\n"
            "compare runs that were evaluated on the same clips"
        )
    place = {name: i for i, name in enumerate(run.identities)}
    missing = [name for name in first.identities if name not in place]
    extra = sorted(place.keys() - set(first.identities))
    if missing or extra:
        one = (missing or extra)[0]
        where = run.name if missing else first.name
        raise ValueError(
            f"{both} ranked other identities: {len(first.identities)} and {len(run.identities)}, "
            f"of which\n{len(missing) + len(extra)} are in one alone, as '{one}', which "
            f"'{where}' has not"
        )
    order = np.array([place[name] for name in first.identities], int)
    positives = run.positives[order]
    differ = np.flatnonzero(positives != first.positives)
    if len(differ) or run.num_clips != first.num_clips:
        text = f"{first.num_clips} and {run.num_clips} clips"
        if len(differ):
            i = differ[0]
            text += (
                f"; '{first.identities[i]}' has {first.positives[i]} in the one "
                f"and {positives[i]} in the other"
            )
        raise ValueError(
            f"{both} ranked other clips: {text}\ncompare runs that were evaluated on the same clips"
        )
    return run._replace(identities=first.identities, ap=run.ap[order], positives=positives)


def _made(run: Ranked) -> str:
    if not run.made:
        return "files"
    return f"synthetic, size {run.made[0]}, seed {run.made[1]}"


# How sure a difference is.


def differences(aps: Sequence[np.ndarray]) -> list[Difference]:
    """Returns how every [C] of average precisions but the first compares with the first."""
    found = []
    for ap in aps[1:]:
        gap = ap - aps[0]
        gap = np.where(np.abs(gap) < EQUAL, 0.0, gap)
        (low,), (high,), (p,) = bootstrap(gap)
        better, worse = int(np.sum(gap > 0)), int(np.sum(gap < 0))
        mean = float(ap.mean() - aps[0].mean())
        found.append(
            Difference(
                mean, float(low), float(high), float(p), 1.0, better, worse,
                len(gap) - better - worse,
            )
        )  # fmt: skip
    corrected = holm([one.p for one in found])
    return [one._replace(p_holm=p) for one, p in zip(found, corrected, strict=True)]


def bootstrap(
    gaps: np.ndarray, *, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the 95 % interval of a mean, and the p of its being 0, by resampled identities.

    The bootstrap is studentised and symmetric: it looks at how far the mean of a resample is from
    the mean of the sample, in standard errors of the resample. Of few and skewed differences it
    covers the true mean more often than percentiles of the means do: of skewed differences of 50
    identities or more, in 95 +- 2 % of simulations. The same numbers give the same result.

    Args:
      gaps: [C] float, paired differences; or [R, C], one experiment a row.
      resamples: how many.

    Returns:
      low [R], high [R] and p [R], two-sided; R = 1 of one experiment.

    Source: P. Hall, On symmetric bootstrap confidence intervals, 1988.
    """
    gaps = np.atleast_2d(np.asarray(gaps, np.float64))
    num = gaps.shape[1]
    mean = gaps.mean(axis=1)
    rest = gaps - mean[:, None]
    spread = np.sqrt(np.mean(rest**2, axis=1))
    rng = np.random.default_rng(0)
    rows = max(1, DRAWS // num)
    means, variances = [], []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(0, num, (count, num)) + num * np.arange(count)[:, None]
        share = np.bincount(drawn.ravel(), minlength=count * num).reshape(count, num) / num
        means.append(rest @ share.T)
        variances.append(rest**2 @ share.T - means[-1] ** 2)
    far = np.abs(np.concatenate(means, axis=1))  # [R, resamples]
    variance = np.concatenate(variances, axis=1)
    # A resample whose identities are all alike has no error of its own: the least of the others.
    alike = variance <= 1e-9 * spread[:, None] ** 2
    least = np.min(variance, axis=1, where=~alike, initial=np.inf)
    variance = np.where(alike, np.where(np.isfinite(least), least, 1.0)[:, None], variance)
    far /= np.sqrt(variance)
    half = np.quantile(far, LEVEL, axis=1) * spread
    seen = np.abs(mean) / np.where(spread > 0, spread, 1.0)
    seen = np.where((spread == 0) & (mean != 0), np.inf, seen)
    p = (1 + np.sum(far >= seen[:, None], axis=1)) / (1 + resamples)
    return mean - half, mean + half, p


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p of several tests, corrected by Holm's method: none below its own."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


# What is shown.


def _table(
    runs: Sequence[Ranked], found: Sequence[Difference]
) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the table: text, without marks of any format."""
    head = ["run", "MAP@100", "difference", "95 % interval", "p"]
    if len(found) > 1:
        head.append("p (Holm)")
    head += ["better", "worse", "equal"]
    rows = [[runs[0].name, f"{runs[0].ap.mean():.4f}", *[""] * (len(head) - 2)]]
    for run, one in zip(runs[1:], found, strict=True):
        ps = [one.p] if len(found) == 1 else [one.p, one.p_holm]
        rows.append(
            [
                run.name,
                f"{run.ap.mean():.4f}",
                f"{one.mean:+.4f}",
                f"{one.low:+.4f} to {one.high:+.4f}",
                *(_p(p) for p in ps),
                f"{one.better:,}",
                f"{one.worse:,}",
                f"{one.equal:,}",
            ]
        )
    return head, rows


def _p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _about(runs: Sequence[Ranked]) -> list[str]:
    """Returns sentences on what was compared, and how."""
    first = runs[0]
    kinds = sorted({run.map_kind.replace("_", " ") for run in runs})
    text = [
        f"{len(first.identities):,} identities and {first.num_clips:,} clips of {first.split} "
        f"(MAP: {', '.join(kinds)}). Differences are to {first.name}.",
        f"Interval and p: studentised bootstrap over the identities, paired, symmetric, "
        f"{RESAMPLES:,} resamples. Better, worse, equal: identities by average precision.",
    ]
    if len(runs) > 2:
        text.append(
            "p (Holm) is corrected for the number of runs that are compared with the first; every "
            "interval stands for itself."
        )
    if len(first.identities) < FEW:
        text.append(f"With fewer than {FEW} identities the interval is too narrow.")
    if first.num_others:
        text.append(
            f"{first.num_others:,} identities of the ground truth that no run knows are left out."
        )
    if "in sample" in kinds:
        text.append("In sample: clips that a run was trained on are scored, which says nothing.")
    return text


def _printed(runs: Sequence[Ranked], found: Sequence[Difference]) -> str:
    head, rows = _table(runs, found)
    if "p (Holm)" in head:  # the other is in the files
        rows = [[*row[:4], *row[5:]] for row in rows]
        head = [*head[:4], *head[5:]]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in [head, *rows]
    ]
    first = runs[0]
    total = (
        f"{len(first.identities):,} identities, {first.num_clips:,} clips of {first.split}; "
        f"differences are to {first.name}"
    )
    return "\n".join([total, *(f"  {line}" for line in lines)])


def _markdown(runs: Sequence[Ranked], found: Sequence[Difference]) -> str:
    head, rows = _table(runs, found)
    marks = ["---", *["---:"] * (len(head) - 1)]
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in [head, marks, *rows]]
    return "\n".join(["# Comparison", "", *lines, "", *_about(runs), ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _csv(runs: Sequence[Ranked], names: Sequence[str]) -> str:
    """Returns a line an identity: its clips, what every run reaches, differences to the first."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    gaps = [f"{name} - {names[0]}" for name in names[1:]]
    writer.writerow(["identity", "clips", *names, *gaps])
    for i, (identity, clips) in enumerate(
        zip(runs[0].identities, runs[0].positives.tolist(), strict=True)
    ):
        values = [float(run.ap[i]) for run in runs]
        writer.writerow([identity, clips, *values, *(value - values[0] for value in values[1:])])
    return content.getvalue()


def _short(names: Sequence[str]) -> list[str]:
    """Returns the last parts of paths, or the whole of them where these are not enough."""
    last = [Path(name).absolute().name for name in names]
    return last if len(set(last)) == len(last) else list(names)


def _html(runs: Sequence[Ranked], names: Sequence[str], found: Sequence[Difference]) -> str:
    title = html.text(f"{', '.join(names[:-1])} and {names[-1]}")
    sections = [
        ("summary", "Summary", _summary(runs, names, found)),
        ("identities", "Identities", _by_identity(runs, names)),
    ]
    return html.make(
        f"Comparison of {title}",
        sections,
        footer="Made by vidjax from the results of these runs. It holds names of\n"
        "identities, and no feature.",
    )


def _summary(
    runs: Sequence[Ranked], names: Sequence[str], found: Sequence[Difference]
) -> Iterator[str]:
    head, rows = _table(runs, found)
    cells = [[html.text(cell) for cell in row] for row in rows]
    yield html.table(f"MAP and its difference to {runs[0].name}", head, cells)
    for sentence in _about(runs):
        yield html.p(html.text(sentence))
    plot = html.Plot(1.2 + 0.35 * len(found), x="difference of MAP@100, 95 % interval")
    places = np.arange(len(found))
    plot.axes.axvline(0, color=html.MUTED, linewidth=1)
    plot.axes.hlines(
        places, [one.low for one in found], [one.high for one in found], color=html.FIRST
    )
    plot.axes.plot([one.mean for one in found], places, "o", color=html.FIRST)
    plot.axes.set_yticks(places, [html.plain(name) for name in names[1:]])
    plot.axes.set_ylim(len(found) - 0.5, -0.5)
    told = " ".join(
        f"{name}: {one.mean:+.4f}, from {one.low:+.4f} to {one.high:+.4f}."
        for name, one in zip(names[1:], found, strict=True)
    )
    yield plot.html("gaps", f"Difference of MAP to {names[0]}", told)


def _by_identity(runs: Sequence[Ranked], names: Sequence[str]) -> Iterator[str]:
    first = runs[0]
    figures = []
    for number, (run, name) in enumerate(zip(runs[1:], names[1:], strict=True)):
        gaps = np.sort(run.ap - first.ap)[::-1]
        share = np.arange(1, len(gaps) + 1) / len(gaps)
        kept = html.few(gaps)
        plot = html.Plot(x="share of the identities", y="difference of average precision")
        plot.axes.axhline(0, color=html.MUTED, linewidth=1)
        plot.axes.plot(share[kept], gaps[kept], color=html.FIRST)
        told = (
            f"{np.mean(gaps > EQUAL):.1%} of the identities are better with {name}, "
            f"{np.mean(gaps < -EQUAL):.1%} worse; from {gaps[0]:+.3f} to {gaps[-1]:+.3f}."
        )
        title = f"{name} less {names[0]}, identities sorted"
        figures.append(plot.html(f"sorted-{number}", title, told))
    yield html.figures(*figures)
    for run, name in zip(runs[1:], names[1:], strict=True):
        gaps = run.ap - first.ap
        order = np.argsort(-np.abs(gaps), kind="stable")[:MOST_SHOWN]
        rows = [
            [
                html.text(first.identities[i]),
                html.number(int(first.positives[i])),
                html.bar(float(first.ap[i])),
                html.bar(float(run.ap[i])),
                f"{gaps[i]:+.4f}",
            ]
            for i in order[np.abs(gaps[order]) >= EQUAL]
        ]
        if rows:
            yield html.table(
                f"{len(rows)} identities that {name} ranks most differently",
                ("identity", "clips", names[0], name, "difference"),
                rows,
            )
        else:
            yield html.p(html.text(f"{name} reaches the same for every identity."))
    yield html.note("All identities are in <code>comparison.csv</code>.")
