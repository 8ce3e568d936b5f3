"""A trained run from its folder: the checkpoint, the files it depends on, and its weights.

A manifest keeps the configuration and the sha256 of `identities.json` and `members.npz`, so that a
file of another run is noticed. It also has digests of the run's data, `data`, which are compared
wherever the run meets data again; the `metrics.json` of a finished run has them as `trained_on`:

    splits    split -> {clips: int, modalities: list, names, features, labels: sha256}, of those
              that training reads; labels are null without ground truth
    weights   sha256 of the file `config.data.weights`; null without one
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble
from vidjax.data.clips import ClipSource, TrainingData, select_modalities
from vidjax.evaluation.eval_step import make_eval_step
from vidjax.evaluation.scoring import TrainedModel
from vidjax.models.system import System, TaskSpec, make_system
from vidjax.runs import checkpoint, config_io
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, IDENTITIES, RunFolder, changes
from vidjax.utils import files
from vidjax.utils.errors import UserError, warn

T = TypeVar("T")
DataDigests = Mapping[str, Any]  # as above
REWRITE = "delete metrics.json: the command that trained the run then rewrites both"
REMEDY = REWRITE.replace("delete", "delete it and")


class FoundRun(NamedTuple):
    """A run in a folder, after a check that its files belong to one run; weights are not yet read.

    Attributes:
      checkpoint: a checkpoint of which every file has matched its sha256.
      identities: [C] names of the class columns 1..C.
    """

    folder: RunFolder
    checkpoint: checkpoint.Checkpoint
    task: TaskSpec
    identities: tuple[str, ...]
    training_sets: ensemble.TrainingSets

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the checkpoint."""
        return self.checkpoint.manifest


def make_model(config: Config, run: FoundRun, data: TrainingData, mesh: Mesh) -> TrainedModel:
    """Returns the model of a run, with its weights, on a dataset.

    Here and below, `config` is that of the run, with the overrides of this evaluation.
    """
    data = fit_data(data, config, run)
    system = make_system(config.to_dict(), run.task)
    params, model_state = load_weights(run, system, mesh)
    step = make_eval_step(system, mesh)
    name = str(run.folder.path)
    sets = sets_for(run.training_sets, run.manifest["data"], data, config.eval.split)
    return TrainedModel(name, system, step, params, model_state, sets, data)


def find_run(config: Config, folder: RunFolder) -> FoundRun:
    """Finds the checkpoint of a run and reads the files that it depends on.

    Where the wanted step is damaged, the next good one is used, with a warning.
    """
    workdir = folder.path
    found = checkpoint.find(workdir, config.eval.checkpoint)
    if found is None:
        raise CheckpointError(f"no checkpoint in '{workdir}'; train first")
    manifest = found.manifest
    check_entries(workdir, manifest)
    old = config_io.from_json(json.dumps(manifest["config"]))
    if spoilt := changes(old, folder.config):
        raise CheckpointError(
            f"'{workdir / CONFIG}' is not what the run was trained with: write back what it was\n"
            f"{spoilt}"
        )
    task = task_of(manifest)
    if tuple(config.modalities) != tuple(task.modalities):
        raise UserError(
            f"config.modalities={','.join(config.modalities)}: the run was trained on "
            f"{','.join(task.modalities)}, in this order\nleave out --config.modalities"
        )
    identities = tuple(load_identities(folder, manifest))
    if task.num_identities != len(identities):
        raise CheckpointError(
            f"'{workdir}': the manifest of the checkpoint counts {task.num_identities:,} people, "
            f"identities.json {len(identities):,}\nthe run was changed: take another copy of it"
        )
    training_sets = load_training_sets(workdir, manifest)
    columns, clips = task.num_columns, len(training_sets.clips)
    if columns > 1 + 2 * len(identities) + clips:  # made before weights are compared
        raise CheckpointError(
            f"'{workdir}': the manifest of the checkpoint counts {columns:,} class columns\n"
            f"of {len(identities):,} people and {clips:,} clips: take another copy of the run"
        )
    return FoundRun(folder, found, task, identities, training_sets)


