"""Records that are damaged, cut, swapped or half written are reported, and never read silently.

Records are the TFRecord files ("shards") into which a conversion writes the clips. Besides shards,
their folder contains manifest.json, index.npz and data_report.json.
"""

import contextlib
import functools
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.campaigns import mutations
from tests.helpers import limits
from tests.helpers.batches import eval_batches, labelled, train_batches
from tests.helpers.clip_files import random_clip, write_labels, write_npz, write_pickle, write_truth
from tests.helpers.datasets import prepare, record_digests
from tests.helpers.seen import refused
from vidjax.data import iqiyi_vid
from vidjax.data.records import conversion
from vidjax.data.records.shards import check_shard

pytestmark = pytest.mark.slow
NUM_CLIPS = 240  # 30 in each of 8 shards
STREAM: dict[str, Any] = {
    "splits": ("train",), "modalities": ("face",), "batch_size": NUM_CLIPS, "max_frames": 8,
    "crop": "quality", "seed": 0,
}  # fmt: skip


def write_source(folder, seed=0):
    """Writes official files of NUM_CLIPS clips; returns their folder."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    clips = {f"c{i:03d}": random_clip(rng, 1 + i % 3, 5) for i in range(NUM_CLIPS)}
    write_pickle(folder, "face", "train", clips)
    write_truth(folder, "train", {name: str(1 + i % 7) for i, name in enumerate(clips)})
    return folder


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "official")


@pytest.fixture
def records(source, tmp_path):
    return prepare(source, tmp_path / "cache")


def shards_of(records):
    return records.splits["train"].shards


def boundaries(content):
    """Returns the offset in bytes of each record of a shard, and then the size of the shard."""
    places = [0]
    while places[-1] < len(content):
        length = int.from_bytes(content[places[-1] : places[-1] + 8], "little")
        places.append(places[-1] + 8 + 4 + length + 4)  # length, checksum, content, checksum
    return places


def as_if_unchanged(records):
    """Returns the records, as if the shards always had their present sizes and times."""
    shards = tuple(
        shard._replace(size=shard.path.stat().st_size, mtime_ns=shard.path.stat().st_mtime_ns)
        for shard in shards_of(records)
    )
    return records._replace(splits={"train": records.splits["train"]._replace(shards=shards)})


# Functions that read every clip. A batch of training has all clips; two batches are two epochs.
READERS = (
    lambda data: list(data.packed(split="train", modalities=("face",))),
    lambda data: list(itertools.islice(train_batches(data, **STREAM), 2)),
    lambda data: list(eval_batches(data, split="train", modalities=("face",), rows=64)),
)


def verify(records):
    """Returns the different errors of the index and of damaged shards."""
    problems = dict[str, None]()
    checks = [functools.partial(check_shard, shard) for shard in shards_of(records)]
    for check in (functools.partial(conversion.load_records, records.folder), *checks):
        try:
            check()
        except ValueError as error:
            problems[str(error)] = None
    return [*problems]


def test_every_reader_reports_the_damaged_file(records, source):
    """A shard is damaged after `records` was made. Readers also find damage of equal size and time.

    `as_if_unchanged` returns `records` with the present size and time of the shard.
    """
    shard = shards_of(records)[5]
    whole = shard.path.read_bytes()
    places = boundaries(whole)  # places[n] is the first byte after n records
    # A bit of record 18 flips: in its content (byte 40), length (0) or checksum of the length (9).
    flipped = [bytearray(whole) for _ in range(3)]
    for damaged, at in zip(flipped, (40, 0, 9), strict=True):
        damaged[places[17] + at] ^= 16
    cases = (
        whole[: places[8]], whole + whole[: places[1]], *flipped, whole[: places[8] + 5], b"",
        whole[: places[4]] + whole[places[5] :],
        whole[: places[3]] + bytes(100) + whole[places[3] + 100 :],
    )  # fmt: skip

    for content in cases:
        shard.path.write_bytes(content)

        (problem,) = verify(records)
        messages = [problem, refused(lambda: conversion.load_records(records.folder))]
        for opened, read in itertools.product((records, as_if_unchanged(records)), READERS):
            messages.append(refused(functools.partial(read, labelled(opened, source))))

        for message in messages:
            assert f"{shard.path}' does not match its sha256\ndelete " in message

    shard.path.unlink()
    data = labelled(records, source)
    for read in (*READERS, lambda _: conversion.load_records(records.folder)):
        error = refused(functools.partial(read, data))
        assert f"{shard.path}' does not exist, but must have 30 records" in error


def test_damaged_or_swapped_shards_are_refused_when_they_are_read(
    records, source, tmp_path, campaign
):
    chance = random.Random(20)
    path, second = (shard.path for shard in shards_of(records)[:2])
    whole, time_ns = path.read_bytes(), path.stat().st_mtime_ns

    for _ in range(100 if campaign else 1):
        for damage in (mutations.flip, mutations.cut):
            path.write_bytes(whole)
            damage(path, chance)
            os.utime(path, ns=(time_ns, time_ns))  # a failing disk does not change the time
            (problem,) = verify(records)
            data = labelled(as_if_unchanged(records), source)
            for error in (problem, refused(functools.partial(chance.choice(READERS), data))):
                assert str(path) in error and "sha256" in error

    # The shard is replaced by another shard, and then by the same shard of another conversion,
    # whose clips have the same names and lengths, but other features.
    stale = prepare(write_source(tmp_path / "other", 1), tmp_path / "other cache")
    for other in (second, shards_of(stale)[0].path):
        path.unlink()
        shutil.copy2(other, path)
        (problem,) = verify(records)
        for error in (problem, refused(lambda: conversion.load_records(records.folder))):
            assert str(path) in error


def convert_command(source, cache):
    program = [sys.executable, "-m", "vidjax.data.iqiyi_vid"]
    return [*program, source, f"--cache_dir={cache}"]


def names(folder):
    """Returns the names of the files and folders in a folder, except locks."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


