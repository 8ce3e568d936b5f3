"""A run in training: its first or restored state, the feed of clips, checkpoints, evaluations."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vidjax import config_io, devices, distributed, ensemble, files
from vidjax.config import Config
from vidjax.data import resident
from vidjax.data.clips import ClipSource, TrainingData, make_batch_plan, num_cropped
from vidjax.errors import UserError, warn
from vidjax.evaluation import restore
<<<<<<< HEAD
from vidjax.evaluation.scoring import Evaluation, TrainedModel, conclude, score
from vidjax.run import checkpoint
from vidjax.run.folder import CONFIG, RunFolder, check_resumes, check_there
=======
from vidjax.evaluation.scoring import Evaluation, TrainedModel, score
from vidjax.run import checkpoint, resume
from vidjax.run.folder import CONFIG, RunFolder, check_there
>>>>>>> f0fce65 (One scoring loop: a member scores only clips that it may score; means of scores live with the evaluation step)
from vidjax.run.logs import Logs
from vidjax.run.terminal import say
from vidjax.steps import eval_step
from vidjax.steps import feed as feed_lib
from vidjax.steps import state as state_lib
from vidjax.steps.train_step import MAX_BAD_STEPS
from vidjax.system import System
from vidjax.training import noise_classes
from vidjax.training.plan import RunPlan, values_of_clips


def restore_or_init(
    workdir: Path,
    config: Config,
    data: TrainingData,
    system: System,
    plan: RunPlan,
    layout: NamedSharding,
    digests: Mapping[str, Any],
) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """Restores the newest checkpoint of a run and its manifest; a new run gets step 0 and {}.

    Damaged checkpoints of later steps are set aside: training will save these steps again.
    `digests` are those that the manifest must have.
    """

    def init() -> state_lib.TrainState:
        members = plan.training_sets.members
        labels = jnp.tile(jnp.asarray(plan.labels, jnp.int32), (len(members), 1))
        rngs = ensemble.make_rngs(members, config.seed)
        return state_lib.init_state(system, plan.task.modalities, rngs, labels)

    folder = RunFolder(workdir)
    if folder.has(CONFIG):
        check_resumes(workdir, folder.config, config)
    found = checkpoint.find(workdir)
    if not found:
        return state_lib.make_state(init, system.tx, layout), {}
    manifest = found.manifest
    restore.check_entries(workdir, manifest)
    check_resumes(workdir, config_io.from_json(json.dumps(manifest["config"])), config)
    restore.check_data(workdir, manifest["data"], config, data)
    restore.check_digests(workdir, manifest, digests)
    items = checkpoint.load(found, state_lib.as_items(jax.eval_shape(init)), layout)
    checkpoint.set_aside_later(workdir, manifest["step"])
    return state_lib.of_items(items), manifest


def write_description(
    workdir: Path, config: Config, data: TrainingData, training_sets: ensemble.TrainingSets
) -> None:
    """Writes the files that describe a run: config, identities, members and data report."""
    distributed.barrier()  # all processes have read what is there
    if not distributed.is_first():
        return
    folder = RunFolder(workdir)
    if metrics := folder.metrics():  # of this run with fewer epochs
        folder.write_metrics({**metrics, "finished": False})
    folder.write_config(config)
    files.write_json(workdir / "identities.json", list(data.identities))
    ensemble.save(workdir, training_sets)
    splits = [data.split(name) for name in config.data.train_splits]
    cropped = num_cropped(splits, config.modalities, config.data.max_frames)
    report = {**data.report, "cropped_in_an_epoch": cropped}
    files.write_json(workdir / "data_report.json", report)


def make_feed(
    config: Config,
    data: TrainingData,
    plan: RunPlan,
    system: System,
    mesh: Mesh,
    *,
    step: int,
    mode: str | None,
) -> tuple[feed_lib.Feed, ClipSource]:
    """Builds the feed of training clips from a step on, and the source of clips to evaluate.

    Both feeds give the same batches, but their compiled steps round otherwise: so a resumed run
    keeps its mode, `streaming` or `resident`; `mode` is None for a new run.
    """
    batches = make_batch_plan(
        [data.split(name) for name in config.data.train_splits],
        tuple(plan.task.modalities),
        batch_size=config.batch_size,
        max_frames=config.data.max_frames,
        crop=config.data.crop,
        seed=config.seed,
    )
    layout = resident.plan_resident(data, batches, config.eval.split)
    num_drawn = plan.task.total_steps * config.batch_size
    mode = mode or resident.choose_mode(config.data.mode, layout, mesh, num_drawn)
    (is_streaming,) = distributed.largest(int(mode == "streaming"))
    if is_streaming:
        say("clips are streamed from the records")
        stream = data.train_batches(batches, step=step)
        return feed_lib.StreamingFeed(system, mesh, stream), data
    began = time.monotonic()
    clips = resident.Resident(data, layout, mesh)
    say(
        f"clips stay on the device: {layout.nbytes / 1e6:,.0f} MB, "
        f"read in {time.monotonic() - began:.1f} s"
    )
    return feed_lib.ResidentFeed(system, mesh, clips.train, batches), clips


Tree = TypeVar("Tree")  # a tree of arrays


class TrainingRun:
    """A run in training: its step, its states, and the operations on them.

    Members that are trained by one program share a TrainState, and large matrix products. Otherwise
    every member has its own: this needs less memory, and each is bit-equal to a run of its own.

    Attributes:
      step: optimiser steps done.
      num_members: number of trained members, E.
      data_digests: the digests of the data, as checkpoints have them.
      is_evaluated: True if the restored checkpoint has been evaluated.
      rates: clips per second of every dispatch of steps so far.
      train_seconds: seconds of these dispatches, with compilation.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        data: TrainingData,
        plan: RunPlan,
        system: System,
        mesh: Mesh,
        *,
        began: float,
    ):
        """Restores the newest checkpoint, or starts at step 0; `began` is a `time.monotonic()`."""
        self._config, self._workdir, self._plan = config, workdir, plan
        self._system, self._mesh = system, mesh
        self._eval_step = eval_step.make_eval_step(system, mesh)
        self.num_members = len(plan.training_sets.members)
        self.data_digests = restore.data_digests(config, data)
        self._description: dict[str, Any] = {
            **plan.task._asdict(),
            **restore.companion_digests(data.identities, plan.training_sets),
            "data": self.data_digests,
            "config": config.to_dict(),
        }
        self._layout = devices.replicated(mesh)
        state, manifest = restore_or_init(
            workdir, config, data, system, plan, self._layout, self._description
        )
        self.step = int(state.step)
        self.is_evaluated = bool(manifest.get("evaluated"))
        self._seconds_before, self._began = manifest.get("seconds", 0.0), began
        self._last_save = time.monotonic()
        if self.step:
            say(f"resuming at step {self.step} of {plan.task.total_steps}")

        self._group_size = size = self.num_members if system.vmap_members else 1
        self._tables = [self._replicate(part) for part in ensemble.split(plan.tables, size)]
        self._states = [
            devices.put(part, self._layout) for part in state_lib.split_state(state, size)
        ]
        del state  # frees its memory; the parts are copies
        self.feed, self._clips = make_feed(
            config, data, plan, system, mesh, step=self.step, mode=manifest.get("mode")
        )
        self._description["mode"] = self.feed.mode
        self._relabelled = None
        if plan.task.layout:
            modalities, predicting = tuple(system.fuse_eval), system
            if config.noise.relabel_by == "train":
                predicting = system._replace(fuse_eval=system.fuse_train)
            self._relabelled = functools.partial(
                noise_classes.relabelled,
                values_of=functools.partial(
                    values_of_clips, config, self._clips, modalities, mesh=mesh
                ),
                predict=eval_step.make_predict_step(predicting, mesh),
                layout=plan.task.layout,
                labels=plan.labels,
                training_sets=plan.training_sets,
                keep=config.noise.keep,
            )
        self.rates: list[float] = []
        self.train_seconds = 0.0
        self._num_logged = 0  # number of rates in the log

    def _replicate(self, tree: Tree) -> Tree:
        return devices.replicate(self._mesh, tree)

    @property
    def seconds(self) -> float:
        """Seconds spent on the run by all processes so far."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def num_params(self) -> int:
        """Number of parameters of one member."""
        return sum(x.size // len(x) for x in jax.tree.leaves(self._states[0].params))

    @property
    def state(self) -> state_lib.TrainState:
        """The state of all members together."""
        return state_lib.merge_states(self._states)

    def advance(self, stop: int) -> tuple[int, float]:
        """Trains for one dispatch of the feed, at most to step `stop`.

        Returns the number of steps, and the last loss, averaged over members. `MAX_BAD_STEPS`
        consecutive steps of a member without a finite loss are an error.
        """
        dispatched = time.monotonic()
        done = self.feed.run(self._states, self._tables, self.step, stop - self.step)
        self._states = done.states
        self.step += done.num_steps
        seconds = time.monotonic() - dispatched
        self.train_seconds += seconds
        self.rates.append(done.num_steps * self._config.batch_size / seconds)
        if done.bad_step is not None:
            raise UserError(self._bad_step_message(done.bad_step))
        return done.num_steps, done.loss

    def _bad_step_message(self, bad_step: int) -> str:
        rate = float(jnp.asarray(self._system.lr_schedule(bad_step)))
        steps = checkpoint.manifests(self._workdir)
        saved = f"the checkpoint of step {max(steps)} is finite; " if steps else ""
        return (
            f"loss or gradient is not finite at step {bad_step + 1} and "
            f"{MAX_BAD_STEPS - 1} steps before it, with learning rate {rate:g}\n"
            f"{saved}lower config.optim.learning_rate, or check the clips for huge features"
        )

    def log(self, logs: Logs) -> None:
        """Logs the means since the last line of the log, and starts new sums."""
        logs.metrics(self.step, self._mean_metrics())
        # New arrays for every state, since the next step donates them.
        self._states = [
            state.replace(sums=self._replicate(state_lib.zero_sums(self._group_size)))
            for state in self._states
        ]
        rate = statistics.median(self.rates[self._num_logged :])
        self._num_logged = len(self.rates)
        timing = {"clips_per_second": rate, "waited_seconds": self.feed.waited}
        logs.timing(self.step, timing)

    def _mean_metrics(self) -> dict[str, float]:
        """Returns the metrics that depend on config, data and step alone."""
        sums = {
            name: sum(float(np.sum(state.sums[name])) for state in self._states)
            for name in self._states[0].sums
        }
        if sums["bad_steps"]:
            warn(
                f"{sums['bad_steps']:.0f} steps up to step {self.step} were skipped: "
                "loss or gradient is not finite"
            )
        weight = max(sums["weight"], 1e-6)
        rate = {}
        if not self._system.model.exact_inputs:
            rate["learning_rate"] = float(jnp.asarray(self._system.lr_schedule(self.step - 1)))
        return {
            "epoch": self.step * self._config.batch_size / self._plan.task.num_clips,
            **rate,
            "train_loss": sums["loss"] / weight,
            "train_accuracy": sums["correct"] / weight,
            "bad_steps": sums["bad_steps"],
        }

    def relabel(self) -> None:
        """Relabels the unclustered distractors by the predictions of the model."""
        assert self._relabelled
        labels = ensemble.split(self._relabelled(self.state), self._group_size)
        self._states = [
            state.replace(labels=self._replicate(part))
            for state, part in zip(self._states, labels, strict=True)
        ]

    def is_save_due(self) -> bool:
        """Returns True if the last checkpoint is `checkpoint_every_seconds` old."""
        return time.monotonic() - self._last_save >= self._config.checkpoint_every_seconds

    def save(self, **more: float) -> None:
        """Saves a checkpoint with `more` in its manifest; if the step has one, only adds `more`."""
        check_there(self._workdir)
        info = {**self._description, **more, "seconds": self.seconds}
        checkpoint.save(self._workdir, self.step, state_lib.as_items(self.state), info)
        self._last_save = time.monotonic()

    def evaluate(self, check: Callable[[], None] = lambda: None) -> Evaluation:
        """Ranks `config.eval.split` by the weights of this step; `check` as in `scoring.score`."""
        spec = self._config.eval
        options = {"block_size": spec.block_size, "each_member": spec.members, "check": check}
        return score([self.trained_model()], spec.split, self._mesh, **options)

    def trained_model(self) -> TrainedModel:
        """Returns the model with the weights of this step."""
        state = self.state
        return TrainedModel(
            str(self._workdir),
            self._system,
            self._eval_step,
            state.params,
            self._replicate(self._system.model.solve(state.params, state.model_state)),
            self._plan.training_sets,
            self._clips,
        )
