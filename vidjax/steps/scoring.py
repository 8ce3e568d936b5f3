"""Scores of every clip of a split by trained systems, and what they are worth."""

import collections
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, metrics, ranking
from vidjax.batch import Array, Batch, LazyFeatures
from vidjax.data.clips import ClipSource, Split, longest, make_eval_plan
from vidjax.run.logs import CompileClock, Progress
from vidjax.steps import eval_step as eval_step_lib
from vidjax.steps import examples
from vidjax.system import System

# Members take turns on a few blocks at a time: often enough that no more than that many scores are
# held, seldom enough that taking a member's slice of the parameters costs nothing.
WINDOW_ROWS = 4096
WINDOW_BYTES = 512 << 20


class Scorer:
    """The compiled evaluation of a system; one serves every evaluation of a run."""

    def __init__(self, system: System, mesh: Mesh):
        """Prepares the evaluation of a system on a mesh."""
        self.system = system
        self.step = eval_step_lib.make_eval_step(system, mesh)
        self.modalities = tuple(system.fuse_eval)
        self.num_identities = system.num_identities
        self.logs = system.logs


class TrainedModel(NamedTuple):
    """A trained system as evaluation sees it.

    Attributes:
      name: of the run.
      scorer: its compiled evaluation.
      params: the model's parameters, [E, ...].
      model_state: the model's other collections, [E, ...].
      training_sets: what its members were trained on.
      data: clips labelled for its identities.
      weight: its share where several are joined.
    """

    name: str
    scorer: Scorer
    params: Any
    model_state: Any
    training_sets: ensemble.TrainingSets
    data: ClipSource
    weight: float = 1.0


class ClipScores(NamedTuple):
    """How the clips of a split fare, by clip index.

    Attributes:
      pool: [N] bool, which are ranked.
      best: [N] float32, the highest score of an identity; -inf outside the pool.
      right: [N] bool, whether that identity is the clip's own.
    """

    pool: np.ndarray
    best: np.ndarray
    right: np.ndarray


class Evaluation(NamedTuple):
    """Scores of one split.

    Attributes:
      top: the best 100 clips of every identity, in their final order.
      each: the same of each model, where there are several.
      positives: [C] int, ground-truth clips of every identity in the pool that is ranked.
      clips: the best score of every clip.
      results: `map`, `map_kind`, `top1` and the open-set metrics (where there is a ground truth),
        counts, `eval_clips_per_second`, and what single members and runs reach.
    """

    top: ranking.TopK
    each: list[ranking.TopK]
    positives: np.ndarray
    clips: ClipScores
    results: dict[str, Any]


class _TopKMetric:
    """A running top k over a pool of clips, and what it is worth."""

    def __init__(self, num_identities: int, pool: np.ndarray):
        self.ranking = ranking.Ranking(num_identities, rows=WINDOW_ROWS)
        self.pool = pool
        self._pool = jnp.asarray(pool)

    def add(self, scores: Array, batch: Batch) -> None:
        mask = _in_pool(self._pool, batch.clip_index, batch.batch_mask)
        self.ranking.add((scores, batch.clip_index, mask))

    def positives(self, split: Split) -> np.ndarray:
        """Returns [C] int, the ground-truth clips of every identity, without those outside."""
        outside = np.bincount(split.labels[~self.pool], minlength=len(split.positives) + 1)[1:]
        return split.positives - outside

    def finish(self, split: Any) -> tuple[ranking.TopK, float | None]:
        """Returns the ranking and its MAP, None where the pool has no positive clip."""
        top, positives = self.ranking.finish(), self.positives(split)
        if not split.labelled or not positives.any():
            return top, None
        others = split.num_others if self.pool.all() else 0
        value = metrics.mean_average_precision(top.index, split.labels, positives, others)
        return top, value


