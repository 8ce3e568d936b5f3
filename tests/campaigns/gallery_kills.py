"""Kills changes of a gallery at random moments, and fills the disk; the gallery stays whole.

What is left must be the gallery before the change or after it, row by row, without a byte of a
removed vector. Where writes fail, as on a full disk, a change fails as a whole, and works when it
is made again.
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
BATCH = 40  # people of the largest enrolment or removal
SPANS = (0.001, 0.004, 0.03)  # seconds from the start of a change: writing takes about as long
CLIPS: dict[str, StoredClip] = {
    f"clip {n}": made_galleries.make_clip(n, f"person {n // 2}") for n in range(2 * PEOPLE)
}


def changes(seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yields changes without end: what is done, and to whom; every second one reverts the first."""
    rng = random.Random(seed)
    while True:
        people = rng.sample([f"person {n}" for n in range(PEOPLE)], rng.choice([1, 5, BATCH]))
        yield from [("remove", people), ("enrol", people)]


def change(people: Gallery, what: str, whom: Sequence[str]) -> None:
    if what == "remove":
        people.remove(identity=whom)
    else:
        people.add({name: clip for name, clip in CLIPS.items() if clip.identity in set(whom)})


def work(folder: Path, seed: int) -> None:
    """Makes changes without end, in the process that is killed."""
    people = Gallery(folder)
    for number, (what, whom) in enumerate(changes(seed)):
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        sys.stdin.readline()  # go
        change(people, what, whom)


class Expected:
    """The states of a gallery before and after each of a sequence of changes."""

    def __init__(self, folder: Path, seed: int):
        self._changes, self._people = changes(seed), made_galleries.make(folder, CLIPS)
        self.states = [made_galleries.contents(folder)]

    def after(self, count: int) -> dict[str, list]:
        while len(self.states) <= count:
            change(self._people, *next(self._changes))
            self.states.append(made_galleries.contents(self._people.folder))
        return self.states[count]


def kill_once(folder: Path, place: Path, rng: random.Random) -> None:
    """Kills a process that changes a gallery; it must not leave another one."""
    seed = rng.randrange(10**9)
    expected = Expected(place / "expected", seed)
    shutil.copytree(place / "expected", folder)
    last = rng.randrange(6)
    code = f"from tests.campaigns.gallery_kills import *; work(Path({str(folder)!r}), {seed})"
    pipes = {"stdin": subprocess.PIPE, "stderr": None}
    with limits.running([sys.executable, "-c", code], **pipes) as process:
        assert process.stdin and process.stdout
        for _ in range(last + 1):
            process.stdout.readline()
            process.stdin.write("go\n")
            process.stdin.flush()
        time.sleep(rng.uniform(0, rng.choice(SPANS)))
    people = Gallery(folder)  # opens, and goes on
    found = made_galleries.contents(folder)
    assert found in (expected.after(last), expected.after(last + 1)), f"seed {seed}, change {last}"
    with contextlib.suppress(ValueError):  # nobody of this name: cleans up all the same
        people.remove(identity=["nobody"])
    assert made_galleries.contents(folder) == found
    # A change that had not begun to write leaves its journal to the next change.
    assert all(path.name.startswith(store.GALLERY_FILE) for path in folder.iterdir())
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    gone = [clip.vector.tobytes() for name, clip in CLIPS.items() if name not in found["clip"]]
    assert not [vector for vector in gone if vector[:16] in content], f"seed {seed}: bytes are left"


def fill_once(folder: Path, place: Path, rng: random.Random) -> int:
    """Makes changes under a limit of the size of files; returns how many failed."""
    seed = rng.randrange(10**9)
    expected = Expected(place / "expected", seed)
    shutil.copytree(place / "expected", folder)
    people, failed = Gallery(folder), 0
    largest = max(path.stat().st_size for path in folder.iterdir())
    for done, (what, whom) in enumerate(itertools.islice(changes(seed), 4)):
        try:
            with limits.file_limit(rng.randrange(largest + 1)):
                change(people, what, whom)
        except OSError:
            failed += 1
            assert made_galleries.contents(folder) == expected.after(done)
            change(people, what, whom)
        assert made_galleries.contents(folder) == expected.after(done + 1)
    wanted = made_galleries.answers(Gallery(place / "expected"))
    assert made_galleries.answers(people) == wanted == made_galleries.answers(Gallery(folder))
    return failed
