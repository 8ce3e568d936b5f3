"""`predict.restore`: a run scores clips in memory exactly as `vidjax evaluate` does."""

import contextlib
import functools
import resource
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.helpers import clip_files, made_galleries, small_runs
from tests.helpers.cases import quick_first
from tests.helpers.seen import refused
from vidjax.data import sources
from vidjax.data.clips import Split
from vidjax.evaluation import predict, trained_runs
from vidjax.runs import checkpoint, config as config_lib, config_io
from vidjax.utils import files

pytestmark = pytest.mark.slow  # all of them train first
WIDTH = 24  # of the faces
SYSTEMS = {
    "knn": ("configs/knn.py:iqiyi_vid",),
    "ensemble": ("configs/quality_fusion.py:iqiyi_vid,folds",
                 "--config.data.train_splits=train,val", "--config.ensemble.views=2"),
    "cosine": ("configs/cosine.py:iqiyi_vid",),
    "fallback": ("configs/deepmef.py:iqiyi_vid,face,head",), "mma": ("configs/mma.py:iqiyi_vid",),
    "plda": ("configs/plda.py:iqiyi_vid,face,head,audio", *small_runs.CLOSED_FORM),
}  # fmt: skip


@pytest.fixture(scope="module")
def restored(trained):
    restore = functools.partial(predict.restore_run, num_devices=1)
    return functools.cache(lambda name: restore(trained(*SYSTEMS[name])))


@pytest.fixture(scope="module")
def clips():
    """The clips of the official files, in reverse order: split -> clip -> modality -> frames."""
    return {
        split: dict(reversed(clip_files.as_arrays(clips).items()))
        for split, clips, _ in clip_files.learnable_clips()
    }


def ranked(run, clips):
    lists = run.rank(clips).items()
    return [" ".join([who, *(f"{name}.mp4" for name, _ in matches)]) for who, matches in lists]


def test_restore_errors_name_the_cause(restored, data, tmp_path):
    folder = restored("plda").workdir
    refused(lambda: restored("knn").scores(data, split="dev"), "no split 'dev'")
    config = config_lib.default()
    config.join.runs = ("runs/a", "runs/b")
    (tmp_path / "config.json").write_text(config_io.to_json(config))
    refused(lambda: predict.restore_run(tmp_path), "is a blend of runs", "runs/a", "runs/b")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        predict.restore_run(tmp_path)
    # An absurd size is refused before anything is allocated for it.
    theirs = shutil.copytree(folder, tmp_path / "theirs")
    for step, manifest in checkpoint.manifests(theirs).items():
        changed = {**manifest, "num_identities": 2**31 - 1}
        files.write_manifest(theirs / "checkpoints" / str(step) / "manifest.json", changed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(checkpoint.CheckpointError, match="2,147,48"):  # 2**31 is 2,147,483,648
        predict.restore_run(theirs, num_devices=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KB: below 1 GiB


@pytest.mark.parametrize("name", quick_first(SYSTEMS, 2, mark=pytest.mark.nightly))
def test_predicted_scores_and_rankings_equal_evaluation(name, data, restored, clips):
    run, folder = restored(name), restored(name).workdir
    assert run.step == max(checkpoint.manifests(folder))
    wanted = small_runs.scores(small_runs.restored(folder, data))
    lines = (folder / "ranking.txt").read_text().splitlines()
    scores = run.scores(data)
    np.testing.assert_array_equal(scores, wanted.astype(np.float32), strict=True)
    assert ranked(run, data) == lines
    # The same clips in memory, in another order. Members of an ensemble score only dataset clips
    # that they were not trained on, but all clips in memory.
    order = [data.split("val").clips.index(clip) for clip in clips["val"]]
    if name != "ensemble":
        np.testing.assert_array_equal(run.scores(clips["val"]), scores[order])
        assert ranked(run, clips["val"]) == lines
    if name == "knn":
        assert predict.restore_run(folder, step="best", num_devices=1).step == run.step
        four_devices = predict.restore_run(folder, num_devices=4)
        np.testing.assert_array_equal(four_devices.scores(clips["val"]), scores[order])
        with jax.enable_x64(True):  # as in a notebook that needs float64 for other things
            wide = predict.restore_run(folder, num_devices=1).scores(clips["val"])
        np.testing.assert_allclose(wide, scores[order], rtol=1e-5)
    # Embeddings have the length 1, or 0 for a clip without frames.
    vectors = run.embed(clips["val"])
    has_frames = np.isfinite(scores[order]).any(axis=1)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), has_frames, atol=1e-5)
    np.testing.assert_array_equal(run.embed(data), vectors[np.argsort(order)])


def test_only_the_training_data_of_a_run_is_scored_out_of_fold(restored, data, clips, tmp_path):
    """Training clips are scored by members not trained on them. All members score other clips."""
    run = restored("ensemble")  # trained on folds of train and val
    load = functools.partial(sources.load, cache_dir=tmp_path)
    # The same training data from memory and from the official files. Both calls score val.
    np.testing.assert_array_equal(run.scores(load(clips), split="val"), run.scores(data))
    # Each name of val gets the frames of the next clip. `wanted` are scores by all members.
    names, values = zip(*sorted(clips["val"].items()), strict=True)
    others = dict(zip(names, values[1:] + values[:1], strict=True))
    wanted = run.scores({f"new {name}": clip for name, clip in others.items()})
    for given, split in (
        (others, None), (load({"val": others}), "val"), (load({"test": others}), "test"),
    ):  # fmt: skip
        with pytest.warns(
            UserWarning, match="have the same names as training clips, but count as other clips"
        ):
            np.testing.assert_array_equal(run.scores(given, split=split), wanted)


