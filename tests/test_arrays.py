"""A user's own features become the same store as official files, or an error."""

import functools
import json
import pickle
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.campaigns import mutations
from tests.helpers import clip_files, seen
from tests.helpers.batches import eval_batches, real_frames
from tests.helpers.datasets import load_dataset
from vidjax.data import data_report, labels, memory, sources
from vidjax.data.clip_files import write_npz
from vidjax.data.packed_clips import fingerprint_frames
from vidjax.utils import errors

DIM = 6


def make_splits():
    """Returns 12 train and 8 val clips, every fourth without a frame."""
    rng, splits = np.random.default_rng(0), {"train": {}, "val": {}}
    for split, clips in splits.items():
        for i in range(12 if split == "train" else 8):
            face = clip_files.random_clip(rng, i % 4, DIM, "float32")._asdict()
            clips[f"{split}_{i:02d}"] = {"face": face}
    return splits


@pytest.fixture
def load(tmp_path):
    """Returns a function that loads features with an empty cache."""
    return functools.partial(sources.load, cache_dir=tmp_path / "cache")


@pytest.fixture
def refused(load, tmp_path):
    """Returns a function that asserts that features give an error with some words."""

    def check(source, *words, labels=None):
        seen.refused(lambda: load(source, labels), *words)
        assert not list((tmp_path / "cache").rglob("*.partial"))

    return check


def digest(data):
    """Returns a digest of all clip names, frames and labels."""
    return data.report["data"]["digest"]


def test_npz_and_parquet_folders_convert_to_the_records_of_arrays(tmp_path, load, read_here):
    splits = make_splits()
    data = load(clip_files.write_npz(tmp_path / "own", splits))  # a file per clip
    assert digest(data) == digest(load(splits))
    assert {1, 2, 3} <= {*data.split("train").lengths["face"]}  # as in `make_splits`
    for split, clips in splits.items():
        (tmp_path / "joined" / split).mkdir(parents=True)
        by_clip = {name: clip_files.npz_arrays(clip) for name, clip in clips.items()}
        write_npz(tmp_path / "joined" / split / "all.npz", by_clip)
    assert digest(load(tmp_path / "joined")) == digest(data)
    pytest.importorskip("pyarrow")
    (tmp_path / "tables").mkdir()
    options: Any = {"fields": ("quality", "detection", "number"), "row_group_size": 7}
    for split, clips in splits.items():
        for name in [*clips][::4]:  # tables have no clips without frames
            del clips[name]
        clip_files.write_parquet(tmp_path / f"tables/{split}.parquet", clips, width=DIM, **options)
    assert digest(load(tmp_path / "tables")) == digest(load(splits))


def test_clips_in_one_level_of_folders_have_the_name_of_their_folder(tmp_path, load):
    names = {"train": ["all", "monday/1", "monday/all", "tuesday/1"], "val": ["monday/1b", "x"]}
    face: Any = {"face": np.arange(6, dtype=np.float32).reshape(2, 3)}
    splits: Any = {"train": dict.fromkeys(names["train"], face)}
    splits["val"] = {name: {"face": face["face"] + 1} for name in names["val"]}
    folder = clip_files.write_npz(tmp_path / "own", splits)
    (folder / "labels.tsv").write_text("monday/1\tAda\nmonday/1b\tAda\n")
    data = load(folder)
    assert digest(data) == digest(load(splits, {"monday/1": "Ada", "monday/1b": "Ada"}))
    assert data.split("train").clips == tuple(names["train"])
    read = functools.partial(memory.load_clips, modalities={"face": 3}, identities=())
    assert read(folder, split="val").names == tuple(names["val"])
    assert read(folder / "val/monday").names == ("1b",)
    (folder / "train/all.npz").unlink()
    write_npz(folder / "train/monday/two.npz", {"a": face, "b": face})
    wanted = ["monday/1", "monday/a", "monday/all", "monday/b", "tuesday/1"]
    assert sorted(read(folder / "train").names) == wanted
    # The cache is filled again if a clip is moved, because its name is another.
    (folder / "train/monday/1.npz").rename(folder / "train/tuesday/one.npz")
    (folder / "labels.tsv").write_text("1\tAda\n")
    seen.refused(lambda: load(folder), "labels name 1, but the features belong to monday/")
    (folder / "labels.tsv").write_text("tuesday/one\tAda\n")
    assert "tuesday/one" in load(folder).split("train").clips


