"""The back end of a gallery: the coordinates of vectors, and the search among people.

A clip has one vector in each of M parts: the modalities of a PLDA run, or the embedding of a net.
`fit` keeps sums over the vectors of labelled clips, and no vector.

All people are compared with a clip by products in float32. The most probable people are compared
once more in float64. So answers are equal to 1e-6 in any order and number of people and clips. The
formulas are those of `models.plda_fit.combine` and `losses.log_softmax`.
"""

import contextlib
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from vidjax.errors import UserError
from vidjax.machine import num_cores
from vidjax.models import two_covariance
from vidjax.models.two_covariance import Settings, Space, blank_space, coefficients
from vidjax.run.terminal import say

if TYPE_CHECKING:
    from vidjax.extract.cards import BackEnd

QUERIES = 64  # clips of a matrix product
MOST_ROWS = 4096  # people of the largest block
FEW_ROWS = 512  # people of a block that a change joins with another one
MOST_GROUPED = 8000  # clips, of which all pairs are compared
# One voice in ten that is heard while a face is seen is of somebody else: a choice, not a figure.
MOST_OF_VOICE = np.log(9)
FINE = 16  # people of a clip, the most probable ones, whose logits are computed in float64
ROUNDED = 1e-3  # more than logits of float32 are off
MOST_FINE = 4096  # people as probable as the k-th one, of whom there are more only if no part tells
PEAK = 32  # people of whom one is looked at, to find how probable the k-th one is


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
        make = two_covariance.distance_coefficients if self.by_distance else coefficients
        return make(self.space, count.astype(np.float64), sums)


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


class Nearest(NamedTuple):
    """Log probabilities of a clip: of somebody `new`, and of the `best` people as (name, log p).

    The most probable person is first; people of equal probability are in the order of names.
    `compared` are the parts that the first person and the clip have both.
    """

    new: float
    best: list[tuple[str, float]]
    compared: tuple[str, ...] = ()


def join(blocks: Sequence[People]) -> People:
    """Joins one or more blocks of people into one."""
    names, linear, constant, count = zip(*blocks, strict=True)
    return People(
        tuple(itertools.chain.from_iterable(names)),
        tuple(map(np.concatenate, zip(*linear, strict=True))),
        np.concatenate(constant, axis=1),
        np.concatenate(count, axis=1),
    )


