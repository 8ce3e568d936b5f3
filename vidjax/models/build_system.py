"""Builds a system: the model, optimiser, losses and fusions of a configuration.

The configuration is given as nested dicts. Callers with a ConfigDict pass `to_dict()`.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from flax.core import FrozenDict

from vidjax.core import augment, ensemble, fusion, losses, optim
from vidjax.core.augment import BatchTransform
from vidjax.core.batch import Array, ClipInfo, Frames, NoiseClassLayout
from vidjax.models.base import Identifier, ModelState, Params, check_output
from vidjax.models.deepmef import DeepMEF
from vidjax.models.dense import CosineIdentifier, DenseIdentifier, NeighbourIdentifier
from vidjax.models.fallback import FallbackIdentifier
from vidjax.models.multimodal import MultimodalIdentifier
from vidjax.models.plda import PLDAIdentifier
from vidjax.runs import config as config_lib
from vidjax.utils.errors import UserError, check_choice, check_entry, prefix_errors

# name -> model. To add a model, write a file in this folder and add a line here.
MODELS: dict[str, type[Identifier]] = {
    "cosine": CosineIdentifier,
    "deepmef": DeepMEF,
    "dense": DenseIdentifier,
    "fallback": FallbackIdentifier,
    "knn": NeighbourIdentifier,
    "mma": MultimodalIdentifier,
    "plda": PLDAIdentifier,
}
FuseFn = Callable[[Array | None, Frames], Frames]


class System(NamedTuple):
    """Everything that a training step or an evaluation step needs, except state and data."""

    task: "TaskSpec"  # sizes of the training data
    model: Identifier
    fuse_train: Mapping[str, FuseFn]  # modality -> (PRNG key, Frames [B, T]) -> Frames [B, T']
    fuse_eval: Mapping[str, FuseFn]  # the same for evaluation, where the key is None
    num_chunks: int | None  # each member lacks one of these parts of every feature; None: no part
    frame_is_example: bool  # True if each fused frame of a clip is a separate example
    clip_transforms: tuple[BatchTransform, ...]  # augmentations before the fusion of frames
    joins_clips: bool  # True if `clip_transforms` join clips of the batch
    transforms: tuple[BatchTransform, ...]  # augmentations after the fusion of frames
    objective: losses.Objective  # (output, labels [B], weight [B], step) -> loss [B]
    divides_by_clips: bool  # the sum of losses is divided by the number of clips, not their weights
    # (labels [B], step) -> weight [B] of each clip, by its class column
    column_weight: Callable[[Array, Array], Array]
    tx: optax.GradientTransformation  # the optimiser
    lr_schedule: optax.Schedule  # step -> learning rate
    temperature: float  # divisor of the logits in evaluation
    precision: str  # precision of matrix products in evaluation
    # (logits [..., K], class_mask) -> scores [..., K]. Clips are ranked by their scores.
    score_fn: Callable[[Array, Array], Array]
    scores_are_logs: bool  # True if scores are logarithms; then their exponentials are averaged
    reduce: str  # `mean` or `max` of the scores of a clip's examples
    top_classes: int  # number of highest scores that a clip keeps; 0: all
    # [K] bool, True for class columns that take part. Only column 0, "other", may be False: if no
    # training clip has this class, and the model does not have `scores_unknown`.
    class_mask: Array

    def fuse(
        self, rng: Array | None, frames: Mapping[str, Frames], hidden_chunk: Array
    ) -> dict[str, Frames]:
        """Selects or averages the frames of each modality: Frames [B, T] become Frames [B, T'].

        `rng` is a PRNG key, or None in evaluation. If `num_chunks` is set, chunk `hidden_chunk` (an
        int32) of every feature vector is removed, see `ensemble.drop_chunk`.
        """
        fused = {}
        fusions = self.fuse_eval if rng is None else self.fuse_train
        for i, (name, fuse) in enumerate(fusions.items()):
            result = fuse(None if rng is None else jax.random.fold_in(rng, i), frames[name])
            features = fusion.read(result.features)
            if self.num_chunks:
                features = ensemble.drop_chunk(features, hidden_chunk, self.num_chunks)
            fused[name] = result._replace(features=features)
        return fused

    def init(self, rng: jax.Array, fuse_rng: Array) -> tuple[Params, ModelState]:
        """Draws the parameters and the other variables of the model with the PRNG key `rng`.

        The inputs are blank clips, because only the shapes matter. `fuse_rng` is the PRNG key of
        the fusion, which may draw frames at random. Returns the parameters, and all other
        collections of variables. Raises UserError if the output of the model has wrong shapes.
        """
        fused = self.fuse(fuse_rng, make_blank_clips(self.task.modalities), jnp.int32(0))
        fused, exists = self.to_examples(fused)
        rows = jnp.zeros(exists.size, jnp.int32)
        clips = ClipInfo(index=rows, mask=rows == 0, labels=rows)
        output, made = self.model.init_with_output(rng, fused, clips, train=False)
        check_output(self.model, output, len(rows))
        variables = dict(made)
        return variables.pop("params", {}), variables

    def compute_shapes(self, num_members: int) -> tuple[Params, ModelState]:
        """Returns the shapes and dtypes of the variables of E nets, without computing the values.

        Returns the parameters, and all other collections: trees of jax.ShapeDtypeStruct [E, ...]. E
        is `num_members`.
        """
        rngs = jax.random.split(jax.random.key(0), num_members)
        return jax.eval_shape(lambda: jax.lax.map(lambda rng: self.init(rng, rng), rngs))

    def to_examples(self, frames: Mapping[str, Frames]) -> tuple[Mapping[str, Frames], Array]:
        """Turns each of B clips into n examples, the inputs of the model.

        `frames` is modality -> Frames [B, T'], the result of `fuse`. Returns the examples, modality
        -> Frames, and [B, n] bool, False for padding.

        If `frame_is_example` is False, n is 1, and `frames` are the examples. If it is True, each
        frame is an example: n is T', and the result has Frames [B * n, 1]. All modalities must have
        the same T', or only one frame. The n examples of a clip share the only frame.
        """
        if not self.frame_is_example:
            return frames, jnp.ones((len(next(iter(frames.values())).mask), 1), bool)
        sizes = {modality.mask.shape[1] for modality in frames.values()}
        if len(sizes - {1}) > 1:
            raise UserError(
                f"config.after_fusion=examples: the modalities have {sorted(sizes)} frames after "
                "fusion\nchange config.fusion: each modality needs the same number of frames, or 1"
            )
        num_examples = max(sizes - {1}, default=1)  # the sizes of an exported run are symbols
        masks = [x.mask for x in frames.values() if x.mask.shape[1] == num_examples]
        exists = jnp.any(jnp.stack(masks), axis=0)  # [B, T']
        # A clip with frames only in modalities with T' = 1 has a single example.
        has_single = fusion.has_frames(frames) & ~exists.any(axis=1)
        exists = exists.at[:, 0].set(exists[:, 0] | has_single)

        def reshape(x: Array) -> Array:
            x = jnp.broadcast_to(x, (x.shape[0], num_examples, *x.shape[2:]))
            return x.reshape(-1, 1, *x.shape[2:])  # [B T', 1, ...]

        return {name: jax.tree.map(reshape, modality) for name, modality in frames.items()}, exists


def make_blank_clips(modalities: Mapping[str, int]) -> dict[str, Frames]:
    """Returns two clips with one frame of zeros each, to compute shapes.

    `modalities` is name -> feature width. Returns modality -> Frames [2, 1].
    """
    row = jnp.zeros((2, 1), jnp.float32)
    return {
        name: Frames(jnp.zeros((2, 1, dim), row.dtype), row, row, row.astype(jnp.int32), row == 0)
        for name, dim in modalities.items()
    }


class TaskSpec(NamedTuple):
    """The sizes of the training data that a model depends on. Checkpoints store them."""

    modalities: Mapping[str, int]  # name -> feature width, in the order of the configuration
    num_identities: int
    num_clusters: int | None  # the K of `NoiseClassLayout`, or None without noise classes
    num_clips: int
    total_steps: int  # optimiser steps of the whole run
    train_other: bool  # True if training clips of column 0 have a weight above 0
    # Attribute of the model -> value that `Identifier.prepare` computed. None before `prepare`.
    settings: Mapping[str, float | tuple[float, ...]] | None = None
    num_places: int | None = None  # rows of all batches of an epoch. None means `num_clips`.

    @property
    def layout(self) -> NoiseClassLayout | None:
        """The class columns of the logits, or None without noise classes (of distractors)."""
        if self.num_clusters is None:
            return None
        return NoiseClassLayout(self.num_identities, self.num_clusters)

    @property
    def num_columns(self) -> int:
        """The number of class columns in the logits, K."""
        return self.layout.num_columns if self.layout else 1 + self.num_identities


def make_system(config: Mapping[str, Any], task: TaskSpec) -> System:
    """Builds the model, loss, optimiser and fusions of frames, for data of the sizes in `task`."""
    groups = ("after_fusion", "dtype", "ensemble", "eval", "loss", "optim")
    config_lib.check_ranges({name: config[name] for name in groups})  # the groups used below
    _check_dtype(config["dtype"])
    _check_precision(config["matmul_precision"])
    steps_per_epoch = (task.num_places or task.num_clips) / config["batch_size"]
    tx, schedule = optim.make_optimizer(
        config["optim"], total_steps=task.total_steps, steps_per_epoch=steps_per_epoch
    )
    model = make_model(config, task)
    # Column 0 needs training clips, unless the model computes its logit without them.
    knows_other = task.train_other or model.scores_unknown
    class_mask = jnp.asarray((np.arange(task.num_columns) > 0) | knows_other)
    check_entry("config.eval.scores", config["eval"]["scores"], SCORES)
    score_fn, scores_are_logs = SCORES[config["eval"]["scores"]]
    clip_transforms, transforms = augment.make_transforms(config, task.num_identities)
    system = System(
        task=task,
        model=model,
        fuse_train=make_fusions(config["fusion"], task.modalities, "train"),
        fuse_eval=make_fusions(config["fusion"], task.modalities, "evaluate"),
        num_chunks=config["ensemble"]["chunks"] if config["ensemble"]["views"] else None,
        frame_is_example=config["after_fusion"] == "examples",
        clip_transforms=clip_transforms,
        joins_clips=config["noise"]["join"],
        transforms=transforms,
        objective=losses.make_objective(
            config["loss"],
            None if knows_other else class_mask,
            steps_per_epoch,
            logit_scale=model.logit_scale,
        ),
        divides_by_clips=config["loss"]["mean_over"] == "clips",
        column_weight=_make_column_weight(config["noise"], task.layout, steps_per_epoch),
        tx=tx,
        lr_schedule=jax.jit(schedule),  # without jit, every operation is a program
        temperature=config["eval"]["temperature"],
        precision=config["matmul_precision"],
        score_fn=score_fn,
        scores_are_logs=scores_are_logs,
        reduce=config["eval"]["reduce"],
        top_classes=config["eval"]["top_classes"],
        class_mask=class_mask,
    )

    # Only the fusion of a training step gets a random key. A fusion that needs a key raises here.
    def fuse(fuse_eval: Mapping[str, FuseFn]) -> None:
        blank = make_blank_clips(task.modalities)
        system._replace(fuse_eval=fuse_eval).fuse(None, blank, jnp.int32(0))

    jax.eval_shape(functools.partial(fuse, system.fuse_eval))
    if task.layout and config["noise"]["relabel_by"] == "train":
        with prefix_errors("config.noise.relabel_by=train"):
            jax.eval_shape(functools.partial(fuse, system.fuse_train))
    return system


def make_model(config: Mapping[str, Any], task: TaskSpec) -> Identifier:
    """Builds the model of a configuration. `task` has sizes of the training data.

    If `config.ensemble.views` is set, each net of the ensemble is trained without a part of the
    features. Then the inputs of the model are narrower than the widths in `task`.
    """
    spec = config["model"]
    if task.settings:
        check_entry("model.name", spec.get("name"), MODELS)
        spec = MODELS[spec["name"]].with_prepared(spec, task.settings)
    views, chunks, modalities = config["ensemble"]["views"], config["ensemble"]["chunks"], {}
    for name, width in task.modalities.items():
        modalities[name] = width - width // chunks if views else width
    if views and max(task.modalities.values()) < chunks:
        raise UserError(
            f"config.ensemble.views: no modality has {chunks} or more features, "
            "so the features cannot be divided into so many chunks\n"
            "choose a smaller --config.ensemble.chunks, or leave --config.ensemble.views out"
        )
    return make_identifier(
        spec,
        modalities=modalities,
        num_classes=task.num_columns,
        num_clips=task.num_clips,
        dtype=jnp.dtype(config["dtype"]),
    )


def make_identifier(
    spec: Mapping[str, Any],
    *,
    modalities: Mapping[str, int],
    num_classes: int,
    num_clips: int,
    dtype: str | jnp.dtype = "float32",
) -> Identifier:
    """Builds a model, a hashable linen module, from its specification.

    `spec` is a dict such as {"name": "mma", "gamma": 0.1}. The name is a key of MODELS. The other
    keys are attributes of the model. If a model contains models, as FallbackIdentifier does, the
    value of such an attribute is a dict of the same form. `modalities` is name -> feature width.
    `num_classes` is the number of logits. `num_clips` is the number of training clips, for models
    that store clips.
    """
    options = dict(spec)
    name = options.pop("name", None)
    check_entry("model.name", name, MODELS)
    model = MODELS[name]
    if not issubclass(model, Identifier):
        raise UserError(
            f"model {name!r}: its class is not an Identifier\n"
            "derive the class from vidjax.models.base.Identifier"
        )
    fields = {field.name: field for field in dataclasses.fields(model)}
    given = {
        "modalities": FrozenDict(modalities),
        "num_classes": num_classes,
        "num_clips": num_clips,
        "dtype": jnp.dtype(dtype),
    }
    fixed = {key: value for key, value in given.items() if key in fields}
    known = {
        key: fusion.REQUIRED if field.default is dataclasses.MISSING else field.default
        for key, field in fields.items()
        if key not in ("parent", "name", *fixed)
    }
    remedy = "\nremove it; if another version of vidjax trained the run, use that version"
    fusion.check_options(f"model {name!r}", known, options, remedy)
    for key, value in options.items():
        _check_type(f"model {name!r}", key, value, dict if key in model.parts else fields[key].type)
    if not modalities:
        raise UserError(
            f"config.modalities is empty, but model {name!r} needs a modality\n"
            "give one, such as --config.modalities=face"
        )
    for part, choice in model.parts.items():
        names = options.get(choice) or tuple(modalities)
        if unknown := sorted(set(names) - set(modalities)):
            raise UserError(
                f"model {name!r}: {choice} lists {', '.join(unknown)}, but the model has only the "
                f"modalities {', '.join(modalities)}\nchoose from these modalities"
            )
        options[part] = make_identifier(
            options[part],
            modalities={key: modalities[key] for key in names},
            num_classes=num_classes,
            num_clips=num_clips,
            dtype=dtype,
        )
    return model(**options, **fixed)


def _check_type(model: str, option: str, value: object, kind: Any) -> None:  # noqa: ANN401
    """Raises UserError if the `value` of an option does not fit the type `kind`.

    `kind` may limit the range, such as `Annotated[float, Meta(ge=0)]`, or be a Literal. `model` is
    the name of the model for the message, such as "model 'dense'".
    """
    if get_origin(kind) is Literal:  # the error of msgspec would not list the possible values
        return check_choice(option, value, get_args(kind))
    given = dict(value) if isinstance(value, Mapping) else value

    def skip(*_: object) -> None:
        raise NotImplementedError

    try:
        plain = msgspec.to_builtins(given, enc_hook=lambda x: x.tolist())  # numbers of numpy
        msgspec.convert(plain, kind, dec_hook=skip)
    except msgspec.ValidationError as error:
        raise UserError(f"{model}: {option}={str(value)[:50]}: {error}") from None
    except (AttributeError, TypeError, NotImplementedError):
        pass  # an option of a user's own model may be of a type unknown to msgspec, such as a dtype


def make_fusions(
    specs: Mapping[str, Any], modalities: Collection[str], phase: str
) -> dict[str, FuseFn]:
    """Builds the fusion of each modality, a function that selects or averages frames.

    `specs` is `config.fusion`: modality -> phase -> specification. `phase` is `train` or
    `evaluate`. A modality without a specification keeps all frames. Returns modality -> fusion.
    """
    fusions = {}
    for name in modalities:
        field = f"config.fusion.{name}.{phase}"
        phases = specs.get(name, {})
        with prefix_errors(field):
            spec = phases.get(phase) if isinstance(phases, Mapping) else phases
            fuse = fusion.make_fusion(spec or {"name": "all"})
        fusions[name] = prefix_errors(field)(fuse)
    return fusions


def _make_column_weight(
    spec: Mapping[str, Any], layout: NoiseClassLayout | None, steps_per_epoch: float
) -> Callable[[Array, Array], Array]:
    """Builds a function (labels [B], step) -> weights of B training clips in the loss, [B].

    The schedule `spec["mirror_weight"]` is the weight of clips whose label is a mirror class, see
    `NoiseClassLayout`. Other clips have the weight 1. Without mirror classes, `layout` is None.
    """
    mirror_weight = optim.make_piecewise(spec["mirror_weight"], name="config.noise.mirror_weight")
    if not layout:
        return lambda labels, step: jnp.ones(labels.shape, jnp.float32)
    return lambda labels, step: jnp.where(
        layout.is_mirror(labels), mirror_weight(step / steps_per_epoch), 1.0
    )


def _check_dtype(dtype: str) -> None:
    """Raises UserError if JAX would silently compute in another dtype than `dtype`."""
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise UserError(
            f"config.dtype={dtype}: JAX computes in float32 in this process\n"
            "in a shell, run 'export JAX_ENABLE_X64=1' before the command\n"
            "in Python, call jax.config.update('jax_enable_x64', True)"
        )


def _check_precision(precision: str) -> None:
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError as error:
        raise UserError(
            f"config.matmul_precision='{precision}': choose default, high, highest, bfloat16, "
            "float32 or another precision of jax"
        ) from error


def _log_sigmoid(logits: Array, class_mask: Array) -> Array:
    """Computes the logarithm of the sigmoid of each logit. Ignores `class_mask`."""
    return jax.nn.log_sigmoid(logits)


def _keep_logits(logits: Array, class_mask: Array) -> Array:
    """Returns the logits unchanged, also of masked classes."""
    return logits


# config.eval.scores -> (score function, True if scores are logarithms). Logarithms keep the order
# of large logits: sigmoid(17) is 1.0 in float32, but its logarithm is not 0.
SCORES = {
    "log_softmax": (losses.log_softmax, True),
    "log_sigmoid": (_log_sigmoid, True),
    "logits": (_keep_logits, False),
}
