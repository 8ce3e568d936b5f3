"""The training step and the evaluation step: pure functions of state, tables and batch, jitted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from vidjax import augment, devices, ensemble, selection
from vidjax.batch import Array, Batch, Branches, Frames
from vidjax.system import System

MAX_BAD_STEPS = 3  # in a row: then more of them would not help
JOINED_FRAMES = 50  # clips of fewer are joined, of more cut; the 5th place's code, 2018


class TrainState(struct.PyTreeNode):
    """What a step changes, and what a checkpoint holds; all but `step` have a leading axis E.

    Attributes:
      step: optimiser steps done.
      params: the model's parameters.
      model_state: the model's other collections, e.g. batch_stats.
      opt_state: the optimiser's state.
      rng: [E] typed keys; a step uses them folded with `step`, so they never change.
      labels: [E, N] int32, the class column of every training clip; a step leaves them alone.
      bad_steps: [E] int32, how many of the last steps were left out, one after another.
      sums: metric -> [E] sum since the last line of the log.
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
    """What every member learns from: rows by member and by clip.

    Attributes:
      weight: [E, N] float32, the weight of every training clip; 0 where a member never sees it.
      min_quality: [E] float32, of the frames that a member is trained on.
      view: [E] int32, the chunk of the features that a member never sees.
    """

    weight: Array
    min_quality: Array
    view: Array


def make_tables(members: Sequence[ensemble.Member], weight: Array) -> Tables:
    """Returns the tables of some members.

    Args:
      members: [E].
      weight: [E, N], of every training clip for every member.
    """
    return Tables(
        weight=jnp.asarray(weight, jnp.float32),
        min_quality=jnp.asarray([member.min_quality for member in members], jnp.float32),
        view=jnp.asarray([member.view for member in members], jnp.int32),
    )


