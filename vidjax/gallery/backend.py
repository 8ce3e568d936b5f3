"""The back end of a gallery: the coordinates of vectors, and the exact search among people.

A clip has one vector in each of M parts: the modalities of a PLDA run, or the embedding of a net.
`fit` keeps sums over the vectors of labelled clips, and no vector.

The coordinates of a vector are equal to the bit whatever is computed beside it. So each is a dot
product of its own: the rounding of a matrix product depends on where in the matrix a row stands.
So are answers, whatever block and row a person has: every ratio is a dot product of its own, sums
over identities are sums of whole numbers, and ties go by name. The formulas are those of
`models.plda_logits.combine` and `logit_ops.log_softmax`, which need all identities in one order and
on the device.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from vidjax.errors import UserError
from vidjax.machine import num_cores
from vidjax.models import two_covariance
from vidjax.models.two_covariance import Settings, Space, blank_space
from vidjax.run.terminal import say

if TYPE_CHECKING:
    from vidjax.extract.cards import BackEnd

MANY = 16  # vectors from which on threads are worth starting
MOST_QUERIES = 1024  # clips whose coordinates are computed at a time
MOST_ROWS = 4096  # people of the largest block
FEW_ROWS = 512  # people of a block that a change joins with another one
PIECE = 2048  # people of a matrix product
MANY_BLOCKS = 48  # from which on threads are worth starting
MOST_GROUPED = 8000  # clips, of which all pairs are compared
# One voice in ten that is heard while a face is seen is of somebody else: a choice, not a figure.
MOST_OF_VOICE = np.log(9)
ROUNDING = 2.0**-24  # of float32
FINE = 2.0**40  # exponentials are counted in units of 1 / FINE: room for 8 million identities


class Part(NamedTuple):
    """A modality, or `embedding`, and the float64 space in which its vectors are compared.

    Attributes:
      name: its name.
      centre: [D] float64, subtracted from unit vectors, which are then scaled to unit length again;
        0 where the run has subtracted its own.
      space: the coordinates.
      scale: factor on the log-likelihood ratios of this part, beside that of the settings.
      by_distance: True if nobody knows the mean of all vectors, see
        `two_covariance.distance_coefficients`.
    """

    name: str
    centre: np.ndarray
    space: Space
    scale: float = 1.0
    by_distance: bool = False

    @property
    def hearsay(self) -> bool:
        """True for voices that cards compare: that of a clip may be of somebody off screen."""
        return self.by_distance and self.name == "audio"

    def coefficients(self, count: np.ndarray, sums: np.ndarray) -> two_covariance.Enrolled:
        """Returns the classes with `count` [K] clips and coordinates of sum `sums` [K, D]."""
        found = (
            two_covariance.distance_coefficients
            if self.by_distance
            else (two_covariance.coefficients)
        )
        return found(self.space, count.astype(np.float64), sums)


class People(NamedTuple):
    """A block of P people, and what scores them in M parts, see `two_covariance.Enrolled`.

    `linear` are M arrays [P, D] float32, coefficients of z; `constant` is [M, P] float64;
    `num_clips` is [M, P] int32, the number of each person's clips that have the part.
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


