"""Training on everything: a run on train and val ranks test, and claims no MAP."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import made_runs
from tests.helpers.pages import Page, check_numbers, section
from vidjax.cli.program import main
from vidjax.core import ensemble
from vidjax.evaluation import ranking
from vidjax.evaluation.report import run_page
from vidjax.runs import checkpoint, config_io
from vidjax.runs import config as config_lib
from vidjax.runs import results as results_lib

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
KNN = f"--config={ROOT}/configs/knn.py:iqiyi_vid"
FOLDS, MEASURED = "--config.ensemble.folds=5", "--config.eval.split=val"
NUM_CLIPS = {"train": 96, "val": 60, "test": 40}  # of the official files


def said_by(*words):
    """Runs a command that succeeds; returns what it prints."""
    said, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
        assert main(list(map(str, words))) == 0, complaints.getvalue()
    return said.getvalue()


def metrics_of(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def trained(official_dir, cache_dir, tmp_path_factory):
    """The folder of a run on everything, and what its command said."""
    del cache_dir
    folder = tmp_path_factory.mktemp("everything") / "run"
    data = f"--config.data.dir={official_dir}"
    return folder, said_by(f"{KNN},everything", data, f"--workdir={folder}")


@pytest.fixture(scope="module")
def measured(trained):
    """The same folder after an evaluation on val, and what that said."""
    folder, _ = trained
    return folder, said_by("--mode=evaluate", f"--workdir={folder}", MEASURED)


@pytest.fixture(scope="module")
def on_train(official_dir, tmp_path_factory, cache_dir):
    """The folder of a run on train alone."""
    del cache_dir
    folder = tmp_path_factory.mktemp("everything") / "on_train"
    said_by(KNN, f"--config.data.dir={official_dir}", f"--workdir={folder}")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_word_trains_on_all_clips_and_ranks_others(name):
    config = config_io.load_file(f"{ROOT}/configs/{name}.py:everything")
    assert config.data.train_splits == ("train", "val")
    assert config.eval.split == "test"
    assert not any(config.ensemble[name] for name in config_lib.HOLD_OUT_FIELDS)
    config_lib.check(config)


@pytest.mark.slow
def test_it_ranks_test_and_claims_no_map(trained, official_dir):
    folder, said = trained
    results = metrics_of(folder)
    assert results["num_clips"] == NUM_CLIPS["test"]
    assert results["num_identities"] == 12
    scores = ("map", "best", "top1", "auroc", "fnir", "threshold")
    assert not [key for key in results if key.startswith(scores)]
    assert not [line for line in results_lib.read_lines(folder / "metrics.jsonl") if "map" in line]
    assert checkpoint.best(checkpoint.manifests(folder)) is None

    sets = ensemble.load(folder)
    assert sets.trained.shape == (1, NUM_CLIPS["train"] + NUM_CLIPS["val"])
    assert sets.trained.all()
    lists = made_runs.lists(folder / "ranking.txt")
    assert len(lists) == 12
    for names in lists.values():
        assert len(names) == len(set(names)) == NUM_CLIPS["test"]
        assert all("_TEST_" in name for name in names)

    assert "MAP@100     none: test has no ground truth" in said
    (line,) = [line for line in said.splitlines() if line.startswith("  measured")]
    assert "nothing: trained on train and val" in line
    assert FOLDS in line and MEASURED in line
    again = said_by(f"{KNN},everything", f"--config.data.dir={official_dir}",
                    f"--workdir={folder}")  # fmt: skip
    assert "finished before" in again and line in again


@pytest.mark.slow
def test_its_report_says_that_nothing_is_measured(trained):
    folder, _ = trained
    text = (folder / "report.html").read_text()
    assert not Page(text).open
    check_numbers(folder, text)
    summary = section(text, "summary")
    assert "and there is no MAP" in summary
    assert "trained on train and val, so no split is left" in summary
    assert "<strong>" not in summary  # where a MAP would stand
    assert 'id="learning"' not in text  # there is no loss to show, and no MAP


@pytest.mark.slow
def test_val_is_evaluated_in_sample_and_the_run_keeps_no_map(measured):
    folder, said = measured
    results = metrics_of(folder, "metrics_val.json")
    assert results["map_kind"] == "in_sample"
    assert results["num_clips"] == NUM_CLIPS["val"]
    (line,) = [line for line in said.splitlines() if "MAP@100" in line]
    assert "in sample" in line and "trained on these clips" in line
    assert "map" not in metrics_of(folder)
    page = (folder / "report_val.html").read_text()
    assert run_page.KINDS["in_sample"] in section(page, "summary")
    assert "in_sample" in section((folder / "report.html").read_text(), "summary")
    assert "all good" in said_by("--mode=check", f"--workdir={folder}")


@pytest.mark.slow
def test_a_comparison_is_refused_or_names_the_run_that_knows_the_clips(
    measured, on_train, tmp_path, command
):
    folder, _ = measured
    words = ("--mode=compare", f"--workdir={tmp_path}/out", f"--runs={folder},{on_train}")
    assert command(*words).refused(FOLDS)
    (line,) = [line for line in said_by(*words, MEASURED).splitlines() if "In sample" in line]
    assert str(folder) in line and str(on_train) not in line
    assert "In sample: " in (tmp_path / "out" / "comparison.html").read_text()


@pytest.mark.slow
def test_the_best_checkpoint_is_refused_with_the_latest(trained, command):
    folder, _ = trained
    done = command("evaluate", f"--workdir={folder}", "--config.eval.checkpoint=best")
    assert done.code == 3 and "--config.eval.checkpoint=latest" in done.err


def test_a_slip_is_refused_with_both_ways_out(tmp_path, official_dir, command):
    slip = "--config.data.train_splits=train,val"
    for words in ([KNN, slip], [f"{KNN},everything", MEASURED]):
        data = [f"--config.data.dir={official_dir}", f"--workdir={tmp_path}/w"]
        done = command(*words, *data)
        assert done.refused(FOLDS, "everything", "--config.eval.split=test")
        assert not (tmp_path / "w").exists()
    config = config_io.load_file(KNN.removeprefix("--config="))
    for remedy in (FOLDS, "--config.eval.split=test"):
        config_lib.check(config_io.override(config, [slip, remedy]))


@pytest.mark.parametrize("name", ["deepmef", "quality_fusion", "residual_dense"])
def test_two_ways_to_train_on_val_exclude_each_other(name):
    with pytest.raises(ValueError, match="'everything' and 'trainval'"):
        config_io.load_file(f"{ROOT}/configs/{name}.py:trainval,everything")


@pytest.mark.slow
def test_joined_with_other_runs_it_ranks_test(trained, on_train, official_dir, tmp_path):
    """Runs that all rank test are joined there; on val the join is in sample, as one run is."""
    folder, _ = trained
    other = tmp_path / "heads"
    data = f"--config.data.dir={official_dir}"
    said_by(f"{KNN},everything,head", data, f"--workdir={other}")
    out = tmp_path / "joined"
    words = ("--mode=evaluate", f"--workdir={out}")
    runs = f"--runs={folder},{other}"
    said = said_by(*words, runs)
    results = metrics_of(out)
    assert "map" not in results
    assert results["num_clips"] == NUM_CLIPS["test"]
    assert len(made_runs.lists(out / "ranking.txt")) == 12
    assert "ranked, not scored" in said

    mixed = (f"--workdir={tmp_path / 'mixed'}", f"--runs={folder},{on_train}")
    assert "in sample" in said_by("--mode=evaluate", *mixed)  # they evaluate two splits: val
    assert metrics_of(tmp_path / "mixed")["map_kind"] == "in_sample"
    said_by("--mode=evaluate", *mixed, "--config.eval.split=test")
    assert "map" not in metrics_of(tmp_path / "mixed", "metrics_test.json")


LABELLED = {"train": True, "val": True, "test": False}


@pytest.mark.parametrize(
    ("train_splits", "folds", "labelled", "wanted"),
    [
        (("train", "val"), 0, LABELLED, "trained on train and val"),
        (("train", "val"), 5, LABELLED, ""),  # val can be measured out of fold
        (("train",), 0, LABELLED, ""),  # val is left
        (("train",), 0, {"train": True, "test": False}, "trained on train,"),
        (("train", "val"), 0, {**LABELLED, "test": True}, ""),
        (("train", "val"), 0, {}, ""),  # no report says what there is
    ],
)
def test_what_is_left_to_measure(tmp_path, train_splits, folds, labelled, wanted):
    splits = {name: {"labelled": known} for name, known in labelled.items()}
    (tmp_path / "data_report.json").write_text(json.dumps({"splits": splits}))
    config = {"data": {"train_splits": train_splits}, "ensemble": {"folds": folds}}
    found = results_lib.unmeasured(config, tmp_path)
    assert found.startswith(wanted) and bool(found) == bool(wanted)


@pytest.mark.slow
def test_a_test_split_with_a_ground_truth_is_measured(tmp_path, cache_dir):
    """The synthetic test split has one, and no run was trained on it: its MAP counts."""
    said = said_by(f"--config={ROOT}/configs/knn.py:everything", f"--workdir={tmp_path}/run")
    results = metrics_of(tmp_path / "run")
    assert results["map_kind"] == "test"
    assert f"{results['map']:.4f} on test;" in said
    assert "measured" not in said
    truths = cache_dir.glob("synthetic/*/test_gt.txt")
    submission = ranking.read_submission(tmp_path / "run" / "ranking.txt")
    values = [ranking.score(ranking.read_ground_truth(x), submission.ranking) for x in truths]
    assert np.isclose(values, results["map"], rtol=0, atol=1e-12).any()