@pytest.mark.parametrize("ending", [".npy", ".PT", ".pkl", ".hdf5", ".pth", ".h5"])
def test_printed_command_converts_files_of_other_kinds(tmp_path, load, ending, monkeypatch):
    """Modules that are not installed are replaced. Their files have the format of numpy here."""
    methods: Any = dict.fromkeys(("detach", "float", "numpy"), lambda self: self)
    tensor = type("Tensor", (np.ndarray,), methods)
    torch = SimpleNamespace(Tensor=tensor, load=lambda path, **_: np.load(path).view(tensor))
    monkeypatch.setitem(sys.modules, "torch", torch)
    h5py = SimpleNamespace(File=lambda path: {"face": np.load(path)})
    monkeypatch.setitem(sys.modules, "h5py", h5py)
    (folder := tmp_path / 'it\'s "own"/train/day 1').mkdir(parents=True)
    face = np.arange(6, dtype=np.float32).reshape(2, 3)
    for name in ("a", "b"):
        with (folder / f"{name}{ending}").open("wb") as file:
            pickle.dump(face, file) if ending == ".pkl" else np.save(file, face)
    read = functools.partial(memory.load_clips, modalities={"face": 3}, identities=())

    def convert(path, read, count):
        message = seen.refused(read, str(path), "face is the modality")
        program, option, code, *words = shlex.split(message.partition("): ")[2])
        assert (program, option) == ("python3", "-c")
        monkeypatch.setattr(sys, "argv", ["-c", *words])
        (tmp_path / "code.py").write_text(code)
        runpy.run_path(str(tmp_path / "code.py"))
        assert len([*folder.glob("*.npz")]) == count

    convert(folder / f"a{ending}", lambda: read(folder / f"a{ending}"), 1)
    np.savez(folder / "a.npz", face=2 * face)  # an existing file is not replaced
    convert(folder / f"a{ending}", lambda: load(folder.parents[1]), 2)
    seen.refused(lambda: read(folder), f"a{ending}' would be ignored", f"move a{ending} away")
    for path in folder.glob(f"*{ending}"):
        path.unlink()
    data = load(folder.parents[1])
    assert data.split("train").clips == ("day 1/a", "day 1/b")
    for (_, frames), factor in zip(real_frames(data, "train"), (2, 1), strict=True):
        np.testing.assert_array_equal(frames.features, factor * face)


def test_labels_are_read_from_a_dict_a_table_or_official_text(tmp_path, load):
    splits, text = make_splits(), tmp_path / "any_gt.txt"
    listed = {"train_01": 3, "train_02": "7", "train_03": 3, "val_03": 7}  # numbers or text
    data = load(splits, listed | {"val_01": None})
    text.write_text("".join(f"{k}.mp4 {v}\n" for k, v in listed.items()))
    for given in (clip_files.write_labels(tmp_path / "any.csv", listed), text):
        assert digest(load(splits, given)) == digest(data)
    # Identity "3" is class 1, "7" is class 2, and a clip without a label is class 0.
    assert data.identities == ("3", "7")
    assert data.split("train").labels.tolist() == [0, 1, 2, 1, *[0] * 8]
    assert data.split("val").labels.tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    declared = data.with_identities(("7", "9", "3"))  # no clip shows identity 9
    assert declared.identities == ("7", "9", "3")
    assert declared.split("val").labels[3] == 1
    assert declared.split("train").positives.tolist() == [1, 0, 2]
    only_train = load(splits, {"train_01": 3})
    assert only_train.split("train").labelled and not only_train.split("val").labelled


@pytest.mark.parametrize("name", ["LABELS.CSV", "labels.tsv", "labels.jsonl", "labels.parquet"])
def test_a_folder_may_contain_any_table_of_labels_with_titles_in_capitals(
    tmp_path, load, name, read_here
):
    path = clip_files.write_npz(tmp_path / "own", splits := make_splits()) / name

    def read(*titles):
        rows = [["3", "x", "train_01"], ["7", "x", "val_03"]]
        if name == "labels.parquet":
            pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
            columns = [[*column] for column in zip(*rows, strict=True)]
            parquet.write_table(pyarrow.Table.from_arrays(columns, [*titles]), path)
        elif name == "labels.jsonl":
            lines = (json.dumps(dict(zip(titles, row, strict=True))) for row in rows)
            path.write_text("\n".join(lines))
        else:
            separator = "\t" if name == "labels.tsv" else ","
            path.write_text("\n".join(map(separator.join, [titles, *rows])))
        return load_dataset("arrays", directory=path.parent)

    wanted = digest(load(splits, {"train_01": 3, "val_03": 7}))
    for titles in (("identity", "note", "clip"), ("IDENTITY", "Note", " Clip ")):
        assert digest(read(*titles)) == wanted
    seen.refused(lambda: read("identity", "Clip", "clip"), name, "Clip and clip mean the same")