class _ClipScoreBuffer:
    """A running `ClipScores`: what `_best` finds, block by block, brought to the host.

    Nothing small is left behind between the large arrays of an evaluation, whose memory would be
    broken up by it, more with every clip.
    """

    def __init__(self, split: Any, pool: np.ndarray):
        best = np.full(len(pool), -np.inf, np.float32)
        self.clips = ClipScores(pool, best, np.zeros(len(pool), bool))
        self._known = split.labels > 0
        self._waiting: collections.deque[tuple[Array, ...]] = collections.deque()

    def add(self, value: Array, right: Array, block: Batch) -> None:
        self._waiting.append((value, right, block.clip_index, block.batch_mask))

    def take(self, but: int = 0) -> None:
        """Waits for all blocks but the last few."""
        while len(self._waiting) > but:
            value, right, clip_index, mask = map(np.asarray, self._waiting.popleft())
            real = mask & self.clips.pool[clip_index]
            value, right, clip_index = value[real], right[real], clip_index[real]
            self.clips.best[clip_index] = value
            self.clips.right[clip_index] = right & self._known[clip_index] & (value > -np.inf)


def score(
    models: Sequence[TrainedModel],
    split_name: str,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool = True,
    check: Callable[[], None] = lambda: None,
    observe: Callable[[Sequence[Batch], Sequence[Sequence[Array]]], None] | None = None,
) -> Evaluation:
    """Returns how systems rank every clip of a split, each clip read once.

    A clip is scored by those members that were not trained on it. Where none is left, for a system
    without folds, all of them score it, and the result says `in_sample`; where folds were not all
    trained, the clips of the others stay out of the pool.

    Args:
      models: one system, or several whose scores are logarithms, on the same clips.
      split_name: which split.
      mesh: the devices.
      block_size: clips that a device scores at a time.
      each_member: whether the members of an ensemble are ranked, too.
      check: called after every few blocks; what it raises ends the evaluation.
      observe: called with every few blocks and, for each model, their scores [B, C].

    Raises:
      ValueError: systems differ in their clips or identities, or no clip may be scored.
    """
    if block_size < 1:
        raise ValueError(f"config.eval.block_size={block_size}: must be positive")
    split = models[0].data.split(split_name)
    num_identities = models[0].scorer.num_identities
    for other in models[1:]:
        _check_alike(models[0], other, split_name)
    entries = [ModelScorer(one, split.clips, mesh) for one in models]
    pool = np.all([entry.use.any(axis=0) for entry in entries], axis=0)
    if not pool.any():
        raise ValueError(
            f"config.eval.split={split_name}: every clip was trained on by all members there are"
        )
    whole = _TopKMetric(num_identities, pool)
    joined = len(entries) > 1
    for entry in entries:
        entry.keep_tallies(num_identities, pool, whole=joined, each_member=each_member)
    tally = _ClipScoreBuffer(split, pool)
    labels = devices.replicate(mesh, jnp.asarray(split.labels))

    began = time.monotonic()
    with CompileClock() as compiling:
        progress = Progress(len(split.clips), unit="clip", label="evaluate", leave=False)
        rows = 1 if not joined and len(entries[0].use) == 1 else WINDOW_ROWS
        for window in windows(models, split_name, block_size, mesh, rows):
            scores = [entry.score(window[i]) for i, entry in enumerate(entries)]
            blocks = window[0]
            if observe:
                observe(blocks, scores)
            if joined:
                weights = [one.weight for one in models]
                scores = [_join(of_block, weights) for of_block in zip(*scores, strict=True)]
            else:
                scores = scores[0]
            for block, of_block in zip(blocks, scores, strict=True):
                whole.add(of_block, block)
                highest, right = _best(of_block, labels, block.clip_index)
                tally.add(highest, right, block)
            tally.take(but=len(blocks))  # a window behind, so that the devices never wait
            progress.advance(sum(int(np.sum(block.batch_mask)) for block in blocks))
            check()
        progress.close()
        top, value = whole.finish(split)
    seconds = time.monotonic() - began - compiling.seconds

    tally.take()
    clips = tally.clips
    results: dict[str, Any] = {}
    if value is not None:
        kind = split_name if all(entry.use.all() for entry in entries) else "out_of_fold"
        results["map"] = value
        results["map_kind"] = "in_sample" if any(one.in_sample for one in entries) else kind
        results |= _clip_metrics(clips, split)
    results |= {
        "num_clips": int(np.sum(pool)),
        "num_identities": num_identities,
        "num_distractors": int(np.sum(split.labels[pool] == 0)) if split.labelled else None,
        "eval_clips_per_second": len(split.clips) / max(seconds, 1e-9),
    }
    each: list[ranking.TopK] = []
    for entry in entries:
        if entry.tally:
            top_of_run, value = entry.tally.finish(split)
            each.append(top_of_run)
            facts = {"name": entry.model.name, "weight": entry.model.weight, "map": value}
            results.setdefault("runs", []).append(facts)
        of_run = {"run": entry.model.name} if joined else {}
        for member, tally in zip(entry.model.training_sets.members, entry.tallies, strict=False):
            facts = {**of_run, **_describe(member), "map": tally.finish(split)[1]}
            results.setdefault("members", []).append(facts)
    return Evaluation(top, each, whole.positives(split), clips, results)


