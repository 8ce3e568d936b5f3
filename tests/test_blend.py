"""Blends of runs: scores against a loop over clip names, and runs that cannot be blended."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vidjax
from tests.helpers import small_runs
from tests.helpers.datasets import load_dataset
from tests.helpers.pages import check_numbers
from tests.helpers.seen import refused
from tests.helpers.small_runs import run, shrunk
from vidjax.evaluation import blend, scores as scores_lib
from vidjax.runs import config_io

SHORT = (
    "--config.num_epochs=1", "--config.eval.block_size=32", "--config.eval.members=false",
    "--config.ensemble.folds=2",
)  # fmt: skip
pytestmark = [
    # Each run has only a part of the modalities.
    pytest.mark.filterwarnings("ignore:.*the data have other modalities"),
    pytest.mark.usefixtures("no_figures"),
]


@pytest.fixture(scope="module")
def load(cache_dir):
    return lambda config: load_dataset("iqiyi_vid", directory=config.data.dir, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def runs(load, official_dir, tmp_path_factory):
    """Two runs with folds. Their systems, modalities, folders of data and eval fields differ.

    The first folder has official files of faces, and the second of heads and voices.
    """
    root, folders = tmp_path_factory.mktemp("runs"), []
    for name, left_out, *own in (
        ("quality_fusion", ("head_*", "audio_*")),
        ("knn", ("face_*",), "--config.eval.top_classes=3", "--config.eval.temperature=2"),
    ):
        files = root / f"files of {name}"
        shutil.copytree(official_dir, files, ignore=shutil.ignore_patterns(*left_out))
        spec = f"configs/{name}.py:iqiyi_vid" + ",head" * (name == "knn")
        config = shrunk(*SHORT, f"--config.data.dir={files}", *own, spec=spec)
        run(config, root / name, load(config))
        folders.append(root / name)
    return folders


def probabilities(folder, load, split):
    """Returns clip -> probabilities [C] float64 of a single run."""
    config = config_io.load_workdir(folder)
    if config.eval.scores == "logits":
        config.eval.scores = "log_softmax"
    model = small_runs.restored(folder, load(config), config)
    logs = small_runs.scores(model, split)
    return dict(zip(model.data.split(split).clips, np.exp(logs), strict=True))


def check_ranking(path, runs, load, weights, split="val"):
    """Asserts that a ranking sorts all clips by the weighted mean of probabilities."""
    first, second = (probabilities(folder, load, split) for folder in runs)
    scores = {x: np.average([first[x], second[x]], axis=0, weights=weights) for x in first}
    for identity, line in enumerate(path.read_text().splitlines()):
        names = [name.removesuffix(".mp4") for name in line.split()[1:]]
        assert sorted(names) == sorted(scores)
        values = np.array([scores[name][identity] for name in names])
        assert (values[1:] <= values[:-1] * (1 + 1e-5) + 1e-30).all()


def test_blend_is_the_weighted_mean_of_probabilities():
    rng = np.random.default_rng(0)
    # Log-probabilities [3 runs, 20 clips, 4 identities]. The fifth one, of strangers, is left out.
    scores = np.log(rng.dirichlet(np.ones(5), (3, 20))).astype(np.float32)[:, :, 1:]
    scores[1, 4] = np.nan  # clip 4 of run 1

    def blended(scores, weights):
        return np.asarray(scores_lib.mean_logs(scores, np.array(weights, np.float32)))

    logs = blended(scores, (0.5, 2.0, 1.0))
    expected = np.average(np.exp(scores.astype(np.float64)), axis=0, weights=(0.5, 2.0, 1.0))
    np.testing.assert_allclose(np.exp(logs), expected, rtol=1e-5)
    # A clip that is NaN in a run stays NaN. If the run has the weight 0, its NaN does not count.
    assert np.isnan(logs[4]).all() and np.isfinite(np.delete(logs, 4, axis=0)).all()
    without_run_1 = blended(scores[[0, 2]], (1.0, 3.0))
    np.testing.assert_array_equal(blended(scores, (1.0, 0.0, 3.0)), without_run_1)


def test_blend_refuses_runs_with_other_identities_or_clips():
    models = [SimpleNamespace(name=name) for name in ("one", "two")]

    def check(*, clips=("a", "b"), identities=("1", "2"), logs=True):
        others = clips, identities, logs
        runs = [SimpleNamespace(clips=x, identities=y, logs=z)
                for x, y, z in ((("a", "b"), ("1", "2"), True), others)]  # fmt: skip
        blended: Any = SimpleNamespace(models=models, runs=runs)
        blend.Blend._check_last(blended, "test")

    check()
    refused(lambda: check(identities=("1", "3")), "one and two", "different lists of identities")
    refused(lambda: check(clips=("a", "b", "c")), "different clips in test, such as c\nblend")
    refused(lambda: check(logs=False), "two cannot be blended", "--config.eval.scores=log_softmax")


@pytest.mark.slow
def test_blend_command_writes_ranking_and_report(runs, load, official_dir, tmp_path, say):
    words = ("--mode=evaluate", f"--workdir={tmp_path}")
    out = say(*words, f"--runs={runs[0]},{runs[1]}", "--config.join.weights=(1,3)")
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert f"{results['map']:.4f} on val" in out and results["map_kind"] == "val"
    check_ranking(tmp_path / "ranking.txt", runs, load, weights=(1.0, 3.0))
    scored = say("score", official_dir / "val_gt.txt", tmp_path / "ranking.txt")
    assert results["map"] == float(scored.split()[-1])
    check_numbers(tmp_path, (tmp_path / "report.html").read_text())
    for facts, folder, weight in zip(results["runs"], runs, (1, 3), strict=True):
        of_run = json.loads((folder / "metrics.json").read_text())["map"]
        assert (facts["name"], facts["weight"]) == (str(folder), weight)
        assert facts["map"] == pytest.approx(of_run, abs=1e-12)
    # The same folder evaluates another split with the same runs and weights.
    say(*words, "--config.eval.split=test")
    check_ranking(tmp_path / "ranking_test.txt", runs, load, weights=(1.0, 3.0), split="test")
    assert json.loads((tmp_path / "metrics.json").read_text()) == results
    assert config_io.load_workdir(tmp_path).eval.split == "val"


@pytest.mark.slow
def test_blend_refuses_used_folders_and_wrong_runs_or_weights(runs, tmp_path, command):
    out, new = tmp_path / "out", tmp_path / "new"
    for folder, blended, weights, remedy in [
        (out, runs, "1,3", ""),  # makes a blend
        (runs[0], runs, "1,3", "use another folder"),
        (out, runs[::-1], "1,3", "use another folder"),  # `out` has the runs in another order
        (new, runs[:1], "1,3", "name two runs"),
        (new, (runs[0], out), "1,3", "is a blend of runs"),
        (new, (runs[0], "nowhere"), "1,3", "no run in"),  # next: 1e-60 is too small a weight
        *((new, runs, bad, "give 2 numbers") for bad in ("1,", "1,-1", "0,0", "inf,1", "1e-60,0")),
    ]:
        given = f"--runs={','.join(map(str, blended))}", f"--config.join.weights=({weights})"
        done = command("--mode=evaluate", f"--workdir={folder}", *given)
        assert done.refused(remedy) if remedy else done.code == 0


def test_blend_of_a_run_and_its_copy_has_the_probabilities_of_the_run(
    nearest_run, official_data, say, tmp_path
):
    runs, out = (nearest_run, shutil.copytree(nearest_run, tmp_path / "copy")), tmp_path / "out"
    say("--mode=evaluate", f"--workdir={out}", f"--runs={runs[0]},{runs[1]}")
    check_ranking(out / "ranking.txt", runs, lambda _: official_data, weights=(1.0, 1.0))
    scores = vidjax.restore(out).scores(official_data, split="test")
    expected = probabilities(nearest_run, lambda _: official_data, "test")
    np.testing.assert_allclose(np.exp(scores), [*expected.values()], rtol=1e-5)
