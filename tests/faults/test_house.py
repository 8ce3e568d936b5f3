"""Faults of the environment: missing packages, unusable folders, logs that a kill has cut."""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from tests.conftest import execute
from tests.helpers import limits
from tests.helpers.limits import file_limit
from vidjax.runs.results import Logs, truncate_log
from vidjax.utils import files


def without(folder, *packages):
    """Returns the environment of a process in which some packages are not installed."""
    folder.mkdir()
    for name in packages:
        error = f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n"
        (folder / f"{name}.py").write_text(error)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{limits.ROOT}"}


@pytest.mark.slow
def test_unusable_workdir_is_refused_before_compilation(tmp_path, mounted):
    """The error also comes before slow packages are imported."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o555)
    # Not even the administrator can write into /proc.
    closed = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"
    places = [tmp_path / "file/below", closed / "w", tmp_path / ("x" * 300)]
    if read_only := mounted("ro"):
        places.append(read_only)
    # Without these packages, a run would fail with another error when it imports them.
    env = without(tmp_path / "hidden", "tensorflow", "tensorflow_datasets", "orbax")
    env["VIDJAX_CACHE"] = str(tmp_path / "cache")
    commands = [["--config=knn", f"--workdir={place}"] for place in places]
    program = (
        "import sys\nfrom vidjax.cli.program import main\n"
        f"for words in {commands}: sys.stderr.write(f'exit {{main(words)}}\\n')"
    )
    *errors, end = execute(("-c", program), limits.ROOT, **env).stderr.split("exit 2\n")
    for place, error in zip(places, errors, strict=True):
        assert str(place) in error and len(error.splitlines()) <= 3 and "Traceback" not in error
    assert not end
    assert (tmp_path / "file").read_text() == "mine"
    # Neither clips nor compiled programs were written.
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.nightly
def test_all_modules_can_be_imported_without_optional_packages(tmp_path, python):
    env = without(tmp_path / "hidden", "torch", "hypothesis", "pytest", "pytrec_eval", "xdist")
    paths = (limits.ROOT / "vidjax").rglob("[!_]*.py")  # not __init__.py
    modules = [".".join(x.relative_to(limits.ROOT).with_suffix("").parts) for x in paths]
    python(
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        "from vidjax.cli.program import main\nsys.exit(main(['--mode=check']))",
        cwd=tmp_path, **env,
    )  # fmt: skip


def test_folder_in_use_is_refused_and_a_stale_lock_is_replaced(say, tmp_path):
    lock, here = tmp_path / ".lock", f"on {socket.gethostname()}"
    hold = "import pathlib, sys, time\nfrom vidjax.utils import files\n"
    hold += "with files.lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with limits.running([sys.executable, "-c", hold, tmp_path]) as child:
        assert child.stdout and child.stdout.readline() == "held\n"
        for words in (("train", "--config=knn"), ("evaluate",)):
            error = say(*words, f"--workdir={tmp_path}", code=2)
            assert f"in use by process {child.pid} {here}" in error
            (tmp_path / "config.json").write_text("{}")  # `evaluate`, which is next, needs it
    # Ended processes left these locks, whose texts are shorter or longer than the new text.
    assert str(child.pid) in lock.read_text()
    for dead in ("process 1 on vm", f"process {10**9} on {'host' * 9}"):
        lock.write_text(dead)
        with files.lock(tmp_path):
            assert lock.read_text().rstrip() == f"process {os.getpid()} {here}"


def test_log_cut_at_any_byte_is_repaired_to_its_complete_lines_up_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 5}\n', b'{"step": 9}\n', b'{"step": 9}\n', b'{"step": 10}\n']
    for cut in range(len(b"".join(lines)) + 1):
        path.write_bytes(b"".join(lines)[:cut])
        truncate_log(path, 9)
        # A line is complete even without its newline. The line of step 10 is always removed.
        complete = [n for n in range(1, 4) if len(b"".join(lines[:n])) - 1 <= cut]
        assert path.read_bytes() == b"".join(lines[: len(complete)]), cut
    # Other damaged lines are removed, too. The warning omits line 5, because a kill can cut it.
    path.write_bytes(lines[0] + b"\x00\xff\x00\n7\n" + lines[1] + b'{"st')
    with pytest.warns(UserWarning, match=r"damaged lines are removed from .*: line 2, 3"):
        truncate_log(path, 9)
    assert path.read_bytes() == lines[0] + lines[1]


@pytest.mark.parametrize("kind", ["metrics", "timing"])
def test_log_that_cannot_grow_ends_with_a_whole_line_and_is_continued_later(tmp_path, kind):
    path = tmp_path / f"{kind}.jsonl"

    def write(*steps):
        with contextlib.closing(Logs(tmp_path, step=steps[0] - 1)) as logs:
            for step in steps:  # the log reaches the limit before TensorBoard's file
                getattr(logs, kind)(step, {"text": "x" * 100})

    def logged_steps():
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    with file_limit(1000), pytest.raises(OSError, match=f"cannot write '{path}': File too large"):
        write(*range(1, 100))
    count = len(logged_steps())
    assert logged_steps() == [*range(1, count + 1)] and path.read_text().endswith("\n")
    assert 4 < count < 12  # lines of over 100 bytes in 1000 bytes
    write(*range(count, 20))  # there is room again; the line of step `count` is replaced
    assert logged_steps() == [*range(1, 20)]
