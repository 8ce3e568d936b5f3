"""MAP and time of every configuration, and the tables of the READMEs that show them.

    python -m tests.benchmarks.scores FOLDER [--real=DIR] [--only=KEYS] [--collect] [--time]

trains every run that FOLDER lacks, one after the other (hours). It then writes the results into
`scores.json`, the tables into the pages of `PAGES`, below the comments
`<!-- table: NAME -->`, and time and score into the docstrings of the configurations. `ladders`
lists the runs and what is compared.

- `--collect` trains nothing. Runs that FOLDER lacks keep the figures of `scores.json`.
- `--real` names a folder of official files, for the columns of real clips.
- `--only` names the rows to train or to time: their keys, separated by commas; `*` stands for any
  text.
- `--time` measures the commands of the main README instead (minutes, on an idle machine).
"""

import argparse
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
from tests.benchmarks.ladders import LADDERS, OPEN_SET, REAL, ROWS, SEEDS, SYNTHETIC, Row, Rung
from vidjax.evaluation import comparison
from vidjax.evaluation.comparison import RankedRun
from vidjax.evaluation.significance import squared_errors

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CONFIGS = ROOT / "configs"
PAGES = {  # table -> the page that shows it
    "systems": ROOT / "README.md",
    "scores": HERE / "README.md",
    **dict.fromkeys(LADDERS, HERE / "README.md"),
}
RESULTS = HERE / "scores.json"
DATASETS = (SYNTHETIC, REAL)
RUNGS = tuple(itertools.chain(*LADDERS.values()))


# The short table in the main README: key of the row with the scores, what the system is, and MAP of
# the publication at full size.
SYSTEMS = (
    ("knn", "nearest training clip, the baseline", ""),
    ("fusion", "a few good faces fused by quality, and an MLP; 4th place 2019", "0.8983"),
    ("deepmef", "DeepMEF: attention between frames, angular margin; 3rd place 2019", "0.8986"),
    ("dense", "Residual Dense Net, three quality subsets; 2nd place 2019", "0.9035"),
    ("noise", "noise classes: distractors clustered into classes; 5th place 2018", "0.8252"),
    ("mma", "the iQIYI-VID paper: NetVLAD, attention between modalities", "0.8970"),
    ("cosine", "ours: unit vectors of all modalities, a cosine classifier with a margin", ""),
    ("plda", "ours: PLDA, likelihood ratios in closed form; nothing is trained", ""),
)
# One row a configuration.
HEADERS = ("knn", "fusion", "deepmef_scene", "dense", "noise", "mma", "cosine", "plda")


# Runs.


def time_systems(only: Sequence[str]) -> dict[str, float]:
    """Returns key -> seconds of each command in the main README, without any cache.

    The seconds include the dataset, compilation, training, evaluation and report.
    """
    seconds = {}
    for key in dict.fromkeys((*(key for key, *_ in SYSTEMS), *HEADERS)):
        if is_chosen(key, only):
            with tempfile.TemporaryDirectory() as folder:
                spec, *overrides = ROWS[key].spec.split()
                words = (f"--config=configs/{spec}", *overrides)
                seconds[key], _ = first_command.run(Path(folder), *words)
            sys.stdout.write(f"{key}: {seconds[key]:.0f} s\n")
    return seconds


def is_chosen(key: str, only: Sequence[str]) -> bool:
    """Returns True if a key matches one of some patterns, or there are none."""
    return not only or any(fnmatch.fnmatchcase(key, pattern) for pattern in only)


def folder_name(row: Row, dataset: str, seed: int) -> str:
    """Returns the name of a run's folder."""
    return f"{row.key}-{dataset}-{seed}"


def runs(real: str | None) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (key of the row, name of the folder, words of the command) of every run.

    `real` is the folder of real clips, None for no runs on them. A join comes after the joined
    runs; in its words, FOLDER stands for their place.
    """
    for row in ROWS.values():
        for dataset in DATASETS if real else (SYNTHETIC,):
            for seed in SEEDS:
                if dataset in row.absent:
                    continue
                name = folder_name(row, dataset, seed)
                if row.joined:
                    parts = [folder_name(ROWS[key], dataset, seed) for key in row.joined]
                    joined = ",".join(f"FOLDER/{part}" for part in parts)
                    yield row.key, name, ["--mode=evaluate", f"--runs={joined}"]
                else:
                    yield row.key, name, row.command(dataset, seed, real or "")


def train(folder: Path, real: str | None, only: Sequence[str]) -> None:
    """Trains the runs that a folder lacks, and resumes interrupted ones."""
    for key, name, words in runs(real):
        workdir = folder / name
        if not is_chosen(key, only) or (workdir / "metrics.json").exists():
            continue
        words = [word.replace("FOLDER", str(folder)) for word in words]
        sys.stdout.write(f"{name}: {' '.join(words)}\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "vidjax.main", *words, f"--workdir={workdir}", "--quiet"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{name}: {ended.stderr[-2000:]}")


# Results.


def collect(folder: Path, old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of `scores.json`, from the runs in a folder.

    `old` are the contents so far, kept for runs that the folder lacks. `rows` are key -> dataset ->
    `map`, `top1` and `fnir` (at an FPIR of 1 %) of each seed and the `commits` of the code; `rungs`
    are key and base -> dataset -> `mean` and `error` of the difference.
    """
    rows: dict[str, Any] = {}
    for key, row in ROWS.items():
        before = old.get("rows", {}).get(key, {})
        scores = {name: _scores(folder, row, name) or before.get(name) for name in DATASETS}
        rows[key] = {name: value for name, value in scores.items() if value}

    @functools.cache
    def read(path: Path) -> RankedRun:
        return comparison.read(str(path))

    rungs: dict[str, Any] = {}
    for rung in (rung for rung in RUNGS if rung.base):
        pair = pair_name(rung)
        before = old.get("rungs", {}).get(pair, {})
        found = {name: _difference(folder, rung, name, read) for name in DATASETS}
        found = {name: value or before.get(name) for name, value in found.items()}
        rungs[pair] = {name: value for name, value in found.items() if value}
    return {"rows": rows, "rungs": rungs, "seconds": old.get("seconds", {})}


