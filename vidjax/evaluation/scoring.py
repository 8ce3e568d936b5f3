"""Evaluation: the scores of every clip of a split by trained models, its ranking and its metrics.

Clips are read in windows, a few blocks at a time, so that several models score the same clips.
"""

import collections
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, metrics
from vidjax.batch import Array, Batch, LazyFeatures
from vidjax.data.clips import ClipSource, EvalPlan, Split, longest, make_eval_plan
from vidjax.data.resident import free_bytes
from vidjax.errors import UserError
from vidjax.evaluation.poor_clips import PoorClips
from vidjax.models.base import ModelState, Params
from vidjax.run.terminal import Progress
from vidjax.steps import eval_step as eval_step_lib
from vidjax.steps import examples, mean_scores, topk
from vidjax.steps.columns import ScoreColumns
from vidjax.steps.mean_scores import blend
from vidjax.system import System

# Clips that one member scores before the next member does. Larger: more scores in memory. Smaller:
# the parameters of a member are sliced more often.
WINDOW_ROWS = 4096


class TopKMetric:
    """A running top k over a pool of clips; `map_of` gives its MAP."""

    def __init__(self, pool: np.ndarray, columns: ScoreColumns):
        """Starts with an empty ranking.

        Args:
          pool: [N] bool, the clips that are ranked.
          columns: the columns of the scores.
        """
        self._top = topk.RunningTopK(
            columns.total,
            rows=min(WINDOW_ROWS, columns.most_waiting),
            mesh=columns.mesh,
            identities=columns.identities,
        )
        self._pool = devices.replicate(columns.mesh, jnp.asarray(pool))

    def add(self, scores: Array, block: Batch) -> None:
        """Adds the scores [B, total] of a block."""
        mask = in_pool(self._pool, block.clip_index, block.batch_mask)
        self._top.add((scores, block.clip_index, mask))

    def flush(self) -> None:
        """Merges the added scores, so that their memory can be freed."""
        self._top.flush()

    def finish(self) -> topk.TopK:
        """Returns the sorted top k."""
        return self._top.finish()


def positives_in(split: Split, pool: np.ndarray) -> np.ndarray:
    """Returns [C] int, the ground-truth clips of every identity in a pool [N] bool."""
    outside = np.bincount(split.labels[~pool], minlength=len(split.positives) + 1)[1:]
    return split.positives - outside


def map_of(top: topk.TopK, split: Split, pool: np.ndarray) -> float | None:
    """Returns the MAP of a top k over a pool [N] bool; None if the pool has no positive clip."""
    positives = positives_in(split, pool)
    if not split.labelled or not positives.any():
        return None
    others = split.num_others if pool.all() else 0
    return metrics.mean_average_precision(top.index, split.labels, positives, others)


class ClipScores(NamedTuple):
    """The best score of every clip of a split, by clip index.

    Attributes:
      pool: [N] bool, the clips that are ranked.
      best: [N] float32, the highest score for any identity; -inf outside the pool.
      right: [N] bool, True if that identity is the label of the clip.
    """

    pool: np.ndarray
    best: np.ndarray
    right: np.ndarray


class ClipScoreBuffer:
    """Collects `ClipScores` from blocks of scores.

    The results of a block are copied to the host and freed on the device: many small arrays between
    the large ones of an evaluation would fragment the memory of the device.

    Attributes:
      clips: the scores of all flushed blocks.
    """

    def __init__(self, split: Split, pool: np.ndarray, columns: ScoreColumns):
        """Starts without scores.

        Args:
          split: the clips.
          pool: [N] bool, the clips that are ranked.
          columns: the columns of the scores.
        """
        best = np.full(len(pool), -np.inf, np.float32)
        self.clips = ClipScores(pool, best, np.zeros(len(pool), bool))
        self._known = split.labels > 0
        places = jnp.asarray(split.labels - 1 + columns.first)
        self._places = devices.replicate(columns.mesh, places)
        self._waiting: collections.deque[tuple[Array, ...]] = collections.deque()

    def add(self, scores: Array, block: Batch) -> None:
        """Adds the scores [B, total] of a block."""
        best, right = _best(scores, self._places, block.clip_index)
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
def in_pool(pool: Array, clip_index: Array, batch_mask: Array) -> Array:
    """Returns [B] bool, True for the rows of a block whose clips are in `pool` [N] bool."""
    return pool[clip_index] & batch_mask


