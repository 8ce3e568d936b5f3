"""The training step: one optimiser step of every member, a pure function of state and batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vidjax import devices, ensemble, fusion
from vidjax.augment import MemberBatch
from vidjax.batch import Array, Batch, ClipInfo, Frames, ModelOutput, Packed
from vidjax.models.base import ModelState, Params
from vidjax.steps import columns as columns_lib
from vidjax.steps import examples, sampled
from vidjax.steps.columns import ClassAxes
from vidjax.steps.state import Tables, TrainState
from vidjax.system import System

MAX_BAD_STEPS = 3  # consecutive steps without a finite loss and gradient before training stops


class Learned(NamedTuple):
    """The part of a member's state that a step changes; for the fields see `TrainState`."""

    params: Params
    model_state: ModelState
    opt_state: optax.OptState
    bad_steps: Array
    sums: Mapping[str, Array]
    updated: Array | None


class MemberInputs(NamedTuple):
    """Constant inputs of a step for one member.

    Attributes:
      rng: [] typed key of the member.
      labels: [B] int32, class columns of the clips.
      weight: [B] float32, weight of the clips; 0 for padded rows, for clips without frames, and for
        clips that the member is not trained on.
      min_quality: [] float32, lowest quality of the frames that the member is trained on.
      view: [] int32, chunk of the features that the member does not see; -1 for none.
    """

    rng: Array
    labels: Array
    weight: Array
    min_quality: Array
    view: Array


class MemberKeys(NamedTuple):
    """Random keys of one member for one step, one for each purpose."""

    fusion: Array
    dropout: Array
    modality_dropout: Array
    transforms: Array
    classes: Array

    @classmethod
    def at(cls, rng: Array, step: Array) -> "MemberKeys":
        """Returns the keys of the member with a key, for a step."""
        return cls(*jax.random.split(jax.random.fold_in(rng, step), len(cls._fields)))


def train_step(
    system: System,
    state: TrainState,
    tables: Tables,
    batch: Batch,
    axes: ClassAxes | None = None,
) -> tuple[TrainState, jax.Array]:
    """Takes one optimiser step of every member.

    A member whose loss or gradient is not finite keeps its state; the sum `bad_steps` counts it.

    Args:
      system: the system.
      state: state before the step.
      tables: weights and settings of the members.
      batch: B clips, the same for all members. Rows outside `batch_mask`, clips without frames and
        clips of weight 0 have no effect.
      axes: axes of the class columns; None for a step that neither splits nor samples them.

    Returns:
      The new state, and the losses [E].
    """

    def step_member(learned: Learned, inputs: MemberInputs) -> tuple[Learned, jax.Array]:
        keys = MemberKeys.at(inputs.rng, state.step)
        clips = _draw_training_clips(system, state.step, keys, batch, inputs)
        if axes is None or system.sampled_classes == 1:
            return _learn(system, state.step, keys, batch, learned, clips)
        return _learn_sampled(system, state.step, keys, batch, learned, clips, axes)

    learned = Learned(*(getattr(state, name) for name in Learned._fields))
    inputs = _member_inputs(system, state, tables, batch)
    learned, losses = ensemble.apply_each(step_member, learned, inputs)
    return state.replace(step=state.step + 1, **learned._asdict()), losses


def _draw_training_clips(
    system: System, step: Array, keys: MemberKeys, batch: Batch, inputs: MemberInputs
) -> MemberBatch:
    """Draws the clips of one member, weights them and transforms them."""
    clips = _draw_clips(system, keys.fusion, batch, inputs)
    clips = clips._replace(weight=clips.weight * system.column_weight(clips.labels, step))
    for number, transform in enumerate(system.transforms):
        rng = jax.random.fold_in(keys.transforms, number) if number else keys.transforms
        clips = transform(rng, clips)
    return clips


