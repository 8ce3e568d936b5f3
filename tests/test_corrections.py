"""Corrections of unknown people: faces that stay together or apart, many at once, several users.

The results are a shelf of made-up films, see `tests.helpers.made_shelf`.
"""

import itertools
import re
from concurrent import futures
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("starlette.testclient")
pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import films, made_nets, made_shelf
from tests.helpers.cases import nightly_after_first
from tests.helpers.drawn_people import extract
from tests.helpers.seen import refused
from vidjax.apps.video import actions, align, log, media, results, review, still, who
from vidjax.apps.video.media import FEATURES
from vidjax.apps.video.names_page import CLIP, Forms
from vidjax.utils.errors import UserError

OLD = "the page was out of date"  # the message after a change on an old page


class Shelf:
    """Results of films of made-up people, and the page of actions."""

    def __init__(self, folder, **sizes):
        self.made = made_shelf.make(folder, **sizes)
        self.out, self.films = self.made.out, folder / "films"
        self.open()

    def open(self):
        self.page = actions.Review(self.out)

    def who(self):
        """Calls `vidjax who`, and returns clip -> name, or None for an ignored clip."""
        who.name_people(self.films, None, self.out, self.made.models)
        return self.later()

    def names(self):
        """Returns clip -> name, or None for an ignored clip, on the page."""
        return made_shelf.list_names(self.out, self.page._decision)

    def later(self):
        """Returns the names that the next call of `vidjax who` would give."""
        return made_shelf.list_names(self.out)

    def clips(self, name):
        return [clip for clip, x in self.names().items() if x == name]

    def people(self):
        """Returns the unknown people, with the most frequent person first."""
        unknown = {*filter(None, self.names().values())} - {*self.made.truth.values()}
        return sorted(unknown, key=lambda name: -len(self.clips(name)))

    def hide(self, film):
        """Hides a film from `vidjax who`, and returns a function that shows it again."""
        features, away = self.out / FEATURES, self.out.parent / "away"
        paths = [features / "videos" / f"{film}.json", features / f"{film}.npz"]
        paths.append(self.films / f"{film}.mp4")
        away.mkdir(exist_ok=True)
        hidden = [path.rename(away / path.name) for path in paths]
        return lambda: [x.rename(path) for x, path in zip(hidden[::-1], paths[::-1], strict=True)]


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path, people=6, films=4, known=1, faces=8)


def keys(clips):
    return [CLIP + clip for clip in clips]


def test_faces_taken_out_and_people_joined_stay_so_when_a_film_is_added(shelf):
    show = shelf.hide("film_003")
    shelf.open()
    one, two, three, *_ = shelf.people()
    wrong, rest = shelf.clips(one)[:2], shelf.clips(one)[2:]
    shelf.page.change("apart", keys(wrong))
    (new,) = {shelf.names()[clip] for clip in wrong}
    assert new not in (one, two, three) and {shelf.names()[clip] for clip in rest} == {one}
    shelf.page.change("name", [two], three)  # joins two people, who look different
    both, before = shelf.clips(min(two, three)), shelf.names()
    assert shelf.later() == before, "the same names in the next call"
    show()
    after = shelf.later()
    assert len(after) > len(before) and {after[clip] for clip in both} == {min(two, three)}
    (apart,) = {after[clip] for clip in wrong}
    assert apart != one and {after[clip] for clip in rest} == {one}
    # If the rest gets a name, the faces that were taken out do not get it.
    shelf.open()
    shelf.page.change("name", [one], "Zoe")
    assert {shelf.names()[clip] for clip in rest} == {"Zoe"}
    assert "Zoe" not in {shelf.names()[clip] for clip in wrong} and shelf.later() == shelf.names()


def test_many_people_and_faces_are_changed_in_one_step(shelf):
    before, (one, two, *others) = shelf.names(), shelf.people()
    faces = [shelf.clips(name)[0] for name in others[:2]]
    changed = {*faces, *shelf.clips(one), *shelf.clips(two)}
    for action, name in (("name", "Zoe"), ("ignore", None)):
        shelf.page.change(action, [one, two, *keys(faces)], name or "")
        assert shelf.names() == before | dict.fromkeys(changed, name) == shelf.later()
        shelf.page.undo()
        assert shelf.names() == before == shelf.later()
    # Each person's part becomes another person.
    clips = [clip for name in (one, two) for clip in shelf.clips(name)[:2]]
    shelf.page.change("apart", keys(clips))
    names = [shelf.names()[clip] for clip in clips]
    assert names[0] == names[1] != names[2] == names[3] and not {one, two} & {*names}
    shelf.page.undo()
    # A face moves to another unknown person, and to a person with a name.
    face = shelf.clips(one)[0]
    for name in (two, "Zoe"):
        shelf.page.change("name", keys([face]), name)
        assert shelf.names()[face] == name
    refused(lambda: shelf.page.change("apart", keys(shelf.clips(two))), "select only the wrong")
    refused(lambda: shelf.page.change("apart", [two]), "you selected all faces of")
    refused(lambda: shelf.page.change("name", [], "Zoe"), "select people or faces")


