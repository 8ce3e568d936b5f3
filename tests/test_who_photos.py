"""`vidjax who` and wrong photos of people, face tags that do not fit, and missing drives.

The photo of `drawn.group` takes the place of a film, because a photo is read faster.
"""

import shutil

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import films
from tests.helpers.drawn_people import SIDE, picture, tags, write_film, write_photo
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import actions, digests, photos

pytestmark = pytest.mark.usefixtures("read_here")
PAIR = ("Ada", 20, 40), ("Bob", 76, 40)  # names, and where the faces are: left, top
# A point (x, y) of the shown picture is the point (y, 128 - x) of a picture that is rotated.
TURNED_TAGS = tags(*((x, top, 128 - left - SIDE) for x, left, top in PAIR), size=(128, 96))
TURNED = "its tags fit only if the photo is turned or mirrored"
LOST, TWO = "there is no face at the tag of Bob", "two of its tags name the same face"


# What happened to a photo after it was tagged -> the picture, the tags, a message, and the people.
# No two pictures are equal.
TAGGED = {
    "nothing": (picture(PAIR), tags(*PAIR), "", "Ada Bob"),
    "a face was not found": (picture(PAIR[:1]), tags(*PAIR), LOST, "Ada"),
    "mirrored": (np.fliplr(picture(PAIR)), tags(*PAIR), TURNED, ""),
    # The tags refer to the stored picture, which EXIF orientation 6 rotates by 90 degrees.
    "rotated": (np.rot90(picture(PAIR)), TURNED_TAGS, "", "Ada Bob"),
    "cropped": (picture(PAIR)[:, 60:], tags(*PAIR), "another shape, 128 x 96, not 68 x 96", ""),
    "two tags name a face": (picture(PAIR, 30), tags(*PAIR, ("Eve", 21, 41)), TWO, ""),
    "a face has its tag twice": (picture(PAIR, 40), tags(*PAIR, ("Bob", 77, 41)), LOST, "Ada Bob"),
    # Eve is now nearly where Ada was, and no face is at the place of Bob.
    "replaced": (picture([("Eve", 24, 44)]), tags(*PAIR), "its tags fit its faces poorly", ""),
}


def test_tags_that_do_not_fit_their_photo_enrol_nobody(drawn):
    notes, path_of = [], {x: drawn.friends / x / "holiday.png" for x in TAGGED}
    for change, (rgb, packet, _, _) in TAGGED.items():
        path_of[change].parent.mkdir(parents=True)
        codec, orientation = ("mjpeg", 6) if change == "rotated" else ("png", 1)
        photo = films.photo(np.ascontiguousarray(rgb), codec, orientation)
        path_of[change].write_bytes(photo + packet)
    drawn.out.mkdir()
    found = photos.read_folder(drawn.friends, drawn.out, drawn.models, 1, notes.append)
    people = {x: [] for x in path_of.values()}
    for face in found.faces:
        people[face.path].append(face.person)
    for change, (_, _, words, names) in TAGGED.items():
        path = path_of[change]
        assert sorted(people[path]) == names.split(), change
        assert (str(path) in found.failed) == (not names), change
        lines = [x.text for x in notes if str(path) in x.text and "poor, with" not in x.text]
        used = [line for line in lines if "the tags are used" in line]
        assert words in "".join(lines) and len(lines) == len(used) + bool(words)
        assert len(used) == bool(names)


