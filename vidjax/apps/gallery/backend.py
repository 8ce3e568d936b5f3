"""The back end of a gallery: the coordinates of vectors, and the search among people.

A clip has a vector in each of M parts. The parts are the modalities of a PLDA run or of models, or
the single embedding of another run. `fit` stores sums over the vectors of labelled clips, but no
vector.

A clip is compared with all people by matrix products in float64. So answers agree to 1e-6 for any
order and number of people and clips. The formulas are the same as in
`models.plda_fit.combine_modalities` and `losses.log_softmax`.
"""

import contextlib
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from vidjax.models import distance, two_covariance
from vidjax.models.distance import Distances
from vidjax.models.two_covariance import Settings, Space, make_blank_space
from vidjax.runs.terminal import say
from vidjax.utils.machine import num_cores

if TYPE_CHECKING:
    from vidjax.apps.video.cards import BackEnd

MAX_QUERY_CLIPS = 32  # clips that are compared together
MAX_BLOCK_PEOPLE = 4096
MIN_BLOCK_PEOPLE = 512  # a change joins smaller blocks
# We assume that 10 % of voices belong to a person off screen while a face is seen.
MAX_VOICE_RATIO = np.log(9)
TIE_DIGITS = 9  # people whose log probabilities have these decimals in common are ordered by name