@jax.jit
def _best(scores: Array, places: Array, clip_index: Array) -> tuple[Array, Array]:
    """Returns the best score of each clip [B], and [B] True if it lies at the clip's place."""
    return jnp.max(scores, axis=1), examples.is_best(scores, places[clip_index])


class TrainedModel(NamedTuple):
    """A system with its weights, and the clips to evaluate.

    Attributes:
      name: name of the run, for messages.
      system: the system.
      eval_step: compiled evaluation step of the system; other weights of it can reuse the step.
      params: parameters, a tree of arrays [E, ...].
      model_state: other collections of the model, a tree of arrays [E, ...].
      training_sets: the clips that each member was trained on.
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

    @classmethod
    def from_params(
        cls,
        name: str,
        system: System,
        mesh: Mesh,
        params: Params,
        model_state: ModelState,
        training_sets: ensemble.TrainingSets,
        data: ClipSource,
    ) -> Self:
        """Compiles the evaluation step for a mesh; for the other arguments see the attributes."""
        step = eval_step_lib.make_eval_step(system, mesh)
        return cls(name, system, step, params, model_state, training_sets, data)

    @property
    def knows_strangers(self) -> bool:
        """True if the scores of a clip leave a probability to somebody new."""
        return bool(self.system.class_mask[0])

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that the system reads."""
        return tuple(self.system.fuse_eval)


class ModelScorer:
    """Scores blocks of clips with one trained model.

    `ensemble.scoring_members` says which members score a clip.

    Attributes:
      model: the trained model.
      columns: the columns of the scores.
      use: [E, N] bool, True for members that score a clip.
      in_sample: True if members score clips that they were trained on.
    """

    def __init__(self, model: TrainedModel, clips: Sequence[str], mesh: Mesh):
        """Matches the clips of a split with the training clips of the members.

        Args:
          model: the trained model.
          clips: [N] names, in the order of clip_index.
          mesh: the devices.
        """
        self.model = model
        self.columns = ScoreColumns.of(model.system, mesh)
        self.use, self.in_sample = ensemble.scoring_members(model.training_sets, clips)
        self._use = devices.replicate(mesh, jnp.asarray(self.use, jnp.float32))
        self._weights = (model.params, model.model_state)
        self._single: tuple[Params, ModelState] | None = None
        if len(self.use) == 1:
            self._single = _take(self._weights, 0)

    @property
    def num_members(self) -> int:
        """Number of members, E."""
        return len(self.use)

    def score(
        self,
        blocks: Sequence[Batch],
        *,
        without: int | None = None,
        member_metrics: Sequence[TopKMetric] = (),
    ) -> list[Array]:
        """Returns the scores of every block, averaged over the members that may score it.

        Args:
          blocks: blocks of clips, on the devices.
          without: position of a member to leave out; None to use all.
          member_metrics: one metric per member, to which its own scores are added; () for none.

        Returns:
          [B, total] of every block, with the columns of `columns`; [B, C] if classes are not split.
        """
        if self._single:
            params, model_state = self._single
            view = jnp.int32(self.model.training_sets.members[0].view)
            return [
                self._best(self.model.eval_step(params, model_state, view, block))
                for block in blocks
            ]
        logs = self.model.system.logs
        totals: list[mean_scores.MeanScores | None] = [None] * len(blocks)
        for number, member in enumerate(self.model.training_sets.members):
            if number == without:
                continue
            params, model_state = _take(self._weights, number)
            for i, block in enumerate(blocks):
                scores = self.model.eval_step(params, model_state, jnp.int32(member.view), block)
                if member_metrics:
                    member_metrics[number].add(scores, block)
                use = _rows(self._use, number, block.clip_index)
                totals[i] = _add(totals[i], scores, use, logs=logs)
            if member_metrics:
                member_metrics[number].flush()  # frees the scores of this member
        return [self._best(_mean(total)) for total in totals if total is not None]

    def _best(self, scores: Array) -> Array:
        """Returns scores of which only those of `eval.top_classes` are kept."""
        count = self.model.system.top_classes
        if not 0 < count < scores.shape[1]:
            return scores
        # XLA sorts columns that lie on several devices wrongly on some of them.
        return keep_best(devices.put(scores, devices.by_rows(self.columns.mesh)), count)


