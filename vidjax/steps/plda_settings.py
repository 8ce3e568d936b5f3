"""The settings of PLDA, fitted on training clips: those that do best on clips held out.

A part of the clips is held out, and the others are enrolled. In each modality some identities are
hidden, and half of them are strangers altogether. Without them no clip with a modality would ever
belong to an identity that lacks it, and no clip to somebody new.

The shares of shrinkage are chosen by MAP. The other settings are those under which the right
answers are most probable: probabilities then mean what they say, on clips like these. The settings
are part of `TaskSpec`, and every checkpoint keeps them.

Source: calibration by logistic regression, as in Brümmer and du Preez 2006, Application-independent
evaluation of speaker detection; here over all identities and somebody new at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from vidjax import ensemble, fusion
from vidjax.batch import Array, Frames
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.models import two_covariance
from vidjax.models.heads import unit_vectors
from vidjax.models.plda import Settings, combine
from vidjax.steps.training_clips import values_of_clips
from vidjax.system import log_softmax

# Shares of shrinkage that are tried, the first value of each while the other share is chosen.
SHARES: Mapping[str, tuple[float, ...]] = {
    "within": (0.8, 0.7, 0.9),
    "between": (0.75, 0.5, 0.25),
}
# The settings that are optimised: their values while the shares are chosen, and at the start.
START = {"scale": 1 / 16, "unenrolled": -2.0, "stranger": 2.0}
FOLDS = 4  # the shares are chosen on two of them, the other settings are fitted on all
HIDDEN = 0.2  # share of the identities that no enrolled clip shows in a modality
STRANGERS = 0.5  # share of the identities that no enrolled clip shows at all
MOST_CLIPS = 4000  # clips that the fit looks at; of more, whole identities are drawn


def training_settings(
    config: Config, data: TrainingData, labels: np.ndarray
) -> dict[str, float] | None:
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
    if len(given) == len(Settings._fields):
        return {}
    wanted = some_identities(labels, config.seed)
    vectors = {
        name: values_of_clips(config, data, name, _unit_mean, wanted) for name in config.modalities
    }
    settings = fit_settings(vectors, labels[wanted], len(data.identities), given, config.seed)
    return {name: value for name, value in settings._asdict().items() if name not in given}


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
    num_identities: int,
    given: Mapping[str, float],
    seed: int,
) -> Settings:
    """Fits settings on held-out clips.

    Args:
      vectors: modality -> [N, D] float, unit vectors; 0 for clips that lack the modality.
      labels: [N] int, class columns from 1.
      num_identities: number of identities, C.
      given: settings that are not fitted.
      seed: seed of the folds, and of the identities that are hidden.

    Returns:
      The settings; the first values where no held-out clip shows an enrolled identity.
    """
    folds = [
        fold
        for number in range(FOLDS)
        if (fold := _hold_out(vectors, labels, num_identities, number, seed)) is not None
    ]
    values = {name: shares[0] for name, shares in SHARES.items()} | START | dict(given)
    if not folds:
        return Settings(**values)
    for name, shares in SHARES.items():
        if name not in given:
            tries = [{**values, name: share} for share in shares]
            values = max(tries, key=lambda one: _mean_ap(folds[: FOLDS // 2], one))
    return _fit(folds, values, given)


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
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    num_identities: int,
    number: int,
    seed: int,
) -> _Fold | None:
    """Holds a fold out and hides identities; None where nothing is left to compare."""
    rng = np.random.default_rng((seed, number))
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
        centred = np.where(present[:, None], _unit(x - centre), 0.0)
        sums = two_covariance.make_sums(centred[shown], labels[shown], 1 + num_identities)
        parts["found"].append(two_covariance.covariances(sums))
        parts["counts"].append(sums.count)
        parts["totals"].append(sums.total)
        parts["queries"].append(centred[held])
    known = np.any(np.stack(parts["counts"]) > 0, axis=0)
    answers = np.where(known[labels[held]], labels[held], 0).astype(np.int32)
    return _Fold(labels=answers, **parts) if answers.any() else None


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class _Ratios(NamedTuple):
    """The held-out clips of a fold, as `models.plda.combine` takes them, and their answers.

    Attributes:
      ratios: [M, Q, K] float32, log-likelihood ratios.
      known: [M, K] bool, False for classes without an enrolled clip.
      present: [M, Q] bool, False for clips that lack the modality.
      labels: [Q] int32, right columns; 0 for strangers.
    """

    ratios: Array
    known: Array
    present: Array
    labels: Array


def _ratios(fold: _Fold, values: Mapping[str, float]) -> _Ratios:
    """Returns the log-likelihood ratios of the held-out clips."""
    ratios = []
    for found, count, total, queries in zip(
        fold.found, fold.counts, fold.totals, fold.queries, strict=True
    ):
        space = two_covariance.make_space(found, within=values["within"], between=values["between"])
        enrolled = two_covariance.enrol(space, count, total)
        arrays = two_covariance.as_arrays(space, enrolled, jnp.dtype("float32"))
        ratios.append(two_covariance.log_ratios(*arrays, jnp.asarray(queries, jnp.float32)))
    return _Ratios(
        jnp.stack(ratios),
        jnp.asarray(np.stack(fold.counts) > 0),
        jnp.asarray(np.stack([np.any(x != 0, axis=1) for x in fold.queries])),
        jnp.asarray(fold.labels),
    )


def _mean_ap(folds: Sequence[_Fold], values: Mapping[str, float]) -> float:
    """Returns the MAP of the held-out clips, averaged over the folds."""
    settings = Settings(**values)
    return float(np.mean([_map_of_fold(_ratios(fold, values), settings) for fold in folds]))


@jax.jit
def _map_of_fold(part: _Ratios, settings: Settings) -> Array:
    """Returns the mean average precision of the identities that held-out clips show."""
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
    return jnp.mean(total / jnp.maximum(count, 1), where=shown)


def _fit(
    folds: Sequence[_Fold], values: Mapping[str, float], given: Mapping[str, float]
) -> Settings:
    """Fits the settings of START, but those that are given, by the likelihood of the answers."""
    parts = [_ratios(fold, values) for fold in folds]
    start = np.array([np.log(values["scale"]), values["unenrolled"], values["stranger"]])
    free = np.array([name not in given for name in START])

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        at = jnp.asarray(np.where(free, point, start), jnp.float32)
        found = [_loss(at, part) for part in parts]
        slope = np.mean([np.asarray(slope, np.float64) for _, slope in found], axis=0)
        return float(np.mean([float(value) for value, _ in found])), np.where(free, slope, 0.0)

    best = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-3})
    log_scale, unenrolled, stranger = np.where(free, best.x, start).tolist()
    fitted = {"scale": float(np.exp(log_scale)), "unenrolled": unenrolled, "stranger": stranger}
    return Settings(**{**values, **fitted, **given})


@jax.jit
@jax.value_and_grad
def _loss(point: Array, part: _Ratios) -> Array:
    """Returns the mean cross-entropy at (logarithm of the scale, unenrolled, stranger)."""
    settings = Settings(0.0, 0.0, jnp.exp(point[0]), point[1], point[2])
    logits = combine(part.ratios, part.known, part.present, settings)
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logs, part.labels[:, None], axis=1))
