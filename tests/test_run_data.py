"""A run accepts only the data that it was trained on. A run on everything measures nothing."""

import contextlib
import copy
import io
import itertools
import json
import shutil
import sys
import tempfile
from typing import Any

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_runs, small_runs
from tests.helpers.pages import check_numbers, section
from tests.helpers.seen import refused
from vidjax.cli import program
from vidjax.runs import checkpoint, digests, results as results_lib
from vidjax.utils import files
from vidjax.utils.errors import VidjaxWarning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_figures")]
CLIPS = 6  # of each split
CONFIG = ("--config=knn:face", "--config.eval.report=False", "--config.batch_size=5")


def write(folder, *, seed=0, num_clips=CLIPS, shift=0):
    """Writes features and labels; `shift` changes the labels of train. Returns flags of data."""
    rng, clips, labels = np.random.default_rng(seed), {"train": {}, "val": {}}, {}
    for split, i in itertools.product(clips, range(num_clips)):
        face = {"features": rng.normal(size=(2, 4)).astype(np.float32), "quality": np.ones(2)}
        clips[split][f"{split}{i}"] = {"face": face}
        labels[f"{split}{i}"] = f"person {(i + shift * (split == 'train')) % 3}"
    clip_files.write_labels(clip_files.write_npz(folder, clips) / "labels.csv", labels)
    return ["--config.data.name=arrays", f"--config.data.dir={folder}"]


