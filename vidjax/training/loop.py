"""Trains a system: takes optimiser steps, evaluates, writes logs and saves checkpoints."""

import bisect
import contextlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, distributed, ensemble, metrics, optim
from vidjax.core.batch import Batch
from vidjax.data import resident
from vidjax.data.clips import ClipSource, TrainingData, count_cropped
from vidjax.evaluation import analysis, eval_step, trained_runs
from vidjax.evaluation.scores import Evaluation, Scored, score
from vidjax.evaluation.scoring import TrainedModel, start_compiling
from vidjax.models.base import ModelState, Params
from vidjax.runs import (
    checkpoint,
    config_io,
    digests,
    members_file,
    results as results_lib,
    signals,
)
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.config import ROUNDING, Config, affects, differences, list_splits
from vidjax.runs.results import Logs
from vidjax.runs.run_folder import (
    CONFIG,
    RunFolder,
    check_not_moved,
    check_resumes,
    make_paths_absolute,
)
from vidjax.runs.terminal import Progress, say
from vidjax.runs.versions import collect_versions
from vidjax.training import (
    early_stop,
    feed as feed_lib,
    init_from,
    noise_classes,
    profiler,
    train_step,
)
from vidjax.training.placement import Placement, choose_placement
from vidjax.training.plan import RunPlan, compute_values, describe_repeated_clips, make_plan
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError, warn

Tree = TypeVar("Tree")  # a tree of arrays
# These steps are always logged, because the loss falls fastest at first, and a run may be short.
FIRST_STEPS = (1, 2, 5, 10)


class Schedule(NamedTuple):
    """The numbers of the steps after which the training pauses for another task."""

    log: frozenset[int]  # a line of `metrics.jsonl` is written
    evaluate: frozenset[int]  # the run is evaluated; this includes the last step
    relabel: frozenset[int]  # distractors in no cluster get new labels
    stops: tuple[int, ...]  # all these steps, in ascending order

    def next_stop(self, step: int) -> int:
        """Returns the first of `stops` after `step`."""
        return self.stops[bisect.bisect(self.stops, step)]


def make_schedule(config: Config, plan: RunPlan) -> Schedule:
    """Returns the schedule of a run. Without noise classes, `Schedule.relabel` is empty."""
    total = plan.task.total_steps

    def every(epochs: float) -> frozenset[int]:
        if not epochs:
            return frozenset()
        steps = max(1, round(epochs * plan.batches.num_places / config.batch_size))
        return frozenset(range(steps, total, steps))

    first = [step for step in FIRST_STEPS if step < total]
    log = frozenset((*first, *range(0, total, config.log_every_steps), total))
    epochs = config.eval.every_epochs or min(config.early_stop.patience, 1)
    evaluate = every(epochs) | {total}
    relabel = every(config.noise.relabel_every_epochs) if plan.task.layout else frozenset()
    if config.profile and config.profile[0] >= total:
        raise UserError(
            f"config.profile={config.profile[0]},{config.profile[1]}: the run has only "
            f"{messages.count(total, 'step')}\nname earlier steps, such as --config.profile=1,2"
        )
    stops = log | evaluate | relabel | {step for step in config.profile if step < total}
    return Schedule(log, evaluate, relabel, tuple(sorted(stops)))


