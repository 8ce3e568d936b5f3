"""Exact search: the probability of every enrolled identity for a clip, and the best ones.

An identity is a row of coefficients in every part. Rows lie in the order in which they came; an
answer does not depend on it, to the bit: every coordinate and every ratio is a dot product of its
own, where a product of matrices rounds by the place of a row; sums over identities are sums of
whole numbers; and ties go by name.

The scores are those of `models.plda.combine` and `system.log_softmax`, which need all identities in
one order and on the device.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vidjax.gallery import front as front_lib
from vidjax.gallery.front import Front
from vidjax.models import two_covariance

CHUNK = 2048  # rows that lie together; enrolling never copies more
MANY = 32  # chunks or vectors from which on threads are worth starting
FINE = 2.0**40  # exponentials are counted in units of 1 / FINE: room for 8 million identities


class _Chunk(NamedTuple):
    """CHUNK rows.

    Attributes:
      linear: [M] of [CHUNK, D] float32, coefficients of z.
      constant: [M, CHUNK] float64.
      kind: [M, CHUNK] int32, row of the curves; 0 for an identity without a clip in the part.
    """

    linear: list[np.ndarray]
    constant: np.ndarray
    kind: np.ndarray


class Index:
    """Identities as coefficients.

    Attributes:
      names: the identity of every row.
    """

    def __init__(self, front: Front):
        """Starts without identities."""
        self.names: list[str] = []
        self._front = front
        self._rows: dict[str, int] = {}
        self._chunks: list[_Chunk] = []
        self._kinds: list[dict[int, int]] = [{0: 0} for _ in front.parts]  # count -> row of curves
        self._axes = [np.ascontiguousarray(part.space.transform.T) for part in front.parts]
        self._curves = [np.zeros((1, len(part.centre))) for part in front.parts]

    def update(self, people: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Replaces identities.

        Args:
          people: identity -> its clips in the order of their names: for each part [k, D] float32,
            0 for clips that lack it. An identity without clips is removed.
        """
        gone = [name for name, parts in people.items() if not len(parts[0])]
        names = [name for name, parts in people.items() if len(parts[0])]
        for name in gone:
            self._remove(name)
        rows = np.array([self._row(name) for name in names], np.int64)
        for number, part in enumerate(self._front.parts):
            vectors = [people[name][number] for name in names]
            for at in range(0, len(names), front_lib.MOST_ROWS):
                some = slice(at, at + front_lib.MOST_ROWS)
                self._fill(number, rows[some], *_sums(part, vectors[some]))

    def _fill(self, number: int, rows: np.ndarray, count: np.ndarray, total: np.ndarray) -> None:
        """Writes the coefficients of identities in one part."""
        part = self._front.parts[number]
        sums = self._turn(number, total - count[:, None] * part.space.mean)
        enrolled = two_covariance.coefficients(part.space, count.astype(np.float64), sums)
        kinds = self._kinds[number]
        new = sorted({int(one) for one in np.unique(count)} - kinds.keys())
        for one in new:
            place = int(enrolled.kind[int(np.argmax(count == one))])
            kinds[one] = len(self._curves[number])
            self._curves[number] = np.vstack([self._curves[number], enrolled.curve[place]])
        kind = np.array([kinds[int(one)] for one in count], np.int32)
        for chunk, inside, chosen in _by_chunk(rows):
            to = self._chunks[chunk]
            to.linear[number][inside] = enrolled.linear[chosen]
            to.constant[number, inside] = enrolled.constant[chosen]
            to.kind[number, inside] = kind[chosen]

    def _row(self, name: str) -> int:
        """Returns the row of an identity, a new one where it has none."""
        if name not in self._rows:
            if len(self.names) == CHUNK * len(self._chunks):
                widths = [len(part.centre) for part in self._front.parts]
                linear = [np.zeros((CHUNK, width), np.float32) for width in widths]
                size = (len(widths), CHUNK)
                self._chunks.append(_Chunk(linear, np.zeros(size), np.zeros(size, np.int32)))
            self._rows[name] = len(self.names)
            self.names.append(name)
        return self._rows[name]

    def _remove(self, name: str) -> None:
        """Removes an identity: the last row takes its place, and is blanked."""
        row = self._rows.pop(name)
        last = self.names.pop()
        to, source = self._chunks[row // CHUNK], self._chunks[len(self.names) // CHUNK]
        at, there = row % CHUNK, len(self.names) % CHUNK
        for number, linear in enumerate(source.linear):
            to.linear[number][at] = linear[there]
            linear[there] = 0
        for name_of in ("constant", "kind"):
            values = getattr(source, name_of)
            getattr(to, name_of)[:, at] = values[:, there]
            values[:, there] = 0
        if last != name:
            self.names[row] = last
            self._rows[last] = row
        if not there:
            self._chunks.pop()

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the coordinates [Q, D] float64 of clips in every part; NaN where they lack it.

        Args:
          parts: [M] of [Q, D] float32, 0 for clips that lack the part.
        """
        found = []
        for number, (part, x) in enumerate(zip(self._front.parts, parts, strict=True)):
            z = self._turn(number, front_lib.unit(part, x) - part.space.mean)
            z[~np.any(x != 0, axis=1)] = np.nan
            found.append(z)
        return found

    def _turn(self, number: int, shifted: np.ndarray) -> np.ndarray:
        """Returns vectors [Q, D] times the transform of a part, float64."""
        if len(shifted) < MANY:
            return np.vecdot(shifted[:, None], self._axes[number])
        turned = _pool().map(lambda row: np.vecdot(row, self._axes[number]), shifted)
        return np.stack(list(turned))

    def log_probabilities(self, clip: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the logarithms of probabilities that add up to 1, [1 + N] float64.

        Column 0 is somebody new; the identity of row r is column 1 + r.

        Args:
          clip: [M] of [D] float64, one row of `whiten`. A clip that lacks all parts shows somebody
            new.
        """
        present = [number for number, z in enumerate(clip) if not np.isnan(z[0])]
        if not present:
            return np.concatenate([[0.0], np.full(len(self.names), -np.inf)])
        settings = self._front.settings
        squares = {n: np.vecdot(self._curves[n], clip[n] * clip[n]) for n in present}
        linear = {n: clip[n].astype(np.float32) for n in present}
        logits = np.zeros(1 + len(self.names))

        def score(number: int) -> None:
            chunk = self._chunks[number]
            out = logits[1:][number * CHUNK : (number + 1) * CHUNK]
            for n in present:
                kind = chunk.kind[n, : len(out)]
                ratios = np.vecdot(chunk.linear[n][: len(out)], linear[n])
                ratios = ratios + chunk.constant[n, : len(out)] + squares[n][kind]
                out += np.where(kind > 0, settings.scale * ratios, settings.unenrolled)

        if len(self._chunks) >= MANY:
            list(_pool().map(score, range(len(self._chunks))))
        else:
            for number in range(len(self._chunks)):
                score(number)
        logits[0] = settings.stranger
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


def _sums(part: front_lib.Part, vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns count [K] and total [K, D] float64 of identities, added up clip by clip in order."""
    sizes = [len(one) for one in vectors]
    stacked = np.concatenate(vectors)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    present = np.any(stacked != 0, axis=1)
    count = np.bincount(owner[present], minlength=len(sizes))
    total = np.zeros((len(sizes), stacked.shape[1]))
    np.add.at(total, owner, front_lib.unit(part, stacked))
    return count, total


def _by_chunk(rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Returns (chunk, rows inside of it, places in `rows`) of every chunk that has some."""
    chunks = rows // CHUNK
    found = []
    for chunk in np.unique(chunks).tolist():
        chosen = np.flatnonzero(chunks == chunk)
        found.append((chunk, rows[chosen] % CHUNK, chosen))
    return found


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


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Returns the threads that search, one per core."""
    return ThreadPoolExecutor(os.cpu_count() or 1)
