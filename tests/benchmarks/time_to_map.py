"""Time to a result: from the start of a process to a MAP within 0.005 of its final one.

    python -m tests.benchmarks.time_to_map [--clips=20000] [--epochs=10] [--rounds=1]

The MLP of `configs/quality_fusion.py` at published size, on made-up official files with people that
can be told apart; softmax alone, as the focal loss learns little of two clips a person; MAP on val
after every epoch. Ours in float32, in bfloat16, and with steps on a tenth of the classes; PyTorch
(the extra `bench`) eager, compiled, and compiled in bfloat16: the same net, files, batches and
schedule. Each run is a process, and they take turns. Before the first round, one run of each kind
of ours converts the files and compiles, and one of each compiled kind of PyTorch fills its cache.
"""

import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import common, end_to_end

NEAR = 0.005  # of the final MAP
LIKENESS = 0.6  # with which no net finds everybody, and every net most
RATE = 0.003
RUNS = {
    "vidjax, float32": ["--config.dtype=float32"],
    "vidjax, bfloat16": ["--config.dtype=bfloat16"],
    "vidjax, float32, a tenth of the classes": ["--config.loss.sampled_classes=0.1"],
    "PyTorch, eager": [],
    "PyTorch, compiled": ["--compile"],
    "PyTorch, compiled, bfloat16": ["--compile", "--bfloat16"],
}


def time_to_map(lines: Sequence[tuple[float, str]]) -> tuple[float, float, float]:
    """Returns the seconds until MAP is NEAR its final value, all seconds, and that value."""
    found = [
        (seconds, float(match[1]))
        for seconds, line in lines
        if (match := re.search(r"(?:^step \d+.*: |\")map\"?:? ([\d.]+)", line))
    ]
    final = found[-1][1]
    near = next(seconds for seconds, value in found if value >= final - NEAR)
    return near, lines[-1][0], final


def main() -> None:
    """Prints the table."""
    args = end_to_end.make_parser(rounds=1).parse_args()
    folder = Path(tempfile.mkdtemp())
    env = {**os.environ, "VIDJAX_CACHE": str(folder / "cache")}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    counts = {"train": args.clips, "val": args.val_clips}

    def words(name: str, number: int, epochs: int) -> list[str]:
        sizes = (folder, epochs, args.batch_size)
        if name.startswith("PyTorch"):
            theirs = [*end_to_end.their_words(*sizes), "--each_epoch", "--softmax"]
            return [*theirs, f"--learning_rate={RATE}", *RUNS[name]]
        ours = [*end_to_end.our_words(*sizes), f"--workdir={folder / f'run{number}'}"]
        ours += ["--config.loss.schedule=((0.0, 0.0),)", f"--config.optim.learning_rate={RATE}"]
        ours += ["--config.optim.warmup=0.1", "--config.optim.warmup_scale=0"]  # as PyTorch's
        return [*ours, "--config.eval.every_epochs=1", *RUNS[name]]

    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in RUNS}
    try:
        end_to_end.write_files(folder, counts, args.num_identities, LIKENESS)
        for number, name in enumerate(RUNS):
            if name != "PyTorch, eager":
                end_to_end.run(words(name, number, 1), env)
        for turn in range(args.rounds):
            for number, name in enumerate(RUNS):
                turn_number = len(RUNS) * (1 + turn) + number
                lines = end_to_end.run(words(name, turn_number, args.epochs), env)
                results[name].append(time_to_map(lines))
    finally:
        shutil.rmtree(folder)
    rows = []
    for name, runs in results.items():
        near, whole, final = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append([name, f"{near:.0f}", f"{whole:.0f}", f"{final:.3f}"])
    common.write_table(["run", "seconds to MAP", "seconds in all", "final MAP"], rows)
    near = {name: [run[0] for run in runs] for name, runs in results.items()}
    fastest = min((n for n in near if n.startswith("PyTorch")), key=lambda n: sum(near[n]))
    rows = [[f"{fastest} / {n}", common.ratio(near, fastest, n)] for n in near if "vidjax" in n]
    common.write_table(["seconds to MAP", "ratio"], rows)


if __name__ == "__main__":
    main()