def check_entries(workdir: Path, manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a manifest lacks an entry that restoring needs."""
    sizes = [name for name in TaskSpec._fields if name not in TaskSpec._field_defaults]
    for name in (*sizes, "identities_sha256", "members_sha256", "config", "data"):
        if name not in manifest:
            raise CheckpointError(
                f"'{workdir}': the manifest of the checkpoint has no entry '{name}'\n"
                "another version of vidjax trained it: go on with that version"
            )


def task_of(manifest: Mapping[str, Any]) -> TaskSpec:
    """Builds the task from a checkpoint's manifest."""
    task = TaskSpec(**{name: manifest[name] for name in TaskSpec._fields if name in manifest})
    found = (task.settings or {}).items()
    settings = {name: tuple(x) if isinstance(x, list) else x for name, x in found}
    return task._replace(settings=settings or None)


def fit_data(data: TrainingData, config: Config, run: FoundRun) -> TrainingData:
    """Checks the data of an evaluation against a run, and labels them with its class columns."""
    split = config.eval.split
    check_widths(data, run.task.modalities)
    own = run.manifest
    named = not config.data.dir or config.data.dir != own["config"]["data"].get("dir")
    check_data(run.folder.path, own["data"], config, data, trains=False, named=named)
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
    """Loads the parameters of a run, and the collections of `Identifier.solve`, all [E, ...]."""
    params, model_state = system.shapes(len(run.training_sets.members))
    saved = {"params": params, "model_state": model_state}
    items = checkpoint.load(run.checkpoint, saved, devices.replicated(mesh))
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


def load_identities(folder: RunFolder, manifest: Mapping[str, Any]) -> list[str]:
    """Reads the names of the class columns 1..C."""
    path, wanted = folder.path / IDENTITIES, manifest.get("identities_sha256")
    return _companion(path, lambda: folder.identities, _digest, wanted)


def load_training_sets(workdir: Path, manifest: Mapping[str, Any]) -> ensemble.TrainingSets:
    """Reads the clips that each member was trained on."""
    path, wanted = workdir / ensemble.FILE, manifest.get("members_sha256")
    return _companion(path, lambda: ensemble.load(workdir), ensemble.digest, wanted)


def _companion(path: Path, read: Callable[[], T], digest: Callable[[T], str], wanted: object) -> T:
    """Reads a file that a checkpoint depends on, and compares its digest."""
    if not files.exists(path):
        raise CheckpointError(f"'{path}' is missing\n{REWRITE}")
    try:
        found = read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(error).splitlines()[0]}\n{REMEDY}") from error
    if digest(found) != wanted:
        raise CheckpointError(f"'{path}' is not what the run was trained with\n{REMEDY}")
    return found


def _digest(identities: Sequence[str]) -> str:
    return files.sha256_json(list(identities))


# The data of a run.


def data_digests(config: Config, data: TrainingData) -> dict[str, Any]:
    """Returns the digests of the data that a configuration trains on and evaluates."""
    of_splits = data.report["splits"]
    weights = config.data.weights
    return {
        "splits": {
            name: of_splits[name]["sha256"]
            for name in dict.fromkeys((*config.data.train_splits, config.eval.split))
            if "sha256" in of_splits.get(name, {})
        },
        "weights": files.sha256_file(Path(weights).expanduser()) if weights else None,
    }


def difference(split: str, before: Mapping[str, Any], now: Mapping[str, Any] | None) -> str:
    """Describes how the digests of a split differ from those of a run; "" if they do not."""
    if now is None:
        return f"{split} is absent"
    if now["names"] != before["names"]:
        return f"{split} has other clips: {now['clips']:,}, before {before['clips']:,}"
    kinds = ["features", "labels"]
    if now.get("modalities") != before.get("modalities"):  # in the same records
        kinds.remove("features")
        warn(
            f"{split}: other modalities lie beside those that the run reads: whether its "
            "features are as they were cannot be told"
        )
    others = [kind for kind in kinds if now[kind] != before[kind]]
    return f"{split} has other {' and '.join(others)}" if others else ""


def sets_for(
    sets: ensemble.TrainingSets, own: DataDigests, data: ClipSource, split: str
) -> ensemble.TrainingSets:
    """Returns the training sets as a split of `data` is scored, with a warning if they change.

    A clip of the run's own data, by its digests `own`, is scored by the members that were not
    trained on it. Other data may have the name of a training clip for another clip: all members
    score all of their clips.
    """
    if ensemble.scoring_members(sets, data.split(split).clips)[0].all():
        return sets
    before, now = own["splits"], getattr(data, "report", {"splits": {}})["splits"]
    names = [split] if split in before else before
    if now and all(_same_clips(before[name], now.get(name, {}).get("sha256")) for name in names):
        return sets
    warn(
        "some clips have names of training clips, but these are not the data of the run: all "
        "members score them\nvidjax evaluate scores training clips by the members that were not "
        "trained on them"
    )
    return sets._replace(trained=np.zeros_like(sets.trained))


def _same_clips(before: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
    """Returns False if the digests of a split are of other clips than before."""
    kinds = ["names", "features"]
    if now and now["modalities"] != before["modalities"]:  # in the same records
        kinds.remove("features")
    return now is not None and all(now[kind] == before[kind] for kind in kinds)


def check_data(
    workdir: Path,
    own: DataDigests,
    config: Config,
    data: TrainingData,
    *,
    trains: bool = True,
    named: bool = True,
) -> None:
    """Refuses other data than those of a run, by its digests `own`.

    A run goes on (`trains`) only if all that it reads is as it was. An evaluation compares
    `eval.split`. If the run has not read that split, it may be of any data; but if the user has not
    `named` their folder, so that `config.json` does, which a stranger may have written, one split
    of the run must be as it was.
    """
    split = config.eval.split
    names = [split] if not trains and split in own["splits"] else list(own["splits"])
    here = {name: counts.get("sha256") for name, counts in data.report["splits"].items()}
    different = [difference(name, own["splits"][name], here.get(name)) for name in names]
    if trains and own.get("weights") != data_digests(config, data)["weights"]:
        different.append("config.data.weights are others")
    if not trains and split not in names and (named or not all(different)):
        return
    if any(different):
        other = "train on these in another folder: --workdir=FOLDER"
        if not trains:
            other = "rank these clips: vidjax rank --input=FOLDER --out=FILE"
        raise UserError(
            f"'{workdir}' holds a run on other data: now {', '.join(filter(None, different))}\n"
            f"name the data of the run: --config.data.dir=FOLDER\nor {other}"
        )
