"""What each knob of the synthetic dataset changes in the files, and what it leaves alone."""

import pickle

import numpy as np
import pytest

from vidjax.data import synthetic
from vidjax.data.knobs import DEFAULT_KNOBS
from vidjax.data.load import DataOptions, open_source

TINY = synthetic.Size(
    30,
    8.0,
    dict.fromkeys(synthetic.SIZES["small"].dims, 64),
    synthetic.SIZES["small"].spread,
)
FACES = {"train": "face_train_v2", "val": "face_val_v2", "test": "face_test"}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Returns a function that writes a set of 30 people with knobs, each set once."""
    made = {}

    def write(**knobs):
        key = tuple(sorted(knobs.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("set") / "made"
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(synthetic.SIZES, "tiny", TINY)
                turned = DEFAULT_KNOBS._replace(**knobs)
                synthetic.write(made[key], size="tiny", seed=3, knobs=turned)
        return made[key]

    return write


def clips_of(folder, name):
    """Returns clip -> frames of one pickle."""
    with (folder / f"{name}.pickle").open("rb") as file:
        return pickle.load(file, encoding="bytes")


def truth_of(folder):
    lines = (folder / "train_gt.txt").read_text().split()
    return dict(zip(lines[::2], lines[1::2], strict=True))


def cosines(frames):
    """Returns [T], the cosine of each face with the mean direction of its clip, and qualities."""
    x = np.array([frame[4] for frame in frames], np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    mean = x.mean(axis=0)
    return x @ (mean / np.linalg.norm(mean)), np.array([frame[3] for frame in frames])


def changed_files(one, other):
    return {
        path.name for path in one.iterdir() if path.read_bytes() != (other / path.name).read_bytes()
    }


def test_wrong_clips_show_somebody_else_in_a_third_of_their_frames(make):
    plain = clips_of(make(wrong_clips=0.0), FACES["val"])
    mixed = clips_of(make(wrong_clips=1.0), FACES["val"])
    assert plain.keys() == mixed.keys()
    shares, lower = [], []
    for name, frames in plain.items():
        pairs = list(zip(frames, mixed[name], strict=True))
        if len(pairs) >= 6:
            other = np.array([a[3] - b[3] > 15 for a, b in pairs])  # 20 less quality
            shares.append(other.mean())
            for pair, wrong in zip(pairs, other, strict=True):
                a, b = (frame[4].astype(float) for frame in pair)
                lower.append((wrong, a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    assert 0.28 < np.mean(shares) < 0.36
    wrong = np.array([cosine for is_wrong, cosine in lower if is_wrong])
    assert np.mean(wrong) < 0.5  # somebody else


def test_blur_makes_quality_foretell_the_noise_of_a_frame(make):
    correlation = {}
    for blur in (0.0, 1.0, 2.0):
        folder = make(blur=blur)
        rows = [cosines(f) for f in clips_of(folder, FACES["val"]).values() if len(f) >= 8]
        rows = [(c[q > 25], q[q > 25]) for c, q in rows]  # below, features are garbage
        within = [(c - c.mean(), q - q.mean()) for c, q in rows if len(c) >= 6]
        cosine, quality = (np.concatenate(part) for part in zip(*within, strict=True))
        correlation[blur] = np.corrcoef(cosine, quality)[0, 1]
    assert correlation[0.0] < 0.25 < correlation[1.0] < correlation[2.0]


def test_label_noise_changes_the_train_truth_alone(make):
    plain, noisy = make(), make(label_noise=0.2)
    assert changed_files(plain, noisy) == {"train_gt.txt"}
    before, after = truth_of(plain), truth_of(noisy)
    assert before.keys() == after.keys()
    wrong = [name for name in before if before[name] != after[name]]
    assert 0.1 < len(wrong) / len(before) < 0.3
    assert set(after.values()) <= set(before.values())


def test_train_distractors_are_clips_without_a_line(make):
    plain, strange = make(), make(train_distractors=0.375)
    names = {name.decode() + ".mp4" for name in clips_of(strange, "scene_train")}
    nobody = names - truth_of(strange).keys()
    assert len(nobody) / len(names) == pytest.approx(0.375, abs=0.01)
    names = {name.decode() + ".mp4" for name in clips_of(plain, "scene_train")}
    assert names == truth_of(plain).keys()
    train = {f"{m}_train.pickle" for m in ("head", "body", "audio", "scene")}
    assert changed_files(plain, strange) == train | {"face_train_v2.pickle", "train_gt.txt"}


def test_missing_rate_empties_modalities_and_leaves_the_rest_alone(make):
    plain, sparse = make(), make(missing_rate=0.3)
    for name, least in (("face_val_v2", 0.02), ("head_val", 0.02), ("audio_val", 0.15)):
        whole, rest = clips_of(plain, name), clips_of(sparse, name)
        count = len(clips_of(plain, "scene_val"))
        there = [sum(len(value) > 0 for value in clips.values()) for clips in (whole, rest)]
        lost = 1 - there[1] / count
        assert lost == pytest.approx(1 - (1 - least) * 0.7, abs=0.09)
        assert there[0] > there[1]
        for clip, frames in rest.items():
            assert not len(frames) or pickle.dumps(frames) == pickle.dumps(whole[clip])
    scenes = {f"scene_{split}.pickle" for split in FACES}
    truth = {f"{split}_gt.txt" for split in FACES}
    assert not changed_files(plain, sparse) & (scenes | truth)


def test_a_set_with_a_knob_has_a_folder_of_its_own(tmp_path, monkeypatch):
    written = []

    def write(out_dir, *, size, seed, knobs):
        written.append(knobs)
        (out_dir / "face_train_v2.pickle").touch()

    monkeypatch.setattr(synthetic, "write", write)
    for _ in range(2):
        for knobs in (DEFAULT_KNOBS, DEFAULT_KNOBS._replace(blur=2.0, missing_rate=0.3)):
            open_source("synthetic", DataOptions(None, tmp_path, knobs=knobs))
    assert [knobs.blur for knobs in written] == [1.0, 2.0]
    turned = (tmp_path / "synthetic").glob("small-0-blur=2-missing_rate=0.3-*")
    assert sum(path.is_dir() for path in turned) == 1
    out = tmp_path / "out"
    out.mkdir()
    assert synthetic.main([str(out), "--label_noise=0.02"]) == 0
    assert written[-1] == DEFAULT_KNOBS._replace(label_noise=0.02)
