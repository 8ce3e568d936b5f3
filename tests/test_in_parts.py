"""Folders of parquet tables, part by part: kills, shares, changes, faults; lines of JSON."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import vidjax
from vidjax.errors import UserError
from vidjax.gallery import commands
from vidjax.in_parts import runner
from vidjax.main import main

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
WIDTH = 24


def clip_rows(number, count=6):
    """Returns the rows of a table: clip, modality, features."""
    rng = np.random.default_rng(number)
    return [
        (f"clip {number}-{i}", "face", rng.normal(size=WIDTH).astype(np.float32))
        for i in range(count)
        for _ in range(1 + i % 3)
    ]


def write_table(path, rows):
    names, kinds, features = zip(*rows, strict=True) if rows else ((), (), ())
    columns = {
        "clip": pyarrow.array(names, pyarrow.string()),
        "modality": pyarrow.array(kinds, pyarrow.string()),
        "features": pyarrow.array(list(features), pyarrow.list_(pyarrow.float32())),
    }
    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def day(tmp_path):
    """A folder of 4 tables: 6 clips, 6 clips, none, 3 clips; and files that are no data."""
    folder = tmp_path / "day"
    folder.mkdir()
    for number, count in enumerate((6, 6, 0, 3)):
        write_table(folder / f"part-{number}.parquet", clip_rows(number, count))
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.parquet.crc").touch()
    (folder / "_hidden.parquet").touch()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, nearest_run, data):
    return vidjax.Gallery.create(tmp_path_factory.mktemp("galleries") / "g", nearest_run, data)


@pytest.fixture
def people(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "g")


@pytest.fixture
def say(capsys):
    """Runs a command with --json; returns what it printed, or its error."""

    def run(*words, code=0):
        capsys.readouterr()
        words = [str(word) for word in words]
        words += [] if "--input=-" in words else ["--json"]
        assert main(words) == code
        said = capsys.readouterr()
        if code:
            assert 1 <= len(said.err.strip().splitlines()) <= 3, said.err
            return said.err
        return said.out if "--input=-" in words else json.loads(said.out)

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("**/*.parquet"))}


def rows_of(folder):
    return [
        row
        for path in sorted(folder.glob("*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]


def count_work(folder, found):
    """Returns what was worked on by a run that counts rows."""
    worked = []

    def work(table):
        worked.append(table.name)
        rows = parquet.read_metadata(table).num_rows
        return {"n": ("int32", [rows])}, {"clips": rows}

    job = runner.Job(found, folder, runner.Shard(1, 1))
    task = runner.Task({"a": 1}, work)
    done = runner.run(job, task, "count", lambda: task)
    return worked, done


def test_identify_answers_every_table_as_it_answers_each_alone(say, people, made, day, tmp_path):
    out = tmp_path / "out"
    done = say("gallery", "identify", people, f"--input={day}", f"--out={out}", "--k=3")
    assert (done["tables"], done["skipped"], done["clips"]) == (4, 0, 15)
    rows = rows_of(out)
    clips = {}
    for number in (0, 1, 3):
        for clip, _, features in clip_rows(number, 3 if number == 3 else 6):
            clips.setdefault(clip, []).append(features)
    wanted = made.identify({name: {"face": np.stack(x)} for name, x in clips.items()}, k=3)
    assert [row["clip"] for row in rows] == list(wanted)
    for row in rows:
        answer = wanted[row["clip"]]
        assert (row["identity"], row["score"]) == (answer.identity, answer.score)
        assert (row["best_1"], row["probability_1"]) == answer.best[0]
    schemas = {str(parquet.read_schema(path).remove_metadata()) for path in out.iterdir()}
    assert len(schemas) == 1  # the empty table's, too
    before = contents(out)
    again = say("gallery", "identify", people, f"--input={day}", f"--out={out}", "--k=3")
    assert (again["skipped"], again["clips"], again["named"]) == (4, 15, done["named"])
    assert contents(out) == before


def test_shares_make_the_same_tables_as_one_call(say, people, day, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    say("gallery", "identify", people, f"--input={day}", f"--out={whole}")
    for k in (3, 1, 2):
        say("gallery", "identify", people, f"--input={day}", f"--out={shared}", f"--shard={k}/3")
    assert contents(shared) == contents(whole)
    idle = say("gallery", "identify", people, f"--input={day}", f"--out={shared}", "--shard=9/9")
    assert idle["tables"] == 0 and idle["clips"] == 0


@pytest.mark.slow
def test_a_killed_call_is_continued_to_the_same_bytes(people, day, tmp_path):
    """Two calls make all tables at once; one is killed after the first table."""
    for number in range(4, 40):
        write_table(day / f"part-{number}.parquet", clip_rows(number, 30))
    words = [sys.executable, "-m", "vidjax.gallery", "identify", str(people), f"--input={day}"]
    out, whole = tmp_path / "out", tmp_path / "whole"

    def start(folder):
        return subprocess.Popen([*words, f"--out={folder}", "--quiet"], stdout=subprocess.DEVNULL)

    killed, beside = start(out), start(out)
    until = time.monotonic() + 100
    while not (out.is_dir() and any(out.glob("part-*"))) and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and beside.wait() == 0
    assert start(out).wait() == 0 and start(whole).wait() == 0
    assert contents(out) == contents(whole) and len(contents(out)) == 40


def test_changed_clips_and_other_means_are_refused_and_kept(say, people, day, tmp_path):
    out = tmp_path / "out"
    words = ("gallery", "identify", people, f"--input={day}", f"--out={out}")
    say(*words)
    before = contents(out)
    said = say(*words, "--threshold=0.9", code=2)
    assert "another rule" in said and "--out=FOLDER" in said
    write_table(day / "part-1.parquet", clip_rows(7))
    said = say(*words, code=2)
    assert "part-1.parquet' was made with another clips" in said
    assert contents(out) == before
    (out / "part-1.parquet").unlink()
    assert say(*words)["skipped"] == 3
    commands.main(["remove", str(people), f"--identity={vidjax.Gallery(people).index.names[0]}"])
    assert "another gallery" in say(*words, code=2)


def test_a_gallery_that_changes_meanwhile_ends_the_call(people, day, tmp_path, monkeypatch, capsys):
    load, gallery = runner.load, vidjax.Gallery(people)

    def load_and_change(table, *args):
        if table.name == "part-1.parquet":
            gallery.remove(identity=gallery.index.names[0])
        return load(table, *args)

    monkeypatch.setattr(runner, "load", load_and_change)
    out = tmp_path / "out"
    words = ["gallery", "identify", str(people), f"--input={day}", f"--out={out}"]
    assert main(words) == 2
    assert "was changed meanwhile" in capsys.readouterr().err
    assert [*contents(out)] == ["part-0.parquet"]


def test_a_bad_table_does_not_keep_the_others_from_answers(say, people, day, tmp_path):
    (day / "part-0.parquet").write_bytes(b"PAR1 no table")
    write_table(day / "part-1.parquet", [("a", "face", np.zeros(3, np.float32))])
    words = ("gallery", "identify", people, f"--input={day}", f"--out={tmp_path / 'out'}")
    said = say(*words, code=2)
    assert "part-0.parquet" in said and "2 of 4 tables failed, the others are done" in said
    assert [*contents(tmp_path / "out")] == ["part-2.parquet", "part-3.parquet"]


@pytest.mark.parametrize(
    ("out", "shard", "message"),
    [
        (None, None, "--out=FOLDER"),
        ("answers.csv", None, "--out=FOLDER"),
        ("day", None, "name another one"),
        ("out", "0/2", "--shard=1/2"),
    ],
)
def test_mistakes_are_told(say, people, day, tmp_path, out, shard, message):
    words = ["gallery", "identify", people, f"--input={day}"]
    words += [f"--out={tmp_path / out}"] if out else []
    words += [f"--shard={shard}"] if shard else []
    assert message in say(*words, code=2)


def test_a_folder_of_splits_is_no_folder_of_parts(say, people, day, tmp_path):
    for split in ("train", "val"):
        shutil.copy(day / "part-0.parquet", day / f"{split}.parquet")
    assert runner.tables_of(day) == []
    said = say("gallery", "identify", people, f"--input={day}", code=2)
    assert "several splits" in said
    said = say("gallery", "identify", people, f"--input={day}", "--shard=1/2", code=2)
    assert "--shard=1/2" in said


def test_tables_have_no_splits(say, day, tmp_path):
    words = ("embed", "--workdir=none", f"--input={day}", f"--out={tmp_path / 'out'}")
    assert "leave it out" in say(*words, "--config.eval.split=test", code=2)


def test_clips_beside_tables_are_not_passed_over(day):
    (day / "one.npz").touch()
    with pytest.raises(UserError, match=r"one\.npz: would not be read beside tables"):
        runner.tables_of(day)


def test_damaged_results_are_made_again_and_foreign_ones_kept(day, tmp_path):
    out, found = tmp_path / "out", runner.tables_of(day)
    worked, done = count_work(out, found)
    assert worked == [path.name for path in found] and done.skipped == 0
    whole = contents(out)
    cut = out / "part-0.parquet"
    cut.write_bytes(cut.read_bytes()[:-9])
    (out / ".part-1.parquet.1234.partial").touch()  # of a call that was killed
    worked, done = count_work(out, found)
    assert worked == ["part-0.parquet"] and done.skipped == 3
    assert contents(out) == whole
    write_table(out / "part-1.parquet", [])
    with pytest.raises(UserError, match="was not made by this command"):
        count_work(out, found)
    assert parquet.read_metadata(out / "part-1.parquet").num_rows == 0


def test_lines_are_answered_in_order_and_bad_ones_told(people, made, monkeypatch, capsys):
    face = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32).tolist()
    lines = [
        json.dumps({"clip": "Zoë", "face": face}),
        "",
        "{no json",
        json.dumps({"clip": "b", "face": [[1, 2], [3]]}),
        json.dumps({"clip": "Zoë", "face": face[0]}),
        json.dumps({"clip": "wide", "face": [1.0] * 3}),
        json.dumps({"clip": "empty", "face": []}),
        json.dumps({"clip": "text", "face": ["1"] * WIDTH}),
        json.dumps({"face": face}),
        json.dumps({"clip": "last", "face": face}),  # without a newline
    ]
    stream = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert main(["gallery", "identify", str(people), "--input=-"]) == 2
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [one.get("clip", one.get("line")) for one in found] == [
        "Zoë", 3, 4, "Zoë", 6, "empty", 8, 9, "last",
    ]  # fmt: skip
    assert all("error" in one for one in found if "line" in one)
    wanted = made.identify({"x": {"face": np.float32(face)}})["x"]
    assert found[0]["score"] == found[-1]["score"] == wanted.score
    assert found[5]["identity"] is None
    assert "4 clips" in said.err and "5 lines without a clip" in said.err


def test_a_line_is_answered_before_the_next_one_comes(people):
    words = [sys.executable, "-m", "vidjax.gallery", "identify", str(people), "--input=-"]
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, env=env) as process:
        assert process.stdin and process.stdout
        for name in ("a", "b"):
            line = json.dumps({"clip": name, "face": [0.5] * WIDTH}) + "\n"
            process.stdin.write(line.encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["clip"] == name
        process.stdout.close()  # as `| head -2` does
        for _ in range(3):
            process.stdin.write(line.encode())
            process.stdin.flush()
            time.sleep(0.1)
            if process.poll() is not None:
                break
        assert process.wait(30) == 0


def test_the_joined_ranking_is_that_of_all_clips(say, nearest_run, day, tmp_path):
    """Also for clips of equal scores, whose order is that of their names."""
    same = clip_rows(0)[0][2]
    twins = [(f"twin {n % 2}{n}{'.mp4' * (n == 3)}", "face", same) for n in range(90)]
    write_table(day / "part-4.parquet", twins[0::2])
    write_table(day / "part-5.parquet", twins[1::2])
    words = ("rank", f"--workdir={nearest_run}", f"--input={day}")
    first = say(*words, f"--out={tmp_path / 'shared'}", "--shard=2/2")
    assert first["ranking"] is None and not (tmp_path / "shared" / "ranking.parquet").exists()
    last = say(*words, f"--out={tmp_path / 'shared'}", "--shard=1/2")
    whole = say(*words, f"--out={tmp_path / 'whole'}")
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert whole["clips"] == 105 and last["ranking"]

    every = parquet.ParquetWriter(
        tmp_path / "all.parquet", parquet.read_schema(day / "part-0.parquet")
    )
    with every:
        for table in runner.tables_of(day):
            every.write_table(parquet.read_table(table))
    ranked = tmp_path / "all_ranked.parquet"
    say(*words[:2], f"--input={tmp_path / 'all.parquet'}", f"--out={ranked}")
    wanted, found = parquet.read_table(ranked), parquet.read_table(last["ranking"])
    for name in ("identity", "rank"):
        assert found[name].to_pylist() == wanted[name].to_pylist()
    scores = found["score"].to_numpy()
    assert scores == pytest.approx(wanted["score"].to_numpy(), abs=1e-5)
    assert len(scores) == 100 * len(vidjax.restore(nearest_run).identities)
    assert found["clip"].to_pylist() == wanted["clip"].to_pylist()
    parts = [row["score"] for row in rows_of(tmp_path / "whole" / "parts")]
    assert {*scores.tolist()} <= {*parts}  # to the bit those of the tables


def test_a_clip_in_two_tables_is_refused_in_a_ranking(say, nearest_run, day, tmp_path):
    """Also by another name, and where 100 clips as good as one half keep it from every list."""
    write_table(day / "part-9.parquet", clip_rows(1)[:1])
    out = tmp_path / "r"
    words = ("rank", f"--workdir={nearest_run}", f"--input={day}", f"--out={out}")
    said = say(*words, code=2)
    assert "clip 'clip 1-0' is in two tables, part-1.parquet and part-9.parquet" in said
    (day / "part-9.parquet").unlink()
    assert say(*words)["ranking"] and (out / "parts" / "part-3.parquet").exists()

    names, same = [*(f"a{n:03}" for n in range(100)), "z.mp4"], clip_rows(0)[0][2]
    write_table(day / "part-4.parquet", [(name, "face", same) for name in names])
    write_table(day / "part-5.parquet", [("z", "face", same)])
    assert "clip 'z' is in two tables, part-4.parquet and part-5" in say(*words, code=2)
    listed = parquet.read_table(out / "parts" / "part-4.parquet")["clip"].to_pylist()
    assert {*listed} == {*names[:-1]}


def test_no_ranking_is_left_of_other_tables(say, nearest_run, people, day, tmp_path):
    """A share, or a call that was killed, leaves none until all tables are ranked anew."""
    out = tmp_path / "r"
    words = ("rank", f"--workdir={nearest_run}", f"--input={day}", f"--out={out}")
    say(*words)
    ranking, parts = out / "ranking.parquet", out / "parts"
    before = ranking.read_bytes()
    say(*words, "--shard=9/9")
    say("gallery", "rank", people, *words[2:], code=2)  # other means are refused: all is kept
    assert ranking.read_bytes() == before

    write_table(day / "part-4.parquet", clip_rows(4))
    assert say(*words, "--shard=1/3")["ranking"] is None and not ranking.exists()
    assert say(*words)["ranking"] and ranking.read_bytes() != before
    (day / "part-4.parquet").unlink()
    (day / "part-1.parquet").write_bytes(b"PAR1 no table")
    (parts / "part-1.parquet").unlink()
    say(*words, code=2)
    assert not ranking.exists()


def test_vectors_of_tables_are_those_of_each_clip(say, nearest_run, day, tmp_path):
    out = tmp_path / "vectors"
    words = ("embed", f"--workdir={nearest_run}", f"--input={day}", f"--out={out}")
    assert say(*words, "--shard=1/2")["clips"] == 6
    assert say(*words)["skipped"] == 2
    assert len({str(parquet.read_schema(x).remove_metadata()) for x in out.iterdir()}) == 1
    rows = rows_of(out)
    clips = {}
    for number in (0, 1, 3):
        for clip, _, features in clip_rows(number, 3 if number == 3 else 6):
            clips.setdefault(clip, []).append(features)
    wanted = vidjax.restore(nearest_run).embed(
        {name: {"face": np.stack(x)} for name, x in clips.items()}
    )
    assert [row["clip"] for row in rows] == list(clips)
    assert np.array([row["vector"] for row in rows]) == pytest.approx(wanted, abs=1e-5)
    alone = tmp_path / "alone.parquet"
    one = say(
        "embed",
        f"--workdir={nearest_run}",
        f"--input={day}/part-3.parquet",
        f"--out={alone}",
    )
    assert one["num_clips"] == 3 and one["width"] == wanted.shape[1]
    assert "--out=" in say(*words[:3], f"--out={tmp_path / 'x.csv'}", code=2)
    said = say(*words[:2], f"--input={day}/part-3.parquet", "--out=x.npy", code=2)
    assert ".parquet" in said


def test_a_gallery_ranks_tables_as_it_ranks_all_clips(say, people, made, day, tmp_path):
    out = tmp_path / "out"
    done = say("gallery", "rank", people, f"--input={day}", f"--out={out}")
    clips = {}
    for number in (0, 1, 3):
        for clip, _, features in clip_rows(number, 3 if number == 3 else 6):
            clips.setdefault(clip, []).append(features)
    wanted = made.rank({name: {"face": np.stack(x)} for name, x in clips.items()})
    found = {}
    for row in parquet.read_table(done["ranking"]).to_pylist():
        found.setdefault(row["identity"], []).append((row["clip"], row["score"]))
    assert found == wanted
    said = say("gallery", "rank", people, f"--input={day}", f"--out={out}", "--fpir=0.1", code=2)
    assert "leave out --fpir" in said


BEAM = "--beam_options=direct_num_workers=1"


@pytest.mark.parametrize("command", ["gallery identify", "gallery rank", "rank", "embed"])
def test_beam_makes_the_tables_of_one_process(say, people, nearest_run, day, tmp_path, command):
    pytest.importorskip("apache_beam")
    whose = people if "gallery" in command else f"--workdir={nearest_run}"
    words = [*command.split(), whose, f"--input={day}"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    wanted = say(*words, f"--out={alone}")
    found = say(*words, f"--out={shared}", BEAM)
    assert found["clips"] == wanted["clips"] == 15 and found["skipped"] == 0
    assert contents(shared) == contents(alone)
    assert say(*words, f"--out={shared}", BEAM)["skipped"] == 4


@pytest.mark.slow
def test_processes_of_beam_find_paths_that_are_relative(people, day, tmp_path):
    pytest.importorskip("apache_beam")
    words = [sys.executable, "-m", "vidjax.gallery", "identify", people.name, f"--input={day.name}"]
    beam = "--beam_options=direct_num_workers=2,direct_running_mode=multi_processing"
    subprocess.run([*words, "--out=alone"], cwd=tmp_path, check=True)
    subprocess.run([*words, "--out=shared", beam], cwd=tmp_path, check=True)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_what_beam_cannot_make_is_told(say, people, day, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    write_table(day / "part-1.parquet", [("a", "face", np.zeros(3, np.float32))])
    words = ("gallery", "identify", people, f"--input={day}", BEAM, "--quiet")
    said = say(*words, f"--out={tmp_path / 'out'}", code=2)
    assert "part-1.parquet" in said and "1 of 4 tables failed, the others are done" in said
    assert len(contents(tmp_path / "out")) == 3
    again = commands._again

    def change(*args):
        gallery = vidjax.Gallery(people)
        gallery.remove(identity=gallery.index.names[0])
        return again(*args)

    monkeypatch.setattr(commands, "_again", change)
    assert "have changed" in say(*words, f"--out={tmp_path / 'other'}", code=2)
    assert not contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard=1/2", BEAM], "choose one of --shard and --beam_options"),
        (["--beam_options=runner=DirectRunner"], "runner=FnApiRunner"),
        ([BEAM, "--input=day/part-1.parquet"], "--beam_options=direct_num_workers=1: --input is"),
    ],
)
def test_mistakes_of_beam_are_told(say, people, day, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    out = f"--out={tmp_path / 'out'}"
    assert message in say("gallery", "identify", people, f"--input={day}", out, *words, code=2)
