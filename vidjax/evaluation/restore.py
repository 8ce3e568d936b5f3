"""A trained run from its folder: the checkpoint, the files it depends on, and its weights.

A manifest keeps the configuration and the sha256 of `identities.json` and `members.npz`, so that a
file of another run is noticed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from vidjax import devices, ensemble, files
from vidjax.config import Config
from vidjax.data.clips import TrainingData, select_modalities
from vidjax.errors import UserError
from vidjax.evaluation import run_data
from vidjax.evaluation.scoring import TrainedModel
from vidjax.run import checkpoint, resume
from vidjax.run import results as results_lib
from vidjax.run.checkpoint import CheckpointError
from vidjax.steps import class_sharding
from vidjax.system import System, TaskSpec, make_system

IDENTITIES, CONFIG = "identities.json", "config.json"
MOST_DEVICES = 1 << 16  # that share the class columns: padding is less than one for each
REMEDY = "delete it and metrics.json: the command that trained the run then rewrites both"
REWRITE = "delete metrics.json: the command that trained the run then rewrites both"


class FoundRun(NamedTuple):
    """A run in a folder, after a check that its files belong to one run; weights are not yet read.

    Attributes:
      checkpoint: a checkpoint of which every file has matched its sha256.
      identities: [C] names of the class columns 1..C.
    """

    checkpoint: checkpoint.Checkpoint
    task: TaskSpec
    identities: tuple[str, ...]
    training_sets: ensemble.TrainingSets

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the checkpoint."""
        return self.checkpoint.manifest


def restore(
    config: Config, workdir: Path, data: TrainingData, mesh: Mesh
) -> tuple[int, TrainedModel]:
    """Restores a trained run on a dataset; returns its optimiser step and the model.

    Here and below, `config` is that of the run, with the overrides of this evaluation.
    """
    run = find_run(config, workdir)
    return run.manifest["step"], make_model(config, workdir, run, data, mesh)


def make_model(
    config: Config, workdir: Path, run: FoundRun, data: TrainingData, mesh: Mesh
) -> TrainedModel:
    """Returns the model of a run, with its weights, on a dataset."""
    data = fit_data(data, config, workdir, run)
    system = make_system(config.to_dict(), run.task.with_padding(mesh.shape["model"]))
    params, model_state = load_weights(run, system, mesh)
    return TrainedModel.from_params(
        str(workdir), system, mesh, params, model_state, run.training_sets, data
    )


def find_run(config: Config, workdir: Path) -> FoundRun:
    """Finds the checkpoint of a run and reads the files that it depends on.

    Where the wanted step is damaged, the next good one is used, with a warning.
    """
    found = checkpoint.find(workdir, config.eval.checkpoint)
    if found is None:
        raise CheckpointError(f"no checkpoint in '{workdir}'; train first")
    manifest = found.manifest
    check_entries(workdir, manifest)
    check_config(workdir, manifest)
    task = task_of(manifest)
    if tuple(config.modalities) != tuple(task.modalities):
        raise UserError(
            f"config.modalities={','.join(config.modalities)}: the run was trained on "
            f"{','.join(task.modalities)}, in this order\nleave out --config.modalities"
        )
    identities = load_identities(workdir, manifest)
    if task.num_identities != len(identities):
        raise CheckpointError(
            f"'{workdir}': the manifest of the checkpoint counts {task.num_identities:,} people, "
            f"identities.json {len(identities):,}\nthe run was changed: take another copy of it"
        )
    training_sets = load_training_sets(workdir, manifest)
    columns, clips = max(task.num_model_columns, task.num_columns), len(training_sets.clips)
    if columns > 1 + len(identities) + clips + MOST_DEVICES:  # made before weights are compared
        raise CheckpointError(
            f"'{workdir}': the manifest of the checkpoint counts {columns:,} class columns\n"
            f"of {len(identities):,} people and {clips:,} clips: take another copy of the run"
        )
    return FoundRun(found, task, identities, training_sets)


