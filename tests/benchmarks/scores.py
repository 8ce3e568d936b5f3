"""Trains every configuration, and writes scores and times into the READMEs and configurations.

    python -m tests.benchmarks.scores FOLDER [--real=DIR] [--only=ROWS] [--collect] [--time]

A row of the table `scores` is a configuration with overrides, or several configurations that are
joined by ` + `. Rows of tables with a column `to` compare two rows of `scores`. In a new row, the
cells of scores are empty, or contain the reason why there is no run. The script trains the runs
that FOLDER lacks, and stores the results in `scores.json`.

- `--collect` trains nothing. Runs that FOLDER lacks keep the results in `scores.json`.
- `--real` is a folder of official files, for the columns of real clips.
- `--only` is a regular expression, which selects the rows to train or to time.
- `--time` measures the times in the main README, and trains nothing else.
"""

import functools
import itertools
import json
import math
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common, first_command
from vidjax.evaluation import comparison
from vidjax.evaluation.significance import squared_errors

HERE = Path(__file__).parent
CONFIGS = common.CONFIGS
read = functools.cache(comparison.read)
PAGES = {"systems": common.ROOT / "README.md", "scores": HERE / "README.md"}
RESULTS = HERE / "scores.json"
SYNTHETIC, REAL = DATASETS = "synthetic", "real"
SEEDS = (0, 1, 2)
MODALITIES = {"face", "head", "body", "audio", "scene"}
# Configuration -> the modalities that it uses of real clips, which have no other modalities.
THREE = ["face", "head", "audio"]
ON_REAL = {"deepmef": ["face"], "mma": THREE, "plda": THREE, "cosine": THREE,
           "joint": THREE}  # fmt: skip
# The rows whose time and score are in the docstring of their configuration.
DOCUMENTED = (
    "knn.py", "quality_fusion.py", "deepmef.py", "residual_dense.py:face", "noise_classes.py",
    "mma.py", "cosine.py", "plda.py",
)  # fmt: skip


def read_tables(page: str) -> dict[str, list[list[str]]]:
    """Returns name -> cells [rows][columns] of each table. The first row is the header."""
    tables = re.findall(r"<!-- table: (\w+) -->\n((?:\|.*\n)+)", PAGES[page].read_text())
    return {name: common.read_table(text) for name, text in tables}


def is_reason(cell: str) -> bool:
    return bool(cell) and not cell[0].isdigit()


def read_rows() -> dict[str, dict[str, str]]:
    """Returns row -> dataset -> the reason why there is no run, or an empty string."""
    rows = {}
    for spec, synthetic, _, real, _ in read_tables("scores")["scores"][1:]:
        cells = zip(DATASETS, (synthetic, real), strict=True)
        rows[spec.strip("`")] = {name: cell if is_reason(cell) else "" for name, cell in cells}
    return rows


# Runs.


def find_folder(folder: Path, row: str, dataset: str, seed: int) -> Path:
    return folder / re.sub(r"[^\w.=-]+", "_", f"{row.replace('.py', '')}-{dataset}-{seed}")


def make_flags(row: str, dataset: str, seed: int, folder: str) -> list[str]:
    """Returns the flags of the command that trains a row. `folder` contains the real clips."""
    spec, *overrides = row.split()
    name, _, words = spec.partition(".py")
    arguments = [word for word in words.strip(":").split(",") if word]
    data = f"--config.data.seed={seed}"
    if dataset == REAL:
        arguments += [] if MODALITIES & {*arguments} else ON_REAL.get(name, [])
        arguments = ["iqiyi_vid", *["few"] * (name != "knn"), *arguments]
        data = f"--config.data.dir={folder}"
    spec = ":".join(filter(None, (f"configs/{name}.py", ",".join(arguments))))
    return [f"--config={spec}", *overrides, f"--config.seed={seed}", data]


def train(folder: Path, real: str, only: str) -> None:
    """Trains the runs that a folder lacks. `real` is the folder of real clips, or empty."""
    rows = read_rows()
    for row in sorted(rows, key=lambda row: " + " in row):  # a join comes after its parts
        for dataset, seed in itertools.product(DATASETS if real else (SYNTHETIC,), SEEDS):
            workdir = find_folder(folder, row, dataset, seed)
            is_done = (workdir / "metrics.json").exists()
            if is_done or rows[row][dataset] or not re.search(only, row):
                continue
            flags = make_flags(row, dataset, seed, real)
            if " + " in row:
                parts = [find_folder(folder, part, dataset, seed) for part in row.split(" + ")]
                flags = ["--mode=evaluate", f"--runs={','.join(map(str, parts))}"]
            common.print_text(f"{workdir.name}: {' '.join(flags)}")
            common.run_python("-m", "vidjax.main", *flags, f"--workdir={workdir}", "--quiet")


