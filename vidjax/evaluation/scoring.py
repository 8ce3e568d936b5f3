"""Scores the clips of a split with trained models, ranks them and computes the metrics."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vidjax.core import devices, ensemble, metrics
from vidjax.core.batch import Array, Batch
from vidjax.core.metrics import ClipScores
from vidjax.data.clips import BUCKETS, ClipSource, EvalPlan, Split, longest, make_eval_plan
from vidjax.data.resident import find_least_free_bytes
from vidjax.evaluation import eval_step as eval_step_lib, topk
from vidjax.evaluation.eval_step import MeanScores, add_scores, make_no_scores, mean_scores
from vidjax.models.base import ModelState, Params
from vidjax.models.build_system import System
from vidjax.runs.terminal import Progress
from vidjax.utils.errors import UserError, warn
from vidjax.utils.groups import group_by_key

# A window is the clips that a member (a net of an ensemble) scores before the next member starts. A
# larger window keeps more scores in memory. A smaller window slices the parameters more often.
WINDOW_ROWS = 4096
WINDOW_BYTES = 512 << 20  # a window ends early at this size of its features
JOINED_FRAMES = 1 << 17  # most frames of a modality, with padding, in joined blocks
WAITING_BYTES = 1 << 30  # a window is smaller if the scores of its clips would take more memory

# (scores [B, C] of each run, clip_index [B]) -> joint scores [B, C].
Join = Callable[[Sequence[Array], Array], Array]


class TrainedModel(NamedTuple):
    """A model with its weights, and the clips to evaluate.

    Attributes:
      name: the folder of the run.
      eval_step: compiled `eval_step.eval_step` of the system. It takes weights as arguments.
      params, model_state: parameters and other variables, trees of arrays [E, ...] for the E
        members (nets) of an ensemble.
      training_sets: the clips that each member was trained on.
      data: the clips. Their labels are 1..C for the identities of this model, or 0 for others.
      weight: weight of this model in a blend of models.
      attention_step: compiled `eval_step.attention_step`. If it is None, it is compiled when used.
    """

    name: str
    system: System
    eval_step: eval_step_lib.EvalStep
    params: Params
    model_state: ModelState
    training_sets: ensemble.TrainingSets
    data: ClipSource
    weight: float = 1.0
    attention_step: eval_step_lib.EvalStep | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that the system reads."""
        return tuple(self.system.fuse_eval)


class RunningTopK:
    """Ranks clips on the host while the devices compute the scores of the next clips.

    If there are several processes, each process ranks the clips that its devices scored.
    """

    def __init__(self, num_identities: int, mesh: Mesh, k: int = topk.MAX_NAMES):
        self._top = topk.HostTopK(num_identities, k)
        self._layout = devices.row_layout(mesh)
        self._waiting: list[topk.ScoreBlock] = []

    def add(self, block: topk.ScoreBlock) -> None:
        """Adds a block, see `HostTopK.add`. The next call of `add` or `flush` ranks the block."""
        self.flush()
        self._waiting.append(block)

    def flush(self) -> None:
        """Ranks the last block, so that the memory of its scores can be freed."""
        for block in self._waiting:
            if jax.process_count() > 1:
                parts = [part.addressable_shards for part in devices.put(block, self._layout)]
                block = [np.concatenate([np.asarray(x.data) for x in part]) for part in parts]
            self._top.add(*map(np.asarray, block))
        self._waiting = []

    def finish(self) -> topk.TopK:
        """Returns the sorted top k of every identity as numpy arrays."""
        self.flush()
        top = self._top.finish()
        if jax.process_count() == 1:
            return top
        return topk.join_tops(multihost_utils.process_allgather(top))


