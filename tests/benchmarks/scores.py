"""MAP and time of every configuration, and the tables of the READMEs that show them.

    python -m tests.benchmarks.scores FOLDER [--real=DIR] [--only=ROWS] [--collect] [--time]

The tables say what is run. A row of the table `scores` is a configuration with its overrides, or a
join of several by ` + `; a row of the tables with a column `to` compares two of these rows. A new
row has empty cells for what is measured, or the reason why there is no run. The script trains every
run that FOLDER lacks. It writes the results into `scores.json`, from there into the tables, and
time and score into the docstrings of the configurations.

- `--collect` trains nothing. Runs that FOLDER lacks keep the figures of `scores.json`.
- `--real` names a folder of official files, for the columns of real clips.
- `--only` names the rows to train or to time, without `.py`, separated by `;`. `*` is any text.
- `--time` measures the commands of the main README instead.
"""

import fnmatch
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common, first_command
from vidjax.evaluation import comparison
from vidjax.evaluation.comparison import RankedRun
from vidjax.evaluation.significance import squared_errors

HERE = Path(__file__).parent
CONFIGS = common.CONFIGS
PAGES = {"systems": common.ROOT / "README.md", "scores": HERE / "README.md"}
RESULTS = HERE / "scores.json"
SYNTHETIC, REAL = DATASETS = "synthetic", "real"
SEEDS = (0, 1, 2)
MODALITIES = {"face", "head", "body", "audio", "scene"}
# Configuration -> the modalities of real clips, which lack the others.
THREE = ["face", "head", "audio"]
ON_REAL = {"deepmef": ["face"], "mma": THREE, "plda": THREE, "cosine": THREE}
# The rows in the docstrings of the configurations, one each.
HEADERS = (
    "knn.py", "quality_fusion.py", "deepmef.py", "residual_dense.py:face", "noise_classes.py",
    "mma.py", "cosine.py", "plda.py",
)  # fmt: skip
TABLE = re.compile(r"<!-- table: (\w+) -->\n((?:\|.*\n)+)")


def read_tables(page: str) -> dict[str, list[list[str]]]:
    """Returns name -> rows of cells of the tables of a page, the first row the header."""
    found = TABLE.findall(PAGES[page].read_text())
    return {name: common.read_markdown(text) for name, text in found}


def is_reason(cell: str) -> bool:
    return bool(cell) and not cell[0].isdigit()


def read_rows() -> dict[str, dict[str, str]]:
    """Returns row -> dataset -> why there is no run on it, or an empty string."""
    rows = {}
    for spec, synthetic, _, real, _ in read_tables("scores")["scores"][1:]:
        cells = {SYNTHETIC: synthetic, REAL: real}
        rows[spec.strip("`")] = {x: cell if is_reason(cell) else "" for x, cell in cells.items()}
    return rows


def is_chosen(row: str, only: Sequence[str]) -> bool:
    """Returns True if a row matches one of some patterns, or there are none."""
    name = row.replace(".py", "")
    return not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)


# Runs.


def folder_name(row: str, dataset: str, seed: int) -> str:
    return re.sub(r"[^\w.=-]+", "_", f"{row.replace('.py', '')}-{dataset}-{seed}")


def command(row: str, dataset: str, seed: int, folder: str) -> list[str]:
    """Returns the words that train a row on `folder`, the real clips.

    The seed is the seed of the net, and on the synthetic dataset also of the data.
    """
    spec, *overrides = row.split()
    name, _, words = spec.partition(".py")
    given = [word for word in words.strip(":").split(",") if word]
    own = [f"--config.data.seed={seed}"]
    if dataset == REAL:
        given += [] if MODALITIES & {*given} else ON_REAL.get(name, [])
        given = ["iqiyi_vid", *["few"] * (name != "knn"), *given]
        own = [f"--config.data.dir={folder}"]
    spec = ":".join(filter(None, (f"configs/{name}.py", ",".join(given))))
    return [f"--config={spec}", *overrides, f"--config.seed={seed}", *own]


