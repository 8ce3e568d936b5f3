"""Blended runs: equal to a loop over clip names, fitted out of fold, refused where they differ."""

import copy
import json
import shlex
import shutil

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


def probabilities(folder, load, split, *, softmax=False):
    """Returns clip -> [C] float64, and the split, of a run that is evaluated by itself."""
    words = [f"--config.eval.split={split}"]
    config = config_io.override(config_io.load_workdir(folder), words)
    if softmax or config.eval.scores == "logits":
        config.eval.scores = "log_softmax"
    mesh = devices.make_mesh(1)
    found = restore.find_run(config, folder)
    one = restore.make_model(config, folder, found, load(config), mesh)
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


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (("--config.join.greedy=true", "--config.join.split=val"), (1.0, 0.0)),
        (("--config.join.mean=logarithms", "--config.join.weights=(1,3)"), (1.0, 3.0)),
    ],
)
def test_a_run_and_its_copy_rank_as_it_does_alone(nearest_run, data, tmp_path, words, weights):
    runs = nearest_run, shutil.copytree(nearest_run, tmp_path / "copy")
    results = blend.blend_runs(joining(runs, *words), tmp_path, lambda _: data, num_devices=1)
    wanted, split = probabilities(nearest_run, lambda _: data, "val")
    check_ranking(tmp_path / "ranking.txt", wanted)
    assert results["map"] == pytest.approx(map_by_hand(wanted, split), abs=1e-9)
    assert config_io.load_workdir(tmp_path).join.weights == weights


@pytest.mark.parametrize("weights", [(), (3.0, 0.0)], ids=["equal", "one"])
def test_scores_are_weighted_means_by_clip_name(runs, load, tmp_path, weights):
    config = joining(runs, f"--config.join.weights={weights}")
    results = blend.blend_runs(config, tmp_path, load, num_devices=1)
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
    """By its own number of identities a clip; and by another where the command names one.

    Cosines are joined as probabilities.
    """
    one = "--config.num_epochs=1"
    own = train("few", "knn.py:iqiyi_vid", folders["faces"], one, "--config.eval.top_classes=3",
                "--config.eval.checkpoint=best")  # fmt: skip
    results = blend.blend_runs(joining((runs[1], own)), tmp_path, load, num_devices=1)
    wanted = joined_by_hand((runs[1], own), load, "val", (1.0, 1.0))
    assert (probabilities(own, load, "val")[0].popitem()[1] > 0).sum() <= 3
    check_ranking(tmp_path / "ranking.txt", wanted)
    assert [row["scored_with"] for row in results["runs"]] == [
        ["defaults"], ["top_classes=3", "checkpoint=best"]
    ]  # fmt: skip
    alone = json.loads((own / "metrics.json").read_text())
    assert results["runs"][1]["map"] == pytest.approx(alone["map"], abs=1e-12)
    assert "top_classes=3" in section((tmp_path / "report.html").read_text(), "summary")

    words = ("--mode=evaluate", f"--workdir={tmp_path}")
    assert main([*words, "--config.eval.top_classes=0"]) == 2
    assert f"'{own}' keeps its own, 3" in capsys.readouterr().err
    assert main([*words, "--config.eval.top_classes=2"]) == 0
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["scored_with"][0] for row in results["runs"]] == ["top_classes=2"] * 2


def test_every_score_equals_the_loop(runs, load):
    mesh = devices.make_mesh(1)
    models = []
    for folder, weight in zip(runs, (0.3, 0.9), strict=True):
        config = config_io.load_workdir(folder)
        found = restore.find_run(config, folder)
        one = restore.make_model(config, folder, found, load(config), mesh)
        models.append(one._replace(weight=weight))
    found = scoring.score(models, "val", mesh, block_size=32, each_member=False)
    wanted = joined_by_hand(runs, load, "val", (0.3, 0.9))
    clips = models[0].data.split("val").clips
    scores = np.exp(ranked_scores(found.top, len(clips)).astype(np.float64))
    np.testing.assert_allclose(scores, [wanted[clip] for clip in clips], rtol=2e-5, atol=1e-12)


