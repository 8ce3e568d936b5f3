"""Updates the members of an ensemble with an optimiser step.

A member is one of the E nets of an ensemble. A single net is an ensemble with E = 1.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from vidjax.core import devices, ensemble, fusion
from vidjax.core.augment import BatchTransform, MemberClips
from vidjax.core.batch import Array, Batch, ClipInfo, Frames, LazyFeatures, Packed
from vidjax.core.losses import is_argmax
from vidjax.data import resident
from vidjax.data.clips import BatchPlan, DrawnClips
from vidjax.models.base import ModelState, Params
from vidjax.models.build_system import System

MAX_BAD_STEPS = 3  # consecutive steps without a finite loss and gradient that stop training


class TrainState(struct.PyTreeNode):
    """The state of training of E nets (members). All fields except `step` have a leading axis E."""

    step: Array  # [] int32, number of finished optimiser steps
    params: Params
    model_state: ModelState  # all other collections of the model, such as `batch_stats`
    opt_state: optax.OptState
    rng: Array  # [E] PRNG keys, constant: every step folds the number of the step into them
    labels: Array  # [E, N] int32, class of every training clip; changes only between steps
    bad_steps: Array  # [E] int32, steps since the loss and the gradient were last finite
    sums: Mapping[str, Array]  # metric -> [E] float32, sum since the log was last written


class MemberConstants(NamedTuple):
    """Arrays that stay the same in all training steps of E members, the nets of an ensemble."""

    weight: Array  # [E, N] float32, weight of every training clip; 0 if a member does not use it
    min_quality: Array  # [E] float32, lowest quality of the frames that a member is trained on
    hidden_chunk: Array  # [E] int32, see `System.fuse`


def make_member_constants(members: Sequence[ensemble.Member], weight: Array) -> MemberConstants:
    """Returns arrays that stay the same in all training steps of E members (nets of an ensemble).

    `weight` [E, N] float is the weight of each of N training clips in the loss of each member.
    """
    return MemberConstants(
        weight=np.asarray(weight, np.float32),
        min_quality=np.array([member.min_quality for member in members], np.float32),
        hidden_chunk=np.array([member.view for member in members], np.int32),
    )


def init_state(system: System, rngs: Array, labels: Array) -> TrainState:
    """Returns the state at step 0 of E members, the nets of an ensemble, with random parameters.

    `rngs` [E] has a PRNG key for all random draws of each member. `labels` [E, N] int32 are the
    classes of the N training clips at step 0, which `noise_classes.relabel` may change later.
    """

    def init_member(rng: Array) -> tuple[Params, ModelState, Array]:
        init_rng, fuse_rng, state_rng = jax.random.split(rng, 3)
        return *system.init(init_rng, fuse_rng), state_rng

    params, model_state, rngs = jax.lax.map(init_member, rngs)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=model_state,
        opt_state=_init_optimizer(system.tx, params, len(labels)),
        rng=rngs,
        labels=labels,
        bad_steps=jnp.zeros(len(labels), jnp.int32),
        sums={
            name: jnp.zeros(len(labels), jnp.float32)
            for name in ("loss", "correct", "weight", "bad_steps")
        },
    )


def make_state(
    init: Callable[[], TrainState],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    change: Callable[[TrainState], TrainState] = lambda state: state,
) -> TrainState:
    """Returns the state of training at step 0, on every device of `mesh`.

    `init` calls `init_state`. Then `change` may change the weights. Finally, the state of the
    optimiser `tx` is computed from the weights. The weights and the state of the optimiser are
    computed by two compiled programs, because a single program would need more memory.
    """

    def complete(state: TrainState) -> TrainState:
        return state.replace(opt_state=_init_optimizer(tx, state.params, len(state.labels)))

    # Drawing the parameters takes 3 times their memory, the state of the optimiser 2 times.
    layout = devices.replicated_layout(mesh)
    draw = devices.jit(lambda: init().replace(opt_state=None), mesh, out_shardings=layout)
    add_rest = devices.jit(complete, mesh, out_shardings=layout, donate_argnums=0)
    return add_rest(change(draw()))


def _init_optimizer(
    tx: optax.GradientTransformation, params: Params, num_members: int
) -> optax.OptState:
    return jax.vmap(tx.init, axis_size=num_members)(params)  # `params` may be an empty tree


def split_state(state: TrainState, size: int) -> tuple[TrainState, ...]:
    """Splits the state of E members (nets) into E / `size` states of `size` members each."""
    parts = ensemble.split(state.replace(step=None), size)
    # Each part gets a copy of the step, because steps donate it.
    return tuple(part.replace(step=state.step + 0) for part in parts)


def convert_to_items(state: TrainState) -> dict[str, Any]:
    """Converts a state of training to trees of arrays for a checkpoint, name -> tree.

    Only training reads the tree `train`. An evaluation reads `params` and `model_state`.
    """
    rest = dict(vars(state))
    params, model_state = rest.pop("params"), rest.pop("model_state")
    return {"params": params, "model_state": model_state, "train": rest}


# Resident clips and the clips of each step, [S, B]; or a streamed batch.
StepClips = tuple[Mapping[str, Packed], DrawnClips] | Batch
# The inputs of one member: PRNG key [], labels [B] and weights [B] of the clips, lowest quality []
# and hidden chunk []; see MemberConstants.
MemberInputs = tuple[Array, Array, Array, Array, Array]


def train_step(
    system: System, state: TrainState, constants: MemberConstants, batch: Batch
) -> tuple[TrainState, jax.Array]:
    """Updates E nets (members) with a batch of clips. Returns the new state and the losses [E].

    If the loss or the gradient of a member is not finite, the member keeps its parameters, and the
    step is counted in `sums["bad_steps"]`. Padding, clips without frames and clips of weight 0 have
    no effect.
    """
    usable = batch.batch_mask & fusion.has_frames({x: batch.frames[x] for x in system.fuse_train})
    labels = state.labels[:, batch.clip_index]  # [E, B]
    weight = constants.weight[:, batch.clip_index] * usable
    inputs = (state.rng, labels, weight, constants.min_quality, constants.hidden_chunk)
    members = (state.replace(step=None, rng=None, labels=None), inputs)

    def step(learned: TrainState, inputs: MemberInputs) -> tuple[TrainState, jax.Array]:
        return take_member_step(system, state.step, learned, batch, inputs)

    if len(state.rng) > 1:
        learned, losses = jax.vmap(step)(*members)
    else:
        result = step(*jax.tree.map(lambda x: x[0], members))
        learned, losses = jax.tree.map(lambda x: x[None], result)
    new = learned.replace(step=state.step + 1, rng=state.rng, labels=state.labels)
    return new, losses


def take_member_step(
    system: System, step: Array, learned: TrainState, batch: Batch, inputs: MemberInputs
) -> tuple[TrainState, jax.Array]:
    """Updates one net (member) with a batch of B clips. Returns the new state and the loss [].

    `step` [] int32 is the number of earlier steps. `learned` is the state of the member, without
    `step`, `rng` and `labels`. `inputs` are the PRNG key, the labels [B] and weights [B] of the
    clips, and settings of the member, see MemberInputs.
    """
    member_rng, *_ = inputs
    keys = jax.random.split(jax.random.fold_in(member_rng, step), 4)
    fuse_rng, dropout_rng, modality_rng, transform_rng = keys
    clips = _transform_and_fuse(system, fuse_rng, batch, inputs)
    clips = clips._replace(weight=clips.weight * system.column_weight(clips.labels, step))
    for number, transform in enumerate(system.transforms):
        # With a small number, the key could equal a key that the first transform gets by `split`.
        key = jax.random.fold_in(transform_rng, 1 << 16 | number) if number else transform_rng
        clips = transform(key, clips)

    frames, exists = system.to_examples(clips.frames)
    exists = exists & (clips.weight > 0)[:, None]  # [B, T']

    def repeat(values: Array) -> Array:  # repeats a clip's value for each of its examples
        return jnp.repeat(values, exists.shape[1])

    labels, mask = repeat(clips.labels), exists.reshape(-1)
    info = ClipInfo(index=repeat(batch.clip_index), mask=mask, labels=labels)
    share_of_clip = exists / jnp.maximum(jnp.sum(exists, axis=1, keepdims=True), 1)  # [B, T']
    weight = (clips.weight[:, None] * share_of_clip).reshape(-1)  # of each example

    def mean_loss(params: Params) -> tuple[Array, tuple[Array, ModelState]]:
        output, model_state = system.model.apply(
            {"params": params, **learned.model_state},
            frames,
            info,
            train=True,
            rngs={"dropout": dropout_rng, "modality_dropout": modality_rng},
            mutable=list(learned.model_state),
        )
        losses = [system.objective(output, repeat(x), weight, step) for x, _ in clips.targets]
        per_clip = sum(
            share * average_over_examples(loss, exists)
            for loss, (_, share) in zip(losses, clips.targets, strict=True)
        )
        counted = clips.weight > 0 if system.divides_by_clips else clips.weight
        loss = jnp.sum(per_clip * clips.weight) / jnp.maximum(jnp.sum(counted), 1e-6)
        return loss, (output.logits[:, 0], model_state)

    gradient = jax.value_and_grad(mean_loss, has_aux=True)
    (loss, (logits, model_state)), grads = gradient(learned.params)
    is_right = is_argmax(jnp.where(system.class_mask, logits, -jnp.inf), labels)
    correct = average_over_examples(is_right, exists)
    total = jnp.sum(clips.weight)
    added = {"loss": loss * total, "correct": jnp.sum(correct * clips.weight), "weight": total}

    return _update_if_finite(system, learned, model_state, grads, added, loss), loss


def _update_if_finite(
    system: System,
    learned: TrainState,
    model_state: ModelState,
    grads: Params,
    added: Mapping[str, Array],
    loss: Array,
) -> TrainState:
    """Returns the state of a net after an optimiser step with the gradients `grads`.

    `learned` is the state before the step. `model_state` is the new state of the model. `added`,
    metric -> number, is added to the sums of the state. If the loss or a gradient is not finite,
    only `bad_steps` and `sums["bad_steps"]` change.
    """
    rows = [jnp.sum(jnp.atleast_1d(x), axis=-1) for x in jax.tree.leaves(grads)]
    # The barrier keeps two separate sums. A single sum of a matrix of 160 MB takes a CPU 1 second.
    total = sum((jnp.sum(x) for x in jax.lax.optimization_barrier(rows)), jnp.float32(0))
    is_finite = jnp.isfinite(loss) & jnp.isfinite(total)
    old = learned.replace(model_state=dict(learned.model_state))

    def update() -> TrainState:
        updates, opt_state = system.tx.update(grads, old.opt_state, old.params)
        new = old.replace(
            params=optax.apply_updates(old.params, updates),
            model_state=model_state,
            opt_state=opt_state,
            bad_steps=jnp.int32(0),
            sums={name: value + added.get(name, 0) for name, value in old.sums.items()},
        )
        # Without the cast, running statistics of Flax would change to the dtype of the batch.
        return jax.tree.map(lambda x, before: x.astype(before.dtype), new, old)

    def skip() -> TrainState:
        sums = {**old.sums, "bad_steps": old.sums["bad_steps"] + 1}
        return old.replace(bad_steps=old.bad_steps + 1, sums=sums)

    # With `jnp.where`, XLA would copy the whole state before every step.
    return jax.lax.cond(is_finite, update, skip)


def _transform_and_fuse(
    system: System, rng: Array, batch: Batch, inputs: MemberInputs
) -> MemberClips:
    """Augments the clips of a batch for one net, and fuses the frames of each clip.

    `rng` is a PRNG key. `inputs` are labels and weights of the clips and settings of the net, see
    MemberInputs. Returns the clips with the fused frames.
    """
    _, labels, weight, min_quality, hidden_chunk = inputs
    clips = MemberClips(
        frames={name: batch.frames[name] for name in system.fuse_train},
        labels=labels,
        weight=weight,
        min_quality=min_quality,
        targets=((labels, jnp.ones_like(weight)),),
    )
    # The fusion of M modalities folds the numbers 0 to M - 1 into the key. The last transform folds
    # M, and the transform before it M + 1. So a further first transform changes no other draw.
    number = len(clips.frames) + len(system.clip_transforms)
    for transform in system.clip_transforms:
        number -= 1
        clips = transform(jax.random.fold_in(rng, number), clips)
    fused = system.fuse(rng, clips.frames, hidden_chunk)
    return clips._replace(frames=fused, weight=clips.weight * fusion.has_frames(fused))


def _copy_everywhere(mesh: Mesh, batch: Batch) -> Batch:
    """Copies a batch to every device of `mesh`, inside a jitted function.

    The features of the result are LazyFeatures: row numbers of frames in an array [F, D].
    """
    batch = jax.lax.with_sharding_constraint(batch, devices.replicated_layout(mesh))

    def make_lazy(frames: Frames) -> Frames:
        values = frames.features
        if not isinstance(values, LazyFeatures):
            rows = jnp.arange(frames.mask.size, dtype=jnp.int32).reshape(frames.mask.shape)
            values = LazyFeatures(values.reshape(-1, values.shape[-1]), rows)
        return frames._replace(features=values)

    return batch._replace(frames={name: make_lazy(x) for name, x in batch.frames.items()})


def _transform_everywhere(mesh: Mesh, transform: BatchTransform) -> BatchTransform:
    """Returns `transform`, changed so that each device computes all rows and then keeps its own.

    Otherwise, XLA would distribute the sorting in `concat_clips` over the devices, which would
    exchange many messages.
    """
    whole = PartitionSpec()
    compute = jax.shard_map(transform, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)

    def apply(rng: Array, clips: MemberClips) -> MemberClips:
        clips = compute(rng, clips)
        rows = devices.constrain_batch(mesh, clips._replace(min_quality=None))
        return rows._replace(min_quality=clips.min_quality)

    return apply


def average_over_examples(values: Array, exists: Array) -> Array:
    """Returns the mean [B] of `values` [B * T'] for each of B clips with T' examples.

    Examples for which `exists` [B, T'] is False do not count. The mean of no examples is 0.
    """
    values = jnp.where(exists, values.reshape(exists.shape), 0.0)
    return jnp.sum(values, axis=1) / jnp.maximum(jnp.sum(exists, axis=1), 1)


class LoopResult(NamedTuple):
    """The result of a compiled loop of steps: last loss of each net, and first failed step."""

    loss: Array  # [E] float32, loss of the last step
    bad_step: Array  # [] int32, first step at which a member reached MAX_BAD_STEPS, or -1


Trained = tuple[TrainState, LoopResult]
Loop = Callable[[TrainState, MemberConstants, StepClips, Array | None], Trained]


def make_train_loop(system: System, mesh: Mesh, plan: BatchPlan) -> jax.stages.Wrapped:
    """Returns a compiled function that takes `count` training steps.

    The function maps (state, constants, clips, count) to (state, result). The memory of the first
    argument is reused (donated to JAX). Two calls give the same state as one call with the sum of
    the counts. If `clips` is a streamed batch, `count` is None, and the function takes one step.
    """
    place = functools.partial(devices.constrain_batch, mesh)
    if system.joins_clips and mesh.size > 1:
        transforms = tuple(_transform_everywhere(mesh, x) for x in system.clip_transforms)
        system = system._replace(clip_transforms=transforms)
        place = functools.partial(_copy_everywhere, mesh)

    def loop(
        state: TrainState, constants: MemberConstants, clips: StepClips, count: Array | None
    ) -> Trained:
        def body(number: Array, carry: Trained) -> Trained:
            state, outcome = carry
            if isinstance(clips, Batch):
                batch = clips
            else:
                packed, drawn = clips
                drawn = jax.tree.map(lambda rows: rows[number], drawn)
                batch = resident.gather_batch(packed, *drawn, sizes=plan.padded_lengths.items())
            new, losses = train_step(system, state, constants, place(batch))
            is_first = (outcome.bad_step < 0) & jnp.any(new.bad_steps >= MAX_BAD_STEPS)
            bad_step = jnp.where(is_first, state.step, outcome.bad_step)
            return new, LoopResult(losses.astype(jnp.float32), bad_step)

        num_members = len(state.rng)
        start = LoopResult(jnp.zeros(num_members, jnp.float32), jnp.int32(-1))
        if count is None:  # without a loop, which on a GPU waits for the host after each step
            return body(jnp.int32(0), (state, start))
        return jax.lax.fori_loop(0, count, body, (state, start))

    return devices.jit(loop, mesh, donate_argnums=0, out_shardings=devices.replicated_layout(mesh))
