"""The back end of a gallery: the coordinates in which vectors are compared, and the settings.

A clip has one vector in each of M parts: the modalities of a PLDA run, or the embedding of a net.
`fit` keeps sums over the vectors of labelled clips, and no vector.

The coordinates of a vector are equal to the bit whatever is computed beside it. So each is a dot
product of its own: the rounding of a matrix product depends on where in the matrix a row stands.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vidjax.machine import num_cores
from vidjax.models import plda, two_covariance
from vidjax.models.plda import Settings, blank_space
from vidjax.models.plda_fit import fit_settings, some_identities, tell_of_few
from vidjax.models.two_covariance import Space
from vidjax.run.terminal import say

MANY = 32  # vectors from which on threads are worth starting


class Part(NamedTuple):
    """A modality, or `embedding`, and the float64 space in which its vectors are compared.

    `centre` [D] is subtracted from unit vectors, which are then scaled to unit length again. It is
    0 where the run has subtracted its own.
    """

    name: str
    centre: np.ndarray
    space: Space


class Coefficients(NamedTuple):
    """What `index` needs to score P people in M parts, see `two_covariance.Enrolled`.

    `linear` are M arrays [P, D] float32, coefficients of z; `constant` is [M, P] float64;
    `num_clips` is [M, P] int32, the number of each person's clips that have the part.
    """

    linear: tuple[np.ndarray, ...]
    constant: np.ndarray
    num_clips: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Backend:
    """Coordinates of M parts, and the settings of `models.plda`."""

    parts: tuple[Part, ...]
    settings: Settings

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """Name -> D of every part."""
        return {part.name: len(part.centre) for part in self.parts}

    @functools.cached_property
    def _axes(self) -> list[np.ndarray]:
        return [np.ascontiguousarray(part.space.transform.T) for part in self.parts]

    def split(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Splits vectors [N, sum of D] into the M parts, each [N, D]."""
        ends = np.cumsum(list(self.widths.values()))[:-1]
        return np.split(vectors, ends.tolist(), axis=1)

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the coordinates z of Q clips: M arrays [Q, D] float64, NaN for a missing part.

        `parts` are the vectors: M arrays [Q, D] float32, 0 where a clip lacks the part.
        """
        found = []
        for number, (part, x) in enumerate(zip(self.parts, parts, strict=True)):
            z = self._turn(number, unit(part, x) - part.space.mean)
            z[~np.any(x != 0, axis=1)] = np.nan
            found.append(z)
        return found

    def _turn(self, number: int, shifted: np.ndarray) -> np.ndarray:
        if len(shifted) < MANY:
            return np.vecdot(shifted[:, None], self._axes[number])
        turned = threads().map(lambda row: np.vecdot(row, self._axes[number]), shifted)
        return np.stack(list(turned))

    def enrol(self, vectors: np.ndarray, owner: np.ndarray, num_people: int) -> Coefficients:
        """Returns the coefficients of people, from sums over their clips, added in order.

        `vectors` are [N, sum of D] float32, 0 where a clip lacks a part; `owner` is [N] int, the
        number below `num_people` of the person whom a clip shows.
        """
        linear, constants, counts = [], [], []
        for number, x in enumerate(self.split(vectors)):
            part = self.parts[number]
            present = np.any(x != 0, axis=1)
            count = np.bincount(owner[present], minlength=num_people)
            total = np.zeros((num_people, x.shape[1]))
            np.add.at(total, owner, unit(part, x))
            sums = self._turn(number, total - count[:, None] * part.space.mean)
            enrolled = two_covariance.coefficients(part.space, count.astype(np.float64), sums)
            linear.append(np.asarray(enrolled.linear, np.float32))
            constants.append(np.asarray(enrolled.constant))
            counts.append(count.astype(np.int32))
        return Coefficients(tuple(linear), np.stack(constants), np.stack(counts))

    def numbers(self) -> np.ndarray:
        """Returns the arrays of all parts, flattened and joined, [num_numbers] float64."""
        return np.concatenate(
            [
                np.ravel(array)
                for part in self.parts
                for array in (part.centre, part.space.mean, part.space.transform, part.space.ratio)
            ]
        ).astype("<f8")


def fit(
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    centred: bool,
    settings: Settings | None = None,
) -> Backend:
    """Fits a back end to the unit vectors of labelled clips, part -> [N, D] float32.

    A clip's vector is 0 in a part that it lacks. `labels` [N] int are classes from 1. `centred` is
    True if the run has subtracted a centre from the vectors. With `settings` None, they are fitted.
    """
    tell_of_few(labels, say)
    if settings is None:
        wanted = some_identities(labels, 0) if len(labels) else np.zeros(0, bool)
        some = {name: x[wanted] for name, x in vectors.items()}
        settings = fit_settings(some, labels[wanted], {}, 0)
    parts = []
    for name, x in vectors.items():
        present = np.any(x != 0, axis=1)
        width = x.shape[1]
        part = Part(name, np.zeros(width), blank_space(width))
        if present.any():
            x = np.asarray(x[present], np.float64)
            if not centred:
                part = part._replace(centre=settings.centred * x.mean(axis=0))
            u = unit(part, x)
            sums = two_covariance.make_sums(u, labels[present], int(labels.max()) + 1)
            part = part._replace(space=plda.fit(sums._asdict(), settings))
        parts.append(part)
    return Backend(tuple(parts), settings)


def unit(part: Part, x: np.ndarray) -> np.ndarray:
    """Returns (x - centre) / |x - centre| for each row of x [N, D], float64; 0 where x is 0."""
    shifted = np.asarray(x, np.float64) - part.centre
    norm = np.sqrt(np.vecdot(shifted, shifted))[:, None]
    present = np.any(np.asarray(x) != 0, axis=1)[:, None]
    return np.where(present, shifted / np.maximum(norm, 1e-12), 0.0)


def num_numbers(widths: Mapping[str, int]) -> int:
    """Returns the length of `Backend.numbers` for parts of these widths."""
    return sum(width * (width + 3) for width in widths.values())


def from_numbers(widths: Mapping[str, int], settings: Settings, numbers: np.ndarray) -> Backend:
    """Returns the back end from its `Backend.numbers`; `widths` are part -> D."""
    parts, at = [], 0
    for name, width in widths.items():
        own = numbers[at : at + width * (width + 3)].astype(np.float64).reshape(-1, width)
        at += own.size
        parts.append(Part(name, own[0], Space(own[1], own[2:-1], own[-1])))
    return Backend(tuple(parts), settings)


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Returns the pool of threads, one per core, that search and whitening share."""
    return ThreadPoolExecutor(num_cores())
