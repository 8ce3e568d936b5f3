"""Whole training runs, each a process: time to a MAP within 0.005 of a final MAP, and in all.

    python -m tests.benchmarks.time_to_map [--clips=20000] [--epochs=10] [--rounds=1] [--streaming]

The MLP of `configs/quality_fusion.py` at published size trains on made-up official files; only by
softmax, as the focal loss learns little from two clips a person. RUNS have the same net, files,
batches and schedule, and take turns, after a run of each kind that fills its cache. PyTorch needs
the extra `bench`, and `--streaming` the extra `tensorflow`, but not PyTorch.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common
from tests.helpers.clip_files import random_clip, write_pickle, write_truth

NEAR = 0.005  # of the final MAP
LIKENESS = 0.6  # with which no net finds everybody, and every net most
RATE = 0.003
SCORE = re.compile(r"(?:^step \d+.*: |\")map\"?:? ([\d.]+)")
RUNS = {
    "vidjax, float32": ["--config.dtype=float32"],
    "vidjax, bfloat16": ["--config.dtype=bfloat16"],
    "PyTorch, eager": [],
    "PyTorch, compiled": ["--compile"],
    "PyTorch, compiled, bfloat16": ["--compile", "--bfloat16"],
}


def write_files(directory: Path, counts: Mapping[str, int], num_identities: int) -> None:
    """Writes faces as official files, `counts` are split -> clips; a third of val are distractors.

    A face has a person's own part, of length LIKENESS, and the rest has a standard deviation of 1.
    """
    rng = np.random.default_rng(0)
    frames = random_clip(rng, 4096, 512)
    frames = frames._replace(features=frames.features / frames.features.std(dtype=np.float32))
    people = rng.normal(0, LIKENESS, (1 + num_identities, 512))
    people[0] = 0  # of distractors
    for split, count in counts.items():
        clips, labels = {}, {}
        for number in range(count):
            first, length = int(rng.integers(0, 4000)), int(rng.integers(20, 31))
            name = f"IQIYI_VID_{split.upper()}_{number:07d}"
            clip = type(frames)(*(field[first : first + length] for field in frames))
            identity = 1 + number % num_identities if split == "train" or number % 3 else 0
            if identity:
                labels[name] = str(identity)
            features = (clip.features + people[identity]).astype(np.float16)
            clips[name] = clip._replace(features=features)
        write_pickle(directory, "face", split, clips)
        write_truth(directory, split, labels)


def run(words: Sequence[str], env: Mapping[str, str]) -> list[tuple[float, float]]:
    """Returns seconds from the start of a process, and MAP, after every epoch and at the end."""
    began, lines, course = time.perf_counter(), [], []
    pipes: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-m", *words]
    with subprocess.Popen(command, cwd=common.ROOT, env=env, **pipes) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if match := SCORE.search(line):
                course.append((time.perf_counter() - began, float(match[1])))
    if process.returncode:
        raise SystemExit("".join(lines[-20:]))
    return [*course, (time.perf_counter() - began, course[-1][1])]


def main() -> None:
    sizes: Any = {"clips": 20_000, "val_clips": 5_000, "num_identities": 10_034, "epochs": 10}
    args = common.parse(__doc__, "--streaming", **sizes, batch_size=1024, rounds=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = {"VIDJAX_CACHE": f"{name}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{name}/inductor"}
        write_files(folder, {"train": args.clips, "val": args.val_clips}, args.num_identities)
        compare = compare_modes if args.streaming else compare_with_torch
        compare(args, folder, os.environ | caches)


def our_words(args: argparse.Namespace, folder: Path, workdir: str, epochs: int) -> list[str]:
    return [
        "vidjax.main", "--config=configs/quality_fusion.py:iqiyi_vid", "--config.eval.report=0",
        f"--config.data.dir={folder}", f"--workdir={folder / workdir}",
        f"--config.num_epochs={epochs}", f"--config.batch_size={args.batch_size}",
    ]  # fmt: skip


def compare_modes(args: argparse.Namespace, folder: Path, env: Mapping[str, str]) -> None:
    """Prints the rates of training on resident and on streamed clips."""
    rates: dict[str, list[float]] = {"resident": [], "streaming": []}
    waits = []  # shares of the time
    for number in range(args.rounds):
        for mode, of_mode in rates.items():
            workdir = f"{mode}{number}"
            words = our_words(args, folder, workdir, args.epochs)
            run([*words, f"--config.data.mode={mode}", "--config.eval.every_epochs=0"], env)
            metrics = json.loads((folder / workdir / "metrics.json").read_text())
            of_mode.append(metrics["train_clips_per_second"])
            if mode == "streaming":
                waits.append(metrics["waited_seconds"] / metrics["train_seconds"])
    rows = [[f"{mode}: clips/s", f"{common.median(x):,.0f}"] for mode, x in rates.items()]
    rows.append(["streaming / resident", common.ratio(rates, "streaming", "resident")])
    rows.append(["share of the time in which a step waits for clips", f"{max(waits):.3f}"])
    common.write_table(["training", "measured"], rows)


def compare_with_torch(args: argparse.Namespace, folder: Path, env: Mapping[str, str]) -> None:
    """Prints the medians of each kind of run, and how much faster ours are than PyTorch's."""

    def measure(name: str, turn: int, epochs: int) -> list[tuple[float, float]]:
        if "PyTorch" in name:
            words = ["tests.benchmarks.peer", str(folder), f"--epochs={epochs}"]
            words += [f"--batch_size={args.batch_size}", f"--learning_rate={RATE}"]
        else:
            words = our_words(args, folder, f"{name.replace(', ', '_')}{turn}", epochs)
            words += ["--config.loss.schedule=((0.0, 0.0),)", "--config.eval.every_epochs=1"]
            words += [f"--config.optim.learning_rate={RATE}", "--config.optim.warmup=0.1"]
            words += ["--config.optim.warmup_scale=0"]  # as PyTorch's
        return run([*words, *RUNS[name]], env)

    for name in RUNS:
        measure(name, 0, 1)
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in RUNS}
    for turn in range(args.rounds):
        for name, courses in found.items():
            courses.append(measure(name, 1 + turn, args.epochs))

    def seconds_to(goal: float, course: list[tuple[float, float]]) -> float:
        return next(seconds for seconds, score in course if score >= goal - NEAR)

    finals = {name: [course[-1][1] for course in courses] for name, courses in found.items()}
    lowest = min(map(min, finals.values()))
    times: dict[str, dict[str, list[float]]] = {
        "to its MAP": {name: [seconds_to(x[-1][1], x) for x in found[name]] for name in RUNS},
        "to the lowest MAP": {name: [seconds_to(lowest, x) for x in found[name]] for name in RUNS},
        "in all": {name: [x[-1][0] for x in found[name]] for name in RUNS},
    }
    rows, ratios = [], []
    for name in RUNS:
        cells = [f"{common.median(of_runs[name]):.0f}" for of_runs in times.values()]
        rows.append([name, *cells, f"{common.median(finals[name]):.3f}"])
    common.write_table(["run", *(f"seconds {title}" for title in times), "final MAP"], rows)
    for title, of_runs in times.items():
        fastest = min((n for n in RUNS if "PyTorch" in n), key=lambda name: sum(of_runs[name]))
        for name in ("vidjax, float32", "vidjax, bfloat16"):
            ratios.append([f"{title}, {fastest} / {name}", common.ratio(of_runs, fastest, name)])
    common.write_table(["seconds", "ratio"], ratios)


if __name__ == "__main__":
    main()
