"""Noise classes end to end: what moves, and that a stop changes nothing."""

import signal

import numpy as np
import pytest

from tests.helpers import small_runs as small
from tests.helpers.batches import real_frames
from tests.helpers.cases import quick_first
from tests.helpers.small_runs import run, saved, shrunk
from vidjax.core import ensemble
from vidjax.runs import checkpoint, signals
from vidjax.training import feed, plan

pytestmark = pytest.mark.slow  # several trainings

SPEC = "configs/noise_classes.py:iqiyi_vid"
WORDS = ("--config.num_epochs=4", "--config.eval.block_size=32", "--config.eval.members=false")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise") / "whole"
    run(shrunk(*WORDS, spec=SPEC), folder, data)
    return folder


def training_labels(data):
    return np.concatenate([data.split(name).labels for name in ("train", "val")])


def starting(data, config=None):
    config = config or shrunk(*WORDS, spec=SPEC)
    return plan.label_distractors(config, data, training_labels(data))


def test_relabelling_moves_only_unclustered_distractors_of_own_folds(data, whole):
    truth, (start, layout) = training_labels(data), starting(data)
    training_sets, unclustered = ensemble.load(whole), layout.is_mirror(start)
    assert layout.num_clusters > 0 and 0 < unclustered.sum() < (truth == 0).sum()
    for number, row in enumerate(np.asarray(saved(whole)["train"]["labels"])):  # [E, N]
        moved = row != start
        assert moved.any() and layout.is_mirror(row[unclustered]).all()
        may = (truth == 0) & unclustered & training_sets.trained[number]
        assert not (moved & ~may).any()


def test_relabelling_by_prediction_moves_distractors_both_ways(data, tmp_path):
    run(shrunk(*WORDS, spec=f"{SPEC},prediction"), tmp_path, data)
    (start, layout), end = starting(data), np.asarray(saved(tmp_path)["train"]["labels"])
    unclustered = layout.is_mirror(start)
    moved = end[:, unclustered]
    assert ((moved > layout.num_identities) & (moved <= layout.mirror_shift)).any()
    assert layout.is_mirror(moved).any()
    np.testing.assert_array_equal(end[:, ~unclustered], np.tile(start[~unclustered], (len(end), 1)))


@pytest.mark.parametrize("mode", quick_first(["resident", "streaming"], mark=pytest.mark.nightly))
def test_resumed_run_equals_an_uninterrupted_run(data, whole, tmp_path, mode, monkeypatch):
    """The stops are right after a relabelling and within an epoch."""
    config, parts = shrunk(*WORDS, f"--config.data.mode={mode}", spec=SPEC), tmp_path / "parts"
    if mode == "streaming":
        whole = tmp_path / "whole"
        run(config, whole, data)
    for number in (5, 8):
        done = max(checkpoint.manifests(parts), default=0)
        with monkeypatch.context() as patch, pytest.raises(signals.Interrupted):
            patch.setattr(feed, "DISPATCH_SECONDS", 0.0)  # a step each
            small.interrupt_dispatch(patch, number - 1 - done, signal.SIGINT)
            run(config, parts, small.Interrupting(data, number - done, signal.SIGINT))
    run(config, parts, data)
    small.assert_same_run(parts, whole)
    np.testing.assert_array_equal(saved(parts)["train"]["labels"], saved(whole)["train"]["labels"])


def test_left_out_distractors_do_not_affect_weights(data, tmp_path):
    truth = training_labels(data)
    hidden = {"train": truth[:96] == 0, "val": truth[96:] == 0}  # 96 clips of train come first
    config = shrunk("--config.num_epochs=1", *WORDS[1:], spec=f"{SPEC},leave_out")
    for name, clips in {"whole": data, "spoilt": small.Spoilt(data, hidden)}.items():
        run(config, tmp_path / name, clips)
    small.assert_equal_weights(tmp_path / "whole", tmp_path / "spoilt")


@pytest.mark.parametrize(("words", "message"), [
    ("data.train_splits=train", r"choose --config=configs/noise_classes\.py:other"),
    ("noise.modality=fac", "config.noise.modality='fac' is not a modality of the data"),
    ("noise.join=True data.max_frames=40", "needs clips of up to 50 frames"),
])  # fmt: skip
def test_invalid_noise_settings_are_refused_before_training(data, tmp_path, words, message):
    words = [f"--config.{word}" for word in words.split()]
    with pytest.raises(ValueError, match=message):
        run(shrunk(*WORDS, *words, spec=SPEC), tmp_path, data)
    assert not (tmp_path / "config.json").exists()


def test_clusters_do_not_depend_on_labels(data):
    """Neither labels nor the seed change clusters; the seed only draws mirror classes."""
    config, truth = shrunk(*WORDS, spec=SPEC), training_labels(data)
    start, layout = starting(data, config)
    other = np.where(truth > 0, truth % 12 + 1, 0).astype(truth.dtype)
    again, same = plan.label_distractors(config, data, other)
    assert same == layout
    np.testing.assert_array_equal(again, np.where(truth > 0, other, start))
    config.seed = 1
    third, same = starting(data, config)
    clustered = (start > layout.num_identities) & (start <= layout.mirror_shift)
    assert same == layout and (third != start).any()
    np.testing.assert_array_equal(third[clustered], start[clustered])


def test_clusters_equal_those_of_quality_weighted_mean_faces(data):
    """Class balance counts the clips of each cluster."""
    config = shrunk(*WORDS, "--config.data.balance=1", spec=SPEC)
    (start, layout), labels = starting(data, config), training_labels(data)
    vectors = np.zeros((len(labels), data.modalities["face"].dim))
    for split, offset in {"train": 0, "val": len(data.split("train").clips)}.items():
        for clip, frames in real_frames(data, split):
            weight = np.maximum(np.float64(frames.quality * frames.detection), 0)
            weight = weight if weight.any() else np.ones(len(weight))
            if len(weight):
                mean = weight @ np.float64(frames.features) / weight.sum()
                vectors[offset + clip] = mean
    wanted = plan.cluster(vectors[labels == 0], eps=config.noise.eps, min_samples=2)
    cluster = start[labels == 0] - 1 - layout.num_identities
    np.testing.assert_array_equal(np.where(cluster < layout.num_clusters, cluster, -1), wanted)
    made = plan.make_plan(config, data)
    _, column, counts = np.unique(made.labels, return_inverse=True, return_counts=True)
    share = made.constants.weight[0] * counts[column]  # 0 for clips of another fold
    np.testing.assert_allclose(share[share > 0], share.max(), rtol=1e-6)


def test_ensemble_member_with_noise_classes_equals_a_run_of_that_member(data, whole, tmp_path):
    run(shrunk(*WORDS, "--config.ensemble.only=1", spec=SPEC), tmp_path, data)
    alone, everyone = small.weights(tmp_path), small.weights(whole)
    for name, value in alone.items():
        np.testing.assert_array_equal(value[0], everyone[name][1], err_msg=name)
    labels = [np.asarray(saved(folder)["train"]["labels"]) for folder in (tmp_path, whole)]
    np.testing.assert_array_equal(labels[0][0], labels[1][1])
