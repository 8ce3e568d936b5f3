"""Functions that several benchmarks share: arguments, timing, tables, and systems to train."""

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from vidjax.core import ensemble
from vidjax.data.clips import BatchPlan
from vidjax.models.build_system import TaskSpec, make_system
from vidjax.runs import config_io

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
IDENTITIES = 10_034  # of the official files
DIM = 512  # width of features
# Clips have 1 to this number of frames, so 30 on average.
MAX_FRAMES = {"face": 59, "head": 59, "body": 29, "audio": 1}
PADDED_FRAMES = {"face": 64, "head": 64, "body": 32, "audio": 1}


def parse(doc: str | None, *flags: str, argv: Any = None, **options: Any) -> argparse.Namespace:
    """Parses flags, and options name -> default. If a default is a type, it is positional."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=as_written)
    for name, default in options.items():
        if isinstance(default, type):
            parser.add_argument(name, type=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, metavar="X")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args(argv)


def print_text(text: str) -> None:
    """Prints a line immediately, even if the output is a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def children_seconds() -> float:
    """Returns the CPU seconds of all child processes that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # user and system


def run_python(*words: str, cwd: Path = ROOT, **env: str) -> tuple[float, float]:
    """Runs Python in a new process; returns its elapsed seconds and its CPU seconds."""
    start, cpu_start = time.perf_counter(), children_seconds()
    command, environment = [sys.executable, *words], os.environ | env
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)}: {ended.stderr[-2000:]}")
    return time.perf_counter() - start, children_seconds() - cpu_start


def alternate(functions: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[Any]]:
    """Calls each function once per round, with the round's number; returns name -> results."""
    # The speed of a machine drifts, so only the times of one round can be compared.
    results: dict[str, list[Any]] = {name: [] for name in functions}
    for number in range(rounds):
        for name, function in functions.items():
            results[name].append(function(number))
    return results


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_machine() -> str:
    """Returns the processor, its instructions for matrix products, and the version of JAX."""
    kind = jax.devices()[0].device_kind
    if kind == "cpu":
        fields = dict(re.findall(r"(?m)^([^\t:]+)\s*: (.*)$", Path("/proc/cpuinfo").read_text()))
        known = ("avx512f", "avx512_bf16", "amx_bf16")
        flags = [flag for flag in known if flag in fields.get("flags", "").split()]
        kind = f"{os.cpu_count()} cores of {fields.get('model name', 'a processor')}"
        kind += f" with {', '.join(flags) or 'no AVX-512'}"
    return f"{kind}, jax {jax.__version__}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print_text(format_table(header, rows))


def read_table(text: str) -> list[list[str]]:
    """Returns the cells [rows][columns] of a Markdown table. The first row is the header."""
    rows = [[*map(str.strip, line.strip()[1:-1].split("|"))] for line in text.splitlines()]
    return [row for row in rows if set(row[0]) != {"-"}]


def replace_table(page: str, name: str, table: str) -> str:
    """Returns a page with a new table below `<!-- table: NAME -->`."""
    pattern = rf"(<!-- table: {name} -->\n)(?:\|.*\n)+"
    new_page, count = re.subn(pattern, lambda match: match[1] + table, page)
    if count != 1:
        raise ValueError(f"the page must have exactly one table below `<!-- table: {name} -->`")
    return new_page


def make_plan(
    spec: str, *overrides: str, num_clips: int, num_clusters: int | None = None, **settings: Any
) -> Any:
    """Returns a system, its configuration, members and batches. `settings` are of `prepare`."""
    config = config_io.load_file(f"{CONFIGS / spec}")
    config = config_io.override(config, [f"--config.{word}" for word in overrides])
    modalities = dict.fromkeys(config.modalities, DIM)
    task = TaskSpec(modalities, IDENTITIES, num_clusters, num_clips, 10_000, True, settings or None)
    padded = {name: min(PADDED_FRAMES[name], config.data.max_frames) for name in modalities}
    batches = BatchPlan(("train",), config.batch_size, num_clips, padded, "window", {}, config.seed)
    system = make_system(config.to_dict(), task)
    members = ensemble.make_members(config.ensemble.to_dict())
    return SimpleNamespace(config=config, system=system, members=members, batches=batches)
