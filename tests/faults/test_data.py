"""Official files with wrong content: faults are counted in the report, or cause one error."""

import warnings

import numpy as np
import pytest

from tests.helpers import made_runs, python2, small_runs
from tests.helpers.batches import real_frames
from tests.helpers.clip_files import random_clip, write_pickle, write_truth
from tests.helpers.datasets import load_dataset
from tests.helpers.seen import refused as refused_by
from vidjax.data import iqiyi_vid

pytestmark = pytest.mark.slow
DIM = 4


def clips_of(split, count, dim=DIM):
    """Returns clips SPLIT000, SPLIT001, ... of 1, 2, 3, 1, 2, 3, ... frames."""
    rng = np.random.default_rng(count)
    return {f"{split}{i:03d}": random_clip(rng, 1 + i % 3, dim) for i in range(count)}


@pytest.fixture
def official(tmp_path):
    """Faces of 20 train and 10 val clips. Clips 0 and 1 lack labels; others show people 1 to 4."""
    folder = tmp_path / "official"
    folder.mkdir()
    for split, count in (("train", 20), ("val", 10)):
        clips = clips_of(split, count)
        write_pickle(folder, "face", split, clips)
        write_truth(folder, split, {name: str(1 + i % 4) for i, name in enumerate(clips) if i > 1})
    return folder


def load(folder, **options):
    return load_dataset("iqiyi_vid", directory=folder, **options)


def assert_adds_up(report):
    """Asserts that loaded + skipped == seen for frames, clips and labels."""
    for facts in report["splits"].values():
        for counts in facts["modalities"].values():
            for kind in ("frames", "clips"):
                skipped = sum(counts[f"{kind}_skipped"].values())
                assert counts[kind] + skipped == counts[f"{kind}_seen"]
            assert counts["clips"] + counts["clips_without"] == facts["clips"]
            assert counts["missing_rate"] == counts["clips_without"] / facts["clips"]
            for histogram in (counts["norm"], counts["quality"]):
                assert sum(histogram["counts"]) == counts["frames"]
        if facts["labelled"]:
            assert facts["labelled_clips"] + facts["distractors"] == facts["clips"]
            assert facts["labelled_clips"] + facts["unknown_clips"] == facts["ground_truth_clips"]


@pytest.fixture
def refused(say, cache_dir):
    """Converts a folder, which must be refused with some words."""

    def convert(folder, *words):
        error = say(folder, code=2, program=iqiyi_vid.main)
        assert all(word in error for word in words), error
        assert not list(cache_dir.rglob("*.partial"))

    return convert


def test_splits_with_equal_clips_or_other_widths_are_refused(official, refused):
    write_pickle(official, "face", "train", clips_of("train", 20) | clips_of("val", 7))
    refused(official, "7 clips are in two splits", "(train and val)", ", ...")
    path = write_pickle(official, "face", "val", clips_of("other", 10, dim=6))
    refused(official, "width 4 in", "face_train.pickle", "width 6 in", str(path))


def test_unlabelled_clips_are_distractors_and_unknown_clips_are_counted(tmp_path):
    clips = clips_of("val", 150)
    write_pickle(tmp_path, "face", "val", clips)
    labels = {name: "1" for i, name in enumerate(clips) if i % 3}
    write_truth(tmp_path, "val", labels | {"stranger": "1"})
    with pytest.warns(UserWarning, match="1 of 101 clips have no features, .* stranger"):
        data = load(tmp_path)
    split = data.split("val")
    np.testing.assert_array_equal(split.labels, [int(name in labels) for name in split.clips])
    assert split.positives.tolist() == [101]  # 100 labelled clips, and the stranger
    facts = data.report["splits"]["val"]
    assert facts["distractors"] == 50 and facts["unknown_clips"] == 1
    norms = [np.linalg.norm(x.features.astype(float), axis=1) for x in clips.values()]
    mean = facts["modalities"]["face"]["norm"]["mean"]
    assert mean == pytest.approx(np.concatenate(norms).mean(), rel=1e-3)
    assert_adds_up(data.report)
    # Features of a few clips are enough for a quick try.
    write_truth(tmp_path, "val", labels | dict.fromkeys(map(str, range(900)), "1"))
    with pytest.warns(UserWarning, match="900 of 1000 clips .*\nin the MAP, .* not found: remove"):
        load(tmp_path)


