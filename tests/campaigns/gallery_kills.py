"""Kills changes of a gallery at random moments, or fills the disk.

After a kill, the gallery must equal the gallery before or after the change. No byte of a removed
vector may remain. If a write fails, as on a full disk, nothing is changed, and the same change
succeeds later.
"""

import contextlib
import itertools
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.helpers import limits, made_galleries
from vidjax.apps.gallery import store
from vidjax.apps.gallery.gallery import Gallery

PEOPLE = 100
MAX_DELAYS = (0.001, 0.004, 0.03)  # seconds from the start of a change to the kill
CLIPS: dict[str, store.StoredClip] = {
    f"clip {n}": made_galleries.make_clip(n, f"person {n // 2}") for n in range(2 * PEOPLE)
}


def draw_changes(seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yields ("remove", random people), and then ("enrol", the same people), without end."""
    rng = random.Random(seed)
    while True:
        people = rng.sample([f"person {n}" for n in range(PEOPLE)], rng.choice([1, 5, 40]))
        yield from [("remove", people), ("enrol", people)]


def change(gallery: Gallery, action: str, people: Sequence[str]) -> None:
    if action == "remove":
        gallery.remove(identity=people)
    else:
        new = {name: clip for name, clip in CLIPS.items() if clip.identity in people}
        made_galleries.add(gallery, new)


def change_on_request(folder: Path, seed: int) -> None:
    """Makes a change of a gallery for each line of stdin, until the process is killed."""
    gallery = Gallery(folder)
    for action, people in draw_changes(seed):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        change(gallery, action, people)


def make_two(folder: Path, other: Path) -> Gallery:
    """Makes two equal galleries in two folders; returns the gallery `other`."""
    gallery = made_galleries.make(other, CLIPS)
    shutil.copytree(other, folder)
    return gallery


def kill_once(folder: Path, place: Path, rng: random.Random) -> None:
    """Kills a change of a gallery, which must be whole or absent; `place` has a second gallery."""
    seed, count = rng.randrange(10**9), 1 + rng.randrange(6)
    other, before = make_two(folder, place / "other"), {}
    code = "from tests.campaigns.gallery_kills import *; "
    code += f"change_on_request(Path({str(folder)!r}), {seed})"
    pipes = {"stdin": subprocess.PIPE, "stderr": None}
    with limits.running([sys.executable, "-c", code], **pipes) as process:
        assert process.stdin and process.stdout
        for _ in range(count):
            process.stdout.readline()
            process.stdin.write("go\n")
            process.stdin.flush()
        time.sleep(rng.uniform(0, rng.choice(MAX_DELAYS)))
    contents = made_galleries.contents(folder)
    for action, people in itertools.islice(draw_changes(seed), count):
        before = made_galleries.contents(place / "other")
        change(other, action, people)
    after = made_galleries.contents(place / "other")
    assert contents in (before, after), f"seed {seed}, {count} changes"
    # To remove a person who is not enrolled fails, but it deletes files of the killed process.
    with contextlib.suppress(ValueError):
        Gallery(folder).remove(identity=["nobody"])
    assert made_galleries.contents(folder) == contents
    # Only the file of the gallery and its journal may be left.
    assert all(path.name.startswith(store.GALLERY_FILE) for path in folder.iterdir())
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    removed = [CLIPS[name].vector.tobytes()[:16] for name in CLIPS.keys() - contents["clip"].keys()]
    assert not any(part in content for part in removed), f"seed {seed}: bytes are left"


def fill_once(folder: Path, place: Path, rng: random.Random) -> int:
    """Makes changes with a limit on the size of files; returns how many of them failed."""
    seed, failed = rng.randrange(10**9), 0
    other = make_two(folder, place / "other")
    gallery, largest = Gallery(folder), max(path.stat().st_size for path in folder.iterdir())
    for action, people in itertools.islice(draw_changes(seed), 4):
        before = made_galleries.contents(folder)
        try:
            with limits.file_limit(rng.randrange(largest + 1)):
                change(gallery, action, people)
        except OSError:
            failed += 1
            assert made_galleries.contents(folder) == before
            change(gallery, action, people)
        change(other, action, people)
        assert made_galleries.contents(folder) == made_galleries.contents(place / "other")
    expected = made_galleries.answers(other)
    assert made_galleries.answers(gallery) == expected == made_galleries.answers(Gallery(folder))
    return failed
