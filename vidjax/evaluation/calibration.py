"""Learns how to join the scores of several runs, from clips that the runs were not trained on.

The joint log odds of identity j against a stranger are

    sum over the runs that can score the clip and know identity j of log(1 - trust + trust x_j)

where log x_j = scale r_j + offset, and r_j are the log odds of the run. The trust in a run is the
probability that the scores of the run are meaningful. For example, a run that sees only the heads
of people is often sure of a wrong person if no frame shows a head clearly. Scale, offset and trust
are learned by multinomial logistic regression, with strangers as an additional class.

Source: the logistic regression is from Brümmer and du Preez 2006, Application-independent
evaluation of speaker detection. `trust`, and the constant STRANGERS in `learn`, are our design.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from vidjax.core import ensemble
from vidjax.core.batch import Array
from vidjax.core.losses import log_softmax
from vidjax.evaluation.scores import ROWS, Scores

PARTS = 3  # the numbers for the clips of a part are learned on the other parts
MAX_CLIPS = 4000  # clips to learn from; if there are more, they are drawn
CANDIDATES = 100  # identities of a clip to learn from; if there are more, half of them are drawn
WRONG = 0.02  # assumed share of wrong labels; without it, probabilities are too low
STRANGERS = 0.1  # weight of a clip as a clip of a stranger, if no clip shows a stranger
PRIOR = 0.02  # weight of the prior, whose means are START
START = {"scale": 0.0, "offset": 0.0, "trust": 2.5}
LEAST = 1e-6  # of the probability of a stranger; float32 does not distinguish smaller ones


class Calibration(NamedTuple):
    """The learned parameters that join the scores of R runs, see the docstring of the module.

    All arrays have an additional first axis if the parameters differ between clips, or between the
    parts of `split_clips`.
    """

    scale: Array  # [R] logarithm of the scale
    offset: Array  # [R]
    trust: Array  # [R] logit of the trust
    stranger: Array  # [] log odds of a stranger


class Examples(NamedTuple):
    """Scores of n clips for K identities (candidates) each. `learn` learns parameters from them."""

    logs: np.ndarray  # [R, n, K] float32, logarithms of probabilities
    unknown: np.ndarray  # [R, n] float32, log of the probability of a stranger
    weight: np.ndarray  # [n, K] float32, the number of identities that a candidate represents
    right: np.ndarray  # [n] int32, the right candidate from 1 to K, or 0 for a stranger
    part: np.ndarray  # [n] int32, from 0 to PARTS - 1


@jax.jit
def log_unknown(logs: Array) -> Array:
    """Computes the logarithm of the probability that a clip shows a stranger, [..., B].

    `logs` [..., B, C] are logarithms of the probabilities of all identities.
    """
    known = jnp.sum(jnp.exp(logs), axis=-1)
    return jnp.log(jnp.maximum(1.0 - known, LEAST))


def join_logs(logs: Array, unknown: Array, calibration: Calibration) -> Array:
    """Computes the joint logits of B clips, [B, 1 + K]. Column 0 is a stranger.

    Args:
      logs: [R, B, K], the log-probabilities of K identities. A value is -inf if the run cannot
        score the clip, or does not know the identity.
      unknown: [R, B], the log-probabilities that the clips show strangers.
      calibration: the learned parameters, arrays [R], or [B, R] if they differ between the clips.
    """
    numbers = [jnp.moveaxis(jnp.asarray(x), -1, 0)[..., None] for x in calibration[:-1]]
    scale, offset, trust = (x[:, None] if x.ndim == 2 else x for x in numbers)  # [R, 1 or B, 1]
    known = logs > -jnp.inf
    ratio = jnp.exp(scale) * (jnp.where(known, logs, 0.0) - unknown[..., None]) + offset
    term = jnp.logaddexp(jax.nn.log_sigmoid(-trust), jax.nn.log_sigmoid(trust) + ratio)
    total = jnp.sum(jnp.where(known, term, 0.0), axis=0)
    total = jnp.where(jnp.any(known, axis=0), total, -jnp.inf)
    stranger = jnp.broadcast_to(jnp.asarray(calibration.stranger), total.shape[:1])
    return jnp.concatenate([stranger[:, None], total], axis=1)


@jax.jit
def join_scores(logs: Array, calibration: Calibration) -> Array:
    """Joins the scores of R runs for B clips and C identities.

    `logs` [R, B, C] are the logarithms of the probabilities that a clip shows an identity. Returns
    the logarithms of the joint probabilities, [B, C]. For `calibration`, see `join_logs`.
    """
    logits = join_logs(logs, log_unknown(logs), calibration)
    return log_softmax(logits, jnp.ones(logits.shape[1], bool))[:, 1:]


def split_clips(labels: np.ndarray) -> np.ndarray:
    """Divides the N clips of a split into PARTS parts. Returns the part of each clip, [N] int32.

    The parameters for a part are learned from the clips of the other parts. Parts are numbered from
    0. `labels` [N] are the labels of the clips. If possible, every part gets clips of every
    identity.
    """
    return ensemble.assign_folds(labels, PARTS, 0)


def draw_clips(pool: np.ndarray, most: int) -> np.ndarray:
    """Draws at most `most` of the clips where `pool` [N] bool is True.

    Returns [N] bool, True for the drawn clips. Equal arguments give equal clips.
    """
    places = np.random.default_rng(0).permutation(np.flatnonzero(pool))
    return np.isin(np.arange(len(pool)), places[:most])


def make_examples(runs: Sequence[Scores], labels: np.ndarray, drawn: np.ndarray) -> Examples:
    """Returns the scores of clips for a few identities, see `choose_candidates`.

    `runs` are the scores of each run for the N clips of a split, and `labels` [N] are the labels of
    the clips. `drawn` [N] bool is True for the clips that become examples.
    """
    places, part = np.flatnonzero(drawn), split_clips(labels)
    return _concatenate([
        choose_candidates(
            np.stack([run.array[run.row[rows]] for run in runs]), labels[rows], part[rows]
        )
        for rows in np.split(places, range(ROWS, len(places), ROWS))
    ])  # fmt: skip


def choose_candidates(logs: np.ndarray, labels: np.ndarray, part: np.ndarray) -> Examples:
    """Chooses candidates for n clips, and returns the scores of the clips for the candidates.

    Candidates are the right identity, the best identities of each run, and random identities. Each
    random identity represents w identities, and has the weight w in the result.

    Args:
      logs: logarithms of the probabilities of R runs, [R, n, C].
      labels: [n], 0 for strangers, or 1 + the column of the right identity in `logs`.
      part: [n], see `split_clips`.

    Source: importance sampling of Bengio and Senécal 2008, who draw all wrong candidates at random.
    """
    num_runs, num_clips, num_columns = logs.shape
    number, rows = min(CANDIDATES, num_columns), np.arange(num_clips)
    key = np.random.default_rng(0).random((num_clips, num_columns))
    best = np.argsort(-logs, axis=2, kind="stable")[..., : number // (2 * num_runs)]
    key[rows[:, None], best] = -1.0
    known = labels > 0
    key[rows[known], labels[known] - 1] = -2.0  # the first candidate
    columns = np.argsort(key, axis=1, kind="stable")[:, :number]
    chosen = np.sum(key < 0, axis=1, keepdims=True)
    share = (num_columns - chosen) / np.maximum(number - chosen, 1)
    drawn = np.take_along_axis(key, columns, axis=1) >= 0
    weight = np.where(drawn, share, 1.0).astype(np.float32)
    unknown = np.asarray(log_unknown(logs))
    logs = np.take_along_axis(logs, columns[None], axis=2)
    return Examples(logs, unknown, weight, known.astype(np.int32), part)


def learn(examples: Sequence[Examples]) -> Calibration:
    """Learns the parameters that join the scores of several runs, by cross-fitting.

    The arrays of the result have PARTS + 1 rows. Row p is learned from all clips that are not in
    part p (see `split_clips`). The last row is learned from all clips.

    `examples` has an item for each split. If no clip shows a stranger, a copy of each clip,
    without the scores of the right identity, is used as a clip of a stranger.
    """
    joined = _concatenate(examples)
    weights = np.ones(len(joined.right), np.float32)
    if joined.right.all():
        joined = _concatenate([joined, _leave_out_right(joined)])
        weights = np.where(joined.right > 0, 1, STRANGERS).astype(np.float32)
    sets = [fit(joined, weights * (joined.part != x)) for x in range(PARTS + 1)]
    return Calibration(*map(np.stack, zip(*sets, strict=True)))


def fit(examples: Examples, weights: np.ndarray) -> Calibration:
    """Learns parameters from n clips with `weights` [n], by maximum a posteriori estimation."""
    num_runs = len(examples.logs)
    start = np.concatenate([np.full(num_runs, x) for x in START.values()] + [np.zeros(1)])
    clips = jax.device_put((*examples[:4], weights / np.sum(weights)))

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _loss(np.asarray(point, np.float32), *clips)
        gap = point - start
        more = PRIOR * gap / len(gap)
        return float(value) + float(gap @ more) / 2, np.asarray(slope, np.float64) + more

    best = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B")
    return _unpack(np.asarray(best.x, np.float32), num_runs)


def _unpack(point: Array, num_runs: int) -> Calibration:
    return Calibration._make([*point[:-1].reshape(len(START), num_runs), point[-1]])


@jax.jit
@jax.value_and_grad
def _loss(
    point: Array, logs: Array, unknown: Array, weight: Array, right: Array, share: Array
) -> Array:
    """Computes the mean cross-entropy of n clips and, by `value_and_grad`, its gradient at `point`.

    `point` has all learned parameters in one array. In the mean, clips have the weights `share`
    [n], whose sum is 1. A label is assumed to be wrong with probability WRONG. The other arguments
    are fields of the class `Examples`.
    """
    logits = join_logs(logs, unknown, _unpack(point, len(logs)))
    logits += jnp.pad(jnp.log(weight), ((0, 0), (1, 0)))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), right[:, None], axis=1)[:, 0]
    floor = jnp.log(WRONG / logits.shape[1])
    return -jnp.sum(share * jnp.logaddexp(chosen + jnp.log(1 - WRONG), floor))


def _concatenate(examples: Sequence[Examples]) -> Examples:
    """Concatenates the clips of several Examples.

    The clips are axis 1 of `logs` and `unknown`, and axis 0 of the other fields.
    """
    fields = zip((1, 1, 0, 0, 0), *examples, strict=True)
    return Examples(*(np.concatenate(parts, axis=axis) for axis, *parts in fields))


def _leave_out_right(examples: Examples) -> Examples:
    """Turns clips into clips of strangers, by removing the scores of the right identities."""
    logs = examples.logs.copy()
    logs[:, np.arange(logs.shape[1]), examples.right - 1] = -np.inf
    return examples._replace(logs=logs, right=np.zeros_like(examples.right))
