"""Finds enrolled clips that may have the name of a wrong person.

Each clip is compared with the other clips of its person, and with all other people.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.backend import LEAST_ODDS, Summary, sum_by_owner
from vidjax.apps.gallery.index import MAX_BLOCK_PEOPLE
from vidjax.apps.gallery.store import State
from vidjax.utils.names import strip_ending
from vidjax.utils.terminal import say

MISFIT_ODDS = 10.0  # against the person, from which on a clip does not fit the other clips
MOST_PAIRS = 10**9  # of a clip and a person that `audit` compares, in about 30 seconds


class Rival(NamedTuple):
    """A person whom a clip of another person probably shows."""

    person: str
    lead: float  # the log ratio of clip and person, minus that of clip and own person, if above 0


class Audit(NamedTuple):
    """The clips that may have a wrong name, see `audit`.

    Attributes:
      misfits: clip that does not fit the other clips of its person -> log(p(clips | one person) /
        p(clips | two people)), lowest first. If a person has two clips that differ, both are
        listed, because nothing shows which is wrong.
      rivals: clip -> another enrolled person whom the clip probably shows. If the two people only
        look alike, as twins do, the clip is not listed.
    """

    misfits: dict[str, float]
    rivals: dict[str, Rival]


def audit(state: State, clips: Iterable[str], *, among_all: bool = True) -> Audit:
    """Finds those of the `clips` that do not fit their person, or that fit another person.

    `clips` are names of enrolled clips. Clips of strangers are left out. If `among_all` is False,
    clips are not compared with other people, and there are no rivals. If a comparison of all
    `clips` would take minutes, the last clips are left out, and a message says so. If the net
    cannot tell people apart, there are no rivals.
    """
    given = {strip_ending(name): name for name in clips}
    owned = [name for name in given if (x := state.clips.get(name)) and x.identity]
    most = max(MOST_PAIRS // max(len(state.index.names), 1), 1) if among_all else len(owned)
    if len(owned) > most:
        say(f"to save time, only {most:,} of {len(owned):,} clips were checked for wrong names")
    misfits, rivals, checked = dict[str, float](), dict[str, Rival](), {*owned[:most]}
    likes = dict(_find_likes(state, owned[:most])) if among_all else {}
    for names, each, rest, fits in _compare_with_rest(state, checked):
        for row in (row for row, name in enumerate(names) if name in checked):
            name, fit = given[names[row]], float(fits[row])
            if fit < -math.log(MISFIT_ODDS):
                misfits[name] = fit
            if like := likes.get(names[row]):
                mates, one = rest.take([row]), each.take([row])
                other_fit, alike = _compare_with(state, like, one, mates)
                is_twin = any(x[0] for x in mates.counts) and fit > other_fit and alike < 0
                if not is_twin or _is_copy(state, names[row], like):
                    rivals[name] = Rival(like, other_fit - max(fit, 0.0))
    return Audit(dict(sorted(misfits.items(), key=lambda x: x[1])), rivals)


def _compare_with_rest(
    state: State, clips: Collection[str]
) -> Iterator[tuple[list[str], Summary, Summary, np.ndarray]]:
    """Compares each clip of the people in `clips` with the other clips of the person.

    Yields for blocks of N clips: their names, the clips, the other clips, and the log ratios [N].
    """
    people = sorted({str(state.clips[name].identity) for name in clips})
    backend = state.index.backend
    for at in range(0, len(people), MAX_BLOCK_PEOPLE):
        block = people[at : at + MAX_BLOCK_PEOPLE]
        names = [name for person in block for name in state.clips_of[person]]
        owner = np.repeat(np.arange(len(block)), [len(state.clips_of[x]) for x in block])
        parts, others = state.stack_parts(names), list[tuple[np.ndarray, np.ndarray]]()
        for x in backend.whiten(parts):
            count, total = sum_by_owner(x, owner, len(block))
            others.append((count[owner] - x.any(axis=1), total[owner] - x))
        each = backend.summarise_clips(parts)
        rest = backend.summarise(others)
        yield names, each, rest, backend.compare(each, rest)[0]


def _find_likes(state: State, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields clip -> another enrolled person whom the clip clearly resembles, or equals."""
    if card_notes.compare(state).problem == "blind":
        return
    nearest = state.index.nearest(state.stack_parts(names), 2)
    for name, found in zip(names, nearest, strict=True):
        others = (x for x in found.best if x[0] != state.clips[name].identity)
        like, log = next(others, ("", -math.inf))
        if like and (log - found.new > math.log(LEAST_ODDS) or _is_copy(state, name, like)):
            yield name, like


def _is_copy(state: State, name: str, like: str) -> bool:
    vector = state.clips[name].vector
    return any(np.array_equal(state.clips[x].vector, vector) for x in state.clips_of[like])


def _compare_with(state: State, person: str, *groups: Summary) -> Iterator[float]:
    """Yields the log ratio of each group of clips and all clips of a person."""
    backend = state.index.backend
    white = backend.whiten(state.stack_parts(state.clips_of[person]))
    sums = [(x.any(axis=1).sum(keepdims=True), x.sum(axis=0, keepdims=True)) for x in white]
    clips = backend.summarise(sums)
    for group in groups:
        yield float(backend.compare(group, clips)[0][0])
