"""Evaluation of a trained run: its weights restored, a split ranked, MAP@100."""

import difflib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import config as config_lib
from vidjax import devices, ensemble
from vidjax.config import Config
from vidjax.data.clips import ClipSource, TrainingData
from vidjax.modes import analysis
from vidjax.modes.outputs import write_results
from vidjax.run import checkpoint, resume
from vidjax.run import results as results_lib
from vidjax.run import workdir as workdir_lib
from vidjax.steps import state as state_lib
from vidjax.steps.scoring import Scorer, TrainedModel, score
from vidjax.system import TaskSpec, make_system


def evaluate(
    config: Config,
    workdir: Path,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    analyse: bool = False,
) -> dict[str, Any]:
    """Scores a split with the weights of a run; writes the ranking and returns the metrics.

    The files are `metrics.json` and `ranking.txt` for the split that training watched,
    `metrics_<split>.json` and `ranking_<split>.txt` for any other.

    Args:
      config: the run's configuration, with what differs now.
      workdir: the run's folder.
      data: a `Dataset`; it need not be the one that was trained on, nor have a
        ground truth.
      num_devices: how many devices to use; None for all. Scores do not depend on it.
      analyse: whether to write `analysis.npz` (or `analysis_<split>.npz`) and `report.html`, too.

    Raises:
      ValueError: the data does not fit the run.
      CheckpointError: no usable checkpoint.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    step, model = restore(config, workdir, data, mesh)
    split = config.eval.split
    observer = analysis.Observer([model], split, mesh) if analyse else None
    evaluation = score(
        [model],
        split,
        mesh,
        block_size=config.eval.block_size,
        each_member=config.eval.members,
        observe=observer,
    )
    results = evaluation.results | {"step": step, "eval_seconds": time.monotonic() - began}

    trained = config_lib.load_workdir(workdir)
    write_results(
        workdir, model.data, evaluation, results_lib.training_metrics(workdir) | results,
        split=split, own_split=trained.eval.split,
        observer=observer, train_splits=trained.data.train_splits,
    )  # fmt: skip
    return results


class Run(NamedTuple):
    """What the folder of a run holds, its weights not read yet.

    Attributes:
      found: the checkpoint; every file of it matched its digest.
      sizes: of the training data.
      identities: [C] names of the columns.
    """

    found: checkpoint.Checkpoint
    sizes: TaskSpec
    identities: tuple[str, ...]

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the checkpoint."""
        return self.found.manifest


def restore(
    config: Config, workdir: Path, data: TrainingData, mesh: Mesh
) -> tuple[int, TrainedModel]:
    """Returns the step that a run's folder restores, and the system with its weights.

    Args:
      config: the run's configuration, with what differs now.
      workdir: the run's folder.
      data: a `Dataset` to evaluate it on.
      mesh: the devices.

    Raises:
      ValueError: the data does not fit the run.
      CheckpointError: no usable checkpoint.
    """
    run = find_run(config, workdir)
    data = fit_data(data, config.eval.split, run.sizes.modalities, run.identities)
    return run.manifest["step"], load_run(run, config, workdir, mesh)._replace(data=data)


def find_run(config: Config, workdir: Path) -> Run:
    """Returns what a run's folder restores.

    Where the wanted step is damaged it is the next good one, with a warning.

    Args:
      config: the run's configuration, with what differs now.
      workdir: the run's folder.

    Raises:
      ValueError: the configuration asks for other modalities.
      CheckpointError: no usable checkpoint.
    """
    found = checkpoint.find(workdir, config.eval.checkpoint)
    if found is None:
        raise checkpoint.CheckpointError(f"no checkpoint in '{workdir}'")
    manifest = found.manifest
    for name in (*TaskSpec._fields, "members_sha256", "config"):
        if name not in manifest:
            raise checkpoint.CheckpointError(
                f"'{workdir}' was trained by another version of vidjax: it says nothing of {name}"
            )
    spoilt = resume.spoilt(workdir, manifest["config"])
    if spoilt:
        raise checkpoint.CheckpointError(
            f"'{workdir / 'config.json'}' is not what the run was trained with\n"
            f"{resume.describe(spoilt)}"
        )
    sizes = TaskSpec(**{name: manifest[name] for name in TaskSpec._fields})
    if tuple(config.modalities) != tuple(sizes.modalities):
        raise ValueError(
            f"config.modalities={','.join(config.modalities)}: the run was trained on "
            f"{','.join(sizes.modalities)}, in this order"
        )
    identities = _identities(workdir / "identities.json", manifest["identities_sha256"])
    return Run(found, sizes, identities)


