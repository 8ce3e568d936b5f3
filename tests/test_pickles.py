"""Official pickles, ground truth and weights of clips are read; errors name the file and line."""

from typing import Any

import numpy as np
import pytest

from tests.campaigns import hostile, mutations
from tests.helpers.clip_files import random_clip, write_pickle
from tests.helpers.seen import refused
from vidjax.core.batch import BATCHED
from vidjax.data import labels as labels_lib
from vidjax.data.iqiyi_vid import OfficialFiles, find_pickles
from vidjax.data.untrusted import sandbox


def test_unpack_returns_the_pickled_frames_memory_mapped(tmp_path, monkeypatch):
    """The child process does not import modules, such as numpy.py, from the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('wrong module')")
    clip = random_clip(np.random.default_rng(0), 3, 4)
    path = write_pickle(tmp_path, "face", "train", {"c": clip})
    faces = sandbox.unpack(path, "face", tmp_path / "out")
    hostile.check(faces)
    frames = faces.frames["face"]
    assert faces.names == ("c",) and frames.length.tolist() == [3]
    for field in BATCHED:
        values = np.asarray(getattr(frames, field))
        np.testing.assert_array_equal(values, getattr(clip, field), strict=True)
    assert isinstance(frames.features, np.memmap)


def test_find_pickles_parses_file_names_and_prefers_version_two(tmp_path):
    names = ["face_train", "face_train_v2", "face_val_v2", "body_val_val", "my-scene_2_test"]
    others = ["._face_val.pickle", "face_val.pickle.bak", "face_dev.pickle", "head_val.pkl"]
    others += ["face_training.pickle"]  # not misspelt, because there is a file of the split train
    for name in [*(f"{name}.pickle" for name in names), *others, "train_gt.txt", "test_gt.txt"]:
        (tmp_path / name).touch()
    (tmp_path / "head.pickle").mkdir()
    stems = {key: path.stem for key, path in find_pickles(tmp_path).items()}
    assert stems == {
        ("body_val", "val"): "body_val_val", ("face", "train"): "face_train_v2",
        ("face", "val"): "face_val_v2", ("my-scene_2", "test"): "my-scene_2_test",
    }  # fmt: skip
    assert list(labels_lib.find_ground_truth(tmp_path)) == ["train", "test"]


@pytest.mark.parametrize(("kind", "name", "words"), [
    ("nothing", "face_val.pickle", "is a link"),  # to a file that does not exist
    ("pipe", "face_val.pickle", "is not a regular file"),
    ("folder", "face_val.pickle", "is a folder"),
    ("file", "fa ce_train.pickle", "may have only letters, digits"),
    ("file", "face_trian.pickle", "rename it to face_train.pickle"),
    ("file", "valid_gt.txt", "rename it to val_gt.txt"),
])  # fmt: skip
def test_official_files_with_wrong_names_or_of_other_kinds_are_refused(tmp_path, kind, name, words):
    (tmp_path / "face_test.pickle").touch()
    if kind == "file":
        (tmp_path / name).touch()
    else:
        mutations.put(tmp_path / name, kind, target=tmp_path / "x")
    refused(lambda: OfficialFiles(tmp_path), name, words)


def truth(folder, text, name="gt.txt", **options):
    """Returns clip -> identity, read from a file of ground truth with this text."""
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return labels_lib.load_ground_truth(folder / name, **options)


def weights(folder, text, clips: Any = "abcde"):
    """Returns the weights of clips, by default a to e, read from a file with this text."""
    (folder / "weights.txt").write_text(text)
    loaded = labels_lib.load_clip_weights(folder / "weights.txt", clips)
    assert loaded.dtype == np.float32 and loaded.shape == (len(clips),)
    return loaded.tolist()


# test_ranking.py has the same test of ground truth.
def test_weight_files_parse_equally_after_any_editor(tmp_path):
    text = "a.mp4 0.5\nb.mp4 2\nd.mp4 0.25\ne.mp4 0\n"
    for edited in (
        text, text.replace("\n", "\r"), "\ufeff" + text.replace("\n", "\r\n"),
        text.replace(" ", "  \t "), "\n \n" + text.replace("\n", "\n\n\t\n"),
        text.replace(".mp4", "", 1),
    ):  # fmt: skip
        assert weights(tmp_path, edited) == [0.5, 2, 1, 0.25, 0]  # c has no line
        assert weights(tmp_path, edited, "edcba") == [0, 0.25, 1, 2, 0.5]


def test_column_order_of_labels_is_inferred_or_refused(tmp_path):
    """The suffix .mp4, or else the name of the official file, shows which column has the clips."""
    assert truth(tmp_path, "a b\nc d\n", "test_gt.txt") == {"b": "a", "d": "c"}
    assert truth(tmp_path, "1 2\n3 4\n", "train_gt.txt") == {"1": "2", "3": "4"}
    assert truth(tmp_path, "1 2.mp4\n", "train_gt.txt") == {"2": "1"}
    assert truth(tmp_path, "x%20y 2\n", "train_gt.txt") == {"x y": "2"}
    # A known clip may have an escape in its name.
    assert truth(tmp_path, "x%20y 2\n", "train_gt.txt", known_clips={"x%20y"}) == {"x%20y": "2"}
    refused(lambda: truth(tmp_path, "a b\nc d\n", "gt.txt"), "gt.txt: no name ends in .mp4")


@pytest.mark.parametrize(("read", "text", "expected"), [
    (truth, "\ufeff\n \n", "is empty: write one line per clip"),
    (truth, b"a.mp4 1\n\xff.mp4 2\n", "line 2 is not UTF-8 text (byte 8)"),
    (truth, "a.mp4 1\nb.mp4 2 3\n", "line 2: the line has 3 words, not 2: write a clip and its"),
    (truth, "a.mp4 1\n2 b.mp4\n", "line 2: the clip is not in the same column"),
    (truth, "a.mp4 1\nb.mp4 1\na.mp4 2\n", "line 3: clip a is already in line 1"),
    (truth, "1 a.mp4\n2 b.mp4\n1 c.mp4\n", "line 3: identity 1 is already in line 1: join"),
    (truth, "1 a.mp4 b.mp4\n2 b.mp4\n", "line 2: clip b is already in line 1, with the identity 1"),
    (truth, "a.mp4 1\nb.mp4 2\nc.mp4 x\n", "line 3: identity x is not a whole number, unlike most"),
    (truth, "0 b.mp4\n1 a.mp4\n", "line 1: identity 0 is less than 1"),
    (weights, "a.mp4 1\n\nb.mp4\n", "line 3: the line has 1 word, not 2: write a clip and its w"),
    (weights, "a.mp4 1\nb.mp4 heavy\n", "line 2: weight heavy is not a finite number of 0"),
    (weights, "a.mp4 1e39\n", "line 1: weight 1e39 is not a finite number of 0"),
    (weights, "a.avi 1\nb.avi 1\n", "none of its 2 clips has features\nthe labels name a.avi, "),
])  # fmt: skip
def test_errors_in_label_and_weight_files_name_the_line(read, text, expected, tmp_path):
    message = refused(lambda: read(tmp_path, text), expected)
    (path,) = tmp_path.iterdir()
    assert message.startswith(f"{path}: ")


def test_identities_sort_as_numbers_if_all_are_numbers():
    assert labels_lib.sort_identities(["10", "9", "100", "9"]) == ("9", "10", "100")
    assert labels_lib.sort_identities(["10", "9", "x"]) == ("10", "9", "x")
    too_long = "7" * 5000  # int() converts at most 4,300 digits
    assert labels_lib.sort_identities(["9", too_long, "10"]) == ("10", too_long, "9")
    words = "identity 7 is written in 2 ways, 007, 7: use only one"
    refused(lambda: labels_lib.sort_identities(["7", "1", "007"]), words)