def logarithms_by_hand(runs, load, split, weights):
    """The weighted mean of logarithms, of nets that know of nobody new: {clip: [C]}."""
    found = [probabilities(folder, load, split, softmax=True)[0] for folder in runs]
    shares = np.array(weights) / sum(weights)
    mean = {}
    for clip in found[0]:
        alone = [one[clip] for one in found]
        some = [(p, w) for p, w in zip(alone, shares, strict=True) if p.any()]
        total = sum(w for _, w in some)
        with np.errstate(divide="ignore"):
            logs = sum(w / total * np.log(p) for p, w in some)
        odds = np.exp(logs) if some else np.zeros_like(alone[0])
        mean[clip] = odds / max(odds.sum(), 1e-300)
    return mean


def test_means_of_logarithms_by_clip_name(runs, load, tmp_path):
    weights = (0.25, 0.75)
    words = ("--config.join.mean=logarithms", f"--config.join.weights={weights}")
    config = joining(runs, *words)
    results = blend.blend_runs(config, tmp_path, load, num_devices=1)
    wanted = logarithms_by_hand(runs, load, "val", weights)
    check_ranking(tmp_path / "ranking.txt", wanted)
    _, split = probabilities(runs[0], load, "val")
    assert results["map"] == pytest.approx(map_by_hand(wanted, split), abs=1e-9)
    assert results["map"] != pytest.approx(
        map_by_hand(joined_by_hand(runs, load, "val", weights), split), abs=1e-9
    )


def test_greedy_weights_are_not_fitted_on_other_clips_than_the_runs(runs, load, tmp_path):
    def relabelled(config):
        data = copy.copy(load(config))
        data.report = copy.deepcopy(data.report)
        data.report["splits"]["train"]["sha256"]["labels"] = "others"
        return data

    with pytest.raises(ValueError, match="other data: now train has other labels"):
        config = joining(runs, "--config.join.greedy=true")
        blend.blend_runs(config, tmp_path, relabelled, num_devices=1)
    assert not (tmp_path / "config.json").exists()
    blend.blend_runs(joining(runs), tmp_path, relabelled, num_devices=1)  # it reads val alone


def test_greedy_weights_come_from_clips_out_of_fold(runs, load, tmp_path, monkeypatch):
    monkeypatch.setattr(blend, "ROUNDS", 6)
    config = joining(runs, "--config.join.greedy=true")
    results = blend.blend_runs(config, tmp_path, load, num_devices=1)
    kept = config_io.load_workdir(tmp_path).join
    assert not kept.greedy and kept.weights == tuple(one["weight"] for one in results["runs"])

    # By hand: the best of all steps of a greedy choice, on train, each clip by its own folds.
    _, split = probabilities(runs[0], load, "train")
    found = [probabilities(folder, load, "train")[0] for folder in runs]

    def value(counts):
        sums = {clip: counts[0] * found[0][clip] + counts[1] * found[1][clip] for clip in found[0]}
        return map_by_hand(sums, split)

    counts, steps = np.zeros(2), []
    for _ in range(6):
        choices = [counts + np.eye(2)[i] for i in range(2)]
        counts = choices[int(np.argmax([value(choice) for choice in choices]))]
        steps.append((value(counts), counts))
    best = max(steps, key=lambda step: step[0])[1]
    np.testing.assert_allclose(kept.weights, best / best.sum())
    assert value(np.array(kept.weights)) >= max(value(one) for one in np.eye(2)) - 1e-9


