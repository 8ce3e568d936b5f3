"""Faults of `vidjax extract`, `who` and galleries of films: kills, full disks, hostile files.

The film of `drawn.film` has three shots of four faces: Ada, then Eve, then Bob and Ada.
"""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.benchmarks import extract
from tests.campaigns.mutations import cut, flip, insert, repeat
from tests.helpers import drawn_people, films
from tests.helpers.clip_files import read_arrays
from tests.helpers.drawn_people import write_film, write_photo
from tests.helpers.limits import ROOT, children_of, file_limit, held_by, running
from tests.helpers.seen import contents, refused
from vidjax.apps.gallery import store
from vidjax.apps.video import log, media, media_files, pipeline
from vidjax.utils.errors import UserError

pytestmark = pytest.mark.slow


def start_extract(*words):
    """Starts `vidjax extract`; the context kills it at its end."""
    command = [sys.executable, "-m", "vidjax", "extract"]
    return running([*command, *words], cwd=ROOT, stdout=subprocess.DEVNULL)


def test_killed_extract_by_two_processes_gives_the_bytes_of_one(drawn, fault_seed, campaign):
    rng = random.Random(fault_seed)
    write_photo(drawn.folder / "photo.png", ("Ada", 20, 20), ("Bob", 80, 60))
    inputs = [drawn.film(), drawn.folder / "photo.png", f"--models={drawn.models}"]
    whole, out = drawn.folder / "whole", drawn.out

    def finish(out, workers):
        with start_extract(*inputs, f"--out={out}", f"--workers={workers}") as process:
            assert process.wait(60) == 0

    finish(whole, workers=1)
    for number in range(50 if campaign else 2):
        with start_extract(*inputs, f"--out={out}", "--workers=2") as process:
            # Waits for the first clip. Unlike glob, os.walk ignores folders that are deleted.
            is_early = number % 2 == 0
            while is_early and process.poll() is None and ".npz" not in str([*os.walk(out)]):
                time.sleep(0.002)
            time.sleep(rng.random() * (0.05 if is_early else 3))
            children = children_of(process.pid)
        for path in (out / "videos").glob("[!.]*.json"):  # films that the command has finished
            for name in (f"videos/{path.name}", f"{path.stem}.npz"):
                assert (out / name).read_bytes() == (whole / name).read_bytes()
        until = time.monotonic() + 5
        while any(map(held_by, children)):  # some children have memory, so they still run
            assert time.monotonic() < until, "a child goes on without its parent"
            time.sleep(0.01)
    finish(out, workers=2)
    assert contents(out) == contents(whole)


def test_extract_reports_a_killed_worker_and_refuses_a_second_call_meanwhile(drawn):
    film, out = drawn.film(), drawn.out
    with start_extract(film, f"--out={out}", f"--models={drawn.models}", "--workers=1") as process:
        while not (children := children_of(process.pid)) and process.poll() is None:
            time.sleep(0.005)
        for child in children:
            os.kill(child, signal.SIGSTOP)  # the first call waits, so its folder stays in use
        try:
            _, stderr = drawn.extract(film, code=2)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
        assert f"in use by process {process.pid} on {socket.gethostname()}" in stderr
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "that reads it was killed" in stderr
    assert not [*out.glob("*.npz")] and not [*out.glob(".extract-*")]
    assert drawn.extract(film)[0]["clips"] == 4


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_extract_that_a_signal_ends_leaves_no_partial_files(drawn, signum):
    with start_extract(drawn.film(), f"--out={drawn.out}", f"--models={drawn.models}") as process:
        while process.poll() is None and not [*drawn.out.glob(".extract-*/progress")]:
            time.sleep(0.002)
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
    assert not [*drawn.out.glob("*.extract-*")]


def test_extract_on_a_full_disk_leaves_no_partial_files(drawn):
    film, out = drawn.film(), drawn.out
    # A limit on the size of files stands for a full disk.
    with file_limit(1500):  # room for extract.json, but not for the clips of the film
        _, stderr = drawn.extract(film, flags=["--workers=1"], code=2)
    assert "File too large" in stderr
    assert not [*out.glob("party*.npz"), *out.glob(".extract-*"), *out.rglob("*.partial")]
    assert drawn.extract(film)[0]["clips"] == 4


