"""Labels of distractors in training: their clusters at the start, what they move to later.

The arithmetic is in `data.noise`; here is what it takes from the data and from a model in training.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, fusion
from vidjax.batch import Frames
from vidjax.config import Config
from vidjax.data import noise
from vidjax.run import workdir as workdir_lib
from vidjax.run.logs import keep_until
from vidjax.run.terminal import say
from vidjax.steps import train_step
from vidjax.system import System

FILE = "noise.jsonl"


def label_distractors(
    config: Config, data: Any, labels: np.ndarray
) -> tuple[np.ndarray, noise.NoiseLayout]:
    """Returns the labels of training clips with distractors in columns of their own.

    Args:
      config: the run's configuration.
      data: a `Dataset`.
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
    clusters = noise.cluster(
        vectors,
        method=config.noise.method,
        eps=config.noise.eps,
        min_samples=config.noise.min_samples,
    )
    layout = noise.NoiseLayout(len(data.identities), int(clusters.max(initial=-1)) + 1)
    labels = labels.copy()
    labels[is_noise] = noise.initial_labels(clusters, layout, config.seed)
    say(
        f"{len(clusters)} distractors: {np.sum(clusters >= 0)} in {layout.num_clusters} clusters, "
        f"{np.sum(clusters < 0)} in none"
    )
    return labels, layout


@jax.jit
def _mean_face(frames: Frames) -> jax.Array:
    return fusion.mean_frame(frames, weighting="quality").features[:, 0]


def _mean_faces(config: Config, data: Any, wanted: np.ndarray) -> np.ndarray:
    """Returns [n, D] float32, the quality-weighted mean frames of the wanted training clips."""
    modality = config.noise.modality
    if modality not in data.modalities:
        raise ValueError(f"config.noise.modality='{modality}': the data has no such modality")
    parts = []
    for split, rows in _by_split(config, data):
        only = wanted[rows]
        found = np.zeros((len(only), data.modalities[modality].dim), np.float32)
        if only.any():
            for batch in data.eval_batches(
                split=split, modalities=(modality,), rows=config.eval.block_size, only=only
            ):
                vectors = np.asarray(_mean_face(batch.frames[modality]))
                found[batch.clip_index[batch.batch_mask]] = vectors[batch.batch_mask]
        parts.append(found[only])
    return np.concatenate(parts)


def _by_split(config: Config, data: Any) -> Sequence[tuple[str, slice]]:
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
        data: Any,
        system: System,
        layout: noise.NoiseLayout,
        training_sets: ensemble.TrainingSets,
        mesh: Mesh,
        *,
        step: int,
    ):
        """Prepares it for a run that begins or goes on at `step`."""
        self._predict = train_step.make_predict_step(system, mesh)
        self._config, self._data, self._mesh = config, data, mesh
        self._modalities = tuple(system.fuse_eval)
        self._layout, self._training_sets = layout, training_sets
        self._path = workdir / FILE
        keep_until(self._path, step)

    def __call__(self, state: train_step.TrainState) -> np.ndarray:
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
        new = np.where(movable, noise.relabel(old, predicted, self._layout), old).astype(np.int32)
        self._write(int(state.step), old, new, predicted, movable)
        return new

    def _predict_split(
        self, weights: Sequence[Any], split: str, only: np.ndarray, predicted: np.ndarray
    ) -> None:
        for batch in self._data.eval_batches(
            split=split,
            modalities=self._modalities,
            rows=self._config.eval.block_size * self._mesh.size,
            only=only,
        ):
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
                counts = noise.audit(
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
