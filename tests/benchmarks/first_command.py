"""Times of the first command of README.md, from the start of its process to its end.

    python -m tests.benchmarks.first_command [--rounds=3]

A cold one finds neither dataset nor compiled programs in its cache, as after an installation; a
warm one follows it, and trains anew. Figures are medians of the rounds.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import common


def run(folder: Path, *words: str) -> tuple[float, float]:
    """Trains in `folder/run` with the cache `folder/cache`; returns seconds, and of all cores."""
    command = [sys.executable, "-m", "vidjax.main", *words, f"--workdir={folder}/run"]
    env = os.environ | {"VIDJAX_CACHE": f"{folder}/cache"}
    return common.timed(command, cwd=common.ROOT, env=env)


def main() -> None:
    args = common.parse(__doc__, rounds=3)
    found: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in found.items():
                times.append(run(Path(folder), "--config=configs/mma.py"))
                shutil.rmtree(f"{folder}/run")
                sys.stderr.write(f"{name}: {times[-1][0]:.1f} s\n")
    rows = [
        [name, *(f"{common.median(column):.1f}" for column in zip(*times, strict=True))]
        for name, times in found.items()
    ]
    common.write_table(["the first command", "seconds", "of the processor"], rows)


if __name__ == "__main__":
    main()
