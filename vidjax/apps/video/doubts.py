"""Finds photos that may show a person other than the person under whose name they are enrolled.

Each photo is compared with the other photos of the named person, and with the photos of all other
people. A photo is doubtful in two cases:

- The odds that the photo shows one of the other people are above 200 to 1. All other people have
  the same prior probability.
- The named person has at least two other photos, and the odds that the photo shows a different
  person than these photos are above 200 to 1.

A wrong photo also makes right photos of the same person doubtful. To find only the wrong photo, the
most doubtful photo of each person is set aside, and the remaining photos are compared again.
"""

from collections.abc import Mapping

import numpy as np

from vidjax.apps.gallery.backend import sum_by_owner
from vidjax.apps.gallery.gallery import Gallery
from vidjax.models import distance
from vidjax.models.distance import Distances

LEAST_ODDS = 200.0
FEWEST_OTHERS = 2  # with fewer other photos, a photo is not doubted for differing from them


def find_doubtful_photos(gallery: Gallery, person_of: Mapping[str, str]) -> dict[str, str | None]:
    """Finds photos in a gallery that may show another person; returns clip -> the likely person.

    If a photo resembles no other person, the likely person is None. `person_of` is clip -> person
    for the photos to check. If the card of the net contains no distribution of distances, the
    result is empty.
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
    """Finds photos that probably show another person than `owner`, with odds above 200 to 1.

    Args:
      distances: the distributions of distances between faces of one person and of two people.
      units: [N, D] float64, the embeddings of N photos, scaled to unit length.
      owner: [N] int, the person in whose folder each photo is. People are numbered from 0.

    Returns:
      Row of such a photo -> number of the person whom it resembles, or None for nobody.
    """
    doubtful: dict[int, int | None] = {}
    rows, kept = np.arange(len(units)), np.ones(len(units), bool)
    num = int(owner.max(initial=0)) + 1
    others, changed = np.zeros((len(units), num)), np.arange(num)
    while True:
        count, total = sum_by_owner(units * kept[:, None], owner, num)
        num_others = count[owner] - kept
        rest = (total[owner] - units * kept[:, None]) / np.maximum(num_others, 1)[:, None]
        log_odds_own = _compute_log_ratios(distances, num_others, rest, np.vecdot(units, rest))
        mean = total[changed] / np.maximum(count[changed], 1)[:, None]
        others[:, changed] = _compute_log_ratios(distances, count[changed], mean, units @ mean.T)
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
        changed = np.array([*worst])


def _compute_log_ratios(
    distances: Distances, count: np.ndarray, mean: np.ndarray, product: np.ndarray
) -> np.ndarray:
    """Compares photos with K people; returns log ratios of likelihoods, in the shape of `product`.

    A ratio is log(p(photo | this person) / p(photo | another person)). If a person has no other
    photos, the ratio is 0.

    Args:
      count: [K], the number of other photos of each person.
      mean: [K, D], the mean unit embedding of these photos.
      product: the inner products of `mean` and the unit embeddings of the compared photos: [N, K]
        for N photos, or [K], if photo k is compared only with person k.
    """
    square = np.vecdot(mean, mean)
    noise = 1 + 1 / distance.effective_count(distances, np.maximum(count, 1), square)
    log_ratios = distance.pair_log_ratios(distances, 1 + square - 2 * product, noise)
    return np.where(count > 0, log_ratios, 0.0)
