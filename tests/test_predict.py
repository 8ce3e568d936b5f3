"""A run from Python gives the numbers of the command, to the bit, of clips that lie in memory."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import small_runs
from tests.helpers.cases import quick_first
from tests.test_arrays import official_arrays  # noqa: F401
from vidjax.data import sources
from vidjax.data.labels import load_ground_truth
from vidjax.evaluation import predict, scoring
from vidjax.runs import checkpoint, config_io
from vidjax.runs import config as config_lib
from vidjax.runs.checkpoint import CheckpointError

pytestmark = pytest.mark.slow  # all of them train first
SYSTEMS = {
    "cosine": ("configs/cosine.py:iqiyi_vid",),
    "knn": ("configs/knn.py:iqiyi_vid",),
    "ensemble": (
        "configs/quality_fusion.py:iqiyi_vid,folds",
        "--config.data.train_splits=train,val",
        "--config.ensemble.views=2",
    ),
    "dense": ("configs/quality_fusion.py:iqiyi_vid,voting",),
    "fallback": ("configs/deepmef.py:iqiyi_vid,face,head",),
    "mma": ("configs/mma.py:iqiyi_vid",),
    "plda": ("configs/plda.py:iqiyi_vid,face,head,audio", "--config.num_epochs=2"),
}


@pytest.fixture(scope="module")
def train(trained):
    return lambda name: trained(*SYSTEMS[name])


@pytest.fixture(scope="module")
def restored(train):
    return functools.cache(lambda name: predict.restore(train(name), num_devices=1))


@pytest.fixture(scope="module")
def clips(official_arrays):  # noqa: F811
    return {split: dict(reversed(some.items())) for split, some in official_arrays.items()}


@pytest.fixture(scope="module")
def new(clips):
    """Clips of val under other names."""
    return {f"new {name}": frames for name, frames in clips["val"].items()}


def first(clips, count):
    return dict(list(clips.items())[:count])


def ranked(run, clips):
    lists = run.rank(clips).items()
    return [" ".join([who, *(f"{name}.mp4" for name, _ in found)]) for who, found in lists]


def test_clips_without_a_frame_come_last(restored, clips):
    run = restored("knn")
    name, seen = next((n, c) for n, c in clips["val"].items() if len(c["face"]["features"]))
    few = {"empty": {"face": []}, f"{name}.mp4": {**seen, "smell": [1.0]}, "bare": {}}
    scores = run.scores(few)
    assert scores.dtype == np.float32 and scores.shape == (3, len(run.identities))
    assert np.isneginf(scores[[0, 2]]).all() and np.isfinite(scores[1]).all()
    assert not run.embed(few)[[0, 2]].any()
    for column, rows in enumerate(run.rank(few).values()):
        assert [clip for clip, _ in rows] == [f"{name}.mp4", "bare", "empty"]
        assert rows[0][1] == scores[1, column]
    nan = {"a": {"face": np.full((2, 24), np.nan, np.float16)}}
    with pytest.warns(UserWarning, match="2 of 2 frames"):
        assert np.isneginf(run.scores(nan)).all()


def test_what_cannot_be_restored_says_so(train, restored, data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no split 'dev'"):
        restored("knn").scores(data, split="dev")
    with pytest.raises(ValueError, match="no run in"):
        predict.restore(tmp_path)
    config = config_lib.default()
    config.join.runs = ("runs/a", "runs/b")
    (tmp_path / "config.json").write_text(config_io.to_json(config))
    with pytest.raises(ValueError, match="joins other runs"):
        predict.restore(tmp_path)
    best = predict.restore(train("knn"), step="best", num_devices=1)
    monkeypatch.chdir(train("knn").parent)
    here = predict.restore(train("knn").name, num_devices=1)
    assert here.workdir == train("knn") and here.step == best.step == best.manifest["step"]
    (tmp_path / "config.json").write_text((train("knn") / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no checkpoint"):
        predict.restore(tmp_path)


@pytest.mark.parametrize("name", quick_first(SYSTEMS, 3, mark=pytest.mark.nightly))
def test_scores_are_those_of_evaluation(name, data, train, restored, clips):
    folder, run = train(name), restored(name)
    wanted = small_runs.scores([small_runs.restored(folder, data)])
    assert run.step == max(checkpoint.manifests(folder))
    scores = run.scores(data)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, wanted.astype(np.float32))
    order = [data.split("val").clips.index(clip) for clip in clips["val"]]
    lines = (folder / "ranking.txt").read_text().splitlines()
    assert ranked(run, data) == lines
    in_memory = scores[order]
    if name != "ensemble":  # whose members score the clips that they were not trained on
        np.testing.assert_array_equal(run.scores(clips["val"]), in_memory)
        assert ranked(run, clips["val"]) == lines
    if name == "knn":
        many = predict.restore(folder, num_devices=4)
        np.testing.assert_array_equal(many.scores(clips["val"]), in_memory)

    vectors = run.embed(clips["val"])
    seen = np.isfinite(in_memory).any(axis=1)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), seen, atol=1e-5)
    np.testing.assert_array_equal(run.embed(data), vectors[np.argsort(order)])
    dims = {"mma": (3 + 1 + 1) * 16, "cosine": 3 * 16, "dense": 8, "knn": 24, "ensemble": 3 * 2 * 8}
    assert vectors.shape[1] == dims.get(name, vectors.shape[1])


def test_only_clips_of_the_runs_own_data_are_scored_out_of_fold(restored, data, clips, tmp_path):
    """Another clip may have the name of a training clip."""
    run = restored("ensemble")

    def as_data(**splits):
        return sources.load(splits, cache_dir=tmp_path)

    np.testing.assert_array_equal(run.scores(as_data(**clips), split="val"), run.scores(data))
    names, values = zip(*sorted(clips["val"].items()), strict=True)
    others = dict(zip(names, values[1:] + values[:1], strict=True))
    wanted = run.scores({f"new {name}": clip for name, clip in others.items()})
    for given, split in (
        (others, None), (as_data(val=others), "val"), (as_data(test=others), "test"),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match="names of training clips, but .* all members"):
            np.testing.assert_array_equal(run.scores(given, split=split), wanted)


RANK = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "pyarrow"): sys.modules[name] = None
import numpy as np
from vidjax.evaluation import predict
rng, run = np.random.default_rng(0), predict.restore(sys.argv[1])
clips = {f"c{n}": {"face": rng.normal(size=(2, 24)).astype("float16")} for n in range(9)}
np.savez(sys.argv[2], scores=run.scores(clips), vectors=run.embed(clips))
"""