def test_a_photo_whose_tags_cannot_be_read_any_more_keeps_its_people(drawn):
    """The photo in Album does not show a person with the name of this folder."""
    group, both, people = drawn.group(), {"Ada": 2, "Bob": 1}, drawn.friends
    sidecars = [people / "1.png.xmp", people / "Album" / "2.png.xmp"]
    for sidecar, faces in zip(sidecars, (PAIR, (("Ada", 24, 44),)), strict=True):
        write_photo(sidecar.with_suffix(""), *faces)
        sidecar.write_bytes(tags(*faces))
    drawn.who(group)
    sidecars[0].write_bytes(tags(*PAIR)[:40])  # cut off before the tags
    assert drawn.who(group, code=1).content["people"] == both
    sidecars[0].write_bytes(b"")  # a placeholder for a file in a cloud
    for words in ("1.png.xmp", "the sidecar file with the face"):
        content, output = drawn.who(group, code=1)
        assert content["people"] == both and words in output
        for sidecar in sidecars:
            sidecar.unlink(missing_ok=True)
    assert {*drawn.names().values()} == {"Ada", "Bob"}
    for tagged, count in ((PAIR[:1], 2), ((), 1)):  # a user removes one tag after the other
        sidecars[0].write_bytes(tags(*tagged))
        assert drawn.who(group, code=1).content["people"] == {"Ada": count}
    write_photo(sidecars[1].with_suffix(""), ("Ada", 24, 40))  # another photo, without tags
    assert drawn.who(group, code=1).content["people"] == {"Album": 1}


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# A drive that is not connected -> what it does to the folder of people.
GONE = {
    "all people are empty": empty,
    "all people are missing": shutil.rmtree,
    "all folders are empty": lambda friends: [empty(friends / name) for name in ("Ada", "Bob")],
    "a photo is a placeholder": lambda friends: (friends / "Ada/1.png").write_bytes(b""),
    "a photo is in a cloud": lambda x: (x / "Ada/1.png").rename(x / "Ada/.1.png.icloud"),
}


def test_a_drive_that_is_not_connected_forgets_nobody(drawn):
    group, both, drive = drawn.group(), {"Ada": 1, "Bob": 1}, drawn.folder / "drive"
    drawn.befriend("Ada", "Bob")
    drawn.who(group)
    page = (drawn.out / "names.html").read_text()
    shutil.copytree(drawn.friends, drive)
    for way, act in GONE.items():
        act(drawn.friends)
        for _ in range(2):
            content, output = drawn.who(group, code=1)
            assert content["people"] == Gallery(drawn.out / "gallery").identities == both, way
            assert "is the drive connected?" in output or "earlier call are kept" in output
            assert "forgotten" not in output and content["failed"]
            assert (drawn.out / "names.html").read_text() == page
        shutil.rmtree(drawn.friends, ignore_errors=True)
        shutil.copytree(drive, drawn.friends)
    assert drawn.who(group).content["people"] == both


@pytest.mark.parametrize("act", [shutil.rmtree, empty])
def test_photos_are_forgotten_if_other_known_photos_are_still_there(drawn, act):
    """The folder of a person, or a folder in it, was deleted, because its drive is connected."""
    group, friends = drawn.group(), drawn.friends
    drawn.befriend("Ada", "Bob")
    for number in (2, 3, 4):
        write_photo(friends / "Ada" / "trip" / f"{number}.png", ("Ada", 40 + number, 40))
    drawn.who(group)
    (friends / "Ada" / "trip" / "3.png").unlink()
    assert drawn.who(group).content["people"] == {"Ada": 3, "Bob": 1}
    act(friends / "Ada" / "trip")
    assert drawn.who(group).content["people"] == {"Ada": 1, "Bob": 1}
    (friends / "Bob" / "1.png").rename(friends / "Bob" / "seaside.png")  # is known by its content
    act(friends / "Ada")
    content, output = drawn.who(group)
    assert content["people"] == {"Bob": 1} and "Ada no longer has photos and is" in output
    assert b"Ada" not in b"".join(x.read_bytes() for x in drawn.out.rglob("*") if x.is_file())
    # Only a photo that vidjax does not know is there: the folder may be another folder.
    shutil.rmtree(friends / "Bob")
    write_photo(friends / "Eve" / "1.png", ("Eve", 40, 40))
    content, output = drawn.who(group, code=1)
    assert content["people"] == {"Bob": 1, "Eve": 1} and "is the drive connected?" in output


