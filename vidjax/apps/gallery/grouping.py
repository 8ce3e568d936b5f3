"""Groups clips of unknown people, so that the clips of a group show the same person.

1. At first, each clip is a group. The two groups that most probably show the same person are joined
   again and again, until every pair of groups has a probability of at most 0.5. The prior odds of a
   pair are 1 / G, where G is the present number of groups. With `for_votes` of `Gallery.group`, the
   prior odds are 4 / G.
2. This step is left out with `for_votes`. A group of at most 3 clips is joined to its most probable
   larger group, if the probability is above 0.55, and one of the two groups has clear faces. The
   prior odds of a larger group of n clips against a new person are n / S, where S is the number of
   groups with a single clip.

Two groups with only unclear faces (small or blurred) are never joined, because unclear faces of two
people have similar vectors. The less clear the faces of two groups are, the more similar the
vectors must be.

The memory grows with the square of the number of clips. If there are more than MAX_GROUPED_CLIPS,
the clips of a few films are grouped at a time, and then the groups are joined.

Source: agglomerative clustering by likelihood ratios, as for speakers in Landini et al. 2022, VBx.
The prior of a new person follows Good 1953, The population frequencies of species. The prior of a
pair and the clarity of faces are our choice.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from vidjax.apps.gallery.backend import Backend, sum_by_owner
from vidjax.models.card_backend import LEAST_CLARITY
from vidjax.utils.names import cut_film_name

MAX_GROUPED_CLIPS = 3000  # largest number of clips or groups whose pairs are all compared
MAX_SMALL_CLIPS = 3  # largest number of clips in a small group
MIN_PROBABILITY = 0.55  # a small group is joined to a larger group above this probability
MIN_CLARITY = 0.8  # of a small group or a larger group, if the two are joined
# Times 1 / G: the prior odds of a pair, in groups that vote. The other clips of a group correct few
# errors if groups are small, and the clips of a wrong person leave the group. In films, odds of 4
# instead of 1 gave more right names (.874 instead of .848) and named fewer strangers.
VOTE_ODDS = 4.0
MAX_TURNS = 4  # passes over the clips, if they are grouped in blocks
# Arrays of groups are shortened if at most this share of the groups still has clips.
MAX_KEPT_SHARE = 0.75


class Groups:
    """G groups of clips. Two groups can be compared and joined.

    Attributes:
      summary: the numbers with which the groups are compared.
      sizes: [G] int, the number of clips, or 0 if the group was joined to another group.
      unclear: [G] bool, True if all faces of a group are small or blurred.
      apart: [G, G] bool, True if two groups certainly show different people.
      settled: [G] bool, True for groups that are never joined to each other, see `settle`.
    """

    def __init__(
        self,
        backend: Backend,
        coordinates: Sequence[np.ndarray],
        labels: np.ndarray,
        clarity: np.ndarray,
        apart: Iterable[tuple[int, int]],
    ):
        """Prepares given groups of N clips, so that they can be compared and joined.

        Args:
          backend: the parameters of the comparison.
          coordinates: M arrays [N, D] from `Part.coordinates`, one for each modality. The row of a
            clip that lacks the modality is 0.
          labels: [N] int, the group of each clip.
          clarity: [N], the clarity of the best face of each clip, from 0 to 1.
          apart: pairs of indices of clips that show different people.
        """
        self._backend, num = backend, int(labels.max()) + 1
        sums = [sum_by_owner(x, labels, num) for x in coordinates]
        self.sizes = np.bincount(labels)
        mean_clarity = np.bincount(labels, clarity) / self.sizes
        self.summary = backend.summarise(sums, mean_clarity)
        self.unclear = np.bincount(labels, clarity >= LEAST_CLARITY) == 0
        self.settled = np.zeros(num, bool)
        self.apart = np.zeros((num, num), bool)
        for clip, other in apart:
            self.apart[labels[clip], labels[other]] = self.apart[labels[other], labels[clip]] = True

    def settle(self, settled: np.ndarray) -> None:
        """Forbids joins of two groups if `settled` [G] bool is True for both groups."""
        self.settled = settled
        self.apart |= settled & settled[:, None]

    def join(self, target: int, source: int) -> None:
        """Moves all clips of the group `source` to the group `target`."""
        pair, summary = [target, source], self.summary
        for number, part in enumerate(self._backend.parts):
            count, mean = summary.counts[number], summary.means[number]
            mean[target] = count[pair] / max(count[pair].sum(), 1) @ mean[pair]
            count[target] += count[source]
            summary.squares[number][target] = mean[target] @ mean[target]
            noise = part.measure_noise(count[[target]], mean[[target]])
            summary.noises[number][[target]] = noise
        shares = self.sizes[pair] / self.sizes[pair].sum()
        summary.clarity[target] = shares @ summary.clarity[pair]
        self.unclear[target] &= self.unclear[source]
        self.settled[target] |= self.settled[source]
        self.sizes[target] += self.sizes[source]
        self.sizes[source] = 0
        self.apart[target] |= self.apart[source]
        self.apart[self.apart[source], target] = True

    def drop_joined(self) -> np.ndarray:
        """Drops groups without clips; returns the old indices of the groups that are left."""
        rows = np.flatnonzero(self.sizes)
        self.summary = self.summary.take(rows)
        self.sizes, self.apart = self.sizes[rows], self.apart[np.ix_(rows, rows)]
        self.unclear = self.unclear[rows]
        self.settled = self.settled[rows]
        return rows

    def ratios(self, row: int) -> np.ndarray:
        """Compares group number `row` with all G groups; returns log-likelihood ratios [G].

        A ratio is log(p(clips | the same person) / p(clips | two people)). The ratio is -inf for
        the group itself, for groups without clips, and for groups that certainly show another
        person. The ratio is also -inf if two groups have no modality in common, or contain only
        unclear faces (small or blurred).
        """
        total, shared = self._backend.compare(self.summary.take([row]), self.summary)
        total[~shared.any(axis=0) | (self.sizes == 0) | self.apart[row]] = -np.inf
        if self.unclear[row]:
            total[self.unclear] = -np.inf
        total[row] = -np.inf
        return total


def group(
    backend: Backend,
    names: Sequence[str],
    parts: Sequence[np.ndarray],
    apart: Collection[tuple[str, str]] = (),
    *,
    clarity: Mapping[str, float] | None = None,
    together: Mapping[str, int] | None = None,
    settled: Collection[int] = (),
    for_votes: bool = False,
) -> np.ndarray:
    """Groups clips that show the same person; returns the group of each clip, [N] int, from 0.

    Args:
      backend: the parameters of the comparison.
      names: [N], the names of the clips. A name starts with the name of the film. If there are too
        many clips to compare all pairs, clips of the same film are grouped first.
      parts: the vectors of the clips, M arrays [N, D] float32, one for each modality. They are 0 if
        a clip lacks the modality.
      apart, clarity, together, settled, for_votes: see `Gallery.group`.
    """
    place = {name: number for number, name in enumerate(names)}
    pairs = [(place[x], place[y]) for x, y in apart if x in place and y in place]
    pairs = np.array(pairs, int).reshape(-1, 2)
    coordinates = backend.whiten(parts)
    order = np.argsort([cut_film_name(name) for name in names], kind="stable")
    labels = np.argsort(order)  # each clip is a group; groups of a film have adjacent numbers
    people = [(together or {}).get(name, name) for name in names]
    first = dict(zip(reversed(people), reversed(labels.tolist()), strict=True))
    labels = np.unique(np.array([first[x] for x in people], int), return_inverse=True)[1]
    old = np.array([person in settled for person in people], bool)
    clear = np.array([(clarity or {}).get(name, 1.0) for name in names])

    def join(rows: np.ndarray, *, absorb: bool) -> np.ndarray:
        """Joins similar groups of the clips `rows` (indices); returns the new group of each clip.

        If `absorb` is True, small groups are then joined to larger groups, see `_absorb`.
        """
        local = np.unique(labels[rows], return_inverse=True)[1]
        here = np.full(len(names), -1)
        here[rows] = np.arange(len(rows))
        inside = here[pairs]
        inside = inside[(inside >= 0).all(axis=1)].tolist()
        groups = Groups(backend, [z[rows] for z in coordinates], local, clear[rows], inside)
        groups.settle(np.bincount(local, old[rows]) > 0)
        odds = VOTE_ODDS if for_votes else 1.0  # the prior odds of a pair are odds / G
        joined = agglomerate(groups, lambda left: float(np.log(left / odds)))
        if absorb:
            joined = _absorb(groups, joined)
        return np.unique(joined[local], return_inverse=True)[1]

    for turn in range(MAX_TURNS):
        count = int(labels.max(initial=-1)) + 1
        if count <= MAX_GROUPED_CLIPS:
            return join(np.arange(len(names)), absorb=not for_votes) if len(names) else labels
        block = np.arange(count) // MAX_GROUPED_CLIPS  # in the first turn, by film
        if turn:
            totals = sum_by_owner(np.concatenate(coordinates, axis=1), labels, count)[1]
            block = _split_into_blocks(totals / np.bincount(labels)[:, None], turn)
        joined, first = np.empty_like(labels), 0
        for number in np.unique(block):
            rows = np.flatnonzero(block[labels] == number)
            joined[rows] = first + join(rows, absorb=not for_votes and turn == MAX_TURNS - 1)
            first = int(joined[rows].max()) + 1
        labels = joined
    return labels


def _split_into_blocks(means: np.ndarray, turn: int) -> np.ndarray:
    """Splits G groups into blocks of similar groups; returns the block of each group, [G] int.

    `means` [G, D] are the means of the groups. A block has at most MAX_GROUPED_CLIPS groups. Each
    `turn`, from 1 on, splits the groups in another direction, so that similar groups are in the
    same block in at least some turns.
    """
    # Splits at the median, in turn n along the direction with the n-th largest variance.
    block, full = np.zeros(len(means), int), [np.arange(len(means))]
    while full:
        rows = full.pop()
        if len(rows) > MAX_GROUPED_CLIPS:
            axes = np.linalg.eigh(np.cov(means[rows].T))[1]
            order = rows[np.argsort(means[rows] @ axes[:, -turn % len(axes)], kind="stable")]
            full += np.array_split(order, 2)
        else:
            block[rows] = rows[0]
    return block


def agglomerate(groups: Groups, least: Callable[[int], float]) -> np.ndarray:
    """Changes `groups`: joins the most probable pair, until no pair is probable enough.

    A pair is joined if its log-likelihood ratio, see `Groups.ratios`, is above `least(n)`, where n
    is the present number of groups. Returns [G] int: old index of a group -> new index.
    """
    # For each group, the highest ratio of its pairs is stored, and an upper bound of its other
    # ratios. When two groups are joined, the ratios of their pairs no longer exist. If such a ratio
    # was the highest ratio of a third group, the bound replaces it, and is called stale. A stale
    # ratio is computed again only when it is the highest of all ratios.
    num = left = len(groups.sizes)
    labels, best, stale = np.arange(num), np.zeros(num, int), ~groups.settled
    highest, others = np.where(groups.settled, -np.inf, np.full((2, num), np.inf))
    while left > 1:
        row = int(highest.argmax())
        if highest[row] <= least(left):
            break
        if not stale[row]:
            other = int(best[row])
            left -= 1
            labels[labels == other] = row
            groups.join(row, other)
            highest[other] = others[other] = -np.inf
            stale |= (best == row) | (best == other)
            np.copyto(highest, others, where=stale)
        ratios = groups.ratios(row)
        added = stale | (best != row)  # the highest ratio of the others is in `ratios`
        np.maximum(others, np.minimum(highest, ratios), out=others, where=added)
        nearer = ratios >= highest
        best[nearer], highest[nearer], stale[nearer] = row, ratios[nearer], False
        best[row], highest[row], stale[row] = ratios.argmax(), ratios.max(), False
        others[row] = np.partition(ratios, -2)[-2]
        if left <= MAX_KEPT_SHARE * len(best):
            place, rows = np.cumsum(groups.sizes > 0) - 1, groups.drop_joined()
            labels, best = place[labels], place[best[rows]]
            highest, others, stale = highest[rows], others[rows], stale[rows]
    return labels


def _absorb(groups: Groups, labels: np.ndarray) -> np.ndarray:
    """Joins groups of at most MAX_SMALL_CLIPS clips to larger groups that show the same person.

    `labels` and the result are as the result of `agglomerate`: old index of a group -> new index.
    """
    labels, sizes, changed = labels.copy(), groups.sizes, True
    while changed:
        changed, single = False, max(int(np.sum(sizes == 1)), 1)
        for row in np.argsort(sizes, kind="stable").tolist():
            if not 0 < sizes[row] <= MAX_SMALL_CLIPS or groups.settled[row]:
                continue
            logits = np.where(sizes <= MAX_SMALL_CLIPS, -np.inf, groups.ratios(row))
            logits += np.log(np.maximum(sizes, 1))
            best = int(logits.argmax())
            total = np.logaddexp.reduce(np.append(logits, np.log(single)))
            clear = max(groups.summary.clarity[row], groups.summary.clarity[best]) >= MIN_CLARITY
            if clear and logits[best] - total > np.log(MIN_PROBABILITY):
                groups.join(best, row)
                labels[labels == row] = best
                changed = True
    return labels