def test_frames_are_sorted_by_time_and_lists_are_read_as_arrays(load):
    features = [[1.0, 2.0], [3.0, 4.0]]
    late = {"features": features, "number": [7, 5], "quality": [10, 20]}
    clips = {"late.mp4": {"face": late}, "plain": {"face": features}}
    (batch,) = eval_batches(load({"val": clips}), split="val", modalities=("face",), rows=2)
    face = batch.frames["face"]
    assert face.number[:, :2].tolist() == [[5, 7], [0, 1]]
    assert face.quality[0, :2].tolist() == [20, 10]
    assert face.features[:, :2].tolist() == [features[::-1], features]
    assert (face.detection == face.mask).all()  # 1, because the clips have no detection scores


def test_arrays_in_memory_are_copied_and_their_digest_depends_on_their_content(tmp_path, load):
    splits = make_splits()
    data, quality = load(splits), splits["val"]["val_03"]["face"]["quality"]
    before = quality[0]
    assert digest(load(make_splits())) == digest(data)
    quality[0] += 1
    assert digest(load(splits)) != digest(data)
    frames = dict(real_frames(data, "val"))[data.split("val").clips.index("val_03")]
    assert frames.quality[0] == before
    assert not (tmp_path / "cache").exists()  # nothing is written


def test_error_names_the_split_clip_and_modality_of_bad_features(refused):
    two = {"features": np.zeros((2, DIM), np.float32)}  # correct features of two frames
    for value, words in (
        (np.zeros((2, DIM + 1)), "features are 7 wide, but 6 wide in other clips: "),
        ([[1.0, 2.0], [3.0]], "rows have different lengths"),
        (np.array([None, "x"], object), "shape [2] and the dtype object\ngive floats"),
        (np.ma.masked_less(np.arange(4.0), 1), "has masked values: leave out the masked frames"),
        (np.zeros((2, DIM), np.float16), "features are float16, but float32 in other clips"),
        (np.zeros((1, 2, DIM)), "from array.reshape(-1, array.shape[-1])"),
        (np.zeros((DIM, 2)), "transpose the array, as array.T"),
        (np.zeros((2, 0)), "shape [2, 0]"),
        (two | {"quality": [1.0] * 3}, "quality has shape [3]: give [2]"),
        (two | {"quality": [1.0] * DIM}, "transpose the array, as array.T"),
        (two | {"number": [0.5, 1.0]}, "number 0.5"),
        ({"quality": [1.0]}, "no features"),
        ({"feature": np.zeros((1, DIM))}, "the key 'feature' is unknown"),
    ):
        splits = make_splits()
        splits["val"] = {"odd": {"face": value}} | splits["val"]
        refused(splits, "val: clip odd, face", words)


def test_error_names_the_split_and_clip_of_a_wrong_dict(refused, load):
    one = {"f": [1.0]}  # a correct clip of one frame
    # Clips that look transposed: all have 64 frames of 3 numbers, as if these were 3 frames of 64.
    transposed = {name: {"f": np.full((64, 3), n + 1.0)} for n, name in enumerate("abc")}
    with pytest.warns(UserWarning, match=r"f: every clip has 64 frames of 3 numbers.*\n.*\.T"):
        load({"train": transposed})
    for source, *words in (
        ({"clip": one}, "'clip' is not the name of a split", "{'train': {clip:"),
        ({"train": {"a": np.zeros((1, 2))}}, "train: clip a is of type ndarray"),
        ({"train": {"a": {"fa ce": np.zeros((1, 2))}}}, "clip a", "modality 'fa ce'"),
        ({"train": {"a": one, "a.mp4": one}}, "clip a comes twice: without .mp4, 'a' and 'a.mp4'"),
        ({"train": {7: one}}, "clip name 7 is of type int"),
        ({"train": {"a": one | {7: [1.0]}}}, "train: clip a: modality 7 is of type int", "a name"),
        ({"train": {"a": one | {"F": [1.0]}}}, "clip a", "differs only in upper and lower"),
        ({"train": transposed | {"d": {"f": np.ones((64, 5))}}}, "clip d, f", "of [64, 5]"),
        ({"train": {"a": one}, "val": {}}, "arrays: split 'val' has no clips"),
    ):
        refused(source, *words)