def read_finished_metrics(folder: RunFolder, config: Config) -> dict[str, Any] | None:
    """Returns the `metrics.json` of a run, or None if it has not finished the epochs of `config`.

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


def train(
    config: Config,
    workdir: Path,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    command: str | None = None,
    began: float | None = None,
    log: results_lib.LogFunction | None = None,
) -> dict[str, Any]:
    """Trains a system, or resumes the training. Returns the content of `metrics.json`.

    The caller has locked the folder `workdir`. `command` is the command line that repeats the
    training. `began` is the value of `time.monotonic()` when this process started. For `log` and
    errors, see `public.train`.
    """
    began = time.monotonic() if began is None else began
    config = make_paths_absolute(config)  # the run may resume from another working directory
    mesh = devices.make_mesh(num_devices)
    plan = make_plan(config, data)
    schedule = make_schedule(config, plan)
    if note := describe_repeated_clips(config, plan):
        say(note)
    if config.optim.freeze:
        params, _ = plan.system.compute_shapes(1)
        say(optim.describe_frozen(params, config.optim.freeze))
    run = TrainingRun(config, workdir, data, plan, mesh, began=began)
    write_description(workdir, config, data, run.training_sets)
    evaluated = _take_steps(run, plan, schedule, workdir, config, log)
    # An earlier process may have stopped between the last evaluation and its results.
    evaluations = evaluated or run.evaluate()
    of_training = run.results() | ({"command": command} if command else {})
    scored = [
        Scored(run.trained_model(), one, {"data": data.report["data"]}) for one in evaluations
    ]
    return analysis.write_results(RunFolder(workdir), config, scored, of_training)[
        config.eval.split
    ]


def _take_steps(
    run: "TrainingRun",
    plan: RunPlan,
    schedule: Schedule,
    workdir: Path,
    config: Config,
    log: results_lib.LogFunction | None,
) -> list[Evaluation]:
    """Trains, logs, saves and evaluates. Returns the last evaluation of each split, if any."""
    total_steps, num_drawn = plan.task.total_steps, plan.batches.num_drawn
    # An earlier process may have stopped between a step and its evaluation.
    is_pending = run.step in schedule.evaluate and not run.is_evaluated
    evaluated: list[Evaluation] = []
    with contextlib.ExitStack() as stack:
        logs = Logs(workdir, step=run.step, evaluated=not is_pending, log=log)
        stack.callback(logs.close)
        progress = Progress(
            num_drawn(total_steps), initial=num_drawn(run.step),
            unit="clip", label="train", compiles=True,
        )  # fmt: skip
        stack.callback(progress.close)
        interruption = stack.enter_context(signals.catch_interruption())
        trace = stack.enter_context(profiler.trace_steps(workdir, config.profile))

        def evaluate() -> list[Evaluation]:
            """Evaluates the run. Adds the metrics to the log and the checkpoint of this step."""
            interruption.raise_if_interrupted(run.step)
            interruption.at_once = True
            evaluated = run.evaluate(lambda: interruption.raise_if_interrupted(run.step))
            first, *others = evaluated
            scores = metrics.select_logged(first.results)
            of_others = {
                f"{other.split.name}/{name}": value
                for other in others
                for name, value in metrics.select_logged(other.results).items()
            }
            logged = {**scores, **of_others}
            logs.metrics(run.step, {"epoch": run.epoch, "split": first.split.name, **logged})
            line = ", ".join(f"{name} {value:.4f}" for name, value in logged.items())
            say(f"step {run.step} of {total_steps}: {line or 'ranked'}")
            if "map" in scores:
                progress.keep_text(f"MAP {scores['map']:.4f}")
            run.check_progress(first)
            run.save(**scores, evaluated=True)
            interruption.at_once = False
            return evaluated

        if is_pending:
            evaluated = evaluate()
        interruption.at_once = True  # before the first step, no training would be lost
        run.start_compiling_evaluation()
        while run.step < total_steps and not run.is_stopped:
            trace(run.step)
            num_clips, loss = run.advance(schedule.next_stop(run.step))
            interruption.at_once = False
            analysis.import_slow_libraries(report=config.eval.report)
            progress.advance(num_clips, f"loss {loss:.3f}")
            timing = run.log(logs) if run.step in schedule.log else {}
            if run.step in schedule.relabel:
                run.relabel()
            asked = interruption.agree(save_due=time.monotonic() >= run.next_save)
            if asked or run.step in schedule.evaluate:
                run.save()
                timing["saved"] = True
            if timing:
                logs.timing(run.step, timing)
            if run.step in schedule.evaluate:
                evaluated = evaluate()
            if run.step < total_steps and not run.is_stopped:
                interruption.raise_if_interrupted(run.step)
    return evaluated


def list_epochs(manifest: Mapping[str, Any], num_epochs: float) -> list[list[float]]:
    """Returns the entry `extended` of a run that resumes with `num_epochs`, see `schemas.Epochs`.

    `manifest` belongs to the checkpoint, or is {} in a new run. If the run is not extended, the
    list is empty.
    """
    if not manifest:
        return []
    step, first = manifest["step"], [0, manifest["config"]["num_epochs"]]
    pairs: list[list[float]] = manifest.get("extended") or [first]
    if num_epochs != pairs[-1][1]:
        pairs = [*(pair for pair in pairs if pair[0] < step), [step, num_epochs]]
    return pairs if len(pairs) > 1 else []


def write_description(
    workdir: Path, config: Config, data: TrainingData, training_sets: ensemble.TrainingSets
) -> None:
    """Writes the configuration, identities, members and counts of clips to the folder of a run."""
    distributed.barrier()  # waits until all processes have read the old files
    if not distributed.is_first():
        return
    folder = RunFolder(workdir)
    if metrics := folder.metrics():  # the run was finished, and now trains more epochs
        folder.write_metrics({**metrics, "finished": False})
    folder.write_config(config)
    files.write_json(workdir / "identities.json", list(data.identities))
    members_file.save(workdir, training_sets)
    splits = [data.split(name) for name in config.data.train_splits]
    cropped = count_cropped(splits, config.modalities, config.data.max_frames)
    report = {**data.report, "cropped_in_an_epoch": cropped}
    files.write_json(workdir / "data_report.json", report)


class TrainingRun:
    """A run in training. Its methods train, evaluate, log and save.

    A run has one or more members, the nets of an ensemble. The groups of members that a program
    trains together are chosen by `placement.choose_placement`.

    Attributes:
      step: the number of finished optimiser steps.
      is_evaluated: True if the restored checkpoint has been evaluated.
      training_sets: the clips that each member was trained on, also before `config.init_from`.
      next_save: the time at which the next checkpoint is due, in seconds of `time.monotonic()`.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        data: TrainingData,
        plan: RunPlan,
        mesh: Mesh,
        *,
        began: float,
    ):
        """Restores the newest checkpoint, if any."""
        self._config, self._workdir, self._plan = config, workdir, plan
        self._mesh = mesh
        self._system = plan.system
        self._eval_step = eval_step.make_eval_step(self._system, self._mesh)
        has_vectors = self._system.model.vector_names and not self._system.frame_is_example
        self._attention_step = (
            eval_step.make_attention_step(self._system, mesh)
            if config.eval.report and has_vectors
            else None
        )
        self.training_sets, self._started = plan.training_sets, dict[str, Any]()
        self._num_members = len(plan.training_sets.members)
        self._description: dict[str, Any] = {
            **plan.task._asdict(),
            "data": digests.hash_data(config, data),
            "config": config.to_dict(),
        }
        state, manifest = self._restore_or_init(data)
        epochs = list_epochs(manifest, config.num_epochs)
        self._extended = {"extended": epochs} if epochs else {}
        self._early_stop = manifest.get("early_stop")
        if self._early_stop and config.num_epochs != manifest["config"]["num_epochs"]:
            self._early_stop |= {"waited": 0, "stopped": False}  # the user wants more steps
        self._description |= {"early_stop": self._early_stop} if self._early_stop else {}
        self._description |= self._companions(data) | self._extended | self._started
        self.step = int(state.step)
        self.is_evaluated = bool(manifest.get("evaluated"))
        self._seconds_before, self._began = manifest.get("seconds", 0.0), began
        self.next_save = time.monotonic() + config.checkpoint_every_seconds
        if self.step:
            say(f"resuming at step {self.step} of {plan.task.total_steps}")

        layout = resident.make_resident_plan(data, plan.batches, list_splits(config))
        mode, size = self._choose_placement(layout, state, manifest)
        self._group_size = size
        self._constants = [self._replicate(part) for part in ensemble.split(plan.constants, size)]
        self._states = [self._replicate(part) for part in train_step.split_state(state, size)]
        del state  # frees its memory; the parts are copies
        self._feed, self._clips = self._make_feed(data, layout, mode)
        self._description |= {"mode": mode, "group_size": size}
        if plan.task.layout:
            system = self._system
            if config.noise.relabel_by == "train":
                system = system._replace(fuse_eval=system.fuse_train)
            self._predict = eval_step.make_predict_step(system, self._mesh)
        self._rates: list[float] = []  # clips per second of every call of `advance`
        self._train_seconds = 0.0  # sum over all calls of `advance`, including compilation
        self._num_logged = 0  # number of rates that are in the log
        self._compiling: threading.Thread | None = None  # compiles the evaluation

    def _restore_or_init(self, data: TrainingData) -> tuple[train_step.TrainState, dict[str, Any]]:
        """Returns the state and manifest of the newest intact checkpoint, or a new state and {}."""
        config, workdir, plan, system = self._config, self._workdir, self._plan, self._system
        sharding = devices.replicated_layout(self._mesh)

        def init() -> train_step.TrainState:
            members = plan.training_sets.members
            labels = jnp.tile(jnp.asarray(plan.labels, jnp.int32), (len(members), 1))
            rngs = ensemble.make_rngs(members, config.seed)
            return train_step.init_state(system, rngs, labels)

        newest = checkpoint.find(workdir)
        if not newest:
            # A model in closed form is trained in seconds, so nothing is lost.
            if not system.model.is_closed_form and (lost := checkpoint.explain_lost(workdir)):
                raise CheckpointError(lost)
            if not config.init_from:
                return train_step.make_state(init, system.tx, self._mesh), {}
            return self._init_from_run(init, data), {}
        manifest = newest.manifest
        trained_runs.check_entries(workdir, manifest)
        old = config_io.from_json(json.dumps(manifest["config"]))
        check_resumes(workdir, old, config)
        digests.check_data(workdir, manifest["data"], config, data)
        if source := manifest.get("init_from"):
            self._started = {"init_from": source}
            self._add_clips(trained_runs.load_training_sets(workdir, manifest))
        digests.check_digests(workdir, manifest, self._companions(data))
        items = checkpoint.load(newest, train_step.convert_to_items(jax.eval_shape(init)), sharding)
        checkpoint.warn_of_lost(workdir, "best")
        self._report_changes(old, manifest)
        checkpoint.set_aside_later(workdir, manifest["step"])  # training saves these steps again
        return train_step.convert_from_items(items), manifest

    def _init_from_run(
        self, init: Callable[[], train_step.TrainState], data: TrainingData
    ) -> train_step.TrainState:
        """Returns a new state with the weights of the run `config.init_from`."""
        source, mesh = init_from.find_source(self._config), self._mesh

        def load(state: train_step.TrainState) -> train_step.TrainState:
            state, entry = init_from.load_state(
                source, self._system, self._config, data.identities, state, mesh
            )
            self._started = {"init_from": entry}
            return state

        self._add_clips(source.training_sets)
        split = data.split(self._config.eval.split)
        if ensemble.choose_scoring_members(self.training_sets, split.clips)[1]:
            warn(
                f"the run config.init_from was trained on clips of {split.name}, so MAP is too "
                "high\nto measure, choose another split: --config.eval.split=SPLIT"
            )
        return train_step.make_state(init, self._system.tx, mesh, load)

    def _add_clips(self, earlier: ensemble.TrainingSets) -> None:
        self.training_sets = ensemble.add_trained_clips(self.training_sets, earlier)

    def _companions(self, data: TrainingData) -> dict[str, str]:
        return digests.hash_companions(data.identities, self.training_sets)

    def _report_changes(self, old: Config, manifest: Mapping[str, Any]) -> None:
        """Reports the changes of the configuration that affect the rest of a resumed training."""
        config, step = self._config, manifest["step"]
        for name, (before, now) in differences(old, config).items():
            if affects(name) & ROUNDING:
                say(f"config.{name} changes from {before} to {now}: later steps round otherwise")
        if config.num_epochs == old.num_epochs or self._system.model.is_closed_form:
            return
        _, earlier = optim.make_optimizer(
            config.optim.to_dict(),
            total_steps=manifest.get("total_steps", step),
            steps_per_epoch=self._plan.batches.num_places / config.batch_size,
        )
        schedules = (jax.jit(earlier), self._system.lr_schedule)
        first, second = (np.asarray(schedule(np.arange(step))) for schedule in schedules)
        if config.optim.total_decay or not np.array_equal(first, second):
            before, now = f"{old.num_epochs:g}", f"{config.num_epochs:g}"
            say(
                f"warning: config.num_epochs grows from {before} to {now}, but the first {step} "
                f"steps had the learning rates for {before} epochs\nso the result differs from a "
                f"run of {now} epochs; metrics.json and the report contain this change",
                warning=True,
            )

    def _choose_placement(
        self, layout: resident.ResidentPlan, state: train_step.TrainState, manifest: dict[str, Any]
    ) -> Placement:
        """Chooses where the clips are, and how many members train together.

        With `config.data.mode=auto`, a resumed run keeps the mode in its `manifest`, because the
        steps of `streaming` and `resident` round differently. In a new run, the free memory
        decides.
        """
        given = self._config.data.mode
        mode = (manifest.get("mode") if given == "auto" else None) or given
        placement = choose_placement(
            mode, layout, self._system, self._plan.batches, state, self._mesh,
            num_drawn=self._plan.task.total_steps * self._config.batch_size,
            before=manifest.get("group_size"),
        )  # fmt: skip
        numbers = int(placement.mode == "streaming"), -placement.group_size
        is_streaming, size = distributed.max_over_processes(*numbers)
        if is_streaming:
            reason = "because they do not fit into the memory"
            if mode != "auto":
                reason = "as before" if given == "auto" else f"because config.data.mode is {mode}"
            say(f"each epoch reads the clips again, {reason}")
        return Placement("streaming" if is_streaming else "resident", -size)

    def _make_feed(
        self, data: TrainingData, layout: resident.ResidentPlan, mode: str
    ) -> tuple[feed_lib.Feed, ClipSource]:
        """Returns the reader of the training clips, and the source of clips for evaluation."""
        system, mesh, batches = self._system, self._mesh, self._plan.batches
        if mode == "streaming":
            stream = data.train_batches(batches, step=self.step)
            return feed_lib.StreamingFeed(system, mesh, stream), data
        began = time.monotonic()
        clips = resident.Resident(data, layout, mesh)
        say(
            f"clips stay on the device: {layout.nbytes / 1e6:,.0f} MB, "
            f"read in {time.monotonic() - began:.1f} s"
        )
        return feed_lib.ResidentFeed(system, mesh, clips.train, batches), clips

    def _replicate(self, tree: Tree) -> Tree:
        return devices.replicate(self._mesh, tree)

    @property
    def seconds(self) -> float:
        """The seconds since the start of the run, without the times in which it was stopped."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def epoch(self) -> float:
        """The number of passes over the training clips up to `step`."""
        return self.step * self._config.batch_size / self._plan.batches.num_places

    @property
    def state(self) -> train_step.TrainState:
        """The state of all members."""
        return train_step.merge_states(self._states)

    def advance(self, stop: int) -> tuple[int, float]:
        """Trains for about a second, at most to step `stop`.

        Returns the number of clips, and the last loss, averaged over members. Raises UserError if
        the loss or gradient of a member was not finite in three consecutive steps.
        """
        dispatched = time.monotonic()
        done = self._feed.advance(self._states, self._constants, self.step, stop - self.step)
        self._states = done.states
        num_drawn = self._plan.batches.num_drawn
        num_clips = num_drawn(self.step + done.num_steps) - num_drawn(self.step)
        self.step += done.num_steps
        seconds = time.monotonic() - dispatched
        self._train_seconds += seconds
        self._rates.append(num_clips / seconds)
        if done.bad_step is not None:
            rate = float(np.asarray(self._system.lr_schedule(done.bad_step)))
            steps = checkpoint.manifests(self._workdir)
            saved = f"; the checkpoint of step {max(steps)} is finite" if steps else ""
            raise UserError(
                f"loss or gradient is not finite at step {done.bad_step + 1} and the "
                f"{train_step.MAX_BAD_STEPS - 1} steps before, with learning rate {rate:g}{saved}\n"
                "train in another --workdir with a lower config.optim.learning_rate, or leave out "
                "clips with huge features\n"
                "to find the operation that gives the first NaN, set JAX_DEBUG_NANS=1"
            )
        return num_clips, done.loss

    def log(self, logs: Logs) -> dict[str, float]:
        """Logs the mean loss and accuracy since the previous call, and resets their sums.

        Returns the measured times, for `Logs.timing`.
        """
        sums = {
            name: sum(float(np.sum(devices.fetch(state.sums[name]))) for state in self._states)
            for name in self._states[0].sums
        }
        if sums["bad_steps"]:
            warn(
                f"up to step {self.step}, {messages.count(int(sums['bad_steps']), 'step')} had no "
                "effect, because the loss or the gradient was not finite"
            )
        values = {"epoch": self.epoch}
        if not self._system.model.is_closed_form:
            values["learning_rate"] = float(np.asarray(self._system.lr_schedule(self.step - 1)))
        weight = max(sums["weight"], 1e-6)
        values |= {
            "train_loss": sums["loss"] / weight,
            "train_accuracy": sums["correct"] / weight,
            "bad_steps": sums["bad_steps"],
        }
        logs.metrics(self.step, values)
        # Every state gets separate arrays, because the next step donates them.
        zeros = {name: np.zeros(self._group_size, np.float32) for name in sums}
        self._states = [state.replace(sums=self._replicate(zeros)) for state in self._states]
        rate = statistics.median(self._rates[self._num_logged :])
        self._num_logged = len(self._rates)
        return {"clips_per_second": rate, "waited_seconds": self._feed.waited}

    def relabel(self) -> None:
        """Changes each member's labels of distractors in no cluster: `noise_classes.relabel`."""
        config, classes = self._config, self._plan.task.layout
        assert classes
        state, (members, _, trained) = self.state, self._plan.training_sets
        # The labels of step 0 decide, because a later label may be a cluster.
        movable = np.asarray(classes.is_mirror(self._plan.labels)) & trained  # [E, N]
        old, wanted = np.asarray(devices.fetch(state.labels)), np.any(movable, axis=0)
        weights: list[tuple[Params, ModelState]] = [
            ensemble.take((state.params, state.model_state), number) for number in range(len(old))
        ]

        def best_columns(batch: Batch) -> np.ndarray:  # [B, E]
            columns = [
                self._predict(*weight, jnp.int32(member.view), batch)
                for weight, member in zip(weights, members, strict=True)
            ]
            return np.stack(devices.fetch(columns), axis=1)

        predicted = np.zeros_like(old)
        if wanted.any():
            modalities = tuple(self._system.fuse_eval)
            predicted[:, wanted] = compute_values(
                config, self._clips, modalities, best_columns, wanted, self._mesh
            ).T
        new = noise_classes.relabel(old, predicted, classes, keep=config.noise.keep)
        labels = np.where(movable, new, old)
        parts = ensemble.split(labels.astype(np.int32), self._group_size)
        self._states = [
            state.replace(labels=self._replicate(part))
            for state, part in zip(self._states, parts, strict=True)
        ]

    def save(self, **more: float) -> None:
        """Saves a checkpoint of this step, with the entries `more` in its manifest.

        If the step already has a checkpoint, only its manifest changes.
        """
        check_not_moved(self._workdir)
        info = {**self._description, **more, "seconds": self.seconds}
        checkpoint.save(self._workdir, self.step, train_step.convert_to_items(self.state), info)
        self.next_save = time.monotonic() + self._config.checkpoint_every_seconds

    @property
    def is_stopped(self) -> bool:
        """True if training ends early."""
        return bool(self._early_stop and self._early_stop["stopped"])

    def check_progress(self, evaluation: Evaluation) -> None:
        """Decides whether training ends early, see `config.early_stop`."""
        if not self._config.early_stop.patience:
            return
        config, before = self._config, self._early_stop
        self._early_stop = early_stop.add_evaluation(config, before, self.step, evaluation.results)
        if self.step >= self._plan.task.total_steps:
            self._early_stop["stopped"] = False  # not early
        self._description["early_stop"] = self._early_stop

    def evaluate(self, check: Callable[[], None] = lambda: None) -> list[Evaluation]:
        """Ranks the splits of `config.eval`, first `eval.split`.

        To end the evaluation early, `check` may raise an error.
        """
        if self._compiling:
            self._compiling.join()
        spec, folder = self._config.eval, RunFolder(self._workdir)
        model, evaluations = self.trained_model(), []
        for split in list_splits(self._config):
            keep = folder.paths(split).scores if spec.keep_scores else None
            evaluations.append(
                score(model, split, each_member=spec.members, check=check, keep=keep)
            )
        return evaluations

    def start_compiling_evaluation(self) -> None:
        """Starts to compile the evaluation in another thread."""
        if self._num_members == 1 and self._mesh.size == 1:
            self._compiling = start_compiling(self.trained_model(), self._config.eval.split)

    def trained_model(self) -> TrainedModel:
        """Returns the model with the present weights."""
        weights = [(state.params, state.model_state) for state in self._states]
        params, model_state = ensemble.merge(weights)
        return TrainedModel(
            str(self._workdir),
            self._system,
            self._eval_step,
            params,
            self._replicate(self._system.model.finalise_state(params, model_state)),
            self.training_sets,
            self._clips,
            self._mesh,
            self._config.eval.block_size,
            self._attention_step,
        )

    def results(self) -> dict[str, Any]:
        """Returns the entries of `metrics.json` that describe the training."""
        steps = checkpoint.manifests(self._workdir)
        best_step = checkpoint.find_best(steps)
        best: dict[str, Any] = {}
        if best_step is not None:
            best = {"best_step": best_step, "best_map": steps[best_step]["map"]}
        rates = self._rates[1:] or self._rates  # the first time includes compilation
        return {
            **best,
            "num_params": sum(x.size // len(x) for x in jax.tree.leaves(self._states[0].params)),
            "num_members": self._num_members,
            "train_clips_per_second": statistics.median(rates) if rates else None,
            "mode": self._feed.mode,
            "waited_seconds": self._feed.waited,
            "train_seconds": self._train_seconds,
            "seconds": self.seconds,
            "date": results_lib.now(),
            "seed": self._config.seed,
            "step": self.step,
            "finished": True,
            **self._extended,
            **self._started,
            **({"early_stop": self._early_stop} if self._early_stop else {}),
            "trained_on": self._description["data"],
            "versions": collect_versions(),
        }
