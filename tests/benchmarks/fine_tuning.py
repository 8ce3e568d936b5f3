"""Compares fine-tuning from a run with half of the identities with training from random weights.

    python -m tests.benchmarks.fine_tuning FOLDER [--seeds=3]

For each seed, four runs of `configs/quality_fusion.py` on the synthetic dataset are trained in
FOLDER, unless they exist: `half` with every second identity, `full` with all identities, and two
with all identities, half of the epochs and twice the learning rate: `tuned` starts from `half`, and
`fresh` starts from random weights. The table shows MAP@100 on val.
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


def train(workdir: Path, data: Path, seed: int, *words: str) -> float:
    """Trains a run unless its folder contains it. Returns its MAP."""
    run(
        "vidjax", "train", "--config=quality_fusion", f"--workdir={workdir}",
        "--config.data.name=iqiyi_vid", f"--config.data.dir={data}", f"--config.seed={seed}",
        "--config.eval.report=False", *words,
    )  # fmt: skip
    return json.loads((workdir / "metrics.json").read_text())["map"]


def measure(folder: Path, seed: int) -> list[float]:
    """Returns the MAP of the runs `full`, `tuned` and `fresh`."""
    whole, part = write_halves(folder, seed)
    half, full, tuned, fresh = (folder / f"{x}-{seed}" for x in ("half", "full", "tuned", "fresh"))
    train(half, part, seed, "--config.data.distractors=leave_out")
    return [
        train(full, whole, seed),
        train(tuned, whole, seed, *SHORT, f"--config.init_from={half}"),
        train(fresh, whole, seed, *SHORT),
    ]


def main() -> None:
    """Prints the table."""
    args = common.parse(__doc__, folder=Path, seeds=3)
    args.folder.mkdir(parents=True, exist_ok=True)
    head = ("seed", f"full, {EPOCHS} epochs", *(f"{x}, {EPOCHS // 2}" for x in ("tuned", "fresh")))
    rows = [[f"{value:.4f}" for value in measure(args.folder, x)] for x in range(args.seeds)]
    table = [head, ["---"] * len(head), *([str(x), *row] for x, row in enumerate(rows))]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in table))


if __name__ == "__main__":
    main()
