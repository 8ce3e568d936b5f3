"""The training step and the evaluation step: pure functions of state, tables and batch, jitted."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from vidjax import fusion, losses, optim
from vidjax import mesh as mesh_lib
from vidjax.batch import Array, Batch, Frames
from vidjax.models import identifier

FuseFn = Callable[[Array | None, Frames], Frames]


class System(NamedTuple):
    """What a configuration describes: everything a step needs but state and data.

    Attributes:
      model: a linen module that maps frames to logits [B, 1 + C].
      fuse_train: modality -> fusion of training, drawn with an rng.
      fuse_eval: modality -> fusion of evaluation, called without one.
      loss_fn: (logits, labels, step) -> [B].
      tx: the optimiser.
      schedule: step -> learning rate.
      scores: log_softmax | log_sigmoid | logits, what clips are ranked by.
      class_mask: [1 + C] bool, False for columns that training never sees.
      matmul_precision: of evaluation.
    """

    model: nn.Module
    fuse_train: Mapping[str, FuseFn]
    fuse_eval: Mapping[str, FuseFn]
    loss_fn: Callable[[Array, Array, Array], Array]
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    scores: str
    class_mask: Array
    matmul_precision: str


class TrainState(struct.PyTreeNode):
    """What a step changes, and what a checkpoint holds.

    Attributes:
      step: optimiser steps done.
      params: the model's parameters.
      model_state: the model's other collections, e.g. batch_stats.
      opt_state: the optimiser's state.
      rng: typed key; a step uses it folded with `step`, so it never changes.
      sums: metric -> sum since the last line of the log.
    """

    step: Array
    params: Any
    model_state: Any
    opt_state: Any
    rng: Array
    sums: Mapping[str, Array]


class Sizes(NamedTuple):
    """What a system takes from the data it is trained on; a checkpoint keeps it beside the weights.

    Attributes:
      modalities: name -> feature width, in the order of the configuration.
      num_identities: C.
      num_clips: training clips.
      total_steps: optimiser steps of the whole run.
      train_other: whether training has clips of column 0.
    """

    modalities: Mapping[str, int]
    num_identities: int
    num_clips: int
    total_steps: int
    train_other: bool


def make_system(config: Mapping[str, Any], sizes: Sizes) -> System:
    """Returns the system that a configuration describes for data of some size.

    Args:
      config: the configuration as a plain nested mapping. Entries of `fusion` for modalities that
        are not configured lie idle.
      sizes: of the training data.

    Raises:
      ValueError: a specification names something that does not exist.
    """

    def fuse(phase: str) -> dict[str, FuseFn]:
        specs = (config["fusion"].get(name, {}).get(phase) for name in sizes.modalities)
        return {
            name: fusion.make_fusion(spec or {"name": "all"})
            for name, spec in zip(sizes.modalities, specs, strict=True)
        }

    scores = config["eval"]["scores"]
    if scores not in SCORES:
        raise ValueError(f"config.eval.scores='{scores}': known are {', '.join(SCORES)}")
    dtypes = ("float32", "bfloat16", "float64")
    if config["dtype"] not in dtypes:
        raise ValueError(f"config.dtype='{config['dtype']}': known are {', '.join(dtypes)}")
    class_mask = jnp.ones(1 + sizes.num_identities, bool).at[0].set(sizes.train_other)
    tx, schedule = optim.make_optimizer(config["optim"], total_steps=sizes.total_steps)
    steps_per_epoch = sizes.num_clips / config["batch_size"]
    return System(
        model=identifier.make_identifier(
            config["model"],
            modalities=sizes.modalities,
            num_classes=1 + sizes.num_identities,
            num_clips=sizes.num_clips,
            dtype=jnp.dtype(config["dtype"]),
        ),
        fuse_train=fuse("train"),
        fuse_eval=fuse("evaluate"),
        loss_fn=losses.make_loss(config["loss"], class_mask, steps_per_epoch),
        tx=tx,
        schedule=schedule,
        scores=scores,
        class_mask=class_mask,
        matmul_precision=config["matmul_precision"],
    )


def _fuse(fns: Mapping[str, FuseFn], rng: Array | None, batch: Batch) -> dict[str, Frames]:
    fused = {}
    for i, (modality, fn) in enumerate(fns.items()):
        fused[modality] = fn(
            None if rng is None else jax.random.fold_in(rng, i), batch.frames[modality]
        )
    return fused


def init_state(system: System, modalities: Mapping[str, int], rng: Array) -> TrainState:
    """Returns the state of step 0.

    Args:
      system: the system.
      modalities: name -> feature width.
      rng: typed key; parameters and all later draws follow from it.
    """
    init_rng, fuse_rng, state_rng = jax.random.split(rng, 3)
    batch = _blank_batch(modalities)
    variables = dict(
        system.model.init(
            init_rng,
            _fuse(system.fuse_train, fuse_rng, batch),
            clip_index=batch.clip_index,
            labels=batch.clip_index,
            batch_mask=batch.batch_mask,
            train=False,
        )
    )
    params = variables.pop("params", {})
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=variables,
        opt_state=system.tx.init(params),
        rng=state_rng,
        sums=zero_sums(),
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


def zero_sums() -> dict[str, Array]:
    """Returns empty metric sums."""
    return {name: jnp.float32(0) for name in ("loss", "correct", "weight")}


def train_step(
    system: System, state: TrainState, tables: Mapping[str, Array], batch: Batch
) -> tuple[TrainState, Array]:
    """Returns the state after one optimiser step, and the loss of its batch.

    Args:
      system: the system.
      state: before the step.
      tables: `label` [N] int32 and `weight` [N] float32, rows by `clip_index`.
      batch: B clips; rows outside `batch_mask` change nothing.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    fuse_rng, dropout_rng, modality_rng = jax.random.split(step_rng, 3)
    frames = _fuse(system.fuse_train, fuse_rng, batch)
    labels = tables["label"][batch.clip_index]
    weight = tables["weight"][batch.clip_index] * batch.batch_mask

    def mean_loss(params: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, model_state = system.model.apply(
            {"params": params, **state.model_state},
            frames,
            clip_index=batch.clip_index,
            labels=labels,
            batch_mask=batch.batch_mask,
            train=True,
            rngs={"dropout": dropout_rng, "modality_dropout": modality_rng},
            mutable=list(state.model_state),
        )
        per_clip = system.loss_fn(logits, labels, state.step)
        loss = jnp.sum(per_clip * weight) / jnp.maximum(jnp.sum(weight), 1e-6)
        return loss, (logits, model_state)

    (loss, (logits, model_state)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = system.tx.update(grads, state.opt_state, state.params)
    correct = jnp.argmax(jnp.where(system.class_mask, logits, -jnp.inf), axis=-1) == labels
    added = {
        "loss": loss * jnp.sum(weight),
        "correct": jnp.sum(correct * weight),
        "weight": jnp.sum(weight),
    }
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        # Linen's running statistics start as float32 and would take the dtype of the batch's.
        model_state=jax.tree.map(
            lambda new, old: new.astype(old.dtype), model_state, dict(state.model_state)
        ),
        opt_state=opt_state,
        sums={name: state.sums[name] + added[name].astype(jnp.float32) for name in added},
    )
    return new_state, loss


def make_train_step(
    system: System, mesh: Mesh
) -> Callable[[TrainState, Mapping[str, Array], Batch], tuple[TrainState, Array]]:
    """Returns `train_step` of a system, compiled for a mesh; the state it is given is donated."""

    def step(
        state: TrainState, tables: Mapping[str, Array], batch: Batch
    ) -> tuple[TrainState, Array]:
        return train_step(system, state, tables, batch)

    return jax.jit(step, donate_argnums=0, out_shardings=mesh_lib.replicated(mesh))


def _log_softmax(logits: Array, class_mask: Array) -> Array:
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True, where=class_mask)


