"""Noise classes: distractors as clusters of strangers and as mirrors of the identities.

A distractor whose face appears in several clips is a stranger that a model can learn: each cluster
of such clips is a class. The other distractors start in a random one of C mirror classes. After
every epoch each of them moves to the mirror of the identity that the model mistakes it for. So the
model learns to tell an identity from clips that only look like it.

Source: the noise-classes system, 5th place of 2018. Its 8,652 is a misprint of 4934 + 3691 = 8625.
The authors' code moves every distractor, their article only the unclustered ones: so do we.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, fusion
from vidjax.batch import Array, Frames, NoiseLayout
from vidjax.config import Config
from vidjax.data.clips import ClipSource, TrainingData, make_eval_plan
from vidjax.run import workdir as workdir_lib
from vidjax.run.logs import keep_until
from vidjax.run.terminal import say
from vidjax.steps import eval_step
from vidjax.steps import state as state_lib
from vidjax.system import System

FILE = "noise.jsonl"


def label_distractors(
    config: Config, data: TrainingData, labels: np.ndarray
) -> tuple[np.ndarray, NoiseLayout]:
    """Returns the labels of training clips with distractors in columns of their own.

    Args:
      config: the run's configuration.
      data: the clips.
      labels: [N] int32, class columns; 0 for distractors.

    Returns:
      [N] int32 labels, and which column is what.

    Raises:
      ValueError: training has no distractor.
    """
    is_noise = labels == 0
    if not is_noise.any():
        raise ValueError(
            "config.data.distractors=noise: no clip to train on is a distractor\n"
            "add their split, as in --config.data.train_splits=train,val --config.ensemble.folds=5"
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
        f"{np.sum(clusters < 0)} in none"
    )
    return labels, layout


@jax.jit
def _mean_face(frames: Frames) -> jax.Array:
    return fusion.mean_frame(frames, weighting="quality").features[:, 0]


def _mean_faces(config: Config, data: TrainingData, wanted: np.ndarray) -> np.ndarray:
    """Returns [n, D] float32, the quality-weighted mean frames of the wanted training clips."""
    modality = config.noise.modality
    if modality not in data.modalities:
        raise ValueError(f"config.noise.modality='{modality}': the data has no such modality")
    parts = []
    for split, rows in _by_split(config, data):
        only = wanted[rows]
        found = np.zeros((len(only), data.modalities[modality].dim), np.float32)
        if only.any():
            plan = make_eval_plan(data.split(split), (modality,), only=only)
            for batch in data.eval_batches(plan, rows=config.eval.block_size):
                vectors = np.asarray(_mean_face(batch.frames[modality]))
                found[batch.clip_index[batch.batch_mask]] = vectors[batch.batch_mask]
        parts.append(found[only])
    return np.concatenate(parts)


def _by_split(config: Config, data: ClipSource) -> Sequence[tuple[str, slice]]:
    """Returns the training splits and their rows in the tables."""
    found, start = [], 0
    for split in config.data.train_splits:
        count = len(data.split(split).clips)
        found.append((split, slice(start, start + count)))
        start += count
    return found


class Relabeller:
    """Moves unclustered distractors, every so often, to the mirror of whom they are taken for."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        data: ClipSource,
        system: System,
        layout: NoiseLayout,
        training_sets: ensemble.TrainingSets,
        mesh: Mesh,
        *,
        step: int,
    ):
        """Prepares it for a run that begins or goes on at `step`."""
        self._predict = eval_step.make_predict_step(system, mesh)
        self._config, self._data, self._mesh = config, data, mesh
        self._modalities = tuple(system.fuse_eval)
        self._layout, self._training_sets = layout, training_sets
        self._path = workdir / FILE
        keep_until(self._path, step)

    def __call__(self, state: state_lib.TrainState) -> np.ndarray:
        """Returns the new labels [E, N] int32; what moved is written to `noise.jsonl`."""
        old = np.asarray(state.labels)
        movable = self._layout.is_mirror(old) & self._training_sets.trained  # [E, N]
        predicted = np.zeros_like(old)
        weights = [
            ensemble.take((state.params, state.model_state), number) for number in range(len(old))
        ]
        for split, rows in _by_split(self._config, self._data):
            only = movable[:, rows].any(axis=0)
            if only.any():
                self._predict_split(weights, split, only, predicted[:, rows])
        new = np.where(movable, relabel(old, predicted, self._layout), old).astype(np.int32)
        self._write(int(state.step), old, new, predicted, movable)
        return new

    def _predict_split(
        self, weights: Sequence[Any], split: str, only: np.ndarray, predicted: np.ndarray
    ) -> None:
        plan = make_eval_plan(self._data.split(split), self._modalities, only=only)
        rows = self._config.eval.block_size * self._mesh.size
        for batch in self._data.eval_batches(plan, rows=rows):
            on_device = devices.shard_batch(self._mesh, batch)
            for number, member in enumerate(self._training_sets.members):
                params, model_state = weights[number]
                columns = self._predict(params, model_state, jnp.int32(member.view), on_device)
                real = np.asarray(batch.batch_mask)
                clips = np.asarray(batch.clip_index)[real]
                predicted[number, clips] = np.asarray(columns)[real]

    def _write(
        self, step: int, old: np.ndarray, new: np.ndarray, predicted: np.ndarray, of: np.ndarray
    ) -> None:
        clips, identities = self._training_sets.clips, self._data.identities
        with open(self._path, "ab", buffering=0) as file:
            for number, rows in enumerate(of):
                counts = audit(
                    old[number, rows], new[number, rows], predicted[number, rows], self._layout
                )
                moved = {
                    clips[clip]: identities[new[number, clip] - self._layout.mirror_shift - 1]
                    for clip in np.flatnonzero(old[number] != new[number])
                }
                line = {
                    "step": step,
                    "member": self._training_sets.members[number].number,
                    **counts,
                    "now_mirrors": moved,
                }
                workdir_lib.append(file, (json.dumps(line) + "\n").encode())


