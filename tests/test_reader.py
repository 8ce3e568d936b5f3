"""Records read without TensorFlow are what TensorFlow reads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.clip_files import random_clip, write_pickle
from tests.helpers.datasets import prepare
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.records.codec import tf
from vidjax.data.records.shard_files import ShardReader, describe_shard

ROOT = Path(__file__).parent.parent
SCALARS = ("quality", "detection", "number")


def converted(tmp_path, dtype="float16", count=40):
    """Returns the records of clips of 0 to 300 frames; half of them lack a modality."""
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    for name, width, some in (("face", 6, count), ("audio", 70, count // 2)):
        lengths = rng.permutation([0, 1, 2, 300, *rng.integers(0, 40, some - 4)])
        clips = {f"c{i}": random_clip(rng, n, width, dtype) for i, n in enumerate(lengths.tolist())}
        write_pickle(source, name, "train", clips)
    return prepare(source, tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
def test_every_value_is_that_of_the_message(tmp_path, dtype):
    records = converted(tmp_path, dtype)
    shards = records.splits["train"].shards
    assert len(shards) > 1
    for shard in shards:
        raw = list(tf.data.TFRecordDataset(str(shard.path)).as_numpy_iterator())
        reader = ShardReader(shard)
        for row, record in enumerate(raw):
            values = tf.train.Example.FromString(record).features.feature
            assert [reader.clip_index[row]] == list(values["clip_index"].int64_list.value)
            for name, modality in records.modalities.items():
                found = reader.frames(name, modality, ("features", *SCALARS), slice(row, row + 1))
                assert found["features"].dtype == dtype
                assert len(found["number"]) == reader.lengths(name)[row]
                for field, array in found.items():
                    (wanted,) = values[f"frames/{name}/{field}"].bytes_list.value
                    assert array.tobytes() == wanted
                for field in SCALARS:
                    assert found[field].dtype == FRAME_FIELDS[field].dtype


def test_rows_together_are_rows_one_after_another(tmp_path):
    records = converted(tmp_path)
    shard = max(records.splits["train"].shards, key=lambda one: one.records)
    reader, modality = ShardReader(shard), records.modalities["face"]
    together = reader.frames("face", modality, ("features", "number"), slice(0, 5))
    alone = [
        reader.frames("face", modality, ("features", "number"), slice(row, row + 1))
        for row in range(5)
    ]
    for field, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([one[field] for one in alone]))


def example(**fields):
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
def test_records_that_nobody_here_wrote_are_refused(tmp_path, other):
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
def test_a_run_on_records_needs_no_tensorflow(vidjax_command, tmp_path, official_dir):
    """Training, evaluation and report, once another run has converted the clips."""
    words = ["--config=configs/knn.py:iqiyi_vid,face", f"--config.data.dir={official_dir}"]
    done = vidjax_command(*words, f"--workdir={tmp_path / 'first'}")
    assert done.returncode == 0, done.stderr
    code = (
        "import sys\nfrom vidjax.main import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {'tensorflow', 'tensorflow_datasets'} & {*sys.modules}"
    )
    for folder, more in (("second", words), ("first", ["--mode=evaluate"])):
        done = subprocess.run(
            [sys.executable, "-c", code, *more, f"--workdir={tmp_path / folder}"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    first, second = (tmp_path / name / "ranking.txt" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
