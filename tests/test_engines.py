"""Conversion by several processes and threads: the files of one, to the byte."""

import os
import time

import numpy as np
import pytest

from tests.helpers import clip_files
from tests.helpers.cases import quick_first
from tests.helpers.clip_files import random_clip, write_learnable
from tests.helpers.datasets import record_digests
from vidjax.data import arrays, cache, iqiyi_vid, processes
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import STORED
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.packing import pack
from vidjax.data.records import conversion as convert_lib
from vidjax.data.records import shard_files
from vidjax.data.records.conversion import convert


def make_clips(seed, count):
    """Returns clip -> modality -> field -> frames, with gaps and values that are not finite."""
    rng = np.random.default_rng(seed)
    clips: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for number in range(count):
        fields = random_clip(rng, number % 5, 6)._asdict()
        for field, every, where in (("features", 7, 0), ("detection", 11, 0), ("quality", 6, -1)):
            if number % every == 2:
                fields[field][where:][:1] = np.nan
        clips[f"{seed}_{number:03d}"] = {"face": fields}
        if number % 3:
            voice = rng.normal(size=(1, 4)).astype(np.float32)
            clips[f"{seed}_{number:03d}"]["audio"] = {"features": voice}
    return clips


def write_some(folder):
    return clip_files.write_npz(folder, {"train": make_clips(0, 40), "val": make_clips(1, 31)})


def write_tables(folder):
    pytest.importorskip("pyarrow")
    folder.mkdir()
    for seed, split in enumerate(("train", "val")):
        clip_files.write_parquet(folder / f"{split}.parquet", make_clips(seed, 40))
    return folder


def write_gaps(folder):
    """Four parts of two clips: no frame of a face, no audio, no clip with a frame, and all."""
    rng = np.random.default_rng(0)
    frames = [(0, 2), (0, 1), (2, None), (3, None), (0, 0), (0, 0), (1, 1), (4, 2)]
    clips = {
        str(number): {
            name: rng.normal(size=(count, width)).astype(np.float32)
            for name, count, width in (("face", faces, 6), ("audio", audio, 4))
            if count is not None
        }
        for number, (faces, audio) in enumerate(frames)
    }
    return clip_files.write_npz(folder, {"train": clips})


def write_official(folder):
    folder.mkdir()
    write_learnable(folder, num_clips={"train": 40, "val": 20})
    return folder


def open_folder(folder, workers):
    return arrays.FeatureFolder(folder, workers=workers)


KINDS = {
    "npz": (write_some, open_folder),
    "pickles": (write_official, OfficialFiles),
    "parquet": (write_tables, open_folder),
    "gaps": (write_gaps, open_folder),
}


@pytest.mark.parametrize("kind", quick_first(KINDS))
def test_several_processes_write_the_files_of_one(kind, tmp_path, say):
    write, open_source = KINDS[kind]
    folder, one = write(tmp_path / "source"), tmp_path / "one"
    wanted = record_digests(convert(open_source(folder, 1), one, workers=1).folder)
    some = convert(open_source(folder, 2), tmp_path / "two", workers=2)
    assert record_digests(some.folder) == wanted and len(wanted) > 10
    if kind == "gaps":
        open_folder(folder, 2).read(tmp_path / "parts", "drop")
        assert len(list((tmp_path / "parts").glob("parts/*"))) == 4
        assert some.splits["train"].lengths["face"].tolist() == [0, 0, 2, 3, 0, 0, 1, 4]
    if kind == "npz":
        words = (folder, f"--cache_dir={one}")
        assert "1 or more" in say(*words, "--workers=0", code=2, program=arrays.main)
        out = say(*words, "--workers=1", program=arrays.main)
        assert "train: 40 clips, no ground truth" in out
        assert len(list(one.glob("arrays/*/manifest.json"))) == 1


def test_arrays_in_memory_are_the_same_files(tmp_path):
    """A source may keep frames in memory; other processes get them as files."""
    one = convert(arrays.FeatureDict({"train": make_clips(0, 20)}), tmp_path / "one", workers=1)

    class InMemory(arrays.FeatureDict):
        def read(self, scratch, non_finite):
            return {"train": pack(self._clips("train"), non_finite=non_finite)}

    some = convert(InMemory({"train": make_clips(0, 20)}), tmp_path / "some", workers=2)
    assert record_digests(some.folder) == record_digests(one.folder)


def test_a_folder_is_read_again_for_its_digest_where_a_file_has_changed(tmp_path, monkeypatch):
    folder = write_some(tmp_path / "source")
    clip = folder / "val" / "1_030.npz"

    class Changing(arrays.FeatureFolder):
        def read(self, scratch, non_finite):
            found, stat = super().read(scratch, non_finite), clip.stat()
            clip.write_bytes(clip.read_bytes()[:-1] + b"\1")
            os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            return found

    read, digest = [], cache._sha256_each
    monkeypatch.setattr(cache, "TICK_NS", 0)
    monkeypatch.setattr(cache, "_sha256_each", lambda some: read.append(len(some)) or digest(some))
    with pytest.raises(ValueError, match="changed during the conversion"):
        convert(Changing(folder, workers=1), tmp_path, workers=1)
    assert read == [40, 31, 31], "the files of train are as they were"
    arrays.FeatureFolder(folder).fingerprint()
    assert len(read) == 3, "another process need not read them either"


