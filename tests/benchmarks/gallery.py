"""Times of a gallery: opening it, finding, enrolling and removing people, on made-up vectors.

    python -m tests.benchmarks.gallery [--people=10000]

Up to 100,000 people have a face, a head and an audio vector of 512 each, and more people have one
vector of 512. A person has one clip. Times are medians of several tries in a process that has
opened the gallery, with processor times in brackets. A search needs at least one product of numpy's
with all coefficients. A removal writes all rows again, and is measured up to 100,000 people.
"""

import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks import common
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
RUN = VectorOrigin("made-up", "0" * 64, centred=True)
THRESHOLD = 0.5


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
) -> dict[str, StoredClip]:
    """Returns one clip of each of `count` people."""
    parts = [_near(rng.standard_normal((count, WIDTH), np.float32), rng) for _ in range(num_parts)]
    rows = np.concatenate(parts, axis=1)
    return {
        f"clip_{start + number:07}": StoredClip(f"person_{start + number:07}", row)
        for number, row in enumerate(rows)
    }


def write(folder: Path, num_people: int, parts: Sequence[str], rng: np.random.Generator) -> None:
    """Writes a gallery whose people have the vectors of a few in turn, under names of their own."""
    front = make_front(parts, rng)
    few = list(make_clips(len(parts), min(MAX_BLOCK_PEOPLE, num_people), rng).values())
    vectors = np.stack([clip.vector for clip in few])
    block = front.enrol([str(clip.identity) for clip in few], vectors, np.arange(len(few)))
    numbers = range(num_people)
    names = [f"person_{number:07}" for number in numbers]
    pieces = (tuple(names[at : at + len(few)]) for at in range(0, num_people, len(few)))
    blocks = (block.take(np.arange(len(some)))._replace(names=some) for some in pieces)
    clips = {f"clip_{n:07}": StoredClip(names[n], few[n % len(few)].vector) for n in numbers}
    folder.mkdir(mode=0o700)
    Store(folder).create(State(1, RUN, Index(front, blocks), clips, group(clips)))


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / common.MIB  # of KiB
    yield "memory of the process", f"{peak:.1f} GB"
    query = np.stack([x.vector for x in make_clips(num_parts, TRIES, rng, 5_000_000).values()])
    parts = dict(zip(people.backend.widths, people.backend.split(query), strict=True))
    asked = [
        Vectors(("query",), {part: x[n : n + 1] for part, x in parts.items()}, (None,))
        for n in range(TRIES)
    ]
    people.identify(asked[0], threshold=THRESHOLD)  # the first answer makes tables
    identify = timed(lambda n: people.identify(asked[n], threshold=THRESHOLD), TRIES)
    yield "identify a clip", identify
    yield "the same as one product of numpy's", _product(people.index, query[0, :WIDTH])
    for count, tries in ((1, TRIES), (1000, 1)):
        made = make_clips(num_parts, count * tries, rng, 2_000_000 + 1_000 * count)
        turns = [dict(list(made.items())[n * count :][:count]) for n in range(tries)]
        enrolled = "a clip" if count == 1 else f"{count:,} clips at once"
        yield f"enrol {enrolled}", timed(lambda n, t=turns: people.add(t[n]), tries)
        if num_people <= MANY and count == 1:
            gone = [next(iter(turn.values())).identity or "" for turn in turns]
            yield "remove a person", timed(lambda n, g=gone: people.remove(identity=g[n]), tries)


def _product(index: Index, vector: np.ndarray) -> str:
    """Returns the time of a product of a vector with the coefficients of all people."""
    parts = [np.concatenate(x) for x in zip(*(b.linear for b in index.blocks), strict=True)]
    return timed(lambda _: np.argmax(sum(x @ vector for x in parts)), TRIES)


def main() -> None:
    """Prints a table."""
    size = common.parse(__doc__, people=10_000).people
    num_parts = 3 if size <= MANY else 1
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(Path(folder, "people"), size, num_parts))
    common.write_table(["", f"{size:,} people, {num_parts} x {WIDTH}"], rows)


if __name__ == "__main__":
    main()
