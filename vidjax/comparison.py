"""Compares runs, or groups of seeds, on the same clips, with intervals for differences of MAP.

No model is run: average precisions come from `analysis.npz`, or `ranking.txt` and ground truth.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidjax import config as config_lib
from vidjax import config_io, files
from vidjax.config import Config
from vidjax.data.sources import describe, is_generated
from vidjax.errors import UserError
from vidjax.run import results as results_lib

if TYPE_CHECKING:
    from vidjax.data.clips import TrainingData
    from vidjax.report.comparison_page import RankedRun
    from vidjax.significance import Difference

# Average precisions [C], positives [C], number of identities in the ground truth without a column.
Averages = tuple[np.ndarray, np.ndarray, int]
UNKNOWN = "unknown data"
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
        """Writes `comparison.html`, `.md`, `.csv`, `.json` and `.tex` into a folder."""
        from vidjax.report import comparison_page, html

        own = self.runs, self.differences
        for name, content in {
            "comparison.md": comparison_page.markdown(*own),
            "comparison.csv": comparison_page.csv_text(self.runs),
            "comparison.json": files.to_json(self.to_dict()),
            "comparison.tex": self.to_latex(),
            "comparison.html": comparison_page.page(*own),
        }.items():
            files.write_text(folder / name, html.plain(content))


def compare(
    groups: Sequence[Sequence[str]],
    load: Callable[[Config], Any],
    *,
    split: str | None = None,
    directory: str | None = None,
) -> Comparison:
    """Compares runs with the first of them, or groups of seeds with the first group.

    Args:
      groups: the folders of one run each, or of as many runs each: the same system, other seeds.
      load: function that returns the dataset of a configuration.
      split: the split to compare on; None for each run's `eval.split`.
      directory: the folder that holds the data now; None for each run's `data.dir`.
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
    runs = [read(name, load, split=split, directory=directory) for name in named]
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
    from vidjax.report import run_page

    fields = [run_page.own_fields(run.config, run.metrics.get("overrides")) for run in runs]
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


def read(
    name: str,
    load: Callable[[Config], Any],
    *,
    split: str | None = None,
    directory: str | None = None,
) -> "RankedRun":
    """Reads the results of the run in a folder; the arguments are those of `compare`."""
    folder = Path(name).expanduser().absolute()
    if not files.exists(folder / "config.json"):
        raise UserError(
            f"--runs: no run in '{name}' (no config.json)\nname folders of trained runs"
        )
    config = config_io.load_workdir(folder)
    own_split: str = config.eval.split
    split = split or own_split
    paths = results_lib.paths(folder, split, own_split)
    metrics = _read_metrics(name, config, paths.metrics, split)
    if files.exists(folder / "identities.json"):
        identities = tuple(results_lib.load_identities(folder / "identities.json"))
    else:
        from vidjax.ranking import read_identities

        identities = read_identities(paths.ranking)
    averages = _read_analysis(paths.analysis)
    source = paths.analysis if averages else paths.ranking
    if not averages:
        data_config = _data_config(config, directory)
        data = load(data_config)
        _check_data(name, metrics, data_config, data, by_user=directory is not None)
        averages = _score_ranking(paths.ranking, identities, data, split, metrics)
    ap, positives, num_others = averages
    if len(identities) != len(ap):
        counts = f"lists {len(identities)} identities, {source.name} {len(ap)}"
        raise UserError(f"'{name}': identities.json {counts}\n{_evaluate_command(name, split)}")
    known = positives > 0
    value = ap[known].sum() / (known.sum() + num_others)
    if abs(value - metrics["map"]) > MAX_MISMATCH:
        both = f"{value:.4f} in {source.name} and {metrics['map']:.4f} in {paths.metrics.name}"
        raise UserError(f"'{name}': MAP is {both}\n{_evaluate_command(name, split)}")
    from vidjax.report.comparison_page import RankedRun

    return RankedRun(
        name=name,
        split=split,
        identities=tuple(itertools.compress(identities, known)),
        ap=np.asarray(ap[known], np.float64),
        positives=np.asarray(positives[known], np.int64),
        num_others=num_others,
        map_kind=metrics["map_kind"],
        num_clips=metrics["num_clips"],
        generated=_generated(config),
        metrics=metrics,
        config=config.to_dict(),
    )