def init_state(
    system: System, modalities: Mapping[str, int], rngs: Array, labels: Array
) -> TrainState:
    """Returns the state of step 0.

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
        frames = _fuse(system, system.fuse_train, fuse_rng, batch.frames, view)
        if system.examples:
            frames, _ = augment.as_examples(frames)
        clips = len(next(iter(frames.values())).mask)
        zeros = jnp.zeros(clips, jnp.int32)
        variables = dict(
            system.model.init(
                init_rng,
                frames,
                clip_index=zeros,
                labels=zeros,
                batch_mask=jnp.ones(clips, bool),
                train=False,
            )
        )
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
    """Returns empty metric sums, metric -> [E]."""
    names = ("loss", "correct", "weight", "bad_steps")
    return {name: jnp.zeros(num_members, jnp.float32) for name in names}


def _fuse(
    system: System,
    fns: Mapping[str, Any],
    rng: Array | None,
    frames: Mapping[str, Frames],
    view: Array,
) -> dict[str, Frames]:
    fused = {}
    for i, (modality, fn) in enumerate(fns.items()):
        one = fn(None if rng is None else jax.random.fold_in(rng, i), frames[modality])
        one = one._replace(features=selection.read(one.features))
        if system.num_chunks:
            kept = ensemble.drop_chunk(one.features, view, system.num_chunks)
            one = one._replace(features=kept)
        fused[modality] = one
    return fused


def _branches(output: Any) -> Branches:
    """Returns what a model gave as branches, of which most have one."""
    if isinstance(output, Branches):
        return output
    ones = jnp.ones((len(output), 1), output.dtype)
    return Branches(output[:, None], ones, ones)


def train_step(
    system: System, state: TrainState, tables: Tables, batch: Batch
) -> tuple[TrainState, Array]:
    """Returns the state after one optimiser step of every member, and their losses [E].

    A member whose loss or gradient is not finite stays as it was, and the step is counted.

    Args:
      system: the system.
      state: before the step.
      tables: what every member learns from.
      batch: B clips, read once for all members; rows outside `batch_mask` change nothing, nor do
        clips without a frame or those that have weight 0 for a member.
    """
    learned = (state.params, state.model_state, state.opt_state, state.bad_steps, state.sums)

    def step_member(learned: Any, inputs: Mapping[str, Array]) -> tuple[Any, Array]:
        return _train_member(system, state.step, learned, inputs, batch)

    learned, losses = ensemble.apply_each(
        step_member, learned, _inputs(system, state, tables, batch)
    )
    params, model_state, opt_state, bad_steps, sums = learned
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        bad_steps=bad_steps,
        sums=sums,
    )
    return new_state, losses


def _inputs(system: System, state: TrainState, tables: Tables, batch: Batch) -> dict[str, Array]:
    """Returns what a step reads for every member, [E, ...]."""
    usable = batch.batch_mask & augment.has_frames({m: batch.frames[m] for m in system.fuse_train})
    return {
        "rng": state.rng,
        "labels": state.labels[:, batch.clip_index],  # [E, B]
        "weight": tables.weight[:, batch.clip_index] * usable,
        "min_quality": tables.min_quality,
        "view": tables.view,
    }


def _train_member(
    system: System, step: Array, learned: Any, inputs: Mapping[str, Array], batch: Batch
) -> tuple[Any, Array]:
    params, model_state, opt_state, bad_steps, sums = learned
    labels, weight = inputs["labels"], inputs["weight"]
    weight = weight * system.column_weight(labels, step)
    step_rng = jax.random.fold_in(inputs["rng"], step)
    fuse_rng, dropout_rng, modality_rng, clip_rng = jax.random.split(step_rng, 4)
    frames, batch_mask = _draw_frames(system, fuse_rng, batch, inputs), weight > 0
    share, partner = jnp.ones_like(weight), jnp.arange(len(weight))
    if system.mixup:
        frames, share, partner = augment.mix_up(clip_rng, system.mixup, frames, weight)
    exists = jnp.ones((len(weight), 1), bool)
    if system.examples:
        frames, exists = augment.as_examples(frames)
    exists = exists & batch_mask[:, None]  # [B, T']

    def mean_loss(params: Any) -> tuple[Array, tuple[Array, Any]]:
        output, new_model_state = system.model.apply(
            {"params": params, **model_state},
            frames,
            clip_index=_spread(batch.clip_index, exists),
            labels=_spread(labels, exists),
            batch_mask=exists.reshape(-1),
            train=True,
            rngs={"dropout": dropout_rng, "modality_dropout": modality_rng},
            mutable=list(model_state),
        )
        per_clip = _loss_by_clip(system, step, output, labels, exists)
        if system.mixup:
            other = _loss_by_clip(system, step, output, labels[partner], exists)
            per_clip = share * per_clip + (1 - share) * other
        loss = jnp.sum(per_clip * weight) / jnp.maximum(jnp.sum(weight), 1e-6)
        return loss, (_branches(output).logits[:, 0], new_model_state)

    (loss, (logits, new_model_state)), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    updates, new_opt_state = system.tx.update(grads, opt_state, params)
    best = is_best(jnp.where(system.class_mask, logits, -jnp.inf), _spread(labels, exists))
    right = jnp.sum(best.reshape(exists.shape) & exists, axis=1)
    correct = right / jnp.maximum(jnp.sum(exists, axis=1), 1)
    total = jnp.sum(weight)
    added = {"loss": loss * total, "correct": jnp.sum(correct * weight), "weight": total}

    def if_good(new: Any, old: Any) -> Any:
        # Linen's running statistics start as float32 and would take the dtype of the batch's.
        return jax.tree.map(lambda x, y: jnp.where(good, x.astype(y.dtype), y), new, old)

    sums_now = {name: sums[name] + added[name] for name in added}
    learned = (
        if_good(optax.apply_updates(params, updates), params),
        if_good(new_model_state, dict(model_state)),
        if_good(new_opt_state, opt_state),
        jnp.where(good, 0, bad_steps + 1),
        {
            **if_good(sums_now, {name: sums[name] for name in added}),
            "bad_steps": sums["bad_steps"] + ~good,
        },
    )
    return learned, loss


def _spread(x: Array, exists: Array) -> Array:
    """Returns [B T'], values of clips [B] for their examples [B, T']."""
    return jnp.repeat(x, exists.shape[1])


def _loss_by_clip(system: System, step: Array, output: Any, labels: Array, exists: Array) -> Array:
    """Returns [B], the mean loss of every clip's examples [B, T'], of a model's output for them."""
    logits, train_weight, _ = _branches(output)  # [B T', G, K]
    columns = jnp.broadcast_to(_spread(labels, exists)[:, None], logits.shape[:2])
    losses = jnp.sum(system.loss_fn(logits, columns, step) * train_weight, axis=1)
    losses = jnp.where(exists, losses.reshape(exists.shape), 0.0)
    return jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(exists, axis=1), 1)


