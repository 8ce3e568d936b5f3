"""The member axis: a step of E members against E steps, one run of folds against as many runs.

    python -m tests.benchmarks.members [--members=1,5,25] [--batch_size=512,4096] [--runs]

Steps are those of `configs/quality_fusion.py` on made-up resident clips; `map` is what training
does on a CPU (a member after the other, each batch drawn anew for it), `vmap` what it does on an
accelerator (all at once). They take turns in one process. With `--runs` whole trainings follow,
each a process: start, compilation, input, evaluation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common
from vidjax import devices, ensemble
from vidjax.data import resident
from vidjax.steps import state as state_lib
from vidjax.steps import train_step

ROOT = Path(__file__).parents[2]
SPEC = "quality_fusion.py"


def make_step(args: argparse.Namespace, batch_size: int, count: int, size: int) -> Any:
    """Returns a function that does a training step of `count` members, `size` in one program."""
    run = common.make_run(
        SPEC,
        [f"ensemble.seeds={count}"],
        batch_size=batch_size,
        num_identities=args.num_identities,
    )
    loop = train_step.make_train_loop(
        run.system,
        devices.make_mesh(1),
        lambda clips, step: resident.draw_batch(clips, run.plan, step),
    )
    states = list(state_lib.split_state(run.state, size))
    tables = ensemble.split(run.tables, size)

    def train() -> list[Any]:
        outcomes = []
        for i, part in enumerate(tables):
            states[i], outcome = loop(states[i], part, run.clips, np.ones((), np.int32))
            outcomes.append(outcome)
        return outcomes

    return train


def compare_steps(args: argparse.Namespace) -> None:
    """Writes the cost of a step of E members beside E steps of one."""
    rows = []
    for batch_size in map(int, args.batch_size.split(",")):
        for count in map(int, args.members.split(",")):
            functions: dict[str, Callable[[], Any]] = {
                "one": make_step(args, batch_size, 1, 1),
                "map": make_step(args, batch_size, count, 1),
                "vmap": make_step(args, batch_size, count, count),
            }
            seconds = common.in_turns(functions, args.rounds)
            seconds["one"] = [count * x for x in seconds["one"]]
            for name in ("map", "vmap"):
                rate = count * batch_size / common.median(seconds[name])
                rows.append(
                    [batch_size, count, name, f"{rate:,.0f}", common.ratio(seconds, name, "one")]
                )
    sys.stdout.write(f"{common.describe()}, {1 + args.num_identities} classes\n\n")
    common.write_table(
        ["batch", "members", "how", "clips/s x members", "cost / single steps"], rows
    )


def compare_runs(args: argparse.Namespace) -> None:
    """Writes the time of one run of five folds beside that of five runs, each a process."""
    folder = Path(tempfile.mkdtemp())
    env = {**os.environ, "VIDJAX_CACHE": str(folder / "cache")}
    base = [sys.executable, "-m", "vidjax.main", f"--config={ROOT / 'configs' / SPEC}:folds"]
    folds = 5

    def run(name: str, *words: str) -> float:
        began = time.perf_counter()
        command = [*base, f"--config.ensemble.folds={folds}", f"--workdir={folder / name}", *words]
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        return time.perf_counter() - began

    try:
        run("warm", "--config.num_epochs=1")  # makes the dataset
        seconds: dict[str, list[float]] = {"all": [], "apart": []}
        for number in range(args.run_rounds):
            apart = [run(f"{number}-{i}", f"--config.ensemble.only={i}") for i in range(folds)]
            seconds["apart"].append(sum(apart))
            seconds["all"].append(run(f"{number}-all"))
    finally:
        shutil.rmtree(folder)
    common.write_table(
        ["run", "ratio"],
        [[f"{folds} folds at once / {folds} runs", common.ratio(seconds, "all", "apart")]],
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", default="1024")
    parser.add_argument("--num_identities", type=int, default=10_034)
    parser.add_argument("--members", default="5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", action="store_true", help="whole runs, too")
    parser.add_argument("--run_rounds", type=int, default=3)
    args = parser.parse_args()
    compare_steps(args)
    if args.runs:
        compare_runs(args)


if __name__ == "__main__":
    main()
