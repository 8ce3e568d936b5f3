"""A system: the functions and numbers of a configuration that training and evaluation need.

Modules that import this one pass configurations as ConfigDict; this one takes nested dicts.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vidjax import augment, config_io, fusion, logit_ops, losses, optim
from vidjax import config as config_lib
from vidjax.augment import BatchTransform
from vidjax.batch import Array, Frames, NoiseLayout
from vidjax.errors import UserError, suggest
from vidjax.models import identifier
from vidjax.models.base import Identifier

FuseFn = Callable[[Array | None, Frames], Frames]

# Padded class columns are a multiple of this, so that 1, 2, 4 and up to 128 devices can share them.
COLUMN_MULTIPLE = 128


class System(NamedTuple):
    """Everything that a training or evaluation step needs, except state and data.

    Only evaluation steps read `fuse_eval`, `score_fn`, `scores_are_logs`, `top_classes`, `reduce`,
    `num_identities` and `matmul_precision`. Both kinds of step read `model`, `num_columns`,
    `modalities`, `num_chunks`, `frame_is_example` and `class_mask`; only training reads the rest.

    Attributes:
      num_columns: number of class columns without padding, K; `model` may have more.
      modalities: name -> feature width, in the order of the configuration.
      fuse_train, fuse_eval: modality -> function that fuses its frames, called with (key, frames);
        the key is None in evaluation.
      num_chunks: number of chunks of a feature vector, one of them hidden (`Member.view`), or 0.
      frame_is_example: True if each fused frame of a clip is an example of its own.
      clip_transforms, transforms: augmentations before and after the frames of clips are fused.
      objective: (output, labels [B], mask [B], step) -> loss [B].
      make_objective: class_mask or None -> objective that ignores columns where the mask is False.
      sampled_classes: share of the classes that a training step draws, above 0; 1 for all.
      column_weight: (labels [B], step) -> weight [B] of the clips, by their class columns.
      score_fn: (logits [..., K], class_mask) -> scores [..., K], by which clips are ranked.
      scores_are_logs: True if scores are logarithms; their exponentials are then averaged.
      top_classes: number of best identities for which each clip keeps its scores; 0 for all.
      reduce: reduction of the scores of a clip's examples in evaluation, `mean` or `max`.
      class_mask: [K] bool, False for columns without training clips, and for padding.
      vmap_members: True to train all members in one program by vmap; False to train one member
        after another, each bit-equal to a run of its own.
      matmul_precision: precision of evaluation, see `jax.default_matmul_precision`.
    """

    model: Identifier
    num_columns: int
    modalities: Mapping[str, int]
    fuse_train: Mapping[str, FuseFn]
    fuse_eval: Mapping[str, FuseFn]
    num_chunks: int
    frame_is_example: bool
    clip_transforms: tuple[BatchTransform, ...]
    transforms: tuple[BatchTransform, ...]
    objective: losses.Objective
    make_objective: Callable[..., losses.Objective]
    sampled_classes: float
    column_weight: Callable[[Array, Array], Array]
    tx: optax.GradientTransformation
    lr_schedule: optax.Schedule
    score_fn: Callable[[Array, Array], Array]
    scores_are_logs: bool
    top_classes: int
    reduce: str
    class_mask: Array
    num_identities: int
    vmap_members: bool
    matmul_precision: str


class TaskSpec(NamedTuple):
    """Sizes of the training data that a system depends on; checkpoints store them.

    Attributes:
      modalities: name -> feature width, in the order of the configuration.
      num_clusters: number of clusters, the K of `NoiseLayout`; None without noise classes.
      total_steps: optimiser steps of the whole run.
      train_other: True if training clips of column 0 have a weight above 0.
      settings: name -> value of the model's attributes that its `prepare` fitted, or None.
      padded_columns: number of class columns with padding; None without padding.
    """

    modalities: Mapping[str, int]
    num_identities: int
    num_clusters: int | None
    num_clips: int
    total_steps: int
    train_other: bool
    settings: Mapping[str, float | tuple[float, ...]] | None = None
    padded_columns: int | None = None

    @property
    def layout(self) -> NoiseLayout | None:
        """The layout of class columns with noise classes; None without noise classes."""
        if self.num_clusters is None:
            return None
        return NoiseLayout(self.num_identities, self.num_clusters)

    @property
    def num_columns(self) -> int:
        """Number of class columns without padding, K."""
        return self.layout.num_columns if self.layout else 1 + self.num_identities

    @property
    def num_model_columns(self) -> int:
        """Number of class columns of the model, with padding."""
        return self.padded_columns or self.num_columns

    def with_padding(self, devices: int) -> "TaskSpec":
        """Returns the task padded for a number of devices; a single device needs no padding."""
        padded = padded_columns(self.num_columns, devices) if devices > 1 else None
        return self._replace(padded_columns=padded)


def padded_columns(num_columns: int, devices: int) -> int:
    """Returns the least number of columns with padding that a number of devices share evenly."""
    multiple = math.lcm(COLUMN_MULTIPLE, devices)
    return -(-num_columns // multiple) * multiple


def make_system(config: Mapping[str, Any], task: TaskSpec) -> System:
    """Builds the system of a configuration, a nested dict.

    `fusion` may contain modalities that are not configured.
    """
    groups = ("after_fusion", "dtype", "ensemble", "eval.reduce", "loss", "optim")
    config_lib.check_ranges(config, groups)  # those that are read here
    config_io.check_definitions(config)
    ensemble_spec, mapping = config["ensemble"], config["ensemble"]["mapping"]
    num_chunks = ensemble_spec["chunks"] if ensemble_spec["views"] else 0
    steps_per_epoch = task.num_clips / config["batch_size"]
    tx, schedule = optim.make_optimizer(
        config["optim"], total_steps=task.total_steps, steps_per_epoch=steps_per_epoch
    )
    num_columns = task.num_model_columns
    model = make_model(config, task)
    # Some models have a logit for somebody new; of a net, training must have seen such clips.
    knows_other = task.train_other or model.knows_unknown
    class_mask = (jnp.arange(num_columns) < task.num_columns).at[0].set(knows_other)
    make_objective = functools.partial(
        losses.make_objective,
        config["loss"],
        steps_per_epoch=steps_per_epoch,
        logit_scale=model.logit_scale,
    )
    is_whole = knows_other and num_columns == task.num_columns
    score_fn, logs = SCORES[_choose("eval.scores", config["eval"]["scores"], SCORES)]
    return System(
        model=model,
        num_columns=task.num_columns,
        modalities=task.modalities,
        fuse_train=make_fusions(config["fusion"], task.modalities, "train"),
        fuse_eval=make_fusions(config["fusion"], task.modalities, "evaluate"),
        num_chunks=num_chunks,
        frame_is_example=config["after_fusion"] == "examples",
        clip_transforms=(
            *_own_clip_transforms(config, task),
            *augment.make_transforms(config["transforms"], before_fusion=True),
        ),
        transforms=(
            *(
                (functools.partial(augment.mix_up, alpha=config["mixup"]),)
                if config["mixup"]
                else ()
            ),
            *augment.make_transforms(config["transforms"], before_fusion=False),
        ),
        objective=make_objective(None if is_whole else class_mask),
        make_objective=make_objective,
        sampled_classes=config["loss"]["sampled_classes"],
        column_weight=_make_column_weight(config["noise"], task.layout, steps_per_epoch),
        tx=tx,
        lr_schedule=schedule,
        score_fn=score_fn,
        scores_are_logs=logs,
        top_classes=config["eval"]["top_classes"],
        reduce=config["eval"]["reduce"],
        class_mask=class_mask,
        num_identities=task.num_identities,
        vmap_members=mapping == "vmap" or (mapping == "auto" and jax.default_backend() != "cpu"),
        matmul_precision=_check_precision(config["matmul_precision"]),
    )


def _choose(field: str, value: str, known: Collection[str]) -> str:
    """Returns the value of a field; raises ValueError if it is unknown."""
    if value not in known:
        raise UserError(f"config.{field}='{value}': {suggest(value, known)}")
    return value


def make_model(config: Mapping[str, Any], task: TaskSpec) -> Identifier:
    """Builds the model of a configuration, for fused frames without the hidden chunk, if any."""
    spec, ensemble_spec = config["model"], config["ensemble"]
    if task.settings:
        spec = identifier.MODELS[spec["name"]].with_prepared(spec, task.settings)
    modalities = {}
    for name, width in task.modalities.items():
        fused = width * fused_widths(config["fusion"], name)
        dropped = fused // ensemble_spec["chunks"] if ensemble_spec["views"] else 0
        modalities[name] = fused - dropped
    return identifier.make_identifier(
        spec,
        modalities=modalities,
        num_classes=task.num_model_columns,
        num_clips=task.num_clips,
        dtype=jnp.dtype(config["dtype"]),
    )


def _fusion_spec(specs: Mapping[str, Any], modality: str, phase: str) -> Mapping[str, Any]:
    """Returns the specification of a modality's fusion in a phase; the default is all frames."""
    return specs.get(modality, {}).get(phase) or {"name": "all"}


