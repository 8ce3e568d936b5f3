"""Running means of scores: over the branches of a model, its examples, members and runs."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from vidjax.batch import Array

LOG_2 = math.log(2.0)


class MeanScores(NamedTuple):
    """A running weighted mean of scores.

    Logarithms of probabilities near 1 lie near 0, where their mean needs as many digits as they
    have. So the complements, 1 less each probability, are averaged beside the probabilities.

    Attributes:
      total: [B, K] sum of the weighted scores; of their exponentials as a logarithm, if they are
        logarithms.
      rest: [B, K] logarithm of the sum of the weighted complements; None if scores are no
        logarithms.
      weight: [B] sum of the weights.
    """

    total: Array
    rest: Array | None
    weight: Array


def no_scores(like: Array, *, logs: bool) -> MeanScores:
    """Returns a mean of nothing.

    Args:
      like: [B, K] scores, whose shape and dtype count.
      logs: True if scores are logarithms of probabilities.
    """
    empty = jnp.full_like(like, -jnp.inf)
    start = empty if logs else jnp.zeros_like(like)
    return MeanScores(start, empty if logs else None, jnp.zeros(like.shape[0], like.dtype))


def add_scores(mean: MeanScores, scores: Array, weight: Array) -> MeanScores:
    """Adds scores to a running mean.

    Args:
      mean: the mean so far.
      scores: [B, K] scores to add.
      weight: [B] float, 0 or more. With weight 0 nothing is added, even if scores are not finite.

    Returns:
      The new mean.
    """
    total, column = mean.weight + weight, weight[:, None]
    counts = column > 0
    if mean.rest is None:
        return MeanScores(mean.total + jnp.where(counts, scores * column, 0.0), None, total)
    log_weight = jnp.log(column)

    def add(part: Array, more: Array) -> Array:
        return jnp.logaddexp(part, jnp.where(counts, more + log_weight, -jnp.inf))

    return MeanScores(add(mean.total, scores), add(mean.rest, log_complement(scores)), total)


def mean_scores(mean: MeanScores) -> Array:
    """Returns the weighted mean of scores, [B, K]; -inf for clips of weight 0.

    A mean probability above 1/2 is computed from its complement.
    """
    column = mean.weight[:, None]
    safe = jnp.where(column > 0, column, 1.0)
    if mean.rest is None:
        return jnp.where(column > 0, mean.total / safe, -jnp.inf)
    scores, rest = mean.total - jnp.log(safe), mean.rest - jnp.log(safe)
    scores = jnp.where(rest < -LOG_2, log_complement(rest), scores)
    return jnp.where(column > 0, scores, -jnp.inf)


def sum_scores(mean: MeanScores) -> Array:
    """Returns the weighted sum of scores, [B, K], of clips whose weights sum to at most 1.

    What lacks to a sum of 1 counts as a score of probability 0.
    """
    if mean.rest is None:
        return mean.total
    lack = jnp.log(jnp.maximum(1.0 - mean.weight, 0.0))[:, None]
    rest = jnp.logaddexp(mean.rest, lack)
    return jnp.where(rest < -LOG_2, log_complement(rest), mean.total)


def log_complement(logs: Array) -> Array:
    """Returns log(1 - p) of probabilities whose logarithms are given; NaN stays NaN.

    Rounding may have left a logarithm above 0, which counts as 0.

    Source: Mächler 2012, Accurately computing log(1 - exp(-|a|)).
    """
    logs = jnp.minimum(logs, 0.0)
    near = logs > -LOG_2  # p above 1/2
    expm1 = jnp.log(-jnp.expm1(jnp.where(near, logs, -1.0)))
    return jnp.where(near, expm1, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logs))))
