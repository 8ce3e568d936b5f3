"""Features of one's own: the records that official files would become, or why not."""

import functools
import pickle
import resource
import sys
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from tests.campaigns import mutations
from tests.helpers import clip_files, seen
from tests.helpers.batches import eval_batches, labelled
from tests.helpers.datasets import load_dataset, prepare
from vidjax.data import arrays, iqiyi_vid, labels, memory, sources
from vidjax.data.clip_files import write_npz
from vidjax.data.records.conversion import convert
from vidjax.utils import errors, files

DIM = 6
SCORES = ("quality", "detection", "number")
LABELS = {"train_01": 3, "train_02": "7", "train_03": 3, "val_03": 7, "val_01": None}
TWO = {"features": np.zeros((2, DIM), np.float32)}
ONE = {"f": [1.0]}
LONG = {name: {"f": np.full((64, 3), n + 1.0)} for n, name in enumerate("abc")}  # not [3, 64]?


def make_splits():
    """Returns 12 train and 8 val clips, every fourth without a frame."""
    rng, splits = np.random.default_rng(0), {"train": {}, "val": {}}
    for split, i in [("train", i) for i in range(12)] + [("val", i) for i in range(8)]:
        clip = clip_files.random_clip(rng, i % 4, DIM, "float32")
        splits[split][f"{split}_{i:02d}"] = {"face": clip._asdict()}
    return splits


def shards(records):
    return {
        (split, shard.path.name.split("-", 1)[1]): shard.sha256
        for split, facts in records.splits.items()
        for shard in facts.shards
    }


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def refused(cache):
    """Asserts that clips are refused in at most three lines that contain some words."""

    def check(source, *words, labels=None, **options):
        options = {"cache_dir": cache, **options}
        return seen.refused(lambda: sources.load(source, labels, **options), *words)

    return check


@pytest.fixture(scope="module")
def official_arrays(official_dir):
    """Official files as arrays: split -> clip -> modality -> fields."""
    splits = {}
    columns = ("number", "box", "detection", "quality")
    for (modality, split), path in iqiyi_vid.find_pickles(official_dir).items():
        for name, entries in pickle.loads(path.read_bytes()).items():
            entries = [[entries]] if modality == "audio" else entries
            features = np.array([entry[-1] for entry in entries], "f2")
            rows = zip(*[entry[:-1] for entry in entries], strict=True)
            fields: dict[str, Any] = dict(zip(columns, rows, strict=False))
            fields["features"] = features.reshape(len(entries), clip_files.WIDTHS[modality])
            fields["number"] = [int(number) for number in fields.get("number", [0] * len(entries))]
            fields.setdefault("quality", [0] * len(entries))  # as pickles without one have it
            splits.setdefault(split, {}).setdefault(name.decode(), {})[modality] = fields
    return splits


def test_arrays_and_official_files_convert_to_the_same_records(
    cache, official_dir, official_arrays
):
    records = prepare(official_dir, cache)
    wanted, labels = labelled(records, official_dir), {}
    for name in ("train", "val"):
        split = wanted.split(name)
        shown = zip(split.clips, split.labels, strict=True)
        labels |= {clip: wanted.identities[label - 1] for clip, label in shown if label}
    source = arrays.FeatureDict(official_arrays, labels)
    assert shards(convert(source, cache)) == shards(records)
    data = sources.load(official_arrays, labels, cache_dir=cache)
    assert (data.identities, data.modalities) == (wanted.identities, wanted.modalities)
    assert data.report["data"]["digest"] == wanted.report["data"]["digest"]
    for split in official_arrays:
        left, right = data.split(split), wanted.split(split)
        assert left.clips == right.clips and left.labelled == right.labelled
        np.testing.assert_array_equal(left.labels, right.labels)
        np.testing.assert_array_equal(left.positives, right.positives)


