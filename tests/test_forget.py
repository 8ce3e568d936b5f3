"""Every place of a person is named, and what vidjax may delete is deleted: then no byte is left."""

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

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_galleries, small_runs
from tests.helpers.cases import quick_first
from vidjax.data import cache
from vidjax.runs import config_io
from vidjax.utils import files, tables

GONE = "Ada Lovelace"


@pytest.fixture
def run(say):
    return functools.partial(say, "forget")


@pytest.fixture
def places(run):
    """Returns path -> kind and remedy, of what the command names."""

    def find(*words, code=1):
        found = run(*words, "--json", code=code)["places"]
        return {one["path"]: (one["kind"], one["remedy"]) for one in found}

    return find


def found_by(command):
    """Returns the paths that a printed command finds."""
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    return [Path(line) for line in done.stdout.splitlines()]


def converted(folder, *clips):
    """Writes a conversion into a cache, as far as its names go."""
    with cache.exclusive(folder), files.atomic_folder(folder) as partial:
        (partial / "manifest.json").write_text("{}")
        names = np.frombuffer("\n".join(clips).encode(), np.uint8)
        arrays: Any = {"train/clips": names}
        np.savez(partial / "index.npz", **arrays)


def test_every_place_is_named_and_what_vidjax_may_delete_is_deleted(tmp_path, run, places):
    clips = made_galleries.make_clips()
    shown = {"ada 1": made_galleries.make_clip(9001, GONE)._replace(fitted=True)}
    people = made_galleries.make(tmp_path / "g", clips | shown)
    others = made_galleries.make(tmp_path / "others")
    for name, some in {"with": ("ada 1", "x"), "without": ("ada 11", "x")}.items():
        converted(tmp_path / "cache" / "arrays" / name, *some)
    for name, identities, clip in (("a", ["x", GONE], "y"), ("b", ["x"], "ada 1"), ("c", [], "y")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "identities.json").write_text(json.dumps(identities))
        names = np.frombuffer(f"x\n{clip}".encode(), np.uint8)
        np.savez_compressed(tmp_path / "runs" / name / "members.npz", clips=names)
    for name, person in {"photos": GONE, "named": "Eve"}.items():
        (tmp_path / name / "people" / person).mkdir(parents=True)
        (tmp_path / name / "gallery").mkdir()
        (tmp_path / name / "names.tsv").write_text("video\tidentity\nx.mp4\tEve\n")
    (tmp_path / "named" / "names.tsv").write_text(f"video\tidentity\nx.mp4\t{GONE}\n")
    (tmp_path / "runs" / "d").mkdir()
    facts = json.dumps({"wrong_clips": [{"clip": "ada 1"}]}).encode()
    analysis: Any = {"facts": np.frombuffer(facts, np.uint8)}
    np.savez_compressed(tmp_path / "runs" / "d" / "analysis.npz", **analysis)
    (tmp_path / "runs" / "d" / "identities.json").write_text("[]")
    before = made_galleries.contents(others.folder)

    found = places(f"--identity={GONE}", tmp_path)
    assert {path: kind for path, (kind, _) in found.items()} == {
        str(tmp_path / name): kind
        for name, kind in {
            "g": "gallery", "cache/arrays/with": "records", "runs/a": "run", "runs/b": "run",
            "runs/d": "run", "photos": "who", "named": "who",
        }.items()
    }  # fmt: skip
    assert GONE in people.identities  # nothing is deleted yet
    found = places(f"--identity={GONE}", "--delete", tmp_path)
    deleted = {path for path, (_, remedy) in found.items() if remedy.startswith("deleted")}
    assert deleted == {str(tmp_path / "g"), str(tmp_path / "cache/arrays/with")}
    assert (tmp_path / "runs" / "a" / "identities.json").exists()  # what is the user's stays
    people.refresh()
    assert GONE not in people.identities
    assert made_galleries.contents(others.folder) == before
    assert (tmp_path / "cache" / "arrays" / "without").exists()
    words = (f"--identity={GONE}", "--clip=ada 1", "--delete", tmp_path)
    said = run(*words, code=1)
    assert "places      5, 0 of them deleted" in said and "train without them" in said
    for name in ("runs", "photos", "named"):
        files.remove_tree(tmp_path / name)
    counts = {"left": 0, "unread": 0, "deleted": 0, "places": [], "commands": [], "similar": {}}
    assert run(*words, "--json") == {"mode": "forget", **counts}


