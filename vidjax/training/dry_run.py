"""A dry run of training: refuses impossible configurations before any data are read.

Building the system and tracing its parameters takes a tenth of a second and no device.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp

from vidjax import config_io, ensemble
from vidjax.config import Config
from vidjax.data import sources
from vidjax.data.clips import Modality, select_modalities
from vidjax.errors import UserError, suggest
from vidjax.steps import state as state_lib
from vidjax.system import TaskSpec, make_system
from vidjax.training.plan import check_model

WIDTH = 512  # feature width of a modality whose files have not been read
CLIPS, STEPS = 64, 10  # sizes of the training
MOST_PARAMS = 10**10  # parameters of one member; more fit no device


def run(
    config: Config,
    overrides: Sequence[str] = (),
    original: Callable[[], Config] | None = None,
    *,
    training: bool = True,
) -> None:
    """Refuses a configuration that no training, or evaluation, could use.

    Args:
      overrides: command-line arguments `--config.FIELD=VALUE`; an error names the one to blame.
      original: returns the configuration without `overrides`.
      training: False for an evaluation, which needs no training split.
    """
    if training:
        check_model(config)
    widths = check_names(config, training=training)
    try:
        trace_model(config, widths)
    except ValueError as error:
        if "config." in str(error):
            raise
        for word in overrides if original else ():
            rest = [other for other in overrides if other != word]
            if original and _is_buildable(config_io.override(original(), rest), widths):
                raise UserError(f"{word}: {error}") from error
        raise UserError(f"config.model: {error}") from error


def check_names(config: Config, *, training: bool) -> Mapping[str, int]:
    """Checks splits and modalities by name; returns feature widths, `WIDTH` for unknown ones."""
    splits, dims = sources.names(config.data) or (None, None)
    if splits is not None:
        _check_splits(config, splits, training=training)
    dims = dims or dict.fromkeys(config.modalities, 0)
    known = {name: Modality(dim or WIDTH, "float32") for name, dim in dims.items()}
    missing = [name for name in config.modalities if name not in known]
    there = [name for name in config.modalities if name in known]
    if there and missing and suggest(missing[0], known).startswith("choose"):
        raise UserError(
            f"config.modalities: the data has no modality '{missing[0]}'\n"
            f"there: {', '.join(known)}; to use these: --config.modalities={','.join(there)}"
        )
    return select_modalities(config.modalities, known)


def _check_splits(config: Config, splits: Collection[str], *, training: bool) -> None:
    wanted = {"eval.split": (config.eval.split,)}
    if training:
        wanted = {"data.train_splits": config.data.train_splits, **wanted}
    for field, names in wanted.items():
        for name in names:
            if name in splits:
                continue
            hint = f"choose from {', '.join(sorted(splits))}"
            if training and field == "eval.split" and len(splits) == 1:
                only = next(iter(splits))
                hint = (
                    f"to score clips of '{only}' by members that were not trained on them:\n"
                    f"--config.eval.split={only} --config.ensemble.folds=5"
                )
            raise UserError(f"config.{field}: the data has no split '{name}': {hint}")


def trace_model(config: Config, widths: Mapping[str, int]) -> None:
    """Builds the system of a configuration and traces its parameters, without devices."""
    spec = config.to_dict()
    members = ensemble.make_members(spec["ensemble"])[:1]
    spec["optim"]["total_decay"] = 0.0  # it asks for the sum of the schedule, on a device
    clusters = 1 if config.data.distractors == "noise" else None
    task = TaskSpec(widths, 2, clusters, CLIPS, STEPS, train_other=True)

    def init() -> state_lib.TrainState:
        system = make_system(spec, task)
        rngs = ensemble.make_rngs(members, config.seed)
        system.fuse(None, state_lib.blank_clip(widths), jnp.int32(0))  # as an evaluation does
        return state_lib.init_state(system, widths, rngs, jnp.zeros((1, CLIPS), jnp.int32))

    try:
        params = jax.eval_shape(init).params
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a model of the user's own raises what it likes
        reason = (str(error) or "no reason given").splitlines()[0]
        raise UserError(
            f"the model '{spec['model'].get('name')}' cannot be built: "
            f"{type(error).__name__}: {reason}\n--debug shows where"
        ) from error
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if count > MOST_PARAMS:
        raise UserError(f"the model '{spec['model'].get('name')}' has {count:,} parameters")


def _is_buildable(config: Config, widths: Mapping[str, int]) -> bool:
    try:
        trace_model(config, widths)
    except ValueError:
        return False
    return True
