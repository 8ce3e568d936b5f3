"""Times of processes that ask a gallery once, from their start to their end.

    python -m tests.benchmarks.gallery_start

A gallery of cards has 20 people and 150 strangers, and answers for five clips. Figures are medians
of seven turns, after a turn that fills caches: seconds, seconds of the processor, and the ratio to
a process that only imports numpy.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import common
from vidjax.apps.gallery import backend
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip, VectorOrigin
from vidjax.apps.video.cards import BackEnd

WIDTH, PEOPLE, STRANGERS, ASKED, TURNS = 128, 20, 150, 5, 7
CARDS = VectorOrigin("made-up", "0" * 64, centred=True, cards={"face": "0" * 64})
ANSWER = """
from pathlib import Path
from typing import Any
import numpy as np
from vidjax import Gallery
clips = {x.stem: dict(np.load(x)) for x in Path("clips").iterdir()}
Gallery("people").identify(clips)
"""
LEAST = "numpy only"
STARTS = {
    LEAST: ["-c", "import numpy"],
    "a first answer from Python": ["-c", ANSWER],
    "vidjax gallery --help": ["-m", "vidjax", "gallery", "--help"],
    "vidjax gallery list": ["-m", "vidjax", "gallery", "list", "people"],
    "vidjax gallery identify": ["-m", "vidjax", "gallery", "identify", "people", "--input=clips"],
}


def make(folder: Path) -> None:
    """Makes a gallery of cards in `folder/people`, and clips to ask for in `folder/clips`."""
    faces = np.random.default_rng(0).standard_normal((PEOPLE + STRANGERS + ASKED, WIDTH))
    faces = (faces / np.linalg.norm(faces, axis=1, keepdims=True)).astype(np.float32)
    same, different = (0.958, 0.0146), (0.83, 0.0352)  # cosines of dlib's vectors of faces
    facts: dict[str, Any] = {
        "same": same,
        "different": different,
        "pairs": (1, 1),
        "data": "made-up",
    }
    card = BackEnd(centre=[0.0] * WIDTH, **facts)
    clips = {
        f"clip {n}": StoredClip(f"person {n}" if n < PEOPLE else None, face)
        for n, face in enumerate(faces[:-ASKED])
    }
    Gallery.of_clips(folder / "people", CARDS, backend.make_card_backend({"face": card}), clips)
    (folder / "clips").mkdir()
    for number, face in enumerate(faces[-ASKED:]):
        np.savez(folder / "clips" / f"{number}.npz", face=face)


def measure(folder: Path) -> dict[str, tuple[float, float]]:
    """Returns seconds and seconds of the processor of each process, medians of turns."""
    env = os.environ | {"PYTHONPATH": str(common.ROOT)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
    for turn in range(1 + TURNS):
        for name, words in STARTS.items():
            times = common.timed([sys.executable, *words], cwd=folder, env=env)
            if turn:
                found[name].append(times)
    pairs = {name: zip(*some, strict=True) for name, some in found.items()}
    return {name: (statistics.median(x), statistics.median(y)) for name, (x, y) in pairs.items()}


def main() -> None:
    """Prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        found = measure(Path(folder))
    least = found[LEAST][1]
    rows = [(name, f"{x:.2f}", f"{y:.2f}", f"{y / least:.1f}") for name, (x, y) in found.items()]
    common.write_table(["process", "seconds", "of the processor", "times numpy"], rows)


if __name__ == "__main__":
    main()
