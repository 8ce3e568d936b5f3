"""Training on everything: a run on train and val ranks test, and claims no MAP."""

import contextlib
import io
import json
import shutil

import pytest

from tests.helpers import clip_files, made_runs
from tests.helpers.pages import check_numbers, section
from vidjax.cli import program
from vidjax.core import ensemble
from vidjax.runs import results as results_lib

pytestmark = pytest.mark.slow
KNN = "--config=knn:iqiyi_vid"
# The two remedies of an error: two ways to train a run whose MAP can be measured.
FOLDS, MEASURED = "--config.ensemble.folds=5", "--config.eval.split=val"


def read_metrics(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


def find_line(text, part):
    """Returns the only line of a text that contains a part."""
    (line,) = [line for line in text.splitlines() if part in line]
    return line


def train(folder, spec, official_dir):
    """Trains a run by the command; returns its folder and what the command printed."""
    words = [spec, f"--config.data.dir={official_dir}", f"--workdir={folder}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert program.main(words) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def everything(official_dir, tmp_path_factory):
    """The folder of a run on train and val, and what the command printed."""
    return train(tmp_path_factory.mktemp("everything"), f"{KNN},everything", official_dir)


@pytest.fixture(scope="module")
def on_train(official_dir, tmp_path_factory):
    """The folder of a run on train only."""
    return train(tmp_path_factory.mktemp("on_train"), KNN, official_dir)[0]


def test_run_on_everything_ranks_the_test_split(everything):
    folder, out = everything
    results = read_metrics(folder)
    assert results["num_clips"] == clip_files.CLIPS["test"] and results["num_identities"] == 12
    lists = made_runs.lists(folder / "ranking.txt").values()
    assert len(lists) == 12 and all("_TEST_" in name for names in lists for name in names)
    assert "MAP@100     none: test has no ground truth" in out


def test_run_on_everything_learns_all_clips_and_reports_no_score(everything):
    folder, _ = everything
    trained = ensemble.load(folder).trained
    assert trained.shape == (1, clip_files.CLIPS["train"] + clip_files.CLIPS["val"])
    assert trained.all()
    scores = ("map", "best", "top1", "auroc", "fnir", "threshold")
    assert not [key for key in read_metrics(folder) if key.startswith(scores)]
    assert not [line for line in results_lib.read_lines(folder / "metrics.jsonl") if "map" in line]


def test_command_and_report_say_that_nothing_is_measured(everything, official_dir, say):
    folder, out = everything

    line = find_line(out, "  measured")
    assert "nothing: the run was trained on train and val" in line
    assert FOLDS in line and MEASURED in line
    data = f"--config.data.dir={official_dir}"
    again = say(f"{KNN},everything", data, f"--workdir={folder}")
    assert "finished before" in again and line in again
    report = (folder / "report.html").read_text()
    check_numbers(folder, report)
    summary = section(report, "summary")
    assert "trained on train and val, so no split is left" in summary
    assert "<strong>" not in summary and 'id="learning"' not in report  # no MAP and no loss


def test_run_on_everything_has_no_best_checkpoint(everything, command):
    done = command("evaluate", f"--workdir={everything[0]}", "--config.eval.checkpoint=best")
    assert done.code == 3 and "--config.eval.checkpoint=latest" in done.err


def test_run_that_prefers_the_best_checkpoint_is_imported_without_a_map(everything, tmp_path, say):
    run, exported = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(everything[0], run)
    config = json.loads((run / "config.json").read_text())
    config["eval"]["checkpoint"] = "best"
    (run / "config.json").write_text(json.dumps(config))
    say("export", run, f"--to={exported}", "--format=safetensors")
    say("import", exported, f"--to={tmp_path / 'again'}")


def test_val_is_evaluated_in_sample_after_a_run_on_everything(everything, say):
    folder, _ = everything
    out = say("--mode=evaluate", f"--workdir={folder}", MEASURED)
    results = read_metrics(folder, "metrics_val.json")
    assert results["map_kind"] == "in_sample" and results["num_clips"] == clip_files.CLIPS["val"]
    line = find_line(out, "MAP@100")
    assert "in sample" in line and "trained on these clips" in line
    assert "map" not in read_metrics(folder)  # the results of test have no MAP, as before
    assert "all good" in say("--mode=check", f"--workdir={folder}")


def test_comparison_on_test_is_refused_and_on_val_names_the_in_sample_run(
    everything, on_train, tmp_path, say
):
    folder, _ = everything
    words = ("--mode=compare", f"--workdir={tmp_path}/out", f"--runs={folder},{on_train}")
    assert FOLDS in say(*words, code=2)  # test, the split of `folder`, is not labelled
    line = find_line(say(*words, MEASURED), "In sample")
    assert str(folder) in line and str(on_train) not in line


def test_blend_with_a_run_on_everything_is_in_sample_on_val_and_has_no_map_on_test(
    everything, on_train, tmp_path, say
):
    words = ("--mode=evaluate", f"--workdir={tmp_path}", f"--runs={everything[0]},{on_train}")
    assert "in sample" in say(*words)  # on val, the default split
    assert read_metrics(tmp_path)["map_kind"] == "in_sample"
    assert "MAP@100     none: " in say(*words, "--config.eval.split=test")
    assert "map" not in read_metrics(tmp_path, "metrics_test.json")
