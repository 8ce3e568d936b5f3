"""From films and photos to names, with drawn people and nets that are made here."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import made_nets
from tests.helpers.drawn_people import (
    COLOURS,
    EMBED,
    tone,
    write_film,
    write_models,
    write_party,
    write_photo,
    write_voices,
)
from vidjax import main as main_lib
from vidjax import who
from vidjax.extract import folder, pipeline
from vidjax.gallery.gallery import Gallery

pytest.importorskip("av")
pytest.importorskip("onnxruntime")


@pytest.fixture
def models(tmp_path):
    return write_models(tmp_path / "models")


@pytest.fixture
def film(tmp_path):
    return write_party(tmp_path / "party.mkv")


def run(capsys, *words):
    code = main_lib.main([*map(str, words), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if code in (0, 1) else {}, said.err


def test_who_appears_when(tmp_path, models, film, capsys):
    for name in ("Ada", "Bob"):
        write_photo(tmp_path / "friends" / name / "1.png", (name, 40, 40))
    out = tmp_path / "out"
    flags = (f"--people={tmp_path / 'friends'}", f"--models={models}", f"--out={out}")
    code, content, _ = run(capsys, "who", film, *flags, "--workers=1")
    assert code == 0 and content["people"] == {"Ada": 1, "Bob": 1}
    rows = [json.loads(line) for line in (out / "names.jsonl").read_text().splitlines()]
    shown = [(row["identity"], round(row["start"]), round(row["end"])) for row in rows]
    assert shown == [("Ada", 0, 2), ("unknown 1", 2, 4), ("Ada", 4, 6), ("Bob", 4, 6)]
    assert rows[1]["probability"] is None and rows[0]["probability"] > 0.5
    vtt, srt = ((out / "subtitles" / f"party.{kind}").read_text() for kind in ("vtt", "srt"))
    assert vtt.startswith("WEBVTT\n") and srt.startswith("1\n00:00:00,000 --> 00:00:01,")
    assert vtt.count("-->") == srt.count("-->") == 2 and "\nAda\nBob\n" in vtt
    page = (out / "names.html").read_text()
    assert "party.mkv" in page and "<script" not in page and page.count('class="line') == 3
    assert os.stat(out).st_mode & 0o077 == 0


def test_unknown_people_keep_their_numbers_while_their_films_stay(tmp_path, models, capsys):
    """A call for other films, a film that goes, and a name that is given and taken back."""
    films = tmp_path / "films"
    films.mkdir()
    write_film(films / "b.mkv", (2, 20, [("Bob", 20, 30)]), (2, 60, [("Bob", 30, 30)]))
    flags = (f"--models={models}", f"--out={tmp_path / 'out'}")

    def numbers(*given):
        code, _, said = run(capsys, "who", *(given or [films]), *flags)
        assert code == 0, said
        rows = map(json.loads, (tmp_path / "out" / "names.jsonl").read_text().splitlines())
        return {row["clips"][0]: row["identity"] for row in rows}

    first = {"b.s000.t00": "unknown 1"}
    assert numbers() == first
    write_film(films / "a.mkv", *[(2, place, [("Eve", place, 30)]) for place in (20, 35, 60)])
    write_film(films / "c.mkv", (2, 20, [("Ada", 40, 40)]))
    more = {"a.s000.t00": "unknown 2", "c.s000.t00": "unknown 3"}
    assert numbers() == first | more
    assert numbers(films / "c.mkv") == {"c.s000.t00": "unknown 3"}
    assert numbers() == first | more
    table = tmp_path / "out" / "unknown.tsv"
    rows = table.read_text().splitlines()
    assert rows[0] == "clip\tidentity" and "a.s000.t00\tunknown 2" in rows
    table.write_text(table.read_text().replace("unknown 2", "Eve"))
    write_film(films / "d.mkv", (2, 20, [("Bob", 25, 30)]))
    assert numbers() == first | more | {"a.s000.t00": "Eve", "d.s000.t00": "unknown 1"}
    gallery = tmp_path / "out" / "gallery"
    assert run(capsys, "gallery", "remove", gallery, "--identity=Eve")[0] == 0
    assert numbers()["a.s000.t00"] == "unknown 2"
    # Another film of the same name is another film, and its clips have no number yet.
    write_film(films / "c.mkv", (2, 20, [("Bob", 40, 40)]))
    assert numbers()["c.s000.t00"] == "unknown 1"
    for path in (tmp_path / "out" / "features").rglob("a.*"):
        path.unlink()
    numbers(films / "b.mkv")
    kept = (tmp_path / "out" / "unknown.json").read_text()
    assert "b.s000" in kept and "a.s000" not in kept


def test_names_written_into_the_table_of_the_unknown_are_taken(tmp_path, models, film, capsys):
    out, table = tmp_path / "out", tmp_path / "out" / "unknown.tsv"
    write_photo(tmp_path / "friends" / "Ada.png", ("Ada", 40, 40))
    flags = (f"--people={tmp_path / 'friends'}", f"--models={models}", f"--out={out}")
    run(capsys, "who", film, *flags)
    assert table.read_text().splitlines()[1:] == [
        "party.s001.t00\tunknown 1", "party.s002.t01\tunknown 2",
    ]  # fmt: skip
    table.write_text(table.read_text().replace("unknown 2", "Bob") + "gone.s000.t00\tZoe\n")
    code, content, said = run(capsys, "who", film, *flags)
    assert code == 0 and content["people"] == {"Ada": 1, "Bob": 1} and content["groups"] == 1
    assert "Bob: named in unknown.tsv, 1 clip" in said and "gone.s000.t00" in said
    assert table.read_text() == "clip\tidentity\nparty.s001.t00\tunknown 1\n"
    shutil.rmtree(tmp_path / "friends")
    code, content, _ = run(capsys, "who", film, *flags[1:])
    assert content["people"] == {"Ada": 1, "Bob": 1}
    for wrong, message in {"party.s001.t00\n": "line 1", "party.s002.t01\tEve\n": "'Bob'"}.items():
        table.write_text(wrong)
        code, _, said = run(capsys, "who", film, *flags[1:])
        assert code == 2 and "unknown.tsv" in said and message in said
        assert len(said.splitlines()) <= 3 and table.read_text() == wrong


@pytest.mark.parametrize("earlier", [False, True], ids=["in films", "with the table to write"])
def test_a_name_that_a_call_took_before_it_was_cut_off_is_forgotten_with_the_person(
    tmp_path, models, film, capsys, monkeypatch, earlier
):
    people, out = tmp_path / "friends", tmp_path / "out"
    for name in ("Ada", "Bob"):
        write_photo(people / name / "1.png", (name, 40, 40))
    flags = (f"--people={people}", f"--models={models}", f"--out={out}")
    run(capsys, "who", film, *flags)
    table = out / "unknown.tsv"
    named = table.read_text().replace("unknown 1", "Ada") + "party.s000.t00\tEve\n"
    table.write_text(named)

    def extract(paths, to, real=pipeline.extract, **words):
        if to == out / "features":
            raise KeyboardInterrupt
        return real(paths, to, **words)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "extract", extract)
        assert run(capsys, "who", film, *flags)[0] == 130
    assert Gallery(out / "gallery").identities == {"Ada": 2, "Bob": 1, "Eve": 1}
    if earlier:
        table.write_text(named)
    shutil.rmtree(people / "Ada")
    code, content, _ = run(capsys, "who", film, *flags)
    assert code == 0 and content["people"] == {"Bob": 1, "Eve": 1}


def test_a_name_for_a_clip_of_a_film_that_was_replaced_is_not_taken(
    tmp_path, models, capsys, monkeypatch
):
    """Where a call was cut off, the table of the unknown is that of the film of before."""
    film, out, table = tmp_path / "c.mkv", tmp_path / "out", tmp_path / "out" / "unknown.tsv"
    flags = (f"--models={models}", f"--out={out}")

    def cut_off(*_):
        raise KeyboardInterrupt

    write_film(film, (2, 20, [("Bob", 20, 30)]))
    run(capsys, "who", film, *flags)
    write_film(film, (2, 20, [("Eve", 20, 30)]))
    with monkeypatch.context() as patch:
        patch.setattr(who, "_look", cut_off)
        assert run(capsys, "who", film, *flags)[0] == 130
    table.write_text(table.read_text().replace("unknown 1", "Bob"))
    code, content, said = run(capsys, "who", film, *flags)
    assert code == 0 and content["people"] == {} and "not there any more" in said
    # A clip of the new film has the name of an enrolled one of the old film.
    table.write_text(table.read_text().replace("unknown 1", "Eve"))
    assert run(capsys, "who", film, *flags)[1]["people"] == {"Eve": 1}
    write_film(film, (2, 20, [("Ada", 20, 30)]))
    run(capsys, "who", film, *flags)
    table.write_text(re.sub(r"unknown \d", "Ada", table.read_text()))
    code, content, said = run(capsys, "who", film, *flags)
    assert code == 0 and content["people"] == {"Ada": 1}, table.read_text()


def test_a_film_that_was_renamed_has_its_new_name_and_a_lost_photo_is_told(
    tmp_path, models, capsys
):
    film, out = tmp_path / "my film.mkv", tmp_path / "out"
    write_film(film, (2, 20, [("Bob", 20, 30)]))
    write_photo(tmp_path / "friends" / "Bob.png", ("Bob", 40, 40))
    write_photo(tmp_path / "friends" / "Ada" / "2020" / "1.png", ("Ada", 40, 40))
    flags = (f"--people={tmp_path / 'friends'}", f"--models={models}", f"--out={out}")
    _, content, said = run(capsys, "who", film, *flags)
    assert content["people"] == {"Bob": 1} and "Ada: no photo directly in" in said
    film.rename(tmp_path / "my_film.mkv")
    run(capsys, "who", tmp_path / "my_film.mkv", *flags)
    assert "my_film.mkv" in (out / "names.tsv").read_text()
    assert [*(out / "subtitles").iterdir()] != []
    assert {path.stem for path in (out / "subtitles").iterdir()} == {"my_film"}


@pytest.mark.slow
def test_names_stay_where_voices_are_added_to_the_models(tmp_path, models, capsys):
    film, out = tmp_path / "film.mkv", tmp_path / "out"
    write_film(
        film, (4, 20, [("Ada", 20, 30)]), (4, 60, [("Bob", 80, 50)]), (4, 35, [("Eve", 30, 20)]),
        sound=tone(440, 12),
    )  # fmt: skip
    for number in (1, 2):
        write_photo(tmp_path / "friends" / "Ada" / f"{number}.png", ("Ada", 30 + number, 40))
    flags = (f"--people={tmp_path / 'friends'}", f"--models={models}", f"--out={out}")

    def shown():
        code, _, said = run(capsys, "who", film, *flags)
        assert code == 0, said
        rows = map(json.loads, (out / "names.jsonl").read_text().splitlines())
        return {row["clips"][0]: (row["identity"], row["evidence"]) for row in rows}, said

    shown()
    gallery = str(out / "gallery")
    run(capsys, "gallery", "relabel", gallery, "--clip=people/Ada/2", "--strangers")
    table = out / "unknown.tsv"
    table.write_text(table.read_text().replace("unknown 1", "Bob"))
    before, _ = shown()
    assert before["film.s001.t00"] == ("Bob", ["told"])
    write_voices(models)
    after, said = shown()
    assert after == before and said.count("new in the models: audio: names stay") == 1
    clips = Gallery(gallery).clips
    assert clips["people/Ada/2"].identity is None and clips["film.s001.t00"].identity == "Bob"
    assert clips["film.s001.t00"].vector[made_nets.WIDTH :].any()  # its voice has come
    assert not clips["people/Ada/1"].vector[made_nets.WIDTH :].any()
    again, said = shown()
    assert again == before and "new in" not in said and "as before" in said
    for name in ("speech", "voice"):
        (models / f"{name}.json").unlink()
    code, _, said = run(capsys, "who", film, *flags)
    assert code == 2 and "other models of audio" in said


def test_a_second_call_reads_no_video_again(tmp_path, models, film, capsys, monkeypatch):
    write_photo(tmp_path / "friends" / "Ada.png", ("Ada", 40, 40))
    flags = (f"--people={tmp_path / 'friends'}", f"--models={models}", f"--out={tmp_path / 'out'}")
    _, first, _ = run(capsys, "who", film, *flags)
    before = (tmp_path / "out" / "names.tsv").read_bytes()
    monkeypatch.setattr(pipeline, "child", None)
    _, second, said = run(capsys, "who", film, *flags)
    assert first == second and "as before" in said
    assert (tmp_path / "out" / "names.tsv").read_bytes() == before


def test_photos_that_do_not_show_one_face_are_named(tmp_path, models, film, capsys):
    people = tmp_path / "friends" / "Ada"
    write_photo(people / "none.png")
    write_photo(people / "two.png", ("Ada", 20, 20), ("Bob", 80, 60))
    flags = (f"--people={people.parent}", f"--models={models}", f"--out={tmp_path / 'out'}")
    code, _, said = run(capsys, "who", film, *flags)
    assert code == 2
    assert "no face is found" in said and "2 faces are found" in said
    assert "Ada is not looked for" in said and "nobody to look for" in said
    write_photo(people.parent / "Bob.png", ("Bob", 20, 20))
    code, content, _ = run(capsys, "who", film, *flags)
    assert code == 1 and content["people"] == {"Bob": 1}
    (people.parent / "Bob.png").unlink()
    write_photo(people / "one.png", ("Ada", 20, 20))
    write_photo(people / "poor.png", ("Ada", 20, 20), dim=True)
    code, content, said = run(capsys, "who", film, *flags)
    assert code == 1 and content["people"] == {"Ada": 2} and len(content["failed"]) == 2
    assert f"{people / 'poor.png'}: a poor face, quality 0.003 of 1" in said
    assert len([line for line in said.splitlines() if str(people) in line]) == 3


def test_what_a_person_says_of_a_clip_counts(tmp_path, models, film, capsys):
    """A clip that was enrolled shows whom its label says; a relabelled photo keeps its label."""
    for name in ("Ada", "Bob"):
        for place in (30, 50):
            write_photo(tmp_path / "friends" / name / f"{place}.png", (name, place, 40))
    out = tmp_path / "out"
    flags = (f"--people={tmp_path / 'friends'}", f"--models={models}", f"--out={out}")

    def who():
        code, _, said = run(capsys, "who", film, *flags)
        assert code == 0, said
        rows = map(json.loads, (out / "names.jsonl").read_text().splitlines())
        return {clip: (row["identity"], row["evidence"]) for row in rows for clip in row["clips"]}

    def say(command, *words):
        assert main_lib.main(["gallery", command, str(out / "gallery"), *words]) == 0
        capsys.readouterr()

    before = who()
    assert before["party.s000.t00"] == ("Ada", ["face"])
    clip = f"--input={out / 'features' / 'party.s000.t00.npz'}"
    say("enrol", clip, "--identity=Bob")
    assert who()["party.s000.t00"] == ("Bob", ["told"])
    say("remove", "--clip=party.s000.t00")
    assert who() == before
    say("enrol", clip, "--strangers")
    assert who()["party.s000.t00"] == (None, [])
    say("relabel", "--clip=party.s000.t00", "--identity=Ada")
    assert who()["party.s000.t00"] == ("Ada", ["told"])
    say("relabel", "--clip=people/Bob/30", "--identity=Ada")
    who()
    shown = {name: one.identity for name, one in Gallery(out / "gallery").clips.items()}
    assert shown.pop("people/Bob/30") == "Ada" and shown["people/Bob/50"] == "Bob"
    shutil.rmtree(tmp_path / "friends" / "Bob")
    who()
    assert {*Gallery(out / "gallery").identities} == {"Ada"}
    shutil.rmtree(tmp_path / "friends" / "Ada")
    write_photo(tmp_path / "friends" / "Bob.png", ("Bob", 30, 40))
    who()
    assert {*Gallery(out / "gallery").identities} == {"Bob"}, "with the clip that was told"


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_enrol_tells_photos_that_do_not_help(tmp_path, models, capsys, whole):
    photos, people = tmp_path / "photos", tmp_path / "people"
    write_photo(photos / "none.png")
    write_photo(photos / "two.png", ("Ada", 20, 20), ("Bob", 80, 60))
    write_photo(photos / "one.png", ("Ada", 20, 20))
    write_photo(photos / "poor.png", ("Ada", 20, 20), dim=True)
    pipeline.extract([photos], people / "Ada", models)
    g = str(tmp_path / "g")
    assert main_lib.main(["gallery", "create", g, f"--models={models}"]) == 0
    words = (f"--input={people}",) if whole else (f"--input={people / 'Ada'}", "--identity=Ada")
    with pytest.warns(UserWarning, match="face") as told:
        assert main_lib.main(["gallery", "enrol", g, *words]) == 0
    assert [str(one.message) for one in told] == [
        f"{people / 'Ada' / name}.png: {problem}"
        for name, problem in {
            "none": "no face is found: give a photo of one person alone",
            "poor": "a poor face, quality 0.003 of 1: a larger or sharper one from the front helps",
            "two": "2 faces are found: give a photo of one person alone",
        }.items()
    ]
    prefix = "Ada/" if whole else ""
    assert {*Gallery(g).clips} == {f"{prefix}one", f"{prefix}poor"}
    words = (f"--input={people / 'Ada' / 'two.f02.npz'}", "--identity=Bob")
    assert main_lib.main(["gallery", "enrol", g, *words]) == 0  # one of two faces, by its name
    assert Gallery(g).identities == {"Ada": 2, "Bob": 1}


def test_enrol_judges_only_clips_that_it_was_given(tmp_path, models, capsys):
    """One of two faces was deleted; a strangers' folder names a file that is no clip of it."""
    photos, made, g = tmp_path / "photos", tmp_path / "made", str(tmp_path / "g")
    write_photo(photos / "two.png", ("Ada", 20, 20), ("Bob", 80, 60))
    write_photo(photos / "odd.png", ("Ada", 20, 20))
    pipeline.extract([photos], made, models)
    (made / "two.f02.npz").unlink()
    np.savez(made / ".x.npz", face=np.ones((1, made_nets.WIDTH)), face_quality=np.zeros(0))
    told = made / "videos" / "odd.json"
    odd = json.loads(told.read_text())
    odd["tracks"][0]["clip"] = ".x"
    told.write_text(json.dumps(odd))
    assert main_lib.main(["gallery", "create", g, f"--models={models}"]) == 0
    with pytest.warns(UserWarning, match=r"odd\.png: no face"):
        assert main_lib.main(["gallery", "enrol", g, f"--input={made}", "--identity=Ada"]) == 0
    assert {*Gallery(g).clips} == {"odd", "two.f01"}


