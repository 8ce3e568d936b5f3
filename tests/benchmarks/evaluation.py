"""Speed of an evaluation, which scores all clips and ranks the best 100 clips of each identity.

    python -m tests.benchmarks.evaluation [--clips=60000] [--block_size=256] [--peer] [--published]

The net is the MLP of `configs/quality_fusion.py`. The clips are random, and stay on the device:

    whole              `vidjax.evaluation.scores.score`, with MAP and the open-set figures
    forward            only the scores of the net
    top 100            the difference: whole without forward
    eager, compiled    with `--peer`, the same net and ranking in PyTorch (the extra `bench`)

`--published` instead measures the tests for which a publication reports a time. Use many more clips
than `--block_size`, because the last block of clips of similar length has much padding.
"""

# pyright: reportMissingImports=false

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import common
from vidjax.core import devices, ensemble
from vidjax.data import resident
from vidjax.data.clips import Split, make_eval_plan
from vidjax.evaluation import eval_step, scores, scoring

TEST_CLIPS = 80_000  # of the official files
# Name of a test -> configuration of a net, and number of nets of the publication.
TESTS = {
    "R31: merged frames": ("residual_dense.py:published,iqiyi_vid,face,one", 3),
    "Q11: a fused face": ("quality_fusion.py:published,iqiyi_vid", 1),
    "Q11: every face": ("quality_fusion.py:published,voting,iqiyi_vid", 1),
}
PEER_CLIPS = 8192  # clips for PyTorch, because all padded clips would not fit into memory
PEER_BLOCK = 1024


class RandomClips(resident.Resident):
    """A source of clips for the evaluation: the random clips of a run, as the split `val`."""

    def __init__(self, run: Any):
        num_clips = run.plan.num_clips
        labels = np.random.default_rng(2).integers(0, 1 + common.IDENTITIES, num_clips)
        self.identities = tuple(str(i) for i in range(common.IDENTITIES))
        split = Split(
            name="val", clips=tuple(f"clip_{i:07d}" for i in range(num_clips)),
            labels=labels.astype(np.int32), labelled=True, num_others=0,
            positives=np.bincount(labels, minlength=1 + common.IDENTITIES)[1:],
            lengths={name: np.asarray(packed.length) for name, packed in run.clips.items()},
        )  # fmt: skip
        self._data: Any = SimpleNamespace(split=lambda _: split)
        self._mesh, self._eval = devices.make_mesh(1), {"val": run.clips}
        self._gather = jax.jit(partial(resident.gather_batch, lazy=False), static_argnames="sizes")


def make_functions(spec: str, args: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], Any]:
    """Returns two functions, `whole` and `forward`, which evaluate a net, and the net's run."""
    run = common.make_run(spec, batch_size=256, num_clips=args.clips)
    weights, mesh = (run.state.params, run.state.model_state), devices.make_mesh(1)
    data = RandomClips(run)
    # The clips are not the training clips of the only member.
    sets = ensemble.TrainingSets((ensemble.Member(),), ("train",), np.ones((1, 1), bool))
    step = eval_step.make_eval_step(run.system, mesh)
    model = scoring.TrainedModel("", run.system, step, *weights, sets, data, mesh, args.block_size)
    params, model_state = ensemble.take(weights, 0)
    plan = make_eval_plan(data.split("val"), tuple(run.clips))

    def score() -> None:
        scores = None
        for batch in data.eval_batches(plan, rows=args.block_size):
            scores = step(params, model_state, jnp.int32(-1), batch)
        jax.block_until_ready(scores)

    rank = partial(scores.score, model, "val")
    return {"whole": lambda: rank().results, "forward": score}, run


def make_torch_functions(run: Any) -> dict[str, Callable[[], Any]]:
    """Returns functions that rank PEER_CLIPS clips in PyTorch: `eager` and `compiled`."""
    from tests.benchmarks import peer

    blocks, mask = [], jnp.ones(PEER_BLOCK, bool)
    for start in range(0, PEER_CLIPS, PEER_BLOCK):
        clip_index = jnp.arange(start, start + PEER_BLOCK, dtype=jnp.int32)
        frames = {
            name: resident.gather_frames(packed, clip_index, mask, common.PADDED_FRAMES[name])
            for name, packed in run.clips.items()
        }
        blocks.append(common.make_torch_batch(frames, np.zeros(PEER_BLOCK, np.int64)))
    recipe = peer.make_recipe("mlp", 1 + common.IDENTITIES)
    recipe.net.eval()
    scorers = {x: peer.make_scorer(recipe, compiled=x == "compiled") for x in ("eager", "compiled")}
    return {k: lambda scorer=x: peer.rank(scorer, blocks)[1].cpu() for k, x in scorers.items()}


def measure_evaluation(args: argparse.Namespace) -> None:
    functions, run = make_functions("quality_fusion.py:iqiyi_vid", args)
    torch_functions = make_torch_functions(run) if args.peer else {}
    seconds = {}  # per clip
    for name, times in common.time_functions(functions | torch_functions).items():
        num_clips = PEER_CLIPS if name in torch_functions else args.clips
        seconds[name] = [x / num_clips for x in times]
    pairs = zip(seconds["whole"], seconds["forward"], strict=True)
    seconds["top 100"] = [whole - forward for whole, forward in pairs]
    rows = [[name, f"{1 / common.median(times):,.0f}"] for name, times in seconds.items()]
    common.print_table(["", "clips/s"], rows)
    ratios = [("top 100", "forward"), *((name, "whole") for name in torch_functions)]
    rows = [[f"{a} / {b}", common.format_ratio(seconds, a, b)] for a, b in ratios]
    common.print_table(["", "ratio"], rows)


def measure_published_tests(args: argparse.Namespace) -> None:
    """Prints the minutes of each test of TESTS, estimated from the time of fewer clips."""
    functions = {name: make_functions(spec, args)[0]["whole"] for name, (spec, _) in TESTS.items()}
    minutes, rows = {}, []
    for name, seconds in common.time_functions(functions).items():
        num_nets = TESTS[name][1]
        minutes[name] = [x * num_nets / args.clips * TEST_CLIPS / 60 for x in seconds]
        rows.append([name, num_nets, f"{common.median(minutes[name]):,.1f}"])
    common.print_table(["", "nets", f"minutes for {TEST_CLIPS:,} clips"], rows)
    _, fused, every = TESTS
    ratio = common.format_ratio(minutes, every, fused)
    common.print_table(["", "ratio"], [[f"{every} / fused", ratio]])


if __name__ == "__main__":
    args = common.parse(__doc__, "--peer", "--published", clips=60_000, block_size=256)
    (measure_published_tests if args.published else measure_evaluation)(args)
