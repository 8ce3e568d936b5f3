"""MAP of every configuration, and the tables of the README that show it.

    python -m tests.benchmarks.scores FOLDER [--real=DIR] [--only=TEXT] [--collect]

trains every run of the tables that FOLDER lacks (hours), one after the other, and then writes what
they reached into `scores.json` beside this file and the tables into the README, where these names
stand in comments. A run is one command, the words of which are in its `config.json` and below. With
`--collect` nothing is trained; a run that is not there keeps the figures of `scores.json`. `--real`
is a folder of official files for the columns of real clips, `--only` names the rows to train.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks import common
from vidjax.modes import compare

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "scores.json"
SEEDS = (0, 1, 2)


class Row(NamedTuple):
    """A row of the table of scores.

    Attributes:
      key: names its runs.
      text: of its first cell.
      synthetic: the configuration on the synthetic dataset, and what overrides it; or none.
      real: the same on real clips; or none.
      real_members: whether the score on real clips is the mean of the members', not of them all;
        of folds it is not: a member's is of its own fold.
      instead: of a score on real clips.
    """

    key: str
    text: str
    synthetic: str
    real: str
    real_members: bool = False
    instead: str = ""


THREE = " --config.ensemble.seeds=3"
VIEWS = " --config.ensemble.views=5"
HELD_OUT = " --config.data.train_splits=train,val --config.ensemble.folds=5"
MMA = "mma.py:iqiyi_vid,few,face,head,audio"
DENSE = "residual_dense.py:iqiyi_vid,few,face"
DEEPMEF = "deepmef.py:iqiyi_vid,few,face"
FUSION = "quality_fusion.py:iqiyi_vid,few"
ROWS = (
    Row("face", "`mma.py:face`", "mma.py:face", "mma.py:iqiyi_vid,few,face" + THREE, True),
    Row(
        "head",
        "`mma.py:face,head`",
        "mma.py:face,head",
        "mma.py:iqiyi_vid,few,face,head" + THREE,
        True,
    ),
    Row("audio", "`mma.py:face,head,audio`", "mma.py:face,head,audio", MMA + THREE, True),
    Row("body", "`mma.py`, with body", "mma.py", "", instead="no body"),
    Row(
        "average",
        "the same with `average` instead of NetVLAD",
        "mma.py:average",
        MMA + ",average" + THREE,
        True,
    ),
    Row(
        "concat",
        "with `concat` instead of attention",
        "mma.py:concat",
        MMA + ",concat" + THREE,
        True,
    ),
    Row(
        "partitions",
        "with `ensemble`: three nets on nine tenths of the clips",
        "mma.py:ensemble",
        MMA + ",ensemble",
    ),
    Row("seeds", "three seeds together", "mma.py" + THREE, MMA + THREE),
    Row(
        "subsets",
        "`residual_dense.py:face`, three quality subsets",
        "residual_dense.py:face",
        DENSE,
    ),
    Row(
        "fallback",
        "with the head where there is no face (`residual_dense.py:face,head`)",
        "",
        DENSE + ",head",
    ),
    Row(
        "merged",
        "with `one,fused`: one net, one vector a clip",
        "residual_dense.py:face,one,fused",
        DENSE + ",one,fused" + THREE,
        True,
    ),
    Row(
        "single",
        "with `one,single`: frames not merged in training",
        "residual_dense.py:face,one,single",
        DENSE + ",one,single" + THREE,
        True,
    ),
    Row("fusion", "`quality_fusion.py`", "quality_fusion.py", FUSION + THREE, True),
    Row(
        "voting",
        "with `voting`, frame by frame",
        "quality_fusion.py:voting",
        FUSION + ",voting" + THREE,
        True,
    ),
    Row(
        "folds",
        "with `folds`: five nets on four fifths of the clips",
        "quality_fusion.py:folds",
        FUSION + ",folds",
    ),
    Row(
        "deepmef",
        "`deepmef.py:face`",
        "deepmef.py:face",
        "deepmef.py:iqiyi_vid,few,face" + THREE,
        True,
    ),
    Row(
        "views",
        "five views of the features",
        "deepmef.py:face" + VIEWS,
        DEEPMEF + VIEWS,
    ),
    Row("knn", "`knn.py`", "knn.py", "knn.py:iqiyi_vid"),
    Row("knn_folds", "out of fold: `knn.py`", "knn.py" + HELD_OUT, "knn.py:iqiyi_vid" + HELD_OUT),
    Row(
        "leave_out",
        "`noise_classes.py:leave_out`",
        "noise_classes.py:leave_out",
        "noise_classes.py:iqiyi_vid,few,leave_out" + THREE,
    ),
    Row(
        "noise",
        "`noise_classes.py`",
        "noise_classes.py",
        "noise_classes.py:iqiyi_vid,few" + THREE,
    ),
    Row(
        "noise_seeds",
        "three seeds together",
        "noise_classes.py" + THREE,
        "noise_classes.py:iqiyi_vid,few" + THREE,
    ),
)


class Claim(NamedTuple):
    """A row of the table of published claims: what a row reaches more than another.

    Attributes:
      text: what is claimed.
      synthetic: keys of the row and of the one before it; or none.
      real: the same on real clips; or none.
      verdict: of both.
    """

    text: str
    synthetic: tuple[str, ...]
    real: tuple[str, ...]
    verdict: str


CLAIMS = (
    Claim("head helps face", ("head", "face"), ("head", "face"), "yes"),
    Claim("audio helps both", ("audio", "head"), ("audio", "head"), "on real voices"),
    Claim(
        "body helps the three",
        ("body", "audio"),
        (),
        "perhaps: alone it scores .08",
    ),
    Claim("three nets help one", ("seeds", "body"), (), "on real clips"),
    Claim(
        "three nets on nine tenths of the clips help one",
        ("partitions", "body"),
        (),
        "on real clips",
    ),
    Claim("NetVLAD against averaging", ("body", "average"), ("audio", "average"), "perhaps"),
    Claim(
        "attention against concatenation",
        ("body", "concat"),
        ("audio", "concat"),
        "hardly: see below",
    ),
    Claim("merged frames against single ones", ("merged", "single"), ("merged", "single"), "yes"),
    Claim("three quality subsets against one net", ("subsets", "merged"), (), "perhaps"),
    Claim(
        "fused by quality against voting",
        ("fusion", "voting"),
        ("fusion", "voting"),
        "on real faces",
    ),
    Claim(
        "five folds against one net on all clips",
        ("folds", "fusion"),
        (),
        "as good, though every net has a fifth less",
    ),
    Claim("views of the features", ("views", "deepmef"), (), "on synthetic faces"),
    Claim("noise net against nearest neighbours", ("leave_out", "knn_folds"), (), "on real clips"),
    Claim("noise classes", ("noise", "leave_out"), ("noise", "leave_out"), "yes"),
)


# Runs.


def runs(real: str | None) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (key of the row, folder, words of the command) of every run."""
    for row in ROWS:
        if row.synthetic:
            for seed in SEEDS:
                words = _words(row.synthetic)
                words += [f"--config.seed={seed}", f"--config.data.seed={seed}"]
                yield row.key, f"{row.key}-{seed}", words
        if row.real and real:
            yield row.key, f"{row.key}-real", [*_words(row.real), f"--config.data.dir={real}"]