def join(blocks: Sequence[People]) -> People:
    """Joins one or more blocks of people into one."""
    names, linear, constant, count = zip(*blocks, strict=True)
    return People(
        tuple(itertools.chain.from_iterable(names)),
        tuple(map(np.concatenate, zip(*linear, strict=True))),
        np.concatenate(constant, axis=1),
        np.concatenate(count, axis=1),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Backend:
    """Coordinates of M parts, and the settings of PLDA."""

    parts: tuple[Part, ...]
    settings: Settings

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """Name -> D of every part."""
        return {part.name: len(part.centre) for part in self.parts}

    @functools.cached_property
    def sha256(self) -> str:
        """The sha256 of `numbers`, as hex digits."""
        return hashlib.sha256(self.numbers().tobytes()).hexdigest()

    @functools.cached_property
    def _axes(self) -> list[np.ndarray]:
        return [np.ascontiguousarray(part.space.transform.T) for part in self.parts]

    def split(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Splits vectors [N, sum of D] into the M parts, each [N, D]."""
        ends = np.cumsum(list(self.widths.values()))[:-1]
        return np.split(vectors, ends.tolist(), axis=1)

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the coordinates z of Q clips: M arrays [Q, D] float64, NaN for a missing part.

        `parts` are the vectors: M arrays [Q, D] float32, 0 where a clip lacks the part.
        """
        found = []
        for number, (part, x) in enumerate(zip(self.parts, parts, strict=True)):
            z = self._turn(number, unit(part, x) - part.space.mean)
            z[~np.any(x != 0, axis=1)] = np.nan
            found.append(z)
        return found

    def _turn(self, number: int, shifted: np.ndarray) -> np.ndarray:
        def turn(rows: np.ndarray) -> np.ndarray:
            return np.vecdot(rows[:, None], self._axes[number])

        if len(shifted) < MANY:
            return turn(shifted)
        pieces = np.array_split(shifted, len(shifted) // MANY)
        return np.concatenate(list(threads().map(turn, pieces)))

    def enrol(self, names: Sequence[str], vectors: np.ndarray, owner: np.ndarray) -> People:
        """Returns the people `names`, from sums over their clips, added in order.

        `vectors` are [N, sum of D] float32, 0 where a clip lacks a part; `owner` is [N] int, the
        place in `names` of the person whom a clip shows.
        """
        linear, constants, counts = [], [], []
        for number, x in enumerate(self.split(vectors)):
            part = self.parts[number]
            present = np.any(x != 0, axis=1)
            count = np.bincount(owner[present], minlength=len(names))
            total = np.zeros((len(names), x.shape[1]))
            np.add.at(total, owner, unit(part, x))
            sums = self._turn(number, total - count[:, None] * part.space.mean)
            enrolled = part.coefficients(count, sums)
            linear.append(np.asarray(enrolled.linear, np.float32))
            constants.append(np.asarray(enrolled.constant))
            counts.append(count.astype(np.int32))
        return People(tuple(names), tuple(linear), np.stack(constants), np.stack(counts))

    def odds(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns [Q, Q] float64, the log odds that two clips show one person, not somebody new.

        `parts` are the vectors of Q clips, M arrays [Q, D] float32, 0 where a clip lacks a part.
        Each clip in turn is the only one of a person beside Q - 1 others.
        """
        if len(parts[0]) > MOST_GROUPED:
            raise UserError(
                f"{len(parts[0]):,} clips are too many to group: {MOST_GROUPED:,} are the most\n"
                "give fewer, or shorter, videos at once"
            )
        names, owner = [str(row) for row in range(len(parts[0]))], np.arange(len(parts[0]))
        index = Index(self, [self.enrol(names, np.concatenate(parts, axis=1), owner)])
        rows = [logs[1:] - logs[0] for logs in index.search(parts)]
        odds = np.array(rows).reshape(len(names), len(names))
        return (odds + odds.T) / 2

    def numbers(self) -> np.ndarray:
        """Returns the arrays of all parts, flattened and joined, [num_numbers] float64."""
        return np.concatenate(
            [
                np.ravel(array)
                for part in self.parts
                for array in (part.centre, part.space.mean, part.space.transform, part.space.ratio)
            ]
        ).astype("<f8")


def fit(
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    centred: bool,
    settings: Settings | None = None,
) -> Backend:
    """Fits a back end to the unit vectors of labelled clips, part -> [N, D] float32.

    A clip's vector is 0 in a part that it lacks. `labels` [N] int are classes from 1. `centred` is
    True if the run has subtracted a centre from the vectors. With `settings` None, they are fitted.
    """
    from vidjax.models import plda_fit  # JAX, for those alone who fit

    plda_fit.tell_of_few(labels, say)
    if settings is None:
        wanted = plda_fit.some_identities(labels, 0) if len(labels) else np.zeros(0, bool)
        some = {name: x[wanted] for name, x in vectors.items()}
        settings = plda_fit.fit_settings(some, labels[wanted], {}, 0)
    parts = []
    for name, x in vectors.items():
        present = np.any(x != 0, axis=1)
        width = x.shape[1]
        part = Part(name, np.zeros(width), blank_space(width))
        if present.any():
            x = np.asarray(x[present], np.float64)
            if not centred:
                part = part._replace(centre=settings.centred * x.mean(axis=0))
            u = unit(part, x)
            sums = two_covariance.make_sums(u, labels[present], int(labels.max()) + 1)
            part = part._replace(space=two_covariance.fit(sums._asdict(), settings))
        parts.append(part)
    return Backend(tuple(parts), settings)


def of_cards(back_ends: "Mapping[str, BackEnd]") -> Backend:
    """Returns the back end that cards of models give, part -> `cards.BackEnd`, without any clip.

    A vector less the centre, scaled to unit length, is y + e with covariances that are multiples of
    the identity. Cosines of pairs of one person have the mean 1 - W, those of two people 1 - W - B,
    in variances that are summed over all dimensions. If vectors had so many independent dimensions
    as they have numbers, cosines would differ less than the card says. The scale corrects that: the
    squared distance has the relative spread of n = 2 (mean / deviation)^2 such dimensions, and the
    smaller n of both kinds of pairs counts. A face is as probably somebody new as somebody known.
    """
    parts = []
    for name, found in back_ends.items():
        width = len(found.centre)
        within, total = 1 - found.same[0], 1 - found.different[0]
        spreads = ((within, found.same[1]), (total, found.different[1]))
        scale = min(1.0, *(2 * (mean / deviation) ** 2 / width for mean, deviation in spreads))
        axes = np.eye(width) / np.sqrt(within / width)
        space = Space(np.zeros(width), axes, np.full(width, (total - within) / within))
        parts.append(Part(name, np.array(found.centre, np.float64), space, scale, True))
    even = Settings(within=1.0, between=1.0, scale=1.0, unenrolled=0.0, stranger=0.0, centred=1.0)
    return Backend(tuple(parts), even)


def unit(part: Part, x: np.ndarray) -> np.ndarray:
    """Returns (x - centre) / |x - centre| for each row of x [N, D], float64; 0 where x is 0."""
    shifted = np.asarray(x, np.float64) - part.centre
    norm = np.sqrt(np.vecdot(shifted, shifted))[:, None]
    present = np.any(np.asarray(x) != 0, axis=1)[:, None]
    return np.where(present, shifted / np.maximum(norm, 1e-12), 0.0)


def num_numbers(widths: Mapping[str, int]) -> int:
    """Returns the length of `Backend.numbers` for parts of these widths."""
    return sum(width * (width + 3) for width in widths.values())


def from_numbers(widths: Mapping[str, int], settings: Settings, numbers: np.ndarray) -> Backend:
    """Returns the back end from its `Backend.numbers`; `widths` are part -> D."""
    parts, at = [], 0
    for name, width in widths.items():
        own = numbers[at : at + width * (width + 3)].astype(np.float64).reshape(-1, width)
        at += own.size
        parts.append(Part(name, own[0], Space(own[1], own[2:-1], own[-1])))
    return Backend(tuple(parts), settings)


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Returns the pool of threads, one per core, that search and whitening share."""
    return ThreadPoolExecutor(num_cores())


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


class Index:
    """Identities as coefficients of a back end; an index is never changed."""

    def __init__(self, backend: Backend, blocks: Iterable[People] = ()):
        """Takes blocks of people; nobody may be in two of them."""
        self.backend = backend
        self.blocks = [block for block in blocks if block.names]

    @functools.cached_property
    def names(self) -> list[str]:
        """The identity of every row."""
        return [name for block in self.blocks for name in block.names]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """[M, N] int32, the number of each identity's clips that have the part."""
        none = np.zeros((len(self.backend.parts), 0), np.int32)
        return np.concatenate([none, *(block.num_clips for block in self.blocks)], axis=1)

    @functools.cached_property
    def _constant(self) -> np.ndarray:
        none = np.zeros((len(self.backend.parts), 0))
        return np.concatenate([none, *(block.constant for block in self.blocks)], axis=1)

    @functools.cached_property
    def _curves(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Coefficients of z^2, M arrays [1 + U, D], and each identity's row in them, [M, N] int32.

        Identities with equal numbers of clips share a row; row 0 is for no clip in the part.
        """
        curves, kinds = [], []
        for part, counts in zip(self.backend.parts, self.counts, strict=True):
            values, inverse = np.unique(counts, return_inverse=True)
            none = np.zeros((len(values), len(part.centre)))
            found = part.coefficients(values, none)
            curves.append(np.pad(np.asarray(found.curve), ((1, 0), (0, 0))))
            kinds.append(np.where(counts > 0, inverse + 1, 0).astype(np.int32))
        return curves, np.stack(kinds)

    def replaced(self, gone: Collection[str], new: People) -> "Index":
        """Returns an index without the people named `gone`, where it has them, and with `new`."""
        away, kept, few = set(gone), [], [new]
        for block in self.blocks:
            if away and not away.isdisjoint(block.names):
                rows = [row for row, name in enumerate(block.names) if name not in away]
                block = block.take(rows)
            (few if len(block.names) < FEW_ROWS else kept).append(block)
        joined = join(few)
        rows = np.arange(len(joined.names))
        pieces = (rows[at : at + MOST_ROWS] for at in range(0, len(rows), MOST_ROWS))
        return Index(self.backend, [*kept, *map(joined.take, pieces)])

    def search(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields `log_probabilities` of Q clips; `parts` are M arrays [Q, D], 0 where missing."""
        for at in range(0, len(parts[0]), MOST_QUERIES):
            block = self.backend.whiten([x[at : at + MOST_QUERIES] for x in parts])
            for row in range(len(block[0])):
                yield self.log_probabilities([z[row] for z in block])

    def log_probabilities(self, clip: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the logarithms of 1 + N probabilities that add up to 1, [1 + N] float64.

        Entry 0 is somebody new, entry 1 + r the identity `names[r]`. `clip` is a row of each of the
        M arrays of `Backend.whiten`, [D] float64. One that lacks all parts shows somebody new.
        """
        present = [number for number, z in enumerate(clip) if not np.isnan(z[0])]
        if not present:
            return np.concatenate([[0.0], np.full(len(self.names), -np.inf)])
        blocks = self.blocks
        ends = np.cumsum([0, *(len(block.names) for block in blocks)]).tolist()
        ratios = np.zeros((len(clip), ends[-1]), np.float32)
        linear = {n: clip[n].astype(np.float32) for n in present}

        def score(first: int, step: int) -> None:
            for number in range(first, len(blocks), step):
                own = slice(ends[number], ends[number + 1])
                for n, z in linear.items():
                    np.vecdot(blocks[number].linear[n], z, out=ratios[n, own])

        if len(blocks) >= MANY_BLOCKS:
            cores = num_cores()
            list(threads().map(lambda first: score(first, cores), range(cores)))
        else:
            score(0, 1)
        logits = np.zeros(1 + ends[-1])
        logits[0] = two_covariance.stranger_logit(self.backend.settings, ends[-1])
        logits[1:] = self._add_up(ratios, slice(None), 0, [z[None] for z in clip])
        return log_softmax(logits)

    def _add_up(
        self,
        ratios: np.ndarray,
        rows: np.ndarray | slice,
        owner: np.ndarray | int,
        clips: Sequence[np.ndarray],
    ) -> np.ndarray:
        """Returns the logits [R] of pairs of a person and a clip, from dot products [M, R]."""
        settings, (curves, kind) = self.backend.settings, self._curves
        present = ~np.isnan([z[:, 0] for z in clips])
        several = present.sum(axis=0)[owner] > 1
        logits = np.zeros(ratios.shape[1])
        for n, part in enumerate(self.backend.parts):
            squares = np.vecdot(curves[n], (clips[n] * clips[n])[:, None])
            own = kind[n, rows]
            ratio = ratios[n] + self._constant[n, rows] + squares[owner, own]
            ratio = settings.scale * part.scale * ratio
            if part.hearsay:
                ratio = np.where(several, np.clip(ratio, -MOST_OF_VOICE, MOST_OF_VOICE), ratio)
            ratio = np.where(own > 0, ratio, settings.unenrolled)
            logits += np.where(present[n, owner], ratio, 0.0)
        return logits

    def logits_of(
        self, rows: np.ndarray, owner: np.ndarray, clips: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Returns the logits [R] float64 of person `rows[i]` [R] int for clip `owner[i]` [R] int.

        They are those that `log_probabilities` makes its answer of, to the bit. `clips` are M
        arrays [Q, D] of `Backend.whiten`.
        """
        ratios = np.empty((len(clips), len(rows)), np.float32)
        narrow = [z.astype(np.float32) for z in clips]
        ends = np.cumsum([0, *(len(block.names) for block in self.blocks)])
        places = np.searchsorted(ends, rows, side="right") - 1
        for place in np.unique(places).tolist():
            pairs = np.flatnonzero(places == place)
            people, asked = rows[pairs] - ends[place], owner[pairs]
            for n, linear in enumerate(self.blocks[place].linear):
                ratios[n, pairs] = np.vecdot(linear[people], narrow[n][asked])
        return self._add_up(ratios, rows, owner, clips)

    def screen(
        self, number: int, z: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns scaled log-likelihood ratios of a part for Q clips, nearly: [Q, N] float32.

        `z` [Q, D] are the coordinates in part `number`. The second array [Q] is more than the most
        by which the ratios, or those of `log_probabilities`, err; the third more than the largest
        ratio. A person who lacks the part has any number.
        """
        curves, kind = self._curves
        constant, largest, norm = self._screened[number]
        exact = np.vecdot(curves[number], (z * z)[:, None])
        squares = (scale * exact).astype(np.float32)
        narrow = (scale * z).astype(np.float32)
        constant = constant if scale == 1 else np.float32(scale) * constant
        ratios = np.empty((len(z), len(self.names)), np.float32)
        ends = np.cumsum([0, *(len(block.names) for block in self.blocks)]).tolist()

        def multiply(piece: tuple[int, int]) -> None:
            place, first = piece
            linear = self.blocks[place].linear[number][first : first + PIECE]
            rows = slice(ends[place] + first, ends[place] + first + len(linear))
            own = np.matmul(narrow, linear.T, out=ratios[:, rows])
            own += constant[rows]
            # Mostly, all people have equally many clips.
            own += squares[:, 1:] if len(curves[number]) == 2 else squares[:, kind[number, rows]]

        # The threads of the library wait for each other, busily: beside other work they take longer
        # than one alone. A thread for each piece does not.
        sizes = (len(block.names) for block in self.blocks)
        pieces = [(n, first) for n, size in enumerate(sizes) for first in range(0, size, PIECE)]
        with _libraries().limit(limits=1, user_api="blas"):
            list(threads().map(multiply, pieces))
        # D products and sums of float32, twice; and some sums and products more.
        product = norm * np.sqrt(np.vecdot(z, z))
        most = product + largest + np.abs(exact).max(axis=1)
        error = 3 * z.shape[1] * ROUNDING * product + 10 * ROUNDING * most
        return ratios, abs(scale) * error, abs(scale) * most

    @functools.cached_property
    def _screened(self) -> list[tuple[np.ndarray, float, float]]:
        """For each part: constants [N] float32, the largest of them, and of norms of `linear`."""
        found = []
        for number in range(len(self.backend.parts)):
            constant = self._constant[number]
            largest = float(np.abs(constant).max(initial=0.0))
            squares = [np.vecdot(one.linear[number], one.linear[number]) for one in self.blocks]
            norm = float(np.sqrt(max((float(x.max(initial=0.0)) for x in squares), default=0.0)))
            found.append((constant.astype(np.float32), largest, 1.001 * norm))
        return found

    @functools.cached_property
    def _row(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def compared(self, name: str, clip: Sequence[np.ndarray]) -> tuple[str, ...]:
        """Returns the parts that the person `name` and a clip, M vectors [D], have both."""
        both = zip(self.backend.parts, self.counts[:, self._row[name]], clip, strict=True)
        return tuple(part.name for part, count, x in both if count and x.any())

    def best(self, log_probabilities: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Returns the k >= 1 most probable identities as (name, log p), best first, ties by name.

        `log_probabilities` [1 + N] come from the method. A clip that lacks all parts has no best.
        """
        logs = log_probabilities[1:]
        k = min(k, len(logs))
        if not k:
            return []
        least = np.partition(logs, len(logs) - k)[-k]
        if least == -np.inf:
            return []
        return self.best_of(np.flatnonzero(logs >= least), logs[logs >= least], k)

    def best_of(self, rows: np.ndarray, logs: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Returns the k most probable of the people in `rows` [R], whose logarithms are `logs`."""
        pairs = zip(rows.tolist(), logs.tolist(), strict=True)
        found = [(self.names[row], log) for row, log in pairs]
        return sorted(found, key=lambda one: (-one[1], one[0]))[:k]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log softmax [..., K] of logits [..., K] float64, whose order changes no bit of it.

    The logarithm of a probability near 1 is computed from the others, as in `logit_ops`.
    """
    if logits.shape[-1] == 1:
        return np.zeros(logits.shape)
    top, others = logits.max(axis=-1, keepdims=True), logits.copy()
    np.put_along_axis(others, logits.argmax(axis=-1, keepdims=True), -np.inf, axis=-1)
    second = others.max(axis=-1, keepdims=True)
    counted = np.rint(np.exp(others - second) * FINE).astype(np.int64)
    rest = second + np.log(counted.sum(axis=-1, keepdims=True) / FINE)
    of_best = -np.logaddexp(0.0, rest - top)
    return np.where(logits == top, of_best, logits - np.logaddexp(top, rest))