@functools.partial(jax.jit, static_argnums=1)
def keep_best(scores: Array, count: int) -> Array:
    """Returns scores [B, C] with -inf for all but the `count` highest of every clip.

    Identities that tie with the last of them are kept, too.

    Source: Residual Dense Net (2nd place 2019): the best 100 classes of every clip are submitted.
    """
    least = jax.lax.top_k(scores, count)[0][:, -1:]
    return jnp.where(scores >= least, scores, -jnp.inf)


_take = jax.jit(ensemble.take)
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


WINDOW_BYTES = 512 << 20  # size of the features that ends a window early


def windows(
    models: Sequence[TrainedModel], split_name: str, block_size: int, mesh: Mesh, rows: int
) -> Iterator[list[list[Batch]]]:
    """Yields windows of a split; a dataset of several models is read only once.

    Args:
      models: models whose datasets have the same clips.
      split_name: the split.
      block_size: number of clips per device and block.
      mesh: the devices.
      rows: number of clips that ends a window.

    Yields:
      For every model a list of blocks, on the devices.

    Raises:
      ValueError: Two datasets have their clips in different orders.
    """
    modalities: dict[int, dict[str, None]] = {}  # dataset -> modalities that its models read
    for model in models:
        modalities.setdefault(id(model.data), {}).update(dict.fromkeys(model.modalities))
    datasets = {id(model.data): model.data for model in models}
    splits = {key: data.split(split_name) for key, data in datasets.items()}
    lengths = np.max([longest(splits[key], tuple(modalities[key])) for key in datasets], axis=0)
    share = devices.share(mesh)
    plans = {
        key: make_eval_plan(splits[key], tuple(modalities[key]), lengths=lengths)
        for key in datasets
    }
    for model in models:
        _check_memory(model.system, plans[id(model.data)], block_size, mesh)
    streams = [
        data.eval_batches(
            plans[key],
            rows=block_size * mesh.shape["data"] // share.parts,
            share=share,
        )
        for key, data in datasets.items()
    ]
    window: list[dict[int, Batch]] = []
    size = 0
    for host in zip(*streams, strict=True):
        for other in host[1:]:
            if not np.array_equal(*map(devices.fetch, (host[0].clip_index, other.clip_index))):
                raise UserError("--runs: the datasets of the runs have different orders of clips")
        batches = [devices.shard_block(mesh, batch) for batch in host]
        window.append(dict(zip(datasets, batches, strict=True)))
        size += sum(_nbytes(batch) for batch in batches)
        if size >= WINDOW_BYTES or len(window) * len(batches[0].clip_index) >= rows:
            yield [[batches[id(model.data)] for batches in window] for model in models]
            window, size = [], 0
    if window:
        yield [[batches[id(model.data)] for batches in window] for model in models]


def _check_memory(system: System, plan: EvalPlan, block_size: int, mesh: Mesh) -> None:
    """Refuses blocks that exceed the free memory of a device by their features and scores alone."""
    frames, widths = plan.padded_lengths, system.modalities
    numbers = [
        sum(widths[name] * frames[name][bucket] for name in system.fuse_eval)
        for bucket in set(plan.bucket[plan.bucket >= 0].tolist())
    ]
    size = 4 * block_size * (max(numbers, default=0) + system.num_columns)
    free = free_bytes(mesh)
    if 0 < free < size:
        raise UserError(
            f"config.eval.block_size={block_size}: a block of clips takes {size / 1e9:,.1f} GB of "
            f"memory, and {free / 1e9:,.1f} GB are free\n"
            f"--config.eval.block_size={max(1, int(block_size * free / size) // 4)}"
        )


def _nbytes(batch: Batch) -> int:
    """Returns the size of a batch in bytes; LazyFeatures count as their indices."""
    frames = [
        modality._replace(features=modality.features.index)
        if isinstance(modality.features, LazyFeatures)
        else modality
        for modality in batch.frames.values()
    ]
    return sum(x.nbytes for x in jax.tree.leaves(frames))


