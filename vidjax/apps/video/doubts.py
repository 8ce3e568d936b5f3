"""Finds photos that may show a person other than the person of their folder.

A photo is compared with the other photos of its person, and with all other people. It is doubtful
if another person is more probable than its own by LEAST_ODDS, with equal priors for all other
people. If its person has at least FEWEST_OTHERS other photos, it is also doubtful if these odds
show that it is of a different person. The most doubtful photo of each person is then set aside, and
the rest is compared again, because a wrong photo makes the right photos doubtful.
"""

from collections.abc import Mapping

import numpy as np

from vidjax.apps.gallery.backend import sum_by_owner
from vidjax.apps.gallery.gallery import Gallery
from vidjax.models import distance
from vidjax.models.distance import Distances

LEAST_ODDS = 200.0
FEWEST_OTHERS = 2  # other photos of a person, from which a photo can differ


def find_doubtful_photos(gallery: Gallery, person_of: Mapping[str, str]) -> dict[str, str | None]:
    """Returns doubtful clip -> the person whom it resembles, or None if it resembles nobody.

    `person_of` is clip -> person. Faces are compared by the distances of the net's card. If the
    gallery has none, no photo is doubtful.
    """
    doubtful: dict[str, str | None] = {}
    clips = np.array(sorted(person_of))
    for number, part in enumerate(gallery.backend.parts):
        if part.name != "face" or part.distances is None or not len(clips):
            continue
        vectors = np.stack([gallery.clips[clip].vector for clip in clips.tolist()])
        units = gallery.backend.units(gallery.backend.split(vectors))[number]
        valid = units.any(axis=1)
        names, owner = np.unique([person_of[clip] for clip in clips[valid]], return_inverse=True)
        for row, like in compare_photos(part.distances, units[valid], owner).items():
            doubtful[str(clips[valid][row])] = None if like is None else str(names[like])
    return doubtful


def compare_photos(
    distances: Distances, units: np.ndarray, owner: np.ndarray
) -> dict[int, int | None]:
    """Returns doubtful photo -> the person whom it resembles, or None if it resembles nobody.

    Args:
      distances: the distances of the net's card.
      units: [N, D] float64, the unit vectors of photos.
      owner: [N] int, the person of each photo, from 0.
    """
    doubtful: dict[int, int | None] = {}
    rows, kept = np.arange(len(units)), np.ones(len(units), bool)
    num = int(owner.max(initial=-1)) + 1
    while True:
        count, total = sum_by_owner(units * kept[:, None], owner, num)
        num_others = count[owner] - kept
        rest = (total[owner] - units * kept[:, None]) / np.maximum(num_others, 1)[:, None]
        log_odds_own = _compute_log_ratios(distances, num_others, rest, np.vecdot(units, rest))
        mean = total / np.maximum(count, 1)[:, None]
        others = _compute_log_ratios(distances, count, mean, units @ mean.T)  # [N, num]
        others[rows, owner] = -np.inf
        like = others.argmax(axis=1)
        gain = others[rows, like] - np.log(max(num - 1, 1)) - np.maximum(log_odds_own, 0)
        doubt = np.maximum(gain, np.where(num_others >= FEWEST_OTHERS, -log_odds_own, -np.inf))
        order = np.flatnonzero(kept & (doubt > np.log(LEAST_ODDS)))
        order = order[np.argsort(doubt[order], kind="stable")]
        worst = dict(zip(owner[order].tolist(), order.tolist(), strict=True))  # of each person
        if not worst:
            return doubtful
        for photo in worst.values():
            doubtful[photo] = int(like[photo]) if gain[photo] > 0 else None
            kept[photo] = False


def _compute_log_ratios(
    distances: Distances, count: np.ndarray, mean: np.ndarray, product: np.ndarray
) -> np.ndarray:
    """Returns log(p(photo, clips | same person) / p(... | two people)); 0 for people without clips.

    Args:
      count: the number of clips of each person.
      mean: the mean of the unit vectors of these clips.
      product: the inner product of `mean` and the unit vector of the photo.
    """
    square = np.vecdot(mean, mean)
    noise = 1 + 1 / distance.effective_count(distances, np.maximum(count, 1), square)
    log_ratios = distance.pair_log_ratios(distances, 1 + square - 2 * product, noise)
    return np.where(count > 0, log_ratios, 0.0)
