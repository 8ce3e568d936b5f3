"""The README's worked example of a system of one's own: what it prints, applied and trained."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def example(name):
    """Returns the code block of the README below `<!-- example: NAME -->`."""
    pattern = rf"<!-- example: {re.escape(name)} -->\n```\w*\n(.*?)```\n"
    found = re.findall(pattern, README.read_text(), re.DOTALL)
    assert len(found) == 1, f"README.md: {len(found)} blocks of `<!-- example: {name} -->`"
    return found[0]


def with_line(source, block):
    """Returns `identifier.py` with the import and the line of the table where they belong."""
    imported, entry = block.rstrip("\n").split("\n")
    assert imported.startswith("from vidjax.models.")
    assert re.fullmatch(r'    "\w+": \w+,', entry)
    last = source.rindex("\nfrom vidjax.models.")
    source = source[:last] + "\n" + imported + source[last:]
    table = "_SYSTEMS: dict[str, Any] = {\n"
    assert source.count(table) == 1
    return source.replace(table, table + entry + "\n")


@pytest.mark.slow
def test_a_system_of_ones_own(official_dir, cache_dir, tmp_path):
    tree = tmp_path / "tree"
    for name in ("vidjax", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("configs/mine.py", "vidjax/models/mine.py"):
        assert not (tree / name).exists()
        (tree / name).write_text(example(name))
    table = tree / "vidjax" / "models" / "identifier.py"
    table.write_text(with_line(table.read_text(), example("line")))

    workdir = tmp_path / "run"
    env = {
        **os.environ,
        "XLA_FLAGS": "",
        "VIDJAX_CACHE": str(cache_dir),
        "PYTHONPATH": str(tree),
    }

    def command(*words):
        command = [sys.executable, "-m", "vidjax.main", *words, f"--workdir={workdir}"]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads((workdir / "metrics.json").read_text())

    results = command(
        "--config=configs/mine.py:iqiyi_vid,face,head,audio",
        f"--config.data.dir={official_dir}",
        "--config.batch_size=32",
        "--config.num_epochs=20",
        "--config.optim.learning_rate=0.01",
        "--config.ensemble.folds=2",
    )
    # A classifier with its bias a modality, 13 columns, and the three weights.
    assert results["num_params"] == (24 + 16 + 8 + 3) * 13 + 3
    assert results["map"] > 0.8
    assert command("--mode=evaluate")["map"] == results["map"]