def test_links_to_a_drive_that_is_not_connected_forget_nobody(drawn):
    drive, people = drawn.folder / "drive", {"Ada": 1, "Bob": 1, "Eve": 1, "Zoe": 1}
    drawn.befriend("Ada", "Bob")
    for left, name in ((40, "Eve"), (44, "Zoe")):  # Zoe.png is not on the drive
        write_photo(drawn.friends / f"{name}.png", ("Eve", left, 40))
    for number, linked in enumerate(("Ada", "Bob/1.png", "Eve.png")):
        (place := drive / f"{number}").mkdir(parents=True)
        (place / "x.png").symlink_to((drawn.friends / linked).rename(place / "real"))
        (drawn.friends / linked).symlink_to(place / "x.png")
    assert drawn.who(drawn.group()).content["people"] == people
    shutil.rmtree(drive)
    assert drawn.who(drawn.group(), code=1).content["people"] == people


def test_calls_that_fail_change_nothing_and_a_missing_gallery_is_made_again(drawn):
    """The gallery is a result: it follows from the photos, the films and the log."""
    group, gallery, moved = drawn.group(), drawn.out / "gallery", drawn.folder / "moved"
    drawn.befriend("Ada")
    drawn.who(group)
    drawn.run("review", drawn.out, "--name=unknown 1=Bob")
    people, names = Gallery(gallery).people, drawn.names()
    gallery.rename(moved)
    drawn.who(group)
    assert Gallery(gallery).people == people and drawn.names() == names
    before = {path: path.read_bytes() for path in drawn.out.glob("names.*")}
    empty(drawn.friends)
    drawn.who(group, flags=["--threshold=2"], code=2)
    assert before == {path: path.read_bytes() for path in drawn.out.glob("names.*")}
    shutil.rmtree(drawn.friends)
    assert "is not a folder" in drawn.who(group, flags=["--forget-missing"], code=2).output
    assert Gallery(gallery).identities == {"Ada": 1, "Bob": 1}


def test_a_person_is_forgotten_only_by_an_act(drawn):
    """Acts are: a deleted photo, `vidjax forget`, and the flag --forget-missing."""
    group, friends = drawn.group(), drawn.friends
    drawn.befriend("Ada", "Bob", "Eve")
    write_photo(friends / "Bob" / "2.png", ("Bob", 42, 40))
    for left, name in ((44, "Cy"), (46, "Dan")):
        write_photo(friends / f"{name}.png", ("Eve", left, 40))
    drawn.who(group)
    (friends / "Bob" / "2.png").unlink()
    (friends / "Cy.png").unlink()
    content, output = drawn.who(group)
    assert content["people"] == {"Ada": 1, "Bob": 1, "Eve": 1, "Dan": 1}
    assert output.count("no longer has photos and is forgotten") == 1 and "Cy no longer" in output
    actions.forget(drawn.out, ["Ada"])
    names = drawn.names().values()
    assert Gallery(drawn.out / "gallery").identities.keys() == {"Bob", "Eve", "Dan"}
    assert "Ada" not in names and "Bob" in names
    for path in friends.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    content, output = drawn.who(group, code=1)
    assert content["people"] == {"Bob": 1, "Eve": 1, "Dan": 1}
    assert "no longer has photos" not in output and "people/" not in output
    content, _ = drawn.who(group, flags=["--forget-missing"])
    assert content["people"] == {} and {*drawn.names().values()} == {"unknown 1", "unknown 2"}
    assert b"Bob" not in (drawn.out / "names.html").read_bytes()


