"""Clips to rank or to find: pipes, bombs and damaged files are named with a remedy."""

import pickle
import resource
import warnings

import numpy as np
import pytest

from tests.campaigns import mutations
from tests.helpers.seen import refused
from vidjax.data import labels, memory
from vidjax.utils import errors, files


def read_input(path):
    """Reads the clips of `--input`, within seconds."""
    with mutations.alarm(), warnings.catch_warnings(action="ignore"):
        return memory.load_clips(path, {"face": 4}, ("anna",))


def refused_input(path, *words):
    """Asserts that clips are refused in at most three lines that name the file and say words."""
    assert "pickle" not in refused(lambda: read_input(path), *words)


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
            refused(lambda: labels.load_label_table(tmp_path / name, {"val": ["x"]}), "is a pipe")  # noqa: B023


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no archive", "damaged or not an .npz file: write it again"),
        (b"", "damaged or not an .npz file: write it again"),
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
        refused_input(path, of_path + "damaged, or not a parquet table: write it again")
    columns = [pyarrow.array(column) for column in (*good.values(), ["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, [*good, "clip"]), path)
    refused_input(path, of_path + "two columns are named clip: keep one")
    long = pyarrow.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["x" * files.MB])
    many = {**dict.fromkeys(("clip", "modality"), long), "features": [[1.0]] * 4000}
    parquet.write_table(pyarrow.table(many), path)  # 4 GB, if each name were a separate text
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused_input(path, ", wanted face")
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
        "face: 2 of 4 frames are not read: their features are not finite; 1 clips lose all frames",
        "face: 1 of 4 frames have a quality that is not finite: 0 is used",
    ]
    (tmp_path / "official").mkdir()
    entries = [[n, (0.0, 0.0, 1.0, 1.0), 0.9, 50.0, row] for n, row in enumerate(face)]
    pickled = pickle.dumps({b"a.mp4": entries}, 2)
    (tmp_path / "official" / "face_val.pickle").write_bytes(pickled)
    with pytest.warns(errors.VidjaxWarning, match="1 of 3 frames are not read"):
        memory.load_clips(tmp_path / "official", {"face": 4}, ())
