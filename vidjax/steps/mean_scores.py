"""Running means of scores: over branches of a model, examples of a clip, members and runs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.logit_ops import log_softmax

LOG_2 = math.log(2.0)


class MeanScores(NamedTuple):
    """A running weighted mean of scores; of logarithms, the log of the mean of exponentials.

    Log-probabilities near 0 lose their digits when their exponentials are added. So the
    complements, 1 less each probability, are averaged beside the probabilities.
    """

    total: Array  # [B, K] sum of the weighted scores; of logarithms, log of the sum of exponentials
    rest: Array | None  # [B, K] log of the sum of the weighted complements; None if no logarithms
    weight: Array  # [B] sum of the weights


def no_scores(like: Array, *, logs: bool) -> MeanScores:
    """Returns an empty mean for scores [B, K] shaped as `like`; `logs` if these are logarithms."""
    empty = jnp.full_like(like, -jnp.inf)
    start = empty if logs else jnp.zeros_like(like)
    return MeanScores(start, empty if logs else None, jnp.zeros(like.shape[0], like.dtype))


def add_scores(mean: MeanScores, scores: Array, weight: Array) -> MeanScores:
    """Adds scores [B, K] of weight [B] to a running mean; scores of weight 0 may be NaN or Inf."""
    total, column = mean.weight + weight, weight[:, None]
    counts = column > 0
    if mean.rest is None:
        return MeanScores(mean.total + jnp.where(counts, scores * column, 0.0), None, total)
    log_weight = jnp.log(column)

    def add(part: Array, more: Array) -> Array:
        return jnp.logaddexp(part, jnp.where(counts, more + log_weight, -jnp.inf))

    return MeanScores(add(mean.total, scores), add(mean.rest, log_complement(scores)), total)


def mean_scores(mean: MeanScores) -> Array:
    """Returns the mean [B, K] as `MeanScores` defines it; -inf for clips of weight 0."""
    column = mean.weight[:, None]
    safe = jnp.where(column > 0, column, 1.0)
    if mean.rest is None:
        return jnp.where(column > 0, mean.total / safe, -jnp.inf)
    scores, rest = mean.total - jnp.log(safe), mean.rest - jnp.log(safe)
    scores = jnp.where(rest < -LOG_2, log_complement(rest), scores)
    return jnp.where(column > 0, scores, -jnp.inf)


def sum_scores(mean: MeanScores) -> Array:
    """Returns the sum [B, K], as `mean_scores` before it divides; weights may exceed 1 in sum."""
    if mean.rest is None:
        return mean.total
    lack = jnp.log(jnp.maximum(1.0 - mean.weight, 0.0))[:, None]
    excess = jnp.log(jnp.maximum(mean.weight, 1.0))[:, None]
    rest = jnp.logaddexp(mean.rest, lack) - excess
    return jnp.where(rest < -LOG_2, log_complement(rest) + excess, mean.total)


def log_complement(logs: Array) -> Array:
    """Returns log(1 - p) for `logs` = log(p), where p are probabilities; NaN stays NaN.

    Rounding may have left a logarithm above 0, which counts as 0.

    Source: Mächler 2012, Accurately computing log(1 - exp(-|a|)).
    """
    logs = jnp.minimum(logs, 0.0)
    near = logs > -LOG_2  # p above 1/2
    expm1 = jnp.log(-jnp.expm1(jnp.where(near, logs, -1.0)))
    return jnp.where(near, expm1, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logs))))


def blend(
    scores: Sequence[Sequence[Array]], voices: Sequence[tuple[float, bool]], *, logarithms: bool
) -> list[Array]:
    """Blends the scores of several models; returns [B, C] for every block.

    Args:
      scores: for each model the scores [B, C] of every block: log-probabilities. Those of a single
        model may be anything, and are returned as they are.
      voices: for each model its weight, 0 or more, and `TrainedModel.knows_strangers`.
      logarithms: True for a mean of logarithms of probabilities, False for one of probabilities.
    """
    if len(voices) == 1:
        return list(scores[0])
    blocks = zip(*scores, strict=True)
    if not logarithms:
        weights = [weight for weight, _ in voices]
        return [_mean_probabilities(list(block), weights) for block in blocks]
    used = [number for number, (weight, _) in enumerate(voices) if weight > 0]
    at = jnp.asarray([voices[number][0] for number in used])
    known = jnp.asarray([voices[number][1] for number in used])
    return [pool(jnp.stack([block[number] for number in used]), at, known) for block in blocks]


@jax.jit
def _mean_probabilities(scores: Sequence[Array], weights: Sequence[Array | float]) -> Array:
    """Returns the logarithm of the weighted mean of probabilities, [B, C]."""
    total = no_scores(scores[0], logs=True)
    for model_scores, weight in zip(scores, weights, strict=True):
        at = jnp.full(len(model_scores), weight, model_scores.dtype)
        total = add_scores(total, model_scores, at)
    return mean_scores(total)


def complete(scores: Array, knows: Array) -> tuple[Array, Array]:
    """Adds a column 0, for somebody new, to the log-probabilities [R, B, C] of R models.

    Its probability is 1 less the model's sum where `knows` [R] is True. Other models take the mean
    of these logarithms, or -inf without any, and their own scores shrink to make room. Also returns
    [R, B] bool, False where all scores of a clip are -inf. NaN is a score, which the mean shows.
    """
    scored = jnp.any(scores != -jnp.inf, axis=2)  # [R, B]
    knowing = scored & knows[:, None]
    rest = jnp.where(knowing, jax.vmap(log_rest)(scores), 0.0)
    count = jnp.sum(knowing, axis=0)
    mean = jnp.where(count > 0, jnp.sum(rest, axis=0) / jnp.maximum(count, 1), -jnp.inf)  # [B]
    others = jnp.where(knows[:, None], 0.0, log_complement(mean))
    rest = jnp.where(knows[:, None], rest, mean)
    return jnp.concatenate([rest[:, :, None], scores + others[:, :, None]], axis=2), scored


def mean_logarithms(logs: Array, scored: Array, weights: Array) -> Array:
    """Returns the weighted mean [B, K] of logarithms [R, B, K]; it is not normalised.

    Weights are [R], above 0; models count where `scored`, [R, B]. Clips without a model get -inf.
    """
    used = jnp.where(scored, weights[:, None], 0.0)
    share = used / jnp.maximum(jnp.sum(used, axis=0), 1e-30)  # [R, B]
    counted = jnp.where(scored[:, :, None], logs, 0.0) * share[:, :, None]
    total = jnp.sum(jnp.where(scored[:, :, None], counted, 0.0), axis=0)
    return jnp.where(jnp.any(scored, axis=0)[:, None], total, -jnp.inf)


def log_rest(scores: Array) -> Array:
    """Returns [B], the logarithm of 1 less the sum of the probabilities [B, C] of all identities.

    It is computed from the complement of the largest probability, whose logarithm keeps its digits
    near 0, and is at least the rounding error of that complement.
    """
    best = jnp.argmax(scores, axis=1, keepdims=True)
    is_best = jnp.arange(scores.shape[1]) == best
    complement = log_complement(jnp.max(scores, axis=1))
    below = jax.nn.logsumexp(jnp.where(is_best, -jnp.inf, scores), axis=1)
    share = jnp.exp(jnp.where(below > -jnp.inf, below - complement, -jnp.inf))  # of the complement
    least = jnp.finfo(scores.dtype).eps
    return complement + jnp.log(jnp.maximum(1.0 - share, least))


@jax.jit
def pool(scores: Array, weights: Array, knows: Array) -> Array:
    """Returns the mean of log-probabilities of R models, [B, C], normalised with somebody new.

    Scores are [R, B, C] logarithms, weights [R] above 0, and `knows` [R] bool, see `complete`.
    """
    logits = mean_logarithms(*complete(scores, knows), weights)
    some = jnp.any(logits != -jnp.inf, axis=1, keepdims=True)
    found = log_softmax(jnp.where(some, logits, 0.0), jnp.ones(logits.shape[1], bool))
    return jnp.where(some, found, -jnp.inf)[:, 1:]
