"""Re-ranks clips: the probabilities of a clip are averaged with the probabilities of similar clips.

P_ic is the probability that clip i shows identity c. A PLDA model compares all pairs of clips.

    A_ij = the log-likelihood ratio that the clips i and j show the same person, summed over the
           modalities that both clips have, times SCALE and the learned scale of the run
    D_ij = the probability, computed from P, that the clips show two different identities
    t    = max(THRESHOLD, log(N / OTHERS)), where N is the number of clips
    v_ij = (1 - D_ij) sigmoid(A_ij - t)
    w_ij = (1 - max_c P_ic) v_ij / (1 + sum_j v_ij)

The clips of identity c are ranked by (1 - sum_j w_ij) P_ic + sum_j w_ij P_jc. The sums run over the
neighbours j of clip i, the NEIGHBOURS clips with the largest A_ij. For clips of a lookalike, A_ij
is high, but 1 - D_ij is near 0. If P_ic is near 1 for an identity c, all w_ij are near 0.

Source: Donoser and Bischof 2013, Diffusion processes for retrieval revisited; Iscen and others
2017, Efficient diffusion on region manifolds. The formula of w is our design.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import scipy

from vidjax.core import devices
from vidjax.evaluation import topk
from vidjax.evaluation.eval_step import embed_step
from vidjax.evaluation.scores import Scores
from vidjax.evaluation.scoring import TrainedModel, iterate_windows
from vidjax.evaluation.topk import TopK
from vidjax.models.two_covariance import all_log_ratios, split_embeddings

NEIGHBOURS = 5
SCALE = 0.1  # a typical `Settings.scale`
THRESHOLD, OTHERS = 6.0, 3  # about OTHERS clips are assumed to show the person of a clip
LIMIT = 6.0  # a log-likelihood ratio of a modality is cut to +-LIMIT
MAX_ROWS = 256  # most clips that are compared with all clips at a time
MAX_VALUES = 1 << 22  # probabilities or pairs in memory at a time


class View(NamedTuple):
    """The vectors by which a member (a net of an ensemble) compares n clips in a modality."""

    vectors: np.ndarray  # [n, D] float32, coordinates of `two_covariance.Space`
    present: np.ndarray  # [n] bool, True if the clip has the modality
    ratio: np.ndarray  # [D] float32, see `two_covariance.Space`
    scale: float  # factor on the log-likelihood ratio of a pair


def view_groups(
    model: TrainedModel,
    split_name: str,
    use: np.ndarray,
    groups: Sequence[np.ndarray],
    factor: float,
) -> Iterator[list[View]]:
    """Computes the vectors by which a PLDA model compares clips, for several groups of clips.

    Yields a list for each group, with a `View`, the vectors of the group, for each modality.

    Args:
      model: the PLDA model, with the clips.
      split_name: the split of the clips.
      use: [E, N] bool, True if a member (net) of the run scores a clip of the split.
      groups: groups of clips, each as clip indices [n]. All clips of a group must have the same
        members in `use`. The first of these members computes the vectors.
      factor: the learned scale of the run, a factor of `View.scale`.
    """
    widths, embed = model.system.task.modalities, jax.jit(partial(embed_step, model.system))
    for clips in groups:
        number = int(np.argmax(use[:, clips[0]]))
        own, only = model.member(number), np.zeros_like(use)
        only[number, clips] = True
        found = np.zeros((use.shape[1], sum(widths.values())), np.float32)
        for block in itertools.chain.from_iterable(iterate_windows(model, split_name, only)):
            done = embed(*own, block), block.clip_index, block.batch_mask
            vectors, index, mask = devices.fetch(done)
            found[index[mask]] = vectors[mask]
        solved = devices.fetch(own[1]["solved"])
        views = []
        for name, x in split_embeddings(found[clips], widths).items():
            space = solved[name]["space"]
            z = (x - space.mean) @ space.transform
            views.append(View(z, np.any(x != 0, axis=1), space.ratio, SCALE * factor))
        yield views


def weigh_neighbours(
    scores: Scores, groups: Sequence[tuple[np.ndarray, Sequence[View]]]
) -> scipy.sparse.csr_array:
    """Returns the weights of similar clips (neighbours), a sparse matrix [n, n].

    Element [i, j] is w_ij of the module docstring, the weight of clip j as a neighbour of clip i.

    Args:
      scores: logarithms of probabilities, with a row for each of n clips.
      groups: a pair for each group of clips: the rows of these clips in `scores`, and a `View` of
        these clips for each modality. Clips of different groups are not compared.
    """
    parts = [part for rows, views in groups for part in _compare(scores.array, rows, views)]
    rows, columns, weights = map(np.concatenate, zip(*parts, strict=True))
    return scipy.sparse.csr_array((weights, (rows, columns)), (len(scores.array),) * 2)


def _compare(
    logs: np.ndarray, rows: np.ndarray, views: Sequence[View]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the weights w_ij of the module docstring for a group of n clips, in portions.

    `rows` [n] are the rows of the group in `logs`, the log-probabilities of all clips. `views` are
    the vectors of the group. A portion is three arrays: the rows i, the rows j, and the weights.
    """
    most, size = min(NEIGHBOURS, len(rows)), min(MAX_ROWS, 1 + MAX_VALUES // len(rows))
    threshold = max(THRESHOLD, np.log(len(rows) / OTHERS))
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        evidence = np.zeros((len(rows[part]), len(rows)), np.float32)
        for view in views:
            ratio = view.scale * all_log_ratios(view.ratio, view.vectors[part], view.vectors)
            both = view.present[part, None] & view.present
            evidence += np.where(both, np.clip(ratio, -LIMIT, LIMIT), 0)
        evidence[rows[part, None] == rows] = -np.inf  # a clip is no neighbour of itself
        best = np.argpartition(-evidence, most - 1, axis=1)[:, :most]
        weight = scipy.special.expit(np.take_along_axis(evidence, best, axis=1) - threshold)
        one, other = np.exp(logs[rows[part], None]), np.exp(logs[rows[best]])  # [n, 1 or most, C]
        known = one.sum(axis=2) * other.sum(axis=2)
        weight *= 1 - np.maximum(known - np.vecdot(one, other), 0)
        weight *= (1 - one.max(axis=2)) / (1 + weight.sum(axis=1, keepdims=True))
        yield np.repeat(rows[part], most), rows[best].ravel(), weight.ravel()


def rank(scores: Scores, weights: scipy.sparse.csr_array) -> TopK:
    """Ranks clips by their probabilities, averaged with the probabilities of similar clips.

    Only the order changes: the scores in the result are the scores before the averaging.

    Args:
      scores: logarithms of probabilities, with a row for each of n clips.
      weights: [n, n], see `weigh_neighbours`.
    """
    index, rest = np.flatnonzero(scores.pool).astype(np.int32), 1 - weights.sum(axis=1)[:, None]
    width = max(1, MAX_VALUES // max(len(index), 1))
    tops = []
    for first in range(0, len(scores.identities), width):
        logs = scores.array[:, first : first + width]
        before = np.exp(logs.astype(np.float64))
        with np.errstate(divide="ignore"):  # the logarithm of 0
            after = np.log(rest * before + weights @ before)
        top = topk.rank([(after, index, np.ones(len(index), bool))], logs.shape[1])
        tops.append((_read(logs, index, top.index), top.index))
    return TopK(*map(np.concatenate, zip(*tops, strict=True)))


def _read(logs: np.ndarray, clips: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Returns the scores [C, k] of the k ranked clips of each of C identities.

    `index` [C, k] are the indices of the ranked clips. Where it is NO_CLIP, the score is -inf.
    `logs` [n, C] are the scores of n clips, and `clips` [n] their indices, ascending.
    """
    rows = np.minimum(np.searchsorted(clips, index), len(clips) - 1)
    scores = logs[rows, np.arange(len(index))[:, None]]
    return np.where(index == topk.NO_CLIP, np.float32(-np.inf), scores)
