"""Training: from a configuration and a dataset to a finished workdir."""

import bisect
import importlib.metadata
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import config as config_lib
from vidjax import devices as devices_lib
from vidjax import ensemble as ensemble_lib
from vidjax import metrics
from vidjax.batch import NoiseLayout
from vidjax.config import Config
from vidjax.data import resident
from vidjax.data.clips import ClipSource, TrainingData, make_batch_plan, num_cropped
from vidjax.data.untrusted import pickles
from vidjax.modes import analysis
from vidjax.modes.evaluate import digest, select_modalities
from vidjax.modes.outputs import write_results
from vidjax.run import checkpoint, resume, signals
from vidjax.run import results as results_lib
from vidjax.run import workdir as workdir_lib
from vidjax.run.logs import Logs, Progress, say
from vidjax.steps import feed as feed_lib
from vidjax.steps import state as state_lib
from vidjax.steps import train_step
from vidjax.steps.distractors import Relabeller, label_distractors
from vidjax.steps.scoring import Evaluation, Scorer, TrainedModel, score
from vidjax.system import System, TaskSpec, make_system


def finished(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Returns the metrics of the run in a folder if it is finished, None if it can go on or begin.

    Raises:
      ValueError: the folder holds a run of another configuration.
    """
    if not (workdir / "config.json").exists():
        return None
    changed = resume.changes(workdir, config_lib.load_workdir(workdir), config)
    if changed.keys() - set(resume.MOVABLE):
        return None
    results = results_lib.read_metrics(workdir)
    return results if results.get("finished") else None  # evaluation writes the file too


def train(
    config: Config,
    workdir: Path,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    analyse: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a system, or goes on where an earlier process stopped; returns the run's metrics.

    Args:
      config: see `config.default`.
      workdir: the run's folder, held by `workdir.lock`.
      data: a `Dataset`.
      num_devices: how many devices to use; None for all.
      analyse: whether to write `analysis.npz` and `report.html` at the end, too.
      command: what repeats the run; `metrics.json` and the report tell it.

    Raises:
      ValueError: the configuration does not fit the data, or not the run that lies in the folder.
      CheckpointError: the run's checkpoints are damaged or of another model.
      Interrupted: SIGINT or SIGTERM came; a checkpoint of the last step was saved.
    """
    began = time.monotonic()
    plan = _plan(config, data)
    sizes, training_sets = plan.sizes, plan.training_sets
    system = make_system(config.to_dict(), sizes)
    mesh = devices_lib.make_mesh(num_devices)
    scorer = Scorer(system, mesh)
    facts = {
        **sizes._asdict(),
        "identities_sha256": digest(data.identities),
        "members_sha256": ensemble_lib.digest(training_sets),
        "config": config.to_dict(),
    }

    state, saved = _start(workdir, config, system, plan, mesh, facts)
    step = int(state.step)
    if step:
        say(f"going on from step {step} of {sizes.total_steps}")

    observer: analysis.Observer | None = None

    def seconds() -> float:
        return saved.get("seconds", 0.0) + time.monotonic() - began

    def save(state: state_lib.TrainState, **more: Any) -> None:
        info = {**facts, **more, "seconds": seconds()}
        checkpoint.save(workdir, int(state.step), _items(state), info)

    def evaluate(state: state_lib.TrainState, **kwargs: Any) -> Evaluation:
        name = str(workdir)
        run = TrainedModel(name, scorer, state.params, state.model_state, training_sets, seen)
        nonlocal observer
        if analyse and step == sizes.total_steps:
            observer = analysis.Observer([run], config.eval.split, mesh)
        return score(
            [run],
            config.eval.split,
            mesh,
            block_size=config.eval.block_size,
            each_member=config.eval.members,
            observe=observer,
            **kwargs,
        )

    # Members in one program share its large products, one after another its small memory and bits.
    size = len(training_sets.members) if system.together else 1
    tables = [devices_lib.replicate(mesh, part) for part in ensemble_lib.split(plan.tables, size)]
    states = [devices_lib.replicate(mesh, part) for part in state_lib.split_state(state, size)]
    del state  # not held beside its parts
    feed, seen = _make_feed(config, data, system, sizes, mesh, step, saved.get("mode"))
    facts["mode"] = feed.mode
    relabel_steps: set[int] = set()
    relabel = None
    if plan.layout:
        relabel_steps = _every(config.noise.relabel_every_epochs, config, sizes)
        relabel = Relabeller(
            config, workdir, seen, system, plan.layout, training_sets, mesh, step=step
        )
    _claim(workdir, config, data, training_sets)
    eval_steps = _every(config.eval.every_epochs, config, sizes) | {sizes.total_steps}
    evaluation = None
    pending = step in eval_steps and not saved.get("evaluated")
    log_steps = {*range(0, sizes.total_steps, config.log_every_steps), sizes.total_steps}
    stops = sorted(log_steps | eval_steps | relabel_steps)
    rates: list[float] = []  # clips a second
    logged = 0  # of them
    last_save = time.monotonic()
    logs = Logs(workdir, step=step, evaluated=not pending)
    clips = sizes.total_steps * config.batch_size
    progress = Progress(clips, initial=step * config.batch_size, unit="clip", label="train")
    try:
        with signals.catch_interruption() as interruption:

            def stop_if_asked() -> None:
                if interruption.signum:
                    raise signals.Interrupted(interruption.signum, step)

            def watch() -> Evaluation:
                stop_if_asked()
                interruption.at_once = True  # every step is saved
                state = state_lib.merge_states(states)
                evaluation = evaluate(state, check=stop_if_asked)
                scores = metrics.logged(evaluation.results)
                logs.metrics(step, {"split": config.eval.split, **scores})
                shown = ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
                say(f"step {step} of {sizes.total_steps}: {shown or 'ranked'}")
                if "map" in scores:
                    progress.keep(f"MAP {scores['map']:.4f}")
                save(state, **scores, evaluated=True)
                interruption.at_once = False
                return evaluation

            if pending:  # an earlier process stopped in this evaluation
                evaluation = watch()
            interruption.at_once = True  # until a step was done
            while step < sizes.total_steps:
                dispatched = time.monotonic()
                states, count, loss, bad_step = feed.run(
                    states, tables, step, stops[bisect.bisect(stops, step)] - step
                )
                step += count
                interruption.at_once = False
                rates.append(count * config.batch_size / (time.monotonic() - dispatched))
                if bad_step is not None:
                    clips = [
                        training_sets.clips[i] for i in feed.bad_clips(states, tables, bad_step)
                    ]
                    more = f" and {len(clips) - 5} more" if len(clips) > 5 else ""
                    raise ValueError(
                        f"loss or gradient is not finite at step {bad_step + 1}, the "
                        f"{train_step.MAX_BAD_STEPS}rd in a row, at learning rate "
                        f"{float(jnp.asarray(system.schedule(bad_step))):g}\n"
                        f"clips: {', '.join(clips[:5])}{more}\n"
                        "the last checkpoint is finite; is config.optim.learning_rate too high?"
                    )
                progress.advance(count * config.batch_size, f"loss {loss:.3f}")

                if step in log_steps:
                    logs.metrics(step, _summary(config, system, sizes, step, states))
                    for i, state in enumerate(states):
                        zeros = devices_lib.replicate(mesh, state_lib.zero_sums(size))
                        states[i] = state.replace(sums=zeros)
                    rate = statistics.median(rates[logged:])
                    logged = len(rates)
                    logs.timing(step, {"clips_per_second": rate, "waited_seconds": feed.waited})
                if relabel and step in relabel_steps:
                    labels = ensemble_lib.split(relabel(state_lib.merge_states(states)), size)
                    states = [
                        state.replace(labels=devices_lib.replicate(mesh, part))
                        for state, part in zip(states, labels, strict=True)
                    ]
                late = time.monotonic() - last_save >= config.checkpoint_every_seconds
                if step in eval_steps or interruption.signum or late:
                    save(state_lib.merge_states(states))
                    last_save = time.monotonic()
                if step in eval_steps:
                    evaluation = watch()
                if step < sizes.total_steps:
                    stop_if_asked()
    finally:
        progress.close()
        logs.close()

    if evaluation is None:  # an earlier process stopped between the last step and its results
        evaluation = evaluate(state_lib.merge_states(states))
    rates = rates[1:] or rates  # the first one compiled
    results = {
        **evaluation.results,
        **_best(workdir),
        "num_params": sum(x[0].size for x in jax.tree.leaves(states[0].params)),
        "num_members": len(training_sets.members),
        "train_clips_per_second": statistics.median(rates) if rates else None,
        "mode": feed.mode,
        "waited_seconds": feed.waited,
        "seconds": seconds(),
        "seed": config.seed,
        "step": step,
        "finished": True,
        "versions": versions(),
    }
    if command:
        results["command"] = command
    split = config.eval.split
    write_results(
        workdir, data, evaluation, results, split=split, own_split=split,
        observer=observer, train_splits=config.data.train_splits,
    )  # fmt: skip
    return results


class _Plan(NamedTuple):
    """What follows from a configuration and its data before anything is compiled."""

    sizes: TaskSpec
    training_sets: ensemble_lib.TrainingSets
    labels: np.ndarray  # [N] int32, class columns
    tables: state_lib.Tables
    layout: NoiseLayout | None


def _plan(config: Config, data: TrainingData) -> _Plan:
    modalities = select_modalities(config.modalities, data)
    train_splits = tuple(config.data.train_splits)
    ensemble = config.ensemble.to_dict()
    members = ensemble_lib.make_members(ensemble)
    if config.eval.split in train_splits and not (ensemble["folds"] or ensemble["bootstraps"]):
        raise ValueError(
            f"config.eval.split='{config.eval.split}' is among config.data.train_splits: "
            "a score on clips\nthat were trained on says nothing; with --config.ensemble.folds=5 "
            "every clip is scored by members that never saw it"
        )
    data.split(config.eval.split)  # before an hour of training, not after
    for name, value in {
        "batch_size": config.batch_size,
        "log_every_steps": config.log_every_steps,
        "num_epochs": config.num_epochs,
        "data.max_frames": config.data.max_frames,
        "eval.block_size": config.eval.block_size,
    }.items():
        if not 0 < value < math.inf:
            raise ValueError(f"config.{name}={value}: must be positive")
    for name, value in {
        "mixup": config.mixup,
        "eval.every_epochs": config.eval.every_epochs,
    }.items():
        if not value >= 0:
            raise ValueError(f"config.{name}={value}: must be 0 or more")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"config.seed={config.seed}: must be 0 or more, below 2**31")
    if not train_splits:
        raise ValueError("config.data.train_splits is empty: name at least one")
    labels = np.concatenate([data.split(name).labels for name in train_splits])
    clips = tuple(clip for name in train_splits for clip in data.split(name).clips)
    if not np.any(labels > 0):
        names = ", ".join(f"{name}_gt.txt" for name in train_splits)
        raise ValueError(f"no clip to train on has an identity: is there a good {names}?")

    seen = ensemble_lib.partition(members, labels, ensemble["folds"], config.seed)  # [E, N]
    weight = seen * _clip_weights(config, labels, clips)
    layout = None
    if config.data.distractors == "noise":
        labels, layout = label_distractors(config, data, labels)
    elif config.data.distractors == "leave_out":
        weight = weight * (labels > 0)
    elif config.data.distractors != "other":
        given = config.data.distractors
        raise ValueError(f"config.data.distractors='{given}': known are other, leave_out, noise")
    for member, row in zip(members, weight, strict=True):
        if not row.any():
            raise ValueError(f"no clip is left to train on for {member}")
    return _Plan(
        sizes=TaskSpec(
            modalities=modalities,
            num_identities=len(data.identities),
            num_clusters=layout.num_clusters if layout else None,
            num_clips=len(labels),
            total_steps=math.ceil(config.num_epochs * len(labels) / config.batch_size),
            train_other=bool(np.any(weight[:, labels == 0])),
        ),
        training_sets=ensemble_lib.TrainingSets(members, clips, seen > 0),
        labels=labels,
        tables=state_lib.make_tables(members, weight),
        layout=layout,
    )


