"""Noise classes: a distractor starts in the class of a cluster, or in a mirror class."""

import numpy as np
import pytest

from tests.helpers import small_runs as small
from tests.helpers.batches import real_frames
from vidjax.training import noise_classes, plan

pytestmark = pytest.mark.slow  # several trainings

SPEC = "configs/noise_classes.py:iqiyi_vid"
WORDS = ("--config.num_epochs=4", "--config.eval.block_size=32", "--config.eval.members=false")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise") / "whole"
    small.run(small.shrunk(*WORDS, spec=SPEC), folder, data)
    return folder


def training_labels(data):
    return np.concatenate([data.split(name).labels for name in ("train", "val")])


def initial_labels(data):
    """Returns the labels [N] before the first step, and the layout of the classes."""
    return plan.label_distractors(small.shrunk(*WORDS, spec=SPEC), data, training_labels(data))


def test_relabelling_moves_only_unclustered_distractors_of_own_folds(data, whole):
    """A moved distractor leaves its mirror class for another. A clustered distractor stays."""
    is_distractor, (start, layout) = training_labels(data) == 0, initial_labels(data)
    unclustered = layout.is_mirror(start)
    assert layout.num_clusters > 0 and 0 < unclustered.sum() < is_distractor.sum()
    ends = np.asarray(small.saved(whole)["train"]["labels"])  # [members, clips]
    for end, trained in zip(ends, small.training_sets(whole).trained, strict=True):
        moved, may_move = end != start, is_distractor & unclustered & trained
        assert moved.any() and not moved[~may_move].any()
        assert layout.is_mirror(end[unclustered]).all()


def test_left_out_distractors_have_no_weight_in_the_loss(data):
    made = plan.make_plan(small.shrunk(*WORDS, spec=f"{SPEC},leave_out"), data)
    assert not made.constants.weight[:, training_labels(data) == 0].any()
    assert made.constants.weight.any(axis=0).sum() == (training_labels(data) > 0).sum()


def test_distractors_are_clustered_by_their_quality_weighted_mean_faces(data):
    """The weight of a frame is quality x detection. If all weights are 0, they become 1."""
    noise = small.shrunk(*WORDS, spec=SPEC).noise
    (start, layout), labels = initial_labels(data), training_labels(data)
    vectors = np.zeros((len(labels), data.modalities["face"].dim))
    for split, offset in {"train": 0, "val": 96}.items():  # train has 96 clips
        for clip, frames in real_frames(data, split):
            weights = np.maximum(np.float64(frames.quality * frames.detection), 0)
            weights = weights if weights.any() else np.ones(len(weights))
            if len(weights):
                vectors[offset + clip] = np.average(frames.features, axis=0, weights=weights)
    wanted = noise_classes.cluster(
        vectors[labels == 0], eps=noise.eps, min_samples=noise.min_samples
    )
    # Of C identities and K clusters, classes C + 1 to C + K are clusters 0 to K - 1. A distractor
    # in a higher class, a mirror class, is in no cluster (-1).
    cluster = start[labels == 0] - 1 - layout.num_identities
    np.testing.assert_array_equal(np.where(cluster < layout.num_clusters, cluster, -1), wanted)
