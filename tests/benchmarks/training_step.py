"""Speed and memory of a training step, compared with only its matrix products.

    python -m tests.benchmarks.training_step [--nets=mlp,residual,mma] [--bfloat16]
        [--batch_size=1024]

The clips stay on the device, and one call takes four steps.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tests.benchmarks import common
from vidjax.core import devices, ensemble
from vidjax.core.batch import Array, Packed
from vidjax.data import resident
from vidjax.training import train_step

STEPS = 4  # of a call
ROUNDS = 5
# Name -> configuration of the published size, and overrides. The residual net is 4096 units wide
# instead of 8192, and trains on one random vector of each clip.
WIDE = "residual_dense.py:iqiyi_vid,face,one", "model.width=4096", "fusion.face.train.num_draws=1"
NETS = {"mlp": ["quality_fusion.py:iqiyi_vid"], "residual": WIDE, "mma": ["mma.py:iqiyi_vid"]}


def make_clips(modalities: Sequence[str], num_clips: int) -> dict[str, Packed]:
    """Returns modality -> random clips. A frame has DIM features in float16."""
    clips = {}
    for seed, name in enumerate(modalities):
        rng = np.random.default_rng(seed)
        length = rng.integers(1, common.MAX_FRAMES[name] + 1, num_clips, np.int32)
        count = 1 + length.sum()
        features = rng.standard_normal((count, common.DIM), np.float32).astype(np.float16)
        features[-1] = 0  # for padding
        quality, detection = rng.uniform([[1], [0.5]], [[99], [1]], (2, count)).astype(np.float32)
        start = np.cumsum(length, dtype=np.int32) - length
        number = np.arange(count, dtype=np.int32)
        clips[name] = Packed(features, quality, detection, number, start, length)
    return clips


def find_products(jaxpr: Any, in_loop: bool = False) -> Iterator[Any]:
    """Yields the equations of all matrix products in a jaxpr. A product in a loop is an error."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            if in_loop:
                raise ValueError("a loop has a matrix product")
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from find_products(inner, in_loop or name in ("scan", "while", "cond"))


def count_flops(product: Any) -> int:
    shape, contracted = product.invars[0].aval.shape, product.params["dimension_numbers"][0][0]
    terms = math.prod(shape[axis] for axis in contracted)
    return 2 * terms * math.prod(product.outvars[0].aval.shape)


def make_products_program(products: Sequence[Any], count: int) -> Callable[[], Array]:
    """Returns a compiled program that computes products of random matrices, `count` times."""
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(products)))
    draw = lambda x: jax.random.normal(next(keys), x.aval.shape, x.aval.dtype)  # noqa: E731
    # Equal operands would let the compiler join products.
    operands = [[*map(draw, product.invars)] for product in products]

    @jax.jit
    def run(operands: Any) -> Array:
        def compute(_: Array, total: Array) -> Array:
            # The barriers keep the compiler from moving products out of the loop, and from
            # computing only the element that is read.
            pairs = jax.lax.optimization_barrier((operands, total))[0]
            results = [
                product.primitive.bind(*pair, **product.params)
                for product, pair in zip(products, pairs, strict=True)
            ]
            results = jax.lax.optimization_barrier(results)
            return total + sum(jnp.ravel(x)[0].astype(jnp.float32) for x in results)

        return jax.lax.fori_loop(0, count, compute, jnp.float32(0))

    return lambda: run(operands)


def time_functions(**functions: Callable[[], Any]) -> dict[str, list[float]]:
    """Returns name -> seconds in each round. The functions take turns."""

    def measure(function: Callable[[], Any], _: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    timed = {name: partial(measure, function) for name, function in functions.items()}
    rounds = common.alternate(timed, 1 + ROUNDS)
    return {name: seconds[1:] for name, seconds in rounds.items()}  # the first round compiles


def benchmark(name: str, args: argparse.Namespace) -> list[Any]:
    spec, *words = NETS[name]
    words += [f"dtype={'bfloat16' if args.bfloat16 else 'float32'}", "data.distractors=other"]
    num_clips, mesh = 4 * args.batch_size, devices.make_mesh(1)
    words.append(f"batch_size={args.batch_size}")
    plan = common.make_plan(spec, *words, num_clips=num_clips)
    labels = np.random.default_rng(1).integers(0, 1 + common.IDENTITIES, (1, num_clips))
    rngs = ensemble.make_rngs(plan.members, plan.config.seed)
    init = partial(train_step.init_state, plan.system, rngs, jnp.asarray(labels, jnp.int32))
    state = train_step.make_state(init, plan.system.tx, mesh)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    constants, clips, drawn = devices.replicate(mesh, (
        train_step.make_member_constants(plan.members, np.ones((1, num_clips))),
        make_clips(plan.config.modalities, num_clips), resident.draw_steps(plan.batches, 0, STEPS),
    ))  # fmt: skip
    loop: Any = train_step.make_train_loop(plan.system, mesh, plan.batches)

    def take_step(state: Any, clips: Any) -> Any:
        rows = jax.tree.map(lambda rows: rows[state.step], drawn)
        batch = resident.gather_batch(clips, *rows, sizes=plan.batches.padded_lengths.items())
        return train_step.train_step(plan.system, state, constants, batch)

    products = list(find_products(jax.make_jaxpr(take_step)(state, clips).jaxpr))

    def train() -> Any:
        nonlocal state
        state, result = loop(state, constants, (clips, drawn), np.int32(STEPS))
        return result

    jax.block_until_ready(train())
    peak = common.peak_bytes()  # without the operands of `bare`
    seconds = time_functions(step=train, bare=make_products_program(products, STEPS))
    step = median(seconds["step"]) / STEPS
    if loop._cache_size() != 1:
        raise SystemExit(f"the loop was compiled {loop._cache_size()} times instead of once")
    ratios = [bare / whole for bare, whole in zip(seconds["bare"], seconds["step"], strict=True)]
    gflops = sum(map(count_flops, products)) / step / 1e9
    cells = [name, f"{num_params:,}", f"{args.batch_size / step:,.0f}", f"{gflops:,.0f}"]
    ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return [*cells, ratio, f"{peak / 2**20:,.0f}"]


if __name__ == "__main__":
    args = common.parse(__doc__, "--bfloat16", nets=",".join(NETS), batch_size=1024)
    header = ["net", "parameters", "clips/s", "GFLOP/s", "bare products / step", "peak MiB so far"]
    common.print_table(header, [benchmark(name, args) for name in args.nets.split(",")])
