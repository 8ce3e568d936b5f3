"""Runs commands of a user on synthetic official files of the official size, and measures each step.

    python -m tests.benchmarks.rehearsal FOLDER [--only=STEP,STEP] [--scale=F] [--collect]

The files have 10,034 identities, 57,620 training clips and 72,730 clips to rank. Each step adds a
row to `FOLDER/rows.json`, and is skipped if it has a row. All steps take more than a day on 2
cores, 25 GB of disk and 8 GB of memory.

- `--scale` is the share of the identities. If it is below 1, runs have at most two epochs. Use it
  to test this script.
- `--collect` runs nothing. It copies the rows to `rehearsal.json` and to README.md.
"""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common
from tests.helpers import limits
from vidjax.data import synthetic
from vidjax.runs import config_io

PAGE = Path(__file__).with_name("README.md")
COLLECTED = Path(__file__).with_suffix(".json")  # the rows of the table
CLIPS_AT_ONCE = 1000
EMPTY_DICT = b"\x80\x03}"  # the first bytes of a pickle of a dict, in protocol 3
SECONDS = 0.25  # between two measurements of the memory
GB = 1e9
STREAMED = "data.mode=streaming"

# Clips of four modalities take 7.3 GB, and nets of the published size several GB. So their clips
# are streamed. Without `fused`, residual_dense would score 150 merged frames of each clip, which
# takes days.
# A run is a configuration (FILE:ARGUMENTS), the number of epochs, and overrides (FIELD=VALUE). The
# number 0 is the number in the configuration.
RUNS: dict[str, tuple[str, int, str]] = {
    "cosine": ("cosine.py:iqiyi_vid,face", 0, ""),
    "knn": ("knn.py:iqiyi_vid", 0, ""),
    "plda": ("plda.py:iqiyi_vid", 0, STREAMED),
    "quality_fusion": ("quality_fusion.py:iqiyi_vid", 0, ""),
    "residual_dense": ("residual_dense.py:iqiyi_vid,one,fused", 3, STREAMED),
    "mma": ("mma.py:iqiyi_vid", 3, STREAMED),
    "deepmef": ("deepmef.py:iqiyi_vid", 2, ""),
    "noise_classes": ("noise_classes.py:iqiyi_vid", 2, ""),
    "streaming": ("quality_fusion.py:iqiyi_vid", 3, STREAMED),
    "joint": ("joint.py:iqiyi_vid", 0, "data.train_splits=train"),
}
KILLED = ("quality_fusion.py:iqiyi_vid", 3, "checkpoint_every_seconds=20")
OTHER_STEPS = {
    "files": "write the synthetic files",
    "convert": "convert them to flat files",
    "resume": "train 3 epochs twice, once with `kill -9`",
}
STEPS = (*OTHER_STEPS, *RUNS)


def write_split(folder: Path, split: str, scale: float) -> None:
    """Writes the pickles and the ground truth of a split, a few clips at a time."""
    dims = {"face": 512, "head": 512, "body": 512, "audio": 512, "scene": 64}
    spread = synthetic.SIZES["standard"].spread
    size = synthetic.Size(max(20, round(scale * common.IDENTITIES)), 29.5, dims, spread)
    world = synthetic._World(size, np.random.default_rng([0, 0]))
    seeds = [0, 1 + ("train", "val").index(split)]
    clips = synthetic._Clips(world, split, seeds, synthetic.CALIBRATED)
    names = {"face": f"face_{split}_v2"} | {m: f"{m}_{split}" for m in ("head", "body", "audio")}
    files = {name: (folder / f"{stem}.pickle").open("wb") for name, stem in names.items()}
    for file in files.values():
        file.write(EMPTY_DICT)
    for first in range(0, len(clips.names), CLIPS_AT_ONCE):
        rows = np.arange(first, min(first + CLIPS_AT_ONCE, len(clips.names)))
        drawn = clips.frames(rows)
        for modality, file in files.items():
            entries = drawn[modality].entries(modality, clips.names[first : first + len(rows)])
            # The instructions that add these entries to the dict at the start of the file.
            content = pickle.dumps(dict(entries), protocol=3)
            file.write(content.removeprefix(EMPTY_DICT + b"q\x00").removesuffix(pickle.STOP))
    for file in files.values():
        file.write(pickle.STOP)
        file.close()
    synthetic._write_ground_truth(folder / f"{split}_gt.txt", clips, inverted=split == "val")


def count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(step: str, folder: Path, scale: float) -> dict[str, Any]:
    """Runs a step; returns its results, its CPU time, and the most memory of child processes."""
    memory = lambda: sum(map(limits.held_by, limits.children_of(os.getpid())))  # noqa: E731
    start = common.children_seconds()
    with limits.peak_of(memory, every_s=SECONDS) as peak:
        row = run_step(step, folder, scale)
    row |= {"processor_seconds": common.children_seconds() - start, "memory": peak[0]}
    return row | {"machine": common.describe_machine()}