class Judge(NamedTuple):
    """A model that scores the clips of a split, without its weights.

    Attributes:
      name: name of the run.
      weight: weight of the model in a blend.
      system: the system.
      training_sets: the clips that each member was trained on.
      use: [E, N] bool, True for members that score a clip.
      in_sample: True if members score clips that they were trained on.
    """

    name: str
    weight: float
    system: System
    training_sets: ensemble.TrainingSets
    use: np.ndarray
    in_sample: bool

    @classmethod
    def make(
        cls,
        name: str,
        system: System,
        training_sets: ensemble.TrainingSets,
        clips: Sequence[str],
    ) -> Self:
        """Returns the judge of [N] clips that a run is by itself."""
        use, in_sample = ensemble.scoring_members(training_sets, clips)
        return cls(name, 1.0, system, training_sets, use, in_sample)

    @classmethod
    def of(cls, scorer: ModelScorer) -> Self:
        """Returns the judge that a scorer of all clips of a split is."""
        model = scorer.model
        return cls(
            model.name,
            model.weight,
            model.system,
            model.training_sets,
            scorer.use,
            scorer.in_sample,
        )


def pool_of(judges: Sequence[Judge], split_name: str) -> np.ndarray:
    """Returns [N] bool, the clips of a split that are ranked: some member of every model may score.

    Raises:
      ValueError: no clip can be scored.
    """
    pool = np.all([judge.use.any(axis=0) for judge in judges], axis=0)
    if not pool.any():
        raise UserError(
            f"config.eval.split={split_name}: all members were trained on all of its clips\n"
            "choose another split with --config.eval.split"
        )
    return pool


class Collected(NamedTuple):
    """What was collected while clips were scored, of M models.

    Attributes:
      top: the best 100 clips of every identity, sorted.
      model_tops: [M], the same by every single model of a blend; [] for one model.
      member_tops: [M], the same by every single member of each model; a model may have none.
      clips: the best score of every clip; NaN where any of its scores is.
      poor: [M], the poor clips of each model, and its clips with the modality that decides.
      seconds: time that scoring took, without compilation.
    """

    top: topk.TopK
    model_tops: list[topk.TopK]
    member_tops: Sequence[Iterable[topk.TopK]]
    clips: ClipScores
    poor: list[tuple[int, int]]
    seconds: float


class Evaluation(NamedTuple):
    """The ranking of one split and its metrics.

    Attributes:
      top: the best 100 clips of every identity, sorted.
      model_tops: the best 100 clips by every single model of a blend; [] for one model.
      positives: [C] int, number of ground-truth clips per identity among the ranked clips.
      clips: the best score of every clip.
      results: `map`, `map_kind` and the metrics of `metrics.CLIP_METRICS` if the split has a ground
        truth; counts; `eval_clips_per_second`; and the MAP of single models and members.
    """

    top: topk.TopK
    model_tops: list[topk.TopK]
    positives: np.ndarray
    clips: ClipScores
    results: dict[str, Any]


def conclude(collected: Collected, split: Split, judges: Sequence[Judge]) -> Evaluation:
    """Returns the ranking of a split and its metrics; warns of clips that are poor or score NaN.

    Args:
      collected: what was collected of all clips of the split.
      split: the clips.
      judges: the models that scored them.

    Raises:
      ValueError: all scores are NaN.
    """
    top, pool = collected.top, collected.clips.pool
    for judge, counts in zip(judges, collected.poor, strict=True):
        PoorClips(judge.system, counts).warn(split.name)
    scores, num_nan = _without_nan(split, collected.clips)
    results = _summarise(split, scores, map_of(top, split, pool), judges) | num_nan
    results["num_ties"] = topk.count_ties(top)
    results["eval_clips_per_second"] = len(split.clips) / max(collected.seconds, 1e-9)
    _summarise_models(collected, split, judges, results)
    return Evaluation(top, collected.model_tops, positives_in(split, pool), scores, results)


def _without_nan(split: Split, clips: ClipScores) -> tuple[ClipScores, dict[str, int]]:
    """Ranks clips with a NaN among their scores last, and counts them.

    Args:
      split: the clips.
      clips: their best scores; a NaN where any score is one.

    Returns:
      The scores with -inf for NaN, and `num_nan_clips` for `results` where there are any.

    Raises:
      ValueError: All scores are NaN.
    """
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
    warnings.warn(f"{message}; they are ranked last", stacklevel=3)
    best = np.where(nan, np.float32(-np.inf), clips.best)
    return clips._replace(best=best, right=clips.right & ~nan), {"num_nan_clips": count}


