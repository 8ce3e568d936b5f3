"""Times of a gallery: opening it, finding, enrolling and removing people, on made-up vectors.

    python -m tests.benchmarks.gallery [--people=10000] [--start]

Up to 100,000 people have a face, a head and an audio vector of 512 each. More people have one
vector of 512, and nobody is removed. Times are medians, with processor times in brackets. A search
needs at least one product of numpy's with all coefficients.

With `--start`, whole processes ask a gallery of cards of 20 people and 150 strangers once. The
times are medians of seven turns, after a turn that fills caches.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks import common
from tests.benchmarks.decision import CARD
from tests.helpers.embeddings import unit
from vidjax.apps.gallery import backend as backend_lib
from vidjax.apps.gallery.backend import MAX_BLOCK_PEOPLE, Backend, Index
from vidjax.apps.gallery.gallery import Gallery, Vectors
from vidjax.apps.gallery.store import State, Store, StoredClip, VectorOrigin, group
from vidjax.models.two_covariance import Settings

WIDTH = 512
SETTINGS = Settings(
    within=0.8, between=0.75, scale=0.1, unenrolled=-2.0, stranger=-4.0, centred=1.0
)
TRIES = 20
MANY = 100_000  # people from which on they have one part, and nobody is removed
CARDS = VectorOrigin("made-up", "0" * 64, True, {"face": "0" * 64})
TURNS = 7
ANSWER = """
from pathlib import Path
import numpy as np
from vidjax import Gallery
Gallery("people").identify({x.stem: dict(np.load(x)) for x in Path("clips").iterdir()})
"""
LEAST = "numpy only"
STARTS = {
    LEAST: ["-c", "import numpy"],
    "a first answer from Python": ["-c", ANSWER],
    "vidjax gallery --help": ["-m", "vidjax", "gallery", "--help"],
    "vidjax gallery list": ["-m", "vidjax", "gallery", "list", "people"],
    "vidjax gallery identify": ["-m", "vidjax", "gallery", "identify", "people", "--input=clips"],
}


def near(centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return unit(centres + 0.5 * rng.standard_normal(centres.shape, np.float32))


def make_front(parts: Sequence[str], rng: np.random.Generator) -> Backend:
    """Returns a front that is fitted to some people of their own."""
    people = rng.standard_normal((400, WIDTH), np.float32)
    labels = np.repeat(np.arange(1, 401), 3)
    vectors = {name: near(people[labels - 1], rng) for name in parts}
    return backend_lib.fit(vectors, labels, centred=True, settings=SETTINGS)


def make_clips(
    num_parts: int, count: int, rng: np.random.Generator, start: int = 0
) -> dict[str, StoredClip]:
    parts = [near(rng.standard_normal((count, WIDTH), np.float32), rng) for _ in range(num_parts)]
    return {
        f"clip_{number:07}": StoredClip(f"person_{number:07}", row)
        for number, row in enumerate(np.concatenate(parts, axis=1), start)
    }


def write(folder: Path, num_people: int, parts: Sequence[str], rng: np.random.Generator) -> None:
    """Writes a gallery whose people have the vectors of a few in turn, under names of their own."""
    front = make_front(parts, rng)
    few = list(make_clips(len(parts), min(MAX_BLOCK_PEOPLE, num_people), rng).values())
    vectors = np.stack([clip.vector for clip in few])
    block = front.enrol([str(clip.identity) for clip in few], vectors, np.arange(len(few)))
    names = [f"person_{number:07}" for number in range(num_people)]
    pieces = (tuple(names[at : at + len(few)]) for at in range(0, num_people, len(few)))
    blocks = (block.take(np.arange(len(some)))._replace(names=some) for some in pieces)
    clips = {
        f"clip_{n:07}": StoredClip(name, few[n % len(few)].vector) for n, name in enumerate(names)
    }
    folder.mkdir(mode=0o700)
    origin = VectorOrigin("made-up", "0" * 64, centred=True)
    Store(folder).create(State(1, origin, Index(front, blocks), clips, group(clips)))


def timed(action: Callable[[int], object], tries: int) -> str:
    """Returns medians of several times as text: of the clock, and of all cores of the processor."""
    times = []
    for number in range(tries):
        began = time.perf_counter(), time.process_time()
        action(number)
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    clock, processor = (
        f"{x:.1f} s" if x >= 1 else f"{1000 * x:.3g} ms" for x in np.median(times, axis=0).tolist()
    )
    return f"{clock} ({processor})"


def measure(folder: Path, num_people: int, num_parts: int) -> Iterator[tuple[str, str]]:
    """Yields what was done and how long it took, in a gallery that is made in a folder."""
    rng = np.random.default_rng(0)
    write(folder, num_people, ["face", "head", "audio"][:num_parts], rng)
    opened: list[Gallery] = []
    yield "open", timed(lambda _: opened.append(Gallery(folder)), 1)
    (people,) = opened
    yield "memory of the process", f"{common.peak_bytes() / common.MIB / 1024:.1f} GB"
    query = np.stack([x.vector for x in make_clips(num_parts, TRIES, rng, 5_000_000).values()])
    parts = dict(zip(people.backend.widths, people.backend.split(query), strict=True))
    asked = [
        Vectors(("query",), {part: x[n : n + 1] for part, x in parts.items()}, (None,))
        for n in range(TRIES)
    ]
    people.identify(asked[0], threshold=0.5)  # the first answer makes tables
    yield "identify a clip", timed(lambda n: people.identify(asked[n], threshold=0.5), TRIES)
    blocks = zip(*(block.linear for block in people.index.blocks), strict=True)
    rows, one = [np.concatenate(x) for x in blocks], query[0, :WIDTH]
    product = timed(lambda _: np.argmax(sum(x @ one for x in rows)), TRIES)
    yield "the same as one product of numpy's", product
    for count, tries in ((1, TRIES), (1000, 1)):
        made = [*make_clips(num_parts, count * tries, rng, 2_000_000 + 1_000 * count).items()]
        turns = [dict(made[n * count :][:count]) for n in range(tries)]
        enrolled = "a clip" if count == 1 else f"{count:,} clips at once"
        yield f"enrol {enrolled}", timed(lambda n, t=turns: people.add(t[n]), tries)
        if num_people <= MANY and count == 1:
            gone = [next(iter(turn.values())).identity or "" for turn in turns]
            yield "remove a person", timed(lambda n, g=gone: people.remove(identity=g[n]), tries)


def measure_starts(folder: Path) -> Iterator[tuple[str, ...]]:
    faces = unit(np.random.default_rng(0).standard_normal((175, 128))).astype(np.float32)
    clips = {
        f"clip {n}": StoredClip(f"person {n}" if n < 20 else None, face)
        for n, face in enumerate(faces[:-5])
    }
    Gallery.of_clips(folder / "people", CARDS, backend_lib.make_card_backend({"face": CARD}), clips)
    (folder / "clips").mkdir()
    for number, face in enumerate(faces[-5:]):
        np.savez(folder / "clips" / f"{number}.npz", face=face)
    env = os.environ | {"PYTHONPATH": str(common.ROOT)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
    for _ in range(1 + TURNS):
        for name, words in STARTS.items():
            found[name].append(common.timed([sys.executable, *words], cwd=folder, env=env))
    least = np.median(found[LEAST][1:], axis=0)[1]
    for name, times in found.items():
        seconds, processor = np.median(times[1:], axis=0)
        yield name, f"{seconds:.2f}", f"{processor:.2f}", f"{processor / least:.1f}"


def main() -> None:
    args = common.parse(__doc__, "--start", people=10_000)
    with tempfile.TemporaryDirectory() as folder:
        if args.start:
            header = ["process", "seconds", "of the processor", "times numpy"]
            common.write_table(header, list(measure_starts(Path(folder))))
            return
        num_parts = 3 if args.people <= MANY else 1
        rows = list(measure(Path(folder, "people"), args.people, num_parts))
    common.write_table(["", f"{args.people:,} people, {num_parts} x {WIDTH}"], rows)


if __name__ == "__main__":
    main()
