"""What people say about faces is a log, `said.jsonl`. Names and galleries follow from it."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import sqlite3
from concurrent import futures
from functools import partial
from typing import Any
from unittest import mock

import msgspec
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import made_shelf
from tests.helpers.cases import quick_first
from tests.helpers.drawn_people import Drawn, restore, write_photo
from tests.helpers.interrupted import count_down
from tests.helpers.seen import contents, refused
from vidjax.apps import features_folder, said
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import Store
from vidjax.apps.said import FEATURES, Face, Line
from vidjax.apps.video import faces, review, unknown_numbers
from vidjax.apps.video.decision import read_said
from vidjax.utils import files

FILM = "a" * 64
BOX = (0.1, 0.1, 0.2, 0.2)
FACES = {clip: Face(film=FILM, at=number, box=BOX) for number, clip in enumerate("abcdef")}


def say(clip, says, of: Any = None, **values):
    of = FACES.get(of, of)
    return said.about(FACES[clip], says, of=of, **values)


def say_of(out, clip, says, of=None):
    """Appends a line about the face of a clip to the log of results; returns the face."""
    found = features_folder.FaceFinder(out)(clip)
    assert found
    said.append(out, said.stamp([said.about(found.face, says, of=of)]))
    return found.face


def replay(*steps, numbers=None):
    """Returns what `steps` said about the faces "a" to "f". A step is a list of lines."""
    lines = [
        msgspec.structs.replace(line, when=str(number))
        for number, step in enumerate(steps)
        for line in (step if isinstance(step, list) else [step])
    ]
    return faces.Said(lines, (), {FACES[clip]: n for clip, n in (numbers or {}).items()})


def of_clips(table):
    return {clip: table[face] for clip, face in FACES.items() if face in table}


def test_last_line_about_a_face_counts_and_renames_change_earlier_lines():
    found = replay(
        say("a", "is", "Ada"), say("a", "not", "Ada"), say("b", "is", "Bob"), say("b", "ignore"),
        say("c", "ignore"), say("c", "is", "Cy"), say("d", "is"), say("e", "is", "Eve"),
        say("e", "undo"), say("f", "not", "Ada"), say("f", "not", "Bob"), say("f", "is", "Ada"),
    )  # fmt: skip
    assert of_clips(found.names) == {"c": "Cy", "d": None, "f": "Ada"}
    assert of_clips(found.denied) == {"a": {"Ada"}, "f": {"Ada", "Bob"}}
    assert of_clips(found.ignored) == {"b": False}
    # A new name replaces the name in earlier lines.
    found = replay(
        say("a", "is", "Ada"), say("b", "not", "Ada"), Line(says="rename", person="Ada", of="Eva"),
        say("c", "is", "Ada"),
        [Line(says="rename", person=x, of=y) for x, y in (("Ada", "Eva"), ("Eva", "Ada"))],
    )  # fmt: skip
    assert of_clips(found.names) == {"a": "Ada", "c": "Eva"}  # two people exchange their names
    assert of_clips(found.denied) == {"b": {"Ada"}}
    assert found.label("people/Ada/1", "Ada") == "Ada"  # Ada, Eva, Ada


def test_numbers_are_moved_divided_and_joined():
    numbers, apart = {"a": 1, "b": 1, "c": 1, "d": 2}, say("a", "apart", "b", number=3)
    found = replay(apart, numbers=numbers)
    assert of_clips(found.numbers) == numbers | {"a": 3} and of_clips(found.given) == numbers
    assert (found.fixed, found.apart, found.highest) == ({1, 3}, {(1, 3)}, 3)
    joined = [say("d", "same", "d", number=2), say("a", "same", "d", number=2, person="unknown 3")]
    found = replay(apart, joined, numbers=numbers)
    assert of_clips(found.numbers) == {"a": 2, "b": 1, "c": 1, "d": 2}
    assert (found.fixed, found.apart) == ({1, 2}, {(1, 2)})
    together = [say("b", "same", "b", number=1)]
    together += [say("d", "same", "b", number=1, person="unknown 2")]
    found = replay(apart, joined, together, numbers=numbers)
    assert {*of_clips(found.numbers).values()} == {1}
    assert (found.fixed, found.apart) == ({1}, set()), "the last statement counts"
    # A person who is taken out of an unknown person also differs from those who differ from it.
    found = replay(apart, say("b", "apart", "c", number=4), numbers=numbers)
    assert found.apart == {(1, 3), (1, 4), (3, 4)}


def test_a_number_of_the_log_is_kept_if_most_clips_of_the_group_had_another_number():
    groups = dict.fromkeys("abc", "unknown 1") | {"d": "unknown 2", "e": "unknown 3"}
    wanted = {"a": 7, "b": 7, "c": 7, "d": 3, "e": 10}
    assert unknown_numbers._keep_numbers(groups, {"a": 3, "b": 3, "c": 7, "d": 3}, {7}, 9) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_undoing_all_steps_restores_everything(seed):
    rng, steps = random.Random(seed), list[Any]()
    numbers = {clip: rng.randint(1, 3) for clip in "abcde"}

    def facts(said_: faces.Said):
        return said_.names, said_.denied, said_.ignored, said_.numbers, said_.fixed, said_.apart

    history = [facts(replay(numbers=numbers))]
    for _ in range(12):
        one, other = rng.sample("abcdef", 2)
        number = rng.randint(1, 9)
        steps.append(rng.choice([
            say(one, "is", "Ada"), say(one, "not", "Ada"), say(one, "ignore"), say(one, "undo"),
            say(one, "same", other, number=number), say(one, "apart", other, number=number),
            Line(says="rename", person="Ada", of="Eva"),
        ]))  # fmt: skip
        history.append(facts(replay(*steps, numbers=numbers)))
    for number in range(12)[::-1]:
        steps.append(Line(says="undo", of=str(number)))
        assert facts(replay(*steps, numbers=numbers)) == history[number]


def test_line_about_a_long_track_has_few_places_from_its_begin_to_its_end():
    facts = {"clip": "a", "shot": 0, "start_s": 0, "end_s": 200, "seen": 9, "box": BOX}
    places = [(number / 5, BOX) for number in range(1000)]
    face = said.make_face(FILM, features_folder.FaceTrack(**facts, places=places))
    assert face and len(face.places) == said.MOST_PLACES
    times = [seconds for seconds, _ in face.places]
    steps = [after - before for before, after in itertools.pairwise(times)]
    assert (times[0], times[-1]) == (0, 199.8) and max(steps) < 1.1 * 200 / len(steps)


def test_log_survives_torn_lines_and_simultaneous_writers(tmp_path):
    lines, path = said.stamp([say("a", "is", "Ada")]), tmp_path / said.NAME
    said.append(tmp_path, lines)
    with path.open("ab") as log:
        log.write(b'{"says":"is","of"')  # a killed program
    assert said.read(tmp_path) == lines
    (other := tmp_path / "other").mkdir()  # a person has written a line and a blank line
    (other / said.NAME).write_bytes(b"\n" + path.read_bytes().splitlines()[0])
    said.append(other, lines)
    assert said.read(other) == lines * 2

    def add(number):
        for place in range(20):
            said.append(tmp_path, said.stamp([say("b", "is", f"{number}-{place}")]))

    with futures.ThreadPoolExecutor() as pool:
        assert len([*pool.map(add, range(3))]) == 3
    found = [str(line.of) for line in said.read(tmp_path)[1:]]
    assert sorted(found) == sorted(f"{x}-{y}" for x in range(3) for y in range(20))
    path.write_bytes(path.read_bytes().replace(b'"says":"is"', b'"says":"was"', 3))
    refused(lambda: said.read(tmp_path), "line 1", said.NAME, "delete this line")


def test_forgetting_a_person_deletes_the_lines_and_keeps_their_number(tmp_path):
    said.append(tmp_path, said.stamp([
        say("a", "is", "Ada"), say("b", "not", "Ada"), say("c", "is", "Bob"),
        Line(says="rename", person="Ada", of="Eva"),
    ]))  # fmt: skip
    assert said.forget(tmp_path, "Ada") == 3 and said.forget(tmp_path, "Zoe") == 0
    assert [line.of for line in said.read(tmp_path)] == [None, None, "Bob", None]
    assert b"Ada" not in (tmp_path / said.NAME).read_bytes()


def test_every_change_of_the_gallery_of_results_reaches_the_log(tmp_path):
    shelf = made_shelf.make(tmp_path, people=4, films=1, known=2, faces=8)
    gallery, ada = Gallery(shelf.out / "gallery"), made_shelf.name_person(0)
    for name, other in ((ada, "Eva"), ("Eva", ada)):
        gallery.rename(name, other)
    assert not (shelf.out / said.NAME).exists(), "a gallery elsewhere gets no log"
    said.append(shelf.out, [])
    first = made_shelf.decide(shelf.out)
    clips = [clip for clip, x in first.unknown.items() if x == "unknown 1"]
    assert first.vectors
    one, names = first.vectors.only(clips[:1]), partial(made_shelf.list_names, shelf.out)
    before = names()
    gallery.enrol(one, "Zoe")
    assert names() == before | dict.fromkeys(clips, "Zoe") and gallery.people["Zoe"] == (clips[0],)
    gallery.rename(ada, "Countess")
    renamed = {clip: "Countess" if name == ada else name for clip, name in names().items()}
    assert names() == renamed and ada not in renamed.values()
    with mock.patch.object(gallery._store, "write", side_effect=OSError), pytest.raises(OSError):
        gallery.rename("Countess", "Eva")
    assert [line.says for line in said.read(shelf.out)][-2:] == ["rename", "undo"]
    assert names() == renamed
    gallery.relabel(clips[0], "Yan")
    assert names()[clips[0]] == "Yan" and "Zoe" not in names().values()
    gallery.relabel(clips[0], None)
    assert names()[clips[0]] is None
    gallery.remove(clip=clips[0])
    assert names()[clips[0]] == "unknown 1"
    gallery.enrol(one, "Zoe")
    gallery.remove(identity="Zoe")
    assert names()[clips[0]] == "unknown 1" and b"Zoe" not in (shelf.out / said.NAME).read_bytes()
    # The gallery follows from the log: if the log has more lines, they are applied.
    face = say_of(shelf.out, clips[0], "is", "Xi")
    assert names()[clips[0]] == "Xi" and gallery.people["Xi"] == (clips[0],)
    # A person may write a line with a single box, at another time of the same shot.
    line = {"film": face.film, "at": face.at + 0.5, "box": [0.3, 0.2, 0.4, 0.7]}
    with (shelf.out / said.NAME).open("a") as log:
        log.write(json.dumps(line | {"says": "is", "of": "Wu"}) + "\n")
    assert names()[clips[0]] == "Wu"


# Changes of a page, or of the gallery of results, and a face.
CHANGES = {
    "people": lambda page, face: page.change("name", ["Ada"], "Bob"),
    "gallery": lambda page, face: Gallery(page._out / "gallery").rename("Ada", "Eva"),
    "unknown": lambda page, face: page.change("name", ["unknown 1"], "Zoe"),
    "apart": lambda page, face: page.change("apart", [face]),
}


@pytest.mark.parametrize("change", quick_first(CHANGES, 2))
def test_change_that_is_killed_at_any_write_is_done_or_not_done(tmp_path, monkeypatch, change):
    shelf = made_shelf.make(tmp_path, people=4, films=1, known=2, faces=8)
    said.append(shelf.out, [])
    whole = tmp_path / "whole"
    left = count_down(monkeypatch, (os, "replace"), (Store, "write"), (files, "append"))
    names = partial(made_shelf.list_names, shelf.out)
    before, found, is_done = names(), list[dict[str, str | None]](), False
    shelf.out.rename(whole)
    while not is_done:
        shutil.copytree(whole, shelf.out)
        page = review.Review(shelf.out, made_shelf.decide(shelf.out))
        left[0] = len(found) + 1  # the number of the write that is interrupted
        with contextlib.suppress(KeyboardInterrupt):
            CHANGES[change](page, "clip:\t" + page._clips_of["unknown 1"][0])
        is_done, left[0] = left[0] > 0, 0
        found.append(names())
        assert names() == found[-1]
        shutil.rmtree(shelf.out)
    assert len(found) > 2 and found[-1] != before and all(x in (before, found[-1]) for x in found)


@pytest.fixture
def party(place, command, read_here):
    """Ada and Bob have photos. The user has said that a face is Ada, and another is not Ada."""

    def make(folder):
        (drawn := Drawn(folder, command)).meet("Ada", "Bob")
        words = f"--input={drawn.out / 'features'}", "--clip=party.s001.t00", "--identity=Ada"
        drawn.gallery("enrol", *words)
        say_of(drawn.out, "party.s000.t00", "not", "Ada")
        drawn.who(folder / "party.mkv")
        names = drawn.names()
        assert names["party.s001.t00"] == "Ada" != names["party.s000.t00"]

    return Drawn(restore(place, make), command)


def read_state(party):
    return read_said(party.out, features_folder.read_media_files(party.out / FEATURES))


def test_typed_names_follow_a_changed_face_tag(party):
    photo, before = party.friends / "Ada" / "1.png", party.names()
    for name in ("Ada", "Adele"):
        write_photo(photo, ("Ada", 40, 40), tagged=[(name, 40, 40)])
        party.who(party.folder / "party.mkv")
    assert party.names() == {clip: "Adele" if x == "Ada" else x for clip, x in before.items()}


# No folder has the name of an earlier person in the second row.
@pytest.mark.parametrize("new", [
    {"Ada": "Bob", "Bob": "Ada"}, {"Ada": "Ada L", "Bob": "Robert"}, {"Ada": "ada"},
])  # fmt: skip
def test_names_follow_the_folders_of_all_people(party, new):
    before, friends = party.names(), party.friends
    (friends / "Ada" / "1.png").rename(friends / "Ada" / "Ada at the sea.png")
    for old in new:
        (friends / old).rename(friends / f"{old} moves")
    for old in new:
        (friends / f"{old} moves").rename(friends / new[old])
    content, output = party.who(party.folder / "party.mkv")
    assert content["people"].keys() == {new.get("Ada"), new.get("Bob", "Bob")}
    assert party.names() == {clip: new.get(x, x) for clip, x in before.items()}
    moved = "all photos of Ada now belong to ada. 1 face that you named Ada got the name ada"
    assert (moved in output) == ("ada" in new.values())


def test_photos_that_went_to_several_people_leave_typed_names_and_ask(party):
    film, friends = party.folder / "party.mkv", party.friends
    write_photo(friends / "Ada" / "2.png", ("Ada", 44, 40))
    party.who(film)
    for number, name in ((1, "Cleo"), (2, "Dora")):
        (friends / name).mkdir()
        (friends / "Ada" / f"{number}.png").rename(friends / name / f"{number}.png")
    (friends / "Ada").rmdir()
    _, output = party.who(film)
    assert "belong to Cleo, Dora. 1 face that you named Ada kept this name" in output
    assert "vidjax gallery rename" in output and party.names()["party.s001.t00"] == "Ada"


def test_only_photo_that_moves_to_another_person_denies_nothing_for_this_person(party):
    """The photo was wrong: it shows Bob."""
    (party.friends / "Ada" / "1.png").rename(party.friends / "Bob" / "2.png")
    (party.friends / "Ada").rmdir()
    party.who(party.folder / "party.mkv")
    assert read_state(party).denied["party.s000.t00"] == {"Ada"}


@pytest.mark.parametrize("way", ["deleted", "missing"])
def test_photo_that_goes_leaves_typed_names(party, way):
    film, friends, is_deleted = party.folder / "party.mkv", party.friends, way == "deleted"
    if is_deleted:  # from a folder that has other files
        shutil.copy(friends / "Ada" / "1.png", friends / "Ada.png")
        write_photo(friends / "Eve.png", ("Eve", 40, 40))
        shutil.rmtree(friends / "Ada")
        party.who(film)
        (friends / "Ada.png").unlink()
    else:
        shutil.rmtree(friends / "Ada")
    _, output = party.who(film, code=int(not is_deleted))
    assert party.names()["party.s001.t00"] == "Ada"
    assert ("but is still a name that you typed for 1 face" in output) == is_deleted
    if is_deleted:
        party.gallery("remove", "--identity=Ada")
    _, output = party.who(film, flags=["--forget-missing"])
    assert "Ada" not in party.names().values()
    forgotten = "Ada no longer has photos and is forgotten, with the name that you typed for 1 face"
    assert is_deleted or forgotten in output
    assert b"Ada" not in (party.out / said.NAME).read_bytes()


def test_faces_ignored_in_bulk_get_the_name_of_a_person_who_is_enrolled_later(drawn, read_here):
    photo, friends = drawn.group(), drawn.friends  # of Ada and Bob
    drawn.befriend("Ada")
    drawn.who(photo)
    for action, of, later in (("once", [], "Bob"), ("ignore", ["unknown 1"], None)):
        page = review.Review(drawn.out, made_shelf.decide(drawn.out))
        page.change(action, of)
        page.save()
        assert {*drawn.names().values()} == {"Ada", None}
        drawn.befriend("Bob")
        drawn.who(photo)
        assert {*drawn.names().values()} == {"Ada", later}
        shutil.rmtree(friends / "Bob")
        drawn.who(photo, flags=["--forget-missing"])
        page.refresh()
        page.undo()


def write_as_earlier(out):
    """Replaces the log of results by what version 0.1.0 has stored: denied and ignored faces."""
    films, gallery = features_folder.read_media_files(out / FEATURES), Gallery(out / "gallery")
    state, numbers, denied = read_said(out, films), {}, {}
    for film in films:
        clips = [track.clip for track in film.tracks]
        known = {clip: state.numbers[clip] for clip in clips if clip in state.numbers}
        numbers[film.digest] = known | {clip: 0 for clip in clips if clip in state.ignored}
        denied[film.digest] = {x: sorted(state.denied[x]) for x in clips if x in state.denied}
    content = {"format": 1, "films": numbers, "fixed": sorted(state.fixed), "apart": [],
               "same": [], "removed": 9}  # fmt: skip
    (out / "unknown.json").write_text(json.dumps(content))
    (out / said.NAME).unlink()
    path = next(gallery.folder.glob("*.sqlite*"))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        ((text,),) = connection.execute("SELECT facts FROM gallery").fetchall()
        text = json.dumps(json.loads(text) | {"denied": denied})
        digest = hashlib.sha256(text.encode()).digest()
        connection.execute("UPDATE gallery SET facts = ?, sha256 = ?", (text, digest))


def test_results_of_version_0_1_0_keep_names_numbers_and_corrections(party):
    film = party.folder / "party.mkv"
    party.gallery("rename", "--identity=Bob", "--to=Robert")
    say_of(party.out, "party.s002.t01", "ignore")
    party.who(film)
    names, state = party.names(), read_state(party)
    write_as_earlier(party.out)
    before = contents(party.out)
    words = (party.out / "gallery", f"--input={party.out / 'features'}")
    answers = party.run("gallery", "identify", *words).content["answers"]
    known = {clip: x for clip, x in names.items() if x and not x.startswith("unknown")}
    assert {x["clip"]: x["identity"] for x in answers if x["identity"]} == known
    assert contents(party.out) == before, "reading converts nothing"
    for _ in range(2):
        party.who(film)
        assert party.names() == names
    found = read_state(party)
    for field in ("names", "denied", "ignored", "numbers"):
        assert getattr(found, field) == getattr(state, field), field
    # A first change of an earlier gallery writes the log, too.
    write_as_earlier(party.out)
    Gallery(party.out / "gallery").rename("Ada", "Eva")
    party.who(film)
    assert party.names() == {clip: "Eva" if x == "Ada" else x for clip, x in names.items()}
    renames = [(x.person, x.of) for x in said.read(party.out) if x.says == "rename"]
    assert renames == [("Bob", "Robert"), ("Ada", "Eva")]
    (earlier := party.out / "features" / "earlier").mkdir()  # of films that wait for other nets
    (earlier.parent / "videos" / "party.json").rename(earlier / "party.json")
    (earlier.parent / "party.npz").unlink()
    assert "1, such as party.mkv" in party.who(party.group()).output and not earlier.exists()
