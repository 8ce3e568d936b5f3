"""Folders of parquet tables: kills, changes, faults; the joint ranking; Ray Data."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vidjax
from tests.helpers import limits
from tests.helpers.cases import first_by_day
from tests.helpers.clip_files import write_parquet
from vidjax.apps import bulk
from vidjax.utils.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
WIDTH = 24
PAGE = Path(vidjax.__file__).parent / "data" / "README.md"
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S))


def clips_of(number, count=6):
    """Returns the clips of a table: 1 to 3 faces each."""
    x = np.random.default_rng(number).normal(size=(count, 3, WIDTH)).astype(np.float32)
    return {f"clip {number}-{i}": {"face": frames[: 1 + i % 3]} for i, frames in enumerate(x)}


TABLES = [clips_of(n, count) for n, count in enumerate((6, 6, 0, 3))]
CLIPS = {name: clip for clips in TABLES for name, clip in clips.items()}


@pytest.fixture
def day(tmp_path):
    """A folder of 4 tables, of which one is empty; and files that are no data."""
    folder = tmp_path / "day"
    folder.mkdir()
    for number, clips in enumerate(TABLES):
        write_parquet(folder / f"part-{number}.parquet", clips)
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_hidden.parquet"):
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, nearest_run, data):
    return vidjax.Gallery.create(tmp_path_factory.mktemp("galleries") / "g", nearest_run, data)


@pytest.fixture
def people(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "g")


@pytest.fixture
def say(say):
    return lambda *words, code=0: say(*words, "--json", code=code)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("**/*.parquet"))}


def rows_of(folder):
    tables = [parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    assert len({str(part.schema.remove_metadata()) for part in tables}) == 1  # the empty one's, too
    return [row for part in tables for row in part.to_pylist()]


def lists_of(path):
    lists = {}
    for row in parquet.read_table(path).to_pylist():
        ranked = lists.setdefault(row["identity"], [])
        assert row["rank"] == len(ranked) + 1
        ranked.append((row["clip"], row["score"]))
    return lists


def test_identify_writes_an_answer_for_each_clip_of_each_table(say, people, made, day, tmp_path):
    out = tmp_path / "out"
    words = ("gallery", "identify", people, f"--input={day}", f"--out={out}", "--k=3")
    assert say(*words)["tables"] == 4
    wanted, rows = made.identify(CLIPS, k=3), rows_of(out)
    assert [row["clip"] for row in rows] == list(wanted)
    for row in rows:
        answer = wanted[row["clip"]]
        assert row["identity"] == answer.identity
        assert row["score"] == pytest.approx(answer.score, abs=1e-6)
        assert (row["best_1"], row["best_3"]) == (answer.best[0][0], answer.best[2][0])
        assert row["probability_1"] == pytest.approx(answer.best[0][1], abs=1e-6)
    before = contents(out)
    assert say(*words)["skipped"] == 4 and contents(out) == before


@pytest.mark.slow
def test_embeddings_of_many_tables_equal_embeddings_of_all_clips(say, nearest_run, day, tmp_path):
    words = ("embed", f"--workdir={nearest_run}")
    say(*words, f"--input={day}", f"--out={tmp_path / 'vectors'}")
    rows, wanted = rows_of(tmp_path / "vectors"), vidjax.restore(nearest_run).embed(CLIPS)
    assert [row["clip"] for row in rows] == list(CLIPS)
    assert np.array([row["vector"] for row in rows]) == pytest.approx(wanted, abs=1e-5)
    words += (f"--input={day}/part-3.parquet",)
    done = say(*words, f"--out={tmp_path / 'alone.parquet'}")
    assert done["num_clips"] == 3 and done["width"] == wanted.shape[1]
    assert ".parquet" in say(*words, "--out=x.npy", code=2)


@pytest.mark.slow
def test_ranking_of_many_tables_equals_ranking_of_one_table(
    say, nearest_run, people, made, day, tmp_path
):
    words = ("gallery", "rank", people, f"--input={day}", "--threshold=0.3")
    lists = lists_of(say(*words, f"--out={tmp_path / 'people'}")["results"])
    for name, expected in made.rank(CLIPS, threshold=0.3).items():
        assert [clip for clip, _ in lists.get(name, [])] == [clip for clip, _ in expected]
    same = CLIPS["clip 0-0"]
    twins = [f"twin {n % 2}{n}{'.mp4' * (n == 3)}" for n in range(90)]
    for turn in range(2):
        write_parquet(day / f"part-{4 + turn}.parquet", dict.fromkeys(twins[turn::2], same))
    every, ranked = tmp_path / "all.parquet", tmp_path / "all_ranked.parquet"
    tables = [parquet.read_table(table) for table in bulk.list_tables(day)]
    parquet.write_table(pyarrow.concat_tables(tables), every)
    words = ("rank", f"--workdir={nearest_run}")
    done = say(*words, f"--input={day}", f"--out={tmp_path / 'ranked'}")
    say(*words, f"--input={every}", f"--out={ranked}")
    lists, expected = lists_of(done["results"]), lists_of(ranked)
    assert list(lists) == list(expected) == list(vidjax.restore(nearest_run).identities)
    for name, clips in expected.items():
        assert [clip for clip, _ in lists[name]] == [clip for clip, _ in clips]
        scores = [score for _, score in lists[name]]  # 100 at most
        assert len(scores) == 100 and scores == pytest.approx([x for _, x in clips], abs=1e-5)


@pytest.mark.slow
def test_ranking_refuses_a_clip_that_is_in_two_tables(say, nearest_run, people, day, tmp_path):
    """Names may differ by `.mp4`. The clip need not be among the 100 listed clips."""
    names, same = [*(f"a{n:03}" for n in range(100)), "z.mp4"], CLIPS["clip 0-0"]
    write_parquet(day / "part-4.parquet", dict.fromkeys(names, same))
    write_parquet(day / "part-5.parquet", {"z": same})
    words = ("rank", f"--workdir={nearest_run}", f"--input={day}", f"--out={tmp_path / 'r'}")
    error = say(*words, code=2)
    assert "clip 'z' is in two tables, part-4.parquet and part-5.parquet" in error
    assert not (tmp_path / "r" / "ranking.parquet").exists()
    # No ranking is left of other tables; another work is refused, and all is kept.
    (day / "part-5.parquet").unlink()
    done = say(*words)
    assert done["skipped"] == 5
    ranking = Path(done["results"])
    before = ranking.read_bytes()
    say("gallery", "rank", people, *words[2:], code=2)
    assert ranking.read_bytes() == before
    (day / "part-6.parquet").write_bytes(b"PAR1 no table")
    say(*words, code=2)
    assert not ranking.exists()


@pytest.mark.slow
@pytest.mark.optimized  # as commands compile
def test_call_after_a_kill_completes_the_same_bytes(say, people, day, tmp_path):
    """Two calls process the same folder at once; one is killed after its first table."""
    for number in range(4, 30):
        write_parquet(day / f"part-{number}.parquet", clips_of(number, 30))
    words = ["gallery", "identify", str(people), f"--input={day}"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vidjax", *words, f"--out={out}", "--quiet"]
    quietly = {"stdout": subprocess.DEVNULL}
    with limits.running(command, **quietly) as killed, limits.running(command, **quietly) as other:
        until = time.monotonic() + 100
        while not (out.is_dir() and any(out.glob("part-*"))) and time.monotonic() < until:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(60) == -signal.SIGKILL
        _, errors = other.communicate(timeout=200)
        assert other.returncode == 0, errors
    assert say(*words, f"--out={out}")["skipped"] == 30
    say(*words, f"--out={tmp_path / 'whole'}")
    assert contents(out) == contents(tmp_path / "whole") and len(contents(out)) == 30


@first_by_day("change", ["clips", "rule", "damage"])
def test_results_of_other_clips_or_rules_are_refused_and_kept(say, people, day, tmp_path, change):
    out = tmp_path / "out"
    words = ["gallery", "identify", people, f"--input={day}", f"--out={out}"]
    say(*words)
    (out / "part-0.parquet").unlink()
    if change == "clips":
        write_parquet(day / "part-1.parquet", clips_of(7))
    elif change == "rule":
        words.append("--threshold=0.9")
    else:
        (out / "part-1.parquet").write_bytes((out / "part-1.parquet").read_bytes()[:-9])
    before = contents(out)
    error = say(*words, code=2)
    assert "part-1.parquet'" in error and "--out=FOLDER" in error and contents(out) == before
    if change == "clips":
        (out / "part-1.parquet").unlink()
        assert say(*words)["skipped"] == 2


@pytest.mark.slow
def test_call_ends_with_an_error_if_the_gallery_changes(say, people, day, tmp_path, monkeypatch):
    load, out = vidjax.Gallery.load, tmp_path / "out"

    def load_and_change(gallery, path):
        if path.name == "part-1.parquet":
            gallery.remove(identity=gallery.index.names[0])
        return load(gallery, path)

    monkeypatch.setattr(vidjax.Gallery, "load", load_and_change)
    words = ("gallery", "identify", people, f"--input={day}", f"--out={out}")
    assert "has changed" in say(*words, code=2)
    assert [*contents(out)] == ["part-0.parquet"]


def test_bad_tables_and_splits_are_refused_and_the_other_tables_are_answered(
    say, people, day, tmp_path
):
    words = ("gallery", "identify", people, f"--input={day}")
    for more in ([], [f"--out={tmp_path / 'answers.csv'}"]):
        assert "--out=FOLDER" in say(*words, *more, code=2)
    assert "name another folder" in say(*words, f"--out={day}", code=2)
    (day / "part-0.parquet").write_bytes(b"PAR1 no table")
    write_parquet(day / "part-1.parquet", {"a": {"face": np.zeros((1, 3))}})
    error = say(*words, f"--out={tmp_path / 'out'}", code=2)
    assert "part-0.parquet" in error and "2 of 4 tables failed, the others are done" in error
    assert [*contents(tmp_path / "out")] == ["part-2.parquet", "part-3.parquet"]
    words = ("embed", "--workdir=none", f"--input={day}", f"--out={tmp_path / 'out'}")
    assert "leave it out" in say(*words, "--config.eval.split=test", code=2)
    (day / "one.npz").touch()
    with pytest.raises(UserError, match=r"one\.npz: .*because the folder has tables"):
        bulk.list_tables(day)
    for split in ("train", "val"):
        (day / f"{split}.parquet").touch()
    assert bulk.list_tables(day) == []


# ---- Ray Data


KILLED = """
import os, signal
from pathlib import Path
from vidjax.apps import bulk

