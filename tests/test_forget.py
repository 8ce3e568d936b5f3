"""`vidjax forget` lists every place of a person, and deletes galleries and records."""

import html
import itertools
import json
import os
import stat
import subprocess
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_galleries
from tests.helpers.limits import file_limit
from vidjax.data import cache_folders
from vidjax.utils import files, tables

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
    """Writes a folder like the records of a cache, which contain the names of some clips."""
    arrays: Any = {"train/clips": lines(*clips)}
    with cache_folders.exclusive(folder), files.atomic_folder(folder) as partial:
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
    """Writes a folder like `vidjax who`: with photos of a person, a name, and a denied name."""
    (folder / "people" / person).mkdir(parents=True)
    (folder / "gallery").mkdir()
    (folder / "names.tsv").write_text(tables.to_text([("x.mp4", named)], ".tsv"))
    (folder / "unknown.json").write_text(json.dumps({"denied": {"0": {"x.s000": [denied]}}}))


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
    make_run(tmp_path / "exported", ["x", GONE])
    (tmp_path / "exported" / "export.json").write_text("{}")
    make_who(tmp_path / "photos", GONE, "Eve")
    make_who(tmp_path / "named", "Eve", GONE)
    make_who(tmp_path / "denied", "Eve", "Eve", GONE)
    return tmp_path


def test_nobody_else_may_read_records_or_a_gallery(world):
    gallery, records = world / "g", world / "cache" / "arrays" / "with"
    for path in (gallery, *gallery.iterdir(), records.parent, records, records / "index.npz"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_forget_lists_every_place_and_deletes_galleries_and_records(world, say, places):
    people, others = (vidjax.Gallery(world / name) for name in ("g", "others"))
    before = made_galleries.contents(others.folder)
    records = world / "cache" / "arrays"

    listed = places(f"--identity={GONE}", world)
    assert {str(Path(path).relative_to(world)): kind for path, (kind, _) in listed.items()} == {
        "g": "gallery", "cache/arrays/with": "records", "exported": "export",
        **dict.fromkeys(("photos", "named", "denied"), "who"),
        **dict.fromkeys(("runs/identity", "runs/clip", "runs/analysis"), "run"),
    }  # fmt: skip
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

    # Three runs, an export and three folders of `vidjax who` are left. The user has to change them.
    # `--clip` is needed, because the gallery no longer knows the clip of GONE.
    text = say("forget", f"--identity={GONE}", "--clip=ada 1", "--delete", world, code=1)
    assert "places      7, 0 of them deleted" in text and "train without them" in text


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


def test_forget_deletes_what_a_killed_conversion_has_left(tmp_path, places):
    """The features of its clips are already on the disk, but the names of the clips are not."""
    folder = tmp_path / "cache" / "arrays" / f"{'0' * 20}.12345678.partial"
    (folder / "staging").mkdir(parents=True)
    (folder / "staging" / "features.bin").write_bytes(b"features of somebody")
    assert places("--clip=ada 1", tmp_path) == {str(folder): ("records", "--delete")}
    deleted = places("--clip=ada 1", "--delete", tmp_path, code=0)
    assert deleted == {str(folder): ("records", "deleted")} and not folder.exists()


def execute(command):
    """Runs a shell command; returns the lines that it prints."""
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.fixture
def other_files(say):
    """Returns a function: words -> files that the printed commands find by path and by content."""

    def find(*words):
        commands, text = say("forget", *words, "--json")["commands"], say("forget", *words)
        assert all(f"\n  {command}\n" in text for command in commands)
        return [sorted(Path(line).name for line in execute(command)) for command in commands]

    return find


def test_printed_commands_find_names_in_paths_and_contents(tmp_path, other_files):
    texts = {"names.tsv": f"x.mp4\t{GONE}\n", "r.txt": "Ada%20Lovelace x\n", "u": GONE.upper()}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / f"{GONE}.jpg").touch()
    (tmp_path / "other.txt").write_text("Ada\nAda Lovelaces\n")  # a part of the name, another name
    os.mkfifo(tmp_path / "pipe")  # to read the pipe or the link would never end
    (tmp_path / "link").symlink_to("/dev/zero")
    assert other_files(f"--identity={GONE}", tmp_path) == [[f"{GONE}.jpg"], [*texts]]


