"""pickles: official files in, flat arrays and labels out; every mistake named with its place."""

import os
import pickle
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.campaigns import hostile
from tests.helpers import python2
from tests.helpers.seen import refused
from vidjax.data import labels as labels_lib
from vidjax.data.iqiyi_vid import find_pickles
from vidjax.data.untrusted import sandbox


def clips(rng, lengths, width=8):
    """Faces of clips c0, c1, ... with these lengths."""
    return {
        b"c%d" % clip: [
            [
                b"%d" % number,
                rng.uniform(0, 500, 4).tolist(),
                float(rng.uniform(0.8, 1)),
                float(rng.normal(80, 20)),
                rng.normal(size=width).astype(np.float16),
            ]
            for number in range(length)
        ]
        for clip, length in enumerate(lengths)
    }


def test_unpack_gives_back_what_was_pickled_and_maps_it_from_disk(tmp_path):
    value = clips(np.random.default_rng(0), [3, 0, 2, 40])
    value[b"c2"][1][4][5] = np.nan
    for name, data in {"2": python2.dumps(value), "3": pickle.dumps(value)}.items():
        (tmp_path / f"face_train_{name}.pickle").write_bytes(data)
        got = sandbox.unpack(tmp_path / f"face_train_{name}.pickle", "face", tmp_path / name)
        frames = [frame for entries in value.values() for frame in entries]
        kept = [frame for frame in frames if np.isfinite(frame[4]).all()]
        assert got.names == ("c0", "c1", "c2", "c3")
        assert got.lengths.dtype == np.int32 and got.lengths.tolist() == [3, 0, 1, 40]
        assert got.seen == 45 == len(got.features) + sum(got.skipped.values())
        assert got.skipped == {"non_finite": 1} and got.skipped_clips == {"empty": 1}
        assert got.features.dtype == np.float16
        np.testing.assert_array_equal(got.features, [frame[4] for frame in kept])
        for column, place in {"number": 0, "box": 1, "detection": 2, "quality": 3}.items():
            array = got.frames[column]
            expected = np.array([frame[place] for frame in kept])
            assert array.dtype == (np.int32 if column == "number" else np.float32)
            np.testing.assert_array_equal(array, expected.astype(array.dtype))
        assert isinstance(got.features.base, np.memmap)
    with pytest.raises(ValueError, match="clip c2, face: the feature of frame 1 is not finite"):
        sandbox.unpack(tmp_path / "face_train_2.pickle", "face", tmp_path / "x", non_finite="error")
    assert not list((tmp_path / "x").iterdir())


def test_a_file_without_frames_is_an_empty_modality(tmp_path):
    path = tmp_path / "body_val.pickle"
    path.write_bytes(python2.dumps({b"a": []}))
    got = sandbox.unpack(path, "body", tmp_path / "out")
    assert got.names == ("a",) and got.lengths.tolist() == [0]
    assert got.features.shape == (0, 0) and got.frames["box"].shape == (0, 4) and got.seen == 0
    path.write_bytes(python2.dumps({}))
    assert sandbox.unpack(path, "body", tmp_path / "out").names == ()
    path.write_bytes(hostile.wide(0, 10**36))  # a shape that no array can have
    got = sandbox.unpack(path, "audio", tmp_path / "out")
    assert got.names == ("a",) and got.features.shape == (0, 0) and got.seen == 0


