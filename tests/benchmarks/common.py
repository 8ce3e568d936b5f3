"""Functions that several benchmarks share: arguments, timing, tables, and systems to train.

Random clips are drawn on the device, so a benchmark needs neither TensorFlow nor a dataset.
"""

import argparse
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core import devices, ensemble, fusion
from vidjax.core.batch import Array, Batch, Frames, Packed
from vidjax.data import resident
from vidjax.data.clips import BatchPlan
from vidjax.models.build_system import TaskSpec, make_system
from vidjax.runs import config_io
from vidjax.training import train_step

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
IDENTITIES = 10_034  # of the official files
ROUNDS = 5
MAX_STEPS = 4  # of a call of a training loop
DIM = 512  # width of features
# Clips have 1 to this number of frames, so 30 on average.
MAX_FRAMES = {"face": 59, "head": 59, "body": 29, "audio": 1}
PADDED_FRAMES = {"face": 64, "head": 64, "body": 32, "audio": 1}
DISTINCT_FRAMES = 1 << 16  # if a modality has more frames, frames are repeated
MIN_SECONDS = 0.25  # a function is called again and again for this time, because a call is short


def parse(doc: str | None, *flags: str, argv: Any = None, **options: Any) -> argparse.Namespace:
    """Parses the command line, or `argv`. `flags` have no value; `options` are name -> default.

    If a default is a type, such as Path, the argument is positional.
    """
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


def time_calls(function: Callable[[], Any], count: int) -> float:
    """Returns the seconds per call of `count` calls, which do not wait for earlier results."""
    start, result = time.perf_counter(), None
    for _ in range(count):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def time_functions(functions: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Returns name -> the seconds per call in each of ROUNDS rounds. The functions take turns."""
    timers: dict[str, Callable[[int], float]] = {}
    for name, function in functions.items():
        jax.block_until_ready(function())  # compiles
        count = math.ceil(MIN_SECONDS / time_calls(function, 1))
        timers[name] = lambda _, function=function, count=count: time_calls(function, count)
    return alternate(timers, ROUNDS)


def format_ratio(seconds: Mapping[str, Sequence[float]], numerator: str, divisor: str) -> str:
    """Returns median and range over rounds of a ratio of times, such as `1.20 (1.10-1.30)`."""
    ratios = [a / b for a, b in zip(seconds[numerator], seconds[divisor], strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_machine() -> str:
    """Returns the processor, its instructions for matrix products, and the version of JAX."""
    kind = jax.devices()[0].device_kind
    if kind == "cpu":
        parts = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in parts}
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


def make_clips(modalities: Sequence[str], num_clips: int) -> dict[str, Packed]:
    """Returns modality -> random clips on the device. A frame has 512 features in float16."""
    clips = {}
    for seed, name in enumerate(modalities):
        lengths = np.random.default_rng((0, seed)).integers(1, MAX_FRAMES[name] + 1, num_clips)
        fields = _draw_frames(jax.random.key(seed), 1 + int(lengths.sum()))
        start = jnp.asarray(np.cumsum(lengths) - lengths, jnp.int32)
        clips[name] = Packed(*fields, start=start, length=jnp.asarray(lengths, jnp.int32))
    return clips


@partial(jax.jit, static_argnums=1)
def _draw_frames(key: Array, count: int) -> list[Array]:
    """Returns features, qualities, detections and numbers. The last frame is padding."""
    keys, number = jax.random.split(key, 3), jnp.arange(count, dtype=jnp.int32)
    distinct = jax.random.normal(keys[0], (DISTINCT_FRAMES, DIM), jnp.float16)
    features = distinct[number % DISTINCT_FRAMES].at[-1].set(0)
    quality = jax.random.uniform(keys[1], (count,), minval=1, maxval=100)
    detection = jax.random.uniform(keys[2], (count,), minval=0.5, maxval=1)
    return [features, quality, detection, number]


def make_plan(
    spec: str, *overrides: str, num_clips: int, num_clusters: int | None = None, **settings: Any
) -> Any:
    """Returns a system for clips of DIM features, its configuration, members and batch plan.

    `spec` is FILE:ARGUMENTS, `overrides` are FIELD=VALUE, and `settings` are the results of
    `Identifier.prepare`.
    """
    config = config_io.load_file(f"{CONFIGS / spec}")
    config = config_io.override(config, [f"--config.{word}" for word in overrides])
    modalities = dict.fromkeys(config.modalities, DIM)
    task = TaskSpec(modalities, IDENTITIES, num_clusters, num_clips, 10_000, True, settings or None)
    padded = {name: min(PADDED_FRAMES[name], config.data.max_frames) for name in modalities}
    return SimpleNamespace(
        config=config,
        system=make_system(config.to_dict(), task),
        members=ensemble.make_members(config.ensemble.to_dict()),
        batches=BatchPlan(
            ("train",), config.batch_size, num_clips, padded, "window", {}, config.seed
        ),
    )


def make_run(spec: str, *overrides: str, batch_size: int, num_clips: int, **options: Any) -> Any:
    """Returns a system, and random clips on the device to train it. Arguments: see `make_plan`."""
    words = [f"batch_size={batch_size}", "data.distractors=other", *overrides]
    plan = make_plan(spec, *words, num_clips=num_clips, **options)
    system, members, mesh = plan.system, plan.members, devices.make_mesh(1)
    shape = len(members), num_clips
    labels = np.random.default_rng(1).integers(0, 1 + IDENTITIES, shape).astype(np.int32)
    rngs = ensemble.make_rngs(members, plan.config.seed)
    init = partial(train_step.init_state, system, rngs, jnp.asarray(labels))
    state = train_step.make_state(init, system.tx, mesh)
    constants = train_step.make_member_constants(members, np.ones(shape))
    constants = devices.replicate(mesh, constants)
    drawn = resident.draw_steps(plan.batches, 0, MAX_STEPS)
    clips = devices.replicate(mesh, make_clips(plan.config.modalities, num_clips))
    loop = train_step.make_train_loop(system, mesh, plan.batches)  # takes several steps
    drawn = devices.replicate(mesh, drawn)

    def gather(clips: Any, number: Any) -> Batch:
        rows = jax.tree.map(lambda rows: rows[number], drawn)
        return resident.gather_batch(clips, *rows, sizes=plan.batches.padded_lengths.items())

    return SimpleNamespace(
        system=system, state=state, constants=constants, clips=clips, plan=plan.batches,
        drawn=drawn, gather=gather, loop=loop,
    )  # fmt: skip


def make_torch_batch(frames: Mapping[str, Frames], labels: np.ndarray) -> Any:
    from tests.benchmarks import peer

    arrays = {
        name: [np.array(x) for x in (fusion.read(f.features), f.quality, f.detection, f.mask)]
        for name, f in frames.items()
    }
    return peer.make_batch(arrays, labels)
