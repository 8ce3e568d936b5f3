"""Checks that a system can be built from a configuration, before any data are read."""

import math
import os
import shlex
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core import ensemble, metrics
from vidjax.core.batch import Batch
from vidjax.data import sources
from vidjax.data.clips import Modality, select_modalities
from vidjax.data.dataset import Dataset
from vidjax.models.base import Identifier
from vidjax.models.build_system import MODELS, TaskSpec, make_blank_clips, make_system
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.config import Config
from vidjax.training import train_step
from vidjax.utils.errors import UserError, check_entry

# The assumptions of a dry run, which reads no data:
WIDTH = 512  # feature width of a modality
CLIPS, STEPS = 64, 10  # training clips and steps
MAX_PARAMS = 10**10  # of a member; no device can store more


def check_model(config: Config) -> None:
    """Raises UserError if `num_epochs` is too small for the model, or a setting has no effect.

    A model in closed form has no optimiser, so fields of the optimiser must have their defaults.
    """
    name = config.model.get("name")
    model = MODELS.get(name, Identifier)
    if not issubclass(model, Identifier):
        return  # `make_identifier` will raise an error
    if config.num_epochs < model.min_epochs:
        raise UserError(
            f"config.num_epochs={config.num_epochs:g} is too small: model '{name}' needs "
            f"{model.min_epochs:g} passes over the clips\n"
            f"use --config.num_epochs={model.min_epochs:g}"
        )
    if not model.is_closed_form:
        return
    defaults = config_lib.DEFAULTS
    for field, value in config_lib.fields(config):
        changed = field in defaults and value != defaults[field]
        if changed and config_lib.affects(field) & config_lib.STEPS:
            remedy = shlex.quote(f"--config.{field}={defaults[field]}")
            raise UserError(
                f"config.{field}={value} has no effect: model '{name}' is trained without an "
                f"optimiser, and without random changes of clips\nuse the default: {remedy}"
            )


def dry_run(config: Config, data: Dataset | None = None) -> None:
    """Raises UserError if a system cannot be built from a configuration.

    Builds the model without memory for its weights, and computes all metrics of four made-up clips.
    No features are read, and no device is used. If `data` is None, the modalities are found in the
    names of the files of `config.data`. If `data` is given, or a user may have written the Python
    file of the configuration, JAX also traces a training step, which takes a second.
    """
    if config.join.systems:
        _dry_run_systems(config, data)
        return
    check_model(config)
    check_entry(
        "config.early_stop.metric", config.early_stop.metric, ["map", *metrics.CLIP_METRICS]
    )
    known = data.modalities if data else {}
    if not data:
        widths = sources.read_modalities(config.data) or dict.fromkeys(config.modalities, 0)
        known = {name: Modality(width or WIDTH, "float32") for name, width in widths.items()}
    widths = select_modalities(config.modalities, known)
    spec = config.to_dict()
    members = ensemble.make_members(spec["ensemble"])[:1]
    spec["optim"]["total_decay"] = 0.0  # it would compute the sum of the schedule on a device
    clusters = 1 if config.data.distractors == "noise" else None
    task = TaskSpec(widths, 2, clusters, CLIPS, STEPS, train_other=True)

    def begin() -> train_step.TrainState:
        system = make_system(spec, task)
        rngs = ensemble.make_rngs(members, config.seed)
        state = train_step.init_state(system, rngs, jnp.zeros((1, CLIPS), jnp.int32))
        if data is None and not config_io.own_files:
            return state
        constants = train_step.make_member_constants(members, np.ones((1, CLIPS)))
        rows = jnp.zeros(2, jnp.int32)
        batch = Batch(make_blank_clips(widths), rows, rows == 0)
        return train_step.train_step(system, state, jax.tree.map(jnp.asarray, constants), batch)[0]

    try:
        metrics.compute_clip_metrics(*_make_up_scores())
        params = jax.eval_shape(begin).params
    except UserError as error:
        place = "" if "config." in str(error) or "the metric" in str(error) else "config.model: "
        raise UserError(f"{place}{error}") from error
    except MemoryError:
        raise
    except Exception as error:  # it may come from code of the user
        reason = (str(error) or "no reason given").splitlines()[0]
        line = _find_own_line(error) or f"the model '{spec['model'].get('name')}' cannot be built"
        raise UserError(
            f"{line}: {type(error).__name__}: {reason}\nto see the whole traceback, add --debug"
        ) from error
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if count > MAX_PARAMS:
        raise UserError(
            f"the model '{spec['model'].get('name')}' has {count:,} parameters, more "
            f"than {MAX_PARAMS:,}\nreduce its sizes in config.model"
        )


def _dry_run_systems(config: Config, data: Dataset | None) -> None:
    """Makes a dry run of each system of a blend, `config.join.systems`.

    Raises UserError if the systems use other modalities than `config.modalities`.
    """
    names = dict[str, None]()
    for spec in config.join.systems:
        system = config_io.load_system(config, spec, final=False)
        dry_run(system, data)
        names |= dict.fromkeys(system.modalities)
    if {*names} != {*config.modalities}:
        given, found = ",".join(config.modalities), ",".join(names)
        raise UserError(
            f"config.modalities={given}, but the systems in config.join.systems have {found}\n"
            f"choose systems that read {given}, as --config=joint:{given} does, or use "
            f"--config.modalities={found}"
        )


def _make_up_scores() -> tuple[metrics.ClipScores, np.ndarray]:
    """Returns made-up scores and labels [4] of four clips, of two known people and a stranger."""
    best, own = np.array([[-0.1, -0.2, -0.7, -1.2], [-0.1, -0.2, -0.9, -np.inf]], np.float32)
    identity, rank = np.array([[1, 2, 2, 1], [0, 0, 1, 0]], np.int32)
    ranking = np.full((2, 100), -1, np.int32)
    ranking[:, :4] = [[0, 3, 2, 1], [1, 2, 0, 3]]
    pool, labels = np.ones(4, bool), np.array([1, 2, 1, 0], np.int32)
    right = identity == labels
    return metrics.ClipScores(pool, best, right, own, identity, rank, ranking), labels


def _find_own_line(error: Exception) -> str:
    """Returns the file and the line of a user's code that caused `error`, as text.

    If the traceback contains no code of a user, returns the last configuration file of a user that
    was executed, or "" if there is none.
    """
    libraries = [Path(__file__).parents[1], Path(jax.__file__).parents[1], Path(os.__file__).parent]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(Path(frame.filename).is_relative_to(folder) for folder in libraries):
            return f"'{frame.filename}' line {frame.lineno}"
    return f"'{config_io.own_files[-1]}'" if config_io.own_files else ""