def test_error_or_warning_of_labels_in_another_unicode_form_names_the_form():
    """Macs write an accent as a letter of its own."""
    with pytest.raises(errors.UserError, match="in another Unicode form"):
        labels.load_label_table({"\u00e9": 1}, {"train": ["a", "e\u0301"]})
    with pytest.warns(errors.VidjaxWarning, match="in another Unicode form"):
        labels.load_label_table({"e\u0301": 1, "a": 2}, {"train": ["\u00e9", "a"]})


def test_error_of_bad_labels_names_the_line_or_clip(tmp_path, refused):
    for given, *words in (
        ({"nobody": 1}, "none of its 1 clips", "nobody"),
        ({"train_01": 1.5}, "clip train_01", "float", "str()"),
        ({"train_01": -1}, "clip train_01", "identity -1"),
        ({"train_01": 1, "train_01.mp4": 2}, "clip train_01 has the labels 1 and 2"),
        (b"name,identity\na,1\n", "line 1", "clip,identity", "name,identity"),
        (b"clip;identity\na;1\n", "line 1", "'clip;identity'", "by commas"),
        (b"clip,identity\ntrain_01,Smith, John\n", "line 2", "as many values", "quotes"),
        (b'clip,identity\n"train\n1",1\n', "line 3", "rename it"),
        (b"clip,identity\n\xff,1\n", "UTF-8"),
        (tmp_path / "none.csv", "none.csv", "does not exist"),
        (tmp_path, "is not a file", "correct the path"),
    ):
        labels = given
        if isinstance(given, bytes):  # the content of a table
            labels, words = tmp_path / "labels.csv", [*words, "labels.csv"]
            labels.write_bytes(given)
        refused(make_splits(), *words, labels=labels)


# Names of files and folders, and words of the error.
@pytest.mark.parametrize(("names", "words"), [
    ("", ["contains no features", "SPLIT/CLIP.npz"]),
    ("train/", ["train' contains no .npz file"]),
    ("train/one.npz train/notes.txt", ["notes.txt", "may contain only .npz files"]),
    ("train/one.npz train/two.npy", ["two.npy", "only .npz files", "face is the modality"]),
    ("train/DAY/CAMERA/one.npz", ["DAY/CAMERA: train", "or folders of them\nmove it away"]),
    ("train.h5", ["contains no features", "see vidjax/data/README.md"]),
    ("train/one.npz train.parquet", ["train.parquet and a folder train: remove one"]),
    ("train-00.parquet train-01.parquet", ["train-00", "a split is one table", "join the tables"]),
    ("train.parquet train-01.parquet", ["train-01", "would be ignored", "train.parquet"]),
    ("train/one.npz labels.csv train_gt.txt", ["labels.csv and train_gt.txt: remove one"]),
    ("train/one.npz labels.csv Labels.csv", ["Labels.csv and labels.csv: remove one"]),
    ("train/one.npz label.tsv", ["label.tsv", "rename it to labels.tsv"]),
    ("train/one.npz validation/a.npz", ["rename it to val"]),
    ("train/one.npz val.parquet/", ["val.parquet' is a folder"]),
])  # fmt: skip
def test_folder_with_missing_misnamed_or_equal_splits_is_refused(tmp_path, refused, names, words):
    for name in names.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif name.endswith(".npz"):
            np.savez(path, face=np.ones((1, 2)))
        else:
            path.touch()
    refused(tmp_path, *words)


def test_npz_file_of_several_clips_needs_a_length_for_each_clip(tmp_path):
    path, face = tmp_path / "all.npz", np.ones((3, 2), np.float32)
    load = functools.partial(memory.load_clips, tmp_path, {"face": 2}, ())
    words = (str(path), "'face_length' does not match the clips and frames")
    # The file has 3 frames of two clips. The sum of two lengths must be 3, as in [1, 2].
    half = 2**63  # the sum of [half, half + 3] overflows to 3
    for length in ([1, 1], [1, 2, 1], [4, -1], [1.0, 2.0], [[1, 2]], [half, half + 3]):
        np.savez(path, clips=["a", "b"], face=face, face_length=length)
        seen.refused(load, *words)
    np.savez(path, clips=["a", "b"], face=face)
    seen.refused(load, *words)
    np.savez(path, clips=["a", "b"], face=face, face_length=np.array([1, 2], np.uint64))
    assert load().names == ("a", "b")
    np.savez(path, clips=["a"], face=face[:1], face_length=[1], face_quality=0.5)  # no axis
    seen.refused(load, *words)
    np.savez(path, clips=face)  # the only array of a file is a modality of one clip, named "all"
    assert memory.load_clips(tmp_path, {"clips": 2}, ()).names == ("all",)


