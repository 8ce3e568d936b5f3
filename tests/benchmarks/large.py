"""A classifier of a million identities on one machine: time and peak memory beside a formula.

    python -m tests.benchmarks.large [--num_identities=1000000] [--batch_size=256] [--rate=0.01]
    python -m tests.benchmarks.large --sampled | --paper

An MLP whose last layer is 512 wide trains 20 sampled steps and is saved; is restored and trains 2
steps on all classes; and ranks 2,000 clips. Each is a process of its own. With K class columns, D
units and a batch of B clips in float32, the formulas are, in numbers of 4 bytes:

    sampled   4 K D while the weights are made, then 3 K D for them and the moments of Adam
    full      3 K D, K D for the gradient, and 2 B K for the logits and their gradient
    rank      2 K D for the weights as they are saved and as one member has them, 200 K for the
              ranking, and the scores that wait

and each process needs REST besides, for the libraries and the clips. `--paper` measures nothing: it
prints what other sizes need by these formulas, split over 1, 8 and 64 devices that share the
classes. `--sampled` times the published MLP at 10,035 class columns, in turns: steps on all of
them, and on a tenth.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.benchmarks import common, evaluation
from vidjax import devices
from vidjax.run import checkpoint
from vidjax.steps import class_sharding
from vidjax.steps import state as state_lib
from vidjax.steps.class_sharding import ScoreColumns

WIDTH = 512
CLIPS = 2_000
STEPS, ROUNDS = 5, 5  # of `--sampled`
REST = 800 * common.MIB
SIZES = (10_000, 100_000, 1_000_000)  # identities
DEVICES = (1, 8, 64)
CLIPS_TO_RANK = (1e5, 1e6, 1e7, 1e8)
STAGES = {"sampled": 20, "full": 2, "rank": 0}  # optimiser steps of each


def make_run(args: argparse.Namespace) -> common.Run:
    """Returns the system on made-up clips; its state is that of step 0."""
    rate = args.rate if args.stage == "sampled" else 1.0
    words = (
        f"model.layers=(({WIDTH},'swish',False,0.0),)",
        "loss.schedule=((0.0,0.0),)",
        f"loss.sampled_classes={rate}",
    )
    sizes = {"batch_size": args.batch_size, "num_identities": args.num_identities}
    abstract = args.stage != "sampled"
    spec = "quality_fusion.py:iqiyi_vid"
    return common.make_run(spec, words, num_clips=CLIPS, abstract=abstract, **sizes)


def time_sampled() -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the times of steps on all classes and on a tenth of them."""
    functions = {}
    for name, rate in {"all": 1.0, "a tenth": 0.1}.items():
        spec, overrides, _ = common.NETS["mlp"]
        words = [*overrides, f"loss.sampled_classes={rate}"]
        run = common.make_run(spec, words, batch_size=1024, num_identities=10_034)
        functions[name] = functools.partial(_go_on, make_loop(run), run, [run.state])
    seconds = common.in_turns(functions, ROUNDS)
    rows = [
        [f"step on {name}, ms", f"{1e3 * common.median(seconds[name]) / STEPS:.0f}"]
        for name in functions
    ]
    rows.append(["a tenth is faster by", common.ratio(seconds, "all", "a tenth")])
    return ["classes", "MLP, batch 1024"], rows


def _go_on(loop: Any, run: common.Run, state: list[Any]) -> Any:
    """Trains for STEPS steps, and leaves the new state in a list of one."""
    state[0], outcome = loop(state[0], run.tables, run.clips, np.int32(STEPS))
    return outcome


def make_loop(run: common.Run) -> Any:
    """Returns compiled steps, (state, tables, clips, count) -> (state, outcome)."""
    widths = dict.fromkeys(run.clips, common.DIM)
    return common.make_loop(
        run, class_sharding.find_class_axes(run.system, widths, devices.make_mesh(1))
    )


def train(run: common.Run, state: Any, count: int) -> tuple[Any, float]:
    """Returns the state after some steps, and the seconds of a step."""
    loop = make_loop(run)
    state, outcome = loop(state, run.tables, run.clips, np.int32(1))  # compiles
    jax.block_until_ready(outcome)
    began = time.perf_counter()
    state, outcome = loop(state, run.tables, run.clips, np.int32(count - 1))
    if not np.isfinite(outcome.loss).all():
        raise SystemExit("the loss is not finite")
    return state, (time.perf_counter() - began) / (count - 1)


