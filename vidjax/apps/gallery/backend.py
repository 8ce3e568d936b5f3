"""The back end of a gallery, which computes how probably a clip shows each enrolled person.

A clip has a vector for each of M modalities, such as face or audio. The vector of a missing
modality is 0. If a run that is not PLDA computes the vectors, the only modality is `embedding`.
The vectors of a modality are compared in one of two ways:

- PLDA: `fit` learns the parameters from labelled clips.
- Distances: a card, the JSON file that describes an embedding net, contains the parameters.

A clip is compared with all people in float32, and again with the most probable people in float64.
So the order of people or clips changes an answer by at most 1e-6. The formulas are the same as in
`models.plda_fit.combine_modalities` and `losses.log_softmax`.
"""

import contextlib
import functools
import heapq
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from vidjax.apps.gallery import ratios as ratios_lib
from vidjax.apps.gallery.ratios import MAX_VOICE_RATIO
from vidjax.models import card_backend, card_check, two_covariance
from vidjax.models.card_backend import Distances
from vidjax.models.card_check import Comparison
from vidjax.models.two_covariance import Settings, Space, make_blank_space
from vidjax.runs.terminal import say
from vidjax.utils.machine import num_cores

if TYPE_CHECKING:
    from vidjax.apps.cards import BackEnd

MAX_QUERY_CLIPS = 64  # clips that are compared together
MAX_PAIRED_NUMBERS = 1 << 20  # numbers in an array with a vector for each pair of clip and person
# The coefficients of people are in blocks of at most this size. Threads compare blocks in parallel.
MAX_BLOCK_PEOPLE = 4096
MIN_BLOCK_PEOPLE = 512  # a change of the gallery joins blocks with fewer people
# The largest `Covariances.shared` with which the gallery of a PLDA run has the settings of the run.
MOST_SHARED = 0.25
NUM_FINE_PEOPLE = 16  # most probable people of a clip, whose logits are computed in float64
MAX_LOGIT_ERROR = 1e-3  # larger than the rounding error of a float32 logit
MAX_FINE_PEOPLE = 4096  # people that are compared in float64 because they tie with the k-th person
# From a shift of the mean of all people by this distance on, inner products with the mean are
# computed again in float64. A smaller shift is added in float32, with an error below 1e-9.
MOST_SHIFT = 1e-3
# People are split into groups of this size. The k-th highest logit of all people is not lower than
# the k-th highest of the groups' best logits.
PEAK_PEOPLE = 32