class Backend(NamedTuple):
    """Coordinates of M parts, and the settings of PLDA."""

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

    def whiten(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the coordinates z of Q clips: M arrays [Q, D] float64, NaN for a missing part.

        `parts` are the vectors: M arrays [Q, D] float32, 0 where a clip lacks the part.
        """
        found = []
        for part, x in zip(self.parts, parts, strict=True):
            with _one_thread():
                z = (unit(part, x) - part.space.mean) @ np.asarray(part.space.transform)
            z[~np.any(x != 0, axis=1)] = np.nan
            found.append(z)
        return found

    def enrol(self, names: Sequence[str], vectors: np.ndarray, owner: np.ndarray) -> People:
        """Returns the people `names`, from sums over their clips, added in order.

        `vectors` are [N, sum of D] float32, 0 where a clip lacks a part; `owner` is [N] int, the
        place in `names` of the person whom a clip shows.
        """
        linear, constants, counts = [], [], []
        for part, x in zip(self.parts, self.split(vectors), strict=True):
            present = np.any(x != 0, axis=1)
            count = np.bincount(owner[present], minlength=len(names))
            total = np.zeros((len(names), x.shape[1]))
            np.add.at(total, owner, unit(part, x))
            shifted = total - count[:, None] * part.space.mean
            with _one_thread():
                sums = shifted @ np.asarray(part.space.transform)
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
        logs = np.array(list(index.search(parts))).reshape(len(names), 1 + len(names))
        odds = logs[:, 1:] - logs[:, :1]
        return (odds + odds.T) / 2

    def numbers(self) -> np.ndarray:
        """Returns the arrays of all parts, D + 3 rows [D] each, flattened and joined, float64."""
        rows = [np.vstack([part.centre, *part.space]).ravel() for part in self.parts]
        return np.concatenate(rows).astype("<f8")


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


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores())


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _one_thread() -> contextlib.AbstractContextManager[object]:
    """Keeps a product of matrices to one thread: several wait for each other, busily."""
    return _libraries().limit(limits=1, user_api="blas")


class _Asked(NamedTuple):
    """Q clips as people are compared with them.

    Attributes:
      coordinates: M arrays [Q, D] float64, scaled; 0 where a clip lacks the part.
      squares: M arrays [Q, U] float64, scaled sums of squares by `Index.curves`.
      missing: [M, Q] bool, True where a clip lacks the part.
    """

    coordinates: list[np.ndarray]
    squares: list[np.ndarray]
    missing: np.ndarray


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
    def curves(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each part, coefficients of z^2, [U, D], and each identity's row in them, [N] int32.

        Identities with equal numbers of clips share a row.
        """
        found = []
        for part, counts in zip(self.backend.parts, self.counts, strict=True):
            values, kind = np.unique(counts, return_inverse=True)
            none = np.zeros((len(values), len(part.centre)))
            curve = np.asarray(part.coefficients(values, none).curve)
            found.append((curve, kind.astype(np.int32)))
        return found

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
        """Yields for each of Q clips the logarithms of 1 + N probabilities, [1 + N] float64.

        Entry 0 is somebody new, entry 1 + r the identity `names[r]`; the probabilities add up to 1.
        `parts` are M arrays [Q, D], 0 where a clip lacks the part. A clip that lacks all parts
        shows somebody new.
        """
        for new, logits, rows, fine in self._compared(parts, FINE):
            wide = np.empty(1 + len(logits))
            wide[0], wide[1:] = new, logits
            wide[1 + rows] = fine
            yield log_softmax(wide)

    def nearest(self, parts: Sequence[np.ndarray], k: int) -> Iterator[Nearest]:
        """Yields the k >= 1 most probable people of Q clips; `parts` as in `search`.

        A clip that lacks all parts has no best people.
        """
        for place, (new, logits, rows, fine) in enumerate(self._compared(parts, k)):
            top = max(new, fine.max(initial=-np.inf))
            weights = np.subtract(logits, np.float32(top), out=logits)
            np.exp(weights, out=weights)
            weights[rows] = 0
            rest = weights.sum(dtype=np.float64)
            others = top + np.log(rest) if rest else -np.inf
            logs = log_softmax(np.array([new, *fine, others]))
            found = zip(logs[1:-1].tolist(), rows.tolist(), strict=True)
            some = [(-log, self.names[row], row) for log, row in found if log > -np.inf]
            some = sorted(some)[:k]
            best = [(name, -log) for log, name, _ in some]
            common = self._common(parts, place, some[0][2]) if some else ()
            yield Nearest(float(logs[0]), best, common)

    def _compared(
        self, parts: Sequence[np.ndarray], k: int
    ) -> Iterator[tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
        """Yields for each clip the logits of somebody new and of all people, [N] float32.

        After these come the rows of the most probable people, k or more, and their logits, [R]
        float64.
        """
        new = float(two_covariance.stranger_logit(self.backend.settings, len(self.names)))
        for at in range(0, len(parts[0]), QUERIES):
            asked = self._asked([x[at : at + QUERIES] for x in parts])
            logits = self._logits(asked)
            logits[asked.missing.all(axis=0)] = -np.inf
            best = [self._best_rows(row, max(k, FINE)) for row in logits]
            owner = np.repeat(np.arange(len(best)), [len(rows) for rows in best])
            fine = self._logits_of(np.concatenate(best), owner, asked)
            ends = np.cumsum([len(rows) for rows in best])[:-1]
            for row, rows, own in zip(logits, best, np.split(fine, ends), strict=True):
                yield new, row, rows, own

    def _asked(self, parts: Sequence[np.ndarray]) -> _Asked:
        """Returns clips as people are compared with them; `parts` are M arrays [Q, D]."""
        coordinates, squares = [], []
        whitened = self.backend.whiten(parts)
        for part, z, (curve, _) in zip(self.backend.parts, whitened, self.curves, strict=True):
            scale = self.backend.settings.scale * part.scale
            coordinates.append(scale * np.nan_to_num(z))
            squares.append(scale * np.nan_to_num(z) ** 2 @ curve.T)
        return _Asked(coordinates, squares, np.array([~x.any(axis=1) for x in parts]))

    def _logits(self, asked: _Asked) -> np.ndarray:
        """Returns the logits of all people for Q clips, [Q, N] float32."""
        narrow = [x.astype(np.float32) for x in asked.coordinates]
        owner = np.arange(len(narrow[0]))[:, None]
        logits = np.empty((len(owner), len(self.names)), np.float32)

        def score(place: int) -> None:
            rows = slice(self._ends[place], self._ends[place + 1])
            linear = self.blocks[place].linear
            first = np.matmul(narrow[0], linear[0].T, out=logits[:, rows])
            others = [x @ own.T for x, own in zip(narrow[1:], linear[1:], strict=True)]
            self._add_up([first, *others], rows, owner, asked)

        with _one_thread():
            list(_threads().map(score, range(len(self.blocks))))
        return logits

    def _logits_of(self, rows: np.ndarray, owner: np.ndarray, asked: _Asked) -> np.ndarray:
        """Returns the logits [R] float64 of the people in `rows` [R] for the clips `owner` [R]."""
        places = np.searchsorted(self._ends, rows, side="right") - 1
        products = [np.zeros(len(rows)) for _ in asked.coordinates]
        for place in np.unique(places).tolist():
            pairs = np.flatnonzero(places == place)
            people = rows[pairs] - self._ends[place]
            for product, x, own in zip(
                products, asked.coordinates, self.blocks[place].linear, strict=True
            ):
                product[pairs] = np.vecdot(own[people], x[owner[pairs]])
        return self._add_up(products, rows, owner, asked)

    def _add_up(
        self,
        products: Sequence[np.ndarray],
        rows: slice | np.ndarray,
        owner: np.ndarray,
        asked: _Asked,
    ) -> np.ndarray:
        """Returns logits, made of products of clips with the coefficients of people, M arrays.

        The products [Q, R] of all of Q clips have `owner` [Q, 1]; those of pairs, [R], `owner` [R].
        `rows` are the places of the R people. The logits overwrite the first of the products.
        """
        settings = self.backend.settings
        several = (np.sum(~asked.missing, axis=0) > 1)[owner]
        for number, (part, ratios) in enumerate(zip(self.backend.parts, products, strict=True)):
            squares = asked.squares[number].astype(ratios.dtype)
            scale = settings.scale * part.scale
            ratios += (scale * self._constant[number, rows]).astype(ratios.dtype)
            # Often all people have equally many clips.
            ratios += squares[owner, 0 if squares.shape[1] == 1 else self.curves[number][1][rows]]
            if part.hearsay:
                np.clip(ratios, -MOST_OF_VOICE, MOST_OF_VOICE, out=ratios, where=several)
            if not (known := self.counts[number, rows] > 0).all():
                np.copyto(ratios, settings.unenrolled, where=~known)
            if asked.missing[number].any():
                np.copyto(ratios, 0, where=asked.missing[number][owner])
        total = products[0]
        for ratios in products[1:]:
            total += ratios
        return total

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The place of the first person of every block, and the number of people."""
        return np.cumsum([0, *(len(block.names) for block in self.blocks)]).tolist()

    def _best_rows(self, logits: np.ndarray, k: int) -> np.ndarray:
        """Returns the sorted rows of the k highest of N logits, and of all that may be as high."""
        k, count = min(k, len(logits)), len(logits) // PEAK
        if not k or logits[0] == -np.inf:  # then all are
            return np.zeros(0, int)
        peaks = logits[: count * PEAK].reshape(PEAK, count).max(axis=0) if k <= count else logits
        rows = np.flatnonzero(logits >= np.partition(peaks, -k)[-k] - ROUNDED)
        if len(rows) > MOST_FINE:
            rows = np.sort(sorted(rows, key=lambda row: (-logits[row], self.names[row]))[:k])
        return rows

    def _common(self, parts: Sequence[np.ndarray], place: int, row: int) -> tuple[str, ...]:
        """Returns the parts that the person of a row and the clip at a place have both."""
        both = zip(self.backend.widths, self.counts[:, row], parts, strict=True)
        return tuple(name for name, count, x in both if count and x[place].any())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log softmax [K] of logits [K] float64.

    The logarithm of a probability near 1 is computed from the others, as in `losses.log_softmax`.
    """
    best = logits.argmax()
    shifted = logits - logits[best]
    weights = np.exp(shifted)
    weights[best] = 0
    return shifted - np.log1p(weights.sum())
