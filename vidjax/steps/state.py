"""The state that training changes, the tables that it reads, and their initial values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from vidjax import devices, ensemble
from vidjax.batch import Array, Batch, ClipInfo, Frames
from vidjax.models.base import ModelState, Params
from vidjax.steps import examples
from vidjax.system import System


class TrainState(struct.PyTreeNode):
    """The state of training; every field except `step` has a leading axis E.

    Attributes:
      step: [] int32, number of optimiser steps done.
      params: parameters of the model.
      model_state: all other collections of the model, such as `batch_stats`.
      opt_state: state of the optimiser.
      rng: [E] typed keys. Every step folds its number into them, so they stay constant.
      labels: [E, N] int32, class column of every training clip; constant within a step.
      bad_steps: [E] int32, number of consecutive steps without a finite loss and gradient.
      sums: metric -> [E] float32, sum since the last line of the log.
      updated: [E, K] int32, number of steps done after the one that last drew a class column; None
        where every step sees all classes.
    """

    step: Array
    params: Params
    model_state: ModelState
    opt_state: optax.OptState
    rng: Array
    labels: Array
    bad_steps: Array
    sums: Mapping[str, Array]
    updated: Array | None


_BY_MEMBER = ("params", "model_state", "opt_state", "rng", "labels", "bad_steps", "sums", "updated")


class Tables(NamedTuple):
    """Weights and settings of the members; constant in training.

    Attributes:
      weight: [E, N] float32, weight of every training clip; 0 if a member is not trained on it.
      min_quality: [E] float32, lowest quality of the frames that a member is trained on.
      view: [E] int32, chunk of the features that a member does not see; -1 for none.
    """

    weight: Array
    min_quality: Array
    view: Array


def make_tables(members: Sequence[ensemble.Member], weight: Array) -> Tables:
    """Builds the tables of E members.

    Args:
      members: [E] members.
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
    """Builds the state at step 0.

    Args:
      system: the system.
      modalities: name -> feature width of the data.
      rngs: [E] typed keys. The parameters and all random draws of a member depend on its key.
      labels: [E, N] int32, class columns of the training clips.
    """
    batch = _blank_batch(modalities)
    view = jnp.int32(0)

    def init_member(rng: Array) -> dict[str, Any]:
        init_rng, fuse_rng, state_rng = jax.random.split(rng, 3)
        fused = examples.fuse(system, system.fuse_train, fuse_rng, batch.frames, view)
        fused, exists = examples.to_examples(fused, apart=system.examples)
        rows = jnp.zeros(exists.size, jnp.int32)
        clips = ClipInfo(index=rows, mask=rows == 0, labels=rows)
        variables = dict(system.model.init(init_rng, fused, clips, train=False))
        return {
            "params": variables.pop("params", {}),
            "model_state": variables,
            "rng": state_rng,
        }

    state = jax.lax.map(init_member, rngs)
    updated = None
    if system.sampled_classes < 1:
        updated = jnp.zeros((len(labels), system.model.num_classes), jnp.int32)
    return TrainState(
        step=jnp.int32(0),
        labels=labels,
        bad_steps=jnp.zeros(len(labels), jnp.int32),
        sums=zero_sums(len(labels)),
        updated=updated,
        opt_state=_init_optimizer(system.tx, state["params"], len(labels)),
        **state,
    )


def make_state(
    init: Callable[[], TrainState], tx: optax.GradientTransformation, layout: devices.Layout
) -> TrainState:
    """Builds the state at step 0 on the devices.

    Random draws hold three times the memory of their result meanwhile. So a second program adds the
    state of the optimiser, which is twice the size of the parameters.

    Args:
      init: builds the state, see `init_state`.
      tx: the optimiser.
      layout: layout of the state.
    """
    drawn = layout.replace(opt_state=None) if isinstance(layout, TrainState) else layout
    state = jax.jit(lambda: init().replace(opt_state=None), out_shardings=drawn)()
    complete = jax.jit(
        lambda state: state.replace(opt_state=_init_optimizer(tx, state.params, len(state.labels))),
        out_shardings=layout,
        donate_argnums=0,
    )
    return complete(state)


def _init_optimizer(
    tx: optax.GradientTransformation, params: Params, num_members: int
) -> optax.OptState:
    """Returns the state of the optimiser of each member; a model may have no parameters."""
    return jax.vmap(tx.init, axis_size=num_members)(params)


def _blank_batch(modalities: Mapping[str, int]) -> Batch:
    """Returns one clip of one frame; shapes of parameters depend on feature widths alone."""

    def frames(dim: int) -> Frames:
        row = jnp.zeros((1, 1))
        return Frames(jnp.zeros((1, 1, dim)), row, row, row.astype(jnp.int32), row == 0)

    return Batch(
        {name: frames(dim) for name, dim in modalities.items()},
        clip_index=jnp.zeros(1, jnp.int32),
        batch_mask=jnp.ones(1, bool),
    )


def zero_sums(num_members: int) -> dict[str, Array]:
    """Returns sums of 0, metric -> [E] float32."""
    names = ("loss", "correct", "weight", "bad_steps")
    return {name: jnp.zeros(num_members, jnp.float32) for name in names}


def split_state(state: TrainState, size: int) -> tuple[TrainState, ...]:
    """Splits the state of E members into states of `size` members each."""
    parts = ensemble.split({name: getattr(state, name) for name in _BY_MEMBER}, size)
    return tuple(
        TrainState(step=state.step + 0, **part) for part in parts
    )  # a copy for each: steps donate it


def merge_states(states: Sequence[TrainState]) -> TrainState:
    """Reverses `split_state`."""
    if len(states) == 1:
        return states[0]
    parts = [{name: getattr(state, name) for name in _BY_MEMBER} for state in states]
    return TrainState(step=states[0].step, **ensemble.merge(parts))
