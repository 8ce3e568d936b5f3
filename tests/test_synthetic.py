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


def _normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("synthetic") / "made" / "here"
    synthetic.write(out_dir, size="small", seed=0)
    return out_dir


@pytest.fixture(scope="module")
def clips(folder):
    """(modality, split) -> {clip: value}."""
    return {pair: _clips(folder, *pair) for pair in itertools.product(MODALITIES, SPLITS)}


@pytest.fixture(scope="module")
def labels(folder):
    """Split -> {clip: identity}; distractors are not in it."""
    result = {"train": {name[:-4]: int(c) for name, c in _lines(folder / "train_gt.txt")}}
    for split in ("val", "test"):
        lines = _lines(folder / f"{split}_gt.txt")
        result[split] = {name[:-4]: int(c) for c, *names in lines for name in names}
    return result


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


def test_ground_truth_forms(folder, clips, labels):
    train = _lines(folder / "train_gt.txt")
    assert all(len(line) == 2 and line[0].endswith(".mp4") for line in train)
    assert [int(c) for _, c in train] == sorted(int(c) for _, c in train)
    for split in SPLITS:
        assert set(labels[split]) <= set(clips["scene", split])
        assert set(labels[split].values()) == set(range(1, 101))
    for split in ("val", "test"):
        assert [int(c) for c, *_ in _lines(folder / f"{split}_gt.txt")] == [*range(1, 101)]
    names = [name for split in SPLITS for name in clips["scene", split]]
    assert len(set(names)) == len(names)
    numbers = np.array([int(name[-7:]) for name in labels["train"]])  # tell no identity
    identities = np.array(list(labels["train"].values()))
    assert abs(np.corrcoef(numbers, identities)[0, 1]) < 0.15


def test_distractors_missing_modalities_and_lengths(clips, labels):
    for split in ("val", "test"):
        named = len(labels[split]) / len(clips["scene", split])
        assert named == pytest.approx(0.625, abs=0.002)
    assert len(labels["train"]) == len(clips["scene", "train"])
    total = sum(len(clips["scene", split]) for split in SPLITS)
    rates = {"face": 0.0, "head": 0.02, "body": 0.05, "audio": 0.15}
    for modality, rate in rates.items():
        absent = total - sum(len(clips[modality, split]) for split in SPLITS)
        assert absent / total == pytest.approx(rate, abs=0.02 if rate else 0)
    lengths = np.array([len(v) for s in SPLITS for v in clips["face", s].values()])
    assert 0.01 < (lengths == 0).mean() < 0.03
    assert lengths[lengths > 0].mean() == pytest.approx(12, rel=0.08)


@pytest.mark.slow
def test_quality_norm_and_noise_go_together(clips):
    quality, norms, cosines = [], [], []
    for split in SPLITS:
        for value in clips["face", split].values():
            features = np.array([frame[4] for frame in value], np.float64)
            good = np.array([frame[3] for frame in value]) > 40
            if good.any():
                mean = _normalised(_normalised(features[good]).mean(0))
                quality += [frame[3] for frame in value]
                norms += np.linalg.norm(features, axis=1).tolist()
                cosines += (_normalised(features) @ mean).tolist()
    quality, cosines = np.array(quality), np.array(cosines)
    got = np.percentile(quality, [10, 50, 90])
    np.testing.assert_allclose(got, [40, 78, 115], atol=5)
    np.testing.assert_allclose(np.polyfit(quality, norms, 1), [0.12, 8], rtol=0.05)
    bins = np.digitize(quality, [0, 30, 50, 70, 90])
    by_quality = [cosines[bins == b].mean() for b in range(6)]
    assert by_quality == sorted(by_quality) and by_quality[-1] - by_quality[0] > 0.4


def test_same_seed_same_bytes(make, tmp_path):
    write_tiny(tmp_path / "again")
    write_tiny(tmp_path / "other", seed=4)
    assert not changed_files(make(), tmp_path / "again")
    assert len(changed_files(make(), tmp_path / "other")) == 18