def find_bad_clips(
    system: System, state: TrainState, tables: Tables, batch: Batch, step: Array
) -> Array:
    """Returns [B] bool, the clips of a batch whose own loss or slope is not finite.

    Dropout and the other clips of the batch play no part, nor does noise that is joined to a clip.

    Args:
      system, tables, batch: as of `train_step`.
      state: after a step that was left out, so that the parameters are those of before it.
      step: [] int32, which step that was.
    """

    def find(member: tuple[Any, Any, Mapping[str, Array]]) -> Array:
        params, model_state, inputs = member
        labels = inputs["labels"]
        fuse_rng = jax.random.split(jax.random.fold_in(inputs["rng"], step), 4)[0]
        frames, batch_mask = _draw_frames(system, fuse_rng, batch, inputs), inputs["weight"] > 0
        exists = jnp.ones((len(labels), 1), bool)
        if system.examples:
            frames, exists = augment.as_examples(frames)
        exists = exists & batch_mask[:, None]

        def losses_of(features: Mapping[str, Array]) -> Array:
            output = system.model.apply(
                {"params": params, **model_state},
                {name: one._replace(features=features[name]) for name, one in frames.items()},
                clip_index=_spread(batch.clip_index, exists),
                labels=None,
                batch_mask=exists.reshape(-1),
                train=False,
            )
            return _loss_by_clip(system, step, output, labels, exists)

        features = {name: one.features.astype(jnp.float32) for name, one in frames.items()}
        # No clip touches another here, so one derivative tells of all of them.
        losses, slopes = jax.jvp(losses_of, (features,), (features,))
        return batch_mask & ~(jnp.isfinite(losses) & jnp.isfinite(slopes))

    inputs = _inputs(system, state, tables, batch)
    return jnp.any(jax.lax.map(find, (state.params, state.model_state, inputs)), axis=0)


def is_best(scores: Array, column: Array) -> Array:
    """Returns [B] bool: whether a column [B] is the first with the highest of scores [B, K].

    What `argmax(scores) == column` says, at a ninth of what an argmax costs on a CPU.
    """
    best = jnp.max(scores, axis=-1)
    earlier = (scores == best[:, None]) & (jnp.arange(scores.shape[-1]) < column[:, None])
    value = jnp.take_along_axis(scores, column[:, None], axis=-1)[:, 0]
    return (value == best) & ~jnp.any(earlier, axis=-1)


def _draw_frames(
    system: System, rng: Array, batch: Batch, inputs: Mapping[str, Array]
) -> dict[str, Frames]:
    """Returns the fused frames on which a member is trained."""
    frames = {name: batch.frames[name] for name in system.fuse_train}
    if system.by_quality:
        frames = {
            name: selection.filter_frames(one, min_quality=inputs["min_quality"])
            for name, one in frames.items()
        }
    if system.join_noise:
        labels = inputs["labels"]
        is_noise = (inputs["weight"] > 0) & ((labels == 0) | (labels > system.num_identities))
        # The first modality decides how long a clip is, so that all are joined to the same ones.
        counts = jnp.sum(next(iter(frames.values())).mask, axis=1)
        short = (counts > 0) & (counts < JOINED_FRAMES)
        join_rng = jax.random.fold_in(rng, len(frames))
        frames = {
            name: selection.join_clips(join_rng, one, is_noise, short, max_frames=JOINED_FRAMES)
            for name, one in frames.items()
        }
    return _fuse(system, system.fuse_train, rng, frames, inputs["view"])


def make_train_step(
    system: System, mesh: Mesh
) -> Callable[[TrainState, Tables, Batch], tuple[TrainState, Array]]:
    """Returns `train_step` of a system, compiled for a mesh; the state it is given is donated."""

    def step(state: TrainState, tables: Tables, batch: Batch) -> tuple[TrainState, Array]:
        return train_step(system, state, tables, batch)

    return jax.jit(step, donate_argnums=0, out_shardings=devices.replicated(mesh))


class Outcome(NamedTuple):
    """What a dispatch of training steps tells the host.

    Attributes:
      loss: [E] float32, of the last step.
      bad_step: [] int32, the first step that was one too many with a loss or gradient that is not
        finite; -1 for none.
    """

    loss: Array
    bad_step: Array


