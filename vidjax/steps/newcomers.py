"""Newcomers: people whom PLDA was fitted without, enrolled with some of their training clips.

The centre and the covariances of every modality are fitted to the clips of all others, with the
settings of the run. Enrolling adds a clip to a count and a sum, so it is the same for newcomers as
for everybody else. Float64 on the host; clips are compared with the identities some at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import scipy

from vidjax.models import plda, two_covariance
from vidjax.models.plda import Settings
from vidjax.models.two_covariance import Space
from vidjax.steps.plda_settings import unit_from

MOST_NEWCOMERS = 100
SHARE = 0.1  # of the identities with training clips, where that is less
SHOTS = (1, 2, 5, 10)  # clips that newcomers are enrolled with
BLOCK = 1 << 20  # logits that are computed at a time


class Clips(NamedTuple):
    """Clips as vectors.

    Attributes:
      vectors: [M] of [N, D] float32, unit vectors; 0 for clips that lack the modality.
      labels: [N] int, class columns; 0 for distractors.
    """

    vectors: Sequence[np.ndarray]
    labels: np.ndarray

    @property
    def usable(self) -> np.ndarray:
        """[N] bool, False for clips that lack all modalities."""
        return np.any([np.any(x != 0, axis=1) for x in self.vectors], axis=0)

    def take(self, chosen: np.ndarray) -> "Clips":
        """Returns the clips `chosen` [N] bool."""
        return Clips([x[chosen] for x in self.vectors], self.labels[chosen])


class Part(NamedTuple):
    """One modality: its coordinates, and who is enrolled.

    Attributes:
      centre: [D] float64, subtracted from unit vectors before they are made unit again.
      space: the coordinates.
      count: [K] float64, number of enrolled clips of each class.
      total: [K, D] float64, their sums.
    """

    centre: np.ndarray
    space: Space
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  (a method of tuple)
    total: np.ndarray


class Scores(NamedTuple):
    """Scores of Q clips, logarithms of probabilities.

    Attributes:
      of: [Q, n] float64, for n chosen classes.
      best: [Q] float64, the highest for any identity; -inf for clips that lack all modalities.
      right: [Q] bool, True if that identity is the label of the clip.
    """

    of: np.ndarray
    best: np.ndarray
    right: np.ndarray


def draw(train_labels: np.ndarray, shown: np.ndarray, seed: int) -> np.ndarray:
    """Draws newcomers among the identities with training clips that ranked clips show.

    Args:
      train_labels: [N] int, class columns of the usable training clips.
      shown: [C] bool, identities that a ranked clip shows.
      seed: of the draw.

    Returns:
      [n] int, class columns in ascending order; at most MOST_NEWCOMERS, and at most SHARE of the
      identities with training clips, so that the others can be fitted.
    """
    known = np.unique(train_labels[train_labels > 0])
    count = min(MOST_NEWCOMERS, int(SHARE * len(known)))
    able = known[shown[known - 1]]
    return np.sort(np.random.default_rng(seed).permutation(able)[:count])


def turns(clips: Clips, seed: int) -> np.ndarray:
    """Returns [N] int, the turn from 0 in which a clip enrols its identity, in a random order.

    Clips that lack all modalities come after those that have one.
    """
    order = np.random.default_rng(seed).permutation(len(clips.labels))
    order = order[np.lexsort((~clips.usable[order], clips.labels[order]))]
    _, first, size = np.unique(clips.labels[order], return_index=True, return_counts=True)
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) - np.repeat(first, size)
    return found


def fit(clips: Clips, num_classes: int, settings: Settings) -> list[Part]:
    """Fits every modality to clips, and enrols those with a label.

    Args:
      clips: the training clips.
      num_classes: number of class columns, K.
      settings: those of the run.
    """
    parts = []
    for x in clips.vectors:
        width, present = x.shape[1], np.any(x != 0, axis=1)
        known = present & (clips.labels > 0)
        centre, space = np.zeros(width), plda.blank_space(width)
        count, total = np.zeros(num_classes), np.zeros((num_classes, width))
        if known.any():
            centre = x[present].mean(axis=0, dtype=np.float64)
            u = unit_from(centre, x[known])
            sums = two_covariance.make_sums(u, clips.labels[known], num_classes)
            space = plda.fit(sums._asdict(), settings)
            count, total = np.asarray(sums.count), np.asarray(sums.total)
        parts.append(Part(centre, space, count, total))
    return parts


def enrol(parts: Sequence[Part], clips: Clips) -> list[Part]:
    """Returns the parts with labelled clips enrolled, too."""
    found = []
    for part, x in zip(parts, clips.vectors, strict=True):
        known = np.any(x != 0, axis=1) & (clips.labels > 0)
        labels, total = clips.labels[known], part.total.copy()
        np.add.at(total, labels, unit_from(part.centre, x[known]))
        count = part.count + np.bincount(labels, minlength=len(total))
        found.append(part._replace(count=count, total=total))
    return found


class _Classes(NamedTuple):
    """K classes to compare with.

    Attributes:
      enrolled: their coefficients in each of the M modalities.
      known: [M, K] bool, False for classes without a clip that has the modality.
      num_clips: [K] float64, clips of each class in the modality that has most.
    """

    enrolled: Sequence[two_covariance.Enrolled]
    known: np.ndarray
    num_clips: np.ndarray

    @classmethod
    def among(cls, parts: Sequence[Part], columns: np.ndarray) -> Self:
        """Takes the classes `columns` [K] int."""
        counts = [part.count[columns] for part in parts]
        enrolled = [
            two_covariance.enrol(part.space, count, part.total[columns])
            for part, count in zip(parts, counts, strict=True)
        ]
        known = np.stack([one.known for one in enrolled])
        return cls(enrolled, known, np.asarray(plda.most_clips(counts, np)))

    def logits(
        self, coordinates: Sequence[np.ndarray], present: np.ndarray, settings: Settings
    ) -> np.ndarray:
        """Returns logits [B, K] of clips z, [M] of [B, D], that have modalities [M, B]."""
        ratios = [
            two_covariance.log_ratios_at(enrolled, z, np)
            for enrolled, z in zip(self.enrolled, coordinates, strict=True)
        ]
        found = plda.combine(np.stack(ratios), self.known, present, settings, self.num_clips, np)
        return np.asarray(found)


def score(
    enrolments: Sequence[Sequence[Part]], settings: Settings, clips: Clips, columns: np.ndarray
) -> list[Scores]:
    """Compares clips with all classes, as `models.plda` and `system.log_softmax` do.

    Args:
      enrolments: results of `enrol` that differ in the classes `columns` alone.
      settings: those of the run.
      clips: Q clips.
      columns: [n] int, classes from 1, whose scores are kept.

    Returns:
      The scores of each enrolment.
    """
    parts = enrolments[0]
    first = _Classes.among(parts, np.arange(len(parts[0].count)))
    others = [_Classes.among(one, np.r_[0, columns]) for one in enrolments[1:]]
    rows = max(1, BLOCK // len(parts[0].count))
    found: list[list[Scores]] = [[] for _ in enrolments]
    for at in range(0, len(clips.labels), rows):
        units = [
            unit_from(part.centre, x[at : at + rows])
            for part, x in zip(parts, clips.vectors, strict=True)
        ]
        present = np.stack([np.any(u != 0, axis=1) for u in units])
        z = [
            (u - part.space.mean) @ part.space.transform
            for part, u in zip(parts, units, strict=True)
        ]
        logits = first.logits(z, present, settings)
        for number, made in enumerate(found):
            if number:
                logits[:, columns] = others[number - 1].logits(z, present, settings)[:, 1:]
            made.append(_scores(logits, present, clips.labels[at : at + rows], columns))
    return [Scores(*(np.concatenate(x) for x in zip(*made, strict=True))) for made in found]


def _scores(
    logits: np.ndarray, present: np.ndarray, labels: np.ndarray, columns: np.ndarray
) -> Scores:
    """Returns the scores of clips from their logits [B, K]."""
    usable = np.any(present, axis=0, keepdims=True).T
    logs = log_softmax(logits)
    logs = np.where(usable & ~np.isnan(logs), logs, -np.inf)  # as `scoring.score` ranks NaN
    best = logs[:, 1:].max(axis=1)
    right = (1 + logs[:, 1:].argmax(axis=1) == labels) & (best > -np.inf)
    return Scores(logs[:, columns], best, right)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the softmax of logits [B, K] float64, as `system.log_softmax`.

    The logarithm of a probability near 1 is computed from the other columns.
    """
    best = logits.argmax(axis=1)[:, None]
    top, others = np.take_along_axis(logits, best, axis=1), logits.copy()
    np.put_along_axis(others, best, -np.inf, axis=1)
    rest = scipy.special.logsumexp(others, axis=1, keepdims=True)
    found = logits - np.logaddexp(top, rest)
    np.put_along_axis(found, best, scipy.special.log_expit(top - rest), axis=1)
    return found


def lists(scores: np.ndarray, pool: np.ndarray, length: int) -> np.ndarray:
    """Returns [n, length] int, the best clips of n identities; the clip's index decides on ties.

    Args:
      scores: [Q, n] float.
      pool: [Q] bool, the clips that are ranked.
      length: at most so many clips; fewer where the pool has fewer.
    """
    ranked = np.flatnonzero(pool)
    order = np.argsort(-scores[ranked], axis=0, kind="stable")[:length]
    return ranked[order].T