def test_unknown_people_keep_their_numbers_when_films_come_and_go(tmp_path):
    shelf = Shelf(tmp_path, people=32, films=4, known=1, faces=10)

    everything = shelf.who()
    for film in ("film_000", "film_003"):
        show = shelf.hide(film)
        rest = shelf.who()
        assert rest.items() < everything.items(), "nobody gets another number"
        show()
        assert shelf.who() == everything, "the people of the film have their numbers again"


def test_change_on_an_old_page_is_refused_only_if_its_people_have_changed(shelf):
    one, two, three, *_ = shelf.people()
    old, clip = shelf.page.version, shelf.clips(two)[0]
    shelf.page.change("name", keys([clip]), "Zoe", version=old)
    last = shelf.page.version
    shelf.page.change("ignore", [one], version=old)
    for change in (
        lambda: shelf.page.change("name", [two], "Bea", version=old),  # it had one more face
        lambda: shelf.page.change("name", [three], two, version=old),
        lambda: shelf.page.change("ignore", keys([clip]), version=old),
        lambda: shelf.page.change("once", [], version=old),
        lambda: shelf.page.undo(version=last),  # another change would be undone
        lambda: shelf.page.change("name", [three], "Bea", version=shelf.page.version + 1),
    ):
        refused(change, "repeat the change")
    shelf.page.change("name", [three], "Bea", version=old)
    shelf.page.undo(version=shelf.page.version)


@nightly_after_first("seed, films, count", [(4, 2, 12), (4, 3, 30), (7, 3, 30), (14, 3, 30)])
def test_random_changes_stay_as_they_were_said_in_every_later_call(tmp_path, seed, films, count):
    shelf = Shelf(tmp_path, people=10, films=films, known=2, faces=12, wrong=0.15, seed=seed)
    for path in (shelf.out / FEATURES / media.VIDEOS).iterdir():
        film = media.read_media_file(path)  # some faces are seen at the same time
        for one, two in zip(film.tracks[::4], film.tracks[1::4], strict=True):
            two.start_s, two.end_s, two.shot = one.start_s, one.end_s, one.shot
        media.write(path, film)
    shelf.open()
    rng, earlier = np.random.default_rng(seed), []
    # The model: clip -> name or None (ignored), wrong names of clips, and clips who differ.
    said, wrong, apart = dict[str, str | None](), set[tuple[str, str]](), set[tuple[str, str]]()

    def choose(values):
        return sorted(values)[rng.integers(len(values))]

    for _ in range(count):
        names = shelf.names()
        unknown = {name for name in names.values() if name and name.startswith("unknown")}
        person, face, new = choose(unknown), choose(names), f"Guest {rng.integers(5)}"
        clips = shelf.clips(person)
        few = clips[: rng.integers(1, len(clips))] if clips[1:] else []
        named = [clip for clip, name in names.items() if name and name not in unknown]
        denied = [choose(named)] if named else []
        before = dict(said), {*wrong}, {*apart}
        # The action, the people or faces, the name, and the clips that must have a name then.
        changes = [
            ("name", [person], new, clips), ("name", keys([face]), new, [face]),
            ("ignore", [person], "", clips), ("ignore", keys([face]), "", [face]),
            ("name", [person], choose(unknown), []), ("apart", keys(few), "", few),
            ("apart", keys(few), "", few), ("apart", keys(denied), "", denied), ("undo",) * 4,
        ]  # fmt: skip
        action, of, name, changed = changes[rng.integers(len(changes))]
        if action == "undo" and earlier:
            shelf.page.undo()
            said, wrong, apart = earlier.pop()
        elif action != "undo" and of and (name not in of):
            shelf.page.change(action, of, name)
            earlier.append(before)
            if action in ("name", "ignore"):
                said |= dict.fromkeys(changed, name or None)
                # The last word counts: of a face, or of the numbers that become one person.
                numbers = {x: {n} for x, n in shelf.page._decision.said.numbers.items()}
                number = {clip: numbers.get(clip, {clip}) for clip in names}
                apart = {(x, y) for x, y in apart if number[x] != number[y]}
                apart = {pair for pair in apart if of[0] == person or not {*pair} & {*changed}}
            else:
                said = {clip: x for clip, x in said.items() if clip not in changed}
                wrong |= {(clip, names[clip]) for clip in changed if changed is denied}
            if changed is few:
                apart |= {(one, two) for one in few for two in {*clips} - {*few}}
        later = shelf.later()
        assert shelf.names() == later == shelf.later()
        assert {clip: later[clip] for clip in said} == said
        assert not [x for x in wrong if later[x[0]] == x[1] and x[0] not in said]
        same = [pair for pair in apart if later[pair[0]] == later[pair[1]] is not None]
        assert not [pair for pair in same if not {*pair} <= said.keys()]


