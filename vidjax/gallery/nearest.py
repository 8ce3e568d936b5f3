"""The most probable people of many clips at once: the answers of `Index`, to the bit, but sooner.

A matrix product says how probable every person is, nearly. By a bound on its rounding, most people
can neither be among the best nor change a bit of the sum over all people: `backend.log_softmax`
counts exponentials in units of 2^-40 of the second highest, so who lies 28 nats below it counts 0.
Only for the others is the dot product of `Index` computed. Where too many are left, it is computed
for all.

Source of the bound: N. Higham, Accuracy and Stability of Numerical Algorithms (2002), 3.1.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.gallery.backend import FINE, MOST_OF_VOICE, ROUNDING, Index, log_softmax
from vidjax.models import two_covariance

QUERIES = 64  # clips of a matrix product
UNCOUNTED = float(np.log(2 * FINE)) + 0.5  # nats below the second highest that count as 0, and more
TOGETHER = 256  # people left of a clip whose logits are computed with those of other clips
MOST_LEFT = 0.25  # share of all people from which on `Index` is as quick
PEAK = 32  # people of whom one is looked at, to find how high the k-th one is
FEW = 512  # people below which a matrix product saves nothing


class Nearest(NamedTuple):
    """Log probabilities of a clip: of somebody `new`, and of the `best` people, as `Index.best`.

    Of `new` the last bits may be wrong where it is 0 but for 1e-15.
    """

    new: float
    best: list[tuple[str, float]]


def nearest(index: Index, parts: Sequence[np.ndarray], k: int) -> Iterator[Nearest]:
    """Yields the k most probable people of Q clips; `parts` are M arrays [Q, D], 0 where missing.

    The best equal `Index.best` of `Index.log_probabilities`, to the bit.
    """
    screen = _Screen(index) if len(index.names) >= FEW else None
    for at in range(0, len(parts[0]), QUERIES):
        z = index.backend.whiten([x[at : at + QUERIES] for x in parts])
        found = screen.nearest(z, k) if screen else {}
        for row in range(len(z[0])):
            if row not in found:
                logs = index.log_probabilities([one[row] for one in z])
                found[row] = Nearest(float(logs[0]), index.best(logs, k))
            yield found[row]


def _peaks(values: np.ndarray) -> np.ndarray:
    """Returns the highest of each PEAK values, [Q, N // PEAK] of [Q, N], but of the last few."""
    count = values.shape[1] // PEAK
    return values[:, : count * PEAK].reshape(len(values), PEAK, count).max(axis=1)


class _Screen:
    """Bounds on the logits of all N people for some clips, and exact answers for those left."""

    def __init__(self, index: Index):
        self._index, settings = index, index.backend.settings
        self._new = float(two_covariance.stranger_logit(settings, len(index.names)))
        self._lacking = [np.flatnonzero(counts == 0) for counts in index.counts]

    def bounds(self, z: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns nearly exact logits [Q, N] float32, and the most by which they err, [Q].

        None where no clip has any part.
        """
        settings = self._index.backend.settings
        missing = [np.isnan(one[:, 0]) for one in z]
        num_present = np.sum([~one for one in missing], axis=0)
        total: np.ndarray | None = None
        error, size = np.zeros(len(z[0])), np.zeros(len(z[0]))
        for number, part in enumerate(self._index.backend.parts):
            if missing[number].all():
                continue
            scale = float(settings.scale) * part.scale
            ratios, wrong, most = self._index.screen(number, np.nan_to_num(z[number]), scale)
            if part.hearsay:
                rows, voice = num_present > 1, np.float32(MOST_OF_VOICE)
                ratios[rows] = np.clip(ratios[rows], -voice, voice)
            if len(self._lacking[number]):
                ratios[:, self._lacking[number]] = settings.unenrolled
            if missing[number].any():
                ratios[missing[number]] = 0
            error += wrong
            size += np.maximum(most, abs(settings.unenrolled))
            total = ratios if total is None else np.add(total, ratios, out=total)
        if total is None:
            return None
        return total, error + 8 * len(z) * ROUNDING * size

    def nearest(self, z: Sequence[np.ndarray], k: int) -> dict[int, Nearest]:
        """Returns clip -> answer, without clips that have no part, or too many people left.

        `z` are M arrays [Q, D] of `Backend.whiten`.
        """
        if not (bounds := self.bounds(z)):
            return {}
        left = self._left(*bounds, k)
        left[np.all([np.isnan(one[:, 0]) for one in z], axis=0)] = False
        counts = np.array([np.count_nonzero(row) for row in left])
        found: dict[int, Nearest] = {}
        for clip in np.flatnonzero((counts > TOGETHER) & (counts <= MOST_LEFT * left.shape[1])):
            rows = np.flatnonzero(left[clip])
            found.update(self._compared(rows, np.full(len(rows), clip), z, k))
        left[counts > TOGETHER] = False
        owner, rows = np.divmod(np.flatnonzero(left), left.shape[1])
        found.update(self._compared(rows, owner, z, k))
        return found

    def _compared(
        self, rows: np.ndarray, owner: np.ndarray, z: Sequence[np.ndarray], k: int
    ) -> Iterator[tuple[int, Nearest]]:
        """Yields clip and answer from the people left, `rows` [R] of clips `owner` [R], sorted."""
        clips, begins, counts = np.unique(owner, return_index=True, return_counts=True)
        logits = np.full((len(clips), 1 + counts.max(initial=0)), -np.inf)
        logits[:, 0] = self._new
        place = np.repeat(np.arange(len(clips)), counts)
        column = 1 + np.arange(len(rows)) - begins[place]
        logits[place, column] = self._index.logits_of(rows, owner, z)
        pieces = np.split(rows, begins[1:])
        for clip, own, logs in zip(clips.tolist(), pieces, log_softmax(logits), strict=False):
            best = self._index.best_of(own, logs[1 : 1 + len(own)], k)
            yield clip, Nearest(float(logs[0]), best)

    def _left(self, logits: np.ndarray, error: np.ndarray, k: int) -> np.ndarray:
        """Returns True for people who may be among the best k, or count in the sum, [Q, N]."""
        people = logits.shape[1]
        k = min(k, people)
        peaks = _peaks(logits) if k * PEAK <= people else logits
        few = max(k, 2)
        high = np.partition(peaks, -few, axis=1)[:, -few:].astype(np.float64)
        high.sort(axis=1)  # of people, who are not above the highest ones
        kth, second = high[:, -k], np.clip(self._new, high[:, -2], high[:, -1])
        # Where somebody new is so probable that all people together change no bit of the sum, only
        # the best k matter.
        most = logits.max(axis=1) + error + math.log(people) + 1
        alone = np.logaddexp(self._new, most) == self._new
        least = np.where(alone, kth, np.minimum(kth, second - UNCOUNTED)) - 2 * error
        # Logits that differ by less than this may be one logarithm: ties, which go by name.
        least -= 4 * np.spacing(abs(self._new) + np.abs(kth))
        return logits >= (least - 1e-6 * np.abs(least)).astype(np.float32)[:, None]