def runs(folder: Path, real: str | None) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (row, name of its folder, words of the command) of every run in `folder`.

    `real` is the folder of real clips, None for no runs on them. A join comes after its parts.
    """
    rows = read_rows()
    for row in sorted(rows, key=lambda row: " + " in row):
        for dataset in DATASETS if real else (SYNTHETIC,):
            for seed in [] if rows[row][dataset] else SEEDS:
                words = command(row, dataset, seed, real or "")
                if " + " in row:
                    parts = [folder_name(part, dataset, seed) for part in row.split(" + ")]
                    joined = ",".join(str(folder / part) for part in parts)
                    words = ["--mode=evaluate", f"--runs={joined}"]
                yield row, folder_name(row, dataset, seed), words


def train(folder: Path, real: str | None, only: Sequence[str]) -> None:
    """Trains the runs that a folder lacks, and resumes interrupted ones."""
    for row, name, words in runs(folder, real):
        workdir = folder / name
        if not is_chosen(row, only) or (workdir / "metrics.json").exists():
            continue
        common.say(f"{name}: {' '.join(words)}")
        words = [sys.executable, "-m", "vidjax.main", *words, f"--workdir={workdir}", "--quiet"]
        ended = subprocess.run(words, cwd=common.ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{name}: {ended.stderr[-2000:]}")


def time_systems(only: Sequence[str]) -> dict[str, float]:
    """Returns row -> seconds of each command in the main README, without any cache.

    The seconds include the dataset, compilation, training, evaluation and report.
    """
    seconds = {}
    shown = [spec.strip("`") for spec, *_ in read_tables("systems")["systems"][1:]]
    for row in dict.fromkeys((*shown, *HEADERS)):
        if is_chosen(row, only):
            with tempfile.TemporaryDirectory() as folder:
                spec, *overrides = row.split()
                words = (f"--config=configs/{spec}", *overrides)
                seconds[row], _ = first_command.run(Path(folder), *words)
            common.say(f"{row}: {seconds[row]:.0f} s")
    return seconds


# Results.


def collect(folder: Path, old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of `scores.json`, from the runs in a folder.

    `old` are the contents so far, kept for runs that the folder lacks. `rows` are row -> dataset ->
    `map`, `top1` and `fnir` (at an FPIR of 1 %) of each seed and the `commits` of the code; `rungs`
    are row and base -> dataset -> `mean` and `error` of the difference.
    """
    read = functools.cache(lambda path: comparison.read(str(path)))
    rows = {row: {x: _scores(_folders(folder, row, x)) for x in DATASETS} for row in read_rows()}
    rungs: dict[str, Any] = {}
    ladders = [rest for head, *rest in read_tables("scores").values() if "to" in head]
    for _, spec, base, _, *cells in itertools.chain(*ladders):
        if base:
            pair = [x.strip("`") for x in (base, spec)]
            rungs[pair_name(spec, base)] = {
                name: _difference([_folders(folder, row, name) for row in pair], name, read)
                for name, cell in zip(DATASETS, cells, strict=False)
                if not is_reason(cell)
            }
    found: dict[str, Any] = {"rows": rows, "rungs": rungs}
    for kind, results in found.items():
        for key, of_datasets in results.items():
            before = old.get(kind, {}).get(key, {})
            found_or_old = {name: value or before.get(name) for name, value in of_datasets.items()}
            results[key] = {name: value for name, value in found_or_old.items() if value}
    return {**found, "seconds": old.get("seconds", {})}


def pair_name(spec: str, base: str) -> str:
    return f"{spec} against {base}".replace("`", "")


def _folders(folder: Path, row: str, dataset: str) -> list[Path]:
    """Returns the folders of a row's finished runs, one per seed; none unless all are there."""
    folders = [folder / folder_name(row, dataset, seed) for seed in SEEDS]
    return folders if all((path / "metrics.json").exists() for path in folders) else []


def _scores(folders: Sequence[Path]) -> dict[str, Any] | None:
    metrics = [json.loads((path / "metrics.json").read_text()) for path in folders]
    keys = {"map": "map", "top1": "top1", "fnir": "fnir_at_fpir_0.01"}
    commits = sorted({one.get("versions", {}).get("commit", "unknown") for one in metrics})
    found = {name: [one.get(key) for one in metrics] for name, key in keys.items()}
    return {**found, "commits": commits} if metrics else None


def _difference(
    folders: Sequence[Sequence[Path]], dataset: str, read: Callable[[Path], RankedRun]
) -> dict[str, float] | None:
    """Returns mean and standard error of a difference in MAP, None without the runs."""
    gaps = []
    for base, new in zip(*folders, strict=False):
        first = read(base)
        gaps.append(comparison.align(first, read(new)).ap - first.ap)
    if not gaps:
        return None
    of_identities, of_seeds = squared_errors(gaps)
    if dataset != REAL:  # each seed has its own identities
        of_identities = sum(gap.var(ddof=1) / len(gap) for gap in gaps) / len(gaps) ** 2
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return {"mean": mean, "error": math.sqrt(of_identities + of_seeds)}


# Tables.


def of_seeds(found: Mapping[str, Any], spec: str, dataset: str, metric: str) -> list[float]:
    """Returns the values of the seeds of a row, none if it was not run."""
    values = found["rows"].get(spec.strip("`"), {}).get(dataset, {}).get(metric, [])
    return [value for value in values if value is not None]


def mean(found: Mapping[str, Any], spec: str, dataset: str, metric: str = "map") -> str:
    """Returns the mean of the seeds of a row as text, empty if it was not run."""
    values = of_seeds(found, spec, dataset, metric)
    return f"{np.mean(values):.3f}" if values else ""


