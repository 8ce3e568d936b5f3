"""PLDA on the device: the logits of clips, and settings that do best on clips held out.

A part of the clips is held out, and the others are enrolled. Some identities are strangers: no clip
of theirs is enrolled. If there are several modalities, some identities are not enrolled in one of
them, since enrolled people may lack a modality.

The shares of shrinkage are chosen by MAP and by AUROC, known clips against strangers. The other
settings maximise the probability of the right answers, with half of the weight on strangers, so
that probabilities are calibrated. `stranger`, on which rankings hardly depend, is fitted last, when
every other identity has one enrolled clip: people who are enrolled later often have fewer clips
than the people of the fit. The prior of the settings counts as much as one clip. With few people
only the prior decides, and the user is informed.

Every member's settings are fitted on its own training clips, never on clips that it scores out of
fold. `TaskSpec` and every checkpoint keep them.

Source: calibration by logistic regression, as in Brümmer and du Preez 2006, Application-independent
evaluation of speaker detection; here over all identities and somebody new at once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from threadpoolctl import threadpool_limits

from vidjax.core import ensemble, fusion
from vidjax.core.batch import Array, Frames
from vidjax.core.losses import log_softmax
from vidjax.models import two_covariance
from vidjax.models.base import TrainingClips
from vidjax.models.layers import unit_vectors
from vidjax.models.two_covariance import Enrolled, Settings, Space, stranger_logit
from vidjax.utils.machine import num_cores

# Shares of shrinkage that are tried, the first value of each while the other share is chosen.
SHARES: Mapping[str, tuple[float, ...]] = {
    "within": (0.8, 0.7, 0.9),
    "between": (0.75, 0.5),
}
# The settings that are optimised have a prior: `log(scale)` a mean of log(DIRECTIONS / width), the
# others these means, and all of them these deviations. The means are typical of embeddings: the
# cosines of different people spread as in 46 directions for dlib's 128 numbers, and in 109, 78 and
# 29 for the 512 of faces, heads and voices of the small real dataset. There `unenrolled` is about
# -0.7 and `stranger` -2; made-up people exactly of the model have -1 to -4.
DIRECTIONS = 32
PRIOR = {"scale": 1.0, "unenrolled": -1.0, "stranger": -2.0}
DEVIATIONS = np.array([2.0, 1.0, 1.0])
FEWEST_PEOPLE = 10  # with two clips or more; of fewer, the prior answers alone
FOLDS = 4
HIDDEN = 0.2  # share of the identities that no enrolled clip shows in a modality, of several
STRANGERS = 0.2  # share of the identities that no enrolled clip shows at all
MOST_CLIPS = 4000  # clips that the fit looks at; of more, whole identities are drawn


def unit_mean(frames: Frames) -> Array:
    """Returns the mean frame of every clip [B, D], scaled to length 1; 0 for clips without one."""
    return unit_vectors(fusion.mean_frame(frames).features[:, 0])


def as_arrays(space: Space, enrolled: Enrolled, dtype: jnp.dtype) -> tuple[Space, Enrolled]:
    """Returns both on the device, with floats of a dtype."""

    def cast(x: Array) -> jax.Array:
        floats = np.issubdtype(np.asarray(x).dtype, np.floating)
        return jnp.asarray(x, dtype if floats else None)

    return Space(*map(cast, space)), Enrolled(*map(cast, enrolled))


def log_ratios(space: Space, enrolled: Enrolled, vectors: Array) -> Array:
    """Returns log(p(x | clip of the class) / p(x | clip of somebody new)), [B, K].

    `vectors` are the x, [B, D] float. Columns of classes without a clip are 0, up to rounding.
    """
    z = (vectors - space.mean) @ space.transform
    squares = (z * z) @ enrolled.curve.T  # [B, U]
    return jnp.take(squares, enrolled.kind, axis=1) + z @ enrolled.linear.T + enrolled.constant


def combine(ratios: Array, known: Array, present: Array, settings: Settings) -> Array:
    """Returns the logits of clips, from their log-likelihood ratios in each modality.

    The logit of an identity is a sum over the modalities of the clip: of scale x ratio, or of
    `unenrolled` where no clip of the identity has the modality. The logit of somebody new is
    `stranger_logit`: chance likeness grows with the number of people.

    Args:
      ratios: [M, B, K] float.
      known: [M, K] bool, False for classes without a clip that has the modality.
      present: [M, B] bool, False for clips that lack the modality.
      settings: `scale`, `unenrolled` and `stranger` are read.

    Returns:
      [B, K] float, somebody new in column 0; -inf for identities that are known in no modality.
    """
    filled = jnp.where(known[:, None, :], settings.scale * ratios, settings.unenrolled)
    logits = jnp.sum(jnp.where(present[:, :, None], filled, 0.0), axis=0)
    anywhere = jnp.any(known, axis=0)
    logits = jnp.where(anywhere, logits, -jnp.inf)
    stranger = stranger_logit(settings, jnp.sum(anywhere), jnp)
    return jnp.where(jnp.arange(logits.shape[1]) == 0, stranger, logits)


def training_settings(
    given: Mapping[str, float | tuple[float, ...] | None], clips: TrainingClips
) -> dict[str, float | tuple[float, ...]]:
    """Returns name -> value of the settings that are None in `given`, fitted on the training clips.

    A value is one number, or a tuple of one number of each member if these numbers differ.
    """
    labels, seed = clips.labels, clips.seed
    fixed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fitted = {*Settings._fields} - fixed.keys()
    if not fitted:
        return {}
    shown = labels[clips.used.any(axis=0)]
    tell_of_few(shown, clips.tell)
    people = len(np.unique(shown[shown > 0]))
    fixed = {"centred": two_covariance.centre_share(people), **fixed}
    if fitted == {"centred"}:
        return {"centred": fixed["centred"]}
    rows, member = np.unique(clips.used, axis=0, return_inverse=True)
    wanted = [some_identities(np.where(row, labels, 0), seed) for row in rows]
    read = np.any(wanted, axis=0)
    vectors = {}
    for name, fuse in clips.fusions.items():

        def value_of(frames: Frames, fuse: Callable[[None, Frames], Frames] = fuse) -> Array:
            fused = fuse(None, frames)
            return unit_mean(fused._replace(features=fusion.read(fused.features)))

        vectors[name] = clips.values(name, jax.jit(value_of), read)
    found = [
        fit_settings(
            {name: x[some[read]] for name, x in vectors.items()}, labels[some], fixed, seed
        )
        for some in wanted
    ]
    values = {name: [getattr(one, name) for one in found] for name in fitted}
    return {
        name: x[0] if len({*x}) == 1 else tuple(x[number] for number in member.ravel())
        for name, x in values.items()
    }


def tell_of_few(labels: np.ndarray, tell: Callable[[str], None]) -> None:
    """Tells the user if too few people have two clips to fit settings; labels [N], 0 for none."""
    count = _num_repeated(labels)
    if count < FEWEST_PEOPLE:
        tell(
            f"{count:,} people have two clips or more, too few to fit how sure an answer is: what "
            f"is typical of faces stands in\nprobabilities are rough until {FEWEST_PEOPLE} people "
            "have; the order of answers is not concerned"
        )


def _num_repeated(labels: np.ndarray) -> int:
    """Returns the number of identities (labels above 0) with two clips or more."""
    return int(np.sum(np.unique(labels[labels > 0], return_counts=True)[1] > 1))


def some_identities(labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns [N] bool: all labelled clips, or at most MOST_CLIPS, those of random identities."""
    known = np.unique(labels[labels > 0])
    order = np.random.default_rng(seed).permutation(known)
    counts = np.bincount(labels, minlength=int(labels.max()) + 1)[order]
    enough = max(int(np.searchsorted(np.cumsum(counts), MOST_CLIPS, side="right")), 2)
    return np.isin(labels, order[:enough])


