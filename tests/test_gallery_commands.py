"""`vidjax gallery`: output, files, errors, and commands on folders of tables."""

import csv
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import vidjax
from tests.helpers import clip_files, made_galleries, made_nets, made_runs, servers
from tests.helpers.clip_files import write_parquet
from tests.helpers.seen import contents
from vidjax.apps import bulk, web
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.serve import app as app_lib
from vidjax.utils import terminal
from vidjax.utils.errors import UserError, VidjaxWarning

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("read_here")
WIDTH = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A gallery of nets with 12 people and 6 strangers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_galleries, "WIDTHS", {"face": WIDTH})
        clips = {name: x for name, x in made_galleries.make_clips().items() if x.vector.any()}
        origin = replace(made_galleries.CARDS, cards={"face": "0" * 64})
        return made_galleries.make(tmp_path_factory.mktemp("of nets") / "g", clips, origin=origin)


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the folder of `made`."""
    return shutil.copytree(made.folder, tmp_path / "g")


@pytest.fixture(scope="module")
def of_run(tmp_path_factory, nearest_run, data):
    """A gallery of a run, with the 12 people of the official files."""
    return vidjax.Gallery.create(tmp_path_factory.mktemp("of a run") / "g", nearest_run, data)


@pytest.fixture
def tell(say):
    """Returns a function that runs `vidjax gallery WORDS`."""
    return functools.partial(say, "gallery")


def write_clips(folder, *people, seed=0):
    """Writes a folder of `.npz` files, two clips for each person; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for person in people:
        centre = np.random.default_rng(int.from_bytes(person.encode())).normal(size=WIDTH)
        noise = np.random.default_rng(seed).normal(size=(2, 3, WIDTH))
        for turn, face in enumerate(3 * centre + 1.5 * noise):
            np.savez(folder / f"{person} {turn}.npz", face=face.astype(np.float16))
    return folder


def test_commands_enrol_rename_relabel_and_remove_a_person(tell, folder, tmp_path):
    """At the end, the gallery contains the same 12 people as before."""
    before = made_galleries.contents(folder)
    ada = ("enrol", folder, f"--input={write_clips(tmp_path / 'ada', 'Ada')}")
    output = tell(*ada, "--identity=Ada")
    assert "enrolled    2 clips, 0 enrolled before" in output and "people      13" in output
    error = tell(*ada, "--identity=Eve", code=2)
    assert "clip 'Ada 0' is already enrolled as 'Ada', not 'Eve'" in error
    assert "remove" not in error  # as a remedy, it would delete Ada
    output = tell(*ada, "--identity=Ada")  # changes nothing
    assert "enrolled    0 clips, 2 enrolled before" in output and "version     2" in output
    write_clips(tmp_path / "ada", "Ada", seed=2)  # the same names, other frames
    error = tell(*ada, "--identity=Ada", code=2)
    assert "clip 'Ada 0' is already enrolled with another vector" in error
    output = tell("rename", folder, "--identity=Ada", "--to=Eve")
    assert "renamed     Ada is Eve, with 2 clips" in output
    output = tell("relabel", folder, "--clip=Ada 1", "--identity=Grace")
    assert "Ada 1 showed Eve; it shows Grace, who is new" in output and "people      14" in output
    merge = ("rename", folder, "--identity=Grace", "--to=Eve")
    output = tell(*merge, code=2)
    assert "two people would become one" in output and "--merge" in output
    tell(*merge, "--merge")
    assert tell("list", folder, "--clips", "--json")["clips"]["Eve"] == ["Ada 0", "Ada 1"]
    output = tell("relabel", folder, "--clip=Ada 1", "--strangers")
    assert "Ada 1 showed Eve; it shows a stranger" in output
    tell("relabel", folder, "--clip=Ada 1", "--identity=Eve")
    assert "removed     1 clip\n" in tell("remove", folder, "--clip=Ada 0")
    assert "people      12" in tell("remove", folder, "--identity=Eve")
    assert made_galleries.contents(folder) == before


