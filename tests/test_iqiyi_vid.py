"""Conversion of official files: the cache, labels, and readers of stored clips."""

import itertools
import os
import shutil

import numpy as np
import pytest

from tests.conftest import run_here
from tests.helpers.clip_files import as_read, random_clip, write_pickle, write_ragged, write_truth
from tests.helpers.datasets import prepare
from vidjax.core.batch import BATCHED
from vidjax.data import iqiyi_vid
from vidjax.data.clips import Modality
from vidjax.data.dataset import Dataset, label_clips
from vidjax.data.labels import load_official_truth
from vidjax.data.packed_clips import StoredFile
from vidjax.data.untrusted import sandbox

RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory of official files of faces: 40 train, 21 val and 3 test clips."""
    counts = {"train": 40, "val": 21, "test": 3}
    lacks = [*itertools.product(("body", "audio"), counts)]
    folder = write_ragged(tmp_path_factory.mktemp("source"), counts, lacks)
    write_truth(folder, "train", {f"train_{i:03d}": str(i % 7 + 1) for i in range(40)})
    write_truth(folder, "val", {f"val_{i:03d}": str(i % 9 + 2) for i in range(15)})
    write_truth(folder, "test", {"test_000": "6", "test_001": "77"})
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        return prepare(source, tmp_path_factory.mktemp("cache"))


@pytest.mark.filterwarnings("ignore:test has 1 clip of identities")
def test_converted_files_are_not_read_again(converted, source, monkeypatch, say):
    monkeypatch.setattr(sandbox, "unpack", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(StoredFile, "check", lambda *_: pytest.fail("read again"))
    cache = converted.folder.parent.parent
    again = prepare(source, cache)
    assert again.folder == converted.folder and again.report == converted.report
    assert again.splits["val"].clips == converted.splits["val"].clips
    # The command does not, either. It prints the clips of each split.
    assert "train: " in say(source, f"--cache_dir={cache}", program=iqiyi_vid.main)


def test_cache_folder_depends_on_the_content_of_the_files(tmp_path, read_here):
    small, cache, clip = tmp_path / "small", tmp_path / "cache", random_clip(RNG, 1, 4)
    small.mkdir()
    path = write_pickle(small, "face", "train", {"s1": clip})
    os.utime(path, ns=(1, 1))
    first = prepare(small, cache).folder
    shutil.copytree(small, tmp_path / "other")
    assert prepare(tmp_path / "other", cache).folder == first  # the same content
    size = path.stat().st_size  # the content changes, but not the name, size and time of the file
    write_pickle(small, "face", "train", {"s1": clip._replace(features=clip.features / 2)})
    assert path.stat().st_size == size
    os.utime(path, ns=(1, 1))
    second = prepare(small, cache).folder
    assert second != first
    write_truth(small, "train", {"s1": "3"})  # a label is no reason to convert
    assert prepare(small, cache).folder == second


def test_labels_number_the_identities_of_train_and_val_in_sorted_order(source, converted):
    """Train has identities 1 to 7. Val has identities 2 to 10, and 6 of 21 clips without one."""
    # Identity 77 is only in test, so it has no class.
    truth = load_official_truth(source, converted.clips)
    with pytest.warns(UserWarning, match="test has 1 clip of identities that are not in"):
        identities, labels, report = label_clips(converted, truth)
    assert identities == tuple(str(i) for i in range(1, 11))
    val, facts = labels["val"], report["splits"]["val"]
    assert labels["train"].labels.tolist() == [i % 7 + 1 for i in range(40)]
    assert val.labels.tolist() == [i % 9 + 2 for i in range(15)] + [0] * 6
    assert val.labels.dtype == np.int32 and val.positives.tolist() == [0, 2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert (facts["labelled"], facts["distractors"], facts["labelled_clips"]) == (True, 6, 15)
    assert facts["clips_per_identity"]["2-2"] == 6  # identities with 2 clips
    assert labels["test"].labels.tolist() == [6, 0, 0]
    assert report["splits"]["test"]["unlisted_identities"] == 1


def test_splits_of_two_dtypes_are_stored_in_the_wider_dtype(tmp_path, read_here):
    clip = random_clip(RNG, 2, 4, "float32")
    write_pickle(tmp_path, "face", "train", {"t": random_clip(RNG, 2, 4, "float16")})
    write_pickle(tmp_path, "face", "val", {"v": clip})
    converted = prepare(tmp_path, tmp_path / "cache")
    assert converted.modalities["face"].dtype == "float32"
    ((_, frames),) = Dataset(converted, {}).packed("val", ("face",))
    np.testing.assert_array_equal(frames["face"].features, clip.features)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TFDS and protobuf
def test_tfds_loads_the_clips_that_were_written(tmp_path, monkeypatch):
    """Of 20 clips with faces, ten have other modalities, too."""
    import vidjax.data.tfds as builders

    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))
    source, tfds, clips = tmp_path / "official", builders.tfds, {}
    source.mkdir()
    kinds = {
        "double": Modality(3, "float64"), "face": Modality(6, "float16"),
        "single": Modality(70, "float32"), "whole": Modality(5, "int8"),
    }  # fmt: skip
    for name, kind in kinds.items():
        lengths = RNG.permutation([0, 1, 2, 300, *RNG.integers(0, 40, 16)])
        chosen = range(20) if name == "face" else range(0, 20, 2)
        clips[name] = {f"c{i:02d}": random_clip(RNG, lengths[i], *kind) for i in chosen}
        write_pickle(source, name, "train", dict(reversed(clips[name].items())))
    write_truth(source, "train", {"c00": "7", "c01": "9"})
    config = builders.Config(name="mine", modalities=(*kinds, "absent"), dtype="float64")
    download = tfds.download.DownloadConfig(manual_dir=str(source))
    examples = tfds.load(
        "iqiyi_vid", split="train", data_dir=tmp_path / "tfds",
        builder_kwargs={"config": config},
        download_and_prepare_kwargs={"download_config": download},
    )  # fmt: skip
    labels = {}
    for example in tfds.as_numpy(examples):
        clip, frames = example["clip"].decode(), example["frames"]
        labels[clip] = example["identity"].decode()
        assert not len(frames["absent"]["features"]) and not len(frames["absent"]["number"])
        for name, kind in kinds.items():
            written = as_read(name, clips[name].get(clip, random_clip(RNG, 0, *kind)))
            for field in BATCHED:
                np.testing.assert_array_equal(frames[name][field], getattr(written, field))
    assert labels == dict.fromkeys(clips["face"], "") | {"c00": "7", "c01": "9"}