def _clip_weights(config: Config, labels: np.ndarray, clips: Sequence[str]) -> np.ndarray:
    """Returns [N] float, the weight of every training clip by its class and by its own."""
    _, column, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weight = counts[column] ** -float(config.data.balance)
    weight = weight / weight.mean()
    if config.data.weights:
        weight = weight * pickles.load_clip_weights(config.data.weights, clips)
    return weight


def _make_feed(
    config: Config,
    data: TrainingData,
    system: System,
    sizes: TaskSpec,
    mesh: Mesh,
    step: int,
    mode: str | None,
) -> tuple[feed_lib.StreamingFeed | feed_lib.ResidentFeed, ClipSource]:
    """Returns how clips reach the training step from some step on, and what evaluation reads.

    Args:
      config, data, system, sizes, mesh: of the run.
      step: how many steps were done.
      mode: of the process that did them, which the order of clips depends on; None for the first.
    """
    plan = make_batch_plan(
        [data.split(name) for name in config.data.train_splits],
        tuple(sizes.modalities),
        batch_size=config.batch_size,
        max_frames=config.data.max_frames,
        crop=config.data.crop,
        seed=config.seed,
    )
    layout = resident.make_layout(data, plan, config.eval.split)
    num_drawn = sizes.total_steps * config.batch_size
    mode = mode or resident.choose_mode(config.data.mode, layout, mesh, num_drawn)
    if mode == "streaming":
        say("clips are streamed from the records")
        batches = data.train_batches(plan, start=step * config.batch_size)
        return feed_lib.StreamingFeed(system, mesh, batches), data
    began = time.monotonic()
    clips = resident.Resident(data, layout, mesh)
    say(
        f"clips stay on the device: {layout.nbytes / 1e6:,.0f} MB, "
        f"read in {time.monotonic() - began:.1f} s"
    )
    return feed_lib.ResidentFeed(system, mesh, clips.train, plan), clips