def test_negative_and_infinite_weights_of_frames_are_reported_with_a_clip(tmp_path):
    clips: Any = {name: {"face": np.ones((4, 2), np.float32)} for name in ("a", "b", "c")}
    clips["b"] |= {"face_quality": [1, -1, -2, np.nan], "face_detection": [1, 1, -1, 1]}
    (tmp_path / "val").mkdir()
    for name, values in clips.items():
        np.savez(tmp_path / "val" / f"{name}.npz", **values)
    for fields, word, count, effect in (
        ("quality", "negative", 2, "it counts as 0"), ("quality", "not finite", 1, "replaced by 0"),
        ("detection", "negative", 1, "it counts as 0"),
    ):  # fmt: skip
        wanted = f"face: {count} of 12 frames have a {fields} that is {word}, such as in clip b: "
        for load in (
            lambda: memory.load_clips(tmp_path / "val", {"face": 2}, ()),
            lambda: memory.MemoryClips.pack(clips, {"face": 2}, ()),
            lambda: sources.load(tmp_path, cache_dir=tmp_path / "cache"),
            lambda: sources.load({"val": clips}, cache_dir=tmp_path / "cache"),
        ):
            with pytest.warns(errors.VidjaxWarning) as caught:
                load()
            assert {warning.filename for warning in caught} == {__file__}
            texts = [str(warning.message) for warning in caught]
            assert any(wanted in text and effect in text for text in texts), texts
    with pytest.warns(errors.VidjaxWarning):
        report = sources.load({"val": clips}, cache_dir=tmp_path / "cache").report
    assert "negative: 2 quality, 1 detection" in data_report.format_report(report)


def test_official_files_may_have_negative_qualities_but_not_only_negative_ones(tmp_path, read_here):
    clip = clip_files.random_clip(np.random.default_rng(0), 3, DIM)
    load = functools.partial(memory.load_clips, tmp_path, {"face": DIM}, ())
    clip.quality[:] = -1, -30, 150
    clip_files.write_pickle(tmp_path, "face", "val", {"a": clip})
    load()  # a warning would be an error
    clip.quality[:] = -1
    clip_files.write_pickle(tmp_path, "face", "val", {"a": clip})
    with pytest.warns(errors.VidjaxWarning, match="face: 3 of 3 frames .* negative.* clip a:"):
        load()


def test_clips_in_memory_without_a_modality_of_the_run_are_empty_or_refused():
    one, read = {"face": [1.0]}, memory.MemoryClips.pack
    for clips, words in (
        ({"a": {"fcae": [1.0]}}, "fcae, which the run does not use: did you mean 'face'?"),
        ({"a": {"title": [1.0]}, "b": {}}, "add a modality of the run, or rename a modality"),
    ):
        seen.refused(functools.partial(read, clips, {"face": 1, "head": 8}, ()), words)
    with pytest.warns(errors.VidjaxWarning, match="1 of 2 clips have no modality of the run.* b\n"):
        packed = read({"a": one, "b": {"audio": [1.0, 2.0]}}, {"face": 1}, ())
    assert packed.names == ("a", "b")
    np.testing.assert_array_equal(packed.split("").lengths["face"], [1, 0])


