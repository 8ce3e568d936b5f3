"""Measures the times of a gallery with random vectors.

    python -m tests.benchmarks.gallery [--people=10000] [--changes | --start]

Up to 100,000 people have a vector of a face, a head and a voice. More people have one vector each,
and the removal of people is not measured. The times are medians, with CPU times in brackets.

With `--changes`, each person has one vector of a face. Three galleries compare them: by a card with
128 or 512 numbers, and by PLDA with 512. Measured are changes, and the first answers after them.

With `--start`, new processes use a gallery of 20 people and 150 strangers. The times are medians of
seven rounds, after a round that fills caches.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.benchmarks import common
from tests.helpers.embeddings import CARD, CARD_WITHOUT_MEAN, unit
from tests.helpers.made_galleries import add, vectors_of
from vidjax.apps.gallery import backend as backend_lib, index as index_lib
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import State, Store, StoredClip, VectorOrigin, list_clips_of
from vidjax.models.two_covariance import Settings

WIDTH = 512
SETTINGS = Settings(
    within=0.8, between=0.75, scale=0.1, unenrolled=-2.0, stranger=-4.0, centred=1.0
)
CARDS = VectorOrigin("made-up", "0" * 64, True, {"face": "0" * 64})
REPEATS = 20
CHANGES = 5
MANY = 100_000
ROUNDS = 7
ANSWER = """
from pathlib import Path
import numpy as np
from vidjax import Gallery
Gallery("people").identify({x.stem: dict(np.load(x)) for x in Path("clips").iterdir()})
"""
STARTS = {
    "numpy only": ["-c", "import numpy"],
    "a first answer from Python": ["-c", ANSWER],
    "vidjax gallery --help": ["-m", "vidjax", "gallery", "--help"],
    "vidjax gallery list": ["-m", "vidjax", "gallery", "list", "people"],
    "vidjax gallery identify": ["-m", "vidjax", "gallery", "identify", "people", "--input=clips"],
}


def near(centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a random vector of length 1 near each of the centres [N, D]."""
    return unit(centres + 0.5 * rng.standard_normal(centres.shape, np.float32))


def make_front(parts: Sequence[str], rng: np.random.Generator) -> backend_lib.Backend:
    """Returns a scoring back end (PLDA) that is fitted to 400 other people with 3 clips each."""
    people = rng.standard_normal((400, WIDTH), np.float32)
    labels = np.repeat(np.arange(1, 401), 3)
    vectors = {name: near(people[labels - 1], rng) for name in parts}
    return backend_lib.fit(vectors, labels, centred=True, settings=SETTINGS)


def make_clips(num_parts: int, count: int, rng: Any, start: int = 0) -> dict[str, StoredClip]:
    parts = [near(rng.standard_normal((count, WIDTH), np.float32), rng) for _ in range(num_parts)]
    return {
        f"clip_{number:07}": StoredClip(f"person_{number:07}", row)
        for number, row in enumerate(np.concatenate(parts, axis=1), start)
    }


def write(folder: Path, num_people: int, parts: Sequence[str], rng: np.random.Generator) -> None:
    """Writes a gallery of `num_people`. To save time, each block of people has equal vectors."""
    front = make_front(parts, rng)
    few = list(make_clips(len(parts), min(index_lib.MAX_BLOCK_PEOPLE, num_people), rng).values())
    vectors, numbers = np.stack([clip.vector for clip in few]), np.arange(len(few))
    block = front.enrol([str(clip.identity) for clip in few], vectors, numbers)
    names = [f"person_{number:07}" for number in range(num_people)]
    pieces = (tuple(names[at : at + len(few)]) for at in range(0, num_people, len(few)))
    blocks = (block.take(numbers[: len(piece)])._replace(names=piece) for piece in pieces)
    clips = {
        f"clip_{n:07}": StoredClip(name, few[n % len(few)].vector) for n, name in enumerate(names)
    }
    folder.mkdir(mode=0o700)
    origin = VectorOrigin("made-up", "0" * 64, centred=True)
    index = index_lib.Index(front, blocks)
    Store(folder).create(State(1, origin, index, clips, list_clips_of(clips)))


def measure_medians(actions: Sequence[Callable[[int], object]], repeats: int) -> list[str]:
    """Calls all actions with 0, 1, ...; returns the medians of their times as `2 ms (1 ms)`."""
    times = []
    for number in range(repeats):
        for action in actions:
            start, cpu_start = time.perf_counter(), time.process_time()
            action(number)
            times.append((time.perf_counter() - start, time.process_time() - cpu_start))
    medians = np.median(np.reshape(times, (repeats, len(actions), 2)), axis=0).tolist()
    return [
        "{} ({})".format(*(f"{x:.1f} s" if x >= 1 else f"{1000 * x:.3g} ms" for x in pair))
        for pair in medians
    ]


def measure_median(action: Callable[[int], object], repeats: int) -> str:
    """Returns the median time and CPU time of `action(0)`, `action(1)`, ..., as `2 ms (1 ms)`."""
    return measure_medians([action], repeats)[0]