@pytest.mark.optimized
def test_arrays_are_ranked_where_there_is_no_tensorflow(train, tmp_path, python):
    python(RANK, train("knn"), tmp_path / "found.npz")
    rng, run = np.random.default_rng(0), predict.restore(train("knn"), num_devices=1)
    clips = {f"c{n}": {"face": rng.normal(size=(2, 24)).astype("float16")} for n in range(9)}
    with np.load(tmp_path / "found.npz") as answers:
        np.testing.assert_array_equal(answers["scores"], run.scores(clips))
        np.testing.assert_allclose(answers["vectors"], run.embed(clips), atol=1e-6)


def test_arrays_train_to_the_same_weights(official_dir, train, clips, tmp_path):
    labels = [load_ground_truth(official_dir / f"{split}_gt.txt") for split in ("train", "val")]
    own = sources.load(clips, labels[0] | labels[1], cache_dir=tmp_path / "cache")
    config = small_runs.shrunk("--config.num_epochs=1", spec="configs/cosine.py:iqiyi_vid")
    small_runs.run(config, tmp_path / "run", own)
    small_runs.assert_same_run(tmp_path / "run", train("cosine"))


@pytest.mark.parametrize("name", ["cosine", "ensemble", "knn"])
def test_few_clips_score_as_many(name, restored, new):
    """Small blocks round in another order; among each other they agree to the bit."""
    run = restored(name)
    wanted = run.scores(new)
    if run.config.eval.scores != "logits":
        with pytest.raises(ValueError, match=r"\nfor a probability p give threshold=math\.log"):
            run.identify(new, threshold=0.5)
    each = np.concatenate([run.scores(dict([item])) for item in first(new, 12).items()])
    np.testing.assert_allclose(each, wanted[:12], rtol=1e-4, atol=1e-4)
    four = first(new, predict.SMALL_REQUEST)
    np.testing.assert_array_equal(run.scores(four), each[: len(four)])
    for column, (identity, rows) in enumerate(run.rank(four).items()):
        assert identity == run.identities[column] and len(rows) == len(four)
        by_name = dict(zip(four, run.scores(four)[:, column].tolist(), strict=True))
        assert rows == sorted(by_name.items(), key=lambda pair: (-pair[1], pair[0]))


