"""The member axis: a step of E members against E steps, one run of folds against as many runs.

    python -m tests.benchmarks.members [--members=1,5,25] [--batch_size=512,4096] [--runs]

Steps are those of `configs/quality_fusion.py` on made-up resident clips; `map` is what training
does on a CPU (a member after the other, each batch drawn anew for it), `vmap` what it does on an
accelerator (all at once). They take turns in one process. With `--runs` whole trainings follow,
each a process: start, compilation, input, evaluation.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks import common
from vidjax import ensemble
from vidjax.training import train_step

SPEC = "quality_fusion.py"


def make_step(args: argparse.Namespace, batch_size: int, count: int, size: int) -> Any:
    """Returns a function that does a training step of `count` members, `size` in one program."""
    sizes = {"batch_size": batch_size, "num_identities": args.num_identities}
    run = common.make_run(SPEC, [f"ensemble.seeds={count}"], **sizes)
    loop = common.make_loop(run)
    states = list(train_step.split_state(run.state, size))
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
                rate = f"{count * batch_size / common.median(seconds[name]):,.0f}"
                cost = common.ratio(seconds, name, "one")
                rows.append([batch_size, count, name, rate, cost])
    sys.stdout.write(f"{common.describe()}, {1 + args.num_identities} classes\n\n")
    header = ["batch", "members", "how", "clips/s x members", "cost / single steps"]
    common.write_table(header, rows)


def compare_runs(args: argparse.Namespace) -> None:
    """Writes the time of one run of five folds beside that of five runs, each a process."""
    base = [sys.executable, "-m", "vidjax.main", f"--config={common.CONFIGS / SPEC}:folds"]
    folds, seconds = 5, {"all": [], "apart": []}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "VIDJAX_CACHE": f"{folder}/cache"}

        def run(name: str, *words: str) -> float:
            began = time.perf_counter()
            own = [f"--config.ensemble.folds={folds}", f"--workdir={folder}/{name}", *words]
            command = [*base, *own]
            subprocess.run(command, cwd=common.ROOT, env=env, check=True, capture_output=True)
            return time.perf_counter() - began

        run("warm", "--config.num_epochs=1")  # makes the dataset
        for number in range(args.run_rounds):
            apart = [run(f"{number}-{i}", f"--config.ensemble.only={i}") for i in range(folds)]
            seconds["apart"].append(sum(apart))
            seconds["all"].append(run(f"{number}-all"))
    ratio = common.ratio(seconds, "all", "apart")
    common.write_table(["run", "ratio"], [[f"{folds} folds at once / {folds} runs", ratio]])


def main() -> None:
    """Prints the tables."""
    sizes = {"num_identities": 10_034, "rounds": 5, "run_rounds": 3}
    args = common.parse(__doc__, "--runs", batch_size="1024", members="5", **sizes)
    compare_steps(args)
    if args.runs:
        compare_runs(args)


if __name__ == "__main__":
    main()
