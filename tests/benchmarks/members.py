"""The member axis: five members in one step against five steps, one run against five runs.

    python -m tests.benchmarks.members [--runs]

Steps are timed alternately on made-up batches, so that a busy machine slows both alike. With
`--runs` whole trainings follow, each a process: start, compilation, input, evaluation.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vidjax import config as config_lib
from vidjax import members, steps
from vidjax import mesh as mesh_lib
from vidjax.batch import Array, Batch, Frames
from vidjax.system import Sizes, make_system

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "quality_fusion.py"
DIM, FRAMES = 512, 32


def make_batch(rng: np.random.Generator, rows: int) -> Batch:
    """Returns clips of 1 to 32 made-up faces."""
    flat = np.ones((rows, FRAMES), np.float32)
    frames = Frames(
        features=rng.normal(size=(rows, FRAMES, DIM)).astype(np.float16),
        quality=80 * flat,
        detection=flat,
        number=np.zeros_like(flat, np.int32),
        mask=np.arange(FRAMES) < rng.integers(1, FRAMES + 1, (rows, 1)),
    )
    return Batch({"face": frames}, np.arange(rows, dtype=np.int32), np.ones(rows, bool))


def make_step(
    args: argparse.Namespace, num_members: int, mapping: str, batch: Batch
) -> Callable[[], list[Array]]:
    """Returns a function that does one training step of so many members."""
    config = config_lib.load_file(str(CONFIG))
    config.batch_size = args.batch_size
    config.ensemble.seeds = num_members
    sizes = Sizes({"face": DIM}, args.num_identities, None, args.batch_size, 10_000, True)
    system = make_system(config.to_dict(), sizes)
    mates = members.make_members(config.ensemble.to_dict())
    mesh = mesh_lib.make_mesh(1)
    labels = np.random.default_rng(1).integers(
        0, 1 + args.num_identities, (num_members, args.batch_size)
    )

    def init() -> steps.TrainState:
        rngs = members.make_rngs(mates, 0)
        return steps.init_state(system, sizes.modalities, rngs, jnp.asarray(labels, jnp.int32))

    state = jax.jit(init, out_shardings=mesh_lib.replicated(mesh))()
    tables = steps.make_tables(mates, np.ones((num_members, args.batch_size)))
    tables = mesh_lib.replicate(mesh, tables)
    size = num_members if mapping == "vmap" else 1
    states, parts = list(steps.split_state(state, size)), members.split(tables, size)
    step = steps.make_train_step(system, mesh)
    on_device = mesh_lib.shard_batch(mesh, batch)

    def train() -> list[Array]:
        losses = []
        for i, part in enumerate(parts):
            states[i], loss = step(states[i], part, on_device)
            losses.append(loss)
        return losses

    jax.block_until_ready(train())  # compiles
    return train


def seconds(train: Callable[[], list[Array]], repeats: int) -> float:
    """Returns the seconds of one call."""
    began = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(train())
    return (time.perf_counter() - began) / repeats


def compare_steps(args: argparse.Namespace) -> None:
    """Prints the cost of a step of E members beside E steps of one."""
    batch = make_batch(np.random.default_rng(0), args.batch_size)
    one = make_step(args, 1, "map", batch)
    ratios: dict[str, list[float]] = {"map": [], "vmap": []}
    rates: dict[str, list[float]] = {"map": [], "vmap": []}
    together = {name: make_step(args, args.members, name, batch) for name in ratios}
    for _ in range(args.rounds):
        for name, train in together.items():
            alone = seconds(one, args.members)
            whole = seconds(train, 1)
            ratios[name].append(whole / (args.members * alone))
            rates[name].append(args.members * args.batch_size / whole)
    write = sys.stdout.write
    write(f"\nbatch {args.batch_size}, {args.num_identities + 1} classes, E = {args.members}\n")
    write("| mapping | clips/s x members | cost against separate steps | from .. to |\n")
    write("|---|---|---|---|\n")
    for name, values in ratios.items():
        low, high = min(values), max(values)
        write(
            f"| {name} | {statistics.median(rates[name]):,.0f} | "
            f"{statistics.median(values):.3f} | {low:.3f} .. {high:.3f} |\n"
        )


def compare_runs(args: argparse.Namespace) -> None:
    """Prints the time of one run of E members beside that of E runs, each a process."""
    folder = Path(tempfile.mkdtemp())
    env = {**os.environ, "VIDJAX_CACHE": str(folder / "cache")}
    base = [sys.executable, "-m", "vidjax.main", f"--config={CONFIG}:folds"]

    def run(name: str, *words: str) -> float:
        began = time.perf_counter()
        command = [*base, f"--workdir={folder / name}", *words]
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        return time.perf_counter() - began

    try:
        run("warm", "--config.num_epochs=1")  # makes the dataset
        found = []
        for round_ in range(args.run_rounds):
            apart = sum(
                run(f"{round_}-{i}", f"--config.ensemble.only={i}") for i in range(args.members)
            )
            found.append(run(f"{round_}-all") / apart)
    finally:
        shutil.rmtree(folder)
    shown = ", ".join(f"{value:.3f}" for value in found)
    sys.stdout.write(f"\nwhole run of {args.members} folds against as many runs: {shown}\n")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--num_identities", type=int, default=10_034)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", action="store_true", help="whole runs, too")
    parser.add_argument("--run_rounds", type=int, default=3)
    args = parser.parse_args()
    compare_steps(args)
    if args.runs:
        compare_runs(args)


if __name__ == "__main__":
    main()
