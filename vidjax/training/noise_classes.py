"""Noise classes: distractors are labelled as clusters of strangers and as mirrors of identities.

Each cluster of distractor clips is a class. Every other distractor starts in a random one of C
mirror classes, and moves every `noise.relabel_every_epochs` to the mirror of the identity that it
is mistaken for.

Source: noise classes (5th place 2018). Its shift of 8,652 is a misprint of 4934 + 3691 = 8625.
The article leaves the label of a clip that is mistaken for no identity as it is; the author's code
takes the prediction (`noise.keep`). The code moves all distractors, the article only the
unclustered ones; we follow the article in that.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from vidjax import devices, distributed, ensemble, files
from vidjax.batch import Array, Batch, NoiseLayout
from vidjax.config import Config
from vidjax.errors import UserError
from vidjax.models.base import ModelState, Params
from vidjax.steps import eval_step
from vidjax.steps import state as state_lib

FILE = "noise.jsonl"


def make_relabeller(
    config: Config,
    log: Path,
    identities: Sequence[str],
    values_of: Callable[[Callable[[Batch], np.ndarray], np.ndarray], np.ndarray],
    predict: eval_step.EvalStep,
    layout: NoiseLayout,
    labels: np.ndarray,
    training_sets: ensemble.TrainingSets,
) -> Callable[[state_lib.TrainState], np.ndarray]:
    """Returns a function that moves unclustered distractors to the mirrors of whom they resemble.

    It maps a state to the new labels, [E, N] int32, and appends the changes to `noise.jsonl`.

    Args:
      log: path of a `noise.jsonl` without later steps.
      identities: [C] names.
      values_of: maps a function of a block [B] of clips, and wanted clips [N] bool, to its values.
      predict: returns the best class column of every clip of a block, for one member.
      labels: [N] int, class columns of the training clips at step 0.
    """
    members, clips = training_sets.members, training_sets.clips
    # Not the mirrors of today: a prediction may put an unclustered distractor in a cluster.
    movable = np.asarray(layout.is_mirror(labels)) & training_sets.trained  # [E, N]
    wanted = np.any(movable, axis=0)

    def relabel_clips(state: state_lib.TrainState) -> np.ndarray:
        old = np.asarray(devices.fetch(state.labels))
        weights: list[tuple[Params, ModelState]] = [
            ensemble.take((state.params, state.model_state), number) for number in range(len(old))
        ]

        def best_columns(batch: Batch) -> np.ndarray:  # [B, E]
            columns = [
                predict(*own, jnp.int32(member.view), batch)
                for own, member in zip(weights, members, strict=True)
            ]
            return np.stack(devices.fetch(columns), axis=1)

        predicted = np.zeros_like(old)
        if wanted.any():
            predicted[:, wanted] = values_of(best_columns, wanted).T
        new = relabel(old, predicted, layout, keep=config.noise.keep)
        new = np.where(movable, new, old).astype(np.int32)
        if distributed.is_first():
            with files.open_log(log) as file:
                for line in describe_moves(int(state.step), old, new, predicted):
                    files.append(file, (json.dumps(line) + "\n").encode())
        return new

    def describe_moves(
        step: int, old: np.ndarray, new: np.ndarray, predicted: np.ndarray
    ) -> Iterator[dict[str, Any]]:
        for number, rows in enumerate(movable):
            before, after = old[number], new[number]
            moved = np.where(before != after, after, 0)
            mirrors = np.flatnonzero(layout.is_mirror(moved))
            inside = np.flatnonzero(layout.is_cluster(moved))
            line = {
                "step": step,
                "member": members[number].number,
                **audit(before[rows], after[rows], predicted[number, rows], layout),
                "now_mirrors": {
                    clips[i]: identities[int(moved[i]) - layout.mirror_shift - 1] for i in mirrors
                },
            }
            if config.noise.keep == "prediction":
                line["now_in_cluster"] = {
                    clips[i]: int(moved[i]) - layout.num_identities - 1 for i in inside
                }
            yield line

    return relabel_clips


def cluster(
    vectors: np.ndarray,
    *,
    method: Literal["dbscan", "hdbscan"] = "dbscan",
    eps: float,
    min_samples: int,
) -> np.ndarray:
    """Clusters vectors by direction.

    Distances are Euclidean on the unit sphere: a distance of d is a cosine of 1 - d^2 / 2. Vectors
    of 0, such as those of clips without frames, are in no cluster. Vectors must be finite.

    Args:
      vectors: [n, D] float.
      method: 'dbscan' joins vectors that a chain of neighbours connects; 'hdbscan' finds a density
        for every cluster, and never returns a single cluster.
      eps: largest distance between neighbours, 0 to 2. More vectors need a smaller value, since
        accidental neighbours join strangers in a long chain. 'hdbscan' merges clusters at a smaller
        distance; 0 merges none.
      min_samples: for 'dbscan', number of neighbours, itself included, that make a vector a core.
        For 'hdbscan', also the smallest size of a cluster, at least 2.

    Returns:
      [n] int32, cluster of every vector, numbered by first members; -1 for vectors in no cluster.

    Source: Ester et al. 1996 (DBSCAN), Campello et al. 2013 (HDBSCAN), both of scikit-learn.
    """
    if method not in ("dbscan", "hdbscan"):
        raise UserError(f"config.noise.method='{method}': choose from dbscan, hdbscan")
    if min_samples < 1 or not (0 < eps <= 2 or (method == "hdbscan" and eps == 0)):
        raise UserError(
            f"config.noise.eps={eps} must be above 0 and at most 2 (0 for hdbscan only), and "
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
    least = max(min_samples, 2) if method == "hdbscan" else 1
    if len(real) < least:
        return clusters

    # Not at the top: the import takes most of a second, and few runs cluster anything.
    from sklearn.cluster import DBSCAN, HDBSCAN

    if method == "dbscan":
        model = DBSCAN(eps=eps, min_samples=min_samples)
    else:
        model = HDBSCAN(
            min_cluster_size=least,
            min_samples=min_samples,
            cluster_selection_epsilon=eps,
            copy=False,  # pyright: ignore[reportArgumentType]  (its default is a string)
        )
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


def audit(old: Array, new: Array, predicted: Array, layout: NoiseLayout) -> dict[str, int]:
    """Counts the clips that a relabelling moved, and those that it did not, by reason.

    `unclustered` clips are `moved` or `kept`. Kept clips are counted by kind of predicted column; a
    clip of `kept_identity` is already in the mirror of the predicted identity.
    """
    unclustered = layout.is_mirror(old) | (old != new)
    kept = unclustered & (old == new)
    reasons = {
        "kept_identity": layout.is_identity(predicted),
        "kept_other": predicted == 0,
        "kept_cluster": layout.is_cluster(predicted),
        "kept_mirror": layout.is_mirror(predicted),
    }
    masks = {
        "clustered": layout.is_cluster(old) & (old == new),
        "unclustered": unclustered,
        "moved": unclustered & (old != new),
        "kept": kept,
        **{name: kept & reason for name, reason in reasons.items()},
    }
    return {name: int(np.sum(mask)) for name, mask in masks.items()}
