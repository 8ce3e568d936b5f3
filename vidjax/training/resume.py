"""Starts or resumes a training: makes a new state, or restores the state of a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from msgspec import structs

from vidjax.core import devices, ensemble, optim
from vidjax.data.dataset import Dataset
from vidjax.evaluation import trained_runs
from vidjax.runs import checkpoint, config_io, digests, facts, members_file
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.config import ROUNDING, Config, affects, differences, list_splits
from vidjax.runs.run_folder import CONFIG, RunFolder, check_resumes, make_paths_absolute
from vidjax.training import init_from, train_step
from vidjax.training.plan import RunPlan
from vidjax.utils.errors import warn
from vidjax.utils.terminal import say


def read_finished_metrics(folder: RunFolder, config: Config) -> dict[str, Any] | None:
    """Returns the `metrics.json` of a run, or None if training or an evaluation is left to do.

    Raises UserError if the run cannot resume with `config`.
    """
    if not folder.has(CONFIG):
        return None
    recorded, results = folder.config, folder.metrics()
    if not results and not checkpoint.list_folders(folder.path):
        return None  # without a checkpoint, a run starts again with any configuration
    check_resumes(folder.path, recorded, make_paths_absolute(config))
    # `vidjax evaluate` also writes this file. If an entry is missing, the run is evaluated again.
    wanted = ["num_clips", "num_identities", "trained_on"]
    wanted += ["map", "map_kind"] if "map" in results else []
    wanted += ["best_map", "best_step"] if "best_map" in results else []
    others = list_splits(config)[1:]
    if not all(folder.has(folder.paths(split).metrics.name) for split in others):
        return None
    if not results.get("finished") or any(results.get(name) is None for name in wanted):
        return None
    return results if config.num_epochs == recorded.num_epochs else None


def start(
    config: Config, workdir: Path, data: Dataset, plan: RunPlan, mesh: Mesh
) -> tuple[train_step.TrainState, ensemble.TrainingSets, dict[str, Any], dict[str, Any]]:
    """Restores the newest intact checkpoint of a run. Without one, makes the state of step 0.

    Returns (state, sets, manifest, facts): the state of all members (nets), the training clips of
    each member, including those of `config.init_from`, the `manifest.json` of the checkpoint (or
    {}), and facts about the training (see `facts.FACTS`). Raises CheckpointError or UserError if
    the run cannot resume.
    """
    system, sets = plan.system, plan.training_sets

    def init() -> train_step.TrainState:
        labels = jnp.tile(jnp.asarray(plan.labels, jnp.int32), (len(sets.members), 1))
        return train_step.init_state(system, ensemble.make_rngs(sets.members, config.seed), labels)

    newest = checkpoint.find(workdir)
    if not newest:
        # A model in closed form is trained in seconds, so nothing is lost.
        if not system.model.is_closed_form and (lost := checkpoint.explain_lost(workdir)):
            raise CheckpointError(lost)
        if not config.init_from:
            return train_step.make_state(init, system.tx, mesh), sets, {}, {}
        source = init_from.find_source(config)
        sets = ensemble.add_trained_clips(sets, source.training_sets)
        split = data.split(config.eval.split)
        if ensemble.choose_scoring_members(sets, split.clips)[1]:
            warn(
                f"the run config.init_from was trained on clips of {split.name}: MAP is too high\n"
                "to measure MAP, choose another split: --config.eval.split=SPLIT"
            )
        known: dict[str, Any] = {}

        def load(state: train_step.TrainState) -> train_step.TrainState:
            state, known["init_from"] = init_from.load_state(
                source, system, config, data.identities, state, mesh
            )
            return state

        return train_step.make_state(init, system.tx, mesh, load), sets, {}, known
    manifest = newest.manifest
    trained_runs.check_entries(workdir, manifest)
    old = config_io.from_json(json.dumps(manifest["config"]))
    check_resumes(workdir, old, config)
    digests.check_data(workdir, manifest["data"], config, data)
    identities, earlier = members_file.read_lists(newest)
    if manifest.get("init_from"):
        sets = ensemble.add_trained_clips(sets, earlier)
    own = members_file.make_lists(identities, earlier)
    if own != (now := members_file.make_lists(data.identities, sets)):
        same = own["identities"] == now["identities"]
        raise CheckpointError(
            f"'{workdir}' was trained with other {'clips or nets' if same else 'identities'} than "
            "now\nuse another folder, --workdir=FOLDER, or the data of the earlier training"
        )
    shapes = train_step.convert_to_items(jax.eval_shape(init))
    items = checkpoint.load(newest, shapes, devices.replicated_layout(mesh))
    checkpoint.warn_of_lost(workdir, "best")
    report_changes(old, config, plan, manifest)
    checkpoint.set_aside_later(workdir, manifest["step"])  # training saves these steps again
    rest = items.pop("train")
    state = train_step.TrainState(**items, **rest)
    return state, sets, manifest, continue_facts(manifest, config.num_epochs)


def continue_facts(manifest: Mapping[str, Any], num_epochs: float) -> dict[str, Any]:
    """Returns the facts about the training of a run that resumes, key in `facts.FACTS` -> value.

    `manifest` is the content of `manifest.json` of the checkpoint. If `num_epochs` is a new value,
    the fact `extended` contains it, and early stopping counts its evaluations from 0 again.
    """
    known = facts.read_facts(manifest)
    if epochs := list_epochs(manifest, num_epochs):
        known["extended"] = epochs
    if "early_stop" in known and num_epochs != manifest["config"]["num_epochs"]:
        # The user wants more steps.
        known["early_stop"] = structs.replace(known["early_stop"], waited=0, stopped=False)
    return known


def list_epochs(manifest: Mapping[str, Any], num_epochs: float) -> list[list[float]]:
    """Returns the values that `config.num_epochs` had, as pairs [first step, value], or [].

    If a run of 10 epochs resumes at step 500 with `num_epochs` 20, returns [[0, 10], [500, 20]]. If
    the value has never changed, returns []. `manifest` is from the checkpoint of the resumed run.
    """
    step, first = manifest["step"], [0, manifest["config"]["num_epochs"]]
    pairs: list[list[float]] = manifest.get("extended") or [first]
    if num_epochs != pairs[-1][1]:
        pairs = [*(pair for pair in pairs if pair[0] < step), [step, num_epochs]]
    return pairs if len(pairs) > 1 else []


def report_changes(old: Config, config: Config, plan: RunPlan, manifest: Mapping[str, Any]) -> None:
    """Prints the changes of the configuration that affect the rest of a resumed training.

    `old` is the configuration in the `manifest` of the checkpoint. `config` is the new
    configuration.
    """
    step = manifest["step"]
    for name, (before, now) in differences(old, config).items():
        if affects(name) & ROUNDING:
            say(f"config.{name} changes from {before} to {now}: results differ only by rounding")
    if config.num_epochs == old.num_epochs or plan.system.model.is_closed_form:
        return
    _, earlier = optim.make_optimizer(
        config.optim.to_dict(),
        total_steps=manifest.get("total_steps", step),
        steps_per_epoch=plan.batches.num_places / config.batch_size,
    )
    schedules = (jax.jit(earlier), plan.system.lr_schedule)
    first, second = (np.asarray(schedule(np.arange(step))) for schedule in schedules)
    if config.optim.total_decay or not np.array_equal(first, second):
        before, now = f"{old.num_epochs:g}", f"{config.num_epochs:g}"
        say(
            f"warning: config.num_epochs grows from {before} to {now}, but the first {step} "
            f"steps had the learning rates for {before} epochs\nso the result differs from a "
            f"run of {now} epochs; metrics.json and the report mention this change",
            warning=True,
        )
