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
from tests.helpers.cases import first_by_day, quick_first
from vidjax.data import cache
from vidjax.runs import config_io
from vidjax.utils import files, tables

GONE = "Ada Lovelace"
ODD = ["Zoë O'Brien", 'a "b" $(id) `id` \\', "-e --x ;", "Zoe\u0308 & Co <x>", "x {} !"]


@pytest.fixture
def run(say):
    return functools.partial(say, "forget")


@pytest.fixture
def places(run):
    def find(*words, code=1):
        listed = run(*words, "--json", code=code)["places"]
        return {place["path"]: (place["kind"], place["remedy"]) for place in listed}

    return find


def converted(folder, *clips):
    """Writes a conversion into a cache, as far as its names go."""
    with cache.exclusive(folder), files.atomic_folder(folder) as partial:
        (partial / "manifest.json").write_text("{}")
        names = np.frombuffer("\n".join(clips).encode(), np.uint8)
        arrays: Any = {"train/clips": names}
        np.savez(partial / "index.npz", **arrays)


def make_run(folder, identities, **arrays):
    """Writes a run as far as its names go."""
    folder.mkdir(parents=True)
    (folder / "identities.json").write_text(json.dumps(identities))
    for file, text in arrays.items():
        name, _, key = file.partition("_")
        content: Any = {key: np.frombuffer(text.encode(), np.uint8)}
        np.savez_compressed(folder / f"{name}.npz", **content)


def make_who(folder, person, named):
    """Writes a folder of vidjax who as far as its names go."""
    (folder / "people" / person).mkdir(parents=True)
    (folder / "gallery").mkdir()
    (folder / "names.tsv").write_text(f"video\tidentity\nx.mp4\t{named}\n")


