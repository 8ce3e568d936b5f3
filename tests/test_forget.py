"""`vidjax forget` lists every place of a person, and deletes galleries and records."""

import bz2
import functools
import gzip
import html
import io
import json
import lzma
import os
import stat
import subprocess
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_galleries
from tests.helpers.cases import nightly_after_first, quick_first
from tests.helpers.limits import file_limit
from vidjax.apps import forget as forget_lib
from vidjax.data import cache
from vidjax.utils import files, tables

GONE = "Ada Lovelace"
ODD = ["Zoë O'Brien", 'a "b" $(id) `id` \\', "-e --x ;", "Zoe\u0308 & Co <x>", "x {} !"]


@pytest.fixture
def forget(say):
    return functools.partial(say, "forget")


@pytest.fixture
def places(forget):
    """Returns path -> (kind, remedy) of the listed places. The code is 1 if there are any."""

    def find(*words, code=1):
        listed = forget(*words, "--json", code=code)["places"]
        return {place["path"]: (place["kind"], place["remedy"]) for place in listed}

    return find


def letters(text):
    return np.frombuffer(text.encode(), np.uint8)


def converted(folder, *clips):
    """Writes the names of some clips into a folder like the records of a cache."""
    with cache.exclusive(folder), files.atomic_folder(folder) as partial:
        (partial / "manifest.json").write_text("{}")
        arrays: Any = {"train/clips": letters("\n".join(clips))}
        np.savez(partial / "index.npz", **arrays)


def make_run(folder, identities=(), *, clips=("x", "y"), wrong_clip="x"):
    """Writes a folder like a run: with names of people, of training clips, and of a wrong clip."""
    folder.mkdir(parents=True)
    (folder / "identities.json").write_text(json.dumps(identities))
    facts = json.dumps({"wrong_clips": [{"clip": wrong_clip}]})
    np.savez_compressed(folder / "members.npz", clips=letters("\n".join(clips)))
    np.savez_compressed(folder / "analysis.npz", facts=letters(facts))


def make_who(folder, person, named, denied="x"):
    """Writes a folder like one of vidjax who: with photos of a person, a name and a denied name."""
    (folder / "people" / person).mkdir(parents=True)
    (folder / "gallery").mkdir()
    rows = [("video", "identity"), ("x.mp4", named)]
    (folder / "names.tsv").write_text(tables.to_text(rows, ".tsv"))
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
    make_who(tmp_path / "photos", GONE, "Eve")
    make_who(tmp_path / "named", "Eve", GONE)
    make_who(tmp_path / "denied", "Eve", "Eve", GONE)
    return tmp_path


def test_nobody_else_may_read_records(world):
    records = world / "cache" / "arrays" / "with"

    modes = [path.stat().st_mode for path in (records, records.parent, records / "index.npz")]

    assert [stat.S_IMODE(mode) for mode in modes] == [0o700, 0o700, 0o600]


def test_forget_lists_every_place_and_deletes_galleries_and_records(world, forget, places):
    people, others = (vidjax.Gallery(world / name) for name in ("g", "others"))
    before = made_galleries.contents(others.folder)
    records = world / "cache" / "arrays"

    listed = places(f"--identity={GONE}", world)
    assert {str(Path(path).relative_to(world)): kind for path, (kind, _) in listed.items()} == {
        "g": "gallery", "cache/arrays/with": "records", "photos": "who", "named": "who",
        "denied": "who",
        **dict.fromkeys(("runs/identity", "runs/clip", "runs/analysis"), "run"),
    }  # fmt: skip
    assert GONE in people.identities  # nothing is deleted without --delete

    # On a full disk, and while another process changes the gallery, the records are deleted.
    for name, fault in {"1": file_limit(5000), "2": people._store.open(write=True)}.items():
        converted(records / name, "ada 1", "x")
        with fault:
            listed = places(f"--identity={GONE}", "--delete", world)
        assert listed[str(people.folder)] == ("gallery", "--delete")  # is not deleted
        assert listed[str(records / name)][1].startswith("deleted")
    assert (records / "without").exists()

    listed = places(f"--identity={GONE}", "--delete", world)  # deletes what is left: the gallery
    deleted = {path for path, (_, remedy) in listed.items() if remedy.startswith("deleted")}
    assert deleted == {str(people.folder)}
    people.refresh()
    assert GONE not in people.identities
    assert made_galleries.contents(others.folder) == before

    # Three runs and three folders of `vidjax who` are left to the user. The gallery no longer lists
    # the clip of GONE, so the command names the clip.
    text = forget(f"--identity={GONE}", "--clip=ada 1", "--delete", world, code=1)
    assert "places      6, 0 of them deleted" in text and "train without them" in text