def test_bad_parquet_table_of_frames_is_refused(tmp_path, refused, monkeypatch, tables_here):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "train.parquet"
    good = {"clip": ["a", "a"], "modality": ["f", "f"], "features": [[1.0, 2.0], [3.0, 4.0]]}
    latin = pyarrow.array([b"\xff", b"\xfe"]).view(pyarrow.string())
    # Columns that replace columns of the good table or are added to it, and words of the error.
    for change, words in (
        ({"features": [[1.0, 2.0], [3.0]]}, ("clip a, f", "width 1 in row 2, but width 2 in ro")),
        ({"features": [1.0, 2.0]}, ("column features is of type double",)),
        ({"features": [[1.0, None], [1.0, 1.0]]}, ("null",)),
        ({"clip": ["a", "a.mp4"]}, ("with and without .mp4",)),
        ({"clip": ["a", None]}, ("row 2: clip is missing",)),
        ({"clip": latin}, ("column clip", "UTF-8")),
        ({"quality": ["x", "y"]}, ("column quality is of type string", "write numbers")),
        ({"qualty": [1.0, 2.0]}, ("qualty", "'quality'")),
    ):
        parquet.write_table(pyarrow.table(good | change), path)
        refused(tmp_path, str(path), *words)
    two_of_a_name = pyarrow.table(good).append_column("clip", [["b", "b"]])
    parquet.write_table(two_of_a_name, path)
    refused(tmp_path, f"{path}: two columns are named clip: delete one")
    parquet.write_table(pyarrow.table({"clip": ["a"], "face": [[[1.0, 2.0]]]}), path)
    refused(tmp_path, str(path), "no column modality", "a row for each frame")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path, str(path), "vidjax[parquet]")


def load_faces(path):
    """Returns clips as a run reads them; raises an error if the reading takes long."""
    with mutations.alarm():
        return memory.load_clips(path, {"face": 4}, ())


def faces_refused(path, *words):
    """Asserts that clips are refused, and that the error does not advise to allow pickles."""
    assert "pickle" not in seen.refused(lambda: load_faces(path), *words)


def test_only_regular_files_are_read_as_clips(tmp_path):
    folder, real = tmp_path / "clips", tmp_path / "real.npz"
    folder.mkdir()
    path = folder / "x.npz"
    for kind, name in {"pipe": "pipe", "zero": "device", "folder": "folder"}.items():
        mutations.put(path, kind, tmp_path)
        faces_refused(folder, f"is a {name}")
        path.rmdir() if kind == "folder" else path.unlink()
    np.savez(real, face=np.ones((1, 4), np.float32))
    path.symlink_to(real)  # users may make a folder of links to their clips
    (folder / "._x.npz").write_text("macOS writes such a file next to each file")
    assert load_faces(folder).names == ("x",)


def test_unreadable_clips_are_refused_with_file_name_and_remedy(tmp_path):
    path, face = tmp_path / "a.npz", np.ones((1, 4))
    np.savez(path, face=face)
    late = bytearray(path.read_bytes())  # the list of entries claims to begin a byte later
    late[-6] += 1  # the last 6 bytes are where the list begins, and the length of a comment
    contents: list[tuple[Any, str]] = [
        (bytes(late), "): write it again"), (b"no archive", "): write it again"),
        (b"", "): write it again"), ({"arr_0": face}, "numpy.savez(file, face=array)"),
        ({"face": np.ones((1, 4), np.int32)}, "features.astype('float32')"),
        ({"face": np.array([{}], object)}, "contains Python objects"),
        ({"face": face, "face_quality": np.ones(2)}, "clip a, face: quality"),
    ]  # fmt: skip
    for content, words in contents:
        path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
        faces_refused(tmp_path, "a.npz", words)
    path.rename(tmp_path / "a.npy")  # a file .npy is refused, whatever it contains
    for given in (tmp_path, tmp_path / "a.npy"):
        faces_refused(given, "numpy.savez(")


def test_clips_that_together_exceed_the_memory_are_refused(tmp_path, monkeypatch):
    clip = np.ones((100, 4), np.float32)
    monkeypatch.setattr("vidjax.data.memory.memory_bytes", lambda: 3 * 10 * clip.nbytes)
    for number in range(11):  # a third of the memory has room for ten
        np.savez(tmp_path / f"{number:02}.npz", face=clip)
    faces_refused(tmp_path, "clip 10", "fewer clips at once")
    (tmp_path / "10.npz").unlink()
    assert len(load_faces(tmp_path).names) == 10


