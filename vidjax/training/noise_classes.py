"""Noise classes: distractors are labelled as clusters of strangers and as mirrors of identities.

Each cluster of distractor clips is a class. Every other distractor starts in a random one of C
mirror classes, and moves every `noise.relabel_every_epochs` to the mirror of the identity that it
is mistaken for.

Source: noise classes (5th place 2018). Its shift of 8,652 is a misprint of 4934 + 3691 = 8625.
The article leaves the label of a clip that is mistaken for no identity as it is; the author's code
takes the prediction (`noise.keep`). The code moves all distractors, the article only the
unclustered ones; we follow the article in that.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from vidjax import devices, ensemble
from vidjax.batch import Array, Batch, NoiseLayout
from vidjax.errors import UserError
from vidjax.evaluation import eval_step
from vidjax.models.base import ModelState, Params
from vidjax.training import train_step


def relabelled(
    state: train_step.TrainState,
    training_sets: ensemble.TrainingSets,
    labels: np.ndarray,
    layout: NoiseLayout,
    *,
    values_of: Callable[[Callable[[Batch], np.ndarray], np.ndarray], np.ndarray],
    predict: eval_step.EvalStep,
    keep: str,
) -> np.ndarray:
    """Returns labels [E, N] int32, with unclustered distractors as mirrors of whom they resemble.

    Args:
      labels: [N] int, class columns of the training clips at step 0.
      values_of: maps a function of a block [B] of clips, and wanted clips [N] bool, to its values.
      predict: returns the best class column of every clip of a block, for one member.
      keep: see `relabel`.
    """
    # Not the mirrors of today: a prediction may put an unclustered distractor in a cluster.
    movable = np.asarray(layout.is_mirror(labels)) & training_sets.trained  # [E, N]
    wanted = np.any(movable, axis=0)
    old = np.asarray(devices.fetch(state.labels))
    weights: list[tuple[Params, ModelState]] = [
        ensemble.take((state.params, state.model_state), number) for number in range(len(old))
    ]

    def best_columns(batch: Batch) -> np.ndarray:  # [B, E]
        columns = [
            predict(*own, jnp.int32(member.view), batch)
            for own, member in zip(weights, training_sets.members, strict=True)
        ]
        return np.stack(devices.fetch(columns), axis=1)

    predicted = np.zeros_like(old)
    if wanted.any():
        predicted[:, wanted] = values_of(best_columns, wanted).T
    return np.where(movable, relabel(old, predicted, layout, keep=keep), old).astype(np.int32)


def cluster(vectors: np.ndarray, *, eps: float, min_samples: int) -> np.ndarray:
    """Clusters vectors by direction.

    Distances are Euclidean on the unit sphere: a distance of d is a cosine of 1 - d^2 / 2. Vectors
    of 0, such as those of clips without frames, are in no cluster. Vectors must be finite.

    Args:
      vectors: [n, D] float.
      eps: largest distance between neighbours, above 0 to 2. A chain of neighbours is a cluster.
        More vectors need a smaller value, since accidental neighbours join strangers in a long
        chain.
      min_samples: number of neighbours, itself included, that make a vector a core.

    Returns:
      [n] int32, cluster of every vector, numbered by first members; -1 for vectors in no cluster.

    Source: Ester et al. 1996 (DBSCAN), of scikit-learn.
    """
    if min_samples < 1 or not 0 < eps <= 2:
        raise UserError(
            f"config.noise.eps={eps} must be above 0 and at most 2, and "
            f"config.noise.min_samples={min_samples} 1 or more"
        )
    vectors = np.asarray(vectors, np.float64)  # [n, D]
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise UserError(
            f"cannot cluster the distractors: the mean frame of distractor {row} is not finite"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    real = np.flatnonzero(lengths[:, 0] > 0)
    clusters = np.full(len(vectors), -1, np.int32)
    if not len(real):
        return clusters

    # Not at the top: the import takes most of a second, and few runs cluster anything.
    from sklearn.cluster import DBSCAN

    model = DBSCAN(eps=eps, min_samples=min_samples)
    labels = model.fit_predict(vectors[real] / lengths[real])
    clustered = labels >= 0
    _, first, number = np.unique(labels[clustered], return_index=True, return_inverse=True)
    by_first_member = np.argsort(np.argsort(first))
    clusters[real[clustered]] = by_first_member[number]
    return clusters


def initial_labels(clusters: np.ndarray, layout: NoiseLayout, seed: int) -> np.ndarray:
    """Returns [n] int32, the column of each distractor's cluster, or of a random mirror.

    The mirror of a clip depends on the seed and its row alone.
    """
    if clusters.size and not -1 <= clusters.min() <= clusters.max() < layout.num_clusters:
        raise ValueError(
            f"clusters {clusters.min()} to {clusters.max()} must lie below {layout.num_clusters}"
        )
    identities = 1 + np.random.default_rng(seed).integers(0, layout.num_identities, len(clusters))
    columns = np.where(
        clusters >= 0, 1 + layout.num_identities + clusters, identities + layout.mirror_shift
    )
    return columns.astype(np.int32)


def relabel(labels: Array, predicted: Array, layout: NoiseLayout, *, keep: str = "label") -> Array:
    """Moves unclustered distractors to the mirrors of the identities that they are mistaken for.

    Args:
      labels: [...] int, class columns of unclustered distractors.
      predicted: [...] int, best class column by the model; where it is 0, a clip keeps its label.
      keep: if the best column is a cluster or a mirror, a clip keeps its label (`label`), or gets
        that column (`prediction`). With `label`, only clips labelled as mirrors move.

    Returns [...] new labels, in the dtype and the library (numpy or jax) of `labels`.

    Source: noise classes (5th place 2018): `label` by the article, `prediction` by the code.
    """
    where = labels.__array_namespace__().where
    mirrors = (predicted + layout.mirror_shift).astype(labels.dtype)
    if keep == "prediction":
        moved = where(predicted > 0, predicted.astype(labels.dtype), labels)
        return where(layout.is_identity(predicted), mirrors, moved)
    moves = layout.is_mirror(labels) & layout.is_identity(predicted)
    return where(moves, mirrors, labels)
