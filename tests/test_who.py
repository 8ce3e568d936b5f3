"""`vidjax who` finds names for the people in films, with drawn people and nets that tests make.

The film of `drawn.film` and `drawn.meet` has three shots, from 0, 1 and 3 s to 4 s: of Ada, of Eve,
and of Bob and Ada. `drawn.meet("Ada")` enrols one photo of Ada and runs `vidjax who` on this film.
Clip party.s002.t01 is track 1 of shot 2 of party.mkv, and 2.f01 is face 1 of photo 2.
"""

import base64
import csv
import json
import os
import re
import shlex
import shutil
from datetime import datetime
from functools import partial
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

import vidjax
from tests.helpers import drawn_people, films, made_nets
from tests.helpers.drawn_people import COLOURS, GROUP, tags, write_film, write_photo
from tests.helpers.seen import refused
from vidjax.apps.gallery.answers import read_groups
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import digests, log, media, pipeline, who
from vidjax.cli import program
from vidjax.data.clip_files import write_npz
from vidjax.utils import messages

pytestmark = pytest.mark.usefixtures("read_here")


def shot(name, left=20):
    """Returns a shot of two seconds that shows only one person."""
    return 2, 20, [(name, left, 30)]


def test_results_list_who_appears_when_in_every_format(drawn):
    """Ada and Bob have photos."""
    film, out = drawn.meet("Ada", "Bob", flags=["--workers=1", "--padding=0.5"]), drawn.out
    assert Gallery(out / "gallery").identities == {"Ada": 1, "Bob": 1}  # one photo each
    assert os.stat(out).st_mode & 0o077 == 0, "private to the user"
    # names.jsonl: Eve has no photo, so she is unknown.
    rows = drawn.rows()
    appearances = [(row["identity"], round(row["start"]), round(row["end"])) for row in rows]
    assert appearances == [("Ada", 0, 1), ("unknown 1", 1, 3), ("Ada", 3, 4), ("Bob", 3, 4)]
    ada, unknown, *_ = rows
    assert unknown["probability"] is None and ada["probability"] > 0.5
    # names.tsv: the second line has the same values for Eve.
    with (out / "names.tsv").open(newline="") as file:
        (_, cells, *_) = csv.DictReader(file, delimiter="\t")
    assert cells["box"] == " ".join(map(str, unknown["box"])) and cells["probability"] == ""
    assert 1 <= float(cells["box_at"]) == unknown["box_at"] < 3
    assert cells["path"] == str(film.resolve()) and cells["date"] == unknown["date"]
    assert datetime.fromisoformat(cells["date"]).timestamp() == int(film.stat().st_mtime)
    for kind in ("vtt", "srt"):  # the names in the first and the last shot
        assert (out / "subtitles" / f"party.{kind}").read_text().count("-->") == 2
    # --padding starts Bob's cut at 2.5 s. The cut ends with the film.
    names = {f"{name}.{ending}" for name in ("Ada", "Bob") for ending in ("m3u", "otio")}
    assert {path.name for path in (out / "cuts").iterdir()} == names
    bob = (out / "cuts" / "Bob.m3u").read_text()
    assert "start-time=2.5" in bob and "stop-time=4.0" in bob and f"file://{film}" in bob
    page = (out / "names.html").read_text()
    assert page.count('href="../party.mkv#t=3.0"') == 6, "bars of two people, and in tables"