def pictures_of(page):
    """Returns the pictures of a page by the words for them, as [H, W, 3] in the order shown."""
    import av

    found = {}
    for source, words in re.findall(
        r'<img src="data:image/png;base64,([^"]+)" alt="([^"]*)"', page
    ):
        with av.open(io.BytesIO(base64.b64decode(source)), "r") as file:
            (frame,) = file.decode(video=0)
        found.setdefault(words, []).append(frame.to_ndarray(format="rgb24"))
    assert page.count("<img") == sum(map(len, found.values()))
    return found


def shows(picture):
    """Returns whose face a picture shows, by the colour of its middle."""
    height, width = picture.shape[:2]
    middle = picture[height // 3 : -height // 3, width // 3 : -width // 3].mean((0, 1))
    return min(COLOURS, key=lambda name: np.abs(middle - COLOURS[name]).sum())


@pytest.mark.slow
def test_thumbnails_are_there_where_asked_for_and_go_with_the_person(
    tmp_path, models, film, capsys
):
    people, out = tmp_path / "friends", tmp_path / "out"
    for name in ("Ada", "Bob"):
        write_photo(people / name / "1.png", (name, 40, 40))
    flags = (f"--people={people}", f"--models={models}", f"--out={out}")

    def pictures():
        return sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))

    run(capsys, "who", film, *flags)
    assert not pictures() and "<img" not in (out / "names.html").read_text()
    features = {path.name: path.read_bytes() for path in (out / "features").glob("*.npz")}

    code, _, said = run(capsys, "who", film, *flags, "--thumbnails")
    assert code == 0 and "as before" not in said
    found = [f"features/thumbnails/party/{name[:-4]}.png" for name in sorted(features)]
    assert pictures() == [*found, *(f"people/{n}/thumbnails/1/1.png" for n in ("Ada", "Bob"))]
    assert {path.name: path.read_bytes() for path in (out / "features").glob("*.npz")} == features
    for path in out.rglob("thumbnails"):
        assert path.stat().st_mode & 0o777 == 0o700
        assert all(one.stat().st_mode & 0o777 == 0o700 for one in path.iterdir())
        assert all(one.stat().st_mode & 0o777 == 0o600 for one in path.rglob("*.png"))
    page = out / "names.html"
    assert page.stat().st_mode & 0o777 == 0o600
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.read_text()
    found = pictures_of(page.read_text())
    assert {words: sorted(map(shows, some)) for words, some in found.items()} == {
        "0:00": ["Ada"], "0:02": ["Eve"], "0:04": ["Ada", "Bob"], "Ada": ["Ada"], "Bob": ["Bob"],
    }  # fmt: skip
    before = page.read_bytes()
    _, _, said = run(capsys, "who", film, *flags, "--thumbnails")
    assert "party.mkv: 6.0 s, 3 shots, 4 faces, as before" in said and page.read_bytes() == before

    shutil.rmtree(people / "Ada")
    run(capsys, "who", film, *flags, "--thumbnails")
    assert not [path for path in pictures() if path.startswith("people/Ada")]
    assert {*pictures_of(page.read_text())} == {"0:00", "0:02", "0:04", "Bob"}
    run(capsys, "who", film, *flags)
    assert not pictures() and not list(out.rglob("thumbnails")) and b"<img" not in page.read_bytes()


