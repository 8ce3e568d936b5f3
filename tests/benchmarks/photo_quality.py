"""Whether the quality of a photo of a face tells if it helps: photos made worse step by step.

    VIDJAX_MODELS=models python -m tests.benchmarks.photo_quality FOLDER

The folder has PERSON/*.jpg, photos of one face, two or more of somebody. Each photo is cut to the
face, shrunk, blurred, darkened, or made noisy, and then takes the place of all photos of a person:
a gallery of the models enrols it, beside the first photo of each other person as it is, and is
asked for those other photos of the person that get the name while the photo is as it was. A photo
whose face is below a quality is told to be poor (`folder.POOR`).

    bins        quality from ... to ... -> photos, and the share of photos asked that get the name
    thresholds  quality -> of photos that name nobody, the share below it; of those that name all,
                the share below it, which are told to be poor in vain
    lost        photos in which no face is found any more
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import films
from vidjax.extract import align, cards, figures, folder
from vidjax.gallery.backend import Backend, Index, of_cards

FACE = 150  # pixels of the height of a face, before it is made worse
SIDES = 2.2  # of the picture around it, in heights
HEIGHTS = (150, 80, 50, 40, 32, 26, 22, 18)  # pixels
BLURS = (0.0, 0.02, 0.04, 0.07, 0.1, 0.15)  # deviation of the blur, in heights of the face
LIGHTS = (0.4, 0.15, 0.06)  # of the brightness
NOISES = (15.0, 40.0, 80.0)  # deviation of grey levels
EDGES = (0.0, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 1.01)


def blurred(rgb: np.ndarray, deviation: float) -> np.ndarray:
    """Returns a picture float [H, W, 3] after a Gaussian blur, in pixels."""
    reach = int(np.ceil(3 * deviation))
    if not reach:
        return rgb
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        pads = [(reach, reach) if one == axis else (0, 0) for one in range(3)]
        padded = np.pad(rgb, pads, "edge")
        size = rgb.shape[axis]
        rgb = sum(w * padded.take(range(n, n + size), axis) for n, w in enumerate(weights))  # pyright: ignore[reportAssignmentType]
    return rgb


def worse(rgb: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yields a picture uint8 [H, W, 3] of a face of FACE pixels, made worse in many ways."""
    rng = np.random.default_rng(seed)
    for blur in BLURS:
        soft = blurred(rgb.astype(float), blur * FACE)
        for height in HEIGHTS:
            side = round(rgb.shape[0] * height / FACE)
            yield films.resized(soft.round().astype(np.uint8), side, side)
    for height in HEIGHTS[::3]:
        side = round(rgb.shape[0] * height / FACE)
        small = films.resized(rgb, side, side).astype(float)
        for light in LIGHTS:
            yield (small * light).round().astype(np.uint8)
        for noise in NOISES:
            noisy = small + rng.normal(0, noise, small.shape)
            yield noisy.clip(0, 255).round().astype(np.uint8)


class Reader:
    """Finds the best face of a picture, and makes its vector."""

    def __init__(self, models: Path):
        self.cards = cards.load(models)
        self._nets = figures.load(self.cards, folder.Settings().size)

    def __call__(self, rgb: np.ndarray) -> tuple[float, np.ndarray, np.ndarray] | None:
        """Returns quality, vector [D] and box [4] of the only face; None for none or several."""
        found = figures.find(self._nets, rgb)
        if len(found.boxes) != 1:
            return None
        crops = [x for x in figures.crops(self._nets, "face", found, rgb) if x is not None]
        quality = align.quality(found.scores, found.points, np.stack(crops))
        vector = self._nets.embed["face"](np.stack(crops))
        return float(quality[0]), vector[0] / np.linalg.norm(vector[0]), found.boxes[0]


def cut_out(rgb: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Returns the square around a face, at the size at which the face is FACE pixels high."""
    half = SIDES * (box[3] - box[1]) / 2
    x, y = (box[:2] + box[2:]) / 2
    left, top = max(int(x - half), 0), max(int(y - half), 0)
    side = min(int(2 * half), rgb.shape[0] - top, rgb.shape[1] - left)
    inside = np.ascontiguousarray(rgb[top : top + side, left : left + side])
    new = round(side * FACE / (box[3] - box[1]))
    return films.resized(inside, new, new)


def named(backend: Backend, enrolled: Sequence[np.ndarray], asked: np.ndarray) -> np.ndarray:
    """Returns [Q] bool, who of `asked` [Q, D] gets the name of the first who is enrolled."""
    block = backend.enrol(
        [str(n) for n in range(len(enrolled))],
        np.stack(enrolled).astype(np.float32),
        np.arange(len(enrolled)),
    )
    logs = [*Index(backend, [block]).search([asked.astype(np.float32)])]
    return np.array(logs).argmax(1) == 1


def measure(photos: Path, models: Path) -> dict[str, Any]:
    """Returns the figures of the module's docstring."""
    read = Reader(models)
    people: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for path in sorted(photos.glob("*/*")):
        rgb = films.read_photo(path)
        if found := read(rgb):
            people.setdefault(path.parent.name, []).append((cut_out(rgb, found[2]), found[1]))
    card = read.cards["face_embedder"].back_end
    assert card
    backend = of_cards({"face": card})
    rows, lost = [], 0
    for person, own in people.items():
        first = [some[0][1] for name, some in people.items() if name != person]
        for place, (picture, vector) in enumerate(own if len(own) > 1 else []):
            asked = np.stack([x for n, (_, x) in enumerate(own) if n != place])
            asked = asked[named(backend, [vector, *first], asked)]
            for bad in worse(picture, place) if len(asked) else ():
                if (found := read(bad)) is None:
                    lost += 1
                    continue
                rows.append((found[0], np.mean(named(backend, [found[1], *first], asked))))
    quality, right = np.array(rows).T
    return {"photos": len(rows), "lost": lost, "bins": _bins(quality, right),
            "thresholds": {f"{x:g}": _shares(quality, right, x) for x in EDGES[1:-1]}}  # fmt: skip


def _bins(quality: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    found = {}
    for low, high in pairwise(EDGES):
        inside = (quality >= low) & (quality < high)
        share = round(float(right[inside].mean()), 3) if inside.any() else None
        found[f"{low:g} to {min(high, 1):g}"] = [int(inside.sum()), share]
    return found


def _shares(quality: np.ndarray, right: np.ndarray, threshold: float) -> list[float]:
    below = quality < threshold
    return [round(float(below[some].mean()), 3) for some in (right == 0, right == 1)]


def main() -> None:
    """Prints the figures as JSON."""
    found = measure(Path(sys.argv[1]), Path(os.environ["VIDJAX_MODELS"]))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
