"""The training step: one optimiser step of every member, a pure function of state and batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vidjax import devices, ensemble, selection
from vidjax.augment import MemberBatch
from vidjax.batch import Array, Batch, ClipInfo, Frames, ModelOutput
from vidjax.steps import examples
from vidjax.steps.state import Tables, TrainState
from vidjax.system import System

MAX_BAD_STEPS = 3  # consecutive steps without a finite loss and gradient before training stops


class Learned(NamedTuple):
    """The part of a member's state that a step changes; fields as in `TrainState`."""

    params: Any
    model_state: Any
    opt_state: Any
    bad_steps: Array
    sums: Mapping[str, Array]


class MemberInputs(NamedTuple):
    """What a step reads for one member.

    Attributes:
      rng: [] typed key of the member.
      labels: [B] int32, class columns of the clips.
      weight: [B] float32, 0 for padded rows, clips without a frame, and clips not to learn from.
      min_quality: [] float32, the member trains on frames of at least this quality.
      view: [] int32, the chunk of the features that the member never sees.
    """

    rng: Array
    labels: Array
    weight: Array
    min_quality: Array
    view: Array


class MemberKeys(NamedTuple):
    """Random keys of one member for one step, a key for each purpose."""

    fusion: Array
    dropout: Array
    modality_dropout: Array
    transforms: Array


def train_step(
    system: System, state: TrainState, tables: Tables, batch: Batch
) -> tuple[TrainState, Array]:
    """Takes one optimiser step of every member; returns the new state and the losses [E].

    A member whose loss or gradient is not finite keeps its state, and the step is counted.

    Args:
      system: the system.
      state: state before the step.
      tables: weights and settings of the members.
      batch: B clips, read once for all members. Rows outside `batch_mask`, clips without a frame
        and clips of weight 0 change nothing.
    """

    def step_member(learned: Learned, inputs: MemberInputs) -> tuple[Learned, Array]:
        return _step_member(system, state.step, batch, learned, inputs)

    learned = Learned(*(getattr(state, name) for name in Learned._fields))
    inputs = _member_inputs(system, state, tables, batch)
    learned, losses = ensemble.apply_each(step_member, learned, inputs)
    return state.replace(step=state.step + 1, **learned._asdict()), losses


def _step_member(
    system: System, step: Array, batch: Batch, learned: Learned, inputs: MemberInputs
) -> tuple[Learned, Array]:
    """Takes one optimiser step of one member; returns its new state and its loss []."""
    keys = MemberKeys(*jax.random.split(jax.random.fold_in(inputs.rng, step), 4))
    clips = _draw_clips(system, keys.fusion, batch, inputs)
    clips = clips._replace(weight=clips.weight * system.column_weight(clips.labels, step))
    for number, transform in enumerate(system.transforms):
        rng = jax.random.fold_in(keys.transforms, number) if number else keys.transforms
        clips = transform(rng, clips)
    frames, exists, info = _as_model_input(system, batch, clips)

    def mean_loss(params: Any) -> tuple[Array, tuple[Array, Any]]:
        output, new_model_state = system.model.apply(
            {"params": params, **learned.model_state},
            frames,
            info,
            train=True,
            rngs={"dropout": keys.dropout, "modality_dropout": keys.modality_dropout},
            mutable=list(learned.model_state),
        )
        per_clip = sum(
            share * _loss_by_clip(system, step, output, labels, exists)
            for labels, share in clips.targets
        )
        loss = jnp.sum(per_clip * clips.weight) / jnp.maximum(jnp.sum(clips.weight), 1e-6)
        return loss, (output.logits[:, 0], new_model_state)

    gradient = jax.value_and_grad(mean_loss, has_aux=True)
    (loss, (logits, new_model_state)), grads = gradient(learned.params)
    is_right = examples.is_best(jnp.where(system.class_mask, logits, -jnp.inf), info.labels)
    correct = examples.mean_over_examples(is_right, exists)
    total = jnp.sum(clips.weight)
    added = {"loss": loss * total, "correct": jnp.sum(correct * clips.weight), "weight": total}
    return _update(system, learned, loss, grads, new_model_state, added), loss


def _update(
    system: System,
    learned: Learned,
    loss: Array,
    grads: Any,
    new_model_state: Any,
    added: Mapping[str, Array],
) -> Learned:
    """Applies the gradients of one member, unless they or its loss are not finite."""
    is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))

    def if_finite(new: Any, old: Any) -> Any:
        # Linen's running statistics start as float32 and would take the dtype of the batch's.
        return jax.tree.map(lambda x, y: jnp.where(is_finite, x.astype(y.dtype), y), new, old)

    updates, new_opt_state = system.tx.update(grads, learned.opt_state, learned.params)
    new_params = optax.apply_updates(learned.params, updates)
    sums = {name: learned.sums[name] for name in added}
    new_sums = {name: sums[name] + added[name] for name in added}
    return Learned(
        params=if_finite(new_params, learned.params),
        model_state=if_finite(new_model_state, dict(learned.model_state)),
        opt_state=if_finite(new_opt_state, learned.opt_state),
        bad_steps=jnp.where(is_finite, 0, learned.bad_steps + 1),
        sums={
            **if_finite(new_sums, sums),
            "bad_steps": learned.sums["bad_steps"] + ~is_finite,
        },
    )