def test_several_at_once_and_from_anywhere_do_not_mix(tmp_path, monkeypatch):
    """Relative paths, a folder with a space, a module in the way in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('not this one')")
    folder = Path("a folder")
    folder.mkdir()
    for seed in range(3):
        value = clips(np.random.default_rng(seed), [seed + 1])
        (folder / f"{seed}.pickle").write_bytes(python2.dumps(value))
    with ThreadPoolExecutor(3) as pool:
        several = pool.map(
            lambda seed: sandbox.unpack(folder / f"{seed}.pickle", "face", folder / str(seed)),
            range(3),
        )
        for seed, got in enumerate(several):
            value = clips(np.random.default_rng(seed), [seed + 1])
            np.testing.assert_array_equal(got.features, [frame[4] for frame in value[b"c0"]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a folder", "numpy.py"]


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pickle: no such file"):
        sandbox.unpack(tmp_path / "gone.pickle", "face", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a regular file"):
        sandbox.unpack(tmp_path / "pipe", "face", tmp_path / "out")
    path = tmp_path / "face_val.pickle"
    path.write_bytes(python2.dumps(clips(np.random.default_rng(0), [2])))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "features.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"face_val\.pickle: .* written to .*out: No space left"):
        sandbox.unpack(path, "face", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(OSError, match="face_val"):
        sandbox.unpack(path, "face", path)


def unpack_measured(path, out):
    """Returns faces seen, shape, the last one, CPU seconds, and the most bytes of the cage."""
    got = sandbox.unpack(path, "face", out)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    return got.seen, got.features.shape, np.array(got.features[-1]), cpu, used.ru_maxrss * 1024


@pytest.mark.slow
def test_600000_faces_unpack_at_full_rate_in_little_memory(tmp_path):
    rng = np.random.default_rng(0)
    entries = clips(rng, [2000], width=512)[b"c0"]
    body = python2.dumps({b"c0": entries}, 1)
    # The same two thousand faces again and again, but none shared: every copy is read in full.
    faces = body[body.index(b"(") : body.rindex(b"s.")]
    path = tmp_path / "face_train.pickle"
    with path.open("wb") as file:
        file.write(b"}(")
        for clip in range(300):
            file.write(b"U\x04%04d]" % clip + faces)
        file.write(b"u.")
    size = path.stat().st_size
    # In a process of its own: the largest child so far is the cage, whatever tests came before.
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        found = alone.submit(unpack_measured, path, tmp_path / "out").result()
    seen, shape, last, cpu, peak = found
    assert seen == 600_000 and shape == (600_000, 512)
    np.testing.assert_array_equal(last, entries[-1][4])
    assert 600_000 / cpu > 60_000, cpu
    assert peak < 2 * size + (1 << 30)


def test_a_modality_is_found_by_name_and_its_second_version_wins(tmp_path):
    names = [
        "face_train.pickle",
        "face_train_v2.pickle",
        "face_val_v2.pickle",
        "face_test.pickle",
        "my-scene_2_test_v2.pickle",
        "my-scene_2_test.pickle",
        "body_val_val.pickle",
    ]
    for name in [*names, "train_gt.txt", "test_gt.txt", "face_dev.pickle", "face.pickle"]:
        (tmp_path / name).touch()
    for name in ["._face_val.pickle", "_train.pickle.part", "face_val.pickle.bak", "head_val.pkl"]:
        (tmp_path / name).touch()
    (tmp_path / "head.pickle").mkdir()
    assert find_pickles(tmp_path) == {
        ("body_val", "val"): tmp_path / "body_val_val.pickle",
        ("face", "test"): tmp_path / "face_test.pickle",
        ("face", "train"): tmp_path / "face_train_v2.pickle",
        ("face", "val"): tmp_path / "face_val_v2.pickle",
        ("my-scene_2", "test"): tmp_path / "my-scene_2_test_v2.pickle",
    }
    assert list(find_pickles(tmp_path)) == sorted(find_pickles(tmp_path))
    truths = labels_lib.find_ground_truth(tmp_path)
    assert list(truths.items()) == [
        ("train", tmp_path / "train_gt.txt"),
        ("test", tmp_path / "test_gt.txt"),
    ]
    (tmp_path / "fa ce_train.pickle").touch()
    with pytest.raises(ValueError, match="may have letters, digits"):
        find_pickles(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        find_pickles(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="not a directory"):
        labels_lib.find_ground_truth(tmp_path / "train_gt.txt")


# Ground truth.


def truth(folder, text, name="gt.txt", **kwargs):
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return labels_lib.load_ground_truth(folder / name, **kwargs)


# What editors leave in the ground truth, and in the weights of clips.
EDITORS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"),
    lambda text: "\ufeff" + text,
    lambda text: text.replace(" ", "\t"),
    lambda text: text.replace(" ", "  \t "),
    lambda text: "\n \n" + text.replace("\n", "\n\n\t\n"),
    lambda text: text.replace("\n", " \n"),
    lambda text: "  " + text.replace("\n", "\n\t"),
    lambda text: text.rstrip("\n"),
    lambda text: text.replace(".mp4", "", 1),
    lambda text: "\ufeff\r\n" + text.replace(" ", "\t").replace("\n", " \r\n\r\n"),
)


@settings(max_examples=50, deadline=None)
@given(
    labels=st.dictionaries(st.integers(0, 10**7), st.integers(1, 40), min_size=2, max_size=30),
    edit=st.sampled_from(EDITORS),
)
def test_both_forms_of_any_labels_are_equal_whatever_the_editor_left(
    labels, edit, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp()
    wanted = {f"V_{clip}": str(identity) for clip, identity in labels.items()}
    direct = "".join(f"{clip}.mp4 {identity}\n" for clip, identity in wanted.items())
    by_identity: dict[str, list[str]] = {}
    for clip, identity in wanted.items():
        by_identity.setdefault(identity, []).append(f"{clip}.mp4")
    inverted = "".join(" ".join([key, *names]) + "\n" for key, names in by_identity.items())
    for text, name in ((direct, "train_gt.txt"), (inverted, "val_gt.txt")):
        got = truth(folder, edit(text))
        assert got == wanted
        if text is direct:
            assert list(got) == list(wanted)  # in the order of the file
        bare = edit(text).replace(".mp4", "")
        assert truth(folder, bare, name) == wanted


def test_what_tells_the_forms_apart_in_order_of_trust(tmp_path):
    both = "a b\nc d\n"
    assert truth(tmp_path, both, "test_gt.txt") == {"b": "a", "d": "c"}
    assert truth(tmp_path, "1 2\n3 4\n", "train_gt.txt") == {"1": "2", "3": "4"}
    assert truth(tmp_path, "1 2.mp4\n", "train_gt.txt") == {"2": "1"}
    assert truth(tmp_path, "x%20y 2\n", "train_gt.txt") == {"x y": "2"}
    assert truth(tmp_path, "x%20y 2\n", "train_gt.txt", known_clips={"x%20y"}) == {"x%20y": "2"}
    for text in (both, "1 2\n3 4\n"):
        with pytest.raises(ValueError, match=r"gt\.txt: are the lines 'CLIP ID' or 'ID CLIP"):
            truth(tmp_path, text)
    with pytest.raises(FileNotFoundError, match=r"none_gt\.txt: no such file"):
        labels_lib.load_ground_truth(tmp_path / "none_gt.txt")


WEIGHTED = "a.mp4 0.5\nb.mp4 2\nd.mp4 1e-3\ne.mp4 0\n"


def weights(folder, text, clips: Any = "abcde"):
    path = folder / "weights.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    got = labels_lib.load_clip_weights(path, clips)
    assert got.dtype == np.float32 and got.shape == (len(clips),)
    return got.tolist()


WRONG_LABELS = (
    ("", "is empty: write one line per clip"),
    ("\ufeff\n \n", "is empty: write one line per clip"),
    (b"a.mp4 1\n\xff.mp4 2\n", "line 2: not UTF-8 text (byte 8)"),
    ("a.mp4 1\nb.mp4 2 3\n", "line 2: 3 fields, wanted a clip and its identity"),
    ("a.mp4 1\n\nb.mp4\n", "line 3: 1 fields, wanted a clip and its identity"),
    ("a.mp4 1\n2 b.mp4\n", "line 2: the clip is not in the same column"),
    ("1 a.mp4\n\n2 \n", "line 3: identity 2 has no clips"),
    ("1 a.mp4\n2 b.mp4\n1 c.mp4\n", "line 3: identity 1 is already in line 1: join"),
    (
        "a.mp4 1\nb.mp4 2\n\na.mp4 2\n",
        "line 4: clip a is already in line 1, with label 1: delete one of the two",
    ),
    (
        "1 a.mp4 b.mp4\n2 b.mp4\n",
        "line 2: clip b is already in line 1, with label 1: delete one of the two",
    ),
    ("a.mp4 1\nb.mp4 1\na 1\n", "line 3: clip a is already in line 1"),
    ("1 a.mp4 b.mp4 a.mp4\n", "line 1: clip a is already in line 1"),
    ("a.mp4 1\nb.mp4 2\nc.mp4 x\n", "line 3: label x is not a whole number, unlike most labels"),
    ("a.mp4 1\nb.mp4 1.0\nc.mp4 2\n", "line 2: label 1.0 is not a whole number"),
    ("a.mp4 1\nb.mp4 ²\nc.mp4 2\n", "line 2: label ² is not a whole number"),
    ("a.mp4 1\nb.mp4 nan\nc.mp4 2\n", "line 2: label nan is not a whole number"),
    ("a.mp4 1\nb.mp4 -1\n", "line 2: label -1 is out of range"),
    ("0 b.mp4\n1 a.mp4\n", "line 1: label 0 is out of range"),
    ("a.mp4 1\n.mp4 2\n", "line 2: clip name '.mp4' is empty"),
)
WRONG_WEIGHTS = (
    ("\ufeff\n \n", "is empty: write one line per clip"),
    (b"a.mp4 1\n\xff.mp4 2\n", "line 2: not UTF-8 text (byte 8)"),
    ("a.mp4 1\n\nb.mp4\n", "line 3: 1 fields, wanted a clip and its weight"),
    ("a.mp4 1\nb.mp4 2 3\n", "line 2: 3 fields, wanted a clip and its weight"),
    ("a.mp4 1\nb.mp4 heavy\n", "line 2: weight heavy is not a number"),
    ("a.mp4 1\nb.mp4 -0.1\n", "line 2: weight -0.1 is negative or not finite"),
    ("a.mp4 nan\n", "line 1: weight nan is negative or not finite"),
    ("a.mp4 inf\n", "line 1: weight inf is negative or not finite"),
    ("a.mp4 1e39\n", "line 1: weight 1e39 is negative or not finite"),
    ("a.mp4 1\nb 1\na 1\n", "line 3: clip a is already in line 1: delete one of the two"),
    ("a.mp4 1\n.mp4 2\n", "line 2: clip name '.mp4' is empty"),
    ("a.mp4 1\nx.mp4 1\n", "1 of 2 clips are in no feature file, for example x\nthe limit is 1%"),
    ("a.avi 1\nb.avi 1\n", "none of its 2 clips is in a feature file\nit names a.avi, "),
)


@pytest.mark.parametrize(
    ("read", "name", "text", "told"),
    [
        *((truth, "gt.txt", *one) for one in WRONG_LABELS),
        *((weights, "weights.txt", *one) for one in WRONG_WEIGHTS),
    ],
)
def test_mistakes_are_told_with_their_line(read, name, text, told, tmp_path):
    message = refused(lambda: read(tmp_path, text), told)
    assert message.startswith(f"{tmp_path / name}: ")


def test_identities_sort_by_number_or_else_by_name():
    assert labels_lib.sort_identities(["10", "9", "100", "9"]) == ("9", "10", "100")
    assert labels_lib.sort_identities(["10", "9", "x"]) == ("10", "9", "x")
    assert labels_lib.sort_identities([]) == ()
    digits = "7" * 5000
    assert labels_lib.sort_identities(["9", digits, "10"]) == ("10", digits, "9")
    with pytest.raises(ValueError, match="identity 7 is written in 2 ways: 007, 7; use only one"):
        labels_lib.sort_identities(["7", "1", "007"])


def test_clip_weights_are_read_whatever_the_editor_left(tmp_path):
    expected = np.array([0.5, 2, 1, 1e-3, 0], np.float32).tolist()
    for edit in EDITORS:
        assert weights(tmp_path, edit(WEIGHTED)) == expected
    assert weights(tmp_path, WEIGHTED.replace(".mp4", "")) == expected
    assert weights(tmp_path, WEIGHTED, "edcba") == expected[::-1]


def test_a_few_unknown_clips_in_the_weights_are_a_slip(tmp_path):
    clips = [f"c{i:03d}" for i in range(200)]
    text = "".join(f"{clip}.mp4 2\n" for clip in clips[1:])
    with pytest.warns(UserWarning, match=r"1 of 200 clips are in no feature file, for example x$"):
        assert weights(tmp_path, text + "x 3\n", clips) == [1.0] + 199 * [2.0]
    with pytest.raises(ValueError, match=r"3 of 202 clips .*, for example x\nthe limit is 1%"):
        weights(tmp_path, text + "x 3\ny 3\nz 3\n", clips)
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        labels_lib.load_clip_weights(tmp_path / "none.txt", clips)