def test_commands_read_a_result_and_refuse_to_change_it(tell, made, tmp_path, monkeypatch):
    """A result is a gallery that another command has made."""
    monkeypatch.chdir(tmp_path)
    folder, new = tmp_path / "names" / "gallery", write_clips(tmp_path / "new", "Ada")
    Gallery.of_clips(folder, made.origin, made.backend, made.clips, "vidjax review names")
    before = contents(folder)
    for words in (
        ("enrol", f"--input={new}", "--identity=Ada"), ("remove", "--identity=person 3"),
        ("remove", "--clip=clip 30"), ("rename", "--identity=person 3", "--to=Ada"),
        ("relabel", "--clip=clip 30", "--strangers"),
    ):  # fmt: skip
        error = tell(words[0], folder, *words[1:], code=2)
        assert "'names/gallery' is a result of another command" in error
        assert "to change names: vidjax review names" in error
    answers = tell("identify", folder, f"--input={new}", "--json")["answers"]
    assert answers == tell("identify", made.folder, f"--input={new}", "--json")["answers"]
    tell("verify", folder, "--identity=person 3", f"--input={new}")
    tell("rank", folder, f"--input={new}", f"--out={tmp_path / 'ranking.txt'}")
    assert "person 3" in tell("list", folder, "--clips") and contents(folder) == before


def list_rows(answers):
    """Returns answers as rows of a table. A row has the three best people of a clip."""
    columns = [f"{column}_{place}" for place in (1, 2, 3) for column in ("best", "probability")]
    return [
        {"clip": clip, "identity": x.identity, "probability": x.probability, "score": x.score}
        | dict.fromkeys(columns)  # cells of a clip without a usable frame
        | dict(zip(columns, itertools.chain(*x.best), strict=False))
        for clip, x in answers.items()
    ]


def test_enrol_reads_one_subfolder_per_person_and_refuses_splits(tell, folder, tmp_path):
    """Files with the same name in two subfolders are two clips."""
    photos = tmp_path / "photos"
    for person in ("Ada", "Grace"):
        write_clips(photos / person, person)
        (photos / person / f"{person} 0.npz").rename(photos / person / "0.npz")
    assert "people      14" in tell("enrol", folder, f"--input={photos}")
    listed = tell("list", folder, "--clips", "--json")["clips"]
    assert (listed["Ada"][0], listed["Grace"]) == ("Ada/0", ["Grace/0", "Grace/Grace 1"])
    write_clips(photos / "Eve", "Eve")
    # There is no warning, not even about the clips of other people.
    with warnings.catch_warnings(action="error", category=VidjaxWarning):
        assert "1 clip," in tell("enrol", folder, f"--input={photos}", "--clip=Eve/Eve 1")
    for split in ("train", "val"):
        write_clips(tmp_path / "splits" / split, "Ada")
    words = ("enrol", folder, f"--input={tmp_path / 'splits'}")
    assert "splits of a dataset, not names of people" in tell(*words, code=2)
    write_clips(tmp_path / "splits", "Eve")  # next to the folders
    error = tell(*words, code=2)
    assert "--identity=NAME" in error and "PATH/NAME/CLIP.npz" in error


