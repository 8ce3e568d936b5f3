"""Diffusion against an oracle in float64, and what it must not change."""

import numpy as np
import pytest
from scipy.special import expit

from vidjax.evaluation import diffusion, scores as scores_lib, topk
from vidjax.evaluation.blend import group_clips
from vidjax.models import two_covariance

N, C, D = 40, 6, 8
RNG = np.random.default_rng(0)


def make_scores(people):
    logits = RNG.normal(size=(N, 1 + C))
    logits[np.arange(N), people] += 2
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    names = tuple(f"clip_{i:02}" for i in range(N)), tuple("abcdef")
    array = logs[:, 1:].astype(np.float32)
    array[5] = -np.inf  # no run scores the clip
    return scores_lib.Scores(array, np.ones((1, N), bool), "val", True, True, *names)


def make_view(people, scale):
    centres = np.vstack([RNG.normal(size=(1, D)), 2 * RNG.normal(size=(C, D))])
    z = (centres[people] + RNG.normal(size=(N, D))).astype(np.float32)
    present = RNG.random(N) < 0.8
    return diffusion.View(z * present[:, None], present, RNG.uniform(1, 5, D), scale)


def oracle(scores, views, rows):
    """Returns the probabilities of the clips `rows` after diffusion, in float64."""
    count = len(rows)
    p = np.exp(scores.array[rows].astype(np.float64))
    weights = np.zeros((count, count))
    for i in range(count):
        value = np.full(count, -np.inf)
        for j in range(count):
            if i == j:
                continue
            value[j] = 0
            for view in views:
                if view.present[rows[i]] and view.present[rows[j]]:
                    space = two_covariance.Space(np.zeros(D), np.eye(D), view.ratio)
                    a, b = view.vectors[[rows[i], rows[j]]].astype(float)
                    one = np.ones(())
                    ratio = view.scale * two_covariance.pair_log_ratios(space, a, one, b, one)
                    value[j] += min(max(ratio, -6), 6)
        for j in np.argsort(-value)[:5]:
            differ = p[i].sum() * p[j].sum() - p[i] @ p[j]
            weights[i, j] = expit(value[j] - 6) * (1 - differ)
        weights[i] *= (1 - p[i].max()) / (1 + weights[i].sum())
    return (1 - weights.sum(axis=1, keepdims=True)) * p + weights @ p


@pytest.mark.parametrize("size", [3, 256])
def test_ranking_is_by_the_probabilities_of_the_equation(size, monkeypatch):
    people = RNG.integers(0, 1 + C, N)  # the person of each clip; 0 is a stranger
    scores, views = make_scores(people), [make_view(people, scale) for scale in (1.0, 0.5)]
    monkeypatch.setattr(diffusion, "MAX_ROWS", size)
    monkeypatch.setattr(diffusion, "MAX_VALUES", 100)  # of few identities at a time
    # The clips of a group are compared. The last group is a single clip.
    groups = [np.arange(0, N, 2), np.arange(1, N - 2, 2), np.array([N - 1])]
    compared = [
        (rows, [x._replace(vectors=x.vectors[rows], present=x.present[rows]) for x in views])
        for rows in groups
    ]
    weights = diffusion.weigh_neighbours(scores, compared)
    assert weights.max() > 0.05
    top = diffusion.rank(scores, weights)
    expected = np.zeros((N, C))
    for rows in groups:
        expected[rows] = oracle(scores, views, rows)
    for column in range(C):
        order = top.index[column][:N]
        assert sorted(order) == list(range(N)) and (top.index[column][N:] == topk.NO_CLIP).all()
        assert (np.diff(expected[order, column]) <= 1e-6).all()
        # The scores are the logarithms of the probabilities before diffusion.
        np.testing.assert_array_equal(top.scores[column][:N], scores.array[order, column])
    plain = topk.rank([(scores.array, np.arange(N, dtype=np.int32), np.ones(N, bool))], C)
    assert (plain.index != top.index).any()


def test_clips_whose_members_know_the_labels_of_others_are_in_other_groups():
    """Out of fold, only clips of the same fold are compared, as in the ranking of new clips."""
    use = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
    assert [group.tolist() for group in group_clips(use)] in ([[0, 1], [2, 3]], [[2, 3], [0, 1]])
    both = np.concatenate([use, [[1, 0, 1, 0, 0]]])
    assert sorted(group.tolist() for group in group_clips(both)) == [[0], [1], [2], [3]]
    assert [group.tolist() for group in group_clips(np.ones((3, 4), bool))] == [[0, 1, 2, 3]]
