"""Time of the first command of README.md, from the start of the process to its end.

    python -m tests.benchmarks.first_command [--rounds=3]

`cold` has an empty cache, without dataset and compiled programs, as after an installation. `warm`
repeats the command with the same cache. The figures are medians of the rounds.
"""

import shutil
import tempfile
from pathlib import Path
from statistics import median

from tests.benchmarks import common


def run(folder: Path, *words: str) -> tuple[float, float]:
    """Trains with the cache `folder/cache`; returns elapsed seconds and CPU seconds."""
    flags = (*words, f"--workdir={folder}/run")
    seconds = common.run_python("-m", "vidjax.main", *flags, VIDJAX_CACHE=f"{folder}/cache")
    shutil.rmtree(folder / "run")
    return seconds


if __name__ == "__main__":
    args = common.parse(__doc__, rounds=3)
    with tempfile.TemporaryDirectory() as folder:
        train = lambda number: run(Path(folder, str(number)), "--config=configs/mma.py")  # noqa: E731
        seconds = common.alternate({"cold": train, "warm": train}, args.rounds)
    rows = [
        [name, *(f"{median(column):.1f}" for column in zip(*times, strict=True))]
        for name, times in seconds.items()
    ]
    common.print_table(["the first command", "seconds", "of the processor"], rows)