@pytest.mark.filterwarnings("ignore:.*1 clip not enrolled")
def test_commands_write_the_answers_and_rule_of_python(tell, folder, made, tmp_path):
    words = (folder, f"--input={write_clips(tmp_path / 'ada', 'Ada')}", "--fpir=0.5", "--json")
    np.savez(tmp_path / "ada" / "empty.npz", face=np.zeros((0, WIDTH), np.float16))
    answers, ranking = f"{tmp_path}/answers.csv", f"{tmp_path}/ranking.csv"
    named = tell("identify", *words, "--k=3", f"--out={answers}")
    ranked = tell("rank", *words, f"--out={ranking}")
    assert (named["answers"], ranked["ranking"]) == (answers, ranking)
    found = made.identify(made.load(tmp_path / "ada"), k=3, fpir=0.5)
    rows = list_rows(found)
    as_text = [{k: "" if cell is None else str(cell) for k, cell in row.items()} for row in rows]
    assert [*csv.DictReader(Path(answers).read_text().splitlines())] == as_text
    for ending in ("jsonl", "parquet"):
        tell("identify", *words, "--k=3", f"--out={tmp_path}/answers.{ending}")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [*map(json.loads, lines)] == [{"clip": x, **found[x].to_dict()} for x in found]
    assert parquet.read_table(tmp_path / "answers.parquet").to_pylist() == rows
    assert named["threshold"] == made.threshold(0.5).to_dict() and named["rule"]["by"] == "fpir"
    assert named["rule"]["score"] == made.rule(fpir=0.5).score
    assert all(named[field] == ranked[field] for field in ("rule", "threshold", "clips"))
    measured = tell("threshold", folder, "--fpir=0.5", "--json")
    assert measured == {"mode": "threshold", **named["threshold"]}
    assert f"strangers   {measured['num_strangers']}" in tell("threshold", folder, "--fpir=0.5")
    tell("rank", *words[:2], "--threshold=0.2", f"--out={(out := tmp_path / 'ranking.txt')}")
    pairs = made.rank(made.load(tmp_path / "ada"), threshold=0.2).items()
    assert made_runs.lists(out) == {x: [f"{clip}.mp4" for clip, _ in clips] for x, clips in pairs}
    assert "exists" in tell("rank", *words[:2], f"--out={out}", code=2)
    with pytest.warns(UserWarning, match="1 clip not enrolled, because no frame is usable: empty"):
        assert "enrolled    2 clips" in tell("enrol", *words[:2], "--identity=Ada")
    assert re.search("empty +unknown +no usable frame\n", tell("identify", *words[:2]))


def test_names_with_and_without_mp4_are_one_clip(tell, folder, tmp_path):
    """Names without .mp4 are stored."""
    clip = {"face": np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)}
    for name, asked, words in (
        ("a", "a", "1 clip, 0 enrolled"), ("a.mp4", "a.mp4", "0 clips, 1 enrolled"),
        ("a.MP4", "a", "0 clips, 1 enrolled"),
    ):  # fmt: skip
        table = write_parquet(tmp_path / f"{name}.parquet", {name: clip})
        given = (f"--input={table}", "--identity=Ada", f"--clip={asked}")
        assert words in tell("enrol", folder, *given)
    assert Gallery(folder).identities["Ada"] == 1 and "a" in Gallery(folder).clips
    tell("relabel", folder, "--clip=a.mp4", "--identity=Eve")
    tell("remove", folder, "--clip=a.mp4")
    old = made_galleries.make(tmp_path / "old", {"c.mp4": made_galleries.make_clip(1, "Ada")})
    vectors = made_galleries.vectors_of(old, {"c": made_galleries.make_clip(1, "Ada")})
    assert old.enrol(vectors, {"c.mp4": "Ada"}).unchanged == 1 and [*old.clips] == ["c"]
    with pytest.raises(UserError, match="two clips are called 'x'"):
        made_galleries.add(old, {x: made_galleries.make_clip(2, "Bob") for x in ("x", "x.mp4")})
    assert old.remove(clip="c") == 1


