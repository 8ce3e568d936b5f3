"""Rate of the training step of configs/mma.py against the matrix products that it cannot avoid.

    python -m tests.benchmarks.training_step [--published] [--batch_size=1024]
        [--num_identities=10034] [--rounds=9]

Made-up float16 x 512 arrays that lie on the device: face and head of 30 real frames on average in
64 places, body of 15 in 32, one audio vector. The bare products are those of the step's own trace,
forward and backward, with the same shapes, dtypes and precision, and nothing between them. The two
are timed in turns in one process, because the machine drifts between runs: the share is the median
of the ratios. One to two minutes on 2 CPU cores.
"""

import argparse
import collections
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from vidjax import config as config_lib
from vidjax import members, steps
from vidjax import mesh as mesh_lib
from vidjax.batch import Array, Batch, Frames
from vidjax.system import Sizes, make_system

CONFIG = Path(__file__).parents[2] / "configs" / "mma.py"
DIM = 512
MOST_FRAMES = {"face": (59, 64), "head": (59, 64), "body": (29, 32), "audio": (1, 1)}  # real, T
SECONDS = 0.25  # the least that is timed at once: a step of an accelerator takes milliseconds
MIB = 1 << 20


def make_batch(rng: np.random.Generator, batch_size: int) -> Batch:
    """Returns B clips, each of 1 to the most real frames of every modality."""

    def frames(longest: int, places: int) -> Frames:
        shape = (batch_size, places)
        lengths = rng.integers(1, longest + 1, batch_size)
        return Frames(
            features=rng.standard_normal((*shape, DIM), np.float32).astype(np.float16),
            quality=rng.uniform(1, 100, shape).astype(np.float32),
            detection=rng.uniform(0.5, 1, shape).astype(np.float32),
            number=np.broadcast_to(np.arange(places, dtype=np.int32), shape),
            mask=np.arange(places) < lengths[:, None],
        )

    return Batch(
        {name: frames(*counts) for name, counts in MOST_FRAMES.items()},
        clip_index=np.arange(batch_size, dtype=np.int32),
        batch_mask=np.ones(batch_size, bool),
    )


class Product(NamedTuple):
    """A matrix product of the step: shapes of both operands, what is contracted, how often."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    flops: int
    equation: Any  # of the trace; bound again to run it alone


def products(jaxpr: Any) -> Iterator[Product]:
    """Yields every matrix product of a trace, those of its inner functions included.

    Raises:
      ValueError: one lies in a loop, where it would count once and run often.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            left, right = (x.aval.shape for x in equation.invars)
            contracted, _ = equation.params["dimension_numbers"]
            inner = math.prod(left[axis] for axis in contracted[0])
            flops = 2 * inner * math.prod(equation.outvars[0].aval.shape)
            yield Product(left, right, contracted, flops, equation)
        for inner_jaxpr in core.jaxprs_in_params(equation.params):
            found = list(products(inner_jaxpr))
            if found and name in ("scan", "while", "cond"):
                raise ValueError(f"a matrix product within '{name}': {found[0][:3]}")
            yield from found


def make_bare(found: list[Product]) -> Callable[[Any], list[Array]]:
    """Returns the products alone, compiled as one function of their operands."""

    def bare(operands: Any) -> list[Array]:
        return [
            p.equation.primitive.bind(*pair, **p.equation.params)
            for p, pair in zip(found, operands, strict=True)
        ]

    return jax.jit(bare)


def make_operands(found: list[Product], rng: Array) -> list[list[Array]]:
    """Returns made-up operands, none of them shared: no product can stand for another."""
    shapes = [x.aval for product in found for x in product.equation.invars]
    keys = jax.random.split(rng, len(shapes))
    arrays = iter(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, shapes, strict=True)]
    )
    return [[next(arrays), next(arrays)] for _ in found]