def run_module(words: Sequence[str], log: Path, kill: Callable[[], bool] | None = None) -> None:
    """Runs a module, and appends its output to a log. Kills it as soon as `kill()` is True."""
    with log.open("a") as output:
        output.write(f"{' '.join(words)}\n")
        output.flush()
        command = [sys.executable, "-m", *words]
        process = subprocess.Popen(command, cwd=common.ROOT, stdout=output, stderr=output)
        while kill and process.poll() is None:
            time.sleep(SECONDS)
            if kill():
                process.kill()
    if process.wait() != (-signal.SIGKILL if kill else 0):
        raise SystemExit(f"{' '.join(words)}\nended with {process.returncode}: see {log}")


def count_epochs(spec: str) -> int:
    return int(config_io.load_file(f"{common.CONFIGS / spec}").num_epochs)


def make_words(run: tuple[str, int, str], folder: Path, workdir: Path, scale: float) -> list[str]:
    spec, epochs, override = run
    all_epochs = count_epochs(spec)
    epochs = epochs or (all_epochs if scale == 1 else min(2, all_epochs))
    fields = [f"data.dir={folder / 'files'}", f"data.cache_dir={folder / 'cache'}", override]
    fields = [f"--config.{field}" for field in (*fields, f"num_epochs={epochs}") if field]
    return ["vidjax.main", f"--config={common.CONFIGS / spec}", f"--workdir={workdir}", *fields]


def run_step(step: str, folder: Path, scale: float) -> dict[str, Any]:
    log, workdir = folder / f"{step}.log", folder / "runs" / step
    files, cache = folder / "files", folder / "cache"
    shutil.rmtree({"files": files, "convert": cache}.get(step, workdir), ignore_errors=True)
    if step == "files":
        files.mkdir(parents=True)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
            list(processes.map(write_split, [files] * 2, ["train", "val"], [scale] * 2))
        return {"disk": count_bytes(files)}
    if step == "convert":
        run_module(["vidjax.data.iqiyi_vid", str(files), f"--cache_dir={cache}"], log)
        return {"disk": count_bytes(cache)}
    if step == "resume":
        return resume(folder, workdir, log, scale)
    run_module(make_words(RUNS[step], folder, workdir, scale), log)
    # In a joint run on train, `metrics.json` has the metrics on train, out of fold.
    results = workdir / ("metrics_val.json" if step == "joint" else "metrics.json")
    metrics, disk = json.loads(results.read_text()), count_bytes(workdir)
    for checkpoints in [*workdir.rglob("checkpoints")]:
        shutil.rmtree(checkpoints)  # they take gigabytes
    return {"map": metrics["map"], "mode": metrics.get("mode"), "disk": disk}  # no mode if joint


def resume(folder: Path, workdir: Path, log: Path, scale: float) -> dict[str, Any]:
    """Trains two equal runs. The second is killed after a checkpoint, and resumed."""
    whole, killed = workdir / "whole", workdir / "killed"
    run_module(make_words(KILLED, folder, whole, scale), log)
    words, checkpoints = make_words(KILLED, folder, killed, scale), killed / "checkpoints"
    run_module(words, log, kill=lambda: any(checkpoints.glob("[0-9]*/manifest.json")))
    run_module(words, log)
    names = ("metrics.jsonl", "ranking.txt")
    equal = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)
    return {"equal": equal, "disk": count_bytes(workdir)}


def render(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines, machine = [], next(iter(rows.values()))["machine"]
    for step in (step for step in STEPS if step in rows):
        row = rows[step]
        used, name, epochs, hours = row["processor_seconds"], OTHER_STEPS.get(step), "", ""
        score = {True: "equal", False: "differs", None: ""}[row.get("equal")]
        if step in RUNS:
            spec, few, _ = RUNS[step]
            all_epochs = count_epochs(spec)
            name = f"`{spec}`" + (", streamed" if row["mode"] == "streaming" else "")
            epochs = f"{few or all_epochs} of {all_epochs}"
            hours = f"{used / 3600 * all_epochs / (few or all_epochs):,.1f}"
            score = "" if few else f"{row['map']:.3f}"
        if row["machine"] != machine:
            name = f"{name} ({row['machine']})"
        sizes = (f"{row[key] / GB:.1f}" for key in ("memory", "disk"))
        lines.append([name, epochs, f"{used / 60:,.0f}", hours, *sizes, score])
    header = [f"step, on {machine}", "epochs", "CPU minutes", "CPU hours, all epochs"]
    header += ["memory, GB", "disk, GB", "MAP"]
    return common.format_table(header, lines)


def main() -> None:
    args = common.parse(__doc__, "--collect", folder=Path, only=",".join(STEPS), scale=1.0)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "rows.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    steps = [] if args.collect else args.only.split(",")
    for step in (step for step in steps if step not in rows):
        rows[step] = measure(step, folder, args.scale)
        results.write_text(json.dumps(rows, indent=1) + "\n")
        common.print_text(f"{step} {json.dumps(rows[step])}")
    if args.scale < 1:
        common.print_text(render(rows))
    elif args.collect:
        rows = json.loads(COLLECTED.read_text()) | rows
        COLLECTED.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(common.replace_table(PAGE.read_text(), "rehearsal", render(rows)))


if __name__ == "__main__":
    main()
