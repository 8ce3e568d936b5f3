"""Vectors in the coordinates of a front, to the bit the same whatever is computed beside them.

Every coordinate is a dot product of its own: a product of matrices rounds by the place of a row.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vidjax.gallery import front as front_lib
from vidjax.gallery.front import Front
from vidjax.machine import num_cores
from vidjax.models import two_covariance

MANY = 32  # vectors from which on threads are worth starting


class Coefficients(NamedTuple):
    """What search needs of P people, see `two_covariance.Enrolled`.

    Attributes:
      linear: [M] of [P, D] float32, coefficients of z.
      constant: [M, P] float64.
      num_clips: [M, P] int32, number of clips that have the part.
    """

    linear: tuple[np.ndarray, ...]
    constant: np.ndarray
    num_clips: np.ndarray


class Coordinates:
    """The coordinates of a front.

    Attributes:
      front: the front.
    """

    def __init__(self, front: Front):
        """Prepares the axes."""
        self.front = front
        self._curves: dict[tuple[int, int], np.ndarray] = {}
        self._axes = [np.ascontiguousarray(part.space.transform.T) for part in front.parts]

    def split(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Returns the parts [M] of [N, D] of vectors [N, sum of D]."""
        ends = np.cumsum(list(self.front.widths.values()))[:-1]
        return np.split(vectors, ends.tolist(), axis=1)

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the coordinates [Q, D] float64 of clips in every part; NaN where they lack it.

        Args:
          parts: [M] of [Q, D] float32, 0 for clips that lack the part.
        """
        found = []
        for number, (part, x) in enumerate(zip(self.front.parts, parts, strict=True)):
            z = self._turn(number, front_lib.unit(part, x) - part.space.mean)
            z[~np.any(x != 0, axis=1)] = np.nan
            found.append(z)
        return found

    def _turn(self, number: int, shifted: np.ndarray) -> np.ndarray:
        """Returns vectors [Q, D] times the transform of a part, float64."""
        if len(shifted) < MANY:
            return np.vecdot(shifted[:, None], self._axes[number])
        turned = threads().map(lambda row: np.vecdot(row, self._axes[number]), shifted)
        return np.stack(list(turned))

    def enrol(self, vectors: np.ndarray, owner: np.ndarray, num_people: int) -> Coefficients:
        """Returns the coefficients of people, whose sums are added up clip by clip in order.

        Args:
          vectors: [N, sum of D] float32, their clips; 0 where a clip lacks a part.
          owner: [N] int, the place of the person whom a clip shows.
          num_people: P.
        """
        linear, constants, counts = [], [], []
        for number, x in enumerate(self.split(vectors)):
            part = self.front.parts[number]
            present = np.any(x != 0, axis=1)
            count = np.bincount(owner[present], minlength=num_people)
            total = np.zeros((num_people, x.shape[1]))
            np.add.at(total, owner, front_lib.unit(part, x))
            sums = self._turn(number, total - count[:, None] * part.space.mean)
            enrolled = two_covariance.coefficients(part.space, count.astype(np.float64), sums)
            linear.append(np.asarray(enrolled.linear, np.float32))
            constants.append(np.asarray(enrolled.constant))
            counts.append(count.astype(np.int32))
        return Coefficients(tuple(linear), np.stack(constants), np.stack(counts))

    def curve(self, number: int, count: int) -> np.ndarray:
        """Returns the coefficients [D] of z squared, of a person with a number of clips."""
        if (number, count) not in self._curves:
            space = self.front.parts[number].space
            none = np.zeros((1, len(space.mean)))
            enrolled = two_covariance.coefficients(space, np.array([float(count)]), none)
            self._curves[number, count] = np.asarray(enrolled.curve[0])
        return self._curves[number, count]


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Returns the threads that compute, one per core."""
    return ThreadPoolExecutor(num_cores())
