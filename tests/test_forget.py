"""Every place of a person is named, and what vidjax may delete is deleted: then no byte is left."""

import functools
import json
import os
import stat
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_galleries, small_runs
from vidjax import config_io, files, tables
from vidjax.data import cache

GONE = "Ada Lovelace"


@pytest.fixture
def run(say):
    return functools.partial(say, "forget")


@pytest.fixture
def places(run):
    """Returns path -> kind and remedy, of what the command names."""

    def find(*words, code=0):
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
    before = made_galleries.contents(others.folder)

    found = places(f"--identity={GONE}", tmp_path)
    assert {path: kind for path, (kind, _) in found.items()} == {
        str(tmp_path / name): kind
        for name, kind in {
            "g": "gallery", "cache/arrays/with": "records", "runs/a": "run", "runs/b": "run",
            "photos": "who", "named": "who",
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
    said = run(f"--identity={GONE}", "--clip=ada 1", "--delete", tmp_path)
    assert "places      4, 0 of them deleted" in said and "train without them" in said


def test_the_printed_commands_find_names_in_other_files(tmp_path, run):
    (tmp_path / "answers.jsonl").write_text(json.dumps({"clip": "x", "identity": GONE}))
    (tmp_path / "names.tsv").write_text(f"video\tidentity\nx.mp4\t{GONE}\n")
    (tmp_path / "ranking.txt").write_text("Ada%20Lovelace x y\n")
    (tmp_path / f"{GONE}.jpg").write_bytes(b"")
    (tmp_path / "other.txt").write_text("Ada\n")
    grep, find = run(f"--identity={GONE}", "--json", tmp_path)["commands"]
    assert f"  {grep}\n  {find}\n" in run(f"--identity={GONE}", tmp_path)
    for command, names in (
        (grep, {"answers.jsonl", "names.tsv", "ranking.txt"}),
        (find, {f"{GONE}.jpg"}),
    ):
        assert {path.name for path in found_by(command)} == names


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
    found = places("--clip=some clip", tmp_path, code=1)
    assert found == {str(tmp_path / name): ("unread", "search it yourself")
                     for name in ("g", "closed", "run")}  # fmt: skip
    assert "--identity=NAME" in run(tmp_path, code=2)
    assert "no such folder" in run("--clip=x", tmp_path / "absent", code=2)


def test_a_gallery_that_is_in_use_is_told_and_the_rest_is_deleted(tmp_path, places):
    people = made_galleries.make(tmp_path / "g", {"a/1": made_galleries.make_clip(1, GONE)})
    converted(tmp_path / "records" / "0", "a/1")
    words = (f"--identity={GONE}", tmp_path, "--delete")
    with people._store.open(write=True):
        found = places(*words, code=1)
    assert found[str(people.folder)] == ("gallery", "--delete")
    assert found[str(tmp_path / "records" / "0")][1].startswith("deleted")
    assert places(*words)[str(people.folder)] == ("gallery", "deleted")


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
    run(f"--identity={GONE}", *clips, "--delete", tmp_path)
    left = places(f"--identity={GONE}", *clips, tmp_path)
    assert {kind for kind, _ in left.values()} == {"run", "gallery"}
    answer = run(f"--identity={GONE}", *clips, "--json", tmp_path)
    others = [path for command in answer["commands"] for path in found_by(command)]
    for path in {*map(Path, left), *others}:  # what the command says that the user has to do
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
    assert places(f"--identity={GONE}", *clips, tmp_path) == {}