def read_metrics(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, a file of weights of clips, and a finished run that used both."""
    folder = tmp_path_factory.mktemp("own")
    weights = folder / "weights.txt"
    weights.write_text("train0.mp4 0\n")
    words = [*CONFIG, *write(folder / "data"), f"--config.data.weights={weights}"]
    assert program.main([*words, f"--workdir={folder}/run"]) == 0
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


def test_evaluation_with_other_settings_keeps_the_results_of_the_run(own, evaluate):
    run, report = own / "run", "--config.eval.report=True"
    with pytest.warns(VidjaxWarning, match="--config=mma: the run keeps its model 'knn'"):
        evaluate(report, "--config=mma", "--config.eval.block_size=3")  # does not change results
    names = ("metrics.json", "ranking.txt", "analysis.npz")
    before = [(run / name).read_bytes() for name in names]
    for path in (run, str(run), run / "analysis.npz"):
        assert vidjax.load_analysis(path)[0].split == "val"
    out = evaluate(report, "--config.eval.temperature=4")
    assert "eval.temperature=4.0" in out and "ranking_val.txt" in out  # another file
    assert [(run / name).read_bytes() for name in names] == before
    assert "eval.temperature=4.0" in (run / "report_val.html").read_text()
    # An evaluation without a report deletes the analysis of the evaluation before.
    evaluate()
    assert not (run / "analysis.npz").exists() and not (run / "report.html").exists()
    refused(lambda: vidjax.evaluate(run).average_precisions(), "config.eval.report=True")
    refused(lambda: vidjax.load_analysis(run), "analysis.npz", "config.eval.report=True")


@pytest.mark.parametrize(("change", "message"), [
    ({"shift": 1}, "train has other labels"), ({"seed": 1}, "other features"),
    ({"num_clips": CLIPS - 1}, "train has other clips (5, before 6)"),
], ids=["labels", "features", "clips"])  # fmt: skip
def test_run_refuses_other_data(own, tmp_path, evaluate, train_again, change, message):
    _, data_dir = words = write(tmp_path / "other", **change)
    path = own / "run" / "metrics.json"
    before, error = path.read_bytes(), train_again(words, code=2)
    assert message in error and "--workdir=" in error
    if "shift" not in change:  # a shift changes only train, but evaluation reads val
        assert "vidjax rank" in evaluate(data_dir, code=2)
    assert path.read_bytes() == before
    path.unlink()  # as in a stopped run
    assert message in train_again(words, code=2)


def test_clips_in_memory_are_written_only_into_the_folder_of_a_run(tmp_path, monkeypatch):
    """Compiled programs, which contain no clips, are cached. Streaming needs no TensorFlow."""
    for name in ("HOME", "VIDJAX_CACHE", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)  # is read from TMPDIR again
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    rng, clips, labels = np.random.default_rng(0), {"train": {}, "val": {}}, {}
    for split, i in itertools.product(clips, range(20)):
        clips[split][f"{split}{i}"] = {"face": rng.normal(size=(1 + i % 3, 4)).astype("f2")}
        labels[f"{split}{i}"] = f"person {i % 4}"

    def train(mode, num_epochs, clips=clips):
        words = [f"--config.{word}" for word in ("batch_size=8", f"data.mode={mode}")]
        words += [small_runs.LAYER, f"--config.num_epochs={num_epochs}"]
        config = vidjax.load_config("quality_fusion:face", *words)
        return vidjax.train(config, tmp_path / mode, vidjax.load_data(clips, labels))

    for mode in ("resident", "streaming"):
        train(mode, 1)
        resumed = train(mode, 2)
        data = vidjax.load_data(clips, labels)
        assert vidjax.evaluate(tmp_path / mode, data).map == resumed.map
        assert vidjax.restore(tmp_path / mode).rank(clips["val"])
    other = copy.deepcopy(clips)
    other["train"]["train3"]["face"][0, 0] += 1
    error = refused(lambda: train("resident", 2, other), "train has other features")
    assert "vidjax.load_data" in error and "data.dir" not in error
    written = [str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()]
    # matplotlib lists the fonts of the system.
    allowed = ("resident/", "streaming/", "VIDJAX_CACHE/programs/", "HOME/.cache/matplotlib/")
    assert not [path for path in written if not path.startswith(allowed)]


def test_only_a_run_without_a_checkpoint_accepts_another_configuration(own, train_again):
    words = ["--config.data.name=arrays", f"--config.data.dir={own}/data", "--config.seed=7"]
    assert "--workdir=FOLDER" in train_again(words, code=2)
    # As in a run that was stopped before its first checkpoint.
    (own / "run" / "metrics.json").unlink()
    shutil.rmtree(own / "run" / "checkpoints")
    train_again(words)
    assert read_metrics(own / "run", "config.json")["seed"] == 7


def test_moved_data_are_accepted_and_changed_weights_are_refused(own, evaluate, train_again):
    new_dir = f"--config.data.dir={own}/moved"
    words = ["--config.data.name=arrays", new_dir]
    shutil.move(own / "data", own / "moved")
    assert "finished before" in train_again(words)
    evaluate(new_dir)
    # Other content of the file of weights is other data.
    (own / "weights.txt").write_text("train1.mp4 0\n")
    assert "config.data.weights" in train_again(words, code=2)


def test_unread_split_may_come_from_other_data(own, tmp_path, evaluate):
    other, test = tmp_path / "other", "--config.eval.split=test"
    _, data_dir = write(other, seed=1)
    shutil.move(other / "val", other / "test")
    evaluate(test, data_dir)
    assert read_metrics(own / "run", "metrics_test.json")["num_clips"] == CLIPS
    # A folder without training clips and labels is ranked, too.
    shutil.rmtree(other / "train")
    (other / "labels.csv").unlink()
    evaluate(test, data_dir)
    metrics = read_metrics(own / "run", "metrics_test.json")
    assert metrics["num_clips"] == CLIPS and "copies" not in metrics
    # A stranger may have written config.json. Without --config.data.dir, the folder in this file is
    # used only if a split of the run is unchanged there: own / "data" has `val`, `other` none.
    (own / "data" / "test").mkdir()
    np.savez(own / "data" / "test" / "test0.npz", face=np.ones((1, 4), np.float32))
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
            assert digests.describe_difference("val", before, after) == wanted
    # Clips stored by another version have other digests, although the features are equal.
    other_version = before | {"records": "1.3.0", "features": "x"}
    with pytest.warns(UserWarning, match="another version of vidjax"):
        assert digests.describe_difference("val", other_version, before) == ""
    assert "features" in digests.describe_difference("val", before | {"features": "x"}, before)


def test_copies_of_training_clips_are_reported_with_the_map_without_them(tmp_path, say):
    """Half of the clips of val are clips of train under other names, in another order and dtype."""
    rng, data, labels = np.random.default_rng(0), tmp_path / "data", {}
    splits: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    for i in range(12):
        train, val = rng.normal(size=(2, 1 + i % 3, 8)).astype("f2")
        splits["train"][f"train{i}"] = {"face": train}
        splits["val"] |= {f"copy{i}": {"face": train[::-1].astype("f4")}}
        splits["val"] |= {f"val{i}": {"face": val.astype("f4")}}
        labels |= dict.fromkeys((f"train{i}", f"copy{i}", f"val{i}"), f"person {i % 3}")
    for name, kind in (("train", "f2"), ("val", "f4")):  # these clips are no copies
        splits[name] |= {f"{name} {n}": {"face": np.zeros((n, 8), kind)} for n in (0, 1)}
    clip_files.write_labels(clip_files.write_npz(data, splits) / "labels.csv", labels)
    words = ["--config.data.name=arrays", f"--config.data.dir={data}"]
    wanted = "12 of 26 clips of val have the frames of clips of train: 'copy0' equals 'train0'\n"
    with pytest.warns(VidjaxWarning, match=wanted):
        printed = say("--config=knn:face", *words, f"--workdir={tmp_path / 'run'}")
    results = read_metrics(tmp_path / "run")
    copies = results["copies"]
    assert copies["count"] == 12 and copies["example"] == "'copy0' equals 'train0' of train"
    assert copies["map"] < results["map"] - 0.1
    assert f"12 clips are training clips: {copies['example']}; MAP@100 without them" in printed
    assert "12 clips are training clips" in (tmp_path / "run" / "report.html").read_text()
    # MAP without the copies is the MAP of the same clips in a split without copies.
    for i in range(12):
        (data / "val" / f"copy{i}.npz").unlink()
        del labels[f"copy{i}"]
    clip_files.write_labels(data / "labels.csv", labels)
    say(*CONFIG[:2], *words, f"--workdir={tmp_path / 'other'}")
    alone = read_metrics(tmp_path / "other")
    assert "copies" not in alone and copies["map"] == pytest.approx(alone["map"], abs=1e-12)


ON_VAL = "--config.eval.split=val"


@pytest.fixture(scope="module")
def everything(official_dir, tmp_path_factory):
    """The folder of a run on train and val, and what the command printed."""
    folder, spec = tmp_path_factory.mktemp("everything"), "--config=knn:iqiyi_vid,everything"
    words = [spec, f"--config.data.dir={official_dir}", f"--workdir={folder}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert program.main(words) == 0
    return folder, printed.getvalue()


def test_run_on_everything_ranks_test_and_measures_nothing(everything):
    folder, out = everything
    trained, results = small_runs.training_sets(folder).trained, read_metrics(folder)
    assert trained.shape == (1, clip_files.CLIPS["train"] + clip_files.CLIPS["val"])
    assert trained.all()
    assert results["num_clips"] == clip_files.CLIPS["test"] and results["num_identities"] == 12
    lists = made_runs.lists(folder / "ranking.txt").values()
    assert len(lists) == 12 and all("_TEST_" in name for names in lists for name in names)
    assert "MAP@100     none: test has no ground truth" in out
    scores = ("map", "best", "top1", "auroc", "fnir", "threshold")
    assert not [key for key in results if key.startswith(scores)]
    assert not [line for line in results_lib.read_lines(folder / "metrics.jsonl") if "map" in line]
    (line,) = [line for line in out.splitlines() if "  measured" in line]
    assert "nothing: the run was trained on train and val" in line
    assert "--config.ensemble.folds=5" in line and ON_VAL in line  # the remedies
    report = (folder / "report.html").read_text()
    check_numbers(folder, report)
    summary = section(report, "summary")
    assert "trained on train and val, so no split is left" in summary
    assert "<strong>" not in summary and 'id="learning"' not in report  # no MAP and no loss


def test_val_is_in_sample_after_a_run_on_everything(everything, tmp_path, say, command):
    """A blend with this run is in sample, too. On test, it has no MAP."""
    (folder, _), blend = everything, tmp_path / "blend"
    done = command("evaluate", f"--workdir={folder}", "--config.eval.checkpoint=best")
    assert done.code == 3 and "--config.eval.checkpoint=latest" in done.err  # no step was measured
    out = say("--mode=evaluate", f"--workdir={folder}", ON_VAL)
    assert "in sample: the run was trained on these clips" in out
    results = read_metrics(folder, "metrics_val.json")
    assert results["map_kind"] == "in_sample" and results["num_clips"] == clip_files.CLIPS["val"]
    assert "map" not in read_metrics(folder)  # the results of test have no MAP, as before
    runs = f"--runs={folder},{shutil.copytree(folder, tmp_path / 'copy')}"
    words = ("--mode=evaluate", f"--workdir={blend}", runs, CONFIG[1])
    assert "in sample" in say(*words, ON_VAL)
    assert read_metrics(blend)["map_kind"] == "in_sample"
    assert "MAP@100     none: " in say(*words, "--config.eval.split=test")
    assert "map" not in read_metrics(blend, "metrics_test.json")
