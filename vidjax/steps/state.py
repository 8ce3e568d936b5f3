"""The state that training changes, the tables that it reads, and how both start."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from vidjax import ensemble
from vidjax.batch import Array, Batch, ClipInfo, Frames
from vidjax.steps import examples
from vidjax.system import System


class TrainState(struct.PyTreeNode):
    """What a step changes and a checkpoint holds; every field but `step` has a leading axis E.

    Attributes:
      step: [] int32, optimiser steps done.
      params: the model's parameters.
      model_state: the model's other collections, such as `batch_stats`.
      opt_state: the optimiser's state.
      rng: [E] typed keys. A step folds its number into them, so they never change.
      labels: [E, N] int32, class column of every training clip. A step leaves them alone.
      bad_steps: [E] int32, number of consecutive steps without a finite loss and gradient.
      sums: metric -> [E] float32, sum since the last line of the log.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    rng: Array
    labels: Array
    bad_steps: Array
    sums: Mapping[str, Array]


_BY_MEMBER = ("params", "model_state", "opt_state", "rng", "labels", "bad_steps", "sums")


class Tables(NamedTuple):
    """What the members learn from; constant in training.

    Attributes:
      weight: [E, N] float32, weight of every training clip; 0 where a member never sees it.
      min_quality: [E] float32, a member trains on frames of at least this quality.
      view: [E] int32, the chunk of the features that a member never sees; -1 for none.
    """

    weight: Array
    min_quality: Array
    view: Array


def make_tables(members: Sequence[ensemble.Member], weight: Array) -> Tables:
    """Returns the tables of E members.

    Args:
      members: [E].
      weight: [E, N] float, weight of every training clip for every member.
    """
    return Tables(
        weight=jnp.asarray(weight, jnp.float32),
        min_quality=jnp.asarray([member.min_quality for member in members], jnp.float32),
        view=jnp.asarray([member.view for member in members], jnp.int32),
    )


def init_state(
    system: System, modalities: Mapping[str, int], rngs: Array, labels: Array
) -> TrainState:
    """Returns the state at step 0.

    Args:
      system: the system.
      modalities: name -> feature width of the data.
      rngs: [E] typed keys; a member's parameters and all its later draws follow from its own.
      labels: [E, N] int32, class columns of the training clips.
    """
    batch = _blank_batch(modalities)
    view = jnp.int32(0)

    def init_member(rng: Array) -> dict[str, Any]:
        init_rng, fuse_rng, state_rng = jax.random.split(rng, 3)
        fused = examples.fuse(system, system.fuse_train, fuse_rng, batch.frames, view)
        fused, exists = system.to_examples(fused)
        rows = jnp.zeros(exists.size, jnp.int32)
        clips = ClipInfo(index=rows, mask=rows == 0, labels=rows)
        variables = dict(system.model.init(init_rng, fused, clips, train=False))
        params = variables.pop("params", {})
        return {
            "params": params,
            "model_state": variables,
            "opt_state": system.tx.init(params),
            "rng": state_rng,
        }

    state = jax.lax.map(init_member, rngs)
    return TrainState(
        step=jnp.int32(0),
        labels=labels,
        bad_steps=jnp.zeros(len(labels), jnp.int32),
        sums=zero_sums(len(labels)),
        **state,
    )


def _blank_batch(modalities: Mapping[str, int]) -> Batch:
    # Parameters depend on the widths alone, not on the number of clips or frames.
    def frames(dim: int) -> Frames:
        row = jnp.zeros((1, 1))
        return Frames(jnp.zeros((1, 1, dim)), row, row, row.astype(jnp.int32), row == 0)

    return Batch(
        {name: frames(dim) for name, dim in modalities.items()},
        clip_index=jnp.zeros(1, jnp.int32),
        batch_mask=jnp.ones(1, bool),
    )


def zero_sums(num_members: int) -> dict[str, Array]:
    """Returns empty metric sums, metric -> [E] float32."""
    names = ("loss", "correct", "weight", "bad_steps")
    return {name: jnp.zeros(num_members, jnp.float32) for name in names}


def split_state(state: TrainState, size: int) -> tuple[TrainState, ...]:
    """Splits the state of E members into states of `size` members each."""
    parts = ensemble.split({name: getattr(state, name) for name in _BY_MEMBER}, size)
    return tuple(TrainState(step=state.step + 0, **part) for part in parts)  # each is donated


def merge_states(states: Sequence[TrainState]) -> TrainState:
    """Reverses `split_state`."""
    if len(states) == 1:
        return states[0]
    parts = [{name: getattr(state, name) for name in _BY_MEMBER} for state in states]
    return TrainState(step=states[0].step, **ensemble.merge(parts))