def fused_widths(specs: Mapping[str, Any], modality: str) -> int:
    """Returns the width of the fused features of a modality, as a multiple of a frame's."""
    names = [_fusion_spec(specs, modality, phase).get("name") for phase in ("train", "evaluate")]
    train, evaluate = (fusion.FUSIONS[x].widths if x in fusion.FUSIONS else 1 for x in names)
    if train != evaluate:
        raise UserError(
            f"config.fusion.{modality}: '{names[0]}' in training and '{names[1]}' in evaluation\n"
            "give features of different widths: choose fusions of one width"
        )
    return train


def make_fusions(
    specs: Mapping[str, Any], modalities: Collection[str], phase: str
) -> dict[str, FuseFn]:
    """Builds modality -> fusion for a phase, `train` or `evaluate`."""
    return {name: fusion.make_fusion(_fusion_spec(specs, name, phase)) for name in modalities}


def _own_clip_transforms(config: Mapping[str, Any], task: TaskSpec) -> list[BatchTransform]:
    """Builds the transforms that have config fields of their own: quality subsets, then noise."""
    transforms: list[BatchTransform] = []
    if config["ensemble"]["min_quality"]:
        transforms.append(
            functools.partial(augment.keep_quality, poor_clips=config["ensemble"]["poor_clips"])
        )
    if config["noise"]["join"]:
        transforms.append(
            functools.partial(augment.concat_noise, num_identities=task.num_identities)
        )
    return transforms


