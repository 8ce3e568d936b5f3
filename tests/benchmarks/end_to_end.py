"""Whole training runs, each a process: start, compilation, input, evaluation, checkpoints.

    python -m tests.benchmarks.end_to_end [--clips=20000] [--epochs=10] [--rounds=2] [--compile]
        [--streaming]

The MLP of `configs/quality_fusion.py` at published size on made-up official files (20 to 30 faces a
clip, 10,034 identities) takes turns with the same net in PyTorch (the extra `bench`), which
unpickles the files into memory. Our first run converts the files and compiles; the ratio is of the
later runs. With `--streaming`, training on clips that tf.data streams (the extra `tensorflow`) is
compared with training on resident clips, without PyTorch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common
from tests.helpers.clip_files import random_clip, write_pickle, write_truth


def write_files(
    directory: Path, counts: dict[str, int], num_identities: int, likeness: float = 0.0
) -> None:
    """Writes made-up faces as official files; a third of val are distractors.

    `counts` are split -> number of clips. `likeness` is the length of a person's own part of a
    face, relative to the rest. If it is not 0, features have a standard deviation near 1.
    """
    rng = np.random.default_rng(0)
    frames = random_clip(rng, 4096, 512)
    if likeness:
        frames = frames._replace(features=frames.features / frames.features.std(dtype=np.float32))
    people = rng.normal(0, likeness, (1 + num_identities, 512))
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


def run(words: Sequence[str], env: dict[str, str]) -> list[tuple[float, str]]:
    """Returns the lines that a process wrote, with seconds from its start; "" at its end."""
    began, lines = time.perf_counter(), []
    pipes: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-m", *words]
    with subprocess.Popen(command, cwd=common.ROOT, env=env, **pipes) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line))
    if process.returncode:
        raise SystemExit("".join(line for _, line in lines[-20:]))
    return [*lines, (time.perf_counter() - began, "")]


SIZES = {"clips": 20_000, "val_clips": 5_000, "num_identities": 10_034, "epochs": 10}


def our_words(folder: Path, epochs: int, batch_size: int) -> list[str]:
    """Returns the words of our run, without a report."""
    words = ["vidjax.main", "--config=configs/quality_fusion.py:iqiyi_vid"]
    words += [f"--config.data.dir={folder}", f"--config.num_epochs={epochs}"]
    return [*words, f"--config.batch_size={batch_size}", "--config.eval.report=False"]


def their_words(folder: Path, epochs: int, batch_size: int) -> list[str]:
    """Returns the words of a run of PyTorch."""
    words = ["tests.benchmarks.peer", str(folder), f"--epochs={epochs}"]
    return [*words, f"--batch_size={batch_size}"]


def main() -> None:
    """Writes the files, and prints the tables."""
    flags = ("--compile", "--streaming")
    args = common.parse(__doc__, *flags, **SIZES, batch_size=1024, rounds=2)
    folder = Path(tempfile.mkdtemp())
    env = {**os.environ, "VIDJAX_CACHE": str(folder / "cache")}
    try:
        write_files(folder, {"train": args.clips, "val": args.val_clips}, args.num_identities)
        ours = our_words(folder, args.epochs, args.batch_size)
        ours.append("--config.eval.every_epochs=0")
        compare = compare_modes if args.streaming else compare_with_torch
        compare(args, folder, ours, env)
    finally:
        shutil.rmtree(folder)


def compare_modes(
    args: argparse.Namespace, folder: Path, ours: Sequence[str], env: dict[str, str]
) -> None:
    """Prints how fast training is on streamed and on resident clips, and what it waits for."""
    found: dict[str, list[dict[str, Any]]] = {"resident": [], "streaming": []}
    for number in range(args.rounds):
        for mode, results in found.items():
            workdir = folder / f"{mode}{number}"
            run([*ours, f"--config.data.mode={mode}", f"--workdir={workdir}"], env)
            results.append(json.loads((workdir / "metrics.json").read_text()))
    rates = {
        mode: [one["train_clips_per_second"] for one in results] for mode, results in found.items()
    }
    rows = [[f"{mode}: clips/s", f"{common.median(rate):,.0f}"] for mode, rate in rates.items()]
    rows.append(["streaming / resident", common.ratio(rates, "streaming", "resident")])
    shares = [one["waited_seconds"] / one["train_seconds"] for one in found["streaming"]]
    rows.append(["share of the time in which a step waits for clips", f"{max(shares):.3f}"])
    common.write_table(["training", "measured"], rows)


def compare_with_torch(
    args: argparse.Namespace, folder: Path, ours: Sequence[str], env: dict[str, str]
) -> None:
    """Prints the seconds of whole runs, ours and PyTorch's, and their ratio."""
    theirs = their_words(folder, args.epochs, args.batch_size)
    theirs += ["--compile"] * args.compile
    seconds: dict[str, list[float]] = {"vidjax": [], "PyTorch": []}
    starts, waits = [], []
    cold = run([*ours, f"--workdir={folder / 'cold'}"], env)
    for number in range(args.rounds):
        workdir = folder / f"run{number}"
        lines = run([*ours, f"--workdir={workdir}"], env)
        whole = lines[-1][0]
        starts.append(next(at for at, line in lines if line.startswith("train: ")))
        metrics = json.loads((workdir / "metrics.json").read_text())
        waits.append(metrics["waited_seconds"] / whole)
        seconds["vidjax"].append(whole)
        seconds["PyTorch"].append(run(theirs, env)[-1][0])
    kind = "torch.compile" if args.compile else "eager"
    rows = [
        ["vidjax, first run (converts, compiles)", f"{cold[-1][0]:.0f}"],
        ["vidjax", f"{common.median(seconds['vidjax']):.0f}"],
        ["until its first training step", f"{common.median(starts):.1f}"],
        [f"PyTorch, {kind}", f"{common.median(seconds['PyTorch']):.0f}"],
    ]
    common.write_table(["run", "seconds"], rows)
    rows = [
        [f"PyTorch, {kind} / vidjax", common.ratio(seconds, "PyTorch", "vidjax")],
        ["share of the time in which a step waits for data", f"{max(waits):.3f}"],
    ]
    common.write_table(["", "ratio"], rows)


if __name__ == "__main__":
    main()