def kill_reader(process):
    """Kills the child of a conversion that reads a pickle; False if the conversion ended first."""
    while process.poll() is None:
        for child in limits.children_of(process.pid):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if b"vidjax.data.untrusted.sandbox" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(child, signal.SIGKILL)
                    return True
    return False


def write_much(folder):
    """Writes 300 clips of 20 frames, whose conversion takes long enough to be killed."""
    folder.mkdir()
    clips = {f"c{i:05d}": random_clip(np.random.default_rng(i), 20, 128) for i in range(300)}
    for modality in ("face", "head"):
        write_pickle(folder, modality, "train", clips)
    return folder


def test_conversion_whose_reader_is_killed_ends_with_one_error_and_leaves_no_files(tmp_path):
    source, cache = write_much(tmp_path / "source"), tmp_path / "cache"
    whole = record_digests(prepare(source, tmp_path / "whole").folder)

    with limits.running(convert_command(source, cache)) as process:
        assert kill_reader(process)
        out, err = process.communicate(timeout=300)

    assert process.returncode == 2 and not out
    _, *lines = err.splitlines()  # the first line names the data
    assert "was killed, perhaps for lack of memory" in lines[0] and len(lines) <= 3, lines
    assert names(cache / "iqiyi_vid") == set()
    assert record_digests(prepare(source, cache).folder) == whole  # the next conversion succeeds


def test_conversion_after_a_killed_conversion_gives_the_same_bytes(tmp_path, campaign, fault_seed):
    rng = np.random.default_rng(fault_seed)
    source, cache = write_much(tmp_path / "source"), tmp_path / "cache"
    began = time.monotonic()
    whole = record_digests(prepare(source, tmp_path / "whole").folder)
    seconds = time.monotonic() - began
    words, root, killed = convert_command(source, cache), cache / "iqiyi_vid", []

    for _ in range(30 if campaign else 2):
        # The context kills the conversion: the first as soon as it writes, and others later.
        with limits.running(words) as process:
            while process.poll() is None and not list(root.glob("*.partial")):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, seconds) if killed else 0)
        killed.append(process.returncode == -signal.SIGKILL)

        # The next conversion succeeds, even while children of the killed conversion still run.
        again = subprocess.run(words, capture_output=True)
        assert again.returncode == 0, again.stderr
        records = prepare(source, cache)
        assert record_digests(records.folder) == whole
        assert verify(records) == []
        remains = names(root) - {records.folder.name}  # of the killed conversion
        assert all(name.endswith(".partial") for name in remains)
        assert len(remains) <= 1
        shutil.rmtree(records.folder)

    assert any(killed)
    prepare(source, cache)
    assert len(names(root)) == 1  # the records, without remains of killed conversions


def test_conversion_on_a_full_disk_ends_with_one_error_and_leaves_no_files(tmp_path, campaign, say):
    """A limit on the size of each file imitates a full disk."""
    source, cache = write_much(tmp_path / "source"), tmp_path / "cache"
    records = prepare(source, tmp_path / "whole")
    size = sum(path.stat().st_size for path in records.folder.rglob("*") if path.is_file())

    most = 0.1 * size  # less than a shard, because there are 8 shards
    for limit in np.geomspace(1024, most, 40 if campaign else 2).astype(int).tolist():
        with limits.file_limit(limit):
            error = say(source, f"--cache_dir={cache}", program=iqiyi_vid.main, code=2)
        assert str(cache) in error and re.search("File too large|No space left", error), error
        assert names(cache / "iqiyi_vid") == set()
        assert not [*cache.rglob("manifest.json")]

    say(source, f"--cache_dir={cache}", program=iqiyi_vid.main)
    assert len(names(cache / "iqiyi_vid")) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_conversion_and_training_fit_into_2_gb_and_256_open_files(tmp_path, mode):
    """The shards take 0.1 GB."""
    rng, clips, labels = np.random.default_rng(0), {"train": {}, "val": {}}, {}
    for number in range(3000):
        split = "train" if number < 2500 else "val"
        face, body = rng.normal(size=(2, 4, 2048)).astype("f2")
        clips[split][f"clip{number}"] = {"face": face, "body": body}
        labels[f"clip{number}"] = f"p{number % 20}"
    write_labels(write_npz(tmp_path / "data", clips) / "labels.csv", labels)

    ended = limits.run(
        [
            "sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", sys.executable, "-m", "vidjax.main",
            "--config=quality_fusion:face,body", "--config.num_epochs=1",
            "--config.data.name=arrays", f"--config.data.dir={tmp_path / 'data'}",
            f"--config.data.mode={mode}", f"--workdir={tmp_path / 'run'}",
        ],
        VIDJAX_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-1000:]
    assert ended.peak < 2 << 30  # 2 GB
    assert (tmp_path / "run" / "report.html").exists()