class Part(NamedTuple):
    """The parameters that compare the vectors of one modality, such as face."""

    name: str  # the modality, or `embedding`
    centre: np.ndarray  # [D] float64, is subtracted from vectors; 0 if a run has subtracted it
    space: Space | None = None  # the parameters of PLDA, if vectors are compared by PLDA
    distances: Distances | None = None  # the parameters, if vectors are compared by distances
    mean: np.ndarray | None = None  # [D] float64, the mean of all people, if the card contains it

    @property
    def may_be_offscreen(self) -> bool:
        """True for voices that are compared by distances: the speaker may not be in the picture."""
        return self.distances is not None and self.name == "audio"

    def coordinates(self, x: np.ndarray) -> np.ndarray:
        """Returns the PLDA coordinates [N, D] of unit vectors x [N, D]. Without PLDA, returns x."""
        if self.space is None:
            return x
        with _one_thread():
            return np.asarray((x - self.space.mean) @ self.space.transform)

    def describe(self, count: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `linear` [P, D] and `constant` [P] of P people, as in the class `People`.

        `count` [P] is the number of clips of each person. `total` [P, D] is the sum of their unit
        vectors.
        """
        if self.space is None:
            mean = total / np.maximum(count, 1)[:, None]
            return mean, np.vecdot(mean, mean)
        with _one_thread():
            enrolled = two_covariance.enrol(self.space, count, total)
        return np.asarray(enrolled.linear), np.asarray(enrolled.constant)

    def arrays(self) -> list[np.ndarray]:
        """Returns all parameters as arrays, in the order in which `from_numbers` reads them."""
        if self.space is None:
            means = [] if self.mean is None else [self.mean]
            return [self.centre, np.array(self.distances), *means]
        return [self.centre, *map(np.asarray, self.space)]


class People(NamedTuple):
    """P enrolled people, with coefficients for each of M modalities.

    The coefficients compare a clip with a person. For PLDA, see `two_covariance.Enrolled`. For
    distances, `linear` is the mean of a person's unit vectors, and `constant` the squared length of
    this mean.
    """

    names: tuple[str, ...]
    linear: tuple[np.ndarray, ...]  # M arrays [P, D] float32
    constant: np.ndarray  # [M, P] float64
    # [M, P] int32, the number of a person's clips with the modality. With PLDA, it is the number of
    # independent clips: all clips of a film count as one, and so do clips that are too similar.
    num_clips: np.ndarray

    def take(self, rows: Sequence[int] | np.ndarray) -> "People":
        """Selects people by their indices."""
        linear = tuple(x[rows] for x in self.linear)
        names = tuple(self.names[row] for row in rows)
        return People(names, linear, self.constant[:, rows], self.num_clips[:, rows])


class Means:
    """The means of the unit vectors of P people in one modality, for the comparison by distances.

    Attributes:
      square: [P] float64, the squared lengths of the means.
      effective: [P] float64, the effective numbers of clips, see `card_backend.effective_count`.
      total: [D] float64, the sum of the means.
      weighed: the weighted sum of the means, and the sum of the weights, see `card_backend.weigh`.
    """

    def __init__(
        self, distances: Distances, linear: np.ndarray, square: np.ndarray, count: np.ndarray
    ):
        """`linear` [P, D] float32 are the means, and `count` [P] the numbers of clips."""
        self._linear, self.square = linear, square
        self.effective = card_backend.effective_count(distances, count, square)
        weights = card_backend.weigh(distances, self.effective, count)
        self.total = linear.sum(axis=0, dtype=np.float64)
        self.weighed = weights @ linear, float(weights.sum())
        # A centre [D], and the inner products [P] of the means with it.
        self._projected = np.full(linear.shape[1], np.inf), np.zeros(0)

    def measure_radius(self, centre: np.ndarray) -> np.ndarray:
        """Returns the squared distances [P] float64 of the means from `centre` [D] float64."""
        before, products = self._projected
        shift = centre - before
        if np.linalg.norm(shift) < MOST_SHIFT:
            products = products + self._linear @ shift.astype(np.float32)
        else:
            products = self._linear @ centre
            self._projected = centre, products
        return self.square - 2 * products + centre @ centre


class Block(People):
    """People who are compared together. An index and a changed index after it share blocks.

    So a block keeps values that do not depend on other people.
    """

    @functools.cached_property
    def _means(self) -> dict[int, Means]:
        return {}

    def means(self, number: int, distances: Distances) -> Means:
        """Returns the means of the modality `number`, whose vectors `distances` compare."""
        if number not in self._means:
            arrays = self.linear[number], self.constant[number], self.num_clips[number]
            self._means[number] = Means(distances, *arrays)
        return self._means[number]


class Nearest(NamedTuple):
    """The most probable people of a clip."""

    new: float  # the log-probability that the clip shows a person who is not enrolled
    best: list[tuple[str, float]]  # (name, log-probability), best first; ties in order of names
    compared: tuple[str, ...] = ()  # the modalities that both the clip and the best person have
    others: float = -np.inf  # the log-probability of all people except the best


def join(blocks: Sequence[People]) -> People:
    """Joins blocks of people into a single block."""
    names, linear, constant, count = zip(*blocks, strict=True)
    return People(
        tuple(itertools.chain.from_iterable(names)),
        tuple(map(np.concatenate, zip(*linear, strict=True))),
        np.concatenate(constant, axis=1),
        np.concatenate(count, axis=1),
    )


class Backend(NamedTuple):
    """The parameters that compare the vectors of M modalities."""

    parts: tuple[Part, ...]  # the parameters of each modality
    settings: Settings  # the parameters for all modalities

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> D, the length of its vectors."""
        return {part.name: len(part.centre) for part in self.parts}

    def split(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Splits vectors [N, sum of D] of all modalities into M arrays [N, D]."""
        ends = np.cumsum(list(self.widths.values()))[:-1]
        return np.split(vectors, ends.tolist(), axis=1)

    def units(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Centres vectors of Q clips, M arrays [Q, D], and scales the results to unit length."""
        return [unit(part, x) for part, x in zip(self.parts, parts, strict=True)]

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns `Part.coordinates` of Q clips, M arrays [Q, D]; NaN for a missing modality."""
        white = [part.coordinates(x) for part, x in zip(self.parts, self.units(parts), strict=True)]
        for z, x in zip(white, parts, strict=True):
            z[~np.any(x != 0, axis=1)] = np.nan
        return white

    def enrol(
        self,
        names: Sequence[str],
        vectors: np.ndarray,
        owner: np.ndarray,
        film: np.ndarray | None = None,
        independent: np.ndarray | None = None,
    ) -> People:
        """Computes the coefficients of P people from their N clips.

        Args:
          names: the names of the people.
          vectors: [N, sum of D].
          owner: [N] int, each clip's person, an index in `names`.
          film: [N] int, from 0. With PLDA, all clips of a person with the same number count as at
            most one clip. By default, each clip has another number.
          independent: [P] bool, True if a person's clips are known to be independent. With PLDA,
            similar clips of other people count as fewer clips. By default, all are False.
        """
        linear, constants, counts = [], [], []
        for part, x in zip(self.parts, self.split(vectors), strict=True):
            count, total = sum_by_owner(unit(part, x), owner, len(names))
            if part.space is not None:
                exact = np.zeros(len(names), bool) if independent is None else independent
                count, total = _add_independent(part, (count, total), (x, owner, film), exact)
            coefficients, constant = part.describe(count, total)
            linear.append(coefficients.astype(np.float32))
            constants.append(constant)
            counts.append(count.astype(np.int32))
        return People(tuple(names), tuple(linear), np.stack(constants), np.stack(counts))

    def numbers(self) -> np.ndarray:
        """Returns all parameters as a flat float64 array, which `from_numbers` reads."""
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
    """Fits PLDA to N labelled clips, for each modality.

    Args:
      vectors: modality -> unit vectors [N, D] float32.
      labels: [N] int, the person of each clip, from 1.
      enrolled: modality -> [N, D] float32. To fit the settings, row n enrols the person of clip n.
        It may be the mean of the person's clips in a film. The default is `vectors`.
      centred: True if the run has already subtracted a centre from the vectors.
      settings: the settings of PLDA. By default, they are fitted, too, and W is at least a typical
        share of the variance, see `two_covariance.covariances`.
    """
    from vidjax.models import plda_fit  # imports JAX

    plda_fit.report_few_people(labels, say)
    least_within = two_covariance.WITHIN if settings is None else 0.0
    if settings is None:
        wanted = plda_fit.draw_identities(labels, 0) if len(labels) else np.zeros(0, bool)
        some = {name: x[wanted] for name, x in vectors.items()}
        films = {name: x[wanted] for name, x in (enrolled or vectors).items()}
        settings = plda_fit.fit_settings(
            some, labels[wanted], {}, 0, films, least_within=least_within
        )
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
            space = two_covariance.fit(sums._asdict(), settings, least_within)
            part = part._replace(space=space)
        parts.append(part)
    return Backend(tuple(parts), settings)


def measure_shared(vectors: Mapping[str, np.ndarray], labels: np.ndarray) -> float:
    """Returns how much of the variance within a person is missing, as in photos of one day: 0 to 1.

    The result is the smallest `Covariances.shared` of all modalities. `vectors` are modality ->
    unit vectors [N, D], and `labels` [N] int the person of each clip, from 1.
    """
    shared = []
    for x in vectors.values():
        present = np.any(x != 0, axis=1)
        if present.any():
            u = np.asarray(x[present], np.float64)
            sums = two_covariance.make_sums(u, labels[present], int(labels.max()) + 1)
            shared.append(two_covariance.covariances(sums, two_covariance.WITHIN).shared)
    return min(shared, default=0.0)


def make_card_backend(back_ends: "Mapping[str, BackEnd]") -> Backend:
    """Makes a back end that compares clips by distances.

    `back_ends` are modality -> distribution of cosines, from the card of an embedding net. Half of
    the clips are expected to show strangers.
    """
    parts = []
    for name, back_end in back_ends.items():
        distances = card_backend.from_cosines(back_end.same, back_end.different)
        mean = None if back_end.mean is None else np.array(back_end.mean, np.float64)
        parts.append(Part(name, np.array(back_end.centre, np.float64), None, distances, mean))
    settings = Settings(
        within=1.0, between=1.0, scale=1.0, unenrolled=0.0, stranger=0.0, centred=1.0
    )
    return Backend(tuple(parts), settings)


def compare_equal(old: Backend, new: Backend) -> bool:
    """Returns whether two back ends compare the modalities of `old` by the same numbers.

    Rounding errors are ignored.
    """
    parts = {part.name: part.arrays() for part in new.parts}
    pairs = [(part.arrays(), parts.get(part.name, [])) for part in old.parts]
    return all(
        len(x) == len(y) and all(map(functools.partial(np.allclose, rtol=1e-9, atol=0), x, y))
        for x, y in pairs
    )


def _add_independent(
    part: Part,
    sums: tuple[np.ndarray, np.ndarray],
    clips: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    independent: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number n of independent clips of each person [P], and n x their mean [P, D].

    `sums` are the number [P] and the sum [P, D] of all clips of each person. `clips` are the
    arguments `vectors`, `owner` and `film` of `Backend.enrol`, for this part. For `independent`,
    see `Backend.enrol`.
    """
    assert part.space is not None
    (count, total), (x, owner, film) = sums, clips
    if film is not None:
        first = np.unique(film, return_index=True)[1]
        in_film, added = sum_by_owner(x, film, len(first))
        means = (added / np.maximum(in_film, 1)[:, None]).astype(np.float32)
        count, total = sum_by_owner(unit(part, means), owner[first], len(count))
    with _one_thread():
        within = two_covariance.compute_within(part.space)
    effective = two_covariance.count_independent(within, *sums, most=count)
    effective = np.where(independent, count, effective)
    return effective, total * (effective / np.maximum(count, 1))[:, None]


def sum_by_owner(units: np.ndarray, owner: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number [num] and the sum [num, D] of each person's vectors.

    `units` [N, D] are the vectors. Vectors of 0 are ignored. `owner` [N] int is the person of each
    vector, an index below `num`.
    """
    present = np.any(units != 0, axis=1)
    return two_covariance.make_totals(units[present], owner[present], num)


def unit(part: Part, x: np.ndarray) -> np.ndarray:
    """Subtracts `part.centre` from vectors x [N, D]; scales the results to unit length, in float64.

    The vector 0 stays 0.
    """
    return two_covariance.unit_vectors_from(part.centre, np.asarray(x, np.float64))


class Kind(NamedTuple):
    """A description of the arrays of a part, see `Part.arrays`."""

    name: str  # the modality, or `embedding`
    width: int  # D
    by_card: bool  # True if vectors are compared by distances, and False for PLDA
    has_mean: bool  # True if the card contains the mean of all people

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each array."""
        width = self.width
        if self.by_card:
            return [width, len(Distances._fields), *([width] if self.has_mean else [])]
        return [width, width, width * width, width]


def from_numbers(kinds: Sequence[Kind], settings: Settings, numbers: np.ndarray) -> Backend:
    """Makes a back end from `numbers`, which `Backend.numbers` returned."""
    parts, at = [], 0
    for kind in kinds:
        name, width, arrays = kind.name, kind.width, []
        for size in kind.sizes:
            arrays.append(numbers[at : at + size].astype(np.float64))
            at += size
        if kind.by_card:
            centre, values, *means = arrays
            parts.append(Part(name, centre, None, Distances(*values.tolist()), *means))
        else:
            centre, mean, transform, ratio = arrays
            space = Space(mean, transform.reshape(width, width), ratio)
            parts.append(Part(name, centre, space))
    return Backend(tuple(parts), settings)


_threads = functools.cache(lambda: ThreadPoolExecutor(num_cores()))
# A forked process, such as a worker of multiprocessing, does not inherit the threads.
os.register_at_fork(after_in_child=_threads.cache_clear)
_libraries = functools.cache(ThreadpoolController)  # the search for libraries is slow


def _one_thread() -> contextlib.AbstractContextManager[object]:
    # BLAS threads that wait for work use whole processors.
    return _libraries().limit(limits=1, user_api="blas")


class _Queries(NamedTuple):
    """Q clips that are prepared for the comparison with people, in M modalities."""

    coordinates: list[np.ndarray]  # M arrays [Q, D] float64, 0 if missing
    terms: list[np.ndarray]  # M arrays [Q, ...] float64, other numbers that the comparison needs
    missing: np.ndarray  # [M, Q] bool, True if a clip lacks the modality


class Ratios:
    """Computes log-likelihood ratios of clips and N people by PLDA, for one modality.

    Attributes:
      curve: [U, D] float64, coefficients of the squared coordinates of a clip. People with the same
        number of clips share a row.
      kind: [N] int, the row of each person in `curve`.
    """

    def __init__(self, part: Part, scale: float, count: np.ndarray, constant: np.ndarray):
        """Prepares the comparison with N people.

        All ratios are multiplied by `scale`. `count` [N] is the number of clips of each person. For
        `constant` [N], see `People`.
        """
        assert part.space is not None
        kinds, self.kind = np.unique(count, return_inverse=True)
        blank = np.zeros((len(kinds), len(part.centre)))
        self.curve = np.asarray(
            two_covariance.compute_coefficients(part.space, kinds.astype(np.float64), blank).curve
        )
        self._part, self._scale, self._constant = part, scale, scale * constant

    def ask(self, units: np.ndarray, effective: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns coordinates [Q, D] and terms [Q, U] of unit vectors [Q, D], for `_Queries`."""
        del effective  # only `DistanceRatios` compares groups of clips
        z = self._part.coordinates(units)
        return self._scale * z, self._scale * z**2 @ self.curve.T

    def finish(
        self, ratios: np.ndarray, rows: slice | np.ndarray, owner: np.ndarray, terms: np.ndarray
    ) -> None:
        """Turns products of coordinates and `People.linear` into log-likelihood ratios, in place.

        `ratios` are the products. `rows` are the indices of the people, and `owner` the indices of
        the clips, see `Index._add_up`. `ask` returned `terms`.
        """
        ratios += self._constant[rows].astype(ratios.dtype)
        # If all people have the same number of clips, broadcasting is faster than indexing.
        column = 0 if terms.shape[1] == 1 else self.kind[rows]
        ratios += terms.astype(ratios.dtype)[owner, column]


class DistanceRatios:
    """Computes log-likelihood ratios of clips and N people from distances, for one modality.

    Attributes:
      population: the distribution of the vectors of all people. Its mean is m.
      share: [N] float64, from 0 to 1. A person's posterior mean is at m for 0, and at the mean of
        the person's clips for 1.
      variance: [N] float64, the variance of a person's posterior, summed over the dimensions.
      radius: [N] float64, the squared distance of a person's posterior mean from m.
    """

    def __init__(self, part: Part, people: Sequence[Means]):
        """Prepares the comparison with N people, in blocks."""
        assert part.distances is not None
        distances = self._distances = part.distances
        weighed = (means.weighed for means in people)
        self.population = card_backend.population(distances, part.mean, weighed)
        radius = [means.measure_radius(self.population.mean) for means in people]
        effective = np.concatenate([means.effective for means in people])
        posterior = card_backend.posterior(distances, self.population, effective)
        self.share, self.variance = posterior
        self.radius = posterior.share**2 * np.concatenate(radius)

    @property
    def card(self) -> np.ndarray:
        """The float64 array [5] that `reader.py` of an exported gallery needs.

        Its values are the shapes for one person and for two people, see `Distances`; the lowest
        squared distance; the constant and the slope of the log density of a stranger.
        """
        distances, zero = self._distances, np.zeros(())
        variance = np.array(distances.within + distances.between + self.population.variance)
        constant = card_backend.stranger_log_density(distances, zero, variance)
        slope = distances.different / variance
        least = card_backend.MIN_SQUARE * distances.within
        return np.array([distances.same, distances.different, least, constant, slope])

    def ask(self, units: np.ndarray, effective: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the coordinates [Q, D] and terms [Q, 4] of Q groups of clips, for `_Queries`.

        `units` [Q, D] are the mean unit vectors x of the groups. `effective` [Q] are the effective
        numbers of their clips, see `card_backend.effective_count`. The coordinates are x - m. The
        terms are `(x - m) . m`, `|x - m|^2`, the variance of x for a known person, and the log
        density of x for a stranger.
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
        """Computes log-likelihood ratios in place, like `Ratios.finish`."""
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
    """Searches for the most probable people of a clip. An index is immutable."""

    def __init__(self, backend: Backend, blocks: Iterable[People] = ()):
        """Makes an index of the people in all `blocks`. Each person is in a single block."""
        self.backend = backend
        self.blocks = [x if isinstance(x, Block) else Block(*x) for x in blocks if x.names]

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of all N people."""
        return [name for block in self.blocks for name in block.names]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """[M, N] int32, the number of a person's clips that have the modality."""
        none = np.zeros((len(self.backend.parts), 0), np.int32)
        return np.concatenate([none, *(block.num_clips for block in self.blocks)], axis=1)

    @functools.cached_property
    def card_comparison(self) -> Comparison:
        """The enrolled people, compared with the card of the net of faces, if there is one."""
        for number, part in enumerate(self.backend.parts):
            if part.name == "face" and part.distances is not None:
                with _one_thread():
                    means = self._list_means(number, part.distances)
                total = np.sum([x.total for x in means], axis=0)
                squares = np.concatenate([x.square for x in means])
                return card_check.compare(part.distances, total, squares, self.counts[number])
        return card_check.NO_PROBLEM

    @functools.cached_property
    def scorers(self) -> "list[Ratios | DistanceRatios]":
        """The objects that compute log-likelihood ratios, one for each of M modalities."""
        scorers: list[Ratios | DistanceRatios] = []
        for number, part in enumerate(self.backend.parts):
            if part.distances is None:
                constants = [np.zeros(0), *(block.constant[number] for block in self.blocks)]
                scale = float(self.backend.settings.scale)
                constant = np.concatenate(constants)
                scorers.append(Ratios(part, scale, self.counts[number], constant))
            else:
                with _one_thread():
                    means = self._list_means(number, part.distances)
                    scorers.append(DistanceRatios(part, means))
        return scorers

    def _list_means(self, number: int, distances: Distances) -> list[Means]:
        """Returns the means of each block, or of a block of nobody, see `Block.means`."""
        means = [block.means(number, distances) for block in self.blocks]
        nobody = np.zeros((0, len(self.backend.parts[number].centre))), np.zeros(0), np.zeros(0)
        return means or [Means(distances, *nobody)]

    def replaced(self, removed: Collection[str], new: Sequence[People]) -> "Index":
        """Returns a new index without the people `removed`, and with the blocks of people `new`.

        Unknown names in `removed` are ignored.
        """
        removed, kept = set(removed), []
        small = [block for block in new if len(block.names) < MIN_BLOCK_PEOPLE]
        for block in self.blocks:
            if removed and not removed.isdisjoint(block.names):
                rows = [row for row, name in enumerate(block.names) if name not in removed]
                block = block.take(rows)
            (small if len(block.names) < MIN_BLOCK_PEOPLE else kept).append(block)
        kept += [block for block in new if len(block.names) >= MIN_BLOCK_PEOPLE]
        if small:
            joined = join(small)
            rows = np.arange(len(joined.names))
            starts = range(0, len(rows), MAX_BLOCK_PEOPLE)
            kept += [joined.take(rows[at : at + MAX_BLOCK_PEOPLE]) for at in starts]
        return Index(self.backend, kept)

    def search(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the log-probabilities of all people for each of Q clips, [1 + N] float64.

        Element 0 belongs to a stranger, and element 1 + r to the person `names[r]`. If a clip lacks
        all modalities, the probability of a stranger is 1. `parts` are M arrays [Q, D].
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

        `parts` are the vectors of Q clips, M arrays [Q, D]. `owner` [Q] int is the group of each
        clip. By default, each clip is a group. A group that lacks all modalities gets no people.
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
        """Compares Q clips with the person `name`. `parts` are their vectors, M arrays [Q, D].

        Returns the log-likelihood ratios [Q] float64 of this person against a stranger, and bool
        [M, Q], True for each modality that both the clip and the person have.
        """
        row, units = self.names.index(name), self.backend.units(parts)
        ratios = np.zeros(len(units[0]))
        for at in range(0, len(ratios), MAX_QUERY_CLIPS):
            some = [x[at : at + MAX_QUERY_CLIPS] for x in units]
            owner = np.arange(len(some[0]))
            queries = self._prepare(some, [np.ones(len(owner))] * len(some))
            rows = np.full(len(owner), row)
            ratios[at : at + len(owner)] = self._logits_of(rows, owner, queries)
        present = np.array([x.any(axis=1) for x in units])
        return ratios, present & (self.counts[:, [row]] > 0)

    def _compared(
        self, parts: Sequence[np.ndarray], k: int, owner: np.ndarray | None = None
    ) -> Iterator[tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Compares groups of clips with all people. The arguments are as in `nearest`.

        Yields five values for each group:
          the logit of a stranger;
          the logits [N] float32 of all enrolled people;
          the indices [R] of the most probable people, where R may be larger than k;
          the logits [R] float64 of these people;
          [M] bool, True for each modality that the group has.
        """
        new = float(two_covariance.compute_stranger_logit(self.backend.settings, len(self.names)))
        units = self.backend.units(parts)
        effective = [np.ones(len(x)) for x in units]
        if owner is not None:  # only galleries with cards group clips
            num = int(owner.max(initial=-1)) + 1
            sums = [sum_by_owner(x, owner, num) for x in units]
            groups = ratios_lib.of_sums(self.backend, sums, np.ones(num))
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
        """Prepares the unit vectors of Q groups of clips, M arrays [Q, D], for the comparison.

        `effective` are the effective numbers of clips, M arrays [Q].
        """
        coordinates, terms = [], []
        for scorer, x, k in zip(self.scorers, units, effective, strict=True):
            z, more = scorer.ask(x, k)
            coordinates.append(np.where(x.any(axis=1, keepdims=True), z, 0))
            terms.append(more)
        return _Queries(coordinates, terms, np.array([~x.any(axis=1) for x in units]))

    def _logits(self, queries: _Queries) -> np.ndarray:
        """Computes the logits [Q, N] float32 of all people for Q clips."""
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

        with _one_thread():
            list(_threads().map(score, range(len(self.blocks))))
        return logits

    def _logits_of(self, rows: np.ndarray, owner: np.ndarray, queries: _Queries) -> np.ndarray:
        """Computes the logits [R] float64 of R pairs of a person and a clip.

        `rows` [R] are the indices of the people, and `owner` [R] the indices of the clips.
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
        """Returns the logits of pairs of a clip and a person.

        A logit is the sum of the log-likelihood ratios of all modalities. `products` are M arrays,
        the coordinates of clips times `People.linear`. Their shape is [Q, R] for all pairs of Q
        clips and R people, or [R] for R pairs. The logits overwrite the first array. `rows` [R] are
        the indices of the people. `owner` are the indices of the clips, [Q, 1] or [R].
        """
        several = (np.sum(~queries.missing, axis=0) > 1)[owner]
        for number, (part, ratios) in enumerate(zip(self.backend.parts, products, strict=True)):
            self.scorers[number].finish(ratios, rows, owner, queries.terms[number])
            if part.may_be_offscreen:
                np.clip(ratios, -MAX_VOICE_RATIO, MAX_VOICE_RATIO, out=ratios, where=several)
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
        """The index of the first person of each block, and at the end the number N of people."""
        return np.cumsum([0, *(len(block.names) for block in self.blocks)]).tolist()

    def _best_rows(self, logits: np.ndarray, k: int) -> np.ndarray:
        """Returns sorted indices of people who may have one of the k highest `logits` [N] float32.

        Logits have rounding errors of up to MAX_LOGIT_ERROR, so the result may contain more than k
        people. If it would contain more than MAX_FINE_PEOPLE, it contains exactly k people. If all
        logits are -inf, it is empty.
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
    """Returns the log softmax [K] of logits [K]. The highest value is exact even near 0."""
    best = logits.argmax()
    shifted = logits - logits[best]
    weights = np.exp(shifted)
    weights[best] = 0
    return shifted - np.log1p(weights.sum())


def sum_others(logs: np.ndarray, best: int) -> float:
    """Returns log(the sum of all exp(`logs`) except exp(`logs[best]`)). `logs` are [K]."""
    others = np.delete(logs, best)
    top = others.max(initial=-np.inf)
    return float(top + np.log(np.exp(others - top).sum())) if top > -np.inf else -np.inf
