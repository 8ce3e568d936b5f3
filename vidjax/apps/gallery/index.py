"""Compares clips with enrolled people, and finds the most probable people of a clip."""

import functools
import heapq
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vidjax.apps.gallery.backend import Backend, Part, People, one_thread, sum_by_owner
from vidjax.models import card_backend, card_check, two_covariance
from vidjax.models.card_backend import Distances
from vidjax.models.card_check import Comparison
from vidjax.utils.machine import num_cores

T = TypeVar("T")
MAX_QUERY_CLIPS = 64  # clips that are compared together

MAX_PAIRED_NUMBERS = 1 << 20  # numbers in an array with a vector for each pair of clip and person

# The coefficients of people are in blocks of at most this size. Threads compare blocks in parallel.
MAX_BLOCK_PEOPLE = 4096

MIN_BLOCK_PEOPLE = 512  # a change of the gallery joins blocks with fewer people

NUM_FINE_PEOPLE = 16  # most probable people of a clip, whose logits are computed in float64

MAX_LOGIT_ERROR = 1e-3  # larger than the rounding error of a float32 logit

MAX_FINE_PEOPLE = 4096  # people that are compared in float64 because they tie with the k-th person

# From a shift of the mean of all people by this distance on, inner products with the mean are
# computed again in float64. A smaller shift is added in float32, with an error below 1e-9.
MOST_SHIFT = 1e-3

MOST_COMPARED = 1000  # if more people are enrolled, the spread of their cosines is not measured

MOST_REMEMBERED = 100  # values that an index remembers

# People are split into groups of this size. The k-th highest logit of all people is not lower than
# the k-th highest of the groups' best logits.
PEAK_PEOPLE = 32

_threads = functools.cache(lambda: ThreadPoolExecutor(num_cores()))
os.register_at_fork(after_in_child=_threads.cache_clear)


class Means:
    """For each of P people, the mean of the unit vectors of the person's clips in one modality.

    If clips and people are compared by distances, the distances are computed from these means.

    Attributes:
      linear: [P, D] float32, the means.
      square: [P] float64, the squared lengths of the means.
      effective: [P] float64, the effective numbers of clips, see `card_backend.effective_count`.
      total: [D] float64, the sum of the means.
      weighed: (weighted sum of the means, sum of the weights), for `card_backend.population`.
    """

    def __init__(
        self, distances: Distances, linear: np.ndarray, square: np.ndarray, count: np.ndarray
    ):
        """Stores the mean vectors `linear` [P, D] float32 of P people.

        `square` [P] float64 are the squared lengths of the means. `count` [P] is the number of
        clips of each person. `distances` are the parameters by which vectors are compared.
        """
        self.linear, self.square = linear, square
        self.effective = card_backend.effective_count(distances, count, square)
        weights = card_backend.weigh(distances, self.effective, count)
        self.total = linear.sum(axis=0, dtype=np.float64)
        self.weighed = weights @ linear, float(weights.sum())
        # A centre [D], and the inner products [P] of the means with it.
        self._projected = np.full(linear.shape[1], np.inf), np.zeros(0)

    def measure_radius(self, centre: np.ndarray) -> np.ndarray:
        """Returns the squared distance of each mean from `centre` [D] float64, as [P] float64."""
        before, products = self._projected
        shift = centre - before
        if np.linalg.norm(shift) < MOST_SHIFT:
            products = products + self.linear @ shift.astype(np.float32)
        else:
            products = self.linear @ centre
            self._projected = centre, products
        return self.square - 2 * products + centre @ centre


class Block(People):
    """A block: some of the enrolled people of a gallery, with values that are computed only once.

    When the gallery changes, unchanged blocks are used again. So a block stores only values that do
    not depend on other blocks.
    """

    @functools.cached_property
    def _means(self) -> dict[int, Means]:
        return {}

    def means(self, number: int, distances: Distances) -> Means:
        """Returns the mean vectors of the people in one modality; computes them at the first call.

        `number` is the index of the modality. `distances` are the parameters by which its vectors
        are compared.
        """
        if number not in self._means:
            arrays = self.linear[number], self.constant[number], self.num_clips[number]
            self._means[number] = Means(distances, *arrays)
        return self._means[number]


