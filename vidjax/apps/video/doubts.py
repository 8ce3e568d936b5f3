"""Finds photos that may have the name of a wrong person.

The photos with one name are divided into sides. A side is a group of photos that seem to show one
face. The odds that two sides show different faces are above 200 to 1. If it is clear which side
shows the named person, the photos of all other sides are doubtful. If it is not clear, no photo
with this name is doubtful, and the result lists the sides.

Each photo of the side with the named person is compared with the other photos of this side, and
with the photos of all other people. A photo is doubtful in two cases:

- The odds that the photo shows one of the other people are above 200 to 1. All other people have
  the same prior probability.
- The named person has at least two other photos, and the odds are above 200 to 1 that the photo
  shows a different person.

A single wrong photo can make all photos with this name seem doubtful. So only the most doubtful
photo with each name is set aside, and the remaining photos are compared again.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.apps.gallery import ratios as ratios_lib
from vidjax.apps.gallery.backend import Backend, sum_by_owner
from vidjax.apps.gallery.grouping import Groups, agglomerate
from vidjax.apps.gallery.ratios import LEAST_ODDS, Summary
from vidjax.apps.gallery.store import StoredClip

FEWEST_OTHERS = 2  # with fewer other photos, a photo is not doubted for differing from them
# It is clear which photos are wrong if this many times more photos must be wrong otherwise.
CLEAR_ERRORS = 3
MOST_PHOTOS = 100  # of a person; with more photos, the photos are not divided into sides

Sides = list[tuple[np.ndarray, int | None]]  # the rows of each side, and the person it resembles


class Side(NamedTuple):
    """Photos that have the name of one person, and show one face."""

    photos: Sequence[str]  # names of clips in the gallery
    like: str | None = None  # another person whom this face resembles


class Doubts(NamedTuple):
    """The photos that may have the name of a wrong person."""

    photos: dict[str, str | None]  # doubtful photo -> the likely person, or None for nobody
    mixed: dict[str, list[Side]]  # person -> at least two sides. It is not clear which is right
    # Pairs of photos that seem to show one person, but are photos of two. If too few other photos
    # agree, it is not clear which photo is wrong.
    alike: list[tuple[str, str]]


def find_doubtful_photos(backend: Backend, photos: Mapping[str, StoredClip]) -> Doubts:
    """Finds photos that may have the name of a wrong person.

    `photos` is clip -> person and embedding. A clip, such as `people/Ada/IMG_1`, is a face in the
    gallery. If `backend` does not compare faces by distances, the result is empty.
    """
    found = Doubts({}, {}, [])
    clips = np.array(sorted(photos))
    for number, part in enumerate(backend.parts):
        if part.name != "face" or part.distances is None or not len(clips):
            continue
        vectors = np.stack([photos[clip].vector for clip in clips.tolist()])
        units = backend.units(backend.split(vectors))[number]
        valid = units.any(axis=1)
        clips, units = clips[valid], units[valid]
        names, owner = np.unique(
            [str(photos[clip].identity) for clip in clips], return_inverse=True
        )
        faces = backend._replace(parts=(part,))
        wrong, mixed = divide_photos(faces, units, owner)
        for person, sides in mixed.items():
            parts = [Side(clips[rows].tolist(), _name(names, like)) for rows, like in sides]
            found.mixed[str(names[person])] = parts
        rest = np.flatnonzero(~np.isin(owner, [*mixed]) & ~np.isin(np.arange(len(owner)), [*wrong]))
        again = compare_photos(faces, units[rest], owner[rest])
        again = {int(rest[row]): like for row, like in again.items()}
        unclear = _find_unclear(faces, units, owner, again)
        found.alike.extend(sorted((str(clips[a]), str(clips[b])) for a, b in {*unclear.values()}))
        for row, like in (wrong | again).items():
            if row not in unclear:
                found.photos[str(clips[row])] = _name(names, like)
    return found


def _find_unclear(
    backend: Backend, units: np.ndarray, owner: np.ndarray, doubtful: Mapping[int, int | None]
) -> dict[int, tuple[int, int]]:
    """Finds similar photos of two people, if it is not clear which of the two photos is wrong.

    Returns row of a doubtful photo -> rows of this photo and of the similar photo, sorted.
    `doubtful` is the result of `compare_photos`; the other arguments are as in `compare_photos`.
    """
    unclear, number_of = dict[int, tuple[int, int]](), np.bincount(owner)
    photos = _summarise(backend, units, np.arange(len(units)))
    for row, like in doubtful.items():
        if like is None:
            continue
        others = np.flatnonzero(owner == like)
        ratios, _ = ratios_lib.compare(backend, photos.take([row]), photos.take(others))
        if np.sum(ratios > 0) + number_of[owner[row]] - 1 < CLEAR_ERRORS:
            low, high = sorted((row, int(others[ratios.argmax()])))
            unclear[row] = low, high
    return unclear


def _name(names: np.ndarray, person: int | None) -> str | None:
    return None if person is None else str(names[person])


def _summarise(backend: Backend, units: np.ndarray, owner: np.ndarray) -> Summary:
    """Returns the number and the mean embedding of the photos in each group.

    `units` [N, D] are the embeddings of the photos, and `owner` [N] int their groups, from 0.
    """
    sums = sum_by_owner(units, owner, int(owner.max(initial=-1)) + 1)
    return ratios_lib.of_sums(backend, [sums], np.ones(len(sums[0])))


def divide_photos(
    backend: Backend, units: np.ndarray, owner: np.ndarray
) -> tuple[dict[int, int | None], dict[int, Sides]]:
    """Divides the photos of each person into sides: the photos of a side show the same face.

    Only one side of a person can be right. If it is clear which side is right, the photos of the
    person's other sides are wrong. For the arguments, see `compare_photos`.

    Returns:
      Row of each wrong photo -> number of the person whom the photo resembles, or None.
      Number of each person whose right side is not clear -> all sides of the person.
    """
    rows_of = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    sides = [side for rows in rows_of for side in _find_sides(backend, units, rows)]
    person = np.array([owner[rows[0]] for rows in sides], int)
    sizes = np.array([len(rows) for rows in sides], int)
    side_of = np.zeros(len(units), int)
    for number, rows in enumerate(sides):
        side_of[rows] = number
    groups = _summarise(backend, units, side_of)
    largest = np.zeros(len(rows_of), int)
    np.maximum.at(largest, person, sizes)
    wrong, mixed = dict[int, int | None](), dict[int, Sides]()
    for split in np.flatnonzero(np.bincount(person, minlength=1) > 1).tolist():
        own = [rows for rows, of in zip(sides, person, strict=True) if of == split]
        ratios, _ = ratios_lib.compare(backend, groups.take(person == split).across(), groups)
        ratios[:, (person == split) | (sizes < largest[person])] = -np.inf
        best = ratios.argmax(1)
        least = np.log(LEAST_ODDS) + np.log(max(len(rows_of) - 1, 1))
        is_like = np.take_along_axis(ratios, best[:, None], 1)[:, 0] > least
        likes = [
            int(person[side]) if like else None for side, like in zip(best, is_like, strict=True)
        ]
        own_sizes = sizes[person == split]
        # If a side is right, all others are wrong, and so is a similar side of another person.
        errors = own_sizes.sum() - own_sizes + is_like * sizes[best]
        order = np.lexsort((-own_sizes, errors))
        if errors[order[1]] < CLEAR_ERRORS * errors[order[0]]:
            mixed[split] = [(own[side], likes[side]) for side in order]
        else:
            wrong |= {int(row): likes[side] for side in order[1:] for row in own[side]}
    return wrong, mixed


def _find_sides(backend: Backend, units: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Divides the photos of a person into groups that show different faces.

    `rows` are the rows of the photos in `units` [N, D], the embeddings of all photos. Returns the
    rows of each group.
    """
    if not 0 < len(rows) <= MOST_PHOTOS:
        return [rows] if len(rows) else []
    numbers = np.arange(len(rows))
    groups = Groups(backend, [units[rows]], numbers, np.ones(len(rows)), ())
    joined = agglomerate(groups, lambda _: -float(np.log(LEAST_ODDS)))
    first = np.unique(joined, return_index=True)[1]
    return [rows[joined == joined[place]] for place in np.sort(first)]