def measure(folder: Path, num_people: int, num_parts: int) -> Iterator[tuple[str, str]]:
    rng = np.random.default_rng(0)
    write(folder, num_people, ["face", "head", "audio"][:num_parts], rng)
    galleries: list[Gallery] = []
    yield "open", measure_median(lambda _: galleries.append(Gallery(folder)), 1)
    (people,) = galleries
    yield "memory of the process", f"{common.peak_bytes() / 2**30:.1f} GB"
    clips = make_clips(num_parts, REPEATS, rng, start=5_000_000)
    queries = [vectors_of(people, {name: clip}) for name, clip in clips.items()]
    people.identify(queries[0], threshold=0.5)  # the first answer also makes tables
    identify = measure_median(lambda n: people.identify(queries[n], threshold=0.5), REPEATS)
    yield "identify a clip", identify
    blocks = zip(*(block.linear for block in people.index.blocks), strict=True)
    rows, vector = [np.concatenate(block) for block in blocks], rng.random(WIDTH, np.float32)
    product = measure_median(lambda _: np.argmax(sum(x @ vector for x in rows)), REPEATS)
    yield "the same as one product of numpy's", product
    new = [*make_clips(num_parts, REPEATS, rng, start=2_000_000).items()]
    yield "enrol a clip", measure_median(lambda n: add(people, dict([new[n]])), REPEATS)
    if num_people <= MANY:
        remove = lambda n: people.remove(identity=str(new[n][1].identity))  # noqa: E731
        yield "remove a person", measure_median(remove, REPEATS)
    more = make_clips(num_parts, 1000, rng, start=3_000_000)
    yield "enrol 1,000 clips at once", measure_median(lambda _: add(people, more), 1)


def measure_changes(
    folder: Path, num_people: int, width: int, *, cards: bool
) -> Iterator[tuple[str, str]]:
    rng, numbers = np.random.default_rng(0), range(num_people + CHANGES)
    vectors = unit(rng.standard_normal((len(numbers), width), np.float32))
    all_clips = {f"c{n}": StoredClip(f"p{n}", vectors[n]) for n in numbers}
    kept = {name: all_clips[name] for name in [*all_clips][:num_people]}
    card = msgspec.structs.replace(CARD_WITHOUT_MEAN, centre=[0.0] * width)
    if cards:
        backend, origin = backend_lib.make_card_backend({"face": card}), CARDS
    else:
        backend, origin = make_front(["face"], rng), VectorOrigin("made-up", "0" * 64, centred=True)
    people = Gallery.of_clips(folder, origin, backend, kept)
    del kept
    shown = vectors_of(people, {"shown": all_clips["c0"]})
    answer = lambda _: people.identify(shown, threshold=0.5)  # noqa: E731
    yield "first answer", measure_median(answer, 1)
    yield "answer", measure_median(answer, REPEATS)
    new = [f"c{n}" for n in numbers[num_people:]]
    for name, change in {
        "enrol a clip": lambda n: add(people, {new[n]: all_clips[new[n]]}),
        "remove a person": lambda n: people.remove(identity=f"p{n * num_people // CHANGES}"),
        "relabel a clip": lambda n: people.relabel(new[n], f"other {n}"),
    }.items():
        spent, first = measure_medians([change, answer], CHANGES)
        yield name, spent
        yield f"the first answer after: {name}", first


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
    run = partial(common.run_python, cwd=folder, PYTHONPATH=str(common.ROOT))
    processes = {name: lambda _, words=words: run(*words) for name, words in STARTS.items()}
    rounds = common.alternate(processes, 1 + ROUNDS)
    medians = {name: np.median(times[1:], axis=0) for name, times in rounds.items()}
    for name, (seconds, cpu_seconds) in medians.items():
        ratio = cpu_seconds / medians["numpy only"][1]
        yield name, f"{seconds:.2f}", f"{cpu_seconds:.2f}", f"{ratio:.1f}"


if __name__ == "__main__":
    args = common.parse(__doc__, "--start", "--changes", people=10_000)
    with tempfile.TemporaryDirectory() as folder:
        if args.start:
            header = ["process", "seconds", "of the processor", "times numpy"]
            rows = list(measure_starts(Path(folder)))
        elif args.changes:
            header, columns = [f"{args.people:,} people"], list[list[tuple[str, str]]]()
            for width, cards in ((128, True), (512, True), (512, False)):
                header.append(f"{'card' if cards else 'PLDA'}, {width}")
                path = Path(folder, str(len(header)))
                columns.append(list(measure_changes(path, args.people, width, cards=cards)))
            rows = [(cells[0][0], *(x for _, x in cells)) for cells in zip(*columns, strict=True)]
        else:
            num_parts = 3 if args.people <= MANY else 1
            header = ["", f"{args.people:,} people, {num_parts} x {WIDTH}"]
            rows = list(measure(Path(folder, "people"), args.people, num_parts))
    common.print_table(header, rows)