def test_forget_lists_every_place_and_deletes_galleries_and_records(tmp_path, run, places):
    fitted = {"ada 1": made_galleries.make_clip(9001, GONE)._replace(fitted=True)}
    people = made_galleries.make(tmp_path / "g", made_galleries.make_clips() | fitted)
    others = made_galleries.make(tmp_path / "others")
    kept, gone = (tmp_path / "cache" / "arrays" / name for name in ("without", "with"))
    converted(kept, "ada 11", "x")
    converted(gone, "ada 1", "x")
    assert stat.S_IMODE(gone.stat().st_mode) == stat.S_IMODE(gone.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((gone / "index.npz").stat().st_mode) == 0o600
    runs = tmp_path / "runs"
    make_run(runs / "a", ["x", GONE], members_clips="x\ny")
    make_run(runs / "b", ["x"], members_clips="x\nada 1")
    make_run(runs / "c", [], members_clips="x\ny")
    make_run(runs / "d", [], analysis_facts=json.dumps({"wrong_clips": [{"clip": "ada 1"}]}))
    make_who(tmp_path / "photos", GONE, "Eve")
    make_who(tmp_path / "named", "Eve", GONE)
    before = made_galleries.contents(others.folder)
    listed = places(f"--identity={GONE}", tmp_path)
    assert {str(Path(path).relative_to(tmp_path)): kind for path, (kind, _) in listed.items()} == {
        "g": "gallery", "cache/arrays/with": "records", "photos": "who", "named": "who",
        **dict.fromkeys(("runs/a", "runs/b", "runs/d"), "run"),
    }  # fmt: skip
    assert GONE in people.identities  # nothing is deleted yet
    with people._store.open(write=True):  # as by another process
        listed = places(f"--identity={GONE}", "--delete", tmp_path)
    assert listed[str(people.folder)] == ("gallery", "--delete")
    assert listed[str(gone)][1].startswith("deleted") and kept.exists()
    listed = places(f"--identity={GONE}", "--clip=ada 1", "--delete", tmp_path)
    deleted = {path for path, (_, remedy) in listed.items() if remedy.startswith("deleted")}
    assert deleted == {str(people.folder)}
    people.refresh()
    assert GONE not in people.identities
    assert made_galleries.contents(others.folder) == before
    words = (f"--identity={GONE}", "--clip=ada 1", "--delete", tmp_path)
    text = run(*words, code=1)  # files of the user stay
    assert "places      5, 0 of them deleted" in text and "train without them" in text
    for name in ("runs", "photos", "named"):
        files.remove_tree(tmp_path / name)
    counts = {"left": 0, "unread": 0, "deleted": 0, "places": [], "commands": [], "similar": {}}
    assert run(*words, "--json") == {"mode": "forget", **counts}


def test_forget_finds_names_in_file_contents_and_file_names(tmp_path, places):
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
    (tmp_path / f"{GONE}.jpg").write_bytes(b"")
    (tmp_path / GONE).mkdir()
    (tmp_path / GONE / "1.jpg").write_text(GONE)  # goes with its folder
    os.mkfifo(tmp_path / "pipe")
    for name, start in {"holes": b"", "holes.txt": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(start)
        os.truncate(tmp_path / name, 1 << 40)  # 1 TiB of holes
    (tmp_path / "link").symlink_to("/dev/zero")
    listed = places(f"--identity={GONE}", tmp_path)
    assert {Path(path).name for path in listed} == {
        *texts.keys() - {"other.txt"}, "utf-16.csv", "utf-16-be.csv", "utf-32.csv",
        f"{GONE}.jpg", GONE,
    }  # fmt: skip
    assert {kind for kind, _ in listed.values()} == {"file"}
    assert places("--identity=Adb", tmp_path, code=0) == {}


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


@first_by_day("name", ODD)
@pytest.mark.parametrize("file", quick_first(WRITERS, 5))  # a process that reads parquet is slow
def test_forget_prints_a_command_that_searches_compressed_files(name, file, tmp_path, run):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    WRITERS[file](folder / file, f"x {name} y\n{name}\n".encode())
    WRITERS[file](folder / f"other {file}", b"somebody else\n")
    answer = run(f"--identity={name}", folder, "--json", code=1)
    assert answer["left"] + answer["unread"] == 2 and answer["unread"]  # short names stay readable
    (command,) = answer["commands"]
    assert f"\n  {command}\n" in run(f"--identity={name}", folder, code=1)
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(folder / file)]


@pytest.mark.parametrize(("typed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_forget_finds_both_unicode_forms_of_a_name(typed, stored, tmp_path, run):
    typed, stored = (unicodedata.normalize(form, "José Müller") for form in (typed, stored))
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
    answer = run(f"--identity={typed}", tmp_path, "--delete", "--json", code=1)
    kinds = sorted(place["kind"] for place in answer["places"])
    assert kinds == ["file"] * 6 + ["gallery", "records", "run"]
    assert (answer["deleted"], answer["left"]) == (2, 7) and len(gallery) == 0
    assert run(f"--clip={typed}", tmp_path, "--json", code=1)["left"] == 7


def test_forget_matches_whole_names_and_reports_similar_names(tmp_path, run):
    made_galleries.make(tmp_path / "g", {"a": made_galleries.make_clip(1, GONE)})
    make_run(tmp_path / "run", [GONE, "ada  LOVELACE"])
    (tmp_path / "run" / "ranking.txt").write_text("Ada%20Lovelace clip%201.mp4 x.mp4\n")
    make_who(tmp_path / "who", GONE, GONE)
    (tmp_path / "who" / "cuts").mkdir()
    (tmp_path / "who" / "cuts" / f"{GONE}.edl").write_text(GONE)
    notes = [tmp_path / "run" / name for name in ("report on Ada.txt", "checks", "metrics Ada.csv")]
    for path in notes:
        path.write_text("Ada\n")  # of no run
    assert run("--identity=Ada", tmp_path, "--json", code=1)["left"] == 3
    for path in notes:
        path.unlink()
    answer = run("--identity=Ada", tmp_path, "--json")  # a part of a name is another name
    assert answer["places"] == [] and answer["similar"] == {}
    text = run("--identity=Ada Lovlace", tmp_path)
    assert f"'{GONE}' looks similar to 'Ada Lovlace'" in text and "places      0" in text
    answer = run("--identity=Ada\u200b Lovelace", tmp_path, "--json")
    assert answer["similar"] == {"Ada\u200b Lovelace": GONE}
    answer = run(f"--identity={GONE}", tmp_path, "--json", code=1)
    assert answer["left"] == 3 and answer["similar"] == {GONE: "ada  LOVELACE"}
    assert run("--clip=clip 1", tmp_path, "--json", code=1)["left"] == 1


def test_forget_lists_places_that_it_cannot_read(tmp_path, run, places, monkeypatch):
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
    listed = places("--clip=some clip", tmp_path)
    unread = ("unread", "search it yourself")
    assert listed == {str(tmp_path / name): unread for name in ("g", "closed", "run")}
    assert "--identity=NAME" in run(tmp_path, code=2)
    assert "as PLACE" in run("--clip=x", tmp_path / "absent", code=2)


def search(folder, pieces):
    """Returns the parts of a folder that hold some bytes, in archives too."""
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
def test_no_byte_of_a_person_is_left_after_forget(tmp_path, run, places):
    rng, labels = np.random.default_rng(0), {}
    splits: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    for name in ("p1", "p2", "p3", GONE):
        centre = rng.normal(size=16)
        for turn in range(6):
            x = (3 * centre + 1.5 * rng.normal(size=(3, 16))).astype(np.float32)
            splits["train" if turn < 4 else "val"][f"{name} {turn}"] = {"face": x}
            labels[f"{name} {turn}"] = name
    gone = [clip for clip, name in labels.items() if name == GONE]
    of_gone = [x["face"] for clips in splits.values() for n, x in clips.items() if n in gone]
    features = clip_files.write_npz(tmp_path / "features", splits)
    clip_files.write_labels(features / "labels.csv", labels)
    config = config_io.override(config_io.load_file(f"{small_runs.ROOT}/configs/knn.py:face"), [
        "--config.data.name=arrays", f"--config.data.dir={features}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ])  # fmt: skip
    data = vidjax.load_data(config)
    (tmp_path / "run").mkdir()
    with files.lock(tmp_path / "run"):
        small_runs.run(config, tmp_path / "run", data)
    gallery = vidjax.Gallery.create(tmp_path / "g", vidjax.restore(tmp_path / "run"), data)
    vectors = [clip.vector for clip in gallery.clips.values() if clip.identity == GONE]
    pieces = [row[:4].tobytes() for row in np.concatenate([*of_gone, vectors])]
    tables.write_ranking(tmp_path / "ranks.tsv", gallery.rank(data, split="val"))
    assert search(tmp_path, pieces) >= {"features", "cache", "g"}
    words = (f"--identity={GONE}", *(f"--clip={name}" for name in gone), tmp_path)
    run(*words, "--delete", code=1)
    left = places(*words)
    assert {kind for kind, _ in left.values()} == {"run", "gallery", "file"}
    for path in map(Path, left):  # what the command says that the user has to do
        if path == features / "labels.csv":
            clip_files.write_labels(path, {n: who for n, who in labels.items() if who != GONE})
        elif path.is_dir():
            files.remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    assert not search(tmp_path, [*pieces, GONE.encode()])
    assert not [path for path in tmp_path.rglob("*") if GONE in path.name]
    assert places(*words, code=0) == {}
