"""The settings of PLDA, fitted on training clips: those that do best on clips held out.

A part of the clips is held out, and the others are enrolled. In each modality some identities are
hidden, and half of them are strangers altogether. Without them no clip with a modality would ever
belong to an identity that lacks it, and no clip to somebody new.

`calibrated` fits more: a scale and an offset of each modality, and how much the number of clips of
an identity counts. The docstring of `configs/plda.py` says what that gained.

The shares of shrinkage are chosen by MAP and by AUROC, known clips against strangers. The other
settings are those under which the right answers are most probable: probabilities then mean what
they say, on clips like these. They are part of `TaskSpec`, and every checkpoint keeps them.

Source: calibration by logistic regression, as in Brümmer and du Preez 2006, Application-independent
evaluation of speaker detection; here over all identities and somebody new at once.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from threadpoolctl import threadpool_limits

from vidjax import ensemble, fusion
from vidjax.batch import Array, Frames
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.models import two_covariance
from vidjax.models.heads import unit_vectors
from vidjax.models.identifier import make_identifier
from vidjax.models.plda import Settings, combine, most_clips
from vidjax.steps.training_clips import values_of_clips
from vidjax.system import log_softmax

# Shares of shrinkage that are tried, the first value of each while the other share is chosen.
SHARES: Mapping[str, tuple[float, ...]] = {
    "within": (0.8, 0.7, 0.9),
    "between": (0.75, 0.5),
}
# The settings that are optimised: their values while the shares are chosen, and at the start.
START = {"scale": 1 / 16, "unenrolled": -1.0, "stranger": 2.0}
FOLDS = 4
HIDDEN = 0.2  # share of the identities that no enrolled clip shows in a modality
STRANGERS = 0.5  # share of the identities that no enrolled clip shows at all
MOST_CLIPS = 4000  # clips that the fit looks at; of more, whole identities are drawn


def training_settings(
    config: Config, data: TrainingData, labels: np.ndarray
) -> dict[str, float | tuple[float, ...]] | None:
    """Returns the settings that the configuration leaves open, fitted on the training clips.

    Args:
      config: the configuration of the run.
      data: the clips.
      labels: [N] int, class columns of the training clips; 0 for distractors.

    Returns:
      name -> value; None for a model without such settings.
    """
    spec = config.model.to_dict()
    if spec.get("name") not in ("plda", "nplda"):
        return None
    given = {name: spec[name] for name in Settings._fields if spec.get(name) is not None}
    calibrated = tuple(spec.get("calibrated", ()))
    fitted = {*SHARES, *START, *({"clips"} & {*calibrated})} - given.keys()
    if not fitted:
        return {}
    widths = dict.fromkeys(config.modalities, 1)
    make_identifier(spec, modalities=widths, num_classes=1, num_clips=1)  # refuses what is no value
    wanted = some_identities(labels, config.seed)
    vectors = {
        name: values_of_clips(config, data, name, _unit_mean, wanted) for name in config.modalities
    }
    settings = fit_settings(vectors, labels[wanted], given, config.seed, calibrated)
    return {name: value for name, value in settings._asdict().items() if name in fitted}


@jax.jit
def _unit_mean(frames: Frames) -> Array:
    """Returns the mean frame of every clip, weighted by quality, of length 1, [B, D]."""
    return unit_vectors(fusion.mean_frame(frames, weighting="quality").features[:, 0])


def some_identities(labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns [N] bool: all labelled clips, or those of random identities if there are too many."""
    known = np.unique(labels[labels > 0])
    order = np.random.default_rng(seed).permutation(known)
    counts = np.bincount(labels, minlength=int(labels.max()) + 1)[order]
    enough = max(int(np.searchsorted(np.cumsum(counts), MOST_CLIPS)), 2)
    return np.isin(labels, order[:enough])


