"""The calibration of joined runs: a slope of each run's log-probabilities, an offset of strangers.

PLDA and an MMA net joined, both in five folds of train, on val (one seed; ECE: calibration error):

                                       MAP     AUROC   FNIR 1 %, 10 %   ECE
    small real       probabilities     .9285   .933    .199   .140      .088
                     greedy weights    .9333   .951    .210   .121      .071
                     logarithms        .9286   .955    .203   .125      .097
                     calibrated        .9294   .943    .205   .126      .120
                     PLDA alone        .9338   .952    .215   .125
    small synthetic  probabilities     .8971   .941    .313   .101      .103
                     greedy weights    .8969   .942    .293   .101      .076
                     logarithms        .8965   .945    .296   .099      .054
                     calibrated        .8970   .944    .291   .108      .054
                     MMA alone         .8893   .918    .368   .202

So logarithms tell strangers better, and rank alike; a calibration on train, which has no stranger,
gains nothing that can be told.

Source: linear fusion by logistic regression, Brümmer et al. 2007, Fusion of heterogeneous speaker
recognition systems; here over all identities and somebody new at once.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax.sharding import Mesh

from vidjax.batch import Array, Batch
from vidjax.config import Config
from vidjax.data.clips import Split
from vidjax.run.terminal import say
from vidjax.steps.conclusion import Evaluation
from vidjax.steps.model_scorer import TrainedModel
from vidjax.steps.pooling import Pooling, complete, mean_logarithms
from vidjax.steps.scoring import score

MOST_IDENTITIES = 100  # of each clip, whose scores the fit looks at
LEAST_SLOPE = 1e-6  # more certain of one run must never mean less certain of all
LEAST = -1e4  # what stands for the logarithm of a probability of 0, which has no gradient


def labelled_split(models: Sequence[TrainedModel], config: Config) -> Split:
    """Returns the clips of `config.join.split`; raises ValueError if they have no ground truth."""
    split = models[0].data.split(config.join.split)
    if not split.labelled:
        raise ValueError(
            f"config.join.split={split.name}: it has no ground truth to fit weights on\n"
            "choose a labelled split with --config.join.split"
        )
    return split


def check_held_out(evaluation: Evaluation, split_name: str) -> None:
    """Raises ValueError if a member scored clips that it was trained on."""
    if evaluation.results["map_kind"] == "in_sample":
        raise ValueError(
            f"config.join.split={split_name}: a run was trained on it without folds\n"
            "train with --config.ensemble.folds=5, or choose a split that no run was trained on"
        )


def fit_calibration(
    models: Sequence[TrainedModel], config: Config, mesh: Mesh
) -> tuple[list[float], Pooling]:
    """Fits a weight of each run, a scale and an offset by the likelihood of the right identities.

    Every clip is scored by members that were not trained on it. The offset is fitted if the split
    has distractors and a run knows of somebody new. Else it stays, and the likelihood is that among
    the identities: without strangers nothing says how probable they are.

    Args:
      models: the R runs.
      config: the configuration of the blend, with `join.mean=logarithms`.
      mesh: the devices.

    Returns:
      One weight per run, which sum to 1; and the mean, with scale and offset.

    Raises:
      ValueError: the split has no ground truth, or a run was trained on it without folds.
    """
    split, name = labelled_split(models, config), config.join.split
    knows = jnp.asarray([model.knows_strangers for model in models])
    labels = jnp.asarray(split.labels)
    kept: list[list[np.ndarray]] = []

    def observe(blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        for block, *of_models in zip(blocks, *scores, strict=True):
            part = _candidates(jnp.stack(of_models), knows, labels[block.clip_index])
            kept.append([np.asarray(x) for x in (*part, block.clip_index, block.batch_mask)])

    block_size = config.eval.block_size
    found = score(models, name, mesh, block_size=block_size, each_member=False, observe=observe)
    check_held_out(found, name)
    logs, scored, answer, clip, mask = (
        np.concatenate(parts, axis=1 if number < 2 else 0)
        for number, parts in enumerate(zip(*kept, strict=True))
    )
    usable = mask & found.clips.pool[clip] & scored.any(axis=0)
    strange = split.labels[clip] == 0
    offset = None if strange[usable].any() and bool(knows.any()) else float(config.join.offset)
    usable &= ~strange if offset is not None else True
    weights, pooling = fit_pooling(
        logs[:, usable], scored[:, usable], answer[usable], offset=offset
    )
    shown = ", ".join(
        f"{weight:.2f} {model.name}" for weight, model in zip(weights, models, strict=True)
    )
    say(
        f"calibrated on {name} ({found.results['map_kind']}): {shown}; scale {pooling.scale:.3g}, "
        f"offset {pooling.offset:.3g}"
    )
    return weights, pooling


@jax.jit
def _candidates(scores: Array, knows: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Returns what the fit looks at of a block of clips.

    Args:
      scores: [R, B, C] logarithms of the probabilities of the identities.
      knows: [R] bool, runs that have a probability of somebody new.
      labels: [B] int32, right columns, 0 for distractors.

    Returns:
      [R, B, k] logarithms of the right answer, of somebody new, and of the identities that are best
      by the mean of logarithms; [R, B] bool, runs that score a clip; [B] the place of the answer.
    """
    logs, scored = complete(scores, knows)
    logs = jnp.maximum(logs, LEAST)
    best = mean_logarithms(logs, scored, jnp.ones(len(logs)))
    columns = jnp.arange(best.shape[1])
    wanted = (columns == labels[:, None]) | (columns == 0)
    count = min(MOST_IDENTITIES + 2, best.shape[1])
    _, chosen = jax.lax.top_k(jnp.where(wanted, jnp.inf, best), count)  # [B, k]
    logs = jnp.take_along_axis(logs, chosen[None], axis=2)
    return logs, scored, jnp.argmax(chosen == labels[:, None], axis=1)


def fit_pooling(
    logs: np.ndarray, scored: np.ndarray, answer: np.ndarray, *, offset: float | None
) -> tuple[list[float], Pooling]:
    """Fits weights, scale and offset, so that the right answers are most probable.

    Args:
      logs: [R, n, k] float, logarithms of probabilities, with somebody new in column 0.
      scored: [R, n] bool, runs that score a clip.
      answer: [n] int, the right columns.
      offset: the offset, of clips that all show an identity; None to fit it.

    Returns:
      One weight per run, which sum to 1, and the mean.
    """
    num = len(logs)
    if offset is not None:
        logs = np.concatenate([np.full_like(logs[:, :, :1], LEAST), logs[:, :, 1:]], axis=2)
    parts = (jnp.asarray(logs, jnp.float32), jnp.asarray(scored), jnp.asarray(answer))

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _loss(jnp.asarray(point, jnp.float32), *parts)
        return float(value), np.asarray(slope, np.float64)

    start = np.array([1 / num] * num + [offset or 0.0])
    bounds = [(LEAST_SLOPE, None)] * num + [(None, None)]
    point = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    scale = float(point[:num].sum())
    return (point[:num] / scale).tolist(), Pooling(True, scale, float(point[num]))


@jax.jit
@jax.value_and_grad
def _loss(point: Array, logs: Array, scored: Array, answer: Array) -> Array:
    """Returns the mean cross-entropy at the R slopes and the offset."""
    slopes = point[:-1]
    logits = jnp.sum(slopes) * mean_logarithms(logs, scored, slopes)
    found = jax.nn.log_softmax(logits.at[:, 0].add(point[-1]))
    return -jnp.mean(jnp.take_along_axis(found, answer[:, None], axis=1))