class ModelScorer:
    """A model in one evaluation: who of it may score what, and how well its parts do."""

    def __init__(self, model: TrainedModel, clips: Sequence[str], mesh: Mesh):
        self.model = model
        self.use = ensemble.held_out(model.training_sets, clips)  # [E, n]
        # Without folds there is no member that has not seen a training clip.
        self.in_sample = bool(model.training_sets.trained.all() and not self.use.all())
        if self.in_sample:
            self.use = np.ones_like(self.use)
        self._use = devices.replicate(mesh, jnp.asarray(self.use, jnp.float32))
        self._weights = (model.params, model.model_state)
        self._only = _take(self._weights, 0) if len(self.use) == 1 else None
        self.tally: _TopKMetric | None = None
        self.tallies: list[_TopKMetric] = []

    def keep_tallies(
        self, num_identities: int, pool: np.ndarray, *, whole: bool, each_member: bool
    ) -> None:
        """Prepares to rank what the model scores as a `whole`, and its `members`."""
        if whole:
            self.tally = _TopKMetric(num_identities, pool)
        if each_member and len(self.use) > 1:
            self.tallies = [_TopKMetric(num_identities, member & pool) for member in self.use]

    def score(self, blocks: Sequence[Batch], without: int | None = None) -> list[Array]:
        """Returns the scores [B, C] of some blocks: the mean over members that may score a clip.

        Args:
          blocks: on the devices.
          without: the number of a member that is left out.
        """
        scorer = self.model.scorer
        totals: list[Any] = [None] * len(blocks)
        for number, member in enumerate(self.model.training_sets.members):
            if number == without:
                continue
            params, model_state = self._only or _take(self._weights, number)
            for i, block in enumerate(blocks):
                scores = scorer.step(params, model_state, jnp.int32(member.view), block)
                if self.tallies:
                    self.tallies[number].add(scores, block)
                if len(self.use) == 1:
                    totals[i] = scores
                else:
                    use = _rows(self._use, number, block.clip_index)
                    totals[i] = _add(totals[i], scores, use, logs=scorer.logs)
            if self.tallies:
                self.tallies[number].ranking.flush()  # not the scores of all members at once
        if len(self.use) > 1:
            totals = [_mean(total, weight, logs=scorer.logs) for total, weight in totals]
        if self.tally:
            for block, scores in zip(blocks, totals, strict=True):
                self.tally.add(scores, block)
            self.tally.ranking.flush()
        return totals


def _describe(member: ensemble.Member) -> dict[str, Any]:
    """Returns what sets a member apart: the fields that are not at their default."""
    defaults = ensemble.Member._field_defaults
    fields = member._asdict()
    number = fields.pop("number")
    differs = {name: value for name, value in fields.items() if value != defaults[name]}
    return {"member": number, **differs}


def _check_alike(one: TrainedModel, other: TrainedModel, split: str) -> None:
    if one.data.split(split).clips != other.data.split(split).clips:
        few = sorted(set(one.data.split(split).clips) ^ set(other.data.split(split).clips))[:3]
        raise ValueError(
            f"--runs: the data of {one.name} and {other.name} differ in the clips of {split}\n"
            f"such as {', '.join(few)}"
        )
    if tuple(one.data.identities) != tuple(other.data.identities):
        raise ValueError(
            f"--runs: {one.name} and {other.name} were trained on different lists of identities"
        )
    for run in (one, other):
        if not run.scorer.logs:
            raise ValueError(
                f"--runs: {run.name} ranks by raw logits, which cannot be joined with others\n"
                "use --config.eval.scores=log_softmax"
            )


