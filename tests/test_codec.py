"""Records: TFDS, batches and the reader without TensorFlow show what was written."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.clip_files import Clip, random_clip, write_pickle
from tests.helpers.datasets import prepare
from vidjax.batch import BATCHED
from vidjax.data.clips import Modality, make_batch_plan
from vidjax.data.frame_fields import FRAME_FIELDS, STORED
from vidjax.data.records.codec import PackedFrames, tfds
from vidjax.data.records.dataset import Dataset
from vidjax.data.records.manifest import Records
from vidjax.data.records.shard_files import ShardReader, describe_shard
from vidjax.data.records.tensors import decode_batch, parse_batch, tf, windows
from vidjax.errors import UserError

ROOT = Path(__file__).parent.parent
MODALITIES = {
    "double": Modality(3, "float64"),
    "face": Modality(6, "float16"),
    "single": Modality(70, "float32"),
    "whole": Modality(5, "int8"),
}
LONGEST = 300
Clips = dict[str, dict[str, Clip]]


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Modality -> clip -> frames, 0 to 300 of them; all but faces lack some clips, and scores."""
    rng = np.random.default_rng(0)
    found: Clips = {}
    for number, (name, kind) in enumerate(MODALITIES.items()):
        lengths = rng.permutation([0, 1, 2, LONGEST, *rng.integers(0, 40, 36)]).tolist()
        some = {f"c{i:02d}": random_clip(rng, n, *kind) for i, n in enumerate(lengths)}
        if name != "face":
            some = {
                clip: one._replace(quality=0 * one.quality, detection=np.ones_like(one.detection))
                for clip, one in some.items()
                if int(clip[1:]) % (2 + number)
            }
        found[name] = some
    return found


