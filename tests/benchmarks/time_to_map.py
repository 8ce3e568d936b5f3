"""Time to a result: from the start of a process to a MAP within 0.005 of a final MAP.

    python -m tests.benchmarks.time_to_map [--clips=20000] [--epochs=10] [--rounds=1]

The MLP of `configs/quality_fusion.py` at published size, on made-up official files with people that
differ; only softmax, as the focal loss learns little from two clips a person; MAP on val after
every epoch. Ours in float32 and in bfloat16; PyTorch (the extra `bench`) eager, compiled, and
compiled in bfloat16, with the same net, files, batches and schedule. The MAP to reach is the final
MAP of the run, and the lowest final MAP of all runs. Each run is a process, and they take turns,
after a run of each kind that fills its cache.
"""

import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks import common, end_to_end

NEAR = 0.005  # of the final MAP
LIKENESS = 0.6  # with which no net finds everybody, and every net most
RATE = 0.003
RUNS = {
    "vidjax, float32": ["--config.dtype=float32"],
    "vidjax, bfloat16": ["--config.dtype=bfloat16"],
    "PyTorch, eager": [],
    "PyTorch, compiled": ["--compile"],
    "PyTorch, compiled, bfloat16": ["--compile", "--bfloat16"],
}


class Course:
    """The course of a run: MAP after every epoch, by the seconds from the start of its process."""

    def __init__(self, lines: Sequence[tuple[float, str]]):
        """Reads the lines of a process."""
        pattern = re.compile(r"(?:^step \d+.*: |\")map\"?:? ([\d.]+)")
        matches = [(seconds, pattern.search(line)) for seconds, line in lines]
        self.found = [(seconds, float(match[1])) for seconds, match in matches if match]
        self.seconds, self.final = lines[-1][0], self.found[-1][1]

    def until(self, value: float) -> float:
        """Returns the seconds until MAP is within NEAR of a value."""
        return next(seconds for seconds, reached in self.found if reached >= value - NEAR)


def main() -> None:
    """Measures, and prints the tables."""
    args = common.parse(__doc__, **end_to_end.SIZES, batch_size=1024, rounds=1)
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

    courses: dict[str, list[Course]] = {name: [] for name in RUNS}
    try:
        end_to_end.write_files(folder, counts, args.num_identities, LIKENESS)
        for number, name in enumerate(RUNS):
            if name != "PyTorch, eager":
                end_to_end.run(words(name, number, 1), env)
        for turn in range(args.rounds):
            for number, name in enumerate(RUNS):
                turn_number = len(RUNS) * (1 + turn) + number
                lines = end_to_end.run(words(name, turn_number, args.epochs), env)
                courses[name].append(Course(lines))
    finally:
        shutil.rmtree(folder)
    write_tables(courses)


def write_tables(courses: Mapping[str, Sequence[Course]]) -> None:
    """Prints the medians of each kind of run, and how much faster ours are than PyTorch's."""
    lowest = min(course.final for runs in courses.values() for course in runs)
    to_final = {name: [one.until(one.final) for one in runs] for name, runs in courses.items()}
    to_lowest = {name: [one.until(lowest) for one in runs] for name, runs in courses.items()}
    rows = []
    for name, runs in courses.items():
        columns = (to_final[name], to_lowest[name], [one.seconds for one in runs])
        final = statistics.median(one.final for one in runs)
        rows.append([name, *(f"{statistics.median(x):.0f}" for x in columns), f"{final:.3f}"])
    header = ("run", *(f"seconds {to}" for to in ("to its MAP", "to the lowest MAP", "in all")))
    common.write_table((*header, "final MAP"), rows)
    rows = []
    for title, seconds in {"its MAP": to_final, "the lowest MAP": to_lowest}.items():
        fastest = min((n for n in seconds if "PyTorch" in n), key=lambda n: sum(seconds[n]))
        for name in seconds:
            if "vidjax" in name:
                ratio = common.ratio(seconds, fastest, name)
                rows.append([f"to {title}, {fastest} / {name}", ratio])
    common.write_table(["seconds", "ratio"], rows)


if __name__ == "__main__":
    main()