def test_a_threshold_of_scores_out_of_fold_is_not_one_of_new_clips(restored, new):
    run, some = restored("ensemble"), first(new, 5)
    assert run.results["map_kind"] == "out_of_fold" and len(run.training_sets.members) > 1
    run = run._replace(results={**run.results, predict.THRESHOLD: -1.0, "num_distractors": 99})
    assert run.threshold is None
    with pytest.raises(ValueError, match=r"too strict for new clips.*\ngive a threshold"):
        run.identify(some)
    assert run.identify(some, threshold=-1.0).keys() == some.keys()
    val = run._replace(results={**run.results, "map_kind": "val"})
    assert val.threshold == -1.0 and val.identify(some) == run.identify(some, threshold=-1.0)


def test_few_distractors_set_no_threshold(restored, new):
    """Three distractors would let a quarter of all strangers pass at a rate of 1 %."""
    run, some = restored("cosine"), first(new, 3)
    for count, known in ((1, False), (98, False), (99, True)):
        results = {**run.results, predict.THRESHOLD: -1.0, "num_distractors": count}
        run = run._replace(results=results)
        assert run.threshold == (-1.0 if known else None)
    few = run._replace(results={**run.results, "num_distractors": 98})
    with pytest.raises(ValueError, match=r"98 distractors cannot show .*\ngive a threshold"):
        few.identify(some)
    assert few.identify(some, threshold=-1.0) == run.identify(some)
    assert all(run._replace(results={"num_distractors": 0}).identify(some).values())


def test_blocks_beyond_the_memory_are_refused_before_they_are_made(train, clips, monkeypatch):
    run = predict.restore(train("knn"), num_devices=1)
    monkeypatch.setattr(scoring, "free_bytes", lambda mesh: 1e6)
    run.config.eval.block_size = 2**20
    with pytest.raises(ValueError, match=r"block_size=1048576: .* GB .*\n--config\.eval\.block_s"):
        run.rank(clips["val"])


def test_one_clip_after_another_compiles_nothing(restored, clips, caplog):
    run = restored("cosine")
    few = [dict([item]) for item in first(clips["val"], 6).items()]
    run = run._replace(results={**run.results, "num_distractors": 0})
    for function in (run.scores, run.rank, run.identify):
        before = [function(one) for one in few]
        caplog.clear()
        with jax.log_compiles():
            again = [function(one) for one in few]
        assert not [line for line in caplog.messages if "ompiling" in line], function
        np.testing.assert_equal(again, before)


def test_a_modality_that_the_run_does_not_read_gets_a_warning_where_one_is_missing(restored, clips):
    run = restored("cosine")
    assert set(run.modalities) == {"face", "head", "audio"}
    face = next(one["face"] for one in clips["val"].values() if len(one["face"]["features"]))
    with pytest.warns(UserWarning, match="no clip has .*audio.*aduio, which the run.*mean 'audio'"):
        run.scores({"a": {"face": face, "head": [], "aduio": np.ones((1, 3))}})
    with pytest.raises(ValueError, match="leave it out"):
        run.scores({"a": {"face": face}}, split="val")
