"""Evaluation: scores of the clips of a split by trained models, their ranking and its metrics."""

import collections
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, metrics
from vidjax.batch import Array, Batch
from vidjax.data.clips import ClipSource, EvalPlan, Split, longest, make_eval_plan
from vidjax.data.resident import free_bytes
from vidjax.errors import UserError, warn
from vidjax.logit_ops import is_best
from vidjax.metrics import ClipScores
from vidjax.models.base import ModelState, Params
from vidjax.run.terminal import Progress
from vidjax.steps import eval_step as eval_step_lib
from vidjax.steps import mean_scores, topk
from vidjax.steps.mean_scores import blend
from vidjax.system import System

# Clips that one member scores before the next member does. Larger: more scores in memory. Smaller:
# the parameters of a member are sliced more often.
WINDOW_ROWS = 4096
WINDOW_BYTES = 512 << 20  # size of the features that ends a window early
WAITING_BYTES = 1 << 30  # of scores that wait for a merge of the ranking at most


def window_rows(num_identities: int) -> int:
    """Returns the number of clips of a window, which are merged into the ranking together."""
    return min(WINDOW_ROWS, max(1, WAITING_BYTES // (4 * num_identities)))


def make_ranking(num_identities: int, mesh: Mesh, pool: np.ndarray) -> topk.RunningTopK:
    """Returns an empty ranking of the clips `pool` [N] bool."""
    rows = min(window_rows(num_identities), len(pool))
    return topk.RunningTopK(num_identities, rows=rows, mesh=mesh, pool=pool)


def positives_in(split: Split, pool: np.ndarray) -> np.ndarray:
    """Returns [C] int, the number of ground-truth clips of every identity in a pool [N] bool."""
    outside = np.bincount(split.labels[~pool], minlength=len(split.positives) + 1)[1:]
    return split.positives - outside


def map_of(top: topk.TopK, split: Split, pool: np.ndarray) -> float | None:
    """Returns the MAP of a top k over a pool [N] bool; None if the pool has no positive clip."""
    positives = positives_in(split, pool)
    if not split.labelled or not positives.any():
        return None
    others = split.num_others if pool.all() else 0
    return metrics.mean_average_precision(top.index, split.labels, positives, others)


class ClipScoreBuffer:
    """Collects in `clips` the `ClipScores` of all flushed blocks.

    A flush frees the results of a block on the device: many small arrays between the large ones of
    an evaluation would fragment the device's memory.
    """

    def __init__(self, split: Split, pool: np.ndarray, mesh: Mesh):
        best = np.full(len(pool), -np.inf, np.float32)
        self.clips = ClipScores(pool, best, np.zeros(len(pool), bool))
        self._known = split.labels > 0
        self._places = devices.replicate(mesh, jnp.asarray(split.labels - 1))
        self._waiting: collections.deque[tuple[Array, ...]] = collections.deque()

    def add(self, scores: Array, block: Batch) -> None:
        """Adds the scores [B, C] of a block."""
        best, right = _best_of_clips(scores, self._places, block.clip_index)
        self._waiting.append((best, right, block.clip_index, block.batch_mask))

    def flush(self, keep: int = 0) -> None:
        """Copies the results of all added blocks to the host, except the last `keep` blocks."""
        while len(self._waiting) > keep:
            best, right, clip_index, mask = devices.fetch(self._waiting.popleft())
            real = mask & self.clips.pool[clip_index]
            best, right, clip_index = best[real], right[real], clip_index[real]
            self.clips.best[clip_index] = best
            self.clips.right[clip_index] = right & self._known[clip_index] & (best > -np.inf)


@jax.jit
def _best_of_clips(scores: Array, places: Array, clip_index: Array) -> tuple[Array, Array]:
    """Returns [B], the best score of each clip, and [B] bool, True if its column is the label's."""
    return jnp.max(scores, axis=1), is_best(scores, places[clip_index])


class TrainedModel(NamedTuple):
    """A system with its weights, and the clips to evaluate.

    Attributes:
      eval_step: compiled evaluation step; other weights of the system can reuse it.
      params, model_state: parameters and other collections, trees of arrays [E, ...].
      data: clips, labelled with the class columns of this model.
      weight: weight of this model in a blend.
    """

    name: str
    system: System
    eval_step: eval_step_lib.EvalStep
    params: Params
    model_state: ModelState
    training_sets: ensemble.TrainingSets
    data: ClipSource
    weight: float = 1.0

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that the system reads."""
        return tuple(self.system.fuse_eval)


class ModelScorer:
    """Scores blocks of clips by the members that `ensemble.scoring_members` chooses.

    Attributes:
      use: [E, N] bool, True for members that score a clip.
      in_sample: True if members score clips that they were trained on.
    """

    def __init__(self, model: TrainedModel, clips: Sequence[str], mesh: Mesh):
        """Takes the names `clips` [N], in the order of clip_index."""
        self.model = model
        self.use, self.in_sample = ensemble.scoring_members(model.training_sets, clips)
        self._use = devices.replicate(mesh, jnp.asarray(self.use, jnp.float32))
        self._weights = (model.params, model.model_state)
        self._single = ensemble.take(self._weights, 0) if len(self.use) == 1 else None

    @property
    def num_members(self) -> int:
        """Number of members, E."""
        return len(self.use)

    def score(
        self,
        blocks: Sequence[Batch],
        *,
        without: int | None = None,
        rankings: Sequence[topk.RunningTopK] = (),
    ) -> list[Array]:
        """Returns mean scores [B, C] of every block, over the members that may score its clips.

        `without` is the position of a member to leave out. `rankings` has one ranking per member,
        to which the member's own scores are added.
        """
        logs = self.model.system.scores_are_logs
        totals: list[Any] = [None] * len(blocks)
        for number, member in enumerate(self.model.training_sets.members):
            if number == without:
                continue
            params, model_state = self._single or ensemble.take(self._weights, number)
            for i, block in enumerate(blocks):
                scores = self.model.eval_step(params, model_state, jnp.int32(member.view), block)
                if rankings:
                    rankings[number].add((scores, block.clip_index, block.batch_mask))
                if not self._single:
                    use = _rows(self._use, number, block.clip_index)
                    scores = _add(totals[i], scores, use, logs=logs)
                totals[i] = scores
            if rankings:
                rankings[number].flush()  # frees the scores of this member
        means = totals if self._single else map(_mean, totals)
        return [self._keep_top_classes(mean) for mean in means if mean is not None]

    def _keep_top_classes(self, scores: Array) -> Array:
        """Keeps only the scores of the best `eval.top_classes` identities of each clip."""
        count = self.model.system.config["eval"]["top_classes"]
        return keep_best(scores, count) if 0 < count < scores.shape[1] else scores


@functools.partial(jax.jit, static_argnums=1)
def keep_best(scores: Array, count: int) -> Array:
    """Returns scores [B, C] with -inf for all but the `count` highest of every clip.

    Identities that tie with the last of them are kept, too.

    Source: Residual Dense Net (2nd place 2019): the best 100 classes of every clip are submitted.
    """
    least = jax.lax.top_k(scores, count)[0][:, -1:]
    return jnp.where(scores >= least, scores, -jnp.inf)


_mean = jax.jit(mean_scores.mean_scores)


@jax.jit
def _rows(table: Array, member: Array | int, clip_index: Array) -> Array:
    return table[member, clip_index]


@functools.partial(jax.jit, static_argnames="logs")
def _add(
    total: mean_scores.MeanScores | None, scores: Array, weight: Array, *, logs: bool
) -> mean_scores.MeanScores:
    """Adds scores [B, C] of weight [B] to a running mean; None for a new one."""
    total = mean_scores.no_scores(scores, logs=logs) if total is None else total
    return mean_scores.add_scores(total, scores, weight)


def windows(
    models: Sequence[TrainedModel],
    split_name: str,
    block_size: int,
    mesh: Mesh,
    rows: int,
) -> Iterator[list[list[Batch]]]:
    """Yields windows of a split: for every model a list of blocks, on the devices.

    A block has `block_size` clips per device; a window ends at `rows` clips or `WINDOW_BYTES`. A
    dataset that models share is read only once; different datasets must have the same clips.
    """
    modalities: dict[int, dict[str, None]] = {}  # dataset -> modalities that its models read
    for model in models:
        modalities.setdefault(id(model.data), {}).update(dict.fromkeys(model.modalities))
    datasets = {id(model.data): model.data for model in models}
    splits = {key: data.split(split_name) for key, data in datasets.items()}
    lengths = np.max([longest(splits[key], tuple(modalities[key])) for key in datasets], axis=0)
    join = not any(model.system.frame_is_example for model in models)
    plans = {
        key: make_eval_plan(splits[key], tuple(modalities[key]), lengths=lengths, join=join)
        for key in datasets
    }
    for model in models:
        _check_memory(model.system, plans[id(model.data)], block_size, mesh)
    streams = [
        data.eval_batches(plans[key], rows=block_size * mesh.size) for key, data in datasets.items()
    ]
    window: list[dict[int, Batch]] = []
    size = 0
    for host in zip(*streams, strict=True):
        for other in host[1:]:
            if not np.array_equal(*map(devices.fetch, (host[0].clip_index, other.clip_index))):
                raise UserError("--runs: the datasets of the runs have different orders of clips")
        batches = [devices.shard_batch(mesh, batch) for batch in host]
        window.append(dict(zip(datasets, batches, strict=True)))
        size += sum(x.nbytes for x in jax.tree.leaves(batches))
        if size >= WINDOW_BYTES or len(window) * len(batches[0].clip_index) >= rows:
            yield [[batches[id(model.data)] for batches in window] for model in models]
            window, size = [], 0
    if window:
        yield [[batches[id(model.data)] for batches in window] for model in models]


def _check_memory(system: System, plan: EvalPlan, block_size: int, mesh: Mesh) -> None:
    """Refuses blocks whose features and scores alone exceed the free memory of a device."""
    frames, widths = plan.padded_lengths, system.task.modalities
    numbers = [
        sum(widths[name] * frames[name][bucket] for name in system.fuse_eval)
        for bucket in set(plan.bucket[plan.bucket >= 0].tolist())
    ]
    size = 4 * block_size * (max(numbers, default=0) + system.task.num_columns)
    free = free_bytes(mesh)
    if 0 < free < size:
        raise UserError(
            f"config.eval.block_size={block_size}: a block of clips takes {size / 1e9:,.1f} GB of "
            f"memory, and {free / 1e9:,.1f} GB are free\n"
            f"--config.eval.block_size={max(1, int(block_size * free / size) // 4)}"
        )


class ModelScores(NamedTuple):
    """The scores of one model, and the members that made them.

    Attributes:
      use, in_sample: as in `ModelScorer`.
      top: the best 100 clips of every identity by this model alone; None for the only model.
      member_tops: [E], the same by every single member; empty if members are not ranked.
    """

    name: str
    weight: float
    system: System
    members: Sequence[ensemble.Member]
    use: np.ndarray
    in_sample: bool
    top: topk.TopK | None
    member_tops: Iterable[topk.TopK]


class Evaluation(NamedTuple):
    """The scores of the clips of a split, as far as a ranking needs them.

    Attributes:
      top: the best 100 clips of every identity, sorted.
      clips: the best score of every clip; NaN where any of its scores is.
      seconds: time that scoring took, without compilation.
      results: what `conclude` adds: `map`, `map_kind` and the metrics of `metrics.CLIP_METRICS` if
        the split has a ground truth; counts; `eval_clips_per_second`; and the MAP of single models
        and members.
    """

    split: Split
    top: topk.TopK
    clips: ClipScores
    models: Sequence[ModelScores]
    seconds: float
    results: dict[str, Any]

    @property
    def positives(self) -> np.ndarray:
        """[C] int, the number of ground-truth clips of every identity among the ranked clips."""
        return positives_in(self.split, self.clips.pool)


def score(
    models: Sequence[TrainedModel],
    split_name: str,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Scores the clips of a split by one model, or by a blend of several.

    Clips that no member may score are not ranked; see `ModelScorer`.

    Args:
      models: one model, or several whose scores are logarithms, on the same clips.
      block_size: number of clips that a device scores at a time.
      each_member: True to also rank by every single member of an ensemble.
      check: function to call after every window; its exceptions end the evaluation.
    """
    for other in models[1:]:
        _check_same_clips(models[0], other, split_name)
    if block_size < 1:
        raise UserError(f"config.eval.block_size={block_size}: must be 1 or more")
    split = models[0].data.split(split_name)
    scorers = [ModelScorer(model, split.clips, mesh) for model in models]
    num_identities, several = models[0].system.task.num_identities, len(models) > 1
    pool = pool_of([scorer.use for scorer in scorers], split_name)
    ranking = make_ranking(num_identities, mesh, pool)
    clips = ClipScoreBuffer(split, pool, mesh)
    alone = [make_ranking(num_identities, mesh, pool) for _ in models if several]
    by_member = [
        [make_ranking(num_identities, mesh, used & pool) for used in scorer.use]
        if each_member and scorer.num_members > 1
        else []
        for scorer in scorers
    ]
    # A window is one block if there is only one member.
    single = not several and scorers[0].num_members == 1
    rows = 1 if single else window_rows(num_identities)

    began = time.monotonic()
    with devices.CompileClock() as compiling:
        progress = Progress(len(split.clips), unit="clip", label="evaluate", leave=False)
        for window in windows(models, split.name, block_size, mesh, rows):
            blocks, scores = window[0], []
            for number, (scorer, own) in enumerate(zip(scorers, window, strict=True)):
                scores.append(scorer.score(own, rankings=by_member[number]))
                if several:
                    for block, block_scores in zip(own, scores[-1], strict=True):
                        alone[number].add((block_scores, block.clip_index, block.batch_mask))
                    alone[number].flush()
            blended = blend(scores, [model.weight for model in models])
            for block, block_scores in zip(blocks, blended, strict=True):
                ranking.add((block_scores, block.clip_index, block.batch_mask))
                clips.add(block_scores, block)
            clips.flush(keep=len(blocks))  # a window behind, so that the devices never wait
            progress.advance(sum(int(np.sum(devices.fetch(block.batch_mask))) for block in blocks))
            check()
        progress.close()
        top = ranking.finish()
    seconds = time.monotonic() - began - compiling.seconds
    clips.flush()
    scored = [
        ModelScores(
            name=model.name,
            weight=model.weight,
            system=model.system,
            members=model.training_sets.members,
            use=scorer.use,
            in_sample=scorer.in_sample,
            top=alone[number].finish() if several else None,
            member_tops=[ranked.finish() for ranked in by_member[number]],
        )
        for number, (model, scorer) in enumerate(zip(models, scorers, strict=True))
    ]
    return Evaluation(split, top, clips.clips, scored, seconds, {})


def pool_of(uses: Sequence[np.ndarray], split_name: str) -> np.ndarray:
    """Returns [N] bool, the ranked clips: those that some member of every model may score.

    `uses` has for each model [E, N] bool, the members that score a clip. An empty pool is an error.
    """
    pool = np.all([use.any(axis=0) for use in uses], axis=0)
    if not pool.any():
        raise UserError(
            f"config.eval.split={split_name}: all members were trained on all of its clips\n"
            "choose another split with --config.eval.split"
        )
    return pool


def conclude(scored: Evaluation) -> Evaluation:
    """Adds the results of a ranking; warns of clips that score NaN.

    It is an error if all scores are NaN.
    """
    split, top, pool, models = scored.split, scored.top, scored.clips.pool, scored.models
    clips, num_nan = _without_nan(split, scored.clips)
    results: dict[str, Any] = {}
    value = map_of(top, split, pool)
    if value is not None:
        results |= {"map": value, "map_kind": _map_kind(split.name, models)}
        for name, metric in metrics.CLIP_METRICS.items():
            results[name] = metric.fn(clips, split.labels)
    results |= {
        "num_clips": int(np.sum(pool)),
        "num_identities": len(split.positives),
        "num_distractors": int(np.sum(split.labels[pool] == 0)) if split.labelled else None,
        **num_nan,
        "num_ties": topk.count_ties(top),
        "eval_clips_per_second": len(split.clips) / max(scored.seconds, 1e-9),
    }
    for model in models:
        run: dict[str, Any] = {}
        if model.top is not None:
            value = map_of(model.top, split, pool)
            row = {"name": model.name, "weight": model.weight, "map": value}
            results.setdefault("runs", []).append(row)
            run = {"run": model.name}
        for member, used, own in zip(model.members, model.use, model.member_tops, strict=False):
            row = {**run, **_describe(member), "map": map_of(own, split, used & pool)}
            results.setdefault("members", []).append(row)
    return scored._replace(clips=clips, results=results)


def _without_nan(split: Split, clips: ClipScores) -> tuple[ClipScores, dict[str, int]]:
    """Ranks clips with a NaN among their scores last; returns also `num_nan_clips`, if any."""
    nan = np.isnan(clips.best) & clips.pool
    if not nan.any():
        return clips, {}
    count, total = int(nan.sum()), int(clips.pool.sum())
    first = [split.clips[clip] for clip in np.flatnonzero(nan)[:3]]
    message = (
        f"{count} of {total} clips of {split.name} have scores of NaN, such as {', '.join(first)}\n"
        "their features, or those of the training clips, are too large for float32: divide them by "
        "a constant"
    )
    if count == total:
        raise UserError(message)
    warn(f"{message}; they are ranked last")
    best = np.where(nan, np.float32(-np.inf), clips.best)
    return clips._replace(best=best, right=clips.right & ~nan), {"num_nan_clips": count}


def _map_kind(split_name: str, models: Sequence[ModelScores]) -> str:
    """Returns the kind of clips that MAP is computed on.

    It is `in_sample` if a model scores clips it was trained on, the name of the split if all
    members score all clips, and `out_of_fold` otherwise.
    """
    if any(model.in_sample for model in models):
        return "in_sample"
    return split_name if all(model.use.all() for model in models) else "out_of_fold"


def _describe(member: ensemble.Member) -> dict[str, Any]:
    """Returns the number of a member, and its fields that differ from their defaults."""
    fields, defaults = member._asdict(), ensemble.Member._field_defaults
    number = {"member": fields.pop("number")}
    return number | {name: value for name, value in fields.items() if value != defaults[name]}


def _check_same_clips(first: TrainedModel, other: TrainedModel, split_name: str) -> None:
    clips, other_clips = (model.data.split(split_name).clips for model in (first, other))
    if clips != other_clips:
        examples = sorted({*clips} ^ {*other_clips})[:3]
        raise UserError(
            f"--runs: {first.name} and {other.name} have different clips in {split_name}\n"
            f"such as {', '.join(examples)}"
        )
    if tuple(first.data.identities) != tuple(other.data.identities):
        raise UserError(
            f"--runs: {first.name} and {other.name} were trained on different lists of identities\n"
            "blend runs that were trained on the same ground truth"
        )
    for model in (first, other):
        if not model.system.scores_are_logs:
            raise UserError(
                f"--runs: {model.name} ranks by scores that are no logarithms of probabilities\n"
                "train it with --config.eval.scores=log_softmax to blend it with others"
            )
