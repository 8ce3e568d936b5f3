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
MMA = "--config=configs/mma.py"
FILES = f"{MMA}:iqiyi_vid,face,head"  # with --workdir and --config.data.dir of the test's own


def helps():
    yield from ((name, "--help") for name in program.COMMANDS)
    yield from (("gallery", name, "--help") for name in gallery_commands.COMMANDS)
    yield from (("--help",),)


@pytest.mark.parametrize("words", [*helps()], ids=" ".join)
def test_help_fits_eighty_columns_and_has_an_example(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        program.main(words)
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert len(said.splitlines()) <= 60
    assert words == ("gallery", "--help") or "\nexample" in said
    every = {("--help",): program.COMMANDS, ("gallery", "--help"): gallery_commands.COMMANDS}
    for name in every.get(words, ()):
        assert re.search(rf"^ +{name}\s+\w+", said, re.MULTILINE), name
    known = dict(config_lib.fields(config_lib.default()))
    for field in re.findall(r"--config\.([a-z_.]+)=", said):
        assert field in known
    for path in re.findall(r"configs/\w+\.py", said):
        assert (ROOT / path).is_file()


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
    FILES, "--config.num_epochs=4", "--config.batch_size=32", "--config.model.embed_dim=16",
    "--config.model.num_clusters=2", "--config.eval.report=False",
)  # fmt: skip


def unknown(text):
    """Returns the lines that are not in SEEN, with every state of an overwritten line."""
    states = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    return [line for line in states if not any(re.fullmatch(seen, line.rstrip()) for seen in SEEN)]


def environment(cache):
    names = ("TF_CPP_MIN_LOG_LEVEL", "JAX_PLATFORMS", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return {**env, "VIDJAX_CACHE": str(cache), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}


@pytest.mark.slow
def test_a_run_shows_nothing_but_its_own_lines(tmp_path, official_dir, cache_dir):
    """On a terminal, as in a notebook's shell; then with both streams in files."""
    command = [sys.executable, "-m", "vidjax.main", *TINY, f"--config.data.dir={official_dir}"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (40, 100))
    child = subprocess.Popen(
        [*command, f"--workdir={tmp_path}/a"], cwd=ROOT, env=environment(cache_dir),
        stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL,
    )  # fmt: skip
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
    assert unknown(text) == []
    bar = re.search(r"train +\d+% \|[^\r]*clips/s, loss [\d.]+[^\r]*, [\d:]+ left", text)
    assert bar, text
    assert len(re.findall(r"step \d+ of \d+: map", text)) == 1
    assert_summary(text.replace("\r", ""), tmp_path / "a")

    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/b"], cwd=ROOT, env=environment(cache_dir),
        capture_output=True, check=True,
    )  # fmt: skip
    said, told = done.stdout.decode(), done.stderr.decode()
    assert unknown(told) == []
    assert "\r" not in told + said and "\x1b" not in told + said
    assert len(told.splitlines()) < 40
    assert len(re.findall(r"^step \d+ of \d+: map", told, re.MULTILINE)) == 1
    assert said.startswith("train\n")
    assert_summary(said, tmp_path / "b")


def assert_summary(text, workdir):
    """Asserts that a summary ends the text: short and aligned."""
    lines = text.splitlines()
    lines = lines[max(i for i, line in enumerate(lines) if line == "train") :]
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines[1:])
    names = ["workdir", "MAP@100", "best", "data", "clips", "identities", "time", "ranking"]
    assert list(rows) == names
    assert rows["workdir"] == str(workdir)
    assert re.fullmatch(r"[01]\.\d{4} on val; top-1 [01]\.\d{4}", rows["MAP@100"])
    assert re.fullmatch(r"[01]\.\d{4} at step \d+", rows["best"])
    assert re.fullmatch(r"iqiyi_vid in \S+, sha256 [0-9a-f]{12}", rows["data"])
    assert {len(re.sub(r"(  \S+ +).*", r"\1", line)) for line in lines[1:]} == {14}


def test_a_long_name_is_printed_without_its_middle():
    assert messages.short("x" * 40) == "x" * 40
    name = messages.short("a" * 200 + " (2009).mp4, 97%")
    assert len(name) == 40 and name.startswith("a" * 24 + "...") and name.endswith(".mp4, 97%")
