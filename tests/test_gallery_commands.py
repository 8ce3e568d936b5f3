"""`vidjax gallery`: what a user types and sees, mistakes, files of answers, tables."""

import contextlib
import csv
import functools
import io
import json
import shutil
import stat

import numpy as np
import pytest

import vidjax
from tests.helpers import made_galleries, made_runs
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery
from vidjax.cli.program import main
from vidjax.utils import tables

WIDTH = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory, nearest_run, data):
    """A gallery that no test changes."""
    return vidjax.Gallery.create(tmp_path_factory.mktemp("galleries") / "g", nearest_run, data)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "g")


@pytest.fixture
def say(say):
    """Runs a command on a gallery and returns what it printed, or its error."""
    return functools.partial(say, "gallery")


def write_clips(folder, people, seed=0):
    """Writes a folder of `.npz` files, two clips of each of some people."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for person in people:
        centre = np.random.default_rng(made_galleries.hash_of(person)).normal(size=WIDTH)
        for turn in range(2):
            face = 3 * (centre + 0.5 * rng.normal(size=(3, WIDTH)))
            np.savez(folder / f"{person} {turn}.npz", face=face.astype(np.float16))


def test_a_person_comes_and_goes(say, folder, tmp_path):
    write_clips(tmp_path / "ada", ["Ada"])
    write_clips(tmp_path / "new", ["Ada", "Grace"], seed=1)
    before = made_galleries.contents(folder)
    listed = say("list", folder)
    assert "people      12" in listed and "Ada" not in listed

    said = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Ada")
    assert "enrolled    2 clips, 0 were there" in said and "people      13" in said
    assert say("list", folder, "--json")["identities"]["Ada"] == 2
    again = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Ada")
    assert "enrolled    0 clips, 2 were there" in again and "version     2" in again

    other = tmp_path / "other"  # of the same name, with other frames
    write_clips(other, ["Ada"], seed=2)
    said = say("enrol", folder, f"--input={other / 'Ada 0.npz'}", "--identity=Ada", code=2)
    assert "clip 'Ada 0' is already enrolled with another vector" in said
    said = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity= Ada", code=2)
    assert "identity ' Ada' has leading or trailing blanks" in said
    said = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Eve", code=2)
    assert "clip 'Ada 0' is already enrolled as 'Ada', not 'Eve'" in said and "another name" in said
    assert "remove" not in said  # it would delete Ada, to enrol somebody else

    lines = say("list", folder, "--clips", "--identity=Ada").splitlines()
    assert [line.split(None, 1)[1] for line in lines[:2]] == ["Ada 0", "Ada 1"]
    listed = say("list", folder, "--clips", "--json")
    assert listed["clips"]["Ada"] == ["Ada 0", "Ada 1"]
    said = say("remove", folder, "--clip=Ada 0")
    assert "removed     1 clip\n" in said
    said = say("remove", folder, "--identity=Ada")
    assert "people      12" in said
    assert made_galleries.contents(folder) == before


def test_clips_without_a_usable_frame_are_named(say, folder, tmp_path):
    write_clips(tmp_path / "ada", ["Ada"])
    for name in ("dead", "gone"):
        np.savez(tmp_path / "ada" / f"{name}.npz", face=np.zeros((0, WIDTH), np.float16))
    with pytest.warns(UserWarning, match="2 clips without a usable frame: .*: dead, gone"):
        said = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Ada")
    assert "enrolled    2 clips" in said
    rows = say("identify", folder, f"--input={tmp_path / 'ada'}").splitlines()
    assert [row.split()[1:] for row in rows if row.split()[0] == "dead"] == [
        ["unknown", "no", "usable", "frame"]
    ]


def test_identify_prints_a_table_and_writes_files(say, folder, tmp_path, made, data):
    wanted = made.identify(data, k=3, fpir=0.1, split="val")
    words = ("identify", folder, "--split=val", "--fpir=0.1", "--k=3")
    said = say(*words[:-1])
    table, _, summary = said.partition("\nidentify\n")
    rows = {line.split()[0]: line.split()[1] for line in table.splitlines()[1:]}
    assert rows == {clip: answer.identity or "unknown" for clip, answer in wanted.items()}
    named = sum(answer.identity is not None for answer in wanted.values())
    assert f"named       {named}" in summary and "people      12" in summary
    threshold = made.threshold(0.1)
    assert f"strangers   {threshold.num_strangers}, of whom {threshold.num_alarms}" in summary
    assert "95 % confidence" in summary

    say(*words, f"--out={tmp_path / 'a.csv'}")
    for ending in {*tables.ENDINGS} - {".csv"}:
        answers_lib.write(tmp_path / f"a{ending}", wanted)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["clip"] for line in lines] == list(wanted)
    for line, answer in zip(lines, wanted.values(), strict=True):
        assert line["identity"] == answer.identity and line["probability"] == answer.probability
        assert [(one["identity"], one["probability"]) for one in line["best"]] == [*answer.best]
        assert line["score"] == (answer.score if answer.best else None)
    with (tmp_path / "a.tsv").open(newline="") as file:
        cells = list(csv.DictReader(file, dialect="excel-tab"))
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == cells
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for cell, row, (clip, answer) in zip(cells, table, wanted.items(), strict=True):
        assert cell["clip"] == row["clip"] == clip
        assert cell["identity"] == (answer.identity or "") and row["identity"] == answer.identity
        assert float(cell["score"]) == row["score"] == answer.score
        if answer.best:
            assert cell["best_2"] == row["best_2"] == answer.best[1][0]
            assert float(cell["probability_2"]) == row["probability_2"] == answer.best[1][1]
    said = say(*words, f"--out={tmp_path / 'a.tsv'}", code=2)
    assert "exists and is not overwritten" in said
    content = say(*words, "--json")
    assert content["named"] == named and content["answers"] == lines
    assert content["threshold"]["num_identities"] == 12
    assert content["rule"]["by"] == "fpir" and not content["rule"]["default"]
    assert content["seconds"] > 0 and content["clips_per_second"] > 0


@pytest.mark.slow
def test_identify_says_by_which_rule(say, folder, made):
    words = ("identify", folder, "--split=val")
    content = say(*words, "--json")
    strangers = len(made.strangers)
    assert content["rule"]["by"] == "new" and content["rule"]["default"]
    assert f"with 99 clips of strangers instead of {strangers}" in content["rule"]["about"]
    content = say(*words, "--threshold=0.3", "--json")
    assert content["rule"]["by"] == "threshold"
    for one in content["answers"]:
        assert (one["identity"] is not None) == (one["probability"] >= 0.3)


def test_a_run_that_was_moved_is_asked_for(say, nearest_run, tmp_path):
    write_clips(tmp_path / "ada", ["Ada"])
    words = ("identify", tmp_path / "g", f"--input={tmp_path / 'ada'}")
    made_galleries.make(tmp_path / "g")
    said = say(*words, code=2)
    assert "no longer at 'somewhere'" in said and "--run=FOLDER" in said
    said = say(*words, f"--run={nearest_run}", code=2)
    assert "was made with the run" in said and "--run=FOLDER" in said


def test_the_folder_of_a_run_is_no_place_for_a_gallery(say, nearest_run):
    said = say("list", nearest_run, code=2)
    assert f"vidjax gallery create NEW_FOLDER --run={nearest_run}" in said


@pytest.mark.slow
def test_a_folder_for_each_person(say, folder, tmp_path):
    """Both have a 1.npz, which are two clips."""
    for person in ("Ada", "Grace"):
        write_clips(tmp_path / "new", [person])
        (tmp_path / "photos" / person).mkdir(parents=True)
        for turn in range(2):
            found = tmp_path / "new" / f"{person} {turn}.npz"
            shutil.copy(found, tmp_path / "photos" / person / f"{turn}.npz")
    said = say("enrol", folder, f"--input={tmp_path / 'photos'}")
    assert "enrolled    4 clips" in said and "people      14" in said
    listed = say("list", folder, "--clips", "--json")["clips"]
    assert listed["Ada"] == ["Ada/0", "Ada/1"] and listed["Grace"] == ["Grace/0", "Grace/1"]
    (tmp_path / "photos" / "Ada").rename(tmp_path / "photos" / "train")
    (tmp_path / "photos" / "Grace").rename(tmp_path / "photos" / "val")
    said = say("enrol", folder, f"--input={tmp_path / 'photos'}", code=2)
    assert "splits of a dataset, not people" in said
    write_clips(tmp_path / "photos", ["Eve"])
    said = say("enrol", folder, f"--input={tmp_path / 'photos'}", code=2)
    assert "--identity=NAME" in said and "PATH/NAME/CLIP.npz" in said


@pytest.mark.slow
def test_rename_and_relabel(say, folder, tmp_path):
    write_clips(tmp_path / "ada", ["Ada"])
    say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Adda")
    said = say("rename", folder, "--identity=Adda", "--to=Ada")
    assert "renamed     Adda is Ada, with 2 clips" in said and "people      13" in said
    said = say("relabel", folder, "--clip=Ada 1", "--identity=Grace")
    assert "Ada 1 showed Ada; it shows Grace, who is new" in said and "people      14" in said
    said = say("rename", folder, "--identity=Grace", "--to=Ada", code=2)
    assert "two people would become one" in said and "--merge" in said
    say("rename", folder, "--identity=Grace", "--to=Ada", "--merge")
    assert say("list", folder, "--json")["identities"]["Ada"] == 2
    strangers = say("list", folder, "--json")["strangers"]
    said = say("relabel", folder, "--clip=Ada 1", "--strangers")
    assert "Ada 1 showed Ada; it shows a stranger" in said
    assert f"strangers   {strangers + 1}\n" in said
    listed = say("list", folder, "--clips", "--json")
    assert listed["clips"]["Ada"] == ["Ada 0"]
    said = say("relabel", folder, "--clip=Ada 1", "--strangers", code=2)
    assert "shows a stranger already" in said


@pytest.mark.slow
def test_progress_is_shown(folder, nearest_run, tmp_path):
    """Of two passes, one line at least each, also where nobody watches."""
    shutil.copytree(nearest_run, tmp_path / "moved")
    words = ["identify", str(folder), "--split=val", f"--run={tmp_path / 'moved'}"]
    told, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(said):
        assert main(["gallery", *words]) == 0
    assert "vectors: " in told.getvalue() and " clips/s" in told.getvalue()
    assert "--threshold=P" in said.getvalue()  # by which rule, as nothing was chosen


@pytest.mark.slow
def test_rank_writes_a_submission(say, folder, tmp_path, made, data):
    wanted = made.rank(data, split="val")
    for ending in (".txt", ".jsonl"):
        say("rank", folder, "--split=val", f"--out={tmp_path / 'r'}{ending}")
    found = made_runs.lists(tmp_path / "r.txt")
    assert list(found) == list(wanted)
    assert found == {n: [f"{clip}.mp4" for clip, _ in clips] for n, clips in wanted.items()}
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {line["identity"]: [one["clip"] for one in line["clips"]] for line in lines} == {
        name: [clip for clip, _ in clips] for name, clips in wanted.items()
    }
    assert "exists" in say("rank", folder, "--split=val", f"--out={tmp_path / 'r.txt'}", code=2)

    words = ("rank", folder, "--split=val", "--threshold=0.2", f"--out={tmp_path / 'p.txt'}")
    content = say(*words, "--json")
    assert content["rule"]["by"] == "threshold" and content["clips_per_second"] > 0
    found = made_runs.lists(tmp_path / "p.txt")
    passing = {
        name: [pair for pair in clips if pair[1] >= np.log(0.2)] for name, clips in wanted.items()
    }
    assert found == {n: [f"{clip}.mp4" for clip, _ in clips] for n, clips in passing.items()}
    assert any(passing.values()) and passing != wanted
    assert made.rank(data, split="val", threshold=0.2) == passing


@pytest.mark.slow
def test_clips_of_another_dataset(say, folder, tmp_path):
    """Own files with labels; people whom the run has never seen."""
    write_clips(tmp_path / "own" / "train", ["Ada", "Grace", "nobody"])
    rows = [f"{name} {turn},{name}\n" for name in ("Ada", "Grace") for turn in range(2)]
    (tmp_path / "own" / "labels.csv").write_text("clip,identity\n" + "".join(rows))
    clips = ("--config.data.name=arrays", f"--config.data.dir={tmp_path / 'own'}", "--split=train")
    said = say("enrol", folder, *clips)
    assert "enrolled    4 clips" in said and "people      14" in said
    found = {line.split()[0] for line in say("identify", folder, *clips).splitlines()}
    assert found >= {"Ada", "Grace", "nobody"}
    strangers = len(Gallery(folder).strangers)
    said = say("enrol", folder, *clips, "--strangers")
    assert f"strangers   {strangers + 2}" in said
    said = say("enrol", folder, "--config.data.dir=/absent", "--split=train", code=2)
    assert "/absent" in said


@pytest.mark.slow
def test_create(say, nearest_run, tmp_path, made):
    run = nearest_run
    said = say("create", tmp_path / "g", f"--run={run}")
    assert made_galleries.contents(tmp_path / "g") == made_galleries.contents(made.folder)
    assert "people      12" in said and "version     1" in said
    assert "holds a gallery" in say("create", tmp_path / "g", f"--run={run}", code=2)
    words = ("create", tmp_path / "empty", f"--run={run}", "--empty", "--strangers=train")
    content = say(*words, "--json")
    assert content["people"] == content["clips"] == content["strangers"] == 0


def test_threshold(say, folder, made):
    found = made.threshold(0.25)
    said = say("threshold", folder, "--fpir=0.25")
    for words in ("threshold", "people      12", f"strangers   {found.num_strangers}"):
        assert words in said
    assert say("threshold", folder, "--fpir=0.25", "--json") == {
        "mode": "threshold",
        **found.to_dict(),
    }
    said = say("threshold", folder, "--fpir=0.001", code=2)
    assert "needs 999 clips of strangers or more" in said and "enrol more strangers" in said
    assert "not a number" in say("threshold", folder, "--fpir=one", code=2)


MISTAKES = {
    "": "gallery needs COMMAND",
    "idenify G": "did you mean vidjax gallery identify",
    "identify": "identify needs G",
    "identify G": "identify needs one of --input --split",
    "identify G --split=val --input=x": "not allowed with argument --split",
    "identify G --split=val --out=a.doc": "--out=a.doc: end the name in .csv, .tsv, .jsonl",
    "identify G --split=val --identity=x": "no flag --identity",
    "identify G --split=val --fpri=0.1": "did you mean --fpir?",
    "identify G --split=val --fpir=1%": "write 0.01",
    "identify G --split=val --threshold=0.5 --fpir=0.1": "not allowed with argument --threshold",
    "identify G --split=val --threshold=-3": "a probability above 0 and at most 1",
    "identify G --split=val --fpir=0.001": "needs 999 clips of strangers or more",
    "identify G new": "example: vidjax gallery identify G --input=PATH",
    "create G runs/plda": "example: vidjax gallery create G --run=runs/plda",
    "remove G p1": "example: vidjax gallery remove G --identity=Ada",
    "add G": "did you mean vidjax gallery enrol",
    "rename G --identity=1": "rename needs --to",
    "relabel G --clip=x": "relabel needs one of --identity --strangers",
    "relabel G --clip=x --identity=a --strangers": "not allowed with argument --identity",
    "relabel G --strangers": "relabel needs --clip",
    "rnak G": "did you mean vidjax gallery rank",
    "identify G --split=val --config.model.name=x": "it takes --config.data.FIELD=VALUE",
    "identify G --split=vla": "vla",
    "identify G --split=val --fpir=0": "above 0 and below 1",
    **dict.fromkeys(
        (f"identify G --split=val --k={k}" for k in ("0", "inf", "nan", "2.7", "1e400", "-1")),
        "wants a whole number from 1",
    ),
    "identify G --input=/absent": "/absent",
    "identify G --split=val --run=/absent": "/absent",
    "enrol G --input=x": "x: no such file",
    "enrol G --input=. --identity=Ada --strangers": "not allowed with argument --identity",
    "enrol G --split=test": "no clip has a label",
    "rank G --split=val": "rank needs --out",
    "remove G": "one of --identity --clip",
    "remove G --identity=a --clip=b": "not allowed with argument --identity",
    "remove G --identity=13": "no identity '13' is enrolled",
    "remove G --clip=x --config.data.dir=y": "no flag --config.data.dir",
    "list /absent": "'/absent' holds no gallery: is the path right?",
    "threshold G": "fpir=0.01 needs 99 clips of strangers or more",
    "list G --identity=13": "no identity '13' is enrolled",
    "create G --run=/absent": "holds a gallery: name another folder",
    "create G/new --run=/absent": "/absent",
    "create G": "create needs one of --run --models",
    "export G": "export needs --out",
    "export G --out=x.csv": "end the name in .parquet",
    "list G --strangers": "no flag --strangers",
}


def test_a_mistake_is_told_in_three_lines(say, folder):
    before = made_galleries.contents(folder)
    for words, told in MISTAKES.items():
        given = [str(folder) if word == "G" else word for word in words.split()]
        assert told in say(*given, code=2), words
        assert made_galleries.contents(folder) == before, words


def test_no_name_is_a_formula(tmp_path):
    best = (("=cmd|' /C calc'!A0", 0.9), ("'quoted", 0.1))
    answer = Answer(best[0][0], 0.9, -0.1, best)
    for ending in (".tsv", ".csv"):
        answers_lib.write(tmp_path / f"a{ending}", {"+1": answer})
        text = (tmp_path / f"a{ending}").read_text()
        rows = list(csv.reader(io.StringIO(text), "excel-tab" if ending == ".tsv" else "excel"))
        assert rows[1][:2] == ["'+1", "'=cmd|' /C calc'!A0"] and rows[1][6] == "''quoted"


def test_a_table_of_the_enrolled_clips(say, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    people, table = made_galleries.make(tmp_path / "g"), tmp_path / "people.parquet"
    enrolled = {n: c for n, c in people.clips.items() if c.identity is not None}
    assert f"clips       {len(enrolled)}" in say("export", people.folder, f"--out={table}")
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    rows = {row["clip"]: row for row in parquet.read_table(table).to_pylist()}
    assert {n: row["identity"] for n, row in rows.items()} == {
        n: clip.identity for n, clip in enrolled.items()
    }
    for name, clip in enrolled.items():
        z = people.backend.whiten(people.backend.split(clip.vector[None]))
        for part, (own,) in zip(people.backend.widths, z, strict=True):
            wanted = 0 * own if np.isnan(own[0]) else own / np.linalg.norm(own)
            np.testing.assert_allclose(rows[name][part], np.nan_to_num(wanted), atol=1e-6)
    assert "exists and is not overwritten" in say("export", people.folder, f"--out={table}", code=2)


def test_a_gallery_is_checked_by_the_main_command(folder, command):
    people = len(vidjax.Gallery(folder).identities)
    assert f"gallery: {people} people by" in command("--mode=check", f"--workdir={folder}").out
    held = folder / "gallery.sqlite"
    content = bytearray(held.read_bytes())
    content[-100] ^= 1
    held.write_bytes(content)
    done = command("--mode=check", f"--workdir={folder}")
    assert done.code == 2 and "FAULT" in done.out