@pytest.fixture(scope="module")
def records(clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Records:
    source = tmp_path_factory.mktemp("source")
    for name, some in clips.items():
        write_pickle(source, name, "train", some)
    found = prepare(source, tmp_path_factory.mktemp("cache"))
    assert found.modalities == MODALITIES and len(found.splits["train"].shards) == 8
    return found


def raw(records: Records) -> list[bytes]:
    """Returns the records of all shards as TensorFlow reads them."""
    paths = [str(shard.path) for shard in records.splits["train"].shards]
    return [bytes(record.numpy()) for record in tf.data.TFRecordDataset(paths)]


def test_tfds_shows_what_was_packed_and_the_fast_path_equals_it(
    clips: Clips, records: Records
) -> None:
    facts, in_order = records.splits["train"], tfds.ReadConfig(interleave_cycle_length=1)
    builder = tfds.builder_from_directory(records.splits["train"].shards[0].path.parent)
    shown = list(tfds.as_numpy(builder.as_dataset(split="train", read_config=in_order)))
    assert facts.clips == tuple(sorted(clips["face"]))
    assert [e["clip_index"] for e in shown] == facts.order.tolist()
    assert [e["clip"].decode() for e in shown] == [facts.clips[i] for i in facts.order]
    messages = raw(records)
    clip_index, fields = parse_batch(tf.constant([*messages, b""]), tuple(MODALITIES))
    assert clip_index.numpy().tolist() == [*facts.order, 0]
    for name, modality in MODALITIES.items():
        fast = decode_batch(fields[name], modality, LONGEST, best=False)
        fast = {field: value.numpy() for field, value in fast.items()}
        features = fast["features"].view(modality.dtype)
        fast["features"] = features.reshape(len(messages) + 1, LONGEST, modality.dim)
        assert not fast["mask"][-1].any()
        nothing = random_clip(np.random.default_rng(0), 0, *modality)
        for row, example in enumerate(shown):
            assert set(example) == {"clip", "clip_index", "frames"}  # no label
            clip = clips[name].get(example["clip"].decode(), nothing)
            length = len(clip.features)
            assert fast["mask"][row].sum() == length == facts.lengths[name][example["clip_index"]]
            for field in STORED:
                packed = example["frames"][name][field]
                assert packed.dtype == getattr(clip, field).dtype
                np.testing.assert_array_equal(packed, getattr(clip, field))
                if field in fast:
                    np.testing.assert_array_equal(fast[field][row, :length], packed)
                    assert not fast[field][row, length:].any()
        assert set(fast) == {*STORED, "mask"} - {"box"}


def test_every_value_without_tensorflow_is_that_of_the_message(records: Records) -> None:
    scalars, messages = ("quality", "detection", "number"), iter(raw(records))
    for shard in records.splits["train"].shards:
        reader = ShardReader(shard)
        for row in range(shard.records):
            values = tf.train.Example.FromString(next(messages)).features.feature
            assert [reader.clip_index[row]] == list(values["clip_index"].int64_list.value)
            for name, modality in records.modalities.items():
                found = reader.frames(name, modality, ("features", *scalars), slice(row, row + 1))
                assert found["features"].dtype == modality.dtype
                assert len(found["number"]) == reader.lengths(name)[row]
                for field, array in found.items():
                    (wanted,) = values[f"frames/{name}/{field}"].bytes_list.value
                    assert array.tobytes() == wanted
                for field in scalars:
                    assert found[field].dtype == FRAME_FIELDS[field].dtype
        for name, modality in records.modalities.items():
            rows = [slice(row, row + 1) for row in range(5)]
            together, *alone = (
                reader.frames(name, modality, ("features", "number"), some)
                for some in (slice(0, 5), *rows)
            )
            for field, array in together.items():
                np.testing.assert_array_equal(array, np.concatenate([one[field] for one in alone]))


def test_packed_frames_refuse_what_they_cannot_hold_exactly() -> None:
    packed = PackedFrames(dim=4, dtype="float16")
    clip = random_clip(np.random.default_rng(0), 3, 4)._asdict()
    wide = np.repeat(clip["features"].astype(">f2"), 2, axis=1)
    encoded = packed.encode_example({**clip, "features": wide[:, ::2]})["features"]
    assert encoded == clip["features"].tobytes()
    with pytest.raises(ValueError, match=r"features: got shape \(3, 5\), wanted \(3, 4\)"):
        packed.encode_example({**clip, "features": np.zeros((3, 5), np.float16)})
    with pytest.raises(ValueError, match=r"number: got shape \(2,\), wanted \(3,\)"):
        packed.encode_example({**clip, "number": clip["number"][:2]})
    with pytest.raises(ValueError, match="float32 does not fit float16"):
        packed.encode_example({**clip, "features": clip["features"].astype(np.float32)})


def test_a_window_is_the_frames_from_its_first_one_on() -> None:
    frames = [np.arange(length, dtype=np.int32) for length in (10, 10, 7, 3, 0)]
    strings = tf.constant([one.tobytes() for one in frames])
    first = np.array([0, 3, 0, 0, 0], np.int32)
    cut = windows(dict.fromkeys(BATCHED, strings), Modality(2, "int16"), 7, tf.constant(first))
    for strings in cut.values():
        for shown, at, one in zip(strings.numpy(), first, frames, strict=True):
            np.testing.assert_array_equal(np.frombuffer(shown, np.int32), one[at : at + 7])


def example(**fields: list[Any]) -> bytes:
    features = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if isinstance(values[0], bytes)
        else tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        for name, values in fields.items()
    }
    message = tf.train.Example(features=tf.train.Features(feature=features))
    return message.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "other",
    [
        example(clip_index=[1], other=[b"x"]),
        example(clip_index=[1, 2], key=[b"x"]),
        example(clip_index=[1]),
        example(clip_index=[1], key=[b"x", b"y"]),
        example(clip_index=[b"x"], key=[b"x"]),
        b"",
        b"\n\x03abc",
        b"\n" + b"\xff" * 30,
    ],
)
def test_records_that_nobody_here_wrote_are_refused(tmp_path: Path, other: bytes) -> None:
    path = tmp_path / "kind" / "folder" / "1.0" / "a.tfrecord"
    path.parent.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example(clip_index=[0], key=[b"abc"]))
        writer.write(example(clip_index=[300], key=[b"abcd" * 99]))
    assert ShardReader(describe_shard(path, 2)).clip_index.tolist() == [0, 300]
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example(clip_index=[0], key=[b"abc"]))
        writer.write(other)
    with pytest.raises(ValueError, match=r"records of another layout\ndelete .*kind"):
        ShardReader(describe_shard(path, 2))


@pytest.mark.slow
def test_a_run_that_fits_the_memory_needs_no_tensorflow(tmp_path: Path, official_dir: Path) -> None:
    """Conversion, training, evaluation and report; on records that are there no TFDS either."""
    words = ["--config=configs/knn.py:iqiyi_vid,face", f"--config.data.dir={official_dir}"]
    env = {**os.environ, "VIDJAX_CACHE": str(tmp_path / "cache")}
    code = (
        "import sys\nfrom vidjax.main import main\nunread, *words = sys.argv[1:]\n"
        "assert main(words) == 0\nassert not {*unread.split(',')} & {*sys.modules}"
    )
    both = "tensorflow,tensorflow_datasets"
    for folder, unread, more in (
        ("first", "tensorflow", words),
        ("second", both, words),
        ("first", both, ["--mode=evaluate"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, unread, *more, f"--workdir={tmp_path / folder}"],
            cwd=ROOT, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    first, second = (tmp_path / name / "ranking.txt" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_streaming_without_tensorflow_names_the_extra(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset(records, {"train": {}})
    sizes = {"batch_size": 8, "max_frames": 64, "crop": "quality", "seed": 0}
    plan = make_batch_plan([data.split("train")], ("face",), **sizes)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"streaming needs tensorflow.*vidjax\[tensorflow\].*resid"):
        data.train_batches(plan)


@pytest.mark.slow
def test_import_says_nothing_and_takes_no_accelerator() -> None:
    code = "from vidjax.data.records.tensors import tf; print(tf.config.get_visible_devices('GPU'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("[]\n", "", 0)
