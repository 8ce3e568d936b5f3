"""Batches: every clip as often as promised, in a fixed order, with exactly its own frames.

What each of several processes reads is together what one reads.
"""

import functools
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.batches import assert_equal, eval_batches, labelled, rows_of, train_batches
from tests.helpers.cases import quick_first
from tests.helpers.clip_files import RAGGED, ragged_clips, random_clip, write_pickle, write_ragged
from tests.helpers.datasets import load_dataset, prepare
from tests.helpers.seen import refused
from vidjax.data import clips as clips_lib
from vidjax.data.records import manifest

ROOT = Path(__file__).parent.parent
COUNTS = {"train": 45, "val": 26}
MAX_FRAMES = 7
TRAIN: dict[str, Any] = {
    "splits": ("train",),
    "modalities": ("face", "audio"),
    "batch_size": 8,
    "max_frames": MAX_FRAMES,
    "crop": "window",
    "seed": 3,
}
BOTH = TRAIN | {"splits": ("val", "train"), "batch_size": 12}


CLIPS = {split: ragged_clips(split, count) for split, count in COUNTS.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory of official files of CLIPS; val has no body file."""
    return write_ragged(tmp_path_factory.mktemp("source"), COUNTS, lacks=[("body", "val")])


@pytest.fixture(scope="module")
def found(source, tmp_path_factory):
    return prepare(source, tmp_path_factory.mktemp("cache"))


def label(records, source):
    with pytest.warns(UserWarning, match="val: no file of body"):
        return labelled(records, source)


@pytest.fixture(scope="module")
def dataset(source, found):
    return label(found, source)


@pytest.fixture
def copied(source, found, tmp_path):
    """A dataset over a copy of the records, to be damaged."""
    shutil.copytree(found.folder, tmp_path / "copy")
    return label(manifest.load_records(tmp_path / "copy"), source)


def take(batches, count):
    return list(itertools.islice(batches, count))


def order_of(batches):
    return np.concatenate([batch.clip_index for batch in batches]).tolist()


def source_clip(dataset, split, modality, index):
    """Returns the frames that were written for a clip, as a batch shows them."""
    empty = random_clip(np.random.default_rng(0), 0, RAGGED[modality])
    name = dataset.split(split).clips[index]
    clip = CLIPS[split][modality].get(name, empty)
    if modality == "audio":  # a bare vector: no scores, no number
        ones = np.ones(len(clip.features), np.float32)
        return clip._replace(quality=0 * ones, detection=ones, number=np.zeros(len(ones), np.int32))
    if modality == "body":
        return clip._replace(quality=0 * clip.quality, detection=np.ones_like(clip.detection))
    return clip


def row_of(batch, modality, row):
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


def best_frames(clip, count):
    """Returns the positions of the best frames in time order, one comparison at a time."""
    ranked = sorted(range(len(clip.quality)), key=lambda t: (-float(clip.quality[t]), t))
    return np.array(sorted(ranked[:count]), int)


@pytest.mark.parametrize("batch_size", quick_first([1, 8, 100], mark=pytest.mark.nightly))
def test_every_clip_comes_once_an_epoch_across_batches(dataset, batch_size):
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


@pytest.mark.parametrize(
    ("crop", "start_batch"), quick_first([("quality", 1), ("window", 6), ("window", 23)])
)
def test_a_resumed_stream_is_the_uninterrupted_one(dataset, crop, start_batch):
    arguments = {**TRAIN, "crop": crop, "splits": ("train", "val"), "batch_size": 9}
    whole = take(train_batches(dataset, **arguments), start_batch + 9)
    resumed = take(train_batches(dataset, **arguments, step=start_batch), 9)
    assert_equal(whole[start_batch:], resumed)


def test_clip_index_counts_through_the_splits(dataset):
    arguments = {**TRAIN, "splits": ("val", "train"), "batch_size": 71, "max_frames": 800}
    (batch,) = take(train_batches(dataset, **arguments), 1)
    assert sorted(batch.clip_index.tolist()) == list(range(71))
    for row, index in enumerate(batch.clip_index.tolist()):
        split, index = ("val", index) if index < 26 else ("train", index - 26)
        fields, _ = row_of(batch, "face", row)
        wanted = source_clip(dataset, split, "face", index)
        np.testing.assert_array_equal(fields["features"], wanted.features)


def test_short_clips_keep_all_frames_and_long_ones_a_window(dataset):
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


def test_cropped_clips_are_counted(dataset):
    splits = [dataset.split(name) for name in ("train", "val")]
    counts = clips_lib.num_cropped(splits, ("face", "audio"), MAX_FRAMES)
    lengths = [len(clip.features) for split in CLIPS for clip in CLIPS[split]["face"].values()]
    lost = [length - MAX_FRAMES for length in lengths if length > MAX_FRAMES]
    cropped = {"clips": len(lost), "frames": sum(lost)}
    assert counts == {"face": cropped, "audio": {"clips": 0, "frames": 0}}


def test_quality_crop_keeps_the_best_frames_in_time_order(dataset):
    (batch,) = take(train_batches(dataset, **{**TRAIN, "crop": "quality", "batch_size": 45}), 1)
    for row, index in enumerate(batch.clip_index.tolist()):
        clip = source_clip(dataset, "train", "face", index)
        fields, _ = row_of(batch, "face", row)
        for field, values in fields.items():
            wanted = getattr(clip, field)[best_frames(clip, MAX_FRAMES)]
            np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_evaluation_shows_every_frame_of_every_clip_once(dataset, split, rows):
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


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ({32: 6, 128: 5, 512: 4}, {512: 15}),
        ({32: 600, 128: 1}, {128: 601}),
        ({32: 700, 128: 1}, {32: 700, 128: 1}),  # 700 x 96 frames of padding
        ({32: 700, 128: 1, 512: 1}, {32: 700, 512: 2}),
        ({32: 6, 512: 1000}, {512: 1006}),
        ({32: 200, 512: 1}, {32: 200, 512: 1}),
        ({1: 3000}, {1: 3000}),
    ],
)
def test_few_clips_join_longer_ones(counts, wanted):
    lengths = np.repeat(np.array([*counts], np.int32), [*counts.values()])
    names, none = tuple(f"{i:04}" for i in range(len(lengths))), np.zeros(0, np.int32)
    split = clips_lib.Split("val", names, none, False, none, 0, {"face": lengths})
    only = np.arange(len(lengths)) % 2 == 0
    plan = functools.partial(clips_lib.make_eval_plan, split, ("face",), join=True)
    whole, part = plan(), plan(only=only)
    assert (part.bucket == np.where(only, whole.bucket, -1)).all()
    padded = np.array(whole.padded_lengths["face"])[whole.bucket]
    assert (padded >= lengths).all()
    assert dict(zip(*np.unique(padded, return_counts=True), strict=True)) == wanted


def test_lengths_choose_the_blocks_of_two_datasets_with_the_same_clips(dataset):
    def stream(modalities, lengths=None):
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
def test_evaluation_pads_a_clip_alike_whatever_the_rows_and_the_other_clips(dataset, split):
    def shown(rows=4, **chosen):
        modalities = ("body", "face") if split == "train" else ("face", "audio")
        blocks = eval_batches(dataset, split=split, modalities=modalities, rows=rows, **chosen)
        return rows_of(blocks)

    every, only = shown(), np.random.default_rng(0).random(COUNTS[split]) < 0.4
    assert sorted(every) == list(range(COUNTS[split]))
    assert_equal(shown(rows=50), every)
    some = {index: every[index] for index in np.flatnonzero(only).tolist()}
    assert_equal(shown(only=only), some)
    assert shown(only=np.zeros_like(only)) == {}


@pytest.mark.parametrize(
    ("split", "modalities", "packed_clips"),
    [("train", ("face", "audio", "body"), 256), ("train", ("body",), 4), ("val", ("face",), 1)],
)
def test_packed_clips_come_once_with_just_their_frames(
    dataset, split, modalities, packed_clips, monkeypatch
):
    monkeypatch.setattr("vidjax.data.records.dataset.MAX_PACKED_CLIPS", packed_clips)
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


def test_mistakes_are_named_before_anything_is_read(dataset):
    mistakes = [
        ({"splits": ("test",)}, "no split 'test' in the data, only train, val"),
        ({"modalities": ("scene",)}, "no features of 'scene'\n.*config.modalities"),
        ({"splits": ("val",), "modalities": ("body",)}, "'val' has no features of 'body'"),
        ({"modalities": ("face", "face")}, "config.modalities=face,face: .* only once"),
        ({"modalities": ()}, "config.modalities=: name at least one"),
        ({"splits": ()}, "config.data.train_splits=: name at least one"),
        ({"splits": ("val", "val")}, "config.data.train_splits=val,val: .* only once"),
        ({"batch_size": 0}, "1 or more"),
    ]
    for changed, message in mistakes:
        with pytest.raises(ValueError, match=message):
            train_batches(dataset, **{**TRAIN, **changed})
    with pytest.raises(ValueError, match="no split 'test'"):
        eval_batches(dataset, split="test", modalities=("face",), rows=4)
    with pytest.raises(ValueError, match="step=-1: must be 0 or more"):
        train_batches(dataset, **TRAIN, step=-1)
    plan = clips_lib.make_eval_plan(dataset.split("val"), ("face",))
    with pytest.raises(ValueError, match="'val' has no features of 'body'"):
        dataset.eval_batches(plan._replace(modalities=("body",)), rows=4)
    with pytest.raises(ValueError, match="no split 'test'"):
        next(dataset.packed(split="test", modalities=("face",)))
    with pytest.raises(ValueError, match="no features of 'scene'"):
        next(dataset.packed(split="val", modalities=("scene",)))


# Which clips and files.


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-1, 2), max_size=60), st.integers(1, 9))
def test_blocks_have_every_clip_once_and_clips_of_one_bucket(buckets, rows):
    bucket, read = np.array(buckets, int), []
    for number, places in clips_lib.split_blocks(bucket, rows):
        assert 0 < len(places) <= rows and (bucket[places] == number).all()
        read += places.tolist()
    assert sorted(read) == np.flatnonzero(bucket >= 0).tolist()
    numbers = [number for number, _ in clips_lib.split_blocks(bucket, rows)]
    wanted = [-(-int((bucket == number).sum()) // rows) for number in range(3)]
    assert np.bincount(numbers, minlength=3).tolist() == wanted


def test_a_file_that_is_cut_while_it_is_read_is_named(copied, tmp_path):
    shard = manifest.load_index(tmp_path / "copy").splits["train"].shards[2]
    batches = train_batches(copied, **BOTH)
    next(batches)
    os.truncate(shard.path, 30)
    said = "expected 5 records, found 0: record 1 is"
    refused(lambda: take(batches, 20), said, str(shard.path))


# Streams that are dropped after a batch, also where the traceback of an error holds one.
DROPPED = f"""
held = []
for number in range(10):
    try:
        batches = train_batches(data, **{BOTH!r})
        next(batches)
        if number % 2:
            raise KeyError
    except KeyError as error:
        held.append(error)
    del batches
    gc.collect()
held.clear()
gc.collect()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    # The signal may come to another thread: the main one learns of it a moment later.
    [
        "",
        "raise KeyError",
        "os.kill(os.getpid(), 2); time.sleep(60)",
        "sys.exit(3)",
        "gc.collect()",
    ],
)
def test_a_process_ends_while_batches_are_read_ahead(source, found, end):
    code = (
        "import gc, os, sys, time\n"
        "from tests.helpers.batches import train_batches\n"
        "from tests.helpers.datasets import load_dataset\n"
        f"cache = {str(found.folder.parents[1])!r}\n"
        f"data = load_dataset('iqiyi_vid', directory={str(source)!r}, cache_dir=cache)\n"
        f"batches = train_batches(data, **{BOTH | {'batch_size': 690}!r})\n"
        "print(len(next(batches).clip_index), flush=True)\n"
        f"{DROPPED if end == 'gc.collect()' else ''}\n"
        "print(time.time(), flush=True)\n"
        f"{end}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    rows, began = done.stdout.split()
    assert int(rows) == 690
    assert time.time() - float(began) < 20, "it waited for what was read ahead"
    wanted = {"": 0, "gc.collect()": 0, "raise KeyError": 1, "sys.exit(3)": 3}
    assert done.returncode == wanted.get(end, -2), done.stderr
    assert done.stderr.count("Traceback") == (done.returncode in (1, -2)), done.stderr


# Memory.


def peaks_of_epochs(directory, num_clips):
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
def test_resident_memory_stays_flat_over_ten_epochs(tmp_path, python):
    clip = random_clip(np.random.default_rng(0), 30, 512)
    write_pickle(tmp_path, "face", "train", {f"c{i:05d}": clip for i in range(4000)})
    # In a process of its own: what other tests have freed comes and goes.
    code = (
        "import sys, json; from tests.test_pipeline import peaks_of_epochs; "
        "print(json.dumps(peaks_of_epochs(sys.argv[1], 4000)))"
    )
    peaks = json.loads(python(code, tmp_path))
    # All records are 125 MB: an epoch that was kept would show in every later one. One epoch has up
    # to 50 MB more on a busy machine, where more batches wait; what grows slowly shows at the end.
    assert min(peaks[5:]) - max(peaks[:2]) < 40e6, peaks
    assert np.median(peaks[7:]) - np.median(peaks[2:5]) < 25e6, peaks
