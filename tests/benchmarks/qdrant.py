"""Compares the answers of a large gallery with the program in RECIPES.md, which asks Qdrant.

    python -m tests.benchmarks.qdrant [--people=1000000] [--width=128] [--clips=40]

Qdrant runs in the local mode of its client, in the same process, and compares a clip with all
people. The vectors are random. Two clips of a person have the cosine 0.7 on average. Every other
clip shows a stranger. The differences are the largest of all clips: of the logarithms of likelihood
ratios of people and strangers, and of the probabilities of the five most probable people.
"""

import contextlib
import os
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from qdrant_client.local import local_collection

from tests.benchmarks import common
from tests.helpers.embeddings import unit
from vidjax.apps.cards import BackEnd
from vidjax.apps.gallery import backend as backend_lib, index as index_lib
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import State, Store, StoredClip, VectorOrigin, list_clips_of
from vidjax.cli.program import main

PAGE = common.ROOT / "vidjax/apps/gallery/RECIPES.md"
SAME = 0.7  # the mean cosine of two clips of a person


def draw_clips(centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the vector of a clip of each person. The centres [N, D] have the length 1."""
    noise = rng.standard_normal(centres.shape, np.float32) / np.float32(centres.shape[1] ** 0.5)
    return unit(np.float32(SAME**0.5) * centres + np.float32((1 - SAME) ** 0.5) * noise)


def write_gallery(folder: Path, vectors: np.ndarray) -> None:
    """Writes a gallery of N people with a clip each. `vectors` are [N, D]."""
    width = vectors.shape[1]
    spread = ((2 * SAME * (1 - SAME) + (1 - SAME) ** 2) / width) ** 0.5
    card = BackEnd(
        centre=[0.0] * width, same=(SAME, spread), different=(0.0, width**-0.5), pairs=(1, 1),
        data="random vectors",
    )  # fmt: skip
    backend = backend_lib.make_card_backend({"face": card})
    names, step = [f"person_{n:07}" for n in range(len(vectors))], index_lib.MAX_BLOCK_PEOPLE
    blocks = (
        backend.enrol(names[at : at + step], some := vectors[at : at + step], np.arange(len(some)))
        for at in range(0, len(names), step)
    )
    clips = {name: StoredClip(name, row) for name, row in zip(names, vectors, strict=True)}
    index = index_lib.Index(backend, blocks)
    folder.mkdir(mode=0o700)
    origin = VectorOrigin("made-up", "0" * 64, True, {"face": "0" * 64})
    Store(folder.absolute()).create(State(1, origin, index, clips, list_clips_of(clips)))


@contextlib.contextmanager
def fast_appends() -> Iterator[None]:
    """Lets the local mode of Qdrant add a million points. It copies two arrays for each point."""

    def append(array: np.ndarray, value: int) -> np.ndarray:
        base, size = array.base, len(array)
        if base is None or len(base) == size:
            base = np.resize(array, 2 * size + 1)
        base[size] = value
        return base[: size + 1]

    copied = SimpleNamespace(**{**vars(np), "append": append})
    with mock.patch.object(local_collection, "np", copied):
        yield


def measure(num_people: int, width: int, num_clips: int, many: int) -> dict[str, Any]:
    """Works in the current folder."""
    rng, times = np.random.default_rng(0), {}
    centres = unit(rng.standard_normal((num_people, width), np.float32))
    write_gallery(Path("people"), draw_clips(centres, rng))
    shown = centres[rng.integers(0, num_people, num_clips)]
    shown[1::2] = unit(rng.standard_normal(shown[1::2].shape, np.float32))
    clips = draw_clips(shown, rng)

    def timed(name: str, function: Any, *words: Any) -> Any:
        began = time.perf_counter()
        result = function(*words)
        times[f"{name}, s"] = round(time.perf_counter() - began, 2)
        return result

    export = ["export", "people", "--to=exported", "--format=safetensors", "--quiet"]
    assert timed("export", main, export) == 0
    people = timed("open the gallery", Gallery, "people")
    wanted = timed("answers of the gallery", lambda x: [*x.index.nearest([clips], many)], people)
    del people

    os.environ["QDRANT"] = ":memory:"
    (program,) = re.findall(r"<!-- recipe: many -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    Path("many.py").write_text(program.replace("MANY = 1000 ", f"MANY = {many} "))
    sys.path.insert(0, ".")
    recipe = runpy.run_path("many.py")
    with fast_appends():
        timed("upload", recipe["upload"])
    found = timed("answers of the program", lambda: [*recipe["identify"](clips)])

    ratios = probabilities = others = 0.0
    for one, (best, rest) in zip(wanted, found, strict=True):
        logs = dict(one.best)
        assert [name for name, _ in best] == [name for name, _ in one.best[: len(best)]]
        for name, probability in best:
            probabilities = max(probabilities, abs(probability - np.exp(logs[name])))
            odds = np.log(probability) - np.log(best[0][1])
            ratios = max(ratios, abs(odds - (logs[name] - logs[best[0][0]])))
        others = max(others, rest)
    return {
        "people": num_people, "width": width, "clips": num_clips, **times,
        "difference of log-likelihood ratios": ratios,
        "difference of probabilities": probabilities, "bound of the others": others,
        "memory, GB": common.peak_bytes() / 2**30,
    }  # fmt: skip


if __name__ == "__main__":
    args = common.parse(__doc__, people=1_000_000, width=128, clips=40, many=1000)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        found = measure(args.people, args.width, args.clips, args.many)
    rows = [[k, f"{v:.3g}" if isinstance(v, float) else f"{v:,}"] for k, v in found.items()]
    common.print_table(["", "value"], rows)
