"""Compares groups of clips: do the clips of two groups show the same person?

A log ratio is log(p(clips | one person) / p(clips | two people)). The clips may be compared by PLDA
or by distances, see `backend`. The ratios of all modalities that both groups have are added.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vidjax.apps.gallery.backend import Backend, Part
from vidjax.models import card_backend, two_covariance

# We assume that 10 % of the voices belong to a person who is not seen. So the likelihood ratio of
# a voice is at most 9 if the clip also has a face.
MAX_VOICE_RATIO = np.log(9)
LEAST_ODDS = 200.0  # with which we say that clips show one person, or two


class Summary(NamedTuple):
    """The statistics of groups of clips that `compare` needs, in M modalities such as face.

    The arrays of groups may have any shape [...], for example [G] for G groups.
    """

    counts: list[np.ndarray]  # M arrays [...], the numbers of clips that have the modality
    means: list[np.ndarray]  # M arrays [..., D] float64, the mean coordinates of these clips, or 0
    squares: list[np.ndarray]  # M arrays [...], the squared lengths of the means
    noises: list[np.ndarray]  # M arrays [...], see `measure_noise`
    clarity: np.ndarray  # [...], the mean clarity of the faces, see `align.measure_clarity`

    def take(self, rows: list[int] | slice | np.ndarray) -> "Summary":
        """Selects groups of clips: `rows` is an index into each array, as in NumPy."""
        counts, means, squares, noises = ([x[rows] for x in each] for each in self[:-1])
        return Summary(counts, means, squares, noises, self.clarity[rows])


def of_clips(backend: Backend, parts: Sequence[np.ndarray]) -> Summary:
    """Returns a `Summary` of N groups, which `compare` needs. Each group is a single clip.

    `parts` are the vectors of the N clips: M arrays [N, D], one for each modality.
    """
    means, ones = backend.whiten(parts), np.ones(len(parts[0]))
    counts, squares = [z.any(axis=1).astype(int) for z in means], [np.vecdot(z, z) for z in means]
    return Summary(counts, means, squares, [ones] * len(means), ones)


def of_sums(
    backend: Backend,
    sums: Sequence[tuple[np.ndarray, np.ndarray]],
    clarity: np.ndarray,
) -> Summary:
    """Returns the statistics of G groups of clips.

    Args:
      backend: the parameters of the comparison.
      sums: (count [G], total [G, D]) for each of M modalities: the number of clips of each group,
        and the sum of the vectors of these clips after `Backend.whiten`.
      clarity: [G], the mean clarity of the faces of each group, see `align.measure_clarity`.
    """
    counts = [count for count, _ in sums]
    means = [total / np.maximum(count, 1)[:, None] for count, total in sums]
    squares = [np.vecdot(mean, mean) for mean in means]
    noises = [*map(measure_noise, backend.parts, counts, means)]
    return Summary(counts, means, squares, noises, clarity)


def measure_noise(part: Part, count: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Returns [G]: the variance of the mean of a group, relative to the variance of one clip.

    A value is 1 / k for k independent clips, and larger for similar clips. `count` [G] and `mean`
    [G, D] are the number and the mean of the clips in each group.
    """
    num = np.maximum(count, 1)
    if part.space is None:
        assert part.distances is not None
        return 1 / card_backend.effective_count(part.distances, num, np.vecdot(mean, mean))
    units = mean @ part.inverse + part.space.mean
    within = float(np.vdot(part.inverse, part.inverse))
    return 1 / two_covariance.count_independent(within, num, num[:, None] * units)


def compare(backend: Backend, x: Summary, y: Summary) -> tuple[np.ndarray, np.ndarray]:
    """Compares groups of clips x with groups of clips y. The shapes of x and y broadcast to [...].

    Returns two arrays: log(p(clips | one person) / p(clips | two people)), [...] float64; and
    [M, ...] bool for M modalities, True if both groups have the modality. If two groups have no
    modality in common, their log ratio is 0.
    """
    shared = np.array([(a > 0) & (b > 0) for a, b in zip(x.counts, y.counts, strict=True)])
    several, total = shared.sum(axis=0) > 1, np.zeros(shared.shape[1:])
    for number, part in enumerate(backend.parts):
        (a, one, s), (b, other, t) = (
            (each.means[number], each.squares[number], each.noises[number]) for each in (x, y)
        )
        if part.space is not None:
            ratios = two_covariance.pair_log_ratios(part.space, a, s, b, t)
            ratios = float(backend.settings.scale) * ratios
        else:
            assert part.distances is not None
            clarity = np.maximum(x.clarity, y.clarity) if part.name == "face" else 1.0
            gap = one + other - 2 * np.vecdot(a, b)
            ratios = card_backend.pair_log_ratios(part.distances, gap, s + t, clarity)
        if part.may_be_offscreen:
            limited = np.clip(ratios, -MAX_VOICE_RATIO, MAX_VOICE_RATIO)
            ratios = np.where(several, limited, ratios)
        total += np.where(shared[number], ratios, 0)
    return total, shared
