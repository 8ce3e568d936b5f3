"""Training steps of shipped experiments on made-up clips, on any number of devices."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vidjax.core import devices, ensemble
from vidjax.core.batch import Batch, Frames
from vidjax.models.system import System, TaskSpec, make_system
from vidjax.runs import config_io
from vidjax.training import train_step

ROOT = Path(__file__).parents[2]
WIDTH = 24  # of features


def make_train_step(system, mesh) -> Any:
    """Compiles single training steps, which donate the state and return the losses as they are."""
    step = functools.partial(train_step.train_step, system)
    return jax.jit(step, donate_argnums=0, out_shardings=devices.replicated(mesh))


class MadeRun(NamedTuple):
    """A run on made-up clips: every step sees all of them."""

    system: System
    mesh: jax.sharding.Mesh
    state: train_step.TrainState
    tables: train_step.Tables
    batch: Batch

    def compiled(self):
        """Returns the step, compiled ahead of its first call."""
        step = make_train_step(self.system, self.mesh)
        return step.lower(self.state, self.tables, self.batch).compile()

    def train(self, count):
        """Returns parameters and moments after some steps, on the host, and the losses."""
        step, state = self.compiled(), self.state
        losses = []
        for _ in range(count):
            state, loss = step(state, self.tables, self.batch)
            losses.append(loss)
        return jax.device_get((state.params, state.opt_state)), np.asarray(jax.device_get(losses))


def make(spec, *words, num_identities=50, num_devices=1, batch_size=32, other=False):
    """Prepares a run.

    Args:
      spec: stem of a shipped experiment, with its arguments behind a colon.
      words: overrides.
      num_identities: C.
      batch_size: number of clips.
      other: True if some clips show nobody known, and the model learns from them.
    """
    stem, _, arguments = spec.partition(":")
    config = config_io.load_file(f"{ROOT}/configs/{stem}.py:{arguments}")
    config = config_io.override(config, words)
    rng = np.random.default_rng(0)
    modalities = dict.fromkeys(config.modalities, WIDTH)
    mesh = devices.make_mesh(num_devices)
    task = TaskSpec(modalities, num_identities, None, batch_size, 100, train_other=other)
    system = make_system(config.to_dict(), task)
    members = ensemble.make_members(config.ensemble.to_dict())
    labels = rng.integers(0 if other else 1, 1 + num_identities, (len(members), batch_size))
    people = rng.normal(size=(1 + num_identities, WIDTH))

    def frames():
        noise = rng.normal(size=(batch_size, 3, WIDTH))
        quality = rng.uniform(30, 90, (batch_size, 3)).astype(np.float32)
        features = (people[labels[0]][:, None] + 0.5 * noise).astype(np.float32)
        number = np.tile(np.arange(3, dtype=np.int32), (batch_size, 1))
        return Frames(features, quality, quality / 100, number, np.ones((batch_size, 3), bool))

    batch = Batch(
        {name: frames() for name in modalities},
        np.arange(batch_size, dtype=np.int32),
        np.ones(batch_size, bool),
    )

    def init():
        rngs = ensemble.make_rngs(members, 0)
        return train_step.init_state(system, rngs, labels.astype(np.int32))

    state = jax.jit(init, out_shardings=devices.replicated(mesh))()
    tables = train_step.make_tables(members, np.ones(labels.shape))
    tables = devices.replicate(mesh, tables)
    return MadeRun(system, mesh, state, tables, devices.shard_batch(mesh, batch))
