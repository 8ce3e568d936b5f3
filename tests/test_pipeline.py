"""Batches: every clip as often as promised, in a fixed order, with exactly its own frames."""

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers.batches import eval_batches, labelled, train_batches
from tests.helpers.clip_files import Clip, random_clip, write_pickle, write_truth
from tests.helpers.datasets import load_dataset, prepare
from vidjax.batch import Batch
from vidjax.data import clips as clips_lib
from vidjax.data.records import manifest
from vidjax.data.records.dataset import Dataset

WIDTHS = {"audio": 4, "body": 3, "face": 6}
MAX_FRAMES = 7
TRAIN = {
    "splits": ("train",),
    "modalities": ("face", "audio"),
    "batch_size": 8,
    "max_frames": MAX_FRAMES,
    "crop": "window",
    "seed": 3,
}


def make_clips(split: str, count: int) -> dict[str, dict[str, Clip]]:
    """Returns modality -> clip -> frames; a few clips are long, some have nothing."""
    rng = np.random.default_rng(count)
    clips: dict[str, dict[str, Clip]] = {name: {} for name in WIDTHS}
    for number in range(count):
        name = f"{split}_{number:03d}"
        length = {1: 700, 2: 100, 3: 513, 4: 32, 5: 33}.get(number, number % 11)
        clips["face"][name] = random_clip(rng, length, WIDTHS["face"])
        if number % 3:
            clips["audio"][name] = random_clip(rng, 1, WIDTHS["audio"])
        if number % 2:
            clips["body"][name] = random_clip(rng, 600 if number == 7 else 2, WIDTHS["body"])
    # Ties in quality, and negative ones: the earlier frame is the better one of two.
    clips["face"][f"{split}_001"].quality[:] = np.round(clips["face"][f"{split}_001"].quality / 20)
    return clips


