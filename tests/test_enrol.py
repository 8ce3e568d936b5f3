"""`vidjax gallery enrol`: many photos, features of photos, tables of people, and interruptions."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")
pytest.importorskip("pyarrow", reason="needs the extra [parquet]")

from pyarrow import parquet

from tests.helpers import clip_files, interrupted, made_galleries, made_nets
from tests.helpers.cases import quick_first
from tests.helpers.clip_files import write_parquet
from tests.helpers.drawn_people import write_models, write_photo
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import clip_inputs
from vidjax.utils.errors import VidjaxWarning

pytestmark = pytest.mark.usefixtures("read_here")
WIDTH = made_nets.WIDTH


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A folder of nets for drawn faces."""
    return write_models(tmp_path_factory.mktemp("of drawn faces") / "nets")


@pytest.fixture
def folder(tmp_path, say, nets):
    """An empty gallery of the nets."""
    say("gallery", "create", tmp_path / "g", f"--models={nets}")
    return tmp_path / "g"


def list_clips(folder):
    """Returns clip -> person."""
    return {name: clip.identity for name, clip in Gallery(folder).clips.items()}


@pytest.fixture
def friends(tmp_path):
    """Photos of three people, one of two people, and one of nobody."""
    folder = tmp_path / "friends"
    for path, *faces in (
        ("Ada/1", ("Ada", 40, 40)), ("Ada/2", ("Ada", 30, 40)), ("Bob/1", ("Bob", 40, 40)),
        ("Eve", ("Eve", 40, 40)), ("Bob/group", ("Bob", 20, 20), ("Ada", 70, 40)), ("Bob/wall",),
    ):  # fmt: skip
        write_photo(folder / f"{path}.png", *faces)
    return folder


PHOTOS = {"Ada/1": "Ada", "Ada/2": "Ada", "Bob/1": "Bob", "Eve/Eve": "Eve"}


def test_photos_of_all_people_are_enrolled_in_one_call(command, folder, friends):
    words = ("gallery", "enrol", folder, f"--photos={friends}")
    done = command(*words, "--json")
    assert done.code == 1 and list_clips(folder) == PHOTOS
    content = json.loads(done.out)
    assert (content["enrolled"], content["unchanged"]) == (4, 0)
    assert [Path(path).name for path in content["failed"]] == ["group.png", "wall.png"]
    assert "group.png: the photo shows 2 faces: give a photo of only one person" in done.err
    assert "wall.png: the photo shows no face" in done.err
    # As if all photos were walls.
    nothing = clip_inputs.embed_clips(Gallery(folder).backend, friends, ())
    assert not nothing.names and [x.shape for x in nothing.parts.values()] == [(0, WIDTH)]
    (friends / "Bob/group.png").unlink()
    (friends / "Bob/wall.png").unlink()
    before = Gallery(folder).digest
    assert "0 faces, 4 enrolled before" in command(*words).out and Gallery(folder).digest == before
    command("gallery", "rename", folder, "--identity=Ada", "--to=Countess")
    command("gallery", "relabel", folder, "--clip=Bob/1", "--identity=Robert")
    write_photo(friends / "Ada/3.png", ("Ada", 20, 50))
    assert "1 face, 4 enrolled before" in command(*words).out
    renamed = dict.fromkeys(("Ada/1", "Ada/2", "Ada/3"), "Countess")
    assert list_clips(folder) == renamed | {"Bob/1": "Robert", "Eve/Eve": "Eve"}
    write_photo(friends / "Ada/3.png", ("Eve", 20, 50))  # another photo of this name
    write_photo(friends / "Dan/1.png", ("Bob", 50, 20))
    done = command(*words)
    assert done.code == 1 and "Ada/3.png: clip 'Ada/3' is already enrolled with another" in done.err
    assert "remove the enrolled clip" in done.out and list_clips(folder)["Dan/1"] == "Dan"


