"""Hostile and damaged pickles get a short error. They run no code and change no file."""

import json
import os
import random
import subprocess
import sys

import pytest

from tests.campaigns import hostile
from tests.helpers import limits, python2
from tests.helpers.seen import contents


def read_all(files, folder, mode):
    """Returns name -> [error, CPU seconds, MB] of another process, which may change no file."""
    canary = folder / "canary"
    canary.mkdir()
    (canary / "keep").write_text("keep")
    env = os.environ | {"HOME": str(canary), "TMPDIR": str(canary), "OPENBLAS_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(limits.ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for name, content in files.items():
        (folder / "files").mkdir(exist_ok=True)
        (folder / "files" / name).write_bytes(content)

    command = [sys.executable, "-m", "tests.campaigns.hostile", mode, folder / "files"]
    done = subprocess.run(command, cwd=canary, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert ends.keys() == files.keys()
    assert contents(canary) == {"keep": b"keep"} and contents(folder / "files") == files
    return ends


def collection(mark):
    """Returns name -> content of hostile pickles. If their code ran, it would create `mark`."""
    groups = {
        "code": {name: data for name, (data, _) in hostile.attacks(mark).items()},
        "trick": hostile.TRICKS, "greed": hostile.GREED,
        "damage": hostile.damage(python2.real()["python2-numpy1.16 protocol 2"]),
    }  # fmt: skip
    pairs = [(group, name) for group, files in groups.items() for name in files]
    return {f"{group} {x}".replace("/", "|"): groups[group][x] for group, x in pairs}


def check_refused(ends):
    """Asserts that every file got an error of one short line, in 5 s of CPU time and 1 GB."""
    for name, (error, cpu, megabytes) in ends.items():
        assert any(f"/{name}{end} " in error for end in ":'"), (name, error)
        assert error.isprintable() and len(error) < 500, (name, error)
        assert "that reads it failed" not in error, (name, error)
        assert cpu < 5 * limits.slowness() and megabytes < 1024, name


def test_hostile_and_mutated_pickles_end_in_a_one_line_error_and_run_no_code(tmp_path, campaign):
    """An attack's error says what is refused. If a mutated pickle loads, its arrays are checked."""
    mark, chance = tmp_path / "canary" / "mark", random.Random(0)
    attacks = hostile.attacks(mark)
    # The next test reads the files of the group "greed", which take long.
    files = {n: data for n, data in collection(mark).items() if not n.startswith("greed")}
    parts = [data for data, _ in attacks.values()] + [*hostile.TRICKS.values()]
    grafts = [data[:-1] for data in parts]  # without the last byte, the opcode STOP
    seeds, count = [*python2.real().values()], 2000 if campaign else 80
    files |= {f"mutated {n}": hostile.mutate(seeds, grafts, chance) for n in range(count)}
    ends = read_all(files, tmp_path, "all")
    loaded = {n: end for n, end in ends.items() if n.startswith("mutated") and not end[0]}
    # With a made-up error, `check_refused` checks the costs of files that load.
    check_refused(ends | {n: [f"/{n}: ", *end[1:]] for n, end in loaded.items()})
    assert count / 50 < len(loaded) < count * 0.8  # the others were refused
    for name, (_, words) in attacks.items():
        assert words in ends[f"code {name}"][0], name


@pytest.mark.slow
def test_sandbox_limits_memory_and_cpu_time_of_hostile_pickles(tmp_path, campaign):
    """`check_refused` checks the limits: 5 s of CPU time and 1 GB for each file."""
    files = collection(tmp_path / "canary" / "mark")
    if not campaign:
        # All files that ask for much memory or time ("greed"), and every 20th file.
        some = [name for i, name in enumerate(files) if "greed" in name or i % 20 == 0]
        files = {name: files[name] for name in some}
    check_refused(read_all(files, tmp_path, "each"))