def seconds_each(function: Callable[[], Any], repeats: int) -> float:
    """Returns the time of one call, over calls that are dispatched one after another."""
    start = time.perf_counter()
    result = None
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def peak_bytes() -> int:
    """Returns the most memory so far: of the device where it counts, else of the process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Prints the products, the rate by round, and the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--num_identities", type=int, default=10_034)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--published", action="store_true", help="the paper to the letter")
    args = parser.parse_args()

    config = config_lib.load_file(f"{CONFIG}:{'published' if args.published else ''}")
    config.batch_size = args.batch_size
    sizes = Sizes(
        modalities=dict.fromkeys(config.modalities, DIM),
        num_identities=args.num_identities,
        num_clusters=None,
        num_clips=args.batch_size,
        total_steps=10_000,
        train_other=True,
    )
    system = make_system(config.to_dict(), sizes)
    mesh = mesh_lib.make_mesh(1)
    step: Any = steps.make_train_step(system, mesh)  # it counts its compilations
    host = np.random.default_rng(0)
    labels = host.integers(0, 1 + args.num_identities, args.batch_size).astype(np.int32)
    mates = (members.Member(),)
    tables = steps.make_tables(mates, np.ones((1, args.batch_size)))
    tables = mesh_lib.replicate(mesh, tables)
    batch = mesh_lib.shard_batch(mesh, make_batch(host, args.batch_size))

    def init() -> steps.TrainState:
        rngs = members.make_rngs(mates, config.seed)
        return steps.init_state(system, sizes.modalities, rngs, jnp.asarray(labels)[None])

    state = jax.jit(init, out_shardings=mesh_lib.replicated(mesh))()
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    found = list(products(jax.make_jaxpr(step)(state, tables, batch).jaxpr))

    def train() -> Array:
        nonlocal state
        state, loss = step(state, tables, batch)
        return loss

    jax.block_until_ready(train())  # compiles
    step_repeats = math.ceil(SECONDS / seconds_each(train, 2))
    peak = peak_bytes()  # before the operands of the bare products lie beside the state

    bare = make_bare(found)
    operands = make_operands(found, jax.random.key(1))
    jax.block_until_ready(bare(operands))
    bare_repeats = math.ceil(SECONDS / seconds_each(lambda: bare(operands), 2))

    out = sys.stdout.write
    out(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {CONFIG.name}")
    out(f"{':published' if args.published else ''}, batch {args.batch_size}, ")
    out(f"{1 + args.num_identities} classes, {num_params:,} parameters\n\n")
    out("matrix products            contracted    times   GFLOP\n")
    total = sum(product.flops for product in found)
    table = collections.Counter(product[:4] for product in found)
    for (left, right, contracted, flops), times in sorted(table.items(), key=lambda x: -x[0][3]):
        shown = f"{list(left)} x {list(right)}"
        out(f"{shown:42} {contracted!s:16} {times:3} {flops * times / 1e9:8.2f}\n")
    out(f"{'together':62} {total / 1e9:8.2f}\n\n")

    out("round   step ms  clips/s   bare ms  bare/step\n")
    step_seconds, ratios = [], []
    bare_seconds = []
    for number in range(args.rounds):
        step_seconds.append(seconds_each(train, step_repeats))
        bare_seconds.append(seconds_each(lambda: bare(operands), bare_repeats))
        ratios.append(bare_seconds[-1] / step_seconds[-1])
        out(f"{number:5} {1e3 * step_seconds[-1]:9.1f} {args.batch_size / step_seconds[-1]:8.0f} ")
        out(f"{1e3 * bare_seconds[-1]:9.1f} {ratios[-1]:10.3f}\n")
    step_time, bare_time = statistics.median(step_seconds), statistics.median(bare_seconds)
    out(f"median{1e3 * step_time:9.1f} {args.batch_size / step_time:8.0f} ")
    out(f"{1e3 * bare_time:9.1f} {statistics.median(ratios):10.3f}\n\n")

    out(f"GFLOP/s: step {total / step_time / 1e9:.0f}, bare {total / bare_time / 1e9:.0f}\n")
    out(f"peak memory of the step: {peak / MIB:.0f} MiB\n")
    compilations = step._cache_size()
    out(f"compilations of the step: {compilations}\n")
    if compilations != 1:
        raise SystemExit(f"the step was compiled {compilations} times instead of once")


if __name__ == "__main__":
    main()