def check_entries(workdir: Path, manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a manifest lacks an entry that restoring needs."""
    sizes = [name for name in TaskSpec._fields if name not in TaskSpec._field_defaults]
    for name in (*sizes, "identities_sha256", "members_sha256", "config"):
        if name not in manifest:
            raise CheckpointError(
                f"'{workdir}': the manifest of the checkpoint has no entry '{name}'\n"
                "another version of vidjax trained it: go on with that version"
            )


def task_of(manifest: Mapping[str, Any]) -> TaskSpec:
    """Builds the task from a checkpoint's manifest, which an earlier version may have written."""
    task = TaskSpec(**{name: manifest[name] for name in TaskSpec._fields if name in manifest})
    found = dict(task.settings or {})
    if manifest.get("threshold") is not None:  # an entry of its own in earlier versions
        found["threshold"] = manifest["threshold"]
    settings = {n: tuple(x) if isinstance(x, list) else x for n, x in found.items()}
    return task._replace(settings=settings or None)


def fit_data(data: TrainingData, config: Config, workdir: Path, run: FoundRun) -> TrainingData:
    """Checks the data of an evaluation against a run, and labels them with its class columns."""
    split = config.eval.split
    check_widths(data, run.task.modalities)
    run_data.check_evaluation(workdir, run.manifest, config, data)
    data = data.with_identities(run.identities)
    if data.split(split).labelled and not np.any(data.split(split).positives):
        raise UserError(
            f"config.eval.split={split}: its ground truth names no identity that the run knows\n"
            "check that --config.data.dir is the dataset of the run"
        )
    return data


def check_widths(data: TrainingData, modalities: Mapping[str, int]) -> None:
    """Raises ValueError if a dataset lacks a modality of a run, or has it in another width."""
    widths = select_modalities(tuple(modalities), data.modalities)
    for name, width in modalities.items():
        if widths[name] != width:
            raise UserError(f"modality '{name}': the run wants width {width}, got {widths[name]}")


def load_weights(
    run: FoundRun, system: System, mesh: Mesh
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Loads the parameters of a run, and the collections of `Identifier.solve`, all [E, ...].

    Parameters with class columns are split over the devices that share the classes. All other
    arrays are whole on every device.
    """
    modalities, count = run.task.modalities, len(run.training_sets.members)
    axes = class_sharding.find_class_axes(system, modalities, mesh)
    layout = axes.layout("params") if axes else devices.replicated(mesh)
    saved = class_sharding.abstract_state(system, modalities, run.task.num_model_columns, count)
    items = checkpoint.load(
        run.checkpoint,
        {"params": saved.params, "model_state": saved.model_state},
        {
            "params": class_sharding.fitting_layout(layout, saved.params),
            "model_state": devices.replicated(mesh),
        },
    )
    if run.task.num_model_columns != system.model.num_classes:
        here = class_sharding.abstract_state(system, modalities, system.model.num_classes, count)
        items = {
            name: class_sharding.resize(tree, getattr(here, name)) for name, tree in items.items()
        }
        items["params"] = devices.put(items["params"], layout)
    params = items["params"]
    return params, devices.replicate(mesh, system.model.solve(params, items["model_state"]))


def companion_digests(
    identities: Sequence[str], training_sets: ensemble.TrainingSets
) -> dict[str, str]:
    """Returns the manifest's sha256 entries for the files that a checkpoint depends on."""
    return {
        "identities_sha256": _digest(identities),
        "members_sha256": ensemble.digest(training_sets),
    }


def check_digests(workdir: Path, manifest: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Refuses to resume a run whose manifest names other identities, training clips or members."""
    for name, noun in {
        "identities_sha256": "another list of identities",
        "members_sha256": "other clips or members",
    }.items():
        if manifest[name] != digests[name]:
            raise CheckpointError(
                f"'{workdir}' was trained on {noun}\nuse another workdir, or the data of that run"
            )


def check_companions(
    workdir: Path, manifest: Mapping[str, Any]
) -> Iterator[tuple[str, str, Exception | None]]:
    """Yields file name, short description and fault of every file that a checkpoint depends on."""

    def members() -> str:
        sets = load_training_sets(workdir, manifest)
        return f"{len(sets.members)} members, {len(sets.clips)} clips"

    checks: dict[str, Callable[[], str]] = {
        IDENTITIES: lambda: f"{len(load_identities(workdir, manifest))} identities",
        ensemble.FILE: members,
    }
    if "config" in manifest:
        checks[CONFIG] = lambda: check_config(workdir, manifest) or "agrees"
    for file, check in checks.items():
        try:
            yield file, check(), None
        except (CheckpointError, ValueError) as error:
            yield file, "", error


def load_identities(workdir: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Reads the names of the class columns 1..C."""
    path = workdir / IDENTITIES
    try:
        identities = tuple(results_lib.load_identities(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' is missing\n{REWRITE}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{_first_line(error)}\n{REMEDY}") from error
    if _digest(identities) != manifest.get("identities_sha256"):
        raise CheckpointError(f"'{path}' is not what the run was trained with\n{REMEDY}")
    return identities


def load_training_sets(workdir: Path, manifest: Mapping[str, Any]) -> ensemble.TrainingSets:
    """Reads the clips that each member was trained on."""
    path = workdir / ensemble.FILE
    if not files.exists(path):
        raise CheckpointError(f"'{path}' is missing\n{REWRITE}")
    try:
        training_sets = ensemble.load(workdir)
    except ValueError as error:
        raise CheckpointError(f"{_first_line(error)}\n{REMEDY}") from error
    if ensemble.digest(training_sets) != manifest.get("members_sha256"):
        raise CheckpointError(f"'{path}' is not what the run was trained with\n{REMEDY}")
    return training_sets


def check_config(workdir: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a `config.json` that differs from the manifest in a field that shapes the model.

    A change that a resume recorded is allowed.
    """
    spoilt = resume.spoilt(workdir, manifest["config"])
    if spoilt:
        raise CheckpointError(
            f"'{workdir / CONFIG}' is not what the run was trained with: write back what it was\n"
            f"{resume.describe(spoilt)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _digest(identities: Sequence[str]) -> str:
    return files.sha256_json(list(identities))