def fill_scores(cells: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    spec, *old = cells
    new = []
    for dataset, cell in zip(DATASETS, old[::2], strict=True):
        every = " ".join(f"{value:.3f}" for value in of_seeds(found, spec, dataset, "map"))
        new += [cell if is_reason(cell) else every, mean(found, spec, dataset)]
    return [spec, *new]


def fill_ladder(
    cells: Sequence[str], found: Mapping[str, Any], absent: Mapping[str, str], *, strangers: bool
) -> list[str]:
    """Returns the cells of a comparison, filled with the measured figures.

    `absent` are dataset -> why the base has no run. With `strangers`, the cells also have FNIR, the
    share of known clips that are missed when 1 % of the distractors pass.
    """
    text, spec, base, published, *old, _, why = cells
    gaps = found["rungs"].get(pair_name(spec, base), {})
    new, verdicts = [], []
    for dataset, cell in zip(DATASETS, old, strict=True):
        told = mean(found, spec, dataset)
        if told and published.startswith("top1"):  # an accuracy: ours, too
            told += f", top1 {mean(found, spec, dataset, 'top1')}"
        if gap := gaps.get(dataset):
            gain, half = gap["mean"], 2 * gap["error"]
            told += f" ({gain:+.3f} ± {half:.3f})"
            verdicts.append("yes" if gain > half else "no" if gain < -half else "open")
        elif absent.get(dataset):
            told += f" ({absent[dataset]})"
        missed = mean(found, spec, dataset, "fnir") if strangers else ""
        new.append(cell if is_reason(cell) else told + f", FNIR {missed}" * bool(missed))
    why = why if {*verdicts} - {"yes"} else ""
    return [text, spec, base, published, *new, ", ".join(verdicts), why]


def header(row: str, found: Mapping[str, Any]) -> str:
    """Returns the lines with time and score of a row, for a configuration's docstring."""
    seconds, (_, _, words) = found["seconds"].get(row), row.partition(".py:")
    spoken = f" with the argument {' and '.join(f'`{x}`' for x in words.split(','))}" * bool(words)
    taken = "not measured" if seconds is None else f"about {seconds:.0f} seconds on 2 CPU cores"
    lines = [f"Time: {taken}{spoken}."]
    means = {name: mean(found, row, name) for name in DATASETS}
    told = [f"{mean} on the small {name} dataset" for name, mean in means.items() if mean]
    if told:  # members of noise classes score the clips that they were not trained on
        protocol = ", out of fold" if row.startswith("noise_classes") else ""
        score = f"Score: MAP@100 {', '.join(told)}{protocol}{spoken} (means of {len(SEEDS)} seeds)."
        lines += textwrap.wrap(score, width=99)
    return "".join(f"{line}\n" for line in lines)


def write_pages(found: Mapping[str, Any]) -> None:
    """Writes every table into its page, and time and score into every configuration."""
    rows = read_rows()
    for page, path in PAGES.items():
        for name, (head, *lines) in read_tables(page).items():
            new = []
            for cells in lines:
                if name == "systems":
                    seconds = found["seconds"].get(cells[0].strip("`"))
                    scored = [mean(found, cells[0], dataset) for dataset in DATASETS]
                    taken = "" if seconds is None else f"{seconds:.0f} s"
                    new.append([*cells[:2], *scored, cells[4], taken])
                elif name == "scores":
                    new.append(fill_scores(cells, found))
                else:
                    absent, strangers = rows.get(cells[2].strip("`"), {}), name == "noise_classes"
                    new.append(fill_ladder(cells, found, absent, strangers=strangers))
            table = common.markdown(head, new)
            common.say(table)
            path.write_text(common.replace_table(path.read_text(), name, table))
    for row in HEADERS:
        path = CONFIGS / f"{row.partition('.')[0]}.py"
        lines = header(row, found)
        text, count = re.subn(r"(?m)^Time: .*\n(?:.+\n)*", lambda _, x=lines: x, path.read_text())
        if count != 1:
            raise ValueError(f"{path}: wanted one paragraph that begins with `Time:`")
        path.write_text(text)


def main(argv: Sequence[str] | None = None) -> None:
    flags = ("--collect", "--time")
    args = common.parse(__doc__, *flags, argv=argv, folder=Path, real="", only="")
    only = [text for text in args.only.split(";") if text]
    if not (args.collect or args.time):
        args.folder.mkdir(parents=True, exist_ok=True)
        train(args.folder.absolute(), args.real, only)
    old = json.loads(RESULTS.read_text())
    found = collect(args.folder, old)
    if args.time:
        found["seconds"] |= time_systems(only)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write_pages(found)


if __name__ == "__main__":
    main()
