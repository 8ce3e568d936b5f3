"""The terminal: help at 80 columns, and a quiet first run."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from vidjax.cli import gallery_commands, program
from vidjax.runs import config as config_lib
from vidjax.utils import messages

ROOT = Path(__file__).parent.parent


def test_help_fits_eighty_columns_and_names_commands_fields_and_files_that_exist(
    capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    known = dict(config_lib.fields(config_lib.default()))
    calls = [(), *((name,) for name in program.COMMANDS)]
    calls += [("gallery", name) for name in gallery_commands.COMMANDS]
    for words in calls:
        with pytest.raises(SystemExit) as caught:
            program.main([*words, "--help"])
        said = capsys.readouterr().out
        assert caught.value.code == 0 and max(map(len, said.splitlines())) <= 80
        every = {(): program.COMMANDS, ("gallery",): gallery_commands.COMMANDS}
        for name in every.get(words, ()):
            assert re.search(rf"^ +{name}\s+\w+", said, re.MULTILINE), name
        assert known.keys() >= {*re.findall(r"--config\.([a-z_.]+)=", said)}
        assert all((ROOT / path).is_file() for path in re.findall(r"configs/\w+\.py", said))


# The only lines that a training command may print.
SEEN = [
    r"making the synthetic dataset in .*",
    r"converting \d+ files of .*",
    r"(read|pack|write|convert)\w* +\d+% \|.*",
    r"(read|pack|write|convert)\w*: .*",
    r"train:? compiling",
    r"clips stay on the device: [\d,]+ MB, read in [\d.]+ s",
    r"(train|evaluate) +\d+% \|.*\| [\d.]+k?/[\d.]+k?, .*",
    r"(train|evaluate): [\d,]+ of [\d,]+ clips, .*",
    r"step \d+ of \d+: map \d\.\d{4}, top1 \d\.\d{4}",
    r"train",
    r"  (workdir|MAP@100|best|data|clips|identities|time|ranking|report) +\S.*",
    r"",
]
TINY = (
    "--config=configs/quality_fusion.py:iqiyi_vid", "--config.num_epochs=4",
    "--config.batch_size=32", "--config.model.layers=((8,'swish',True,0.5),)",
    "--config.eval.report=False",
)  # fmt: skip


def check(text, workdir):
    """Asserts that a text has no line but SEEN, nor does an overwritten line, and a summary."""
    states = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    assert [x for x in states if not any(re.fullmatch(seen, x.rstrip()) for seen in SEEN)] == []
    assert len(re.findall(r"step \d+ of \d+: map", text)) == 1
    rows = dict(re.findall(r"^  (\S+) +(\S.*?)\r?$", text.rpartition("\ntrain")[2], re.MULTILINE))
    assert rows["workdir"] == str(workdir)
    assert re.fullmatch(r"[01]\.\d{4} on val; top-1 [01]\.\d{4}", rows["MAP@100"])
    assert re.fullmatch(r"iqiyi_vid in \S+, sha256 [0-9a-f]{12}", rows["data"])


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_run_shows_nothing_but_its_own_lines(tmp_path, official_dir, cache_dir, terminal):
    """On a terminal, as in a notebook's shell; and with both streams in files."""
    command = [sys.executable, "-m", "vidjax.main", *TINY, f"--config.data.dir={official_dir}"]
    command.append(f"--workdir={tmp_path}/run")
    names = ("TF_CPP_MIN_LOG_LEVEL", "JAX_PLATFORMS", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"VIDJAX_CACHE": str(cache_dir), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    if not terminal:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
        said, told = done.stdout.decode(), done.stderr.decode()
        check(f"{told}\n{said}", tmp_path / "run")
        assert "\r" not in told + said and "\x1b" not in told + said
        assert len(told.splitlines()) < 40 and said.startswith("train\n")
        return
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (40, 100))
    child = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    content, end = io.BytesIO(), threading.Timer(600, child.kill)
    end.start()
    try:
        with contextlib.suppress(OSError):  # the other end was closed
            while True:
                content.write(os.read(ours, 65536))
        assert child.wait(60) == 0
    finally:
        end.cancel()
        child.kill()
        os.close(ours)
    text = content.getvalue().decode()
    check(text, tmp_path / "run")
    bar = r"train +\d+% \|[^\r]*clips/s, loss [\d.]+[^\r]*, [\d:]+ left"
    assert re.search(bar, text), text


def test_a_long_name_is_printed_without_its_middle():
    assert messages.shorten("x" * 40) == "x" * 40
    name = messages.shorten("a" * 200 + " (2009).mp4, 97%")
    assert len(name) == 40 and name.startswith("a" * 24 + "...") and name.endswith(".mp4, 97%")
