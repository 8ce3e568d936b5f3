"""Rehearses the challenge on made-up official files of the official size, and measures each step.

    python -m tests.benchmarks.rehearsal FOLDER [--only=STEP,STEP] [--scale=F] [--collect]

The official files are gone. So the step `files` writes files of their layout and size: 10,034
identities, about 57,800 clips to train on and 73,000 to rank, of which 27,000 are distractors. Each
other step runs commands of a user in child processes, and appends a row to `FOLDER/rows.json`.
Steps with a row are skipped, so the script continues after an interruption. All steps take about a
day on 2 cores, 25 GB of disk and 8 GB of memory. The steps of full size become the table
`rehearsal` of the main README.

- `--only` names the steps to run.
- `--scale` is the share of the identities. Below 1, runs have two epochs at most, to test this
  script.
- `--collect` runs nothing, and only writes the table.
"""

import argparse
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks import common
from vidjax.data import synthetic
from vidjax.runs import config_io

PAGE = common.ROOT / "README.md"
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
# streamed.
RUNS = {
    "cosine": Run("cosine.py:iqiyi_vid", 0, STREAMED),
    "knn": Run("knn.py:iqiyi_vid"),
    "plda": Run("plda.py:iqiyi_vid", 0, STREAMED),
    "quality_fusion": Run("quality_fusion.py:iqiyi_vid"),
    "residual_dense": Run("residual_dense.py:iqiyi_vid,one", 3, STREAMED),
    "mma": Run("mma.py:iqiyi_vid", 3, STREAMED),
    "deepmef": Run("deepmef.py:iqiyi_vid", 2),
    "noise_classes": Run("noise_classes.py:iqiyi_vid", 2),
    "streaming": Run("quality_fusion.py:iqiyi_vid", 3, STREAMED),
}
KILLED = Run("quality_fusion.py:iqiyi_vid", 3, ("checkpoint_every_seconds=20",))
STEPS = ("files", "convert", "resume", *RUNS)


class PickleFile:
    """A dict that is pickled a few clips at a time, as `pickle.dump` writes the whole dict."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(b"\x80\x04}\x94")  # protocol 4, a dict, and its place in the memo
        self._known: dict[int, tuple[int, Any]] | None = None

    def add(self, clips: Mapping[str, Any]) -> None:
        """Writes clips. Only what numpy shares between arrays may be in two clips."""
        content = io.BytesIO()
        pickler: Any = pickle.Pickler(content, 4)
        if self._known is not None:
            pickler.memo = self._known
        pickler.dump(dict(clips))
        if self._known is None:
            own = (str, list, tuple, np.ndarray, dict)
            memo = pickler.memo.copy().items()
            shared = {k: v for k, v in memo if not isinstance(v[1], own)}
            self._known = {k: v for k, v in shared.items() if len(repr(v[1])) < 100}
        frames = [*_cut_frames(content.getvalue())]
        frames[0] = frames[0].removeprefix(b"}\x94")  # the clips belong to the dict of the file
        frames[-1] = frames[-1].removesuffix(b".")
        for frame in filter(None, frames):
            self._file.write(b"\x95" + len(frame).to_bytes(8, "little") + frame)

    def close(self) -> None:
        self._file.write(b".")
        self._file.close()


def _cut_frames(content: bytes) -> Iterator[bytes]:
    """Yields the contents of the frames of a pickle of protocol 4."""
    at = 2
    while at < len(content):
        size = int.from_bytes(content[at + 1 : at + 9], "little")
        yield content[at + 9 : at + 9 + size]
        at += 9 + size


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


def tree_bytes(pid: int) -> int:
    """Returns the memory of a process and its children, without pages of files."""
    total, waiting = 0, [pid]
    while waiting:
        place = Path(f"/proc/{waiting.pop()}")
        try:
            for line in (place / "status").read_text().splitlines():
                if line.startswith(("RssAnon", "RssShmem")):
                    total += 1024 * int(line.split()[1])
            for children in place.glob("task/*/children"):
                waiting += map(int, children.read_text().split())
        except OSError:
            continue  # it has ended
    return total


def busy_seconds() -> float:
    """Returns the seconds for which the cores of the machine have worked since its start."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


class Meter:
    """Measures the block of a `with`: seconds, processor, memory, and work of other processes."""

    def __enter__(self) -> "Meter":
        self._start = time.perf_counter(), common.children_seconds(), busy_seconds()
        self._peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._own = tree_bytes(os.getpid())
        return self

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            self._peak = max(self._peak, tree_bytes(os.getpid()))

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        now = time.perf_counter(), common.children_seconds(), busy_seconds()
        seconds, used, busy = (b - a for a, b in zip(self._start, now, strict=True))
        others = max(0.0, busy - used) / (seconds * (os.cpu_count() or 1))
        self.row = {"seconds": seconds, "processor_seconds": used, "others": others}
        self.row["memory"] = max(0, self._peak - self._own)


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
    return int(config_io.load_file(f"{common.CONFIGS / run.spec}").num_epochs)


