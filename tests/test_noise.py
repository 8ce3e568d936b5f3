"""Noise classes: clusters of distractors, and a mirror class of each identity."""

import numpy as np
import pytest

from tests.helpers.seen import refused
from vidjax.core.batch import NoiseClassLayout
from vidjax.training import noise_classes

# Classes: 0 is other, 1 to 3 are identities, 4 and 5 clusters, and 6 to 8 mirror classes.
LAYOUT = NoiseClassLayout(num_identities=3, num_clusters=2)


@pytest.mark.parametrize(("min_samples", "wanted"), [
    (2, [0, 1, -1, 0, 1, -1, 1]),  # clusters are numbered by their first vectors
    (3, [-1, 0, -1, -1, 0, -1, 0]),  # at 10 degrees are 3 neighbours: 0, 10 itself, and 20
])  # fmt: skip
def test_clusters_are_chains_of_neighbouring_finite_directions(min_samples, wanted):
    """Neighbours are at most 12 degrees apart. A zero vector has no neighbour."""
    angles = np.deg2rad([90, 0, 180, 95, 10, 0, 20])
    lengths = np.array([1, 5, 2, 0.1, 30, 0, 7])
    vectors = (lengths * [np.cos(angles), np.sin(angles)]).T
    distance_of_12_degrees = 2 * np.sin(np.deg2rad(12) / 2)
    clusters = noise_classes.cluster(vectors, eps=distance_of_12_degrees, min_samples=min_samples)
    assert clusters.tolist() == wanted
    nothing = noise_classes.cluster(np.zeros((0, 4)), eps=0.5, min_samples=5)
    assert nothing.shape == (0,)
    vectors[[3, 5]] = np.nan
    refused(lambda: noise_classes.cluster(vectors, eps=0.5, min_samples=2), "of number 3 of these")


@pytest.mark.parametrize("keep", ["label", "prediction"])
def test_relabelling_matches_the_published_arithmetic_of_columns(keep) -> None:
    """The published code has no class "other" (0), so its numbers of classes are lower by 1."""
    labels, predicted = np.indices((9, 9))  # every label with every prediction
    mirrors = predicted + 3 + 2  # see LAYOUT
    if keep == "prediction":  # the prediction stays, unless it is an identity or "other"
        kept = np.where(predicted == 0, labels, predicted)
        wanted = np.where(np.isin(predicted, (1, 2, 3)), mirrors, kept)
    else:  # only clips of mirror classes move
        moves = np.isin(labels, (6, 7, 8)) & np.isin(predicted, (1, 2, 3))
        wanted = np.where(moves, mirrors, labels)
    new = noise_classes.relabel(labels, predicted, LAYOUT, keep=keep)
    np.testing.assert_array_equal(new, wanted)
    np.testing.assert_array_equal(noise_classes.relabel(new, predicted, LAYOUT, keep=keep), new)
    assert NoiseClassLayout(num_identities=4934, num_clusters=3691).num_columns == 13_560


def test_clustered_clips_start_in_their_cluster_and_other_clips_at_random() -> None:
    clusters = np.array([0, -1, 1, -1, 0] * 200, np.int32)
    labels = noise_classes.initial_labels(clusters, LAYOUT, seed=3)
    assert (labels[clusters == 0] == 4).all()
    assert (labels[clusters == 1] == 5).all()
    drawn = labels[clusters == -1]
    assert set(drawn.tolist()) == {6, 7, 8}
    assert np.bincount(drawn).max() < 0.45 * len(drawn)  # about a third for each mirror class
    assert (drawn != noise_classes.initial_labels(clusters, LAYOUT, seed=4)[clusters == -1]).any()