def fit_settings(
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    given: Mapping[str, float],
    seed: int,
    enrolled: Mapping[str, np.ndarray] | None = None,
) -> Settings:
    """Fits settings on held-out clips; those of the prior stay if too few people have two clips.

    Vectors are modality -> [N, D] float of unit length, 0 for clips that lack it. Labels are [N]
    int from 1 on. Settings in `given` stay. `enrolled` are the vectors that clips have when they
    are enrolled, if these differ.
    """
    sides = vectors, enrolled or vectors
    width = float(np.mean([x.shape[1] for x in vectors.values()]))
    values = {name: shares[0] for name, shares in SHARES.items()} | PRIOR
    values |= {"scale": min(1.0, DIRECTIONS / width)}
    values |= {"centred": two_covariance.centre_share(len(np.unique(labels)))} | dict(given)
    if _num_repeated(labels) < FEWEST_PEOPLE:
        return Settings(**values)
    columns = 1 + np.unique(labels, return_inverse=True)[1]  # 1 to the number of identities
    # Matrices of 512 rows gain less from two threads of BLAS than from two folds at a time, and
    # their last digits do not depend on the number of cores then.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_cores()) as pool:
        found = pool.map(lambda k: _hold_out(*sides, columns, k, seed), range(FOLDS))
        folds = [fold for fold in found if fold is not None]
        if not folds:
            return Settings(**values)

        @functools.cache
        def compare(within: float, between: float) -> list[_Ratios]:
            return list(pool.map(lambda fold: _ratios(fold, within, between), folds))

        def quality(values: Mapping[str, float]) -> float:  # mean of MAP and AUROC
            parts, settings = compare(values["within"], values["between"]), Settings(**values)
            return float(np.mean([_quality_of_fold(part, settings) for part in parts]))

        for name, shares in SHARES.items():
            if name not in given:
                tries = [{**values, name: share} for share in shares]
                values = max(tries, key=quality)
        shares = values["within"], values["between"]
        found = _fit(compare(*shares), values, given)._asdict()
        few = pool.map(lambda fold: _ratios(fold._replace(totals=fold.few), *shares), folds)
        others = {name: x for name, x in found.items() if name != "stranger"}
        return _fit([*few], values | others, others | dict(given))


