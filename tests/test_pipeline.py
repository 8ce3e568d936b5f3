"""Batches: every clip as often as promised, in a fixed order, with exactly its own frames."""

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
STREAM: dict[str, Any] = {"max_frames": MAX_FRAMES, "crop": "window", "seed": 3, "batch_size": 8}
TRAIN: dict[str, Any] = STREAM | {"splits": ("train",), "modalities": ("face", "audio")}
CLIPS = {split: ragged_clips(split, count) for split, count in COUNTS.items()}
FIELDS = ("features", "quality", "detection", "number")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory of official files of CLIPS; val has no body file."""
    return write_ragged(tmp_path_factory.mktemp("source"), COUNTS, lacks=[("body", "val")])


@pytest.fixture(scope="module")
def found(source, tmp_path_factory):
    return prepare(source, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def dataset(source, found):
    with pytest.warns(UserWarning, match="val: no file of body"):
        return labelled(found, source)


def take(dataset, count, **options):
    """Returns the first batches of a stream; `options` override TRAIN."""
    return list(itertools.islice(train_batches(dataset, **{**TRAIN, **options}), count))


def source_clip(dataset, split, modality, index):
    """Returns the frames that were written for a clip, as a batch shows them."""
    empty = random_clip(np.random.default_rng(0), 0, RAGGED[modality])
    clip = CLIPS[split][modality].get(dataset.split(split).clips[index], empty)
    if modality == "face":
        return clip
    ones = np.ones(len(clip.features), np.float32)  # without scores
    clip = clip._replace(quality=0 * ones, detection=ones)
    return clip if modality == "body" else clip._replace(number=np.zeros(len(ones), np.int32))


def row_of(batch, modality, row):
    """Returns the real frames of one row; what is padding must be zero and come last."""
    frames = batch.frames[modality]
    length = int(frames.mask[row].sum())
    assert frames.mask[row, :length].all()
    fields = {field: np.asarray(getattr(frames, field)[row]) for field in FIELDS}
    assert not any(values[length:].any() for values in fields.values())
    return {field: values[:length] for field, values in fields.items()}, length


def assert_best_frames(fields, clip, count):
    """Asserts that these are the best frames of a clip, in time order."""
    ranked = sorted(range(len(clip.quality)), key=lambda t: (-float(clip.quality[t]), t))
    best = np.array(sorted(ranked[:count]), int)
    for field, values in fields.items():
        np.testing.assert_array_equal(values, getattr(clip, field)[best])


def test_every_clip_comes_once_an_epoch_across_batches(dataset):
    batches = take(dataset, 3 * 45 // 8 + 1)
    assert all(batch.clip_index.shape == (8,) and batch.batch_mask.all() for batch in batches)
    order = np.concatenate([batch.clip_index for batch in batches]).tolist()
    epochs = [order[i : i + 45] for i in (0, 45, 90)]
    assert all(sorted(epoch) == list(range(45)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_epoch_of_examples_ends_with_a_short_batch(dataset):
    """Each example comes once an epoch; rows that are left are empty."""
    examples = np.arange(0, 45, 2)
    batches = take(dataset, 6, epoch_clips=examples)
    for epoch in (batches[:3], batches[3:]):
        order = np.concatenate([batch.clip_index[batch.batch_mask] for batch in epoch])
        np.testing.assert_array_equal(np.sort(order), examples)
        assert epoch[2].batch_mask.tolist() == [True] * 7 + [False]
        for frames in epoch[2].frames.values():
            assert not any(field[7:].any() for field in frames)
    plan = clips_lib.make_batch_plan(
        [dataset.split("train")], ("face",), epoch_clips=examples, **STREAM
    )
    assert [plan.num_drawn(step) for step in range(5)] == [0, 8, 16, 23, 31]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("crop", "start", "examples"), [("quality", 1, None), ("window", 23, np.arange(0, 60, 2))]
)
def test_a_resumed_stream_is_the_uninterrupted_one(dataset, crop, start, examples):
    """This also holds for whole epochs whose last batch is short."""
    options = {"crop": crop, "splits": ("train", "val"), "batch_size": 9, "epoch_clips": examples}
    whole = take(dataset, start + 9, **options)
    assert_equal(whole[start:], take(dataset, 9, step=start, **options))


def test_clip_index_counts_through_the_splits(dataset):
    options = {"splits": ("val", "train"), "batch_size": 71, "max_frames": 800}
    (batch,) = take(dataset, 1, **options)
    assert sorted(batch.clip_index.tolist()) == list(range(71))
    for row, index in enumerate(batch.clip_index.tolist()):
        split, index = ("val", index) if index < 26 else ("train", index - 26)
        fields, _ = row_of(batch, "face", row)
        wanted = source_clip(dataset, split, "face", index)
        np.testing.assert_array_equal(fields["features"], wanted.features)


def test_short_clips_keep_all_frames_and_long_ones_a_window(dataset):
    starts = set()
    for batch in take(dataset, 60):
        assert batch.frames["face"].features.shape == (8, MAX_FRAMES, 6)
        assert batch.frames["audio"].features.shape == (8, 1, 4)
        assert batch.frames["face"].features.dtype == np.float16
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
    counts = clips_lib.count_cropped(splits, ("face", "audio"), MAX_FRAMES)
    lengths = [len(clip.features) for split in CLIPS for clip in CLIPS[split]["face"].values()]
    lost = [length - MAX_FRAMES for length in lengths if length > MAX_FRAMES]
    cropped = {"clips": len(lost), "frames": sum(lost)}
    assert counts == {"face": cropped, "audio": {"clips": 0, "frames": 0}}


def test_quality_crop_keeps_the_best_frames_in_time_order(dataset):
    (batch,) = take(dataset, 1, crop="quality", batch_size=45)
    for row, index in enumerate(batch.clip_index.tolist()):
        clip = source_clip(dataset, "train", "face", index)
        assert_best_frames(row_of(batch, "face", row)[0], clip, MAX_FRAMES)


@pytest.mark.parametrize(("split", "rows"), [("train", 4), ("val", 64)])
def test_evaluation_shows_every_frame_of_every_clip_once(dataset, split, rows):
    shapes: dict[int, int] = {}
    for batch in eval_batches(dataset, split=split, modalities=("face", "audio"), rows=rows):
        assert batch.clip_index.shape == batch.batch_mask.shape == (rows,)
        assert not batch.clip_index[~batch.batch_mask].any()
        assert not batch.frames["face"].mask[~batch.batch_mask].any()
        for row in np.flatnonzero(batch.batch_mask):
            index = int(batch.clip_index[row])
            assert index not in shapes
            shapes[index] = batch.frames["face"].mask.shape[1]
            for modality in ("face", "audio"):
                clip = source_clip(dataset, split, modality, index)
                assert_best_frames(row_of(batch, modality, row)[0], clip, 512)
    lengths = dataset.split(split).lengths["face"]
    wanted = {i: next(b for b in (32, 128, 512) if b >= min(n, 512)) for i, n in enumerate(lengths)}
    assert shapes == wanted


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ({32: 6, 128: 5, 512: 4}, {512: 15}),
        ({32: 600, 128: 1}, {128: 601}),
        ({32: 700, 128: 1}, {32: 700, 128: 1}),  # 700 x 96 frames of padding
        ({32: 700, 128: 1, 512: 1}, {32: 700, 512: 2}),
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
    audio, face, both = (stream(kind, np.max(lengths, axis=0)) for kind in kinds)
    for one in (audio, face):
        for batch, other in zip(one, both, strict=True):
            np.testing.assert_array_equal(batch.clip_index, other.clip_index)
            np.testing.assert_array_equal(batch.batch_mask, other.batch_mask)
    # Each dataset decides how far its modalities are padded.
    assert {batch.frames["audio"].mask.shape for batch in audio} == {(4, 1)}
    assert_equal(stream(kinds[2]), both)  # the longest of these two is the longest of all


def test_evaluation_pads_a_clip_alike_whatever_the_rows_and_the_other_clips(dataset):
    def shown(rows=4, **chosen):
        modalities = ("body", "face")
        return rows_of(
            eval_batches(dataset, split="train", modalities=modalities, rows=rows, **chosen)
        )

    every, only = shown(), np.random.default_rng(0).random(45) < 0.4
    assert sorted(every) == list(range(45))
    assert_equal(shown(rows=50), every)
    assert_equal(shown(only=only), {index: every[index] for index in np.flatnonzero(only).tolist()})
    assert shown(only=np.zeros_like(only)) == {}


def test_mistakes_are_named_before_anything_is_read(dataset):
    for changed, message in (
        ({"splits": ("test",)}, "no split 'test' in the data, only train, val"),
        ({"modalities": ("scene",)}, "no features of 'scene'\n.*config.modalities"),
        ({"splits": ("val",), "modalities": ("body",)}, "'val' has no features of 'body'"),
        ({"modalities": ("face", "face")}, "config.modalities=face,face: .* only once"),
        ({"modalities": ()}, "config.modalities=: name"),
        ({"splits": ()}, "config.data.train_splits=: name"),
        ({"batch_size": 0}, "1 or more"),
        ({"step": -1}, "step=-1: must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            train_batches(dataset, **{**TRAIN, **changed})
    with pytest.raises(ValueError, match="no split 'test'"):
        eval_batches(dataset, split="test", modalities=("face",), rows=4)
    plan = clips_lib.make_eval_plan(dataset.split("val"), ("face",))
    with pytest.raises(ValueError, match="'val' has no features of 'body'"):
        dataset.eval_batches(plan._replace(modalities=("body",)), rows=4)
    with pytest.raises(ValueError, match="no split 'test'"):
        next(dataset.packed(split="test", modalities=("face",)))


def test_blocks_have_every_clip_once_and_clips_of_one_bucket():
    rng = np.random.default_rng(0)
    for case in range(100):
        bucket, rows, read, numbers = rng.integers(-1, 3, case % 60), 1 + case % 9, [], []
        for number, places in clips_lib.split_blocks(bucket, rows):
            assert 0 < len(places) <= rows and (bucket[places] == number).all()
            read += places.tolist()
            numbers.append(number)
        assert sorted(read) == np.flatnonzero(bucket >= 0).tolist()
        wanted = [-(-int((bucket == number).sum()) // rows) for number in range(3)]
        assert np.bincount(np.array(numbers, int), minlength=3).tolist() == wanted


def test_a_file_that_is_cut_while_it_is_read_is_named(source, found, tmp_path):
    shutil.copytree(found.folder, tmp_path / "copy")
    with pytest.warns(UserWarning, match="val: no file of body"):
        copied = labelled(manifest.load_records(tmp_path / "copy"), source)
    shard = manifest.load_index(tmp_path / "copy").splits["train"].shards[2]
    batches = train_batches(copied, **{**TRAIN, "splits": ("val", "train")})
    next(batches)
    os.truncate(shard.path, 30)
    said = "expected 5 records, found 0: record 1 is"
    refused(lambda: list(itertools.islice(batches, 20)), said, str(shard.path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"),
    # The signal may come to another thread: the main one learns of it a moment later.
    quick_first(
        [
            ("os.kill(os.getpid(), 2)\nfor _ in range(600): time.sleep(0.1)", -2),
            ("raise KeyError", 1),
            ("sys.exit(3)", 3),
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_a_process_ends_while_batches_are_read_ahead(source, found, end, code):
    """Streams that were dropped before, also where the traceback of an error holds one, end too."""
    program = f"""