def _summarise(
    split: Split, clips: ClipScores, value: float | None, judges: Sequence[Judge]
) -> dict[str, Any]:
    """Returns the metrics of the whole ranking; `value` is its MAP, None without ground truth."""
    results: dict[str, Any] = {}
    if value is not None:
        results["map"] = value
        results["map_kind"] = _map_kind(split.name, judges)
        for name, metric in metrics.CLIP_METRICS.items():
            results[name] = metric.fn(clips, split.labels)
    num_distractors = int(np.sum(split.labels[clips.pool] == 0)) if split.labelled else None
    return results | {
        "num_clips": int(np.sum(clips.pool)),
        "num_identities": len(split.positives),
        "num_distractors": num_distractors,
    }


def _map_kind(split_name: str, judges: Sequence[Judge]) -> str:
    """Returns the kind of clips that MAP is computed on.

    It is `in_sample` if a model scores clips it was trained on, the name of the split if all
    members score all clips, and `out_of_fold` otherwise.
    """
    if any(judge.in_sample for judge in judges):
        return "in_sample"
    return split_name if all(judge.use.all() for judge in judges) else "out_of_fold"


def _summarise_models(
    collected: Collected, split: Split, judges: Sequence[Judge], results: dict[str, Any]
) -> None:
    """Adds the MAP of single models and members to `results`."""
    pool = collected.clips.pool
    for number, (judge, member_tops) in enumerate(zip(judges, collected.member_tops, strict=True)):
        run: dict[str, Any] = {}
        if collected.model_tops:
            value = map_of(collected.model_tops[number], split, pool)
            row = {"name": judge.name, "weight": judge.weight, "map": value}
            results.setdefault("runs", []).append(row)
            run = {"run": judge.name}
        members = judge.training_sets.members
        for member, used, top in zip(members, judge.use, member_tops, strict=False):
            row = {**run, **_describe(member), "map": map_of(top, split, used & pool)}
            results.setdefault("members", []).append(row)


def _describe(member: ensemble.Member) -> dict[str, Any]:
    """Returns the number of a member, and its fields that differ from their defaults."""
    defaults = ensemble.Member._field_defaults
    fields = member._asdict()
    number = fields.pop("number")
    changed = {name: value for name, value in fields.items() if value != defaults[name]}
    return {"member": number, **changed}


