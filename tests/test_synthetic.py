"""The files of the synthetic set: layout, statistics, the effect of each option, and the cache."""

import functools
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, execute
from tests.helpers.clip_files import random_clip, write_pickle, write_truth
from tests.helpers.datasets import load_dataset
from vidjax.data import synthetic
from vidjax.data.labels import load_ground_truth
from vidjax.data.synthetic import SyntheticOptions

SPLITS, MODALITIES = ("train", "val", "test"), ("face", "head", "body", "audio", "scene")
TINY = synthetic.Size(30, 8.0, dict.fromkeys(MODALITIES, 64), synthetic.SIZES["small"].spread)


def file_name(modality, split):
    """Returns the official name of a pickle."""
    v2 = "_v2" if modality == "face" and split != "test" else ""
    return f"{modality}_{split}{v2}.pickle"


def clips_of(folder, modality, split):
    return pickle.loads((folder / file_name(modality, split)).read_bytes())


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Writes a set with some options; returns its folder. `again` writes the same set again."""

    @functools.cache
    def write(seed=3, again=False, identities=30, **options):
        folder = tmp_path_factory.mktemp("set") / "made"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(synthetic.SIZES, "tiny", TINY._replace(identities=identities))
            synthetic.write(folder, size="tiny", seed=seed, options=SyntheticOptions(**options))
        return folder

    return write


def changed_files(left, other):
    """Returns the names of the files that differ between two sets."""
    return {x.name for x in left.iterdir() if x.read_bytes() != (other / x.name).read_bytes()}


@pytest.mark.slow
def test_synthetic_set_has_the_specified_statistics(make):
    folder, pairs = make(), itertools.product(MODALITIES, SPLITS)
    clips: dict[tuple[str, str], Any] = {pair: clips_of(folder, *pair) for pair in pairs}
    labels = {split: load_ground_truth(folder / f"{split}_gt.txt") for split in SPLITS}
    # Every split shows all 30 people. 37.5 % of val and test show strangers, without labels.
    names = [name for split in SPLITS for name in clips["scene", split]]
    assert len({*names}) == len(names)
    for split, share in {"train": 1, "val": 0.625, "test": 0.625}.items():
        assert {*labels[split].values()} == {*map(str, range(1, 31))}
        assert labels[split].keys() <= clips["scene", split].keys()
        assert len(labels[split]) / len(clips["scene", split]) == pytest.approx(share, abs=0.01)
    # Some clips lack a modality, at the rates that the docstring of `missing_rate` gives. About
    # 2 % of the clips have no frame with a face.
    for modality, rate in {"face": 0.0, "head": 0.02, "body": 0.05, "audio": 0.15}.items():
        absent = 1 - sum(len(clips[modality, split]) for split in SPLITS) / len(names)
        assert absent == pytest.approx(rate, abs=0.03 if rate else 0)
    lengths = np.array([len(v) for s in SPLITS for v in clips["face", s].values()])
    assert 0 < (lengths == 0).mean() < 0.04
    assert lengths[lengths > 0].mean() == pytest.approx(TINY.mean_frames, rel=0.12)


def test_equal_seeds_write_equal_bytes(make):
    make = functools.partial(make, identities=5)
    assert not changed_files(make(), make(again=True))
    assert len(changed_files(make(), make(seed=4))) == 18  # 15 pickles, 3 lists of labels


@pytest.mark.slow
def test_options_change_only_their_files_and_as_many_clips_as_asked(make):
    def names(modalities, splits=SPLITS):
        return {file_name(*pair) for pair in itertools.product(modalities, splits)}

    plain, sparse, noisy = make(), make(missing_rate=0.3), make(label_noise=0.2)
    strange, false = make(train_distractors=0.375), make(false_modality=1.0)
    assert changed_files(plain, sparse) == names(MODALITIES[:-1])  # scenes are never missing
    for modality in ("face", "head", "audio"):
        before, after = (clips_of(x, modality, "val") for x in (plain, sparse))
        kept = [clip for clip, frames in after.items() if len(frames)]
        some = [clip for clip, frames in before.items() if len(frames)]
        assert len(kept) / len(some) == pytest.approx(1 - 0.3, abs=0.09)
        for clip in kept:  # the frames have not changed
            assert pickle.dumps(after[clip]) == pickle.dumps(before[clip])
    before, after, labelled = (
        load_ground_truth(x / "train_gt.txt") for x in (plain, noisy, strange)
    )
    assert changed_files(plain, noisy) == {"train_gt.txt"}
    assert before.keys() == after.keys() and set(after.values()) <= set(before.values())
    assert 0.1 < np.mean([before[name] != after[name] for name in before]) < 0.3
    assert changed_files(plain, strange) == names(MODALITIES, ["train"]) | {"train_gt.txt"}
    shown = clips_of(strange, "scene", "train").keys()
    assert len(shown - labelled.keys()) / len(shown) == pytest.approx(0.375, abs=0.01)
    # Either the face or the voice of a clip is replaced, with equal probability.
    assert changed_files(plain, false) == names(["face", "audio"])
    old, new = ([clips_of(x, kind, "val") for kind in ("face", "audio")] for x in (plain, false))
    kept = []  # for each clip with both, whether the face and the voice are kept
    for name in [name for name, frames in old[0].items() if frames and name in old[1]]:
        pairs = zip(old, new, strict=True)
        kept.append([pickle.dumps(a[name]) == pickle.dumps(b[name]) for a, b in pairs])
    assert 0.4 < np.mean(kept, axis=0)[0] < 0.62 and all(map(any, kept))


def test_synthetic_data_are_written_once_per_setting(tmp_path, monkeypatch, read_here):
    written = []

    def write(out_dir, *, size, seed, options):
        written.append((size, seed, options.blur))
        write_pickle(out_dir, "face", "train", {"a": random_clip(np.random.default_rng(), 2, 4)})
        write_truth(out_dir, "train", {"a": "1"})

    monkeypatch.setattr(synthetic, "write", write)
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path))
    for seed, blur in ((5, 1.0), (5, 1.0), (6, 1.0), (6, 2.0), (6, 2.0)):
        dataset = load_dataset("synthetic", seed=seed, blur=blur)
        assert dataset.split("train").clips == ("a",) and dataset.identities == ("1",)
        assert dataset.report["data"]["name"] == "synthetic" and not dataset.report["data"]["dir"]
    assert written == [("small", 5, 1.0), ("small", 6, 1.0), ("small", 6, 2.0)]


def test_synthetic_command_refuses_existing_paths_and_wrong_flags(tmp_path, say):
    (tmp_path / "kept").write_text("mine")
    for out_dir in (tmp_path, tmp_path / "kept"):
        assert str(out_dir) in say(out_dir, code=2, program=synthetic.main)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    done = execute(("-m", "vidjax.data.synthetic", tmp_path), ROOT)
    assert done.returncode == 2 and str(tmp_path) in done.stderr
    for word in ("--seed=-1", "--size=huge"):
        say(tmp_path / "new", word, code=2, program=synthetic.main)
    assert not (tmp_path / "new").exists()
