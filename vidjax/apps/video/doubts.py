"""Finds photos that may have the name of a wrong person.

The photos with one name are divided into sides. A side is a group of photos that seem to show one
face. The odds that two sides show different faces are above 200 to 1. If it is clear which side
shows the named person, the photos of all other sides are doubtful. If it is not clear, no photo
with this name is doubtful, and the result lists the sides.

The photos that are left are compared, see `audit`. A photo is doubtful in two cases:

- The odds that the photo shows another person, and not the named one, are above 200 to 1. All
  other people have the same prior probability.
- The named person has at least two other photos, and the odds are above 200 to 1 that the photo
  shows a different person.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.apps.gallery import ratios as ratios_lib
from vidjax.apps.gallery.audit import audit
from vidjax.apps.gallery.backend import Backend, sum_by_owner
from vidjax.apps.gallery.enrolment import make_state, stack_parts, stack_vectors
from vidjax.apps.gallery.grouping import Groups, agglomerate
from vidjax.apps.gallery.ratios import LEAST_ODDS, Summary
from vidjax.apps.gallery.store import State

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


def find_doubtful_photos(state: State, without: Collection[str] = ()) -> Doubts:
    """Finds enrolled photos that may have the name of a wrong person.

    `state` is the content of a gallery, of which the clips `without` are left out. If the gallery
    does not compare faces by distances, the result is empty.
    """
    found, backend = Doubts({}, {}, []), state.index.backend
    for number, part in enumerate(backend.parts):
        if part.name != "face" or part.distances is None:
            continue
        clips = {
            name: x._replace(vector=face) for name, x in state.clips.items()
            if x.identity and name not in without
            and (face := backend.split(x.vector[None])[number][0]).any()
        }  # fmt: skip
        faces, clip_names = backend._replace(parts=(part,)), sorted(clips)
        (units,) = faces.units([stack_vectors(clip_names, clips, len(part.centre))])
        names, owner = np.unique([str(clips[x].identity) for x in clip_names], return_inverse=True)
        wrong, mixed = divide_photos(faces, units, owner)
        for person, sides in mixed.items():
            found.mixed[str(names[person])] = [
                Side([clip_names[row] for row in rows], _name(names, like)) for rows, like in sides
            ]
        rest = {x: clips[x] for row, x in enumerate(clip_names)
                if owner[row] not in mixed and row not in wrong}  # fmt: skip
        left = make_state(state.version, state.origin, faces, rest)
        again = _audit(left)
        unclear = _find_unclear(left, again)
        found.alike.extend(sorted({*unclear.values()}))
        found.photos.update({clip_names[row]: _name(names, x) for row, x in wrong.items()})
        found.photos.update({clip: x for clip, x in again.items() if clip not in unclear})
    return found


def _audit(state: State) -> dict[str, str | None]:
    """Returns the clips that fit another person, or differ from the other clips of their person.

    The result is clip -> the other person, or None.
    """
    (misfits, rivals), least = audit(state, state.clips), np.log(LEAST_ODDS)
    prior = np.log(max(len(state.index.names) - 1, 1))  # all other people are equally probable
    likes = {clip: x.person for clip, x in rivals.items() if x.lead - prior > least}
    differ = {
        clip for clip, ratio in misfits.items()
        if ratio < -least and len(state.clips_of[state.clips[clip].identity or ""]) > FEWEST_OTHERS
    }  # fmt: skip
    return {clip: likes.get(clip) for clip in sorted(differ | likes.keys())}


def _find_unclear(state: State, doubtful: Mapping[str, str | None]) -> dict[str, tuple[str, str]]:
    """Finds similar photos of two people, if it is not clear which of the two photos is wrong.

    `doubtful` is the result of `_audit`. Returns doubtful photo -> this photo and the similar
    photo, sorted.
    """
    unclear, backend = dict[str, tuple[str, str]](), state.index.backend
    for clip, like in doubtful.items():
        own, others = (state.clips_of.get(x or "", ()) for x in (state.clips[clip].identity, like))
        photos = ratios_lib.of_clips(backend, stack_parts(state, [clip, *others]))
        ratios, _ = ratios_lib.compare(backend, photos.take([0]), photos.take(slice(1, None)))
        if others and np.sum(ratios > 0) + len(own) - 1 < CLEAR_ERRORS:
            first, second = sorted((clip, others[ratios.argmax()]))
            unclear[clip] = first, second
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
    person's other sides are wrong.

    Args:
      backend: must have a single modality, face, and compare it by distances.
      units: [N, D] float64, the embeddings of N photos, scaled to unit length.
      owner: [N] int, the person who is named for each photo. People are numbered from 0.

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
