"""`vidjax forget` lists every place of a person, and deletes galleries and records."""

import fcntl
import functools
import gzip
import html
import json
import os
import shutil
import stat
import subprocess
import time
import unicodedata
import urllib.parse
import zipfile
from pathlib import Path
from typing import Any

import markupsafe
import msgspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import vidjax
from tests.helpers import clip_files, drawn_people, limits, made_galleries, made_shelf, servers
from tests.helpers.limits import file_limit
from vidjax.apps import forget as traces
from vidjax.apps.gallery import gallery as gallery_lib
from vidjax.apps.gallery.store import VectorOrigin
from vidjax.apps.video import actions, cuts, log, media
from vidjax.apps.video.log import Line
from vidjax.data import store
from vidjax.utils import files, tables

pytestmark = pytest.mark.usefixtures("read_here")
GONE = "Ada Lovelace"
# Names that may touch other letters, because these languages lack blanks or have particles.
TOUCHED = {"李小龙": "我喜欢李小龙的电影", "김연아": "이김연아는"}
ODD = ["Zoë O'Brien", 'a "b" $(id) `id` \\', "-e --x ;", "Zoe\u0308 & Co <x>", "x {} !"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Every call searches the cache. Other tests fill the common cache at the same time."""
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def places(say):
    """Returns a function: words -> path -> (kind, remedy) of the places that `forget` lists.

    The command must end with the exit code `code`: 1 if there are places, 0 if not.
    """

    def find(*words, code=1):
        listed = say("forget", *words, "--json", code=code)["places"]
        return {place["path"]: (place["kind"], place["remedy"]) for place in listed}

    return find


def lines(*texts):
    return np.frombuffer("\n".join(texts).encode(), np.uint8)


def converted(folder, *clips):
    """Writes a folder like the stored clips of a cache, which contain the names of some clips."""
    arrays: Any = {"train/clips": lines(*clips)}
    with store.exclusive(folder), files.atomic_folder(folder) as partial:
        (partial / "manifest.json").write_text("{}")
        np.savez(partial / "index.npz", **arrays)


def make_run(folder, identities=(), *, clips=("x", "y"), wrong_clip="x"):
    """Writes a folder like a run: with names of people, of training clips, and of a wrong clip."""
    folder.mkdir(parents=True)
    (folder / "identities.json").write_text(json.dumps(identities))
    facts = json.dumps({"wrong_clips": [{"clip": wrong_clip}]})
    np.savez_compressed(folder / "members.npz", clips=lines(*clips))
    np.savez_compressed(folder / "analysis.npz", facts=lines(facts))


def make_who(folder, person, named, denied="x"):
    """Writes results of `vidjax who`: with a named person, a name in a table, and a denied name."""
    shelf = made_shelf.make(
        folder.with_name(f".{folder.name}"), people=2, films=1, known=0, faces=2
    )
    shutil.move(shelf.out, folder)
    page, keys = actions.Review(folder), (log.make_key(), log.make_key())
    lines = [Line(says="person", person=keys[0], name=person)]
    lines += [Line(says="person", person=keys[1], name=denied)]
    faces = [face for film in page._decision.films for face in film.faces.values()]
    lines += [log.about(faces[0], "is", person=keys[0]), log.about(faces[1], "not", person=keys[1])]
    log.append(folder, lines)
    (folder / "names.tsv").write_text(
        tables.to_text([("video", "identity"), ("x.mp4", named)], ".tsv")
    )


@pytest.fixture
def world(tmp_path):
    """A folder with places of GONE and of others. In the gallery `g`, GONE has the clip `ada 1`."""
    fitted = {"ada 1": made_galleries.make_clip(9001, GONE)._replace(fitted=True)}
    made_galleries.make(tmp_path / "g", made_galleries.make_clips() | fitted)
    made_galleries.make(tmp_path / "others")
    converted(tmp_path / "cache" / "arrays" / "without", "ada 11", "x")
    converted(tmp_path / "cache" / "arrays" / "with", "ada 1", "x")
    make_run(tmp_path / "runs" / "identity", ["x", GONE])
    make_run(tmp_path / "runs" / "clip", clips=("x", "ada 1"))
    make_run(tmp_path / "runs" / "analysis", wrong_clip="ada 1")
    make_run(tmp_path / "runs" / "others")
    state = tmp_path / "runs" / "checkpoint" / "checkpoints" / "5" / "state"
    (state / "members").mkdir(parents=True)
    (state / "members" / "data.json").write_text('{"clips": ["x", "ada 1"], "members": [[0]]}')
    (tmp_path / "for import").mkdir()
    (tmp_path / "for import" / "export.json").write_text("{}")
    lists = {"identities": ["x"], "members": {"clips": ["ada 1"]}, "config": {"x": "Eve"}}
    (tmp_path / "for import" / "checkpoint.json").write_text(json.dumps(lists))
    make_run(tmp_path / "exported", ["x", GONE])
    (tmp_path / "exported" / "export.json").write_text("{}")
    origin = VectorOrigin(str(tmp_path / "runs" / "identity"), "0" * 64, centred=False)
    made_galleries.make(tmp_path / "of a run", origin=origin)
    make_who(tmp_path / "photos", GONE, "Eve")
    make_who(tmp_path / "named", "Eve", GONE)
    make_who(tmp_path / "denied", "Eve", "Eve", GONE)
    return tmp_path


def test_nobody_else_may_read_records_or_a_gallery(world):
    gallery, records = world / "g", world / "cache" / "arrays" / "with"
    for path in (gallery, *gallery.iterdir(), records.parent, records, records / "index.npz"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_forget_lists_all_places_and_deletes_galleries_and_records(world, say, places, monkeypatch):
    monkeypatch.setattr(gallery_lib, "LOCK_SECONDS", 0.1)  # for another process
    people, others = (vidjax.Gallery(world / name) for name in ("g", "others"))
    before = made_galleries.contents(others.folder)
    records = world / "cache" / "arrays"
    listed = places(f"--identity={GONE}", world)
    assert {str(Path(path).relative_to(world)): kind for path, (kind, _) in listed.items()} == {
        "g": "gallery", "of a run": "gallery", "cache/arrays/with": "records",
        **dict.fromkeys(("exported", "for import"), "export"),
        **dict.fromkeys(("photos", "named", "denied"), "who"),
        **dict.fromkeys(("runs/identity", "runs/clip", "runs/analysis", "runs/checkpoint"), "run"),
    }  # fmt: skip
    assert "with a new run" in listed[str(world / "of a run")][1]
    assert GONE in people.identities  # nothing is deleted without --delete
    # On a full disk, and while another process changes the gallery, only records are deleted.
    for name, fault in {"1": file_limit(5000), "2": people._store.open(write=True)}.items():
        converted(records / name, "ada 1", "x")
        with fault:
            listed = places(f"--identity={GONE}", "--delete", world)
        assert listed[str(people.folder)] == ("gallery", "repair this, then run the command again")
        assert listed[str(records / name)][1].startswith("deleted")
    assert (records / "without").exists()
    listed = places(f"--identity={GONE}", "--delete", world)
    deleted = {path for path, (_, remedy) in listed.items() if remedy.startswith("deleted")}
    assert deleted == {str(people.folder)}  # the records are already deleted
    people.refresh()
    assert GONE not in people.identities and made_galleries.contents(others.folder) == before
    # Four runs, a gallery of a run and two exports are left, for the user to change. `--clip` is
    # needed, because the gallery no longer knows the clip of GONE.
    text = say("forget", f"--identity={GONE}", "--clip=ada 1", "--delete", world, code=1)
    assert "places      7, 0 of them deleted" in text and "train without them" in text


def test_forget_finds_the_clips_and_people_of_a_trained_run(nearest_run, places):
    for words in ("--clip=IQIYI_VID_TRAIN_0000000", "--identity=12"):
        assert [kind for kind, _ in places(words, nearest_run).values()] == ["run"]


def test_forget_searches_the_cache_wherever_it_is(tmp_path, places, monkeypatch):
    records, place = tmp_path / "elsewhere" / "arrays" / "with", tmp_path / "place"
    converted(records, "ada 1", "x")
    place.mkdir()
    (place / "notes.txt").touch()  # an empty folder may be a drive that is not connected
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "elsewhere"))
    wanted = {str(records): ("records", "--delete")}
    for words in ([place], [tmp_path], [place, tmp_path / "elsewhere"]):
        assert places("--clip=ada 1", *words) == wanted
    monkeypatch.chdir(place)
    assert places("--clip=ada 1") == wanted
    deleted = places("--clip=ada 1", "--delete", place, code=0)
    assert deleted[str(records)][1].startswith("deleted") and not records.exists()


def test_forget_finds_names_in_contents_but_not_in_paths_of_other_programs(tmp_path, places):
    photos = tmp_path / "photos"
    (photos / GONE).mkdir(parents=True)
    texts = {"names.tsv": f"x.mp4\t{GONE}\n", "r.txt": "Ada%20Lovelace x\n", "u": GONE.upper()}
    # The first has a part of the name and another name. The letters of a picture are no name.
    picture = '<img src="data:image/png;base64,AA/Eve/AA==" alt="">'
    others = {"other.txt": "Ada\nAda Lovelaces\n", "names.html": picture}
    for name, text in (texts | others).items():
        (tmp_path / name).write_text(text)
    (tmp_path / f"{GONE}.jpg").touch()
    tag = f"<rdf:li>{GONE}</rdf:li>".encode()
    (photos / "tagged.jpg").write_bytes(b"\xff\xd8\0" + tag + b"\0\xff" * 99)
    (photos / "other.jpg").write_bytes(b"\xff\xd8\0Ada\0Lovelace\0")
    assert places("--identity=Eve", tmp_path, code=0) == {}
    os.mkfifo(tmp_path / "pipe")  # to read the pipe or the link would never end
    (tmp_path / "link").symlink_to("/dev/zero")
    (photos / f"{GONE}.png").symlink_to("/dev/zero")
    listed = map(Path, places(f"--identity={GONE}", tmp_path))
    assert {str(x.relative_to(tmp_path)) for x in listed} == {*texts, "photos/tagged.jpg"}


@pytest.mark.parametrize("name", [*ODD, *TOUCHED, "José Müller"])
def test_forget_finds_names_with_any_letters_in_each_format(name, tmp_path, places):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    texts = {
        "a.html": html.escape(name), "b.html": str(markupsafe.escape(name)),
        "c.json": json.dumps({"x": [name]}), "d.csv": tables.to_text([("x", name)], ".csv"),
        "e.vtt": html.escape(name, quote=False), "f.txt": name,
        "g.txt": unicodedata.normalize("NFD", name), "h.txt": TOUCHED.get(name, name),
        "i.json": json.dumps(TOUCHED.get(name, name)), "j.rttm": "_".join(name.split()),
        "k": name, "l.md": f"# {name}\n",
    }  # fmt: skip
    for file, text in (texts | {"z.txt": "another person"}).items():
        (folder / file).write_text(text)
    assert sorted(Path(path).name for path in places(f"--identity={name}", folder)) == [*texts]


def make_copy(number, owner):
    """Returns a clip with the vector of the clip `number` of GONE, as a clip of `owner`."""
    return made_galleries.make_clip(number, GONE)._replace(identity=owner)


def test_forget_lists_clips_with_equal_vectors_or_names_but_keeps_them(tmp_path, say):
    """The clips may show another person. A part of a vector that is 0 identifies nobody."""
    silent = made_galleries.make_clip(8, "Eve", lacks="audio")
    gone = {"ada 1": make_copy(1, GONE), "silent": made_galleries.make_clip(9, GONE, lacks="audio")}
    gone["son 1"] = make_copy(1, f"{GONE} Junior")  # another person of the same gallery
    made_galleries.make(tmp_path / "g", gone)
    others = {
        "bob 1": make_copy(1, "Bob"), "ada 1": make_copy(7, "Bob"), "no voice": silent,
        "short": make_copy(1, "LOVELACE, A."), "stranger": make_copy(1, None),
    }  # fmt: skip
    other = made_galleries.make(tmp_path / "other", others)
    before = (other.folder / "gallery.sqlite").read_bytes()
    for flags in ([], ["--delete"]):
        text = say("forget", f"--identity={GONE}", *flags, tmp_path, code=1)
        assert "'ada 1', 'bob 1', 'short', 'stranger'\n" in text and "in 'son 1'\n" in text
        assert "vidjax gallery remove GALLERY --clip=NAME" in text and "no voice" not in text
    assert (other.folder / "gallery.sqlite").read_bytes() == before
    assert vidjax.Gallery(tmp_path / "g").clips.keys() == {"son 1"}
    say("gallery", "remove", other.folder, "--clip=bob 1")
    other.refresh()
    assert other.clips.keys() == others.keys() - {"bob 1"}


def test_forget_deletes_the_files_that_killed_processes_have_left(tmp_path, places):
    """The first is of a conversion: it has features of its clips, but not yet their names."""
    folder = tmp_path / "cache" / "arrays" / f"{'0' * 20}.12345678.partial"
    (folder / "staging").mkdir(parents=True)
    (folder / "staging" / "features.bin").write_bytes(b"features of somebody")
    make_who(tmp_path / "who", "Eve", "Eve")
    page = tmp_path / "who" / ".names.html.0123abcd.partial"
    page.write_text(f"<p>{html.escape(GONE)}")
    (tmp_path / "own.partial").write_text(GONE)  # a file of another program
    own = {str(tmp_path / "own.partial"): ("file", "look at it, and delete it or the name in it")}
    find = functools.partial(places, f"--identity={GONE}", tmp_path)
    assert find() == {str(folder): ("records", "--delete"), str(page): ("file", "--delete")} | own
    with page.open() as written:
        fcntl.flock(written, fcntl.LOCK_EX)  # as a living process does
        deleted = find("--delete")
        assert "another program writes it" in deleted[str(page)][1] and page.exists()
    assert deleted[str(folder)] == ("records", "deleted") and not folder.exists()
    assert find("--delete") == {str(page): ("file", "deleted")} | own
    assert find() == own and (tmp_path / "who" / "names.tsv").exists()


def test_forget_finds_only_whole_names_but_ignores_the_ending_of_a_clip(tmp_path, places):
    make_run(tmp_path / "run", [GONE])
    (tmp_path / "run" / "ranking.txt").write_text("Ada%20Lovelace clip%201.mp4 x.mp4\n")
    made_galleries.make(tmp_path / "g", {"a": made_galleries.make_clip(1, GONE)})
    make_who(tmp_path / "who", GONE, GONE)
    assert len(places(f"--identity={GONE}", tmp_path)) == 3  # run, g and who
    assert len(places("--clip=clip 1", tmp_path)) == 1  # run
    assert places("--identity=Ada", tmp_path, code=0) == {}
    for name in ('Ada "Q" L', "=Ada"):  # names.tsv stores them with more quotation marks
        make_who(tmp_path / name[-1], "Eve", name)
        assert len(places(f"--identity={name}", tmp_path)) == 1
    (tmp_path / "own/monday").mkdir(parents=True)  # the clip monday/c1 is in a folder of a split
    (tmp_path / "own/monday/c1.npz").write_bytes((tmp_path / "run/members.npz").read_bytes())
    (found,) = places("--clip=monday/c1", tmp_path / "own")
    assert found.endswith("monday/c1.npz")
    assert places("--clip=tuesday/c1", tmp_path / "own", code=0) == {}
    for clip in ("c1", "c1.mp4"):  # a server keeps the ending
        made_galleries.make(tmp_path / clip, {clip: made_galleries.make_clip(1, GONE)})
        for searched in ("c1", "c1.mp4"):
            assert len(places(f"--clip={searched}", tmp_path / clip)) == 1


def test_forget_reports_similar_names_and_refuses_impossible_names(tmp_path, say):
    make_run(tmp_path / "run", [GONE])
    for name in ("Ada Lovlace", "Ada\u200b Lovelace"):  # \u200b has no width
        assert f"'{GONE}' looks similar to" in say("forget", f"--identity={name}", tmp_path)
    make_run(tmp_path / "other", ["ada  LOVELACE"])
    text = say("forget", f"--identity={GONE}", tmp_path, code=1)
    assert "'ada  LOVELACE' looks similar to" in text
    for flag in ("--identity=", "--identity= ", "--clip=.mp4", "--clip=a\nb"):
        say("forget", flag, tmp_path, code=2)
    assert "as PLACE" in say("forget", "--clip=x", tmp_path / "absent", code=2)


def test_forget_lists_places_that_it_cannot_read(tmp_path, places, monkeypatch):
    """A damaged gallery, a folder without permission, and a run with a link cannot be read."""
    unreadable = [tmp_path / name for name in ("g", "closed", "run")]
    for folder in unreadable:
        folder.mkdir()
    (tmp_path / "g" / "gallery.sqlite").write_bytes(b"x")
    (tmp_path / "run" / "identities.json").symlink_to("/etc/passwd")
    (tmp_path / "link").symlink_to("/")  # is not followed

    def scandir(path, real=os.scandir):
        if str(path).endswith("closed"):  # chmod would not keep root out
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    unread = dict.fromkeys(map(str, unreadable), ("unread", "search it yourself"))
    assert places("--clip=some clip", tmp_path) == unread


def test_forget_finds_files_by_the_vectors_of_clips_with_short_names(tmp_path, places):
    """The clip of a photo is called `1`, which nearly every file contains."""
    clips = {"1": made_galleries.make_clip(1, GONE), "2": made_galleries.make_clip(2, "Eve")}
    gallery = made_galleries.make(tmp_path / "g", clips)
    gone, other = (gallery.backend.split(clips[name].vector[None])[0] for name in clips)
    out = tmp_path / "files"
    out.mkdir()
    for kind in (np.float16, np.float32, np.float64):
        np.savez(out / f"{kind.__name__}.npz", x=3 * gone.astype(kind))
    np.savez(out / "mean.npz", x=np.concatenate([gone + 0.1, gone - 0.1]))
    found = {path.name for path in out.iterdir()}
    clip_files.write_parquet(out / "1.parquet", {"1": {"face": gone}})
    shutil.copy(gallery.folder / "gallery.sqlite", out / "copy")
    found |= {"1.parquet", "copy"}
    np.savez(out / "other.npz", x=other)
    clip_files.write_parquet(out / "other.parquet", {"1": {"face": other}})
    (out / "answers.tsv").write_text("clip\tidentity\n1\tAda\n2\tAda Lovelace King\n")
    kinds = places(f"--identity={GONE}", tmp_path)
    assert {Path(path).name for path, (kind, _) in kinds.items() if kind == "file"} == found
    deleted = places(f"--identity={GONE}", "--delete", tmp_path)
    assert deleted.keys() == kinds.keys() and GONE not in gallery.identities


def test_forget_reads_any_arrays_and_long_texts(tmp_path, places, monkeypatch):
    gallery = made_galleries.make(tmp_path / "g", {"1": made_galleries.make_clip(1, GONE)})
    width = gallery.clips["1"].vector.size
    np.savez(
        tmp_path / "other.npz", number=np.float32(1), text=np.array(GONE[:3]),
        infinite=np.full((2, width), np.inf), long=np.ones(3, np.longdouble), x=np.ones(2, complex),
    )  # fmt: skip
    np.savez(tmp_path / "names.npz", text=np.array([["Eve"], [GONE]]))
    (tmp_path / "others.csv").write_text(f"{GONE}s," * 2000)
    monkeypatch.setattr(traces, "PART_BYTES", 300)
    monkeypatch.setattr(traces, "OVERLAP_BYTES", 80)
    for place in range(280, 310):  # the name is at the end of a part, or is divided
        for code, ending in (("utf-8", "csv"), ("utf-16", "txt"), ("utf-16-be", "json")):
            text = "x," * (place // 4) + f"é{',' * (place % 4)},{GONE},{'y,' * 500}"
            (tmp_path / f"{place}.{ending}").write_text(text, code)
        longer = "x," * (place // 4) + f"{',' * (place % 4)},{GONE} King,{'y,' * 500}"
        (tmp_path / f"{place}.tex").write_text(longer + f"z{GONE}" * 99)
    ours = {f"{place}.{x}" for place in range(280, 310) for x in ("csv", "txt", "json")}
    expected = ours | {"g", "names.npz"}
    assert {Path(path).name for path in places(f"--identity={GONE}", tmp_path)} == expected


def test_the_printed_line_deletes_files_with_any_names_but_none_of_other_programs(tmp_path, say):
    """Only files that vidjax wrote are deleted. All other files are listed, with a reason."""
    made_galleries.make(tmp_path / "g", {"1": made_galleries.make_clip(1, GONE)})
    text, cue = f"Written by: {GONE}.\n", "00:00:01,000 --> 00:00:02,000\n"
    for name in b"a\nrm notes.txt", b"\x1b[31mred", b"\xff", b"$(id)'\n`id`", "\u202eb".encode():
        answer = f"clip\tidentity\tprobability\tscore\nx\t{GONE}\t1\t0\n"
        (tmp_path / os.fsdecode(name + b".tsv")).write_text(answer)
    speaker = "SPEAKER x 1 0.000 2.000 <NA> <NA>"
    ours = {
        "a.csv": f"clip,identity,probability,score\nx,{GONE},1,0\n",
        "b.tsv": f"identity\trank\tclip\tscore\n{GONE}\t1\tx\t0\n",
        "c.jsonl": json.dumps({"clip": "x", "identity": GONE, "probability": 1, "score": 0}),
        "d.rttm": f"{speaker} Ada_Lovelace <NA> <NA>\n{speaker} unknown_1 <NA> <NA>\n",
        "e.srt": f"1\n{cue}{GONE}\n",
        "f.vtt": f"WEBVTT\n\n{cue.replace(',', '.')}{GONE}\n",
        "g.jsonl": json.dumps({"identity": GONE, "clips": [{"clip": "x", "score": 1.5}]}),
        "h.html": f"\n<!DOCTYPE html>\n<html><title>Who appears when</title><bdi>{GONE}</bdi>",
        "i.otio": files.to_json(cuts.to_timeline(GONE, [])),
        "j.json": json.dumps({"format": 3, "video": "x.mp4", "source": {}, "tags": [GONE]}),
        "k.tsv.gz": "",
    }
    others = {
        "package.json": json.dumps({"author": GONE}), "labels.csv": f"clip,identity\nx,{GONE}\n",
        "people.tsv": f"name\tborn\n{GONE}\t1815\n", "notes.txt": text, "page.html": text,
        "log.jsonl": json.dumps({"user": GONE}), "film.srt": f"1\n{cue}{text}",
        "film.vtt": f"WEBVTT\n\n{cue.replace(',', '.')}{text}",
        "cut.otio": f'{{"name": "{GONE}"}}\n',
        "other.rttm": f"{speaker} Ada_Lovelace <NA> <NA>\n{speaker} Zoe <NA> <NA>\n",
    }  # fmt: skip
    for name, content in (ours | others).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "k.tsv.gz").write_bytes(gzip.compress(ours["b.tsv"].encode()))
    text = say("forget", f"--identity={GONE}", tmp_path, code=1)
    assert all(f"/{name}: it contains the name\n" in text for name in ours | others)
    assert text.count("look at it") == len(others)
    (line,) = (line for line in text.splitlines() if line.startswith("  rm -r -- "))
    subprocess.run([shutil.which("bash") or "bash", "-c", line], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "g"}


def test_names_of_films_photos_and_folders_are_no_traces_but_people_of_playlists_are(
    tmp_path, places
):
    """A film and its folder have the name of the person, who is in no film."""
    film = Path(f"/films/{GONE}/{GONE}.mp4")
    place = {"video": film.name, "start": 1, "end": 2, "identity": "Eve", "probability": 1}
    place |= {"clips": [f"{GONE}.s000.t00", GONE], "path": str(film)}
    source = {"address": urllib.parse.quote(str(film))}
    track = {"clip": GONE, "shot": 0}
    described = media.MediaFile(
        video=film.name, source=media.FileStamp.of(Path(__file__)), sha256="0" * 64,
        photo=False, seconds=9.0, shots=[], tracks=[], frames=9, rate=25.0,
    )  # fmt: skip
    described.source = msgspec.structs.replace(described.source, **source)
    cut = [cuts.Cut(described, 1, 9)]
    texts = {
        f"{GONE}.txt": "Eve", "names.jsonl": json.dumps(place),
        "names.tsv": tables.to_text([place, [str(x) for x in place.values()]], ".tsv"),
        "film.json": json.dumps({"format": 3, "video": film.name, "source": source, "x": [track]}),
        "config.json": json.dumps({"data": {"dir": str(film.parent)}}, indent=2),
        "own.m3u": f"#EXTM3U\n#EXTINF:9,{film.name}\n{film}\nfile://{source['address']}\n",
        "cut.m3u": cuts.to_playlist(cut), "cut.otio": files.to_json(cuts.to_timeline("Eve", cut)),
        "film.rttm": "SPEAKER Ada_Lovelace 1 0.000 2.000 <NA> <NA> Eve <NA> <NA>\n",
        "names.html": "<!DOCTYPE html>\n<title>Who appears when</title><a href="
        f'"{source["address"]}" title="{GONE}"><bdi dir="ltr">{film.name}</bdi></a><bdi>Eve</bdi>',
    }  # fmt: skip
    folder = tmp_path / GONE
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    table = pyarrow.table({"video": [film.name], "path": [str(film)]})
    parquet.write_table(table, folder / "a.parquet")
    assert places(f"--identity={GONE}", tmp_path, code=0) == {}
    assert len(places("--identity=Eve", tmp_path)) == 6
    for name in (f"{GONE}.m3u", f"{GONE} (2).m3u"):
        (folder / name).write_text(texts["cut.m3u"])
        assert places(f"--identity={GONE}", tmp_path) == {str(folder / name): ("file", "delete it")}
        (folder / name).unlink()


def test_forget_names_own_files_in_results_and_goes_on_after_a_damaged_log(tmp_path, say):
    """The second folder has a damaged log. The person is deleted from all other places."""
    for name in ("first", "second", "third"):
        make_who(tmp_path / name, "Eve", "Eve")
        actions.Review(tmp_path / name).change("name", ["Eve"], GONE)
    damaged = tmp_path / "second" / "said.jsonl"
    lines = damaged.read_text()
    damaged.write_text(f"{lines}nonsense\n")
    number = len(lines.splitlines()) + 1
    copies = [
        tmp_path / "first" / x for x in ("names (copy).tsv", "said.jsonl.bak", "people/n.txt")
    ]
    columns = "video\tstart\tend\tidentity\tprobability\n"
    for copy in copies:
        copy.write_text(f"{columns}x.mp4\t1\t2\t{GONE}\t1\n")
    zeros = tmp_path / "x.npz"
    zeros.write_bytes(b"PK damaged")
    answer = say("forget", f"--identity={GONE}", "--delete", tmp_path, "--json", code=1)
    found = {x["path"]: (x["kind"], x["remedy"], x["about"]) for x in answer["places"]}
    for name in ("first", "third"):
        assert found[str(tmp_path / name)][:2] == ("who", "deleted")
        assert GONE not in vidjax.Gallery(tmp_path / name / "gallery").identities
        assert GONE.encode() not in (tmp_path / name / "said.jsonl").read_bytes()
    kind, remedy, about = found[str(tmp_path / "second")]
    assert (kind, remedy) == ("who", "repair this, then run the command again")
    assert f"not deleted: line {number} of '{damaged}' is damaged" in about
    assert [found[str(x)][0] for x in (damaged, zeros)] == ["unread"] * 2
    assert {found[str(copy)][1] for copy in copies} == {
        "look at it, and delete it or the name in it"
    }
    assert len(found) == 8 and answer["unread"] == 2 and answer["deleted"] == 2
    damaged.write_text(lines)
    (tmp_path / "third" / "names.tsv").write_text("")
    listed = say("forget", "--identity=Zoe", tmp_path, "--json", code=1)["places"]
    assert {x["path"] for x in listed} == {str(zeros), str(tmp_path / "third" / "names.tsv")}
    assert "1 of them deleted" in say("forget", f"--identity={GONE}", "--delete", tmp_path, code=1)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".tsv", ".otio", ".m3u", ".vtt", ".html"])
def test_forget_reads_any_text_in_linear_time(ending, tmp_path, places):
    track = {"start": 0.0, "end": 1.0, "identity": "P0"}
    texts = [
        json.dumps({"video": "x.mp4", "fps": 25, "tracks": [track] * 3000}),
        "[" * 200_000,
        '{"clip":' * 50_000,
        '{"clip":' + " " * 200_000,
        '{"clip": "' + "\\" * 200_000,
        '{"video": ' + "9" * 200_000,
        f'{{"{GONE}.mp4": "' + "x." * 100_000,
        "<" * 200_000,
        "<!DOCTYPE html>" + "<title>" * 20_000,
        '"' * 200_001,
        "#EXTM3U\n#EXTINF:1," + "x" * 200_000,
    ]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}{ending}").write_text(f"{text}\n{GONE}" if n % 2 else text)
    began = time.process_time()
    found = places(f"--identity={GONE}", tmp_path)
    assert time.process_time() - began < 5 * limits.slowness()
    assert {int(Path(path).stem) for path in found} >= {1, 3, 5, 7, 9}


@pytest.mark.parametrize("name", ["x.txt.gz", "x.json", "x.safetensors"])
def test_forget_searches_long_files_with_the_memory_of_a_part(name, tmp_path):
    content = b"some words; " * 1_600_000 + GONE.encode()
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    del content
    with limits.traced_memory() as peak:
        found = traces.Traces([GONE], [], []).in_file(tmp_path / name)
    assert found and peak[0] < 16 * files.MB


def unpack(path):
    """Returns the content of a file as bytes, unpacked, and of a table the values of all cells."""
    if path.suffix == ".parquet":
        return repr(parquet.read_table(path).to_pylist()).encode()
    content = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(content)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return b"".join([content, *map(archive.read, archive.namelist())])
    return content


def list_traces(folder, pieces):
    """Returns the files with any of `pieces` in their paths or in their contents."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)) for path in paths
        if any(x in bytes(path.relative_to(folder)) + b"\n" + unpack(path) for x in pieces)
    }  # fmt: skip


ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet", ".vtt", ".srt", ".rttm")
PERSON = "Zoë Qüintela O'Brien"