def time_systems(only: str) -> dict[str, float]:
    """Returns row -> seconds of a training with an empty cache, for rows of the main README."""
    seconds = {}
    systems = [spec.strip("`") for spec, *_ in read_tables("systems")["systems"][1:]]
    for row in filter(re.compile(only).search, dict.fromkeys((*systems, *DOCUMENTED))):
        with tempfile.TemporaryDirectory() as folder:
            seconds[row], _ = first_command.run(Path(folder), *f"--config=configs/{row}".split())
        common.print_text(f"{row}: {seconds[row]:.0f} s")
    return seconds


# Results.


def collect(folder: Path, old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `scores.json`. The `old` content is kept for runs that are missing.

    `rows` are row -> dataset -> metric -> value of each seed. `rungs` are comparison of two rows ->
    dataset -> mean and standard error of the difference in MAP.
    """
    rows = {row: {x: _read_scores(folder, row, x) for x in DATASETS} for row in read_rows()}
    rungs: dict[str, Any] = {}
    ladders = [lines for header, *lines in read_tables("scores").values() if "to" in header]
    for _, spec, base, _, *cells in itertools.chain(*ladders):
        if base:
            rungs[name_comparison(spec, base)] = {
                dataset: _compare(folder, base.strip("`"), spec.strip("`"), dataset)
                for dataset, cell in zip(DATASETS, cells, strict=False)
                if not is_reason(cell)
            }
    results: dict[str, Any] = {"rows": rows, "rungs": rungs}
    for kind, of_kind in results.items():
        for key, of_datasets in of_kind.items():
            before = old.get(kind, {}).get(key, {})
            new_or_old = {name: x or before.get(name) for name, x in of_datasets.items()}
            of_kind[key] = {name: x for name, x in new_or_old.items() if x}
    return {**results, "seconds": old.get("seconds", {})}


def name_comparison(spec: str, base: str) -> str:
    return f"{spec} against {base}".replace("`", "")


def _list_finished(folder: Path, row: str, dataset: str) -> list[Path]:
    """Returns the folder of each seed of a row, or an empty list if a run is not finished."""
    folders = [find_folder(folder, row, dataset, seed) for seed in SEEDS]
    return folders if all((path / "metrics.json").exists() for path in folders) else []


def _read_scores(folder: Path, row: str, dataset: str) -> dict[str, Any] | None:
    folders = _list_finished(folder, row, dataset)
    if not folders:
        return None
    metrics = [json.loads((path / "metrics.json").read_text()) for path in folders]
    keys = {"map": "map", "top1": "top1", "fnir": "fnir_at_fpir_0.01"}
    scores: dict[str, Any] = {name: [x.get(key) for x in metrics] for name, key in keys.items()}
    commits = {x.get("versions", {}).get("commit", "unknown") for x in metrics}
    return scores | {"commits": sorted(commits)}


def _compare(folder: Path, base: str, row: str, dataset: str) -> dict[str, float] | None:
    """Returns mean and standard error of MAP(row) - MAP(base), or None if a run is missing."""
    gaps = []
    for folders in zip(*(_list_finished(folder, x, dataset) for x in (base, row)), strict=False):
        first, second = (read(str(path)) for path in folders)
        gaps.append(comparison.align(first, second).ap - first.ap)
    if not gaps:
        return None
    identity_error, seed_error = squared_errors(gaps)
    if dataset == SYNTHETIC:  # each seed has other identities
        identity_error = sum(gap.var(ddof=1) / len(gap) for gap in gaps) / len(gaps) ** 2
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return {"mean": mean, "error": math.sqrt(identity_error + seed_error)}


# Tables.


def get_scores(results: Any, row: str, dataset: str, metric: str = "map") -> list[float]:
    """Returns the values of a metric, one per seed, or an empty list without runs."""
    values = results["rows"].get(row.strip("`"), {}).get(dataset, {}).get(metric, [])
    return [value for value in values if value is not None]


def format_mean(results: Any, row: str, dataset: str, *metric: str, label: str = "") -> str:
    """Returns the label and the mean of a metric, by default of MAP, or "" without runs."""
    values = get_scores(results, row, dataset, *metric)
    return f"{label}{np.mean(values):.3f}" if values else ""


def fill_scores(cells: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    spec, *old = cells
    new = [spec]
    for dataset, cell in zip(DATASETS, old[::2], strict=True):
        values = " ".join(f"{value:.3f}" for value in get_scores(results, spec, dataset))
        new += [cell if is_reason(cell) else values, format_mean(results, spec, dataset)]
    return new


def fill_comparison(table: str, cells: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    """Returns a row that compares two rows of `scores`, with our top1 if `published` is a top1."""
    text, spec, base, published, *old, _, why = cells
    gaps = results["rungs"].get(name_comparison(spec, base), {})
    missing = read_rows().get(base.strip("`"), {})
    new, verdicts = [], []
    for dataset, cell in zip(DATASETS, old, strict=True):
        score = format_mean(results, spec, dataset)
        if score and published.startswith("top1"):
            score += format_mean(results, spec, dataset, "top1", label=", top1 ")
        if gap := gaps.get(dataset):
            gain, half = gap["mean"], 2 * gap["error"]
            score += f" ({gain:+.3f} ± {half:.3f})"
            verdicts.append("yes" if gain > half else "no" if gain < -half else "open")
        elif missing.get(dataset):  # the base has no run
            score += f" ({missing[dataset]})"
        if table == "noise_classes":
            score += format_mean(results, spec, dataset, "fnir", label=", FNIR ")
        new.append(cell if is_reason(cell) else score)
    why = why if {*verdicts} - {"yes"} else ""
    return [text, spec, base, published, *new, ", ".join(verdicts), why]


def fill_system(cells: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    spec, about, _, _, published, _ = cells
    seconds = results["seconds"].get(spec.strip("`"))
    scores = [format_mean(results, spec, dataset) for dataset in DATASETS]
    return [spec, about, *scores, published, "" if seconds is None else f"{seconds:.0f} s"]


def describe_results(row: str, results: Mapping[str, Any]) -> str:
    """Returns the lines about time and score for the docstring of a configuration."""
    seconds, (_, _, words) = results["seconds"].get(row), row.partition(".py:")
    arguments = f" with the argument {' and '.join(f'`{x}`' for x in words.split(','))}"
    arguments = arguments if words else ""
    time = "not measured" if seconds is None else f"about {seconds:.0f} seconds on 2 CPU cores"
    lines = [f"Time: {time}{arguments}."]
    means = {name: format_mean(results, row, name) for name in DATASETS}
    scores = [f"{mean} on the small {name} dataset" for name, mean in means.items() if mean]
    if scores:  # nets of noise classes score the clips that they were not trained on
        protocol = ", out of fold" if row.startswith("noise_classes") else ""
        end = f"{protocol}{arguments} (means of {len(SEEDS)} seeds)"
        lines += textwrap.wrap(f"Score: MAP@100 {', '.join(scores)}{end}.", width=99)
    return "".join(f"{line}\n" for line in lines)


def write_results(results: Mapping[str, Any]) -> None:
    """Writes the results into the tables of the pages and the docstrings of configurations."""
    for page, path in PAGES.items():
        for name, (header, *lines) in read_tables(page).items():
            if name in ("systems", "scores"):
                fill = fill_system if name == "systems" else fill_scores
            elif "to" in header:
                fill = functools.partial(fill_comparison, name)
            else:  # another script writes the table
                continue
            table = common.format_table(header, [fill(cells, results) for cells in lines])
            common.print_text(table)
            path.write_text(common.replace_table(path.read_text(), name, table))
    for row in DOCUMENTED:
        path = CONFIGS / f"{row.partition('.')[0]}.py"
        lines = describe_results(row, results)
        text, count = re.subn(r"(?m)^Time: .*\n(?:.+\n)*", lambda _, x=lines: x, path.read_text())
        if count != 1:
            raise ValueError(f"{path}: exactly one paragraph must begin with `Time:`")
        path.write_text(text)


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, "--collect", "--time", argv=argv, folder=Path, real="", only="")
    if not (args.collect or args.time):
        args.folder.mkdir(parents=True, exist_ok=True)
        train(args.folder.absolute(), args.real, args.only)
    results = collect(args.folder, json.loads(RESULTS.read_text()))
    if args.time:
        results["seconds"] |= time_systems(args.only)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_results(results)


if __name__ == "__main__":
    main()
