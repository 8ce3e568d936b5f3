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


def test_run_on_everything_learns_all_clips_and_ranks_test_without_a_score(everything):
    folder, out = everything
    trained, results = ensemble.load(folder).trained, read_metrics(folder)
    assert trained.shape == (1, clip_files.CLIPS["train"] + clip_files.CLIPS["val"])
    assert trained.all()
    assert results["num_clips"] == clip_files.CLIPS["test"] and results["num_identities"] == 12
    lists = made_runs.lists(folder / "ranking.txt").values()
    assert len(lists) == 12 and all("_TEST_" in name for names in lists for name in names)
    assert "MAP@100     none: test has no ground truth" in out
    scores = ("map", "best", "top1", "auroc", "fnir", "threshold")
    assert not [key for key in results if key.startswith(scores)]
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


def test_run_on_everything_has_no_best_checkpoint_and_is_imported_without_it(
    everything, tmp_path, say, command
):
    folder, _ = everything
    done = command("evaluate", f"--workdir={folder}", "--config.eval.checkpoint=best")
    assert done.code == 3 and "--config.eval.checkpoint=latest" in done.err

    run, exported = shutil.copytree(folder, tmp_path / "run"), tmp_path / "exported"
    config = read_metrics(run, "config.json")
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


def test_comparison_and_blend_with_a_run_on_everything_are_in_sample_on_val(
    everything, official_dir, tmp_path, say
):
    """On test, a comparison is refused and a blend has no MAP, because test is not labelled."""
    (folder, _), (on_train, _) = everything, train(tmp_path / "on_train", KNN, official_dir)
    runs, blend = f"--runs={folder},{on_train}", tmp_path / "blend"

    words = ("--mode=compare", f"--workdir={tmp_path}/out", runs)
    assert FOLDS in say(*words, code=2)  # on test, the split of `folder`
    line = find_line(say(*words, MEASURED), "In sample")
    assert str(folder) in line and str(on_train) not in line

    words = ("--mode=evaluate", f"--workdir={blend}", runs)
    assert "in sample" in say(*words)  # on val, the default split
    assert read_metrics(blend)["map_kind"] == "in_sample"
    assert "MAP@100     none: " in say(*words, "--config.eval.split=test")
    assert "map" not in read_metrics(blend, "metrics_test.json")
