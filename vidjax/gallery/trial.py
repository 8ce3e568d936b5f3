"""Whether a back end fitted to own people beats that of the cards, on people that it has not seen.

A quarter of the people is left out in turn, and a back end is fitted to the others. Of those left
out, one half is enrolled, but for a clip of each; the other half are strangers. The cost of a clip
is the negative logarithm of the probability of the right answer, in nats. It is a proper score: it
is lowest for probabilities that are true.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.gallery.backend import Backend, Index
from vidjax.gallery.changes import enrol, stack
from vidjax.gallery.store import STRANGER, Clip, group

FOLDS = 4
SURE = 2.0  # standard errors by which the cost must be lower


class Trial(NamedTuple):
    """Mean costs of a clip by the `card` and by the `own` back end, in nats.

    `error` is the standard error of their difference, over people.
    """

    card: float
    own: float
    error: float

    @property
    def better(self) -> bool:
        """Returns True if the own back end is surely better."""
        return self.card - self.own > SURE * self.error


def repeated(clips: Mapping[str, Clip]) -> dict[str, tuple[str, ...]]:
    """Returns identity -> names of clips, of people with two clips or more."""
    groups = group(clips)
    return {name: some for name, some in groups.items() if name != STRANGER and len(some) > 1}


def run(
    card: Backend, clips: Mapping[str, Clip], fit: Callable[[Mapping[str, Clip]], Backend]
) -> Trial:
    """Compares the back end of cards with one that `fit` makes of clips."""
    groups = repeated(clips)
    people = np.random.default_rng(0).permutation(sorted(groups)).tolist()
    costs: list[dict[str, float]] = [dict.fromkeys(people, 0.0) for _ in range(2)]
    for number in range(FOLDS):
        held = people[number::FOLDS]
        others = {name: clip for name, clip in clips.items() if clip.identity not in held}
        for found, backend in zip(costs, (card, fit(others)), strict=True):
            for known, strangers in ((held[::2], held[1::2]), (held[1::2], held[::2])):
                for name, cost in _costs(backend, known, strangers, groups, clips).items():
                    found[name] += cost / 2
    by_card, own = (np.array([*found.values()]) for found in costs)
    error = np.std(by_card - own, ddof=1) / np.sqrt(len(people))
    return Trial(float(by_card.mean()), float(own.mean()), float(error))


def _costs(
    backend: Backend,
    known: Sequence[str],
    strangers: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    clips: Mapping[str, Clip],
) -> dict[str, float]:
    """Returns person -> the cost of the last clip, where `known` are enrolled by their others."""
    index = Index(backend, [enrol(backend, {name: groups[name][:-1] for name in known}, clips)])
    shown = [*known, *strangers]
    width = sum(backend.widths.values())
    queries = stack([groups[name][-1] for name in shown], clips, width)
    right = [*range(1, 1 + len(known)), *[0] * len(strangers)]
    logs = index.search(backend.split(queries))
    return {name: -float(row[at]) for name, at, row in zip(shown, right, logs, strict=True)}
