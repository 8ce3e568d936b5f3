"""Noise classes: clusters equal their definition, and relabelling equals the published code.

Classes are "other", identities, clusters of distractors, and a mirror class of each identity.
"""

import numpy as np
import pytest

from tests.helpers.seen import refused
from vidjax.core.batch import NoiseClassLayout
from vidjax.training import plan

LAYOUT = NoiseClassLayout(num_identities=3, num_clusters=2)
COLUMNS = np.arange(9)  # 0: other, 1 to 3: identities, 4 and 5: clusters, 6 to 8: mirror classes


def slow_dbscan(vectors: np.ndarray, eps: float, min_samples: int) -> list[int]:
    """Returns clusters by the definition of DBSCAN: connected cores, and neighbours of cores."""
    real = np.any(vectors, axis=1)
    unit = vectors / np.where(real, np.linalg.norm(vectors, axis=1), 1)[:, None]
    near = np.linalg.norm(unit[:, None] - unit, axis=2) <= eps
    near &= real[:, None] & real
    cores = near.sum(axis=1) >= min_samples
    clusters, number = np.full(len(vectors), -1), 0
    for seed in np.flatnonzero(cores):
        todo = [seed] if clusters[seed] == -1 else []
        number += len(todo)
        while todo:
            a = todo.pop()
            if clusters[a] == -1:
                clusters[a] = number
                todo += np.flatnonzero(near[a]).tolist() if cores[a] else []
    order = [*dict.fromkeys(clusters[clusters > 0].tolist())]  # by the first vector of a cluster
    return [order.index(cluster) if cluster > 0 else -1 for cluster in clusters.tolist()]


@pytest.mark.parametrize("min_samples", [2, 4])
def test_dbscan_clusters_match_the_definition(min_samples: int) -> None:
    rng = np.random.default_rng(0)
    # 8 groups of 4 similar vectors of different lengths, in random order.
    vectors = rng.normal(size=(8, 16))[rng.permutation(np.repeat(np.arange(8), 4))]
    vectors = (vectors + 0.4 * rng.normal(size=(32, 16))) * rng.lognormal(size=(32, 1))
    vectors[[3, 11]] = 0  # zero vectors are in no cluster

    for eps, dtype in ((0.2, "f2"), (0.9, "f4"), (1.4, "f8")):
        given = vectors.astype(dtype)
        clusters = plan.cluster(given, eps=eps, min_samples=min_samples)
        assert clusters.dtype == np.int32 and clusters.shape == (32,)
        expected = np.array(slow_dbscan(given.astype(float), eps, min_samples))
        if min_samples <= 2:  # otherwise a border may belong to two clusters
            np.testing.assert_array_equal(clusters, expected)
        np.testing.assert_array_equal(clusters >= 0, expected >= 0)
        assert clusters.max() == expected.max() and clusters[3] == clusters[11] == -1
    assert plan.cluster(np.eye(4)[:0], eps=0.5, min_samples=5).shape == (0,)


@pytest.mark.parametrize("keep", ["label", "prediction"])
def test_relabelling_matches_the_published_arithmetic_of_columns(keep) -> None:
    """A prediction l becomes l + C + K if l is an identity. Otherwise the label or l is kept.

    C is the number of identities, and K of clusters. The published code has no class "other", so
    its numbers are lower by 1.
    """
    published = NoiseClassLayout(num_identities=4934, num_clusters=3691)
    assert published.num_columns == 1 + 2 * 4934 + 3691
    theirs = np.arange(published.num_columns - 1)
    start = np.full(len(theirs), published.num_columns - 1)  # the last mirror class

    ours = plan.relabel(start, theirs + 1, published, keep=keep)

    kept = theirs if keep == "prediction" else start - 1
    wanted = np.where(theirs < 4934, theirs + 4934 + 3691, kept)
    np.testing.assert_array_equal(ours, 1 + wanted)


def test_clustered_clips_start_in_their_cluster_and_other_clips_at_random() -> None:
    clusters = np.array([0, -1, 1, -1, 0] * 200, np.int32)
    labels = plan.initial_labels(clusters, LAYOUT, seed=3)
    assert (labels[clusters == 0] == 4).all() and (labels[clusters == 1] == 5).all()

    drawn = labels[clusters == -1]
    assert set(drawn.tolist()) == {6, 7, 8}
    assert np.bincount(drawn).max() < 0.45 * len(drawn)
    assert (drawn != plan.initial_labels(clusters, LAYOUT, seed=4)[clusters == -1]).any()

    # Without clusters, the same clips get the same mirror classes.
    without_clusters = plan.initial_labels(np.full(1000, -1), LAYOUT, seed=3)
    np.testing.assert_array_equal(drawn, without_clusters[clusters == -1])


def test_relabelling_moves_only_mirror_clips_predicted_as_an_identity() -> None:
    labels, predicted = np.meshgrid(COLUMNS, COLUMNS, indexing="ij")  # [9, 9]
    moves = np.isin(labels, (6, 7, 8)) & np.isin(predicted, (1, 2, 3))
    new = plan.relabel(labels, predicted, LAYOUT)
    np.testing.assert_array_equal(new, np.where(moves, predicted + 5, labels))
    np.testing.assert_array_equal(plan.relabel(new, predicted, LAYOUT), new)  # nothing moves twice
