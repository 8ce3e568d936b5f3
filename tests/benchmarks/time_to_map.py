"""Measures the time from the start of a training until MAP is almost the lowest final MAP.

    python -m tests.benchmarks.time_to_map [--clips=20000] [--val_clips=5000] [--epochs=10]
        [--batch_size=1024] [--rounds=1] [--streaming]

The MLP of `configs/quality_fusion.py` is trained on synthetic official files. The loss is the
softmax cross-entropy, because the focal loss learns little from two clips of a person. All RUNS
have the same net, files, batches and learning rates. They take turns, after a run of each kind that
fills its cache. PyTorch needs the extra `bench`. `--streaming` compares streamed clips with clips
in memory. It needs the extra `tensorflow`, but not PyTorch.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.benchmarks import common
from tests.helpers import limits
from tests.helpers.clip_files import random_clip, write_pickle, write_truth

NEAR = 0.005  # difference from the lowest final MAP
LIKENESS = 0.6  # nets find most people with this likeness, but not all
RATE = 0.003
RUNS = {f"vidjax, {dtype}": [f"--config.dtype={dtype}"] for dtype in ("float32", "bfloat16")}
RUNS |= {"PyTorch, eager": [], "PyTorch, compiled": ["--compile"]}
RUNS["PyTorch, compiled, bfloat16"] = ["--compile", "--bfloat16"]


def write_files(folder: Path, counts: Mapping[str, int]) -> None:
    """Writes official files of random faces. `counts` are split -> number of clips.

    A feature is the vector of the person, with the standard deviation LIKENESS, plus noise with the
    standard deviation 1. A third of the val clips are distractors.
    """
    rng = np.random.default_rng(0)
    frames = random_clip(rng, 4096, 512)
    frames = frames._replace(features=frames.features / frames.features.std(dtype=np.float32))
    people = rng.normal(0, LIKENESS, (1 + common.IDENTITIES, 512))
    people[0] = 0  # distractors
    for split, count in counts.items():
        clips, labels = {}, {}
        for number in range(count):
            first, length = int(rng.integers(0, 4000)), int(rng.integers(20, 31))
            clip = type(frames)(*(field[first : first + length] for field in frames))
            identity = 1 + number % common.IDENTITIES if split == "train" or number % 3 else 0
            name = f"IQIYI_VID_{split.upper()}_{number:07d}"
            if identity:
                labels[name] = str(identity)
            features = (clip.features + people[identity]).astype(np.float16)
            clips[name] = clip._replace(features=features)
        write_pickle(folder, "face", split, clips)
        write_truth(folder, split, labels)


def run(folder: Path, *words: str) -> list[tuple[float, float]]:
    """Runs a training; returns (seconds, MAP) after every epoch and at the end of the process."""
    start, lines, course = time.perf_counter(), [], []
    caches = {"VIDJAX_CACHE": "cache", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    env = os.environ | {name: f"{folder}/{cache}" for name, cache in caches.items()}
    command = [sys.executable, "-m", *words]
    with limits.running(command, cwd=common.ROOT, env=env, stderr=subprocess.STDOUT) as process:
        for line in process.stdout or ():
            lines.append(line)
            if match := re.match(r"step \d+.*: map ([\d.]+)", line):
                course.append((time.perf_counter() - start, float(match[1])))
        if process.wait():
            raise SystemExit("".join(lines[-20:]))
    return [*course, (time.perf_counter() - start, course[-1][1] if course else 0.0)]


def make_words(args: argparse.Namespace, folder: Path, workdir: str, epochs: int) -> list[str]:
    return [
        "vidjax.main", "--config=configs/quality_fusion.py:iqiyi_vid", "--config.eval.report=0",
        f"--config.data.dir={folder}", f"--workdir={folder / workdir}",
        f"--config.num_epochs={epochs}", f"--config.batch_size={args.batch_size}",
    ]  # fmt: skip


def compare_modes(args: argparse.Namespace, folder: Path) -> None:
    def train(mode: str, number: int) -> dict[str, float]:
        words = make_words(args, folder, f"{mode}{number}", args.epochs)
        run(folder, *words, f"--config.data.mode={mode}", "--config.eval.every_epochs=0")
        return json.loads((folder / f"{mode}{number}" / "metrics.json").read_text())

    modes = {mode: functools.partial(train, mode) for mode in ("resident", "streaming")}
    metrics = common.alternate(modes, args.rounds)
    rates = {mode: [x["train_clips_per_second"] for x in metrics[mode]] for mode in modes}
    waits = [x["waited_seconds"] / x["train_seconds"] for x in metrics["streaming"]]
    rows = [[f"{mode}: clips/s", f"{common.median(x):,.0f}"] for mode, x in rates.items()]
    rows.append(["streaming / resident", common.format_ratio(rates, "streaming", "resident")])
    rows.append(["share of the time in which a step waits for clips", f"{max(waits):.3f}"])
    common.print_table(["training", "measured"], rows)


def compare_with_torch(args: argparse.Namespace, folder: Path) -> None:
    """Prints the times of RUNS, and how many times longer the fastest PyTorch run takes."""

    def train(name: str, turn: int) -> list[tuple[float, float]]:
        """Trains for all epochs, or for one epoch if `turn` is 0."""
        epochs = args.epochs if turn else 1
        if "PyTorch" in name:
            words = ["tests.benchmarks.peer", str(folder), f"--epochs={epochs}"]
            words += [f"--batch_size={args.batch_size}", f"--learning_rate={RATE}"]
        else:
            words = make_words(args, folder, f"{name.replace(', ', '_')}{turn}", epochs)
            fields = ["loss.schedule=((0.0, 0.0),)", "eval.every_epochs=1", "optim.warmup=0.1"]
            fields += [f"optim.learning_rate={RATE}", "optim.warmup_scale=0"]
            words += [f"--config.{field}" for field in fields]
        return run(folder, *words, *RUNS[name])

    runs = {name: functools.partial(train, name) for name in RUNS}
    rounds = common.alternate(runs, 1 + args.rounds)
    courses = {name: of_rounds[1:] for name, of_rounds in rounds.items()}
    finals = {name: [course[-1][1] for course in courses[name]] for name in RUNS}
    target = min(map(min, finals.values())) - NEAR
    seconds = {
        name: [next(time for time, score in course if score >= target) for course in courses[name]]
        for name in RUNS
    }
    rows = []
    for name in RUNS:
        times = seconds[name], [course[-1][0] for course in courses[name]]
        cells = [f"{common.median(x):.0f}" for x in times]
        rows.append([name, *cells, f"{common.median(finals[name]):.3f}"])
    header = ["run", "seconds to the lowest MAP", "seconds in all", "final MAP"]
    common.print_table(header, rows)
    fastest = min((name for name in RUNS if "PyTorch" in name), key=lambda k: sum(seconds[k]))
    ratios = [
        [f"to the lowest MAP, {fastest} / {name}", common.format_ratio(seconds, fastest, name)]
        for name in RUNS
        if "vidjax" in name
    ]
    common.print_table(["seconds", "ratio"], ratios)


if __name__ == "__main__":
    sizes = {"clips": 20_000, "val_clips": 5_000, "epochs": 10, "batch_size": 1024, "rounds": 1}
    args = common.parse(__doc__, "--streaming", **sizes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder, {"train": args.clips, "val": args.val_clips})
        (compare_modes if args.streaming else compare_with_torch)(args, folder)