def fit_data(
    data: TrainingData, split: str, modalities: Mapping[str, int], identities: Sequence[str]
) -> TrainingData:
    """Returns a dataset labelled for the columns of a run.

    Args:
      data: a `Dataset`.
      split: the one to evaluate.
      modalities: name -> feature width, of the run.
      identities: [C] of the run.

    Raises:
      ValueError: the data does not fit the run.
    """
    widths = select_modalities(tuple(modalities), data)
    for name, width in modalities.items():
        if widths[name] != width:
            raise ValueError(f"modality '{name}': the run wants width {width}, got {widths[name]}")
    data = data.with_identities(identities)
    if data.split(split).labelled and not np.any(data.split(split).positives):
        raise ValueError(
            f"config.eval.split={split}: its ground truth names no identity that the run knows"
        )
    return data


def load_run(run: Run, config: Config, workdir: Path, mesh: Mesh) -> TrainedModel:
    """Returns the system of a run with its weights, without data.

    Args:
      run: what `find_run` found.
      config, workdir: as there.
      mesh: the devices.

    Raises:
      CheckpointError: the run's files do not belong together.
    """
    sizes = run.sizes
    training_sets = _training_sets(workdir, run.manifest["members_sha256"])
    system = make_system(config.to_dict(), sizes)
    abstract = jax.eval_shape(
        lambda: state_lib.init_state(
            system,
            sizes.modalities,
            ensemble.make_rngs(training_sets.members, config.seed),
            jnp.zeros((len(training_sets.members), 1), jnp.int32),
        )
    )
    items = checkpoint.load(
        run.found,
        {"params": abstract.params, "model_state": abstract.model_state},
        devices.replicated(mesh),
    )
    scorer = Scorer(system, mesh)
    no_data = cast(ClipSource, None)  # the caller replaces it
    return TrainedModel(
        str(workdir), scorer, items["params"], items["model_state"], training_sets, no_data
    )


REWRITE = "delete it and metrics.json: the command that trained the run writes them anew"


def _identities(path: Path, wanted: str) -> tuple[str, ...]:
    try:
        identities = tuple(workdir_lib.read_json(path, list))
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(f"cannot read '{path}': {error}\n{REWRITE}") from error
    if digest(identities) != wanted:
        raise checkpoint.CheckpointError(
            f"'{path}' is not the list that the run was trained on\n{REWRITE}"
        )
    return identities


def _training_sets(workdir: Path, wanted: str) -> ensemble.TrainingSets:
    try:
        training_sets = ensemble.load(workdir)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{error}\n{REWRITE}") from error
    if ensemble.digest(training_sets) != wanted:
        raise checkpoint.CheckpointError(
            f"'{workdir / ensemble.FILE}' is not what the run was trained with\n{REWRITE}"
        )
    return training_sets


def select_modalities(names: Sequence[str], data: Any) -> dict[str, int]:
    """Returns name -> feature width of the modalities that a configuration asks for.

    Raises:
      ValueError: there is none of that name, or no name at all.
    """
    if not names:
        raise ValueError("config.modalities is empty: name at least one")
    if len(set(names)) < len(names):
        raise ValueError(f"config.modalities={','.join(names)}: one is named twice")
    for name in names:
        if name not in data.modalities:
            close = difflib.get_close_matches(name, data.modalities, n=1)
            hint = (
                f"did you mean '{close[0]}'?" if close else f"there: {', '.join(data.modalities)}"
            )
            raise ValueError(f"config.modalities: the data has no modality '{name}'; {hint}")
    return {name: data.modalities[name].dim for name in names}


def digest(identities: Sequence[str]) -> str:
    """Returns the sha256 of a list of identities, in its order."""
    return workdir_lib.sha256_json(list(identities))