def _log_sigmoid(logits: Array, class_mask: Array) -> Array:
    del class_mask
    return jax.nn.log_sigmoid(logits)


def _logits(logits: Array, class_mask: Array) -> Array:
    del class_mask
    return logits


# Ranks are taken on logs: sigmoid(17) is 1.0 in float32, its logarithm is not 0.
SCORES = {"log_softmax": _log_softmax, "log_sigmoid": _log_sigmoid, "logits": _logits}


def eval_step(system: System, params: Any, model_state: Any, batch: Batch) -> Array:
    """Returns the scores [B, C] of clips for identities; -inf for a clip without a usable frame.

    Args:
      system: the system.
      params: the model's parameters.
      model_state: the model's other collections.
      batch: B clips with all their frames.
    """
    with jax.default_matmul_precision(system.matmul_precision):
        logits = system.model.apply(
            {"params": params, **model_state},
            _fuse(system.fuse_eval, None, batch),
            clip_index=batch.clip_index,
            labels=None,
            batch_mask=batch.batch_mask,
            train=False,
        )
    assert not isinstance(logits, tuple)  # nothing is mutable here
    scores = SCORES[system.scores](logits, system.class_mask)[:, 1:]  # (B, C)
    usable = jnp.any(
        jnp.stack([jnp.any(batch.frames[m].mask, axis=1) for m in system.fuse_eval]), axis=0
    )
    return jnp.where(usable[:, None], scores, -jnp.inf)


def make_eval_step(system: System, mesh: Mesh) -> Callable[[Any, Any, Batch], Array]:
    """Returns `eval_step` of a system, compiled for a mesh.

    Every device runs the program of its own rows, so that with a fixed number of rows per device
    the scores are bit-equal on any number of devices.
    """

    def step(params: Any, model_state: Any, batch: Batch) -> Array:
        return eval_step(system, params, model_state, batch)

    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(whole, whole, rows), out_specs=rows, check_vma=False
        )
    )