def test_odd_file_names_give_distinct_printable_clip_names(drawn, read_here):
    odd_names = [
        b"x..png", b"=cmd().png", b"new\nline.png", b"\x1b[2J.png", b"not \xff utf-8.png",
        b"x" * 251 + b".png", b"a.s000.t00.png", b"a.png", b"A.png", b"a.PNG",
        b"\xe2\x80\xaetxt.png",
    ]  # fmt: skip
    place, features = drawn.folder / "in", drawn.out / "features"
    for number, name in enumerate(odd_names):
        write_photo(place / os.fsdecode(name), ("Ada", 20 + number, 20))
    film = drawn.film().rename(place / "a.mkv")
    _, stderr = drawn.who(place, people=False, flags=["--workers=4"])
    assert "\x1b" not in stderr and "\u202e" not in stderr
    found = media.read_media_files(features)
    clips = [track.clip for film in found for track in film.tracks]
    assert len({*clips}) == len(clips) == len(read_arrays(features))
    assert all("/" not in clip and clip.isprintable() for clip in clips)
    # If the order of the files changes, clips keep their names, and nothing is extracted again.
    paths = [film, *reversed(sorted(place.iterdir()))]
    again = pipeline.extract_files(paths, features, drawn.models)
    assert len(found) == len(odd_names) + 1 and all(outcome.kept for outcome in again)


def test_hostile_feature_folders_end_in_short_errors(drawn, read_here):
    drawn.extract(drawn.film())
    path = drawn.out / "videos" / "party.json"
    film = json.loads(path.read_text())
    times = ((2, 1), (-1, 1), (0, 1e300), (0, "1"), (float("nan"), 1))
    tracks = [{"start_s": start_s, "end_s": end_s} for start_s, end_s in times]
    tracks += [{"clip": clip} for clip in ("../../x", "a\nb", "\ud800", "x" * 5000, 5)]
    fields = [{"tracks": [film["tracks"][0] | wrong]} for wrong in tracks]
    fields += [{"video": name} for name in ("../x.mp4", "\x1b[2J", "x" * 5000, [])]
    fields += [{"seconds": 10**400}, {"shots": [[0, 1], [1]]}]
    texts = ["", "[]", "{}", '{"\\ud800": 1}', "[" * 200_000, '{"video": "' + "x" * 1_000_000]
    read = functools.partial(media.read_media_files, drawn.out)
    for text in (*texts, *(json.dumps(film | wrong) for wrong in fields)):
        path.write_text(text)
        assert len(refused(read)) < 1000
    # Two films with one path of 6,000 folders: reading compares their folders, and must be quick.
    source, began = {"address": "/a" * 6000, "size": 1, "mtime_ns": 0, "inode": 1}, time.monotonic()
    for place in (path, path.with_name("y.json")):
        place.write_text(json.dumps(film | {"source": source}))
    shutil.copy(drawn.out / "party.npz", drawn.out / "y.npz")
    assert len(read()) == 2 and time.monotonic() - began < 5
    path.unlink()
    path.symlink_to("/etc/passwd")
    refused(read, "link")
    for text in ("", "[]", '{"format": 1, "models": {"face_embedder": "x"}}', "[" * 100_000):
        (drawn.out / "extract.json").write_text(text)
        refused(lambda: media.read_extraction(drawn.out))


def test_folders_that_may_not_be_read_are_reported(tmp_path, monkeypatch):
    (tmp_path / "films" / "closed").mkdir(parents=True, mode=0)
    (tmp_path / "films" / "a.mp4").touch()
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # "nobody", because root may read all folders
    try:
        with pytest.raises(PermissionError):
            media_files.list_files([Path("films/closed")])
        notes, paths = [], [Path("films"), Path("films/a.mp4")]
        assert media_files.list_files(paths, notes.append) == [Path("films/a.mp4")]
    finally:
        os.seteuid(user)
    assert "closed is left out, because you may not read" in notes[0].text and len(notes) == 1


