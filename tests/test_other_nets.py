"""After a change of nets, `vidjax who` reads films and photos again, and keeps all corrections.

The new detector draws larger boxes, and finds Bob and Eve before Ada. So clips of two faces in a
shot change their names. The new embedder permutes the values of its vectors, and adds two values.
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette.testclient")
pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import made_appearances, made_nets
from tests.helpers.drawn_people import EMBED, Drawn, restore, write_film, write_photo
from tests.helpers.interrupted import count_down
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import Store
from vidjax.apps.video import actions, faces, log, media, results
from vidjax.apps.video.media import FEATURES, FaceTrack
from vidjax.apps.video.names_page import CLIP
from vidjax.apps.video.said import Said
from vidjax.data.clip_files import write_npz

NEW_WIDTH = made_nets.WIDTH + 2  # of the vectors of the new embedder
PLACES = (20, 30), (90, 20), (10, 60)  # of faces: left, top


def write_nets(folder, *, detect=True, embed=True):
    """Writes other nets than `write_models`, or only one other net; returns the folder."""
    folder.mkdir()
    find = made_nets.detector(side=20, weights=(0.9, 0.9, 1.2)) if detect else None
    made_nets.write(folder, "find", "face_detector", find)
    weights, width = made_nets.colours(), made_nets.WIDTH
    if embed:
        weights, width = np.pad(np.roll(weights, 1, axis=1), ((0, 0), (0, 2))), NEW_WIDTH
    fields: Any = EMBED | {"content": made_nets.embedder(weights=weights)}
    back_end = made_nets.back_end(different=(-0.4, 0.2), width=width)
    made_nets.write(folder, "embed", back_end=back_end, width=width, **fields)
    return folder


class Archive:
    """Films with corrections of each kind: names, wrong names, ignored and joined people."""

    def __init__(self, drawn):
        self.drawn, self.out, self.films = drawn, drawn.out, drawn.folder / "films"

    def make(self):
        """Makes corrections of each film, divides and joins unknown people, and renames Ada."""
        drawn = self.drawn
        self.films.mkdir()
        for number in range(3):
            first, second, third = [(left, top + number) for left, top in PLACES]
            write_film(
                self.films / f"0{number}.mkv", (1, 20, [("Ada", *first)]),
                (2, 60, [("Eve", *second)]), (2, 35, [("Bob", *third), ("Ada", *second)]),
            )  # fmt: skip
            write_photo(drawn.friends / "Ada" / f"{number + 1}.png", ("Ada", 31 + number, 40))
        self.who()
        page, names = self.open(), drawn.names()
        for film in ("00", "01", "02"):
            eve, both = f"{CLIP}{film}.s001.t00", (f"{film}.s002.t00", f"{film}.s002.t01")
            bob, ada = (CLIP + x for x in sorted(both, key=lambda clip: names[clip] == "Ada"))
            page.change("apart", [f"{CLIP}{film}.s000.t00"])
            for action, face, name in {
                "00": [("name", eve, "Eve 00"), ("ignore", bob, "")],
                "01": [("name", bob, "Bob"), ("apart", ada, "")],
                "02": [("ignore", eve, ""), ("name", ada, "Ada")],
            }[film]:
                page.change(action, [face], name)
        apart = [f"{film}.s000.t00" for film in ("01", "02")]
        for clip in apart:  # two faces are taken out of an unknown person, and are one person
            page.change("apart", [CLIP + clip])
        one, other = (page._decision.unknown[clip] for clip in apart)
        page.change("name", [one], other)
        page.change("name", ["Ada"], "Countess")
        page.save()
        self.who()

    def who(self, **options):
        return self.drawn.who(self.films, **options)

    def open(self):
        """Returns the page of corrections."""
        return actions.Review(self.out)

    def list_names(self):
        """Returns (film, name, second, column of the face) of each appearance."""
        rows = ((x["start"], 2 * sum(x["box"][::2]), x) for x in self.drawn.rows())
        return sorted((x["video"], str(x["identity"]), round(a), round(b)) for a, b, x in rows)

    def list_corrections(self):
        """Returns (film, second, column of the face, correction), also of films that wait."""
        films = media.describe_media_files(self.out / FEATURES)
        said, gallery = Said(log.read(self.out), films.values()), Gallery(self.out / "gallery")
        found: list[tuple[Any, ...]] = [("joined", sorted(said.fixed), sorted(said.apart))]
        found += [("people", sorted(map(str, {*gallery.identities, *said.names.values()})))]
        for stem, film in films.items():
            for track in film.tracks:
                assert track.box
                clip, column = track.clip, round(2 * sum(track.box[::2]))
                place = stem, round(track.start_s), column
                found += [(*place, x[clip]) for x in (said.names, said.numbers) if clip in x]
                found += [(*place, f"not {name}") for name in said.denied.get(clip, ())]
                found += [(*place, "ignored")] * (clip in said.ignored)
        return sorted(map(str, found))


@pytest.fixture
def drawn(place, command, read_here):
    return Drawn(restore(place, lambda now: Archive(Drawn(now, command)).make()), command)


@pytest.fixture
def archive(drawn):
    return Archive(drawn)


def test_corrections_are_kept_when_all_nets_change(archive, drawn):
    before, names, clips = archive.list_corrections(), archive.list_names(), drawn.names()
    assert sum("not Countess" in x for x in before) == 4 and "('joined', [], [])" not in before
    drawn.models = write_nets(drawn.folder / "new")
    net = (drawn.models / "embed.onnx").rename(drawn.folder / "net")
    features = sorted((archive.out / "features").iterdir())
    (drawn.models / "embed.onnx").write_bytes(b"damaged")
    assert "embed.onnx" in drawn.who(archive.films, code=2).output  # removes no features
    assert sorted((archive.out / "features").iterdir()) == features
    net.replace(drawn.models / "embed.onnx")
    _, output = archive.who()
    words = (
        "there are new nets (face_detector, face_embedder): the films and photos of this run are"
    )
    assert output.count(words) == 1
    assert archive.list_corrections() == before and not (archive.out / "unmatched.tsv").exists()
    assert all(x.vector.any() for x in Gallery(archive.out / "gallery").clips.values())
    assert archive.list_names() == names and drawn.names() != clips
    archive.who()
    assert archive.list_names() == names and archive.list_corrections() == before


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["detect", "embed"])
def test_corrections_are_kept_when_one_net_changes(archive, drawn, kept):
    before = archive.list_corrections()
    drawn.models = write_nets(drawn.folder / "new", **{kept: False})
    archive.who()
    assert archive.list_corrections() == before


def test_names_that_people_told_are_kept_when_dlibs_net_is_replaced(archive, drawn):
    """An earlier version converted dlib's net, and this version does not."""
    new, old = drawn.models, shutil.copytree(drawn.models, drawn.folder / "old")
    (old / "embed.json").unlink()
    made_nets.write_dlib(old)
    drawn.models = old
    archive.who()
    drawn.run("review", archive.out, "--name=Eve 00=Eva")
    before = archive.list_corrections()
    told = [row for row in archive.list_names() if row[1] in ("Eva", "Bob", "Countess")]
    assert {row[1] for row in told} == {"Eva", "Bob", "Countess"}
    drawn.models = new
    _, output = archive.who()
    assert "there are new nets (face_embedder)" in output
    assert archive.list_corrections() == before and {*told} <= {*archive.list_names()}