def test_a_page_does_not_outlive_a_person_in_a_call_that_fails(tmp_path, models, film, capsys):
    people, out = tmp_path / "friends", tmp_path / "out"
    for name in ("Ada", "Bob"):
        write_photo(people / name / "1.png", (name, 40, 40))
    flags = (f"--people={people}", f"--models={models}", f"--out={out}")
    run(capsys, "who", film, *flags, "--thumbnails")
    shutil.rmtree(people / "Ada")
    (out / "features" / "extract.json").write_text("damaged")
    code, _, _ = run(capsys, "who", film, *flags)
    assert code == 2
    named = [path for path in out.rglob("*") if path.is_file() and b"Ada" in path.read_bytes()]
    assert not named and not list(out.rglob("names.*"))


def test_a_file_that_cannot_be_read_costs_itself_alone(tmp_path, models, film, capsys):
    (tmp_path / "bad.mp4").write_bytes(b"ffconcat version 1.0\nfile party.mkv\n")
    out = tmp_path / "features"
    code, content, said = run(
        capsys, "extract", tmp_path / "bad.mp4", film, f"--out={out}", f"--models={models}"
    )
    assert code == 1 and content["failed"] == [str(tmp_path / "bad.mp4")] and content["files"] == 1
    assert (
        len([line for line in said.splitlines() if "bad.mp4" in line]) == 1
        and "is no video" in said
    )
    (tmp_path / "worse.mp4").write_text("no film")
    words = [tmp_path / "bad.mp4", tmp_path / "worse.mp4", f"--out={out}", f"--models={models}"]
    assert main_lib.main(["extract", *map(str, words)]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 2 and said.out.count("give MP4, MKV") == 1
    assert [one.video for one in folder.read_films(out)] == ["party.mkv"]


def test_one_and_two_processes_write_the_same_bytes(tmp_path, models, film):
    other = tmp_path / "other.mkv"
    write_film(other, (1.5, 40, [("Bob", 30, 30)]))
    for workers in (1, 2):
        pipeline.extract([film, other], tmp_path / f"by{workers}", models, workers=workers)
    one, two = (
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path / "by1", tmp_path / "by2")
    )
    assert {path: one[path] for path in one if path.name != ".lock"} == {
        path: two[path] for path in two if path.name != ".lock"
    }


