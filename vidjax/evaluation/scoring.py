"""Scores the clips of a split with a trained model, in blocks of clips."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble
from vidjax.core.batch import Array, Batch
from vidjax.data.clips import BUCKETS, ClipSource, EvalPlan, make_eval_plan
from vidjax.data.resident import find_least_free_bytes
from vidjax.evaluation import eval_step as eval_step_lib
from vidjax.evaluation.eval_step import MeanScores, add_scores, make_no_scores, mean_scores
from vidjax.models.base import ModelState, Params
from vidjax.models.build_system import System
from vidjax.utils.errors import UserError

# A window is the clips that a member (a net of an ensemble) scores before the next member starts. A
# larger window keeps more scores in memory. A smaller window slices the parameters more often.
WINDOW_ROWS = 4096
WINDOW_BYTES = 512 << 20  # a window ends early at this size of its features
JOINED_FRAMES = 1 << 17  # most frames of a modality, with padding, in joined blocks
WAITING_BYTES = 1 << 30  # a window is smaller if the scores of its clips would take more memory
ALL = -1  # `ScoreBlock.member` of the mean over all members that score a clip


class ScoreBlock(NamedTuple):
    """The scores of B clips for C identities."""

    scores: Any  # [B, C] float32
    clip_index: Any  # [B] int32
    mask: Any  # [B] bool, False for padding, and for clips that the member does not score
    member: int = ALL  # the position of the member in its ensemble

    def without_padding(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores [b, C] and clip indices [b] of the b rows where `mask` is True."""
        rows = slice(None) if self.mask.all() else self.mask
        return self.scores[rows], self.clip_index[rows]