def test_films_and_photos_that_are_missing_keep_their_corrections(archive, drawn):
    """The drive of film 00 and of Ada's photos is not connected. Meanwhile, Eve 00 is renamed."""
    before, drive = archive.list_corrections(), drawn.folder / "drive"
    drive.mkdir()
    shutil.move(archive.films / "00.mkv", drive)
    shutil.move(drawn.friends / "Ada", drive)
    (pictures := (features := archive.out / "features") / "thumbnails/00").mkdir(parents=True)
    (pictures / "00.s000.t00.png").touch()
    damaged = shutil.copy(features / "00.npz", features / "04.npz")
    (features / "videos" / "04.json").touch()
    drawn.models = write_nets(drawn.folder / "new")
    for _ in range(2):
        _, output = archive.who(code=1)
        assert "films that were not read with the present nets: 1, such as 00.mkv" in output
        assert (
            "photos of people that were not read with the present nets: 3, such as 1.png" in output
        )
        assert archive.list_corrections() == before
        assert not pictures.exists() and not damaged.exists()
    # Another film with the same name does not get the clips of the missing film.
    (archive.films / "other").mkdir()
    write_film(archive.films / "other" / "00.mkv", (1, 70, [("Eve", *PLACES[0])]))
    archive.who(code=1)
    assert [x for x in archive.list_corrections() if "00~" not in x] == before
    archive.open().change("name", ["Eve 00"], "Eva")  # on the page of `vidjax review`
    shutil.move(drive / "00.mkv", archive.films)
    shutil.move(drive / "Ada", drawn.friends)
    archive.who()
    corrections = [x for x in archive.list_corrections() if "00~" not in x]
    assert corrections == [x.replace("Eve 00", "Eva") for x in before]