@pytest.mark.slow
def test_two_browsers_and_vidjax_who_at_once_lose_no_change(tmp_path, monkeypatch):
    monkeypatch.setattr(review.Review, "save_later", lambda self: None)
    shelf = Shelf(tmp_path, people=8, films=4, known=2, faces=8)
    shows, known = [shelf.hide(film) for film in ("film_002", "film_003")], {*made_shelf.NAMES[:2]}
    clips = [clip for clip, name in shelf.who().items() if name not in known][:12]
    wanted = dict[str, str | None]()
    shelf.open()

    def edit(number):
        """Changes every second clip, and repeats the changes that are refused."""
        client, version = made_shelf.open_client(shelf.page), ""
        for place, clip in enumerate(clips[number::2]):
            kind = ("name", "ignore", "name", "apart")[place % 4]
            form = {"do": kind, "of": CLIP + clip, "new": f"{('Left', 'Right')[number]} {place}"}
            answer = SimpleNamespace(text=OLD)
            while OLD in answer.text:
                if not version:
                    version = re.findall('name="version" value="([0-9]+)"', client.get("").text)[0]
                answer = client.post("change", data=form | {"version": version})
                if OLD in answer.text:  # else the page stays old
                    version = ""
            alone = "you selected all faces" in answer.text  # of an unknown person
            assert answer.status_code == 200 or alone, (form, answer.text)
            if not alone:
                wanted[clip] = {"name": form["new"], "ignore": None, "apart": ""}[kind]

    with futures.ThreadPoolExecutor() as pool:
        edits = [pool.submit(edit, number) for number in (0, 1)]
        for show in shows:  # in each call, a film is new
            show()
            shelf.who()
        assert [x.result() for x in edits] == [None, None]
    shelf.page.save()
    found, state = shelf.names(), made_shelf.decide(shelf.out).said
    assert {x[:8] for x in found} == {f"film_00{number}" for number in range(4)}
    for clip, name in wanted.items():
        # A face that was taken out of a person may get another name later.
        kept = clip in state.numbered or clip in state.denied
        assert kept if name == "" else found[clip] == name, (clip, name, found[clip])
    assert wanted and shelf.who() == found


def test_change_whose_names_cannot_be_decided_changes_nothing(shelf, monkeypatch):
    before, lines, decide = shelf.names(), log.read(shelf.out), actions.decide

    def fail_once(*args):
        monkeypatch.setattr(actions, "decide", decide)
        decide(*args)
        raise UserError("no names")

    for change in (("name", [shelf.people()[0]], "Zoe"), ("name", ["Ada"], "Eva")):
        monkeypatch.setattr(actions, "decide", fail_once)
        refused(lambda change=change: shelf.page.change(*change), "no names")
        assert log.read(shelf.out) == lines
        assert shelf.names() == before == shelf.later()
    shelf.page.change("name", ["Ada"], "Eva")
    assert "Ada" not in shelf.later().values()


def test_undo_keeps_what_another_program_has_changed(shelf):
    one, two, *_ = shelf.people()
    clips = shelf.clips(two)
    shelf.page.change("name", [one], "Zoe")
    actions.Review(shelf.out).change("name", [two], "Yan")
    shelf.who()
    actions.Review(shelf.out).change("name", ["Ada"], "Eva")
    shelf.page.undo()
    names = shelf.names()
    assert {names[clip] for clip in clips} == {"Yan"} and not {"Ada", "Zoe"} & {*names.values()}
    assert "Eva" in names.values() and shelf.who() == names