class _Fold(NamedTuple):
    """The enrolled and the held-out clips of one fold."""

    found: Sequence[two_covariance.Covariances]  # of the enrolled clips, for M modalities
    totals: Sequence[tuple[np.ndarray, np.ndarray]]  # their number [K] and sum [K, D], M pairs
    few: Sequence[tuple[np.ndarray, np.ndarray]]  # the same with one clip of every other identity
    queries: Sequence[np.ndarray]  # [M] of [Q, D], centred unit vectors of the held-out clips
    labels: np.ndarray  # [Q] int32, classes of the held-out clips; 0 for strangers


def _hold_out(
    vectors: Mapping[str, np.ndarray],
    films: Mapping[str, np.ndarray],
    labels: np.ndarray,
    number: int,
    seed: int,
) -> _Fold | None:
    """Holds out fold `number` and hides identities; None if nothing is left to compare."""
    rng = np.random.default_rng((seed, number))
    num_identities = int(labels.max())
    held = ensemble.stratified_folds(labels, FOLDS, seed) == number
    stranger = rng.random(1 + num_identities) < STRANGERS
    enrolled = ~held & ~stranger[labels]
    parts: dict[str, list[Any]] = {name: [] for name in ("found", "totals", "few", "queries")}
    for name, x in vectors.items():
        present = np.any(x != 0, axis=1)
        hidden = (rng.random(1 + num_identities) < HIDDEN) & (len(vectors) > 1)
        shown = enrolled & present & ~hidden[labels]
        if not shown.any():
            return None
        share = two_covariance.centre_share(len(np.unique(labels[shown])))
        centre = share * x[shown].mean(axis=0)
        centred, own = (two_covariance.unit_from(centre, side) for side in (x, films[name]))
        sums = two_covariance.make_sums(centred[shown], labels[shown], 1 + num_identities)
        parts["found"].append(two_covariance.covariances(sums))
        rows = np.flatnonzero(shown)
        few = shown & ((labels + number) % 2 == 1)
        few[rows[np.unique(labels[rows], return_index=True)[1]]] = True
        for kind, some in (("totals", shown), ("few", few)):
            pair = two_covariance.make_totals(own[some], labels[some], 1 + num_identities)
            parts[kind].append(pair)
        parts["queries"].append(centred[held])
    known = np.any([count > 0 for count, _ in parts["totals"]], axis=0)
    answers = np.where(known[labels[held]], labels[held], 0).astype(np.int32)
    return _Fold(labels=answers, **parts) if answers.any() and not answers.all() else None


