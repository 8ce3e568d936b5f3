"""Speed of an ensemble, compared with the separate training of its members.

    python -m tests.benchmarks.members [--members=5] [--batch_size=1024] [--runs]

The first table compares steps of `configs/quality_fusion.py` on random clips, in one process. With
`--runs`, a second table compares complete runs, each in a new process.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks import common
from vidjax.core import ensemble
from vidjax.training import train_step

SPEC = "quality_fusion.py"
RUN_ROUNDS = 3


def make_step(args: argparse.Namespace, num_members: int) -> Callable[[], list[Any]]:
    """Returns a function that takes one training step of each member of an ensemble in turn."""
    run = common.make_run(
        SPEC, [f"ensemble.seeds={num_members}"], batch_size=args.batch_size,
        num_identities=args.num_identities, num_clips=4 * args.batch_size,
    )  # fmt: skip
    loop, states = common.make_loop(run), list(train_step.split_state(run.state, 1))
    constants_of_members = ensemble.split(run.constants, 1)

    def train() -> list[Any]:
        results = []
        for i, constants in enumerate(constants_of_members):
            states[i], result = loop(states[i], constants, run.clips, np.ones((), np.int32))
            results.append(result)
        return results

    return train


def compare_runs() -> None:
    """Compares the time of a run of five folds with the time of five runs of one fold each."""
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, *words: str) -> float:
            flags = (f"--config=configs/{SPEC}:folds", "--config.ensemble.folds=5",
                     f"--workdir={folder}/{name}", *words)  # fmt: skip
            cache = f"{folder}/cache"
            return common.run_python("-m", "vidjax.main", *flags, VIDJAX_CACHE=cache)[0]

        def run_each_fold(number: int) -> float:
            return sum(run(f"{number}-{i}", f"--config.ensemble.only={i}") for i in range(5))

        run("first", "--config.num_epochs=1")  # makes the dataset
        functions = {"apart": run_each_fold, "all": lambda number: run(f"{number}-all")}
        seconds = common.alternate(functions, RUN_ROUNDS)
    ratio = common.format_ratio(seconds, "all", "apart")
    common.print_table(["run", "ratio"], [["5 folds at once / 5 runs", ratio]])


def main() -> None:
    args = common.parse(
        __doc__, "--runs", batch_size=1024, num_identities=10_034, rounds=5, members=5
    )
    steps = {"one": make_step(args, 1), "all": make_step(args, args.members)}
    seconds = common.time_functions(steps, args.rounds)
    seconds["one"] = [args.members * x for x in seconds["one"]]
    rate = f"{args.members * args.batch_size / common.median(seconds['all']):,.0f}"
    header = ["batch", "members", "clips/s x members", "cost / single steps"]
    ratio = common.format_ratio(seconds, "all", "one")
    common.print_table(header, [[args.batch_size, args.members, rate, ratio]])
    if args.runs:
        compare_runs()


if __name__ == "__main__":
    main()
