"""Compares fine-tuning from a run with half of the identities with training from random weights.

    python -m tests.benchmarks.fine_tuning FOLDER [--config=quality_fusion] [--seeds=3]

For each seed, four runs of a shipped configuration on the synthetic dataset are trained in FOLDER,
unless they exist: `half` with every second identity, `full` with all identities, and two with all
identities and half of the epochs: `tuned` starts from `half`, and `fresh` starts from random
weights. For `quality_fusion`, these two have twice the learning rate. The table shows MAP@100 on
val.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import common
from vidjax.runs import config_io

FASTER = {"quality_fusion": 2}  # factor of the learning rate of short runs


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


def train(name: str, workdir: Path, data: Path, seed: int, *words: str) -> float:
    """Trains a run of the configuration `name` unless its folder contains it. Returns its MAP."""
    run(
        "vidjax", "train", f"--config={name}", f"--workdir={workdir}",
        "--config.data.name=iqiyi_vid", f"--config.data.dir={data}", f"--config.seed={seed}",
        "--config.eval.report=False", *words,
    )  # fmt: skip
    return json.loads((workdir / "metrics.json").read_text())["map"]


def measure(folder: Path, name: str, seed: int) -> list[float]:
    """Returns the MAP of the runs `full`, `tuned` and `fresh`."""
    whole, part = write_halves(folder, seed)
    half, full, tuned, fresh = (
        folder / f"{name}-{kind}-{seed}" for kind in ("half", "full", "tuned", "fresh")
    )
    config = config_io.load_file(f"configs/{name}.py")
    rate = config.optim.learning_rate * FASTER.get(name, 1)
    epochs = f"--config.num_epochs={config.num_epochs / 2:g}"
    short = (epochs, f"--config.optim.learning_rate={rate:g}")
    train(name, half, part, seed, "--config.data.distractors=leave_out")
    return [
        train(name, full, whole, seed),
        train(name, tuned, whole, seed, *short, f"--config.init_from={half}"),
        train(name, fresh, whole, seed, *short),
    ]


def main() -> None:
    """Prints the table."""
    args = common.parse(__doc__, folder=Path, config="quality_fusion", seeds=3)
    args.folder.mkdir(parents=True, exist_ok=True)
    head = ("seed", "full", "tuned", "fresh")
    rows = [
        [f"{value:.4f}" for value in measure(args.folder, args.config, seed)]
        for seed in range(args.seeds)
    ]
    table = [head, ["---"] * len(head), *([str(x), *row] for x, row in enumerate(rows))]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in table))


if __name__ == "__main__":
    main()
