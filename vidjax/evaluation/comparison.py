"""Compares runs on the same clips, with confidence intervals of their differences in MAP.

A group of seeds is a list of runs that differ only in their seeds, and is compared like a run. The
average precisions are read from `analysis.npz` of each run, so no model and no data are needed.
"""

import contextlib
import itertools
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from vidjax.core import metrics
from vidjax.data.sources import describe
from vidjax.evaluation import significance
from vidjax.evaluation.report import html
from vidjax.evaluation.significance import Difference
from vidjax.runs import config as config_lib, config_io, facts, results as results_lib
from vidjax.runs.run_folder import open_run
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError, warn

MAX_MISMATCH = 1e-9  # largest difference between the MAP of metrics.json and analysis.npz
MAX_IDENTITIES = 20  # most identities in a table of the page
# A sentence reports the smallest difference in MAP that can be significant if there are fewer
# identities than FEW, or if a larger share of pairs of identities than MOST_TIES has equal gaps.
FEW, MOST_TIES = 50, 0.9
SMALL = 0.001  # the sentence is left out if smaller differences can be significant
HOLM = "p (Holm)"
NUMBERS = (int, float)  # types of metrics that seeds average


class RankedRun(NamedTuple):
    """The metrics and average precisions of a run on a split, or the means of several runs."""

    name: str  # the folder of the run, as the user typed it
    split: str
    # Names of the C identities that are in both the ground truth and the training data.
    identities: tuple[str, ...]
    ap: np.ndarray  # [C] average precision of each identity
    positives: np.ndarray  # [C] number of clips of each identity
    num_others: int  # number of identities in the ground truth that are not in the training data
    metrics: Mapping[str, Any]  # content of `metrics.json`, including `map_kind` and `num_clips`
    config: Mapping[str, Any]
    # The name and the MAP of each run, if the results are the means of several runs.
    seeds: tuple[tuple[str, float], ...] = ()

    @property
    def data(self) -> str:
        """The name, size and seed of a generated dataset as text, or `files` for other datasets."""
        data = self.metrics.get("data") or {}
        return describe(data) if data.get("name") == "synthetic" else "files"


