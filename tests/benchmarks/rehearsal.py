"""Rehearses the challenge on made-up official files of the official size, and measures each step.

    python -m tests.benchmarks.rehearsal FOLDER [--only=STEP,STEP] [--scale=F] [--collect]

The official files are gone. So the step `files` writes files of their layout and size: 10,034
identities, 57,620 clips to train on, and 72,730 to rank, of which 27,274 are distractors. The other
steps run commands of a user in child processes, and add rows to `FOLDER/rows.json`. Steps with a
row are skipped, and unfinished runs are resumed, so the script can be interrupted. Delete a row to
repeat its step. All steps take more than a day on 2 cores, 25 GB of disk and 8 GB of memory.

- `--only` names the steps to run.
- `--scale` is the share of the identities. Below 1, runs have two epochs at most, to test this
  script.
- `--collect` runs nothing. It adds the rows to `rehearsal.json`, and writes the table `rehearsal`
  of the main README.
"""

import functools
import io
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
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks import common
from tests.helpers import limits
from vidjax.data import synthetic
from vidjax.runs import config_io

PAGE = common.ROOT / "README.md"
COLLECTED = Path(__file__).with_suffix(".json")  # the rows of the table
IDENTITIES = 10_034
CLIPS_AT_ONCE = 1000  # as many as pickle puts into a dict at once
SECONDS = 0.25  # between two readings of the memory
IDLE = 0.05  # largest share of other processes in the time of the cores of an idle machine
GB = 1e9
STREAMED = ("data.mode=streaming",)


class Run(NamedTuple):
    """A run of a configuration, of `epochs` epochs; 0: to its end."""

    spec: str
    epochs: int = 0
    overrides: Sequence[str] = ()


# Clips of four modalities take 7.3 GB, and nets of published size several, so their clips are
# streamed. Without `fused`, residual_dense would score 150 merged frames of each clip, which takes
# days.
RUNS = {
    "cosine": Run("cosine.py:iqiyi_vid,face"),
    "knn": Run("knn.py:iqiyi_vid"),
    "plda": Run("plda.py:iqiyi_vid", 0, STREAMED),
    "quality_fusion": Run("quality_fusion.py:iqiyi_vid"),
    "residual_dense": Run("residual_dense.py:iqiyi_vid,one,fused", 3, STREAMED),
    "mma": Run("mma.py:iqiyi_vid", 3, STREAMED),
    "deepmef": Run("deepmef.py:iqiyi_vid", 2),
    "noise_classes": Run("noise_classes.py:iqiyi_vid", 2),
    "streaming": Run("quality_fusion.py:iqiyi_vid", 3, STREAMED),
}
KILLED = Run("quality_fusion.py:iqiyi_vid", 3, ("checkpoint_every_seconds=20",))
NAMES = {
    "files": "write the synthetic files",
    "convert": "convert them to TFRecords",
    "resume": "train 3 epochs twice, once with `kill -9`",
}
STEPS = ("files", "convert", "resume", *RUNS)