def test_films_and_photos_in_subfolders_are_read_and_other_files_are_skipped(drawn):
    """A live photo is a photo and a short film with the same name. Only the photo is read."""
    films, ada, empty = drawn.folder / "films", drawn.friends / "Ada", drawn.folder / "empty"
    drawn.out = films / "names"
    write_photo(ada / "2020" / "IMG_1.png", ("Ada", 40, 40))
    write_film(ada / "2020" / "IMG_1.mov", (1, 20, [("Ada", 40, 40)]))
    odd = "Bob\x1b at the sea.png"  # its name is changed before it is printed
    for name in ("party-poster.jpg", f"2019/summer/{odd}", ".hidden/Eve.png"):
        write_photo(films / name, ("Bob", 20, 30))
    write_film(films / "party.MKV", shot("Ada"))
    (films / "link").symlink_to(films / "2019")
    for path in (drawn.friends, ada, films):  # the message counts the photos of each folder
        for name in ("Thumbs.db", "party.srt", "party.nfo"):
            (path / name).write_text("no picture")
    empty.mkdir()
    shown = media.make_printable(odd)
    for _ in range(2):  # in the second call, the folder of films also contains the results
        content, output = drawn.who(films, empty)
        assert content["people"] == {"Ada": 1} and content["failed"] == [], output
        assert {row["video"] for row in drawn.rows()} == {"party.MKV", shown} != {"party.MKV", odd}
        assert output.count(f"'{empty}' contains no film and no photo") == 1
        words = "files in {} that are not films or photos are left out: {}"  # without Thumbs.db
        assert output.count(words.format(films, "party-poster.jpg and 2 more")) == 1
        assert output.count(words.format(drawn.friends, "party.nfo and 1 more")) == 1
    drawn.who(films / "party.nfo", code=1)  # a file on the command line is read, and this one fails


def test_an_edited_table_of_unknown_people_is_kept_and_answered_with_a_command(drawn):
    film, table = drawn.meet("Ada"), drawn.out / "unknown.tsv"
    own, mine = table.read_text(), drawn.out / "unknown.tsv.mine"
    assert [line.split("\t")[:3] for line in own.splitlines()[1:]] == [
        ["party.s001.t00", "unknown 1", "party.mkv"], ["party.s002.t01", "unknown 2", "party.mkv"],
    ], "Eve and Bob"  # fmt: skip
    assert "are not read" not in drawn.who(film).output and not mine.exists()
    name, names = "unknown neighbour", drawn.names()  # without a number, it is a person's name
    edited = own.replace("unknown 2", name).replace("unknown 1", "O'Eve") + "gone.s000.t00\tZoe\n"
    # LibreOffice quotes all cells. Some programs write other separators.
    quoted = "".join('"' + row.replace("\t", '"\t"') + '"\r\n' for row in edited.splitlines())
    commands, kept = list[list[str]](), list[bytes]()
    damaged = own[: own.rindex("party")] + "\0\udcff"
    for text in (edited, "\ufeff" + quoted, edited.replace("\t", ";"), damaged):
        table.write_text(text, errors="surrogateescape")
        before = table.read_bytes()
        content, output = drawn.who(film)
        assert f"names in {table} are not read. Your table is kept as unknown.tsv.mine" in output
        assert mine.read_bytes() == before and table.read_text() == own
        kept.append(before)
        assert content["people"] == {"Ada": 1} and drawn.names() == names
        commands.append(shlex.split(output.partition("to give these names: ")[2].splitlines()[0]))
        assert commands[-1][:3] == ["vidjax", "review", str(drawn.out)]
    assert {path.read_bytes() for path in drawn.out.glob("unknown.tsv.mine*")} == {*kept}
    given = commands[0]
    assert sorted(given[3:]) == ["--name=unknown 1=O'Eve", f"--name=unknown 2={name}"]
    assert commands[1] == given
    drawn.run(*given[1:])
    assert drawn.names() == {clip: {"unknown 1": "O'Eve", "unknown 2": name}.get(x, x)
                             for clip, x in names.items()}  # fmt: skip
    assert len(table.read_text().splitlines()) == 1