@pytest.mark.parametrize("kind", ["npz", "npz of several clips", "a list of one length"])
def test_npz_and_parquet_folders_convert_to_the_records_of_arrays(tmp_path, cache, kind):
    splits, folder = make_splits(), tmp_path / "own"
    if kind == "npz":
        clip_files.write_npz(folder, splits)
    for split, clips in splits.items() if kind == "npz of several clips" else ():
        (folder / split).mkdir(parents=True)
        prefixed = {
            name: {"face" if f == "features" else f"face_{f}": x for f, x in clip["face"].items()}
            for name, clip in clips.items()
        }
        write_npz(folder / split / "all.npz", prefixed)
    for split, clips in splits.items() if kind.startswith("a list") else ():
        pytest.importorskip("pyarrow")
        folder.mkdir(exist_ok=True)
        path = folder / f"{split}.parquet"
        clip_files.write_parquet(path, clips, fields=SCORES, width=DIM, row_group_size=7)
        for name in [name for name, clip in clips.items() if not len(clip["face"]["features"])]:
            del clips[name]  # a clip without a row is not in a table
        for clip in clips.values():
            del clip["face"]["box"]
    source = arrays.FeatureFolder(folder)
    records = convert(source, cache)
    assert source.read_labels(records.clips) == {}
    assert shards(records) == shards(convert(arrays.FeatureDict(splits), cache))
    counts = records.splits["train"].lengths["face"].tolist()
    assert counts == ([0, 1, 2, 3] if "npz" in kind else [1, 2, 3]) * 3


def test_labels_are_read_from_a_dict_a_table_or_official_text(tmp_path, cache):
    splits = make_splits()
    folder = clip_files.write_npz(tmp_path / "own", splits)
    listed = {name: identity for name, identity in LABELS.items() if identity}
    table = clip_files.write_labels(tmp_path / "any.csv", listed)
    text = tmp_path / "any_gt.txt"
    text.write_text("".join(f"{k}.mp4 {v}\n" for k, v in listed.items()))
    datasets = [
        sources.load(source, labels, cache_dir=cache)
        for source, labels in ((splits, LABELS), (splits, table), (folder, text))
    ]
    table.rename(folder / "labels.csv")
    datasets.append(load_dataset("arrays", directory=folder, cache_dir=cache))
    for data in datasets:
        assert data.identities == ("3", "7")
        assert data.split("train").labels.tolist() == [0, 1, 2, 1, *[0] * 8]
        assert data.split("val").labels.tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
        assert data.with_identities(("7", "3")).split("val").labels[3] == 1
    train = {name: identity for name, identity in LABELS.items() if "train" in name}
    ranked = sources.load(splits, train, cache_dir=cache)
    assert ranked.split("train").labelled and not ranked.split("val").labelled
    labels = {"train_01": 3, "train_02": float("nan"), "val_03": 3}
    with pytest.warns(UserWarning, match=r"train_02: 1 clips have an empty identity.*\n.*None"):
        sources.load(splits, labels, cache_dir=cache)
    table = clip_files.write_labels(tmp_path / "empty.csv", labels | {"train_02": ""})
    with pytest.warns(UserWarning, match=r"empty.csv: line 3: clip train_02: 1 clips"):
        sources.load(splits, table, cache_dir=cache)


def test_frames_are_sorted_by_time_and_lists_are_read_as_arrays(cache):
    frames = {"features": [[1.0, 2.0], [3.0, 4.0]], "number": [7, 5], "quality": [10, 20]}
    data = sources.load({"val": {"a.mp4": {"face": frames}}}, cache_dir=cache)
    (batch,) = eval_batches(data, split="val", modalities=("face",), rows=1)
    face = batch.frames["face"]
    assert face.number[0, :2].tolist() == [5, 7] and face.quality[0, :2].tolist() == [20, 10]
    assert face.features[0, :2].tolist() == [[3, 4], [1, 2]]
    # Features alone: their norm is the quality.
    data = sources.load({"val": {"a": {"face": frames["features"]}}}, cache_dir=cache)
    (batch,) = eval_batches(data, split="val", modalities=("face",), rows=1)
    face = batch.frames["face"]
    assert face.number[0, :2].tolist() == [0, 1] and (face.detection == face.mask).all()
    np.testing.assert_allclose(face.quality[0, :2], [5**0.5, 5], rtol=1e-6)


