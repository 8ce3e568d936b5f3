"""Faults of workdirs: nowhere to write, a folder in use, logs cut by a kill, a full disk."""

import json
import os
import socket
import sys

import numpy as np
import pytest

from tests.helpers import limits
from tests.helpers.limits import file_limit
from tests.helpers.seen import contents
from vidjax.runs.results import Logs, truncate_log
from vidjax.utils import files

HOLD = """
import pathlib, sys, time
from vidjax.utils import files
with files.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_folder_in_use_is_refused_and_a_stale_lock_is_replaced(say, tmp_path):
    here = f"on {socket.gethostname()}"
    with limits.running([sys.executable, "-c", HOLD, tmp_path]) as child:
        assert child.stdout and child.stdout.readline() == "held\n"
        train = ("train", f"--config={limits.ROOT}/configs/knn.py")
        for words in (train, ("evaluate",)):
            error = say(*words, f"--workdir={tmp_path}", code=2)
            assert f"in use by process {child.pid} {here}" in error
            (tmp_path / "config.json").write_text("{}")
    assert str(child.pid) in (tmp_path / ".lock").read_text()  # the lock of a dead process is stale
    for dead in ("process 1 on vm", f"process {10**9} on {'host' * 9}"):  # shorter, and longer
        (tmp_path / ".lock").write_text(dead)
        with files.lock(tmp_path):
            assert (tmp_path / ".lock").read_text().rstrip() == f"process {os.getpid()} {here}"


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_text(path, "old")
    with file_limit(10), pytest.raises(OSError, match=f"cannot write '{path}': File too large"):
        files.write_text(path, 100 * "new")
    assert contents(tmp_path) == {"metrics.json": b"old"}


def line_of(step, split=None):
    values = {"step": step, "split": split} if split else {"step": step, "loss": step}
    return json.dumps(values) + "\n"


def test_log_cut_at_any_byte_is_repaired(tmp_path):
    """The log keeps exactly the whole lines up to the step."""
    path = tmp_path / "metrics.jsonl"
    lines = [line_of(5), line_of(9), line_of(9, "val"), line_of(10)]
    ends = np.cumsum([len(line) for line in lines[:3]]) - 1  # a line may lack its newline
    for cut in range(len("".join(lines)) + 1):
        path.write_text("".join(lines)[:cut])
        truncate_log(path, 9)
        assert path.read_text() == "".join(lines[: np.sum(ends <= cut)]), cut


def test_repair_of_a_log_removes_only_damaged_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line_of(1).encode() + b"\x00\xff\x00\n7\n" + line_of(3).encode() + b'{"st')
    with pytest.warns(UserWarning, match=r"damaged lines are removed: \[2, 3\]"):
        truncate_log(path, 5)
    assert path.read_text() == line_of(1) + line_of(3)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_log_that_cannot_grow_ends_with_a_whole_line(tmp_path, name):
    """The error names the file; with room again, no step is missing or repeated."""

    def write(first, last):
        logs = Logs(tmp_path, step=first - 1)
        try:
            for step in range(first, last):  # longer than its event: the log is full first
                getattr(logs, name.removesuffix(".jsonl"))(step, {"text": "x" * 100})
        finally:
            logs.close()

    def steps():
        return [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]

    with file_limit(1000), pytest.raises(OSError, match=f"cannot write '.*{name}': File too large"):
        write(1, 100)
    count = len(steps())
    assert steps() == [*range(1, count + 1)] and 4 < count < 12
    assert (tmp_path / name).read_text()[-1] == "\n"
    write(count, 20)
    assert steps() == [*range(1, 20)]