def _learn_sampled(
    system: System,
    step: Array,
    keys: MemberKeys,
    batch: Batch,
    learned: Learned,
    clips: MemberBatch,
    axes: ClassAxes,
) -> tuple[Learned, jax.Array]:
    """Takes one optimiser step of one member on some of the classes, as `_learn` does on all."""
    labels = jnp.concatenate([labels for labels, _ in clips.targets])
    count = sampled.num_drawn(system, len(labels), axes.mesh.shape["model"])
    drawn = sampled.draw(keys.classes, labels, system.class_mask, count, axes.mesh)
    class_axes = Learned(*(getattr(axes.state, name) for name in Learned._fields))
    part = sampled.take(axes, class_axes, learned, drawn)
    before = part.updated
    assert before is not None
    narrow = sampled.narrow(system, drawn, class_axes.opt_state, step - before)
    part, loss = _learn(narrow, step, keys, batch, part, sampled.relabel(clips, drawn))
    part = part._replace(updated=jnp.where(part.bad_steps == 0, step + 1, before))
    return sampled.put(axes, class_axes, learned, part, drawn), loss


def _learn(
    system: System,
    step: Array,
    keys: MemberKeys,
    batch: Batch,
    learned: Learned,
    clips: MemberBatch,
) -> tuple[Learned, jax.Array]:
    """Takes one optimiser step of one member; returns its new state and its loss []."""
    frames, exists, info = _as_model_input(system, batch, clips)
    columns = info.labels
    assert columns is not None

    def mean_loss(params: Params) -> tuple[Array, tuple[Array, ModelState]]:
        output, new_model_state = system.model.apply(
            {"params": params, **learned.model_state},
            frames,
            info,
            train=True,
            rngs={"dropout": keys.dropout, "modality_dropout": keys.modality_dropout},
            mutable=list(learned.model_state),
        )
        per_clip = sum(
            share * _loss_by_clip(system, step, output, labels, exists, compared=exists)
            for labels, share in clips.targets
        )
        loss = jnp.sum(per_clip * clips.weight) / jnp.maximum(jnp.sum(clips.weight), 1e-6)
        return loss, (output.logits[:, 0], new_model_state)

    gradient = jax.value_and_grad(mean_loss, has_aux=True)
    (loss, (logits, new_model_state)), grads = gradient(learned.params)
    is_right = examples.is_best(jnp.where(system.class_mask, logits, -jnp.inf), columns)
    correct = examples.mean_over_examples(is_right, exists)
    total = jnp.sum(clips.weight)
    added = {"loss": loss * total, "correct": jnp.sum(correct * clips.weight), "weight": total}
    return _update(system, learned, loss, grads, new_model_state, added), loss


def _update(
    system: System,
    learned: Learned,
    loss: Array,
    grads: Params,
    new_model_state: ModelState,
    added: Mapping[str, Array],
) -> Learned:
    """Applies the gradients of one member if they and its loss are finite."""
    is_finite = jnp.isfinite(loss) & jnp.isfinite(_sum_of_all(grads))
    learned = learned._replace(model_state=dict(learned.model_state))

    def take() -> Learned:
        updates, opt_state = system.tx.update(grads, learned.opt_state, learned.params)
        params: Any = optax.apply_updates(learned.params, updates)
        sums = {name: value + added.get(name, 0) for name, value in learned.sums.items()}
        new = Learned(params, new_model_state, opt_state, jnp.int32(0), sums, learned.updated)
        # In linen, running statistics start as float32 and would take the dtype of the batch.
        return jax.tree.map(lambda x, old: x.astype(old.dtype), new, learned)

    def skip() -> Learned:
        sums = {**learned.sums, "bad_steps": learned.sums["bad_steps"] + 1}
        return learned._replace(bad_steps=learned.bad_steps + 1, sums=sums)

    # A choice number by number would make XLA copy the whole state before every step.
    return jax.lax.cond(is_finite, take, skip)