def compare_photos(backend: Backend, units: np.ndarray, owner: np.ndarray) -> dict[int, int | None]:
    """Finds photos that probably show another person than `owner`, with odds above 200 to 1.

    Args:
      backend: must have a single modality, face, and compare it by distances.
      units: [N, D] float64, the embeddings of N photos, scaled to unit length.
      owner: [N] int, the person in whose folder each photo is. People are numbered from 0.

    Returns:
      Row of the photo -> number of the person whom the photo resembles; None if it resembles
        nobody.
    """
    doubtful: dict[int, int | None] = {}
    rows, kept = np.arange(len(units)), np.ones(len(units), bool)
    num = int(owner.max(initial=0)) + 1
    photos = _summarise(backend, units, rows)
    others, changed = np.zeros((len(units), num)), np.arange(num)
    while True:
        count, total = sum_by_owner(units * kept[:, None], owner, num)
        num_others = count[owner] - kept
        rest = [(num_others, total[owner] - units * kept[:, None])]
        rest, people = (
            ratios_lib.of_sums(backend, sums, np.ones(len(sums[0][0])))
            for sums in (rest, [(count[changed], total[changed])])
        )
        log_odds_own, _ = ratios_lib.compare(backend, photos, rest)
        others[:, changed], _ = ratios_lib.compare(backend, photos.across(), people)
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