# Words after `vidjax gallery enrol G` -> part of the error.
MISTAKES = {
    "--photos=P --identity=Ada": "--identity has no effect with --photos",
    "--photos=P/Ada/1.png": "--photos=P/Ada/1.png is a file, not a folder",
    "--photos=P --models=EMPTY": "--models=DIR",
    "--input=P --models=EMPTY": "--models has no effect without --photos",
    "--photos=missing": "'missing' is not a folder",
    "--input=P": "'P' contains photos, but no features\nto enrol people from photos: --photos=P",
    "": "needs one of --input --split --photos",
}


def test_mistakes_about_photos_name_the_remedy(say, folder, friends, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    friends.rename("P")
    (tmp_path / "EMPTY").mkdir()
    for words, remedy in MISTAKES.items():
        assert remedy in say("gallery", "enrol", folder, *words.split(), code=2), words
    of_run = made_galleries.make(tmp_path / "run").folder
    error = say("gallery", "enrol", of_run, "--photos=P", code=2)
    assert "gallery create NEW --models=DIR" in error


def write_table(path, people, *, first=0, frames=2):
    """Writes a table with a column of people, who may be None; returns its path."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(first)
    clips = {
        f"c{first + number}": {"face": rng.normal(size=(frames, WIDTH)).astype(np.float32)}
        for number in range(len(people))
    }
    write_parquet(path, clips)
    table = parquet.read_table(path)
    column = [people[int(clip[1:]) - first] for clip in table["clip"].to_pylist()]
    parquet.write_table(table.append_column("identity", [column]), path)
    return path


def test_tables_with_a_column_of_people_are_enrolled(say, folder, tmp_path):
    one = write_table(tmp_path / "one.parquet", ["Ada", "Eve", None, "unknown 1"])
    with pytest.warns(VidjaxWarning, match=r"row 3: clip c2: its .*clips: 1\)"):
        assert "2 clips, 0 enrolled before" in say("gallery", "enrol", folder, f"--input={one}")
    assert list_clips(folder) == {"c0": "Ada", "c1": "Eve"}
    odd = write_table(tmp_path / "odd.parquet", ["1E+05", "Eve"], first=10)
    with pytest.warns(VidjaxWarning, match="odd.parquet: row 1: identity '1E[+]05' looks like"):
        say("gallery", "enrol", folder, f"--input={odd}")
    twice = parquet.read_table(odd)
    twice = twice.set_column(twice.column_names.index("identity"), "identity", [["A", *"BBB"]])
    parquet.write_table(twice, odd)
    error = say("gallery", "enrol", folder, f"--input={odd}", code=2)
    assert "odd.parquet: row 3: clip c10 has the labels A and B" in error
    nobody = write_table(tmp_path / "nobody.parquet", ["unknown 1"], first=20)
    assert "contains no name" in say("gallery", "enrol", folder, f"--input={nobody}", code=2)


@pytest.mark.parametrize("ending", quick_first(["csv", "tsv", "jsonl", "parquet"]))
def test_answers_of_identify_are_labels_of_many_tables(say, folder, nets, tmp_path, ending):
    """A folder of tables and a single table; the answers name clips of both."""
    day = tmp_path / "day"
    for number, people in enumerate((["Ada", "Eve"], ["Ada", "Bob"], [None])):
        write_table(day / f"{number}.parquet", people, first=2 * number)
    say("gallery", "enrol", folder, f"--input={day}/0.parquet", f"--input={day}/1.parquet")
    rows = {f"c{number}": name for number, name in enumerate(("Ada", "Eve", "Ada", "Bob"))}
    assert list_clips(folder) == rows
    say("gallery", "create", other := tmp_path / "other", f"--models={nets}")
    for number, given, inputs in (
        (0, [f"--input={day}"], 3),
        (1, [f"--input={day}/1.parquet", f"--input={day}/0.parquet"], 2),
    ):
        answers = tmp_path / f"{number}.{ending}"  # `identify` writes the answers of a table
        words = (f"--input={day}/{number}.parquet", f"--out={answers}", "--threshold=1e-9")
        say("gallery", "identify", folder, *words)
        done = say("gallery", "enrol", other, *given, f"--labels={answers}")
        assert f"inputs      {inputs}" in done and "2 clips, 0 enrolled before" in done
    assert list_clips(other) == rows


def test_folders_of_clips_are_not_enrolled_as_one_person(say, folder, tmp_path):
    face = {"face": np.ones((1, WIDTH), np.float32)}
    days = clip_files.write_npz(tmp_path / "days", {"monday": {"1": face}, "tuesday": {"1": face}})
    words = ("gallery", "enrol", folder, f"--input={days}")
    assert "leave out --identity" in say(*words, "--identity=Ada", code=2)
    labels = clip_files.write_labels(tmp_path / "l.csv", {"monday/1": "Ada", "tuesday/1": "Eve"})
    say(*words, f"--labels={labels}")
    say(*words[:3], f"--input={days / 'monday'}", "--identity=Ada")
    assert list_clips(folder) == {"monday/1": "Ada", "tuesday/1": "Eve", "1": "Ada"}


def test_labels_that_no_input_has_are_reported_once(say, command, folder, tmp_path):
    day = tmp_path / "day"
    for number in (0, 2):
        write_table(day / f"{number}.parquet", ["Ada", "Eve"], first=number)
    words = ("gallery", "enrol", folder, f"--input={day}")
    labels = clip_files.write_labels(tmp_path / "labels.csv", {"c3.mp4": "Eve", "zzz": "Bob"})
    with pytest.warns(VidjaxWarning, match="labels.csv: no clip is called 'zzz'") as warned:
        say(*words, f"--labels={labels}")
    assert len(warned) == 1 and list_clips(folder) == {"c3": "Eve"}
    labels.write_text("clip,identity\nc0,Ada\nc1,\n")  # as `identify` writes an unknown person
    with pytest.warns(VidjaxWarning, match="labels.csv: line 3: clip c1: its identity is"):
        say(*words, f"--labels={labels}")
    assert list_clips(folder) == {"c0": "Ada", "c3": "Eve"}
    labels = clip_files.write_labels(tmp_path / "stray.csv", {"zzz": "Bob"})
    done = command(*words, f"--labels={labels}")
    assert done.code == 2 and "use the names of the clips in the features" in done.err
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"clip": "c0", "identity": "Ada"}\n\n{"clip": "c1"}\n')
    assert f"{broken}: line 3 is not JSON" in say(*words, f"--labels={broken}", code=2)
    plain = write_parquet(tmp_path / "plain.parquet", {"x": {"face": np.ones((1, WIDTH))}})
    error = say("gallery", "enrol", folder, f"--input={plain}", code=2)
    assert "--labels=FILE" in error and "a column identity in the table" in error


def test_an_interrupted_enrolment_continues(folder, say, command, tmp_path, monkeypatch):
    """Tables that were finished before the interruption are not enrolled twice."""
    day = tmp_path / "day"
    for number in range(3):
        write_table(day / f"{number}.parquet", ["Ada", f"Person {number}"], first=2 * number)
    words = ("gallery", "enrol", folder, f"--input={day}")
    with monkeypatch.context() as patch:
        interrupted.count_down(patch, (Gallery, "load"))[0] = 3
        say(*words, code=130)
    assert list_clips(folder).keys() == {"c0", "c1", "c2", "c3"}
    assert command(*words, "--identity=unknown 1").refused("is reserved for people")
    done = command(*words)
    assert "2 clips, 4 enrolled before" in done.out and "3 of 3: " in done.err
    assert "3 of 3: " not in command(*words, "--quiet").err
    assert list_clips(folder)["c5"] == "Person 2"
