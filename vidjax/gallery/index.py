"""Exact search: the probability of every enrolled identity for a clip, and the best ones.

People are stored in blocks. Answers are equal to the bit whatever block and row a person has: every
coordinate and every ratio is a dot product of its own, sums over identities are sums of whole
numbers, and ties go by name. The formulas are those of `models.plda.combine` and
`logit_ops.log_softmax`, which need all identities in one order and on the device.
"""

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.gallery.backend import Backend, Coefficients, threads
from vidjax.machine import num_cores
from vidjax.models import two_covariance

MOST_QUERIES = 1024  # clips whose coordinates are computed at a time
MOST_ROWS = 4096  # people of the largest block
FEW_ROWS = 512  # people of a block that a change joins with another one
MANY_BLOCKS = 48  # from which on threads are worth starting
FINE = 2.0**40  # exponentials are counted in units of 1 / FINE: room for 8 million identities


class People(NamedTuple):
    """A block of P people: their names, and their coefficients in the same order."""

    names: tuple[str, ...]
    coefficients: Coefficients

    def take(self, rows: Sequence[int] | np.ndarray) -> "People":
        """Returns the people in the given rows of the block."""
        linear, constant, count = self.coefficients
        taken = Coefficients(tuple(x[rows] for x in linear), constant[:, rows], count[:, rows])
        return People(tuple(self.names[row] for row in rows), taken)


def join(blocks: Sequence[People]) -> People:
    """Joins one or more blocks of people into one."""
    found = [block.coefficients for block in blocks]
    linear = tuple(np.concatenate(parts) for parts in zip(*(x.linear for x in found), strict=True))
    constant = np.concatenate([x.constant for x in found], axis=1)
    count = np.concatenate([x.num_clips for x in found], axis=1)
    names = tuple(itertools.chain.from_iterable(block.names for block in blocks))
    return People(names, Coefficients(linear, constant, count))


class Index:
    """Identities as coefficients of a back end; an index is never changed."""

    def __init__(self, backend: Backend, blocks: Iterable[People] = ()):
        """Takes blocks of people; nobody may be in two of them."""
        self.backend = backend
        self.blocks = [block for block in blocks if block.names]

    @functools.cached_property
    def names(self) -> list[str]:
        """The identity of every row."""
        return [name for block in self.blocks for name in block.names]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """[M, N] int32, the number of each identity's clips that have the part."""
        none = np.zeros((len(self.backend.parts), 0), np.int32)
        found = [block.coefficients.num_clips for block in self.blocks]
        return np.concatenate([none, *found], axis=1)

    @functools.cached_property
    def _constant(self) -> np.ndarray:
        none = np.zeros((len(self.backend.parts), 0))
        return np.concatenate([none, *(x.coefficients.constant for x in self.blocks)], axis=1)

    @functools.cached_property
    def _curves(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Coefficients of z^2, M arrays [1 + U, D], and each identity's row in them, [M, N] int32.

        Identities with equal numbers of clips share a row; row 0 is for no clip in the part.
        """
        curves, kinds = [], []
        for part, counts in zip(self.backend.parts, self.counts, strict=True):
            values, inverse = np.unique(counts, return_inverse=True)
            none = np.zeros((len(values), len(part.centre)))
            found = two_covariance.coefficients(part.space, values.astype(np.float64), none)
            curves.append(np.pad(np.asarray(found.curve), ((1, 0), (0, 0))))
            kinds.append(np.where(counts > 0, inverse + 1, 0).astype(np.int32))
        return curves, np.stack(kinds)

    def replaced(self, gone: Collection[str], new: People) -> "Index":
        """Returns an index without the people named `gone`, where it has them, and with `new`."""
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
        return Index(self.backend, kept)

    def search(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields `log_probabilities` of Q clips; `parts` are M arrays [Q, D], 0 where missing."""
        for at in range(0, len(parts[0]), MOST_QUERIES):
            block = self.backend.whiten([x[at : at + MOST_QUERIES] for x in parts])
            for row in range(len(block[0])):
                yield self.log_probabilities([z[row] for z in block])

    def log_probabilities(self, clip: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the logarithms of 1 + N probabilities that add up to 1, [1 + N] float64.

        Entry 0 is somebody new, entry 1 + r the identity `names[r]`. `clip` is a row of each of the
        M arrays of `Backend.whiten`, [D] float64. One that lacks all parts shows somebody new.
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
        settings = self.backend.settings
        logits = np.zeros(1 + ends[-1])
        logits[0] = two_covariance.stranger_logit(settings, ends[-1])
        for n in present:
            squares = np.vecdot(curves[n], clip[n] * clip[n])
            ratio = ratios[n] + self._constant[n] + squares[kind[n]]
            logits[1:] += np.where(kind[n] > 0, settings.scale * ratio, settings.unenrolled)
        return log_softmax(logits)

    def best(self, log_probabilities: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Returns the k >= 1 most probable identities as (name, log p), best first, ties by name.

        `log_probabilities` [1 + N] come from the method. A clip that lacks all parts has no best.
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
    """Returns log softmax [K] float64 of logits [K] float64, whose order changes no bit of it.

    The logarithm of a probability near 1 is computed from the others, as in `logit_ops`.
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
