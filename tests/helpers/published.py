"""Shipped configurations on the official files at their full size, which nothing holds."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core import ensemble
from vidjax.models.system import System, TaskSpec, make_system
from vidjax.runs import config_io
from vidjax.training import train_step

ROOT = Path(__file__).parents[2]
CLIPS, IDENTITIES = 57_820, 10_034  # of train
NUM_CLUSTERS = 3691  # published: noise classes, 2018


def config_of(spec: str) -> Any:
    """Returns a shipped configuration of NAME:ARGS."""
    name, _, words = spec.partition(":")
    return config_io.load_file(f"{ROOT}/configs/{name}.py:{words}")


@functools.cache
def official(spec: str, train_other: bool = False) -> tuple[Any, System]:
    """Returns a configuration, and its system at full size."""
    config = config_of(spec)
    widths = {name: 2048 if name == "scene" else 512 for name in config.modalities}
    clusters = NUM_CLUSTERS if config.data.distractors == "noise" else None
    steps = math.ceil(config.num_epochs * CLIPS / config.batch_size)
    task = TaskSpec(widths, IDENTITIES, clusters, CLIPS, steps, train_other=train_other)
    return config, make_system(config.to_dict(), task)


def rates(spec: str, *epochs: float) -> np.ndarray:
    """Returns the learning rate of the first step of some epochs."""
    config, system = official(spec)
    steps = np.ceil(np.asarray(epochs) * CLIPS / config.batch_size).astype(np.int32)
    return np.array([system.lr_schedule(step) for step in steps])


def shapes(spec: str) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of the parameters of one member."""
    _, system = official(spec)
    labels, rngs = jnp.zeros((1, CLIPS), jnp.int32), ensemble.make_rngs((ensemble.Member(),), 0)
    params = jax.eval_shape(lambda: train_step.init_state(system, rngs, labels)).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape[1:] for path, x in leaves
    }