def test_another_film_at_the_place_of_a_film_gets_none_of_its_names(drawn, monkeypatch):
    """A camera counts from 1 again. The earlier film keeps its rows, as not at its place."""
    film, features = drawn.folder / "c.mkv", drawn.out / "features"
    write_film(film, shot("Bob"))
    drawn.who(film, people=False)
    drawn.run("review", drawn.out, "--name=unknown 1=Bob")
    shutil.copy(film, first := drawn.folder / "first.mkv")
    write_film(film, shot("Eve"))
    with monkeypatch.context() as patch:
        patch.setattr(who, "decide", mock.Mock(side_effect=KeyboardInterrupt))
        drawn.who(film, people=False, code=130)
    content, output = drawn.who(film, people=False)
    assert content["people"] == {"Bob": 1} and "1 film cannot be found, such as" in output
    (other,) = drawn.names().keys() - {"c.s000.t00"}
    both = {"c.s000.t00": "Bob", other: "unknown 2"}  # Eve
    videos = {row["identity"]: row["video"] for row in drawn.rows()}
    assert drawn.names() == both and videos == {"unknown 2": "c.mkv", "Bob": "c (earlier 1).mkv"}
    # The earlier film comes back at another place, with its old name.
    content, output = drawn.who(first, people=False)
    assert drawn.names() == both and "cannot be found" not in output
    videos = {row["identity"]: row["video"] for row in drawn.rows()}
    assert videos == {"unknown 2": "c.mkv", "Bob": "first.mkv"}
    files = [features / "c.npz", features / "videos" / "c.json"]
    assert [media.list_files_of(path) for path in files] == [files] * 2
    files[1].write_text("damaged")
    assert "c.json is damaged" in drawn.who(drawn.film(), people=False).output
    assert not any(path.exists() for path in files)


def test_files_of_photos_are_named_after_their_content_and_not_after_people(drawn):
    group, people = drawn.group(), drawn.out / "people"
    write_photo(photo := drawn.friends / "Ada?.png", ("Ada", 40, 40))
    write_photo(drawn.friends / "CON" / "x.png", ("Bob", 40, 40))
    assert drawn.who(group).content["people"] == {"Ada?": 1, "CON": 1}
    stem = str(digests.digest_photo(photo))[:16]
    assert f"people/{stem}" in Gallery(drawn.out / "gallery").people["Ada?"]
    names = {path.name for path in people.rglob("*")}
    assert {f"{stem}.npz", f"{stem}.json"} <= names
    assert not [name for name in names if "Ada" in name or "CON" in name]


def test_unclear_faces_are_not_grouped_and_a_name_is_for_one_face(drawn):
    """The card of the net declares that all faces in the photos are unclear."""
    card = drawn.models / "embed.json"
    content = json.loads(card.read_text())
    content["back_end"]["clear_quality"] = 1.0
    card.write_text(json.dumps(content))
    photos = [drawn.folder / f"p{n}.png" for n in range(5)]
    places = ("Ada", 20), ("Eve", 80), ("Ada", 50), ("Eve", 10), ("Bob", 90)
    for photo, place in zip(photos, places, strict=True):
        write_photo(photo, (*place, 30))
    drawn.befriend("Ada")
    ada = dict.fromkeys(("p0", "p2"), "Ada")  # each by its probability
    eve, again, bob = "p1", "p3", "p4"
    faces = {eve: "unknown face 1", again: "unknown face 2", bob: "unknown face 3"}
    content, _ = drawn.who(*photos)
    assert drawn.names() == ada | faces and (content["groups"], content["unclear"]) == (0, 3)
    assert "Unclear faces (3)" in (drawn.out / "names.html").read_text()
    # Eve gets a name in one clip. Other clips do not get the name of this unclear face.
    drawn.run("review", drawn.out, "--name=unknown face 1=Eve")
    content, _ = drawn.who(*photos)
    assert content["people"] == {"Ada": 1, "Eve": 1} and drawn.names() == ada | faces | {eve: "Eve"}
    words = (drawn.out / "gallery", f"--input={drawn.out / 'features'}", "--json")
    answers = drawn.run("gallery", "identify", *words).content["answers"]
    assert {x["clip"]: x["identity"] for x in answers if x["identity"]} == ada | {eve: "Eve"}
    stored = drawn.out / "features" / "videos" / f"{again}.json"
    clear = re.sub('"clarity": ?[0-9.]+', '"clarity":1.0', described := stored.read_text())
    for text, name in ((clear, "unknown 1"), (described, "unknown face 1")):
        stored.write_text(text)
        drawn.run("gallery", "group", *words, f"--out={drawn.folder / name}.tsv")
        groups = read_groups(drawn.folder / f"{name}.tsv", unknown=True)
        assert groups == {again: name, bob: "unknown face 2"}
    # A user joins two faces to one person. If a photo of Eve is added, unclear faces get her name.
    read = media.read_media_files(drawn.out / "features")
    faces_of = {clip: face for photo in read for clip, face in photo.faces.items()}
    person = log.make_key()
    joined = [log.about(faces_of[clip], "same", person=person) for clip in (again, bob)]
    log.append(drawn.out, [log.Line(says="person", person=person, number=2), *joined])
    drawn.who(*photos)
    assert drawn.names() == ada | {eve: "Eve", again: "unknown 2", bob: "unknown 2"}
    drawn.befriend("Eve")
    drawn.who(*photos)
    assert drawn.names() == ada | {eve: "Eve", again: "Eve", bob: "unknown face 2"}


