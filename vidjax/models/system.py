"""A system: the functions and numbers of a configuration that training and evaluation need.

This module takes a configuration as nested dicts; callers have a ConfigDict and pass `to_dict()`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vidjax.core import augment, ensemble, fusion, losses, optim
from vidjax.core.augment import BatchTransform
from vidjax.core.batch import Array, ClipInfo, Frames, NoiseLayout
from vidjax.models import identifier
from vidjax.models.base import Identifier, ModelState, Params
from vidjax.runs import config as config_lib
from vidjax.utils.errors import UserError, check_entry, named

FuseFn = Callable[[Array | None, Frames], Frames]


class System(NamedTuple):
    """Everything that a training or evaluation step needs, except state and data.

    Attributes:
      config: the configuration, nested dicts; the steps read its plain values.
      task: sizes of the training data.
      fuse_train, fuse_eval: modality -> function that fuses its frames, called with (key, frames);
        the key is None in evaluation.
      frame_is_example: True if each fused frame of a clip is an example of its own.
      clip_transforms, transforms: augmentations before and after the frames of clips are fused.
      objective: (output, labels [B], mask [B], step) -> loss [B].
      column_weight: (labels [B], step) -> weight [B] of the clips, by their class columns.
      score_fn: (logits [..., K], class_mask) -> scores [..., K], by which clips are ranked.
      scores_are_logs: True if scores are logarithms; their exponentials are then averaged.
      class_mask: [K] bool, False for columns without training clips.
    """

    config: Mapping[str, Any]
    task: "TaskSpec"
    model: Identifier
    fuse_train: Mapping[str, FuseFn]
    fuse_eval: Mapping[str, FuseFn]
    frame_is_example: bool
    clip_transforms: tuple[BatchTransform, ...]
    transforms: tuple[BatchTransform, ...]
    objective: losses.Objective
    column_weight: Callable[[Array, Array], Array]
    tx: optax.GradientTransformation
    lr_schedule: optax.Schedule
    score_fn: Callable[[Array, Array], Array]
    scores_are_logs: bool
    class_mask: Array

    @property
    def vmap_members(self) -> bool:
        """True to train all members in one program by vmap; False for one after another.

        One after another, each is bit-equal to a run of its own.
        """
        mapping = self.config["ensemble"]["mapping"]
        return mapping == "vmap" or (mapping == "auto" and jax.default_backend() != "cpu")

    def fuse(
        self, rng: Array | None, frames: Mapping[str, Frames], view: Array
    ) -> dict[str, Frames]:
        """Fuses the frames of all modalities to Frames [B, T'], as one member sees them.

        The position of a modality is folded into `rng`; without a key it fuses for evaluation. Of
        the features, the chunk `view` [] int32 is left out, which is hidden from the member; -1 for
        none.
        """
        fused = {}
        fusions = self.fuse_eval if rng is None else self.fuse_train
        for i, (name, fuse) in enumerate(fusions.items()):
            result = fuse(None if rng is None else jax.random.fold_in(rng, i), frames[name])
            features = fusion.read(result.features)
            if self.config["ensemble"]["views"]:
                features = ensemble.drop_chunk(features, view, self.config["ensemble"]["chunks"])
            fused[name] = result._replace(features=features)
        return fused

    def init(self, rng: Array, fuse_rng: Array) -> tuple[Params, ModelState]:
        """Draws the parameters of one member; returns them and the other collections."""
        fused = self.fuse(fuse_rng, blank_clip(self.task.modalities), jnp.int32(0))
        fused, exists = self.to_examples(fused)
        rows = jnp.zeros(exists.size, jnp.int32)
        clips = ClipInfo(index=rows, mask=rows == 0, labels=rows)
        variables = dict(self.model.init(rng, fused, clips, train=False))
        return variables.pop("params", {}), variables

    def shapes(self, num_members: int) -> tuple[Params, ModelState]:
        """Returns the shapes and dtypes of what `init` returns, of all members: [E, ...]."""
        rngs = jax.random.split(jax.random.key(0), num_members)
        return jax.eval_shape(lambda: jax.lax.map(lambda rng: self.init(rng, rng), rngs))

    def to_examples(self, frames: Mapping[str, Frames]) -> tuple[Mapping[str, Frames], Array]:
        """Turns the fused frames of B clips into examples, the inputs of the model.

        A clip is one example, or each of its frames if `frame_is_example`. Then all modalities must
        have the same number T' of frames, or one frame. This one is repeated in every example of
        the clip; a clip with only such modalities is one example.

        Returns:
          The frames as given, and [B, 1] bool, all True. If `frame_is_example`: modality -> Frames
          [B T', 1], and [B, T'] bool, True for examples that exist.
        """
        if not self.frame_is_example:
            return frames, jnp.ones((len(next(iter(frames.values())).mask), 1), bool)
        sizes = {modality.mask.shape[1] for modality in frames.values()}
        if len(sizes - {1}) > 1:
            raise UserError(
                f"config.after_fusion='examples': all modalities must have 1 or equally many fused "
                f"frames, got {sorted(sizes)}"
            )
        num_examples = max(sizes - {1}, default=1)  # the sizes of an exported run are symbols
        masks = [x.mask for x in frames.values() if x.mask.shape[1] == num_examples]
        exists = jnp.any(jnp.stack(masks), axis=0)  # [B, T']
        alone = fusion.has_frames(frames) & ~exists.any(axis=1)
        exists = exists.at[:, 0].set(exists[:, 0] | alone)

        def reshape(x: Array) -> Array:
            x = jnp.broadcast_to(x, (x.shape[0], num_examples, *x.shape[2:]))
            return x.reshape(-1, 1, *x.shape[2:])  # [B T', 1, ...]

        return {name: jax.tree.map(reshape, modality) for name, modality in frames.items()}, exists


def blank_clip(modalities: Mapping[str, int]) -> dict[str, Frames]:
    """Returns one clip of one frame: the shapes of parameters depend only on widths."""
    row = jnp.zeros((1, 1))
    return {
        name: Frames(jnp.zeros((1, 1, dim)), row, row, row.astype(jnp.int32), row == 0)
        for name, dim in modalities.items()
    }


class TaskSpec(NamedTuple):
    """Sizes of the training data that a system depends on; checkpoints store them.

    Attributes:
      modalities: name -> feature width, in the order of the configuration.
      num_clusters: number of clusters, the K of `NoiseLayout`; None without noise classes.
      total_steps: optimiser steps of the whole run.
      train_other: True if training clips of column 0 have a weight above 0.
      settings: name -> value of the model's attributes that its `prepare` fitted, or None.
      num_places: rows of all batches of an epoch, see `BatchPlan`; None: `num_clips`.
    """

    modalities: Mapping[str, int]
    num_identities: int
    num_clusters: int | None
    num_clips: int
    total_steps: int
    train_other: bool
    settings: Mapping[str, float | tuple[float, ...]] | None = None
    num_places: int | None = None

    @property
    def layout(self) -> NoiseLayout | None:
        """The layout of class columns with noise classes; None without noise classes."""
        if self.num_clusters is None:
            return None
        return NoiseLayout(self.num_identities, self.num_clusters)

    @property
    def num_columns(self) -> int:
        """Number of class columns, K."""
        return self.layout.num_columns if self.layout else 1 + self.num_identities


def make_system(config: Mapping[str, Any], task: TaskSpec) -> System:
    """Builds the system of a configuration, a nested dict.

    `fusion` may contain modalities that are not configured.
    """
    groups = ("after_fusion", "dtype", "ensemble", "eval", "loss", "optim")
    config_lib.check_ranges({name: config[name] for name in groups})  # those that are read here
    _check_dtype(config["dtype"])
    _check_precision(config["matmul_precision"])
    steps_per_epoch = (task.num_places or task.num_clips) / config["batch_size"]
    tx, schedule = optim.make_optimizer(
        config["optim"], total_steps=task.total_steps, steps_per_epoch=steps_per_epoch
    )
    model = make_model(config, task)
    # Some models have a logit for somebody new; of a net, training must have seen such clips.
    knows_other = task.train_other or model.knows_unknown
    class_mask = jnp.asarray((np.arange(task.num_columns) > 0) | knows_other)
    check_entry("config.eval.scores", config["eval"]["scores"], SCORES)
    score_fn, scores_are_logs = SCORES[config["eval"]["scores"]]
    clip_transforms, transforms = augment.make_transforms(config, task.num_identities)
    return System(
        config=config,
        task=task,
        model=model,
        fuse_train=make_fusions(config["fusion"], task.modalities, "train"),
        fuse_eval=make_fusions(config["fusion"], task.modalities, "evaluate"),
        frame_is_example=config["after_fusion"] == "examples",
        clip_transforms=clip_transforms,
        transforms=transforms,
        objective=losses.make_objective(
            config["loss"],
            None if knows_other else class_mask,
            steps_per_epoch,
            logit_scale=model.logit_scale,
        ),
        column_weight=_make_column_weight(config["noise"], task.layout, steps_per_epoch),
        tx=tx,
        lr_schedule=jax.jit(schedule),  # one program, not one for every operation
        score_fn=score_fn,
        scores_are_logs=scores_are_logs,
        class_mask=class_mask,
    )


def make_model(config: Mapping[str, Any], task: TaskSpec) -> Identifier:
    """Builds the model of a configuration, for fused frames without the hidden chunk, if any."""
    spec = config["model"]
    if task.settings:
        spec = identifier.MODELS[spec["name"]].with_prepared(spec, task.settings)
    views, chunks, modalities = config["ensemble"]["views"], config["ensemble"]["chunks"], {}
    for name, width in task.modalities.items():
        modalities[name] = width - width // chunks if views else width
    if views and max(task.modalities.values()) < chunks:
        raise UserError(
            f"config.ensemble.views: no modality has {chunks} numbers, of which a view could hide "
            "some\n--config.ensemble.chunks=N, or no views"
        )
    return identifier.make_identifier(
        spec,
        modalities=modalities,
        num_classes=task.num_columns,
        num_clips=task.num_clips,
        dtype=jnp.dtype(config["dtype"]),
    )


def make_fusions(
    specs: Mapping[str, Any], modalities: Collection[str], phase: str
) -> dict[str, FuseFn]:
    """Builds modality -> fusion for a phase, `train` or `evaluate`; all frames where none is named.

    Errors name the field.
    """
    fusions = {}
    for name in modalities:
        field = f"config.fusion.{name}.{phase}"
        with named(field):
            fuse = fusion.make_fusion(specs.get(name, {}).get(phase) or {"name": "all"})
        fusions[name] = named(field)(fuse)
    return fusions


def _make_column_weight(
    spec: Mapping[str, Any], layout: NoiseLayout | None, steps_per_epoch: float
) -> Callable[[Array, Array], Array]:
    """Builds `System.column_weight`: `spec["mirror_weight"]` for mirrors, 1 for other columns."""
    mirror_weight = optim.make_piecewise(spec["mirror_weight"], name="config.noise.mirror_weight")
    if not layout:
        return lambda labels, step: jnp.ones(labels.shape, jnp.float32)
    return lambda labels, step: jnp.where(
        layout.is_mirror(labels), mirror_weight(step / steps_per_epoch), 1.0
    )


def _check_dtype(dtype: str) -> None:
    """Raises ValueError if JAX would compute in another dtype without a word."""
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise UserError(
            f"config.dtype={dtype}: JAX computes in float32 in this process\n"
            "set JAX_ENABLE_X64=1 before the command: export JAX_ENABLE_X64=1\n"
            "in Python: jax.config.update('jax_enable_x64', True)"
        )


def _check_precision(precision: str) -> None:
    """Raises ValueError if jax does not know a precision."""
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError as error:
        raise UserError(
            f"config.matmul_precision='{precision}': jax knows default, high, highest, bfloat16, "
            "float32 and others"
        ) from error


def _log_sigmoid(logits: Array, class_mask: Array) -> Array:
    """Returns the logarithm of the sigmoid."""
    return jax.nn.log_sigmoid(logits)


def _logits(logits: Array, class_mask: Array) -> Array:
    """Returns the logits themselves."""
    return logits


# config.eval.scores -> (score function, True if scores are logarithms). Logarithms keep the order
# of large logits: sigmoid(17) is 1.0 in float32, but its logarithm is not 0.
SCORES = {
    "log_softmax": (losses.log_softmax, True),
    "log_sigmoid": (_log_sigmoid, True),
    "logits": (_logits, False),
}