class Embed(bulk.Embed):
    done = 0

    def __call__(self, batch):
        mark = Path(os.environ["KILLED"])
        if self.done == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.done += 1
        return super().__call__(batch)
"""  # Kills one worker, once, at its second table. A kill from outside may come after the work.


@pytest.mark.slow
@pytest.mark.optimized  # as the workers compile
def test_ray_results_equal_those_of_one_machine(say, nearest_run, people, day, tmp_path):
    """Runs the recipes of the page. Their single worker is killed once and restarted."""
    pytest.importorskip("ray")
    (day / "part-2.parquet").unlink()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "own").symlink_to(nearest_run)
    people.rename(tmp_path / "people")
    start = "import ray\nray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8)\n"
    assert set(RECIPES) == {"embed", "identify", "rank"}
    recipes = "\n".join([start, "import killed", *RECIPES.values()])
    for old, new in (("bulk.Embed", "killed.Embed"), ("size=2", "size=1"), ("ns=4", "ns=1")):
        assert old in recipes
        recipes = recipes.replace(old, new)
    (tmp_path / "recipes.py").write_text(recipes)
    (tmp_path / "killed.py").write_text(KILLED)
    mark = tmp_path / "worker_killed"
    env = {
        **os.environ, "PYTHONPATH": f"{PAGE.parents[2]}{os.pathsep}{tmp_path}",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "KILLED": str(mark),
    }  # fmt: skip
    with subprocess.Popen([sys.executable, "recipes.py"], cwd=tmp_path, env=env) as process:
        try:
            assert process.wait(800) == 0
        finally:
            process.terminate()
    assert mark.exists()

    for name, words in {
        "vectors": ["embed", f"--workdir={nearest_run}"],
        "answers": ["gallery", "identify", tmp_path / "people", "--threshold=0.5"],
        "ranked": ["rank", f"--workdir={nearest_run}"],
    }.items():
        own = tmp_path / f"own_{name}"
        say(*words, f"--input={day}", f"--out={own}")
        keys = [("identity", "ascending"), ("rank", "ascending")]
        keys = keys if name == "ranked" else [("clip", "ascending")]
        table, expected = (
            pyarrow.concat_tables(map(parquet.read_table, sorted(folder.glob("*.parquet"))))
            .sort_by(keys).to_pydict()
            for folder in (tmp_path / name, own)
        )  # fmt: skip
        for column, values in expected.items():
            if column in ("vector", "score", "probability_1"):
                assert np.array(table[column]) == pytest.approx(np.array(values), abs=1e-6)
            elif not column.startswith("probability"):
                assert table[column] == values, (name, column)
