"""Vectors in the coordinates of a front, to the bit the same whatever is computed beside them.

Every coordinate is a dot product of its own: a product of matrices rounds by the place of a row.
"""

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vidjax.gallery import backend as front_lib
from vidjax.gallery.backend import MOST_ROWS as MOST_QUERIES
from vidjax.gallery.backend import Front
from vidjax.machine import num_cores
from vidjax.models import plda, two_covariance

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


MOST_ROWS = 4096  # people of the largest block
FEW_ROWS = 512  # people of a block that a change joins with another one
MANY_BLOCKS = 48  # from which on threads are worth starting
FINE = 2.0**40  # exponentials are counted in units of 1 / FINE: room for 8 million identities


class People(NamedTuple):
    """A block of people.

    Attributes:
      names: P identities.
      coefficients: of these.
    """

    names: tuple[str, ...]
    coefficients: Coefficients

    def take(self, rows: Sequence[int] | np.ndarray) -> "People":
        """Returns the people of some rows."""
        linear, constant, count = self.coefficients
        taken = Coefficients(tuple(x[rows] for x in linear), constant[:, rows], count[:, rows])
        return People(tuple(self.names[row] for row in rows), taken)


def join(blocks: Sequence[People]) -> People:
    """Returns the people of one block or more as one."""
    found = [block.coefficients for block in blocks]
    linear = tuple(np.concatenate(parts) for parts in zip(*(x.linear for x in found), strict=True))
    constant = np.concatenate([x.constant for x in found], axis=1)
    count = np.concatenate([x.num_clips for x in found], axis=1)
    names = tuple(itertools.chain.from_iterable(block.names for block in blocks))
    return People(names, Coefficients(linear, constant, count))


class _Curves(NamedTuple):
    """The coefficients of squares, which depend on the number of clips alone.

    Attributes:
      curves: [M] of [U, D] float64.
      kind: [M, N] int32, row of the curves; 0 for an identity without a clip in the part.
    """

    curves: list[np.ndarray]
    kind: np.ndarray


class Index:
    """Identities as coefficients; an index is never changed.

    Attributes:
      coordinates: those of the coefficients.
      blocks: the people, block after block.
    """

    def __init__(self, coordinates: Coordinates, blocks: Iterable[People] = ()):
        """Takes blocks of people, none of which is in two."""
        self.coordinates = coordinates
        self.blocks = [block for block in blocks if block.names]

    @functools.cached_property
    def names(self) -> list[str]:
        """The identity of every row."""
        return [name for block in self.blocks for name in block.names]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """[M, N] int32, number of clips that have the part."""
        none = np.zeros((len(self.coordinates.front.parts), 0), np.int32)
        found = [block.coefficients.num_clips for block in self.blocks]
        return np.concatenate([none, *found], axis=1)

    @functools.cached_property
    def _constant(self) -> np.ndarray:
        """[M, N] float64."""
        none = np.zeros((len(self.coordinates.front.parts), 0))
        return np.concatenate([none, *(x.coefficients.constant for x in self.blocks)], axis=1)

    @functools.cached_property
    def _curves(self) -> _Curves:
        curves, kinds = [], []
        for number, part in enumerate(self.coordinates.front.parts):
            values, inverse = np.unique(self.counts[number], return_inverse=True)
            some = [value for value in values.tolist() if value]
            none = np.zeros((1, len(part.centre)))
            curves.append(np.vstack([none, *(self.coordinates.curve(number, n) for n in some)]))
            kinds.append((inverse + (len(some) == len(values))).astype(np.int32))
        return _Curves(curves, np.stack(kinds))

    def replaced(self, gone: Collection[str], new: People) -> "Index":
        """Returns an index without some people, if they are there, and with others."""
        away, kept, few = set(gone), [], [new]
        for block in self.blocks:
            if away and not away.isdisjoint(block.names):
                rows = [row for row, name in enumerate(block.names) if name not in away]
                block = block.take(rows)
            (few if len(block.names) < FEW_ROWS else kept).append(block)
        joined = join(few)
        rows = np.arange(len(joined.names))
        pieces = [rows[at : at + MOST_ROWS] for at in range(0, len(rows), MOST_ROWS)]
        kept += [joined] if len(pieces) < 2 else [joined.take(piece) for piece in pieces]
        return Index(self.coordinates, kept)

    def search(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields for every clip the logarithms of probabilities, see `log_probabilities`.

        Args:
          parts: [M] of [Q, D] float32, 0 for clips that lack the part.
        """
        for at in range(0, len(parts[0]), MOST_QUERIES):
            block = self.coordinates.whiten([x[at : at + MOST_QUERIES] for x in parts])
            for row in range(len(block[0])):
                yield self.log_probabilities([z[row] for z in block])

    def log_probabilities(self, clip: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the logarithms of probabilities that add up to 1, [1 + N] float64.

        Column 0 is somebody new; the identity of row r is column 1 + r.

        Args:
          clip: [M] of [D] float64, one row of `Coordinates.whiten`. A clip that lacks all parts
            shows somebody new.
        """
        present = [number for number, z in enumerate(clip) if not np.isnan(z[0])]
        if not present:
            return np.concatenate([[0.0], np.full(len(self.names), -np.inf)])
        blocks, (curves, kind) = self.blocks, self._curves
        ends = np.cumsum([0, *(len(block.names) for block in blocks)]).tolist()
        ratios = np.empty((len(curves), ends[-1]), np.float32)
        linear = {n: clip[n].astype(np.float32) for n in present}

        def score(first: int, step: int) -> None:
            for number in range(first, len(blocks), step):
                own = slice(ends[number], ends[number + 1])
                for n, z in linear.items():
                    np.vecdot(blocks[number].coefficients.linear[n], z, out=ratios[n, own])

        if len(blocks) >= MANY_BLOCKS:
            cores = num_cores()
            list(threads().map(lambda first: score(first, cores), range(cores)))
        else:
            score(0, 1)
        settings = self.coordinates.front.settings
        logits = np.zeros(1 + ends[-1])
        logits[0] = plda.stranger_logit(settings, ends[-1])
        for n in present:
            squares = np.vecdot(curves[n], clip[n] * clip[n])
            ratio = ratios[n] + self._constant[n] + squares[kind[n]]
            logits[1:] += np.where(kind[n] > 0, settings.scale * ratio, settings.unenrolled)
        return log_softmax(logits)

    def best(self, log_probabilities: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Returns the best k identities with their logarithms, best first, ties by name.

        Args:
          log_probabilities: [1 + N], of `log_probabilities`.
          k: 1 or more. No identity is returned for a clip that lacks all parts.
        """
        logs = log_probabilities[1:]
        k = min(k, len(logs))
        if not k:
            return []
        least = np.partition(logs, len(logs) - k)[-k]
        if least == -np.inf:
            return []
        rows = np.flatnonzero(logs >= least)
        found = [(self.names[row], float(logs[row])) for row in rows.tolist()]
        return sorted(found, key=lambda one: (-one[1], one[0]))[:k]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the softmax, [K] float64, of logits [K] float64 in any order.

    The logarithm of a probability near 1 is computed from the others, as in `system.log_softmax`.
    """
    best = int(np.argmax(logits))
    top, others = float(logits[best]), np.delete(logits, best)
    if not len(others):
        return np.zeros(1)
    second = float(others.max())
    counted = np.rint(np.exp(others - second) * FINE).astype(np.int64)
    rest = second + np.log(int(counted.sum()) / FINE)
    of_best = -np.logaddexp(0.0, rest - top)
    return np.where(logits == top, of_best, logits - np.logaddexp(top, rest))