class Rehearsal:
    """The files, the cache and the runs in a folder."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.folder, self.scale = folder, scale
        self.files, self.cache, self.logs = folder / "files", folder / "cache", folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def words(self, run: Run, workdir: Path) -> list[str]:
        """Returns the command of a run."""
        overrides = [*run.overrides, f"data.dir={self.files}", f"data.cache_dir={self.cache}"]
        epochs = run.epochs or (0 if self.scale == 1 else min(2, all_epochs(run)))
        if epochs:
            overrides.append(f"num_epochs={epochs}")
        words = ["vidjax.main", f"--config={common.CONFIGS / run.spec}", f"--workdir={workdir}"]
        return [*words, *(f"--config.{override}" for override in overrides)]

    def do(self, step: str) -> dict[str, Any]:
        """Runs a step, and returns the results that `Meter` does not measure."""
        log, workdir = self.logs / f"{step}.log", self.folder / "runs" / step
        shutil.rmtree(workdir, ignore_errors=True)
        if step == "files":
            return make_files(self.files, self.scale)
        if step == "convert":
            shutil.rmtree(self.cache, ignore_errors=True)
            call(["vidjax.data.iqiyi_vid", f"{self.files}", f"--cache_dir={self.cache}"], log)
            return {"disk": disk(self.cache)}
        if step == "resume":
            return self.resume(workdir, log)
        run = RUNS[step]
        call(self.words(run, workdir), log)
        metrics = json.loads((workdir / "metrics.json").read_text())
        wanted = ("map", "mode", "num_params", "num_members", "train_clips_per_second")
        row = {"disk": disk(workdir)} | {name: metrics[name] for name in wanted}
        shutil.rmtree(workdir / "checkpoints")  # gigabytes
        return row

    def resume(self, workdir: Path, log: Path) -> dict[str, Any]:
        """Runs twice; the second run is killed after its first checkpoint, and resumed."""
        whole, killed = (self.words(KILLED, workdir / name) for name in ("whole", "killed"))
        call(whole, log)
        saved = workdir / "killed" / "checkpoints"
        call(killed, log, kill=lambda: any(saved.glob("[0-9]*/manifest.json")))
        call(killed, log)
        names = ("metrics.jsonl", "ranking.txt")
        pairs = (
            [(workdir / run / name).read_bytes() for run in ("whole", "killed")] for name in names
        )
        return {"equal": all(a == b for a, b in pairs), "disk": disk(workdir)}


def render(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of the README. Wall time is left out if other programs were busy."""
    lines = []
    for step, row in rows.items():
        minutes = f"{row['seconds'] / 60:,.0f}" if row["others"] < IDLE else ""
        used, name, epochs, hours, score = row["processor_seconds"], step, "", "", ""
        if step in RUNS:
            run, every = RUNS[step], all_epochs(RUNS[step])
            name = f"`{run.spec}`" + (", streamed" if row["mode"] == "streaming" else "")
            epochs = f"{run.epochs or every} of {every}"
            hours = f"{used / 3600 * every / (run.epochs or every):,.1f}"
            score = f"{row['map']:.3f}" if not run.epochs else ""
        if step == "resume":
            score = "equal" if row["equal"] else "differs"
        sizes = (f"{row[key] / GB:.1f}" for key in ("memory", "disk"))
        lines.append([name, epochs, f"{used / 60:,.0f}", minutes, hours, *sizes, score])
    header = ["step", "epochs", "minutes of a core", "minutes", "all epochs, hours of a core"]
    return common.markdown([*header, "memory, GB", "disk, GB", "MAP"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--collect", action="store_true")
    args = parser.parse_args(argv)
    rehearsal, results = Rehearsal(args.folder.resolve(), args.scale), args.folder / "rows.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    for step in [] if args.collect else args.only.split(","):
        if step in rows:
            continue
        with Meter() as meter:
            found = rehearsal.do(step)
        rows[step] = found | meter.row | {"machine": common.describe(), "scale": args.scale}
        results.write_text(json.dumps(rows, indent=1) + "\n")
        sys.stdout.write(f"{step} {json.dumps(rows[step])}\n")
        sys.stdout.flush()
    if args.scale < 1:
        sys.stdout.write(render(rows))
    elif args.collect:
        PAGE.write_text(common.replace_table(PAGE.read_text(), "rehearsal", render(rows)))


if __name__ == "__main__":
    main()
