"""The state that training changes, the tables that it reads, and their initial values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding

from vidjax import ensemble
from vidjax.batch import Array, ClipInfo, Frames
from vidjax.models.base import ModelState, Params
from vidjax.system import System


class TrainState(struct.PyTreeNode):
    """The state of training; every field except `step` has a leading axis E."""

    step: Array  # [] int32, number of optimiser steps done
    params: Params
    model_state: ModelState  # all other collections of the model, such as `batch_stats`
    opt_state: optax.OptState
    rng: Array  # [E] typed keys; every step folds its number into them, so they stay constant
    labels: Array  # [E, N] int32, class column of every training clip; constant within a step
    bad_steps: Array  # [E] int32, number of consecutive steps without a finite loss and gradient
    sums: Mapping[str, Array]  # metric -> [E] float32, sum since the last line of the log


class Tables(NamedTuple):
    """Weights and settings of the members; constant in training."""

    weight: Array  # [E, N] float32, of every training clip; 0 if a member is not trained on it
    min_quality: Array  # [E] float32, lowest quality of the frames that a member is trained on
    view: Array  # [E] int32, chunk of the features that is hidden from a member; -1 for none


def make_tables(members: Sequence[ensemble.Member], weight: Array) -> Tables:
    """Builds the tables of E members, with the weight [E, N] of every training clip."""
    return Tables(
        weight=np.asarray(weight, np.float32),
        min_quality=np.array([member.min_quality for member in members], np.float32),
        view=np.array([member.view for member in members], np.int32),
    )


def init_state(
    system: System, modalities: Mapping[str, int], rngs: Array, labels: Array
) -> TrainState:
    """Builds the state at step 0.

    `rngs` [E] has one key per member, for its parameters and draws. Labels are [E, N] int32.
    """

    def init_member(rng: Array) -> tuple[Params, ModelState, Array]:
        init_rng, fuse_rng, state_rng = jax.random.split(rng, 3)
        fused = system.fuse(fuse_rng, blank_clip(modalities), jnp.int32(0))
        fused, exists = system.to_examples(fused)
        rows = jnp.zeros(exists.size, jnp.int32)
        clips = ClipInfo(index=rows, mask=rows == 0, labels=rows)
        variables = dict(system.model.init(init_rng, fused, clips, train=False))
        return variables.pop("params", {}), variables, state_rng

    params, model_state, rngs = jax.lax.map(init_member, rngs)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=model_state,
        opt_state=_init_optimizer(system.tx, params, len(labels)),
        rng=rngs,
        labels=labels,
        bad_steps=jnp.zeros(len(labels), jnp.int32),
        sums=zero_sums(len(labels)),
    )


def abstract_state(
    system: System, modalities: Mapping[str, int], num_members: int = 1
) -> TrainState:
    """Returns the shapes and dtypes of the state of a system for one training clip."""

    def init() -> TrainState:
        rngs = jax.random.split(jax.random.key(0), num_members)
        return init_state(system, modalities, rngs, jnp.zeros((num_members, 1), jnp.int32))

    return jax.eval_shape(init)


def blank_clip(modalities: Mapping[str, int]) -> dict[str, Frames]:
    """Returns one clip of one frame: the shapes of parameters depend on widths alone."""
    row = jnp.zeros((1, 1))
    return {
        name: Frames(jnp.zeros((1, 1, dim)), row, row, row.astype(jnp.int32), row == 0)
        for name, dim in modalities.items()
    }


def make_state(
    init: Callable[[], TrainState], tx: optax.GradientTransformation, layout: NamedSharding
) -> TrainState:
    """Builds the state at step 0 on the devices; `init` is `init_state` with its arguments.

    Drawing the parameters takes three times their memory. So a second program adds the state of the
    optimiser, which is twice the size of the parameters.
    """
    state = jax.jit(lambda: init().replace(opt_state=None), out_shardings=layout)()
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


def zero_sums(num_members: int) -> dict[str, Array]:
    """Returns sums of 0, metric -> [E] float32."""
    names = ("loss", "correct", "weight", "bad_steps")
    return {name: jnp.zeros(num_members, jnp.float32) for name in names}


def split_state(state: TrainState, size: int) -> tuple[TrainState, ...]:
    """Splits the state of E members into states of `size` members each."""
    parts = ensemble.split(state.replace(step=None), size)
    # A copy of the step for each: steps donate it.
    return tuple(part.replace(step=state.step + 0) for part in parts)


def merge_states(states: Sequence[TrainState]) -> TrainState:
    """Reverses `split_state`."""
    parts = [state.replace(step=None) for state in states]
    return ensemble.merge(parts).replace(step=states[0].step)


def as_items(state: TrainState) -> dict[str, Any]:
    """Returns the items of a checkpoint; evaluation reads only `params` and `model_state`."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    own = {name: rest.pop(name) for name in ("params", "model_state")}
    return {**own, "train": rest}


def of_items(items: Mapping[str, Any]) -> TrainState:
    """Reverses `as_items`."""
    own = {name: item for name, item in items.items() if name != "train"}
    return TrainState(**own, **items["train"])