@pytest.mark.parametrize(("name", "words"), [
    *((name, "is reserved for people without a name")
      for name in ("unknown", "Unknown 7", "unknown face", "unknown face 7", "Ignored")),
    (" Ann", "remove these blanks"), ("a\nb", "control character"), ("\udcff", "not valid Unicode"),
])  # fmt: skip
def test_impossible_name_of_a_person_is_refused_before_anything_is_written(drawn, name, words):
    write_photo(drawn.friends / f"{name}.png", ("Bob", 40, 40))
    _, output = drawn.who(drawn.group(), code=2)
    assert words in output and len(output.splitlines()) <= 3 and not drawn.out.exists()
    assert f"{drawn.friends}/" in output and "rename the photo" in output


def test_numbered_photos_in_one_folder_get_a_warning(drawn):
    """A photo that is in no folder of a person counts as a person. Its file name is the name."""
    for left, name in ((40, "Ada_1"), (42, "Ada_2")):
        write_photo(drawn.friends / f"{name}.png", ("Ada", left, 40))
    group = drawn.group()
    assert "counts as a different person" in drawn.who(group).output
    # Later, people are enrolled, so this is not the folder of only one person.
    output = drawn.who(group).output
    assert "Ada_1 and Ada_2 count as two people" in output and "different person" not in output


def test_wrong_folder_of_people_is_answered_with_the_right_folder_and_forgets_nobody(drawn):
    friends, group, path = drawn.friends, drawn.group(), None

    def who(people, code=0):
        return drawn.who(group, people=False, flags=[f"--people={people}"], code=code).output

    for shown, folder, name in (("Ada", "Ada", "1"), ("Bob", "Cy", "Cy")):
        write_photo(path := friends / folder / f"{name}.png", (shown, 40, 40))
        hint = f"name the folder above: --people={friends}"
        assert (hint in who(path.parent)) == (name == "1")
        shutil.rmtree(drawn.out)
    output = who(path, code=2)
    assert f"--people={path.parent}\n" in output and f"--people={friends}\n" in output
    assert f"is inside --people={drawn.folder}" in who(drawn.folder, code=2)
    # Later, the folder of one person, or a folder of other people, does not contain Ada and Cy.
    who(friends)
    for folder, hint in {"Ada": f"--people={friends}", "strangers": "--forget-missing"}.items():
        write_photo(friends / folder / "new.png", ("Eve", 40, 40))
        output = who(friends / folder, code=2)
        assert "Ada, Cy" in output and hint in output
    assert {*Gallery(drawn.out / "gallery").identities} == {"Ada", "Cy"}


def test_photos_without_one_good_face_and_damaged_tags_are_reported_in_every_call(drawn):
    group, people = drawn.group(), drawn.friends / "Ada"
    (drawn.friends / "Eve").mkdir(parents=True)
    write_photo(people / "none.png")
    write_photo(people / "two.png", ("Ada", 20, 20), ("Bob", 80, 60))
    _, output = drawn.who(group, code=2)
    messages = ("photo shows no face", "photo shows 2 faces", "Eve cannot be recognised")
    assert all(message in output for message in (*messages, "nobody can be recognised")), output
    drawn.befriend("Bob")
    content, _ = drawn.who(group, code=1)
    # `missed` lacks Eve, because her folder contains no photo.
    assert content["people"] == {"Bob": 1} and content["missed"] == ["Ada"]
    write_photo(people / "poor.png", ("Ada", 20, 20), dim=True, tagged=[("Ada", 20, 20)])
    write_photo(people / "bad.png", ("Ada", 20, 20))
    (people / "bad.xmp").write_bytes(b"<rdf:RDF Region")
    for flags in ([], ["--quiet"]):
        content, output = drawn.who(group, flags=flags, code=1)
        assert content["people"] == {"Ada": 2, "Bob": 1} and content["missed"] == []
        assert {*content["failed"]} == {f"{people}/none.png", f"{people}/two.png"}
        assert f"{people / 'poor.png'}: Ada: the face is poor, with quality 0.000" in output
        assert f"{people / 'bad.png'}: the face tags in bad.xmp cannot be read" in output


