"""Hostile and damaged pickles get a short error. They run no code and change no file."""

import json
import os
import random
import sys

import pytest

from tests.campaigns import hostile
from tests.helpers import limits, python2


def read_all(files, folder, mode):
    """Reads pickles in two processes; returns name -> [error, CPU seconds, seconds, MB].

    `files` are name -> content. `mode` is a mode of `tests.campaigns.hostile`. Asserts that the
    processes changed no file.
    """
    canary = folder / "canary"
    canary.mkdir()
    (canary / "keep").write_text("keep")
    env = os.environ | {"HOME": str(canary), "TMPDIR": str(canary), "OPENBLAS_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(limits.ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.campaigns.hostile", mode]

    def start(part):
        """Writes every second file into the folder "0" or "1", and starts a process."""
        (folder / part).mkdir()
        for name in list(files)[int(part) :: 2]:
            (folder / part / name).write_bytes(files[name])
        return limits.running([*command, folder / part], cwd=canary, env=env)

    ends = {}
    with start("0") as first, start("1") as second:
        for reader in (first, second):
            output, errors = reader.communicate(timeout=800)
            assert reader.returncode == 0, errors
            ends |= {name: rest for name, *rest in map(json.loads, output.splitlines())}

    assert ends.keys() == files.keys()
    assert [path.name for path in canary.rglob("*")] == ["keep"]
    assert (canary / "keep").read_text() == "keep"
    assert all(x.read_bytes() == files[x.name] for x in folder.glob("[0-9]/*"))
    return ends


def collection(mark):
    """Returns name -> content of hostile pickles. If their code ran, it would create `mark`."""
    groups = {
        "code": {name: attack.data for name, attack in hostile.attacks(mark).items()},
        "trick": hostile.TRICKS,
        "greed": hostile.GREED,
        "damage": hostile.damage(python2.real()["python2-numpy1.16 protocol 2"]),
    }
    return {
        f"{group} {name}".replace("/", "|"): data
        for group, files in groups.items()
        for name, data in files.items()
    }


def check_refused(ends, *, strict):
    """Asserts that every file got an error of one short line, in 5 s of CPU time and 1 GB.

    If `strict`, the elapsed time is also at most 5 s.
    """
    for name, (error, cpu, seconds, megabytes) in ends.items():
        assert any(f"/{name}{end} " in error for end in ":'"), (name, error)
        assert error.isprintable() and len(error) < 500, (name, error)
        assert "that reads it failed" not in error, (name, error)
        assert cpu < 5 * limits.slowness(), name
        if strict:
            assert seconds < 5, name
        assert megabytes < 1024, name


def test_hostile_pickles_end_in_a_one_line_error_and_run_no_code(tmp_path):
    """The error of an attack names the function that the pickle would call, such as os.system."""
    mark = tmp_path / "canary" / "mark"
    # The next test reads the files of the group "greed", which take long.
    files = {n: data for n, data in collection(mark).items() if not n.startswith("greed")}
    ends = read_all(files, tmp_path, "fork")

    check_refused(ends, strict=False)
    for name, attack in hostile.attacks(mark).items():
        assert attack.error_words in ends[f"code {name}"][0], name


@pytest.mark.slow
def test_sandbox_limits_memory_and_cpu_time_of_hostile_pickles(tmp_path, campaign):
    """`check_refused` checks the limits: 5 s of CPU time and 1 GB for each file."""
    files = collection(tmp_path / "canary" / "mark")
    if not campaign:
        # All files that ask for much memory or time ("greed"), and every 20th file.
        some = [name for i, name in enumerate(files) if "greed" in name or i % 20 == 0]
        files = {name: files[name] for name in some}
    check_refused(read_all(files, tmp_path, "unpack"), strict=campaign)


def test_mutated_pickles_are_refused_or_load_to_valid_arrays(tmp_path, campaign):
    """The seed is fixed. The processes of `read_all` check the arrays."""
    count, chance = 2000 if campaign else 80, random.Random(0)
    attacks = hostile.attacks(tmp_path / "canary" / "mark").values()
    grafts = [attack.data[:-1] for attack in attacks]  # without the last byte, the opcode STOP
    grafts += [data[:-1] for data in hostile.TRICKS.values()]
    seeds = [*python2.real().values()]
    files = {f"{n:05d}": hostile.mutate(seeds, grafts, chance) for n in range(count)}

    ends = read_all(files, tmp_path, "fork")

    # Files that load have no error. With a made-up error, `check_refused` checks their costs.
    loaded = {name: [f"/{name}: ", *end[1:]] for name, end in ends.items() if not end[0]}
    check_refused(ends | loaded, strict=campaign)
    assert count / 50 < len(loaded) < count * 0.8  # the others were refused
