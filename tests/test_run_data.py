"""A run accepts only the data that it was trained on; errors say how other data differ."""

import itertools
import json
import shutil

import numpy as np
import pytest

import vidjax
from tests.helpers.clip_files import write_labels, write_npz
from tests.helpers.seen import refused
from vidjax.cli.program import main
from vidjax.evaluation import restore
from vidjax.runs import checkpoint
from vidjax.utils import files

CLIPS = 6  # of each split
CONFIG = ("--config=knn:face", "--config.eval.report=False", "--config.batch_size=5")


def write(folder, *, seed=0, num_clips=CLIPS, shift=0):
    """Writes features and labels; `shift` changes the labels of train. Returns flags of data."""
    rng, clips, labels = np.random.default_rng(seed), {"train": {}, "val": {}}, {}
    for split, i in itertools.product(clips, range(num_clips)):
        face = {"features": rng.normal(size=(2, 4)).astype(np.float32), "quality": np.ones(2)}
        clips[split][f"{split}{i}"] = {"face": face}
        labels[f"{split}{i}"] = f"person {(i + shift * (split == 'train')) % 3}"
    write_labels(write_npz(folder, clips) / "labels.csv", labels)
    return ["--config.data.name=arrays", f"--config.data.dir={folder}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, a file of weights of clips, and a finished run that used both."""
    folder = tmp_path_factory.mktemp("own")
    weights = folder / "weights.txt"
    weights.write_text("train0.mp4 0\n")
    words = [*CONFIG, *write(folder / "data"), f"--config.data.weights={weights}"]
    assert main([*words, f"--workdir={folder}/run"]) == 0
    return folder


@pytest.fixture
def own(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "own")


@pytest.fixture
def train_again(own, say):
    """Returns a function that repeats the training command with other flags of data."""
    weights = f"--config.data.weights={own}/weights.txt"
    return lambda words, code=0: say(*CONFIG, *words, weights, f"--workdir={own}/run", code=code)


@pytest.fixture
def evaluate(own, say):
    return lambda *words, code=0: say("--mode=evaluate", f"--workdir={own}/run", *words, code=code)


@pytest.mark.slow
def test_evaluation_with_other_settings_keeps_the_results_of_the_run(own, evaluate):
    run, report = own / "run", "--config.eval.report=True"
    evaluate(report, "--config.eval.block_size=3")  # does not change results
    names = ("metrics.json", "ranking.txt", "analysis.npz")
    before = [(run / name).read_bytes() for name in names]

    out = evaluate(report, "--config.eval.temperature=4")  # writes other files, such as *_val.txt

    assert "eval.temperature=4.0" in out and "ranking_val.txt" in out
    assert [(run / name).read_bytes() for name in names] == before
    assert "eval.temperature=4.0" in (run / "report_val.html").read_text()

    # An evaluation without a report deletes the analysis of the evaluation before.
    evaluate()
    assert not (run / "analysis.npz").exists() and not (run / "report.html").exists()
    refused(lambda: vidjax.evaluate(run).average_precisions(), "config.eval.report=True")


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), [
    ({"shift": 1}, "train has other labels"), ({"seed": 1}, "other features"),
    ({"num_clips": CLIPS - 1}, "train has other clips (5, before 6)"),
], ids=["labels", "features", "clips"])  # fmt: skip
def test_run_refuses_to_train_or_evaluate_on_other_data(
    own, tmp_path, evaluate, train_again, change, message
):
    words, path = write(tmp_path / "other", **change), own / "run" / "metrics.json"
    _, data_dir = words
    before, error = path.read_bytes(), train_again(words, code=2)
    assert message in error and "--workdir=" in error
    if "shift" not in change:  # a shift changes only train, but evaluation reads val
        assert "vidjax rank" in evaluate(data_dir, code=2)
    assert path.read_bytes() == before

    path.unlink()  # as in a stopped run
    assert message in train_again(words, code=2)


@pytest.mark.slow
def test_only_a_run_without_a_checkpoint_accepts_another_configuration(own, train_again):
    words = ["--config.data.name=arrays", f"--config.data.dir={own}/data", "--config.seed=7"]
    assert "--workdir=FOLDER" in train_again(words, code=2)

    # As in a run that was stopped before its first checkpoint.
    (own / "run" / "metrics.json").unlink()
    shutil.rmtree(own / "run" / "checkpoints")
    train_again(words)
    assert json.loads((own / "run" / "config.json").read_text())["seed"] == 7


@pytest.mark.slow
def test_moved_data_are_accepted_and_a_killed_run_is_completed(own, evaluate, train_again):
    path, new_dir = own / "run", f"--config.data.dir={own}/moved"
    words = ["--config.data.name=arrays", new_dir]
    shutil.move(own / "data", own / "moved")
    assert "finished before" in train_again(words)
    evaluate(new_dir)

    # A run that was killed before its report is completed.
    results = json.loads((path / "metrics.json").read_text())
    (path / "metrics.json").write_text(json.dumps(results | {"finished": False}))
    assert "finished before" not in train_again(words)
    completed = json.loads((path / "metrics.json").read_text())
    assert completed["finished"] and completed["map"] == results["map"]

    # Other content of the file of weights is other data.
    (own / "weights.txt").write_text("train1.mp4 0\n")
    assert "config.data.weights" in train_again(words, code=2)


@pytest.mark.slow
def test_unread_split_may_come_from_other_data(own, tmp_path, evaluate):
    other, test = tmp_path / "other", "--config.eval.split=test"
    _, data_dir = write(other, seed=1)
    shutil.move(other / "val", other / "test")
    evaluate(test, data_dir)
    assert json.loads((own / "run" / "metrics_test.json").read_text())["num_clips"] == CLIPS

    # A stranger may have written config.json. Without --config.data.dir, the folder in this file is
    # used only if it has a split of the run: own / "data" has `val`, `other` has none.
    (own / "data" / "test").mkdir()
    shutil.copy(own / "data" / "val" / "val0.npz", own / "data" / "test" / "test0.npz")
    folder = next((own / "run" / "checkpoints").iterdir())
    manifest = checkpoint.read_manifest(folder)
    for place, code in ((own / "data", 0), (other, 2)):
        manifest["config"]["data"]["dir"] = str(place)
        files.write_manifest(folder / "manifest.json", manifest)
        (own / "run" / "config.json").write_text(json.dumps(manifest["config"]))
        printed = evaluate(test, code=code)
        assert code == 0 or "--config.data.dir=" in printed


def test_data_with_other_modalities_are_compared_by_clips_and_labels(tmp_path):
    """The digest of features covers all modalities, so it is not compared."""
    report = vidjax.load_data(vidjax.load_config("knn:face", *write(tmp_path / "data"))).report
    before = report["splits"]["val"]["sha256"]
    added_head = before | {"modalities": ["face", "head"], "features": "x"}
    other_labels = added_head | {"labels": "y"}
    for after, wanted in ((added_head, ""), (other_labels, "val has other labels")):
        with pytest.warns(UserWarning, match="other modalities"):
            assert restore.describe_difference("val", before, after) == wanted