def test_film_that_was_encoded_again_takes_over_corrections_until_this_is_undone(shelf):
    features = shelf.out / FEATURES
    clip = next(x for x, name in shelf.names().items() if x.startswith("film_000") and name)
    shelf.page.change("name", keys([clip]), "Zoe")
    # The film has the same faces at the same times, but other bytes.
    film = media.read_media_file(features / media.VIDEOS / "film_000.json")
    film.source.path.rename(new := shelf.films / "again.mp4")
    with np.load(features / "film_000.npz") as arrays:
        content = {name: arrays[name] for name in arrays.files}
    content["clips"] = np.array([x.replace("film_000", "again") for x in content["clips"]])
    np.savez(features / "again.npz", **content)
    film.video, film.sha256, film.source = new.name, 64 * "9", media.FileStamp.of(new)
    for track in film.tracks:
        track.clip = track.clip.replace("film_000", "again")
    media.write(features / media.VIDEOS / "again.json", film)
    shelf.open()
    copy = clip.replace("film_000", "again")
    before, offer = (
        shelf.names(),
        "again.mp4 shows the same faces at the same times as film_000.mp4",
    )
    (key,) = re.findall(f'name="of" value="([0-9a-f ]+)".*{offer}', shelf.page.render(Forms()))
    shelf.page.change("take", [key])
    assert shelf.names()[copy] == "Zoe" and shelf.later() == shelf.names()
    page = shelf.page.render(Forms())
    assert f"Saved: {offer}, and has its corrections." in page and f"<p>{offer}. <" not in page
    refused(lambda: shelf.page.change("take", [key]), "no longer on the page")
    shelf.page.undo()
    assert shelf.names() == before and f"<p>{offer}. <" in shelf.page.render(Forms())


def test_another_person_who_gets_an_earlier_name_is_another_person(shelf):
    one, two, *_ = shelf.people()
    clips = {"Bea": shelf.clips(one), "Ana": shelf.clips(two)}
    for old, new in ((one, "Ana"), ("Ana", "Bea"), (two, "Ana")):
        shelf.page.change("name", [old], new)
    for names in (shelf.names(), shelf.who()):
        assert {name: [x for x, y in names.items() if y == name] for name in clips} == clips
    shelf.page.forget("Ana")  # of the two people, only the one who has the name now
    assert "Ana" not in (shelf.out / log.NAME).read_text()
    names = shelf.who()
    assert {names[clip] for clip in clips["Bea"]} == {"Bea"} and "Ana" not in names.values()


def test_message_says_that_another_face_of_the_shot_got_the_denied_name(tmp_path):
    shelf = Shelf(tmp_path, people=3, films=2, known=1, faces=6)
    # Two faces of one person are seen at the same time, as in a mirror.
    path = shelf.out / FEATURES / media.VIDEOS / "film_000.json"
    film, ada = media.read_media_file(path), made_shelf.name_person(0)
    first, second = (x for x in film.tracks if shelf.made.truth[x.clip] == ada)
    second.shot, second.start_s, second.end_s = first.shot, first.start_s, first.end_s
    media.write(path, film)
    shelf.open()
    (kept,) = {first.clip, second.clip} & {*shelf.clips(ada)}
    (twin,) = {first.clip, second.clip} - {kept}
    assert shelf.page._decision.twins == {twin: ada}
    shelf.page.change("apart", keys([kept]))
    assert shelf.names()[twin] == ada
    text = shelf.page.render(Forms())
    assert f"Yes, also {ada}</button>" not in text
    assert f"Another face of the same shot now has the name {ada}" in text
    shelf.page.undo()
    shelf.page.change("twin", keys([twin]))
    assert {shelf.names()[kept], shelf.names()[twin]} == {ada}


def test_suggested_name_that_a_user_refuses_is_not_suggested_again(tmp_path):
    shelf = Shelf(tmp_path, people=12, films=5, known=6, faces=12, wrong=0.5)
    page = shelf.page
    best = {clip: x.best for clip, x in page._decision.answers.items() if not x.identity}
    clip, name = next((c, pairs[0][0]) for c, pairs in sorted(best.items()) if len(pairs) > 1)
    client = made_shelf.open_client(page)
    assert client.get(f"{made_shelf.SITE}/favicon.ico").status_code == 204
    form = {"do": "name", "of": CLIP + clip, "version": str(page.version), "person": ""}
    form["not"], before = name, shelf.names()
    assert f"is not {name}." in client.post("change", data=form).text
    assert shelf.names() == before == shelf.later()
    assert name not in dict(page._decision.answers[clip].best)
    assert name not in dict(made_shelf.decide(shelf.out).answers[clip].best)
    page.undo()
    assert page._decision.answers[clip].best == best[clip]
    refused(lambda: page.change("deny", keys([clip]), "Zoe"), "reload the page")