def test_prune_keeps_the_results_of_films_whose_folder_is_missing(drawn):
    """A film that is missing from a folder with other files was deleted."""
    drive, film = drawn.folder / "drive", drawn.folder / "here.mkv"
    for left, path in enumerate((drive / "a.mkv", drive / "b.mkv", film), 20):
        path.parent.mkdir(exist_ok=True)
        write_film(path, (1, 20, [("Ada", left, 30)]))
    drawn.who(drive, film, people=False)

    def prune(*flags, code=0):
        done = drawn.who(film, people=False, flags=flags, code=code)
        return done, {row["video"] for row in drawn.rows()}

    (drive / "a.mkv").unlink()
    assert prune("--prune")[1] == {"b.mkv", "here.mkv"}
    assert not (drawn.out / "features" / "a.npz").exists()
    empty(drive)
    (content, output), films = prune("--prune", code=1)
    assert films == {"b.mkv", "here.mkv"} and content["failed"] == [f"{drive}/b.mkv"]
    assert "is the drive connected?" in output and "add --prune" not in output
    assert prune("--prune", "--forget-missing")[1] == {"here.mkv"}
    film.write_bytes(b"")  # a film that becomes unreadable keeps its results, too
    (_, output), films = prune(code=1)
    assert "here.mkv" in output and films == {"here.mkv"}


SHOW = "the photos of Ada show two people:"
# Folder -> the people whom its photos show; and the message, or "".
WRONG = {
    "two people in a folder": ({"Ada": "Ada Eve"}, f"{SHOW} Ada/1.png / Ada/2.png"),
    # Are photos 2 and 3 of Ada wrong, or is her photo 1 wrong, and the photo of Bob?
    "one right, two wrong": ({"Ada": "Ada Bob Bob", "Bob": "Bob"},
                             f"{SHOW} Ada/2.png, Ada/3.png (like Bob) / Ada/1.png"),
    "two wrong of nobody": ({"Ada": "Ada Eve Eve", "Bob": "Bob"},
                            f"{SHOW} Ada/2.png, Ada/3.png / Ada/1.png"),
    "one photo each": ({"Ada": "Ada", "Bob": "- Ada"},
                       "Ada/1.png and Bob/2.png count as photos of Ada and Bob, but"),
    "clear": ({"Ada": "Ada Ada Ada Bob", "Bob": "Bob Bob Bob"},
              "Ada/4.png counts as a photo of Ada, but looks like Bob"),
    "of nobody": ({"Ada": "Ada Ada Ada", "Bob": "Bob Bob Bob Eve"},
                  "Bob/4.png counts as a photo of Bob, but differs from Bob's other photos"),
    "nothing": ({"Ada": "Ada Ada", "Bob": "Bob Bob"}, ""),
}  # fmt: skip


@pytest.mark.parametrize(("shown", "words"), WRONG.values(), ids=WRONG)
def test_photos_of_two_people_blame_nobody_if_it_is_not_clear_who_is_wrong(drawn, shown, words):
    for folder, people in shown.items():
        for number, person in enumerate(people.split(), 1):
            if person != "-":
                path = drawn.friends / folder / f"{number}.png"
                write_photo(path, (person, 36 + 2 * number, 40))
    gallery, notes = Gallery.of_models(drawn.folder / "g", drawn.models), []
    photos.enrol_folder(gallery, drawn.friends, drawn.models, 1, notes.append)
    # Photos whose sides cannot be told apart identify nobody.
    named = {"Ada", "Bob"} & shown.keys() - ({"Ada"} if words.startswith(SHOW) else set())
    assert gallery.identities.keys() == named
    begins = ("the photos of", f"{drawn.friends}/", "Ada/", "Bob/")
    texts = [x.text for x in notes if x.text.startswith(begins) and "poor, with" not in x.text]
    assert words in "".join(texts) and len(texts) == bool(words)