@pytest.mark.slow
def test_enrol_and_identify_read_a_dataset_that_is_not_of_the_run(tell, of_run, tmp_path):
    folder = shutil.copytree(of_run.folder, tmp_path / "g")
    dataset = write_clips(tmp_path / "own" / "train", "Ada", "nobody").parent
    clip_files.write_labels(dataset / "labels.csv", {"Ada 0": "Ada", "Ada 1": "Ada"})
    words = ("--config.data.name=arrays", f"--config.data.dir={dataset}", "--split=train")
    assert "people      13" in tell("enrol", folder, *words)  # 12 of the run, and Ada
    first_words = {line.split()[0] for line in tell("identify", folder, *words).splitlines()}
    assert first_words >= {"Ada", "nobody"}  # of the clips Ada 0, Ada 1, nobody 0 and nobody 1
    wanted = len(Gallery(folder).strangers) + 2  # the two clips without a label
    assert f"strangers   {wanted}" in tell("enrol", folder, *words, "--strangers")
    assert "no clip has a label" in tell("enrol", folder, "--split=test", code=2)


@pytest.mark.slow
def test_created_gallery_equals_the_api_and_accepts_its_moved_run_but_no_other(
    tell, nearest_run, tmp_path, of_run, command, monkeypatch
):
    (tmp_path / "old/runs").mkdir(parents=True)
    run = shutil.copytree(nearest_run, tmp_path / "old/runs/people")
    assert "people      12" in tell("create", tmp_path / "old/g", f"--run={run}")
    stored = [made_galleries.contents(folder) for folder in (tmp_path / "old/g", of_run.folder)]
    assert stored[0] | {"run": None} == stored[1] | {"run": None}
    # All training clips have a label, so no clip shows a stranger.
    words = (tmp_path / "e", f"--run={run}", "--empty", "--strangers=train", "--json")
    content = tell("create", *words)
    assert content["people"] == content["clips"] == content["strangers"] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new/runs/people"
    assert vidjax.Gallery(tmp_path / "new/g").run.workdir == moved
    # The gallery was not moved with this run.
    done = command("gallery", "identify", of_run.folder, "--split=val", f"--run={moved}")
    assert done.code == 0, done.err
    assert "vectors: " in done.err and " clips/s" in done.err  # progress, also without a terminal
    assert "--threshold=P" in done.out  # how to choose another rule than the default
    served = []
    monkeypatch.setattr(app_lib, "make_app", lambda gallery, *_: served.append(gallery))
    monkeypatch.setattr(web, "serve", lambda *_: True)
    monkeypatch.setenv(terminal.QUIET, "1")  # `serve` sets it for its whole process
    command("serve", f"--gallery={of_run.folder}", f"--run={moved}", "--port=0")
    assert served[0].run.workdir == moved
    other = made_galleries.make(tmp_path / "other").folder  # names a run that does not exist
    for flags in ((), (f"--run={nearest_run}",)):  # no flag, and a run of another gallery
        done = command("gallery", "identify", other, "--split=val", *flags)
        assert done.refused("--run=FOLDER")


# Words after `vidjax gallery` -> part of the error. G is a gallery, H is new, TABLES has tables.
MISTAKES = {
    "": "gallery needs COMMAND",
    "identify G": "identify needs one of --input --split",
    "identify G --split=val --out=a.doc": "--out=a.doc: end the name in .csv, .tsv, .jsonl",
    "identify G --split=val --fpir=1%": "write 0.01",
    "identify G --split=val --threshold=0.5 --fpir=0.1": "leave one of them out",
    "identify G --split=val --threshold=-3": "a number above 0 and at most 1",
    "identify G --split=val --config.model.name=x": "takes only --config.data.FIELD=VALUE",
    "identify G --input=. --config.data.dir=x": "has no effect with --input: leave it out",
    "create H --models=. --strangers=val": "has no effect with --models: leave it out",
    "identify G --split=val --k=nan": "must be a whole number from 1",
    "remove G --identity=13": "no identity '13' is enrolled",
    "identify G --input=TABLES --out=answers.csv": "--out=FOLDER",
    "identify G --input=TABLES --out=TABLES": "name another folder",
    "rank G --input=TABLES --out=ranking.txt": "--out=FOLDER",
}


