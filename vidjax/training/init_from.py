"""Starts the training of a run with the weights of another run, `config.init_from`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble
from vidjax.evaluation import trained_runs
from vidjax.models.build_system import System, TaskSpec, make_model
from vidjax.runs import checkpoint
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.config import Config
from vidjax.runs.facts import Source
from vidjax.runs.run_folder import open_run
from vidjax.training.train_step import TrainState
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError, prefix_errors
from vidjax.utils.terminal import say

FIELD = "config.init_from"
Arrays = dict[str, np.ndarray]  # path -> values [E, ...] of the E nets of a run


def find_source(config: Config) -> trained_runs.FoundRun:
    """Finds the run `config.init_from`, whose weights the new run starts with.

    Raises UserError if the found run has another model, has an unsuitable number of nets, or is not
    finished. Raises CheckpointError if its last checkpoint is damaged.
    """
    with prefix_errors(FIELD):
        folder = open_run(config.init_from)
        theirs, name = folder.config, config.model.get("name")
        if (other := theirs.model.get("name")) != name:
            kind = f"a run of the model '{other}'" if other else "a blend of runs"
            raise UserError(
                f"'{folder.path}' is {kind}, but this run trains the model '{name}'\n"
                "give a run of this model, or leave out --config.init_from"
            )
        if not folder.metrics().get("finished"):
            raise UserError(
                f"the run in '{folder.path}' is not finished\n"
                "to finish it, repeat the command that trains it"
            )
        theirs.eval.checkpoint = "latest"
        source = trained_runs.find_run(theirs, folder)
        if source.manifest["step"] != (last := max(checkpoint.list_folders(folder.path))):
            raise CheckpointError(
                f"the checkpoint of step {last:,} in '{folder.path}' is damaged\nrestore a copy"
            )
        members = len(source.training_sets.members)
        wanted = len(ensemble.make_members(config.ensemble.to_dict()))
        if members not in (1, wanted):
            raise UserError(
                f"the run in '{folder.path}' has {members} members, but this run has {wanted}\n"
                f"give a run with 1 or {wanted} members (nets), or train {members} members here"
            )
    return source


def load_state(
    source: trained_runs.FoundRun,
    system: System,
    config: Config,
    identities: Sequence[str],
    state: TrainState,
    mesh: Mesh,
) -> tuple[TrainState, Source]:
    """Copies weights of the run `source` to a new run, array by array, if the arrays fit.

    An array fits if it has the same path and, except for the axis of the classes, the same shape.
    Along this axis, an identity gets the values of the identity with the same name in `source`. All
    other values of the new run stay. Raises UserError if no array with two or more axes fits.

    Args:
      system: the system of the new run.
      config: the configuration of the new run.
      identities: the identities of the new run, in the order of the class columns.
      state: the state of the new run at step 0.

    Returns:
      The state with the loaded weights, and a description of what was loaded.
    """
    theirs = trained_runs.load_model(source.folder.config, source, mesh)
    old = _flatten((theirs.params, theirs.model_state))
    weights = (state.params, state.model_state)
    columns = match_columns(source, system.task, identities)
    wider = _compute_wider_shapes(system, config, len(state.labels))
    width = source.task.num_columns
    rest: list[str] = []
    num_matrices = 0

    def load(path: tuple[Any, ...], value: np.ndarray, wide: jax.ShapeDtypeStruct) -> np.ndarray:
        nonlocal num_matrices
        name = _name(path)
        loaded = _load_array(value, wide.shape, old.get(name), columns, width)
        if loaded is None:
            rest.append(name)
            return value
        num_matrices += value.ndim > 2  # the first axis is the members
        return loaded

    values = jax.tree_util.tree_map_with_path(load, devices.fetch(weights), wider)
    total = len(jax.tree.leaves(weights))
    folder, step = source.folder.path, source.manifest["step"]
    if not num_matrices:
        raise UserError(
            f"{FIELD}: no weight matrix of '{folder}' fits into the model of the new run\n"
            f"the earlier run has the modalities {', '.join(source.task.modalities)}: choose the "
            "same --config.modalities and sizes of the model"
        )
    known = int(np.sum(columns[0] > 0))
    text = f"{FIELD}: step {step:,} of '{folder}': {total - len(rest)} of {total} arrays are loaded"
    fresh = f", {len(identities) - known:,} start anew" if known < len(identities) else ""
    text += f"; {known:,} of {len(identities):,} identities are known{fresh}"
    say(text + (f"\nnot loaded: {messages.list_some(rest)}" if rest else ""))
    params, model_state = devices.replicate(mesh, values)
    entry = Source(
        run=str(folder), step=step, sha256=files.sha256_json(source.manifest["files"]),
        arrays=total - len(rest), identities=known,
    )  # fmt: skip
    return state.replace(params=params, model_state=model_state), entry


def match_columns(
    source: trained_runs.FoundRun, task: TaskSpec, identities: Sequence[str]
) -> np.ndarray:
    """Finds the classes that a new run has in common with the run `source`.

    Identities are matched by name. Class 0, "other", is matched if both runs train it. `task` and
    `identities` are of the new run. Returns [2, n] int: the columns of the n common classes in the
    new run, and their columns in the run `source`.
    """
    number = {name: column for column, name in enumerate(source.identities, start=1)}
    pairs = [(new, number[x]) for new, x in enumerate(identities, start=1) if x in number]
    if task.train_other and source.task.train_other:
        pairs.insert(0, (0, 0))
    return np.array(pairs, np.int64).reshape(-1, 2).T


def _compute_wider_shapes(
    system: System, config: Config, num_members: int
) -> tuple[Mapping[str, Any], ...]:
    """Returns the shapes that the weights of `system` would have with one more identity.

    The caller compares them with the real shapes: an axis whose size differs is an axis of classes.
    """
    task = system.task._replace(num_identities=system.task.num_identities + 1)
    wider = system._replace(task=task, model=make_model(config.to_dict(), task))
    return wider.compute_shapes(num_members)


def _load_array(
    value: np.ndarray, wide: tuple[int, ...], old: np.ndarray | None, columns: np.ndarray,
    width: int,
) -> np.ndarray | None:  # fmt: skip
    """Returns an array of a new run, filled with the values of an array of another run.

    Args:
      value: [E, ...], the array of the new run, of E nets.
      wide: the shape that `value` would have with one more identity. Only the size of the axis of
        the classes differs from `value`.
      old: the array of the other run with the same name, or None.
      columns: [2, n] int, new and old columns of common classes, from `match_columns`.
      width: the number of class columns of `old`.

    Returns:
      An array with the shape of `value`, or None if `old` is None or its shape does not fit.
    """
    if old is None or old.ndim != value.ndim:
        return None
    classes = [
        i for i, (size, more) in enumerate(zip(value.shape, wide, strict=True)) if size != more
    ]
    expected = [width if i in classes else size for i, size in enumerate(value.shape)]
    if list(old.shape[1:]) != expected[1:] or len(classes) > 1:
        return None
    old = np.broadcast_to(old, (len(value), *old.shape[1:])).astype(value.dtype)
    if not classes:
        return old
    result = np.moveaxis(value.copy(), classes[0], 0)
    new, same = columns
    result[new] = np.moveaxis(old, classes[0], 0)[same]
    return np.moveaxis(result, 0, classes[0])


def _flatten(tree: object) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(devices.fetch(tree))
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path[1:], simple=True, separator="/")