def test_names_in_other_files_are_found(tmp_path, places):
    texts = {
        "answers.jsonl": json.dumps({"clip": "x", "identity": GONE}),
        "names.tsv": f"video\tidentity\nx.mp4\t{GONE}\n",
        "ranking.txt": "Ada%20Lovelace x y\n",
        "upper.txt": GONE.upper(),
        "other.txt": "Ada\nAda Lovelaces\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for way in ("utf-16", "utf-16-be", "utf-32"):
        (tmp_path / f"{way}.csv").write_text(f"x,{GONE},y", encoding=way)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"{GONE}.jpg").write_bytes(b"")
    (tmp_path / GONE).mkdir()
    (tmp_path / GONE / "1.jpg").write_text(GONE)  # goes with its folder
    os.mkfifo(tmp_path / "pipe")
    for name, start in {"holes": b"", "holes.txt": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(start)
        os.truncate(tmp_path / name, 1 << 40)
    (tmp_path / "link").symlink_to("/dev/zero")
    found = places(f"--identity={GONE}", tmp_path)
    assert {str(Path(path).relative_to(tmp_path)) for path in found} == {
        *texts.keys() - {"other.txt"}, "utf-16.csv", "utf-16-be.csv", "utf-32.csv",
        f"photos/{GONE}.jpg", GONE,
    }  # fmt: skip
    assert {kind for kind, _ in found.values()} == {"file"}
    assert places("--identity=Adb", tmp_path, code=0) == {}


ODD = ["Zoë O'Brien", 'a "b" $(id) `id` \\', "-e --x ;", "Zoe\u0308 & Co <x>", "x {} !"]
WRITERS = {
    "a.csv.gz": lambda path, text: path.write_bytes(gzip.compress(text)),
    "a.csv.bz2": lambda path, text: path.write_bytes(bz2.compress(text)),
    "a.csv.xz": lambda path, text: path.write_bytes(lzma.compress(text)),
    "a.tgz": lambda path, text: _archive(path, text),
    "a.ZIP": lambda path, text: zipfile.ZipFile(path, "w", 8).writestr("x", text * 3),
    "a.parquet": lambda path, text: tables.write(
        path, {"identity": "string"}, [(line,) for line in text.decode().splitlines()], ()
    ),
}  # fmt: skip


def _archive(path, text):
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("x")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))


@pytest.mark.parametrize("name", quick_first(ODD))
@pytest.mark.parametrize("file", WRITERS)
def test_a_printed_command_searches_what_is_compressed(name, file, tmp_path, run):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    WRITERS[file](folder / file, f"x {name} y\n{name}\n".encode())
    WRITERS[file](folder / f"other {file}", b"somebody else\n")
    answer = run(f"--identity={name}", folder, "--json", code=1)
    assert answer["left"] + answer["unread"] == 2 and answer["unread"]  # short names stay readable
    (command,) = answer["commands"]
    assert f"\n  {command}\n" in run(f"--identity={name}", folder, code=1)
    assert found_by(command) == [folder / file]