class Nearest(NamedTuple):
    """The most probable people of a clip, and the probability that the clip shows a stranger."""

    new: float  # the log-probability that the clip shows a person who is not enrolled
    best: list[tuple[str, float]]  # (name, log-probability), best first; ties in order of names
    compared: tuple[str, ...] = ()  # the modalities that both the clip and the best person have
    others: float = -np.inf  # the log-probability of all people except the best


def join(blocks: Sequence[People]) -> People:
    """Returns all people of `blocks` as one `People`, in the same order."""
    names, linear, constant, count = zip(*blocks, strict=True)
    return People(
        tuple(itertools.chain.from_iterable(names)),
        tuple(map(np.concatenate, zip(*linear, strict=True))),
        np.concatenate(constant, axis=1),
        np.concatenate(count, axis=1),
    )


class _Queries(NamedTuple):
    """Q clips that are prepared for the comparison with people, in M modalities such as face."""

    coordinates: list[np.ndarray]  # M arrays [Q, D] float64, 0 if missing
    terms: list[np.ndarray]  # M arrays [Q, ...] float64, other numbers that the comparison needs
    missing: np.ndarray  # [M, Q] bool, True if a clip lacks the modality


class Ratios:
    """Computes how much better a clip fits each of N people than a stranger, by PLDA.

    The results are log-likelihood ratios for one modality, by the formula in
    `two_covariance.Enrolled`.

    Attributes:
      curve: [U, D] float64, coefficients of this formula for U different numbers of clips.
      kind: [N] int, the row of each person in `curve`.
    """

    def __init__(self, part: Part, scale: float, count: np.ndarray, constant: np.ndarray):
        """Prepares the comparison of clips with N people in one modality.

        `part` are the parameters of the modality. `scale` is a factor of all log-likelihood ratios.
        `count` [N] and `constant` [N] are `num_clips` and `constant` of `People`.
        """
        assert part.space is not None
        kinds, self.kind = np.unique(count, return_inverse=True)
        blank = np.zeros((len(kinds), len(part.centre)))
        self.curve = np.asarray(
            two_covariance.compute_coefficients(part.space, kinds.astype(np.float64), blank).curve
        )
        self._part, self._scale, self._constant = part, scale, scale * constant

    def ask(self, units: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Computes the input of `finish` from `units` [Q, D], the unit vectors of Q clips.

        Returns scale * z, [Q, D], and scale * z**2 @ curve.T, [Q, U]. Here, z [Q, D] are the PLDA
        coordinates of the clips. For `curve` [U, D], see the class.
        """
        z = self._part.coordinates(units)
        return self._scale * z, self._scale * z**2 @ self.curve.T

    def finish(
        self, ratios: np.ndarray, rows: slice | np.ndarray, owner: np.ndarray, terms: np.ndarray
    ) -> None:
        """Turns inner products into log-likelihood ratios, in place.

        Args:
          ratios: inner products for Q clips and R people, [Q, R], or for R pairs (clip, person),
            [R]. The factors are the first result of `ask` and `People.linear`.
          rows: the indices of the R people.
          owner: the indices of the clips in `terms`, [Q, 1] or [R].
          terms: the second result of `ask`.
        """
        ratios += self._constant[rows].astype(ratios.dtype)
        # If all people have the same number of clips, broadcasting is faster than indexing.
        column = 0 if terms.shape[1] == 1 else self.kind[rows]
        ratios += terms.astype(ratios.dtype)[owner, column]


class DistanceRatios:
    """Computes how much better a clip fits each of N people than a stranger, by distances.

    The results are log-likelihood ratios for one modality, such as face.

    Attributes:
      population: the distribution of the vectors of all people, with the mean m.
      share: [N] float64. A person's posterior mean is share * (mean of the person's clips) +
        (1 - share) * m.
      variance: [N] float64, the variance of a person's posterior, summed over the dimensions.
      radius: [N] float64, the squared distance of a person's posterior mean from m.
    """

    def __init__(self, part: Part, people: Sequence[Means]):
        """Prepares the comparison of clips with N people.

        `part` are the parameters of the modality. `people` are the people's mean vectors in blocks.
        """
        assert part.distances is not None
        distances = self._distances = part.distances
        weighed = (means.weighed for means in people)
        self.population = card_backend.population(distances, part.mean, weighed)
        radius = [means.measure_radius(self.population.mean) for means in people]
        effective = np.concatenate([means.effective for means in people])
        posterior = card_backend.posterior(distances, self.population, effective)
        self.share, self.variance = posterior
        self.radius = posterior.share**2 * np.concatenate(radius)

    def ask(self, units: np.ndarray, effective: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `units` minus the mean of all people, [Q, D], and `terms` [Q, 4] for `finish`.

        `units` [Q, D] are the mean unit vectors of Q groups of clips. `effective` [Q] is the number
        of independent clips whose mean has the same variance: 1 for a group of one clip.
        """
        distances, noise = self._distances, self._distances.within / effective
        x = units - self.population.mean
        square = np.vecdot(x, x)
        variance = distances.between + noise + self.population.variance
        new = card_backend.stranger_log_density(distances, square, variance)
        return x, np.stack([x @ self.population.mean, square, noise, new], axis=1)

    def finish(
        self, ratios: np.ndarray, rows: slice | np.ndarray, owner: np.ndarray, terms: np.ndarray
    ) -> None:
        """Turns inner products into log-likelihood ratios, in place. See `Ratios.finish`."""
        kind = ratios.dtype
        across, square, noise, new = (x[owner] for x in terms.T.astype(kind))
        share, radius, variance = (
            x[rows].astype(kind) for x in (self.share, self.radius, self.variance)
        )
        ratios -= across
        ratios *= -2 * share
        ratios += radius
        ratios += square
        if np.all(noise == noise[:1]):  # true for single clips: fewer logarithms are computed
            noise = noise[:1]
        ratios[...] = card_backend.person_log_density(self._distances, ratios, variance + noise)
        ratios -= new


