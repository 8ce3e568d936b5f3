"""Rate of an evaluation: forward pass over all clips and the exact top 100 of every identity.

    python -m tests.benchmarks.evaluation [--net=mlp] [--clips=60000] [--num_identities=10034]
        [--peer] [--rounds=3] [--published]

The whole is `vidjax.evaluation.scoring.score` of made-up resident clips, with MAP and the open-set
figures; the forward pass has the same blocks without a ranking. With `--peer` the same net in
PyTorch (the extra `bench`), eager and by torch.compile, ranks padded blocks in memory with
`torch.topk`. All take turns in one process. `--published` times the nets of the two publications
that report a time of their test, at the official number of identities. `--clips` should be many
times `--block_size`, since the last block of each length is filled up.
"""

# pyright: reportMissingImports=false

import argparse
import sys
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
        """Takes a run's clips as a split."""
        self.run, num_clips = run, run.plan.num_clips
        labels = np.random.default_rng(2).integers(0, 1 + num_identities, num_clips)
        self.identities = tuple(str(i) for i in range(num_identities))
        self._split = Split(
            name="val",
            clips=tuple(f"clip_{i:07d}" for i in range(num_clips)),
            labels=labels.astype(np.int32),
            labelled=True,
            positives=np.bincount(labels, minlength=1 + num_identities)[1:],
            num_others=0,
            lengths={name: np.asarray(packed.length) for name, packed in run.clips.items()},
        )
        self.plan = make_eval_plan(self._split, tuple(run.clips))
        self._gathered = jax.jit(resident.gather_modalities, static_argnames="sizes")

    def split(self, name: str) -> Split:
        """Returns the one split."""
        del name
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields all clips, in blocks of one bucket."""
        for bucket, chosen in split_blocks(plan.bucket, rows):
            clip_index = jnp.asarray(np.pad(chosen, (0, rows - len(chosen))), jnp.int32)
            batch_mask = jnp.asarray(np.arange(rows) < len(chosen))
            clips = self.run.clips
            sizes = tuple(min(BUCKETS[bucket], common.PLACES[name]) for name in clips)
            laid = self._gathered(list(clips.values()), clip_index, batch_mask, sizes=sizes)
            frames = dict(zip(clips, laid, strict=True))
            yield Batch(frames, clip_index, batch_mask)


def make_model(
    run: common.Run, num_identities: int, params: Any, model_state: Any
) -> tuple[TrainedModel, MadeUp]:
    """Returns a model with these weights that ranks a run's clips, and the clips."""
    data, mesh = MadeUp(run, num_identities), devices.make_mesh(1)
    sets = ensemble.TrainingSets((ensemble.Member(),), ("another",), np.ones((1, 1), bool))
    step = eval_step_lib.make_eval_step(run.system, mesh)
    return TrainedModel("", run.system, step, params, model_state, sets, data), data


def rank(model: TrainedModel, block_size: int) -> dict[str, Any]:
    """Returns the results of an evaluation."""
    return scoring.score([model], "val", devices.make_mesh(1), block_size=block_size).results


def make_functions(args: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], common.Run]:
    """Returns the whole and the forward pass, as functions."""
    spec, overrides, _ = common.NETS.get(args.net, (args.net, (), {}))
    sizes = {"num_identities": args.num_identities, "num_clips": args.clips}
    run = common.make_run(spec, overrides, batch_size=256, **sizes)
    weights = run.state.params, run.state.model_state
    model, data = make_model(run, args.num_identities, *weights)
    params, model_state = ensemble.take(weights, 0)

    def forward() -> None:
        block = None
        for batch in data.eval_batches(data.plan, rows=args.block_size):
            block = model.eval_step(params, model_state, jnp.int32(-1), batch)
        jax.block_until_ready(block)

    return {"whole": lambda: rank(model, args.block_size), "forward": forward}, run


def make_peers(args: argparse.Namespace, run: common.Run) -> dict[str, Callable[[], Any]]:
    """Returns the rankings of PyTorch, eager and compiled."""
    from tests.benchmarks import peer

    blocks = []
    for at in range(0, PEER_CLIPS, 1024):
        clip_index, mask = jnp.arange(at, at + 1024, dtype=jnp.int32), jnp.ones(1024, bool)
        frames = {
            name: resident.gather_frames(packed, clip_index, mask, common.PLACES[name])
            for name, packed in run.clips.items()
        }
        blocks.append(peer.make_batch(common.for_torch(frames), np.zeros(1024, np.int64)))
    net = common.NETS[args.net]
    recipe = peer.make_recipe(args.net, num_classes=1 + args.num_identities, **net[2])
    eager, compiled = (peer.make_scorer(recipe, compile=compile) for compile in (False, True))
    return {
        "eager": lambda: peer.rank(eager, blocks),
        "compiled": lambda: peer.rank(compiled, blocks),
    }


def benchmark(args: argparse.Namespace) -> None:
    """Writes the table of one size."""
    functions, run = make_functions(args)
    counts = {name: args.clips for name in functions}
    if args.peer:
        peers = make_peers(args, run)
        functions |= peers
        counts |= {name: PEER_CLIPS for name in peers}
    seconds = common.in_turns(functions, args.rounds)
    seconds = {name: [x / counts[name] for x in values] for name, values in seconds.items()}
    seconds["top 100"] = [
        whole - forward for whole, forward in zip(seconds["whole"], seconds["forward"], strict=True)
    ]
    rows = [[name, f"{1 / common.median(x):,.0f}"] for name, x in seconds.items()]
    sys.stdout.write(f"{common.describe()}, {args.net}, {args.clips:,} clips, ")
    sys.stdout.write(f"{args.num_identities:,} identities\n\n")
    common.write_table(["", "clips/s"], rows)
    rows: list[list[str]] = [["top 100 / forward", common.ratio(seconds, "top 100", "forward")]]
    peers = [name for name in counts if name in ("eager", "compiled")]
    rows += [[f"{name} / whole", common.ratio(seconds, name, "whole")] for name in peers]
    common.write_table(["", "ratio"], rows)


def time_tests(args: argparse.Namespace) -> None:
    """Writes how long the published nets take for the official test, from a sample of it."""
    functions, counts = {}, {}
    for name, (spec, nets) in TESTS.items():
        args.net, counts[name] = spec, nets
        functions[name] = make_functions(args)[0]["whole"]
    seconds = common.in_turns(functions, args.rounds)
    minutes = {
        name: [x * counts[name] / args.clips * TESTED / 60 for x in values]
        for name, values in seconds.items()
    }
    sys.stdout.write(f"{common.describe()}, {args.clips:,} clips, {args.num_identities:,} ")
    sys.stdout.write("identities\n\n")
    rows = [[k, str(counts[k]), f"{common.median(x):,.1f}"] for k, x in minutes.items()]
    common.write_table(["", "nets", f"minutes for {TESTED:,} clips"], rows)
    every, fused = list(TESTS)[2], list(TESTS)[1]
    common.write_table(["", "ratio"], [[f"{every} / fused", common.ratio(minutes, every, fused)]])


def main() -> None:
    """Prints the tables."""
    sizes = {"clips": 60_000, "num_identities": 10_034, "block_size": 256, "rounds": 3}
    args = common.parse(__doc__, "--peer", "--published", net="mlp", **sizes)
    (time_tests if args.published else benchmark)(args)


if __name__ == "__main__":
    main()