@pytest.mark.parametrize("typed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_both_unicode_forms_are_one_name(typed, stored, tmp_path, run):
    typed, stored = (unicodedata.normalize(form, "José Müller") for form in (typed, stored))
    gallery = made_galleries.make(
        tmp_path / "g", {f"{stored} 1": made_galleries.make_clip(1, stored)}
    )
    converted(tmp_path / "cache" / "0", f"{stored} 1")
    for kind in ("run", "notes"):
        (tmp_path / kind).mkdir()
    (tmp_path / "run" / "identities.json").write_text(json.dumps([stored]))
    (tmp_path / "notes" / "a.txt").write_text(stored)
    (tmp_path / "notes" / "b.json").write_text(json.dumps(stored))
    (tmp_path / "notes" / "c.html").write_text(html.escape(stored).upper())
    (tmp_path / "notes" / "d.csv").write_text(stored, encoding="utf-16")
    (tmp_path / "notes" / "e.csv").write_text("x;José Müller;y", encoding="latin-1")
    (tmp_path / f"{stored}.jpg").write_bytes(b"")
    found = run(f"--identity={typed}", tmp_path, "--delete", "--json", code=1)
    kinds = sorted(one["kind"] for one in found["places"])
    assert kinds == ["file"] * 6 + ["gallery", "records", "run"]
    assert (found["deleted"], found["left"]) == (2, 7)
    assert len(gallery) == 0
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text(stored)
    run(f"--clip={typed}", tmp_path / "only", code=1)


def test_whole_names_count_and_similar_names_are_told(tmp_path, run):
    made_galleries.make(tmp_path / "g", {"a": made_galleries.make_clip(1, GONE)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "identities.json").write_text(json.dumps([GONE, "ada  LOVELACE"]))
    (tmp_path / "run" / "ranking.txt").write_text("Ada%20Lovelace clip%201.mp4 x.mp4\n")
    (tmp_path / "who" / "people" / GONE).mkdir(parents=True)
    (tmp_path / "who" / "gallery").mkdir()
    (tmp_path / "who" / "cuts").mkdir()
    (tmp_path / "who" / "cuts" / f"{GONE}.edl").write_text(GONE)
    (tmp_path / "who" / "names.tsv").write_text(f"video\tidentity\nx.mp4\t{GONE}\n")
    notes = [tmp_path / "run" / name for name in ("report on Ada.txt", "checks", "metrics Ada.csv")]
    for path in notes:
        path.write_text("Ada\n")  # of no run
    assert run("--identity=Ada", tmp_path, "--json", code=1)["left"] == 3
    for path in notes:
        path.unlink()
    answer = run("--identity=Ada", tmp_path, "--json")  # a part of a name is another name
    assert answer["places"] == [] and answer["similar"] == {}
    said = run("--identity=Ada Lovlace", tmp_path)
    assert f"'{GONE}' is not 'Ada Lovlace'" in said and "places      0" in said
    answer = run("--identity=Ada\u200b Lovelace", tmp_path, "--json")
    assert answer["similar"] == {"Ada\u200b Lovelace": GONE}
    answer = run(f"--identity={GONE}", tmp_path, "--json", code=1)
    assert answer["left"] == 3 and answer["similar"] == {GONE: "ada  LOVELACE"}
    assert run("--clip=clip 1", tmp_path, "--json", code=1)["left"] == 1


def test_what_cannot_be_searched_is_named(tmp_path, run, places, monkeypatch):
    for name in ("g", "closed", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "g" / "gallery.sqlite").write_bytes(b"x")
    (tmp_path / "run" / "identities.json").symlink_to("/etc/passwd")
    (tmp_path / "link").symlink_to("/")

    def scandir(path, real=os.scandir):
        if Path(path).name == "closed":  # which root may list, whatever its mode
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = places("--clip=some clip", tmp_path)
    assert found == {str(tmp_path / name): ("unread", "search it yourself")
                     for name in ("g", "closed", "run")}  # fmt: skip
    assert "--identity=NAME" in run(tmp_path, code=2)
    assert "no such folder" in run("--clip=x", tmp_path / "absent", code=2)


def test_a_gallery_that_is_in_use_is_told_and_the_rest_is_deleted(tmp_path, places):
    people = made_galleries.make(tmp_path / "g", {"a/1": made_galleries.make_clip(1, GONE)})
    converted(tmp_path / "records" / "0", "a/1")
    words = (f"--identity={GONE}", tmp_path, "--delete")
    with people._store.open(write=True):
        found = places(*words)
    assert found[str(people.folder)] == ("gallery", "--delete")
    assert found[str(tmp_path / "records" / "0")][1].startswith("deleted")
    assert places(*words, code=0)[str(people.folder)] == ("gallery", "deleted")


def test_conversions_are_for_their_user_alone(tmp_path):
    folder = tmp_path / "cache" / "arrays" / "0123"
    converted(folder, "x")
    for path in (tmp_path / "cache", folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "index.npz").stat().st_mode) == 0o600


def everything(folder):
    """Yields path and content of all files, those of archives unpacked."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from ((path, archive.read(entry)) for entry in archive.infolist())


@pytest.mark.slow
def test_after_the_deletion_no_byte_is_left_wherever_vidjax_writes(tmp_path, run, places):
    rng = np.random.default_rng(0)
    centres = {name: rng.normal(size=16) for name in (GONE, "p1", "p2", "p3")}
    splits = {
        split: {
            f"{name} {split} {turn}": {
                "face": (3 * (centre + 0.5 * rng.normal(size=(3, 16)))).astype(np.float32)
            }
            for name, centre in centres.items()
            for turn in range(count)
        }
        for split, count in {"train": 4, "val": 2}.items()
    }
    features = clip_files.write_npz(tmp_path / "features", splits)
    labels = {clip: clip.rsplit(" ", 2)[0] for clips in splits.values() for clip in clips}
    clip_files.write_labels(features / "labels.csv", labels)
    gone = [clip for clip, name in labels.items() if name == GONE]
    vectors = [np.load(path)["face"] for path in features.rglob(f"{GONE}*")]
    pieces = [row[:4].tobytes() for face in vectors for row in face]

    def trained(folder):
        words = ["--config.data.name=arrays", f"--config.data.dir={features}",
                 f"--config.data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
        spec = f"{small_runs.ROOT}/configs/knn.py:face"
        config = config_io.override(config_io.load_file(spec), words)
        data = vidjax.load_data(config)
        folder.mkdir(parents=True)
        with files.lock(folder):
            small_runs.run(config, folder, data)
        return vidjax.restore(folder), data

    first, data = trained(tmp_path / "runs" / "one")
    gallery = vidjax.Gallery.create(tmp_path / "g", first, data)
    shown = [clip.vector for clip in gallery.clips.values() if clip.identity == GONE]
    pieces += [vector[:4].tobytes() for vector in shown]
    tables.write_ranking(tmp_path / "ranks.tsv", gallery.rank(data, split="val"))
    held = {path.relative_to(tmp_path).parts[0] for path, content in everything(tmp_path)
            if any(piece in content for piece in pieces)}  # fmt: skip
    assert held >= {"features", "cache", "g"}
    clips = [f"--clip={name}" for name in gone]
    run(f"--identity={GONE}", *clips, "--delete", tmp_path, code=1)
    left = places(f"--identity={GONE}", *clips, tmp_path)
    assert {kind for kind, _ in left.values()} == {"run", "gallery", "file"}
    for path in map(Path, left):  # what the command says that the user has to do
        if path == features / "labels.csv":
            clip_files.write_labels(path, {n: who for n, who in labels.items() if who != GONE})
        elif path.is_dir():
            files.remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    second, data = trained(tmp_path / "runs" / "two")
    vidjax.Gallery.create(tmp_path / "g", second, data)
    for path, content in everything(tmp_path):
        assert not [piece for piece in pieces if piece in content], path
        assert GONE.encode() not in content and GONE not in path.name, path
    assert places(f"--identity={GONE}", *clips, tmp_path, code=0) == {}