import gc, os, sys, time
from tests.helpers.batches import train_batches
from tests.helpers.datasets import load_dataset
cache = {str(found.folder.parents[1])!r}
data = load_dataset("iqiyi_vid", directory={str(source)!r}, cache_dir=cache)
held = []
for number in range(4):
    try:
        batches = train_batches(data, **{TRAIN!r})
        next(batches)
        if number % 2:
            raise KeyError
    except KeyError as error:
        held.append(error)
    del batches
batches = train_batches(data, **{TRAIN | {"batch_size": 200}!r})
print(len(next(batches).clip_index), flush=True)
held.clear()
gc.collect()
print(time.time(), flush=True)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    rows, began = done.stdout.split()
    assert int(rows) == 200
    assert time.time() - float(began) < 20, "it waited for what was read ahead"
    assert done.returncode == code, done.stderr
    assert done.stderr.count("Traceback") == (code != 3), done.stderr


def peaks_of_epochs(directory, num_clips):
    """Returns the most resident memory in bytes during each of ten epochs."""
    dataset = load_dataset("iqiyi_vid", directory=directory, cache_dir=f"{directory}/cache")
    options = {"modalities": ("face",), "batch_size": 256, "max_frames": 32}
    batches = train_batches(dataset, **{**TRAIN, **options})
    statm = Path(f"/proc/{os.getpid()}/statm")
    peaks = []
    for _ in range(10):
        peaks.append(0)
        for _ in itertools.islice(batches, num_clips // 256):
            pages = int(statm.read_text().split()[1])
            peaks[-1] = max(peaks[-1], pages * resource.getpagesize())
    return peaks


@pytest.mark.nightly
def test_resident_memory_stays_flat_over_ten_epochs(tmp_path, python):
    clip = random_clip(np.random.default_rng(0), 30, 512)
    write_pickle(tmp_path, "face", "train", {f"c{i:05d}": clip for i in range(4000)})
    # In a new process, because memory that other tests have freed would be counted.
    code = (
        "import sys, json; from tests.test_pipeline import peaks_of_epochs; "
        "print(json.dumps(peaks_of_epochs(sys.argv[1], 4000)))"
    )
    peaks = json.loads(python(code, tmp_path))
    # All records are 125 MB: an epoch that was kept would show in every later one. One epoch has up
    # to 50 MB more on a busy machine, where more batches wait; what grows slowly shows at the end.
    assert min(peaks[5:]) - max(peaks[:2]) < 40e6, peaks
    assert np.median(peaks[7:]) - np.median(peaks[2:5]) < 25e6, peaks