def pair_name(rung: Rung) -> str:
    """Returns the name of a comparison in `scores.json`."""
    return f"{rung.key} against {rung.base}"


def _folders(folder: Path, row: Row, dataset: str) -> list[Path]:
    """Returns the folders of a row's finished runs, one per seed; none unless all are there."""
    folders = [folder / folder_name(row, dataset, seed) for seed in SEEDS]
    return folders if all((path / "metrics.json").exists() for path in folders) else []


def _scores(folder: Path, row: Row, dataset: str) -> dict[str, Any] | None:
    paths = _folders(folder, row, dataset)
    metrics = [json.loads((path / "metrics.json").read_text()) for path in paths]
    if not metrics:
        return None
    commits = {one.get("versions", {}).get("commit", "unknown") for one in metrics}
    return {
        "map": [one["map"] for one in metrics],
        "top1": [one["top1"] for one in metrics],
        "fnir": [one.get("fnir_at_fpir_0.01") for one in metrics],
        "commits": sorted(commits),
    }


def _difference(
    folder: Path, rung: Rung, dataset: str, read: Callable[[Path], RankedRun]
) -> dict[str, float] | None:
    """Returns mean and standard error of a rung's difference in MAP, None without its runs."""
    if dataset in rung.absent:
        return None
    base, new = (_folders(folder, ROWS[key], dataset) for key in (rung.base, rung.key))
    gaps = []
    for first_folder, folder_of_new in zip(base, new, strict=False):
        first = read(first_folder)
        other = comparison.align(first, read(folder_of_new))
        gaps.append(other.ap - first.ap)
    if not gaps:
        return None
    of_identities, of_seeds = squared_errors(gaps)
    if dataset != REAL:  # each seed has its own identities
        of_identities = sum(gap.var(ddof=1) / len(gap) for gap in gaps) / len(gaps) ** 2
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return {"mean": mean, "error": math.sqrt(of_identities + of_seeds)}