def load(folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of the checkpoint that the first stage saved."""
    found = checkpoint.find(folder)
    assert found is not None
    return checkpoint.load(found, items, devices.replicated(devices.make_mesh(1)))


def stage(args: argparse.Namespace) -> float:
    """Runs one stage; returns the seconds of a step, or of the ranking."""
    folder = Path(args.folder)
    run = make_run(args)
    if args.stage == "sampled":
        state, seconds = train(run, run.state, STAGES["sampled"])
        checkpoint.save(folder, STAGES["sampled"], state_lib.as_items(state), {"evaluated": True})
        return seconds
    if args.stage == "full":
        items = load(folder, state_lib.as_items(run.state))
        state = run.state.replace(
            params=items["params"], model_state=items["model_state"], **items["train"]
        )
        del items
        return train(run, state, STAGES["full"])[1]
    saved = load(folder, {"params": run.state.params, "model_state": run.state.model_state})
    weights = saved["params"], saved["model_state"]
    model, _ = evaluation.make_model(run, args.num_identities, *weights)
    began = time.perf_counter()
    evaluation.rank(model)
    return time.perf_counter() - began


def formula(args: argparse.Namespace, name: str) -> int:
    """Returns the bytes that a stage should need."""
    count, size = 1 + args.num_identities, args.batch_size
    kernel = 4 * count * WIDTH
    waiting = ScoreColumns(devices.make_mesh(1), count, 0, count)
    scores = 4 * count * min(waiting.max_pending_rows + waiting.max_block_rows, 2 * CLIPS)
    full, rank = 4 * kernel + 8 * size * count, 2 * kernel + 800 * count + scores
    return REST + {"sampled": 4 * kernel, "full": full, "rank": rank}[name]


def paper() -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yields header and rows of what training and ranking need on paper, for each device."""
    batch, rows = 1024, []
    for count in SIZES:
        for share in DEVICES:
            state, kernel = 12 * count * WIDTH / share, 4 * count * WIDTH / share
            logits, work = 8 * batch * count / share, 6 * batch * count * WIDTH / share
            full, few = state + kernel + logits, state + 0.1 * (3 * kernel + kernel + logits)
            numbers = (x / 1e9 for x in (state, full, few))
            flops = (x / 1e12 for x in (work, 0.1 * work))
            rows.append([f"{count:,}", str(share), *map(_short, (*numbers, *flops))])
    header = ["identities", "devices", "state, GB", "step, GB", "sampled .1, GB"]
    yield [*header, "step, TFLOP", "sampled .1, TFLOP"], rows
    rows = []
    for count in SIZES:
        for share in DEVICES:
            numbers = [4 * count * WIDTH / share / 1e9, 800 * count / share / 1e9]
            numbers += [2 * clips * count * WIDTH / share / 1e15 for clips in CLIPS_TO_RANK]
            rows.append([f"{count:,}", str(share), *map(_short, numbers)])
    header = ["identities", "devices", "weights, GB", "lists, GB"]
    yield [*header, *(f"{clips:.0e} clips, PFLOP" for clips in CLIPS_TO_RANK)], rows


def _short(number: float) -> str:
    """Returns a number with two digits."""
    return f"{float(f'{number:.2g}'):,.10g}"


def main() -> None:
    """Prints the tables."""
    sizes = {"num_identities": 1_000_000, "batch_size": 256, "rate": 0.01}
    args = common.parse(__doc__, "--sampled", "--paper", stage="", folder="", **sizes)
    if args.stage:
        seconds = stage(args)
        sys.stdout.write(f"{seconds} {common.peak_bytes()}\n")
        return
    if args.paper or args.sampled:
        for header, rows in paper() if args.paper else [time_sampled()]:
            common.write_table(header, rows)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in STAGES:
            words = [f"--stage={name}", f"--folder={folder}", f"--rate={args.rate}"]
            words += [f"--num_identities={args.num_identities}", f"--batch_size={args.batch_size}"]
            seconds, peak = map(float, common.run_again("large", *words).split()[-2:])
            expected = formula(args, name)
            sizes = (f"{x / 1e9:.2f}" for x in (peak, expected))
            rows.append([name, f"{seconds:.2f}", *sizes, f"{peak / expected:.2f}"])
    common.write_table(["stage", "seconds", "peak GB", "formula GB", "ratio"], rows)


if __name__ == "__main__":
    main()
