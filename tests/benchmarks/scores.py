"""MAP and time of every configuration, and the tables of the READMEs that show them.

    python -m tests.benchmarks.scores FOLDER [--real=DIR] [--only=TEXT] [--collect] [--time]

trains every run that FOLDER lacks, one after the other (hours). It then writes the results into
`scores.json` beside this file, and the tables into the pages of `PAGES`, below the comments
`<!-- table: NAME -->`.

- `--collect` trains nothing. Runs that FOLDER lacks keep the figures of `scores.json`.
- `--real` names a folder of official files, for the columns of real clips.
- `--only` names the rows to train or to time.
- `--time` measures the commands of the main README instead (minutes, on an idle machine).
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks import common
from vidjax.modes import compare

ROOT = Path(__file__).parents[2]
PAGES = {  # table -> the page that shows it
    "systems": ROOT / "README.md",
    "scores": Path(__file__).parent / "README.md",
    "claims": Path(__file__).parent / "README.md",
}
RESULTS = Path(__file__).parent / "scores.json"
SEEDS = (0, 1, 2)


class Row(NamedTuple):
    """A row of the table of scores.

    Attributes:
      key: name of the row; the folders of its runs begin with it.
      text: first cell.
      synthetic: configuration and overrides for the synthetic dataset; may be empty.
      real: the same for real clips; may be empty.
      real_members: True to average the MAP of the members on real clips; False for the MAP of the
        ensemble. Folds need False, because each member has a score on its own fold only.
      instead: text of the cell where there is no score on real clips.
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
    Row("body", "`mma.py`: face, head, body and audio", "mma.py", "", instead="no body"),
    Row(
        "average",
        "`mma.py:average`: averaging instead of NetVLAD",
        "mma.py:average",
        MMA + ",average" + THREE,
        True,
    ),
    Row(
        "concat",
        "`mma.py:concat`: no attention",
        "mma.py:concat",
        MMA + ",concat" + THREE,
        True,
    ),
    Row(
        "partitions",
        "`mma.py:ensemble`: three nets, each on nine tenths of the clips",
        "mma.py:ensemble",
        MMA + ",ensemble",
    ),
    Row("seeds", "`mma.py`, three seeds together", "mma.py" + THREE, MMA + THREE),
    Row(
        "subsets",
        "`residual_dense.py:face`: three quality subsets",
        "residual_dense.py:face",
        DENSE,
    ),
    Row(
        "fallback",
        "`residual_dense.py:face,head`: the head where a clip has no face",
        "",
        DENSE + ",head",
    ),
    Row(
        "merged",
        "`residual_dense.py:face,one,fused`: one net, one vector per clip",
        "residual_dense.py:face,one,fused",
        DENSE + ",one,fused" + THREE,
        True,
    ),
    Row(
        "single",
        "`residual_dense.py:face,one,single`: frames not merged in training",
        "residual_dense.py:face,one,single",
        DENSE + ",one,single" + THREE,
        True,
    ),
    Row("fusion", "`quality_fusion.py`", "quality_fusion.py", FUSION + THREE, True),
    Row(
        "voting",
        "`quality_fusion.py:voting`: frame by frame",
        "quality_fusion.py:voting",
        FUSION + ",voting" + THREE,
        True,
    ),
    Row(
        "folds",
        "`quality_fusion.py:folds`: five nets, each on four fifths of the clips",
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
        "`deepmef.py:face`, five members; each omits a different 1/16 of the features",
        "deepmef.py:face" + VIEWS,
        DEEPMEF + VIEWS,
    ),
    Row("knn", "`knn.py`", "knn.py", "knn.py:iqiyi_vid"),
    Row("knn_folds", "`knn.py`, out of fold", "knn.py" + HELD_OUT, "knn.py:iqiyi_vid" + HELD_OUT),
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
        "`noise_classes.py`, three seeds together",
        "noise_classes.py" + THREE,
        "noise_classes.py:iqiyi_vid,few" + THREE,
    ),
)


