"""Restores trained runs: finds the checkpoint, checks the files and the data, loads the weights.

Functions raise CheckpointError if a file of the run is missing, damaged or of another run, and
UserError if the data do not fit the run.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble
from vidjax.data.clips import ClipSource, Split, select_modalities
from vidjax.data.dataset import Dataset
from vidjax.evaluation.eval_step import make_eval_step
from vidjax.evaluation.scoring import TrainedModel
from vidjax.models.build_system import TaskSpec, make_system
from vidjax.runs import checkpoint, config_io, members_file
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.config import Config
from vidjax.runs.digests import DataDigests, check_data, find_changes
from vidjax.runs.run_folder import CONFIG, RunFolder, describe_changes
from vidjax.utils.errors import UserError, warn

RARE = 0.1  # a modality is rare if at most this share of the clips has it; our choice
FEWEST_GAPS = 3  # of clips times rare modalities; fewer may be chance


class FoundRun(NamedTuple):
    """All that is known about a trained run, except for its weights, which are not loaded yet.

    The files were checked: `config.json` and the checkpoint belong to the same run, and the
    checkpoint matches its sha256. Column c of the logits belongs to `identities[c - 1]`.
    """

    folder: RunFolder
    checkpoint: checkpoint.Checkpoint
    task: TaskSpec
    identities: tuple[str, ...]
    training_sets: ensemble.TrainingSets

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `manifest.json` of the checkpoint, name -> JSON value."""
        return self.checkpoint.manifest


def make_model(config: Config, run: FoundRun, data: Dataset, mesh: Mesh) -> TrainedModel:
    """Builds the model of a run from `config`, with its weights and the dataset to evaluate.

    The labels of `data` are renumbered to the class columns of the run. Members (nets) of an
    ensemble will not score the clips that they were trained on.
    """
    data = fit_data(data, config, run)
    warn_of_missing_modalities(data.split(config.eval.split), run.task.modalities)
    sets = select_sets(run.training_sets, run.manifest["data"], data, config.eval.split)
    return load_model(config, run, mesh)._replace(training_sets=sets, data=data)


def load_model(config: Config, run: FoundRun, mesh: Mesh) -> TrainedModel:
    """Builds the model of a run from `config`, with its weights, but without clips to evaluate."""
    system, sets = make_system(config.to_dict(), run.task), run.training_sets
    params, model_state = system.compute_shapes(len(sets.members))
    saved = {"params": params, "model_state": model_state}
    items = checkpoint.load(run.checkpoint, saved, devices.replicated_layout(mesh))
    model_state = system.model.finalise_state(items["params"], items["model_state"])
    return TrainedModel(
        str(run.folder.path), system, make_eval_step(system, mesh), items["params"],
        devices.replicate(mesh, model_state), sets, cast(ClipSource, None), mesh,
        config.eval.block_size,
    )  # fmt: skip


def find_run(config: Config, folder: RunFolder) -> FoundRun:
    """Finds the checkpoint of a run, and reads its manifest, identities and training clips.

    If the checkpoint `config.eval.checkpoint` is damaged, an intact one is used, with a warning.
    Raises UserError if `config.modalities` are not the modalities of the run, and CheckpointError
    if no checkpoint is usable.
    """
    workdir = folder.path
    saved = checkpoint.find(workdir, config.eval.checkpoint)
    if saved is None:
        problem = f"'{workdir}' has no checkpoint: train the run first"
        raise CheckpointError(checkpoint.explain_lost(workdir) or problem)
    manifest = saved.manifest
    check_entries(workdir, manifest)
    old = config_io.from_json(json.dumps(manifest["config"]))
    if changes := describe_changes(old, folder.config):
        raise CheckpointError(
            f"'{workdir / CONFIG}' is not the configuration that the run was trained with\n"
            f"undo these changes: {changes}"
        )
    task = read_task(manifest)
    if tuple(config.modalities) != tuple(task.modalities):
        raise UserError(
            f"config.modalities={','.join(config.modalities)}: the run was trained on "
            f"{','.join(task.modalities)}, in this order\nleave out --config.modalities"
        )
    identities, training_sets = members_file.read_lists(saved)
    people, columns = len(identities), task.num_columns
    most = 1 + 2 * people + len(training_sets.clips)  # building a model takes memory per column
    if task.num_identities != people or columns > most:
        raise CheckpointError(
            f"'{workdir}': the checkpoint lists {people:,} identities, so up to {most:,} classes, "
            f"but its manifest has {task.num_identities:,} identities and {columns:,} classes\n"
            f"{members_file.REMEDY}"
        )
    return FoundRun(folder, saved, task, identities, training_sets)