class Index:
    """Searches for the most probable people of a clip. An index never changes."""

    def __init__(self, backend: Backend, blocks: Iterable[People] = ()):
        """Makes an index of the people in all `blocks`. Each person is in a single block."""
        self.backend = backend
        self.blocks = [x if isinstance(x, Block) else Block(*x) for x in blocks if x.names]
        if not self.blocks:  # a block without people, so that no array needs a special case
            none = np.zeros((0, sum(backend.widths.values())))
            self.blocks = [Block(*backend.enrol((), none, np.zeros(0, int)))]
        self._known: dict[object, Any] = {}

    def remember(self, key: object, compute: Callable[[], T]) -> T:
        """Returns `compute()`, or the stored result of an earlier call with this key.

        The result must not be None. Only the results that were used last are kept. A change of the
        gallery makes a new index, which has stored nothing.
        """
        value = self._known.pop(key, None)
        if value is None:
            value = compute()
        self._known[key] = value
        for old in [*self._known][:-MOST_REMEMBERED]:
            self._known.pop(old, None)  # another thread may have dropped it
        return value

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of all N people."""
        return [name for block in self.blocks for name in block.names]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """The number of clips of each of N people in each of M modalities, [M, N] int32."""
        return np.concatenate([block.num_clips for block in self.blocks], axis=1)

    @functools.cached_property
    def card_comparison(self) -> Comparison:
        """The comparison of enrolled face vectors with the card, the JSON file of the face net.

        The value is NO_PROBLEM if the gallery has no card of a face net.
        """
        for number, part in enumerate(self.backend.parts):
            if part.name == "face" and part.distances is not None:
                counts, deviation = self.counts[number], 0.0
                with one_thread():
                    means = [block.means(number, part.distances) for block in self.blocks]
                    if 1 < np.sum(counts > 0) <= MOST_COMPARED:
                        some = np.concatenate([x.linear for x in means])[counts > 0]
                        pairs = (some @ some.T)[np.triu_indices(len(some), 1)]
                        deviation = float(np.std(pairs))
                total = np.sum([x.total for x in means], axis=0)
                squares = np.concatenate([x.square for x in means])
                return card_check.compare(part.distances, total, squares, counts, deviation)
        return card_check.NO_PROBLEM

    @functools.cached_property
    def scorers(self) -> "list[Ratios | DistanceRatios]":
        """The objects that compute log-likelihood ratios, one for each of M modalities."""
        scorers, scale = list[Ratios | DistanceRatios](), float(self.backend.settings.scale)
        for number, part in enumerate(self.backend.parts):
            if part.distances is not None:
                with one_thread():
                    means = [block.means(number, part.distances) for block in self.blocks]
                    scorers.append(DistanceRatios(part, means))
            else:
                constant = np.concatenate([block.constant[number] for block in self.blocks])
                scorers.append(Ratios(part, scale, self.counts[number], constant))
        return scorers

    def replaced(self, removed: Collection[str], new: Sequence[People]) -> "Index":
        """Returns a new index: without the people `removed`, and with the people `new`.

        `new` are blocks of people. Unknown names in `removed` are ignored.
        """
        removed, blocks = set(removed), list[People]()
        for block in self.blocks:
            if removed and not removed.isdisjoint(block.names):
                rows = [row for row, name in enumerate(block.names) if name not in removed]
                block = block.take(rows)
            blocks.append(block)
        blocks += new
        kept = [block for block in blocks if len(block.names) >= MIN_BLOCK_PEOPLE]
        if small := [block for block in blocks if len(block.names) < MIN_BLOCK_PEOPLE]:
            joined = join(small)
            rows = np.arange(len(joined.names))
            starts = range(0, len(rows), MAX_BLOCK_PEOPLE)
            kept += [joined.take(rows[at : at + MAX_BLOCK_PEOPLE]) for at in starts]
        return Index(self.backend, kept)

    def search(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields for each of Q clips the log-probabilities of all people, an array [1 + N] float64.

        Element 0 belongs to a stranger, and element 1 + r to the person `names[r]`. If a clip lacks
        all modalities, the probability of a stranger is 1. `parts` are the vectors of the clips, M
        arrays [Q, D], one for each modality.
        """
        for new, logits, rows, fine, _ in self._compared(parts, NUM_FINE_PEOPLE):
            wide = np.empty(1 + len(logits))
            wide[0], wide[1:] = new, logits
            wide[1 + rows] = fine
            yield log_softmax(wide)

    def nearest(
        self, parts: Sequence[np.ndarray], k: int, owner: np.ndarray | None = None
    ) -> Iterator[Nearest]:
        """Yields the k most probable people of each group of clips.

        `parts` are the vectors of Q clips, M arrays [Q, D], one for each modality. `owner` [Q] int
        is the group of each clip. By default, each clip is a group. A group that lacks all
        modalities gets no people.
        """
        for new, logits, rows, fine, has_part in self._compared(parts, k, owner):
            top = max(new, fine.max(initial=-np.inf))
            weights = np.subtract(logits, np.float32(top), out=logits)
            np.exp(weights, out=weights)
            weights[rows] = 0
            rest = weights.sum(dtype=np.float64)
            others = top + np.log(rest) if rest else -np.inf
            logs = log_softmax(np.array([new, *fine, others]))
            pairs = zip(logs[1:-1].tolist(), rows.tolist(), strict=True)
            best = sorted((-log, self.names[row], row) for log, row in pairs if log > -np.inf)[:k]
            common = has_part & (self.counts[:, best[0][2]] > 0) if best else []
            compared = tuple(self.backend.parts[number].name for number in np.flatnonzero(common))
            pairs = [(name, -log) for log, name, _ in best]
            rest = sum_others(logs[1:], int(logs[1:-1].argmax())) if best else -np.inf
            yield Nearest(float(logs[0]), pairs, compared, rest)

    def ratios(self, parts: Sequence[np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
        """Compares Q clips with the person `name`.

        `parts` are the vectors of the clips, M arrays [Q, D], one for each modality. Returns two
        arrays. The first, [Q] float64, contains the log-likelihood ratios of this person against a
        stranger. The second, [M, Q] bool, is True if the clip and the person have the modality.
        """
        row, units = self.names.index(name), self.backend.units(parts)
        owner = np.arange(len(units[0]))
        queries = self._prepare(units, [np.ones(len(owner))] * len(units))
        ratios = self._logits_of(np.full(len(owner), row), owner, queries)
        return ratios, ~queries.missing & (self.counts[:, [row]] > 0)

    def _compared(
        self, parts: Sequence[np.ndarray], k: int, owner: np.ndarray | None = None
    ) -> Iterator[tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Compares groups of clips with all people. The arguments are as in `nearest`.

        Yields a tuple of five values for each group, in this order:

        - the logit of a stranger, float;
        - the logits of all enrolled people, [N] float32;
        - the indices of the `k` most probable people, and of some more (see `_best_rows`), [R] int;
        - the logits of these people, [R] float64;
        - True for each modality that the group has, [M] bool.
        """
        new = float(two_covariance.compute_stranger_logit(self.backend.settings, len(self.names)))
        units = self.backend.units(parts)
        effective = [np.ones(len(x)) for x in units]
        if owner is not None:  # only galleries with cards group clips
            num = int(owner.max(initial=-1)) + 1
            groups = self.backend.summarise([sum_by_owner(x, owner, num) for x in units])
            units, effective = groups.means, [1 / noise for noise in groups.noises]
        for at in range(0, len(units[0]), MAX_QUERY_CLIPS):
            chosen = slice(at, at + MAX_QUERY_CLIPS)
            queries = self._prepare([x[chosen] for x in units], [n[chosen] for n in effective])
            logits = self._logits(queries)
            logits[queries.missing.all(axis=0)] = -np.inf
            best = [self._best_rows(row, max(k, NUM_FINE_PEOPLE)) for row in logits]
            clip = np.repeat(np.arange(len(best)), [len(rows) for rows in best])
            fine = self._logits_of(np.concatenate(best), clip, queries)
            ends = np.cumsum([len(rows) for rows in best])[:-1]
            each = zip(logits, best, np.split(fine, ends), ~queries.missing.T, strict=True)
            for clip_logits, rows, clip_fine, has_part in each:
                yield new, clip_logits, rows, clip_fine, has_part

    def _prepare(self, units: Sequence[np.ndarray], effective: Sequence[np.ndarray]) -> _Queries:
        """Prepares Q groups of clips for the comparison with people.

        `units` (M arrays [Q, D]) and `effective` (M arrays [Q]) are the arguments of
        `DistanceRatios.ask` for each of M modalities.
        """
        coordinates, terms = [], []
        for scorer, x, k in zip(self.scorers, units, effective, strict=True):
            z, more = scorer.ask(x, k)
            coordinates.append(np.where(x.any(axis=1, keepdims=True), z, 0))
            terms.append(more)
        return _Queries(coordinates, terms, np.array([~x.any(axis=1) for x in units]))

    def _logits(self, queries: _Queries) -> np.ndarray:
        """Returns the logits of all N people for each of Q clips, as an array [Q, N] float32."""
        narrow = [x.astype(np.float32) for x in queries.coordinates]
        owner = np.arange(len(narrow[0]))[:, None]
        logits = np.empty((len(owner), len(self.names)), np.float32)

        def score(place: int) -> None:
            rows = slice(self._ends[place], self._ends[place + 1])
            pairs = zip(narrow, self.blocks[place].linear, strict=True)
            # In rare cases, OpenBLAS reports an invalid value although all numbers are finite.
            with np.errstate(invalid="ignore"):
                products = [x @ people.T for x, people in pairs]
            logits[:, rows] = self._add_up(products, rows, owner, queries)

        with one_thread():
            list(_threads().map(score, range(len(self.blocks))))
        return logits

    def _logits_of(self, rows: np.ndarray, owner: np.ndarray, queries: _Queries) -> np.ndarray:
        """Computes the logits of R pairs of a person and a clip, [R] float64.

        `rows` [R] are the indices of the people in `names`. `owner` [R] are the indices of the
        clips in `queries`.
        """
        places = np.searchsorted(self._ends, rows, side="right") - 1
        products = [np.zeros(len(rows)) for _ in queries.coordinates]
        for place in np.unique(places).tolist():
            pairs = np.flatnonzero(places == place)
            for product, x, linear in zip(
                products, queries.coordinates, self.blocks[place].linear, strict=True
            ):
                size = max(MAX_PAIRED_NUMBERS // linear.shape[1], 1)
                for some in np.split(pairs, range(size, len(pairs), size)):
                    people = rows[some] - self._ends[place]
                    product[some] = np.vecdot(linear[people], x[owner[some]])
        return self._add_up(products, rows, owner, queries)

    def _add_up(
        self,
        products: Sequence[np.ndarray],
        rows: slice | np.ndarray,
        owner: np.ndarray,
        queries: _Queries,
    ) -> np.ndarray:
        """Turns inner products into log-likelihood ratios, and adds the ratios of all modalities.

        Args:
          products: inner products of clips and people, an array for each modality. The products,
            `rows` and `owner` are as for `Ratios.finish`. The arrays are overwritten.
          queries: the clips. `owner` contains indices in `queries`.

        Returns:
          the sums (logits), [Q, R] or [R].
        """
        several = (np.sum(~queries.missing, axis=0) > 1)[owner]
        for number, (part, ratios) in enumerate(zip(self.backend.parts, products, strict=True)):
            self.scorers[number].finish(ratios, rows, owner, queries.terms[number])
            part.limit(ratios, several)
            unenrolled = self.counts[number, rows] == 0
            if unenrolled.any():
                np.copyto(ratios, self.backend.settings.unenrolled, where=unenrolled)
            if queries.missing[number].any():
                np.copyto(ratios, 0, where=queries.missing[number][owner])
        total = products[0]
        for ratios in products[1:]:
            total += ratios
        return total

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The bounds of the blocks: block b has the people `names[_ends[b] : _ends[b + 1]]`."""
        return np.cumsum([0, *(len(block.names) for block in self.blocks)]).tolist()

    def _best_rows(self, logits: np.ndarray, k: int) -> np.ndarray:
        """Returns indices (ascending) of people who may have one of the k highest `logits` [N].

        The float32 logits have rounding errors of up to MAX_LOGIT_ERROR, so the result may contain
        more than k people. If it would contain more than MAX_FINE_PEOPLE, it contains exactly k
        people. If all logits are -inf, it is empty.
        """
        k, count = min(k, len(logits)), len(logits) // PEAK_PEOPLE
        if not k or logits[0] == -np.inf:  # if any logit is -inf, all are
            return np.zeros(0, int)
        peaks = logits
        if k <= count:
            peaks = logits[: count * PEAK_PEOPLE].reshape(PEAK_PEOPLE, count).max(axis=0)
        rows = np.flatnonzero(logits >= np.partition(peaks, -k)[-k] - MAX_LOGIT_ERROR)
        if len(rows) > MAX_FINE_PEOPLE:
            least = np.partition(logits[rows], -k)[-k]
            better, equal = rows[logits[rows] > least], rows[logits[rows] == least]
            first = heapq.nsmallest(k - len(better), equal.tolist(), key=self.names.__getitem__)
            rows = np.sort([*better, *first])
        return rows


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the log softmax [K] of logits [K]. It is exact even for a probability near 1."""
    best = logits.argmax()
    shifted = logits - logits[best]
    weights = np.exp(shifted)
    weights[best] = 0
    return shifted - np.log1p(weights.sum())


def sum_others(logs: np.ndarray, best: int) -> float:
    """Returns the logarithm of the sum of exp(`logs`) without element `best`. `logs` are [K]."""
    others = np.delete(logs, best)
    top = others.max(initial=-np.inf)
    return float(top + np.log(np.exp(others - top).sum())) if top > -np.inf else -np.inf