def _words(text: str) -> list[str]:
    """Returns the words of a command: only results out of fold need more than their ranking."""
    spec, *overrides = text.split()
    out_of_fold = spec.startswith("noise_classes") or "train_splits" in text
    return [f"--config=configs/{spec}", *overrides, f"--config.eval.report={out_of_fold}"]


def train(folder: Path, real: str | None, only: str) -> None:
    """Trains what is not there, and goes on with what was begun."""
    done: dict[tuple[str, ...], str] = {}
    for key, name, words in runs(real):
        workdir = folder / name
        if only not in key or (workdir / "metrics.json").exists():
            done.setdefault(tuple(words), name)
            continue
        if same := done.get(tuple(words)):  # two rows of one run
            workdir.symlink_to(same)
            continue
        done[tuple(words)] = name
        sys.stdout.write(f"{name}: {' '.join(words)}\n")
        command = [sys.executable, "-m", "vidjax.main", *words, f"--workdir={workdir}"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{name}: {ended.stderr[-2000:]}")


def collect(folder: Path, old: Mapping[str, Any], load: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns scores and differences: of the runs in a folder, else the old ones."""
    found: dict[str, Any] = {"scores": {}, "claims": {}}
    for row in ROWS:
        before = old.get("scores", {}).get(row.key, {})
        scores = {}
        for kind, names in _folders(row).items():
            values = [_score(folder / name, kind == "real" and row.real_members) for name in names]
            scores[kind] = before.get(kind) if None in values else values
        found["scores"][row.key] = {kind: values for kind, values in scores.items() if values}
    for claim in CLAIMS:
        before = old.get("claims", {}).get(claim.text, {})
        found["claims"][claim.text] = {}
        for kind in ("synthetic", "real"):
            value = before.get(kind)
            if pair := getattr(claim, kind):
                rows = [next(row for row in ROWS if row.key == key) for key in pair]
                names = [_folders(row)[kind] for row in rows]
                folders = [[folder / name for name in both] for both in zip(*names, strict=True)]
                if all((one / "metrics.json").exists() for both in folders for one in both):
                    value = _difference(folders, load)
            if value:
                found["claims"][claim.text][kind] = value
    return found


def _folders(row: Row) -> dict[str, list[str]]:
    names = {"synthetic": [f"{row.key}-{seed}" for seed in SEEDS], "real": [f"{row.key}-real"]}
    return {kind: value for kind, value in names.items() if getattr(row, kind)}


def _score(workdir: Path, of_members: bool) -> float | None:
    if not (workdir / "metrics.json").exists():
        return None
    results = json.loads((workdir / "metrics.json").read_text())
    if of_members:
        return float(np.mean([member["map"] for member in results["members"]]))
    return results["map"]


def _difference(pairs: list[list[Path]], load: Callable[[Any], Any]) -> list[float]:
    """Returns the mean difference by identity of pairs of runs, and its standard error."""
    gaps = []
    for new, base in pairs:
        first = compare.read(str(base), load)
        gaps.append(compare.align(first, compare.read(str(new), load)).ap - first.ap)
    gap = np.concatenate(gaps)
    return [float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))]


# Tables.


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tables by the names in the README."""
    rows = []
    for row in ROWS:
        scores = found["scores"].get(row.key, {})
        synthetic, real = scores.get("synthetic", []), scores.get("real", [])
        mean = _short(float(np.mean(synthetic))) if synthetic else ""
        cells = [" ".join(map(_short, synthetic)), mean, " ".join(map(_short, real)) or row.instead]
        rows.append([row.text, *cells])
    seeds = ", ".join(map(str, SEEDS))
    head = ["configuration and arguments", f"synthetic, seeds {seeds}", "mean", "real"]
    claims = []
    for claim in CLAIMS:
        differences = found["claims"].get(claim.text, {})
        cells = [_with_error(differences.get(kind)) for kind in ("synthetic", "real")]
        claims.append([claim.text, *cells, claim.verdict])
    return {
        "scores": common.markdown(head, rows),
        "claims": common.markdown(["published claim", "synthetic", "real", ""], claims),
    }


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _with_error(value: list[float] | None) -> str:
    if not value:
        return ""
    mean, error = (
        f"{x:{sign}.3f}".replace("0.", ".", 1) for x, sign in zip(value, "+-", strict=True)
    )
    return f"{mean} ± {error}"


def replace(text: str, name: str, table: str) -> str:
    """Returns a page with another table below `<!-- table: NAME -->`.

    Raises:
      ValueError: there is no such table, or several.
    """
    pattern = rf"(<!-- table: {name} -->\n)(?:\|.*\n)+"
    if len(re.findall(pattern, text)) != 1:
        raise ValueError(f"README.md: no table below `<!-- table: {name} -->`, or several")
    return re.sub(pattern, lambda match: match[1] + table, text)


def main() -> None:
    """Trains, collects, and writes the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", help="a folder of official files")
    parser.add_argument("--only", default="", help="rows whose key contains this")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.collect:
        args.folder.mkdir(parents=True, exist_ok=True)
        train(args.folder, args.real, args.only)
    from vidjax.modes.arguments import load_data

    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = collect(args.folder, old, load_data)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    text = README.read_text()
    for name, table in tables(found).items():
        sys.stdout.write(f"{table}\n")
        text = replace(text, name, table)
    README.write_text(text)


if __name__ == "__main__":
    main()