def test_corrections_without_a_face_are_listed(archive, drawn):
    """Film 00 is replaced by another film while the nets change, and film 01 is deleted.

    A photo program has added bytes to the photos of Ada, whom the user calls Countess.
    """
    shutil.move(archive.films / "01.mkv", drawn.folder)
    write_film(archive.films / "00.mkv", (1, 20, [("Bob", 60, 10)]))
    for photo in (drawn.friends / "Ada").iterdir():
        photo.write_bytes(photo.read_bytes() + b"more")
    drawn.models = write_nets(drawn.folder / "new")
    _, output = archive.who(flags=["--prune"])
    people = Gallery(archive.out / "gallery").identities
    assert "Ada" not in people and people["Countess"] == 4
    head, *lines = (archive.out / "unmatched.tsv").read_text().splitlines()
    rows = {tuple(line.split("\t")) for line in lines}
    assert head.split("\t") == [*results.UNMATCHED_COLUMNS]
    assert {(row[0], row[2]) for row in rows} >= {
        ("00.mkv", "not Countess"), ("00.mkv", "Eve 00"), ("00.mkv", "ignored"), ("01.mkv", "Bob"),
    }  # fmt: skip
    words = f"corrections of faces that are no longer found: {len(rows):,}, see"
    assert words in output and words in archive.who().output
    assert lines == (archive.out / "unmatched.tsv").read_text().splitlines()[1:]
    # What is listed is computed. If a face is found again or its person is forgotten, its row goes.
    page = archive.open()
    page.forget("Bob")
    page.forget("Countess")
    text = (archive.out / "unmatched.tsv").read_text()
    assert "Bob" not in text and "Countess" not in text and "\tEve 00" in text
    shutil.move(drawn.folder / "01.mkv", archive.films)
    _, output = archive.who(code=0)
    assert "01.mkv\t" not in (archive.out / "unmatched.tsv").read_text()


@pytest.mark.slow
def test_interrupted_change_of_nets_continues(archive, drawn, monkeypatch, fault_seed, campaign):
    """The call is interrupted at one of its writes. The next call has the old or the new nets."""
    before, whole, old = archive.list_corrections(), drawn.folder / "whole", drawn.models
    new = write_nets(drawn.folder / "new")
    shutil.copytree(archive.out, whole)
    functions = ((os, "replace"), (Path, "unlink"), (Store, "write"), (os, "unlink"))
    left = count_down(monkeypatch, *functions)
    left[0], drawn.models = 10**9, new
    archive.who()
    writes, rng = 10**9 - left[0], random.Random(fault_seed)
    points = range(1, writes) if campaign else sorted(rng.sample(range(1, writes), 3))
    for point in points:
        shutil.rmtree(archive.out)
        shutil.copytree(whole, archive.out)
        left[0] = point
        archive.who(code=130)
        left[0] = 10**9
        archive.who()
        assert archive.list_corrections() == before, (point, writes)
    drawn.models = old
    archive.who()
    assert archive.list_corrections() == before, "with the old nets again"


def track(clip, begin, end, *places):
    """Returns a track whose face is at (seconds, left) and moves linearly between these places."""
    boxes = [(seconds, (left, 0.4, left + 0.1, 0.6)) for seconds, left in places]
    at, box = boxes[0]
    return FaceTrack(
        clip=clip, shot=0, start_s=begin, end_s=end, seen=9, places=boxes, box=box, box_at_s=at
    )


def film(*tracks, photo=False):
    made = made_appearances.film(photo=photo)
    made.tracks = [*tracks]
    return made