def test_long_clips_in_memory_keep_their_best_frames(cache):
    rng = np.random.default_rng(0)
    clips = {
        name: {"face": clip_files.random_clip(rng, length, DIM, "float32")._asdict()}
        for name, length in (("long", 700), ("short", 3))
    }
    data = sources.load({"val": clips}, cache_dir=cache)
    own = memory.MemoryClips.from_dict(clips, {"face": DIM}, ())
    options = {"split": "val", "modalities": ("face",), "rows": 2}
    batches = [list(eval_batches(dataset, **options)) for dataset in (own, data)]
    for each in batches:
        each.sort(key=lambda batch: batch.clip_index[0])
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert batches[0][0].frames["face"].mask.sum() == 512


def test_changed_arrays_are_converted_again_but_equal_arrays_are_not(tmp_path, cache):
    splits = make_splits()
    folder = clip_files.write_npz(tmp_path / "own", splits)

    def folders():
        sources = (arrays.FeatureDict(splits), arrays.FeatureFolder(folder))
        return [convert(source, cache).folder for source in sources]

    first = folders()
    assert folders() == first
    splits["val"]["val_03"]["face"]["quality"][0] += 1
    frames = splits["val"]["val_03"]["face"]
    np.savez(folder / "val" / "val_03.npz", face=frames["features"], face_quality=frames["quality"])
    assert not {*first} & {*folders()}


BAD = (  # what val contains first, and words of the error
    (np.zeros((2, DIM + 1)), "features are 7 wide, but 6 wide in other clips: "),
    ([[1.0, 2.0], [3.0]], "rows have different lengths"),
    (np.array([None, "x"], object), "not [2] of object"),
    (np.zeros((2, DIM), np.float16), "features are float16, but float32 in other clips"),
    (np.zeros((1, 2, DIM)), "at most 2 axes"),
    (np.zeros((2, 0)), "shape [2, 0]"),
    (TWO | {"box": [1.0, 2.0]}, "box has shape [2]: give [2, 4]"),
    (TWO | {"number": [0.5, 1.0]}, "number 0.5"),
    ({"quality": [1.0]}, "no features"),
    ({"feature": np.zeros((1, DIM))}, "the key 'feature' is unknown"),
)


def test_error_names_the_split_and_clip_of_bad_features(cache, refused):
    for value, words in BAD:
        splits = make_splits()
        splits["val"] = {"odd": {"face": value}} | splits["val"]
        message = refused(splits, "val: clip odd, face", words)
        assert len(message.splitlines()) == 1
    for source, *words in (
        ({"clip": ONE}, "'clip' is not the name of a split", "{'train': {clip:"),
        ({"train": {"a": np.zeros((1, 2))}}, "train: clip a is of type ndarray"),
        ({"train": {"a": {"fa ce": np.zeros((1, 2))}}}, "clip a", "modality 'fa ce'"),
        ({"train": {"a": ONE, "a.mp4": ONE}}, "train: clip a comes twice"),
        ({"train": {7: ONE}}, "clip name 7 is of type int"),
        (
            {"train": {"a": {"F": [1.0], "f": [1.0]}}},
            "clip a",
            "'f' differs only in upper and lower",
        ),
        ({"train": {"a": ONE}, "val": {"a": ONE}}, "in two splits", "a (train and val)"),
        ({"train": {"a": ONE}, "val": {"b": {"f": [1.0, 2.0]}}}, "features have width 1 in train"),
        ({"train": LONG | {"d": {"f": np.ones((64, 5))}}}, "clip d, f", "3] instead of [64, 5]"),
        ({"train": {}}, "no clip has a frame"),
        ({"train": {"a": ONE}, "val": {}}, "split 'val' has no clips"),
    ):
        refused(source, *words)
    assert not list(cache.rglob("*.partial"))
    with pytest.warns(UserWarning, match=r"f: every clip has 64 frames of 3 numbers.*\n.*\.T"):
        sources.load({"train": LONG}, cache_dir=cache)