def test_a_digest_is_not_kept_of_a_file_that_may_change_in_the_same_tick(tmp_path, monkeypatch):
    """A clock of two seconds does not show a write after the times were taken."""
    path, digest, tick = tmp_path / "a.npz", cache._sha256_each, 10**8
    path.write_bytes(b"1")
    monkeypatch.setattr(cache, "TICK_NS", tick)
    changed = time.time_ns()
    monkeypatch.setattr(cache, "_read_file_state", lambda one: (1, 1, changed, changed))

    def slow(some):
        time.sleep(2 * tick / 10**9)  # other files take long
        return digest(some)

    monkeypatch.setattr(cache, "_sha256_each", slow)
    first = cache.digest_files([path], tmp_path / "cache")
    path.write_bytes(b"2")
    assert cache.digest_files([path], tmp_path / "cache") != first


def outcome(folder, workers, scratch):
    """Returns the summaries of what is read, or the error."""
    try:
        read = arrays.FeatureFolder(folder, workers=workers).read(scratch, "drop")
    except ValueError as error:
        return str(error)
    return {name: flat.summary() for name, flat in read["train"].items()}


@pytest.mark.parametrize(("name", "features", "words"), quick_first([
    ("b", np.zeros((2, 7), np.float32), "b, face"),  # another width
    ("a.mp4", np.zeros((2, 6), np.float32), "twice"),
    ("b", b"PK", "b.npz"),  # damaged
    ("b", None, ""),  # no array: a clip all the same
]))  # fmt: skip
def test_where_only_one_process_can_judge_several_end_as_it_does(name, features, words, tmp_path):
    (tmp_path / "train").mkdir()
    np.savez(tmp_path / "train" / "a.npz", face=np.ones((2, 6), np.float32))
    path = tmp_path / "train" / f"{name}.npz"
    np.savez(path, **({} if features is None else {"face": features}))
    if isinstance(features, bytes):
        path.write_bytes(features)
    one, some = (outcome(tmp_path, n, tmp_path / f"scratch{n}") for n in (1, 2))
    assert some == one and words in str(one)
    assert (features is None) == (not isinstance(one, str))


def test_a_failure_ends_the_other_processes(tmp_path):
    def run(children, item):
        if item == "fails":
            time.sleep(0.3)
            raise ValueError("a file is damaged")
        children.run("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)")

    began = time.monotonic()
    with pytest.raises(ValueError, match="a file is damaged"):
        processes.map_children(run, ["waits", "fails", "begins late"], 2)
    assert time.monotonic() - began < 10


def test_pickles_are_read_at_once_as_far_as_memory_lasts(monkeypatch):
    monkeypatch.setattr(iqiyi_vid, "num_cores", lambda: 8)
    monkeypatch.setattr(iqiyi_vid, "memory_bytes", lambda: 100)
    for sizes, wanted in (([1] * 9, 8), ([20, 5, 1], 2), ([10] * 5, 2), ([90], 1)):
        assert iqiyi_vid._choose_num_readers(sizes) == wanted


@pytest.mark.slow
def test_checksums_are_those_of_tensorflow(tmp_path):
    from vidjax.data.records.streaming import tf

    rng = np.random.default_rng(0)
    messages = [rng.bytes(size) for size in (0, 1, 4, 8, 5000)]
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for message in messages:
            writer.write(message)
    ours = b"".join(map(shard_files.make_record, messages))
    assert ours == (tmp_path / "theirs").read_bytes()


@pytest.mark.slow
def test_a_record_is_what_tfds_makes_of_a_clip():
    from vidjax.data.records.codec import PackedFrames, tfds
    from vidjax.data.records.streaming import tf

    modalities = {"face": Modality(5, "float16")}
    for number, dtype in enumerate(("float16", "float32", "float64", "int8")):
        modalities[f"a-b_{number}"] = Modality(300, dtype)
    packed = {name: PackedFrames(dim=one.dim, dtype=one.dtype) for name, one in modalities.items()}
    parts = {
        "clip": tfds.features.Text(),
        "clip_index": tfds.features.Scalar(dtype=np.int64),
        "frames": tfds.features.FeaturesDict(packed),
    }
    features = tfds.features.FeaturesDict(parts)
    rng = np.random.default_rng(0)
    for index, count in ((0, 0), (1, 1), (127, 3), (128, 40), (2**31 - 1, 300)):
        frames = {}
        for name, modality in modalities.items():
            clip = random_clip(rng, count, *modality)._asdict()
            frames[name] = {field: clip[field] for field in STORED}
        example = {"clip": f"clip é {index}", "clip_index": index, "frames": frames}
        theirs = tf.train.Example.FromString(features.serialize_example(example))
        ours = convert_lib._encode_clip(example["clip"], index, frames, modalities)
        assert ours == theirs.SerializeToString(deterministic=True)