class Part(NamedTuple):
    """A part of a clip's vector, and the parameters that compare two vectors of this part.

    Attributes:
      name: the modality, or `embedding`.
      centre: [D] float64. It is subtracted from unit vectors, which are then scaled to unit length
        again. It is 0 if the run has already subtracted a centre.
      space: the float64 coordinates of PLDA; None for a part with a card.
      distances: the parameters of the card; None for PLDA.
    """

    name: str
    centre: np.ndarray
    space: Space | None = None
    distances: Distances | None = None

    @property
    def may_be_offscreen(self) -> bool:
        """True for voices of films: the voice of a clip may belong to a person off screen."""
        return self.distances is not None and self.name == "audio"

    def coordinates(self, x: np.ndarray) -> np.ndarray:
        """Returns unit vectors [N, D] in the coordinates of PLDA; a card leaves them unchanged."""
        if self.space is None:
            return x
        return _product(x - self.space.mean, np.asarray(self.space.transform))

    def describe(self, count: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `People.linear` and `People.constant` of P people for a part.

        `count` [P] are numbers of clips, and `total` [P, D] the sums of their unit vectors.
        """
        if self.space is None:
            mean = total / np.maximum(count, 1)[:, None]
            return mean, np.vecdot(mean, mean)
        sums = _product(total - count[:, None] * self.space.mean, np.asarray(self.space.transform))
        enrolled = two_covariance.compute_coefficients(self.space, count.astype(np.float64), sums)
        return np.asarray(enrolled.linear), np.asarray(enrolled.constant)

    def arrays(self) -> list[np.ndarray]:
        """Returns all numbers of the part, see `from_numbers`."""
        if self.space is None:
            return [self.centre, np.array(self.distances)]
        return [self.centre, *map(np.asarray, self.space)]


class People(NamedTuple):
    """A block of P people, and the coefficients that score them in M parts.

    In a part of PLDA, `linear` and `constant` are coefficients of z, see `two_covariance.Enrolled`.
    In a part with a card, they are the means of unit vectors and the squared lengths of the means.

    Attributes:
      names: the names of the people.
      linear: M arrays [P, D] float32.
      constant: [M, P] float64.
      num_clips: [M, P] int32, the number of each person's clips that have the part.
    """

    names: tuple[str, ...]
    linear: tuple[np.ndarray, ...]
    constant: np.ndarray
    num_clips: np.ndarray

    def take(self, rows: Sequence[int] | np.ndarray) -> "People":
        """Returns the people in the given rows of the block."""
        linear = tuple(x[rows] for x in self.linear)
        names = tuple(self.names[row] for row in rows)
        return People(names, linear, self.constant[:, rows], self.num_clips[:, rows])


class Nearest(NamedTuple):
    """The most probable people of a clip.

    Attributes:
      new: the log probability of a new person.
      best: (name, log probability), the most probable person first, ties in the order of names.
      compared: the parts that both the first person and the clip have.
    """

    new: float
    best: list[tuple[str, float]]
    compared: tuple[str, ...] = ()


def join(blocks: Sequence[People]) -> People:
    """Joins blocks of people."""
    names, linear, constant, count = zip(*blocks, strict=True)
    return People(
        tuple(itertools.chain.from_iterable(names)),
        tuple(map(np.concatenate, zip(*linear, strict=True))),
        np.concatenate(constant, axis=1),
        np.concatenate(count, axis=1),
    )


class Backend(NamedTuple):
    """The parameters of M parts, and the settings of PLDA."""

    parts: tuple[Part, ...]
    settings: Settings

    @property
    def widths(self) -> dict[str, int]:
        """Name -> D of every part."""
        return {part.name: len(part.centre) for part in self.parts}

    def split(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Splits vectors [N, sum of D] into the M parts, each [N, D]."""
        ends = np.cumsum(list(self.widths.values()))[:-1]
        return np.split(vectors, ends.tolist(), axis=1)

    def units(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns centred unit vectors of Q clips: M arrays [Q, D] float64, 0 for a missing part.

        `parts` are the vectors: M arrays [Q, D] float32, 0 for a missing part.
        """
        return [unit(part, x) for part, x in zip(self.parts, parts, strict=True)]

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the coordinates z of Q clips: M arrays [Q, D] float64, NaN for a missing part.

        `parts` are as in `units`. The coordinates of a part with a card are the unit vectors.
        """
        white = [part.coordinates(x) for part, x in zip(self.parts, self.units(parts), strict=True)]
        for z, x in zip(white, parts, strict=True):
            z[~np.any(x != 0, axis=1)] = np.nan
        return white

    def enrol(self, names: Sequence[str], vectors: np.ndarray, owner: np.ndarray) -> People:
        """Returns the people `names`, computed from sums over their clips, in this order.

        `vectors` are [N, sum of D] float32, 0 for a missing part. `owner` is [N] int, the index of
        each clip's person in `names`.
        """
        linear, constants, counts = [], [], []
        for part, x in zip(self.parts, self.split(vectors), strict=True):
            count, total = sum_by_owner(unit(part, x), owner, len(names))
            coefficients, constant = part.describe(count, total)
            linear.append(coefficients.astype(np.float32))
            constants.append(constant)
            counts.append(count.astype(np.int32))
        return People(tuple(names), tuple(linear), np.stack(constants), np.stack(counts))

    def numbers(self) -> np.ndarray:
        """Returns the arrays of all parts, flattened and joined, [num_numbers] float64."""
        arrays = (np.ravel(array) for part in self.parts for array in part.arrays())
        return np.concatenate([*arrays]).astype("<f8")


def fit(
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    enrolled: Mapping[str, np.ndarray] | None = None,
    *,
    centred: bool,
    settings: Settings | None = None,
) -> Backend:
    """Fits a back end to labelled clips.

    Args:
      vectors: part -> unit vectors [N, D] float32, 0 for a missing part.
      labels: [N] int, classes from 1.
      enrolled: the vectors with which the clips are enrolled, if they differ from `vectors`.
      centred: True if the run has already subtracted a centre from the vectors.
      settings: the settings of PLDA. By default, they are fitted.
    """
    from vidjax.models import plda_fit  # imports JAX

    plda_fit.report_few_people(labels, say)
    if settings is None:
        wanted = plda_fit.draw_identities(labels, 0) if len(labels) else np.zeros(0, bool)
        some, films = (
            {name: x[wanted] for name, x in by_part.items()}
            for by_part in (vectors, enrolled or vectors)
        )
        settings = plda_fit.fit_settings(some, labels[wanted], {}, 0, films)
    parts = []
    for name, x in vectors.items():
        present = np.any(x != 0, axis=1)
        width = x.shape[1]
        part = Part(name, np.zeros(width), make_blank_space(width))
        if present.any():
            x = np.asarray(x[present], np.float64)
            if not centred:
                part = part._replace(centre=settings.centred * x.mean(axis=0))
            u = unit(part, x)
            sums = two_covariance.make_sums(u, labels[present], int(labels.max()) + 1)
            part = part._replace(space=two_covariance.fit(sums._asdict(), settings))
        parts.append(part)
    return Backend(tuple(parts), settings)


def make_card_backend(back_ends: "Mapping[str, BackEnd]", stranger_odds: float = 1.0) -> Backend:
    """Makes a back end from the cards of models, part -> `cards.BackEnd`; no clips are needed.

    `stranger_odds` is the expected number of clips of strangers per clip of an enrolled person.
    """
    parts = []
    for name, back_end in back_ends.items():
        distances = distance.from_cosines(back_end.same, back_end.different)
        parts.append(Part(name, np.array(back_end.centre, np.float64), distances=distances))
    odds = float(np.log(stranger_odds))
    settings = Settings(
        within=1.0, between=1.0, scale=1.0, unenrolled=0.0, stranger=odds, centred=1.0
    )
    return Backend(tuple(parts), settings)


def sum_by_owner(units: np.ndarray, owner: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and adds the unit vectors [N, D] of each `owner` [N]; returns [num] and [num, D].

    Vectors that are 0 are not counted.
    """
    present = np.any(units != 0, axis=1)
    return two_covariance.make_totals(units[present], owner[present], num)


def unit(part: Part, x: np.ndarray) -> np.ndarray:
    """Returns unit vectors [N, D] float64 from the centre of a part to x; 0 if x is 0."""
    return two_covariance.unit_vectors_from(part.centre, np.asarray(x, np.float64))


def sizes(width: int, by_card: bool) -> list[int]:
    """Returns the lengths of the flattened `Part.arrays`."""
    return [width, len(Distances._fields)] if by_card else [width, width, width * width, width]


def from_numbers(
    kinds: Sequence[tuple[str, int, bool]], settings: Settings, numbers: np.ndarray
) -> Backend:
    """Returns the back end from its `Backend.numbers`.

    `kinds` has for each part its name, D, and True if it has a card.
    """
    parts, at = [], 0
    for name, width, by_card in kinds:
        arrays = []
        for size in sizes(width, by_card):
            arrays.append(numbers[at : at + size].astype(np.float64))
            at += size
        if by_card:
            parts.append(Part(name, arrays[0], distances=Distances(*arrays[1].tolist())))
        else:
            centre, mean, transform, ratio = arrays
            space = Space(mean, transform.reshape(width, width), ratio)
            parts.append(Part(name, centre, space))
    return Backend(tuple(parts), settings)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores())


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _one_thread() -> contextlib.AbstractContextManager[object]:
    """Limits matrix products to a single thread, because idle BLAS threads use whole processors."""
    return _libraries().limit(limits=1, user_api="blas")


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with _one_thread():
        return x @ y


class Ratios:
    """The log-likelihood ratios of N people in a part of PLDA, see `two_covariance.Enrolled`.

    Attributes:
      curve: [U, D] float64, coefficients of z^2. People with the same number of clips share them.
      kind: [N], the row of each person in `curve`.
    """

    def __init__(self, part: Part, scale: float, count: np.ndarray, constant: np.ndarray):
        """Takes `count` [N], the clips of each person, and `constant` [N]."""
        assert part.space is not None
        kinds, self.kind = np.unique(count, return_inverse=True)
        blank = np.zeros((len(kinds), len(part.centre)))
        self.curve = np.asarray(
            two_covariance.compute_coefficients(part.space, kinds.astype(np.float64), blank).curve
        )
        self._part, self._scale, self._constant = part, scale, scale * constant

    def ask(self, units: np.ndarray, effective: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `compare` needs of Q clips, whose unit vectors are [Q, D]."""
        del effective
        z = self._part.coordinates(units)
        return self._scale * z, self._scale * z**2 @ self.curve.T

    def compare(self, clips: tuple[np.ndarray, ...], linear: np.ndarray, rows: slice) -> np.ndarray:
        """Returns the ratios [Q, P] of clips and the people `rows`, whose `linear` is [P, D]."""
        z, curve = clips
        return z @ linear.T + self._constant[rows] + curve[:, self.kind[rows]]


class DistanceRatios:
    """The log-likelihood ratios of N people in a part with a card, see `models.distance`.

    Attributes:
      population: the mean m of all people.
      share, variance: [N] float64, see `distance.Posterior`.
      radius: [N] float64, the squared distance of the posterior mean from m.
    """

    def __init__(self, distances: Distances, people: Sequence[tuple[np.ndarray, ...]]):
        """Takes blocks of people: numbers of clips, means of unit vectors, squared lengths."""
        counts, means, _ = zip(*people, strict=True)
        effective = [distance.effective_count(distances, count, x) for count, _, x in people]
        self._distances = distances
        self.population = distance.population(distances, means, effective, counts)
        centre = self.population.mean
        radius = [x - 2 * mean @ centre + centre @ centre for _, mean, x in people]
        posterior = distance.posterior(distances, self.population, np.concatenate(effective))
        self.share, self.variance = posterior
        self.radius = posterior.share**2 * np.concatenate(radius)

    @property
    def card(self) -> np.ndarray:
        """[5]: both shapes, the smallest squared distance, constant and slope for a stranger."""
        distances, zero = self._distances, np.zeros(())
        variance = np.array(distances.within + distances.between + self.population.variance)
        constant = distance.stranger_log_density(distances, zero, variance)
        slope = distances.different / variance
        least = distance.MIN_SQUARE * distances.within
        return np.array([distances.same, distances.different, least, constant, slope])

    def ask(self, units: np.ndarray, effective: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns what `compare` needs of Q clips.

        `units` are means [Q, D] of unit vectors, and `effective` [Q] their effective numbers.
        """
        distances, noise = self._distances, self._distances.within / effective
        x = units - self.population.mean
        square = np.vecdot(x, x)
        variance = distances.between + noise + self.population.variance
        new = distance.stranger_log_density(distances, square, variance)
        return x, x @ self.population.mean, square, noise, new

    def compare(self, clips: tuple[np.ndarray, ...], linear: np.ndarray, rows: slice) -> np.ndarray:
        """Returns the ratios [Q, P] of clips and the people `rows`, whose `linear` is [P, D]."""
        x, *numbers = clips
        across, square, noise, new = (number[:, None] for number in numbers)
        if np.all(noise == noise[:1]):  # true for single clips: fewer logarithms are computed
            noise = noise[:1]
        gap = square + self.radius[rows] - 2 * self.share[rows] * (x @ linear.T - across)
        return distance.person_log_density(self._distances, gap, self.variance[rows] + noise) - new


class Index:
    """The coefficients of all people, which are searched; an index is never changed."""

    def __init__(self, backend: Backend, blocks: Iterable[People] = ()):
        """Takes blocks of different people."""
        self.backend = backend
        self.blocks = [block for block in blocks if block.names]

    @functools.cached_property
    def names(self) -> list[str]:
        """The name of every person."""
        return [name for block in self.blocks for name in block.names]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """[M, N] int32, the number of each identity's clips that have the part."""
        none = np.zeros((len(self.backend.parts), 0), np.int32)
        return np.concatenate([none, *(block.num_clips for block in self.blocks)], axis=1)

    @functools.cached_property
    def scorers(self) -> "list[Ratios | DistanceRatios]":
        """The scorer of each part, which computes log-likelihood ratios."""
        scorers: list[Ratios | DistanceRatios] = []
        for number, part in enumerate(self.backend.parts):
            people = [
                (block.num_clips[number], block.linear[number], block.constant[number])
                for block in self.blocks
            ] or [(np.zeros(0, int), np.zeros((0, len(part.centre))), np.zeros(0))]
            if part.distances is None:
                constant = np.concatenate([constant for _, _, constant in people])
                scale = float(self.backend.settings.scale)
                scorers.append(Ratios(part, scale, self.counts[number], constant))
            else:
                scorers.append(DistanceRatios(part.distances, people))
        return scorers

    def replaced(self, removed: Collection[str], new: People) -> "Index":
        """Returns an index without the people `removed`, if it has them, and with `new` people."""
        removed, kept, small = set(removed), [], [new]
        for block in self.blocks:
            if removed and not removed.isdisjoint(block.names):
                rows = [row for row, name in enumerate(block.names) if name not in removed]
                block = block.take(rows)
            (small if len(block.names) < MIN_BLOCK_PEOPLE else kept).append(block)
        joined = join(small)
        rows = np.arange(len(joined.names))
        pieces = (rows[at : at + MAX_BLOCK_PEOPLE] for at in range(0, len(rows), MAX_BLOCK_PEOPLE))
        return Index(self.backend, [*kept, *map(joined.take, pieces)])

    def search(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields for each of Q clips the logarithms of 1 + N probabilities, [1 + N] float64.

        Entry 0 is a new person, and entry 1 + r is `names[r]`. The probabilities add up to 1.
        `parts` are M arrays [Q, D], 0 for a missing part. For a clip without any part, a new person
        has probability 1.
        """
        for logits, _ in self._compare(parts):
            yield log_softmax(logits)

    def nearest(
        self, parts: Sequence[np.ndarray], k: int, owner: np.ndarray | None = None
    ) -> Iterator[Nearest]:
        """Yields for each of Q clips the k >= 1 most probable people; `parts` as in `search`.

        A clip without any part has no best people. If `owner` [Q] int is given, it assigns the
        clips to G groups, and each group gets an answer.
        """
        for logits, has_part in self._compare(parts, owner):
            logs = log_softmax(logits)
            people = logs[1:]
            rows = self._find_best(people, k)
            common = has_part & (self.counts[:, rows[0]] > 0) if rows else []
            compared = tuple(self.backend.parts[number].name for number in np.flatnonzero(common))
            best = [(self.names[row], float(people[row])) for row in rows]
            yield Nearest(float(logs[0]), best, compared)

    def _find_best(self, logs: np.ndarray, k: int) -> list[int]:
        """Returns the rows of the k highest of N logarithms that are not -inf, the highest first.

        Ties, except for rounding, are in the order of names.
        """
        k = min(k, len(logs))
        least = np.partition(logs, -k)[-k] - 10.0**-TIE_DIGITS if k else 0.0
        rows = np.flatnonzero((logs >= least) & (logs > -np.inf)).tolist()
        return sorted(rows, key=lambda row: (-round(logs[row], TIE_DIGITS), self.names[row]))[:k]

    def _compare(
        self, parts: Sequence[np.ndarray], owner: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the logits [1 + N] of each clip, as in `search`, and the parts that it has [M]."""
        new = float(two_covariance.compute_stranger_logit(self.backend.settings, len(self.names)))
        units = self.backend.units(parts)
        effective = [np.ones(len(x)) for x in units]
        if owner is not None:
            units, effective = self._groups(units, owner)
        for at in range(0, len(units[0]), MAX_QUERY_CLIPS):
            chosen = slice(at, at + MAX_QUERY_CLIPS)
            has_part = np.array([x[chosen].any(axis=1) for x in units])  # [M, Q]
            clips = [
                scorer.ask(x[chosen], count[chosen])
                for scorer, x, count in zip(self.scorers, units, effective, strict=True)
            ]
            score = functools.partial(self._score_block, clips, has_part)
            with _one_thread():
                blocks = [*_threads().map(score, range(len(self.blocks)))]
            logits = np.concatenate([np.full((has_part.shape[1], 1), new), *blocks], axis=1)
            logits[~has_part.any(axis=0), 1:] = -np.inf
            yield from zip(logits, has_part.T, strict=True)

    def _groups(
        self, units: Sequence[np.ndarray], owner: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns the mean unit vectors of groups, and their effective numbers of clips."""
        means, effective = [], []
        for part, x in zip(self.backend.parts, units, strict=True):
            count, total = sum_by_owner(x, owner, int(owner.max(initial=-1)) + 1)
            mean = total / np.maximum(count, 1)[:, None]
            means.append(mean)
            assert part.distances is not None  # only galleries with cards group clips
            square = np.vecdot(mean, mean)
            effective.append(distance.effective_count(part.distances, count, square))
        return means, effective

    def _score_block(
        self, clips: Sequence[tuple[np.ndarray, ...]], has_part: np.ndarray, place: int
    ) -> np.ndarray:
        """Returns the logits [Q, P] of the people of a block.

        `clips` are the results of the scorers' `ask` for Q clips. `has_part` is [M, Q] bool.
        """
        rows = slice(self._ends[place], self._ends[place + 1])
        total = np.zeros((has_part.shape[1], len(self.blocks[place].names)))
        several = has_part.sum(axis=0)[:, None] > 1
        for number, part in enumerate(self.backend.parts):
            linear = self.blocks[place].linear[number]
            ratios = self.scorers[number].compare(clips[number], linear, rows)
            if part.may_be_offscreen:
                np.clip(ratios, -MAX_VOICE_RATIO, MAX_VOICE_RATIO, out=ratios, where=several)
            unenrolled = self.counts[number, rows] == 0
            np.copyto(ratios, self.backend.settings.unenrolled, where=unenrolled)
            total += np.where(has_part[number][:, None], ratios, 0)
        return total

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The row of the first person of every block, and the number of people."""
        return np.cumsum([0, *(len(block.names) for block in self.blocks)]).tolist()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log softmax [K] of logits [K] float64.

    The logarithm of a probability near 1 is computed from the other probabilities, as in
    `losses.log_softmax`.
    """
    best = logits.argmax()
    shifted = logits - logits[best]
    weights = np.exp(shifted)
    weights[best] = 0
    return shifted - np.log1p(weights.sum())