def test_subtitles_have_the_names_of_their_films():
    names = {
        "/a/2019/IMG_1.MP4": "2019/IMG_1", "/a/2020/IMG_1.MOV": "2020/IMG_1",
        "/a/2020/only.mp4": "only", "/b/Twin.mp4": "Twin.mp4", "/b/twin.MOV": "twin.MOV",
        "/c/x/y.mp4": "c/x/y", "/d/x/y.mp4": "d/x/y", "/a/con.mp4": "con_",
    }  # fmt: skip
    videos: Any = [SimpleNamespace(path=PurePath(x)) for x in names]
    assert [str(x) for x in results._place_subtitles(videos)] == [*names.values()]


def test_subtitles_of_twins_are_replaced_and_files_of_others_stay(shelf):
    decision, folder = shelf.page._decision, shelf.out / "subtitles"
    twins = [msgspec.structs.replace(film) for film in decision.films[:2]]
    for year, film in zip(("2019", "2020"), twins, strict=True):
        film.source = msgspec.structs.replace(film.source, address=f"/films/{year}/IMG_1.mp4")
        film.video = "IMG_1.mp4"
    gallery, faces = shelf.page._gallery, decision.faces._replace(films=twins)
    empty = decision._replace(faces=faces, appearances=[], unknown={})
    results.write(shelf.out, gallery, empty)
    made = {str(x.relative_to(folder)) for x in folder.rglob("*.srt")}
    assert made == {"2019/IMG_1.srt", "2020/IMG_1.srt"}
    assert (folder / "2019").stat().st_mode & 0o777 == 0o700
    (folder / "2019" / "mine.txt").write_text("mine")
    results.write(shelf.out, gallery, decision)
    assert [x.name for x in (folder / "2019").iterdir()] == ["mine.txt"]
    assert not (folder / "2020").exists()


def test_page_shows_the_picture_of_a_face_from_the_film(drawn, read_here):
    film = drawn.film()
    drawn.who(film, drawn.group(), people=False)
    page = actions.Review(drawn.out)
    for clip in ("party.s001.t00", "group.f01"):
        picture = page.frame(clip)
        assert picture and picture.startswith(b"\xff\xd8\xff")
    assert page.frame("party.s009.t00") is None
    refused(lambda: still.read_still(drawn.out / "names.tsv", 0.0), "damaged or has an unknown")
    film.write_bytes(b"another file")
    assert page.frame("party.s001.t00") is None


def turn_faces(drawn, turns):
    """Replaces the detector by a detector that takes faces for turned by 90 degrees, `turns` times.

    The faces in the film of a lying person are turned once or three times.
    """
    points = made_nets.POINTS - 0.5
    for _ in range(turns):
        points = points[:, ::-1] * (1, -1)
    made_nets.write(drawn.models, "find", "face_detector", made_nets.detector(points=points + 0.5))


def test_films_that_are_upside_down_or_too_dark_are_reported(drawn, read_here):
    turn_faces(drawn, 2)
    evening, night = drawn.folder / "evening.mkv", drawn.folder / "night.mkv"
    for path, level in ((evening, 7), (night, 4)):  # of 255
        films.write(path, [np.full((96, 128, 3), level, np.uint8)] * 10, "ffv1", 10)
    drawn.befriend("Ada")
    _, output = drawn.who(drawn.film(), evening, night)
    assert "films that are too dark to find faces: 1, such as night.mkv" in output
    said = "films that are upside down, so that faces are missed: 1, such as party.mkv"
    assert said in output and "upside down" in (drawn.out / "names.html").read_text()


def test_film_with_lying_people_or_with_people_in_water_is_not_upside_down(drawn, monkeypatch):
    """In water, every second face is upside down, and some faces are not detected."""
    film, turned = drawn.film(), itertools.cycle(n in (1, 3, 5, 7) for n in range(9))
    for turns in (1, 3, 0):
        turn_faces(drawn, turns)
        if not turns:
            monkeypatch.setattr(
                align, "find_upside_down", lambda x: np.array([next(turned) for _ in x])
            )
        found, _ = extract(film, drawn.folder / f"{turns}", drawn.models)
        assert not found.upside_down and (turns or len(found.tracks) == 4)