class Comparison(NamedTuple):
    """The results of runs, and the difference in MAP of every other run to the first run.

    A run may also be the mean of several runs that differ only in their seeds.
    """

    runs: list[RankedRun]
    differences: list[Difference]

    def __repr__(self) -> str:
        return self.text()

    def text(self, width: float = math.inf) -> str:
        """Returns the comparison as a table for a terminal with `width` columns."""

        def make_lines(names: Sequence[str]) -> list[str]:
            head, rows = make_difference_table(rename(self.runs, names), self.differences)
            return messages.align_columns([head, *rows], numbers=True)

        lines = _fit_names([run.name for run in self.runs], make_lines, width - 2)
        first = self.runs[0]
        clips = f"{messages.count(first.metrics['num_clips'], 'clip')} of {first.split}"
        unseen = f" ({first.num_others:,} that no run was trained on are left out)"
        others = unseen if first.num_others else ""
        people = messages.count(len(first.identities), "identity")
        title = f"{people}{others}, {clips}; compared with {first.name}"
        lines += describe_limit(self.runs, self.differences) + describe_in_sample(self.runs)
        lines += describe_unusual(self.runs)
        lines = [part for line in lines for part in messages.wrap(f"  {line}", width, indent=2)]
        return "\n".join([*messages.wrap(title, width), *lines])

    def config_lines(self, width: float = math.inf) -> list[str]:
        """Returns the configuration fields in which the runs differ, as lines of a table.

        `width` is the width of the terminal in letters.
        """
        (_, *names), rows = _compare_fields(self.runs)
        if not rows:
            return ["the configurations are equal"]

        def make_lines(names: Sequence[str]) -> list[str]:
            return messages.align_columns([["field", *names], *rows], width=width)

        return _fit_names(names, make_lines, width)

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as plain values for JSON."""
        first = self.runs[0]
        rows: list[dict[str, Any]] = []
        for run, gap in zip(self.runs, [None, *self.differences], strict=True):
            map_kind = run.metrics["map_kind"]
            row = {"run": run.name, "map": float(run.ap.mean()), "map_kind": map_kind}
            row |= facts.to_json(run.metrics)
            if run.seeds:
                row["seeds"] = [{"run": name, "map": value} for name, value in run.seeds]
            if gap:
                numbers = gap._asdict()
                row |= {"difference": numbers.pop("mean"), **numbers}
            rows.append(row)
        return {
            "split": first.split,
            "num_identities": len(first.identities),
            "num_others": first.num_others,
            "num_clips": first.metrics["num_clips"],
            "level": significance.LEVEL,
            "method": significance.METHOD_OF_SEEDS if first.seeds else significance.METHOD_OF_GAPS,
            "runs": rows,
        }

    def to_latex(self) -> str:
        """Returns the comparison as a LaTeX table. The table needs the LaTeX package booktabs."""
        named = rename(self.runs, shorten_names(self.runs))
        head, rows = make_difference_table(named, self.differences)
        lines = [" & ".join(map(_format_latex_cell, row)) + r" \\" for row in [head, *rows]]
        body = "\n".join(lines[1:])
        texts = sentences(self.runs, self.differences)
        note = "".join(f"% {line}\n" for text in texts for line in text.splitlines())
        return (
            f"{note}\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n"
            f"{lines[0]}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
        )

    def write(self, folder: Path) -> None:
        """Writes `comparison.json`, `comparison.tex` and `comparison.html` into a folder.

        If the folder has a file with one of these names that vidjax did not write, raises
        UserError.
        """
        contents = {
            "comparison.json": files.to_json(self.to_dict()),
            "comparison.tex": self.to_latex(),
            "comparison.html": _render_page(self.runs, self.differences),
        }
        taken = [name for name in contents if files.exists(folder / name)]
        with contextlib.suppress(UserError, FileNotFoundError):
            taken *= "num_identities" not in files.read_json(folder / "comparison.json")
        if taken:
            raise files.foreign_error(folder / taken[0], "--workdir")
        for name, content in contents.items():
            files.write_text(folder / name, html.plain(content))


def compare(groups: Sequence[Sequence[str]], *, split: str | None = None) -> Comparison:
    """Compares the MAP of groups of runs with the MAP of the first group, on the same clips.

    A group is a list of folders of runs. To compare single runs, each group has one folder. To
    compare mean MAPs over several seeds, all groups have the same number of runs, and the runs of a
    group differ only in the seed. `split` is by default `eval.split` of each run.
    """
    named = [name for group in groups for name in group]
    if len({Path(name).resolve() for name in named}) < len(named):
        raise UserError(
            f"--runs={','.join(map('+'.join, groups))}: a run is named twice\nname each run once"
        )
    if len(sizes := {len(group) for group in groups}) > 1:
        raise UserError(
            f"--runs has groups of {' and '.join(map(str, sorted(sizes)))} runs\n"
            "name the same number of runs in every group: --runs=A1+A2+A3,B1+B2+B3"
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
        [merge_seeds(group) for group in seeds],
        significance.differences_of_seeds([[run.ap for run in group] for group in seeds]),
    )


def split_groups(runs: str) -> list[list[str]]:
    """Splits the value of `--runs`: `A1+A2,B1+B2` becomes [[A1, A2], [B1, B2]].

    If a folder is really called `A1+A2`, it stays one name.
    """
    names = [name.strip() for name in runs.split(",") if name.strip()]
    return [
        [name]
        if files.local(name).exists()
        else [folder.strip() for folder in name.split("+") if folder.strip()]
        for name in names
    ]


def select_comparable(names: Sequence[str], split: str | None) -> list[str]:
    """Returns those of the folders `names` whose runs can be compared. Warns of all others.

    The names come from a pattern such as `runs/*`. So some folders may have no results, or results
    on another dataset. Only the runs on the most frequent dataset are kept.
    """
    runs: list[RankedRun] = []
    for name in names:
        with _warn_of_left_out():
            runs.append(read(name, split))
    if not runs:
        return []
    data = Counter((run.data, run.identities) for run in runs).most_common(1)[0][0]
    runs.sort(key=lambda run: (run.data, run.identities) != data)  # the reference comes first
    kept = []
    for run in runs:
        with _warn_of_left_out():
            kept.append(align(runs[0], run).name)
    return kept


@contextlib.contextmanager
def _warn_of_left_out() -> Iterator[None]:
    """Turns a UserError in a `with` block into a warning that a folder is left out."""
    try:
        yield
    except UserError as error:
        warn(f"a folder is left out: {str(error).splitlines()[0]}")


def _check_seeds(runs: Sequence[RankedRun]) -> None:
    """Raises UserError if runs differ in more than their seeds, or if two have the same seed."""
    fields = [list_fields(run.config, run.metrics) for run in runs]
    first, seeds = fields[0], [own.get("seed") for own in fields]
    names = [run.name for run in runs]
    for name, own in zip(names[1:], fields[1:], strict=True):
        others = {key for key in first.keys() | own.keys() if first.get(key) != own.get(key)}
        if others := sorted(name for name in others if not _is_of_seeds(name)):
            raise UserError(
                f"--runs: '{names[0]}' and '{name}' differ in more than the seed: "
                f"{', '.join(others[:3])}\ncompare them as separate runs: {names[0]},{name}"
            )
    if None not in seeds and len({*seeds}) < len(seeds):
        raise UserError(
            f"--runs={'+'.join(names)}: two of these runs have the same seed\nname only one of them"
        )


def _is_of_seeds(name: str) -> bool:
    """Returns True for a field in which runs with different seeds may differ, such as `seed`."""
    may_change = name in config_lib.MAY_CHANGE and not config_lib.changes_scores(name)
    return name != "init_from" and (may_change or name in ("seed", "join.runs"))


def read(name: str, split: str | None = None) -> RankedRun:
    """Reads the results of the run in the folder `name` on a split, by default its `eval.split`."""
    folder = open_run(name)
    config = folder.config
    split = split or str(config.eval.split)
    paths = folder.paths(split)
    command = f"vidjax evaluate --workdir={shlex.quote(name)} --config.eval.split={split}"
    remedy = f"to evaluate it: {command}"
    if not config.eval.report:  # which writes analysis.npz
        remedy += " --config.eval.report=True"
    metrics, analysed = folder.metrics(paths), folder.analysis(paths)
    if metrics and metrics.get("map") is None:
        reason = results_lib.explain_unmeasured(config.to_dict(), folder.path)
        raise UserError(
            f"'{name}' has no MAP on split '{split}', because the split has no ground truth\n"
            f"{reason or 'compare on another split: --config.eval.split=val'}"
        )
    if not metrics or analysed is None:
        missing = (paths.analysis if metrics else paths.metrics).name
        raise UserError(
            f"'{name}' has no results on split '{split}': {missing} is missing\n{remedy}"
        )
    for key in ("map_kind", "num_clips"):
        if metrics.get(key) is None:
            raise UserError(f"'{paths.metrics}' is damaged: it has no {key}\n{remedy}")
    (analysis, arrays), identities = analysed, folder.identities
    if len(identities) != len(arrays.get("ap", ())):
        raise UserError(
            f"'{name}': identities.json and {paths.analysis.name} have different numbers of "
            "identities\n"
            f"{remedy}"
        )
    ap, positives, num_others = arrays["ap"], arrays["positives"], analysis.num_others or 0
    known = positives > 0
    value = ap[known].sum() / (known.sum() + num_others)
    if abs(value - metrics["map"]) > MAX_MISMATCH:
        raise UserError(
            f"'{name}' has two values of MAP: {value:.4f} in {paths.analysis.name}, and "
            f"{metrics['map']:.4f} in {paths.metrics.name}\n{remedy}"
        )
    return RankedRun(
        name=name,
        split=split,
        identities=tuple(itertools.compress(identities, known)),
        ap=np.asarray(ap[known], np.float64),
        positives=np.asarray(positives[known], np.int64),
        num_others=num_others,
        metrics=metrics,
        config=config.to_dict(),
    )


def align(first: RankedRun, run: RankedRun) -> RankedRun:
    """Returns `run` with its identities in the order of the run `first`.

    If the runs were evaluated on different clips or identities, raises UserError.
    """
    both = f"'{first.name}' and '{run.name}'"
    if run.split != first.split:
        raise UserError(
            f"{both} were evaluated on different splits, {first.split} and {run.split}\n"
            "compare on a split that both have ranked: --config.eval.split=val"
        )
    places = {name: i for i, name in enumerate(run.identities)}
    missing = [name for name in first.identities if name not in places]
    extra = sorted(places.keys() - set(first.identities))
    if missing or extra:
        example = (missing or extra)[0]
        raise UserError(
            f"{both} ranked different identities: {len(first.identities)} and "
            f"{len(run.identities)}\n"
            f"'{example}' is missing in '{run.name if missing else first.name}'\n"
            "compare runs that were trained on the same ground truth"
        )
    order = np.array([places[name] for name in first.identities], int)
    positives = run.positives[order]
    counts = [side.metrics["num_clips"] for side in (first, run)]
    text = f"{counts[0]} and {counts[1]} clips"
    if run.data != first.data:
        text += f" of {first.data} and {run.data}"
    different = np.flatnonzero(positives != first.positives)
    for i in different[:1]:
        text += f"; {first.positives[i]} and {positives[i]} of '{first.identities[i]}'"
    # Features are not compared, because runs may read different features of the same clips.
    trained = [side.metrics.get("trained_on") or {} for side in (first, run)]
    old, new = (data.get("splits", {}).get(first.split, {}) for data in trained)
    names = [name for name in ("names", "labels") if old.get(name) and new.get(name)]
    if names := [name for name in names if old[name] != new[name]]:
        text += f"; the {' and '.join(names)} of the clips differ"
    if names or len(different) or run.data != first.data or counts[0] != counts[1]:
        raise UserError(
            f"{both} ranked different clips: {text}\n"
            "compare runs that were evaluated on the same clips"
        )
    return run._replace(identities=first.identities, ap=run.ap[order], positives=positives)


def merge_seeds(seeds: Sequence[RankedRun]) -> RankedRun:
    """Merges runs that differ only in their seeds. The metrics of the result are the means."""
    first, kinds = seeds[0], [run.metrics["map_kind"] for run in seeds]
    metrics = {key: value for key, value in first.metrics.items() if not isinstance(value, NUMBERS)}
    for key in first.metrics.keys() - metrics.keys():
        values = [run.metrics.get(key) for run in seeds]
        if all(isinstance(value, NUMBERS) for value in values):
            metrics[key] = float(np.mean(np.array(values, float)))
    worst = (kind for kind in ("in_sample", "out_of_fold", kinds[0]) if kind in kinds)
    return first._replace(
        name="+".join(run.name for run in seeds),
        ap=np.mean([run.ap for run in seeds], axis=0),
        metrics={**metrics, "map_kind": next(worst), "num_clips": first.metrics["num_clips"]},
        seeds=tuple((run.name, float(run.ap.mean())) for run in seeds),
    )


Rows = list[list[str]]


def make_difference_table(
    runs: Sequence[RankedRun], differences: Sequence[Difference]
) -> tuple[list[str], Rows]:
    """Returns (titles, rows) of a table of the MAP of runs and the differences to the first run."""
    head = ["run", "MAP@100", "difference", "95 % interval"]
    if not runs[0].seeds:
        head.append(HOLM if len(differences) > 1 else "p")
    head += ["better", "worse", "equal"]
    rows = [[runs[0].name, f"{runs[0].ap.mean():.4f}", *[""] * (len(head) - 2)]]
    for run, gap in zip(runs[1:], differences, strict=True):
        ps = [] if gap.p_holm is None else [gap.p_holm]
        rows.append(
            [
                run.name,
                f"{run.ap.mean():.4f}",
                f"{gap.mean:+z.4f}",
                f"{gap.low:+z.4f} to {gap.high:+z.4f}",
                *("< 0.001" if p < 0.001 else f"{p:.3f}" for p in ps),
                f"{gap.better:,}",
                f"{gap.worse:,}",
                f"{gap.equal:,}",
            ]
        )
    return head, rows


def make_metric_table(runs: Sequence[RankedRun]) -> tuple[list[str], Rows]:
    """Returns (titles, rows) of a table of metrics except MAP. If runs have none, rows is []."""
    head, columns = ["run"], [[run.name for run in runs]]
    for name, metric in metrics.CLIP_METRICS.items():
        values = [run.metrics.get(name) for run in runs]
        if any(value is not None for value in values):
            head.append(metric.label)
            columns.append(["none" if x is None else f"{x:z,.{metric.digits}f}" for x in values])
    return head, [list(row) for row in zip(*columns, strict=True)] if head[1:] else []


def _compare_fields(runs: Sequence[RankedRun]) -> tuple[list[str], Rows]:
    every = [list_fields(run.config, run.metrics) for run in runs]
    return make_config_table(shorten_names(runs), every)


def make_config_table(
    names: Sequence[str], every: Sequence[Mapping[str, str]]
) -> tuple[list[str], Rows]:
    """Returns (titles, rows) of a table of the fields in which configurations differ.

    `names` are the names of the configurations, and `every` has a dict for each configuration,
    field -> value as text.
    """
    rows = []
    for name in dict.fromkeys(name for values in every for name in values):
        # A blend has only the fields `join`, so only runs can differ in other fields.
        compared = [values for values in every if "seed" in values or name.startswith("join.")]
        if len({values.get(name, "") for values in compared}) > 1:
            rows.append([name, *(values.get(name, "") for values in every)])
    return ["field", *names], rows


def list_fields(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """Returns the configuration with which a run was evaluated: field -> value as text.

    `metrics` is the content of `metrics.json`. Its `overrides` replace values of `config`. For a
    blend, only the fields of `config.join` are returned, because the blended runs may differ in all
    other fields.
    """
    values = dict(config_lib.fields(config)) | {"eval.checkpoint": "latest"}
    values |= metrics.get("overrides") or {}
    values["num_epochs"] = facts.EXTENDED.text(metrics) or values["num_epochs"]
    if metrics.get("runs"):
        # The weights in `config.json` are of the last evaluation, maybe of another split.
        weights = tuple(row.get("weight") for row in metrics.get("runs") or ())
        own = {name: value for name, value in values.items() if name.startswith("join.")}
        values = own | {"join.weights": weights}
    return {name: config_io.value_text(value) for name, value in values.items()}


def sentences(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> list[str]:
    """Returns sentences that describe the data, the method and the limits of a comparison."""
    first, method = runs[0], f"Interval and p: {significance.METHOD_OF_GAPS}"
    if first.seeds:
        method = f"Interval: {significance.METHOD_OF_SEEDS}"
    text = [
        f"{len(first.identities):,} identities and {first.metrics['num_clips']:,} clips of "
        f"{first.split}. Every run is compared with {first.name}.",
        f"{method}, paired. Better, worse, equal: the number of identities by average precision.",
    ]
    if first.seeds:
        text.append(
            f"A run is the mean of {len(first.seeds)} seeds, paired in the order given. "
            "If there are only two seeds, the interval is wide. "
            "The intervals are not corrected for the number of comparisons."
        )
    elif len(runs) > 2:
        text.append(
            f"{HOLM} is corrected for the number of comparisons. The intervals are not corrected."
        )
    text += describe_limit(runs, differences)
    if first.num_others:
        text.append(
            f"The comparison leaves out {first.num_others:,} identities of the ground truth, "
            "because no run was trained on them."
        )
    folds = [run.name for run in runs if run.metrics["map_kind"] == "out_of_fold"]
    known = describe_in_sample(runs)
    if folds:
        score = f"{', '.join(folds)} {'scores' if len(folds) == 1 else 'score'}"
        text.append(f"Out of fold: {score} every clip by members that were not trained on it.")
    elif not known:
        text.append("No run was trained on these clips.")
    return text + known + describe_unusual(runs)


def describe_unusual(runs: Sequence[RankedRun]) -> list[str]:
    """Returns sentences about runs with unusual results.

    A run is unusual if `facts.FACTS` has a sentence about its training, for example that the
    training was extended. A run whose evaluation changed the configuration is unusual, too.
    """
    texts = []
    for run in runs:
        described = ((fact.sentence, fact.text(run.metrics)) for fact in facts.FACTS)
        texts += [x.format(run=run.name, text=text) for x, text in described if x and text]
        if settings := results_lib.describe_overrides(run.metrics):
            texts.append(f"Scored with other settings: {run.name} with {settings}.")
    return texts


def describe_limit(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> list[str]:
    """Returns ["No difference in MAP below about 0.030 can be significant, with 20 identities."].

    Returns [] if the limit (here 0.030) is below 0.001. Also returns [] for 50 identities or more,
    unless nearly all identities have equal differences.
    """
    first, limits = runs[0], {}
    few = len(first.identities) < FEW
    for run, gap in zip(runs[1:], differences, strict=True):
        limit = min(gap.mean - gap.low if gap.mean >= 0 else gap.high - gap.mean, 1.0)
        if limit >= SMALL and (few or significance.measure_ties(run.ap - first.ap) > MOST_TIES):
            limits[run.name] = f"{limit:.3f}"
    if not limits:
        return []
    named = ", ".join(f"{limit} ({name})" for name, limit in limits.items())
    below = named if len(differences) > 1 else limits[runs[1].name]
    count = messages.count(len(first.identities), "identity")
    reason = f"with {count}" if few else "because nearly all identities differ equally"
    return [f"No difference in MAP below about {below} can be significant, {reason}."]


def describe_in_sample(runs: Sequence[RankedRun]) -> list[str]:
    """Returns a list with a warning that names the runs that were trained on the ranked clips.

    If there is no such run, returns [].
    """
    known = [run.name for run in runs if run.metrics["map_kind"] == "in_sample"]
    were = f"{', '.join(known)} {'was' if len(known) == 1 else 'were'}"
    return [f"In sample: {were} trained on these clips: the MAP is too high."] if known else []


LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


def _format_latex_cell(text: str) -> str:
    """Escapes text for LaTeX. Numbers with a sign get math mode, which prints a real minus sign."""
    if re.fullmatch(r"[+-]\d[\d.]*( to [+-]\d[\d.]*)?", text):
        return re.sub(r"[+-]\d[\d.]*", lambda match: f"${match[0]}$", text)
    return html.plain(text).translate(LATEX).replace("<", r"$<$")


def shorten_names(runs: Sequence[RankedRun]) -> list[str]:
    """Returns the name of the folder of each run. If two names are equal, returns whole paths."""
    last = ["+".join(Path(n).absolute().name for n in run.name.split("+")) for run in runs]
    return last if len(set(last)) == len(last) else [run.name for run in runs]


def rename(runs: Sequence[RankedRun], names: Sequence[str]) -> list[RankedRun]:
    """Returns `runs` with the names `names`."""
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]


def drop_common(names: Sequence[str]) -> list[str]:
    """Returns the names without the beginning and the end that all names have in common.

    Names are only cut at a `/` or `_`: `runs/a_1` and `runs/b_1` become `a` and `b`.
    """
    parts = [re.split("(?<=[/_])", name) for name in names]
    for _ in range(2):  # at the beginning, then at the end
        while min(map(len, parts)) > 1 and len({x[0] for x in parts}) == 1:
            parts = [x[1:] for x in parts]
        parts = [x[::-1] for x in parts]
    return ["".join(x).strip("_") for x in parts]


def _fit_names(
    names: Sequence[str], make_lines: Callable[[Sequence[str]], list[str]], width: float
) -> list[str]:
    """Returns the lines of a table that fit into `width` letters, if possible.

    `make_lines` makes the lines of the table, given names of the runs. It is called with `names`,
    then with shorter names, and then with numbers as names, until the lines fit. Below a table with
    numbers, additional lines list the names.
    """
    for short in (names, drop_common(names)):
        lines = make_lines(short)
        if max(map(len, lines)) <= width:
            return lines
    numbered = [f"run {number}" for number in range(1, len(names) + 1)]
    return make_lines(numbered) + [": ".join(pair) for pair in zip(numbered, names, strict=True)]


def _render_page(runs: Sequence[RankedRun], differences: Sequence[Difference]) -> str:
    first, names = runs[0], shorten_names(runs)
    caption = f"MAP and its difference to {first.name}"
    summary = [
        _make_table(caption, *make_difference_table(runs, differences)),
        *(html.paragraph("{}", text) for text in sentences(runs, differences)),
        html.beside("figures", [_draw_intervals(names, differences)]),
        _make_table("Other metrics", *make_metric_table(runs)),
    ]
    changed = html.table("Fields in which the configurations differ", *_compare_fields(runs))
    others = zip(runs[1:], names[1:], strict=True)
    gaps = [_make_gap_table(first, run, names[0], name) for run, name in others]
    return html.page(
        f"Comparison of {', '.join(names[:-1])} and {names[-1]}",
        [
            ("summary", "Summary", Markup().join(summary)),
            ("configuration", "Configurations", changed or html.paragraph("They are equal.")),
            ("identities", "Identities", html.beside("tables", gaps)),
        ],
        lead=f"{first.metrics['num_clips']:,} clips of {first.split}",
        footer="vidjax made this page from the results of these runs. It contains names of "
        "identities, and no features.",
    )


def _make_table(caption: str, head: Sequence[str], rows: Rows) -> Markup:
    cells = ([row[0], *map(html.Number.escape, row[1:])] for row in rows)
    return html.table(caption, head, cells)


def _draw_intervals(names: Sequence[str], differences: Sequence[Difference]) -> Markup:
    plot = html.Plot(1.2 + 0.35 * len(differences), x="difference of MAP@100, 95 % interval")
    places = np.arange(len(differences))
    lows, highs = [gap.low for gap in differences], [gap.high for gap in differences]
    plot.axes.axvline(0, color=html.MUTED, linewidth=1)
    plot.axes.hlines(places, lows, highs, color=html.FIRST)
    plot.axes.plot([gap.mean for gap in differences], places, "o", color=html.FIRST)
    plot.axes.set_yticks(places, [html.short(name) for name in names[1:]])
    plot.axes.set_ylim(len(differences) - 0.5, -0.5)
    description = " ".join(
        f"{name}: {gap.mean:+z.4f}, from {gap.low:+z.4f} to {gap.high:+z.4f}."
        for name, gap in zip(names[1:], differences, strict=True)
    )
    return plot.html("gaps", f"Difference of MAP to {names[0]}", description)


def _make_gap_table(first: RankedRun, run: RankedRun, own: str, other: str) -> Markup:
    gaps = run.ap - first.ap
    order = np.argsort(-np.abs(gaps), kind="stable")[:MAX_IDENTITIES]
    rows = [
        (
            first.identities[i],
            int(first.positives[i]),
            html.bar(float(first.ap[i])),
            html.bar(float(run.ap[i])),
            html.number(float(gaps[i]), sign="+"),
        )
        for i in order
        if np.abs(gaps[i]) >= significance.EQUAL
    ]
    caption = f"The {len(rows)} identities with the largest difference for {other}"
    head = ("identity", "clips", own, other, "difference")
    return html.table(caption, head, rows)
