"""Computes scores, embeddings and attention with a member, which is one net of an ensemble.

Every evaluation step is a function of (params, model_state, hidden_chunk, batch), and returns an
array with a row for each of B clips. `params` and `model_state` are the weights of the member. If
the feature vectors are divided into parts (`System.num_chunks`), `hidden_chunk`, [] int32, is the
number of the part that is hidden from the member. Otherwise, `hidden_chunk` is not used.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import core
from jax.sharding import Mesh, PartitionSpec

from vidjax.core import devices, fusion
from vidjax.core.batch import Array, Batch, ClipInfo, Frames, ModelOutput
from vidjax.models.base import ModelState, Params
from vidjax.models.build_system import System
from vidjax.models.layers import unit_vectors

# (params and model_state of a member, hidden_chunk [] int32, batch) -> [B, ...]
EvalStep = Callable[[Params, ModelState, Array, Batch], Array]
ROWS_AT_ONCE = 256  # most examples, of all clips, that an exported function computes together


def eval_step(
    system: System, params: Params, model_state: ModelState, hidden_chunk: Array, batch: Batch
) -> Array:
    """Scores B clips for K classes, [B, K]. A clip without a usable frame gets -inf.

    For the arguments, see the docstring of the module.
    """
    forward = _make_forward(system, params, model_state, batch)

    def scores_of(frames: Mapping[str, Frames], mask: Array) -> Array:
        output = forward(frames, mask)
        logits = output.logits / system.temperature
        if output.score_weight is None and logits.shape[1] == 1:
            return system.score_fn(logits[:, 0], system.class_mask)
        scores = system.score_fn(logits, system.class_mask)  # [B, G, K]
        weight = output.score_weight  # [B, G]
        if weight is None:
            weight = jnp.ones(logits.shape[:2], logits.dtype)
        each, weights = ([x[:, i] for i in range(x.shape[1])] for x in (scores, weight))
        return sum_scores(collect_scores(each, weights, logs=system.scores_are_logs))

    logs = system.scores_are_logs
    scores = _reduce_examples(
        system, hidden_chunk, batch, scores_of, logs=logs, reduce=system.reduce
    )
    return jnp.where(_is_usable(system, batch)[:, None], scores, -jnp.inf)


def embed_step(
    system: System, params: Params, model_state: ModelState, hidden_chunk: Array, batch: Batch
) -> Array:
    """Computes the embeddings of B clips with one net of an ensemble, [B, D] float32.

    An embedding has the norm 1, except in three cases:
    - If the model has several classifiers, the embedding has a part for each classifier. A part has
      the norm 1, or is 0 if its classifier does not score the clip.
    - If the model takes each frame as an example, the embedding is the mean over the frames.
    - If a clip has no usable frame, the embedding is 0.
    """
    forward = _make_forward(system, params, model_state, batch)

    def embedding_of(frames: Mapping[str, Frames], mask: Array) -> Array:
        output = forward(frames, mask)
        is_single = output.logits.shape[1] == 1
        return unit_vectors(output.embedding) if is_single else output.embedding

    vectors = _reduce_examples(system, hidden_chunk, batch, embedding_of, logs=False, reduce="mean")
    usable = _is_usable(system, batch)[:, None]
    return jnp.where(usable, vectors, 0.0).astype(jnp.float32)


def attention_step(
    system: System, params: Params, model_state: ModelState, hidden_chunk: Array, batch: Batch
) -> Array | None:
    """Computes the attention between the M input vectors of each of B clips, [B, M, M] float32.

    Element [b, i, j] is how much vector j attends to vector i in clip b. If the model has no
    attention, returns None. The model must classify whole clips. For arguments, see the module.
    """
    fused = system.fuse(None, batch.frames, hidden_chunk)
    with jax.default_matmul_precision(system.precision):
        mask = batch.batch_mask[:, None]
        return _make_forward(system, params, model_state, batch)(fused, mask).attention


def _make_forward(
    system: System, params: Params, model_state: ModelState, batch: Batch
) -> Callable[[Mapping[str, Frames], Array], ModelOutput]:
    """Returns a function that applies the model to G examples of each of the B clips of a batch.

    An example is a whole clip or a single frame. The function takes the frames of the examples,
    [B x G, ...], and the mask of real examples, [B, G] bool.
    """
    measure = system.model.measure_clips(batch.frames)

    def apply(frames: Mapping[str, Frames], mask: Array) -> ModelOutput:
        def repeat(x: Array) -> Array:  # [B] -> [B G]
            return jnp.broadcast_to(x[:, None], mask.shape).reshape(-1)

        clips = ClipInfo(
            index=repeat(batch.clip_index),
            mask=mask.reshape(-1),
            measure=None if measure is None else repeat(measure),
        )
        return system.model.apply({"params": params, **model_state}, frames, clips, train=False)

    return apply


def _is_usable(system: System, batch: Batch) -> Array:
    """Returns [B] bool, True if a clip has a frame of a configured modality."""
    return fusion.has_frames({name: batch.frames[name] for name in system.fuse_eval})


def _reduce_examples(
    system: System,
    hidden_chunk: Array,
    batch: Batch,
    values_of: Callable[[Mapping[str, Frames], Array], Array],
    *,
    logs: bool,
    reduce: str,
) -> Array:
    """Computes K values (scores, or an embedding) for each of B clips, [B, K].

    If `system.frame_is_example` is True, `values_of` computes K values for each frame, and `reduce`
    (`mean` or `max`) joins the values of a clip. Otherwise, `values_of` gets whole clips.

    Args:
      values_of: takes frames [B x G, ...] and the mask of real examples [B, G], and returns values
        [B x G, K]. G is a number of frames of each clip, or 1 for whole clips.
      logs: True if the values are log-probabilities. Then `mean` averages the probabilities.
    """
    fused = system.fuse(None, batch.frames, hidden_chunk)
    with jax.default_matmul_precision(system.precision):
        if not system.frame_is_example:
            return values_of(fused, batch.batch_mask[:, None])
        _, exists = system.to_examples(fused)
        weight = exists / jnp.maximum(jnp.sum(exists, axis=1, keepdims=True), 1)  # [B, T']
        count, size = exists.shape[1], _choose_num_examples(*exists.shape)

        def block(x: Array, first: Array) -> Array:
            """Returns x[:, first : first + size]. For missing elements, another is repeated."""
            if x.shape[1] != count:  # a modality with a single frame repeats it
                return jnp.broadcast_to(x, (x.shape[0], size, *x.shape[2:]))
            if size == 1:
                return jax.lax.dynamic_index_in_dim(x, first, axis=1)
            return jnp.take(x, first + jnp.arange(size), axis=1, mode="clip")

        def values_at(first: Array) -> tuple[Array, Array]:
            """Calls `values_of` for G frames of each clip, beginning with frame `first`.

            Returns the K values of each frame, [B, G, K], and [B, G] bool, False for padding.
            """
            beyond = first + jnp.arange(size) >= count
            real = block(exists, first) & ~beyond

            def take(x: Array) -> Array:
                return block(x, first).reshape(-1, 1, *x.shape[2:])

            frames = {name: jax.tree.map(take, frames) for name, frames in fused.items()}
            values = values_of(frames, batch.batch_mask[:, None] & real)
            return values.reshape(*real.shape, -1), real

        first = jax.eval_shape(values_at, jnp.int32(0))[0]
        nothing = jnp.zeros((first.shape[0], first.shape[2]), first.dtype)
        last = jnp.max(jnp.where(exists, jnp.arange(1, count + 1), 0))
        blocks = (last + size - 1) // size
        if reduce == "max":

            def keep_best(n: Array, best: Array) -> Array:
                values, real = values_at(n * size)
                values = jnp.where(real[..., None], values, -jnp.inf)
                return jnp.maximum(best, jnp.max(values, axis=1))

            return jax.lax.fori_loop(0, blocks, keep_best, nothing - jnp.inf)

        def add(n: Array, total: MeanScores) -> MeanScores:
            values, real = values_at(n * size)
            share = jnp.where(real, block(weight, n * size), 0.0).astype(first.dtype)
            return add_scores(total, values, share)

        return mean_scores(jax.lax.fori_loop(0, blocks, add, make_no_scores(nothing, logs=logs)))


def _choose_num_examples(clips: int, examples: int) -> int:
    """Returns how many examples (frames) of each clip the model processes at once.

    Only in exports, it is more than 1. `clips` is the number of clips of the batch, and `examples`
    is the number of examples of a clip.
    """
    if not (jax.export.is_symbolic_dim(clips) or jax.export.is_symbolic_dim(examples)):
        return 1  # saves memory
    # Only exports have symbols as sizes. The iterations of a loop are slow in other runtimes.
    return core.max_dim(1, core.min_dim(examples, ROWS_AT_ONCE // clips))


def make_eval_step(system: System, mesh: Mesh) -> EvalStep:
    """Returns a compiled `eval_step` that returns only the scores of the C identities, [B, C].

    Other classes, such as strangers, are left out. Every device scores a part of the clips. With
    the same number of clips per device, the scores are equal to the bit on any number of devices.
    """
    identities = slice(1, 1 + system.task.num_identities)
    return _shard_rows(lambda *inputs: eval_step(system, *inputs)[:, identities], mesh)


def make_predict_step(system: System, mesh: Mesh) -> EvalStep:
    """Returns a compiled evaluation step that computes the best class of every clip, [B] int32."""

    def step(params: Params, model_state: ModelState, hidden_chunk: Array, batch: Batch) -> Array:
        scores = eval_step(system, params, model_state, hidden_chunk, batch)
        return jnp.argmax(jnp.where(system.class_mask, scores, -jnp.inf), axis=1)

    return _shard_rows(step, mesh)


def _shard_rows(step: EvalStep, mesh: Mesh) -> EvalStep:
    """Compiles an evaluation step, so that every device computes a part of the clips of a batch."""
    whole = PartitionSpec()

    def apply(params: Params, model_state: ModelState, hidden_chunk: Array, batch: Batch) -> Array:
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(whole, whole, whole, devices.batch_specs(batch)),
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )(params, model_state, hidden_chunk, batch)

    return devices.jit(apply, mesh, out_shardings=devices.row_layout(mesh))


# Running means of scores over a model's classifiers, a clip's examples, members, or runs.

LOG_2 = math.log(2.0)


class MeanScores(NamedTuple):
    """Sums of scores and weights, from which `mean_scores` computes a weighted mean.

    If the scores are logarithms of probabilities, their mean is the logarithm of the mean
    probability. If this probability is near 1, its logarithm loses digits. So the complements, 1
    minus each probability, are summed, too.
    """

    total: Array  # [B, K] weighted sum of scores, or log of the weighted sum of probabilities
    rest: Array | None  # [B, K] log of the weighted sum of complements; None without logarithms
    weight: Array  # [B] sum of the weights


def make_no_scores(like: Array, *, logs: bool) -> MeanScores:
    """Returns an empty `MeanScores`, to which scores [B, K] can be added.

    `like` [B, K] has the shape and dtype of the scores. If `logs` is True, the scores are
    logarithms of probabilities.
    """
    empty = jnp.full_like(like, -jnp.inf)
    start = empty if logs else jnp.zeros_like(like)
    return MeanScores(start, empty if logs else None, jnp.zeros(like.shape[0], like.dtype))


def collect_scores(
    scores: Sequence[Array] | Array, weights: Iterable[Array], *, logs: bool
) -> MeanScores:
    """Sums n arrays of scores, [B, K] each, with n weights, [B] each.

    If `logs` is True, the scores are logarithms of probabilities, and the probabilities are summed.
    """
    total = make_no_scores(scores[0], logs=logs)
    for one, weight in zip(scores, weights, strict=True):
        total = add_scores(total, one, weight)
    return total


def add_scores(mean: MeanScores, scores: Array, weight: Array) -> MeanScores:
    """Adds weighted scores of B clips to the sums in `mean`, and returns the new sums.

    `scores` is [B, K] and `weight` is [B], or each clip has G rows of scores: [B, G, K] and [B, G].
    Scores of weight 0 are ignored, even if they are NaN or infinite.
    """
    if weight.ndim > 1 and weight.shape[1] == 1:
        scores, weight = scores[:, 0], weight[:, 0]
    several, column = weight.ndim > 1, weight[..., None]
    total = mean.weight + (jnp.sum(weight, axis=1) if several else weight)
    counts = column > 0
    if mean.rest is None:
        scores = jnp.where(counts, scores * column, 0.0)
        scores = jnp.sum(scores, axis=1) if several else scores
        return MeanScores(mean.total + scores, None, total)
    log_weight = jnp.log(column)

    def add(part: Array, more: Array) -> Array:
        more = jnp.where(counts, more + log_weight, -jnp.inf)
        return jnp.logaddexp(part, jax.nn.logsumexp(more, axis=1) if several else more)

    return MeanScores(add(mean.total, scores), add(mean.rest, log_complement(scores)), total)


def mean_scores(mean: MeanScores) -> Array:
    """Returns the mean of the scores in `mean`, [B, K]. It is -inf for a clip of weight 0."""
    column = mean.weight[:, None]
    safe = jnp.where(column > 0, column, 1.0)
    if mean.rest is None:
        return jnp.where(column > 0, mean.total / safe, -jnp.inf)
    scores, rest = mean.total - jnp.log(safe), mean.rest - jnp.log(safe)
    scores = jnp.where(rest < -LOG_2, log_complement(rest), scores)
    return jnp.where(column > 0, scores, -jnp.inf)


def sum_scores(mean: MeanScores) -> Array:
    """Returns the weighted sum of all scores that were added to `mean`, [B, K].

    If the scores are log-probabilities, the result is the logarithm of the weighted sum of the
    probabilities.
    """
    if mean.rest is None:
        return mean.total
    lack = jnp.log(jnp.maximum(1.0 - mean.weight, 0.0))[:, None]
    excess = jnp.log(jnp.maximum(mean.weight, 1.0))[:, None]
    rest = jnp.logaddexp(mean.rest, lack) - excess
    return jnp.where(rest < -LOG_2, log_complement(rest) + excess, mean.total)


def log_complement(logs: Array) -> Array:
    """Computes log(1 - p) from `logs` = log(p), where p are probabilities.

    NaN stays NaN. If rounding errors make a logarithm larger than 0, it counts as 0.

    Source: Mächler 2012, Accurately computing log(1 - exp(-|a|)).
    """
    logs = jnp.minimum(logs, 0.0)
    near = logs > -LOG_2  # p above 1/2
    expm1 = jnp.log(-jnp.expm1(jnp.where(near, logs, -1.0)))
    return jnp.where(near, expm1, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logs))))
