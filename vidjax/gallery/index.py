"""Exact search: the probability of every enrolled identity for a clip, and the best ones.

The people lie in blocks. An answer does not depend on how, to the bit: every coordinate and every
ratio is a dot product of its own, where a product of matrices rounds by the place of a row; sums
over identities are sums of whole numbers; and ties go by name.

The scores are those of `models.plda.combine` and `system.log_softmax`, which need all identities in
one order and on the device.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.gallery.blocks import Block
from vidjax.gallery.coordinates import Coordinates, threads

MANY_BLOCKS = 1024  # from which on threads are worth starting
FINE = 2.0**40  # exponentials are counted in units of 1 / FINE: room for 8 million identities


class _Rows(NamedTuple):
    """All people, block after block.

    Attributes:
      names: N identities.
      ends: the row behind the last one of each block.
      constant: [M, N] float64.
      kind: [M, N] int32, row of the curves; 0 for an identity without a clip in the part.
    """

    names: list[str]
    ends: list[int]
    constant: np.ndarray
    kind: np.ndarray


class Index:
    """Identities as coefficients."""

    def __init__(self, coordinates: Coordinates):
        """Starts without identities."""
        self._coordinates = coordinates
        self._blocks: dict[str, Block] = {}
        self._joined: _Rows | None = None
        parts = coordinates.front.parts
        self._kinds: list[dict[int, int]] = [{0: 0} for _ in parts]  # count -> row of curves
        self._curves = [np.zeros((1, len(part.centre))) for part in parts]

    @property
    def names(self) -> list[str]:
        """The identity of every row."""
        return self._rows().names

    def replace(self, gone: Iterable[str], new: Mapping[str, Block]) -> None:
        """Replaces blocks, which have names of their own; `gone` before `new`."""
        for name in gone:
            self._blocks.pop(name, None)
        self._blocks.update({name: block for name, block in new.items() if block.people})
        self._joined = None

    def _rows(self) -> _Rows:
        """Returns all but the long rows of coefficients, which stay where they are."""
        if self._joined is None:
            found = [block.coefficients for block in self._blocks.values()]
            names = [name for block in self._blocks.values() for name in block.people]
            ends = np.cumsum([len(block.people) for block in self._blocks.values()], dtype=int)
            parts = range(len(self._curves))
            none = np.zeros((len(parts), 0))
            constant = np.concatenate([none, *(one.constant for one in found)], axis=1)
            count = np.concatenate([none, *(one.num_clips for one in found)], axis=1).astype(int)
            kind = np.array([self._kind(number, count[number]) for number in parts])
            self._joined = _Rows(names, ends.tolist(), constant, kind)
        return self._joined

    def _kind(self, number: int, count: np.ndarray) -> np.ndarray:
        """Returns the rows of the curves, [P] int32, of numbers of clips in one part."""
        kinds = self._kinds[number]
        values, inverse = np.unique(count, return_inverse=True)
        for value in values.tolist():
            if value not in kinds:
                kinds[value] = len(self._curves[number])
                curve = self._coordinates.curve(number, value)
                self._curves[number] = np.vstack([self._curves[number], curve])
        return np.array([kinds[value] for value in values.tolist()], np.int32)[inverse]

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
        rows = self._rows()
        blocks = list(self._blocks.values())
        ratios = np.empty((len(self._curves), len(rows.names)), np.float32)
        linear = {n: clip[n].astype(np.float32) for n in present}

        def score(first: int, step: int) -> None:
            for number in range(first, len(blocks), step):
                own = slice(rows.ends[number - 1] if number else 0, rows.ends[number])
                for n, z in linear.items():
                    np.vecdot(blocks[number].coefficients.linear[n], z, out=ratios[n, own])

        if len(blocks) >= MANY_BLOCKS:
            cores = os.cpu_count() or 1
            list(threads().map(lambda first: score(first, cores), range(cores)))
        else:
            score(0, 1)
        settings = self._coordinates.front.settings
        logits = np.zeros(1 + len(rows.names))
        logits[0] = settings.stranger
        for n in present:
            squares = np.vecdot(self._curves[n], clip[n] * clip[n])
            ratio = ratios[n] + rows.constant[n] + squares[rows.kind[n]]
            logits[1:] += np.where(rows.kind[n] > 0, settings.scale * ratio, settings.unenrolled)
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
