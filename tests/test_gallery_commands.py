"""`vidjax gallery`: what a user types and sees, mistakes, files of answers, tables."""

import csv
import functools
import io
import json
import shutil
import stat

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_galleries, made_runs
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery

WIDTH = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory, nearest_run, data):
    return vidjax.Gallery.create(tmp_path_factory.mktemp("galleries") / "g", nearest_run, data)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "g")


@pytest.fixture
def say(say):
    return functools.partial(say, "gallery")


def write_clips(folder, *people, seed=0):
    """Writes a folder of `.npz` files, two clips of each of some people; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for person in people:
        centre = np.random.default_rng(made_galleries.hash_of(person)).normal(size=WIDTH)
        for turn in range(2):
            face = 3 * (centre + 0.5 * rng.normal(size=(3, WIDTH)))
            np.savez(folder / f"{person} {turn}.npz", face=face.astype(np.float16))
    return folder


def test_commands_enrol_rename_relabel_and_remove_a_person(say, folder, tmp_path):
    before = made_galleries.contents(folder)
    ada = ("enrol", folder, f"--input={write_clips(tmp_path / 'ada', 'Ada')}")
    output = say(*ada, "--identity=Ada")
    assert "enrolled    2 clips, 0 were there" in output and "people      13" in output
    again = say(*ada, "--identity=Ada")
    assert "enrolled    0 clips, 2 were there" in again and "version     2" in again
    other = write_clips(tmp_path / "other", "Ada", seed=2)  # the same names, other frames
    output = say("enrol", folder, f"--input={other}", "--identity=Ada", code=2)
    assert "clip 'Ada 0' is already enrolled with another vector" in output
    assert "identity ' Ada' has leading or trailing blanks" in say(*ada, "--identity= Ada", code=2)
    output = say(*ada, "--identity=Eve", code=2)
    assert "clip 'Ada 0' is already enrolled as 'Ada', not 'Eve'" in output
    assert "remove" not in output  # it would delete Ada, to enrol another person
    assert "Ada 1" in say("list", folder, "--clips", "--identity=Ada").splitlines()[1]
    assert say("list", folder, "--clips", "--json")["clips"]["Ada"] == ["Ada 0", "Ada 1"]
    output = say("rename", folder, "--identity=Ada", "--to=Eve")
    assert "renamed     Ada is Eve, with 2 clips" in output
    output = say("relabel", folder, "--clip=Ada 1", "--identity=Grace")
    assert "Ada 1 showed Eve; it shows Grace, who is new" in output and "people      14" in output
    merge = ("rename", folder, "--identity=Grace", "--to=Eve")
    output = say(*merge, code=2)
    assert "two people would become one" in output and "--merge" in output
    say(*merge, "--merge")
    output = say("relabel", folder, "--clip=Ada 1", "--strangers")
    assert "Ada 1 showed Eve; it shows a stranger" in output
    say("relabel", folder, "--clip=Ada 1", "--identity=Eve")
    assert "removed     1 clip\n" in say("remove", folder, "--clip=Ada 0")
    assert "people      12" in say("remove", folder, "--identity=Eve")
    assert made_galleries.contents(folder) == before


def test_clips_without_a_usable_frame_are_listed_by_name(say, folder, tmp_path):
    words = (folder, f"--input={write_clips(tmp_path / 'ada', 'Ada')}")
    np.savez(tmp_path / "ada" / "dead.npz", face=np.zeros((0, WIDTH), np.float16))
    with pytest.warns(UserWarning, match="1 clip without a usable frame: .*: dead"):
        assert "enrolled    2 clips" in say("enrol", *words, "--identity=Ada")
    rows = [row.split() for row in say("identify", *words).splitlines()]
    assert ["dead", "unknown", "no", "usable", "frame"] in rows


@pytest.mark.slow
def test_identify_prints_a_table_and_writes_files(say, folder, tmp_path, made, data):
    wanted = made.identify(data, k=3, fpir=0.1, split="val")
    words = ("identify", folder, "--split=val", "--fpir=0.1", "--k=3")
    table, _, summary = say(*words[:-1]).partition("\nidentify\n")
    rows = {line.split()[0]: line.split()[1] for line in table.splitlines()[1:]}
    assert rows == {clip: answer.identity or "unknown" for clip, answer in wanted.items()}
    named = sum(answer.identity is not None for answer in wanted.values())
    assert f"named       {named}" in summary and "people      12" in summary

    say(*words, f"--out={tmp_path / 'a.csv'}")
    for ending in (".jsonl", ".parquet"):
        answers_lib.write(tmp_path / f"a{ending}", wanted)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    cells = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text()))
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for line, cell, row, (clip, expected) in zip(lines, cells, table, wanted.items(), strict=True):
        assert line["clip"] == cell["clip"] == row["clip"] == clip
        assert (
            line["identity"] == (cell["identity"] or None) == row["identity"] == expected.identity
        )
        assert line["probability"] == expected.probability
        assert [(best["identity"], best["probability"]) for best in line["best"]] == [
            *expected.best
        ]
        assert float(cell["score"]) == row["score"] == expected.score
        assert line["score"] == (expected.score if expected.best else None)
        if expected.best:
            assert cell["best_2"] == row["best_2"] == expected.best[1][0]
            assert float(cell["probability_2"]) == row["probability_2"] == expected.best[1][1]
    message = say(*words, f"--out={tmp_path / 'a.csv'}", code=2)
    assert "exists and is not overwritten" in message
    content = say(*words, "--json")
    assert content["named"] == named and content["answers"] == lines
    assert content["rule"]["by"] == "fpir" and not content["rule"]["default"]


def test_missing_or_wrong_run_folder_gets_a_hint_to_the_run_flag(say, nearest_run, tmp_path):
    words = ("identify", tmp_path / "g", f"--input={write_clips(tmp_path / 'ada', 'Ada')}")
    made_galleries.make(tmp_path / "g")
    message = say(*words, code=2)
    assert "no longer at 'somewhere'" in message and "--run=FOLDER" in message
    message = say(*words, f"--run={nearest_run}", code=2)
    assert "was made with the run" in message and "--run=FOLDER" in message
    message = say("list", nearest_run, code=2)
    assert f"vidjax gallery create NEW_FOLDER --run={nearest_run}" in message


def test_enrol_reads_one_subfolder_per_person(say, folder, tmp_path):
    """Files with the same name in two subfolders are two clips."""
    photos, words = tmp_path / "photos", ("enrol", folder, f"--input={tmp_path / 'photos'}")
    for person in ("Ada", "Grace"):
        write_clips(photos / person, person)
        (photos / person / f"{person} 0.npz").rename(photos / person / "0.npz")
    assert "people      14" in say(*words)
    listed = say("list", folder, "--clips", "--json")["clips"]
    assert listed["Ada"] == ["Ada/0", "Ada/Ada 1"] and listed["Grace"] == [
        "Grace/0",
        "Grace/Grace 1",
    ]
    (photos / "Ada").rename(photos / "train")
    (photos / "Grace").rename(photos / "val")
    assert "splits of a dataset, not people" in say(*words, code=2)
    write_clips(photos, "Eve")
    message = say(*words, code=2)
    assert "--identity=NAME" in message and "PATH/NAME/CLIP.npz" in message


@pytest.mark.slow
def test_rank_writes_a_submission(say, folder, tmp_path, made, data):
    wanted = made.rank(data, split="val")
    passing = {n: [pair for pair in x if pair[1] >= np.log(0.2)] for n, x in wanted.items()}
    assert made.rank(data, split="val", threshold=0.2) == passing
    assert any(passing.values()) and passing != wanted
    words = ("rank", folder, "--split=val")
    for name, lists, more in (("a", wanted, ()), ("p", passing, ("--threshold=0.2",))):
        say(*words, f"--out={tmp_path / name}.txt", *more)
        written = made_runs.lists(tmp_path / f"{name}.txt")
        assert list(written) == list(lists)
        assert written == {n: [f"{clip}.mp4" for clip, _ in clips] for n, clips in lists.items()}
    say(*words, f"--out={tmp_path / 'r.jsonl'}")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {line["identity"]: [entry["clip"] for entry in line["clips"]] for line in lines} == {
        name: [clip for clip, _ in clips] for name, clips in wanted.items()
    }
    assert "exists" in say(*words, f"--out={tmp_path / 'a.txt'}", code=2)


@pytest.mark.slow
def test_enrol_and_identify_read_a_dataset_that_the_run_never_saw(say, folder, tmp_path):
    own = write_clips(tmp_path / "own" / "train", "Ada", "Grace", "nobody").parent
    labels = {f"{name} {turn}": name for name in ("Ada", "Grace") for turn in range(2)}
    clip_files.write_labels(own / "labels.csv", labels)
    clips = ("--config.data.name=arrays", f"--config.data.dir={own}", "--split=train")
    assert "people      14" in say("enrol", folder, *clips)
    answers = {line.split()[0] for line in say("identify", folder, *clips).splitlines()}
    assert answers >= {"Ada", "Grace", "nobody"}
    strangers = len(Gallery(folder).strangers)
    assert f"strangers   {strangers + 2}" in say("enrol", folder, *clips, "--strangers")


@pytest.mark.slow
def test_create_builds_a_gallery_and_identify_accepts_a_moved_run(
    say, nearest_run, tmp_path, made, command
):
    words = ("create", tmp_path / "g", f"--run={nearest_run}")
    output = say(*words)
    assert made_galleries.contents(tmp_path / "g") == made_galleries.contents(made.folder)
    assert "people      12" in output and "version     1" in output
    content = say("create", tmp_path / "e", words[2], "--empty", "--strangers=train", "--json")
    assert content["people"] == content["clips"] == content["strangers"] == 0
    moved = shutil.copytree(nearest_run, tmp_path / "moved")
    done = command("gallery", *("identify", tmp_path / "g", "--split=val", f"--run={moved}"))
    assert "vectors: " in done.err and " clips/s" in done.err  # progress, also without a terminal
    assert "--threshold=P" in done.out  # by which rule, as nothing was chosen


def test_threshold_command_equals_the_api_and_reports_too_few_strangers(say, folder, made):
    content = say("threshold", folder, "--fpir=0.25", "--json")
    assert content == {"mode": "threshold", **made.threshold(0.25).to_dict()}
    output = say("threshold", folder, "--fpir=0.25")
    assert "people      12" in output and f"strangers   {content['num_strangers']}" in output
    output = say("threshold", folder, "--fpir=0.001", code=2)
    assert "needs 999 clips of strangers or more" in output and "enrol more strangers" in output


MISTAKES = {
    "": "gallery needs COMMAND",
    "idenify G": "did you mean vidjax gallery identify",
    "identify G": "identify needs one of --input --split",
    "identify G --split=val --out=a.doc": "--out=a.doc: end the name in .csv, .tsv, .jsonl",
    "identify G --split=val --fpir=1%": "write 0.01",
    "identify G --split=val --threshold=0.5 --fpir=0.1": "not allowed with argument --threshold",
    "identify G --split=val --threshold=-3": "a probability above 0 and at most 1",
    "identify G new": "example: vidjax gallery identify G --input=PATH",
    "add G": "did you mean vidjax gallery enrol",
    "identify G --split=val --config.model.name=x": "it takes --config.data.FIELD=VALUE",
    "identify G --split=vla": "vla",
    "identify G --split=val --k=nan": "wants a whole number from 1",
    "identify G --split=val --run=/absent": "/absent",
    "enrol G --input=x": "x: no such file",
    "enrol G --split=test": "no clip has a label",
    "enrol G --split=train --config.data.dir=/absent": "/absent",
    "remove G --identity=13": "no identity '13' is enrolled",
    "list /absent": "'/absent' holds no gallery: is the path right?",
    "list G --identity=13": "no identity '13' is enrolled",
    "create G --run=/absent": "holds a gallery: name another folder",
    "create G/new --run=/absent": "/absent",
    "export G --out=x.csv": "end the name in .parquet",
}


def test_usage_errors_name_the_remedy_and_change_nothing(say, folder):
    before = made_galleries.contents(folder)
    for words, remedy in MISTAKES.items():
        given = [str(folder) if word == "G" else word for word in words.split()]
        assert remedy in say(*given, code=2), words
    assert made_galleries.contents(folder) == before


def test_names_in_csv_files_are_guarded_against_formulas(tmp_path):
    best = (("=cmd|' /C calc'!A0", 0.9), ("'quoted", 0.1))
    answers_lib.write(tmp_path / "a.csv", {"+1": Answer(best[0][0], 0.9, -0.1, best)})
    _, row = csv.reader(io.StringIO((tmp_path / "a.csv").read_text()))
    assert row[:2] == ["'+1", "'=cmd|' /C calc'!A0"] and row[6] == "''quoted"  # best_2


def test_export_writes_a_table_of_the_enrolled_clips(say, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    people, table = made_galleries.make(tmp_path / "g"), tmp_path / "people.parquet"
    enrolled = {n: c for n, c in people.clips.items() if c.identity is not None}
    words = ("export", people.folder, f"--out={table}")
    assert f"clips       {len(enrolled)}" in say(*words)
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    rows = {row["clip"]: row for row in parquet.read_table(table).to_pylist()}
    assert {name: row["identity"] for name, row in rows.items()} == {
        name: clip.identity for name, clip in enrolled.items()
    }
    for name, clip in enrolled.items():
        z = people.backend.whiten(people.backend.split(clip.vector[None]))
        for part, (own,) in zip(people.backend.widths, z, strict=True):
            wanted = 0 * own if np.isnan(own[0]) else own / np.linalg.norm(own)
            np.testing.assert_allclose(rows[name][part], np.nan_to_num(wanted), atol=1e-6)
    assert "exists and is not overwritten" in say(*words, code=2)


def test_check_mode_detects_a_damaged_gallery(folder, command):
    words = ("--mode=check", f"--workdir={folder}")
    assert "gallery: 12 people by" in command(*words).out
    content = bytearray((folder / "gallery.sqlite").read_bytes())
    content[-100] ^= 1  # any bit
    (folder / "gallery.sqlite").write_bytes(content)
    done = command(*words)
    assert done.code == 2 and "FAULT" in done.out
