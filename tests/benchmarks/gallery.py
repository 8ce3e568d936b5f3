"""Times of a gallery: enrolling, removing and finding people, on made-up vectors.

    python -m tests.benchmarks.gallery FOLDER [--people=10000,1000000]
    python -m tests.benchmarks.gallery FOLDER --start

10,000 people have a face, a head and an audio vector of 512 each; 1,000,000 people one vector of
512, which is 4 GB on the disk. A person has one clip. Times are the fastest, the
median and the slowest of several tries, after the gallery is open. Brute force is a product of
numpy's with all coefficients, whose rounding depends on the order of people: the least that a
search needs.

`--start` measures processes from their start to their end, for a gallery of cards with 20 people
and 150 strangers: seconds of time and of the processor, medians of several turns, beside a process
that imports numpy alone.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vidjax.extract.cards import BackEnd
from vidjax.gallery import backend as backend_lib
from vidjax.gallery.backend import Backend
from vidjax.gallery.gallery import Gallery
from vidjax.gallery.store import Clip, Origin
from vidjax.models.two_covariance import Settings

WIDTH = 512
SETTINGS = Settings(
    within=0.8, between=0.75, scale=0.1, unenrolled=-2.0, stranger=-4.0, centred=1.0
)
TRIES = 20
RUN = Origin("made-up", "0" * 64, centred=True)
CARDS = Origin("made-up", "0" * 64, centred=True, cards={"face": "0" * 64})
TURNS = 7  # of processes that start
ANSWER = """
from pathlib import Path
import numpy as np
from vidjax import Gallery
clips = {x.stem: dict(np.load(x)) for x in Path("clips").iterdir()}
Gallery("people").identify(clips)
"""
STARTS = {
    "numpy alone": ["-c", "import numpy"],
    "a first answer from Python": ["-c", ANSWER],
    "vidjax gallery --help": ["-m", "vidjax", "gallery", "--help"],
    "vidjax gallery list": ["-m", "vidjax", "gallery", "list", "people"],
    "vidjax gallery identify": ["-m", "vidjax", "gallery", "identify", "people", "--input=clips"],
}


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


def make_small(folder: Path) -> None:
    """Makes a gallery of cards in `folder/people`, and five clips to ask for in `folder/clips`."""
    rng = np.random.default_rng(0)
    same, different = (0.958, 0.0146), (0.83, 0.0352)  # cosines of dlib's vectors of faces
    card = BackEnd(centre=[0.0] * 128, same=same, different=different, pairs=(1, 1), data="made-up")
    faces = _near(rng.standard_normal((175, 128), np.float32), rng)
    clips = {f"clip {n}": Clip(f"person {n}", x) for n, x in enumerate(faces[:20])}
    clips |= {f"stranger {n}": Clip(None, x) for n, x in enumerate(faces[20:170])}
    shutil.rmtree(folder, ignore_errors=True)
    Gallery.of_clips(folder / "people", CARDS, backend_lib.of_cards({"face": card}), clips)
    (folder / "clips").mkdir()
    for number, face in enumerate(faces[170:]):
        np.savez(folder / "clips" / f"{number}.npz", face=face)


def start(folder: Path) -> dict[str, dict[str, float]]:
    """Returns what each process of STARTS takes: medians in seconds, and beside numpy's."""
    make_small(folder)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path[:1]))}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
    for turn in range(1 + TURNS):  # the first turn fills caches
        for name, words in STARTS.items():
            began, used = time.perf_counter(), _of_children()
            command = [sys.executable, *words]
            subprocess.run(command, cwd=folder, env=env, capture_output=True, check=True)
            if turn:
                found[name].append((time.perf_counter() - began, _of_children() - used))
    medians = {
        name: [statistics.median(x) for x in zip(*some, strict=True)]
        for name, some in found.items()
    }
    least = medians["numpy alone"]
    return {
        name: {"seconds": x, "processor": y, "times numpy": y / least[1]}
        for name, (x, y) in medians.items()
    }


def _of_children() -> float:
    """Returns the seconds of the processor that ended children of this process have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the times as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", default="10000,1000000")
    parser.add_argument("--start", action="store_true")
    args = parser.parse_args(argv)
    if args.start:
        for name, found in start(args.folder / "small").items():
            told = {key: round(value, 3) for key, value in found.items()}
            sys.stdout.write(json.dumps({"process": name, **told}) + "\n")
        return 0
    for size in map(int, args.people.split(",")):
        folder = args.folder / f"gallery-{size}"
        found = measure(folder, size, 3 if size <= 100_000 else 1)
        shutil.rmtree(folder)
        sys.stdout.write(json.dumps({**found, "cores": os.cpu_count()}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