def test_a_cut_off_extraction_goes_on(tmp_path, models, film):
    out = tmp_path / "out"
    pipeline.extract([film], out, models, thumbnails=True)

    def written():
        paths = [*out.glob("*.npz"), *out.rglob("*.png")]
        return {str(path): path.read_bytes() for path in paths}

    whole = written()
    assert len(whole) == 8
    (out / "thumbnails" / "party" / "of a cut-off call.png").write_bytes(b"")
    (out / "videos" / "party.json").unlink()  # written last
    (out / "party.s000.t00.npz").unlink()
    (out / "party.s007.t00.npz").write_bytes(b"of a cut-off call")
    (out / ".extract-0badc0de").mkdir()
    pipeline.extract([film], out, models, thumbnails=True)
    assert written() == whole
    shutil.rmtree(out / "thumbnails" / "party")
    pipeline.extract([film], out, models, thumbnails=True)
    assert written() == whole
    assert not (out / ".extract-0badc0de").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": folder.Settings(fps=2.0)}, "other settings .fps: 5.0, not 2.0"),
        ({"models": "other"}, "features of another face_embedder"),
    ],
)
def test_a_folder_has_one_kind_of_features(tmp_path, models, film, change, message):
    pipeline.extract([film], tmp_path / "out", models)
    if "models" in change:
        made_nets.write(models, "embed", notes="another card", **EMBED)
        change = {}
    with pytest.raises(ValueError, match=message):
        pipeline.extract([film], tmp_path / "out", models, **change)