def test_unreadable_parquet_tables_are_refused_with_file_name_and_remedy(tmp_path, tables_here):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "clips.parquet"
    good = pyarrow.table({"clip": ["a"], "modality": ["face"], "features": [[1.0, 2.0, 3.0, 4.0]]})
    parquet.write_table(good, path, use_dictionary=False, compression="none")
    content = path.read_bytes()
    # In the footer, the first column begins at byte 4, stored as 2 * 4. It becomes byte -4.
    early = content.replace(b"\x26\x08", b"\x26\x07")
    # The page of the features begins with its type, its size twice, ... It becomes 1: without data.
    without_data = content.replace(b"\x15\x00\x15X\x15X", b"\x15\x02\x15X\x15X")
    words = ("clips.parquet' is not a parquet table", "write it again")
    for damaged in (b"", content[:-20] + content[-12:], content[:30] + content[50:], early):
        path.write_bytes(damaged)
        faces_refused(path, *words)
    path.write_bytes(without_data)
    faces_refused(path, *words, "features has 0 values, but the footer lists 4")


def test_checksums_and_encodings_of_other_programs_are_read(tmp_path, tables_here):
    """Spark writes a checksum of each page, and text with the encodings DELTA_..."""
    pytest.importorskip("pyarrow")
    clips = {f"clip{i}": {"face": np.full((2, 4), 1.5 + i)} for i in range(3)}
    for encoding in ("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"):
        options = {"use_dictionary": False, "column_encoding": {"clip": encoding}}
        path = clip_files.write_parquet(tmp_path / "clips.parquet", clips, **options)
        assert [*load_faces(path).names] == [*clips]
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    path = clip_files.write_parquet(path, clips, **options)
    assert [*load_faces(path).names] == [*clips]
    value = np.full(4, 2.5, np.float32).tobytes()
    path.write_bytes(path.read_bytes().replace(value, value[:-1] + b"\x41"))  # another number
    faces_refused(path, "clips.parquet' is not a parquet table, or is damaged", "checksum")


def test_frames_with_non_finite_values_are_skipped_and_counted(tmp_path):
    face, quality = np.ones((4, 4)), np.array([1, 1, 1, np.inf])
    face[1:3, 2] = np.nan, 1e39  # 1e39 is infinite in float32
    np.savez(tmp_path / "a.npz", face=face, face_quality=quality)
    np.savez(tmp_path / "b.npz", face=np.full((1, 4), np.inf))
    with pytest.warns(errors.VidjaxWarning) as caught:  # the category that commands show
        memory.load_clips(tmp_path, {"face": 4}, ())
    features, qualities = (str(warning.message) for warning in caught)
    assert "face: 3 of 5 frames are left out" in features and "1 clips lose all frames" in features
    assert "face: 1 of 5 frames have a quality that is not finite" in qualities


PAGE = Path(memory.__file__).parent / "README.md"
PROGRAMS = dict(re.findall(r"<!-- convert: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S))


@pytest.mark.parametrize("kind", ["h5py", "lmdb", "array"])
def test_programs_of_the_readme_convert_files_of_many_clips(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    faces = {f"clip {n}": np.full((n, 512), n, np.float32) for n in (1, 3)}
    if kind == "h5py":
        with pytest.importorskip("h5py").File("train.h5", "w") as file:
            file.update(faces)
    elif kind == "lmdb":
        store = pytest.importorskip("lmdb").open("train.lmdb")
        with store, store.begin(write=True) as writer:
            for name, face in faces.items():
                writer.put(name.encode(), face.tobytes())
    else:
        np.save("train.npy", [np.pad(x, [(0, 3 - len(x)), (0, 0)]) for x in faces.values()])
        Path("train.txt").write_text("\n".join(faces) + "\n")
    Path("features/train").mkdir(parents=True)
    Path("program.py").write_text(code := PROGRAMS[kind])
    runpy.run_path("program.py")
    assert sum(map(bool, code.splitlines())) <= 6
    read = clip_files.read_arrays(Path("features/train"))
    np.testing.assert_equal(read, {name: {"face": face} for name, face in faces.items()})


def test_frames_and_clips_have_equal_fingerprints_if_and_only_if_they_are_equal(tmp_path):
    frames = np.random.default_rng(0).normal(size=(600, 6)).astype(np.float16)
    frames[:2] = [[0.0], [-0.0]]
    prints = fingerprint_frames(frames)
    assert not prints[:2].any() and len({*prints.tolist()}) == 599
    for dtype in (np.float32, np.float64):
        assert np.array_equal(fingerprint_frames(frames.astype(dtype)), prints)
    rows_of = {"a": [5, 3], "b": [9], "c": [3, 5]}
    clips: Any = {name: {"face": frames[rows]} for name, rows in rows_of.items()}
    found: Any = sources.load({"val": clips}, cache_dir=tmp_path).split("val").fingerprints
    assert found[0] == found[2] != found[1]