class PickleFile:
    """A dict that is pickled a few clips at a time, as `pickle.dump` writes the whole dict."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(b"\x80\x04}\x94")  # protocol 4; a dict, the first object of the memo
        self._memo: dict[int, tuple[int, Any]] = {}

    def add(self, clips: Mapping[str, Any]) -> None:
        """Writes clips. Two clips may share only what numpy shares between arrays."""
        content, at, frames = io.BytesIO(), 2, list[bytes]()
        pickler: Any = pickle.Pickler(content, 4)
        if self._memo:
            pickler.memo = self._memo
        pickler.dump(dict(clips))
        kept = (type, type(len), np.dtype, bytes)
        memo = pickler.memo.copy().items()
        self._memo = {k: v for k, v in memo if isinstance(v[1], kept) and len(repr(v[1])) < 99}
        while at < len(whole := content.getvalue()):
            end = at + 9 + int.from_bytes(whole[at + 1 : at + 9], "little")
            frames.append(whole[at + 9 : end])
            at = end
        frames[0] = frames[0].removeprefix(b"}\x94")  # the clips belong to the dict of the file
        frames[-1] = frames[-1].removesuffix(b".")
        for frame in filter(None, frames):
            self._file.write(b"\x95" + len(frame).to_bytes(8, "little") + frame)

    def close(self) -> None:
        self._file.write(b".")
        self._file.close()


def write_split(folder: Path, split: str, scale: float) -> None:
    """Writes the pickles and the ground truth of a split."""
    dims = {"face": 512, "head": 512, "body": 512, "audio": 512, "scene": 64}
    spread = synthetic.SIZES["standard"].spread
    size = synthetic.Size(max(20, round(scale * IDENTITIES)), 29.5, dims, spread)
    world = synthetic._World(size, np.random.default_rng([0, 0]))
    seeds = [0, 1 + ("train", "val").index(split)]
    clips = synthetic._Clips(world, split, seeds, synthetic.CALIBRATED)
    names = {"face": f"face_{split}_v2"} | {m: f"{m}_{split}" for m in ("head", "body", "audio")}
    files = {name: PickleFile(folder / f"{stem}.pickle") for name, stem in names.items()}
    for first in range(0, len(clips.names), CLIPS_AT_ONCE):
        rows = np.arange(first, min(first + CLIPS_AT_ONCE, len(clips.names)))
        drawn = clips.frames(rows)
        for modality, file in files.items():
            # From 10 on, equal numbers are different strings.
            frames = drawn[modality]._replace(number=drawn[modality].number + 100)
            file.add(dict(frames.entries(modality, clips.names[rows[0] : rows[-1] + 1])))
    for file in files.values():
        file.close()
    synthetic._write_ground_truth(folder / f"{split}_gt.txt", clips, inverted=split == "val")


def make_files(folder: Path, scale: float) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(write_split, [folder] * 2, ["train", "val"], [scale] * 2))
    return {"disk": disk(folder)}


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clocks() -> tuple[float, float, float]:
    """Returns seconds: of the clock, of ended children, and of the working cores of the machine."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), common.children_seconds(), busy


