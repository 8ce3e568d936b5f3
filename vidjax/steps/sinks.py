"""Collectors of score blocks: a running top k with its MAP, and the best score of every clip."""

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidjax import devices, metrics
from vidjax.batch import Array, Batch
from vidjax.data.clips import Split
from vidjax.steps import examples, topk
from vidjax.steps.columns import ScoreColumns

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
