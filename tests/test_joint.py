"""Systems that one command trains and joins: learned numbers against an oracle, files, repeats."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logsumexp

import vidjax
from tests.helpers import small_runs
from tests.helpers.seen import refused
from vidjax.apps import forget
from vidjax.evaluation import blend, calibration, predict, scores as scores_lib
from vidjax.models import plda_fit, two_covariance
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.run_folder import RunFolder
from vidjax.training import joint as joint_lib, public
from vidjax.training.dry_run import dry_run

C, RNG = 6, np.random.default_rng(0)


def make_scores(labels, shown, noise, count=C):
    """Log-probabilities [n, count] of a run that sees identity `shown`, not the right one."""
    logits = noise * RNG.normal(size=(len(labels), 1 + count))
    logits[np.arange(len(labels)), shown] += 6
    logs = logits - logsumexp(logits, axis=1, keepdims=True)
    return logs[:, 1:].astype(np.float32)


def test_joined_scores_are_those_of_the_equation():
    labels = RNG.integers(0, 1 + C, 9)
    scores = np.stack([make_scores(labels, labels, 1.0) for _ in range(3)])
    scores[1, 4] = -np.inf  # the clip lacks the modality
    scores[2, :, 3] = -np.inf  # the run does not know the identity
    scores[:, 7] = -np.inf
    numbers = calibration.Calibration._make([*RNG.normal(size=(3, 3)), np.array(0.3)])
    expected = np.zeros((9, 1 + C))
    expected[:, 0] = numbers.stranger
    for i in range(9):
        for j in range(C):
            for r in range(3):
                log = np.float64(scores[r, i, j])
                if np.isneginf(log):
                    continue
                other = np.log(1 - np.sum(np.exp(np.float64(scores[r, i]))))
                trust = expit(numbers.trust[r])
                ratio = np.exp(numbers.scale[r]) * (log - other) + numbers.offset[r]
                expected[i, 1 + j] += np.log(1 - trust + trust * np.exp(ratio))
    expected = expected - np.asarray(logsumexp(expected, axis=1, keepdims=True))
    joined, rows = np.asarray(calibration.join_scores(scores, numbers)), np.arange(9) != 7
    np.testing.assert_allclose(joined[rows], expected[rows, 1:], atol=2e-3)
    assert np.isneginf(joined[7]).all()


def test_a_run_that_shows_the_wrong_person_in_some_clips_is_trusted_less():
    labels = RNG.integers(0, 1 + C, 900)
    wrong = np.where(RNG.random(900) < 0.3, RNG.integers(0, 1 + C, 900), labels)
    logs = np.stack([make_scores(labels, labels, 1.0), make_scores(labels, wrong, 1.0)])
    logs[1, :100] = -np.inf
    part = calibration.split_clips(labels)
    sets = calibration.learn([calibration.choose_candidates(logs, labels, part)])
    assert sets.trust.shape == (calibration.PARTS + 1, 2)
    assert (sets.trust[:, 0] > sets.trust[:, 1] + 1).all()
    joined = calibration.join_scores(logs, calibration.Calibration(*(x[part] for x in sets)))
    known = labels > 0
    assert np.mean(np.argmax(joined, axis=1)[known] == labels[known] - 1) > 0.97


def test_candidates_stand_for_all_identities(monkeypatch):
    """They are the right identity, the best two of each run, and random identities."""
    monkeypatch.setattr(calibration, "CANDIDATES", 8)
    labels = RNG.integers(0, 1 + 40, 30)
    logs = np.stack([make_scores(labels, labels, 3.0, 40) for _ in range(2)])
    found = calibration.choose_candidates(logs, labels, calibration.split_clips(labels))
    assert found.logs.shape == (2, 30, 8)
    for clip, label in enumerate(labels):
        scores = found.logs[:, clip].T.tolist()  # [candidates, runs]
        chosen = [logs[:, clip].T.tolist().index(pair) for pair in scores]  # columns
        best = {*np.argsort(-logs[:, clip], axis=1)[:, :2].ravel()} | ({label - 1} - {-1})
        assert label == 0 or chosen[0] == label - 1
        others = (40 - len(best)) / (8 - len(best))  # each random identity stands for several
        wanted = [1.0 if column in best else others for column in chosen]
        assert {*best} <= {*chosen} and found.weight[clip].tolist() == pytest.approx(wanted)


def test_strangers_are_recognised_if_no_stranger_was_among_the_clips_to_learn_from():
    labels = RNG.integers(1, 1 + C, 450)
    scores = np.stack([make_scores(labels, labels, 3.0) for _ in range(2)])
    part = calibration.split_clips(labels)
    sets = calibration.learn([calibration.choose_candidates(scores, labels, part)])
    nobody = np.zeros(900, int)
    of_strangers = np.stack([make_scores(nobody, nobody, 3.0) for _ in range(2)])
    joined = calibration.join_scores(of_strangers, calibration.Calibration(*(x[-1] for x in sets)))
    assert np.median(np.exp(np.asarray(joined)).sum(axis=1)) < 0.1


def test_numbers_for_a_part_are_learned_from_the_clips_of_other_parts():
    labels = RNG.integers(0, 1 + C, 900)
    part = calibration.split_clips(labels)
    logs = np.stack([make_scores(labels, labels, 1.0) for _ in range(2)])
    spoilt = logs.copy()
    spoilt[0, part == 1] = logs[0, part == 1, ::-1]  # scores of other people
    before, after = (
        calibration.learn([calibration.choose_candidates(x, labels, part)]) for x in (logs, spoilt)
    )
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[1], y[1])
    assert (before.trust[[0, 2, 3], 0] > after.trust[[0, 2, 3], 0]).all()


@pytest.fixture(scope="module", autouse=True)
def fixed_settings():
    """PLDA has these settings: to fit them takes longer than everything else in this file."""
    settings = two_covariance.Settings(
        within=0.5, between=0.5, scale=0.1, unenrolled=-1.0, stranger=-1.0, centred=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plda_fit, "fit_member_settings", lambda *_: settings._asdict())
        yield


@pytest.fixture(scope="module")
def joint(no_figures, official_dir, official_data, tmp_path_factory):
    """A joint run of two systems in closed form, its configuration, and the data."""
    config = config_lib.default()
    config.data.update(name="iqiyi_vid", dir=str(official_dir), train_splits=("train", "val"))
    config.modalities, config.ensemble.folds = ("face", "head"), 2
    config.eval.update(block_size=32)
    config.join.systems = ("plda:iqiyi_vid,few,face", "plda:iqiyi_vid,few,head")
    config.join.learned = config.join.diffusion = True
    config.eval.splits = ("train",)
    folder = tmp_path_factory.mktemp("runs") / "joint"
    folder.mkdir()
    lines, train = [], public.train_run
    results, was_finished = train(config, RunFolder(folder), official_data, log=lines.append)
    assert {line["split"] for line in lines if "split" in line} == {"val", "test"}
    assert results["map_kind"] == "out_of_fold" and not was_finished
    return config, folder, official_data


@pytest.fixture
def copied(joint, tmp_path):
    """A copy of the joint run, its configuration, and the data."""
    return joint[0], Path(shutil.copytree(joint[1], tmp_path / "copy")), joint[2]


@pytest.mark.slow
def test_one_command_measures_out_of_fold_and_writes_a_deleted_report_again(copied):
    config, folder, data = copied
    metrics = RunFolder(folder).metrics()
    assert [row["map"] is not None for row in metrics["runs"]] == [True, True]
    assert metrics["finished"] and metrics["trained_on"]
    names = ("metrics.json", "ranking.txt", "config.json", "join.json", "ranking_test.txt")
    of_train = RunFolder(folder).other_metrics()["train"]
    assert of_train["map_kind"] == "out_of_fold" and of_train["map"] > 0.5
    before = {name: (folder / name).read_bytes() for name in names}
    moved = folder.rename(folder.with_name("moved"))
    again = public.evaluate_run(RunFolder(moved).config, RunFolder(moved), data)
    assert again["val"]["map"] == metrics["map"]
    assert [x for x in names if (moved / x).read_bytes() != before[x]] == ["metrics.json"]
    assert again["train"]["map"] == of_train["map"]
    # A deleted report is written again, also if the process died before `finished` was written.
    for finished in (True, False):
        RunFolder(moved).write_metrics({**RunFolder(moved).metrics(), "finished": finished})
        (moved / "report.html").unlink()
        results, was_finished = public.train_run(config, RunFolder(moved), data)
        assert was_finished == finished and results["map"] == metrics["map"]
        assert "blend of 2 runs" in (moved / "report.html").read_text()
    config = copy.deepcopy(config)
    config.ensemble.folds = 3
    refused(lambda: public.train_run(config, RunFolder(moved), data), "--workdir")


def test_evaluation_refuses_fields_that_the_join_does_not_read():
    def evaluate(*words):
        config = config_lib.default()
        config.join.runs, config.join.learned = ("a", "b"), True
        return public.configure_evaluation(config, [f"--config.join.{word}" for word in words])

    remedy = "has no effect with config.join.learned=True", "--config.join.learned=False"
    refused(lambda: evaluate("weights=2,1"), "config.join.weights", *remedy)
    assert evaluate("weights=2,1", "learned=false").join.weights == (2, 1)
    refused(lambda: evaluate("diffusion=true", "learned=false"), "--config.join.learned=True")


def test_runs_with_other_folds_or_without_a_common_clip_are_refused():
    uses = [np.array(use, bool) for use in ([[1, 1, 0], [0, 0, 1]], [[1, 0, 0]], [[0, 0, 1]])]
    runs: list[Any] = [SimpleNamespace(use=use, pool=use.any(axis=0)) for use in uses]

    def check(*chosen):
        names = [SimpleNamespace(name=str(number)) for number in range(len(chosen))]
        blended: Any = SimpleNamespace(runs=chosen, models=names)
        blend.Blend.check_folds(blended)

    check(runs[0], runs[0])
    refused(lambda: check(*runs[:2]), "different folds", "0, 1", "ensemble.folds")
    refused(lambda: scores_lib.combine(runs[1:], max, None), "no clip is scored by all", "folds")


@pytest.fixture(scope="module")
def restored(joint):
    """The restored blend, and its scores of test."""
    run = vidjax.restore(joint[1])
    return run, run.scores(joint[2], split="test")


@pytest.mark.slow
def test_restored_blend_ranks_new_clips_as_the_command_did(joint, restored):
    (_, folder, data), (restored, scores) = joint, restored
    clips, ranking = data.split("test").clips, restored.rank(data, split="test")
    names = [line.split()[1:] for line in (folder / "ranking_test.txt").read_text().splitlines()]
    expected = [[name.removesuffix(".mp4") for name in row] for row in names]
    assert [[clip for clip, _ in row] for row in ranking.values()] == expected
    shown = {clip: score for clip, score in ranking[restored.identities[3]]}
    for clip, row in zip(clips, scores, strict=True):
        assert clip not in shown or shown[clip] == row[3]
    assert set(restored.identify(data, split="test", threshold=-100.0)) == set(clips)
    refused(lambda: restored.embed(data, split="test"), str(folder / "1_plda_all"))
    refused(lambda: predict.restore_run(folder), str(folder / "1_plda_all"))


@pytest.mark.slow
def test_scores_are_kept_as_an_array_if_the_user_asks(copied, restored):
    _, folder, data = copied
    config = RunFolder(folder).config
    config.eval.keep_scores, config.eval.split = True, "test"
    public.evaluate_run(config, RunFolder(folder), data)
    np.testing.assert_array_equal(np.load(folder / "scores_test.npy", mmap_mode="r"), restored[1])
    names = json.loads((folder / "scores_test.json").read_text())
    assert names == {"clips": [*data.split("test").clips], "identities": [*data.identities]}
    found = forget.forget([], [names["clips"][0]], [folder])[0]
    assert folder in {place.path for place in found}
    single, path = RunFolder(folder / "1_plda"), folder / "1_plda" / "scores.npy"
    config = single.config
    config.eval.keep_scores = True
    public.evaluate_run(config, single, data)
    np.testing.assert_array_equal(
        np.load(path), small_runs.scores(small_runs.restored(single.path, data))
    )
    config.eval.keep_scores = False
    public.evaluate_run(config, single, data)  # scores of an earlier evaluation are deleted
    assert not path.exists()


@pytest.mark.slow
def test_all_runs_of_a_blend_are_checked_and_faults_are_refused(copied, cache_dir, command):
    config, folder, data = copied
    words = "check", f"--workdir={folder}", f"--config.data.cache_dir={cache_dir}"
    done = command(*words)
    assert done.code == 0
    for name in ("1_plda", "2_plda", "1_plda_all", "2_plda_all"):
        assert f"{name}: run: step" in done.out
    next((folder / "2_plda" / "checkpoints").rglob("_METADATA")).write_text("{}")
    done = command(*words)
    assert done.code == 3 and "2_plda: checkpoint" in done.out.splitlines()[-1]
    # Learned numbers of another blend.
    numbers = json.loads((folder / "join.json").read_text())
    for name, value in (("scale", [[0.0]] * 4), ("stranger", [0.0]), ("trust", "NaN")):
        (folder / "join.json").write_text(json.dumps({**numbers, name: value}))
        refused(lambda: vidjax.restore(folder), "join.json", "delete the file")
    (folder / "join.json").unlink()
    refused(lambda: vidjax.restore(folder), "--config.eval.split=val")
    # A split without ground truth, and fields that no system reads.
    config = copy.deepcopy(config)
    config.data.train_splits = ("train", "test")
    refused(lambda: public.train_run(config, RunFolder(folder / "x"), data), "train_splits=train")
    config.data.train_splits, config.eval.splits = ("train", "val"), ("test",)
    refused(lambda: public.train_run(config, RunFolder(folder / "x"), data), "eval.splits: test")
    refused(lambda: public.evaluate_run(config, RunFolder(folder), data), "eval.splits: test")
    config.num_epochs = 5.0
    refused(lambda: config_lib.check(config), "config.num_epochs=5.0")
    config.num_epochs, config.modalities = 1.0, ("face",)
    refused(lambda: dry_run(config, data), "config.modalities=face,head")


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "asked", "further", "wanted", "of_all"), [
    (("train", "val"), "val", (), ("val", "test"), "test"),
    (("train",), "val", (), ("train", "val", "test"), "test"),
    (("train", "val", "test"), "val", (), ("val",), None),
    (("train", "val", "test"), "val", ("val", "train"), ("val", "train"), None),
    (("val", "test"), "val", ("train",), ("val", "train"), "train"),
])  # fmt: skip
def test_folds_measure_a_training_split_and_runs_on_all_clips_rank_the_others(
    joint, tmp_path, monkeypatch, trained, asked, further, wanted, of_all
):
    config, data, runs = copy.deepcopy(joint[0]), joint[2], []
    config.data.train_splits, config.eval.split, config.join.learned = trained, asked, False
    config.eval.splits = further
    monkeypatch.setattr(joint_lib.analysis, "score_splits", lambda *words: words[-len(wanted) :])
    monkeypatch.setattr(joint_lib.analysis, "write_results", lambda *words: {asked: words[2]})
    found = joint_lib.train_systems(
        config, RunFolder(tmp_path), data,
        lambda own, folder, _: runs.append((folder.path.name, own.eval.split, own.ensemble.folds)),
    )  # fmt: skip
    assert found == wanted
    folds = [(name, wanted[0], 2) for name in ("1_plda", "2_plda")]
    assert runs == folds + [(f"{name}_all", of_all, 0) for name, *_ in folds if of_all]


def test_the_shipped_configuration_gives_data_and_seed_to_its_systems():
    def load(words):
        """Returns a configuration, and that of its first system for its folds and all clips."""
        config = config_io.load_file(f"configs/joint.py:iqiyi_vid{words}")
        config.seed, config.data.dir = 3, "somewhere"
        config_lib.check(config)
        first = config.join.systems[0]
        return config, *(config_io.load_system(config, first, final=x) for x in (False, True))

    config, folds, final = load(",few,face,audio")
    first, *others = config.join.systems
    assert first == "cosine:iqiyi_vid,few,ensemble,face,audio"
    assert others == ["plda:iqiyi_vid,few,face", "plda:iqiyi_vid,few,audio"]
    assert (folds.seed, folds.data.dir) == (3, "somewhere")
    members = [(x.ensemble.folds, x.ensemble.seeds) for x in (folds, final)]
    assert members == [(5, 1), (0, 3)]
    config, *_ = load(",few,plda,face,audio")
    assert [*config.join.systems] == others
    refused(lambda: dry_run(config), "'somewhere' does not exist")
    config, measured, final = load("")  # one net measures, and one ranks
    assert (measured.ensemble.only, final.ensemble.only) == ((0,), ())
    assert measured.modalities == ("face",) and final.data.train_splits == ("train", "val")
    refused(lambda: config_io.load_system(config, "/tmp/x.py", final=False), "configs/NAME.py")