def test_extract_reports_each_unreadable_film_and_prints_the_advice_once(drawn, command):
    """A copy of a film is not read. The speed is printed only for films."""
    bad, worse, film = drawn.folder / "bad.mp4", drawn.folder / "worse.mp4", drawn.film()
    bad.write_bytes(b"ffconcat version 1.0\nfile party.mkv\n")
    worse.write_text("no film")
    copy, photo = shutil.copy(film, drawn.folder / "party.mov"), drawn.group()
    (notes := drawn.folder / "notes.doc").write_text("no film")

    def extract(*paths):
        return command("extract", *paths, f"--out={drawn.out}", f"--models={drawn.models}")

    done = extract(bad, worse, film, copy)
    assert done.code == 1 and done.err.count("unknown format") == 2
    assert done.out.count("copy the file again") == 1 and "use MP4, MKV" not in done.out
    assert f"{copy} is a copy of {film} and is left out" in done.err
    assert [film.video for film in media.read_media_files(drawn.out)] == ["party.mkv"]
    assert not [path for path in drawn.out.rglob("*") if path.stat().st_mode & 0o077]  # private
    labels = [line[2:12].strip() for line in extract(photo, worse).out.splitlines()[1:]]
    assert labels == ["out", "files", "clips", "not used", "remedy"]  # no speed
    assert "worse.mp4' is damaged" in extract(worse, "--quiet").err
    done = extract(notes, worse)
    assert "notes.doc: use MP4, MKV" in done.out and "; worse.mp4: copy the file" in done.out