def _sum_of_all(grads: Params) -> Array:
    """Returns the sum of all derivatives, [], which is finite only if all of them are."""
    rows = [jnp.sum(jnp.atleast_1d(x), axis=-1) for x in jax.tree.leaves(grads)]
    # The barrier keeps the two sums apart. As one sum, a matrix of 160 MB takes XLA for CPUs 1 s.
    return sum((jnp.sum(x) for x in jax.lax.optimization_barrier(rows)), jnp.float32(0))


def _member_inputs(system: System, state: TrainState, tables: Tables, batch: Batch) -> MemberInputs:
    """Gathers the inputs of a step for every member, with a leading axis E."""
    frames = {name: batch.frames[name] for name in system.fuse_train}
    usable = batch.batch_mask & fusion.has_frames(frames)
    return MemberInputs(
        rng=state.rng,
        labels=state.labels[:, batch.clip_index],  # [E, B]
        weight=tables.weight[:, batch.clip_index] * usable,
        min_quality=tables.min_quality,
        view=tables.view,
    )


def _draw_clips(system: System, rng: Array, batch: Batch, inputs: MemberInputs) -> MemberBatch:
    """Draws the fused frames on which one member trains in one step."""
    clips = MemberBatch(
        frames={name: batch.frames[name] for name in system.fuse_train},
        labels=inputs.labels,
        weight=inputs.weight,
        min_quality=inputs.min_quality,
        targets=((inputs.labels, jnp.ones_like(inputs.weight)),),
    )
    # Fusion folds the numbers 0 to M - 1 into the key. The transforms get the numbers from M on,
    # counted from the last one, so that adding `keep_quality` in front leaves their draws as is.
    number = len(clips.frames) + len(system.clip_transforms)
    for transform in system.clip_transforms:
        number -= 1
        clips = transform(jax.random.fold_in(rng, number), clips)
    fused = examples.fuse(system, system.fuse_train, rng, clips.frames, inputs.view)
    return clips._replace(frames=fused)


def _as_model_input(
    system: System, batch: Batch, clips: MemberBatch
) -> tuple[dict[str, Frames], Array, ClipInfo]:
    """Returns the input of the model: its frames, the mask of examples [B, T'], and its clips."""
    frames, exists = examples.to_examples(clips.frames, apart=system.examples)
    exists = exists & (clips.weight > 0)[:, None]
    info = ClipInfo(
        index=examples.spread(batch.clip_index, exists),
        mask=exists.reshape(-1),
        labels=examples.spread(clips.labels, exists),
    )
    return frames, exists, info


def _loss_by_clip(
    system: System,
    step: Array,
    output: ModelOutput,
    labels: Array,
    exists: Array,
    *,
    compared: Array,
) -> Array:
    """Returns the loss of every clip, [B] float, averaged over its examples.

    Args:
      system: the system.
      step: [] int32, number of the step.
      output: output of the model for B T' examples.
      labels: [B] int32, class columns of the clips.
      exists: [B, T'] bool, the examples that count.
      compared: [B, T'] bool, the examples that a loss of embeddings compares with each other.
    """
    losses = system.objective(output, examples.spread(labels, exists), compared.reshape(-1), step)
    return examples.mean_over_examples(losses, exists)


