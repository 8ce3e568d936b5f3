"""What people say about faces is a log, `said.jsonl`. Names and galleries follow from it."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Set
from concurrent import futures
from functools import partial
from typing import Any

import msgspec
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import made_appearances, made_shelf
from tests.helpers.cases import quick_first
from tests.helpers.drawn_people import Drawn, restore, write_photo
from tests.helpers.interrupted import count_down
from tests.helpers.seen import contents, refused
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import Store
from vidjax.apps.video import actions, decide, log, media, results
from vidjax.apps.video.faces import find_first, match
from vidjax.apps.video.log import Line
from vidjax.apps.video.media import Face, FaceTrack
from vidjax.apps.video.names_page import CLIP
from vidjax.apps.video.said import Said
from vidjax.utils import files
from vidjax.utils.errors import InUseError

FILM = "a" * 64
BOX = (0.1, 0.1, 0.2, 0.2)
FACES = {clip: Face(film=FILM, at=number, box=BOX) for number, clip in enumerate("abcdef")}
ADA, BOB, EVE, *UNKNOWN = PEOPLE = [digit * 32 for digit in "123456"]  # keys
CALLED = [Line(says="person", person=x, name=y) for x, y in ((ADA, "Ada"), (BOB, "Bob"))]
NUMBERED = [Line(says="person", person=x, number=n) for n, x in enumerate(UNKNOWN, 1)]


def say(clip, says, person=None, **values):
    return log.about(FACES[clip], says, person=person, **values)


def call(person, name):
    return Line(says="person", person=person, name=name)


def join(person, other):
    return Line(says="merge", person=person, other=other)


def guess(**unknown):
    """Returns the numbers that a call has given to faces: clip -> number."""
    return [*NUMBERED, *(say(x, "guess", UNKNOWN[n - 1]) for x, n in unknown.items())]


def key_of(step):
    return f"{step:032x}"


def undo(step):
    return Line(says="undo", of=key_of(step))


def number_steps(steps):
    """Returns the lines of steps, with the key of each step. A step is a line or a list."""
    return [
        msgspec.structs.replace(line, step=key_of(number))
        for number, step in enumerate(steps)
        for line in (step if isinstance(step, list) else [step])
    ]


def replay(*steps, media=()):
    """Returns what `steps` said about the faces "a" to "f"."""
    return Said(number_steps(steps), media)


def of_clips(table):
    return {clip: table[face] for clip, face in FACES.items() if face in table}


def list_facts(said, gone: Set[Any] = frozenset(), forgotten: Set[str] = frozenset()):
    """Returns all facts of `said`, without the faces `gone` and the names `forgotten`."""
    tables = said.names, said.ignored, said.numbers
    kept = [{key: x for key, x in table.items() if key not in gone} for table in tables]
    denied = {key: names - forgotten for key, names in said.denied.items() if key not in gone}
    photos = {
        (key, name, x.person and said.call(x.person), x.unused)
        for key, of in said.photos.items() for name, x in of.items()
    }  # fmt: skip
    return {
        "names": kept[0], "ignored": kept[1], "numbers": kept[2], "highest": said.highest,
        "denied": {key: names for key, names in denied.items() if names},
        "photos": {x for x in photos if x[2] not in forgotten or x[2] is None},
        "numbered": said.numbered - gone, "fixed": said.fixed, "apart": said.apart,
        "films": said.films,
    }  # fmt: skip


def make_film(*faces, **facts):
    """Returns a film in which the clips "a", "b" and so on show the faces with these names."""
    film = made_appearances.film()
    film.sha256 = FILM
    left, top, width, height = BOX
    box = (left, top, left + width, top + height)
    film.tracks = [
        FaceTrack(clip=x, shot=0, start_s=FACES[x].at, end_s=FACES[x].at, seen=1, box=box)
        for x in faces
    ]  # fmt: skip
    return msgspec.structs.replace(film, **facts)


def make_steps(rng, count=14):
    """Returns random steps about three people with names, and three unknown people."""
    steps = [[*CALLED, call(EVE, "Eve")], guess(a=1, b=1, c=1, d=2, e=3)]
    for _ in range(count):
        clip, (one, other) = rng.choice("abcdef"), rng.sample(PEOPLE[:3], 2)
        first, second = rng.sample(UNKNOWN, 2)
        name, sha256 = rng.choice(("Ada", "Bob", "Eve", "Zoe")), rng.choice("01") * 64
        photo = {"name": name, "unused": rng.random() < 0.2}
        steps.append(rng.choice([
            say(clip, "is", one), say(clip, "is"), say(clip, "not", one), say(clip, "show"),
            say(clip, "ignore", once=rng.random() < 0.5), say(clip, "same", first),
            say(clip, "guess", first), call(one, name), [call(one, name), call(other, "Ada")],
            join(one, other), join(first, second),
            Line(says="apart", person=first, other=second),
            Line(says="photo", film=sha256, box=BOX, person=rng.choice([one, None]), **photo),
            Line(says="gone", film=sha256, name=name), Line(says="film", film=FILM, of=one),
            undo(rng.randrange(2, len(steps) + 1)),
        ]))  # fmt: skip
    return steps


def test_last_line_about_a_face_counts_and_people_have_their_present_names():
    found = replay(
        CALLED, say("a", "is", ADA), say("a", "not", ADA), say("b", "is", BOB), say("b", "ignore"),
        say("c", "ignore", once=True), say("c", "is", BOB), say("d", "is"), say("e", "is", BOB),
        say("e", "show"), say("f", "not", ADA), say("f", "not", BOB), say("f", "is", ADA),
        say("c", "not", ADA),
    )  # fmt: skip
    assert of_clips(found.names) == {"c": "Bob", "d": None, "f": "Ada"}
    assert of_clips(found.denied) == {"a": {"Ada"}, "c": {"Ada"}, "f": {"Ada", "Bob"}}
    assert of_clips(found.ignored) == {"b": False}
    assert of_clips(replay(say("a", "ignore", once=True)).ignored) == {"a": True}
    assert of_clips(replay(say("a", "ignore"), say("a", "show")).ignored) == {}
    # A key that was never called has no name.
    assert not replay(say("a", "is", EVE), say("b", "not", EVE)).names


def test_names_follow_people_who_are_renamed_exchange_names_or_have_the_same_name():
    said = [CALLED, say("a", "is", ADA), say("b", "is", BOB), say("c", "not", ADA)]
    found = replay(*said, [call(ADA, "Bob"), call(BOB, "Ada")])
    assert of_clips(found.names) == {"a": "Bob", "b": "Ada"}
    assert of_clips(found.denied) == {"c": {"Bob"}}
    # Ada is now Eva. Later, another person gets the name Ada.
    later = [call(ADA, "Eva"), call(EVE, "Ada"), say("d", "is", EVE)]
    found = replay(*said, *later)
    assert of_clips(found.names) == {"a": "Eva", "b": "Bob", "d": "Ada"}
    assert (found.find_people("Ada"), found.find_people("Eva")) == ([EVE], [ADA])
    # Two people with one name are two people: the photos of one may go away, or get a new name.
    found = replay(*said, call(BOB, "Ada"))
    assert of_clips(found.names) == {"a": "Ada", "b": "Ada"}
    assert (
        found.find_people("Ada") == [ADA, BOB] and found.list_named("Ada") == [*FACES.values()][:2]
    )
    assert of_clips(replay(*said, call(BOB, "Ada"), call(ADA, "Eva")).names) == {
        "a": "Eva",
        "b": "Ada",
    }


def test_people_who_were_joined_have_one_name_until_that_is_undone():
    said = [CALLED, say("a", "is", ADA), say("b", "is", BOB), join(ADA, BOB)]
    assert of_clips(replay(*said).names) == {"a": "Bob", "b": "Bob"}
    assert of_clips(replay(*said, call(ADA, "Eva")).names) == {"a": "Eva", "b": "Eva"}
    assert of_clips(replay(*said, say("b", "not", ADA)).names) == {"a": "Bob"}
    assert replay(*said).find_people("Ada") == [] and replay(*said).find_root(ADA) == BOB
    assert of_clips(replay(*said, undo(3)).names) == {"a": "Ada", "b": "Bob"}
    assert of_clips(replay(*said, undo(3), undo(4)).names) == {"a": "Bob", "b": "Bob"}
    circle = replay(*said, join(BOB, ADA), join(ADA, ADA))  # is not followed for ever
    assert of_clips(circle.names) == {"a": "Bob", "b": "Bob"}
    assert replay(call(ADA, "Ada"), join(ADA, EVE), say("a", "is", EVE)).list_named("Ada")


def test_numbers_are_moved_divided_and_joined():
    numbers, apart = {"a": 1, "b": 1, "c": 1, "d": 2}, say("a", "same", UNKNOWN[2])
    before = guess(**numbers)
    found = replay(before, apart)
    assert of_clips(found.numbers) == numbers | {"a": 3}
    assert (found.fixed, found.apart, found.highest) == ({1, 3}, {(1, 3)}, 3)
    joined = [join(UNKNOWN[2], UNKNOWN[1])]
    found = replay(before, apart, joined)
    assert of_clips(found.numbers) == {"a": 2, "b": 1, "c": 1, "d": 2}
    assert (found.fixed, found.apart) == ({1, 2}, {(1, 2)})
    together = [join(UNKNOWN[1], UNKNOWN[0])]
    found = replay(before, apart, joined, together)
    assert {*of_clips(found.numbers).values()} == {1}
    assert (found.fixed, found.apart) == ({1}, set()), "the last statement counts"
    # A person who is taken out of an unknown person also differs from those who differ from it.
    fourth = Line(says="person", person=EVE, number=4)
    found = replay(before, apart, [fourth, say("b", "same", EVE)])
    assert found.apart == {(1, 3), (1, 4), (3, 4)} and found.find_unknown(4) == EVE
    # vidjax's own numbers do not move a face that a user has moved.
    assert of_clips(replay(before, apart, say("a", "guess", UNKNOWN[1])).numbers)["a"] == 3
    assert of_clips(replay(before, say("a", "guess", UNKNOWN[1])).numbers)["a"] == 2
    assert replay(before, apart, undo(1)).fixed == set()


def test_a_number_of_the_log_is_kept_if_most_clips_of_the_group_had_another_number():
    groups = dict.fromkeys("abc", "unknown 1") | {"d": "unknown 2", "e": "unknown 3"}
    wanted = {"a": 7, "b": 7, "c": 7, "d": 3, "e": 10}
    assert decide._keep_numbers(groups, {"a": 3, "b": 3, "c": 7, "d": 3}, {7}, 9) == wanted


def test_photos_name_their_faces_until_they_are_gone_or_belong_to_two_people():
    """A photo of Ada is in a film, too: its two files have the same digest."""
    photo = made_appearances.film("1.jpg", photo=True)
    photo.sha256, photo.tracks = FILM, make_film("a").tracks
    photo.tracks[0].clip = "people/aaaa"
    media = [make_film("a", "b"), photo]
    said = [CALLED, say("a", "photo", ADA, name="friends")]
    enrolled = lambda *lines: replay(*said, *lines, media=media).list_enrolled()  # noqa: E731
    assert enrolled() == {"people/aaaa": "Ada"}, "the clip of the film is not a photo of Ada"
    assert enrolled(call(ADA, "Eva")) == {"people/aaaa": "Eva"}
    assert enrolled(say("a", "photo", name="strangers")) == {}
    assert replay(say("a", "photo", name="x"), media=media).list_enrolled() == {"people/aaaa": None}
    assert enrolled(say("a", "photo", BOB, name="b")) == {}, "in the folders of two people"
    assert enrolled(say("a", "photo", BOB, name="b"), join(BOB, ADA)) == {"people/aaaa": "Ada"}
    assert enrolled(say("a", "photo", BOB, name="friends")) == {"people/aaaa": "Bob"}
    assert enrolled(say("a", "photo", ADA, name="friends", unused=True)) == {}
    gone = Line(says="gone", film=FILM, name="friends")
    assert enrolled(gone) == {} and replay(*said, gone, media=media).photos == {}
    assert enrolled(Line(says="gone", film=FILM, name="b")) == {"people/aaaa": "Ada"}
    # What a user says about the face is about both files.
    assert enrolled(say("a", "not", ADA)) == {} == enrolled(say("a", "ignore"))
    assert enrolled(say("a", "is", BOB)) == {"people/aaaa": "Bob", "a": "Bob"}
    # A photo that was not read with the present nets.
    found = replay(*said, media=[make_film("b")])
    assert [*found.photos] == [FACES["a"]] and not found.list_enrolled() and not found.list_lost(())


def test_a_face_of_a_missing_film_is_one_face_although_two_nets_described_it():
    places = tuple((float(x), BOX) for x in range(3))
    one = Face(film=FILM, at=1.0, box=BOX, places=places)
    other = Face(film=FILM, at=1.5, box=(0.12, 0.1, 0.2, 0.2), places=((0.5, BOX), (2.5, BOX)))
    far, later = (Face(film=FILM, at=1.0, box=(0.6, 0.1, 0.2, 0.2)), Face(film=FILM, at=9, box=BOX))
    first = {one: one, other: one, far: far, later: later}
    assert find_first([one, other, far, later]) == first
    for says in ("guess", "not"):  # also if the last line about the first face is only a guess
        lines = [
            *CALLED, *NUMBERED, log.about(one, "is", person=ADA), log.about(one, "not", person=ADA),
            log.about(one, says, person=UNKNOWN[0]), log.about(other, "is", person=ADA),
        ]  # fmt: skip
        found = Said(lines)
        assert found.names == {one: "Ada"} and len(found.list_lost(())) == 2, says
        forgotten = Said(found.write_anew({ADA}))
        assert not (forgotten.names or forgotten.denied or forgotten.list_lost(()))


def test_faces_turn_with_a_film_whose_rotation_changed():
    """Orientation 6 turns the picture by 90 degrees, so the left edge becomes the top edge."""
    face, box = Face(film=FILM, at=0, box=(0.1, 0.2, 0.2, 0.4)), (0.4, 0.1, 0.8, 0.3)
    turned, film = (make_film("a", orientation=turn) for turn in (6, 1))
    turned.tracks[0].box = film.tracks[0].box = box
    again = turned.faces["a"]
    assert again.turn == 6
    assert match([face, again], [turned]) == {face: [["a"]], again: [["a"]]}
    assert match([face, again], [film]) == {}


@pytest.mark.parametrize("seed", range(20))
def test_undoing_all_steps_restores_everything_and_undoing_that_brings_it_back(seed):
    rng = random.Random(seed)
    steps = [x for x in make_steps(rng, 20) if not (isinstance(x, Line) and x.says == "undo")]
    history = [list_facts(replay(*steps[:number])) for number in range(2, len(steps) + 1)]
    while len(history) > 1:
        steps = [*steps, undo(len(history))]
        found, before = list_facts(replay(*steps)), history.pop()
        # The highest number is kept, so that no later person gets the number.
        assert found == history[-1] | {"highest": found["highest"]}
        again = list_facts(replay(*steps, undo(len(steps) - 1)))
        assert again == before | {"highest": again["highest"]}


@pytest.mark.parametrize("seed", range(30))
def test_forgetting_a_person_leaves_what_was_said_about_all_others(seed):
    rng = random.Random(seed)
    steps = [*make_steps(rng), say("a", "is", EVE), call(EVE, "Gone"), say("b", "not", EVE)]
    media = [make_film(*rng.sample("abcdef", 4))]
    for shown in ([], media):
        lines = number_steps(steps)
        before = Said(lines, shown)
        assert list_facts(Said(before.write_anew(()), shown)) == list_facts(before)
        gone = {key for key, name in before.names.items() if name == "Gone"}
        keys = before.find_people("Gone")
        anew = before.write_anew(keys)
        after = Said(anew, shown)
        assert list_facts(after) == list_facts(before, gone, {"Gone"})
        assert not {*keys} & {x for line in anew for x in (line.person, line.other)}
        names = {line.name for line in anew if line.says == "person"} - {None}
        assert "Gone" not in names and all(before.find_people(str(name)) for name in names)
        # Forgetting again changes nothing, also if the film is away in the meantime.
        assert list_facts(Said(Said(anew).write_anew(()), shown)) == list_facts(after)


def test_forgetting_leaves_no_earlier_name_and_keeps_the_highest_number():
    lines = number_steps([
        CALLED, guess(d=3), say("a", "is", ADA), say("b", "not", ADA), say("c", "is", BOB),
        [call(ADA, "Eva")], [call(EVE, "Zoe"), say("e", "is", EVE)], join(EVE, ADA), undo(2),
        say("f", "is", ADA),
    ])  # fmt: skip
    text = log.ENCODER.encode_lines(Said(lines).write_anew({ADA})).decode()
    assert not [name for name in ("Ada", "Eva", "Zoe") if name in text] and "Bob" in text
    assert Said(lines).write_anew({ADA})[0] == Line(says="begin", number=3)
    # The person with the highest number is forgotten, and the number is not given again.
    anew = Said([*NUMBERED, call(UNKNOWN[2], "Ada"), say("a", "is", UNKNOWN[2])])
    assert Said(anew.write_anew({UNKNOWN[2]})).highest == 3
    # Another person who now has the forgotten person's earlier name is not forgotten.
    found = Said([*CALLED, say("a", "is", ADA), call(ADA, "Eva"), call(EVE, "Ada"),
                  say("b", "is", EVE)])  # fmt: skip
    for gone, kept in ((ADA, {"b": "Ada"}), (EVE, {"a": "Eva"})):
        assert of_clips(Said(found.write_anew({gone})).names) == kept


def test_line_about_a_long_track_has_few_places_from_its_begin_to_its_end():
    facts = {"clip": "a", "shot": 0, "start_s": 0, "end_s": 200, "seen": 9, "box": BOX}
    places = [(number / 5, BOX) for number in range(1000)]
    face = media.make_face(FILM, FaceTrack(**facts, places=places))
    assert face and len(face.places) == media.MOST_PLACES
    times = [seconds for seconds, _ in face.places]
    steps = [after - before for before, after in itertools.pairwise(times)]
    assert (times[0], times[-1]) == (0, 199.8) and max(steps) < 1.1 * 200 / len(steps)


@pytest.mark.parametrize(("line", "words"), {
    '{"says":"was"}': "Invalid enum", '{"says":"is","film":"x"}': "film",
    '{"says":"is"}': "needs the field `film`", '{"says":"merge","person":"KEY"}': "`other`",
    '{"says":"person","person":"KEY","name":"unknown 3"}': "reserved",
    '{"says":"person","person":"KEY","name":" Ada"}': "Ada", "Ada": "JSON", "[]": "object",
    '{"says":"undo","of":"yesterday"}': "of", '{"says":"is","video":"\xff"}': "UTF-8",
}.items())  # fmt: skip
def test_damaged_line_is_named_with_its_file_and_number(tmp_path, line, words):
    begin, line = [say("a", "is"), say("b", "is")], line.replace("KEY", ADA)
    log.append(tmp_path, begin)
    path = tmp_path / log.NAME
    before = path.read_bytes()
    for end in (b"\n", b""):  # also as the last line, without a line break
        path.write_bytes(before + line.encode("latin-1") + end)
        read = partial(log.read, tmp_path)
        refused(read, "line 4 of", str(path), words, "repair or delete this line")
        path.write_bytes(before)
        assert log.read(tmp_path)[1:] == begin


def test_log_survives_killed_programs_editors_and_hands(tmp_path):
    lines, path = log.make_step([say("a", "is"), say("b", "is")]), tmp_path / log.NAME
    log.append(tmp_path, lines)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):  # a kill during the last write
        path.write_bytes(whole[: -1 - cut])
        assert log.read(tmp_path)[1:] == lines[:1]
        log.append(tmp_path, lines[1:])
        assert log.read(tmp_path)[1:] == lines
    path.write_bytes(whole[:-1])  # by hand, without a line break
    assert log.read(tmp_path)[1:] == lines
    log.append(tmp_path, lines)
    assert log.read(tmp_path)[1:] == lines * 2
    path.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n\r\n"))  # Notepad, blank lines
    assert log.read(tmp_path)[1:] == lines
    log.append(tmp_path, lines)
    assert log.read(tmp_path)[1:] == lines * 2
    path.write_bytes(b"")
    assert log.read(tmp_path) == []


@pytest.mark.parametrize("seed", quick_first(range(10), 2))
def test_page_follows_a_log_that_others_change(tmp_path, seed):
    rng = random.Random(seed)
    shelf = made_shelf.make(tmp_path / "shelf", people=4, films=1, known=2, faces=8)
    path, page, new = shelf.out / log.NAME, actions.Review(shelf.out), tmp_path / "new"
    lines = number_steps(make_steps(rng, 30))
    new.mkdir()
    for _ in range(30):
        some, act = rng.sample(lines, rng.randrange(4)), rng.random()
        if act < 0.6:
            log.append(shelf.out, some)
        elif act < 0.7:
            log.replace(shelf.out, [Line(says="begin", number=9), *some])
        elif act < 0.8:  # a file with the same inode, as a file system may give it again
            log.replace(new, [Line(says="begin", number=9), *lines])
            path.write_bytes((new / log.NAME).read_bytes())
        else:
            path.write_bytes(path.read_bytes()[: -rng.randrange(1, 30)])  # a kill
        if rng.random() < 0.5:
            page.refresh()
            assert page.lines == log.read(shelf.out)
    page.refresh()
    assert page.lines == log.read(shelf.out)


def test_simultaneous_writers_lose_no_line(tmp_path):
    def add(number):
        for place in range(20):
            with log.lock(tmp_path, 20):
                log.append(tmp_path, [call(ADA, f"{number}-{place}")])

    with futures.ThreadPoolExecutor() as pool:
        assert len([*pool.map(add, range(3))]) == 3
    begin, *lines = log.read(tmp_path)
    assert begin.says == "begin"
    assert {line.name for line in lines} == {f"{x}-{y}" for x in range(3) for y in range(20)}
    assert len(lines) == 60
    with log.lock(tmp_path, 0), pytest.raises(InUseError), log.lock(tmp_path, 0):
        pass


def test_log_that_a_user_edits_while_a_page_is_open_is_read_again(tmp_path):
    shelf = made_shelf.make(tmp_path, people=2, films=1, known=1, faces=4)
    page, path = actions.Review(shelf.out), shelf.out / log.NAME
    key = next(line.person for line in page.lines if line.name == "Ada")
    # Names that are as long as the name before, longer and shorter.
    for later, name in enumerate(("Eva", "Eva Maria", "Bo"), 1):
        path.write_text(re.sub('"name":"[^"]+"', f'"name":"{name}"', path.read_text()))
        os.utime(path, (0, later))
        page.refresh()
        assert page.lines == log.read(shelf.out) and page.has_person(name)
        log.append(shelf.out, [Line(says="person", person=key, name=name)])
        page.refresh()
        assert page.lines == log.read(shelf.out)


# Files of results of earlier versions: their log begins with another line, or is not there yet.
EARLIER = {
    "log": {"said.jsonl": f'{{"film":"{FILM}","at":1.0,"box":[0,0,1,1],"says":"is","of":"Ada"}}\n',
            "unknown.json": '{"format":2}', "names.tsv": "video\n"},
    "empty log": {"said.jsonl": "\n", "unknown.json": "{}"},
    "0.1.0": {"unknown.json": '{"format": 1}', "names.tsv": "", "gallery/gallery.db": ""},
    "no numbers": {"said.jsonl": "", "features/extract.json": '{"format": 3}'},
    "features": {"features/extract.json": '{"format": 3}', "features/videos/a.json": "{}"},
}  # fmt: skip


@pytest.mark.parametrize("case", EARLIER)
def test_results_of_earlier_versions_are_refused_and_stay_as_they_are(drawn, case):
    film = drawn.group()
    drawn.befriend("Ada")
    for name, text in EARLIER[case].items():
        (path := drawn.out / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = contents(drawn.out)
    calls = [lambda: drawn.who(film, code=2), lambda: drawn.run("review", drawn.out, code=2)]
    calls += [lambda: drawn.who(film, flags=["--fps=9"], code=2)]
    words = ("review", drawn.out, "--name=unknown 1=Ada")
    for call_ in (*calls, lambda: drawn.run(*words, code=2)):
        output = call_().output
        assert "an earlier version of vidjax wrote the results in" in output
        assert "--out=FOLDER" in output and len(output.splitlines()) <= 3
        assert contents(drawn.out) == before


def test_names_and_gallery_of_results_follow_from_lines_that_a_person_wrote(tmp_path):
    shelf = made_shelf.make(tmp_path, people=4, films=1, known=2, faces=8)
    names = partial(made_shelf.list_names, shelf.out)
    clip = next(clip for clip, x in names().items() if x == "unknown 1")
    (film,) = media.read_media_files(shelf.out / "features")
    # A single box is enough, at another time of the same shot.
    face = film.faces[clip]
    line = {"film": face.film, "at": face.at + 0.5, "box": [0.3, 0.2, 0.4, 0.7], "person": ADA}
    with (shelf.out / log.NAME).open("a") as file:
        file.write(json.dumps({"says": "person", "person": ADA, "name": "Wu"}) + "\n")
        file.write(json.dumps(line | {"says": "is"}))
    assert names()[clip] == "Wu"
    page = actions.Review(shelf.out)
    page.change("ignore", [CLIP + clip])
    assert names()[clip] is None
    page.undo()
    page.save()
    assert names()[clip] == "Wu" and Gallery(shelf.out / results.GALLERY).people["Wu"] == (clip,)


# Changes of a page, and a face.
CHANGES = {
    "people": lambda page, face: page.change("name", ["Ada"], "Bob"),
    "unknown": lambda page, face: page.change("name", ["unknown 1"], "Zoe"),
    "apart": lambda page, face: page.change("apart", [face]),
    "forget": lambda page, face: page.forget("Ada"),
}


@pytest.mark.parametrize("change", quick_first(CHANGES, 2))
def test_change_that_is_killed_at_any_write_is_done_or_not_done(tmp_path, monkeypatch, change):
    shelf = made_shelf.make(tmp_path, people=4, films=1, known=2, faces=8)
    whole = tmp_path / "whole"
    left = count_down(monkeypatch, (os, "replace"), (Store, "write"), (files, "append"))
    names = partial(made_shelf.list_names, shelf.out)
    before, found, is_done = names(), list[dict[str, str | None]](), False
    shelf.out.rename(whole)
    while not is_done:
        shutil.copytree(whole, shelf.out)
        page = actions.Review(shelf.out)
        left[0] = len(found) + 1  # the number of the write that is interrupted
        with contextlib.suppress(KeyboardInterrupt):
            CHANGES[change](page, CLIP + page._clips_of["unknown 1"][0])
        is_done, left[0] = left[0] > 0, 0
        found.append(names())
        assert names() == found[-1]
        shutil.rmtree(shelf.out)
    assert len(found) > 1 and found[-1] != before and all(x in (before, found[-1]) for x in found)


@pytest.fixture
def party(place, command, read_here):
    """Ada and Bob have photos. The user has said that a face is Ada, and another is not Ada."""

    def make(folder):
        (drawn := Drawn(folder, command)).meet("Ada", "Bob")
        page = actions.Review(drawn.out)
        page.change("name", [f"{CLIP}party.s001.t00"], "Ada")
        page.change("deny", [f"{CLIP}party.s000.t00"], "Ada")
        page.save()
        names = drawn.names()
        assert names["party.s001.t00"] == "Ada" != names["party.s000.t00"]

    return Drawn(restore(place, make), command)


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
    # Nobody is forgotten, and the next call has nothing to say.
    assert "forgotten" not in output + party.who(party.folder / "party.mkv").output
    assert party.names() == {clip: new.get(x, x) for clip, x in before.items()}


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
    assert "to change this name: vidjax review" in output
    assert party.names()["party.s001.t00"] == "Ada"
    assert "kept this name" not in party.who(film).output


def test_only_photo_that_moves_to_another_person_denies_nothing_for_this_person(party):
    """The photo was wrong: it shows Bob."""
    (party.friends / "Ada" / "1.png").rename(party.friends / "Bob" / "2.png")
    (party.friends / "Ada").rmdir()
    party.who(party.folder / "party.mkv")
    assert actions.Review(party.out)._decision.said.denied["party.s000.t00"] == {"Ada"}


def test_name_that_a_user_typed_stays_when_the_photo_is_deleted(party):
    """Her photo was added after her name was typed, or before it."""
    film, friends, words = party.folder / "party.mkv", party.friends, "still a name that you typed"
    for number in range(2):
        shutil.rmtree(friends / "Ada")
        _, output = party.who(film)
        assert f"Ada no longer has photos, but is {words} for {number + 1} face" in output
        assert f"vidjax forget --identity=Ada --delete {party.out}" in output
        assert party.names()["party.s001.t00"] == "Ada"
        assert words not in party.who(film).output, "it is said once"
        if not number:
            page = actions.Review(party.out)
            page.change("name", [f"{CLIP}party.s002.t01"], "Ada")
            page.save()
            party.befriend("Ada")
            party.who(film)
    told = {"party.s001.t00", "party.s002.t01"}
    assert told == {clip for clip, name in party.names().items() if name == "Ada"}


def test_photos_of_people_who_were_joined_follow_them_if_they_are_divided_again(party):
    """A photo is added while Ada and Bob count as one person."""
    film = party.folder / "party.mkv"
    page, before = actions.Review(party.out), party.names()
    page.change("name", ["Ada"], "Bob")
    write_photo(party.friends / "Ada" / "2.png", ("Ada", 30, 40))
    party.who(film)
    page.undo()
    output = party.who(film).output
    assert party.names() == before and "not used" not in output


def test_photo_that_comes_back_shows_the_person_who_got_another_name(party):
    film, folder, away = party.folder / "party.mkv", party.friends / "Ada", party.folder / "away"
    party.run("review", party.out, "--name=Ada=Eva")
    before = party.names()
    folder.rename(away)
    party.who(film)
    away.rename(folder)
    output = party.who(film).output
    assert party.names() == before and "seem to show one person" not in output


def test_folder_of_photos_without_a_known_photo_forgets_nobody(party):
    film, before = party.folder / "party.mkv", party.names()
    shutil.rmtree(party.friends / "Ada")
    shutil.rmtree(party.friends / "Bob")
    for _ in range(2):
        _, output = party.who(film, code=1)
        assert "photos of Ada, Bob are missing" in output and "is the drive connected?" in output
        assert party.names() == before
    _, output = party.who(film, flags=["--forget-missing"])
    assert not {"Ada", "Bob"} & {*party.names().values()}
    assert "Ada no longer has photos and is forgotten, with the name that you typed" in output
    for path in party.out.rglob("*"):
        assert not path.is_file() or b"Ada" not in path.read_bytes(), path


def test_faces_ignored_in_bulk_get_the_name_of_a_person_who_is_enrolled_later(drawn, read_here):
    photo, friends = drawn.group(), drawn.friends  # of Ada and Bob
    drawn.befriend("Ada")
    drawn.who(photo)
    for action, of, later in (("once", [], "Bob"), ("ignore", ["unknown 1"], None)):
        page = actions.Review(drawn.out)
        page.change(action, of)
        page.save()
        assert {*drawn.names().values()} == {"Ada", None}
        drawn.befriend("Bob")
        drawn.who(photo)
        assert {*drawn.names().values()} == {"Ada", later}
        shutil.rmtree(friends / "Bob")
        drawn.who(photo, flags=["--forget-missing"])
        refused(page.undo, "there is no change to undo")  # the log has no steps any more
        page.change("show", ["ignored"])