def test_who_refuses_to_write_into_a_folder_with_other_files(drawn):
    drawn.befriend("Ada")
    film, mine = drawn.film(), drawn.folder / "mine"
    (mine / "subtitles").mkdir(parents=True)
    (mine / "subtitles" / "own.vtt").write_text("mine")
    before = contents(drawn.folder)
    for out in (mine, drawn.folder, drawn.friends, drawn.friends / "out"):
        drawn.out = out
        _, stderr = drawn.who(film, code=2)
        assert re.search("(another|new) folder", stderr) and len(stderr.splitlines()) <= 3
    assert contents(drawn.folder) == before


def test_who_continues_after_a_kill_that_left_an_unfinished_gallery(drawn, read_here):
    """The kill also left a file with which a gallery tests whether its folder is writable."""
    folder, half = drawn.out / "gallery", drawn.folder / "half"
    folder.mkdir(parents=True)
    log.append(drawn.out, [])
    (folder / ".write-test-0badc0de").touch()
    # With a small cache, SQLite writes a part of the change to the file before the change ends.
    with contextlib.closing(sqlite3.connect(half)) as gallery:
        for words in ("PRAGMA cache_size=1", "BEGIN", "CREATE TABLE clip (vector BLOB)"):
            gallery.execute(words)
        gallery.executemany("INSERT INTO clip VALUES (?)", 400 * [(os.urandom(3000),)])
        shutil.copy(half, folder / store.GALLERY_FILE)
        shutil.copy(f"{half}-journal", folder / store.JOURNAL_FILE)
        assert all(path.stat().st_size for path in folder.glob("gallery*"))
    assert drawn.who(drawn.film(), people=False)[0]["groups"] == 3  # Ada, Bob, Eve


def test_mutated_films_and_photos_are_read_or_refused(tmp_path, fault_seed, campaign):
    """The files are read in this process, so no limit of memory or time ends the reader."""
    models = drawn_people.write_voices(drawn_people.write_models(tmp_path / "models"))
    faces, sound = [("Ada", 20, 30), ("Bob", 80, 50)], drawn_people.tone(440, 2)
    shots = ((1, 20, faces), (1, 60, faces[:1]))
    for name, codec in {"a.mkv": "libx264", "a.avi": "mpeg4", "a.mp4": "libx264"}.items():
        write_film(tmp_path / name, *shots, codec=codec, sound=sound if name == "a.mp4" else None)
    for name, codec in {"a.png": "png", "a.jpg": "mjpeg", "a.webp": "libwebp"}.items():
        photo = films.photo(drawn_people.picture(faces), codec, orientation=6)
        (tmp_path / name).write_bytes(photo)
    for path in tmp_path.glob("a.*"):
        content, outcomes = path.read_bytes(), Counter()
        for number in range(1000 if campaign else 25):
            rng, began = random.Random(f"{fault_seed} {path.name} {number}"), time.process_time()
            path.write_bytes(content)
            rng.choice((flip, cut, insert, repeat))(path, rng)
            try:
                drawn_people.extract(path, tmp_path / "out", models)
                outcomes["read"] += 1
            except (UserError, MemoryError) as error:  # a mutated size can be enormous
                assert len(str(error).splitlines()) <= 3, (path, number)
                outcomes["refused"] += 1
            assert time.process_time() - began < 10, (path, number)
        # Each part of a PNG has a checksum, so all of its mutations may be refused.
        assert outcomes["refused"] and (outcomes["read"] or path.suffix == ".png"), (path, outcomes)


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_length_of_a_film(drawn):
    shots = [(4, 20 + 7 * n, [("Ada", 20 + n, 30), ("Bob", 70, 50)]) for n in range(15)]
    minute, peaks = drawn.folder / "minute.mp4", []
    write_film(minute, *shots, codec="libx264")
    for minutes in (2, 30):
        out = drawn.folder / f"out{minutes}"
        film = extract.repeated(drawn.folder / f"{minutes}.mp4", minute, minutes)
        peaks.append(extract.peak(film, out, drawn.models))
        (film,) = media.read_media_files(out)
        assert film.seconds == pytest.approx(60 * minutes, rel=0.01)
        assert len(film.tracks) >= 25 * minutes  # a minute has 15 shots of 2 faces
    assert peaks[1] < 1 << 30 and peaks[1] - peaks[0] < 30 << 20, peaks  # 1 GB, and 30 MB