def spell(name):
    """Returns the bytes of a name in the encodings and with the codes of files of vidjax."""
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    texts = {x for form in forms for x in (
        form, json.dumps(form)[1:-1], urllib.parse.quote(form), form.replace(" ", "_"),
        form.replace(" ", "%20"), html.escape(form),
    )}  # fmt: skip
    texts |= {text.casefold() for text in texts}
    codes = ("utf-8", "utf-16-le", "utf-16-be")
    return {x.encode(code) for x in texts for code in codes} | {name.encode("latin-1")}


@pytest.mark.slow
def test_the_printed_steps_delete_every_byte_of_a_person(tmp_path, command, say, monkeypatch):
    """All results of films, photos and galleries are in a folder: nothing of the person is left."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("VIDJAX_CACHE", str(home / ".cache"))
    drawn = drawn_people.Drawn(home, command)
    drawn_people.write_photo(drawn.friends / PERSON / "1.png", ("Ada", 40, 40))
    drawn_people.write_photo(drawn.friends / "Bob" / "bob.png", ("Bob", 40, 40))
    film, other = drawn.film(), home / "other.mkv"
    drawn_people.write_film(other, (2, 20, [("Bob", 20, 30)]), (2, 60, [("Eve", 80, 50)]))
    drawn.who(film, other, flags=["--thumbnails"])
    # A gallery, answers with every ending, exports, copies, and a server that removes the person.
    models, people, feats = f"--models={drawn.models}", home / "people", home / "feats"
    drawn.run("extract", drawn.friends / PERSON / "1.png", film, models, f"--out={feats}")
    say("gallery", "create", people, models)
    for words in ([f"--input={feats / '1.npz'}"], [f"--input={feats}", "--clip=party.s000.t00"]):
        say("gallery", "enrol", people, *words, f"--identity={PERSON}")
    for ending in ENDINGS:
        shown = feats / "party.npz" if ending in (".vtt", ".srt") else feats
        say("gallery", "identify", people, f"--input={shown}", f"--out={home}/answers{ending}")
    say("gallery", "rank", people, f"--input={feats}", f"--out={home}/ranks.tsv")
    faces = [clip_files.read_arrays(feats)[name]["face"] for name in ("1", "party.s000.t00")]
    (home / "tables").mkdir()
    clip_files.write_parquet(home / "tables" / "t.parquet", {"query": {"face": faces[0]}})
    for task in ("identify", "rank"):
        say("gallery", task, people, f"--input={home}/tables", f"--out={home}/{task}s")
    for name in ("people.bak", "served"):
        shutil.copytree(people, home / name)
    (home / "old.tsv.gz").write_bytes(gzip.compress((home / "answers.tsv").read_bytes()))
    vectors = [x.vector for x in vidjax.Gallery(people).clips.values()] + [*np.concatenate(faces)]
    units = [x / np.linalg.norm(x.astype(float)) for x in vectors]
    kinds = (np.float32, np.float64, np.float16)
    pieces = {x.astype(kind)[:4].tobytes() for x in (*vectors, *units) for kind in kinds}
    pieces |= spell(PERSON)
    assert {f"answers{ending}" for ending in ENDINGS} <= list_traces(home, pieces)
    with servers.served(home / "served") as server:
        path = f"/identities/{urllib.parse.quote(PERSON)}"
        assert server.ask("DELETE", path)[1] == {"removed": 2}
    assert not list_traces(home / "served", pieces)
    # 1. The user deletes the person's photos, films and tables of features.
    shutil.rmtree(drawn.friends / PERSON)
    shutil.rmtree(home / "tables")
    film.unlink()
    # 2. and 3. The listed places.
    answer = say("forget", f"--identity={PERSON}", "--delete", home, "--json", code=1)
    text = say("forget", f"--identity={PERSON}", home, code=1)
    assert "\u2028" not in text and len(text.splitlines()) < 40
    subprocess.run(["/bin/sh", "-c", answer["delete_files"]], check=True)
    for path in filter(Path.exists, [Path(x["path"]) for x in answer["places"]]):
        if path.name == "safetensors":
            files.remove_tree(path)
    drawn.who(other, flags=["--forget-missing", "--prune"])
    # 4. The same command again.
    assert say("forget", f"--identity={PERSON}", home, "--json")["places"] == []
    assert not list_traces(home, pieces)


def test_forgetting_ends_although_the_name_is_a_word_of_the_results_or_of_a_folder(tmp_path, say):
    """The folder of photos `Ada` belongs to a person who is called Eva now."""
    shelf = made_shelf.make(tmp_path / "x", people=6, films=2, known=1, faces=8)
    page = actions.Review(shelf.out)
    page.change("name", ["Ada"], "Eva")
    for name in ("Page", "Ada", "Film"):
        page.change("name", [next(iter(page._clips_of))], name)
        page.save()
        assert name in made_shelf.list_names(shelf.out).values()
        say("forget", f"--identity={name}", "--delete", shelf.out, "--json", code=0)
        page.refresh()
        assert {"Eva"} <= {*page._decision.people} and name not in page._decision.people
