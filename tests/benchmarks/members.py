"""Speed of an ensemble, compared with the separate training of its members.

    python -m tests.benchmarks.members [--members=5] [--batch_size=1024] [--runs]

The first table compares steps of `configs/quality_fusion.py` on random clips, in one process. With
`--runs`, a second table compares complete runs, each in a new process.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks import common
from vidjax.core import ensemble
from vidjax.training import train_step

SPEC = "quality_fusion.py"


def make_step(members: int, batch_size: int) -> Callable[[], list[Any]]:
    """Returns a function that takes one training step of each member of an ensemble in turn."""
    sizes = {"batch_size": batch_size, "num_clips": 4 * batch_size}
    run = common.make_run(SPEC, f"ensemble.seeds={members}", **sizes)
    states = list(train_step.split_state(run.state, 1))
    constants_of_members = ensemble.split(run.constants, 1)

    def train() -> list[Any]:
        results = []
        for i, constants in enumerate(constants_of_members):
            states[i], result = run.loop(states[i], constants, (run.clips, run.drawn), np.int32(1))
            results.append(result)
        return results

    return train


def compare_runs() -> None:
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, *words: str) -> float:
            command = ["-m", "vidjax.main", f"--config=configs/{SPEC}:folds", *words]
            command += ["--config.ensemble.folds=5", f"--workdir={folder}/{name}"]
            return common.run_python(*command, VIDJAX_CACHE=f"{folder}/cache")[0]

        def run_each_fold(number: int) -> float:
            return sum(run(f"{number}-{i}", f"--config.ensemble.only={i}") for i in range(5))

        run("first", "--config.num_epochs=1")  # makes the dataset
        functions = {"apart": run_each_fold, "all": lambda number: run(f"{number}-all")}
        seconds = common.alternate(functions, 3)
    ratio = common.format_ratio(seconds, "all", "apart")
    common.print_table(["run", "ratio"], [["5 folds at once / 5 runs", ratio]])


if __name__ == "__main__":
    args = common.parse(__doc__, "--runs", batch_size=1024, members=5)
    members = {"one": 1, "all": args.members}
    steps = {name: make_step(count, args.batch_size) for name, count in members.items()}
    seconds = common.time_functions(steps)
    seconds["one"] = [args.members * x for x in seconds["one"]]
    ratio = common.format_ratio(seconds, "all", "one")
    common.print_table(
        ["batch", "members", "cost / single steps"], [[args.batch_size, args.members, ratio]]
    )
    if args.runs:
        compare_runs()
