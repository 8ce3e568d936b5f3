"""Computes new labels of distractors during a training with noise classes."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble
from vidjax.core.batch import Batch
from vidjax.data.clips import ClipSource
from vidjax.evaluation.eval_step import make_predict_step
from vidjax.models.base import ModelState, Params
from vidjax.runs.config import Config
from vidjax.training import noise_classes
from vidjax.training.plan import RunPlan, compute_values
from vidjax.training.train_step import TrainState

Relabel = Callable[[TrainState, ClipSource], np.ndarray]


def make_relabel(config: Config, plan: RunPlan, mesh: Mesh) -> Relabel:
    """Returns a function that computes new labels, [E, N] int32, see `noise_classes.relabel`.

    Its arguments are the state of all members and the source of the clips. It changes each member's
    labels of distractors in no cluster. All processes of the run must call it together.
    """
    classes, system = plan.task.layout, plan.system
    if config.noise.relabel_by == "train":
        system = system._replace(fuse_eval=system.fuse_train)
    predict = make_predict_step(system, mesh)
    members, _, trained = plan.training_sets

    def relabel(state: TrainState, clips: ClipSource) -> np.ndarray:
        assert classes
        # The labels of step 0 decide, because a later label may be a cluster.
        movable = np.asarray(classes.is_mirror(plan.labels)) & trained  # [E, N]
        old, wanted = np.asarray(devices.fetch(state.labels)), np.any(movable, axis=0)
        weights: list[tuple[Params, ModelState]] = [
            ensemble.take((state.params, state.model_state), number) for number in range(len(old))
        ]

        def best_columns(batch: Batch) -> np.ndarray:  # [B, E]
            columns = [
                predict(*weight, jnp.int32(member.view), batch)
                for weight, member in zip(weights, members, strict=True)
            ]
            return np.stack(devices.fetch(columns), axis=1)

        predicted = np.zeros_like(old)
        if wanted.any():
            values = compute_values(
                config, clips, tuple(plan.system.fuse_eval), best_columns, wanted, mesh
            )
            predicted[:, wanted] = values.T
        new = noise_classes.relabel(old, predicted, classes, keep=config.noise.keep)
        return np.where(movable, new, old).astype(np.int32)

    return relabel