def _read_metrics(name: str, config: Config, path: Path, split: str) -> dict[str, Any]:
    if not files.exists(path):
        raise UserError(
            f"'{name}' has no results on split '{split}' ({path.name})\n"
            f"{_evaluate_command(name, split)}"
        )
    metrics = results_lib.load_metrics(path)
    if metrics.get("map") is None:
        report = results_lib.read_data_report(path.parent)
        reason = results_lib.unmeasured(config.to_dict(), report)
        raise UserError(
            f"'{name}' has no MAP on split '{split}', which has no ground truth\n"
            f"{reason or 'compare on another: --config.eval.split=val'}"
        )
    for key in ("map_kind", "num_clips"):
        if metrics.get(key) is None:
            raise UserError(f"'{path}' is damaged: no {key}\n{_evaluate_command(name, split)}")
    return metrics


def _evaluate_command(name: str, split: str) -> str:
    return (
        "to evaluate it: python -m vidjax.main --mode=evaluate "
        f"--workdir={name} --config.eval.split={split}"
    )


def _generated(config: Config) -> str:
    """Describes a generated dataset: "" if it is none, UNKNOWN if the joined runs are gone."""
    own = config
    if config.join.runs:
        try:
            own = config_io.load_workdir(Path(config.join.runs[0]))
        except ValueError:
            return UNKNOWN
    return describe(own.data.to_dict()) if is_generated(own.data.name) else ""


def _data_config(config: Config, directory: str | None) -> Config:
    """Returns a configuration with the `data` of an evaluation: for a blend, of its first run."""
    own = copy.deepcopy(config)
    if config.join.runs:
        own = config_io.load_workdir(Path(config.join.runs[0]))
        own.data.dir = config.data.dir or own.data.dir
    if directory is not None:
        own.data.dir = directory
    return own


def _check_data(
    name: str, metrics: Mapping[str, Any], config: Config, data: "TrainingData", *, by_user: bool
) -> None:
    """Refuses data other than a run was evaluated on, unless the user named their folder."""
    evaluated = metrics.get("data", {}).get("digest")
    if config.data.dir and not by_user and evaluated != data.report["data"]["digest"]:
        raise UserError(
            f"'{name}' was evaluated on other data than '{config.data.dir}' holds now\n"
            "name the folder of those data: --config.data.dir=FOLDER; or, for the new ones, "
            f"--mode=evaluate --workdir={name}"
        )


def _read_analysis(path: Path) -> Averages | None:
    if not files.exists(path):
        return None
    analysis, arrays = results_lib.load_analysis(path)
    if "ap" not in arrays:
        return None
    return arrays["ap"], arrays["positives"], analysis.num_others or 0


def _score_ranking(
    path: Path,
    names: Sequence[str],
    data: "TrainingData",
    split_name: str,
    metrics: Mapping[str, Any],
) -> Averages:
    if metrics["map_kind"] == "out_of_fold":
        raise UserError(
            f"'{path.parent}' has no analysis.npz, which an out-of-fold MAP needs\n"
            f"{_evaluate_command(str(path.parent), split_name)}"
        )
    from vidjax import metrics as metrics_lib
    from vidjax import ranking

    split = data.with_identities(names).split(split_name)
    rows = {clip.removesuffix(".mp4") + ".mp4": i for i, clip in enumerate(split.clips)}
    hits = np.zeros((len(names), ranking.MAX_NAMES), bool)
    columns = {name: column for column, name in enumerate(names)}
    for name, ranked in ranking.each_list(path, names):
        column = columns[name]
        for place, clip in enumerate(ranked):
            if clip not in rows:
                raise UserError(
                    f"'{path}': clip {clip!r} is not in the data\n"
                    "name the folder that was evaluated: --config.data.dir=FOLDER"
                )
            hits[column, place] = split.labels[rows[clip]] == column + 1
    averages = metrics_lib.average_precision(hits, split.positives)
    return averages, np.asarray(split.positives), split.num_others


def align(first: "RankedRun", run: "RankedRun") -> "RankedRun":
    """Returns a run with identities in the order of the first run's; refuses one on other clips."""
    both = f"'{first.name}' and '{run.name}'"
    if run.split != first.split:
        raise UserError(
            f"{both} were evaluated on two splits, {first.split} and {run.split}\n"
            "compare on one that both have ranked: --config.eval.split=val"
        )
    if run.generated != first.generated and UNKNOWN not in (run.generated, first.generated):
        names = [run.generated or "files" for run in (first, run)]
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