def test_clips_that_lack_a_modality_of_the_run_are_reported(restored, clips):
    """The run uses face, head and audio. It is normal that a few clips have no audio."""
    run, face = restored("plda"), {"face": np.ones((1, WIDTH), np.float32)}
    for method in (run.rank, run.scores, run.embed, functools.partial(run.identify, threshold=-1)):
        method(clips["val"])  # no warning, which would be an error
        with pytest.warns(
            UserWarning, match="of head, audio that most clips lack: of 60 clips, 0 % have head, 0"
        ):
            method(dict.fromkeys(clips["val"], face))


@pytest.mark.parametrize(("counts", "wanted"), [
    ({"face": 100, "audio": 11}, ""), ({"face": 100, "audio": 10}, "10 % have audio"),
    ({"face": 100, "head": 1, "audio": 0}, "1 % have head, 0 % have audio"),
    # One clip, or two clips, may lack a modality by chance.
    ({"face": 2, "audio": 0}, ""), ({"face": 3, "audio": 0}, "of 3 clips, 0 % have audio"),
    ({"face": 0, "audio": 0}, ""),  # another message reports that no clip has a frame
])  # fmt: skip
def test_a_modality_is_missing_if_hardly_any_clip_has_it(counts, wanted):
    num_clips = max(counts.values())
    lengths = {name: 5 * (np.arange(num_clips) < count) for name, count in counts.items()}
    split = Split("val", (), np.zeros(0), False, np.zeros(0), 0, lengths)
    with pytest.warns(UserWarning, match=wanted) if wanted else contextlib.nullcontext():
        trained_runs.warn_of_missing_modalities(split, counts)


def test_identify_uses_a_measured_threshold_only_if_it_holds_for_new_clips(restored, clips):
    """Among 99 distractors, a new stranger has the best score with a probability of 1 %."""
    run, five = restored("ensemble"), {f"new {n}": clips["val"][n] for n in [*clips["val"]][:5]}
    assert run.results["map_kind"] == "out_of_fold" and len(run.model.training_sets.members) > 1
    # Only a few members scored each clip of val. All members score a new clip.
    results = {**run.results, predict.THRESHOLD: -1.0, "num_distractors": 99}
    run = replace(run, results=results)
    assert run.threshold is None
    refused(lambda: run.identify(five), "too strict for new clips", "\ngive a threshold")
    # Logarithms of probabilities are at most 0.
    refused(lambda: run.identify(five, threshold=0.5), "probability p, give threshold=math.log")
    assert run.identify(five, threshold=-1.0).keys() == five.keys()
    # The threshold of a run that was trained without the clips of val is used.
    val = replace(run, results={**results, "map_kind": "val"})
    assert val.threshold == -1.0 and val.identify(five) == run.identify(five, threshold=-1.0)
    few = replace(val, results={**val.results, "num_distractors": 98})
    refused(lambda: few.identify(five), "98 clips of strangers are too few", "\ngive a threshold")
    assert few.threshold is None and few.identify(five, threshold=-1.0) == val.identify(five)
    # Without distractors, no score is too low, so every clip gets a name.
    assert all(replace(val, results={"num_distractors": 0}).identify(five).values())
    (three,) = run.identify(dict([*five.items()][:1]), k=3, threshold=float("-inf")).values()
    assert len(three) == 3 and three[0][1] >= three[1][1] >= three[2][1]
    refused(lambda: run.identify(five, k=0), "k=0: give 1 or more")


@pytest.mark.parametrize(("features", "message"), [
    (np.zeros((2, WIDTH - 1)), f"clip bad, face: .*width {WIDTH - 1}, .*width {WIDTH}"),
    (np.zeros((2, WIDTH), np.int64), "clip bad, face: .*int64"),
    ([[0.0] * WIDTH, [0.0]], "clip bad, face: .*rows have different lengths"),
    (None, "no clips"),
])  # fmt: skip
def test_restored_run_refuses_no_clips_or_clips_of_wrong_width_or_type(restored, features, message):
    run = restored("plda")
    for function in (run.scores, run.rank, run.embed):
        with pytest.raises(ValueError, match=message):
            function({} if features is None else {"bad": {"face": features}})


def test_scores_do_not_depend_on_the_number_of_clips_in_a_call(trained):
    folder = trained("configs/mma.py:iqiyi_vid", "--config.modalities=face")
    run = predict.restore_run(folder, num_devices=1)
    clips = made_galleries.random_clips(run, *(1 + i % 5 for i in range(37)))
    scores, vectors = run.scores(clips), run.embed(clips)
    assert scores.shape == (37, len(run.identities)) and np.isfinite(scores).all()
    for count in (1, 2, 15, 16, 17):  # blocks hold 16 clips
        last_clips = dict([*clips.items()][-count:])
        np.testing.assert_array_equal(run.scores(last_clips), scores[-count:])
        np.testing.assert_array_equal(run.embed(last_clips), vectors[-count:])
