"""Photos that may show somebody else than their folder says.

A photo is compared with the other photos of its person, and with all other people. One of these is
named where it is more probable than the person of the photo by the odds LEAST_ODDS, with equal
priors for all other people. A photo with two or more others of its person is doubtful, too, where
these odds say that it shows somebody else than they do. The most doubtful photo of each person is
set aside, and the rest is compared again, since a wrong photo makes the right ones doubtful.
"""

from collections.abc import Mapping

import numpy as np

from vidjax.apps.gallery.backend import sums_of
from vidjax.apps.gallery.gallery import Gallery
from vidjax.models import distance
from vidjax.models.distance import Distances

LEAST_ODDS = 200.0
FEWEST_OTHERS = 2  # photos of a person that an unlike one differs from


def among(gallery: Gallery, shown: Mapping[str, str]) -> dict[str, str | None]:
    """Returns doubtful clip of a gallery -> the person whom it looks like, None for nobody.

    `shown` is clip -> person. Faces are compared as a card says; without a card there is no doubt.
    """
    found: dict[str, str | None] = {}
    clips = np.array(sorted(shown))
    for number, part in enumerate(gallery.backend.parts):
        if part.name != "face" or part.distances is None or not len(clips):
            continue
        vectors = np.stack([gallery.clips[clip].vector for clip in clips.tolist()])
        units = gallery.backend.units(gallery.backend.split(vectors))[number]
        there = units.any(axis=1)
        names, owner = np.unique([shown[clip] for clip in clips[there]], return_inverse=True)
        for row, like in find(part.distances, units[there], owner).items():
            found[str(clips[there][row])] = None if like is None else str(names[like])
    return found


def find(distances: Distances, units: np.ndarray, owner: np.ndarray) -> dict[int, int | None]:
    """Returns doubtful photo -> the person whom it looks like, None for nobody enrolled.

    Args:
      distances: what the card of the net says.
      units: [N, D] float64, the unit vectors of photos.
      owner: [N] int, the person of each photo, from 0.
    """
    found: dict[int, int | None] = {}
    rows, left = np.arange(len(units)), np.ones(len(units), bool)
    num = int(owner.max(initial=-1)) + 1
    while True:
        count, total = sums_of(units * left[:, None], owner, num)
        own_count = count[owner] - left
        rest = (total[owner] - units * left[:, None]) / np.maximum(own_count, 1)[:, None]
        own = _log_ratios(distances, own_count, rest, np.vecdot(units, rest))
        mean = total / np.maximum(count, 1)[:, None]
        others = _log_ratios(distances, count, mean, units @ mean.T)  # [N, num]
        others[rows, owner] = -np.inf
        like = others.argmax(axis=1)
        gain = others[rows, like] - np.log(max(num - 1, 1)) - np.maximum(own, 0)
        doubt = np.maximum(gain, np.where(own_count >= FEWEST_OTHERS, -own, -np.inf))
        order = np.flatnonzero(left & (doubt > np.log(LEAST_ODDS)))
        order = order[np.argsort(doubt[order], kind="stable")]
        worst = dict(zip(owner[order].tolist(), order.tolist(), strict=True))  # of each person
        if not worst:
            return found
        for photo in worst.values():
            found[photo] = int(like[photo]) if gain[photo] > 0 else None
            left[photo] = False


def _log_ratios(
    distances: Distances, count: np.ndarray, mean: np.ndarray, product: np.ndarray
) -> np.ndarray:
    """Returns log(p(photo, clips | one person) / p(.. | two people)); 0 for people without clips.

    `mean` is that of `count` clips, and `product` the product of it and the unit vector of a photo.
    """
    square = np.vecdot(mean, mean)
    noise = 1 + 1 / distance.effective_count(distances, np.maximum(count, 1), square)
    found = distance.pair_log_ratios(distances, 1 + square - 2 * product, noise)
    return np.where(count > 0, found, 0.0)
