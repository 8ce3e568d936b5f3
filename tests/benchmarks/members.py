"""The member axis: a step of E members against E steps, one run of folds against five runs.

    python -m tests.benchmarks.members [--members=5] [--batch_size=1024] [--runs]

Steps of `configs/quality_fusion.py` on made-up resident clips take turns in one process; as on a
CPU, one member follows the other. With `--runs`, whole trainings follow, each in a process.
"""

import argparse
import os
import sys
import tempfile
from typing import Any

import numpy as np

from tests.benchmarks import common
from vidjax.core import ensemble
from vidjax.training import train_step

SPEC = "quality_fusion.py"


def make_step(args: argparse.Namespace, count: int) -> Any:
    sizes: Any = {"batch_size": args.batch_size, "num_identities": args.num_identities}
    run = common.make_run(SPEC, [f"ensemble.seeds={count}"], **sizes)
    loop, states = common.make_loop(run), list(train_step.split_state(run.state, 1))
    tables = ensemble.split(run.constants, 1)

    def train() -> list[Any]:
        outcomes = []
        for i, part in enumerate(tables):
            states[i], outcome = loop(states[i], part, run.clips, np.ones((), np.int32))
            outcomes.append(outcome)
        return outcomes

    return train


def compare_runs(rounds: int) -> None:
    base = [sys.executable, "-m", "vidjax.main", f"--config={common.CONFIGS / SPEC}:folds"]
    seconds = {"all": [], "apart": []}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "VIDJAX_CACHE": f"{folder}/cache"}

        def run(name: str, *words: str) -> float:
            own = ["--config.ensemble.folds=5", f"--workdir={folder}/{name}", *words]
            return common.timed([*base, *own], cwd=common.ROOT, env=env)[0]

        run("warm", "--config.num_epochs=1")  # makes the dataset
        for number in range(rounds):
            apart = [run(f"{number}-{i}", f"--config.ensemble.only={i}") for i in range(5)]
            seconds["apart"].append(sum(apart))
            seconds["all"].append(run(f"{number}-all"))
    ratio = common.ratio(seconds, "all", "apart")
    common.write_table(["run", "ratio"], [["5 folds at once / 5 runs", ratio]])


def main() -> None:
    sizes: Any = {"num_identities": 10_034, "rounds": 5, "members": 5}
    args = common.parse(__doc__, "--runs", batch_size=1024, **sizes)
    functions = {"one": make_step(args, 1), "all": make_step(args, args.members)}
    seconds = common.in_turns(functions, args.rounds)
    seconds["one"] = [args.members * x for x in seconds["one"]]
    rate = f"{args.members * args.batch_size / common.median(seconds['all']):,.0f}"
    common.say(f"{common.describe()}, {1 + args.num_identities} classes\n")
    header = ["batch", "members", "clips/s x members", "cost / single steps"]
    ratio = common.ratio(seconds, "all", "one")
    common.write_table(header, [[args.batch_size, args.members, rate, ratio]])
    if args.runs:
        compare_runs(3)


if __name__ == "__main__":
    main()
