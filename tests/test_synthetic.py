"""Statistics of the synthetic set, read from the files it writes; never an ordering of systems."""

import itertools
import pickle
import pickletools

import numpy as np
import pytest

from vidjax.data import synthetic

SPLITS = ("train", "val", "test")
MODALITIES = ("face", "head", "body", "audio", "scene")


def _pickle_path(folder, modality, split):
    v2 = "_v2" if modality == "face" and split != "test" else ""
    return folder / f"{modality}_{split}{v2}.pickle"


def _lines(path):
    return [line.split(" ") for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("synthetic") / "made" / "here"
    synthetic.write(out_dir, size="small", seed=0)
    return out_dir


@pytest.fixture(scope="module")
def clips(folder):
    """(modality, split) -> {clip: value}, by plain pickle."""
    result = {}
    for modality, split in itertools.product(MODALITIES, SPLITS):
        with _pickle_path(folder, modality, split).open("rb") as file:
            result[modality, split] = pickle.load(file, encoding="bytes")
    return result


@pytest.fixture(scope="module")
def labels(folder):
    """Split -> {clip: identity}; distractors are not in it."""
    result = {"train": {name[:-4].encode(): int(c) for name, c in _lines(folder / "train_gt.txt")}}
    for split in ("val", "test"):
        result[split] = {
            name[:-4].encode(): int(c)
            for c, *names in _lines(folder / f"{split}_gt.txt")
            for name in names
        }
    return result


@pytest.fixture(scope="module")
def faces(clips):
    """All face frames: clip [F] as (split, name), quality [F], features [F, D] float64."""
    frames = [
        ((split, name), frame)
        for split in SPLITS
        for name, value in clips["face", split].items()
        for frame in value
    ]
    features = np.array([frame[4] for _, frame in frames], np.float64)
    return [clip for clip, _ in frames], np.array([frame[3] for _, frame in frames]), features


@pytest.fixture(scope="module")
def means(clips):
    """Split -> {clip: unit mean of its good faces}."""
    result = {}
    for split in SPLITS:
        result[split] = {}
        for name, value in clips["face", split].items():
            good = [frame[4].astype(np.float64) for frame in value if frame[3] > 40]
            if good:
                result[split][name] = _normalised(np.mean(good, axis=0))
    return result


@pytest.fixture(scope="module")
def by_identity(means, labels):
    """Identity -> [n, D] unit means of its clips in all splits."""
    result = {}
    for split in SPLITS:
        for name, mean in means[split].items():
            if name in labels[split]:
                result.setdefault(labels[split][name], []).append(mean)
    return {identity: np.array(rows) for identity, rows in sorted(result.items())}


def _normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_files(folder):
    pickles = {_pickle_path(folder, m, s).name for m in MODALITIES for s in SPLITS}
    assert {p.name for p in folder.iterdir()} == pickles | {f"{s}_gt.txt" for s in SPLITS}


@pytest.mark.parametrize("modality", MODALITIES)
def test_pickled_as_python_2_did(folder, modality):
    data = _pickle_path(folder, modality, "train").read_bytes()
    opcodes = [(op.name, arg) for op, arg, _ in pickletools.genops(data)]
    assert opcodes[0] == ("PROTO", 2)
    assert {arg for name, arg in opcodes if name == "GLOBAL"} == {
        "numpy.core.multiarray _reconstruct",
        "numpy ndarray",
        "numpy dtype",
    }
    assert not any("UNICODE" in name or "BYTES" in name for name, _ in opcodes)
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(data)


def test_entries_in_the_official_order(clips):
    dims = synthetic.SIZES["small"].dims
    for (modality, split), values in clips.items():
        for name, value in values.items():
            assert isinstance(name, bytes) and not name.endswith(b".mp4")
            assert split.upper().encode() in name
            if modality == "audio":
                value = [(value,)]
            assert isinstance(value, list)
            for frame in value:
                *before, feature = frame
                assert feature.shape == (dims[modality],) and np.isfinite(feature).all()
                assert feature.dtype == (np.float32 if modality == "scene" else np.float16)
                if modality == "scene":
                    assert isinstance(frame, tuple) and isinstance(before[0], int)
                elif modality != "audio":
                    number, box, *scores = before
                    assert isinstance(frame, list) and isinstance(number, bytes)
                    assert number.isdigit() and str(int(number)).encode() == number
                    assert len(box) == 4 and box[0] < box[2] and box[1] < box[3]
                    assert len(scores) == {"face": 2, "head": 1, "body": 0}[modality]
                    assert all(type(x) is float for x in [*box, *scores])
                    assert not scores or 0.5 <= scores[0] < 1  # the detection score comes first


def test_frame_numbers_never_fall_and_sometimes_repeat(clips):
    numbers = [[int(f[0]) for f in v] for s in SPLITS for v in clips["face", s].values()]
    assert all(row == sorted(row) for row in numbers)
    assert 10 < sum(len(set(row)) < len(row) for row in numbers) < len(numbers) / 2


def test_ground_truth_forms(folder, clips, labels):
    size = synthetic.SIZES["small"]
    train = _lines(folder / "train_gt.txt")
    assert all(len(line) == 2 and line[0].endswith(".mp4") for line in train)
    assert [int(c) for _, c in train] == sorted(int(c) for _, c in train)
    for split in SPLITS:
        scene = clips["scene", split]
        assert set(labels[split]) <= set(scene)
        assert set(labels[split].values()) == set(range(1, size.identities + 1))
        assert sorted(scene) != list(scene)  # a file's order says nothing, as a Python 2 dict's
    for split in ("val", "test"):
        assert [int(c) for c, *_ in _lines(folder / f"{split}_gt.txt")] == [*range(1, 101)]
    names = [name for split in SPLITS for name in clips["scene", split]]
    assert len(set(names)) == len(names)


def test_names_do_not_tell_the_identity(labels):
    numbers = np.array([int(name[-7:]) for name in labels["train"]])
    identities = np.array(list(labels["train"].values()))
    assert abs(np.corrcoef(numbers, identities)[0, 1]) < 0.15


def test_clips_per_identity(labels):
    counts = np.bincount(list(labels["train"].values()))[1:]
    assert 550 <= counts.sum() <= 620
    assert (counts < 10).mean() > 0.75 and counts.max() > 12
    assert np.bincount(counts).argmax() <= 3


def test_distractors_and_missing_modalities(clips, labels):
    for split in ("val", "test"):
        scene = clips["scene", split]
        assert 600 <= len(scene) <= 850
        assert 1 - len(labels[split]) / len(scene) == pytest.approx(0.375, abs=0.002)
    assert len(labels["train"]) == len(clips["scene", "train"])
    total = sum(len(clips["scene", split]) for split in SPLITS)
    rates = {"face": 0.0, "head": 0.02, "body": 0.05, "audio": 0.15}
    for modality, rate in rates.items():
        absent = total - sum(len(clips[modality, split]) for split in SPLITS)
        assert absent / total == pytest.approx(rate, abs=0.02 if rate else 0)
    empty = sum(not value for split in SPLITS for value in clips["face", split].values())
    assert 0.01 < empty / total < 0.03
    assert {len(v) for split in SPLITS for v in clips["scene", split].values()} == {1, 2, 3}


def test_frames_per_clip(clips):
    lengths = np.array([len(v) for s in SPLITS for v in clips["face", s].values() if v])
    mean = synthetic.SIZES["small"].mean_frames
    assert lengths.mean() == pytest.approx(mean, rel=0.08)
    assert lengths.std() == pytest.approx(mean / np.sqrt(1.5), rel=0.15)
    assert lengths.min() == 1 and (lengths > 100 / 29.5 * mean).mean() < 0.03


def test_quality_and_norm_percentiles(faces):
    _, quality, features = faces
    got = np.percentile(quality, [0.1, 1, 10, 50, 90, 99.9])
    np.testing.assert_allclose(got, [-15, 8, 40, 78, 115, 167], atol=5)
    norm = np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(
        np.percentile(norm, [1, 10, 50, 90, 99]), [9, 13, 17, 22, 26], atol=1
    )
    np.testing.assert_allclose(np.polyfit(quality, norm, 1), [0.12, 8], rtol=0.05)


def test_noise_grows_as_quality_falls(faces, means):
    clip, quality, features = faces
    known = [i for i, (split, name) in enumerate(clip) if name in means[split]]
    mean = np.array([means[split][name] for split, name in (clip[i] for i in known)])
    cosine = (_normalised(features[known]) * mean).sum(1)
    edges = [0, 30, 50, 70, 90, 110]
    bins = np.digitize(quality[known], edges)
    by_quality = [cosine[bins == b].mean() for b in range(1, len(edges) + 1)]
    assert by_quality == sorted(by_quality) and by_quality[-1] - by_quality[0] > 0.4


def test_very_bad_faces_look_alike(faces):
    _, quality, features = faces
    bad = _normalised(features[quality < 0])
    usual = _normalised(features[::100])
    assert np.mean(bad @ bad.T) > 0.5 > 0.1 > np.mean(usual @ usual.T)


def test_wrong_people_fill_a_third_of_some_clips(clips):
    shares = []
    for split in SPLITS:
        for value in clips["face", split].values():
            good = _normalised(np.array([f[4] for f in value if f[3] > 40], np.float64))
            if len(good) >= 9:
                cosine = good @ good.T
                agrees = cosine[np.argmax(cosine.mean(0))]  # with the frame most like the others
                shares.append((agrees < 0.35).mean())
    shares = np.array(shares)
    assert len(shares) > 500
    assert 0.09 < (shares > 0.15).mean() < 0.2
    assert 0.25 < shares[shares > 0.15].mean() < 0.4
    assert 0.01 < shares[shares <= 0.15].mean() < 0.05


def test_intrinsic_dimension(by_identity):
    rows = np.concatenate(list(by_identity.values()))
    spectrum = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    drop = spectrum[:-1] / spectrum[1:]
    assert rows.shape[1] == 128
    assert 60 <= 1 + drop[:100].argmax() <= 68


def test_clips_share_their_poses(by_identity):
    within = np.concatenate([rows - rows.mean(0) for rows in by_identity.values()])
    spectrum = np.linalg.eigvalsh(np.cov(within.T))[::-1]
    drop = spectrum[:-1] / spectrum[1:]
    assert 1 + drop[:40].argmax() == 8 and drop[7] > 1.5
    assert 0.3 < spectrum[:8].sum() / spectrum.sum() < 0.5


def test_lookalikes(by_identity):
    centroids = _normalised(np.array([np.median(rows, axis=0) for rows in by_identity.values()]))
    cosine = centroids @ centroids.T - 2 * np.eye(len(centroids))
    assert 0.08 < (cosine.max(1) > 0.52).mean() < 0.22


def test_some_labelled_clips_show_nobody(by_identity):
    cosines = []
    for rows in by_identity.values():
        if len(rows) >= 10:
            others = _normalised(rows.sum(0) - rows)
            cosines.extend((rows * others).sum(1))
    assert 0.04 < (np.array(cosines) < 0.25).mean() < 0.12


def test_strangers_come_in_clusters_and_never_in_two_splits(means, labels):
    val, test = (
        np.array([m for name, m in means[s].items() if name not in labels[s]])
        for s in ("val", "test")
    )
    again = (val @ val.T - 2 * np.eye(len(val))).max(1) > 0.5
    elsewhere = (val @ test.T).max(1) > 0.5
    assert 0.4 < again.mean() < 0.7
    assert elsewhere.mean() < 0.05


def test_few_strangers_are_close_to_an_identity(means, labels, by_identity):
    centroids = _normalised(np.array([np.median(rows, axis=0) for rows in by_identity.values()]))
    strange = np.array([m for name, m in means["val"].items() if name not in labels["val"]])
    assert 0.02 < ((strange @ centroids.T).max(1) > 0.45).mean() < 0.2


def test_same_seed_same_bytes(folder, tmp_path):
    synthetic.write(tmp_path / "again", size="small", seed=0)
    synthetic.write(tmp_path / "other", size="small", seed=1)
    for path in folder.iterdir():
        data = path.read_bytes()
        assert data == (tmp_path / "again" / path.name).read_bytes()
        assert data != (tmp_path / "other" / path.name).read_bytes()


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, clips, *, inverted):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_write_ground_truth", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write(tmp_path, size="small")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_short(tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    for out_dir in (tmp_path, tmp_path / "kept"):
        assert synthetic.main([str(out_dir)]) == 2
        message = capsys.readouterr().err
        assert str(out_dir) in message and message.count("\n") <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert synthetic.main([str(tmp_path / "new"), "--seed=-1"]) == 2
    assert "seed" in capsys.readouterr().err
    for wrong in (["--size=huge"], ["--sede=1"], []):
        assert synthetic.main([str(tmp_path / "new"), *wrong] if wrong else []) == 2
        assert capsys.readouterr().err.count("\n") <= 3
    with pytest.raises(ValueError, match="small, standard"):
        synthetic.write(tmp_path / "new", size="huge")
    assert not (tmp_path / "new").exists()
