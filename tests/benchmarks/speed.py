"""Runs the benchmarks on this machine, and writes their tables into `README.md`.

    python -m tests.benchmarks.speed [--only=NAME,NAME] [--collect]

Each machine has a column, named after its processor. The figures are also stored in `speed.json`.
`--collect` only writes the tables. The measurement takes half an hour on 2 cores. It needs 20 GB of
memory, and an otherwise idle machine.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks import common

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).with_name("README.md")
BENCHMARKS = {  # name of a table -> module and flags
    "first_command": ["first_command"], "training_step": ["training_step"],
    "training_step_bfloat16": ["training_step", "--bfloat16"], "gallery": ["gallery"],
    "gallery_million": ["gallery", "--people=1000000"], "gallery_start": ["gallery", "--start"],
}  # fmt: skip


def measure(module: str, *flags: str) -> dict[str, str]:
    """Runs a benchmark. Returns `ROW: COLUMN` -> figure, for all tables that it prints."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *flags]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = {}
    for table in re.findall(r"(?:^\|.*\n)+", output, re.MULTILINE):
        (_, *columns), *rows = common.read_table(table)
        for row, *cells in rows:
            figures |= {f"{row}: {c}": x for c, x in zip(columns, cells, strict=True) if x}
    return figures


def render(results: Mapping[str, Mapping[str, Mapping[str, str]]], name: str) -> str:
    """Returns a table with a row for each figure, and a column for each machine."""
    columns = {machine: tables[name] for machine, tables in results.items() if name in tables}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    rows = [[label, *(column.get(label, "") for column in columns.values())] for label in labels]
    return common.format_table(["", *columns], rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, "--collect", argv=argv, only=",".join(BENCHMARKS))
    results = json.loads(RESULTS.read_text())
    for name in [] if args.collect else args.only.split(","):
        results.setdefault(common.describe_machine(), {})[name] = measure(*BENCHMARKS[name])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        common.print_text(f"{name}\n{render(results, name)}")
    page = PAGE.read_text()
    for name in BENCHMARKS:
        if any(name in tables for tables in results.values()):
            page = common.replace_table(page, f"speed {name}", render(results, name))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