def test_clips_without_frames_rank_last_in_spite_of_bad_qualities(tmp_path):
    """Qualities are NaN, infinite, negative or 0. Of 6 silent clips, 2 have no face, 4 only NaN."""
    silent = [f"val{i:03d}" for i in range(0, 30, 5)]
    for split, count in (("train", 32), ("val", 30)):
        clips = clips_of(split, count)
        write_truth(tmp_path, split, {name: str(1 + i % 4) for i, name in enumerate(clips)})
        for i, clip in enumerate(clips.values()):
            clip.quality[:] = (np.nan, -np.inf, -5.0, 0.0)[i % 4]
        for name in clips.keys() & {*silent}:
            clips[name].features[:] = np.nan
        no_frame = random_clip(np.random.default_rng(0), 0, DIM)
        clips |= dict.fromkeys(clips.keys() & {*silent[:2]}, no_frame)
        write_pickle(tmp_path, "face", split, clips)
    with warnings.catch_warnings(action="ignore"):
        data = load(tmp_path)
    facts = data.report["splits"]["val"]
    counts = facts["modalities"]["face"]
    assert facts["clips_without_frames"] == counts["clips_without"] == len(silent)
    assert counts["frames_skipped"] == {"non_finite": 8}  # 2 + 1 + 3 + 2 frames
    assert counts["clips_skipped"] == {"empty": 2, "non_finite": 4}
    assert counts["values_replaced"]["non_finite_quality"] > 0
    assert_adds_up(data.report)
    words = ("--config.modalities=face", "--config.num_epochs=2", "--config.eval.report=False")
    config = small_runs.shrunk(*words, spec="configs/quality_fusion.py:iqiyi_vid,mlp1")
    assert np.isfinite(small_runs.run(config, tmp_path / "run", data)["map"])
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in logged and "Infinity" not in logged
    for ranked in made_runs.lists(tmp_path / "run" / "ranking.txt").values():
        assert sorted(ranked) == sorted(f"{clip}.mp4" for clip in data.split("val").clips)
        assert ranked[-6:] == [f"{clip}.mp4" for clip in silent]  # equal scores, sorted by name


def test_odd_clip_names_are_kept_and_never_become_paths(tmp_path):
    names = ("ü" * 300, "人物_①", "../../../etc/passwd", "/absolute", "..", "-rf", "a:b*c?", "$(x)")
    # The folders are deep, so a file ../../../etc/passwd would be found below `tmp_path`.
    folder, cache = (tmp_path / "deep" / "down" / name for name in ("official", "cache"))
    folder.mkdir(parents=True)
    content = {name.encode(): np.full(DIM, i, np.float32) for i, name in enumerate(names)}
    (folder / "audio_val.pickle").write_bytes(python2.dumps(content))
    data = load(folder, cache_dir=cache)
    assert (clips := data.split("val").clips) == tuple(sorted(names, key=str.encode))
    for n, frames in real_frames(data, "val", "audio"):
        assert frames.features.tolist() == [[names.index(clips[n])] * DIM]
    made = {path.name for path in tmp_path.rglob("*")}
    assert not made & {"passwd", "absolute", "-rf", *names[:2]}


def test_missing_labels_clips_or_files_are_each_one_error(official, refused, tmp_path):
    (official / "train_gt.txt").unlink()
    config, data = small_runs.shrunk("--config.modalities=face"), load(official)
    refused_by(lambda: small_runs.run(config, tmp_path / "run", data), "correct train_gt.txt")
    for split in ("train", "val"):
        write_pickle(official, "face", split, {})
    refused(official, "no clip has a frame")
    write_pickle(official, "face", "train", clips_of("train", 20))
    refused(official, "face_val.pickle: split 'val' has no clips")
    for path in official.glob("*.pickle"):
        path.unlink()
    refused(official, f"{official}' contains no feature pickles")
    refused(official / "gone", "gone' does not exist")