def test_error_of_bad_labels_names_the_line_or_clip(tmp_path, refused):
    path = tmp_path / "labels.csv"
    for given, *words in (
        ({"nobody": 1}, "none of its 1 clips", "nobody"),
        ({**LABELS, "nobody": 1}, "1 of 5 clips", "nobody"),
        ({"train_01": 1.5}, "clip train_01", "float", "str()"),
        ({"train_01": -1}, "clip train_01", "identity -1"),
        ({"train_01": 1, "train_01.mp4": 2}, "clip train_01 has the labels 1 and 2"),
        (b"name,identity\na,1\n", "line 1", "clip,identity", "name,identity"),
        (b"clip,identity\ntrain_01\n", "line 2", "lacks a value"),
        (b"clip,identity\ntrain_01,Smith, John\n", "line 2", "more values", "quotes"),
        (b'clip,identity\n"train\n1",1\n', "line 3", "rename it"),
        (b"clip,identity\n\xff,1\n", "UTF-8"),
        (tmp_path / "none.csv", "none.csv", "does not exist"),
    ):
        if isinstance(given, bytes):
            path.write_bytes(given)
            words.append(str(path))
        refused(make_splits(), *words, labels=path if isinstance(given, bytes) else given)


def test_folder_with_missing_damaged_or_ambiguous_files_is_refused(tmp_path, refused):
    folder = tmp_path / "own"
    refused(folder, "does not exist")
    folder.mkdir()
    refused(folder, "contains no features", "SPLIT/CLIP.npz")
    (folder / "train").mkdir()
    refused(folder, "train' contains no CLIP.npz")
    path = folder / "train" / "one.npz"
    np.savez(path, face=np.zeros((1, 2)), face_quality=np.zeros(2))
    refused(folder, str(path), "clip one, face: quality")
    path.write_bytes(path.read_bytes()[:-40])
    refused(folder, str(path))
    with path.open("wb") as file:
        np.save(file, np.ones((1, 2)))
    refused(folder, str(path), "use numpy.savez")
    np.savez(path, face=np.ones((1, 2)))
    (folder / "train" / "notes.txt").write_text("mine")
    refused(folder, "notes.txt", "may contain only .npz files")
    (folder / "train" / "notes.txt").unlink()
    (folder / "train.parquet").write_bytes(b"")
    refused(folder, "train.parquet and a folder train: remove one")
    (folder / "train.parquet").unlink()
    clip_files.write_truth(folder, "train", {"one": "1"})
    clip_files.write_labels(folder / "labels.csv", {"one": 1})
    refused(folder, "labels.csv and train_gt.txt: remove one")
    for part in ("train-00000", "train-00001"):
        (tmp_path / f"{part}-of-00002.parquet").touch()
    refused(tmp_path, "train-00000", "a split is one table", "join the tables")
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "train.parquet")
    refused(tmp_path, "train-00001", "would be ignored", "train.parquet")


