"""Rate of an evaluation: forward pass over all clips and the exact top 100 of every identity.

    python -m tests.benchmarks.evaluation [--clips=60000] [--num_identities=10034]
        [--peer] [--rounds=3] [--published]

The net is the MLP of `configs/quality_fusion.py`, the clips are made up, and on the device:

    whole              `vidjax.evaluation.scoring.score`, with MAP and the open-set figures
    forward            only the net, on the same blocks of clips
    top 100            the difference: whole without forward
    eager, compiled    with `--peer`, the same net and ranking in PyTorch (the extra `bench`), on
                       padded blocks in memory

All take turns in one process. `--published` instead times the nets of the two publications that
report a time of their test. `--clips` should be many times `--block_size`, because the last block
of each length is filled up.
"""

# pyright: reportMissingImports=false

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import common
from vidjax.core import devices, ensemble
from vidjax.core.batch import Batch
from vidjax.data import resident
from vidjax.data.clips import BUCKETS, EvalPlan, Split, make_eval_plan, split_blocks
from vidjax.evaluation import eval_step as eval_step_lib
from vidjax.evaluation import scoring
from vidjax.evaluation.scoring import TrainedModel

TESTED = 80_000  # clips of the official test
TESTS = {  # test with a published time -> one of its nets, and their number
    "R31: merged frames": ("residual_dense.py:published,iqiyi_vid,face,one", 3),
    "Q11: a fused face": ("quality_fusion.py:published,iqiyi_vid", 1),
    "Q11: every face": ("quality_fusion.py:published,voting,iqiyi_vid", 1),
}
PEER_CLIPS = 8192  # that PyTorch ranks: all padded clips would not fit into memory


class MadeUp:
    """Resident clips as evaluation sees a dataset."""

    def __init__(self, run: common.Run, num_identities: int):
        self.run, num_clips = run, run.plan.num_clips
        labels = np.random.default_rng(2).integers(0, 1 + num_identities, num_clips)
        self.identities = tuple(str(i) for i in range(num_identities))
        self._split = Split(
            name="val", clips=tuple(f"clip_{i:07d}" for i in range(num_clips)),
            labels=labels.astype(np.int32), labelled=True, num_others=0,
            positives=np.bincount(labels, minlength=1 + num_identities)[1:],
            lengths={name: np.asarray(packed.length) for name, packed in run.clips.items()},
        )  # fmt: skip
        self.plan = make_eval_plan(self._split, tuple(run.clips))
        self._gathered = jax.jit(resident.gather_modalities, static_argnames="sizes")

    def split(self, name: str) -> Split:
        del name
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        for bucket, chosen in split_blocks(plan.bucket, rows):
            clip_index = jnp.asarray(np.pad(chosen, (0, rows - len(chosen))), jnp.int32)
            batch_mask = jnp.asarray(np.arange(rows) < len(chosen))
            clips = self.run.clips
            sizes = tuple(min(BUCKETS[bucket], common.PLACES[name]) for name in clips)
            laid = self._gathered(list(clips.values()), clip_index, batch_mask, sizes=sizes)
            frames = dict(zip(clips, laid, strict=True))
            yield Batch(frames, clip_index, batch_mask)


def make_functions(
    spec: str, args: argparse.Namespace
) -> tuple[dict[str, Callable[[], Any]], common.Run]:
    """Returns the whole and the forward pass of a net as functions, and its clips."""
    sizes: Any = {"num_identities": args.num_identities, "num_clips": args.clips}
    run = common.make_run(spec, batch_size=256, **sizes)
    weights, mesh = (run.state.params, run.state.model_state), devices.make_mesh(1)
    data = MadeUp(run, args.num_identities)
    sets = ensemble.TrainingSets((ensemble.Member(),), ("another",), np.ones((1, 1), bool))
    step = eval_step_lib.make_eval_step(run.system, mesh)
    model = TrainedModel("", run.system, step, *weights, sets, data)
    params, model_state = ensemble.take(weights, 0)

    def whole() -> dict[str, Any]:
        return scoring.score([model], "val", mesh, block_size=args.block_size).results

    def forward() -> None:
        block = None
        for batch in data.eval_batches(data.plan, rows=args.block_size):
            block = step(params, model_state, jnp.int32(-1), batch)
        jax.block_until_ready(block)

    return {"whole": whole, "forward": forward}, run


def make_peers(args: argparse.Namespace, run: common.Run) -> dict[str, Callable[[], Any]]:
    from tests.benchmarks import peer

    blocks = []
    for at in range(0, PEER_CLIPS, 1024):
        clip_index, mask = jnp.arange(at, at + 1024, dtype=jnp.int32), jnp.ones(1024, bool)
        frames = {
            name: resident.gather_frames(packed, clip_index, mask, common.PLACES[name])
            for name, packed in run.clips.items()
        }
        blocks.append(peer.make_batch(common.for_torch(frames), np.zeros(1024, np.int64)))
    recipe = peer.make_recipe("mlp", 1 + args.num_identities)
    eager, compiled = (peer.make_scorer(recipe, compile=compile) for compile in (False, True))
    return {
        "eager": lambda: peer.rank(eager, blocks)[1].cpu(),
        "compiled": lambda: peer.rank(compiled, blocks)[1].cpu(),
    }


def benchmark(args: argparse.Namespace) -> None:
    functions, run = make_functions("quality_fusion.py:iqiyi_vid", args)
    peers = make_peers(args, run) if args.peer else {}
    seconds = {}  # a clip
    for name, values in common.in_turns(functions | peers, args.rounds).items():
        count = PEER_CLIPS if name in peers else args.clips
        seconds[name] = [x / count for x in values]
    pairs = zip(seconds["whole"], seconds["forward"], strict=True)
    seconds["top 100"] = [whole - forward for whole, forward in pairs]
    rows = [[name, f"{1 / common.median(x):,.0f}"] for name, x in seconds.items()]
    common.write_table(["", "clips/s"], rows)
    ratios = [("top 100", "forward"), *((name, "whole") for name in peers)]
    rows = [[f"{one} / {other}", common.ratio(seconds, one, other)] for one, other in ratios]
    common.write_table(["", "ratio"], rows)


def time_tests(args: argparse.Namespace) -> None:
    """Writes how long the published nets take for the official test, from a sample of it."""
    functions = {name: make_functions(spec, args)[0]["whole"] for name, (spec, _) in TESTS.items()}
    minutes, rows = {}, []
    for name, seconds in common.in_turns(functions, args.rounds).items():
        nets = TESTS[name][1]
        minutes[name] = [x * nets / args.clips * TESTED / 60 for x in seconds]
        rows.append([name, str(nets), f"{common.median(minutes[name]):,.1f}"])
    common.write_table(["", "nets", f"minutes for {TESTED:,} clips"], rows)
    _, fused, every = TESTS
    common.write_table(["", "ratio"], [[f"{every} / fused", common.ratio(minutes, every, fused)]])


def main() -> None:
    sizes: Any = {"clips": 60_000, "num_identities": 10_034, "block_size": 256, "rounds": 3}
    args = common.parse(__doc__, "--peer", "--published", **sizes)
    told = f"{args.clips:,} clips, {args.num_identities:,} identities"
    common.say(f"{common.describe()}, {told}\n")
    (time_tests if args.published else benchmark)(args)


if __name__ == "__main__":
    main()