def test_two_names_of_one_person_do_not_blame_the_net(drawn):
    for number, left in enumerate(range(32, 44, 2)):
        path = drawn.friends / ("Ada", "Ada L")[number // 3] / f"{number}.png"
        write_photo(path, ("Ada", left, 40))
    for people, words in ((True, "but looks like Ada"), (False, "if two names are one person")):
        output = drawn.who(drawn.group(), people=people).output
        output += (drawn.out / "names.html").read_text()
        assert words in output and "as much as the net" not in output
        assert ("if two names are one person" in output) == (not people)
        shutil.rmtree(drawn.friends, ignore_errors=True)  # as if a user gave both names


def test_a_photo_in_the_folders_of_two_people_identifies_nobody_until_it_is_moved(drawn):
    """The only photo of Eve is also in the folder of Ada. A name that a user typed stays."""
    films = drawn.group(), drawn.folder / "eve.png"
    photo, wrong = drawn.friends / "Eve" / "1.png", drawn.friends / "Ada" / "2.png"
    drawn.befriend("Ada", "Bob")
    write_photo(photo, ("Eve", 44, 40))
    write_photo(films[1], ("Eve", 30, 30))
    shutil.copy(photo, wrong)

    def enrol():
        """Returns name of a person -> number of clips, and the messages."""
        output = drawn.who(*films).output
        assert "forgotten" not in output
        return Gallery(drawn.out / "gallery").identities, output

    people, output = enrol()
    assert people == {"Ada": 1, "Bob": 1} and output.count("it is not used: delete the wrong") == 2
    version = Gallery(drawn.out / "gallery").version
    assert enrol()[0] == people and Gallery(drawn.out / "gallery").version == version
    drawn.run("review", drawn.out, "--name=unknown 1=Eve")
    assert enrol()[0] == people | {"Eve": 1}
    wrong.unlink()
    people, output = enrol()
    assert people == {"Ada": 1, "Bob": 1, "Eve": 2} and "copy" not in output
    shutil.copy(photo, wrong)  # the photo comes back into the wrong folder
    assert enrol()[0] == {"Ada": 1, "Bob": 1, "Eve": 1}


def test_a_photo_with_sunglasses_is_left_out_if_there_are_others(drawn):
    """Sunglasses are a dark bar over the eyes."""
    drawn.befriend("Ada")
    for name in ("Ada", "Bob"):
        rgb = picture([(name, 40, 40)])
        rgb[42:48, 40:56] = rgb[42:48, 40:56] // 3
        (drawn.friends / name).mkdir(exist_ok=True)
        (drawn.friends / name / "2.png").write_bytes(films.photo(rgb, "png"))
    content, output = drawn.who(drawn.group())
    assert output.count("sunglasses or a shadow hide the eyes") == 2
    assert content["people"] == {"Ada": 1, "Bob": 1}
    assert "it is left out, because Ada has better photos" in output
    used = [drawn.friends / name for name in ("Ada/1.png", "Bob/2.png")]
    clips = {f"people/{str(digests.digest_photo(path))[:16]}" for path in used}
    assert {*Gallery(drawn.out / "gallery").clips} == clips
    # Later, this photo is damaged. Its face is not enrolled, so nothing changes.
    (drawn.friends / "Ada" / "2.png").write_bytes(b"\x89PNG\r\n damaged")
    assert drawn.who(drawn.group(), code=1).content["people"] == {"Ada": 1, "Bob": 1}


def test_photos_of_two_people_in_one_folder_name_nobody_until_they_are_parted(drawn):
    films, friends = (drawn.group(), drawn.folder / "eve.png"), drawn.friends
    drawn.befriend("Ada", "Bob")
    write_photo(films[1], ("Eve", 30, 30))
    drawn.who(*films)
    drawn.run("review", drawn.out, "--name=unknown 1=Bob L")  # Eve; a typed name stays
    before = drawn.names()
    (friends / "Ada" / "2.png").hardlink_to(friends / "Bob" / "1.png")
    (friends / "Bob" / "1.png").unlink()
    (friends / "Bob").rmdir()
    (friends / "Ada").rename(friends / "Both")
    for _ in range(2):
        content, output = drawn.who(*films)
        words = "the photos in the folder Both were photos of Ada, Bob, so they are not used"
        assert words in output and "forgotten" not in output
        assert content["people"] == {"Bob L": 1} and content["missed"] == ["Both"]
    (friends / "Both").rename(friends / "Ada")
    (friends / "Bob").mkdir()
    (friends / "Ada" / "2.png").rename(friends / "Bob" / "1.png")
    content, output = drawn.who(*films)
    assert content["people"] == {"Ada": 1, "Bob": 1, "Bob L": 1} and "not used" not in output
    assert drawn.names() == before


def test_people_in_the_folder_of_strangers_get_no_name(drawn):
    """The only photo of Ada shows Eve. Strangers who look like Ada raise the threshold."""
    flags = ["--fpir=0.25"]  # none of three strangers may get a name
    films, friends = (drawn.group(), drawn.folder / "eve.png"), drawn.friends
    drawn.befriend("Bob")
    write_photo(friends / "Ada" / "1.png", ("Eve", 40, 40))
    write_photo(films[1], ("Eve", 30, 30))
    drawn.who(*films)
    assert drawn.names()["eve"] == "Ada"
    for number in range(3):
        write_photo(friends / "strangers" / "2020" / f"{number}.png", ("Eve", 34 + number, 40))
    content, _ = drawn.who(*films, flags=flags)
    assert content["people"] == {"Ada": 1, "Bob": 1}
    assert content["failed"] == content["missed"] == []
    assert drawn.names()["eve"] == "unknown 2"
    assert len(Gallery(drawn.out / "gallery").strangers) == 3
    shutil.rmtree(friends / "strangers")
    content, output = drawn.who(*films)
    assert not Gallery(drawn.out / "gallery").strangers and "no longer" not in output
    assert drawn.names()["eve"] == "Ada"
    # Another spelling is the name of a person.
    (friends / "Ada").rename(friends / "Strangers")
    assert drawn.who(*films).content["people"] == {"Strangers": 1, "Bob": 1}


def test_a_correction_of_a_photo_is_about_its_picture_and_not_about_one_of_its_files(drawn):
    """`photo.png` and `photo (1).png` are equal. They are in --people, too."""
    films, friends = drawn.folder / "films", drawn.friends
    drawn.befriend("Bob")
    write_photo(first := films / "photo.png", ("Eve", 40, 40))
    copies = films / "photo (1).png", friends / "Ada" / "photo.png", friends / "Ada" / "copy.png"
    for path in copies:
        path.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(first, path)
    content, _ = drawn.who(films)
    assert content["people"] == {"Ada": 1, "Bob": 1} and [*drawn.names().values()] == ["Ada"]
    (clip,) = drawn.names()
    page = actions.Review(drawn.out)
    page.change("apart", [f"clip:\t{clip}"])
    page.save()
    assert drawn.names() == {clip: "unknown 1"} and "Ada" not in Gallery(drawn.out / "gallery")
    for moves in (lambda: None, first.unlink, copies[0].unlink):  # the photo has two places
        moves()
        films_there = films if any(films.iterdir()) else drawn.group()
        drawn.who(films_there)
        assert drawn.names()[clip] == "unknown 1" and "Ada" not in Gallery(drawn.out / "gallery")
    shutil.copy(copies[1], films / "again.png")
    drawn.who(films)
    assert drawn.names()[clip] == "unknown 1"


def test_messages_after_a_folder_got_another_name_speak_of_the_new_name_only(drawn):
    group, friends = drawn.group(), drawn.friends
    drawn.befriend("Ada", "Bob")
    drawn.who(group)
    drawn.run("review", drawn.out, "--name=Bob=Robert")  # the folder is still Bob
    assert drawn.who(group).content["people"] == {"Ada": 1, "Robert": 1}
    for name in ("bob", "Bo"):
        next(friends.glob("[bB]o*")).rename(friends / name)
        content, output = drawn.who(group)
        assert content["people"] == {"Ada": 1, name: 1}
        assert f"now belong to {name}" in output and "forgotten" not in output
        assert name in drawn.names().values() and "Robert" not in drawn.names().values()
        assert "belong" not in drawn.who(group, flags=["--prune"]).output
        assert b"Robert" not in (drawn.out / "names.html").read_bytes()