class ModelScorer:
    """Scores blocks of clips with a model, which has one or more nets (members).

    A member skips the clips that it was trained on. If all members were trained on all training
    clips, no clip is skipped.

    Attributes:
      use: [E, N] bool, True where one of E members scores one of N clips.
      in_sample: True if a member scores clips that it was trained on.
    """

    def __init__(self, model: TrainedModel, clips: Sequence[str], mesh: Mesh):
        """Chooses the members that score each clip. `clips` are N names, sorted by clip index."""
        self.model = model
        self.use, self.in_sample = ensemble.choose_scoring_members(model.training_sets, clips)
        self._use = devices.replicate(mesh, jnp.asarray(self.use))
        self._single = self._weights(0) if len(self.use) == 1 else None

    def _weights(self, member: int) -> tuple[Params, ModelState]:
        return ensemble.take((self.model.params, self.model.model_state), member)

    def score(self, blocks: Sequence[Batch], rankings: Sequence[RunningTopK] = ()) -> list[Array]:
        """Returns the scores of every block, [B, C] for B clips and C identities.

        The score of a clip is the mean over the members that score the clip. `rankings` is empty or
        has a ranking for each member, to which the scores of this member are added.
        """
        if self._single:
            scores = [self.compute(self.model.eval_step, block) for block in blocks]
        else:
            scores = self._mean_scores(blocks, rankings)
        return [self._keep_best(x) for x in scores]

    def _keep_best(self, scores: Array) -> Array:
        count = self.model.system.top_classes
        return keep_best(scores, count) if 0 < count < scores.shape[1] else scores

    def compute(self, step: eval_step_lib.EvalStep, block: Batch) -> Array:
        """Applies an evaluation step to a block of clips. The model must have a single member."""
        assert self._single
        hidden_chunk = np.array(self.model.training_sets.members[0].view, np.int32)
        return step(*self._single, hidden_chunk, block)

    def _mean_scores(self, blocks: Sequence[Batch], rankings: Sequence[RunningTopK]) -> list[Array]:
        model, totals = self.model, list[Any]([None] * len(blocks))
        may_score = np.stack([self._find_members(block) for block in blocks], axis=1)
        for number, member in enumerate(model.training_sets.members):
            if not may_score[number].any():
                continue
            own = self._weights(number)
            for i in np.flatnonzero(may_score[number]).tolist():
                block = blocks[i]
                scores = model.eval_step(*own, np.array(member.view, np.int32), block)
                used = _find_used(self._use, number, block.clip_index, block.batch_mask)
                if rankings:
                    rankings[number].add((self._keep_best(scores), block.clip_index, used))
                totals[i] = _add(totals[i], scores, used, logs=model.system.scores_are_logs)
            if rankings:
                rankings[number].flush()  # frees the scores of this member
        return [_mean(total) for total in totals]

    def _find_members(self, block: Batch) -> np.ndarray:
        clips, real = devices.fetch((block.clip_index, block.batch_mask))
        used = np.any(self.use[:, clips[real]], axis=1)
        return used if np.any(used) else np.arange(len(used)) == 0  # at least one member


@functools.partial(jax.jit, static_argnums=1)
def keep_best(scores: Array, count: int) -> Array:
    """Keeps the `count` highest of the scores [B, C] of every clip, and sets the rest to -inf.

    Identities that tie with the last kept identity are kept, too.

    Source: Residual Dense Net (2nd place 2019) submits the best 100 classes of every clip.
    """
    least = jax.lax.top_k(scores, count)[0][:, -1:]
    return jnp.where(scores >= least, scores, -jnp.inf)


_mean = jax.jit(mean_scores)


@jax.jit
def _find_used(use: Array, member: Array | int, clip_index: Array, batch_mask: Array) -> Array:
    return use[member, clip_index] & batch_mask


@functools.partial(jax.jit, static_argnames="logs")
def _add(total: MeanScores | None, scores: Array, used: Array, *, logs: bool) -> MeanScores:
    """Adds scores [B, C] of the rows `used` [B] to a mean. If `total` is None, starts a mean."""
    total = make_no_scores(scores, logs=logs) if total is None else total
    return add_scores(total, scores, used.astype(scores.dtype))