def cluster(
    vectors: np.ndarray,
    *,
    method: Literal["dbscan", "hdbscan"] = "dbscan",
    eps: float,
    min_samples: int,
) -> np.ndarray:
    """Returns the cluster of every vector, counted from 0 by its first member; -1 without one.

    Vectors are compared by direction: at a distance d on the unit sphere their cosine is
    1 - d^2 / 2. A zero vector, as of a clip without frames, is in no cluster.

    Args:
      vectors: [n, D] float.
      method: 'dbscan' joins what a chain of neighbours connects; 'hdbscan' finds for every cluster
        the density at which it holds together, but never one cluster alone.
      eps: distance 0..2 up to which two are neighbours. The more vectors, the smaller it must be,
        or chance neighbours join strangers in one long chain. For 'hdbscan', clusters that are
        closer are not told apart, and 0 is no such limit.
      min_samples: how many vectors, itself included, must lie about one to make it a core; for
        'hdbscan' clusters have as many members at least, and never fewer than 2.

    Returns:
      [n] int32.

    Raises:
      ValueError: an unknown method, an eps or min_samples that cannot be, a vector not finite.

    Source: Ester et al. 1996 (DBSCAN), Campello et al. 2013 (HDBSCAN), both of scikit-learn.
    """
    if method not in ("dbscan", "hdbscan"):
        raise ValueError(f"method is 'dbscan' or 'hdbscan', got {method!r}")
    if min_samples < 1 or not (0 < eps <= 2 or (method == "hdbscan" and eps == 0)):
        raise ValueError(f"eps {eps} must be within 0..2 and min_samples {min_samples} 1 or more")
    vectors = np.asarray(vectors, np.float64)  # [n, D]
    if not np.isfinite(vectors).all():
        raise ValueError("a vector to be clustered is not finite")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    real = np.flatnonzero(lengths[:, 0] > 0)
    found = np.full(len(vectors), -1, np.int32)
    least = max(min_samples, 2) if method == "hdbscan" else 1
    if len(real) < least:
        return found

    # The import takes most of a second, and few runs cluster anything.
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
    found[real[clustered]] = by_first_member[number]
    return found


def initial_labels(clusters: np.ndarray, layout: NoiseLayout, seed: int) -> np.ndarray:
    """Returns the class column that each distractor starts in.

    Args:
      clusters: [n] int, as `cluster` returns them.
      layout: the class columns.
      seed: of the mirror classes; which one a clip draws depends on its row alone.

    Returns:
      [n] int32, the column of its cluster, or of a random mirror class for -1.

    Raises:
      ValueError: a cluster that has no column.
    """
    if clusters.size and not -1 <= clusters.min() <= clusters.max() < layout.num_clusters:
        raise ValueError(
            f"clusters {clusters.min()}..{clusters.max()} do not fit {layout.num_clusters} classes"
        )
    identities = 1 + np.random.default_rng(seed).integers(0, layout.num_identities, len(clusters))
    columns = np.where(
        clusters >= 0, 1 + layout.num_identities + clusters, identities + layout.mirror_shift
    )
    return columns.astype(np.int32)


def relabel(labels: Array, predicted: Array, layout: NoiseLayout) -> Array:
    """Returns the labels after an epoch: unclustered clips go where they are mistaken for somebody.

    Args:
      labels: [...] int, class columns; only those of mirrors can change.
      predicted: [...] int, the best column of the model, any of them. A clip that is taken for an
        identity goes to its mirror, any other stays.
      layout: the class columns.

    Returns:
      [...] of the labels' dtype, numpy or jax as the labels are.
    """
    moves = layout.is_mirror(labels) & layout.is_identity(predicted)
    mirrors = (predicted + layout.mirror_shift).astype(labels.dtype)
    return labels.__array_namespace__().where(moves, mirrors, labels)


def audit(old: Array, new: Array, predicted: Array, layout: NoiseLayout) -> dict[str, int]:
    """Returns what a relabelling did, in numbers of clips.

    Args:
      old: [...] int, the labels before.
      new: [...] int, those that `relabel` returned.
      predicted: [...] int, the columns that it was given.
      layout: the class columns.

    Returns:
      `clustered`, `unclustered` = `moved` + `kept`, and `kept` by its reason: `kept_identity` was
      in the mirror of the predicted identity already, `kept_other`, `kept_cluster` and
      `kept_mirror` were predicted to be that. Labels of other columns do not count.
    """
    unclustered = layout.is_mirror(old)
    kept = unclustered & (old == new)
    reasons = {
        "kept_identity": layout.is_identity(predicted),
        "kept_other": predicted == 0,
        "kept_cluster": layout.is_cluster(predicted),
        "kept_mirror": layout.is_mirror(predicted),
    }
    masks = {
        "clustered": layout.is_cluster(old),
        "unclustered": unclustered,
        "moved": unclustered & (old != new),
        "kept": kept,
        **{name: kept & reason for name, reason in reasons.items()},
    }
    return {name: int(np.sum(mask)) for name, mask in masks.items()}
