"""Stored clips that are damaged, cut, swapped or half written are reported, never read silently.

Clips are stored in flat files, SPLIT/MODALITY/FIELD.bin. Their folder also contains manifest.json,
index.npz and data_report.json.
"""

import contextlib
import functools
import gc
import itertools
import os
import random
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
from tests.helpers.clip_files import random_clip, write_pickle, write_truth
from tests.helpers.datasets import prepare, record_digests
from tests.helpers.seen import refused
from vidjax.data import iqiyi_vid
from vidjax.data.store import load_store

pytestmark = pytest.mark.slow
NUM_CLIPS = 240
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
def opened(source, tmp_path):
    return prepare(source, tmp_path / "cache")


# Functions that read every clip. A batch of training has all clips; two batches are two epochs.
READERS = (
    lambda data: list(data.packed(split="train", modalities=("face",))),
    lambda data: list(itertools.islice(train_batches(data, **STREAM), 2)),
    lambda data: list(eval_batches(data, split="train", modalities=("face",), rows=64)),
)


def file_of(opened, field="features"):
    """Returns a file of the faces of the split train."""
    return getattr(opened.splits["train"].packed.frames["face"], field).file


@pytest.mark.parametrize("field", ["features", "quality", "number"])
def test_every_reader_reports_the_damaged_file(opened, source, field):
    path = file_of(opened, field).path
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    zeros = whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :]
    words = f"{path}' does not match its sha256\ndelete "
    for content in (whole[: len(whole) // 2], whole[:-1], b"", bytes(flipped), zeros):
        path.write_bytes(content)
        refused(lambda: load_store(opened.folder), words)
        for read in READERS:  # the file was opened before
            refused(functools.partial(read, labelled(opened, source)), words)
    path.unlink()
    refused(lambda: load_store(opened.folder), f"{path}' does not exist\ndelete ")


def test_damage_that_changes_no_size_and_no_time_is_found_when_clips_are_read(
    opened, source, tmp_path, campaign
):
    chance, (path, _, time_ns, _) = random.Random(20), file_of(opened)
    whole = path.read_bytes()
    for _ in range(100 if campaign else 2):
        path.write_bytes(whole)
        mutations.flip(path, chance)
        os.utime(path, ns=(time_ns, time_ns))  # a failing disk does not change the time
        data = labelled(load_store(opened.folder), source)
        refused(functools.partial(chance.choice(READERS), data), str(path), "sha256")
    # The same file of another dataset, whose clips have the same names and lengths.
    stale = prepare(write_source(tmp_path / "other", 1), tmp_path / "other cache")
    shutil.copy(file_of(stale).path, path)
    os.utime(path, ns=(time_ns, time_ns))
    data = labelled(load_store(opened.folder), source)
    refused(lambda: READERS[0](data), str(path), "sha256")


def test_files_that_change_while_they_are_read_are_an_error(opened, source, monkeypatch):
    """The files have their sha256 again when they are checked."""
    frames = opened.splits["train"].packed.frames["face"]
    read = type(frames.features).__getitem__
    monkeypatch.setattr(type(frames.features), "__getitem__", lambda x, rows: read(x, rows) * 2)
    words = "changed while it was read\nrun the command again"
    refused(lambda: READERS[0](labelled(opened, source)), words)


def convert_command(source, cache):
    program = [sys.executable, "-m", "vidjax.data.iqiyi_vid"]
    return [*program, source, f"--cache_dir={cache}"]


def names(folder):
    """Returns the names of the files and folders in a folder, except locks."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


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
        killed = False
        while not killed and process.poll() is None:
            for child in limits.children_of(process.pid):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    words = Path(f"/proc/{child}/cmdline").read_bytes()
                    if killed := b"vidjax.data.untrusted.sandbox" in words:
                        os.kill(child, signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    assert killed and process.returncode == 2 and not out
    lines = err.splitlines()  # the first line names the data
    assert "was killed, perhaps for lack of memory" in lines[1] and len(lines) <= 4, lines
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
        folder = prepare(source, cache).folder
        assert record_digests(folder) == whole
        remains = names(root) - {folder.name}  # of the killed conversion
        assert [Path(name).suffix for name in remains] in ([], [".partial"])
        shutil.rmtree(folder)
    assert any(killed)
    prepare(source, cache)
    assert len(names(root)) == 1  # without remains of killed conversions


def test_conversion_on_a_full_disk_ends_with_one_error_and_leaves_no_files(
    tmp_path, campaign, say, mounted
):
    source, disk = write_much(tmp_path / "source"), mounted("size=16m")
    if not disk:
        pytest.skip("needs the right to mount a disk")
    folder, cache = prepare(source, tmp_path / "whole").folder, disk / "cache"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for left in np.geomspace(16384, 0.9 * size, 40 if campaign else 3).astype(int).tolist():
        with limits.filled(disk, left):
            error = say(source, f"--cache_dir={cache}", program=iqiyi_vid.main, code=2)
        assert str(cache) in error and "No space left" in error, error
        assert names(cache / "iqiyi_vid") == set()
        assert not [*cache.rglob("manifest.json")]
    say(source, f"--cache_dir={cache}", program=iqiyi_vid.main)
    assert len(names(cache / "iqiyi_vid")) == 1
    gc.collect()  # errors hold maps of deleted files, and the disk must not be busy
