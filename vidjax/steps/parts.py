"""What was collected of parts of a split, joined into what one process collects of all of it.

Clips are numbered as in the whole split, so lists of parts are in the order of one ranking: score
descending, then clip index. The best 100 of their union are the best 100 of all clips, bit for bit.
"""

from collections.abc import Iterable

import numpy as np

from vidjax.steps.topk import MAX_NAMES, NO_CLIP, TopK

ROWS = 4096  # identities whose lists are sorted at a time


def renumber(top: TopK, chosen: np.ndarray) -> TopK:
    """Returns the sorted top k of a part by the clip indices of the whole split.

    Places that are empty for every identity, because the part has fewer clips, are left out.

    Args:
      top: the lists of the part, by its own clip indices.
      chosen: [n] int, clips of the part, in ascending order.
    """
    width = min(len(chosen), np.shape(top.index)[1])
    index = np.asarray(top.index)[:, :width]
    filled = index != NO_CLIP
    index = np.where(filled, chosen[np.where(filled, index, 0)], NO_CLIP)
    return TopK(np.asarray(top.scores)[:, :width], index.astype(np.int32))


def join_tops(tops: Iterable[TopK], num_identities: int, k: int = MAX_NAMES) -> TopK:
    """Returns the sorted top k of all clips, from those of parts that have no clip in common.

    Args:
      tops: the lists of every part; no score is NaN.
      num_identities: C.
      k: number of clips to keep per identity.
    """
    nothing = _keys(np.full((1, k), -np.inf, np.float32), np.full((1, k), NO_CLIP))
    best = np.repeat(nothing, num_identities, axis=0)
    for top in tops:
        for at in range(0, num_identities, ROWS):
            rows = slice(at, at + ROWS)
            more = _keys(np.asarray(top.scores[rows]), np.asarray(top.index[rows]))
            keys = np.concatenate([best[rows], more], axis=1)
            keys.sort(axis=1)
            best[rows] = keys[:, :k]
    return _unpack(best)


def _keys(scores: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Returns uint64 whose ascending order is that of a ranking.

    The bits of positive floats have the order of the floats, those of negative ones the reverse.
    """
    bits = (np.ascontiguousarray(scores) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    descending = np.where(bits >> 31, bits, ~bits & 0x7FFFFFFF)
    return descending.astype(np.uint64) << np.uint64(32) | index.astype(np.uint64)


def _unpack(keys: np.ndarray) -> TopK:
    """Returns the scores and the clip indices of keys."""
    descending = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(descending >> 31, descending, ~descending & 0x7FFFFFFF)
    return TopK(bits.view(np.float32), (keys & np.uint64(0xFFFFFFFF)).astype(np.int32))