def _claim(
    workdir: Path, config: Config, data: TrainingData, training_sets: ensemble_lib.TrainingSets
) -> None:
    workdir_lib.write_text(workdir / "config.json", config_lib.to_json(config))
    workdir_lib.write_json(workdir / "identities.json", list(data.identities))
    ensemble_lib.save(workdir, training_sets)
    splits = [data.split(name) for name in config.data.train_splits]
    cropped = num_cropped(splits, config.modalities, config.data.max_frames)
    report = {**data.report, "cropped_in_an_epoch": cropped}
    workdir_lib.write_json(workdir / "data_report.json", report)


def _start(
    workdir: Path,
    config: Config,
    system: System,
    plan: _Plan,
    mesh: Mesh,
    facts: Mapping[str, Any],
) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """Returns the newest saved state and its manifest, or a new state and nothing."""

    def init() -> state_lib.TrainState:
        members = plan.training_sets.members
        labels = jnp.tile(jnp.asarray(plan.labels, jnp.int32), (len(members), 1))
        rngs = ensemble_lib.make_rngs(members, config.seed)
        return state_lib.init_state(system, plan.sizes.modalities, rngs, labels)

    def check(saved: Mapping[str, Any]) -> None:
        before = config_lib.from_json(json.dumps(saved["config"]))
        changed.update(resume.changes(workdir, before, config))
        for name in ("identities_sha256", "members_sha256"):
            if saved[name] != facts[name]:
                of = "list of identities" if "identities" in name else "set of clips or members"
                raise checkpoint.CheckpointError(f"'{workdir}' was trained on another {of}")
        if saved["step"] > plan.sizes.total_steps:
            raise ValueError(
                f"'{workdir}' was trained for {saved['step']} steps already, "
                f"of {plan.sizes.total_steps} by config.num_epochs={config.num_epochs}"
            )

    changed: resume.Changes = {}
    sharding = devices_lib.replicated(mesh)
    try:
        found = checkpoint.restore_latest(workdir, _items(jax.eval_shape(init)), sharding, check)
    except checkpoint.OtherModelError as error:
        if not changed:
            raise
        raise ValueError(f"{error}\nbecause of {resume.describe(changed)}") from error
    if (workdir / "config.json").exists():
        changed = resume.changes(workdir, config_lib.load_workdir(workdir), config)
    resume.record(workdir, found[1]["step"] if found else 0, changed)
    if found is None:
        return jax.jit(init, out_shardings=sharding)(), {}
    items, manifest = found
    return _state(items), manifest


