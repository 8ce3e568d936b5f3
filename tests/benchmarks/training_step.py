"""Rate of the training step against its bare matrix products, the memory, and PyTorch.

    python -m tests.benchmarks.training_step [--nets=mlp,residual,mma] [--peer] [--bfloat16]
        [--batch_size=1024] [--num_identities=10034] [--rounds=5]

The nets of `configs/` have their published size, but the residual net is 4096 wide with one draw a
clip. A step is a step of training on resident clips; four steps are one dispatch. The bare products
are the products of the step's trace and nothing between them. With `--peer`, the same nets in
PyTorch (the extra `bench`), eager and by torch.compile, train on padded batches in memory. All take
turns in one process, because machines drift: the ratios are medians over rounds.
"""

# pyright: reportMissingImports=false

import argparse
from typing import Any

import jax
import numpy as np

from tests.benchmarks import common
from vidjax.data import resident
from vidjax.training import train_step

STEPS = 4  # a dispatch


def make_peers(name: str, run: common.Run, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tests.benchmarks import peer

    batch = resident.draw_batch(run.clips, run.plan, np.zeros((), np.int32))
    classes = 1 + args.num_identities
    labels = np.random.default_rng(1).integers(0, classes, len(batch.clip_index))
    clips = peer.make_batch(common.for_torch(batch.frames), labels)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    eager, compiled = (
        peer.Step(peer.make_recipe(name, classes), compile=compile, dtype=dtype)
        for compile in (False, True)
    )
    torch.backends.cuda.matmul.allow_tf32 = True  # as XLA's default on a GPU

    def train(step: Any) -> float:
        return [step(clips) for _ in range(STEPS)][-1].item()

    return {"eager": lambda: train(eager), "compiled": lambda: train(compiled)}


def benchmark(name: str, args: argparse.Namespace) -> list[Any]:
    spec, overrides = common.NETS[name]
    words = [*overrides, f"dtype={'bfloat16' if args.bfloat16 else 'float32'}"]
    sizes: Any = {"batch_size": args.batch_size, "num_identities": args.num_identities}
    run = common.make_run(spec, words, **sizes)
    loop, state = common.make_loop(run), run.state

    def one_step(state: Any, clips: Any) -> Any:
        batch = resident.draw_batch(clips, run.plan, state.step)
        return train_step.train_step(run.system, state, run.constants, batch)

    found = list(common.products(jax.make_jaxpr(one_step)(state, run.clips).jaxpr))

    def train() -> Any:
        nonlocal state
        state, outcome = loop(state, run.constants, run.clips, np.int32(STEPS))
        return outcome

    jax.block_until_ready(train())
    peak = common.peak_bytes()  # before the operands of the bare products are made
    functions = {"step": train, "bare": common.make_bare(found, STEPS)}
    functions |= make_peers(name, run, args) if args.peer else {}
    seconds = common.in_turns(functions, args.rounds)
    seconds = {name: [x / STEPS for x in values] for name, values in seconds.items()}
    step, flops = common.median(seconds["step"]), sum(map(common.flops, found))
    if loop._cache_size() != 1:
        raise SystemExit(f"the steps were compiled {loop._cache_size()} times instead of once")
    return [
        name, f"{run.num_params:,}", f"{args.batch_size / step:,.0f}",
        f"{flops / step / 1e9:,.0f}", common.ratio(seconds, "bare", "step"),
        f"{peak / common.MIB:,.0f}",
        *(common.ratio(seconds, kind, "step") for kind in ("eager", "compiled") if args.peer),
    ]  # fmt: skip


def main() -> None:
    sizes: Any = {"batch_size": 1024, "num_identities": 10_034, "rounds": 5}
    args = common.parse(__doc__, "--peer", "--bfloat16", nets=",".join(common.NETS), **sizes)
    classes = 1 + args.num_identities
    common.say(f"{common.describe()}, batch {args.batch_size}, {classes} classes\n")
    rows = [benchmark(name, args) for name in args.nets.split(",")]
    header = ["net", "parameters", "clips/s", "GFLOP/s", "bare products / step", "peak MiB so far"]
    header += ["faster than eager", "than torch.compile"] if args.peer else []
    common.write_table(header, rows)


if __name__ == "__main__":
    main()