def test_clips_of_npz_files_and_in_memory_that_do_not_fit_each_other_are_refused(tmp_path):
    path, features = tmp_path / "all.npz", np.ones((3, 2), np.float32)
    load = functools.partial(memory.load_clips, tmp_path, {"face": 2}, ())
    for length in (None, [1, 1], [1, 2, 1], [4, -1], [1.0, 2.0], [[1, 2]], [1, 2**40]):
        more: Any = {} if length is None else {"face_length": length}
        np.savez(path, clips=["a", "b"], face=features, **more)
        seen.refused(load, str(path), "'face_length' does not match the clips and frames")
    np.savez(path, clips=["a", "a"], face=features, face_length=[1, 2])
    seen.refused(load, "clip a comes twice")
    np.savez(path, clips=features)  # a modality of this name
    assert memory.load_clips(tmp_path, {"clips": 2}, ()).split("clips").clips == ("all",)
    np.savez(path, face=features)
    (tmp_path / "labels.csv").write_text("clip,identity\nall,1\n")
    assert load().split("all").clips == ("all",)
    for other in ("val/d.npz", "b.NPZ", "c.npy", "d.parquet"):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / other).touch()
        seen.refused(load, "because the folder also contains CLIP.npz")
        (tmp_path / other).unlink()
    good, wide = {"face": np.ones((1, 24), np.float32)}, {"a": {"face": np.zeros((2, 23))}}
    for clips, words in (
        ([good], "of type list"),
        (
            {"a": {"fcae": [1.0]}},
            "reads face, head: add one of them, or rename the modality to 'face'",
        ),
        ({"b": good, "c": good, **wide}, "23 wide, but 24 wide in other clips"),
        ({"a": good, "a.mp4": good}, "clip a comes twice"),
    ):
        given: Any = clips
        seen.refused(
            lambda x=given: memory.MemoryClips.from_dict(x, {"face": 24, "head": 8}, ()), words
        )


def test_bad_parquet_table_of_frames_is_refused(tmp_path, refused, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    good = {"clip": ["a", "a"], "modality": ["f", "f"], "features": [[1.0, 2.0], [3.0, 4.0]]}
    for change, words in (
        ({"features": [[1.0, 2.0], [3.0]]}, ("clip a, f", "width 1 in row 2, but width 2 in ro")),
        ({"features": [1.0, 2.0]}, ("column features is of type double",)),
        ({"features": [[1.0, None], [1.0, 1.0]]}, ("null",)),
        ({"clip": [["a"], ["b"]]}, ("column clip is of type list", "write text")),
        ({"clip": ["a", "a.mp4"]}, ("with and without .mp4",)),
        ({"quality": ["x", "y"]}, ("column quality is of type string", "write numbers")),
        ({"qualty": [1.0, 2.0]}, ("qualty", "'quality'")),
    ):
        parquet.write_table(pyarrow.table(good | change), path)
        refused(tmp_path, str(path), *words)
    parquet.write_table(pyarrow.table({"clip": ["a"], "face": [[[1.0, 2.0]]]}), path)
    refused(tmp_path, str(path), "no column modality", "a row for each frame")
    path.write_bytes(path.read_bytes()[:-30])
    refused(tmp_path, str(path), "damaged")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path, str(path), "vidjax[parquet]")


def read_input(path):
    with mutations.alarm(), warnings.catch_warnings(action="ignore"):
        return memory.load_clips(path, {"face": 4}, ("anna",))


def refused_input(path, *words):
    """Asserts that clips are refused in at most three lines that name the file and say words."""
    assert "pickle" not in seen.refused(lambda: read_input(path), *words)


def test_only_regular_files_are_read_as_clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    path = folder / "x.npz"
    for kind in ("pipe", "zero", "folder"):
        mutations.put(path, kind, tmp_path)
        refused_input(folder, f"is a {'device' if kind == 'zero' else kind}")
        path.rmdir() if kind == "folder" else path.unlink()
    np.savez(tmp_path / "real.npz", face=np.ones((1, 4), np.float32))
    path.symlink_to(tmp_path / "real.npz")  # their own folders may be made of links
    (folder / "._x.npz").write_text("what other systems leave beside a file")
    assert read_input(folder).names == ("x",)
    for name in ("labels.csv", "val_gt.txt"):
        mutations.put(tmp_path / name, "pipe", tmp_path)
        with mutations.alarm():
            load = functools.partial(labels.load_label_table, tmp_path / name, {"val": ["x"]})
            seen.refused(load, "is a pipe")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no archive", "): write it again"),
        (b"", "): write it again"),
        ({"arr_0": np.ones((1, 4))}, "numpy.savez(file, face=array)"),
        ({"face": np.ones((1, 4), np.int32)}, "features.astype('float32')"),
        ({"face": np.array([{}], object)}, "contains Python objects"),
    ],
)
def test_unreadable_clips_are_refused_with_file_name_and_remedy(tmp_path, content, words):
    path = tmp_path / "a.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    refused_input(tmp_path, "a.npz", words)
    path.rename(tmp_path / "a.npy")
    refused_input(tmp_path, "numpy.savez('CLIP.npz', face=array)")
    refused_input(tmp_path / "a.npy", "numpy.savez(")


