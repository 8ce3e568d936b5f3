"""Compares fine-tuning from a run with half of the identities with trainings from random weights.

    python -m tests.benchmarks.fine_tuning FOLDER [--seeds=3]

For each seed, four runs of `configs/quality_fusion.py` on the synthetic dataset are trained in
FOLDER, unless they exist: `half` with every second identity, `full` with all identities, and
two with half of the epochs and twice the learning rate, `tuned` from `half` and `fresh` from random
weights. Then a table shows MAP@100 on val, and the epoch at which each reaches the MAP of `full`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import common

EPOCHS = 100  # of the shipped configuration
SHORT = (f"--config.num_epochs={EPOCHS // 2}", "--config.optim.learning_rate=0.002")


def run(*words: str) -> None:
    """Runs `python -m WORDS`."""
    subprocess.run((sys.executable, "-m", *words), check=True, stdout=sys.stderr)


def write_halves(folder: Path, seed: int) -> tuple[Path, Path]:
    """Writes the dataset, and the dataset with the ground truth of every second identity."""
    whole, half = folder / f"data-{seed}", folder / f"data-half-{seed}"
    if half.exists():
        return whole, half
    run("vidjax.data.synthetic", str(whole), f"--seed={seed}")
    shutil.copytree(whole, half)
    train, val = half / "train_gt.txt", half / "val_gt.txt"
    lines = [line.split() for line in train.read_text().splitlines()]  # CLIP IDENTITY
    kept = {*sorted({int(identity) for _, identity in lines})[::2]}
    train.write_text("".join(f"{clip} {name}\n" for clip, name in lines if int(name) in kept))
    rows = val.read_text().splitlines()  # IDENTITY CLIP CLIP ...
    val.write_text("".join(f"{row}\n" for row in rows if int(row.split()[0]) in kept))
    return whole, half


def train(workdir: Path, data: Path, seed: int, *words: str) -> list[tuple[float, float]]:
    """Trains a run if its folder does not contain it. Returns (epoch, MAP) of its evaluations."""
    run(
        "vidjax", "train", "--config=quality_fusion", f"--workdir={workdir}",
        "--config.data.name=iqiyi_vid", f"--config.data.dir={data}", f"--config.seed={seed}",
        "--config.eval.every_epochs=5", "--config.eval.report=False", *words,
    )  # fmt: skip
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "epoch" in line][-1]
    epochs = last["epoch"] / last["step"]
    return [(line["step"] * epochs, line["map"]) for line in lines if "map" in line]


def measure(folder: Path, seed: int) -> list[str]:
    """Returns the row of a seed in the table."""
    whole, half = write_halves(folder, seed)
    source = folder / f"half-{seed}"
    train(source, half, seed, "--config.data.distractors=leave_out")
    full = train(folder / f"full-{seed}", whole, seed)
    started = (*SHORT, f"--config.init_from={source}")
    tuned = train(folder / f"tuned-{seed}", whole, seed, *started)
    fresh = train(folder / f"fresh-{seed}", whole, seed, *SHORT)
    goal, row = full[-1][1], [str(seed)]
    for curve in (full, tuned, fresh):
        reached = next((f"{epoch:.0f}" for epoch, value in curve if value >= goal), "never")
        row += [f"{curve[-1][1]:.3f}", reached]
    return row


def main() -> None:
    """Prints the table."""
    args = common.parse(__doc__, folder=Path, seeds=3)
    args.folder.mkdir(parents=True, exist_ok=True)
    head = ["seed", *(f"{x}, {y}" for x in ("full", "tuned", "fresh") for y in ("MAP", "epoch"))]
    rows = [head, ["---"] * len(head), *(measure(args.folder, seed) for seed in range(args.seeds))]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))


if __name__ == "__main__":
    main()