class Claim(NamedTuple):
    """A row of the table of published claims: the difference in MAP between two rows.

    Attributes:
      text: the claim.
      synthetic: keys of the row and of its baseline on the synthetic dataset; may be empty.
      real: the same on real clips; may be empty.
      verdict: whether the differences confirm the claim.
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
        "perhaps: alone it scores 0.08",
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
        "as good, though every net sees a fifth fewer clips",
    ),
    Claim(
        "nets that each miss part of the features, against one net",
        ("views", "deepmef"),
        (),
        "on synthetic faces",
    ),
    Claim("noise net against nearest neighbours", ("leave_out", "knn_folds"), (), "on real clips"),
    Claim("noise classes", ("noise", "leave_out"), ("noise", "leave_out"), "yes"),
)


class System(NamedTuple):
    """A row of the short table in the main README.

    Attributes:
      key: names the row of `ROWS` with the scores.
      text: describes the system.
      paper: MAP of the publication at full size, or an empty string.
    """

    key: str
    text: str
    paper: str = ""


SYSTEMS = (
    System("knn", "nearest training clip, the baseline"),
    System("fusion", "a few good faces fused by quality, and an MLP; 4th place 2019", "0.8983"),
    System(
        "deepmef", "DeepMEF: attention between frames, angular margin; 3rd place 2019", "0.8986"
    ),
    System("subsets", "Residual Dense Net, three quality subsets; 2nd place 2019", "0.9035"),
    System("noise", "noise classes: distractors clustered into classes; 5th place 2018", "0.8252"),
    System("face", "the iQIYI-VID paper: NetVLAD; face alone"),
    System("body", "the same with head, body, audio and attention between them", "0.8970"),
    System("seeds", "three of these nets, trained together"),
)


# Runs.


def time_systems(only: str) -> dict[str, float]:
    """Returns key -> seconds of each command in the main README, with nothing cached before.

    The seconds run from the start of the process to its end: dataset, compilation, training,
    evaluation and report.
    """
    seconds = {}
    for system in SYSTEMS:
        if only not in system.key:
            continue
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "vidjax.main", *_command(system).split()]
            env = {**os.environ, "VIDJAX_CACHE": f"{folder}/cache"}
            start = time.perf_counter()
            subprocess.run(
                [*words, f"--workdir={folder}/run"],
                cwd=ROOT,
                env=env,
                check=True,
                capture_output=True,
            )
            seconds[system.key] = time.perf_counter() - start
        sys.stdout.write(f"{system.key}: {seconds[system.key]:.0f} s\n")
    return seconds


def _command(system: System) -> str:
    """Returns the words that run a system on the synthetic dataset."""
    row = next(row for row in ROWS if row.key == system.key)
    return f"--config=configs/{row.synthetic}"


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
    """Returns the words of a command. Only out-of-fold differences need the analysis."""
    spec, *overrides = text.split()
    out_of_fold = spec.startswith("noise_classes") or "train_splits" in text
    return [f"--config=configs/{spec}", *overrides, f"--config.eval.report={out_of_fold}"]


def train(folder: Path, real: str | None, only: str) -> None:
    """Trains the runs that a folder lacks, and resumes interrupted ones."""
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
    """Returns the contents of `scores.json`, from the runs in a folder.

    Args:
      folder: holds the folders of runs.
      old: the contents so far, kept for runs that the folder lacks.
      load: loads the dataset of a configuration.
    """
    found: dict[str, Any] = {"scores": {}, "claims": {}, "seconds": old.get("seconds", {})}
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
    """Returns the mean difference in AP over identities and pairs, and its standard error."""
    gaps = []
    for new, base in pairs:
        first = compare.read(str(base), load)
        gaps.append(compare.align(first, compare.read(str(new), load)).ap - first.ap)
    gap = np.concatenate(gaps)
    return [float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))]


# Tables.


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> table in Markdown, for the pages of `PAGES`.

    Args:
      found: `scores`, `claims` and `seconds`, as `scores.json` holds them.
    """
    rows = []
    for row in ROWS:
        scores = found["scores"].get(row.key, {})
        synthetic, real = scores.get("synthetic", []), scores.get("real", [])
        seeds = " ".join(map(_short, synthetic))
        rows.append([row.text, seeds, _mean(synthetic), _mean(real) or row.instead])
    seeds = ", ".join(map(str, SEEDS))
    head = ["configuration and arguments", f"synthetic, seeds {seeds}", "mean", "real"]
    claims = []
    for claim in CLAIMS:
        differences = found["claims"].get(claim.text, {})
        cells = [_with_error(differences.get(kind)) for kind in ("synthetic", "real")]
        claims.append([claim.text, *cells, claim.verdict])
    return {
        "systems": _systems(found),
        "scores": common.markdown(head, rows),
        "claims": common.markdown(["published claim", "synthetic", "real", "confirmed?"], claims),
    }


def _systems(found: Mapping[str, Any]) -> str:
    """Returns the short table of the main README."""
    rows = []
    for system in SYSTEMS:
        scores, seconds = found["scores"].get(system.key, {}), found.get("seconds", {})
        time_taken = f"{seconds[system.key]:.0f} s" if system.key in seconds else ""
        scored = [_mean(scores.get(kind, [])) for kind in ("synthetic", "real")]
        command = _command(system).removeprefix("--config=configs/")
        rows.append([f"`{command}`", system.text, *scored, system.paper, time_taken])
    return common.markdown(
        ["`--config=configs/`", "system", "synthetic", "real", "published", "time"], rows
    )


def _mean(values: Sequence[float]) -> str:
    return _short(float(np.mean(values))) if values else ""


def _short(value: float) -> str:
    return f"{value:.3f}"


def _with_error(value: list[float] | None) -> str:
    if not value:
        return ""
    mean, error = value
    return f"{mean:+.3f} ± {error:.3f}"


def replace(text: str, name: str, table: str) -> str:
    """Returns a page with another table below `<!-- table: NAME -->`.

    Raises:
      ValueError: the page has no such table, or several.
    """
    pattern = rf"(<!-- table: {name} -->\n)(?:\|.*\n)+"
    if len(re.findall(pattern, text)) != 1:
        raise ValueError(f"wanted one table below `<!-- table: {name} -->`")
    return re.sub(pattern, lambda match: match[1] + table, text)


def write_pages(found: Mapping[str, Any]) -> None:
    """Writes every table into its page."""
    for name, table in tables(found).items():
        sys.stdout.write(f"{table}\n")
        PAGES[name].write_text(replace(PAGES[name].read_text(), name, table))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, collects, and writes the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", help="a folder of official files")
    parser.add_argument("--only", default="", help="rows whose key contains this")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="time the commands of README.md")
    args = parser.parse_args(argv)
    if not (args.collect or args.time):
        args.folder.mkdir(parents=True, exist_ok=True)
        train(args.folder, args.real, args.only)
    from vidjax.modes.arguments import load_data

    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = collect(args.folder, old, load_data)
    if args.time:
        found["seconds"] |= time_systems(args.only)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write_pages(found)


if __name__ == "__main__":
    main()