def test_features_of_another_net_are_refused_by_a_gallery(tmp_path, models, film, capsys):
    pipeline.extract([film], tmp_path / "features", models)
    card = json.loads((models / "embed.json").read_text())
    made_nets.write(models, "embed", back_end=card["back_end"], **EMBED, notes="another")
    assert main_lib.main(["gallery", "create", str(tmp_path / "g"), f"--models={models}"]) == 0
    words = ["gallery", "enrol", str(tmp_path / "g"), f"--input={tmp_path / 'features'}"]
    assert main_lib.main([*words, "--identity=Ada"]) == 2
    assert "of another model than the gallery's" in capsys.readouterr().err


def test_files_of_one_name_keep_apart(tmp_path, models, film):
    twin = tmp_path / "elsewhere" / "party.mkv"
    twin.parent.mkdir()
    write_film(twin, (1.5, 40, [("Bob", 30, 30)]))
    outcomes = pipeline.extract([film, twin], tmp_path / "out", models)
    videos = [outcome.film.video for outcome in outcomes if outcome.film]
    assert videos[0] == "party.mkv" and videos[1].startswith("party~")
    assert len(list((tmp_path / "out").glob("*.npz"))) == 5
    again = pipeline.extract([film, twin], tmp_path / "out", models)
    assert all(outcome.kept for outcome in again)


def test_commands_tell_mistakes(tmp_path, models, capsys):
    for words, message in {
        ("who",): "who needs",
        ("extract", "--out=x", f"--models={models}"): "extract needs FILE",
        ("extract", "none.mp4", "--out=x", f"--models={models}"): "no such file",
        ("extract", str(Path(__file__)), "--out=x", "--models=none"): "no such folder of nets",
        ("extract", str(Path(__file__)), f"--models={models}", "--out=x", "--fps=0"): "above 0",
        (
            "extract",
            str(Path(__file__)),
            f"--models={models}",
            "--out=x",
            "--size=1",
        ): "32 to 8,192",
    }.items():
        assert main_lib.main([*words]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) <= 3, said