def windows(
    models: Sequence[TrainedModel], split: str, block_size: int, mesh: Mesh, rows: int
) -> Iterator[list[list[Batch]]]:
    """Yields for every model the same few blocks of clips, about `rows` rows of them.

    Datasets are read once, whoever shares them.
    """
    modalities: dict[int, dict[str, None]] = {}
    for one in models:
        modalities.setdefault(id(one.data), {}).update(dict.fromkeys(one.scorer.modalities))
    datasets = {id(one.data): one.data for one in models}
    splits = {key: data.split(split) for key, data in datasets.items()}
    lengths = np.max([longest(splits[key], tuple(modalities[key])) for key in datasets], axis=0)
    plans = {
        key: make_eval_plan(splits[key], tuple(modalities[key]), lengths=lengths)
        for key in datasets
    }
    rows_of_block = block_size * mesh.size
    streams = [data.eval_batches(plans[key], rows=rows_of_block) for key, data in datasets.items()]
    window: list[dict[int, Batch]] = []
    size = 0
    for host in zip(*streams, strict=True):
        for other in host[1:]:
            if not np.array_equal(host[0].clip_index, other.clip_index):
                raise ValueError("--runs: the records of the runs' data are in different orders")
        batches = [devices.shard_batch(mesh, batch) for batch in host]
        window.append(dict(zip(datasets, batches, strict=True)))
        size += sum(_nbytes(batch) for batch in host)
        if size >= WINDOW_BYTES or len(window) * len(host[0].clip_index) >= rows:
            yield [[batches[id(one.data)] for batches in window] for one in models]
            window, size = [], 0
    if window:
        yield [[batches[id(one.data)] for batches in window] for one in models]


def _nbytes(batch: Batch) -> int:
    frames = [
        one._replace(features=one.features.index) if isinstance(one.features, LazyFeatures) else one
        for one in batch.frames.values()
    ]
    return sum(x.nbytes for x in jax.tree.leaves(frames))


_take = jax.jit(ensemble.take)


@jax.jit
def _rows(table: Array, member: Array | int, clip_index: Array) -> Array:
    return table[member, clip_index]


@functools.partial(jax.jit, static_argnames="logs")
def _add(
    total: tuple[Array, Array] | None, scores: Array, weight: Array, *, logs: bool
) -> tuple[Array, Array]:
    if total is None:
        start = jnp.full_like(scores, -jnp.inf if logs else 0.0)
        total = start, jnp.zeros_like(weight)
    return ensemble.add_scores(total[0], scores, weight, logs=logs), total[1] + weight


_mean = jax.jit(ensemble.mean_scores, static_argnames="logs")


@jax.jit
def _join(scores: Sequence[Array], weights: Sequence[Array | float]) -> Array:
    """Returns the weighted mean of the probabilities that several systems give, as logarithms."""
    total = None
    for one, weight in zip(scores, weights, strict=True):
        total = _add(total, one, jnp.full(len(one), weight), logs=True)
    assert total is not None
    return ensemble.mean_scores(total[0], total[1], logs=True)


@jax.jit
def _in_pool(pool: Array, clip_index: Array, batch_mask: Array) -> Array:
    return pool[clip_index] & batch_mask


@jax.jit
def _best(scores: Array, labels: Array, clip_index: Array) -> tuple[Array, Array]:
    """Returns [B] the best score, and whether it is that of the clip's own identity."""
    return jnp.max(scores, axis=1), examples.is_best(scores, labels[clip_index] - 1)


def _clip_metrics(clips: ClipScores, split: Split) -> dict[str, float | None]:
    """Returns key -> value of every metric in `metrics.CLIP_METRICS`."""
    labels = split.labels
    return {name: metric.fn(clips, labels) for name, metric in metrics.CLIP_METRICS.items()}