class _Ratios(NamedTuple):
    """Arguments of `combine` for the held-out clips of a fold, and their labels."""

    ratios: Array  # [M, Q, K] float32, log-likelihood ratios
    known: Array  # [M, K] bool, False for classes without an enrolled clip
    present: Array  # [M, Q] bool, False for clips that lack the modality
    labels: Array  # [Q] int32, right columns; 0 for strangers


def _ratios(fold: _Fold, within: float, between: float) -> _Ratios:
    """Returns the log-likelihood ratios of the held-out clips, for given shares of shrinkage."""
    ratios = []
    for found, pair, queries in zip(fold.found, fold.totals, fold.queries, strict=True):
        space = two_covariance.make_space(found, within=within, between=between)
        enrolled = two_covariance.enrol(space, *pair)
        arrays = as_arrays(space, enrolled, jnp.dtype("float32"))
        with jax.default_matmul_precision("highest"):  # as in evaluation
            ratios.append(log_ratios(*arrays, jnp.asarray(queries, jnp.float32)))
    return _Ratios(
        jnp.stack(ratios),
        jnp.asarray(np.stack([count > 0 for count, _ in fold.totals])),
        jnp.asarray(np.stack([np.any(x != 0, axis=1) for x in fold.queries])),
        jnp.asarray(fold.labels),
    )


@jax.jit
def _quality_of_fold(part: _Ratios, settings: Settings) -> Array:
    """Returns [2]: MAP of the known identities, AUROC of best scores of known against strangers."""
    logits = combine(part.ratios, part.known, part.present, settings)
    scores = log_softmax(logits, jnp.ones(logits.shape[1], bool))  # [Q, K]
    # Row i: the scores of all clips for the identity of clip i, and the clips that show it.
    column = scores.T[part.labels]  # [Q, Q]
    above = column >= jnp.diagonal(column)[:, None]
    same = part.labels[:, None] == part.labels
    precision = jnp.sum(above & same, axis=1) / jnp.sum(above, axis=1)
    total = jax.ops.segment_sum(precision, part.labels, logits.shape[1])
    count = jax.ops.segment_sum(jnp.ones_like(precision), part.labels, logits.shape[1])
    shown = (count > 0).at[0].set(False)
    mean_ap = jnp.mean(total / jnp.maximum(count, 1), where=shown)
    best, known = jnp.max(scores[:, 1:], axis=1), part.labels > 0
    wins = (best[:, None] > best) + 0.5 * (best[:, None] == best)
    pairs = known[:, None] & ~known
    return jnp.stack([mean_ap, jnp.sum(wins * pairs) / jnp.maximum(jnp.sum(pairs), 1)])


def _fit(
    parts: Sequence[_Ratios], values: Mapping[str, float], given: Mapping[str, float]
) -> Settings:
    """Fits the settings named in PRIOR by the likelihood of the labels; those in `given` stay."""
    start = np.array([np.log(values["scale"]), values["unenrolled"], values["stranger"]])
    free = np.array([name not in given for name in PRIOR])
    num_clips = sum(len(part.labels) for part in parts)

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        at = jnp.asarray(np.where(free, point, start), jnp.float32)
        found = [_loss(at, part) for part in parts]
        slope = np.mean([np.asarray(slope, np.float64) for _, slope in found], axis=0)
        gap = (point - start) / DEVIATIONS**2 / num_clips
        value = np.mean([float(value) for value, _ in found]) + gap @ (point - start) / 2
        return float(value), np.where(free, slope + gap, 0.0)

    best = scipy.optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-3})
    scale, unenrolled, stranger = np.where(free, best.x, start).tolist()
    fitted = {"scale": float(np.exp(scale)), "unenrolled": unenrolled, "stranger": stranger}
    return Settings(**{**values, **fitted, **given})


@jax.jit
@jax.value_and_grad
def _loss(point: Array, part: _Ratios) -> Array:
    """Returns the mean cross-entropy at `point`, [3]: log(scale), `unenrolled`, `stranger`."""
    settings = Settings(0.0, 0.0, jnp.exp(point[0]), point[1], point[2], 1.0)
    logs = jax.nn.log_softmax(combine(part.ratios, part.known, part.present, settings))
    right = jnp.take_along_axis(logs, part.labels[:, None], axis=1)[:, 0]
    known = part.labels > 0
    return -(jnp.mean(right, where=known) + jnp.mean(right, where=~known)) / 2
