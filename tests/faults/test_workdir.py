"""Faults of workdirs: nowhere to write, a folder in use, logs cut by a kill, a full disk."""

import json
import os
import socket
import sys

import numpy as np
import pytest

from tests.helpers import limits
from tests.helpers.limits import file_limit
from tests.helpers.small_runs import ROOT
from vidjax.runs.results import Logs, keep_until
from vidjax.utils import files

HOLD = """
import pathlib, sys, time
from vidjax.utils import files
with files.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_folder_in_use_is_refused_and_a_stale_lock_taken_over(say, tmp_path, mode):
    words = [f"--workdir={tmp_path}", f"--mode={mode}"]
    if mode == "train":
        words.append(f"--config={ROOT / 'configs/mma.py'}")
    else:
        (tmp_path / "config.json").write_text("{}")
    with limits.running([sys.executable, "-c", HOLD, tmp_path]) as child:
        assert child.stdout and child.stdout.readline() == "held\n"
        said = say(*words, code=2)
        assert f"in use by process {child.pid} on {socket.gethostname()}" in said
    assert str(child.pid) in (tmp_path / ".lock").read_text()  # of the dead, and nobody's
    for dead in ("process 1 on vm", f"process {10**9} on {'host' * 9}"):  # shorter, and longer
        (tmp_path / ".lock").write_text(dead)
        with files.lock(tmp_path):
            owner = (tmp_path / ".lock").read_text()
            assert owner.rstrip() == f"process {os.getpid()} on {socket.gethostname()}"


def line_of(step, split=None):
    values = {"step": step, "split": split} if split else {"step": step, "loss": step}
    return json.dumps(values) + "\n"


def test_a_log_cut_anywhere_is_repaired(tmp_path):
    """At every byte that a kill may leave: whole lines up to the step, none twice, none missing."""
    path = tmp_path / "metrics.jsonl"
    lines = [(step, line_of(step)) for step in (5, 9, 10)]
    lines.insert(2, (9, line_of(9, "val")))
    content = "".join(line for _, line in lines)
    for cut in range(len(content) + 1):
        for step in (5, 9):
            path.write_text(content[:cut])
            keep_until(path, step)
            ends = np.cumsum([len(line) for _, line in lines]) - 1  # a line may lack its newline
            kept = [
                line
                for (at, line), end in zip(lines, ends, strict=True)
                if cut >= end and at <= step
            ]
            assert path.read_text() == "".join(kept), (cut, step)


def test_a_damaged_line_takes_no_other_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line_of(1).encode() + b"\x00\xff\x00\n7\n" + line_of(3).encode() + b'{"st')
    with pytest.warns(UserWarning, match=r"damaged lines are removed: \[2, 3\]"):
        keep_until(path, 5)
    assert path.read_text() == line_of(1) + line_of(3)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_log_that_cannot_grow_ends_with_a_whole_line(tmp_path, name):
    """The error names the file; where there is room again no step is missing and none twice."""
    logs = Logs(tmp_path, step=0)
    write = logs.metrics if name == "metrics.jsonl" else logs.timing
    step, text = 0, "x" * 100  # longer than its event: the log is full first
    with file_limit(1000), pytest.raises(OSError, match=f"cannot write '.*{name}': File too large"):
        for step in range(1, 100):
            write(step, {"text": text})
    logs.close()
    assert 5 < step < 12
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, step))
    assert lines[-1].endswith("\n")
    logs = Logs(tmp_path, step=step - 2)
    write = logs.metrics if name == "metrics.jsonl" else logs.timing
    for again in range(step - 1, 20):
        write(again, {"text": text})
    logs.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]
    assert steps == list(range(1, 20))


def test_a_file_that_cannot_be_written_keeps_what_it_was(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_text(path, "old")
    with file_limit(10), pytest.raises(OSError, match=f"cannot write '{path}': File too large"):
        files.write_text(path, 100 * "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_lock_is_held_on_a_full_disk_too(tmp_path):
    with (
        file_limit(0),
        files.lock(tmp_path),
        pytest.raises(ValueError, match="in use by another process"),
        files.lock(tmp_path),
    ):
        pass
