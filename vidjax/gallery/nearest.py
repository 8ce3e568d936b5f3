"""The most probable people of many clips at once: the answers of `Index`, to the bit, but sooner.

A matrix product says how probable every person is, nearly. By a bound on its rounding, most people
can neither be among the best nor change a bit of the sum over all people: `backend.log_softmax`
counts exponentials in units of 2^-40 of the second highest, so who lies 28 nats below it counts 0.
Only for the others is the dot product of `Index` computed. Where too many are left, `Index` answers.

Source of the bound: N. Higham, Accuracy and Stability of Numerical Algorithms (2002), 3.1.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.gallery import backend as backend_lib
from vidjax.gallery.backend import FINE, Index
from vidjax.models import two_covariance

QUERIES = 32  # clips of a matrix product
UNCOUNTED = float(np.log(2 * FINE)) + 0.5  # nats below the second highest that count as 0, and more
MOST_LEFT = 0.25  # share of all people from which on `Index` is as quick
FEW = 512  # people below which a matrix product saves nothing


class Nearest(NamedTuple):
    """Log probabilities of a clip: of somebody `new`, and of the `best` people, as `Index.best`."""

    new: float
    best: list[tuple[str, float]]


def nearest(index: Index, parts: Sequence[np.ndarray], k: int) -> Iterator[Nearest]:
    """Yields the k most probable people of Q clips; `parts` are M arrays [Q, D], 0 where missing.

    They equal `Index.best` of `Index.log_probabilities`, to the bit.
    """
    screen = _Screen(index) if len(index.names) >= FEW else None
    for at in range(0, len(parts[0]), QUERIES):
        z = index.backend.whiten([x[at : at + QUERIES] for x in parts])
        bounds = screen.bounds(z) if screen else None
        for row in range(len(z[0])):
            clip = [one[row] for one in z]
            found = None
            if screen and bounds is not None:
                found = screen.nearest(clip, *(one[row] for one in bounds), k)
            if found is None:
                logs = index.log_probabilities(clip)
                found = Nearest(float(logs[0]), index.best(logs, k))
            yield found


class _Screen:
    """Bounds on the logits of all N people for some clips, and exact answers for those left."""

    def __init__(self, index: Index):
        self._index = index

    def bounds(self, z: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns nearly exact logits [Q, N] float32, and the most by which they err, [Q].

        None where clips lack a part, or parts are clipped: few galleries, and `Index` answers.
        """
        index, settings = self._index, self._index.backend.settings
        total: np.ndarray | None = None
        error = np.zeros(len(z[0]))
        for number, part in enumerate(index.backend.parts):
            if np.isnan(z[number]).any() or (part.hearsay and len(z) > 1):
                return None
            ratios, wrong = index.screened(number, z[number])
            ratios *= np.float32(settings.scale * part.scale)
            error += abs(settings.scale * part.scale) * wrong
            lacking = index.lacking(number)
            if lacking.any():
                ratios[:, lacking] = settings.unenrolled
            total = ratios if total is None else total + ratios
        if total is None:
            return None
        largest = np.maximum(np.abs(total.max(axis=1)), np.abs(total.min(axis=1)))
        return total, error + 8e-7 * (1 + len(z)) * (1 + largest)

    def nearest(
        self, clip: Sequence[np.ndarray], logits: np.ndarray, error: float, k: int
    ) -> Nearest | None:
        """Returns the answer for a clip from its bounds; None where too many people are left."""
        index = self._index
        people = len(logits)
        k = min(k, people)
        stranger = two_covariance.stranger_logit(index.backend.settings, people)
        highest = np.partition(logits, [people - k, people - 2])
        kth, first, second = (float(highest[at]) for at in (people - k, people - 1, people - 2))
        runner_up = sorted((first, second, float(stranger)))[1]  # of all but the highest, nearly
        least = min(kth, runner_up - UNCOUNTED) - 2 * error
        rows = np.flatnonzero(logits >= least)
        if len(rows) > MOST_LEFT * people:
            return None
        exact = index.logits_of(rows, clip)
        logs = backend_lib.log_softmax(np.concatenate([[stranger], exact]))
        return Nearest(float(logs[0]), index.best_of(rows, logs[1:], k))