def test_forget_deletes_what_a_killed_conversion_has_left(tmp_path, places):
    """The features of its clips are already on the disk, but the names of the clips are not."""
    folder = tmp_path / "cache" / "arrays" / f"{'0' * 20}.12345678.partial"
    (folder / "staging").mkdir(parents=True)
    (folder / "staging" / "features.bin").write_bytes(b"features of somebody")

    assert places("--clip=ada 1", tmp_path) == {str(folder): ("records", "--delete")}
    assert places("--clip=ada 1", "--delete", tmp_path, code=0) == {
        str(folder): ("records", "deleted")
    }
    assert not folder.exists() and not places("--clip=ada 1", tmp_path, code=0)


def test_forget_finds_names_in_file_contents_and_file_names(tmp_path, places):
    texts = {
        "answers.jsonl": json.dumps({"clip": "x", "identity": GONE}),
        "names.tsv": f"video\tidentity\nx.mp4\t{GONE}\n",
        "ranking.txt": "Ada%20Lovelace x y\n",
        "upper.txt": GONE.upper(),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        (tmp_path / f"{encoding}.csv").write_text(f"x,{GONE},y", encoding=encoding)
    (tmp_path / f"{GONE}.jpg").write_bytes(b"")
    (tmp_path / GONE).mkdir()
    (tmp_path / GONE / "1.jpg").write_text(GONE)  # is not listed, as its folder is listed

    # These files are not listed. Two of them have 1 TiB of holes.
    (tmp_path / "other.txt").write_text("Ada\nAda Lovelaces\n")
    os.mkfifo(tmp_path / "pipe")
    for name, start in {"holes": b"", "holes.txt": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(start)
        os.truncate(tmp_path / name, 1 << 40)
    (tmp_path / "link").symlink_to("/dev/zero")

    listed = places(f"--identity={GONE}", tmp_path)

    assert {Path(path).name for path in listed} == {
        *texts, "utf-16.csv", "utf-16-be.csv", "utf-32.csv", f"{GONE}.jpg", GONE,
    }  # fmt: skip
    assert {kind for kind, _ in listed.values()} == {"file"}


@pytest.mark.parametrize(("name", "text", "encoding"), [
    ("李小龙", "我喜欢李小龙的电影", "utf-8"),  # Chinese has no blanks between words
    ("김연아", json.dumps("이김연아는"), "utf-8"),
    ("上官婉儿", "x 上官婉儿 y", "utf-16-le"),  # the first letter has the byte of a line end
    ("Ċgis", "x ĊGIS", "utf-16"),
])  # fmt: skip
def test_forget_finds_names_in_texts_of_many_languages(name, text, encoding, tmp_path, places):
    (tmp_path / "a.txt").write_text(text, encoding=encoding)
    (tmp_path / "b.txt").write_text("somebody else", encoding=encoding)
    assert [*places(f"--identity={name}", tmp_path)] == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize("name", ODD)
def test_forget_finds_names_with_quotation_marks_in_pages_and_tables(name, tmp_path, places):
    (tmp_path / "a.html").write_text(str(markupsafe.escape(name)))
    (tmp_path / "b.csv").write_text(tables.to_text([("x", name)], ".csv"))
    (tmp_path / "c.vtt").write_text(html.escape(name, quote=False))
    assert len(places(f"--identity={name}", tmp_path)) == 3


def test_a_file_that_grep_cannot_read_hides_no_other_file(tmp_path, places, monkeypatch):
    monkeypatch.setattr(forget_lib, "GREP", forget_lib.GREP.replace("1048576", "100000"))
    for name, text in {"a": GONE, "b": "x" * (200 << 20), "c": GONE}.items():
        (tmp_path / name).write_text(text)
    listed = places(f"--identity={GONE}", tmp_path)
    assert {Path(path).name: kind for path, (kind, _) in listed.items()} == {
        "a": "file", "b": "unread", "c": "file",
    }  # fmt: skip


def test_other_files_are_unread_if_grep_lacks_an_option(tmp_path, places, monkeypatch):
    (tmp_path / "grep").write_text("#!/bin/sh\necho unknown option >&2; exit 2\n")  # as of BusyBox
    (tmp_path / "grep").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert places(f"--identity={GONE}", tmp_path) == {".": ("unread", "install GNU grep")}


def test_forget_ignores_the_ending_of_a_clip(tmp_path, places):
    for clip in ("c1", "c1.mp4"):  # a server keeps the ending
        made_galleries.make(tmp_path / clip, {clip: made_galleries.make_clip(1, GONE)})
        assert len(places("--clip=c1.mp4", tmp_path / clip)) == 1
        assert len(places("--clip=c1", tmp_path / clip)) == 1


def test_forget_finds_the_clips_of_a_person_in_features_of_several_clips(tmp_path, places):
    made_galleries.make(tmp_path / "g", {"film.s001": made_galleries.make_clip(1, GONE)})
    face = np.ones((1, 8), np.float32)
    for name, save in {"a": np.savez, "b": np.savez_compressed, "c": np.savez}.items():
        clips = np.array(["other", "film.s001.mp4" if name != "c" else "film.s0011"])
        save(tmp_path / f"{name}.npz", clips=clips, face=np.repeat(face, 2, 0), face_length=[1, 1])
    (tmp_path / "d.npz").write_bytes(b"PK clips.npy")  # is damaged

    listed = places(f"--identity={GONE}", tmp_path)
    assert {Path(path).name: kind for path, (kind, _) in listed.items()} == {
        "g": "gallery", "a.npz": "file", "b.npz": "file", "d.npz": "unread",
    }  # fmt: skip


def write_tar(path, text):
    with tarfile.open(path, "w:gz") as file:
        entry = tarfile.TarInfo("x")
        entry.size = len(text)
        file.addfile(entry, io.BytesIO(text))


WRITERS = {
    "a.csv.gz": lambda path, text: path.write_bytes(gzip.compress(text)),
    "a.csv.bz2": lambda path, text: path.write_bytes(bz2.compress(text)),
    "a.csv.xz": lambda path, text: path.write_bytes(lzma.compress(text)),
    "a.tgz": write_tar,
    "a.ZIP": lambda path, text: zipfile.ZipFile(path, "w", 8).writestr("x", text * 3),  # deflated
    "a.parquet": lambda path, text: tables.write(
        path, {"identity": "string"}, [(line,) for line in text.decode().splitlines()], ()
    ),
}


@nightly_after_first("name", ODD)
@pytest.mark.parametrize("file", quick_first(WRITERS, 5))  # a process that reads parquet is slow
def test_forget_prints_a_command_that_searches_compressed_files(name, file, tmp_path, forget):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    WRITERS[file](folder / file, f"x {name} y\n{name}\n".encode())
    WRITERS[file](folder / f"other {file}", b"somebody else\n")

    answer = forget(f"--identity={name}", folder, "--json", code=1)

    # `left` counts files with a readable name, `unread` counts other compressed files. Compression
    # may leave a short name readable.
    assert answer["left"] + answer["unread"] == 2
    assert answer["unread"] >= 1  # the file of somebody else
    (command,) = answer["commands"]
    assert f"\n  {command}\n" in forget(f"--identity={name}", folder, code=1)
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(folder / file)]


def test_forget_compares_no_path_with_all_others(tmp_path, monkeypatch):
    for n in range(50):
        (tmp_path / f"{n}.txt").write_text("Ada was here")
        (tmp_path / f"{n}.gz").write_bytes(b"")
    compared, equal = [], Path.__eq__
    monkeypatch.setattr(Path, "__eq__", lambda x, y: compared.append(1) or equal(x, y))
    found = forget_lib.forget({"Ada"}, (), [tmp_path]).found
    assert [place.kind for place in found] == ["file"] * 50 + ["unread"] * 50
    assert len(compared) < 1000


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_forget_finds_both_unicode_forms_of_a_name(forms, tmp_path, forget):
    typed, stored = (unicodedata.normalize(form, "José Müller") for form in forms)
    clips = {f"{stored} 1": made_galleries.make_clip(1, stored)}
    gallery = made_galleries.make(tmp_path / "g", clips)
    converted(tmp_path / "cache" / "0", f"{stored} 1")
    make_run(tmp_path / "run", [stored])
    (tmp_path / "a.txt").write_text(stored)
    (tmp_path / "b.json").write_text(json.dumps(stored))
    (tmp_path / "c.html").write_text(html.escape(stored).upper())
    (tmp_path / "d.csv").write_text(stored, encoding="utf-16")
    (tmp_path / "e.csv").write_text("x;José Müller;y", encoding="latin-1")
    (tmp_path / f"{stored}.jpg").write_bytes(b"")

    answer = forget(f"--identity={typed}", tmp_path, "--delete", "--json", code=1)

    kinds = sorted(place["kind"] for place in answer["places"])
    assert kinds == ["file"] * 6 + ["gallery", "records", "run"]
    assert (answer["deleted"], answer["left"]) == (2, 7)  # gallery, records; 6 files, run
    assert len(gallery) == 0
    # --clip also finds names of people, in the same 7 places.
    assert forget(f"--clip={typed}", tmp_path, "--json", code=1)["left"] == 7


def test_forget_finds_only_whole_names(tmp_path, places):
    make_run(tmp_path / "run", [GONE])
    (tmp_path / "run" / "ranking.txt").write_text("Ada%20Lovelace clip%201.mp4 x.mp4\n")
    made_galleries.make(tmp_path / "g", {"a": made_galleries.make_clip(1, GONE)})
    make_who(tmp_path / "who", GONE, GONE)
    (tmp_path / "who" / "cuts").mkdir()
    (tmp_path / "who" / "cuts" / f"{GONE}.edl").write_text(GONE)

    assert len(places(f"--identity={GONE}", tmp_path)) == 3  # run, g and who
    assert len(places("--clip=clip 1", tmp_path)) == 1  # run
    assert places("--identity=Ada", tmp_path, code=0) == {}
    for name in ('Ada "Q" L', "=Ada"):  # the table has more quotation marks
        make_who(tmp_path / name[-1], "Eve", name)
        assert len(places(f"--identity={name}", tmp_path)) == 1

    # The names of these files begin like names of files of a run, but no run writes the files.
    for name in ("report on Ada.txt", "checks", "metrics Ada.csv"):
        (tmp_path / "run" / name).write_text("Ada\n")
    assert len(places("--identity=Ada", tmp_path)) == 3


def test_forget_reports_similar_names(tmp_path, forget):
    make_run(tmp_path / "run", [GONE])
    for name in ("Ada Lovlace", "Ada\u200b Lovelace"):  # \u200b has no width
        assert f"'{GONE}' looks similar to" in forget(f"--identity={name}", tmp_path)

    make_run(tmp_path / "other", ["ada  LOVELACE"])
    assert "'ada  LOVELACE' looks similar to" in forget(f"--identity={GONE}", tmp_path, code=1)


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

    listed = places("--clip=some clip", tmp_path)

    assert listed == dict.fromkeys(map(str, unreadable), ("unread", "search it yourself"))


def test_forget_refuses_empty_names_and_absent_folders(tmp_path, forget):
    for flag in ("--identity=", "--identity= ", "--clip=.mp4", "--clip=a\nb"):
        forget(flag, tmp_path, code=2)
    assert "as PLACE" in forget("--clip=x", tmp_path / "absent", code=2)


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
def test_no_byte_of_a_person_is_left_after_forget(tmp_path, forget, places):
    """Features, records, a run, a gallery and a ranking contain the person."""
    rng = np.random.default_rng(0)
    labels = {f"{name} {turn}": name for turn in range(6) for name in ("p1", "p2", "p3", GONE)}
    clips = {clip: {"face": rng.normal(size=(3, 16)).astype(np.float32)} for clip in labels}
    val = {clip: clips[clip] for clip in [*clips][:8]}  # 2 clips of each person
    train = {clip: clips[clip] for clip in [*clips][8:]}
    features = clip_files.write_npz(tmp_path / "features", {"train": train, "val": val})
    clip_files.write_labels(features / "labels.csv", labels)
    words = ("data.name=arrays", f"data.dir={features}", f"data.cache_dir={tmp_path / 'cache'}")
    config = vidjax.load_config("knn:face", *(f"--config.{word}" for word in words))
    data = vidjax.load_data(config)
    vidjax.train(config, tmp_path / "run", data, num_devices=1)
    gallery = vidjax.Gallery.create(tmp_path / "g", tmp_path / "run", data)
    tables.write_ranking(tmp_path / "ranks.tsv", gallery.rank(data, split="val"))

    # Four numbers of a vector identify the vector.
    gone = [clip for clip, name in labels.items() if name == GONE]
    frames = [clips[clip]["face"] for clip in gone]
    vectors = [clip.vector for clip in gallery.clips.values() if clip.identity == GONE]
    pieces = [row[:4].tobytes() for row in np.concatenate([*frames, vectors])]
    assert search(tmp_path, pieces) >= {"features", "cache", "g"}

    words = (f"--identity={GONE}", *(f"--clip={clip}" for clip in gone), tmp_path)
    forget(*words, "--delete", code=1)
    left = places(*words)
    # The gallery is still listed, because its run was trained with the person.
    assert {kind for kind, _ in left.values()} == {"run", "gallery", "file"}

    for path in map(Path, left):  # the user has to delete these places
        if path == features / "labels.csv":
            clip_files.write_labels(path, {x: who for x, who in labels.items() if who != GONE})
        elif path.is_dir():
            files.remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    assert not search(tmp_path, [*pieces, GONE.encode()])
    assert not [path for path in tmp_path.rglob("*") if GONE in path.name]
    assert places(*words, code=0) == {}