@jax.jit
def blend(scores: Sequence[Array], weights: Sequence[Array | float]) -> Array:
    """Returns the log of the weighted mean of the models' probabilities, [B, C].

    `scores` has the logs of the probabilities of each model, [B, C].
    """
    total = make_no_scores(scores[0], logs=True)
    for block, weight in zip(scores, weights, strict=True):
        total = add_scores(total, block, jnp.full(len(block), weight, block.dtype))
    return mean_scores(total)


def iterate_block_groups(
    models: Sequence[TrainedModel],
    split_name: str,
    block_size: int,
    mesh: Mesh,
    use: np.ndarray | None = None,
) -> Iterator[list[list[Batch]]]:
    """Yields the clips of a split in groups. A group has a list of blocks for each model.

    A block is a batch of `block_size` clips per device. On accelerators, blocks are up to 8 times
    as large if all clips are short. The memory for features and scores limits the size of a group.
    If there is only one net, a group has only one block. If models share a dataset, the dataset is
    read only once. Different datasets must have the same clips.

    `use` [E, N] bool is True if a member scores a clip. It has a row for each member of each model.
    Clips that the same members score share blocks. Clips that no member scores are left out. If
    `use` is None, the groups contain all clips.
    """
    sharing = group_by_key((id(model.data), model) for model in models)  # dataset -> its models
    names = {
        key: tuple(dict.fromkeys(name for model in group for name in model.modalities))
        for key, group in sharing.items()
    }
    splits = {key: group[0].data.split(split_name) for key, group in sharing.items()}
    lengths = np.max([longest(splits[key], names[key]) for key in sharing], axis=0)
    join = not any(model.system.frame_is_example for model in models)
    only = None if use is None else np.any(use, axis=0)
    plans = {
        key: make_eval_plan(splits[key], names[key], lengths=lengths, only=only, join=join)
        for key in sharing
    }
    if mesh.devices.flat[0].platform != "cpu":  # the start of a program takes longer than few clips
        block_size *= _count_joined_blocks(plans.values(), block_size)
    rows, streams = block_size * mesh.size, []
    for key, group in sharing.items():
        plan = plans[key]
        if use is not None and len(use) > 1:
            plan = split_by_members(plan, use, rows)
        for model in group:
            _check_memory(model.system, plan, block_size, mesh)
        streams.append(group[0].data.eval_batches(plan, rows=rows))
    single = sum(len(model.training_sets.members) for model in models) == 1
    scores_bytes = 4 * models[0].system.task.num_identities  # of a clip
    most = 1 if single else min(WINDOW_ROWS, max(1, WAITING_BYTES // scores_bytes))
    window: list[dict[int, Batch]] = []
    size = 0
    for host in zip(*streams, strict=True):
        for other in host[1:]:
            if not np.array_equal(*map(devices.fetch, (host[0].clip_index, other.clip_index))):
                raise UserError(
                    "--runs: the datasets of the runs list their clips in different orders\n"
                    "blend runs of the same dataset"
                )
        batches = [devices.shard_batch(mesh, batch) for batch in host]
        window.append(dict(zip(sharing, batches, strict=True)))
        size += sum(x.nbytes for x in jax.tree.leaves(batches))
        if size >= WINDOW_BYTES or len(window) * len(batches[0].clip_index) >= most:
            yield [[batches[id(model.data)] for batches in window] for model in models]
            window, size = [], 0
    if window:
        yield [[batches[id(model.data)] for batches in window] for model in models]


def score_clips(
    models: Sequence[TrainedModel],
    split_name: str,
    mesh: Mesh,
    block_size: int,
    most: int | None = None,
) -> Iterator[tuple[list[Batch], list[Array]]]:
    """Scores the clips of a split that no model was trained on.

    Yields a block for each model, and the scores [B, C] of each model. If there are more than
    `most` clips, they are drawn. If a model was trained on all clips, yields nothing.
    """
    clips = models[0].data.split(split_name).clips
    scorers = [ModelScorer(model, clips, mesh) for model in models]
    pool = np.all([scorer.use.any(axis=0) for scorer in scorers], axis=0)
    if any(scorer.in_sample for scorer in scorers) or not pool.any():
        return
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(pool))[:most]
    use = np.concatenate([x.use for x in scorers]) & np.isin(np.arange(len(pool)), chosen)
    for window in iterate_block_groups(models, split_name, block_size, mesh, use):
        scores = [scorer.score(blocks) for scorer, blocks in zip(scorers, window, strict=True)]
        for blocks, each in zip(zip(*window, strict=True), zip(*scores, strict=True), strict=True):
            yield list(blocks), list(each)


def _count_joined_blocks(plans: Iterable[EvalPlan], block_size: int) -> int:
    """Returns how many blocks, 1 to 8, are joined, so that they have up to JOINED_FRAMES frames."""
    longest = max(
        lengths[plan.bucket.max()] for plan in plans for lengths in plan.padded_lengths.values()
    )
    return min(8, max(1, JOINED_FRAMES // (block_size * longest)))


def split_by_members(plan: EvalPlan, use: np.ndarray, rows: int) -> EvalPlan:
    """Returns a plan in which the same members score all clips of a block.

    `use` [E, N] bool is True where one of E members scores one of N clips. Each bucket, a group of
    clips of similar length, is split by the members that score the clips. Parts of fewer than
    `rows` clips stay in a common bucket, because separate blocks would be mostly padding.
    """
    _, group = np.unique(np.packbits(use, axis=0), axis=1, return_inverse=True)
    group = group.reshape(-1) * len(BUCKETS) + plan.bucket
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    group = np.where(counts[number] < rows, plan.bucket - len(BUCKETS), group)
    groups, number = np.unique(group, return_inverse=True)
    lengths = {
        name: tuple(sizes[at] for at in groups % len(BUCKETS))
        for name, sizes in plan.padded_lengths.items()
    }
    bucket = np.where(plan.bucket < 0, -1, number)
    return plan._replace(bucket=bucket, padded_lengths=lengths)


def _check_memory(system: System, plan: EvalPlan, block_size: int, mesh: Mesh) -> None:
    frames, widths = plan.padded_lengths, system.task.modalities
    numbers = [
        sum(widths[name] * frames[name][bucket] for name in system.fuse_eval)
        for bucket in set(plan.bucket[plan.bucket >= 0].tolist())
    ]
    size = 4 * block_size * (max(numbers, default=0) + system.task.num_columns)
    free = find_least_free_bytes(mesh)
    if 0 < free < size:
        raise UserError(
            f"config.eval.block_size={block_size}: a block of clips takes {size / 1e9:,.1f} GB of "
            f"memory, but only {free / 1e9:,.1f} GB are free\n"
            f"add --config.eval.block_size={max(1, int(block_size * free / size) // 4)}"
        )


class Evaluation(NamedTuple):
    """The ranking of a split and its metrics."""

    split: Split
    top: topk.TopK  # the best 100 clips of every identity, sorted
    clips: ClipScores  # the best score of every clip. It is -inf if a score of the clip is NaN.
    # Entries of `metrics.json`: counts of clips, the speed, and the MAP of each model and member.
    # If the split has a ground truth, the dict also has the MAP and the other metrics.
    results: dict[str, Any]


def count_positives(split: Split, pool: np.ndarray) -> np.ndarray:
    """Returns how many clips in `pool` [N] bool show each identity, [C] int."""
    outside = np.bincount(split.labels[~pool], minlength=len(split.positives) + 1)[1:]
    return split.positives - outside


def compute_map(top: topk.TopK, split: Split, pool: np.ndarray) -> float | None:
    """Returns the MAP of `top` on clips in `pool` [N] bool, or None if they show no identity."""
    positives = count_positives(split, pool)
    if not split.labelled or not positives.any():
        return None
    others = split.num_others if pool.all() else 0
    return metrics.mean_average_precision(top.index, split.labels, positives, others)


def score(
    models: Sequence[TrainedModel],
    split_name: str,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool = True,
    check: Callable[[], None] = lambda: None,
    join: Join | None = None,
) -> Evaluation:
    """Scores and ranks the clips of a split with a model or a blend of models.

    A clip is left out if all members of a model were trained on it. If all members were trained on
    all training clips, no clip is left out. Clips with NaN scores are ranked last, with a warning.

    Args:
      block_size: number of clips that a device scores at a time.
      each_member: also computes the MAP of each member of an ensemble.
      check: called after each group of blocks. It may raise an exception to end the evaluation.
      join: joins the scores of a blend. None means the weighted mean of probabilities.

    Raises:
      UserError: the models differ in clips or identities, the scores of a blend are not logarithms,
        a block does not fit into memory, no member may score any clip, or all clips have NaN
        scores.
    """
    for other in models[1:]:
        _check_same_clips(models[0], other, split_name)
    if block_size < 1:
        raise UserError(f"config.eval.block_size={block_size}: must be 1 or more")
    split = models[0].data.split(split_name)
    ranker = _Ranker(models, split, mesh, each_member=each_member, join=join)
    if not (pool := ranker.pool).any():
        raise UserError(
            f"config.eval.split={split_name}: all members of the run were trained on all clips of "
            "this split\nchoose another split with --config.eval.split"
        )
    use = np.concatenate([scorer.use for scorer in ranker.scorers]) & pool
    began = time.monotonic()
    with devices.compile_seconds() as compiling:
        progress = Progress(int(pool.sum()), unit="clip", label="evaluate", leave=False)
        for window in iterate_block_groups(models, split.name, block_size, mesh, use):
            before = ranker.best
            ranker.add(window)
            masks = devices.fetch([block.batch_mask for block in window[0]])
            progress.advance(sum(int(np.sum(mask)) for mask in masks))
            jax.block_until_ready(before)  # the previous window, so the devices always have work
            check()
        progress.close()
        top = ranker.ranking.finish()
    seconds = time.monotonic() - began - sum(compiling)
    clips, num_nan = _replace_nan(split, devices.fetch(ranker.best))
    results = {
        **_compute_metrics(top, clips, split, ranker.scorers),
        **num_nan,
        "num_ties": topk.count_ties(top),
        "eval_clips_per_second": int(pool.sum()) / max(seconds, 1e-9),
        **ranker.compute_maps(),
    }
    return Evaluation(split, top, clips, results)


def start_compiling(
    model: TrainedModel, split_name: str, mesh: Mesh, *, block_size: int
) -> threading.Thread:
    """Starts a thread that compiles the programs of `score`, and returns the thread.

    The model must have a single member, because the thread copies the weights. The mesh must have a
    single device, because several devices must start all programs in the same order.
    """
    split = model.data.split(split_name)
    # This copies the weights, because the next training step overwrites them.
    ranker = _Ranker([model], split, mesh, each_member=False)

    def score_block() -> None:
        with contextlib.suppress(Exception):  # `score` raises the error again
            window = next(iterate_block_groups([model], split.name, block_size, mesh))
            ranker.add(window)
            ranker.ranking.finish()
            if model.attention_step:
                ranker.scorers[0].compute(model.attention_step, window[0][0])

    thread = threading.Thread(target=score_block)
    thread.start()
    return thread


class _Ranker:
    """Scores clips, and ranks them by all models together, by each model, and by each member.

    Attributes:
      scorers: a scorer for each model.
      pool: [N] bool, True for the clips that all models score.
      ranking: the ranking by the blend of all models, or by the only model.
      best: ClipScores on the devices, with the highest score of each clip over all identities.
    """

    def __init__(
        self,
        models: Sequence[TrainedModel],
        split: Split,
        mesh: Mesh,
        *,
        each_member: bool,
        join: Join | None = None,
    ):
        self._models, self._split = models, split
        weights = [model.weight for model in models]
        self._join = join or (lambda scores, _: blend(scores, weights))
        self.scorers = [ModelScorer(model, split.clips, mesh) for model in models]
        self.pool = np.all([scorer.use.any(axis=0) for scorer in self.scorers], axis=0)
        num_identities, num_clips = models[0].system.task.num_identities, len(split.clips)
        new_ranking = functools.partial(RunningTopK, num_identities, mesh)
        self.ranking = new_ranking()
        self._by_model = [new_ranking() for _ in models if len(models) > 1]
        self._by_member = [
            [new_ranking() for _ in scorer.use] if each_member and len(scorer.use) > 1 else []
            for scorer in self.scorers
        ]
        lowest = np.full(num_clips, -np.inf, np.float32)
        # Without all scores as logarithms of probabilities, there is no loss.
        systems = [model.system for model in models]
        has_loss = all(x.scores_are_logs and not x.top_classes for x in systems)
        own = lowest if has_loss else None
        zeros = np.zeros(num_clips, np.int32)
        best = ClipScores(self.pool, lowest, zeros > 0, own, zeros, zeros)
        self.best, self._labels = devices.replicate(mesh, (best, split.labels))

    def add(self, window: Sequence[Sequence[Batch]]) -> None:
        """Scores a group of blocks, a list for each model, and adds the scores to the rankings."""
        scores = []
        for number, (scorer, blocks) in enumerate(zip(self.scorers, window, strict=True)):
            scores.append(scorer.score(blocks, self._by_member[number]))
            if self._by_model:
                for block, block_scores in zip(blocks, scores[-1], strict=True):
                    self._by_model[number].add((block_scores, block.clip_index, block.batch_mask))
                self._by_model[number].flush()
        for block, each in zip(window[0], zip(*scores, strict=True), strict=True):
            blended = self._join(each, block.clip_index) if self._by_model else each[0]
            scored = blended, block.clip_index, block.batch_mask
            self.ranking.add(scored)
            self.best = _add_best(self.best, self._labels, *scored)

    def compute_maps(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the entries `runs` and `members` of `metrics.json`, with the MAP of each.

        `runs` is left out if there is a single run. `members` is left out if each run has a single
        member, or `each_member` is False.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        for number, (model, scorer) in enumerate(zip(self._models, self.scorers, strict=True)):
            run: dict[str, Any] = {}
            if self._by_model:
                value = compute_map(self._by_model[number].finish(), self._split, self.pool)
                row = {"name": model.name, "weight": model.weight, "map": value}
                rows.setdefault("runs", []).append(row)
                run = {"run": model.name}
            rankings = self._by_member[number]
            members = zip(model.training_sets.members, scorer.use, rankings, strict=False)
            for member, used, ranking in members:
                value = compute_map(ranking.finish(), self._split, used & self.pool)
                row = {**run, **_describe_member(member), "map": value}
                rows.setdefault("members", []).append(row)
        return rows


def _compute_metrics(
    top: topk.TopK, clips: ClipScores, split: Split, scorers: Sequence[ModelScorer]
) -> dict[str, Any]:
    """Returns counts of clips and identities. If the split has a ground truth, adds metrics."""
    listed = np.where(top.index == topk.NO_CLIP, -1, top.index)
    pool, clips = clips.pool, clips._replace(ranking=listed)
    results: dict[str, Any] = {}
    value = compute_map(top, split, pool)
    if value is not None:
        others = split.num_others if pool.all() else 0
        results |= {
            "map": value,
            "map_kind": _map_kind(split.name, scorers),
            "num_map_identities": int(np.sum(count_positives(split, pool) > 0)) + others,
            **metrics.compute_clip_metrics(clips, split.labels),
        }
    return results | {
        "num_clips": int(np.sum(pool)),
        "num_identities": len(split.positives),
        "num_distractors": int(np.sum(split.labels[pool] == 0)) if split.labelled else None,
    }


@jax.jit
def _add_best(
    clips: ClipScores, labels: Array, scores: Array, clip_index: Array, batch_mask: Array
) -> ClipScores:
    """Adds the scores of a block of clips."""
    rows = jnp.where(batch_mask, clip_index, len(labels))  # drops padding
    best, label = jnp.max(scores, axis=1), labels[clip_index]
    known, column = label > 0, jnp.arange(1.0, scores.shape[1] + 1)
    # On a CPU, `argmax` takes 8 times as long.
    first = jnp.min(jnp.where(scores == best[:, None], column, column[-1]), axis=1)
    identity = jnp.where(best > -jnp.inf, first, 0).astype(jnp.int32)  # 0 also for NaN
    at_label = jnp.take_along_axis(scores, jnp.maximum(label - 1, 0)[:, None], axis=1)
    higher = jnp.sum((scores > at_label).astype(jnp.float32), axis=1)
    block = {
        "best": best,
        "right": known & (identity == label),
        "own": jnp.where(known, at_label[:, 0], -jnp.inf),
        "identity": identity,
        "rank": jnp.where(identity > 0, higher, column[-1]).astype(jnp.int32),
    }
    kept = {name: getattr(clips, name) for name in block if getattr(clips, name) is not None}
    return clips._replace(**{
        name: jnp.asarray(values).at[rows].set(block[name], mode="drop")
        for name, values in kept.items()
    })  # fmt: skip


def _replace_nan(split: Split, clips: ClipScores) -> tuple[ClipScores, dict[str, int]]:
    """Replaces NaN scores by -inf, with a warning. Returns the number of such clips, too."""
    nan = np.isnan(clips.best) & clips.pool
    if not nan.any():
        return clips, {}
    count, total = int(nan.sum()), int(clips.pool.sum())
    first = [split.clips[clip] for clip in np.flatnonzero(nan)[:3]]
    message = (
        f"{count} of {total} clips of {split.name} have scores of NaN, such as {', '.join(first)}\n"
        "features of these clips or of training clips are too large for float32: divide all "
        "features by a constant, and train the run again"
    )
    if count == total:
        raise UserError(message)
    warn(f"{message}\nuntil then, the clips with scores of NaN are ranked last")
    best = np.where(nan, np.float32(-np.inf), clips.best)
    return clips._replace(best=best, right=clips.right & ~nan), {"num_nan_clips": count}


def _map_kind(split_name: str, scorers: Sequence[ModelScorer]) -> str:
    """Returns the entry `map_kind` of `metrics.json`.

    It is `in_sample` if a member scores its training clips. It is `out_of_fold` if a member of a
    fold or of a bootstrap sample skips clips. Otherwise, it is the name of the split.
    """
    if any(scorer.in_sample for scorer in scorers):
        return "in_sample"
    complete = (
        use.all()
        for scorer in scorers
        for member, use in zip(scorer.model.training_sets.members, scorer.use, strict=True)
        # All other members skip only clips that `pseudo_labels` enrolled.
        if max(member.fold, member.bootstrap) >= 0
    )
    return split_name if all(complete) else "out_of_fold"


def _describe_member(member: ensemble.Member) -> dict[str, Any]:
    """Returns the number of a member, and its fields that differ from their defaults."""
    fields, defaults = member._asdict(), ensemble.Member._field_defaults
    number = {"member": fields.pop("number")}
    return number | {name: value for name, value in fields.items() if value != defaults[name]}


def _check_same_clips(first: TrainedModel, other: TrainedModel, split_name: str) -> None:
    clips, other_clips = (model.data.split(split_name).clips for model in (first, other))
    if clips != other_clips:
        examples = sorted({*clips} ^ {*other_clips})[:3]
        raise UserError(
            f"--runs: {first.name} and {other.name} have different clips in {split_name}, "
            f"such as {', '.join(examples)}\nblend runs of the same dataset"
        )
    if tuple(first.data.identities) != tuple(other.data.identities):
        raise UserError(
            f"--runs: {first.name} and {other.name} were trained on different lists of identities\n"
            "blend runs that were trained on the same ground truth"
        )
    for model in (first, other):
        if not model.system.scores_are_logs:
            raise UserError(
                f"--runs: {model.name} cannot be blended, because its scores are not logarithms of "
                "probabilities\ntrain it with --config.eval.scores=log_softmax"
            )
