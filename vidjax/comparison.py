"""Compares runs, or groups of seeds, on the same clips, with intervals for differences of MAP.

No model is run and no data is read: average precisions come from `analysis.npz`.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidjax import config as config_lib
from vidjax import files
from vidjax.data.sources import describe, is_generated
from vidjax.errors import UserError
from vidjax.run import results as results_lib
from vidjax.run.folder import CONFIG, RunFolder

if TYPE_CHECKING:
    from vidjax.report.comparison_page import RankedRun
    from vidjax.significance import Difference

# Fields in which the runs of one group may differ.
OF_SEEDS = {"seed", "join.runs", "eval.report", *config_lib.MOVABLE}
MAX_MISMATCH = 1e-9  # between MAP in metrics.json and the mean of the average precisions


class Comparison(NamedTuple):
    """Runs on the same clips, and how far each lies from the first of them.

    Attributes:
      runs: what was read of them; a group of seeds is one run, of the mean average precisions.
      differences: of every run but the first.
    """

    runs: "list[RankedRun]"
    differences: "list[Difference]"

    def __repr__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Returns a table for the terminal."""
        from vidjax.report import comparison_page

        return comparison_page.printed(self.runs, self.differences)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as plain values for JSON."""
        from vidjax.report import comparison_page

        return comparison_page.as_json(self.runs, self.differences)

    def to_latex(self) -> str:
        """Returns the table for a paper; it needs the LaTeX package booktabs."""
        from vidjax.report import comparison_page

        return comparison_page.latex(self.runs, self.differences)

    def write(self, folder: Path) -> None:
        """Writes `comparison.html`, `.json` and `.tex` into a folder."""
        from vidjax.report import comparison_page, html

        for name, content in {
            "comparison.json": files.to_json(self.to_dict()),
            "comparison.tex": self.to_latex(),
            "comparison.html": comparison_page.page(self.runs, self.differences),
        }.items():
            files.write_text(folder / name, html.plain(content))


def compare(groups: Sequence[Sequence[str]], *, split: str | None = None) -> Comparison:
    """Compares runs with the first of them, or groups of seeds with the first group.

    Args:
      groups: the folders of one run each, or of as many runs each: the same system, other seeds.
      split: the split to compare on; None for the `eval.split` of each run.
    """
    from vidjax import significance
    from vidjax.report import comparison_page

    named = [name for group in groups for name in group]
    if len({Path(name).resolve() for name in named}) < len(named):
        raise UserError(f"--runs={','.join(map('+'.join, groups))}: a run is named twice")
    if len(sizes := {len(group) for group in groups}) > 1:
        raise UserError(
            f"groups of {' and '.join(map(str, sorted(sizes)))} runs: they are compared seed by "
            "seed\nname as many of each: --runs=A1+A2+A3,B1+B2+B3"
        )
    runs = [read(name, split) for name in named]
    runs = [runs[0], *(align(runs[0], run) for run in runs[1:])]
    (size,) = sizes
    if size == 1:
        return Comparison(runs, significance.differences([run.ap for run in runs]))
    seeds = [runs[at : at + size] for at in range(0, len(runs), size)]
    for group in seeds:
        _check_seeds(group)
    return Comparison(
        [comparison_page.mean_of(group) for group in seeds],
        significance.differences_of_seeds([[run.ap for run in group] for group in seeds]),
    )


def _check_seeds(runs: "Sequence[RankedRun]") -> None:
    """Refuses runs of a group that differ in more than their seeds, or in no seed."""
    from vidjax.report.comparison_page import fields_of

    fields = [fields_of(run) for run in runs]
    first, seeds = fields[0], [own.get("seed") for own in fields]
    names = [run.name for run in runs]
    for name, own in zip(names[1:], fields[1:], strict=True):
        others = {key for key in first.keys() | own.keys() if first.get(key) != own.get(key)}
        if others := sorted(others - OF_SEEDS):
            raise UserError(
                f"--runs: '{names[0]}' and '{name}' are no seeds of one system: they differ in "
                f"{', '.join(others[:3])}\ncompare them as runs of their own: {names[0]},{name}"
            )
    if None not in seeds and len({*seeds}) < len(seeds):
        raise UserError(f"--runs={'+'.join(names)}: two of them have the same seed")


def read(name: str, split: str | None = None) -> "RankedRun":
    """Reads the results of the run in a folder on a split; None for its `eval.split`."""
    from vidjax.report.comparison_page import RankedRun

    folder = RunFolder(name)
    if not folder.has(CONFIG):
        raise UserError(
            f"--runs: no run in '{name}' (no config.json)\nname folders of trained runs"
        )
    config = folder.config
    split = split or str(config.eval.split)
    paths = folder.paths(split)
    remedy = f"to evaluate it: vidjax evaluate --workdir={name} --config.eval.split={split}"
    metrics, identities = _read_metrics(name, folder, split, remedy), folder.identities
    found = folder.analysis(paths)
    if found is None:
        raise UserError(f"'{name}' has no {paths.analysis.name}\n{remedy}")
    analysis, arrays = found
    if len(identities) != len(arrays.get("ap", ())):
        counts = f"lists {len(identities)} identities, {paths.analysis.name} has others"
        raise UserError(f"'{name}': identities.json {counts}\n{remedy}")
    ap, positives, num_others = arrays["ap"], arrays["positives"], analysis.num_others or 0
    known = positives > 0
    value = ap[known].sum() / (known.sum() + num_others)
    if abs(value - metrics["map"]) > MAX_MISMATCH:
        both = f"{value:.4f} in {paths.analysis.name} and {metrics['map']:.4f} in"
        raise UserError(f"'{name}': MAP is {both} {paths.metrics.name}\n{remedy}")
    data = metrics.get("data") or {}
    return RankedRun(
        name=name,
        split=split,
        identities=tuple(itertools.compress(identities, known)),
        ap=np.asarray(ap[known], np.float64),
        positives=np.asarray(positives[known], np.int64),
        num_others=num_others,
        map_kind=metrics["map_kind"],
        num_clips=metrics["num_clips"],
        data=describe(data) if is_generated(data.get("name", "")) else "",
        metrics=metrics,
        config=config.to_dict(),
    )


def _read_metrics(name: str, folder: RunFolder, split: str, remedy: str) -> dict[str, Any]:
    paths = folder.paths(split)
    metrics, path = folder.metrics(paths), paths.metrics
    if not metrics:
        raise UserError(f"'{name}' has no results on split '{split}' ({path.name})\n{remedy}")
    if metrics.get("map") is None:
        reason = results_lib.unmeasured(folder.config.to_dict(), folder.path)
        raise UserError(
            f"'{name}' has no MAP on split '{split}', which has no ground truth\n"
            f"{reason or 'compare on another: --config.eval.split=val'}"
        )
    for key in ("map_kind", "num_clips"):
        if metrics.get(key) is None:
            raise UserError(f"'{path}' is damaged: no {key}\n{remedy}")
    return metrics


def align(first: "RankedRun", run: "RankedRun") -> "RankedRun":
    """Returns a run with identities in the order of the first run's; refuses one on other clips."""
    both = f"'{first.name}' and '{run.name}'"
    if run.split != first.split:
        raise UserError(
            f"{both} were evaluated on two splits, {first.split} and {run.split}\n"
            "compare on one that both have ranked: --config.eval.split=val"
        )
    if run.data != first.data:
        names = [run.data or "files" for run in (first, run)]
        raise UserError(
            f"{both} ranked different data: {' and '.join(names)}\n"
            "compare runs that were evaluated on the same clips"
        )
    places = {name: i for i, name in enumerate(run.identities)}
    missing = [name for name in first.identities if name not in places]
    extra = sorted(places.keys() - set(first.identities))
    if missing or extra:
        example = (missing or extra)[0]
        raise UserError(
            f"{both} ranked different identities: {len(first.identities)} and "
            f"{len(run.identities)}\n{len(missing) + len(extra)} are in one run only, such as "
            f"'{example}', which is missing in '{run.name if missing else first.name}'"
        )
    order = np.array([places[name] for name in first.identities], int)
    positives = run.positives[order]
    text = f"{first.num_clips} and {run.num_clips} clips"
    different = np.flatnonzero(positives != first.positives)
    for i in different[:1]:
        text += f"; {first.positives[i]} and {positives[i]} of '{first.identities[i]}'"
    if names := [name for name in ("names", "labels") if _differ(first, run, name)]:
        text += f", with other {' and '.join(names)}"
    if names or len(different) or run.num_clips != first.num_clips:
        raise UserError(
            f"{both} ranked different clips: {text}\n"
            "compare runs that were evaluated on the same clips"
        )
    return run._replace(identities=first.identities, ap=run.ap[order], positives=positives)


def _differ(first: "RankedRun", run: "RankedRun", name: str) -> bool:
    """Returns True if both runs know a digest of their split, `names` or `labels`, and it differs.

    A digest of features may differ: runs may read other features of the same clips.
    """
    known = ((one.metrics.get("trained_on") or {}).get("splits", {}) for one in (first, run))
    mine, others = (splits.get(first.split, {}).get(name) for splits in known)
    return bool(mine and others) and mine != others