def _items(state: state_lib.TrainState) -> dict[str, Any]:
    # Apart, so that evaluation reads the first two only.
    names = ("step", "opt_state", "rng", "labels", "bad_steps", "sums")
    rest = {name: getattr(state, name) for name in names}
    return {"params": state.params, "model_state": state.model_state, "train": rest}


def _state(items: dict[str, Any]) -> state_lib.TrainState:
    return state_lib.TrainState(
        params=items["params"], model_state=items["model_state"], **items["train"]
    )


def _every(epochs: float, config: Config, sizes: TaskSpec) -> set[int]:
    """Returns the steps before the last at which so many epochs have passed again; 0 for none."""
    every = round(epochs * sizes.num_clips / config.batch_size)
    return set(range(every, sizes.total_steps, every)) if every else set()


def _summary(
    config: Config,
    system: System,
    sizes: TaskSpec,
    step: int,
    states: Sequence[state_lib.TrainState],
) -> dict[str, float]:
    """Returns the means since the last line of the log: functions of config, data and step."""
    sums = {
        name: sum(float(np.sum(state.sums[name])) for state in states) for name in states[0].sums
    }
    weight = max(sums["weight"], 1e-6)
    if sums["bad_steps"]:
        warnings.warn(
            f"{sums['bad_steps']:.0f} steps up to step {step} were left out: "
            "loss or gradient not finite",
            stacklevel=2,
        )
    return {
        "epoch": step * config.batch_size / sizes.num_clips,
        "learning_rate": float(jnp.asarray(system.schedule(step - 1))),
        "train_loss": sums["loss"] / weight,
        "train_accuracy": sums["correct"] / weight,
        "bad_steps": sums["bad_steps"],
    }


def _best(workdir: Path) -> dict[str, Any]:
    step = checkpoint.best_step(workdir)
    if step is None:
        return {}
    return {"best_step": step, "best_map": checkpoint.manifests(workdir)[step]["map"]}


def versions(
    packages: Sequence[str] = ("jax", "flax", "optax", "orbax-checkpoint", "numpy"),
) -> dict:
    """Returns what a score was computed with: package -> version, Python and the device."""
    found = {name: importlib.metadata.version(name) for name in ("vidjax", *packages)}
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}"
    return {**found, "python": platform.python_version(), "device": device}