CLIPS = {split: make_clips(split, count) for split, count in (("train", 45), ("val", 26))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of official files of CLIPS; val has no body file."""
    folder = tmp_path_factory.mktemp("source")
    for split, modalities in CLIPS.items():
        for modality, clips in modalities.items():
            if (modality, split) != ("body", "val"):
                write_pickle(folder, modality, split, clips)
        names = sorted(modalities["face"])
        write_truth(folder, split, {name: str(i % 5 + 1) for i, name in enumerate(names)})
    return folder


@pytest.fixture(scope="module")
def found(source: Path, tmp_path_factory: pytest.TempPathFactory) -> manifest.Records:
    return prepare(source, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def dataset(source: Path, found: manifest.Records) -> Dataset:
    with pytest.warns(UserWarning, match="val: no file of body"):
        return labelled(found, source)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def order_of(batches: list[Batch]) -> list[int]:
    return np.concatenate([batch.clip_index for batch in batches]).tolist()


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def source_clip(dataset: Dataset, split: str, modality: str, index: int) -> Clip:
    """Returns the frames that were written for a clip, as a batch shows them."""
    empty = random_clip(np.random.default_rng(0), 0, WIDTHS[modality])
    name = dataset.split(split).clips[index]
    clip = CLIPS[split][modality].get(name, empty)
    if modality == "audio":  # a bare vector: no scores, no number
        ones = np.ones(len(clip.features), np.float32)
        return clip._replace(quality=0 * ones, detection=ones, number=np.zeros(len(ones), np.int32))
    if modality == "body":
        return clip._replace(quality=0 * clip.quality, detection=np.ones_like(clip.detection))
    return clip


def row_of(batch: Batch, modality: str, row: int) -> tuple[dict[str, np.ndarray], int]:
    """Returns the real frames of one row; what is padding must be zero and come last."""
    frames = batch.frames[modality]
    length = int(frames.mask[row].sum())
    assert frames.mask[row, :length].all()
    fields = {}
    for field in ("features", "quality", "detection", "number"):
        values = np.asarray(getattr(frames, field)[row])
        assert not values[length:].any()
        fields[field] = values[:length]
    return fields, length


def best_frames(clip: Clip, count: int) -> np.ndarray:
    """Returns the positions of the best frames in time order, one comparison at a time."""
    ranked = sorted(range(len(clip.quality)), key=lambda t: (-float(clip.quality[t]), t))
    return np.array(sorted(ranked[:count]), int)


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_every_clip_comes_once_an_epoch_across_batches(dataset: Dataset, batch_size: int) -> None:
    batches = take(
        train_batches(dataset, **{**TRAIN, "batch_size": batch_size}), 3 * 45 // batch_size + 1
    )
    assert all(batch.clip_index.shape == (batch_size,) for batch in batches)
    assert all(batch.batch_mask.all() for batch in batches)
    order = order_of(batches)
    epochs = [order[i : i + 45] for i in range(0, len(order) - 44, 45)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(45)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_depends_on_seed_and_epoch_alone(dataset: Dataset) -> None:
    order = order_of(take(train_batches(dataset, **TRAIN), 12))
    other_crop = {**TRAIN, "modalities": ("body",), "crop": "quality", "max_frames": 2}
    assert order_of(take(train_batches(dataset, **other_crop), 12)) == order
    other_size = {**TRAIN, "batch_size": 32}
    assert order_of(take(train_batches(dataset, **other_size), 3)) == order
    assert order_of(take(train_batches(dataset, **{**TRAIN, "seed": 4}), 12)) != order


@pytest.mark.parametrize("crop", ["window", "quality"])
@pytest.mark.parametrize("start_batch", [1, 6, 23])
def test_a_resumed_stream_is_the_uninterrupted_one(
    dataset: Dataset, crop: str, start_batch: int
) -> None:
    arguments = {**TRAIN, "crop": crop, "splits": ("train", "val"), "batch_size": 9}
    whole = take(train_batches(dataset, **arguments), start_batch + 9)
    resumed = take(train_batches(dataset, **arguments, start=9 * start_batch), 9)
    assert_equal(whole[start_batch:], resumed)


def test_a_resume_need_not_stand_at_a_batch(dataset: Dataset) -> None:
    order = order_of(take(train_batches(dataset, **TRAIN), 12))
    assert order_of(take(train_batches(dataset, **TRAIN, start=50), 5)) == order[50:90]


def test_clip_index_counts_through_the_splits(dataset: Dataset) -> None:
    arguments = {**TRAIN, "splits": ("val", "train"), "batch_size": 71, "max_frames": 800}
    (batch,) = take(train_batches(dataset, **arguments), 1)
    assert sorted(batch.clip_index.tolist()) == list(range(71))
    for row, index in enumerate(batch.clip_index.tolist()):
        split, index = ("val", index) if index < 26 else ("train", index - 26)
        fields, _ = row_of(batch, "face", row)
        wanted = source_clip(dataset, split, "face", index)
        np.testing.assert_array_equal(fields["features"], wanted.features)


def test_short_clips_keep_all_frames_and_long_ones_a_window(dataset: Dataset) -> None:
    batches = take(train_batches(dataset, **TRAIN), 60)
    starts = set()
    for batch in batches:
        assert batch.frames["face"].features.shape == (8, MAX_FRAMES, 6)
        assert batch.frames["audio"].features.shape == (8, 1, 4)
        assert batch.frames["face"].features.dtype == np.float16
        assert batch.clip_index.dtype == batch.frames["face"].number.dtype == np.int32
        assert set(batch.frames) == {"face", "audio"}  # nothing else is decoded
        for row, index in enumerate(batch.clip_index.tolist()):
            for modality in batch.frames:
                clip = source_clip(dataset, "train", modality, index)
                fields, length = row_of(batch, modality, row)
                assert length == min(len(clip.features), MAX_FRAMES)
                matches = [
                    first
                    for first in range(len(clip.features) - length + 1)
                    if all(
                        np.array_equal(values, getattr(clip, field)[first : first + length])
                        for field, values in fields.items()
                    )
                ]
                assert matches
                if modality == "face" and len(clip.features) == 10:
                    starts |= set(matches)
    assert starts == {0, 1, 2, 3}  # every place of a window of 7 frames out of 10


def test_quality_crop_keeps_the_best_frames_in_time_order(dataset: Dataset) -> None:
    (batch,) = take(train_batches(dataset, **{**TRAIN, "crop": "quality", "batch_size": 45}), 1)
    for row, index in enumerate(batch.clip_index.tolist()):
        clip = source_clip(dataset, "train", "face", index)
        fields, _ = row_of(batch, "face", row)
        for field, values in fields.items():
            wanted = getattr(clip, field)[best_frames(clip, MAX_FRAMES)]
            np.testing.assert_array_equal(values, wanted)


def test_cropped_clips_are_counted(dataset: Dataset) -> None:
    splits = [dataset.split(name) for name in ("train", "val")]
    counts = clips_lib.num_cropped(splits, ("face", "audio"), MAX_FRAMES)
    lengths = [len(clip.features) for split in CLIPS for clip in CLIPS[split]["face"].values()]
    lost = [length - MAX_FRAMES for length in lengths if length > MAX_FRAMES]
    assert counts == {
        "face": {"clips": len(lost), "frames": sum(lost)},
        "audio": {"clips": 0, "frames": 0},
    }


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_evaluation_shows_every_frame_of_every_clip_once(
    dataset: Dataset, split: str, rows: int
) -> None:
    seen = []
    shapes: dict[int, int] = {}
    for batch in eval_batches(dataset, split=split, modalities=("face", "audio"), rows=rows):
        assert batch.clip_index.shape == batch.batch_mask.shape == (rows,)
        assert not batch.clip_index[~batch.batch_mask].any()
        size = batch.frames["face"].mask.shape[1]
        assert batch.frames["audio"].mask.shape == (rows, 1)
        for row in range(rows):
            if not batch.batch_mask[row]:
                assert not batch.frames["face"].mask[row].any()
                continue
            index = int(batch.clip_index[row])
            seen.append(index)
            shapes[index] = size
            for modality in ("face", "audio"):
                clip = source_clip(dataset, split, modality, index)
                fields, _ = row_of(batch, modality, row)
                for field, values in fields.items():
                    wanted = getattr(clip, field)[best_frames(clip, 512)]
                    np.testing.assert_array_equal(values, wanted)
    assert sorted(seen) == list(range(len(dataset.split(split).clips)))
    lengths = dataset.split(split).lengths["face"]
    buckets = {i: next(b for b in (32, 128, 512) if b >= min(lengths[i], 512)) for i in seen}
    assert shapes == buckets
    if split == "val":
        for bucket in (32, 128, 512):
            within = [index for index in seen if buckets[index] == bucket]
            assert within == sorted(within)


def test_evaluation_pads_a_clip_alike_whatever_the_rows(dataset: Dataset) -> None:
    shown = []
    for rows in (3, 50):
        by_clip: dict[int, Any] = {}
        for batch in eval_batches(dataset, split="train", modalities=("body", "face"), rows=rows):
            for row in np.flatnonzero(batch.batch_mask).tolist():
                frames = jax.tree.map(lambda array, row=row: array[row], batch.frames)
                by_clip[int(batch.clip_index[row])] = frames
        shown.append(by_clip)
    jax.tree.map(np.testing.assert_array_equal, *shown)


def test_one_modality_sets_the_length_of_its_own_blocks(dataset: Dataset) -> None:
    (batch,) = eval_batches(dataset, split="val", modalities=("audio",), rows=26)
    assert batch.frames["audio"].features.shape == (26, 1, 4)


def test_lengths_choose_the_blocks_of_two_datasets_with_the_same_clips(
    dataset: Dataset,
) -> None:
    def stream(modalities: tuple[str, ...], lengths: np.ndarray | None = None) -> list[Batch]:
        arguments = {"split": "train", "modalities": modalities, "rows": 4, "lengths": lengths}
        return list(eval_batches(dataset, **arguments))

    kinds = (("audio",), ("face",), ("body", "face"))
    lengths = [clips_lib.longest(dataset.split("train"), kind) for kind in kinds]
    frames = dataset.split("train").lengths
    np.testing.assert_array_equal(lengths[0], frames["audio"])
    np.testing.assert_array_equal(lengths[2], np.maximum(frames["body"], frames["face"]))
    audio, face, both = (stream(kind, np.max(lengths, axis=0)) for kind in kinds)
    for one in (audio, face):
        for batch, other in zip(one, both, strict=True):
            np.testing.assert_array_equal(batch.clip_index, other.clip_index)
            np.testing.assert_array_equal(batch.batch_mask, other.batch_mask)
    # How far a modality is padded is the business of its own dataset.
    assert {batch.frames["audio"].mask.shape for batch in audio} == {(4, 1)}
    assert_equal(stream(kinds[2]), both)  # the longest of these two is the longest of all
    assert order_of(stream(kinds[1])) != order_of(face)


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluation_of_chosen_clips_alone(dataset: Dataset, split: str) -> None:
    arguments = {"split": split, "modalities": ("face", "audio"), "rows": 4}

    def shown(**chosen: Any) -> dict[int, Any]:
        return {
            int(batch.clip_index[row]): jax.tree.map(lambda array: array[row], batch.frames)  # noqa: B023
            for batch in eval_batches(dataset, **arguments, **chosen)
            for row in np.flatnonzero(batch.batch_mask).tolist()
        }

    only = np.random.default_rng(0).random(len(dataset.split(split).clips)) < 0.4
    some, every = shown(only=only), shown()
    assert sorted(some) == np.flatnonzero(only).tolist() and len(every) == len(only)
    for index, frames in some.items():  # with the same T as among all
        jax.tree.map(np.testing.assert_array_equal, frames, every[index])
    assert shown(only=np.zeros(len(only), bool)) == {}


@pytest.mark.parametrize(
    ("split", "modalities", "packed_clips"),
    [("train", ("face", "audio", "body"), 256), ("train", ("body",), 4), ("val", ("face",), 1)],
)
def test_packed_clips_come_once_with_just_their_frames(
    dataset: Dataset,
    split: str,
    modalities: tuple[str, ...],
    packed_clips: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vidjax.data.records.dataset.PACKED_CLIPS", packed_clips)
    seen = []
    for clip_index, frames in dataset.packed(split=split, modalities=modalities):
        assert clip_index.dtype == np.int32 and 0 < len(clip_index) <= packed_clips
        assert tuple(frames) == modalities
        seen += clip_index.tolist()
        for modality, packed in frames.items():
            assert packed.start.dtype == packed.length.dtype == np.int32
            assert len(packed.features) == packed.length.sum()
            for index, start, length in zip(clip_index, packed.start, packed.length, strict=True):
                clip = source_clip(dataset, split, modality, index)
                for field in ("features", "quality", "detection", "number"):
                    values, wanted = getattr(packed, field), getattr(clip, field)
                    assert values.dtype == wanted.dtype
                    np.testing.assert_array_equal(values[start : start + length], wanted)
    assert sorted(seen) == list(range(len(dataset.split(split).clips)))


def test_packing_names_mistakes_and_clips_that_do_not_come(
    dataset: Dataset, found: manifest.Records, source: Path
) -> None:
    for split, modalities, message in (
        ("test", ("face",), "no split 'test'"),
        ("val", ("scene",), "no features of 'scene'"),
        ("val", ("body",), "no features of 'body'"),
    ):
        with pytest.raises(ValueError, match=message):
            next(dataset.packed(split=split, modalities=modalities))
    val = found.splits["val"]
    fewer = found._replace(splits={**found.splits, "val": val._replace(shards=val.shards[1:])})
    with pytest.warns(UserWarning, match="no file of body"):
        damaged = labelled(fewer, source)
    with pytest.raises(ValueError, match="did not come exactly once, such as val_0"):
        list(damaged.packed(split="val", modalities=("face",)))


def test_a_chosen_clip_that_does_not_come_is_an_error(
    found: manifest.Records, source: Path
) -> None:
    order = found.splits["val"].order.copy()
    order[0] = order[1]  # the records no longer are what the index says
    broken = found._replace(
        splits={**found.splits, "val": found.splits["val"]._replace(order=order)}
    )
    with pytest.warns(UserWarning, match="no file of body"):
        dataset = labelled(broken, source)
    only = np.arange(26) == 0
    with pytest.raises(ValueError, match=r"1 of 1 clips did .* such as val_000"):
        list(eval_batches(dataset, split="val", modalities=("face",), rows=4, only=only))


def test_a_clip_of_ten_thousand_frames_gives_its_best(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clips = {"long": random_clip(rng, 10_000, 16), "short": random_clip(rng, 2, 16)}
    write_pickle(tmp_path, "face", "val", clips)
    write_truth(tmp_path, "val", {"long": "1"})
    dataset = load_dataset("iqiyi_vid", directory=tmp_path, cache_dir=tmp_path / "cache")
    batches = list(eval_batches(dataset, split="val", modalities=("face",), rows=4))
    long = next(b for b in batches if b.frames["face"].mask.shape[1] == 512)
    wanted = clips["long"].features[best_frames(clips["long"], 512)]
    np.testing.assert_array_equal(long.frames["face"].features[0], wanted)
    assert dataset.split("val").labels.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8"])
def test_unusual_dtypes_reach_the_batch(tmp_path: Path, dtype: str) -> None:
    clips = {f"c{i}": random_clip(np.random.default_rng(i), 3 * i, 5, dtype) for i in range(4)}
    write_pickle(tmp_path, "face", "train", clips)
    write_truth(tmp_path, "train", dict.fromkeys(clips, "1"))
    dataset = load_dataset("iqiyi_vid", directory=tmp_path, cache_dir=tmp_path / "cache")
    arguments = {**TRAIN, "modalities": ("face",), "batch_size": 4, "max_frames": 5}
    (batch,) = take(train_batches(dataset, **{**arguments, "crop": "quality"}), 1)
    assert batch.frames["face"].features.dtype == dtype
    for row, index in enumerate(batch.clip_index.tolist()):
        clip = clips[f"c{index}"]
        fields, _ = row_of(batch, "face", row)
        np.testing.assert_array_equal(fields["features"], clip.features[best_frames(clip, 5)])


def copy_of(found: manifest.Records, source: Path, folder: Path) -> Dataset:
    """Returns a dataset over a copy of the records, to be damaged."""
    shutil.copytree(found.folder, folder)
    with pytest.warns(UserWarning, match="no file of body"):
        return labelled(manifest.load_records(folder), source)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", r"record \d is damaged"),
        ("cut", "expected 5 records, found 1"),
        ("empty", "expected 5 records, found 0"),
        ("missing", "no such file"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval", "packed"])
def test_damage_after_loading_shows_while_reading(
    source: Path, found: manifest.Records, tmp_path: Path, damage: str, message: str, mode: str
) -> None:
    dataset = copy_of(found, source, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("**/*train*-00002-of-*")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 16
    length = int.from_bytes(content[:8], "little")
    keep = {"cut": 8 + 4 + length + 4, "empty": 0}.get(damage, len(content))
    path.write_bytes(content[:keep])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=message) as error:
        if mode == "train":
            take(train_batches(dataset, **TRAIN), 20)
        elif mode == "packed":
            list(dataset.packed(split="train", modalities=("face",)))
        else:
            list(eval_batches(dataset, split="train", modalities=("face",), rows=8))
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_mistakes_are_named_before_anything_is_read(dataset: Dataset) -> None:
    mistakes = [
        ({"splits": ("test",)}, "no split 'test' in the data, only train, val"),
        ({"modalities": ("scene",)}, "no features of 'scene'\n.*config.modalities"),
        ({"splits": ("val",), "modalities": ("body",)}, "'val' has no features of 'body'"),
        ({"modalities": ("face", "face")}, "config.modalities=face,face: .* each once"),
        ({"modalities": ()}, "config.modalities=: name one or more"),
        ({"splits": ()}, "config.data.train_splits=: name one or more"),
        ({"splits": ("val", "val")}, "config.data.train_splits=val,val: .* each once"),
        ({"crop": "centre"}, "'window' or 'quality', got 'centre'"),
        ({"batch_size": 0}, "1 or more"),
    ]
    for changed, message in mistakes:
        with pytest.raises(ValueError, match=message):
            train_batches(dataset, **{**TRAIN, **changed})
    with pytest.raises(ValueError, match="no split 'test'"):
        eval_batches(dataset, split="test", modalities=("face",), rows=4)
    tables: list[tuple[dict[str, Any], str]] = [
        ({"lengths": np.zeros(25, int)}, r"lengths: got \(25,\), wanted one for 26 clips"),
        ({"lengths": np.zeros(26, int)}, "lengths: clip val_001 has 700 frames, not 0"),
        ({"only": np.zeros(26, int)}, r"only: got int64 \(26,\), wanted bool for 26 clips"),
        ({"only": np.zeros(25, bool)}, r"only: got bool \(25,\), wanted bool for 26 clips"),
    ]
    for table, message in tables:
        with pytest.raises(ValueError, match=message):
            eval_batches(dataset, split="val", modalities=("face",), rows=4, **table)
    with pytest.raises(ValueError, match="start=-1: must be 0 or more"):
        train_batches(dataset, **TRAIN, start=-1)
    plan = clips_lib.make_eval_plan(dataset.split("val"), ("face",))
    with pytest.raises(ValueError, match="'val' has no features of 'body'"):
        dataset.eval_batches(plan._replace(modalities=("body",)), rows=4)


def peaks_of_epochs(directory: str, num_clips: int) -> list[int]:
    """Returns the most resident memory in bytes during each of ten epochs."""
    dataset = load_dataset("iqiyi_vid", directory=directory, cache_dir=f"{directory}/cache")
    arguments = {**TRAIN, "modalities": ("face",), "batch_size": 256, "max_frames": 32}
    batches = train_batches(dataset, **arguments)
    statm = Path(f"/proc/{os.getpid()}/statm")
    peaks = []
    for _ in range(10):
        peak = 0
        for batch in itertools.islice(batches, num_clips // 256):
            assert batch.batch_mask.all()
            peak = max(peak, int(statm.read_text().split()[1]) * resource.getpagesize())
        peaks.append(peak)
    return peaks


@pytest.mark.slow
def test_resident_memory_stays_flat_over_ten_epochs(tmp_path: Path) -> None:
    clip = random_clip(np.random.default_rng(0), 30, 512)
    write_pickle(tmp_path, "face", "train", {f"c{i:05d}": clip for i in range(4000)})
    # In a process of its own: what other tests have freed comes and goes.
    code = (
        "import sys, json; from tests.test_pipeline import peaks_of_epochs; "
        "print(json.dumps(peaks_of_epochs(sys.argv[1], 4000)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    peaks = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    # All records are 125 MB: an epoch that was kept would show.
    assert max(peaks[2:]) - max(peaks[:2]) < 40e6, peaks
