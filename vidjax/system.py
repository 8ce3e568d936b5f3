"""A system: what a configuration describes, as functions and numbers that a step needs."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vidjax import fusion, losses, optim
from vidjax.batch import Array, Frames
from vidjax.data import noise
from vidjax.models import identifier

FuseFn = Callable[[Array | None, Frames], Frames]


class System(NamedTuple):
    """What a configuration describes: everything a step needs but state and data.

    Attributes:
      model: a linen module that maps frames to logits [B, K], or to Branches.
      fuse_train: modality -> fusion of training, drawn with an rng.
      fuse_eval: modality -> fusion of evaluation, called without one.
      examples: False where the model takes all T' fused frames of a clip, True where each of them
        is an example of its own.
      loss_fn: (logits [..., K], labels [...], step) -> loss [...].
      column_weight: (labels [...], step) -> weight [...] of a clip by its class column.
      mixup: alpha of the Beta distribution by which pairs of clips are mixed; 0: none.
      join_noise: whether clips that show no identity are joined and cut in training.
      tx: the optimiser.
      schedule: step -> learning rate.
      score_fn: (logits [..., K], class_mask) -> scores [..., K], what clips are ranked by.
      logs: whether scores are logarithms; what they are logarithms of is then what gets averaged.
      reduce: mean | max, of the scores of a clip's examples.
      class_mask: [K] bool, False for columns that training never sees.
      num_identities: C; columns 1..C are ranked.
      num_chunks: of which a member's view leaves out one; 0: members see whole features.
      by_quality: whether members differ in the frames they are trained on.
      together: whether all members are trained in one program, by vmap, or one after another, to
        the bit as if each were alone.
      matmul_precision: of evaluation.
    """

    model: nn.Module
    fuse_train: Mapping[str, FuseFn]
    fuse_eval: Mapping[str, FuseFn]
    examples: bool
    loss_fn: Callable[[Array, Array, Array], Array]
    column_weight: Callable[[Array, Array], Array]
    mixup: float
    join_noise: bool
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    score_fn: Callable[[Array, Array], Array]
    logs: bool
    reduce: str
    class_mask: Array
    num_identities: int
    num_chunks: int
    by_quality: bool
    together: bool
    matmul_precision: str


class TaskSpec(NamedTuple):
    """What a system takes from the data it is trained on; a checkpoint keeps it beside the weights.

    Attributes:
      modalities: name -> feature width, in the order of the configuration.
      num_identities: C.
      num_clusters: K of `data.noise.NoiseLayout`; None where noise has no class columns.
      num_clips: training clips.
      total_steps: optimiser steps of the whole run.
      train_other: whether training has clips of column 0.
    """

    modalities: Mapping[str, int]
    num_identities: int
    num_clusters: int | None
    num_clips: int
    total_steps: int
    train_other: bool


def make_system(config: Mapping[str, Any], sizes: TaskSpec) -> System:
    """Returns the system that a configuration describes for data of some size.

    Args:
      config: the configuration as a plain nested mapping. Entries of `fusion` for modalities that
        are not configured lie idle.
      sizes: of the training data.

    Raises:
      ValueError: a specification names something that does not exist.
    """

    def choose(field: str, value: str, known: Collection[str]) -> str:
        if value not in known:
            raise ValueError(f"config.{field}='{value}': known are {', '.join(known)}")
        return value

    def fuse(phase: str) -> dict[str, FuseFn]:
        specs = (config["fusion"].get(name, {}).get(phase) for name in sizes.modalities)
        return {
            name: fusion.make_fusion(spec or {"name": "all"})
            for name, spec in zip(sizes.modalities, specs, strict=True)
        }

    ensemble = config["ensemble"]
    num_chunks = ensemble["chunks"] if ensemble["views"] else 0
    layout = None
    if sizes.num_clusters is not None:
        layout = noise.NoiseLayout(sizes.num_identities, sizes.num_clusters)
    num_columns = layout.num_columns if layout else 1 + sizes.num_identities
    class_mask = jnp.ones(num_columns, bool).at[0].set(sizes.train_other)
    steps_per_epoch = sizes.num_clips / config["batch_size"]
    tx, schedule = optim.make_optimizer(
        config["optim"], total_steps=sizes.total_steps, steps_per_epoch=steps_per_epoch
    )
    dtype = choose("dtype", config["dtype"], ("float32", "bfloat16", "float64"))
    model = identifier.make_identifier(
        config["model"],
        modalities={
            name: width - (width // num_chunks if num_chunks else 0)
            for name, width in sizes.modalities.items()
        },
        num_classes=num_columns,
        num_clips=sizes.num_clips,
        dtype=jnp.dtype(dtype),
    )
    mirror_weight = optim.make_piecewise(
        config["noise"]["mirror_weight"], name="config.noise.mirror_weight"
    )

    def column_weight(labels: Array, step: Array) -> Array:
        if not layout:
            return jnp.ones(labels.shape, jnp.float32)
        return jnp.where(layout.is_mirror(labels), mirror_weight(step / steps_per_epoch), 1.0)

    mapping = choose("ensemble.mapping", ensemble["mapping"], ("auto", "map", "vmap"))
    if mapping == "auto":
        mapping = "map" if jax.default_backend() == "cpu" else "vmap"
    try:
        with jax.default_matmul_precision(config["matmul_precision"]):
            pass
    except ValueError as error:
        raise ValueError(
            f"config.matmul_precision='{config['matmul_precision']}': jax knows default, high, "
            "highest, bfloat16, float32 and others"
        ) from error
    after_fusion = choose("after_fusion", config["after_fusion"], ("pool", "examples"))
    score_fn, logs = SCORES[choose("eval.scores", config["eval"]["scores"], SCORES)]
    return System(
        model=model,
        fuse_train=fuse("train"),
        fuse_eval=fuse("evaluate"),
        examples=after_fusion == "examples",
        loss_fn=losses.make_loss(
            config["loss"],
            class_mask,
            steps_per_epoch,
            logit_scale=model.logit_scale,  # type: ignore[attr-defined]
        ),
        column_weight=column_weight,
        mixup=config["mixup"],
        join_noise=config["noise"]["join"],
        tx=tx,
        schedule=schedule,
        score_fn=score_fn,
        logs=logs,
        reduce=choose("eval.reduce", config["eval"]["reduce"], ("mean", "max")),
        class_mask=class_mask,
        num_identities=sizes.num_identities,
        num_chunks=num_chunks,
        by_quality=bool(ensemble["min_quality"]),
        together=mapping == "vmap",
        matmul_precision=config["matmul_precision"],
    )


def _log_softmax(logits: Array, class_mask: Array) -> Array:
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True, where=class_mask)


def _log_sigmoid(logits: Array, class_mask: Array) -> Array:
    del class_mask
    return jax.nn.log_sigmoid(logits)


def _logits(logits: Array, class_mask: Array) -> Array:
    del class_mask
    return logits


# Ranks are taken on logs: sigmoid(17) is 1.0 in float32, its logarithm is not 0.
SCORES = {
    "log_softmax": (_log_softmax, True),
    "log_sigmoid": (_log_sigmoid, True),
    "logits": (_logits, False),
}
