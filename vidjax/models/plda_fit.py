"""Computes logits by PLDA, and fits the settings of PLDA, see `two_covariance.Settings`.

The fit imitates later use in FOLDS folds of the training clips. Some clips are held out and scored.
The other clips are enrolled, except all clips of random people (strangers). If there are several
modalities, random people are enrolled without some of them. The fit has four steps:

1. Choose the settings `within` and `between` by MAP plus AUROC (known people against strangers).
2. Fit the settings `scale`, `unenrolled` and `stranger`: maximise the probability of the right
   answers, with half of the weight on strangers, and a Gaussian prior.
3. Fit the setting `stranger` again, with only one enrolled clip for half of the people.
4. If there are few people, or for a gallery: fit the setting `stranger` to people whose clips were
   not used to estimate the covariances, and take a mean of the values of steps 3 and 4.

If too few people have two clips, the settings keep typical values, and the user gets a message.
The settings of a net of an ensemble are fitted on the training clips of this net. `TaskSpec` and
every checkpoint store the settings.

Source: calibration by logistic regression, as in Brümmer and du Preez 2006, Application-independent
evaluation of speaker detection; here over all identities and a stranger at once.
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
from vidjax.core.losses import log_softmax, softmax_cross_entropy
from vidjax.models import two_covariance
from vidjax.models.base import TrainingClips
from vidjax.models.layers import unit_vectors
from vidjax.models.two_covariance import Enrolled, Settings, Space, compute_stranger_logit
from vidjax.utils.machine import num_cores

# Shares of shrinkage that are tried. While `within` is chosen, `between` has its first value.
SHARES: Mapping[str, tuple[float, ...]] = {"within": (0.8, 0.7, 0.9), "between": (0.75, 0.5)}
# The prior of the optimised settings is Gaussian. Its means are log(DIRECTIONS / width) for
# log(scale), and PRIOR for the other settings; its standard deviations are DEVIATIONS. The means
# are typical of embeddings. The cosines of different people spread as in 46 dimensions for the 128
# numbers of dlib, and as in 109, 78 and 29 for the 512 numbers of faces, heads and voices of the
# small real dataset. There `unenrolled` is about -0.7 and `stranger` -2.
DIRECTIONS = two_covariance.DIRECTIONS
PRIOR = {"scale": 1.0, "unenrolled": -1.0, "stranger": -2.0}
DEVIATIONS = np.array([2.0, 1.0, 1.0])
FEWEST_PEOPLE = 10  # with two clips or more; if there are fewer, only the prior decides
FEW_PEOPLE = 80  # with two clips or more; if there are fewer, covariances are not exact
FOLDS = 4
HIDDEN = 0.2  # share of identities that are not enrolled in a modality, if there are several
STRANGERS = 0.2  # share of identities that are not enrolled at all
NEVER = -1e6  # log-likelihood ratio of a person whom a clip certainly does not show
MAX_FITTED_CLIPS = 4000  # clips for the fit; if there are more, identities are drawn
MAX_CLIPS_OF_A_PERSON = MAX_FITTED_CLIPS // FEWEST_PEOPLE  # if identities are drawn


def unit_mean(frames: Frames) -> Array:
    """Computes the mean features of clips, scaled to length 1, [B, D], or 0 without frames."""
    return unit_vectors(fusion.mean_frame(frames).features[:, 0])


def log_ratios(space: Space, enrolled: Enrolled, vectors: Array) -> Array:
    """Computes the log-likelihood ratio of each of K classes against a stranger, [B, K].

    `vectors` [B, D] float are the centred vectors of clips. If a class has no enrolled clip, its
    ratios are about 0.
    """
    z = (vectors - space.mean) @ space.transform
    squares = (z * z) @ enrolled.curve.T  # [B, U]
    return jnp.take(squares, enrolled.kind, axis=1) + z @ enrolled.linear.T + enrolled.constant


def combine_modalities(ratios: Array, known: Array, present: Array, settings: Settings) -> Array:
    """Computes the logits of clips from their log-likelihood ratios in each modality.

    The logit of an identity is a sum over the modalities of the clip. A term is `settings.scale` x
    ratio, or `settings.unenrolled` if no clip of the identity has the modality. The logit of a
    stranger, see `compute_stranger_logit`, is the same for all clips.

    Args:
      ratios: [M, B, K] float, for M modalities, B clips and K classes.
      known: [M, K] bool, False for classes without a clip that has the modality.
      present: [M, B] bool, False for clips that lack the modality.

    Returns:
      [B, K] float. Column 0 is a stranger. Identities without any enrolled clip have -inf.
    """
    filled = jnp.where(known[:, None, :], settings.scale * ratios, settings.unenrolled)
    logits = jnp.sum(jnp.where(present[:, :, None], filled, 0.0), axis=0)
    anywhere = jnp.any(known, axis=0)
    logits = jnp.where(anywhere, logits, -jnp.inf)
    stranger = compute_stranger_logit(settings, jnp.sum(anywhere), jnp)
    return jnp.where(jnp.arange(logits.shape[1]) == 0, stranger, logits)


def fit_member_settings(
    given: Mapping[str, float | tuple[float, ...] | None], clips: TrainingClips
) -> dict[str, float | tuple[float, ...]]:
    """Fits the settings of PLDA that are None in `given`, for each member of an ensemble.

    Returns name -> value of the fitted settings. A value is a number if it is the same for all
    members, otherwise a tuple with a number for each member.
    """
    labels, seed = clips.labels, clips.seed
    fixed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fitted = {*Settings._fields} - fixed.keys()
    if not fitted:
        return {}
    report_few_people(labels[clips.used.any(axis=0)], clips.print_message)
    # All members have the same share, also if `ensemble.only` trains some of them.
    people = len(np.unique(labels[labels > 0]))
    fixed = {"centred": two_covariance.centre_share(people), **fixed}
    if fitted == {"centred"}:
        return {"centred": fixed["centred"]}
    rows, member = np.unique(clips.used, axis=0, return_inverse=True)
    wanted = [draw_identities(np.where(row, labels, 0), seed) for row in rows]
    read = np.any(wanted, axis=0)
    vectors = {}
    for name, fuse in clips.fusions.items():

        def value_of(frames: Frames, fuse: Callable[[None, Frames], Frames] = fuse) -> Array:
            fused = fuse(None, frames)
            return unit_mean(fused._replace(features=fusion.read(fused.features)))

        vectors[name] = clips.values(name, jax.jit(value_of), read)
    member_settings = [
        fit_settings(
            {name: x[chosen[read]] for name, x in vectors.items()}, labels[chosen], fixed, seed
        )
        for chosen in wanted
    ]
    values = {name: [getattr(x, name) for x in member_settings] for name in fitted}
    return {
        name: x[0] if len({*x}) == 1 else tuple(x[number] for number in member.ravel())
        for name, x in values.items()
    }


def report_few_people(labels: np.ndarray, print_message: Callable[[str], None]) -> None:
    """Prints a message if fewer than FEWEST_PEOPLE people have two clips or more.

    Then probabilities cannot be calibrated. `labels` [N] int are the people in the training clips,
    1 or more, or 0 for distractors (clips of unknown people).
    """
    count = _count_repeated(labels)
    if count < FEWEST_PEOPLE:
        print_message(
            f"people with two clips or more: {count:,}, too few to calibrate probabilities. "
            "Default values for faces are used\n"
            f"probabilities are rough until {FEWEST_PEOPLE} people have two clips; the order of "
            "answers is not affected"
        )


def _count_repeated(labels: np.ndarray) -> int:
    """Returns the number of identities (labels above 0) with two clips or more."""
    return int(np.sum(np.unique(labels[labels > 0], return_counts=True)[1] > 1))


def draw_identities(labels: np.ndarray, seed: int) -> np.ndarray:
    """Chooses clips of known people, on which the settings of PLDA are fitted, [N] bool.

    `labels` [N] are the people, or 0 for unknown people. If more than MAX_FITTED_CLIPS clips show
    known people, draws as many random people as fit into this number, with at most
    MAX_CLIPS_OF_A_PERSON clips of each person. The first FEWEST_PEOPLE people have several clips.
    """
    wanted = labels > 0
    if np.sum(wanted) <= MAX_FITTED_CLIPS:
        return wanted
    rng = np.random.default_rng(seed)
    known, counts = np.unique(labels[wanted], return_counts=True)
    order = rng.permutation(len(known))
    first = np.flatnonzero(counts[order] > 1)[:FEWEST_PEOPLE]
    order = np.concatenate([order[first], np.delete(order, first)])
    totals = np.cumsum(np.minimum(counts[order], MAX_CLIPS_OF_A_PERSON))
    enough = np.searchsorted(totals, MAX_FITTED_CLIPS, side="right")
    rows = rng.permutation(np.flatnonzero(np.isin(labels, known[order[:enough]])))
    rows = rows[np.argsort(labels[rows], kind="stable")]
    place = np.arange(len(rows)) - np.searchsorted(labels[rows], labels[rows])  # in the identity
    chosen = np.zeros(len(labels), bool)
    chosen[rows[place < MAX_CLIPS_OF_A_PERSON]] = True
    return chosen


def fit_settings(
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    given: Mapping[str, float],
    seed: int,
    enrolled: Mapping[str, np.ndarray] | None = None,
    *,
    least_within: float = 0.0,
) -> Settings:
    """Fits the settings of PLDA, except the settings in `given`.

    If fewer than FEWEST_PEOPLE people have two clips, nothing is fitted, and the settings have
    typical values.

    Args:
      vectors: modality -> [N, D] float of unit length, 0 for clips that lack the modality.
      labels: [N] int, a number above 0 for the person in each clip.
      given: name -> value of settings that are not fitted.
      enrolled: other vectors of the same clips, which replace `vectors` where a clip is enrolled.
      least_within: the lower limit of the covariance within classes, see
        `two_covariance.covariances`. It is above 0 only for a gallery.
    """
    sides = vectors, enrolled or vectors
    width = float(np.mean([x.shape[1] for x in vectors.values()]))
    values = {name: shares[0] for name, shares in SHARES.items()} | PRIOR
    values |= {"scale": min(1.0, DIRECTIONS / width)}
    values |= {"centred": two_covariance.centre_share(len(np.unique(labels)))} | dict(given)
    if _count_repeated(labels) < FEWEST_PEOPLE:
        return Settings(**values)
    columns = 1 + np.unique(labels, return_inverse=True)[1]  # 1 to the number of identities
    # For matrices of 512 rows, two folds at a time are faster than two threads of BLAS, and the
    # last digits then do not depend on the number of cores.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_cores()) as pool:

        def make_folds(*, later: bool) -> list[_Fold]:
            kind = (columns, seed, least_within, later)
            made = pool.map(lambda k: _hold_out(*sides, k, *kind), range(FOLDS))
            return [fold for fold in made if fold is not None]

        folds = make_folds(later=False)
        if not folds:
            return Settings(**values)

        @functools.cache
        def compare(within: float, between: float) -> list[_Ratios]:
            return list(pool.map(lambda fold: _compute_ratios(fold, within, between), folds))

        def quality(values: Mapping[str, float]) -> float:  # mean of MAP and AUROC
            parts, settings = compare(values["within"], values["between"]), Settings(**values)
            return float(np.mean([_score_fold(part, settings) for part in parts]))

        for name, shares in SHARES.items():
            if name not in given:
                tries = [{**values, name: share} for share in shares]
                values = max(tries, key=quality)
        shares = values["within"], values["between"]
        fitted = _fit(compare(*shares), values, given)
        if least_within and fitted.scale > 1 and "scale" not in given:  # few people are too easy
            given = {**given, "scale": 1.0}
            fitted = _fit(compare(*shares), values | given, given)
        others = {name: x for name, x in fitted._asdict().items() if name != "stranger"}
        others |= given
        few = (fold._replace(totals=fold.few) for fold in folds)
        ratios = [*pool.map(lambda fold: _compute_ratios(fold, *shares), few)]
        settings = _fit(ratios, values | others, others)
        is_exact = _count_repeated(labels) >= FEW_PEOPLE and not least_within
        later = [] if is_exact or "stranger" in given else make_folds(later=True)
        ratios = [*pool.map(lambda fold: _add_strangers(_compute_ratios(fold, *shares)), later)]
        return _refit_stranger(ratios, settings, width) if ratios else settings


def _refit_stranger(ratios: Sequence["_Ratios"], settings: Settings, width: float) -> Settings:
    """Returns `settings` with a value of `stranger` that is also fitted to `ratios`.

    `ratios` are from folds with `later=True`, see `_hold_out`. `width` is the number of dimensions
    of the vectors, a mean over the modalities.
    """
    # The fitted value is right if ratios are scaled down as for typical embeddings. If the scale is
    # 1, only a fit to `ratios` is right. Then exact ratios need no offset, so the prior is 0.
    typical = np.log(min(DIRECTIONS / width, 1.0)) or -np.inf
    share = float(np.clip(np.log(settings.scale) / typical, 0, 1))
    others = {name: x for name, x in settings._asdict().items() if name != "stranger"}
    second = _fit(ratios, {"stranger": share * PRIOR["stranger"], **others}, others).stranger
    return settings._replace(stranger=share * settings.stranger + (1 - share) * second)


class _Fold(NamedTuple):
    """The clips of a fold: enrolled clips, and held-out clips, which are scored for the fit."""

    covariances: Sequence[two_covariance.Covariances]  # for M modalities
    totals: Sequence[tuple[np.ndarray, np.ndarray]]  # count [K] and sum [K, D], for M modalities
    few: Sequence[tuple[np.ndarray, np.ndarray]]  # the same, but half of the people have one clip
    queries: Sequence[np.ndarray]  # for M modalities [Q, D], centred vectors of held-out clips
    labels: np.ndarray  # [Q] int32, classes of the held-out clips; 0 for strangers


def _hold_out(
    vectors: Mapping[str, np.ndarray],
    enrolled_vectors: Mapping[str, np.ndarray],
    number: int,
    labels: np.ndarray,
    seed: int,
    least_within: float,
    later: bool,
) -> _Fold | None:
    """Makes fold `number` of the fit: estimates covariances, and chooses enrolled clips.

        later=False:  A part of the clips is held out. The other clips are enrolled, except clips of
                      random people (strangers). Covariances are those of the enrolled clips.
        later=True:   A part of the people is enrolled with some clips. Their other clips are held
                      out. Covariances are those of all other people. There are no strangers.

    Both `vectors` and `enrolled_vectors` are modality -> [N, D], for the same N clips. An enrolled
    clip is represented by `enrolled_vectors`. For `least_within`, see `fit_settings`. Returns None
    if the fold is of no use, for example if no held-out clip shows an enrolled person.
    """
    rng = np.random.default_rng((seed, number))
    num_identities = int(labels.max())
    held_out = ensemble.assign_folds(labels, FOLDS, seed) == number
    stranger = rng.random(1 + num_identities) < STRANGERS
    enrolled = ~held_out & ~stranger[labels]
    outside = np.zeros(len(labels), bool)  # the people who are enrolled later
    if later:
        outside = (rng.permutation(1 + num_identities) % FOLDS == number)[labels]
        enrolled = outside & _choose_first_clips(labels)
        held_out = outside & ~enrolled
    parts: dict[str, list[Any]] = {n: [] for n in ("covariances", "totals", "few", "queries")}
    for name, x in vectors.items():
        present = np.any(x != 0, axis=1)
        hidden = (rng.random(1 + num_identities) < HIDDEN) & (len(vectors) > 1)
        visible = enrolled & present & ~hidden[labels]
        fitted = present & ~outside if later else visible
        if not (visible.any() and fitted.any()):
            continue
        share = two_covariance.centre_share(len(np.unique(labels[fitted])))
        centre = share * x[fitted].mean(axis=0)
        centred = two_covariance.unit_vectors_from(centre, x)
        to_enrol = two_covariance.unit_vectors_from(centre, enrolled_vectors[name])
        sums = two_covariance.make_sums(centred[fitted], labels[fitted], 1 + num_identities)
        covariances = two_covariance.covariances(sums, least_within)
        parts["covariances"].append(covariances)
        rows = np.flatnonzero(visible)
        few = visible & ((labels + number) % 2 == 1)
        few[rows[np.unique(labels[rows], return_index=True)[1]]] = True
        for kind, chosen in (("totals", visible), ("few", few)):
            count, total = two_covariance.make_totals(
                to_enrol[chosen], labels[chosen], 1 + num_identities
            )
            if least_within:
                within = float(np.sum(covariances.within))
                effective = two_covariance.count_independent(within, count, total)
                total *= (effective / np.maximum(count, 1))[:, None]
                count = effective.astype(float)
            parts[kind].append((count, total))
        parts["queries"].append(centred[held_out])
    if not parts["totals"]:
        return None
    known = np.any([count > 0 for count, _ in parts["totals"]], axis=0)
    answers = np.where(known[labels[held_out]], labels[held_out], 0).astype(np.int32)
    has_both = answers.any() and (later or not answers.all())
    return _Fold(labels=answers, **parts) if has_both else None


def _choose_first_clips(labels: np.ndarray) -> np.ndarray:
    """Returns which clips are enrolled, [N] bool, given the people `labels` [N] int.

    A person with an odd label enrols the first clip. A person with an even label enrols all clips
    except the last. A person with one clip always enrols it. So the fit sees people with a single
    enrolled clip and people with many.
    """
    order = np.argsort(labels, kind="stable")
    place, count = np.empty(len(labels), int), np.bincount(labels)[labels]
    place[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return (place == 0) | ((labels % 2 == 0) & (place < count - 1))


@jax.jit
def _add_strangers(part: "_Ratios") -> "_Ratios":
    """Returns `part` with a copy of each held-out clip, which counts as the clip of a stranger.

    In the copies, the log-likelihood ratio of the right person is NEVER, a very low value, as if
    the person were not enrolled.
    """
    labels = part.labels[:, None]
    own = (labels > 0) & (labels == jnp.arange(part.ratios.shape[2]))
    return _Ratios(
        jnp.concatenate([part.ratios, jnp.where(own, NEVER, part.ratios)], axis=1),
        part.known,
        jnp.concatenate([part.present, part.present], axis=1),
        jnp.concatenate([part.labels, jnp.zeros_like(part.labels)]),
    )


class _Ratios(NamedTuple):
    """The log-likelihood ratios of Q held-out clips in M modalities, and the right answers."""

    ratios: Array  # [M, Q, K] float32, log-likelihood ratios
    known: Array  # [M, K] bool, False for classes without an enrolled clip
    present: Array  # [M, Q] bool, False for clips that lack the modality
    labels: Array  # [Q] int32, right columns; 0 for strangers


def _compute_ratios(fold: _Fold, within: float, between: float) -> _Ratios:
    """Computes the log-likelihood ratios between the held-out clips of a fold and the classes.

    `two_covariance.make_space` shrinks the covariances by the shares `within` and `between`.
    """
    parts = []
    for fitted, pair, queries in zip(fold.covariances, fold.totals, fold.queries, strict=True):
        space = two_covariance.make_space(fitted, within=within, between=between)
        if fitted.shared:
            queries = _move_to_new_days(space, queries, fitted.shared)
        parts.append((space, two_covariance.enrol(space, *pair), queries))
    with jax.default_matmul_precision("highest"):  # as in evaluation
        ratios = _stack_ratios(parts)
    known = np.stack([count > 0 for count, _ in fold.totals])
    present = np.stack([np.any(x != 0, axis=1) for x in fold.queries])
    return jax.device_put(_Ratios(ratios, known, present, fold.labels))


@jax.jit  # without jit, every operation is a program
def _stack_ratios(parts: Sequence[tuple[Space, Enrolled, Array]]) -> Array:
    """Computes `log_ratios(*part)` for each of M modalities, and stacks the results: [M, Q, K]."""
    return jnp.stack([log_ratios(*part) for part in parts])


def _move_to_new_days(space: Space, vectors: np.ndarray, shared: float) -> np.ndarray:
    """Changes the vectors of held-out clips as if the clips were from other days.

    A part of the noise is common to all clips of a person from one day. `shared`, from 0 to 1, is
    the share of the common part in the variance of the noise. In the held-out clips `vectors`
    [Q, D], the common part is replaced by other noise. Returns [Q, D].
    """
    # The coordinates z = y + g + e of a clip have the variances psi, r and 1 - r. The coordinates
    # of other clips of the person contain y + g. We need y + g' + e'. The linear predictor of y
    # from y + g is a = psi / (psi + r) times it, so a z + noise has the right covariance, psi, with
    # other clips, and the right variance, psi + 1.
    keep = space.ratio / (space.ratio + shared)
    noise = np.random.default_rng(0).normal(size=vectors.shape)
    z = keep * ((vectors - space.mean) @ space.transform)
    z += np.sqrt((1 + space.ratio) * (1 - keep**2)) * noise
    moved = z @ np.linalg.inv(space.transform) + space.mean
    return np.where(np.any(vectors != 0, axis=1, keepdims=True), moved, 0.0)


@jax.jit
def _score_fold(part: _Ratios, settings: Settings) -> Array:
    """Computes the MAP of known identities, and the AUROC of known clips against strangers, [2]."""
    logits = combine_modalities(part.ratios, part.known, part.present, settings)
    scores = log_softmax(logits, jnp.ones(logits.shape[1], bool))  # [Q, K]
    # Row i has the scores of all clips for the identity of clip i. `same` marks its clips.
    column = scores.T[part.labels]  # [Q, Q]
    above = column >= jnp.diagonal(column)[:, None]
    same = part.labels[:, None] == part.labels
    precision = jnp.sum(above & same, axis=1) / jnp.sum(above, axis=1)
    total = jax.ops.segment_sum(precision, part.labels, logits.shape[1])
    count = jax.ops.segment_sum(jnp.ones_like(precision), part.labels, logits.shape[1])
    has_clips = (count > 0).at[0].set(False)
    mean_ap = jnp.mean(total / jnp.maximum(count, 1), where=has_clips)
    best, known = jnp.max(scores[:, 1:], axis=1), part.labels > 0
    wins = (best[:, None] > best) + 0.5 * (best[:, None] == best)
    pairs = known[:, None] & ~known
    return jnp.stack([mean_ap, jnp.sum(wins * pairs) / jnp.maximum(jnp.sum(pairs), 1)])


def _fit(
    parts: Sequence[_Ratios], values: Mapping[str, float], given: Mapping[str, float]
) -> Settings:
    """Fits `scale`, `unenrolled` and `stranger` (see `Settings`) by maximum a posteriori.

    `parts` are the log-likelihood ratios of each fold. `values`, name -> value of all settings, are
    the start of the fit and the mean of the prior. Settings in `given` are not fitted.
    """
    start = np.array([np.log(values["scale"]), values["unenrolled"], values["stranger"]])
    free = np.array([name not in given for name in PRIOR])
    num_clips = sum(len(part.labels) for part in parts)

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        at = np.where(free, point, start).astype(np.float32)
        results = [_loss(at, part) for part in parts]
        slope = np.mean([np.asarray(slope, np.float64) for _, slope in results], axis=0)
        gap = (point - start) / DEVIATIONS**2 / num_clips
        value = np.mean([float(value) for value, _ in results]) + gap @ (point - start) / 2
        return float(value), np.where(free, slope + gap, 0.0)

    best = scipy.optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-3})
    scale, unenrolled, stranger = np.where(free, best.x, start).tolist()
    fitted = {"scale": float(np.exp(scale)), "unenrolled": unenrolled, "stranger": stranger}
    return Settings(**{**values, **fitted, **given})


@jax.jit
@jax.value_and_grad
def _loss(point: Array, part: _Ratios) -> Array:
    """Computes the mean cross-entropy of clips, with half of the weight on clips of strangers.

    `point` is [3]: log(scale), `unenrolled` and `stranger`, see `Settings`.
    """
    settings = Settings(0.0, 0.0, jnp.exp(point[0]), point[1], point[2], 1.0)
    logits = combine_modalities(part.ratios, part.known, part.present, settings)
    loss, known = softmax_cross_entropy(logits, part.labels), part.labels > 0
    return (jnp.mean(loss, where=known) + jnp.mean(loss, where=~known)) / 2
