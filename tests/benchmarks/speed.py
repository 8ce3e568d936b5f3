"""Measures speed on this machine and writes it into `README.md`, with a column for each machine.

    python -m tests.benchmarks.speed [--only=NAME,NAME] [--collect]

Every benchmark of BENCHMARKS is a process. Its printed tables go into `speed.json`, under the name
of the processor, and from there into the tables below `<!-- table: speed NAME -->`. `--collect`
only writes the tables. The measurement needs PyTorch (the extra `bench`), 20 GB of memory, an hour
on 2 cores, and an otherwise idle machine.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks import common

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "speed.json"
PAGE = FOLDER / "README.md"
BENCHMARKS = {
    "first_command": ["first_command"], "training_step": ["training_step", "--peer"],
    "training_step_bfloat16": ["training_step", "--peer", "--bfloat16"],
    "evaluation": ["evaluation", "--peer"],
    "published_tests": ["evaluation", "--published", "--clips=256", "--block_size=32"],
    "streaming": ["time_to_map", "--streaming", "--epochs=5", "--rounds=2"],
    "time_to_map": ["time_to_map"], "gallery": ["gallery"],
    "gallery_million": ["gallery", "--people=1000000"], "gallery_start": ["gallery", "--start"],
}  # fmt: skip


def read_tables(text: str) -> dict[str, str]:
    """Returns row and column -> value of all Markdown tables in what a benchmark printed."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        (_, *names), *rows = common.read_markdown(table)
        for row, *cells in rows:
            found |= {f"{row}: {name}": x for name, x in zip(names, cells, strict=True) if x}
    return found


def measure(words: list[str]) -> dict[str, str]:
    command = [sys.executable, "-m", f"tests.benchmarks.{words[0]}", *words[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return read_tables(done.stdout)


def render(found: Mapping[str, Mapping[str, Mapping[str, str]]], name: str) -> str:
    """Returns the table of a benchmark: a row for each figure, and a column for each machine."""
    columns = {machine: results[name] for machine, results in found.items() if name in results}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    rows = [[label, *(column.get(label, "") for column in columns.values())] for label in labels]
    return common.markdown(["", *columns], rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, "--collect", argv=argv, only=",".join(BENCHMARKS))
    found = json.loads(RESULTS.read_text())
    for name in [] if args.collect else args.only.split(","):
        found.setdefault(common.describe(), {})[name] = measure(BENCHMARKS[name])
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        common.say(f"{name}\n{render(found, name)}")
    text = PAGE.read_text()
    for name in BENCHMARKS:
        if any(name in results for results in found.values()):
            text = common.replace_table(text, f"speed {name}", render(found, name))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
