"""What each of several processes reads: its own records, which together are those of one."""

import itertools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.batches import eval_batches, labelled, train_batches
from tests.helpers.clip_files import random_clip, write_pickle, write_truth
from tests.helpers.datasets import prepare
from vidjax.batch import Batch
from vidjax.cluster.processes import Share, own_blocks, own_places
from vidjax.commands import parts as parts_lib
from vidjax.data import memory
from vidjax.data.clips import ClipSource, make_eval_plan
from vidjax.data.records import manifest, padding, shard_files
from vidjax.data.records.codec import tf
from vidjax.data.records.dataset import Dataset

ROOT = Path(__file__).parent.parent
WIDTHS = {"face": 6, "audio": 4}
COUNTS = {"train": 43, "val": 26}
EVAL: dict[str, Any] = {"split": "train", "modalities": ("face", "audio")}
TRAIN: dict[str, Any] = {
    "splits": ("val", "train"),
    "modalities": ("face", "audio"),
    "batch_size": 12,
    "max_frames": 7,
    "crop": "window",
    "seed": 3,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of official files: clips of 0 to 700 frames, some without audio."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        names = [f"{split}_{number:03d}" for number in range(count)]
        lengths = {1: 700, 2: 100, 3: 513, 4: 32, 5: 33, 9: 90}
        face = [lengths.get(number, number % 11) for number in range(count)]
        for modality, frames in (("face", face), ("audio", [n % 3 for n in range(count)])):
            clips = {
                name: random_clip(rng, length, WIDTHS[modality])
                for name, length in zip(names, frames, strict=True)
            }
            write_pickle(folder, modality, split, clips)
        write_truth(folder, split, {name: str(i % 5 + 1) for i, name in enumerate(names)})
    return folder


@pytest.fixture(scope="module")
def found(source: Path, tmp_path_factory: pytest.TempPathFactory) -> manifest.Records:
    records = prepare(source, tmp_path_factory.mktemp("cache"))
    assert all(len(split.shards) == 8 for split in records.splits.values())
    return records


@pytest.fixture(scope="module")
def dataset(source: Path, found: manifest.Records) -> Dataset:
    return labelled(found, source)


@pytest.fixture
def copied(source: Path, found: manifest.Records, tmp_path: Path) -> Dataset:
    """A dataset over a copy of the records, to be damaged."""
    shutil.copytree(found.folder, tmp_path / "copy")
    return labelled(manifest.load_records(tmp_path / "copy"), source)


def shares(count: int) -> list[Share]:
    return [Share(number, count) for number in range(count)]


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def joined(batches: tuple[Batch, ...]) -> Batch:
    """Returns the batches of all processes as one."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def assert_equal(left: Any, right: Any) -> None:
    def check(one: np.ndarray, other: np.ndarray) -> None:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)

    jax.tree.map(check, left, right)


def rows_of(batches: list[Batch]) -> dict[int, Any]:
    """Returns clip index -> modality -> frames [T] of all real rows, each of which comes once."""
    rows: dict[int, Any] = {}
    for batch in batches:
        for row in range(len(batch.batch_mask)):
            frames = jax.tree.map(lambda array, row=row: array[row], batch.frames)
            if batch.batch_mask[row]:
                assert int(batch.clip_index[row]) not in rows
                rows[int(batch.clip_index[row])] = frames
            else:
                assert not batch.clip_index[row]
                assert not any(np.any(array) for array in jax.tree.leaves(frames))
    return rows


# Which clips and rows.


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-1, 2), max_size=60), st.integers(1, 9), st.integers(1, 6))
def test_processes_have_every_clip_once_in_blocks_of_one_bucket(
    buckets: list[int], rows: int, count: int
) -> None:
    bucket = np.array(buckets, int)
    blocks = [list(own_blocks(bucket, rows, share)) for share in shares(count)]
    for together in zip(*blocks, strict=True):
        (number,) = {number for number, _ in together}
        assert all(
            len(places) <= rows and (bucket[places] == number).all() for _, places in together
        )
    for number in range(3):
        places = [[part for which, part in own if which == number] for own in blocks]
        num_blocks = -(-int((bucket == number).sum()) // (rows * count))
        assert {len(own) for own in places} == {num_blocks}
        read = [place for own in places for part in own for place in part.tolist()]
        assert read == np.flatnonzero(bucket == number).tolist()  # each a range, one after another
    for own, share in zip(blocks, shares(count), strict=True):
        read = [place for _, part in own for place in part.tolist()]
        assert own_places(bucket, rows, share).tolist() == read


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("count", "rows"), [(1, 4), (2, 1), (2, 5), (3, 4), (4, 3), (7, 8)])
def test_blocks_of_all_processes_have_every_clip_once(
    dataset: Dataset, split: str, count: int, rows: int
) -> None:
    arguments = {**EVAL, "split": split}
    whole = rows_of(list(eval_batches(dataset, **arguments, rows=rows)))
    parts = [list(eval_batches(dataset, **arguments, rows=rows, share=s)) for s in shares(count)]
    blocks = [joined(together) for together in zip(*parts, strict=True)]
    assert all(len(block.clip_index) == rows * count for block in blocks)
    assert {block.frames["face"].mask.shape[1] for block in blocks} == {32, 128, 512}
    assert all(block.clip_index.dtype == np.int32 for block in blocks)
    found = rows_of(blocks)
    assert sorted(found) == list(range(COUNTS[split]))
    assert_equal(found, {clip: whole[clip] for clip in found})


def test_which_clips_a_process_has_follows_from_the_plan(dataset: Dataset) -> None:
    plan, order = make_eval_plan(dataset.split("train"), ("face",)), dataset.order("train")
    for share in shares(3):
        batches = list(dataset.eval_batches(plan, rows=4, share=share))
        wanted = list(own_blocks(plan.bucket[order], 4, share))
        for batch, (_, places) in zip(batches, wanted, strict=True):
            assert batch.clip_index[batch.batch_mask].tolist() == order[places].tolist()
            assert batch.batch_mask.tolist() == [row < len(places) for row in range(4)]


def test_chosen_clips_a_part_and_clips_in_memory_have_shares(dataset: Dataset) -> None:
    only = np.arange(43) % 3 == 0
    chosen = parts_lib.choose_clips(dataset, "train", ("face",), 2, 3)
    clips = {f"c{i}": {"face": np.full((i, 5), i, np.float16)} for i in range(1, 60, 4)}
    sources: list[tuple[ClipSource, dict[str, Any]]] = [
        (dataset, {"only": only}),
        (dataset, {"only": np.zeros(43, bool)}),
        (parts_lib.ClipSubset(dataset, "train", chosen), {}),
        (memory.MemoryClips.of(clips, {"face": 5}, ()), {}),
    ]
    for data, options in sources:
        arguments = {"split": "train", "modalities": ("face",), "rows": 2, **options}
        parts = [list(eval_batches(data, **arguments, share=share)) for share in shares(3)]
        blocks = [joined(together) for together in zip(*parts, strict=True)]
        whole = rows_of(list(eval_batches(data, **arguments)))
        found = rows_of(blocks)
        assert sorted(found) == sorted(whole)
        assert_equal(found, {clip: whole[clip] for clip in found})


# Which files.


def test_a_process_opens_the_files_of_its_ranges_alone(
    copied: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = []

    class Spy(padding.ShardReader):
        def __init__(self, shard: shard_files.Shard):
            opened.append(shard.path)
            super().__init__(shard)

    monkeypatch.setattr(padding, "ShardReader", Spy)
    records = manifest.load_index(tmp_path / "copy").splits["train"]
    shard_of = np.repeat(np.arange(8), [shard.records for shard in records.shards])
    plan = make_eval_plan(copied.split("train"), ("face",))
    for share in shares(4):
        places = own_places(plan.bucket[records.order], 4, share)
        wanted = {records.shards[number].path for number in shard_of[places]}
        assert 0 < len(wanted) < 8
        others = [shard.path for shard in records.shards if shard.path not in wanted]
        for path in others:
            path.rename(f"{path}.away")
        opened.clear()
        list(copied.eval_batches(plan, rows=4, share=share))
        assert sorted(opened) == sorted(wanted)  # each once, though it has clips of all buckets
        for path in others:
            Path(f"{path}.away").rename(path)


def test_an_index_that_names_a_clip_twice_is_refused_by_every_process(
    found: manifest.Records, source: Path
) -> None:
    val = found.splits["val"]
    order = val.order.copy()
    order[0] = order[1]
    for broken in (val._replace(order=order), val._replace(shards=val.shards[1:])):
        dataset = labelled(found._replace(splits={**found.splits, "val": broken}), source)
        for share in shares(3):
            with pytest.raises(ValueError, match="did not come exactly once, such as val_0"):
                eval_batches(dataset, split="val", modalities=("face",), rows=4, share=share)


# Training.


@pytest.mark.parametrize("crop", ["window", "quality"])
@pytest.mark.parametrize(
    ("count", "start"),
    [(2, 0), (3, 36), (4, 149), pytest.param(12, 12, marks=pytest.mark.slow)],
)
def test_rows_of_all_processes_are_the_batch_of_one(
    dataset: Dataset, crop: str, count: int, start: int
) -> None:
    arguments = {**TRAIN, "crop": crop, "start": start}
    num_batches = 3 * sum(COUNTS.values()) // 12
    whole = take(train_batches(dataset, **arguments), num_batches)
    parts = [
        take(train_batches(dataset, **arguments, share=share), num_batches)
        for share in shares(count)
    ]
    for batch, *together in zip(whole, *parts, strict=True):
        assert all(len(part.clip_index) == len(part.batch_mask) == 12 // count for part in together)
        assert_equal(joined(tuple(together)), batch)


def test_a_batch_that_cannot_be_split_is_refused(dataset: Dataset) -> None:
    message = "^config.batch_size=12 cannot be split over 5 processes: use a multiple$"
    with pytest.raises(ValueError, match=message):
        train_batches(dataset, **TRAIN, share=Share(4, 5))


def location(data: Dataset, records: manifest.SplitRecords, clip: int) -> tuple[int, int]:
    """Returns the shard of a clip of 'train', and the number of its record there."""
    place = int(np.flatnonzero(data.order("train") == clip)[0])
    ends = np.cumsum([shard.records for shard in records.shards])
    shard = int(np.searchsorted(ends, place, side="right"))
    return shard, place - int(ends[shard]) + records.shards[shard].records


def damage(shard: shard_files.Shard, at: int) -> None:
    """Changes a byte of a file, and neither its size nor its time."""
    stat = shard.path.stat()
    content = bytearray(shard.path.read_bytes())
    content[at] ^= 16
    shard.path.write_bytes(content)
    os.utime(shard.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_record_is_refused_by_the_process_that_reads_it(
    copied: Dataset, tmp_path: Path
) -> None:
    records = manifest.load_index(tmp_path / "copy").splits["train"]
    arguments = {**TRAIN, "splits": ("train",), "batch_size": 42}
    read = [take(train_batches(copied, **arguments, share=share), 1)[0] for share in shares(2)]
    assert not set(read[0].clip_index) & set(read[1].clip_index)
    shard, number = location(copied, records, int(read[1].clip_index[3]))
    places = shard_files.find_records(records.shards[shard])
    damage(records.shards[shard], int(places.start[number] + places.size[number] // 2))
    (again,) = take(train_batches(copied, **arguments, share=Share(0, 2)), 1)
    assert_equal(again, read[0])
    with pytest.raises(ValueError, match=rf"record {number + 1} is damaged") as error:
        next(train_batches(copied, **arguments, share=Share(1, 2)))
    assert str(records.shards[shard].path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_file_that_is_cut_while_it_is_read_is_named(copied: Dataset, tmp_path: Path) -> None:
    shard = manifest.load_index(tmp_path / "copy").splits["train"].shards[2]
    batches = train_batches(copied, **TRAIN, share=Share(1, 2))
    next(batches)
    os.truncate(shard.path, 30)
    with pytest.raises(ValueError, match="expected 6 records, found 0: record 1 is") as error:
        take(batches, 20)
    assert str(shard.path) in str(error.value) and len(str(error.value).splitlines()) <= 3


@pytest.mark.slow
def test_a_process_ends_while_batches_are_read_ahead(source: Path, found: manifest.Records) -> None:
    code = (
        "from tests.helpers.batches import train_batches\n"
        "from vidjax.data.clips import Share\n"
        "from tests.helpers.datasets import load_dataset\n"
        f"cache = {str(found.folder.parents[1])!r}\n"
        f"data = load_dataset('iqiyi_vid', directory={str(source)!r}, cache_dir=cache)\n"
        f"batches = train_batches(data, **{TRAIN | {'batch_size': 690}!r}, share=Share(0, 2))\n"
        "print(len(next(batches).clip_index))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "345\n"), done.stderr
    assert "Exception" not in done.stderr, done.stderr


# Single records.


def test_nothing_but_the_lengths_is_read_of_other_records(
    found: manifest.Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], shard_files._read

    def spy(file: Any, start: int, size: int) -> bytes:
        read.append((Path(file.name), start, size))
        return original(file, start, size)

    monkeypatch.setattr(shard_files, "_read", spy)
    shards = found.splits["train"].shards
    files = shard_files.RecordFiles(shards)
    assert not read
    content = files.read(np.array([3, 0, 3]), np.array([2, 1, 0]))
    assert {path for path, _, size in read if size == 12} == {shards[0].path, shards[3].path}
    own = [(path, size - 4) for path, _, size in read if size != 12]
    assert own == [
        (shards[0].path, len(content[1])),
        (shards[3].path, len(content[0])),
        (shards[3].path, len(content[2])),
    ]
    for row, (shard, number) in enumerate(((3, 2), (0, 1), (3, 0))):
        wanted = list(tf.data.TFRecordDataset(str(shards[shard].path)).as_numpy_iterator())
        assert content[row] == wanted[number]
    read.clear()
    files.read(np.array([3]), np.array([1]))
    assert len(read) == 1  # where records lie is found once


def test_any_damaged_byte_of_a_record_is_found(found: manifest.Records, tmp_path: Path) -> None:
    (shard,) = [
        shard for shard in found.splits["train"].shards if shard.path.name.count("00003-of")
    ]
    shard = shard._replace(path=Path(shutil.copy(shard.path, tmp_path / "shard")))
    start, size = shard_files.find_records(shard)
    first, last = int(start[2]), int(start[2] + size[2]) + shard_files.SUM
    files = shard_files.RecordFiles([shard])
    rng = np.random.default_rng(0)
    assert len(files.read(np.zeros(5, int), np.arange(5))) == 5
    for at in {first, last - 1, *rng.integers(first, last, 30).tolist()}:
        damage(shard, at)
        with pytest.raises(ValueError, match=r"shard: record 3 is damaged$"):
            files.read(np.zeros(5, int), np.arange(5))
        files.read(np.zeros(4, int), np.array([0, 1, 3, 4]))
        damage(shard, at)
    for at in range(first - shard_files.HEADER, first):
        damage(shard, at)
        with pytest.raises(ValueError, match=r"shard: (record 3 is damaged|ends before byte)"):
            shard_files.find_records(shard)
        damage(shard, at)


def test_a_file_of_another_length_is_refused(found: manifest.Records, tmp_path: Path) -> None:
    shard = found.splits["val"].shards[0]
    content = shard.path.read_bytes()
    shard = shard._replace(path=tmp_path / "shard")
    (size,) = struct.unpack_from("<Q", content)
    for changed in (b"", content[: size + 16], content[:-1], content + b"x", content[: size + 20]):
        shard.path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"shard: (\d+ bytes, expected|ends before byte)"):
            shard_files.RecordFiles([shard]).read(np.array([0]), np.array([0]))
