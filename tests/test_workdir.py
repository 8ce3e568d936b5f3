"""Workdirs: files whole or not at all, one process at a time, signals noted once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vidjax.run import signals, workdir


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "w").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        workdir.make_workdir(tmp_path / "w")
    assert workdir.make_workdir(tmp_path / "a" / "b").is_dir()


def test_write_text_replaces_whole(tmp_path):
    path = tmp_path / "x.txt"
    workdir.write_text(path, "old")
    workdir.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        workdir.write_text(tmp_path / "absent" / "x.txt", "text")
    with pytest.raises(TypeError, match="no JSON form"):
        workdir.write_json(tmp_path / "x.json", object())
    assert os.listdir(tmp_path) == []


def test_a_second_process_is_refused(tmp_path):
    code = (
        "import pathlib, sys, time\nfrom vidjax.run import workdir\n"
        "with workdir.lock(pathlib.Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"in use by process {child.pid} on"),
            workdir.lock(tmp_path),
        ):
            pass
    finally:
        child.kill()
        child.communicate()
    with workdir.lock(tmp_path):  # the kernel let go of it
        pass


def test_the_first_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals.catch_interruption() as interruption:
        assert interruption.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interruption.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_ends_the_process():
    code = (
        "import os, signal\nfrom vidjax.run import signals\n"
        "with signals.catch_interruption():\n"
        " os.kill(os.getpid(), signal.SIGINT)\n os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == 130
