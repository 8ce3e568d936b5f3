"""Times of a gallery: enrolling, removing and finding people, on made-up vectors.

    python -m tests.benchmarks.gallery FOLDER [--people=10000,1000000]

10,000 people have a face, a head and an audio vector of 512 each; 1,000,000 people one vector of
512, which is 4 GB on the disk. A person has one clip. Times are the fastest, the
median and the slowest of several tries, after the gallery is open. Brute force is a product of
numpy's with all coefficients, whose rounding depends on the order of people: the least that a
search needs.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vidjax.gallery import backend as backend_lib
from vidjax.gallery.backend import Backend
from vidjax.gallery.gallery import Gallery
from vidjax.gallery.store import Clip, Origin
from vidjax.models.plda import Settings

WIDTH = 512
SETTINGS = Settings(
    within=0.8, between=0.75, scale=0.1, unenrolled=-2.0, stranger=-4.0, centred=1.0
)
TRIES = 20
RUN = Origin("made-up", "0" * 64, centred=True)


def make_front(parts: Sequence[str], rng: np.random.Generator) -> Backend:
    """Returns a front that is fitted to some people of their own."""
    people = rng.standard_normal((400, WIDTH), np.float32)
    labels = np.repeat(np.arange(1, 401), 3)
    vectors = {name: _near(people[labels - 1], rng) for name in parts}
    return backend_lib.fit(vectors, labels, centred=True, settings=SETTINGS)


def _near(centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns unit vectors near some centres."""
    x = centres + 0.5 * rng.standard_normal(centres.shape, np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make_clips(
    num_parts: int, count: int, rng: np.random.Generator, start: int = 0
) -> dict[str, Clip]:
    """Returns one clip of each of `count` people."""
    parts = [_near(rng.standard_normal((count, WIDTH), np.float32), rng) for _ in range(num_parts)]
    rows = np.concatenate(parts, axis=1)
    return {
        f"clip_{start + number:07}": Clip(f"person_{start + number:07}", row)
        for number, row in enumerate(rows)
    }


def timed(action: Callable[[int], object], tries: int) -> dict[str, float]:
    """Returns the fastest, the median and the slowest of several times, in milliseconds."""
    times = []
    for number in range(tries):
        began = time.perf_counter()
        action(number)
        times.append(1000 * (time.perf_counter() - began))
    return {"fastest": min(times), "median": float(np.median(times)), "slowest": max(times)}


def brute_force(num_people: int, num_parts: int, rng: np.random.Generator) -> dict[str, float]:
    """Returns the times of products of numpy's with all coefficients."""
    parts = [rng.standard_normal((num_people, WIDTH), np.float32) for _ in range(num_parts)]
    vector = rng.standard_normal(WIDTH).astype(np.float32)
    return timed(lambda _: np.argmax(sum(x @ vector for x in parts)), TRIES)


def measure(folder: Path, num_people: int, num_parts: int) -> dict[str, object]:
    """Returns times in milliseconds, of a gallery that is made in a folder."""
    rng = np.random.default_rng(0)
    names = ["face", "head", "audio"][:num_parts]
    shutil.rmtree(folder, ignore_errors=True)
    clips = make_clips(num_parts, num_people, rng)
    began = time.perf_counter()
    Gallery.of_clips(folder, RUN, make_front(names, rng), clips)
    found: dict[str, object] = {"people": num_people, "parts": num_parts}
    found["create_seconds"] = time.perf_counter() - began
    del clips
    began = time.perf_counter()
    people = Gallery(folder)
    found["open_seconds"] = time.perf_counter() - began
    found["bytes"] = sum(file.stat().st_size for file in folder.iterdir())

    query = make_clips(num_parts, TRIES, rng, 5_000_000)
    parts = people.backend.split(np.stack([clip.vector for clip in query.values()]))

    def identify(number: int) -> None:
        (logs,) = people.index.search([x[number : number + 1] for x in parts])
        people.index.best(logs, 5)

    identify(0)
    found["identify"] = timed(identify, TRIES)
    found["brute_force"] = brute_force(num_people, num_parts, rng)
    for key, start in {"": 2_000_000, "_sync": 3_000_000}.items():
        people = Gallery(folder, sync=bool(key))
        for count, tries in ((1, TRIES), (1000, 1)):
            clips = make_clips(num_parts, count * tries, rng, start + 500 * count)
            turns = [dict(list(clips.items())[n * count :][:count]) for n in range(tries)]
            gone = [[str(clip.identity) for clip in turn.values()] for turn in turns]
            add = timed(lambda n, p=people, turns=turns: p.add(turns[n]), tries)
            remove = timed(lambda n, p=people, gone=gone: p.remove(identity=gone[n]), tries)
            found |= {f"enrol_{count}{key}": add, f"remove_{count}{key}": remove}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the times as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", default="10000,1000000")
    args = parser.parse_args(argv)
    for size in map(int, args.people.split(",")):
        folder = args.folder / f"gallery-{size}"
        found = measure(folder, size, 3 if size <= 100_000 else 1)
        shutil.rmtree(folder)
        sys.stdout.write(json.dumps({**found, "cores": os.cpu_count()}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
