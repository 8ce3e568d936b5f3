"""Changes of a gallery are killed at random moments, or the disk is full. The gallery stays whole.

After a kill, the gallery must equal, row by row, the gallery before or after the change. No byte of
a removed vector may remain. If a write fails, as on a full disk, nothing is changed, and the same
change succeeds later.
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
from vidjax.apps.gallery.store import StoredClip

PEOPLE = 100
SPANS = (0.001, 0.004, 0.03)  # most seconds from the start of a change to its kill
CLIPS: dict[str, StoredClip] = {
    f"clip {n}": made_galleries.make_clip(n, f"person {n // 2}") for n in range(2 * PEOPLE)
}


def changes(seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yields ("remove", people) and then ("enrol", people) for the same people, without end."""
    rng = random.Random(seed)
    while True:
        people = rng.sample([f"person {n}" for n in range(PEOPLE)], rng.choice([1, 5, 40]))
        yield from [("remove", people), ("enrol", people)]


def change(people: Gallery, what: str, whom: Sequence[str]) -> None:
    if what == "remove":
        people.remove(identity=whom)
    else:
        people.add({name: clip for name, clip in CLIPS.items() if clip.identity in set(whom)})


def work(folder: Path, seed: int) -> None:
    """Makes changes until the process is killed; each change waits for a line."""
    people = Gallery(folder)
    for number, (what, whom) in enumerate(changes(seed)):
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        sys.stdin.readline()  # go
        change(people, what, whom)


def make_two(folder: Path, other: Path, seed: int, count: int) -> list[dict[str, list]]:
    """Makes two equal galleries and `count` changes of the other gallery.

    Returns the contents before the first change, and after each change.
    """
    people = made_galleries.make(other, CLIPS)
    shutil.copytree(other, folder)
    states = [made_galleries.contents(other)]
    for what, whom in itertools.islice(changes(seed), count):
        change(people, what, whom)
        states.append(made_galleries.contents(other))
    return states


def kill_once(folder: Path, place: Path, rng: random.Random) -> None:
    """Kills a process that changes a gallery; asserts that the gallery is whole."""
    seed, last = rng.randrange(10**9), rng.randrange(6)
    states = make_two(folder, place / "other", seed, last + 1)
    code = f"from tests.campaigns.gallery_kills import *; work(Path({str(folder)!r}), {seed})"
    pipes = {"stdin": subprocess.PIPE, "stderr": None}
    with limits.running([sys.executable, "-c", code], **pipes) as process:
        assert process.stdin and process.stdout
        for _ in range(last + 1):
            process.stdout.readline()
            process.stdin.write("go\n")
            process.stdin.flush()
        time.sleep(rng.uniform(0, rng.choice(SPANS)))

    people = Gallery(folder)
    contents = made_galleries.contents(folder)
    assert contents in states[-2:], f"seed {seed}, change {last}"

    # A change of nobody fails, but deletes what the killed change left behind.
    with contextlib.suppress(ValueError):
        people.remove(identity=["nobody"])
    assert made_galleries.contents(folder) == contents
    # If the killed change had not begun to write, its journal remains until the next change.
    assert all(path.name.startswith(store.GALLERY_FILE) for path in folder.iterdir())
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    removed = [CLIPS[name].vector.tobytes()[:16] for name in CLIPS.keys() - contents["clip"].keys()]
    assert not [part for part in removed if part in content], f"seed {seed}: bytes are left"


def fill_once(folder: Path, place: Path, rng: random.Random) -> int:
    """Makes changes with a limit on the size of files; returns the number of failed changes."""
    seed = rng.randrange(10**9)
    states = make_two(folder, place / "other", seed, 4)
    people, failed = Gallery(folder), 0
    largest = max(path.stat().st_size for path in folder.iterdir())
    for done, (what, whom) in enumerate(itertools.islice(changes(seed), 4)):
        try:
            with limits.file_limit(rng.randrange(largest + 1)):
                change(people, what, whom)
        except OSError:
            failed += 1
            assert made_galleries.contents(folder) == states[done]
            change(people, what, whom)
        assert made_galleries.contents(folder) == states[done + 1]
    wanted = made_galleries.answers(Gallery(place / "other"))
    assert made_galleries.answers(people) == wanted == made_galleries.answers(Gallery(folder))
    return failed