def test_usage_errors_name_the_remedy_and_change_nothing(tell, folder, day):
    before = made_galleries.contents(folder)
    for words, remedy in MISTAKES.items():
        given = words.replace(" G", f" {folder}").replace("TABLES", str(day)).split()
        assert remedy in tell(*given, code=2), words
    assert made_galleries.contents(folder) == before


# The page contains programs for Ray Data: name -> program.
PAGE = Path(vidjax.__file__).parent / "data" / "README.md"
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S))


def clips_of(number, count=6):
    """Returns clips for a table, with 1 to 3 faces each."""
    faces = np.random.default_rng(number).normal(size=(count, 3, WIDTH)).astype(np.float32)
    return {f"clip {number}-{i}": {"face": face[: 1 + i % 3]} for i, face in enumerate(faces)}


TABLES = [clips_of(number, count) for number, count in enumerate((6, 6, 0, 3))]
CLIPS = {name: clip for clips in TABLES for name, clip in clips.items()}


@pytest.fixture
def day(tmp_path):
    """A folder of four tables, one of them empty, and of files that are not data."""
    folder = tmp_path / "day"
    folder.mkdir()
    for number, clips in enumerate(TABLES):
        write_parquet(folder / f"part-{number}.parquet", clips)
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_hidden.parquet"):
        (folder / name).touch()
    return folder


