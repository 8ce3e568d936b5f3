"""Speed and memory of a training step, compared with its matrix products and with PyTorch.

    python -m tests.benchmarks.training_step [--nets=mlp,residual,mma] [--peer] [--bfloat16]
        [--batch_size=1024]

The clips stay on the device, and one call takes four steps. With `--peer`, the same nets are
trained in PyTorch (the extra `bench`) on a padded batch in memory.
"""

# pyright: reportMissingImports=false

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tests.benchmarks import common
from vidjax.core.batch import Array
from vidjax.training import train_step

STEPS = common.MAX_STEPS  # of a call
# Name -> configuration of the published size, and overrides. The residual net is 4096 units wide
# instead of 8192, and trains on one random vector of each clip.
WIDE = "residual_dense.py:iqiyi_vid,face,one", "model.width=4096", "fusion.face.train.num_draws=1"
NETS = {"mlp": ["quality_fusion.py:iqiyi_vid"], "residual": WIDE, "mma": ["mma.py:iqiyi_vid"]}


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


def make_torch_steps(name: str, run: Any, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Returns two functions, `eager` and `compiled`, which take STEPS training steps in PyTorch."""
    import torch

    from tests.benchmarks import peer

    batch = run.gather(run.clips, 0)
    num_classes = 1 + common.IDENTITIES
    labels = np.random.default_rng(1).integers(0, num_classes, len(batch.clip_index))
    torch_batch = common.make_torch_batch(batch.frames, labels)
    torch.backends.cuda.matmul.allow_tf32 = True  # the default of JAX on a GPU

    functions = {}
    for kind in ("eager", "compiled"):
        recipe = peer.make_recipe(name, num_classes)
        step = peer.Step(recipe, compiled=kind == "compiled", bfloat16=args.bfloat16)
        functions[kind] = lambda step=step: [step(torch_batch) for _ in range(STEPS)][-1].item()
    return functions


def benchmark(name: str, args: argparse.Namespace) -> list[Any]:
    spec = (*NETS[name], f"dtype={'bfloat16' if args.bfloat16 else 'float32'}")
    run = common.make_run(*spec, batch_size=args.batch_size, num_clips=4 * args.batch_size)
    loop, state = run.loop, run.state
    num_params = sum(x.size for x in jax.tree.leaves(state.params))

    def take_step(state: Any, clips: Any) -> Any:
        batch = run.gather(clips, state.step)
        return train_step.train_step(run.system, state, run.constants, batch)

    products = list(find_products(jax.make_jaxpr(take_step)(state, run.clips).jaxpr))

    def train() -> Any:
        nonlocal state
        state, result = loop(state, run.constants, (run.clips, run.drawn), np.int32(STEPS))
        return result

    jax.block_until_ready(train())
    peak = common.peak_bytes()  # without the operands of `bare`
    functions = {"step": train, "bare": make_products_program(products, STEPS)}
    functions |= make_torch_steps(name, run, args) if args.peer else {}
    seconds = common.time_functions(functions)
    step = common.median(seconds["step"]) / STEPS
    if loop._cache_size() != 1:
        raise SystemExit(f"the loop was compiled {loop._cache_size()} times instead of once")
    gflops = sum(map(count_flops, products)) / step / 1e9
    cells = [name, f"{num_params:,}", f"{args.batch_size / step:,.0f}", f"{gflops:,.0f}"]
    cells += [common.format_ratio(seconds, "bare", "step"), f"{peak / 2**20:,.0f}"]
    kinds = ("eager", "compiled") if args.peer else ()
    return cells + [common.format_ratio(seconds, kind, "step") for kind in kinds]


if __name__ == "__main__":
    args = common.parse(__doc__, "--peer", "--bfloat16", nets=",".join(NETS), batch_size=1024)
    header = ["net", "parameters", "clips/s", "GFLOP/s", "bare products / step", "peak MiB so far"]
    header += ["faster than eager", "than torch.compile"] if args.peer else []
    common.print_table(header, [benchmark(name, args) for name in args.nets.split(",")])