def make_train_loop(
    system: System, mesh: Mesh, draw: Callable[[Any, Array], Batch]
) -> Callable[[TrainState, Tables, Any, Array], tuple[TrainState, Outcome]]:
    """Returns a function of state, tables, clips and count that does so many steps, compiled once.

    Args:
      system: the system.
      mesh: the devices.
      draw: (clips, step) -> the batch of that step, on the devices.

    The state it is given is donated. How steps are spread over calls does not matter.
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
    """Returns the outcome after one more step, the state after it and its losses [E]."""
    is_first = (outcome.bad_step < 0) & jnp.any(state.bad_steps >= MAX_BAD_STEPS)
    bad_step = jnp.where(is_first, state.step - 1, outcome.bad_step)
    return Outcome(losses.astype(jnp.float32), bad_step)


def split_state(state: TrainState, size: int) -> tuple[TrainState, ...]:
    """Returns the state of every `size` members."""
    parts = ensemble.split({name: getattr(state, name) for name in _BY_MEMBER}, size)
    return tuple(TrainState(step=state.step + 0, **part) for part in parts)  # each is donated


def merge_states(states: Sequence[TrainState]) -> TrainState:
    """Returns the state that `split_state` was given."""
    if len(states) == 1:
        return states[0]
    parts = [{name: getattr(state, name) for name in _BY_MEMBER} for state in states]
    return TrainState(step=states[0].step, **ensemble.merge(parts))


def eval_step(system: System, params: Any, model_state: Any, view: Array, batch: Batch) -> Array:
    """Returns one member's scores [B, K] of clips for class columns.

    A clip without a usable frame scores -inf everywhere.

    Args:
      system: the system.
      params: the member's parameters.
      model_state: the member's other collections.
      view: [] int32, the chunk of the features that it does not see.
      batch: B clips with all their frames.
    """
    fused = _fuse(system, system.fuse_eval, None, batch.frames, view)

    def scores_of(frames: Mapping[str, Frames], batch_mask: Array) -> Array:
        output = system.model.apply(
            {"params": params, **model_state},
            frames,
            clip_index=batch.clip_index,
            labels=None,
            batch_mask=batch_mask,
            train=False,
        )
        if not isinstance(output, Branches):
            return system.score_fn(output, system.class_mask)
        logits, _, weights = output
        scores = system.score_fn(logits, system.class_mask)  # [B, G, K]
        total = _empty(scores[:, 0], system.logs)
        for branch in range(scores.shape[1]):
            total = ensemble.add_scores(
                total, scores[:, branch], weights[:, branch], logs=system.logs
            )
        return total

    with jax.default_matmul_precision(system.matmul_precision):
        if system.examples:
            scores = _reduce_examples(system, fused, batch, scores_of)
        else:
            scores = scores_of(fused, batch.batch_mask)
    usable = augment.has_frames({name: batch.frames[name] for name in system.fuse_eval})
    return jnp.where(usable[:, None], scores, -jnp.inf)


def _empty(scores: Array, logs: bool) -> Array:
    return jnp.full_like(scores, -jnp.inf if logs else 0.0)


def _reduce_examples(
    system: System,
    fused: Mapping[str, Frames],
    batch: Batch,
    scores_of: Callable[[Mapping[str, Frames], Array], Array],
) -> Array:
    """Returns the mean or the largest scores [B, K] of every clip's examples, one after another.

    The scores of all T' examples never exist at once.
    """
    _, exists = augment.as_examples(fused)
    weight = exists / jnp.maximum(jnp.sum(exists, axis=1, keepdims=True), 1)  # [B, T']

    def example(t: Array) -> dict[str, Frames]:
        def take(x: Array) -> Array:
            at = jnp.minimum(t, x.shape[1] - 1)  # a modality with one frame goes with each
            return jax.lax.dynamic_index_in_dim(x, at, axis=1)

        return {name: jax.tree.map(take, one) for name, one in fused.items()}

    def add(t: Array, total: Array) -> Array:
        scores = scores_of(example(t), batch.batch_mask & exists[:, t])
        if system.reduce == "max":
            return jnp.maximum(total, jnp.where(exists[:, t, None], scores, -jnp.inf))
        return ensemble.add_scores(total, scores, weight[:, t], logs=system.logs)

    first = jax.eval_shape(scores_of, example(jnp.int32(0)), batch.batch_mask)
    logs = system.logs or system.reduce == "max"
    total = _empty(jnp.zeros(first.shape, first.dtype), logs)
    last = jnp.max(jnp.where(exists, jnp.arange(1, exists.shape[1] + 1), 0))
    return jax.lax.fori_loop(0, last, add, total)


def make_eval_step(system: System, mesh: Mesh) -> Callable[[Any, Any, Array, Batch], Array]:
    """Returns `eval_step` of a system for the identity columns alone, [B, C], compiled for a mesh.

    Every device runs the program of its own rows, so that with a fixed number of rows per device
    the scores are bit-equal on any number of devices.
    """

    def step(params: Any, model_state: Any, view: Array, batch: Batch) -> Array:
        scores = eval_step(system, params, model_state, view, batch)
        return scores[:, 1 : 1 + system.num_identities]

    return _by_rows(step, mesh)


def make_predict_step(system: System, mesh: Mesh) -> Callable[[Any, Any, Array, Batch], Array]:
    """Returns a function like that of `make_eval_step` that gives [B] int32, the best column."""

    def step(params: Any, model_state: Any, view: Array, batch: Batch) -> Array:
        scores = eval_step(system, params, model_state, view, batch)
        return jnp.argmax(jnp.where(system.class_mask, scores, -jnp.inf), axis=1)

    return _by_rows(step, mesh)


def _by_rows(step: Callable[..., Array], mesh: Mesh) -> Callable[..., Array]:
    whole = PartitionSpec()

    def on_each(params: Any, model_state: Any, view: Array, batch: Batch) -> Array:
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(whole, whole, whole, devices.batch_specs(batch)),
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )(params, model_state, view, batch)

    return jax.jit(on_each)