@pytest.mark.slow
def test_wrong_clips_show_somebody_else_in_a_third_of_their_frames(make):
    plain = _clips(make(wrong_clips=0.0), "face", "val")
    mixed = _clips(make(wrong_clips=1.0), "face", "val")
    assert plain.keys() == mixed.keys()
    shares, cosines = [], []
    for name, frames in plain.items():
        pairs = list(zip(frames, mixed[name], strict=True))
        if len(pairs) >= 6:
            other = np.array([a[3] - b[3] > 15 for a, b in pairs])  # 20 less quality
            shares.append(other.mean())
            for pair, wrong in zip(pairs, other, strict=True):
                a, b = (_normalised(frame[4].astype(float)) for frame in pair)
                cosines += [a @ b] if wrong else []
    assert 0.28 < np.mean(shares) < 0.36
    assert np.mean(cosines) < 0.5


@pytest.mark.slow
def test_blur_makes_quality_foretell_the_noise_of_a_frame(make):
    correlation = {}
    for blur in (0.0, 1.0, 2.0):
        rows = []
        for frames in _clips(make(blur=blur), "face", "val").values():
            x = _normalised(np.array([f[4] for f in frames], np.float64).reshape(-1, 64))
            q = np.array([f[3] for f in frames])
            cosine = x @ _normalised(x.mean(0)) if len(x) else q
            c, q = cosine[q > 25], q[q > 25]  # below, features are garbage
            if len(frames) >= 8 and len(c) >= 6:
                rows.append((c - c.mean(), q - q.mean()))
        cosine, quality = map(np.concatenate, zip(*rows, strict=True))
        correlation[blur] = np.corrcoef(cosine, quality)[0, 1]
    assert correlation[0.0] < 0.25 < correlation[1.0] < correlation[2.0]


@pytest.mark.slow
def test_label_noise_changes_the_train_truth_alone(make):
    plain, noisy = make(), make(label_noise=0.2)
    assert changed_files(plain, noisy) == {"train_gt.txt"}
    before, after = (dict(_lines(x / "train_gt.txt")) for x in (plain, noisy))
    assert before.keys() == after.keys() and set(after.values()) <= set(before.values())
    assert 0.1 < np.mean([before[name] != after[name] for name in before]) < 0.3


@pytest.mark.slow
def test_train_distractors_are_clips_without_a_line(make):
    plain, strange = make(), make(train_distractors=0.375)
    names = {f"{name}.mp4" for name in _clips(strange, "scene", "train")}
    nobody = names - dict(_lines(strange / "train_gt.txt")).keys()
    assert len(nobody) / len(names) == pytest.approx(0.375, abs=0.01)
    train = {_pickle_path(plain, modality, "train").name for modality in MODALITIES}
    assert changed_files(plain, strange) == train | {"train_gt.txt"}


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
def test_a_false_modality_shows_somebody_else_and_leaves_the_rest_alone(make):
    plain, false = make(), make(false_modality=1.0)
    files = {_pickle_path(plain, m, split).name for m in ("face", "audio") for split in SPLITS}
    assert changed_files(plain, false) == files
    faces = [_clips(one, "face", "val") for one in (plain, false)]
    voices = [_clips(one, "audio", "val") for one in (plain, false)]
    other = {}
    for name, frames in faces[0].items():
        if not frames or name not in voices[0]:
            continue
        now = faces[1][name]
        assert [frame[:4] for frame in frames] == [frame[:4] for frame in now]
        same = [
            np.mean([np.array_equal(a[4], b[4]) for a, b in zip(frames, now, strict=True)]) > 0.2,
            np.array_equal(voices[0][name], voices[1][name]),
        ]
        other[name] = same
    whose = np.array(list(other.values()))
    # At even odds; a frame of a passer-by, or a voice of nobody in particular, was false before.
    assert 0.4 < whose[:, 0].mean() < 0.62 and not (~whose).all(axis=1).any()


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
    for word in ("--seed=-1", "--size=huge", "--sede=1", "--blur=5", None):
        words = [tmp_path / "new", word] if word else []
        say(*words, code=2, program=synthetic.main)
    assert not (tmp_path / "new").exists()