def fit_settings(
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    given: Mapping[str, float],
    seed: int,
    calibrated: Sequence[str] = (),
) -> Settings:
    """Fits settings on held-out clips.

    Args:
      vectors: modality -> [N, D] float, unit vectors; 0 for clips that lack the modality.
      labels: [N] int, class columns from 1; those without a clip do not matter.
      given: settings that are not fitted.
      seed: seed of the folds, and of the identities that are hidden.
      calibrated: what else is fitted, see `models.plda.PLDAIdentifier`.

    Returns:
      The settings; the first values where no held-out clip shows an enrolled identity.
    """
    columns = 1 + np.unique(labels, return_inverse=True)[1]  # 1 to the number of identities
    values = {name: shares[0] for name, shares in SHARES.items()} | START | dict(given)
    # Matrices of 512 rows gain less from two threads of BLAS than from two folds at a time, and
    # their last digits do not depend on the number of cores then.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda number: _hold_out(vectors, columns, number, seed), range(FOLDS))
        folds = [fold for fold in found if fold is not None]
        if not folds:
            return Settings(**values)

        @functools.cache
        def compare(within: float, between: float) -> list[_Ratios]:
            return list(pool.map(lambda fold: _ratios(fold, within, between), folds))

        for name, shares in SHARES.items():
            if name not in given:
                tries = [{**values, name: share} for share in shares]
                values = max(
                    tries, key=lambda one: _quality(compare(one["within"], one["between"]), one)
                )
        parts = compare(values["within"], values["between"])
        return _fit(parts, values, given, calibrated)


class _Fold(NamedTuple):
    """Enrolled and held-out clips.

    Attributes:
      found: covariances of each of the M modalities, of the enrolled clips.
      counts: [M] of [K], number of enrolled clips.
      totals: [M] of [K, D], their sums.
      queries: [M] of [Q, D], centred unit vectors of the held-out clips.
      labels: [Q] int32, classes of the held-out clips; 0 for strangers.
    """

    found: Sequence[two_covariance.Covariances]
    counts: Sequence[np.ndarray]
    totals: Sequence[np.ndarray]
    queries: Sequence[np.ndarray]
    labels: np.ndarray


def _hold_out(
    vectors: Mapping[str, np.ndarray], labels: np.ndarray, number: int, seed: int
) -> _Fold | None:
    """Holds a fold out and hides identities; None where nothing is left to compare."""
    rng = np.random.default_rng((seed, number))
    num_identities = int(labels.max())
    held = ensemble.stratified_folds(labels, FOLDS, seed) == number
    stranger = rng.random(1 + num_identities) < STRANGERS
    enrolled = ~held & ~stranger[labels]
    parts: dict[str, list[Any]] = {name: [] for name in ("found", "counts", "totals", "queries")}
    for x in vectors.values():
        present = np.any(x != 0, axis=1)
        hidden = rng.random(1 + num_identities) < HIDDEN
        shown = enrolled & present & ~hidden[labels]
        if not shown.any():
            return None
        centre = x[shown].mean(axis=0)
        centred = unit_from(centre, x)
        sums = two_covariance.make_sums(centred[shown], labels[shown], 1 + num_identities)
        parts["found"].append(two_covariance.covariances(sums))
        parts["counts"].append(sums.count)
        parts["totals"].append(sums.total)
        parts["queries"].append(centred[held])
    known = np.any(np.stack(parts["counts"]) > 0, axis=0)
    answers = np.where(known[labels[held]], labels[held], 0).astype(np.int32)
    return _Fold(labels=answers, **parts) if answers.any() else None