def test_a_greedy_choice_repeats_runs_and_keeps_the_best_round():
    target = np.array([0.6, 0.4, 0.0])
    tried = []

    def value_of(counts):
        tried.append(counts)
        return -float(np.abs(counts / counts.sum() - target).sum())

    weights, value = blend.greedy_weights(value_of, 3, 7)
    np.testing.assert_allclose(weights, target)  # after 5 of the 7 rounds
    assert value == pytest.approx(0) and len(tried) == 3 * 7
    weights, _ = blend.greedy_weights(lambda counts: 1.0, 3, 4)
    assert weights.tolist() == [1, 0, 0]  # among equals the first run, of equal rounds the first


def test_weights_are_not_fitted_on_what_a_run_was_trained_on(runs, plain, load, tmp_path):
    config = joining((runs[0], plain), "--config.join.greedy=true")
    with pytest.raises(ValueError, match=r"join\.split=train: .*without folds"):
        blend.blend_runs(config, tmp_path, load, num_devices=1)
    on_test = joining(runs, "--config.join.greedy=true", "--config.join.split=test")
    with pytest.raises(ValueError, match=r"join\.split=test: .*no ground truth"):
        blend.blend_runs(on_test, tmp_path, load, num_devices=1)
    assert not (tmp_path / "config.json").exists()


def test_other_identities_or_clips_are_refused(
    runs, train, load, loaded, folders, tmp_path, monkeypatch
):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    clip_files.write_learnable(fewer, num_identities=10, num_clips={"train": 96, "val": 60})
    others = train("others", "knn.py:iqiyi_vid", fewer, "--config.num_epochs=1")
    with pytest.raises(ValueError, match="different lists of identities"):
        blend.blend_runs(joining((runs[0], others)), tmp_path / "out", load, num_devices=1)

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
        blend.blend_runs(
            joining(runs, "--config.eval.split=test"), tmp_path / "out", load, num_devices=1
        )
    assert "IQIYI_VID_TEST_" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config.join.weights=(1,)",), "want 2 numbers"),
        (("--config.join.weights=(1,-1)",), "want 2 numbers"),
        (("--config.join.weights=(0,0)",), "want 2 numbers"),
        (("--config.join.mean=logarithms", "--config.join.greedy=true"), "mean of probabilities"),
        (("--config.join.mean=logarithms", "--config.eval.top_classes=3"), "mean=probabilities"),
        (("--config.join.mean=logarithm",), "choose from probabilities, logarithms"),
    ],
)
def test_weights_that_do_not_fit(runs, load, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        blend.blend_runs(joining(runs, *words), tmp_path, load, num_devices=1)


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
        blend.blend_runs(config, tmp_path, load, num_devices=1)
        found.append((tmp_path / "ranking.txt").read_bytes())
    assert found[0] == found[1]


def test_the_report_is_of_the_runs_that_are_joined(runs, load, tmp_path, capsys):
    """Data, identities and settings are those of the runs; its command gives the same ranking."""
    config = joining(runs, "--config.join.greedy=True", "--config.join.split=train")
    out = tmp_path / "joined"
    out.mkdir()
    results = blend.blend_runs(config, out, load, num_devices=1)
    text = (out / "report.html").read_text()
    check_numbers(out, text)
    assert not Page(text).open
    summary = section(text, "summary")
    for row, folder in zip(results["runs"], runs, strict=True):
        trained = config_io.load_workdir(folder)
        assert row["modalities"] == list(trained.modalities)
        assert ", ".join(row["modalities"]) in summary
        assert row["data"]["digest"][:16] in text
        assert trained.model.name in section(text, "ensemble")
    assert "iqiyi_vid" in summary
    assert "synthetic" not in text
    assert ">unknown<" not in text
    assert "weights fitted on" in summary
    identities = json.loads((out / "identities.json").read_text())
    assert identities == json.loads((runs[0] / "identities.json").read_text())

    words = shlex.split(results["command"].replace(str(out), str(tmp_path / "again")))
    assert main(words[words.index("--mode=evaluate") :]) == 0, capsys.readouterr().err
    assert (tmp_path / "again" / "ranking.txt").read_bytes() == (out / "ranking.txt").read_bytes()
