"""Training on everything: a run on train and val ranks test, and claims no MAP."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import clip_files, made_runs
from tests.helpers.pages import check_numbers, section
from vidjax.core import ensemble
from vidjax.evaluation import ranking
from vidjax.runs import checkpoint
from vidjax.runs import results as results_lib

ROOT = Path(__file__).parent.parent
KNN = f"--config={ROOT}/configs/knn.py:iqiyi_vid"
FOLDS, MEASURED = "--config.ensemble.folds=5", "--config.eval.split=val"


def read_metrics(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
def test_run_on_everything_reports_no_map(official_dir, tmp_path, say, command):
    folder, data = tmp_path / "run", f"--config.data.dir={official_dir}"
    out = say(f"{KNN},everything", data, f"--workdir={folder}")
    results = read_metrics(folder)
    assert results["num_clips"] == clip_files.CLIPS["test"] and results["num_identities"] == 12
    scores = ("map", "best", "top1", "auroc", "fnir", "threshold")
    assert not [key for key in results if key.startswith(scores)]
    assert not [line for line in results_lib.read_lines(folder / "metrics.jsonl") if "map" in line]
    assert checkpoint.find_best(checkpoint.manifests(folder)) is None
    sets = ensemble.load(folder)
    assert (
        sets.trained.shape == (1, clip_files.CLIPS["train"] + clip_files.CLIPS["val"])
        and sets.trained.all()
    )
    lists = made_runs.lists(folder / "ranking.txt")
    assert len(lists) == 12 and all("_TEST_" in name for names in lists.values() for name in names)
    assert "MAP@100     none: test has no ground truth" in out
    (line,) = [line for line in out.splitlines() if line.startswith("  measured")]
    assert "nothing: the run was trained on train and val" in line
    assert FOLDS in line and MEASURED in line
    again = say(f"{KNN},everything", data, f"--workdir={folder}")
    assert "finished before" in again and line in again
    done = command("evaluate", f"--workdir={folder}", "--config.eval.checkpoint=best")
    assert done.code == 3 and "--config.eval.checkpoint=latest" in done.err
    # Its report says that nothing is measured.
    text = (folder / "report.html").read_text()
    check_numbers(folder, text)
    summary = section(text, "summary")
    assert "trained on train and val, so no split is left" in summary
    assert "<strong>" not in summary and 'id="learning"' not in text  # no MAP and no loss to show
    # Val is evaluated in sample, and the run keeps no MAP.
    out = say("--mode=evaluate", f"--workdir={folder}", MEASURED)
    results = read_metrics(folder, "metrics_val.json")
    assert results["map_kind"] == "in_sample" and results["num_clips"] == clip_files.CLIPS["val"]
    (line,) = [line for line in out.splitlines() if "MAP@100" in line]
    assert "in sample" in line and "trained on these clips" in line
    assert "map" not in read_metrics(folder)
    assert "all good" in say("--mode=check", f"--workdir={folder}")
    # A comparison is refused, or names the run that knows the clips.
    on_train = tmp_path / "on_train"
    say(KNN, data, f"--workdir={on_train}")
    words = ("--mode=compare", f"--workdir={tmp_path}/out", f"--runs={folder},{on_train}")
    assert FOLDS in say(*words, code=2)
    (line,) = [line for line in say(*words, MEASURED).splitlines() if "In sample" in line]
    assert str(folder) in line and str(on_train) not in line
    # A blend of the two runs evaluates val in sample, and reports no MAP of test.
    joined = tmp_path / "joined"
    words = ("--mode=evaluate", f"--workdir={joined}", f"--runs={folder},{on_train}")
    assert "in sample" in say(*words)
    assert read_metrics(joined)["map_kind"] == "in_sample"
    assert "MAP@100     none: " in say(*words, "--config.eval.split=test")
    assert "map" not in read_metrics(joined, "metrics_test.json")


@pytest.mark.slow
def test_run_on_everything_reports_map_of_a_labelled_test_split(official_dir, tmp_path, say):
    data = shutil.copytree(official_dir, tmp_path / "data")
    labels = {f"IQIYI_VID_TEST_{n:07d}": str(n % 12 + 1) for n in range(18)}
    clip_files.write_truth(data, "test", labels)
    words = f"--config.data.dir={data}", "--config.eval.report=False"
    out = say(f"{KNN},everything", *words, f"--workdir={tmp_path}/run")
    results = read_metrics(tmp_path / "run")
    assert results["map_kind"] == "test" and f"{results['map']:.4f} on test;" in out
    assert "measured" not in out
    submission = ranking.read_submission(tmp_path / "run" / "ranking.txt")
    truth = ranking.read_ground_truth(data / "test_gt.txt")
    assert results["map"] == pytest.approx(ranking.score(truth, submission.ranking), abs=1e-12)
