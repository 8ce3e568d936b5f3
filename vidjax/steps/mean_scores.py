"""Running means of scores: over branches of a model, examples of a clip, members and runs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vidjax.batch import Array

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


def blend(scores: Sequence[Sequence[Array]], weights: Sequence[float]) -> list[Array]:
    """Returns the logarithm of the weighted mean of probabilities, [B, C] for every block.

    Args:
      scores: for each model the scores [B, C] of every block: log-probabilities. Scores of a single
        model may be anything, and are returned as they are.
      weights: the weight of each model, 0 or more.
    """
    if len(weights) == 1:
        return list(scores[0])
    return [_mean_probabilities(list(block), weights) for block in zip(*scores, strict=True)]


@jax.jit
def _mean_probabilities(scores: Sequence[Array], weights: Sequence[Array | float]) -> Array:
    total = no_scores(scores[0], logs=True)
    for model_scores, weight in zip(scores, weights, strict=True):
        at = jnp.full(len(model_scores), weight, model_scores.dtype)
        total = add_scores(total, model_scores, at)
    return mean_scores(total)
