"""The terminal: a quiet first run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vidjax.utils import messages

ROOT = Path(__file__).parent.parent
SEEN = (  # the only lines that a training command may print
    r"converting \d+ files of .*",
    r"(read|pack|write|convert)\w*: .*",
    r"train:? compiling",
    r"clips stay on the device: [\d,]+ MB, read in [\d.]+ s",
    r"(train|evaluate): [\d,]+ of [\d,]+ clips, .*",
    r"step \d+ of \d+: map \d\.\d{4}, top1 \d\.\d{4}",
    r"train",
    r"  (workdir|MAP@100|best|data|clips|identities|time|ranking|report) +\S.*",
    r"",
)
TINY = (
    "--config=configs/quality_fusion.py:iqiyi_vid", "--config.num_epochs=4",
    "--config.batch_size=32", "--config.model.layers=((8,'swish',True,0.5),)",
    "--config.eval.report=False",
)  # fmt: skip


def test_long_names_are_shortened_in_the_middle():
    assert messages.shorten("x" * 40) == "x" * 40
    name = messages.shorten("a" * 200 + " (2009).mp4, 97%")
    assert len(name) == 40 and name.startswith("a" * 24 + "...") and name.endswith(".mp4, 97%")


@pytest.mark.nightly
def test_training_command_prints_only_expected_lines(tmp_path, official_dir, cache_dir):
    command = [sys.executable, "-m", "vidjax.main", *TINY, f"--config.data.dir={official_dir}"]
    command.append(f"--workdir={tmp_path}/run")
    names = ("TF_CPP_MIN_LOG_LEVEL", "JAX_PLATFORMS", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env["VIDJAX_CACHE"] = str(cache_dir)
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, check=True, text=True, timeout=600
    )
    lines = f"{done.stderr}\n{done.stdout}".split("\n")
    assert [x for x in lines if not any(re.fullmatch(seen, x) for seen in SEEN)] == []
    assert len(lines) < 60 and done.stdout.startswith("train\n")
    rows = dict(re.findall(r"^  (\S+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert rows["workdir"] == str(tmp_path / "run")
    assert re.fullmatch(r"[01]\.\d{4} on val; top-1 [01]\.\d{4}", rows["MAP@100"])
    assert re.fullmatch(r"iqiyi_vid in \S+, sha256 [0-9a-f]{12}", rows["data"])