# Tables.


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> table in Markdown, of the contents of `scores.json`."""
    rows = []
    for key, row in ROWS.items():
        scores = found["rows"].get(key, {})
        cells = []
        for dataset in DATASETS:
            values = scores.get(dataset, {}).get("map", [])
            reason = row.absent.get(dataset, "")
            cells += [" ".join(map(_short, values)) or reason, _mean(values)]
        rows.append([f"`{row.spec}`", *cells])
    seeds = ", ".join(map(str, SEEDS))
    head = ["`--config=configs/`"]
    for dataset in DATASETS:
        head += [f"{dataset}, seeds {seeds}", "mean"]
    above = ["added", "`--config=configs/`", "to", "published", *DATASETS, "gain?", "why"]
    ladders = {}
    for name, rungs in LADDERS.items():
        cells = [_ladder_row(rung, found, strangers=name in OPEN_SET) for rung in rungs]
        ladders[name] = common.markdown(above, cells)
    return {"systems": _systems(found), "scores": common.markdown(head, rows), **ladders}


def _ladder_row(rung: Rung, found: Mapping[str, Any], *, strangers: bool) -> list[str]:
    scores = found["rows"].get(rung.key, {})
    differences = found["rungs"].get(pair_name(rung), {})
    cells = []
    for dataset in DATASETS:
        score = _mean(scores.get(dataset, {}).get("map", []))
        if score and rung.published.startswith("top1"):  # an accuracy: ours, too
            score += f", top1 {_mean(scores[dataset]['top1'])}"
        reason = {**ROWS[rung.key].absent, **rung.absent}.get(dataset, "")
        gain = _with_interval(differences.get(dataset)) or _no_base(rung, dataset)
        missed = scores.get(dataset, {}).get("fnir", []) if strangers else []
        missed = _mean([share for share in missed if share is not None])
        cells.append(reason or f"{score} {gain}".strip() + f", FNIR {missed}" * bool(missed))
    published = rung.published
    if rung.base and (gain := published_gain(rung)) is not None:
        published = f"{published} ({gain:+.4f})"
    verdicts = [verdict(differences.get(dataset)) for dataset in DATASETS]
    gained = ", ".join(filter(None, verdicts))
    base = f"`{ROWS[rung.base].spec}`" if rung.base else ""
    why = rung.why if {*verdicts} - {"", "yes"} else ""
    return [rung.text, f"`{ROWS[rung.key].spec}`", base, published, *cells, gained, why]


def _no_base(rung: Rung, dataset: str) -> str:
    """Returns why the base of a rung has no score on a dataset, or an empty string."""
    reason = ROWS[rung.base].absent.get(dataset) if rung.base else None
    return f"({reason})" if reason else ""


def published_gain(rung: Rung) -> float | None:
    """Returns the published MAP of a rung minus that of its base, None if either is not given."""
    by_key = {one.key: one.published for one in RUNGS if re.fullmatch(r"0\.\d+", one.published)}
    if rung.published != by_key.get(rung.key) or rung.base not in by_key:
        return None
    return float(rung.published) - float(by_key[rung.base])


def verdict(difference: Mapping[str, float] | None) -> str:
    """Returns `yes` for a gain outside of the interval, `no` for a loss, `open` for neither."""
    if not difference:
        return ""
    mean, half = difference["mean"], 2 * difference["error"]
    return "yes" if mean > half else "no" if mean < -half else "open"


def _systems(found: Mapping[str, Any]) -> str:
    """Returns the short table of the main README."""
    rows = []
    for key, text, paper in SYSTEMS:
        scores, seconds = found["rows"].get(key, {}), found.get("seconds", {})
        time_taken = f"{seconds[key]:.0f} s" if key in seconds else ""
        scored = [_mean(scores.get(name, {}).get("map", [])) for name in DATASETS]
        rows.append([f"`{ROWS[key].spec}`", text, *scored, paper, time_taken])
    return common.markdown(["`--config=configs/`", "system", *DATASETS, "published", "time"], rows)


def _mean(values: Sequence[float]) -> str:
    return _short(float(np.mean(values))) if values else ""


def _short(value: float) -> str:
    return f"{value:.3f}"


def _with_interval(difference: Mapping[str, float] | None) -> str:
    if not difference:
        return ""
    return f"({difference['mean']:+.3f} ± {2 * difference['error']:.3f})"


def replace(text: str, name: str, table: str) -> str:
    """Returns a page with another table below `<!-- table: NAME -->`, of which it must have one."""
    pattern = rf"(<!-- table: {name} -->\n)(?:\|.*\n)+"
    if len(re.findall(pattern, text)) != 1:
        raise ValueError(f"wanted one table below `<!-- table: {name} -->`")
    return re.sub(pattern, lambda match: match[1] + table, text)


def header(row: Row, found: Mapping[str, Any]) -> str:
    """Returns the lines with time and score of a row, for a configuration's docstring."""
    scores, seconds = found["rows"].get(row.key, {}), found["seconds"].get(row.key)
    arguments = " and ".join(f"`{word}`" for word in row.arguments.split(",") if word)
    spoken = f" with the argument {arguments}" if arguments else ""
    taken = "not measured" if seconds is None else f"about {seconds:.0f} seconds on 2 CPU cores"
    lines = [f"Time: {taken}{spoken}."]
    means = {name: _mean(scores.get(name, {}).get("map", [])) for name in DATASETS}
    told = [f"{mean} on the small {name} dataset" for name, mean in means.items() if mean]
    if told:
        protocol = ", out of fold" if row.is_out_of_fold else ""
        lines += textwrap.wrap(
            f"Score: MAP@100 {', '.join(told)}{protocol}{spoken} (means of {len(SEEDS)} seeds).",
            width=99,
        )
    return "".join(f"{line}\n" for line in lines)


def replace_header(text: str, lines: str) -> str:
    """Returns the text of a configuration with other lines of time and score."""
    pattern = r"(?m)^Time: .*\n(?:.+\n)*"
    if len(re.findall(pattern, text)) != 1:
        raise ValueError("wanted one paragraph that begins with `Time:`")
    return re.sub(pattern, lambda match: lines, text)


def write_pages(found: Mapping[str, Any]) -> None:
    """Writes every table into its page, and time and score into every configuration."""
    for name, table in tables(found).items():
        sys.stdout.write(f"{table}\n")
        PAGES[name].write_text(replace(PAGES[name].read_text(), name, table))
    for key in HEADERS:
        path = CONFIGS / f"{ROWS[key].config}.py"
        path.write_text(replace_header(path.read_text(), header(ROWS[key], found)))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, collects, and writes the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", help="a folder of official files")
    parser.add_argument("--only", default="", help="keys of rows; * stands for any text")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="time the commands of README.md")
    args = parser.parse_args(argv)
    only = [text for text in args.only.split(",") if text]
    if not (args.collect or args.time):
        args.folder.mkdir(parents=True, exist_ok=True)
        train(args.folder.absolute(), args.real, only)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = collect(args.folder, old)
    if args.time:
        found["seconds"] |= time_systems(only)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write_pages(found)


if __name__ == "__main__":
    main()
