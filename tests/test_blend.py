"""Blended runs: equal to a loop over clip names, refused where they differ."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import clip_files
from tests.helpers.datasets import load_dataset
from tests.helpers.pages import Page, check_numbers, section
from tests.helpers.small_runs import ranked_scores, run, shrunk
from vidjax import config as config_lib
from vidjax import config_io, devices
from vidjax.commands import blend
from vidjax.evaluation import restore, scoring
from vidjax.main import main
from vidjax.run.folder import RunFolder

TRAINED = [pytest.param("trained", marks=pytest.mark.slow)]  # several trainings
FOLDS = "--config.ensemble.folds=2"
SHORT = ("--config.num_epochs=3", "--config.eval.block_size=32", "--config.eval.members=false")


@pytest.fixture(scope="module")
def folders(official_dir, tmp_path_factory):
    """The official files in two folders: faces in one, heads and voices in the other."""
    root = tmp_path_factory.mktemp("apart")
    for name, wanted in {"faces": ("face",), "others": ("head", "audio")}.items():
        (root / name).mkdir()
        for path in official_dir.iterdir():
            if path.suffix == ".txt" or path.name.split("_")[0] in wanted:
                shutil.copy(path, root / name)
    return {name: root / name for name in ("faces", "others")}


@pytest.fixture(scope="module")
def loaded():
    """Datasets that were loaded already, by folder."""
    return {}


@pytest.fixture(scope="module")
def load(loaded, cache_dir):
    """Configuration -> dataset, each read once."""

    def load(config):
        key = config.data.dir
        if key not in loaded:
            loaded[key] = load_dataset("iqiyi_vid", directory=key, cache_dir=str(cache_dir))
        return loaded[key]

    return load


@pytest.fixture(scope="module")
def train(load, tmp_path_factory):
    """(name, experiment, folder of data, overrides) -> the folder of a trained run."""

    def train(name, spec, data_dir, *overrides):
        words = (*SHORT, f"--config.data.dir={data_dir}", *overrides)
        config = shrunk(*words, spec=f"configs/{spec}")
        folder = tmp_path_factory.mktemp("runs") / name
        run(config, folder, load(config))
        return folder

    return train


@pytest.fixture(scope="module", params=TRAINED)
def runs(train, folders):
    """Two runs with folds, of other nets on other modalities in other folders."""
    dense = train("dense", "quality_fusion.py:iqiyi_vid", folders["faces"], FOLDS)
    others = "--config.modalities=head,audio"
    mma = train(
        "mma", "mma.py:iqiyi_vid", folders["others"], FOLDS, others, "--config.model.netvlad=()"
    )
    return (dense, mma)


@pytest.fixture(scope="module")
def plain(train, folders):
    """A run without folds, which ranks by cosines."""
    return train("plain", "knn.py:iqiyi_vid", folders["faces"], "--config.num_epochs=1")


def joining(runs, *overrides):
    config = config_lib.default()
    config.join.runs = tuple(map(str, runs))
    return config_io.override(config, ["--config.eval.block_size=32", *overrides])


def probabilities(folder, load, split):
    """Returns clip -> [C] float64, and the split, of a run that is evaluated by itself."""
    words = [f"--config.eval.split={split}"]
    config = config_io.override(config_io.load_workdir(folder), words)
    if config.eval.scores == "logits":
        config.eval.scores = "log_softmax"
    mesh = devices.make_mesh(1)
    found = restore.find_run(config, RunFolder(folder))
    one = restore.make_model(config, found, load(config), mesh)
    found = scoring.score([one], split, mesh, block_size=32, each_member=False)
    clips = one.data.split(split).clips
    logs = ranked_scores(found.top, len(clips)).astype(np.float64)
    return dict(zip(clips, np.exp(logs), strict=True)), one.data.split(split)


def joined_by_hand(runs, load, split, weights):
    """The weighted mean of probabilities, clip name by clip name: {clip: [C]}."""
    found = [probabilities(folder, load, split)[0] for folder in runs]
    mean = {}
    for clip in found[0]:
        mean[clip] = np.zeros_like(found[0][clip])
        for of_run, weight in zip(found, weights, strict=True):
            mean[clip] += weight / sum(weights) * of_run[clip]
    return mean


def map_by_hand(scores, split):
    """MAP of {clip: [C]}, ties by name, one identity after the other."""
    precisions = []
    labels = dict(zip(split.clips, split.labels, strict=True))
    for identity in range(1, len(split.positives) + 1):
        order = sorted(scores, key=lambda clip: (-scores[clip][identity - 1], clip))[:100]
        hits, total = 0, 0.0
        for place, clip in enumerate(order, start=1):
            if labels[clip] == identity:
                hits += 1
                total += hits / place
        if split.positives[identity - 1]:
            precisions.append(total / split.positives[identity - 1])
    return np.mean(precisions)


def check_ranking(path, scores):
    """Asserts that a ranking file has all clips, and none before one that scores higher."""
    for identity, line in enumerate(path.read_text().splitlines()):
        names = [name.removesuffix(".mp4") for name in line.split()[1:]]
        assert sorted(names) == sorted(scores)
        values = np.array([scores[name][identity] for name in names])
        assert (values[1:] <= values[:-1] * (1 + 1e-5) + 1e-30).all()


def test_a_run_and_its_copy_rank_as_it_does_alone(nearest_run, data, tmp_path):
    """Cosines are joined as probabilities."""
    runs = nearest_run, shutil.copytree(nearest_run, tmp_path / "copy")
    config = joining(runs, "--config.join.weights=(1,3)")
    results = blend.blend_runs(config, RunFolder(tmp_path), lambda _: data, num_devices=1)
    wanted, split = probabilities(nearest_run, lambda _: data, "val")
    check_ranking(tmp_path / "ranking.txt", wanted)
    assert results["map"] == pytest.approx(map_by_hand(wanted, split), abs=1e-9)
    assert config_io.load_workdir(tmp_path).join.weights == (1.0, 3.0)


def test_a_mean_of_probabilities_by_hand():
    rng = np.random.default_rng(0)
    scores = np.log(rng.dirichlet(np.ones(5), (3, 20))).astype(np.float32)[:, :, 1:]
    scores[1, 4] = np.nan

    def joined(numbers, weights):
        return np.asarray(scoring.blend([jnp.asarray(scores[n]) for n in numbers], weights))

    found = joined((0, 1, 2), (0.5, 2.0, 1.0))
    wanted = np.average(np.exp(scores.astype(np.float64)), axis=0, weights=(0.5, 2.0, 1.0))
    np.testing.assert_allclose(np.exp(found), wanted, rtol=1e-5)  # NaN of a run is shown
    assert np.isnan(found[4]).all() and np.isfinite(np.delete(found, 4, axis=0)).all()
    np.testing.assert_array_equal(joined((0, 1, 2), (1.0, 0.0, 3.0)), joined((0, 2), (1.0, 3.0)))


@pytest.mark.parametrize("weights", [(), (3.0, 0.0)], ids=["equal", "one"])
def test_scores_are_weighted_means_by_clip_name(runs, load, tmp_path, weights):
    config = joining(runs, f"--config.join.weights={weights}")
    results = blend.blend_runs(config, RunFolder(tmp_path), load, num_devices=1)
    weights = weights or (1.0, 1.0)
    wanted = joined_by_hand(runs, load, "val", weights)
    check_ranking(tmp_path / "ranking.txt", wanted)
    _, split = probabilities(runs[0], load, "val")
    assert results["map"] == pytest.approx(map_by_hand(wanted, split), abs=1e-9)
    assert results["map_kind"] == "val"
    for facts, folder, weight in zip(results["runs"], runs, weights, strict=True):
        assert (facts["name"], facts["weight"]) == (str(folder), weight)
        alone = json.loads((folder / "metrics.json").read_text())
        assert facts["map"] == pytest.approx(alone["map"], abs=1e-12)
    assert config_io.load_workdir(tmp_path).join.weights == weights


def test_each_run_is_scored_in_its_own_way(runs, train, load, folders, tmp_path, capsys):
    words = ("--config.num_epochs=1", "--config.eval.top_classes=3",
             "--config.eval.temperature=2")  # fmt: skip
    own = train("few", "knn.py:iqiyi_vid", folders["faces"], *words)
    results = blend.blend_runs(joining((runs[1], own)), RunFolder(tmp_path), load, num_devices=1)
    assert (probabilities(own, load, "val")[0].popitem()[1] > 0).sum() <= 3
    check_ranking(tmp_path / "ranking.txt", joined_by_hand((runs[1], own), load, "val", (1.0, 1.0)))
    alone = json.loads((own / "metrics.json").read_text())
    assert results["runs"][1]["map"] == pytest.approx(alone["map"], abs=1e-12)

    words = ("--mode=evaluate", f"--workdir={tmp_path}", "--config.eval.temperature=3")
    assert main(words) == 2
    assert "--config.join.weights" in capsys.readouterr().err


def test_every_score_equals_the_loop(runs, load):
    mesh = devices.make_mesh(1)
    models = []
    for folder, weight in zip(runs, (0.3, 0.9), strict=True):
        config = config_io.load_workdir(folder)
        found = restore.find_run(config, RunFolder(folder))
        one = restore.make_model(config, found, load(config), mesh)
        models.append(one._replace(weight=weight))
    found = scoring.score(models, "val", mesh, block_size=32, each_member=False)
    wanted = joined_by_hand(runs, load, "val", (0.3, 0.9))
    clips = models[0].data.split("val").clips
    scores = np.exp(ranked_scores(found.top, len(clips)).astype(np.float64))
    np.testing.assert_allclose(scores, [wanted[clip] for clip in clips], rtol=2e-5, atol=1e-12)


def test_other_identities_or_clips_are_refused(
    runs, train, load, loaded, folders, tmp_path, monkeypatch
):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    clip_files.write_learnable(fewer, num_identities=10, num_clips={"train": 96, "val": 60})
    others = train("others", "knn.py:iqiyi_vid", fewer, "--config.num_epochs=1")
    with pytest.raises(ValueError, match="different lists of identities"):
        blend.blend_runs(
            joining((runs[0], others)), RunFolder(tmp_path / "out"), load, num_devices=1
        )

    # The folder of one run gains a clip after training.
    moved = tmp_path / "moved"
    shutil.copytree(folders["others"], moved)
    rng = np.random.default_rng(0)
    for name in ("head", "audio"):
        clip = clip_files.random_clip(rng, 3, clip_files.WIDTHS[name])
        clip_files.write_pickle(moved, name, "test", {"IQIYI_VID_TEST_9999999": clip})
    config = config_io.load_workdir(runs[1])
    config.data.dir = str(moved)
    monkeypatch.setitem(loaded, str(folders["others"]), load(config))
    with pytest.raises(ValueError, match="have different clips in test") as caught:
        config = joining(runs, "--config.eval.split=test")
        blend.blend_runs(config, RunFolder(tmp_path / "out"), load, num_devices=1)
    assert "IQIYI_VID_TEST_" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config.join.weights=(1,)",), "want 2 numbers"),
        (("--config.join.weights=(1,-1)",), "want 2 numbers"),
        (("--config.join.weights=(0,0)",), "want 2 numbers"),
    ],
)
def test_weights_that_do_not_fit(runs, load, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        blend.blend_runs(joining(runs, *words), RunFolder(tmp_path), load, num_devices=1)


def test_the_command_line(runs, load, tmp_path, capsys):
    """Join on val with weights, come back for test with them; folders that cannot be joined."""
    out = tmp_path / "both"
    words = ("--mode=evaluate", f"--workdir={out}")
    given = f"--runs={runs[0]},{runs[1]}"
    assert main([*words, given, "--config.join.weights=(1,3)"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    results = json.loads((out / "metrics.json").read_text())
    assert f"{results['map']:.4f} on val" in said
    assert [one["weight"] for one in results["runs"]] == [1, 3]

    assert main([*words, "--config.eval.split=test"]) == 0, capsys.readouterr().err
    wanted = joined_by_hand(runs, load, "test", (1.0, 3.0))
    check_ranking(out / "ranking_test.txt", wanted)
    assert "map" not in json.loads((out / "metrics_test.json").read_text())
    assert json.loads((out / "metrics.json").read_text()) == results
    assert config_io.load_workdir(out).eval.split == "val"

    capsys.readouterr()
    for bad, message in [
        ((f"--workdir={runs[0]}", given), "use another folder"),
        ((f"--workdir={out}", f"--runs={runs[1]},{runs[0]}"), "use another folder"),
        ((f"--workdir={tmp_path / 'x'}", f"--runs={runs[0]}"), "name two runs"),
        ((f"--workdir={tmp_path / 'y'}", f"--runs={runs[0]},{out}"), "is itself a joined run"),
        ((f"--workdir={tmp_path / 'z'}", f"--runs={runs[0]},nowhere"), "no run in"),
    ]:
        assert main(["--mode=evaluate", *bad]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) <= 3


@pytest.mark.filterwarnings("ignore:.*other modalities lie beside")
def test_one_folder_of_data_for_all_runs(runs, load, official_dir, tmp_path):
    """Where config.data.dir is set it stands for that of every run, and scores do not change."""
    found = []
    for words in ((), (f"--config.data.dir={official_dir}",)):
        config = config_io.override(joining(runs), words)
        blend.blend_runs(config, RunFolder(tmp_path), load, num_devices=1)
        found.append((tmp_path / "ranking.txt").read_bytes())
    assert found[0] == found[1]


def test_the_report_lists_the_runs_and_the_command(runs, load, tmp_path):
    config = joining(runs, "--config.join.weights=(1,3)")
    results = blend.blend_runs(
        config, RunFolder(tmp_path), load, num_devices=1, command="vidjax evaluate"
    )
    text = (tmp_path / "report.html").read_text()
    check_numbers(tmp_path, text)
    assert not Page(text).open
    for row in results["runs"]:
        named = f"{row['name']} (weight {row['weight']})"
        assert named in re.sub("<[^>]+>", "", section(text, "summary"))
    assert "2 runs joined on iqiyi_vid" in text and "synthetic" not in text
    assert "<span>vidjax</span>" in section(text, "summary")
    identities = json.loads((tmp_path / "identities.json").read_text())
    assert identities == json.loads((runs[0] / "identities.json").read_text())