def unit_from(centre: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns unit vectors [N, D] from the centre [D] to x; 0 where x is 0."""
    gap = x - centre
    unit = gap / np.maximum(np.linalg.norm(gap, axis=-1, keepdims=True), 1e-12)
    return np.where(np.any(x != 0, axis=1, keepdims=True), unit, 0.0)


class _Ratios(NamedTuple):
    """The held-out clips of a fold, as `models.plda.combine` takes them, and their answers.

    Attributes:
      ratios: [M, Q, K] float32, log-likelihood ratios.
      known: [M, K] bool, False for classes without an enrolled clip.
      present: [M, Q] bool, False for clips that lack the modality.
      labels: [Q] int32, right columns; 0 for strangers.
      num_clips: [K] float, enrolled clips of each class.
    """

    ratios: Array
    known: Array
    present: Array
    labels: Array
    num_clips: Array


def _ratios(fold: _Fold, within: float, between: float) -> _Ratios:
    """Returns the log-likelihood ratios of the held-out clips, for given shares of shrinkage."""
    ratios = []
    for found, count, total, queries in zip(
        fold.found, fold.counts, fold.totals, fold.queries, strict=True
    ):
        space = two_covariance.make_space(found, within=within, between=between)
        enrolled = two_covariance.enrol(space, count, total)
        arrays = two_covariance.as_arrays(space, enrolled, jnp.dtype("float32"))
        ratios.append(two_covariance.log_ratios(*arrays, jnp.asarray(queries, jnp.float32)))
    return _Ratios(
        jnp.stack(ratios),
        jnp.asarray(np.stack(fold.counts) > 0),
        jnp.asarray(np.stack([np.any(x != 0, axis=1) for x in fold.queries])),
        jnp.asarray(fold.labels),
        most_clips([jnp.asarray(count, jnp.float32) for count in fold.counts]),
    )


def _quality(parts: Sequence[_Ratios], values: Mapping[str, float]) -> float:
    """Returns the mean of MAP and AUROC of the held-out clips, averaged over the folds."""
    settings = Settings(**values)
    return float(np.mean([_quality_of_fold(part, settings) for part in parts]))


@jax.jit
def _quality_of_fold(part: _Ratios, settings: Settings) -> Array:
    """Returns [2], MAP of the identities that clips show, and AUROC of the clips' best scores."""
    logits = combine(part.ratios, part.known, part.present, settings, part.num_clips)
    scores = log_softmax(logits, _in_question(part))  # [Q, K]
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
    parts: Sequence[_Ratios],
    values: Mapping[str, float],
    given: Mapping[str, float],
    calibrated: Sequence[str],
) -> Settings:
    """Fits the settings of START, and `clips`, by the likelihood of the answers.

    Those that are given stay, and `clips` too unless `calibrated` names it.
    """
    num = len(parts[0].ratios) if "modalities" in calibrated else 1
    num = max(num, np.size(values["scale"]), np.size(values["unenrolled"]))
    begin = {
        "scale": np.full(num, np.log(values["scale"])),
        "unenrolled": np.full(num, values["unenrolled"]),
        "stranger": np.full(1, values["stranger"]),
        "clips": np.full(1, values.get("clips", 0.0)),
    }
    fitted = {*START, *({"clips"} & {*calibrated})} - given.keys()
    start = np.concatenate([*begin.values()])
    free = np.concatenate([np.full(len(part), name in fitted) for name, part in begin.items()])

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        at = jnp.asarray(np.where(free, point, start), jnp.float32)
        found = [_loss(at, part) for part in parts]
        slope = np.mean([np.asarray(slope, np.float64) for _, slope in found], axis=0)
        return float(np.mean([float(value) for value, _ in found])), np.where(free, slope, 0.0)

    best = scipy.optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-3})
    at = _settings_at(np.where(free, best.x, start))
    found = {name: _numbers(value) for name, value in at._asdict().items() if name in fitted}
    return Settings(**{**values, **found, **given})


def _settings_at(point: Array) -> Settings:
    """Returns the settings at n logarithms of scales, n `unenrolled`, `stranger` and `clips`."""
    num = len(point) // 2 - 1
    xp = np if isinstance(point, np.ndarray) else jnp
    return Settings(0.0, 0.0, xp.exp(point[:num]), point[num:-2], point[-2], point[-1])


def _numbers(value: Array) -> float | tuple[float, ...]:
    """Returns one number, or those of all modalities, as checkpoints keep them."""
    numbers = np.atleast_1d(np.asarray(value, np.float64)).tolist()
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _in_question(part: _Ratios) -> Array:
    """Returns [K] bool, True for somebody new and for identities enrolled in any modality."""
    return jnp.any(part.known, axis=0).at[0].set(True)


@jax.jit
@jax.value_and_grad
def _loss(point: Array, part: _Ratios) -> Array:
    """Returns the mean cross-entropy at a point of `_settings_at`."""
    settings = _settings_at(point)
    logits = combine(part.ratios, part.known, part.present, settings, part.num_clips)
    logs = jax.nn.log_softmax(jnp.where(_in_question(part), logits, -jnp.inf))
    return -jnp.mean(jnp.take_along_axis(logs, part.labels[:, None], axis=1))