def test_clips_that_together_exceed_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vidjax.data.memory.memory_bytes", lambda: 3 * 16_000)
    for number in range(11):  # a third of the memory holds 10 clips
        np.savez(tmp_path / f"{number:02}.npz", face=np.ones((100, 4), np.float32))
    refused_input(tmp_path, "clip 10", "fewer clips at once")
    (tmp_path / "10.npz").unlink()
    assert len(read_input(tmp_path).names) == 10


def test_unreadable_parquet_tables_are_refused_with_file_name_and_remedy(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, of_path = tmp_path / "clips.parquet", "clips.parquet: "
    good = {"clip": ["a"], "modality": ["face"], "features": [[1.0, 2.0, 3.0, 4.0]]}
    parquet.write_table(pyarrow.table(good), path)
    assert read_input(path).names == ("a",)
    content = path.read_bytes()
    for damaged in (b"", b"no table", content[:-20] + content[-12:], content[:30] + content[50:]):
        path.write_bytes(damaged)
        refused_input(
            path, "clips.parquet' is not a parquet table, or is damaged (", "write it again"
        )
    columns = [pyarrow.array(column) for column in (*good.values(), ["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, [*good, "clip"]), path)
    refused_input(path, of_path + "two columns are named clip: delete one")
    long = pyarrow.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["x" * files.MB])
    many = {**dict.fromkeys(("clip", "modality"), long), "features": [[1.0]] * 4000}
    parquet.write_table(pyarrow.table(many), path)  # 4 GB, if each name were a separate text
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused_input(path, "the run reads face")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    monkeypatch.setattr("vidjax.data.parquet.memory_bytes", lambda: 3 * files.MB)
    flat = pyarrow.array(np.zeros(files.MB, np.float32))
    features = pyarrow.FixedSizeListArray.from_arrays(flat, files.MB)
    parquet.write_table(pyarrow.table({**good, "features": features}), path)
    assert path.stat().st_size < 64 << 10
    refused_input(path, of_path + "its columns take 4,", "a third of the memory")


def test_frames_with_non_finite_values_are_skipped_and_counted(tmp_path):
    face, quality = np.ones((3, 4), np.float32), np.array([1, 1, np.inf], np.float32)
    face[1, 2] = np.nan
    np.savez(tmp_path / "a.npz", face=face, face_quality=quality)
    np.savez(tmp_path / "b.npz", face=np.full((1, 4), np.inf, np.float32))
    with pytest.warns(errors.VidjaxWarning) as caught:  # commands show only this category
        memory.load_clips(tmp_path, {"face": 4}, ())
    assert [str(warning.message) for warning in caught] == [
        "face: 2 of 4 frames are left out, because their features are not finite\n"
        "1 clips lose all frames",
        "face: 1 of 4 frames have a quality that is not finite: it is replaced by 0",
    ]
    (tmp_path / "official").mkdir()
    entries = [[n, (0.0, 0.0, 1.0, 1.0), 0.9, 50.0, row] for n, row in enumerate(face)]
    pickled = pickle.dumps({b"a.mp4": entries}, 2)
    (tmp_path / "official" / "face_val.pickle").write_bytes(pickled)
    with pytest.warns(errors.VidjaxWarning, match="1 of 3 frames are left out"):
        memory.load_clips(tmp_path / "official", {"face": 4}, ())
