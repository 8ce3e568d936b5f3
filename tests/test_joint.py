"""Systems that one command trains and joins: learned numbers against an oracle, files, repeats."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logsumexp

from tests.helpers.datasets import load_dataset
from tests.helpers.seen import refused
from vidjax.core import devices, ensemble
from vidjax.evaluation import blend, calibration, predict, pseudo_labels, scoring, trained_runs
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.run_folder import RunFolder
from vidjax.training import public
from vidjax.training.dry_run import dry_run

C = 6
RNG = np.random.default_rng(0)


def make_scores(labels, shown, noise, count=C):
    """Log-probabilities [n, count] of a run that sees identity `shown`, not the right one."""
    logits = noise * RNG.normal(size=(len(labels), 1 + count))
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
    refused(lambda: calibration.from_values(calibration.to_values(sets)[1:]), "eval.split=val")
    joined = np.asarray(calibration.Joined(sets, part)([good, bad], np.arange(900)))
    known = labels > 0
    assert np.mean(joined[known].argmax(axis=1) == labels[known] - 1) > 0.97


def test_numbers_learned_from_candidates_are_as_good_as_those_from_all_identities(monkeypatch):
    """A run without strangers has the highest odds of all runs for thousands of identities."""
    count = 8 * calibration.CANDIDATES
    labels = RNG.integers(1, 1 + count, 600)
    first, second = (make_scores(labels, labels, 1.8, count) for _ in range(2))
    first -= logsumexp(first, axis=1, keepdims=True)  # it never sees a stranger
    part = calibration.split_clips(labels)

    def lose():
        examples = calibration.choose_candidates([first, second], labels, part)
        numbers = calibration.fit(examples, np.ones(len(labels), np.float32))
        joined = np.asarray(calibration.join_scores([first, second], numbers))
        return -joined[np.arange(len(labels)), labels - 1].mean()

    of_candidates = lose()
    monkeypatch.setattr(calibration, "CANDIDATES", count)
    assert abs(of_candidates - lose()) < 0.005


def test_strangers_are_recognised_if_no_stranger_was_among_the_clips_to_learn_from():
    labels = RNG.integers(1, 1 + C, 900)
    scores = [make_scores(labels, labels, 3.0) for _ in range(2)]
    part = calibration.split_clips(labels)
    sets = calibration.learn([calibration.choose_candidates(scores, labels, part)])
    nobody = np.zeros(900, int)
    of_strangers = [make_scores(nobody, nobody, 3.0) for _ in range(2)]
    joined = calibration.join_scores(of_strangers, calibration.Calibration(*(x[-1] for x in sets)))
    assert np.median(np.exp(np.asarray(joined)).sum(axis=1)) < 0.1


@pytest.fixture(scope="module")
def joint(official_dir, cache_dir, tmp_path_factory):
    """A joint run of two systems in closed form, its configuration, and the data."""
    config = config_lib.default()
    config.data.update(name="iqiyi_vid", dir=str(official_dir), train_splits=("train", "val"))
    config.modalities, config.ensemble.folds = ("face", "head"), 2
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


def test_a_blend_that_is_trained_only_on_train_ranks_val_with_the_runs_on_all_clips(
    joint, tmp_path
):
    config, data = copy.deepcopy(joint[0]), joint[2]
    config.ensemble.folds = 2
    config.data.train_splits, config.join.pseudo_labels = ("train",), 0.9
    results, _ = public.train_run(config, RunFolder(tmp_path), data)
    metrics = {
        x: RunFolder(tmp_path).metrics(RunFolder(tmp_path).paths(x)) for x in ("train", "val")
    }
    assert results["map"] == metrics["val"]["map"] > 0.5
    assert (metrics["train"]["map_kind"], metrics["val"]["map_kind"]) == ("out_of_fold", "val")
    assert [row["name"].rpartition("/")[2] for row in metrics["train"]["runs"]] == [
        "1_plda",
        "2_plda",
    ]
    assert metrics["val"]["runs"][0]["name"].endswith("1_plda_all")
    again, was_finished = public.train_run(config, RunFolder(tmp_path), data)
    assert was_finished and again["map"] == results["map"]


def test_splits_without_ground_truth_and_fields_that_no_system_reads_are_refused(joint, tmp_path):
    config, data = copy.deepcopy(joint[0]), joint[2]
    config.data.train_splits = ("train", "test")
    refused(lambda: public.train_run(config, RunFolder(tmp_path), data), "train_splits=train")
    config.num_epochs = 5.0
    refused(lambda: config_lib.check(config), "config.num_epochs=5.0")
    config.num_epochs, config.modalities = 1.0, ("face",)
    refused(lambda: dry_run(config, data), "config.modalities=face,head")


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
    assert (final.ensemble.folds, final.ensemble.seeds) == (0, 3)
    without = config_io.load_file("configs/joint.py:iqiyi_vid,few,plda,face,audio")
    assert without.join.systems == config.join.systems[1:]
    config = config_io.load_file("configs/joint.py:iqiyi_vid")  # one net measures, and one ranks
    measured, final = (
        config_io.load_system(config, config.join.systems[0], final=x) for x in (False, True)
    )
    assert (measured.ensemble.only, final.ensemble.only) == ((0,), ())
    assert measured.modalities == ("face",)
    refused(lambda: config_io.load_system(config, "/tmp/x.py", final=False), "configs/NAME.py")
    assert final.data.train_splits == ("train", "val")


@pytest.fixture(scope="module")
def runs(joint):
    """The models of the runs in folds of `joint`, trained, and a function that scores clips."""
    config, folder, data = joint
    if not folder.has("ranking.txt"):
        public.train_run(config, folder, data)
    mesh = devices.make_mesh(1)
    models = []
    for name in ("1_plda", "2_plda"):
        own = blend.run_config(folder.config, str(folder.path / name))
        run = trained_runs.find_run(own, RunFolder(folder.path / name))
        models.append(trained_runs.make_model(own, run, data, mesh, keep_sums=True))

    def score(models, split):
        """Returns the scores of all clips by the mean probability, [N, C]."""
        result = np.zeros((len(data.split(split).clips), len(data.identities)))
        for blocks, scores in scoring.score_clips(models, split, mesh, 32):
            rows = np.asarray(blocks[0].batch_mask)
            joined = np.asarray(scoring.blend(scores, [1.0] * len(scores)))
            result[np.asarray(blocks[0].clip_index)[rows]] = joined[rows]
        return result

    def enrol(least, change=lambda scores, index: scores, splits=("train", "val", "test")):
        def make_join(split):
            return lambda scores, index: change(scoring.blend(scores, [1.0, 1.0]), index)

        return pseudo_labels.enrol(models, splits, make_join, least, mesh, 32)

    return models, score, enrol


def test_a_clip_is_scored_by_one_member_that_does_not_enrol_it(runs, joint):
    models, _, enrol = runs
    splits = {name: joint[2].split(name).clips for name in ("train", "val", "test")}
    names = [name for clips in splits.values() for name in clips]
    group = {name: i % pseudo_labels.GROUPS for i, name in enumerate(names)}
    for old, new in zip(models, enrol(0.5), strict=True):
        sets = new.training_sets
        assert len(sets.members) == pseudo_labels.GROUPS * len(old.training_sets.members)
        for split in ("train", "val"):
            use, _ = ensemble.choose_scoring_members(sets, splits[split])
            assert (use.sum(axis=0) == 1).all()
        use, _ = ensemble.choose_scoring_members(sets, splits["test"])
        rows = np.array([group[name] for name in splits["test"]])
        expected = np.arange(len(use))[:, None] % pseudo_labels.GROUPS == rows
        np.testing.assert_array_equal(use, expected)
        before, _ = ensemble.choose_scoring_members(old.training_sets, splits["test"])
        assert before.all()


def test_without_certain_clips_scores_do_not_change(runs):
    models, score, enrol = runs
    for split in ("val", "test"):
        expected = score(models, split)
        np.testing.assert_allclose(score(enrol(2.0), split), expected, atol=1e-4)


def test_the_pseudo_label_of_a_clip_changes_the_scores_of_other_clips_only(runs):
    _, score, enrol = runs
    row, splits = 7, ("test",)

    def change(scores, index):
        """Gives clip `row` the identity with the lowest score, and no label to all others."""
        marked = jnp.where(scores == scores.min(axis=1, keepdims=True), 0.0, -50.0)
        return jnp.where((index == row)[:, None], marked, -50.0)

    before = score(enrol(0.5, lambda scores, index: scores - 50.0, splits), "test")
    after = score(enrol(0.5, change, splits), "test")
    np.testing.assert_allclose(after[row], before[row], atol=1e-5)
    others = np.arange(len(before)) % pseudo_labels.GROUPS != row % pseudo_labels.GROUPS
    assert (np.abs(after - before).max(axis=1)[others] > 1e-3).any()
    same = np.arange(len(before)) % pseudo_labels.GROUPS == row % pseudo_labels.GROUPS
    np.testing.assert_allclose(after[same], before[same], atol=1e-5)


def test_a_blend_with_pseudo_labels_has_no_table_of_members(runs, joint):
    _, folder, data = joint
    again = folder.config
    again.join.pseudo_labels = 0.9
    results = blend.blend_runs(again, folder, lambda _: data)
    assert results["map_kind"] == "out_of_fold"
    assert "members" not in results and len(results["runs"]) == 2
