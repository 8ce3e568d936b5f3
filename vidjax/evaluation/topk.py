"""Ranks clips with numpy: finds the exact k best clips of every identity.

The scores come in blocks, each with the scores of B clips for all C identities. Clips are ordered
by descending score, and clips with equal scores by ascending clip index, the order of their names.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NO_CLIP = np.iinfo(np.int32).max  # clip index of an empty entry; sorts after every real clip
MAX_NAMES = 100  # largest number of clips per identity in a submission
CHUNK = 1 << 14  # identities that are ranked together; numpy sorts uint16 in linear time
MAX_CANDIDATES = 1 << 19  # most candidates of a chunk that wait to be merged into its best clips
TINY = np.finfo(np.float32).tiny
EMPTY = np.uint64(0x007FFFFF << 32)  # sort key of an empty entry: -inf and NO_CLIP


class TopK(NamedTuple):
    """The k best clips of C identities: scores [C, k] float32 and clip indices [C, k] int32.

    If an identity has fewer clips, its row is filled with the score -inf and the index NO_CLIP.
    """

    scores: np.ndarray
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)


# Scores, clip_index and batch_mask, see `HostTopK.add`. `rank` ignores further items.
ScoreBlock = tuple[Any, Any, Any] | tuple[Any, Any, Any, int]


class HostTopK:
    """Finds the k best clips of every identity. The scores are given in blocks of clips."""

    def __init__(self, num_identities: int, k: int = MAX_NAMES):
        self._k = k
        self._chunks = [
            _Chunk(min(CHUNK, num_identities - first), k)
            for first in range(0, num_identities, CHUNK)
        ]

    def add(self, scores: np.ndarray, clip_index: np.ndarray, batch_mask: np.ndarray) -> None:
        """Adds a block: the scores [B, C] of B clips for C identities.

        `clip_index` [B] int32 has the indices of the clips. `batch_mask` [B] bool is False for
        padding. Padding is ignored. A clip must not be added twice. The result does not depend on
        the order, size and padding of the blocks. NaN counts as -inf, and magnitudes below the
        smallest normal float32 count as 0.
        """
        if not batch_mask.all():
            scores, clip_index = scores[batch_mask], clip_index[batch_mask]
        scores = scores.astype(np.float32, copy=False)
        for number, chunk in enumerate(self._chunks):
            chunk.add(scores[:, number * CHUNK : (number + 1) * CHUNK], clip_index)

    def finish(self) -> TopK:
        """Returns the k best clips of every identity, best first."""
        for chunk in self._chunks:
            chunk.merge()
        keys = [chunk.keys for chunk in self._chunks] or [np.empty((0, self._k), np.uint64)]
        return _read_keys(np.sort(np.concatenate(keys), axis=1)[:, ::-1])


class _Chunk:
    """Collects the k best clips of each of C identities, where C is at most CHUNK.

    `keys` [C, k] uint64 are the sort keys of these clips (see `_make_keys`), in any order.
    """

    def __init__(self, num_identities: int, k: int):
        self.keys = np.full((num_identities, k), EMPTY)
        self._set_bounds()
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # identities and keys
        self._num_waiting = 0

    def add(self, scores: np.ndarray, clip_index: np.ndarray) -> None:
        """Collects clips whose scores [B, C] can be among the k best of an identity.

        `clip_index` [B] has the indices of the B clips. If many clips are collected, calls `merge`.
        """
        after_last = self._last < clip_index.min(initial=NO_CLIP)
        bounds = np.where(after_last, self._above_least, self._least)
        places = np.flatnonzero(~(scores < bounds))
        rows, identities = np.divmod(places.astype(np.uint32), np.uint32(len(self.keys)))
        keys = _make_keys(scores[rows, identities], clip_index[rows])
        self._waiting.append((identities.astype(np.uint16), keys))
        self._num_waiting += len(keys)
        if self._num_waiting > MAX_CANDIDATES:
            self.merge()

    def merge(self) -> None:
        """Adds the clips that `add` collected to `keys`, but keeps only the k best clips."""
        if not self._num_waiting:
            return
        identities, keys = map(np.concatenate, zip(*self._waiting, strict=True))
        order = np.argsort(identities, kind="stable")
        (num_identities, k), counts = self.keys.shape, np.bincount(identities)
        ends = np.cumsum(counts)
        place = np.arange(len(keys)) - np.repeat(ends - counts, counts)  # index within an identity
        most = int(counts.max())
        table = np.full((num_identities, k + most), EMPTY)
        table[:, :k] = self.keys
        table[identities[order], k + place] = keys[order]
        table.partition(most, axis=1)
        self.keys = table[:, most:].copy()
        self._set_bounds()
        self._waiting, self._num_waiting = [], 0

    def _set_bounds(self) -> None:
        """Computes, for each identity, the score below which `add` ignores a clip."""
        least, self._last = _read_keys(self.keys.min(axis=1))
        # Magnitudes below TINY count as 0. So if the least score is 0, these scores tie with it.
        self._least = np.where(least == 0, -TINY, least)
        self._above_least = np.where(least == 0, TINY, np.nextafter(least, np.float32(np.inf)))


def _make_keys(scores: np.ndarray, clip_index: np.ndarray) -> np.ndarray:
    """Returns a uint64 key for each score of a clip. A better clip has a larger key.

    The upper 32 bits sort like the float32 scores: all bits of negative numbers are flipped, and
    only the sign bit of other numbers. The lower 32 bits are NO_CLIP - clip_index.
    """
    scores = np.where(np.isnan(scores), -np.inf, np.where(np.abs(scores) < TINY, 0, scores))
    bits = scores.astype(np.float32).view(np.uint32)
    upper = bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    lower = NO_CLIP - clip_index.astype(np.int32)
    return upper.astype(np.uint64) << np.uint64(32) | lower.astype(np.uint64)


def _read_keys(keys: np.ndarray) -> TopK:
    """Returns the scores and clip indices that `_make_keys` encoded in the uint64 `keys`."""
    upper = (keys >> np.uint64(32)).astype(np.uint32)
    bits = upper ^ np.where(upper >> 31, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    index = NO_CLIP - (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)
    return TopK(bits.view(np.float32), index)


def rank(blocks: Iterable[ScoreBlock], num_identities: int, k: int = MAX_NAMES) -> TopK:
    """Returns the k best clips of every identity. For the items of a block, see `HostTopK.add`."""
    top = HostTopK(num_identities, k)
    for block in blocks:
        top.add(*map(np.asarray, block[:3]))
    return top.finish()


def count_ties(top: TopK) -> int:
    """Counts ranked clips with the same finite score as the clip before them in the list."""
    scores = top.scores
    return int(np.sum((scores[:, 1:] == scores[:, :-1]) & np.isfinite(scores[:, 1:])))


def convert_to_lists(
    identities: Sequence[str], names: Mapping[int, str], top: TopK
) -> dict[str, list[tuple[str, float]]]:
    """Returns identity -> its clips as (name, score), best first. `names` is clip index -> name."""
    rows = zip(top.index.tolist(), top.scores.tolist(), strict=True)
    return {
        identity: [(names[i], score) for i, score in zip(*row, strict=True) if i != NO_CLIP]
        for identity, row in zip(identities, rows, strict=True)
    }
