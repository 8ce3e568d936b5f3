"""Systems that one command trains and joins: learned numbers against an oracle, files, repeats."""

import numpy as np
import pytest
from scipy.special import expit, logsumexp

from tests.helpers.datasets import load_dataset
from tests.helpers.seen import refused
from vidjax.evaluation import blend, calibration, predict
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.run_folder import RunFolder
from vidjax.training import public

C = 6
RNG = np.random.default_rng(0)


def make_scores(labels, shown, noise):
    """Log-probabilities [n, C] of a run that sees identity `shown`, not the right one."""
    logits = noise * RNG.normal(size=(len(labels), 1 + C))
    logits[np.arange(len(labels)), shown] += 6
    logs = logits - logsumexp(logits, axis=1, keepdims=True)
    return logs[:, 1:].astype(np.float32)


def test_joined_scores_are_those_of_the_equation():
    labels = RNG.integers(0, 1 + C, 9)
    scores = [make_scores(labels, labels, 1.0) for _ in range(3)]
    scores[1][4] = -np.inf  # the clip lacks the modality
    scores[2][:, 3] = -np.inf  # the run does not know the identity
    scores[0][7] = scores[1][7] = scores[2][7] = -np.inf
    numbers = calibration.Calibration._make([*RNG.normal(size=(5, 3)), np.array(0.3)])
    expected = np.zeros((9, 1 + C))
    expected[:, 0] = numbers.stranger
    for i in range(9):
        for j in range(C):
            for r in range(3):
                log = np.float64(scores[r][i, j])
                if np.isneginf(scores[r][i]).all():
                    continue
                if np.isneginf(log):
                    expected[i, 1 + j] += numbers.absent[r]
                    continue
                other = np.log(1 - np.sum(np.exp(np.float64(scores[r][i]))))
                trust = expit(numbers.trust[r])
                ratio = np.exp(numbers.scale[r]) * (log - other) + numbers.offset[r]
                limited = 1 + np.exp(ratio - numbers.limit[r])
                expected[i, 1 + j] += np.log((1 - trust + trust * np.exp(ratio)) / limited)
    expected = expected - np.asarray(logsumexp(expected, axis=1, keepdims=True))
    joined = np.asarray(calibration.join_scores(scores, numbers))
    rows = np.arange(9) != 7
    np.testing.assert_allclose(joined[rows], expected[rows, 1:], atol=2e-3)
    assert np.isneginf(joined[7]).all()


def test_a_run_that_shows_the_wrong_person_in_some_clips_is_trusted_less():
    labels = RNG.integers(0, 1 + C, 900)
    wrong = np.where(RNG.random(900) < 0.3, RNG.integers(0, 1 + C, 900), labels)
    good, bad = make_scores(labels, labels, 1.0), make_scores(labels, wrong, 1.0)
    bad[:100] = -np.inf
    examples = calibration.choose_candidates(
        [good, bad], labels, part := calibration.split_clips(labels)
    )
    sets = calibration.learn([examples])
    assert sets.trust.shape == (calibration.PARTS + 1, 2)
    assert (sets.trust[:, 0] > sets.trust[:, 1] + 1).all()
    again = calibration.from_values(calibration.to_values(sets))
    np.testing.assert_array_equal(again.trust[0], sets.trust[-1])
    joined = np.asarray(calibration.Joined(sets, part)([good, bad], np.arange(900)))
    known = labels > 0
    assert np.mean(joined[known].argmax(axis=1) == labels[known] - 1) > 0.97


@pytest.fixture(scope="module")
def joint(official_dir, cache_dir, tmp_path_factory):
    """A joint run of two systems in closed form, its configuration, and the data."""
    config = config_lib.default()
    config.data.update(name="iqiyi_vid", dir=str(official_dir), train_splits=("train", "val"))
    config.ensemble.folds = 2
    config.eval.update(block_size=32, report=False)
    config.join.systems = ("plda:iqiyi_vid,few,face", "plda:iqiyi_vid,few,head")
    config.join.learned = True
    data = load_dataset("iqiyi_vid", directory=official_dir, cache_dir=cache_dir)
    folder = tmp_path_factory.mktemp("runs") / "joint"
    folder.mkdir()
    return config, RunFolder(folder), data


def test_one_command_measures_out_of_fold_and_ranks_test(joint):
    config, folder, data = joint
    lines = []
    results, was_finished = public.train_run(config, folder, data, log=lines.append)
    assert {line["split"] for line in lines if "split" in line} == {"val", "test"}
    assert results["map_kind"] == "out_of_fold" and not was_finished
    assert [row["map"] is not None for row in results["runs"]] == [True, True]
    assert folder.has("ranking.txt") and folder.has("ranking_test.txt")
    assert len(folder.config.join.calibration) == 6
    refused(lambda: predict.restore(folder.path), str(folder.path / "1_plda_all"))
    moved = RunFolder(folder.path.rename(folder.path.parent / "moved"))
    assert blend.blend_runs(moved.config, moved, lambda _: data)["map"] == results["map"]
    moved.path.rename(folder.path)
    before = (folder.path / "metrics.json").read_bytes()
    again, was_finished = public.train_run(config, RunFolder(folder.path), data)
    assert was_finished and again["map"] == results["map"]
    assert (folder.path / "metrics.json").read_bytes() == before
    config.ensemble.folds = 3
    refused(lambda: public.train_run(config, RunFolder(folder.path), data), "--workdir")


def test_the_shipped_configuration_gives_data_and_seed_to_its_systems():
    config = config_io.load_file("configs/joint.py:iqiyi_vid,few,face,audio")
    config.seed, config.data.dir = 3, "somewhere"
    config_lib.check(config)
    assert config.join.systems == (
        "cosine:iqiyi_vid,few,ensemble,face,audio",
        "plda:iqiyi_vid,few,face",
        "plda:iqiyi_vid,few,audio",
    )
    folds, final = (
        config_io.load_system(config, config.join.systems[0], final=x) for x in (False, True)
    )
    assert (folds.seed, folds.data.dir, folds.ensemble.folds, folds.ensemble.seeds) == (
        3, "somewhere", 5, 1,
    )  # fmt: skip
    assert (final.eval.split, final.ensemble.folds, final.ensemble.seeds) == ("test", 0, 3)
    config = config_io.load_file("configs/joint.py:iqiyi_vid")  # one net measures, and one ranks
    measured, final = (
        config_io.load_system(config, config.join.systems[0], final=x) for x in (False, True)
    )
    assert (measured.ensemble.only, final.ensemble.only) == ((0,), ())
    assert measured.modalities == ("face",)
    refused(lambda: config_io.load_system(config, "/tmp/x.py", final=False), "configs/NAME.py")
    assert final.data.train_splits == ("train", "val")
