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

from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.audit import audit
from vidjax.apps.gallery.backend import LEAST_ODDS, sum_by_owner
from vidjax.apps.gallery.enrolment import make_state
from vidjax.apps.gallery.grouping import Groups, agglomerate
from vidjax.apps.gallery.store import State
from vidjax.utils.groups import group_by_key

FEWEST_OTHERS = 2  # with fewer other photos, a photo is not doubted for differing from them
# It is clear which photos are wrong if this many times more photos must be wrong otherwise.
CLEAR_ERRORS = 3
MOST_PHOTOS = 100  # of a person; with more photos, the photos are not divided into sides


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
    does not compare faces by distances, or its net cannot tell people apart, the result is empty.
    """
    faces = _select_faces(state, without)
    if faces is None or card_notes.compare(state).problem == "blind":
        return Doubts({}, {}, [])
    wrong, mixed = _divide_photos(faces)
    rest = {
        clip: x for clip, x in faces.clips.items() if clip not in wrong and x.identity not in mixed
    }
    left = make_state(state.version, state.origin, faces.index.backend, rest)
    again = _audit(left)
    unclear = _find_unclear(left, again)
    clear = {clip: like for clip, like in again.items() if clip not in unclear}
    return Doubts(wrong | clear, mixed, sorted({*unclear.values()}))


def _select_faces(state: State, without: Collection[str]) -> State | None:
    """Returns a gallery that contains only the faces of people, without the clips `without`.

    Returns None if faces are not compared by distances.
    """
    backend = state.index.backend
    for number, part in enumerate(backend.parts):
        if part.name == "face" and part.distances is not None:
            clips = {
                name: x._replace(vector=face) for name, x in state.clips.items()
                if x.identity and name not in without
                and (face := backend.split(x.vector[None])[number][0]).any()
            }  # fmt: skip
            return make_state(state.version, state.origin, backend._replace(parts=(part,)), clips)
    return None


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
        photos = backend.summarise_clips(state.stack_parts([clip, *others]))
        ratios, _ = backend.compare(photos.take([0]), photos.take(slice(1, None)))
        if others and np.sum(ratios > 0) + len(own) - 1 < CLEAR_ERRORS:
            first, second = sorted((clip, others[ratios.argmax()]))
            unclear[clip] = first, second
    return unclear


def _divide_photos(state: State) -> tuple[dict[str, str | None], dict[str, list[Side]]]:
    """Divides the photos of each person into sides: the photos of a side show the same face.

    Only one side of a person can be right. If it is clear which side is right, the photos of the
    person's other sides are wrong. `state` is a gallery that contains only faces.

    Returns:
      Wrong photo -> the person whom the photo resembles, or None.
      Person whose right side is not clear -> all sides of the person.
    """
    backend, clips_of = state.index.backend, state.clips_of
    sides_of = {person: _find_sides(state, clips_of[person]) for person in state.index.names}
    sides = [(person, side) for person, of in sides_of.items() for side in of]
    people, sizes = np.array([x for x, _ in sides]), np.array([len(side) for _, side in sides], int)
    is_largest = np.array([len(side) == max(map(len, sides_of[x])) for x, side in sides], bool)
    units = backend.whiten(state.stack_parts([clip for _, side in sides for clip in side]))
    owner = np.repeat(np.arange(len(sides)), sizes)
    groups = backend.summarise([sum_by_owner(x, owner, len(sides)) for x in units])
    least = np.log(LEAST_ODDS) + np.log(max(len(sides_of) - 1, 1))
    wrong, mixed = dict[str, str | None](), dict[str, list[Side]]()
    for split, own in sides_of.items():
        if len(own) == 1:
            continue
        each = (groups.take([side]) for side in np.flatnonzero(people == split).tolist())
        ratios = np.array([backend.compare(side, groups)[0] for side in each])
        ratios[:, (people == split) | ~is_largest] = -np.inf
        best, is_like = ratios.argmax(1), ratios.max(1) > least
        likes = [
            str(people[side]) if like else None for side, like in zip(best, is_like, strict=True)
        ]
        own_sizes = sizes[people == split]
        # If a side is right, all others are wrong, and so is a similar side of another person.
        errors = own_sizes.sum() - own_sizes + is_like * sizes[best]
        order = np.lexsort((-own_sizes, errors))
        if errors[order[1]] < CLEAR_ERRORS * errors[order[0]]:
            mixed[split] = [Side(own[side], likes[side]) for side in order]
        else:
            wrong |= {clip: likes[side] for side in order[1:] for clip in own[side]}
    return wrong, mixed


def _find_sides(state: State, clips: Sequence[str]) -> list[Sequence[str]]:
    """Divides `clips`, the photos of a person, into groups that show different faces."""
    if len(clips) > MOST_PHOTOS:
        return [clips]
    backend, numbers = state.index.backend, np.arange(len(clips))
    units = backend.whiten(state.stack_parts(clips))
    groups = Groups(backend, units, numbers, np.ones(len(clips)), ())
    joined = agglomerate(groups, lambda _: -float(np.log(LEAST_ODDS)))
    return [*group_by_key(zip(joined.tolist(), clips, strict=True)).values()]