def measure(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the results of a function and what its child processes took: time and memory.

    `others` is the share of other processes in the time of the cores.
    """

    def memory() -> int:
        return sum(map(limits.held_by, limits.children_of(os.getpid())))

    before = clocks()
    with limits.peak_of(memory, every_s=SECONDS) as peak:
        row = function()
    seconds, used, busy = (b - a for a, b in zip(before, clocks(), strict=True))
    others = max(0.0, busy - used) / (seconds * (os.cpu_count() or 1))
    times = {"seconds": seconds, "processor_seconds": used, "others": others}
    return row | times | {"memory": peak[0]}


def call(words: Sequence[str], log: Path, kill: Callable[[], bool] | None = None) -> None:
    """Runs a module; its output is appended to `log`. Kills it as soon as `kill` is true."""
    command = [sys.executable, "-m", *words]
    with log.open("a") as output:
        output.write(f"{' '.join(words)}\n")
        output.flush()
        process = subprocess.Popen(command, cwd=common.ROOT, stdout=output, stderr=output)
        while process.poll() is None:
            time.sleep(SECONDS)
            if kill and kill():
                process.kill()
    if process.returncode != (-signal.SIGKILL if kill else 0):
        raise SystemExit(f"{' '.join(words)}\nended with {process.returncode}: see {log}")


def all_epochs(run: Run) -> int:
    """Returns the epochs of a run to its end."""
    return int(config_io.load_file(f"{common.CONFIGS / run.spec}").num_epochs)


def command(run: Run, folder: Path, workdir: Path, scale: float) -> list[str]:
    epochs = run.epochs or (0 if scale == 1 else min(2, all_epochs(run)))
    fields = [*run.overrides, f"data.dir={folder / 'files'}", f"data.cache_dir={folder / 'cache'}"]
    fields += [f"num_epochs={epochs}"] if epochs else []
    config = f"--config={common.CONFIGS / run.spec}"
    return ["vidjax.main", config, f"--workdir={workdir}", *(f"--config.{x}" for x in fields)]


def do(step: str, folder: Path, scale: float) -> dict[str, Any]:
    """Runs a step, and returns the results that are not measured from outside."""
    log, workdir = folder / f"{step}.log", folder / "runs" / step
    if step == "files":
        return make_files(folder / "files", scale)
    if step == "convert":
        shutil.rmtree(folder / "cache", ignore_errors=True)
        flag = f"--cache_dir={folder / 'cache'}"
        call(["vidjax.data.iqiyi_vid", str(folder / "files"), flag], log)
        return {"disk": disk(folder / "cache")}
    if step == "resume":
        return resume(workdir, log, lambda name: command(KILLED, folder, workdir / name, scale))
    if (workdir / "metrics.json").exists():
        shutil.rmtree(workdir)  # finished: the step is repeated
    row: dict[str, Any] = {"resumed": workdir.exists()}  # then the time is of the last process
    call(command(RUNS[step], folder, workdir, scale), log)
    metrics = json.loads((workdir / "metrics.json").read_text())
    for name in ("map", "mode", "num_params", "num_members", "train_clips_per_second"):
        row[name] = metrics[name]
    row["disk"] = disk(workdir)
    shutil.rmtree(workdir / "checkpoints")  # gigabytes
    return row


def resume(workdir: Path, log: Path, command_in: Callable[[str], list[str]]) -> dict[str, Any]:
    """Runs twice; the second run is killed after its first checkpoint, and resumed."""
    shutil.rmtree(workdir, ignore_errors=True)
    whole, killed = workdir / "whole", workdir / "killed"
    saved = killed / "checkpoints"
    call(command_in("whole"), log)
    call(command_in("killed"), log, kill=lambda: any(saved.glob("[0-9]*/manifest.json")))
    call(command_in("killed"), log)
    names = ("metrics.jsonl", "ranking.txt")
    equal = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)
    return {"equal": equal, "disk": disk(workdir)}


def render(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of the README. Wall time is left out if other programs were busy.

    The header names the machine of the first row. Rows of another machine name the machine.
    """
    lines, machine = [], next(iter(rows.values()))["machine"]
    for step in (step for step in STEPS if step in rows):
        row = rows[step]
        minutes = f"{row['seconds'] / 60:,.0f}" if row["others"] < IDLE else "busy"
        used, name, epochs, hours, score = row["processor_seconds"], step, "", "", ""
        if step in RUNS:
            run, every = RUNS[step], all_epochs(RUNS[step])
            name = f"`{run.spec}`" + (", streamed" if row["mode"] == "streaming" else "")
            epochs = f"{run.epochs or every} of {every}"
            hours = f"{used / 3600 * every / (run.epochs or every):,.1f}"
            score = f"{row['map']:.3f}"
        if step == "resume":
            score = "equal" if row["equal"] else "differs"
        if row.get("resumed"):
            minutes = hours = "interrupted"
        name = NAMES.get(step, name)
        if row["machine"] != machine:
            name += f" ({row['machine']})"
        sizes = (f"{row[key] / GB:.1f}" for key in ("memory", "disk"))
        times = (f"{used / 60:,.0f}", minutes, hours)
        lines.append([name, epochs, *times, *sizes, score])
    header = [machine, "epochs", "CPU minutes", "elapsed minutes", "CPU hours, all epochs"]
    return common.markdown([*header, "memory, GB", "disk, GB", "MAP"], lines)


def main() -> None:
    args = common.parse(__doc__, "--collect", folder=Path, only=",".join(STEPS), scale=1.0)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "rows.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    for step in [] if args.collect else args.only.split(","):
        if step in rows:
            continue
        rows[step] = measure(functools.partial(do, step, folder, args.scale))
        rows[step] |= {"machine": common.describe(), "scale": args.scale}
        results.write_text(json.dumps(rows, indent=1) + "\n")
        common.say(f"{step} {json.dumps(rows[step])}")
    if args.scale < 1:
        common.say(render(rows))
    elif args.collect:
        rows = json.loads(COLLECTED.read_text()) | rows
        COLLECTED.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(common.replace_table(PAGE.read_text(), "rehearsal", render(rows)))


if __name__ == "__main__":
    main()
