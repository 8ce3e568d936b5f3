"""The start of a run: its files, its first or restored state, and its feed of clips."""

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vidjax import config as config_lib
from vidjax import devices, ensemble
from vidjax.cluster import members
from vidjax.config import Config
from vidjax.data import resident
from vidjax.data.clips import ClipSource, TrainingData, make_batch_plan, num_cropped
from vidjax.errors import UserError
from vidjax.modes import run_data
from vidjax.modes.plan import RunPlan
from vidjax.modes.restore import check_digests, check_entries, task_of
from vidjax.run import checkpoint, resume
from vidjax.run import workdir as workdir_lib
from vidjax.run.terminal import say
from vidjax.steps import columns
from vidjax.steps import feed as feed_lib
from vidjax.steps import state as state_lib
from vidjax.steps.columns import ClassAxes
from vidjax.system import System


def restore_or_init(
    workdir: Path,
    config: Config,
    data: TrainingData,
    system: System,
    plan: RunPlan,
    layout: devices.Layout,
    description: Mapping[str, Any],
) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """Restores the newest checkpoint of a run, or initialises its state.

    Args:
      workdir: the folder of the run.
      config: the current configuration; changes are recorded in `changes.jsonl`.
      data: the clips, which must be those of the run.
      system: the system of the configuration.
      plan: the plan of the run.
      layout: layout of the state, see `columns.state_layout`.
      description: digests of identities and members, which must equal those in the manifest.

    Returns:
      The state, and the manifest of its checkpoint, {} for a new state.

    Raises:
      ValueError: The folder contains a run of another configuration, or on other data.
      CheckpointError: The checkpoints are damaged or belong to another model.
    """

    def init(num_columns: int) -> state_lib.TrainState:
        members = plan.training_sets.members
        labels = jnp.tile(jnp.asarray(plan.labels, jnp.int32), (len(members), 1))
        rngs = ensemble.make_rngs(members, config.seed)
        resized = system._replace(model=system.make_model(num_columns))
        return state_lib.init_state(resized, plan.task.modalities, rngs, labels)

    def describe(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], devices.Layout]:
        check_entries(workdir, manifest)
        before = config_lib.from_json(json.dumps(manifest["config"]))
        changed.update(resume.changes(workdir, before, config))
        run_data.check_training(workdir, manifest.get("data"), config, data)
        check_digests(workdir, manifest, description)
        if manifest["step"] > plan.task.total_steps:
            raise UserError(
                f"'{workdir}' has been trained for {manifest['step']} steps, more than the "
                f"{plan.task.total_steps} of config.num_epochs={config.num_epochs}\n"
                "raise --config.num_epochs, or train in another workdir"
            )
        if manifest["step"] == plan.task.total_steps:
            resume.refuse_relabelling(workdir, changed)
        saved = abstract
        if (number := task_of(manifest).num_model_columns) != system.model.num_classes:
            saved = jax.eval_shape(functools.partial(init, number))
        return as_items(saved), as_items(columns.fitting_layout(layout, saved))

    changed: resume.Changes = {}
    abstract = jax.eval_shape(functools.partial(init, system.model.num_classes))
    try:
        restored = checkpoint.restore_latest(workdir, describe)
    except checkpoint.OtherModelError as error:
        if not changed:
            raise
        raise UserError(f"{error}\nchanged: {resume.describe(changed)}") from error
    if (workdir / "config.json").exists():
        changed = resume.changes(workdir, config_lib.load_workdir(workdir), config)
    if members.is_first():
        resume.record(workdir, restored[1]["step"] if restored else 0, changed)
    if restored is None:

        def first() -> state_lib.TrainState:
            # Padding is cut off and added, so that draws do not depend on it.
            return columns.resize(init(system.num_columns), abstract)

        return state_lib.make_state(first, system.tx, layout), {}
    items, manifest = restored
    state = state_lib.TrainState(**items.pop("train"), **items)
    if manifest.get("padded_columns") != plan.task.padded_columns:
        state = jax.jit(lambda x: columns.resize(x, abstract), out_shardings=layout)(state)
    return state, manifest


def as_items(state: state_lib.TrainState) -> dict[str, Any]:
    """Returns the items of a checkpoint; evaluation reads only `params` and `model_state`.

    `updated` is an item of its own, so that a run on some classes can go on with all of them.
    """
    names = ("step", "opt_state", "rng", "labels", "bad_steps", "sums")
    rest = {name: getattr(state, name) for name in names}
    own = {name: getattr(state, name) for name in ("params", "model_state", "updated")}
    return {**own, "train": rest}


def write_description(
    workdir: Path, config: Config, data: TrainingData, training_sets: ensemble.TrainingSets
) -> None:
    """Writes the files that describe a run: config, identities, members and data report."""
    members.barrier()  # all processes have read what is there
    if not members.is_first():
        return
    resume.write_config(workdir, config)
    workdir_lib.write_json(workdir / "identities.json", list(data.identities))
    ensemble.save(workdir, training_sets)
    splits = [data.split(name) for name in config.data.train_splits]
    cropped = num_cropped(splits, config.modalities, config.data.max_frames)
    report = {**data.report, "cropped_in_an_epoch": cropped}
    workdir_lib.write_json(workdir / "data_report.json", report)


def make_feed(
    config: Config,
    data: TrainingData,
    plan: RunPlan,
    system: System,
    mesh: Mesh,
    *,
    step: int,
    mode: str | None,
    axes: ClassAxes | None,
) -> tuple[feed_lib.Feed, ClipSource]:
    """Builds the feed of training clips, and the source of clips to evaluate.

    Args:
      config: the configuration.
      data: clips to train on and to evaluate.
      plan: the plan of the run.
      system: the system of the configuration.
      mesh: the devices.
      step: number of steps that are done.
      mode: `streaming` or `resident`; a run keeps its mode, since the order of clips depends on it.
        None for a new run.
      axes: axes of the class columns, as in `train_step`.
    """
    batches = make_batch_plan(
        [data.split(name) for name in config.data.train_splits],
        tuple(plan.task.modalities),
        batch_size=config.batch_size,
        max_frames=config.data.max_frames,
        crop=config.data.crop,
        seed=config.seed,
    )
    layout = resident.make_layout(data, batches, config.eval.split)
    num_drawn = plan.task.total_steps * config.batch_size
    mode = mode or members.by_first(
        lambda: resident.choose_mode(config.data.mode, layout, mesh, num_drawn)
    )
    if mode == "streaming":
        say("clips are streamed from the records")
        start, share = step * config.batch_size, devices.share(mesh)
        stream = data.train_batches(batches, start=start, share=share)
        return feed_lib.StreamingFeed(system, mesh, stream, axes), data
    began = time.monotonic()
    clips = resident.Resident(data, layout, mesh)
    say(
        f"clips stay on the device: {layout.nbytes / 1e6:,.0f} MB, "
        f"read in {time.monotonic() - began:.1f} s"
    )
    return feed_lib.ResidentFeed(system, mesh, clips.train, batches, axes), clips
