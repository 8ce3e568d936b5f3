"""Pickles from strangers, read as the package reads them: nothing happens but a short error."""

import json
import os
import random
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.campaigns import hostile
from tests.helpers import limits, python2
from tests.helpers.cases import quick_first
from vidjax.data.untrusted import sandbox

ROOT = Path(__file__).parents[2]


def start(canary, *words):
    """Starts a reader of hostile files in the folder that they may not change."""
    env = os.environ | {"HOME": str(canary), "TMPDIR": str(canary), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.campaigns.hostile", *map(str, words)]
    env |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return limits.running(command, cwd=canary, env=env)


def end(reader):
    """Returns the report of a reader, one entry per file; no file may have ended it."""
    output, errors = reader.communicate(timeout=800)
    assert reader.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def read_all(files, folder, mode, readers=2):
    """Returns name -> error, CPU seconds, seconds, MB of each; several readers at a time."""
    canary = folder / "canary"
    hostile.set_canary(canary)
    before = hostile.listing(canary)
    with ExitStack() as stack:
        started = []
        for number in range(readers):
            (folder / f"{number}").mkdir()
            for name in list(files)[number::readers]:
                (folder / f"{number}" / name).write_bytes(files[name])
            started.append(stack.enter_context(start(canary, mode, folder / f"{number}")))
        found = {name: rest for reader in started for name, *rest in end(reader)}
    assert found.keys() == files.keys()
    assert hostile.listing(canary) == before
    for number in range(readers):
        for path in (folder / f"{number}").iterdir():
            assert path.read_bytes() == files[path.name]
    return found


def collection(mark):
    """Returns every hostile or damaged file by a name that a file may have."""
    sound = python2.real()["python2-numpy1.16 protocol 2"]
    groups = {
        "code": {name: attack.data for name, attack in hostile.attacks(mark).items()},
        "trick": hostile.TRICKS,
        "greed": hostile.GREED,
        "damage": hostile.damage(sound),
    }
    return {
        f"{group} {name}".replace("/", "|"): data
        for group, files in groups.items()
        for name, data in files.items()
    }


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What became of each file but the greedy ones, each read in a fork."""
    folder = tmp_path_factory.mktemp("hostile")
    files = collection(folder / "canary" / "mark")
    return read_all({n: files[n] for n in files if not n.startswith("greed")}, folder, "fork")


@pytest.mark.slow
def test_attacks_would_work_elsewhere(tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "attacks"
    hostile.set_canary(canary)
    folder.mkdir()
    attacks = hostile.attacks(canary / "mark")
    armed = {name for name, attack in attacks.items() if attack.fires}
    for name in armed:
        (folder / name).write_bytes(attacks[name].data)
    with start(canary, "fire", folder, canary) as reader:
        assert set(end(reader)) == armed
    assert len(armed) > 40


def check_refused(ends, *, strict):
    """Asserts that all of them ended in one short line, soon, and in little memory.

    Elapsed time counts where `strict`, on a machine without other work; CPU time everywhere.
    """
    for name, (error, cpu, seconds, megabytes) in ends.items():
        assert f"/{name}: " in error and error.isprintable() and len(error) < 500, (name, error)
        assert "that reads it failed" not in error, (name, error)
        assert cpu < 5 * limits.slowness() and (seconds < 5 or not strict), name
        assert megabytes < 1024, name


def test_hostile_files_end_in_one_line_and_nothing_else(ends):
    check_refused(ends, strict=False)


@pytest.mark.slow
def test_the_sandbox_limits_memory_and_cpu_time(tmp_path, campaign):
    files = collection(tmp_path / "canary" / "mark")
    if not campaign:
        files = {n: data for i, (n, data) in enumerate(files.items()) if "greed" in n or i % 4 == 0}
    check_refused(read_all(files, tmp_path, "unpack"), strict=campaign)


def test_the_error_names_the_global(ends):
    for name, attack in hostile.attacks(Path("mark")).items():
        error = ends[f"code {name}"][0]
        assert attack.told in error, name


def mutations(count, mark):
    """Returns sound pickles after random changes of their opcodes, always the same ones."""
    chance = random.Random(0)
    seeds = [hostile.operations(data) for data in python2.real().values()]
    grafts = [attack.data[:-1] for attack in hostile.attacks(mark).values() if attack.fires]
    grafts += [data[:-1] for data in hostile.TRICKS.values()]
    return {f"{n:05d}": hostile.mutate(seeds, grafts, chance) for n in range(count)}


def test_mutated_pickles_are_refused_or_load_to_sound_arrays(tmp_path, campaign):
    count = 2000 if campaign else 200
    found = read_all(mutations(count, tmp_path / "canary" / "mark"), tmp_path, "fork")
    refused = {name: end for name, end in found.items() if end[0]}
    loaded = {name: ["/" + name + ": ", *end[1:]] for name, end in found.items() if not end[0]}
    check_refused(refused | loaded, strict=campaign)
    assert len(refused) > count / 2 and len(loaded) > count / 50
    assert all(error.startswith(f"{tmp_path}/") for error, *_ in refused.values())


@pytest.mark.parametrize("written", quick_first(python2.real(), 3))
def test_real_files_of_every_python_and_numpy_load_to_equal_arrays(written, tmp_path):
    (tmp_path / "face_train.pickle").write_bytes(python2.real()[written])
    got = sandbox.unpack(tmp_path / "face_train.pickle", "face", tmp_path / "out")
    hostile.check(got, tmp_path / "out")
    lengths = dict(zip(got.names, got.lengths.tolist(), strict=True))
    assert lengths == {"clip_1": 2, "clip_2": 0, "clip_3": 1}
    rows = [2, 0, 1] if got.names.index("clip_3") < got.names.index("clip_1") else [0, 1, 2]
    features = np.array([[1, 2.5, -3], [4, 5, 6], [0.5, -0.25, 100]], np.float16)
    np.testing.assert_array_equal(got.features, features[rows])
    assert got.features.dtype == np.float16
    assert got.frames["number"].tolist() == rows
    assert got.frames["quality"].tolist() == [80.5 - row for row in rows]
    assert got.frames["detection"].tolist() == [0.5] * 3
    assert got.frames["box"].tolist() == [[1.0, 2.5, 30.5, 40.25 + row] for row in rows]
