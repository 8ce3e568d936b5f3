"""Made-up vectors of photos: as dlib makes them, or exactly of the two-covariance model."""

from typing import Any

import numpy as np

WIDTH = 128  # of dlib
SAME, DIFFERENT = 0.42, 0.85  # mean distances of two photos of one person, and of two people
# Effective number of directions of both parts: the distances then deviate by .08 and .09.
NOISE, PEOPLE = 15.0, 38.0
LENGTH = 1.4


class Faces:
    """A population of faces: unit vectors of photos of people, in 128 numbers."""

    def __init__(self, seed: int):
        """Draws the directions in which people and photos differ."""
        self._rng = np.random.default_rng(seed)
        within = (SAME**2 + 0.08**2) / 2
        total = (DIFFERENT**2 + 0.09**2) / 2
        self._noise = np.sqrt(_variances(within, NOISE))
        self._people = np.sqrt(_variances(total - within, PEOPLE))
        self._axes = np.linalg.qr(self._rng.normal(size=(WIDTH, WIDTH)))[0]
        mean = self._rng.normal(size=WIDTH)
        self._mean = mean / np.linalg.norm(mean) * np.sqrt(LENGTH**2 - total)

    def raw(self, people: int, photos: int) -> np.ndarray:
        """Returns vectors of new people, [people, photos, 128], whose distances are dlib's."""
        who = self._people * self._rng.normal(size=(people, 1, WIDTH))
        noise = self._noise * self._rng.normal(size=(people, photos, WIDTH))
        return self._mean + who + noise @ self._axes

    def __call__(self, people: int, photos: int) -> np.ndarray:
        """Returns the same of length 1."""
        return unit(self.raw(people, photos))


def unit(x: np.ndarray) -> np.ndarray:
    """Returns vectors of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _variances(total: float, directions: float) -> np.ndarray:
    """Returns falling variances with a sum, and (sum)^2 / (sum of squares) = directions."""
    low, high = 0.5, 1.0
    values = np.ones(WIDTH)
    for _ in range(60):
        middle = (low + high) / 2
        values = middle ** np.arange(WIDTH)
        below = values.sum() ** 2 / (values**2).sum() < directions
        low, high = (middle, high) if below else (low, middle)
    return values / values.sum() * total


def exact(rng: Any, people: int, clips: int, width: int, within: float) -> np.ndarray:
    """Returns vectors of length 1 of people of the two-covariance model, [people, clips, width].

    `within` is the share of the variance that is not the person's.
    """
    between = np.geomspace(1, 0.1, width)  # variances of people and of clips in each number
    noise = np.geomspace(1, 0.3, width)[::-1]
    who = np.sqrt((1 - within) * between / between.sum())
    each = np.sqrt(within * noise / noise.sum())
    found = rng.normal(size=(people, 1, width)) * who
    return unit(found + rng.normal(size=(people, clips, width)) * each)
