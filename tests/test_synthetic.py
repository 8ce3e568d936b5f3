"""The synthetic set, read from the files it writes: layout, statistics, and what options change."""

import itertools
import pickle

import numpy as np
import pytest

from vidjax.data import synthetic
from vidjax.data.synthetic import SyntheticOptions

SPLITS = ("train", "val", "test")
MODALITIES = ("face", "head", "body", "audio", "scene")
TINY = synthetic.Size(30, 8.0, dict.fromkeys(MODALITIES, 64), synthetic.SIZES["small"].spread)


def _pickle_path(folder, modality, split):
    v2 = "_v2" if modality == "face" and split != "test" else ""
    return folder / f"{modality}_{split}{v2}.pickle"


def _clips(folder, modality, split):
    return pickle.loads(_pickle_path(folder, modality, split).read_bytes())


def _lines(path):
    return [line.split(" ") for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Returns a function that writes a set with options, each set once."""
    made = {}

    def write(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("set") / "made"
            write_tiny(made[key], **options)
        return made[key]

    return write


def write_tiny(folder, seed=3, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic.SIZES, "tiny", TINY)
        synthetic.write(folder, size="tiny", seed=seed, options=SyntheticOptions(**options))


def changed_files(one, other):
    return {
        path.name for path in one.iterdir() if path.read_bytes() != (other / path.name).read_bytes()
    }


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(modality, split) -> {clip: value}, and split -> {clip: identity} without distractors."""
    folder = tmp_path_factory.mktemp("synthetic") / "made" / "here"
    synthetic.write(folder, size="small", seed=0)
    train = _lines(folder / "train_gt.txt")
    assert all(len(line) == 2 and line[0].endswith(".mp4") for line in train)
    assert [int(c) for _, c in train] == sorted(int(c) for _, c in train)
    labels = {"train": {name[:-4]: int(c) for name, c in train}}
    for split in ("val", "test"):
        lines = _lines(folder / f"{split}_gt.txt")
        assert [int(c) for c, *_ in lines] == [*range(1, 101)]
        labels[split] = {name[:-4]: int(c) for c, *names in lines for name in names}
    return {p: _clips(folder, *p) for p in itertools.product(MODALITIES, SPLITS)}, labels


@pytest.mark.slow
def test_clips_distractors_missing_modalities_and_lengths(small):
    clips, labels = small
    for split in SPLITS:
        assert set(labels[split]) <= set(clips["scene", split])
        assert set(labels[split].values()) == set(range(1, 101))
    names = [name for split in SPLITS for name in clips["scene", split]]
    assert len(set(names)) == len(names)
    numbers = np.array([int(name[-7:]) for name in labels["train"]])  # tell no identity
    assert abs(np.corrcoef(numbers, [*labels["train"].values()])[0, 1]) < 0.15
    for split, share in {"train": 1, "val": 0.625, "test": 0.625}.items():
        assert len(labels[split]) / len(clips["scene", split]) == pytest.approx(share, abs=0.002)
    rates = {"face": 0.0, "head": 0.02, "body": 0.05, "audio": 0.15}
    for modality, rate in rates.items():
        absent = 1 - sum(len(clips[modality, split]) for split in SPLITS) / len(names)
        assert absent == pytest.approx(rate, abs=0.02 if rate else 0)
    lengths = np.array([len(v) for s in SPLITS for v in clips["face", s].values()])
    assert 0.01 < (lengths == 0).mean() < 0.03
    assert lengths[lengths > 0].mean() == pytest.approx(12, rel=0.08)


@pytest.mark.slow
def test_quality_norm_and_noise_go_together(small):
    quality, norms, cosines = [], [], []
    for value in small[0]["face", "val"].values():
        features = np.array([frame[4] for frame in value], np.float64)
        own = np.array([frame[3] for frame in value])
        if (own > 40).any():
            mean = unit(unit(features[own > 40]).mean(0))
            quality += own.tolist()
            norms += np.linalg.norm(features, axis=1).tolist()
            cosines += (unit(features) @ mean).tolist()
    np.testing.assert_allclose(np.percentile(quality, [10, 50, 90]), [40, 78, 115], atol=5)
    np.testing.assert_allclose(np.polyfit(quality, norms, 1), [0.12, 8], rtol=0.05)
    bins = np.digitize(quality, [0, 30, 50, 70, 90])
    by_quality = [np.array(cosines)[bins == b].mean() for b in range(6)]
    assert by_quality == sorted(by_quality) and by_quality[-1] - by_quality[0] > 0.4


def test_same_seed_same_bytes(make, tmp_path):
    write_tiny(tmp_path / "again")
    assert not changed_files(make(), tmp_path / "again")
    assert len(changed_files(make(), make(seed=4))) == 18


@pytest.mark.slow
def test_wrong_clips_show_somebody_else_in_a_third_of_their_frames(make):
    plain, mixed = (_clips(make(wrong_clips=share), "face", "val") for share in (0.0, 1.0))
    assert plain.keys() == mixed.keys()
    shares, cosines = [], []
    for name, frames in plain.items():
        if len(frames) >= 6:
            pairs = list(zip(frames, mixed[name], strict=True))
            wrong = [(a[4], b[4]) for a, b in pairs if a[3] - b[3] > 15]  # 20 less quality
            shares.append(len(wrong) / len(pairs))
            cosines += [unit(a.astype(float)) @ unit(b.astype(float)) for a, b in wrong]
    assert 0.28 < np.mean(shares) < 0.36
    assert np.mean(cosines) < 0.5


@pytest.mark.slow
def test_blur_makes_quality_foretell_the_noise_of_a_frame(make):
    correlation = []
    for blur in (0.0, 1.0, 2.0):
        rows = []
        for frames in _clips(make(blur=blur), "face", "val").values():
            good = [f for f in frames if f[3] > 25]  # below, features are garbage
            if len(frames) >= 8 and len(good) >= 6:
                mean = unit(unit(np.array([f[4] for f in frames], np.float64)).mean(0))
                c = unit(np.array([f[4] for f in good], np.float64)) @ mean
                q = np.array([f[3] for f in good])
                rows.append((c - c.mean(), q - q.mean()))
        cosine, quality = map(np.concatenate, zip(*rows, strict=True))
        correlation.append(np.corrcoef(cosine, quality)[0, 1])
    assert correlation[0] < 0.25 < correlation[1] < correlation[2]


@pytest.mark.slow
def test_missing_rate_empties_modalities_and_leaves_the_rest_alone(make):
    plain, sparse = make(), make(missing_rate=0.3)
    count = len(_clips(plain, "scene", "val"))
    for modality, least in (("face", 0.02), ("head", 0.02), ("audio", 0.15)):
        whole, rest = (_clips(x, modality, "val") for x in (plain, sparse))
        there = sum(len(value) > 0 for value in rest.values())
        assert 1 - there / count == pytest.approx(1 - (1 - least) * 0.7, abs=0.09)
        for clip, frames in rest.items():
            assert not len(frames) or pickle.dumps(frames) == pickle.dumps(whole[clip])
    same = {f"scene_{split}.pickle" for split in SPLITS} | {f"{s}_gt.txt" for s in SPLITS}
    assert not changed_files(plain, sparse) & same


@pytest.mark.slow
def test_noise_and_distractors_change_train_and_nothing_else(make):
    plain, noisy, strange = make(), make(label_noise=0.2), make(train_distractors=0.375)
    assert changed_files(plain, noisy) == {"train_gt.txt"}
    before, after = (dict(_lines(x / "train_gt.txt")) for x in (plain, noisy))
    assert before.keys() == after.keys() and set(after.values()) <= set(before.values())
    assert 0.1 < np.mean([before[name] != after[name] for name in before]) < 0.3
    names = {f"{name}.mp4" for name in _clips(strange, "scene", "train")}
    nobody = names - dict(_lines(strange / "train_gt.txt")).keys()  # clips without a line
    assert len(nobody) / len(names) == pytest.approx(0.375, abs=0.01)
    train = {_pickle_path(plain, modality, "train").name for modality in MODALITIES}
    assert changed_files(plain, strange) == train | {"train_gt.txt"}


@pytest.mark.slow
def test_a_false_modality_shows_somebody_else_and_leaves_the_rest_alone(make):
    plain, false = make(), make(false_modality=1.0)
    files = {_pickle_path(plain, m, split).name for m in ("face", "audio") for split in SPLITS}
    assert changed_files(plain, false) == files
    faces, now = (_clips(one, "face", "val") for one in (plain, false))
    voices, other = (_clips(one, "audio", "val") for one in (plain, false))
    same = []
    for name in [name for name, frames in faces.items() if frames and name in voices]:
        pairs = list(zip(faces[name], now[name], strict=True))
        assert all(a[:4] == b[:4] for a, b in pairs)
        kept = np.mean([np.array_equal(a[4], b[4]) for a, b in pairs])
        same.append((kept > 0.2, np.array_equal(voices[name], other[name])))
    # At even odds; a frame of a passer-by, or a voice of nobody in particular, was false before.
    assert 0.4 < np.mean(same, axis=0)[0] < 0.62 and all(map(any, same))


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, clips, *, inverted):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_write_ground_truth", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tiny(tmp_path)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_short(tmp_path, say):
    (tmp_path / "kept").write_text("mine")
    for out_dir in (tmp_path, tmp_path / "kept"):
        assert str(out_dir) in say(out_dir, code=2, program=synthetic.main)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    for word in ("--seed=-1", "--size=huge"):
        say(tmp_path / "new", word, code=2, program=synthetic.main)
    assert not (tmp_path / "new").exists()
