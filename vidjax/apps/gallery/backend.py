"""The back end of a gallery: the parameters of the comparison of clips with enrolled people.

A clip has a vector for each of M modalities, such as face or audio. The vector of a missing
modality is 0. Vectors are compared in one of two ways:

- Vectors from a training run, by PLDA: `fit` learns the parameters from labelled clips. If the
  model of the run is not a PLDA model, the only modality is `embedding`.
- Vectors from embedding nets, by distances: the JSON file of a net contains the parameters.

A clip is compared with all people in float32, and again with the most probable people in float64.
So the rounding errors, which depend on the order of people and clips, change an answer by at most
1e-6. The formulas are the same as in `models.plda_fit.combine_modalities` and
`losses.log_softmax`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from threadpoolctl import ThreadpoolController

from vidjax.apps.cards import BackEnd
from vidjax.models import card_backend, two_covariance
from vidjax.models.card_backend import Distances
from vidjax.models.two_covariance import Settings, Space, make_blank_space
from vidjax.utils.json_files import Size, Text
from vidjax.utils.terminal import say

# We assume that 10 % of the voices belong to a person who is not seen. So the likelihood ratio of
# a voice is at most 9 if the clip also has a face.
MAX_VOICE_RATIO = np.log(9)
LEAST_ODDS = 200.0  # with which we say that clips show one person, or two
# The largest `Covariances.shared` with which the gallery of a PLDA run has the settings of the run.
MOST_SHARED = 0.25


class Summary(NamedTuple):
    """The statistics of groups of clips that `Backend.compare` needs, in M modalities such as face.

    The arrays of groups may have any shape [...], for example [G] for G groups.
    """

    counts: list[np.ndarray]  # M arrays [...], the numbers of clips that have the modality
    means: list[np.ndarray]  # M arrays [..., D] float64, the mean coordinates of these clips, or 0
    squares: list[np.ndarray]  # M arrays [...], the squared lengths of the means
    noises: list[np.ndarray]  # M arrays [...], see `Part.measure_noise`
    clarity: np.ndarray  # [...], the mean clarity of the faces, see `align.measure_clarity`

    def take(self, rows: list[int] | slice | np.ndarray) -> "Summary":
        """Selects groups of clips: `rows` is an index into each array, as in NumPy."""
        counts, means, squares, noises = ([x[rows] for x in each] for each in self[:-1])
        return Summary(counts, means, squares, noises, self.clarity[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The parameters of the comparison in one modality, such as face."""

    name: str  # the modality, or `embedding`
    centre: np.ndarray  # [D] float64, is subtracted from vectors; 0 if a run has subtracted it
    space: Space | None = None  # the parameters of PLDA, if vectors are compared by PLDA
    distances: Distances | None = None  # the parameters, if vectors are compared by distances
    mean: np.ndarray | None = None  # [D] float64, the mean of all people, if the card contains it

    def limit(self, ratios: np.ndarray, several: np.ndarray) -> None:
        """Limits the log ratios of voices, in place, because the speaker may be off screen.

        This applies to `audio` vectors of an embedding net. `several` is True where other
        modalities are compared, too.
        """
        if self.distances is not None and self.name == "audio":
            np.clip(ratios, -MAX_VOICE_RATIO, MAX_VOICE_RATIO, out=ratios, where=several)

    @functools.cached_property
    def inverse(self) -> np.ndarray:
        """The inverse [D, D] of `Space.transform`. Only PLDA has it."""
        assert self.space is not None
        return np.linalg.inv(self.space.transform)

    def coordinates(self, x: np.ndarray) -> np.ndarray:
        """Returns the PLDA coordinates [N, D] of unit vectors x [N, D]. Without PLDA, returns x."""
        if self.space is None:
            return x
        with one_thread():
            return np.asarray((x - self.space.mean) @ self.space.transform)

    def describe(self, count: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Computes the coefficients `linear` [P, D] and `constant` [P] of P people, see `People`.

        `count` [P] is the number of clips of each person. `total` [P, D] is the sum of the unit
        vectors of these clips.
        """
        if self.space is None:
            mean = total / np.maximum(count, 1)[:, None]
            return mean, np.vecdot(mean, mean)
        with one_thread():
            enrolled = two_covariance.enrol(self.space, count, total)
        return np.asarray(enrolled.linear), np.asarray(enrolled.constant)

    def measure_noise(self, count: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Returns [G]: the variance of the mean of a group, relative to the variance of one clip.

        A value is 1 / k for k independent clips, and larger for similar clips. `count` [G] and
        `mean` [G, D] are the number and the mean of the clips in each group.
        """
        num = np.maximum(count, 1)
        if self.space is None:
            assert self.distances is not None
            return 1 / card_backend.effective_count(self.distances, num, np.vecdot(mean, mean))
        units = mean @ self.inverse + self.space.mean
        within = float(np.vdot(self.inverse, self.inverse))
        return 1 / two_covariance.count_independent(within, num, num[:, None] * units)

    def arrays(self) -> list[np.ndarray]:
        """Returns all parameters as arrays, in the order in which `from_numbers` reads them."""
        if self.space is None:
            means = [] if self.mean is None else [self.mean]
            return [self.centre, np.array(self.distances), *means]
        return [self.centre, *map(np.asarray, self.space)]


class People(NamedTuple):
    """P enrolled people, with the coefficients that the comparison with a clip needs.

    If vectors are compared by PLDA, see `two_covariance.Enrolled`. If they are compared by
    distances, `linear` is the mean m of a person's unit vectors, and `constant` is m . m.
    """

    names: tuple[str, ...]
    linear: tuple[np.ndarray, ...]  # M arrays [P, D] float32
    constant: np.ndarray  # [M, P] float64
    # [M, P] int32, the number of a person's clips with the modality. With PLDA, it is the number of
    # independent clips: all clips of a film count as one, and so do clips that are too similar.
    num_clips: np.ndarray

    def take(self, rows: Sequence[int] | np.ndarray) -> "People":
        """Selects people by their indices `rows`."""
        linear = tuple(x[rows] for x in self.linear)
        names = tuple(self.names[row] for row in rows)
        return People(names, linear, self.constant[:, rows], self.num_clips[:, rows])


class Backend(NamedTuple):
    """The parameters of the comparison in M modalities, such as face and audio."""

    parts: tuple[Part, ...]  # the parameters of each modality
    settings: Settings  # the parameters for all modalities

    @property
    def widths(self) -> dict[str, int]:
        """The length D of the vectors of each modality: modality -> D."""
        return {part.name: len(part.centre) for part in self.parts}

    def split(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Splits vectors [N, sum of D] into M arrays [N, D], one for each modality."""
        ends = np.cumsum(list(self.widths.values()))[:-1]
        return np.split(vectors, ends.tolist(), axis=1)

    def units(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Subtracts the centre from the vectors of Q clips, and scales the results to unit length.

        `parts` and the result are M arrays [Q, D], one for each modality.
        """
        return [unit(part, x) for part, x in zip(self.parts, parts, strict=True)]

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the PLDA coordinates of Q clips: M arrays [Q, D], one for each modality.

        `parts` are the vectors of the clips, in the same form. If a clip lacks a modality, its
        coordinates are 0. If a modality is not compared by PLDA, its coordinates are the centred
        unit vectors.
        """
        pairs = zip(self.parts, self.units(parts), strict=True)
        return [np.where(x.any(axis=1, keepdims=True), part.coordinates(x), 0) for part, x in pairs]

    def enrol(
        self,
        names: Sequence[str],
        vectors: np.ndarray,
        owner: np.ndarray,
        film: np.ndarray | None = None,
        independent: np.ndarray | None = None,
    ) -> People:
        """Enrols P people: computes coefficients from N clips of these people, see `People`.

        Args:
          names: the names of the people.
          vectors: [N, sum of D], the vectors of the clips, of all modalities.
          owner: [N] int, the person of each clip, an index in `names`.
          film: [N] int, the film of each clip, from 0. With PLDA, all clips of a person in a film
            count as at most one clip. By default, each clip is from another film.
          independent: [P] bool, True if a person's clips are known to be independent. Otherwise,
            PLDA counts similar clips of the person as fewer clips. By default, all are False.
        """
        linear, constants, counts = [], [], []
        exact = np.zeros(len(names), bool) if independent is None else independent
        for part, x in zip(self.parts, self.split(vectors), strict=True):
            count, total = _sum_clips(part, x, owner, film, exact)
            coefficients, constant = part.describe(count, total)
            linear.append(coefficients.astype(np.float32))
            constants.append(constant)
            counts.append(count.astype(np.int32))
        return People(tuple(names), tuple(linear), np.stack(constants), np.stack(counts))

    def summarise_clips(self, parts: Sequence[np.ndarray]) -> Summary:
        """Returns a `Summary` of N groups. Each group is a single clip.

        `parts` are the vectors of the N clips: M arrays [N, D], one for each modality.
        """
        means, ones = self.whiten(parts), np.ones(len(parts[0]))
        counts = [z.any(axis=1).astype(int) for z in means]
        squares = [np.vecdot(z, z) for z in means]
        return Summary(counts, means, squares, [ones] * len(means), ones)

    def summarise(
        self, sums: Sequence[tuple[np.ndarray, np.ndarray]], clarity: np.ndarray | None = None
    ) -> Summary:
        """Returns the statistics of G groups of clips.

        Args:
          sums: (count [G], total [G, D]) for each of M modalities: the number of clips of each
            group, and the sum of the vectors of these clips after `whiten`.
          clarity: [G], the mean clarity of the faces of each group, see `align.measure_clarity`. By
            default, it is 1.
        """
        counts = [count for count, _ in sums]
        means = [total / np.maximum(count, 1)[:, None] for count, total in sums]
        squares = [np.vecdot(mean, mean) for mean in means]
        noises = [*map(Part.measure_noise, self.parts, counts, means)]
        clarity = np.ones(len(counts[0])) if clarity is None else clarity
        return Summary(counts, means, squares, noises, clarity)

    def compare(self, x: Summary, y: Summary) -> tuple[np.ndarray, np.ndarray]:
        """Compares groups of clips x with groups y: do the clips of two groups show one person?

        The shapes of x and y broadcast to [...]. The clips may be compared by PLDA or by distances.
        The ratios of all modalities that both groups have are added.

        Returns two arrays: log(p(clips | one person) / p(clips | two people)), [...] float64; and
        [M, ...] bool for M modalities, True if both groups have the modality. If two groups have no
        modality in common, their log ratio is 0.
        """
        shared = np.array([(a > 0) & (b > 0) for a, b in zip(x.counts, y.counts, strict=True)])
        several, total = shared.sum(axis=0) > 1, np.zeros(shared.shape[1:])
        for number, part in enumerate(self.parts):
            (a, one, s), (b, other, t) = (
                (each.means[number], each.squares[number], each.noises[number]) for each in (x, y)
            )
            if part.space is not None:
                ratios = two_covariance.pair_log_ratios(part.space, a, s, b, t)
                ratios = float(self.settings.scale) * ratios
            else:
                assert part.distances is not None
                clarity = np.maximum(x.clarity, y.clarity) if part.name == "face" else 1.0
                gap = one + other - 2 * np.vecdot(a, b)
                ratios = card_backend.pair_log_ratios(part.distances, gap, s + t, clarity)
            part.limit(ratios, several)
            total += np.where(shared[number], ratios, 0)
        return total, shared

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
      enrolled: replaces `vectors` for enrolled clips in the fit of `settings`. Row n may be the
        mean of several clips of the person `labels[n]`. Default: `vectors`.
      centred: True if the run has already subtracted a centre from the vectors.
      settings: the settings of PLDA. If None, they are fitted, and the variance of a person's
        clips has a lower limit, see `two_covariance.covariances`.
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
        centre, space = np.zeros(x.shape[1]), make_blank_space(x.shape[1])
        if present.any():
            x = np.asarray(x[present], np.float64)
            if not centred:
                centre = settings.centred * x.mean(axis=0)
            u = unit(Part(name, centre), x)
            sums = two_covariance.make_sums(u, labels[present], int(labels.max()) + 1)
            space = two_covariance.fit(sums._asdict(), settings, least_within)
        parts.append(Part(name, centre, space))
    return Backend(tuple(parts), settings)


def measure_shared(vectors: Mapping[str, np.ndarray], labels: np.ndarray) -> float:
    """Measures how alike the clips of a person are; returns a value from 0 to 1.

    The value is 0 if the clips of a person vary as usual, and near 1 if they hardly vary, as in
    photos of one day. The lowest value of all modalities is returned. `vectors` are modality ->
    unit vectors [N, D], and `labels` [N] int the person of each clip, from 1.
    """
    shared = []
    for x in vectors.values():
        present = np.any(x != 0, axis=1)
        if present.any():
            sums = two_covariance.make_sums(x[present], labels[present], int(labels.max()) + 1)
            shared.append(two_covariance.covariances(sums, two_covariance.WITHIN).shared)
    return min(shared, default=0.0)


def make_card_backend(back_ends: Mapping[str, BackEnd]) -> Backend:
    """Makes the parameters with which a gallery compares clips by distances.

    `back_ends` are modality -> the entry `back_end` of the card (the JSON file) of an embedding
    net. The entry contains distributions of cosines, which give the distributions of distances.
    The prior probability that a clip shows a stranger is 0.5.
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
    """Returns whether `old` and `new` contain the same parameters, except for rounding errors.

    Only the modalities of `old` are compared. `new` may have more modalities.
    """
    parts = {part.name: part.arrays() for part in new.parts}
    pairs = [(part.arrays(), parts.get(part.name, [])) for part in old.parts]
    return all(
        [*map(np.shape, x)] == [*map(np.shape, y)]
        and all(map(functools.partial(np.allclose, rtol=1e-9, atol=0), x, y))
        for x, y in pairs
    )


def _sum_clips(
    part: Part, x: np.ndarray, owner: np.ndarray, film: np.ndarray | None, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a count n [P] of each person's clips, and n times the person's mean vector, [P, D].

    `x` [N, D] are the vectors of the clips in one modality. With PLDA, n is lower if clips are from
    the same film, or if clips are similar and `exact` [P] is False. `owner`, `film` and `exact`
    (`independent`) are as in `Backend.enrol`.
    """
    count, total = sum_by_owner(unit(part, x), owner, len(exact))
    if part.space is None:
        return count, total
    most, sums = count, total
    if film is not None:
        first = np.unique(film, return_index=True)[1]
        in_film, added = sum_by_owner(x, film, len(first))
        means = (added / np.maximum(in_film, 1)[:, None]).astype(np.float32)
        most, sums = sum_by_owner(unit(part, means), owner[first], len(exact))
    with one_thread():
        within = two_covariance.compute_within(part.space)
    effective = two_covariance.count_independent(within, count, total, most=most)
    effective = np.where(exact, most, effective)
    return effective, sums * (effective / np.maximum(most, 1))[:, None]


def sum_by_owner(units: np.ndarray, owner: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and sums the vectors of each of P people: returns arrays [P] and [P, D].

    `units` [N, D] are the vectors. Vectors of 0 are ignored. `owner` [N] int is the person of each
    vector, from 0 to P - 1. P is `num`.
    """
    present = np.any(units != 0, axis=1)
    return two_covariance.make_totals(units[present], owner[present], num)


def unit(part: Part, x: np.ndarray) -> np.ndarray:
    """Subtracts `part.centre` from vectors x [N, D]; scales the results to unit length, in float64.

    If a row of x is 0 (a missing modality), its result is 0.
    """
    return two_covariance.unit_vectors_from(part.centre, np.asarray(x, np.float64))


class Kind(Struct, omit_defaults=True):
    """Describes one modality in the flat array of parameters that `from_numbers` reads."""

    name: Text  # the modality, or `embedding`
    width: Size  # D
    by_card: bool = False  # True if vectors are compared by distances, and False for PLDA
    has_mean: bool = False  # True if the card contains the mean of all people

    @property
    def sizes(self) -> list[int]:
        """The size (number of values) of each array that `Part.arrays` returns."""
        width = self.width
        if self.by_card:
            return [width, len(Distances._fields), *([width] if self.has_mean else [])]
        return [width, width, width * width, width]


def from_numbers(kinds: Sequence[Kind], settings: Settings, numbers: np.ndarray) -> Backend:
    """Makes a back end from `numbers`, the flat float64 array that `Backend.numbers` returned.

    `kinds` describe the modalities. `settings` become `Backend.settings`, which `numbers` lacks.
    """
    parts, left = [], numbers.astype(np.float64)
    for kind in kinds:
        centre, *arrays, left = np.split(left, np.cumsum(kind.sizes))
        if kind.by_card:
            values, *means = arrays
            parts.append(Part(kind.name, centre, None, Distances(*values.tolist()), *means))
        else:
            mean, transform, ratio = arrays
            space = Space(mean, transform.reshape(kind.width, kind.width), ratio)
            parts.append(Part(kind.name, centre, space))
    return Backend(tuple(parts), settings)


_libraries = functools.cache(ThreadpoolController)  # the search for libraries is slow


def one_thread() -> contextlib.AbstractContextManager[object]:
    """Limits BLAS to one thread in a `with` block. Idle BLAS threads would keep processors busy."""
    return _libraries().limit(limits=1, user_api="blas")