@pytest.mark.slow
def test_results_contain_all_films_and_each_film_is_read_once(drawn, monkeypatch):
    film, other = drawn.meet("Ada", "Bob"), drawn.folder / "other" / "party.mkv"
    other.parent.mkdir()
    write_film(other, shot("Bob"))
    # Films with the same name are listed with their folders.
    drawn.who(other.parent)
    paths = {f"{drawn.folder.name}/party.mkv", "other/party.mkv"}
    assert {row["video"] for row in drawn.rows()} == paths
    # A film is not read a second time, even if it was moved: reading would now fail.
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.film_lib, "extract", None)
        moved = film.rename(film.with_name("the party.mkv"))
        assert "the party.mkv: 4.0 s, 3 shots, 4 faces, as before" in drawn.who(moved).output
    # If a film changes but keeps its size and time, only --check sees the change.
    info, content = other.stat(), bytearray(other.read_bytes())
    content[len(content) // 3] ^= 1  # in a picture
    other.write_bytes(content)
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert "as before" in drawn.who(other).output
    output = drawn.who(other, flags=["--check"]).output
    assert "as before" not in output and "(earlier 1).mkv" in str(drawn.rows())
    # A film that no longer exists stays in the results until --prune.
    moved.unlink()
    output = drawn.who(other).output
    assert "film cannot be found, such as the party.mkv" in output and ": to delete" in output
    assert "the party.mkv" in {row["video"] for row in drawn.rows()}


def test_people_with_only_voices_have_no_doubtful_photos(drawn):
    """Doubtful photos are found by comparing faces. Eve is enrolled with a voice, but no face."""
    drawn_people.write_voices(drawn.models)
    drawn.befriend("Ada")
    drawn.who(drawn.group())
    voice, gallery = np.ones((3, made_nets.WIDTH), np.float32), drawn.folder / "g"
    write_npz(drawn.folder / "heard.npz", {"heard": {"face": voice[:0], "audio": voice}})
    Gallery.of_models(gallery, drawn.models)
    drawn.run(
        "gallery", "enrol", gallery, f"--input={drawn.folder / 'heard.npz'}", "--identity=Eve"
    )
    words = (f"--photos={drawn.friends}", f"--models={drawn.models}")
    drawn.run("gallery", "enrol", gallery, *words)
    assert Gallery(gallery).identities == {"Ada": 1, "Eve": 1}
    for name in ("speech", "voice"):
        (drawn.models / f"{name}.json").unlink()
    assert "voice" in drawn.who(drawn.group(), code=2).output


def test_enrol_refuses_two_faces_of_a_photo_as_one_person(drawn):
    two, gallery, labels = (drawn.folder / name for name in ("two", "g", "labels.tsv"))
    pipeline.extract_files([drawn.group()], two, drawn.models)
    Gallery.of_models(gallery, drawn.models)

    def enrol(*words, code=0, path=two):
        return drawn.run("gallery", "enrol", gallery, f"--input={path}", *words, code=code).output

    for path in (two / "group.npz", two):
        output = enrol("--identity=Bob", path=path, code=2)
        assert "group.f01 and group.f02 are seen together" in output
    labels.write_text("group.f01\tBob\ngroup.f02\tBob\n")
    enrol(f"--labels={labels}", code=2)
    assert "--photos=FOLDER" in enrol(code=2)
    enrol("--identity=Bob", "--clip=group.f02")
    assert Gallery(gallery).identities == {"Bob": 1}
    labels.write_text("group.f01\tAda\ngroup.f02\tBob\n")
    enrol(f"--labels={labels}")
    assert Gallery(gallery).people == {"Ada": ("group.f01",), "Bob": ("group.f02",)}


def pictures_of(path):
    """Returns text of a picture on a page -> people whose faces the pictures with this text show.

    The colour in the middle of a picture is the colour of a person.
    """
    shown_faces, page = {}, path.read_text()
    for source, alt in re.findall(r'<img [^>]*src="([^"]+)" alt="([^"]*)"', page):
        place, _, content = source.partition("base64,")
        if content:
            (place := path.parent.parent / "embedded.png").write_bytes(base64.b64decode(content))
        rgb = films.read_photo(path.parent / place)
        middle = rgb[len(rgb) // 3 : -len(rgb) // 3].mean((0, 1))
        person = min(COLOURS, key=lambda name: np.abs(middle - COLOURS[name]).sum())
        shown_faces.setdefault(alt, []).append(person)
    assert page.count("<img") == sum(map(len, shown_faces.values()))
    return {alt: sorted(faces) for alt, faces in shown_faces.items()}


def test_face_tags_name_the_people_of_a_group_photo(drawn):
    """Tags in a photo or in its sidecar file take precedence over the names of files or folders."""
    film, friends = drawn.film(), drawn.friends
    # A photo of three people. Only Ada and Bob (GROUP) have tags, so Eve is not enrolled.
    write_photo(friends / "group.png", *GROUP, ("Eve", 40, 70), tagged=GROUP)
    content, output = drawn.who(film, flags=["--thumbnails"])
    assert content["people"] == {"Ada": 1, "Bob": 1} and "group" not in output, output
    assert {*drawn.names().values()} == {"Ada", "Bob", "unknown 1"}
    clips = {*Gallery(drawn.out / "gallery").clips}
    stem = str(digests.digest_photo(friends / "group.png"))[:16]
    assert clips == {f"people/{stem}.f01", f"people/{stem}.f02"}
    # The page shows a face for each person, and one that appears for each bar of a timeline.
    assert pictures_of(drawn.out / "names.html") == {
        "": [*["Ada"] * 3, *["Bob"] * 2, *["Eve"] * 2],
        "0:01\u20130:03": ["Eve"], "Ada": ["Ada"], "Bob": ["Bob"],  # in the times of each person
    }  # fmt: skip
    # A film without thumbnails is reported, so that it is read again.
    shutil.rmtree(drawn.out / "features" / "thumbnails" / "party")
    assert "there are no thumbnails of party.mkv" in drawn.who(drawn.group()).output
    # Photo 2 in the folder of Bob shows Eve, and the tag of photo 3 is at a place without a face.
    bob = friends / "Bob"
    write_photo(bob / "1.png", ("Bob", 40, 40))
    write_photo(bob / "2.png", ("Eve", 30, 30))
    (bob / "2.png.xmp").write_bytes(tags(("Eve", 30, 30)))
    write_photo(bob / "3.png", ("Bob", 20, 40), tagged=[("Ada", 90, 60)])
    content, output = drawn.who(film, code=1)
    assert content["people"] == {"Ada": 1, "Bob": 2, "Eve": 1}
    assert content["failed"] == [str(bob / "3.png")]
    assert f"{bob / '3.png'}: there is no face at the tag of Ada" in output
    assert f"the face tags in {bob / '2.png'} name Eve, not Bob" in output
    shutil.rmtree(bob)
    content, output = drawn.who(film, flags=["--forget-missing"])
    assert content["people"] == {"Ada": 1, "Bob": 1}, "the group photo still has both tags"
    assert "Eve no longer has photos and is forgotten" in output and "Bob" not in output


def test_last_person_without_photos_is_forgotten_everywhere(drawn):
    group, out = drawn.group(), drawn.out
    drawn.befriend("Ada")
    drawn.who(group, flags=["--thumbnails"])
    shutil.rmtree(drawn.friends / "Ada")
    content, output = drawn.who(group, flags=["--forget-missing"])
    assert "Ada no longer has photos and is forgotten" in output and content["people"] == {}
    assert not Gallery(out / "gallery").identities
    assert not [path for path in out.rglob("*") if path.is_file() and b"Ada" in path.read_bytes()]
    assert {*drawn.names().values()} == {"unknown 1", "unknown 2"}
    killed = out / "features/.extract-01234567"  # of a killed call
    shutil.copytree(out / "features/thumbnails", killed)
    _, output = drawn.who(group, flags=["--no-thumbnails"])  # the films are still named
    assert "nobody can be recognised" in output and not list(out.rglob("*.png"))
    shutil.rmtree(out)
    assert "contains no photos" in drawn.who(group, code=2).output and not out.exists()
    # Now there is a log, because the first call had no folder of people.
    drawn.who(group, people=False)
    assert "add photos" in drawn.who(group).output


def test_next_call_removes_what_killed_calls_have_left_and_keeps_files_of_the_user(drawn):
    film, out = drawn.meet("Ada", "Bob"), drawn.out
    left = (
        "names.html", "names.tsv", "names.jsonl", "unknown.tsv", "unmatched.tsv", "said.jsonl",
        "cuts/Ada.otio", "subtitles/party.vtt", "features/party.npz", "features/videos/party.json",
        "features/extract.json", "people/0123456789abcdef.npz",
    )  # fmt: skip
    for path in map(out.joinpath, left):
        path.with_name(f".{path.name}.0123abcd.partial").write_text("Ada")
    (killed := out / "people" / ".extract-0123abcd").mkdir()
    # The features of a photo that was deleted; their JSON file was not yet written.
    (photo, *_) = (out / "people").glob("*.npz")
    orphan = shutil.copy(photo, photo.with_name("0123456789abcdef.npz"))
    own = {"own.partial", ".notes.txt.0123abcd.partial", "cuts/.Ada.otio.partial"}
    for name in own:
        (out / name).write_text("mine")
    shutil.rmtree(drawn.friends / "Ada")
    drawn.who(film, flags=["--forget-missing"])
    assert {str(path.relative_to(out)) for path in out.rglob("*.partial")} == own
    assert not killed.exists() and not orphan.exists()


def test_terminal_shows_names_and_probabilities_but_no_messages_if_quiet(drawn, command):
    """The film shows Ada and Bob, who have photos, and Eve. --threshold=1 leaves out all names."""
    photo = drawn.folder / "photo.png"
    drawn.befriend("Ada", "Bob")
    write_photo(photo, ("Ada", 20, 30))
    words = (f"--models={drawn.models}", f"--out={drawn.out}", f"--people={drawn.friends}")
    done = command("who", drawn.film(), photo, *words)
    assert re.search("photo.png +in the photo +Ada, over 99 %", done.out)
    assert "party.mkv: 4.0 s, 3 shots, 4 faces" in done.err and "100 %" not in done.out
    assert "1 person without a name: to name them, vidjax review " in done.out  # Eve
    assert "party.mkv" not in command("who", drawn.film(), *words, "--quiet").err
    drawn.who(photo, flags=["--threshold=1"])
    assert not {"Ada", "Bob"} & {*drawn.names().values()}
    assert "give a number above 0" in drawn.who(photo, flags=["--threshold=2"], code=2).output
    shutil.rmtree(drawn.friends / "Bob")
    shutil.rmtree(drawn.friends / "Ada")
    done = command("who", photo, *words)
    assert re.search("missing +2: .*Bob\n", done.out) and "not used" not in done.out
    help_text = program.parse(["who", str(photo), *words]).parser.format_help()
    usual, programs = help_text.partition("usual:")[2].split("for programs:")
    assert "--review" in usual and re.findall(r"^  --(\w+)", programs, re.MULTILINE) == [
        "workers", "check", "fpir", "threshold", "padding", "quiet", "json", "debug",
    ]  # fmt: skip


def test_identify_counts_the_names_in_a_file_with_times(drawn):
    """Two people are visible together, so only one can be Ada. A photo has no times."""
    drawn.befriend("Ada")
    film, photo = drawn.folder / "twins.mkv", drawn.folder / "photo.png"
    write_film(film, (2, 20, [("Ada", 20, 30), ("Ada", 80, 60)]))
    write_photo(photo, ("Ada", 20, 30))
    drawn.who(film, photo)
    features, out = drawn.out / "features", drawn.folder / "names.rttm"
    words = (drawn.out / "gallery", f"--input={features}", f"--out={out}")
    content = drawn.run("gallery", "identify", *words).content
    assert (content["clips"], content["named"]) == (3, 2)  # a track and the photo are named
    (line,) = out.read_text().splitlines()
    assert line == "SPEAKER twins.mkv 1 0.000 2.000 <NA> <NA> Ada <NA> <NA>"


def test_features_of_other_nets_or_settings_are_refused(drawn):
    extract = partial(pipeline.extract_files, [drawn.group()], drawn.out, drawn.models)
    extract()
    faster = media.ExtractionSettings(fps=2.0, size=448)
    refused(lambda: extract(faster), "other settings (fps: 5.0, not 2.0; size: 640, not 448)")
    # A folder has the settings of its first call. In later calls, flags may be left out.
    words = ["extract", drawn.group(), f"--models={drawn.models}", f"--out={drawn.folder / 'fast'}"]
    for flags in (("--fps=2", "--size=448"), ("--fps=2",), ()):
        drawn.run(*words, *flags)
    card = drawn.models / "embed.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"notes": "another"}))
    refused(extract, "with another net for the role face_embedder")


def test_python_names_people_of_paths_that_are_texts(drawn):
    drawn.befriend("Ada")
    out, models = str(drawn.out), str(drawn.models)
    copy = shutil.copy(group := drawn.group(), group.with_suffix(".bmp"))
    paths, told = [str(group), str(copy)], list[messages.Note]()
    done = vidjax.name_people(paths, str(drawn.friends), out, models, tell=told.append)
    assert done.people == {"Ada": 1} and "Ada" in drawn.names().values()
    assert told and done.notes == told


def test_names_go_to_a_new_folder_for_other_settings_with_a_copy_of_the_log(drawn):
    film, log_file = drawn.meet("Ada"), drawn.out / "said.jsonl"
    drawn.run("review", drawn.out, "--name=unknown 1=Eve")
    names = drawn.names()
    output = drawn.who(film, flags=["--fps=2.5"], code=2).output
    assert f"first copy '{log_file}' into the new folder" in output
    (drawn.folder / "new").mkdir()
    shutil.copy(log_file, drawn.folder / "new")
    drawn.out = drawn.folder / "new"
    drawn.who(film, flags=["--fps=2.5"])
    assert {*drawn.names().values()} == {*names.values()} and "Eve" in names.values()