@pytest.mark.parametrize("name", [*ODD, *TOUCHED, "José Müller"])
def test_printed_commands_find_names_with_any_letters_in_each_format(name, tmp_path, other_files):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    texts = {
        "a.html": html.escape(name), "b.html": str(markupsafe.escape(name)),
        "c.json": json.dumps({"x": [name]}), "d.csv": tables.to_text([("x", name)], ".csv"),
        "e.vtt": html.escape(name, quote=False), "f.txt": name,
        "g.txt": unicodedata.normalize("NFD", name), "h.txt": TOUCHED.get(name, name),
        "i.json": json.dumps(TOUCHED.get(name, name)),
    }  # fmt: skip
    for file, text in (texts | {"z.txt": "another person"}).items():
        (folder / file).write_text(text)
    assert other_files(f"--identity={name}", folder) == [[], [*texts]]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_forget_finds_both_unicode_forms_of_a_name(forms, tmp_path, say):
    typed, stored = (unicodedata.normalize(form, "José Müller") for form in forms)
    clips = {f"{stored} 1": made_galleries.make_clip(1, stored)}
    gallery = made_galleries.make(tmp_path / "g", clips)
    converted(tmp_path / "cache" / "0", f"{stored} 1")
    make_run(tmp_path / "run", [stored])
    answer = say("forget", f"--identity={typed}", tmp_path, "--delete", "--json", code=1)
    assert sorted(place["kind"] for place in answer["places"]) == ["gallery", "records", "run"]
    assert (answer["deleted"], answer["left"], len(gallery)) == (2, 1, 0)
    # --clip also finds names of people.
    assert say("forget", f"--clip={typed}", tmp_path, "--json", code=1)["left"] == 1


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
        if Path(path).name == "closed":  # chmod would not keep root out
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)

    unread = dict.fromkeys(map(str, unreadable), ("unread", "search it yourself"))
    assert places("--clip=some clip", tmp_path) == unread


def search(folder, pieces):
    """Returns the entries of a folder that contain some bytes, in files or in archives."""
    found = set()
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content += b"".join(map(archive.read, archive.namelist()))
        if any(piece in content for piece in pieces):
            found.add(path.relative_to(folder).parts[0])
    return found


@pytest.mark.slow
def test_no_byte_of_a_person_is_left_after_forget(tmp_path, say, places):
    """Features, records, a run, a gallery and a ranking contain the person."""
    rng = np.random.default_rng(0)
    labels = {f"{name} {turn}": name for turn in range(6) for name in ("p1", "p2", "p3", GONE)}
    clips = {clip: {"face": rng.normal(size=(3, 16)).astype(np.float32)} for clip in labels}
    splits = {"val": dict([*clips.items()][:8]), "train": dict([*clips.items()][8:])}  # 8: 2 each
    features = clip_files.write_npz(tmp_path / "features", splits)
    clip_files.write_labels(features / "labels.csv", labels)
    words = ("data.name=arrays", f"data.dir={features}", f"data.cache_dir={tmp_path / 'cache'}")
    config = vidjax.load_config("knn:face", *(f"--config.{word}" for word in words))
    vidjax.train(config, tmp_path / "run", data := vidjax.load_data(config), num_devices=1)
    gallery = vidjax.Gallery.create(tmp_path / "g", tmp_path / "run", data)
    tables.write_ranking(tmp_path / "ranks.tsv", gallery.rank(data, split="val"))

    # A piece is the first four numbers of a vector, which identify the vector.
    gone = [clip for clip, name in labels.items() if name == GONE]
    frames = [clips[clip]["face"] for clip in gone]
    vectors = [clip.vector for clip in gallery.clips.values() if clip.identity == GONE]
    pieces = [row[:4].tobytes() for row in np.concatenate([*frames, vectors])]
    assert search(tmp_path, pieces) >= {"features", "cache", "g"}

    words = (f"--identity={GONE}", *(f"--clip={clip}" for clip in gone), tmp_path)
    say("forget", *words, "--delete", code=1)
    left = places(*words)
    # The gallery is still listed, because its run was trained with the person.
    assert {kind for kind, _ in left.values()} == {"run", "gallery"}
    others = map(execute, say("forget", *words, "--json", code=1)["commands"])
    # The user has to delete these places and files.
    for path in map(Path, itertools.chain(left, *others)):
        if path == features / "labels.csv":
            clip_files.write_labels(path, {x: who for x, who in labels.items() if who != GONE})
        elif path.is_dir():
            files.remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    assert not search(tmp_path, [*pieces, GONE.encode()]) and not [*tmp_path.rglob(f"*{GONE}*")]
    assert places(*words, code=0) == {}