class TrainedModel(NamedTuple):
    """A model with its weights, and the clips to evaluate.

    Attributes:
      name: the folder of the run.
      eval_step: compiled function that scores a batch of clips, given the weights of a member.
      params: the parameters, a tree of arrays [E, ...] for the E members (nets) of an ensemble.
      model_state: the other variables of the members, in the same form.
      training_sets: the clips that each member was trained on.
      data: the clips to evaluate. Labels are 1..C for the identities of this model, 0 for others.
      mesh: the devices.
      block_size: the number of clips that a device scores at a time.
    """

    name: str
    system: System
    eval_step: eval_step_lib.EvalStep
    params: Params
    model_state: ModelState
    training_sets: ensemble.TrainingSets
    data: ClipSource
    mesh: Mesh
    block_size: int

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that the system reads."""
        return tuple(self.system.fuse_eval)

    def member(self, number: int) -> tuple[Params, ModelState, Array]:
        """Returns (params, model_state, hidden_chunk) of a member (net), to call `eval_step` with.

        With `config.ensemble.views`, each member sees all features except one chunk.
        `hidden_chunk`, [] int32, is the index of this chunk. Otherwise, it is not used.
        """
        params, model_state = ensemble.take((self.params, self.model_state), number)
        return params, model_state, np.array(self.training_sets.members[number].view, np.int32)


def score_blocks(
    model: TrainedModel, split_name: str, use: np.ndarray, *, each_member: bool = False
) -> Iterator[ScoreBlock]:
    """Yields the scores of the clips of a split, in blocks of numpy arrays.

    `use` [E, N] bool is True where one of the E members (nets) of the ensemble scores one of the N
    clips. A block with `member` = ALL has the mean over the members that score the clip. If
    `each_member` is True, and E is 2 or more, the blocks of each member are yielded, too.
    """
    waiting: list[ScoreBlock] = []
    # A block is fetched after the next block was started, so that devices work while the host does.
    blocks = _start_blocks(model, split_name, use, each_member=each_member)
    for block in itertools.chain(blocks, [None]):
        for done in waiting:
            yield ScoreBlock(*devices.fetch(done[:3]), done.member)
        waiting = [block] if block else []


def _start_blocks(
    model: TrainedModel, split_name: str, use: np.ndarray, *, each_member: bool
) -> Iterator[ScoreBlock]:
    """Yields the same blocks as `score_blocks`, as arrays on the devices.

    The devices may still be computing the arrays.
    """
    system, windows = model.system, iterate_windows(model, split_name, use)
    if len(use) == 1:
        own = model.member(0)
        for block in itertools.chain.from_iterable(windows):
            scores = keep_best(system, model.eval_step(*own, block))
            yield ScoreBlock(scores, block.clip_index, block.batch_mask)
        return
    scored_by = devices.replicate(model.mesh, jnp.asarray(use))
    for window in windows:
        totals = list[MeanScores | None]([None] * len(window))
        may_score = np.stack([_find_members(use, block) for block in window], axis=1)
        for number in np.flatnonzero(may_score.any(axis=1)).tolist():
            own = model.member(number)
            for i in np.flatnonzero(may_score[number]).tolist():
                block = window[i]
                scores = model.eval_step(*own, block)
                used = _find_used(scored_by, number, block.clip_index, block.batch_mask)
                totals[i] = _add(totals[i], scores, used, logs=system.scores_are_logs)
                if each_member:
                    yield ScoreBlock(keep_best(system, scores), block.clip_index, used, number)
        for block in window:
            scores = keep_best(system, _mean(totals.pop(0)))
            yield ScoreBlock(scores, block.clip_index, block.batch_mask)


def _find_members(use: np.ndarray, block: Batch) -> np.ndarray:
    clips, real = devices.fetch((block.clip_index, block.batch_mask))
    used = np.any(use[:, clips[real]], axis=1)
    return used if np.any(used) else np.arange(len(used)) == 0  # at least one member


def keep_best(system: System, scores: Array) -> Array:
    """Replaces the scores of each clip by -inf, except for its `system.top_classes` highest scores.

    `scores` and the result are [B, C]. If `system.top_classes` is 0, returns `scores`. Identities
    that tie with the last kept identity are kept, too.

    Source: Residual Dense Net (2nd place 2019) submits the best 100 classes of every clip.
    """
    count = system.top_classes
    return _keep_best(scores, count) if 0 < count < scores.shape[1] else scores


@functools.partial(jax.jit, static_argnums=1)
def _keep_best(scores: Array, count: int) -> Array:
    least = jax.lax.top_k(scores, count)[0][:, -1:]
    return jnp.where(scores >= least, scores, -jnp.inf)


_mean = jax.jit(mean_scores)


@jax.jit
def _find_used(use: Array, member: Array | int, clip_index: Array, batch_mask: Array) -> Array:
    return use[member, clip_index] & batch_mask


@functools.partial(jax.jit, static_argnames="logs")
def _add(total: MeanScores | None, scores: Array, used: Array, *, logs: bool) -> MeanScores:
    """Adds the scores [B, C] of a member to a mean, only for the rows where `used` [B] is True.

    If `total` is None, starts a new mean. `logs` is True if the scores are log-probabilities.
    """
    total = make_no_scores(scores, logs=logs) if total is None else total
    return add_scores(total, scores, used.astype(scores.dtype))


def iterate_windows(
    model: TrainedModel, split_name: str, use: np.ndarray | None = None
) -> Iterator[list[Batch]]:
    """Yields the clips of a split in windows. A window is a list of batches on the devices.

    A member (net) of an ensemble scores a whole window before the next member starts. For a single
    member, a window has only one batch. A batch has `model.block_size` clips per device. On
    accelerators, batches are up to 8 times as large if all clips are short.

    `use` [E, N] bool is True where one of E members scores one of N clips. If possible, all clips
    of a batch are scored by the same members. Clips that no member scores are left out. If `use` is
    None, the windows contain all clips.
    """
    split, num_members = model.data.split(split_name), len(model.training_sets.members)
    mesh, block_size = model.mesh, model.block_size
    only = None if use is None else np.any(use, axis=0)
    join = not model.system.frame_is_example
    plan = make_eval_plan(split, model.modalities, only=only, join=join)
    if mesh.devices.flat[0].platform != "cpu":  # the start of a program takes longer than few clips
        # The shorter the clips, the more blocks are joined into one, at most 8.
        longest = max(lengths[plan.bucket.max()] for lengths in plan.padded_lengths.values())
        block_size *= min(8, max(1, JOINED_FRAMES // (block_size * longest)))
    rows = block_size * mesh.size
    if use is not None and len(use) > 1:
        plan = split_by_members(plan, use, rows)
    _check_memory(model.system, plan, block_size, mesh)
    scores_bytes = 4 * model.system.task.num_identities  # of a clip
    most = 1 if num_members == 1 else min(WINDOW_ROWS, max(1, WAITING_BYTES // scores_bytes))
    window, size = list[Batch](), 0
    for host in model.data.eval_batches(plan, rows=rows):
        window.append(devices.shard_batch(mesh, host))
        size += sum(x.nbytes for x in jax.tree.leaves(window[-1]))
        if size >= WINDOW_BYTES or len(window) * rows >= most:
            yield window
            window, size = [], 0
    if window:
        yield window


def split_by_members(plan: EvalPlan, use: np.ndarray, rows: int) -> EvalPlan:
    """Splits each group of clips of similar length in `plan` by the nets that score the clips.

    `use` [E, N] bool is True where one of E nets scores one of N clips. Parts of a group with fewer
    than `rows` clips stay together, because a block of `rows` clips would be mostly padding.
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
