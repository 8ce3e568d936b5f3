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
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, files, fusion
from vidjax.batch import Array, Frames, NoiseLayout
from vidjax.cluster import processes
from vidjax.config import Config
from vidjax.data.clips import ClipSource, TrainingData, make_eval_plan
from vidjax.errors import UserError
from vidjax.models.base import ModelState, Params
from vidjax.run.terminal import say
from vidjax.steps import eval_step
from vidjax.steps import state as state_lib
from vidjax.steps.clip_values import by_split, values_of_clips
from vidjax.system import System

FILE = "noise.jsonl"


def label_distractors(
    config: Config, data: TrainingData, labels: np.ndarray
) -> tuple[np.ndarray, NoiseLayout]:
    """Gives distractors (label 0) columns of clusters and mirrors; returns [N] and the layout."""
    is_noise = labels == 0
    if not is_noise.any():
        raise UserError(
            f"config.data.distractors=noise: no clip of {', '.join(config.data.train_splits)} is a "
            "distractor\nwithout distractors: the argument 'other', as in "
            "--config=configs/noise_classes.py:other,\nor another system, such as "
            "--config=configs/mma.py"
        )
    vectors = _mean_faces(config, data, is_noise)
    clusters = cluster(
        vectors,
        method=config.noise.method,
        eps=config.noise.eps,
        min_samples=config.noise.min_samples,
    )
    layout = NoiseLayout(len(data.identities), int(clusters.max(initial=-1)) + 1)
    labels = labels.copy()
    labels[is_noise] = initial_labels(clusters, layout, config.seed)
    say(
        f"{len(clusters)} distractors: {np.sum(clusters >= 0)} in {layout.num_clusters} clusters, "
        f"{np.sum(clusters < 0)} unclustered"
    )
    return labels, layout


@jax.jit
def _mean_face(frames: Frames) -> Array:
    return fusion.mean_frame(frames, weighting="quality").features[:, 0]


def _mean_faces(config: Config, data: TrainingData, wanted: np.ndarray) -> np.ndarray:
    """Returns the quality-weighted mean frames of the n wanted training clips, [n, D] float32."""
    modality = config.noise.modality
    if modality not in data.modalities:
        raise UserError(
            f"config.noise.modality='{modality}': the data has {', '.join(data.modalities)}"
        )
    return values_of_clips(config, data, modality, _mean_face, wanted)


class Relabeller:
    """Moves unclustered distractors to the mirrors of the identities that they are mistaken for."""

    def __init__(
        self,
        config: Config,
        log: Path,
        data: ClipSource,
        system: System,
        layout: NoiseLayout,
        labels: np.ndarray,
        training_sets: ensemble.TrainingSets,
        mesh: Mesh,
    ):
        """Takes the path `log` of a `noise.jsonl` without later steps, and labels [N] of step 0."""
        self._predict = eval_step.make_predict_step(system, mesh)
        self._config, self._data, self._mesh = config, data, mesh
        self._modalities = tuple(system.fuse_eval)
        self._layout, self._training_sets = layout, training_sets
        # Not the mirrors of today: a prediction may put an unclustered distractor in a cluster.
        self._unclustered = np.asarray(layout.is_mirror(labels))  # [N]
        self._path = log

    def __call__(self, state: state_lib.TrainState) -> np.ndarray:
        """Returns the new labels, [E, N] int32, and appends the changes to `noise.jsonl`."""
        old = np.asarray(devices.fetch(state.labels))
        movable = self._unclustered & self._training_sets.trained  # [E, N]
        predicted = np.zeros_like(old)
        weights = [
            ensemble.take((state.params, state.model_state), number) for number in range(len(old))
        ]
        for split, rows in by_split(self._config, self._data):
            only = np.any(movable[:, rows], axis=0)
            if only.any():
                self._predict_split(weights, split, only, predicted[:, rows])
        new = relabel(old, predicted, self._layout, keep=self._config.noise.keep)
        new = np.where(movable, new, old).astype(np.int32)
        if processes.is_first():
            self._write(int(state.step), old, new, predicted, movable)
        return new

    def _predict_split(
        self,
        weights: Sequence[tuple[Params, ModelState]],
        split: str,
        only: np.ndarray,
        predicted: np.ndarray,
    ) -> None:
        """Writes the best class columns of the clips `only` [n] bool into `predicted` [E, n]."""
        plan = make_eval_plan(self._data.split(split), self._modalities, only=only)
        share = devices.share(self._mesh)
        rows = self._config.eval.block_size * self._mesh.shape["data"] // share.parts
        for batch in self._data.eval_batches(plan, rows=rows, share=share):
            on_device = devices.shard_block(self._mesh, batch)
            clips, real = devices.fetch((on_device.clip_index, on_device.batch_mask))
            for number, member in enumerate(self._training_sets.members):
                params, model_state = weights[number]
                columns = self._predict(params, model_state, jnp.int32(member.view), on_device)
                predicted[number, clips[real]] = devices.fetch(columns)[real]

    def _write(
        self,
        step: int,
        old: np.ndarray,
        new: np.ndarray,
        predicted: np.ndarray,
        movable: np.ndarray,
    ) -> None:
        """Appends one line per member to `noise.jsonl`; all arrays are [E, N]."""
        with files.open_log(self._path) as file:
            for number, rows in enumerate(movable):
                counts = audit(
                    old[number, rows], new[number, rows], predicted[number, rows], self._layout
                )
                moved = np.where(old[number] != new[number], new[number], 0)
                line = {
                    "step": step,
                    "member": self._training_sets.members[number].number,
                    **counts,
                    "now_mirrors": self._names(moved),
                }
                if self._config.noise.keep == "prediction":
                    line["now_in_cluster"] = self._numbers(moved)
                files.append(file, (json.dumps(line) + "\n").encode())

    def _names(self, moved: np.ndarray) -> dict[str, str]:
        """Returns clip -> identity of its mirror; `moved` [N] has new columns, 0 for no move."""
        clips, identities = self._training_sets.clips, self._data.identities
        mirrors = np.flatnonzero(self._layout.is_mirror(moved))
        first = self._layout.mirror_shift + 1
        return {clips[i]: identities[int(moved[i]) - first] for i in mirrors}

    def _numbers(self, moved: np.ndarray) -> dict[str, int]:
        """Returns clip -> number of its cluster; `moved` [N] has new columns, 0 for no move."""
        first = self._layout.num_identities + 1
        inside = np.flatnonzero(self._layout.is_cluster(moved))
        return {self._training_sets.clips[i]: int(moved[i]) - first for i in inside}


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
