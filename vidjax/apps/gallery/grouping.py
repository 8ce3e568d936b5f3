"""Unknown people: which clips show one person, without knowing who it is.

Groups of clips are joined two by two, the most probable pair first, while the odds that two groups
show one person are above even. Among G people, two groups show one person with a prior of 1 / G,
and G is the number of groups that are left. After this, small groups are given to larger ones. The
prior that a clip shows the person of a group of n clips is then proportional to n, and the prior of
somebody new to the number of groups with one clip.

More than MAX_GROUPED_CLIPS clips are grouped film by film, and then the groups.

Source: agglomerative clustering by likelihood ratios, as for speakers in Landini et al. 2022, VBx;
the share of clips that show somebody new is the estimate of Good 1953, The population frequencies
of species. The prior of a pair is ours.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from vidjax.apps.gallery.backend import MAX_VOICE_RATIO, Backend, sum_by_owner
from vidjax.apps.video.features_folder import cut_film_name
from vidjax.models import distance, two_covariance

MAX_GROUPED_CLIPS = 3000  # clips, or groups, of which all pairs are compared
MAX_SMALL_CLIPS = 3  # clips of a group that may be given to a larger one
MIN_PROBABILITY = 0.6  # a group is given if the probability is higher
MAX_TURNS = 4  # the most turns in which clips are grouped block by block
MAX_KEPT_SHARE = 0.75  # with this share of groups left, or fewer, rows of the others are dropped


class Groups:
    """Groups of clips, and the log-likelihood ratios of two of them.

    Attributes:
      counts: M arrays [G], the number of clips with each part.
      means: M arrays [G, D], the means of the coordinates of these clips.
      sizes: [G], the number of clips; 0 for a group that was joined to another one.
      apart: [G, G] bool, True for two groups that show two people for sure.
    """

    def __init__(
        self,
        backend: Backend,
        coordinates: Sequence[np.ndarray],
        labels: np.ndarray,
        apart: Iterable[tuple[int, int]],
    ):
        """Makes groups of clips by `labels` [N] int; see `group` for the other arguments."""
        self._backend, num = backend, int(labels.max()) + 1
        pairs = [sum_by_owner(x, labels, num) for x in coordinates]
        self.counts = [count for count, _ in pairs]
        self.means = [total / np.maximum(count, 1)[:, None] for count, total in pairs]
        self.sizes = np.bincount(labels)
        self.apart = np.zeros((num, num), bool)
        for one, other in apart:
            self.apart[labels[one], labels[other]] = self.apart[labels[other], labels[one]] = True
        self._squares = [np.vecdot(mean, mean) for mean in self.means]
        self._noises = [self._noise(part, slice(None)) for part in range(len(pairs))]

    def _noise(self, number: int, rows: slice | int) -> np.ndarray:
        """Returns the reciprocal of the effective number of clips of groups in one part."""
        count = np.maximum(self.counts[number][rows], 1)
        distances = self._backend.parts[number].distances
        if distances is None:
            return 1 / count
        return 1 / distance.effective_count(distances, count, self._squares[number][rows])

    def join(self, one: int, other: int) -> None:
        """Adds the group `other` to the group `one`."""
        for number, (count, mean) in enumerate(zip(self.counts, self.means, strict=True)):
            shares = count[[one, other]] / max(count[one] + count[other], 1)
            count[one] += count[other]
            mean[one] = shares @ mean[[one, other]]
            self._squares[number][one] = mean[one] @ mean[one]
            self._noises[number][one] = self._noise(number, one)
        self.sizes[one] += self.sizes[other]
        self.sizes[other] = 0
        self.apart[one] |= self.apart[other]
        self.apart[self.apart[other], one] = True

    def drop_joined(self) -> np.ndarray:
        """Drops the groups that were joined to others; returns the rows [G] of all that stay."""
        rows = np.flatnonzero(self.sizes)
        for own in (self.counts, self.means, self._squares, self._noises):
            own[:] = [x[rows] for x in own]
        self.sizes, self.apart = self.sizes[rows], self.apart[np.ix_(rows, rows)]
        return rows

    def ratios(self, one: int) -> np.ndarray:
        """Returns log(p(clips | one person) / p(clips | two)), [G] float64, of a group and others.

        The ratio is -inf for the group itself, for a group that is apart from it, and for a group
        that has no part in common with it.
        """
        shared = [(count > 0) & (count[one] > 0) for count in self.counts]
        found = np.zeros(len(self.sizes))
        for number, (part, both) in enumerate(zip(self._backend.parts, shared, strict=True)):
            ratios = self._part_ratios(number, one)
            if part.may_be_offscreen:
                limited = np.clip(ratios, -MAX_VOICE_RATIO, MAX_VOICE_RATIO)
                ratios = np.where(np.sum(shared, axis=0) > 1, limited, ratios)
            found += np.where(both, ratios, 0)
        found[~np.logical_or.reduce(shared) | (self.sizes == 0) | self.apart[one]] = -np.inf
        found[one] = -np.inf
        return found

    def _part_ratios(self, number: int, one: int) -> np.ndarray:
        part, mean, noise = self._backend.parts[number], self.means[number], self._noises[number]
        if part.space is not None:
            ratios = two_covariance.pair_log_ratios(part.space, noise, mean, one)
            return float(self._backend.settings.scale) * ratios
        assert part.distances is not None
        square = self._squares[number]
        gap = square + square[one] - 2 * (mean @ mean[one])
        return distance.pair_log_ratios(part.distances, gap, noise + noise[one])


def group(
    backend: Backend,
    names: Sequence[str],
    parts: Sequence[np.ndarray],
    apart: Collection[tuple[str, str]] = (),
    *,
    begin: Sequence[str] | None = None,
    absorb: bool = True,
) -> np.ndarray:
    """Returns the group of every clip, [N] int from 0.

    Args:
      backend: compares the vectors.
      names: [N] names of clips, which say the film, see `folder.cut_film_name`.
      parts: the vectors of the clips, M arrays [N, D] float32, 0 where a clip lacks the part.
      apart: pairs of clips that do not show one person.
      begin: [N] names of groups that are joined further; None to begin with single clips.
      absorb: True to give small groups to larger ones.
    """
    place = {name: number for number, name in enumerate(names)}
    pairs = [(place[x], place[y]) for x, y in apart if x in place and y in place]
    pairs = np.array(pairs, int).reshape(-1, 2)
    coordinates = [np.nan_to_num(z) for z in backend.whiten(parts)]
    order = np.argsort([cut_film_name(name) for name in names], kind="stable")
    labels = np.argsort(order)  # a group a clip, film by film
    if begin is not None:
        labels = np.unique(begin, return_inverse=True)[1]

    def join(rows: np.ndarray, *, absorb: bool) -> np.ndarray:
        """Joins the groups of the clips `rows`, and returns the new labels of the clips, from 0."""
        local = np.unique(labels[rows], return_inverse=True)[1]
        here = np.full(len(names), -1)
        here[rows] = np.arange(len(rows))
        inside = here[pairs]
        inside = inside[(inside >= 0).all(axis=1)].tolist()
        groups = Groups(backend, [z[rows] for z in coordinates], local, inside)
        joined = _agglomerate(groups)
        if absorb:
            joined = _absorb(groups, joined)
        return np.unique(joined[local], return_inverse=True)[1]

    for turn in range(MAX_TURNS):
        count = int(labels.max(initial=-1)) + 1
        if count <= MAX_GROUPED_CLIPS:
            return join(np.arange(len(names)), absorb=absorb) if len(names) else labels
        block = np.arange(count) // MAX_GROUPED_CLIPS  # the clips of a film follow each other
        if turn:
            totals = sum_by_owner(np.concatenate(coordinates, axis=1), labels, count)[1]
            block = _neighbours(totals / np.bincount(labels)[:, None], turn)
        found, first = np.empty_like(labels), 0
        for number in np.unique(block):
            rows = np.flatnonzero(block[labels] == number)
            found[rows] = first + join(rows, absorb=absorb and turn == MAX_TURNS - 1)
            first = int(found[rows].max()) + 1
        labels = found
    return labels


def _neighbours(means: np.ndarray, turn: int) -> np.ndarray:
    """Returns the block [G] int of every mean [G, D]: MAX_GROUPED_CLIPS neighbours, or fewer.

    In turn 1 the means are cut in halves along the direction in which they differ most, and so are
    the halves. Turn 2 takes the second direction, and so on: it cuts other neighbours apart.
    """
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


def _agglomerate(groups: Groups) -> np.ndarray:
    """Joins groups, the most probable pair first; returns the new labels [G] of groups.

    A ratio that was the highest of its group, and is lower after a join, is compared anew when it
    is the highest of all.
    """
    num = left = len(groups.sizes)
    labels, best, highest = np.arange(num), np.zeros(num, int), np.full(num, np.inf)
    stale = np.ones(num, bool)
    while left > 1:
        one = int(highest.argmax())
        if highest[one] <= np.log(left):
            break
        if not stale[one]:
            other = int(best[one])
            left -= 1
            labels[labels == other] = one
            groups.join(one, other)
            highest[other] = -np.inf
            stale |= (best == one) | (best == other)
        new = groups.ratios(one)
        nearer = new >= highest
        best[nearer], highest[nearer], stale[nearer] = one, new[nearer], False
        best[one], highest[one], stale[one] = new.argmax(), new.max(), False
        if left <= MAX_KEPT_SHARE * len(best):
            place, rows = np.cumsum(groups.sizes > 0) - 1, groups.drop_joined()
            labels, best = place[labels], place[best[rows]]
            highest, stale = highest[rows], stale[rows]
    return labels


def _absorb(groups: Groups, labels: np.ndarray) -> np.ndarray:
    """Gives groups of few clips to larger ones; returns the new labels [G] of groups."""
    labels, sizes, changed = labels.copy(), groups.sizes, True
    while changed:
        changed, single = False, max(int(np.sum(sizes == 1)), 1)
        for one in np.argsort(sizes, kind="stable").tolist():
            if not 0 < sizes[one] <= MAX_SMALL_CLIPS:
                continue
            logits = np.where(sizes < sizes[one], -np.inf, groups.ratios(one))
            logits += np.log(np.maximum(sizes, 1))
            best = int(logits.argmax())
            if logits[best] - np.logaddexp.reduce(np.append(logits, np.log(single))) > np.log(
                MIN_PROBABILITY
            ):
                groups.join(best, one)
                labels[labels == one] = best
                changed = True
    return labels
