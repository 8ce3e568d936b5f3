"""The streaming top k equals a full sort for every order of blocks, ties and special values."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidjax.evaluation import topk

C, K = 7, 20  # identities, and places in the list of an identity


def full_sort(scores: np.ndarray, clip_index: np.ndarray, k: int) -> topk.TopK:
    """Returns the top k of each column by a sort: highest scores first, ties by clip index."""
    best = np.full((scores.shape[1], k), -np.inf, np.float32)
    index = np.full(best.shape, topk.NO_CLIP, np.int32)
    for c in range(len(best)):
        order = np.lexsort((clip_index, -scores[:, c]))[:k]
        best[c, : len(order)] = scores[order, c]
        index[c, : len(order)] = clip_index[order]
    return topk.TopK(best, index)


def blocks_of(scores, clip_index, rows, rng):
    """Yields blocks of `rows` with padded rows at random places, whose scores would be the best."""
    taken = 0
    while taken < len(scores):
        real = np.zeros(rows, bool)
        real[rng.permutation(rows)[: rng.integers(1, rows + 1)]] = True
        real[np.flatnonzero(real)[len(scores) - taken :]] = False  # no scores are left
        block = np.full((rows, scores.shape[1]), np.inf, np.float32)
        index = np.zeros(rows, np.int32)
        block[real] = scores[taken : taken + real.sum()]
        index[real] = clip_index[taken : taken + real.sum()]
        taken += real.sum()
        yield block, index, real


STREAMS = {
    "random": lambda s: s, "descending": lambda s: -np.sort(-s, axis=0), "all equal": np.zeros_like,
    "few values": lambda s: np.round(2 * s),
    "silent clips": lambda s: np.where(np.arange(len(s))[:, None] % 10, -np.inf, s),
    "one part in a thousand apart": lambda s: np.round(s) * np.float32(1 + 1e-7),
    "infinite": lambda s: np.where(s > 1, np.inf, s),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_top_k_equals_a_full_sort(monkeypatch, name):
    rng = np.random.default_rng(0)
    for num_clips in (0, 1, 19, 150):
        scores = STREAMS[name](rng.standard_normal((num_clips, C), np.float32)).astype(np.float32)
        # float32 cannot distinguish such large numbers of clips.
        clip_index = 2**30 + np.sort(rng.permutation(900)[:num_clips]).astype(np.int32)
        expected = full_sort(scores, clip_index, K)
        order = rng.permutation(num_clips)
        blocks = list(blocks_of(scores[order], clip_index[order], rows=16, rng=rng))
        # Identities that are ranked together, and scores that may wait before they are merged.
        for chunk, candidates in ((C, 0), (3, 10), (3, 10**6)):
            monkeypatch.setattr(topk, "CHUNK", chunk)
            monkeypatch.setattr(topk, "MAX_CANDIDATES", candidates)
            np.testing.assert_equal(topk.rank(blocks, C, K), expected)


def test_top_k_orders_nan_zeros_infinities_and_bfloat16_scores():
    """NaN ranks like -inf. 0, -0 and denormal numbers tie. Ties are in the order of the clips."""
    tiny = np.float32(1e-40)  # some backends round it to 0
    score_of = {0: np.nan, 6: 0.0, 5: -0.0, 4: tiny, 3: -tiny, 2: -np.inf, 1: -1.0}
    clips = np.array([*score_of], np.int32)
    scores = np.array([*score_of.values()], np.float32)[:, None]
    top = topk.rank([(scores, clips, np.ones(7, bool))], num_identities=1, k=7)
    assert top.index.tolist() == [[3, 4, 5, 6, 1, 0, 2]]
    assert top.scores.tolist() == [[0.0, 0.0, 0.0, 0.0, -1.0, -np.inf, -np.inf]]
    # Ties have the same order if each clip is a block.
    one_by_one = [(scores[[i]], clips[[i]], np.ones(1, bool)) for i in range(7)]
    assert topk.rank(one_by_one, num_identities=1, k=3).index.tolist() == [[3, 4, 5]]
    halves = jnp.arange(7, dtype=jnp.bfloat16)[:, None]
    block = halves, np.arange(7, dtype=np.int32), np.ones(7, bool)
    assert topk.rank([block], num_identities=1, k=3).index.tolist() == [[6, 5, 4]]


def test_count_ties_counts_tied_pairs_of_neighbouring_places():
    scores = np.array([[3, 3, 3, 1], [2, 1, -np.inf, -np.inf]], np.float32)
    top = topk.TopK(scores, np.arange(8, dtype=np.int32).reshape(2, 4))
    assert topk.count_ties(top) == 2  # 3 = 3 = 3; -inf is no score
