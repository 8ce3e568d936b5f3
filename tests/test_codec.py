"""Packed frames: TFDS reads back what was written, and the fast batch path reads the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.clip_files import Clip, random_clip, write_pickle
from tests.helpers.datasets import prepare
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import STORED
from vidjax.data.records.codec import (
    DECODED,
    PackedFrames,
    decode_batch,
    parse_batch,
    random_window,
    tf,
    tfds,
)

LENGTHS = (3, 0, 1, 7, 5)


def write_and_read(tmp_path: Path, clips: dict[str, Clip]) -> tuple[list[dict], list[bytes]]:
    """Converts val clips and returns them as TFDS shows them, and as the records they lie in."""
    (tmp_path / "source").mkdir()
    write_pickle(tmp_path / "source", "face", "val", clips)
    records = prepare(tmp_path / "source", tmp_path / "cache")
    builder = tfds.builder_from_directory(records.splits["val"].shards[0].path.parent)
    shown = list(tfds.as_numpy(builder.as_dataset(split="val", shuffle_files=False)))
    paths = [str(shard.path) for shard in records.splits["val"].shards]
    raw = [bytes(record.numpy()) for record in tf.data.TFRecordDataset(paths)]
    return shown, raw


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
def test_tfds_shows_what_was_packed_and_the_fast_path_equals_it(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    clips = {f"c{i}": random_clip(rng, length, 6, dtype) for i, length in enumerate(LENGTHS)}
    shown, raw = write_and_read(tmp_path, clips)
    assert [example["clip"].decode() for example in shown] == list(clips)
    for index, (example, clip) in enumerate(zip(shown, clips.values(), strict=True)):
        assert example["clip_index"] == index
        assert set(example) == {"clip", "clip_index", "frames"}  # no label
        for field in STORED:
            assert example["frames"]["face"][field].dtype == getattr(clip, field).dtype
            np.testing.assert_array_equal(example["frames"]["face"][field], getattr(clip, field))

    size = 9
    clip_index, fields = parse_batch(tf.constant([*raw, b""]), ("face",))
    fast = decode_batch(fields["face"], Modality(6, dtype), size, best=False)
    fast = {field: value.numpy() for field, value in fast.items()}
    fast["features"] = fast["features"].view(dtype).reshape(len(raw) + 1, size, 6)
    assert clip_index.numpy().tolist() == [*range(len(raw)), 0]
    assert fast["mask"].sum(1).tolist() == [*LENGTHS, 0]
    for row, example in enumerate(shown):
        length = LENGTHS[row]
        for field in ("features", "quality", "detection", "number"):
            np.testing.assert_array_equal(
                fast[field][row, :length], example["frames"]["face"][field]
            )
            assert not fast[field][row, length:].any()


def test_packed_frames_refuse_what_they_cannot_hold_exactly() -> None:
    packed = PackedFrames(dim=4, dtype="float16")
    clip = random_clip(np.random.default_rng(0), 3, 4)._asdict()
    with pytest.raises(ValueError, match=r"features: got shape \(3, 5\), wanted \(3, 4\)"):
        packed.encode_example({**clip, "features": np.zeros((3, 5), np.float16)})
    with pytest.raises(ValueError, match=r"number: got shape \(2,\), wanted \(3,\)"):
        packed.encode_example({**clip, "number": clip["number"][:2]})
    with pytest.raises(ValueError, match="float32 does not fit float16"):
        packed.encode_example({**clip, "features": clip["features"].astype(np.float32)})


def test_packed_frames_survive_json() -> None:
    packed = PackedFrames(dim=4, dtype="int8")
    again = tfds.features.FeatureConnector.from_json(packed.to_json())
    assert again.get_tensor_info() == packed.get_tensor_info()


def test_windows_start_anywhere_and_alike_whatever_the_batch() -> None:
    frames = np.arange(10, dtype=np.int32)
    strings = tf.constant([frames.tobytes()] * 4000)
    fields: dict[str, Any] = dict.fromkeys(DECODED, strings)
    modality = Modality(2, "int16")

    def first_frames(positions: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
        rows = {field: value[: len(positions)] for field, value in fields.items()}
        windows = random_window(rows, modality, 7, tf.constant(positions), seed)
        numbers = decode_batch(windows, modality, 7, best=False)["number"]
        decoded = np.array(numbers)
        np.testing.assert_array_equal(np.diff(decoded, axis=1), 1)
        return decoded[:, 0]

    positions = np.arange(4000, dtype=np.int64)
    drawn = first_frames(positions, (3, 0))
    counts = np.bincount(drawn, minlength=4)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000 * 0.75)
    pairs = np.bincount(4 * drawn[:-1] + drawn[1:], minlength=16)  # neighbours are independent
    assert np.abs(pairs - 250).max() < 5 * np.sqrt(250)
    np.testing.assert_array_equal(first_frames(positions[100:132], (3, 0)), drawn[100:132])
    for other in ((4, 0), (3, 1), (-3, 0)):
        assert 0.6 < (first_frames(positions, other) != drawn).mean() < 0.9


def test_big_endian_and_strided_features_keep_their_values() -> None:
    packed = PackedFrames(dim=4, dtype="float32")
    clip = random_clip(np.random.default_rng(0), 6, 8, "float32")._asdict()
    strided = {**clip, "features": clip["features"][:, ::2].astype(">f4")}
    encoded = packed.encode_example(strided)["features"]
    np.testing.assert_array_equal(
        np.frombuffer(encoded, "<f4").reshape(6, 4), clip["features"][:, ::2]
    )


@pytest.mark.slow
def test_import_says_nothing_and_takes_no_accelerator() -> None:
    code = "from vidjax.data.records.codec import tf; print(tf.config.get_visible_devices('GPU'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("[]\n", "", 0)