def match(old, new):
    """Returns clip of the film `old` -> clips of the film `new` that show this face."""
    clip_of = {face: clip for clip, face in old.faces.items()}
    return {clip_of[face]: of[0] for face, of in faces.match([*clip_of], [new]).items()}


def test_faces_are_matched_by_time_and_place():
    left, right = ((0, 0.1), (9, 0.2)), ((0, 0.6), (9, 0.5))
    old = film(track("a", 0, 9, *left), track("b", 0, 9, *right))
    assert match(old, old) == {"a": ["a"], "b": ["b"]}
    swapped = film(track("a", 0, 9, *right), track("b", 0, 9.1, *left))
    assert match(old, swapped) == {"a": ["b"], "b": ["a"]}
    # Two people cross: only the place at each time distinguishes them.
    crossing = film(track("a", 0, 9, (0, 0.1), (9, 0.8)), track("b", 0, 9, (0, 0.8), (9, 0.1)))
    other = film(track("x", 0, 9, (0, 0.79), (9, 0.1)), track("y", 0, 9, (0, 0.11), (9, 0.8)))
    assert match(crossing, other) == {"a": ["y"], "b": ["x"]}
    # A track that was divided goes to the longer part. A part at another place is another person.
    parts = film(track("p", 0, 3, *left), track("q", 3.5, 9, *left), track("r", 0, 9, (0, 0.9)))
    whole = film(track("a", 0, 9, (0, 0.11), *left[1:]))
    assert match(whole, parts) == {"a": ["q", "p"]}
    beside = film(track("p", 0, 3, *left), track("q", 2.9, 9, *left))  # two faces at a time
    assert match(whole, beside) == {"a": ["q"]}
    # Two nets have found one face, and a third net finds it again.
    twice = film(whole.tracks[0], track("c", 0, 9, (0, 0.12), *left[1:]))
    assert match(twice, old) == {"a": ["a"], "c": ["a"]}
    # A face that is lost does not get the track of a face that partly hides it.
    near = film(track("a", 0, 9, (0, 0.1)), track("b", 0, 9, (0, 0.185)))
    assert match(near, film(track("x", 0, 9, (0, 0.11)))) == {"a": ["x"]}
    # The same place at another time, as in the next shot, is another person.
    assert match(old, film(track("z", 9, 12, (9, 0.2)))) == {}
    # A line of the log may contain a single box. It must be seen at nearly this time.
    point = media.Face(film=old.sha256, at=0.5, box=(0.1, 0.4, 0.1, 0.2))
    assert faces.match([point], [swapped]) == {point: [["b"]]}
    assert faces.match([point], [film(track("z", 2, 9, (2, 0.1)))]) == {}
    replaced = film(track("a", 0, 9, *left))
    replaced.sha256 = "1" * 64
    assert match(old, replaced) == {}
    photo = film(track("f", 0, 0, (0, 0.1)), track("g", 0, 0, (0, 0.5)), photo=True)
    assert match(photo, photo) == {"f": ["f"], "g": ["g"]}


def test_features_of_other_nets_are_refused_although_they_were_copied(archive, drawn):
    copied, own, gallery = (drawn.folder / name for name in ("copied", "own", "g"))
    copied.mkdir()
    own.mkdir()
    shutil.copy(archive.out / "features" / "00.npz", copied)
    Gallery.of_models(gallery, write_nets(drawn.folder / "new"))

    def enrol(path, code=0):
        words = ("gallery", "enrol", gallery, f"--input={path}", "--identity=Ada")
        return drawn.run(*words, code=code).output

    for path in (copied, copied / "00.npz"):
        output = enrol(path, code=2)
        assert "face vectors" in output and "00.npz" in output and "--models" in output
    with pytest.raises(ValueError, match="not from the model of the gallery"):
        Gallery(gallery).load(copied)
    # Files of a user's own program, and of older versions, name no net.
    write_npz(own / "x.npz", {"x": {"face": np.ones((1, NEW_WIDTH), np.float32)}})
    enrol(own)
    drawn.run("gallery", "identify", archive.out / "gallery", f"--input={copied}")
    shutil.copy(archive.out / "features" / "extract.json", own)  # older versions write it, too
    assert "face vectors" in enrol(own, code=2)