class ScoreObserver(Protocol):
    """A function that gets all scores of an evaluation, one window at a time."""

    def __call__(self, blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        """Observes one window.

        Args:
          blocks: blocks of clips from the data of the first model, on the devices.
          scores: for each model the scores [B, C] of every block.
        """
        ...


def score(
    models: Sequence[TrainedModel],
    split_name: str,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool = True,
    check: Callable[[], None] = lambda: None,
    observe: ScoreObserver | None = None,
    logarithms: bool = False,
) -> Evaluation:
    """Ranks all clips of a split by the scores of one model, or by a blend of several.

    Every clip is read once. `ModelScorer` selects the members that score it. Clips that no member
    may score are not ranked.

    Args:
      models: one model, or several whose scores are logarithms, on the same clips.
      split_name: the split.
      mesh: the devices.
      block_size: number of clips that a device scores at a time.
      each_member: True to also rank by every single member of an ensemble.
      check: function to call after every window; its exceptions end the evaluation.
      observe: function to call with the scores of every window; None for none.
      logarithms: True to join several models by the mean of their logarithms.

    Raises:
      ValueError: The models differ in clips or identities, or no clip can be scored.
    """
    check_block_size(block_size)
    for other in models[1:]:
        _check_same_clips(models[0], other, split_name)
    split = models[0].data.split(split_name)
    scorers = [ModelScorer(model, split.clips, mesh) for model in models]
    judges = [Judge.of(scorer) for scorer in scorers]
    pool_of(judges, split_name)  # before anything is scored
    collected = collect(
        scorers,
        split,
        mesh,
        block_size=block_size,
        each_member=each_member,
        check=check,
        observe=observe,
        logarithms=logarithms,
    )
    return conclude(collected, split, judges)


def check_block_size(block_size: int) -> None:
    """Raises ValueError if a block would hold no clip."""
    if block_size < 1:
        raise UserError(f"config.eval.block_size={block_size}: must be 1 or more")


def collect(
    scorers: Sequence[ModelScorer],
    split: Split,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool,
    check: Callable[[], None] = lambda: None,
    observe: ScoreObserver | None = None,
    logarithms: bool = False,
) -> Collected:
    """Scores all clips of a split, and keeps what a ranking of them needs.

    Args:
      scorers: one for each model, of all clips of the split.
      split: the clips, which may be those of a part; none of them needs to be ranked.
      mesh: the devices.
      block_size, each_member, check, observe, logarithms: as `score` takes them.
    """
    models = [scorer.model for scorer in scorers]
    pool = np.all([scorer.use.any(axis=0) for scorer in scorers], axis=0)
    rankers = [
        _ModelRanker(scorer, split, pool, by_itself=len(scorers) > 1, each_member=each_member)
        for scorer in scorers
    ]
    columns, single = scorers[0].columns, len(scorers) == scorers[0].num_members == 1
    ranking = TopKMetric(pool, columns)
    clips = ClipScoreBuffer(split, pool, columns)
    voices = [(model.weight, model.knows_strangers) for model in models]
    # A window is one block if there is only one member.
    rows = 1 if single else min(WINDOW_ROWS, columns.most_waiting)
    block_size = min(block_size, columns.most_rows)

    began = time.monotonic()
    with devices.CompileClock() as compiling:
        progress = Progress(len(split.clips), unit="clip", label="evaluate", leave=False)
        for window in windows(models, split.name, block_size, mesh, rows):
            blocks = window[0]
            scores = [
                ranker.score(model_blocks)
                for ranker, model_blocks in zip(rankers, window, strict=True)
            ]
            if observe:
                observe(blocks, scores)
            for block, block_scores in zip(
                blocks, blend(scores, voices, logarithms=logarithms), strict=True
            ):
                for sink in (ranking, clips):
                    sink.add(block_scores, block)
            clips.flush(keep=len(blocks))  # a window behind, so that the devices never wait
            progress.advance(sum(int(np.sum(devices.fetch(block.batch_mask))) for block in blocks))
            check()
        progress.close()
        top = ranking.finish()
    seconds = time.monotonic() - began - compiling.seconds
    clips.flush()
    return Collected(
        top,
        [ranker.metric.finish() for ranker in rankers if ranker.metric],
        [[member.finish() for member in ranker.members] for ranker in rankers],
        clips.clips,
        [ranker.poor.counts() for ranker in rankers],
        seconds,
    )


class _ModelRanker:
    """A model with the metrics of its own ranking and of the rankings of its members.

    Attributes:
      scorer: scorer of the model.
      metric: metric of the model alone; None if it is the only model.
      members: one metric per member; [] for a single member, or if `each_member` is False.
      poor: counter of the poor clips.
    """

    def __init__(
        self,
        scorer: ModelScorer,
        split: Split,
        pool: np.ndarray,
        *,
        by_itself: bool,
        each_member: bool,
    ):
        self.scorer = scorer
        self.metric = TopKMetric(pool, scorer.columns) if by_itself else None
        self.poor = PoorClips(scorer.model.system)
        self.members: list[TopKMetric] = []
        if each_member and scorer.num_members > 1:
            self.members = [TopKMetric(used & pool, scorer.columns) for used in scorer.use]

    def score(self, blocks: Sequence[Batch]) -> list[Array]:
        """Returns the scores [B, C] of every block, and adds them to the metrics."""
        self.poor.add(blocks)
        scores = self.scorer.score(blocks, member_metrics=self.members)
        if self.metric:
            for block, block_scores in zip(blocks, scores, strict=True):
                self.metric.add(block_scores, block)
            self.metric.flush()
        return scores


def _check_same_clips(first: TrainedModel, other: TrainedModel, split_name: str) -> None:
    """Raises ValueError if two models cannot be blended."""
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
        if not model.system.logs:
            raise UserError(
                f"--runs: {model.name} ranks by raw logits, which cannot be blended with others\n"
                "use --config.eval.scores=log_softmax"
            )