def check_entries(workdir: Path, manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a manifest lacks an entry that is needed to restore the run."""
    sizes = [name for name in TaskSpec._fields if name not in TaskSpec._field_defaults]
    for name in (*sizes, "config", "data"):
        if name not in manifest:
            raise CheckpointError(
                f"'{workdir}': the manifest of the checkpoint has no entry '{name}'\n"
                "another version of vidjax trained this run: use that version"
            )


def read_task(manifest: Mapping[str, Any]) -> TaskSpec:
    """Reads the sizes of a run's inputs and outputs from the manifest of a checkpoint."""
    task = TaskSpec(**{name: manifest[name] for name in TaskSpec._fields if name in manifest})
    fields = (task.settings or {}).items()
    settings = {name: tuple(x) if isinstance(x, list) else x for name, x in fields}
    return task._replace(settings=settings or None)


def fit_data(data: Dataset, config: Config, run: FoundRun) -> Dataset:
    """Returns `data` with new labels: 1..C for the C identities of the run, 0 for other clips.

    Raises UserError if the data are not the data of the run, have no identity of the run, or lack
    the labels of a split in `eval.splits`.
    """
    split = config.eval.split
    check_labelled(config, data)
    check_widths(data, run.task.modalities)
    own = run.manifest
    named = not config.data.dir or config.data.dir != own["config"]["data"].get("dir")
    check_data(run.folder.path, own["data"], config, data, trains=False, named=named)
    data = data.with_identities(run.identities)
    if data.split(split).labelled and not np.any(data.split(split).positives):
        raise UserError(
            f"config.eval.split={split}: its ground truth has no identity of the training data\n"
            "give the dataset on which the run was trained: --config.data.dir=FOLDER"
        )
    return data


def check_labelled(config: Config, data: Dataset) -> None:
    """Raises UserError if a split in `eval.splits` is missing or has no ground truth."""
    for name in config.eval.splits:
        if not data.split(name).labelled:
            raise UserError(
                f"config.eval.splits: {name} has no ground truth, so it cannot be scored\n"
                f"leave it out; to rank it, use vidjax evaluate --config.eval.split={name}"
            )


def check_widths(data: Dataset, modalities: Mapping[str, int]) -> None:
    """Raises UserError if a dataset lacks a modality of a run, or has another feature width."""
    widths = select_modalities(tuple(modalities), data.modalities)
    for name, width in modalities.items():
        if widths[name] != width:
            raise UserError(
                f"modality '{name}': the run was trained on features of width {width}, not "
                f"{widths[name]}\ngive the dataset of the run: --config.data.dir=FOLDER"
            )


def warn_of_missing_modalities(split: Split, modalities: Collection[str]) -> None:
    """Warns if a modality of a run is missing in nearly all clips of a split.

    If the split has only a few clips, a missing modality may be chance. Then there is no warning.
    """
    present = np.array([split.lengths[name] > 0 for name in modalities])  # [M, N]
    present = present[:, present.any(axis=0)]  # a clip without any frame says nothing
    shares = present.mean(axis=1) if present.size else np.ones(len(present))
    rare = {name: x for name, x in zip(modalities, shares, strict=True) if x <= RARE}
    if len(rare) * present.shape[1] >= FEWEST_GAPS:
        counts = ", ".join(f"{100 * share:.0f} % have {name}" for name, share in rare.items())
        warn(
            f"the run reads features of {', '.join(rare)} that most clips lack: "
            f"of {present.shape[1]:,} clips, {counts}\n"
            "add these features, or use a run that does not read them"
        )


def select_sets(
    sets: ensemble.TrainingSets, own: DataDigests, data: ClipSource, split: str
) -> ensemble.TrainingSets:
    """Returns `sets`, the clips that each net of an ensemble was trained on.

    `own` are the digests of the training data. If `data` has other digests, but clips of `split`
    have names of training clips, warns that they count as other clips, and returns empty sets.
    """
    if ensemble.choose_scoring_members(sets, data.split(split).clips)[0].all():
        return sets
    before, now = own["splits"], getattr(data, "report", {"splits": {}})["splits"]
    names = [split] if split in before else before
    pairs = [(before[name], now.get(name, {}).get("sha256")) for name in names]
    if now and all(x and {*find_changes(old, x)} <= {"labels"} for old, x in pairs):
        return sets
    warn(
        f"clips of {split} have the same names as training clips, but count as other clips\n"
        "if they are the training clips, the scores are too good: use vidjax evaluate instead"
    )
    return sets._replace(trained=np.zeros_like(sets.trained))