def find_bad_clips(
    system: System, state: TrainState, tables: Tables, batch: Batch, step: Array
) -> Array:
    """Finds the clips of a skipped step whose loss or its derivative is not finite.

    The losses are computed without dropout, without the transforms after fusion, and without the
    loss of the embeddings.

    Args:
      system: the system.
      state: state after the step, with the parameters from before it, since it was skipped.
      tables: weights and settings of the members.
      batch: the B clips of the step.
      step: [] int32, number of the step.

    Returns:
      [B] bool.
    """

    def find(member: tuple[Params, ModelState, MemberInputs]) -> Array:
        params, model_state, inputs = member
        keys = MemberKeys.at(inputs.rng, step)
        clips = _draw_clips(system, keys.fusion, batch, inputs)
        frames, exists, info = _as_model_input(system, batch, clips)

        def losses_of(features: Mapping[str, Array]) -> Array:
            output = system.model.apply(
                {"params": params, **model_state},
                {name: x._replace(features=features[name]) for name, x in frames.items()},
                info,
                train=False,
            )
            # A loss of embeddings would blame a bad clip on those that it is compared with.
            none = jnp.zeros_like(exists)
            return _loss_by_clip(system, step, output, clips.labels, exists, compared=none)

        features = {name: x.features.astype(jnp.float32) for name, x in frames.items()}
        # Clips do not depend on each other here, so one derivative serves all of them.
        losses, slopes = jax.jvp(losses_of, (features,), (features,))
        return (clips.weight > 0) & ~(jnp.isfinite(losses) & jnp.isfinite(slopes))

    inputs = _member_inputs(system, state, tables, batch)
    return jnp.any(jax.lax.map(find, (state.params, state.model_state, inputs)), axis=0)


def make_train_step(
    system: System, mesh: Mesh, axes: ClassAxes | None = None
) -> Callable[[TrainState, Tables, Batch], tuple[TrainState, jax.Array]]:
    """Compiles `train_step` of a system for a mesh; the state argument is donated."""

    def step(state: TrainState, tables: Tables, batch: Batch) -> tuple[TrainState, jax.Array]:
        return train_step(system, state, tables, batch, axes)

    return jax.jit(step, donate_argnums=0, out_shardings=_out_layout(mesh, axes))


class Outcome(NamedTuple):
    """The report of a dispatch of training steps to the host.

    Attributes:
      loss: [E] float32, losses of the last step.
      bad_step: [] int32, first step at which a member reached MAX_BAD_STEPS; -1 for none.
    """

    loss: Array
    bad_step: Array


def make_train_loop(
    system: System,
    mesh: Mesh,
    draw: Callable[[Mapping[str, Packed], Array], Batch],
    axes: ClassAxes | None = None,
) -> Callable[[TrainState, Tables, Mapping[str, Packed], Array], tuple[TrainState, Outcome]]:
    """Compiles many training steps into one program, (state, tables, clips, count) -> outcome.

    The number of steps is an argument, so that the program is compiled once. The state argument is
    donated. Two calls give the same result as one call with the sum of both counts.

    Args:
      system: the system.
      mesh: the devices.
      draw: (clips, step) -> the batch of that step, on the devices.
      axes: axes of the class columns, as in `train_step`.
    """

    def loop(
        state: TrainState, tables: Tables, clips: Mapping[str, Packed], count: Array
    ) -> tuple[TrainState, Outcome]:
        def body(_: Array, carry: tuple[TrainState, Outcome]) -> tuple[TrainState, Outcome]:
            state, outcome = carry
            batch = devices.constrain_batch(mesh, draw(clips, state.step))
            new_state, losses = train_step(system, state, tables, batch, axes)
            return new_state, watch(outcome, new_state, losses)

        num_members = len(state.rng)
        start = Outcome(jnp.zeros(num_members, jnp.float32), jnp.int32(-1))
        return jax.lax.fori_loop(0, count, body, (state, start))

    return jax.jit(loop, donate_argnums=0, out_shardings=_out_layout(mesh, axes))


def _out_layout(mesh: Mesh, axes: ClassAxes | None) -> tuple[Any, Any]:
    """Returns the layout of a state and of what comes with it."""
    return columns_lib.state_layout(mesh, axes), devices.replicated(mesh)


def watch(outcome: Outcome, state: TrainState, losses: Array) -> Outcome:
    """Adds one step to an outcome.

    Args:
      outcome: outcome of the steps before it.
      state: state after the step.
      losses: [E] float, losses of the step.
    """
    is_first = (outcome.bad_step < 0) & jnp.any(state.bad_steps >= MAX_BAD_STEPS)
    bad_step = jnp.where(is_first, state.step - 1, outcome.bad_step)
    return Outcome(losses.astype(jnp.float32), bad_step)
