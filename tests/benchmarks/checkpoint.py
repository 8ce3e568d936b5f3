"""What digests cost: seconds of saving and restoring a checkpoint with and without them.

    python -m tests.benchmarks.checkpoint [--megabytes=400] [--rounds=5] [--folder=DIR]

DIR lies on the disk to measure. The arrays are parameters and both moments of Adam; wanted is at
most 5 % of the time of a save, or 1 s per GB.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from tests.benchmarks import common
from vidjax import devices
from vidjax.run import checkpoint


def make_items(num_bytes: float) -> dict[str, Any]:
    """Returns trees of about so many bytes in all, as a run saves them."""
    rows = max(1, int(num_bytes / 3 / 4 / 2 / 1024))

    def arrays(seed: int) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(seed), 2)
        return {name: jax.random.normal(keys[i], (rows, 1024)) for i, name in enumerate("ab")}

    moments = {"mu": arrays(1), "nu": arrays(2)}
    return {"params": arrays(0), "train": {"opt_state": moments, "step": jnp.int32(7)}}


class Timed(NamedTuple):
    """Seconds of one call, and those in which its thread had a core."""

    wall: float
    cpu: float


def timed(function: Callable[[], Any]) -> Timed:
    """Returns the times of one call."""
    wall, cpu = time.perf_counter(), time.thread_time()
    jax.block_until_ready(function())
    return Timed(time.perf_counter() - wall, time.thread_time() - cpu)


def main() -> None:
    """Prints a table of medians over rounds in which each is done in turn."""
    args = common.parse(__doc__, megabytes=400.0, rounds=5, folder="")
    items = jax.block_until_ready(make_items(args.megabytes * 1e6))
    everywhere = devices.replicated(devices.make_mesh(1))
    names = ("Orbax alone saves", "save", "digests", "find", "Orbax loads")
    found: dict[str, list[Timed]] = {name: [] for name in names}
    size = 0
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=args.folder or None) as name:
            folder = Path(name)
            bare = str(folder / "bare")
            found[names[0]].append(timed(lambda p=bare: ocp.save_checkpointables(p, items)))
            shutil.rmtree(bare)
            found[names[1]].append(timed(lambda p=folder: checkpoint.save(p, 7, items, {})))
            one = folder / "checkpoints" / "7"
            size = sum(p.stat().st_size for p in one.rglob("*") if p.is_file())
            found[names[2]].append(timed(lambda p=one: checkpoint.verify(p)))
            found[names[3]].append(timed(lambda p=folder: checkpoint.find(p)))
            step = checkpoint.find(folder)
            assert step is not None
            found[names[4]].append(timed(lambda s=step: checkpoint.load(s, items, everywhere)))
    sys.stdout.write(f"{common.describe()}, {size / 1e9:.2f} GB on the disk\n\n")
    of_save = common.median([one.wall for one in found["Orbax alone saves"]])
    rows = []
    for name, times in found.items():
        wall = common.median([one.wall for one in times])
        cpu = common.median([one.cpu for one in times])
        per_gb = (f"{x / size * 1e9:.2f}" for x in (wall, cpu))
        rows.append((name, f"{wall:.3f}", *per_gb, f"{wall / of_save:.2f}"))
    header = ("part", "seconds", "s per GB", "the same of one core", "share of Orbax's save")
    common.write_table(header, rows)


if __name__ == "__main__":
    main()