def rows_of(folder):
    """Returns the rows of all tables of a folder, which have equal columns."""
    tables = [parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    assert len({str(part.schema.remove_metadata()) for part in tables}) == 1
    return [row for part in tables for row in part.to_pylist()]


def test_identify_writes_an_answer_for_each_clip_of_each_table(tell, folder, made, day, tmp_path):
    out = tmp_path / "out"
    words = ("identify", folder, f"--input={day}", f"--out={out}", "--k=3", "--json")
    done = tell(*words)
    # The gallery has too few strangers to measure a threshold, so the rule is `new`.
    assert (done["tables"], done["rule"]["by"], done["threshold"]) == (4, "new", None)
    wanted = [made.identify(clips, k=3) for clips in TABLES if clips]
    assert rows_of(out) == [row for answers in wanted for row in list_rows(answers)]
    assert not [path for path in (out, *out.iterdir()) if path.stat().st_mode & 0o077]  # private
    before = contents(out)
    assert tell(*words)["skipped"] == 4 and contents(out) == before  # all results exist
    assert "contains results of other clips" in tell(*words[:-2], "--k=2", "--json", code=2)
    for content in (TABLES[1], b"PAR1 no table"):
        part = out / "part-1.parquet"
        part.write_bytes(content) if isinstance(content, bytes) else write_parquet(part, content)
        before = contents(out)
        assert "was not written by vidjax, or is damaged" in tell(*words, code=2)
        assert contents(out) == before
    for number in (0, 1):
        (out / f"part-{number}.parquet").unlink()
    tell(*words)
    (out / "part-0.parquet").unlink()  # the next call has to write part-0
    write_parquet(day / "part-1.parquet", clips_of(7))  # and the result of part-1 is outdated
    before, error = contents(out), tell(*words, code=2)
    assert "part-1.parquet'" in error and "--out=FOLDER" in error and contents(out) == before


@pytest.mark.slow
def test_ranking_and_vectors_of_many_tables_equal_one_table(say, nearest_run, day, tmp_path):
    """Two more tables have 90 equal clips, whose scores tie. A ranking has at most 100 clips."""
    twins = [f"twin {n % 2}{n}" for n in range(90)]  # names of part-4 precede those of part-5
    twins[3] += ".mp4"  # an ending does not count in the order of names
    for number, names in ((4, twins[0::2]), (5, twins[1::2])):
        write_parquet(day / f"part-{number}.parquet", dict.fromkeys(names, CLIPS["clip 0-0"]))
    tables = [parquet.read_table(table) for table in bulk.list_tables(day)]
    parquet.write_table(pyarrow.concat_tables(tables), tmp_path / "all.parquet")
    words = ("rank", f"--workdir={nearest_run}", "--json")
    done = say(*words, f"--input={day}", f"--out={tmp_path / 'ranked'}")
    one_table = tmp_path / "all_ranked.parquet"
    say(*words, f"--input={tmp_path / 'all.parquet'}", f"--out={one_table}")
    rows, wanted = (parquet.read_table(path).to_pylist() for path in (done["results"], one_table))
    scores = [row.pop("score") for row in rows]
    assert scores == pytest.approx([row.pop("score") for row in wanted], abs=1e-5)
    assert rows == wanted
    # The ranking of each person has 100 of the 15 + 90 clips.
    run = vidjax.restore(nearest_run)
    places = itertools.product(run.identities, range(1, 101))
    assert [(row["identity"], row["rank"]) for row in rows] == [*places]
    say("embed", *words[1:], f"--input={day}", f"--out={tmp_path / 'vectors'}")
    rows, wanted = rows_of(tmp_path / "vectors")[: len(CLIPS)], run.embed(CLIPS)
    assert [row["clip"] for row in rows] == list(CLIPS)
    assert np.array([row["vector"] for row in rows]) == pytest.approx(wanted, abs=1e-5)
    embed = "embed", *words[1:], f"--input={day}/part-3.parquet"
    done = say(*embed, f"--out={tmp_path / 'one.parquet'}")
    assert (done["num_clips"], done["width"]) == (len(TABLES[3]), wanted.shape[1])
    assert ".parquet" in say(*embed, "--out=x.npy", code=2)


def test_people_in_a_ranking_of_two_tables_are_sorted(tell, tmp_path):
    """A clip is named like its person: person 3 in the first table, person 2 in the second."""
    gallery, day = servers.make_gallery(tmp_path / "g"), tmp_path / "day"
    day.mkdir()
    for number, person in enumerate(("person 3", "person 2")):
        clips = {person: servers.make_frames(700 + number, person)}
        write_parquet(day / f"part-{number}.parquet", clips)
    words = (f"--input={day}", f"--out={tmp_path / 'ranked'}", "--threshold=0.5")
    done = tell("rank", gallery.folder, *words, "--json")
    for private in (Path(done["results"]), gallery.folder):
        assert private.stat().st_mode & 0o077 == 0
    assert parquet.read_table(done["results"])["clip"].to_pylist() == ["person 2", "person 3"]
    # Without a threshold, each person has a list of both clips.
    done = tell("rank", gallery.folder, words[0], f"--out={tmp_path / 'lists'}", "--json")
    assert done["tables"] == 2
    assert parquet.read_table(done["results"]).num_rows == 2 * len(gallery)


@pytest.mark.slow
def test_ranking_refuses_a_clip_that_is_in_two_tables(say, nearest_run, day, tmp_path):
    """It is called `z.mp4` in part-4, whose ranking has 100 other clips, and `z` in part-5."""
    hundred, same = [f"a{n:03}" for n in range(100)], CLIPS["clip 0-0"]
    write_parquet(day / "part-4.parquet", dict.fromkeys([*hundred, "z.mp4"], same))
    write_parquet(day / "part-5.parquet", {"z": same})
    words = ("rank", f"--workdir={nearest_run}", f"--input={day}", f"--out={tmp_path}/r", "--json")
    assert "clip 'z' is in two tables, part-4.parquet and part-5.parquet" in say(*words, code=2)
    assert not (tmp_path / "r" / "ranking.parquet").exists()
    (day / "part-5.parquet").unlink()
    done = say(*words)
    # The refused command has written the results of each table.
    assert done["skipped"] == 5 and Path(done["results"]).exists()
    # If a later call cannot complete a ranking, the old ranking of fewer tables is deleted.
    (day / "part-6.parquet").write_bytes(b"PAR1 no table")
    say(*words, code=2)
    assert not Path(done["results"]).exists()


def test_call_ends_with_an_error_if_the_gallery_changes(tell, folder, day, tmp_path, monkeypatch):
    load, out = vidjax.Gallery.load, tmp_path / "out"

    def load_and_change(gallery, path):
        if path.name == "part-1.parquet":
            gallery.remove(identity=gallery.index.names[0])
        return load(gallery, path)

    monkeypatch.setattr(vidjax.Gallery, "load", load_and_change)
    words = ("identify", folder, f"--input={day}", f"--out={out}")
    assert "was changed during the command" in tell(*words, code=2)
    assert [*contents(out)] == ["part-0.parquet"]  # was written before the change


def test_damaged_tables_and_files_are_refused_and_others_are_answered(tell, folder, day, tmp_path):
    (day / "part-0.parquet").write_bytes(b"PAR1 no table")
    write_parquet(day / "part-1.parquet", {"a": {"face": np.zeros((1, 3))}})  # not WIDTH wide
    out = tmp_path / "out"
    error = tell("identify", folder, f"--input={day}", f"--out={out}", code=2)
    assert "part-0.parquet" in error and "2 of 4 tables failed; the other tables are done" in error
    assert [*contents(out)] == ["part-2.parquet", "part-3.parquet"]
    (day / "one.npz").touch()
    with pytest.raises(UserError, match=r"one\.npz' .*because the folder also contains tables"):
        bulk.list_tables(day)
    for split in ("train", "val"):
        (day / f"{split}.parquet").touch()
    assert bulk.list_tables(day) == []  # a dataset of two splits


# Recipe -> the folder of its results, and the command that computes the same.
RAY_COMMANDS = {
    "identify": ("answers", ("gallery", "identify", "people", "--threshold=0.5")),
    "rank": ("ranked", ("rank", "--workdir=runs/own")),
    "embed": ("vectors", ("embed", "--workdir=runs/own")),
}


@pytest.mark.nightly
@pytest.mark.optimized  # as the workers compile
@pytest.mark.parametrize("name", RAY_COMMANDS)
def test_ray_results_equal_one_machine(say, request, day, tmp_path, monkeypatch, name):
    pytest.importorskip("ray")
    assert set(RECIPES) == {*RAY_COMMANDS}
    monkeypatch.chdir(tmp_path)
    results, words = RAY_COMMANDS[name]
    if name == "identify":  # with nets, so that the workers need no JAX
        Path("models").mkdir()
        made_nets.write(Path("models"), width=WIDTH, back_end=made_nets.back_end(width=WIDTH))
        enrolled = {"Ada": CLIPS["clip 0-0"], "Bob": CLIPS["clip 1-0"]}
        Gallery.of_models(Path("people"), Path("models")).enrol(enrolled, {x: x for x in enrolled})
        (day / "part-1.parquet").unlink()
    else:
        Path("runs").mkdir()
        Path("runs/own").symlink_to(request.getfixturevalue("nearest_run"))
    (day / "part-2.parquet").unlink()  # the empty table, which has tests above
    start = "import ray\nray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8)\n"
    Path("recipe.py").write_text(start + RECIPES[name])
    env = {
        **os.environ, "PYTHONPATH": str(PAGE.parents[2]), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    subprocess.run([sys.executable, "recipe.py"], env=env, timeout=800, check=True)
    say(*words, f"--input={day}", "--out=one_machine")
    pair = [
        sorted(rows_of(Path(out)), key=lambda row: (row.get("identity") or "", row["clip"]))
        for out in (results, "one_machine")
    ]
    for row, wanted in zip(*pair, strict=True):
        # Numbers may differ by rounding, because Ray makes other batches.
        assert row.pop("vector", []) == pytest.approx(wanted.pop("vector", []), abs=1e-6)
        assert row == pytest.approx(wanted, abs=1e-6)