def _make_column_weight(
    spec: Mapping[str, Any], layout: NoiseLayout | None, steps_per_epoch: float
) -> Callable[[Array, Array], Array]:
    """Builds `System.column_weight`: `spec["mirror_weight"]` for mirrors, 1 for other columns."""
    mirror_weight = optim.make_piecewise(spec["mirror_weight"], name="config.noise.mirror_weight")

    def column_weight(labels: Array, step: Array) -> Array:
        if not layout:
            return jnp.ones(labels.shape, jnp.float32)
        return jnp.where(layout.is_mirror(labels), mirror_weight(step / steps_per_epoch), 1.0)

    return column_weight


def _check_precision(precision: str) -> str:
    """Returns the precision; raises ValueError if jax does not know it."""
    try:
        with jax.default_matmul_precision(precision):
            return precision
    except ValueError as error:
        raise UserError(
            f"config.matmul_precision='{precision}': jax knows default, high, highest, bfloat16, "
            "float32 and others"
        ) from error


def _log_sigmoid(logits: Array, class_mask: Array) -> Array:
    """Returns the logarithm of the sigmoid."""
    del class_mask
    return jax.nn.log_sigmoid(logits)


def _logits(logits: Array, class_mask: Array) -> Array:
    """Returns the logits themselves."""
    del class_mask
    return logits


# config.eval.scores -> (score function, True if scores are logarithms). Logarithms keep the order
# of large logits: sigmoid(17) is 1.0 in float32, but its logarithm is not 0.
SCORES = {
    "log_softmax": (logit_ops.log_softmax, True),
    "log_sigmoid": (_log_sigmoid, True),
    "logits": (_logits, False),
}