def _member_inputs(system: System, state: TrainState, tables: Tables, batch: Batch) -> MemberInputs:
    """Gathers what a step reads for every member, with a leading axis E."""
    frames = {name: batch.frames[name] for name in system.fuse_train}
    usable = batch.batch_mask & selection.has_frames(frames)
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
    # Fusion folds 0 to M - 1 into the key. The numbers from M on are counted from the last
    # transform, so that one which draws nothing leaves the draws of those after it alone.
    number = len(clips.frames) + len(system.clip_transforms)
    for transform in system.clip_transforms:
        number -= 1
        clips = transform(jax.random.fold_in(rng, number), clips)
    fused = examples.fuse(system, system.fuse_train, rng, clips.frames, inputs.view)
    return clips._replace(frames=fused)


def _as_model_input(
    system: System, batch: Batch, clips: MemberBatch
) -> tuple[dict[str, Frames], Array, ClipInfo]:
    """Returns frames for the model, [B, T'] bool of the examples that exist, and their clips."""
    frames, exists = system.to_examples(clips.frames)
    exists = exists & (clips.weight > 0)[:, None]
    info = ClipInfo(
        index=examples.spread(batch.clip_index, exists),
        mask=exists.reshape(-1),
        labels=examples.spread(clips.labels, exists),
    )
    return frames, exists, info


def _loss_by_clip(
    system: System, step: Array, output: ModelOutput, labels: Array, exists: Array
) -> Array:
    """Returns [B] float, the loss of every clip, averaged over its examples [B, T']."""
    losses = system.objective(output, examples.spread(labels, exists), exists.reshape(-1), step)
    return examples.mean_over_examples(losses, exists)


def find_bad_clips(
    system: System, state: TrainState, tables: Tables, batch: Batch, step: Array
) -> Array:
    """Finds the clips of a batch whose own loss or its derivative is not finite.

    Dropout and the transforms that mix clips play no part.

    Args:
      system: the system.
      state: state after a step that was left out: its parameters are those before the step.
      tables: weights and settings of the members.
      batch: B clips, those of that step.
      step: [] int32, number of that step.

    Returns:
      [B] bool.
    """

    def find(member: tuple[Any, Any, MemberInputs]) -> Array:
        params, model_state, inputs = member
        keys = MemberKeys(*jax.random.split(jax.random.fold_in(inputs.rng, step), 4))
        clips = _draw_clips(system, keys.fusion, batch, inputs)
        frames, exists, info = _as_model_input(system, batch, clips)

        def losses_of(features: Mapping[str, Array]) -> Array:
            output = system.model.apply(
                {"params": params, **model_state},
                {name: one._replace(features=features[name]) for name, one in frames.items()},
                info,
                train=False,
            )
            return _loss_by_clip(system, step, output, clips.labels, exists)

        features = {name: one.features.astype(jnp.float32) for name, one in frames.items()}
        # No clip touches another here, so one derivative tells about all of them.
        losses, slopes = jax.jvp(losses_of, (features,), (features,))
        return (clips.weight > 0) & ~(jnp.isfinite(losses) & jnp.isfinite(slopes))

    inputs = _member_inputs(system, state, tables, batch)
    return jnp.any(jax.lax.map(find, (state.params, state.model_state, inputs)), axis=0)


def make_train_step(
    system: System, mesh: Mesh
) -> Callable[[TrainState, Tables, Batch], tuple[TrainState, Array]]:
    """Compiles `train_step` of a system for a mesh; the state it is given is donated."""

    def step(state: TrainState, tables: Tables, batch: Batch) -> tuple[TrainState, Array]:
        return train_step(system, state, tables, batch)

    return jax.jit(step, donate_argnums=0, out_shardings=devices.replicated(mesh))


class Outcome(NamedTuple):
    """What a dispatch of training steps reports to the host.

    Attributes:
      loss: [E] float32, losses of the last step.
      bad_step: [] int32, first step at which a member reached MAX_BAD_STEPS; -1 for none.
    """

    loss: Array
    bad_step: Array


def make_train_loop(
    system: System, mesh: Mesh, draw: Callable[[Any, Array], Batch]
) -> Callable[[TrainState, Tables, Any, Array], tuple[TrainState, Outcome]]:
    """Compiles many training steps into one program, (state, tables, clips, count) -> outcome.

    The count is an argument, so that one compilation serves any number of steps. The state is
    donated. The result does not depend on how steps are spread over calls.

    Args:
      system: the system.
      mesh: the devices.
      draw: (clips, step) -> the batch of that step, on the devices.
    """

    def loop(
        state: TrainState, tables: Tables, clips: Any, count: Array
    ) -> tuple[TrainState, Outcome]:
        def body(_: Array, carry: tuple[TrainState, Outcome]) -> tuple[TrainState, Outcome]:
            state, outcome = carry
            batch = devices.constrain_batch(mesh, draw(clips, state.step))
            new_state, losses = train_step(system, state, tables, batch)
            return new_state, watch(outcome, new_state, losses)

        num_members = len(state.rng)
        start = Outcome(jnp.zeros(num_members, jnp.float32), jnp.int32(-1))
        return jax.lax.fori_loop(0, count, body, (state, start))

    return jax.jit(loop, donate_argnums=0, out_shardings=devices.replicated(mesh))


def watch(outcome: Outcome, state: TrainState, losses: Array) -> Outcome:
    """Adds one step to an outcome.

    Args:
      outcome: outcome of the steps before.
      state: state after the step.
      losses: [E] float, losses of the step.
    """
    is_first = (outcome.bad_step < 0) & jnp.any(state.bad_steps >= MAX_BAD_STEPS)
    bad_step = jnp.where(is_first, state.step - 1, outcome.bad_step)
    return Outcome(losses.astype(jnp.float32), bad_step)
