"""Rate at which resident clips become batches: drawn by index, read when they are fused.

    python -m tests.benchmarks.resident [--batch_size=1024] [--clips=8192] [--rounds=5]

Made-up clips of 30 faces and heads, 15 bodies and an audio vector, filled on the device. Every
number of a batch is read, and summed up. Beside the batches that training draws stand whole clips,
padded.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.benchmarks import common
from vidjax import fusion
from vidjax.data import resident

BATCHES = 16  # a call


def main() -> None:
    """Prints the table."""
    args = common.parse(__doc__, batch_size=1024, clips=8192, rounds=5)
    sizes = {"batch_size": args.batch_size, "num_identities": 10, "num_clips": args.clips}

    def make(spec: str, padded: bool = False) -> Callable[[], Any]:
        run = common.make_run(spec, **sizes)
        fuse = {name: lambda rng, x: x for name in run.clips} if padded else run.system.fuse_train

        @jax.jit
        def read(clips: Any) -> Any:
            def add(step: Any, total: Any) -> Any:
                batch = resident.draw_batch(clips, run.plan, step)
                for name, fn in fuse.items():
                    one = fn(jax.random.fold_in(jax.random.key(1), step), batch.frames[name])
                    total += jnp.sum(fusion.read(one.features).astype(jnp.float32))
                return total

            return jax.lax.fori_loop(0, BATCHES, add, jnp.float32(0))

        return lambda: read(run.clips)

    functions = {
        "quality_fusion.py: 1 to 5 faces, fused": make("quality_fusion.py:iqiyi_vid"),
        "mma.py: all four modalities, fused": make("mma.py:iqiyi_vid"),
        "whole padded clips of one modality": make("quality_fusion.py:iqiyi_vid", padded=True),
    }
    seconds = common.in_turns(functions, args.rounds)
    rows = [
        [name, f"{BATCHES * args.batch_size / common.median(values):,.0f}"]
        for name, values in seconds.items()
    ]
    sys.stdout.write(f"{common.describe()}, batch {args.batch_size}\n\n")
    common.write_table(["batches of", "clips/s"], rows)


if __name__ == "__main__":
    main()
