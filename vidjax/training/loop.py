"""Trains a system: takes optimiser steps, evaluates, writes logs and saves checkpoints."""

import bisect
import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble, metrics, optim
from vidjax.data import resident
from vidjax.data.clips import ClipSource, count_cropped
from vidjax.data.dataset import Dataset
from vidjax.evaluation import analysis, eval_step
from vidjax.evaluation.scores import Evaluation, score
from vidjax.evaluation.scoring import TrainedModel
from vidjax.runs import checkpoint, digests, facts, members_file, results as results_lib, signals
from vidjax.runs.config import Config, list_splits
from vidjax.runs.results import Logs
from vidjax.runs.run_folder import RunFolder, check_not_moved, make_paths_absolute
from vidjax.runs.versions import collect_versions
from vidjax.training import early_stop, feed as feed_lib, profiler, resume, train_step
from vidjax.training.placement import agree_on_placement
from vidjax.training.plan import RunPlan, describe_repeated_clips, make_plan, make_relabel
from vidjax.utils import distributed, files, messages
from vidjax.utils.errors import UserError, warn
from vidjax.utils.terminal import Progress, say

Tree = TypeVar("Tree")  # a tree of arrays
# These steps are always logged, because the loss falls fastest at first, and a run may be short.
FIRST_STEPS = (1, 2, 5, 10)


def make_schedule(config: Config, plan: RunPlan) -> dict[str, frozenset[int]]:
    """Chooses the steps after which training writes its log, relabels distractors, and evaluates.

    Distractors are clips of unknown people. Returns task (`log`, `relabel` or `evaluate`) -> set
    of steps, such as {10, 20}. Raises UserError if the profiler would start after the last step.
    """
    total = plan.task.total_steps

    def every(epochs: float) -> frozenset[int]:
        steps = max(1, round(epochs * plan.batches.num_places / config.batch_size))
        return frozenset(range(steps, total, steps) if epochs else ())

    first = [step for step in FIRST_STEPS if step < total]
    log = frozenset((*first, *range(0, total, config.log_every_steps), total))
    evaluate = every(config.eval.every_epochs or min(config.early_stop.patience, 1)) | {total}
    if config.profile and config.profile[0] >= total:
        raise UserError(
            f"config.profile={config.profile[0]},{config.profile[1]}: the run has only "
            f"{messages.count(total, 'step')}\nname earlier steps, such as --config.profile=1,2"
        )
    relabel = every(config.noise.relabel_every_epochs if plan.task.layout else 0)
    return {"log": log, "relabel": relabel, "evaluate": evaluate}


def train(
    config: Config,
    workdir: Path,
    data: Dataset,
    *,
    num_devices: int | None = None,
    command: str | None = None,
    began: float | None = None,
    log: results_lib.LogFunction | None = None,
) -> dict[str, Any]:
    """Trains a system, or resumes the training. Returns the content of `metrics.json`.

    The caller has locked the folder `workdir`. `command` is the command line that repeats the
    training. `began` is the value of `time.monotonic()` when this process started. `log` gets each
    line of `metrics.jsonl` as a dict. For errors, see `public.train`.
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
    with contextlib.ExitStack() as stack:
        evaluated = TrainingLoop(run, schedule, stack, log).take_steps()
    # An earlier process may have stopped between the last evaluation and its results.
    evaluations = evaluated or run.evaluate()
    about = {"data": data.report["data"], **run.results()}
    about |= {"command": command} if command else {}
    metrics = analysis.write_results(RunFolder(workdir), config, evaluations, about)
    return metrics[config.eval.split]


class TrainingLoop:
    """Takes the training steps of a run. Between steps, does tasks such as an evaluation."""

    def __init__(
        self, run: "TrainingRun", schedule: Mapping[str, frozenset[int]],
        stack: contextlib.ExitStack, log: results_lib.LogFunction | None,
    ):  # fmt: skip
        """Opens the logs and catches signals, such as Ctrl-C, until `stack` is closed.

        `schedule` is task -> the steps after which the task is done, see `make_schedule`. `log`
        gets each line of `metrics.jsonl`.
        """
        config, plan = run.config, run.plan
        self._run, self._schedule, self._total = run, schedule, plan.task.total_steps
        # An earlier process may have stopped between a step and its evaluation.
        self._is_pending = run.step in schedule["evaluate"] and not run.is_evaluated
        self._evaluated: list[Evaluation] = []  # the last evaluation of each split
        self._timing: dict[str, float] = {}  # measured times since the previous pause
        self._logs = Logs(
            run.workdir, step=run.step, evaluated=not self._is_pending, log=log, config=config
        )
        stack.callback(self._logs.close)
        num_drawn = plan.batches.num_drawn
        self._progress = Progress(
            num_drawn(self._total), initial=num_drawn(run.step),
            unit="clip", label="train",
        )  # fmt: skip
        stack.callback(self._progress.close)
        self._interruption = stack.enter_context(signals.catch_interruption())
        self._trace = stack.enter_context(profiler.trace_steps(run.workdir, config.profile))
        # In the order in which they are done. A task without a schedule is done in every pause.
        self._tasks = {
            "log": self._log, "relabel": run.relabel, "save": self._save,
            "evaluate": self._evaluate,
        }  # fmt: skip
        self._stops = sorted({self._total, *config.profile}.union(*schedule.values()))

    def take_steps(self) -> list[Evaluation]:
        """Trains to the end. Returns the last evaluation of each split, or [] if there was none."""
        run, interruption = self._run, self._interruption
        if self._is_pending:
            self._evaluate()
        interruption.at_once = True  # before the first step, no training would be lost
        while run.step < self._total and not run.is_stopped:
            self._trace(run.step)
            self._evaluated = []  # frees the weights of an ensemble
            num_clips, loss = run.advance(self._stops[bisect.bisect(self._stops, run.step)])
            interruption.at_once = False
            self._progress.advance(num_clips, f"loss {loss:.3f}")
            for name, task in self._tasks.items():
                if name not in self._schedule or run.step in self._schedule[name]:
                    task()
            if run.step < self._total and not run.is_stopped:
                interruption.raise_if_interrupted(run.step)
        return self._evaluated

    def _log(self) -> None:
        self._timing = self._run.log(self._logs)

    def _save(self) -> None:
        """Saves a checkpoint if one is due: before an evaluation, after a signal, or regularly."""
        run, timing, self._timing = self._run, self._timing, {}
        asked = self._interruption.agree(save_due=time.monotonic() >= run.next_save)
        if asked or run.step in self._schedule["evaluate"]:
            run.save()
            timing["saved"] = True
        if timing:
            self._logs.timing(run.step, timing)

    def _evaluate(self) -> None:
        """Evaluates the run. Adds the metrics to the log and the checkpoint of this step."""
        run, interruption = self._run, self._interruption
        interruption.raise_if_interrupted(run.step)
        interruption.at_once = True
        self._evaluated = run.evaluate(lambda: interruption.raise_if_interrupted(run.step))
        first, *others = self._evaluated
        logged = scores = metrics.select_logged(first.results)
        for other in others:
            found = metrics.select_logged(other.results).items()
            logged = logged | {f"{other.split.name}/{name}": value for name, value in found}
        self._logs.metrics(run.step, {"epoch": run.epoch, "split": first.split.name, **logged})
        line = ", ".join(f"{name} {value:.4f}" for name, value in logged.items())
        say(f"step {run.step} of {self._total}: {line or 'clips are ranked, without metrics'}")
        if "map" in scores:
            self._progress.keep_text(f"MAP {scores['map']:.4f}")
        run.check_progress(first)
        run.save(**scores, evaluated=True)
        interruption.at_once = False


def write_description(
    workdir: Path, config: Config, data: Dataset, training_sets: ensemble.TrainingSets
) -> None:
    """Writes the configuration, identities, nets and counts of clips to the folder of a run."""
    distributed.barrier()  # waits until all processes have read the old files
    if not distributed.is_first():
        return
    folder = RunFolder(workdir)
    if metrics := folder.metrics():  # the run was finished, and now trains more epochs
        folder.write_metrics({**metrics, "finished": False})
    folder.write_config(config)
    members_file.write_copies(workdir, data.identities, training_sets)
    splits = [data.split(name) for name in config.data.train_splits]
    cropped = count_cropped(splits, config.modalities, config.data.max_frames)
    report = {**data.report, "cropped_in_an_epoch": cropped}
    files.write_json(workdir / "data_report.json", report)


class TrainingRun:
    """A run in training. Its methods train, evaluate, log and save.

    A run has one or more members, the nets of an ensemble. `placement.choose_placement` chooses
    how many members a compiled program trains together.

    Attributes:
      config, workdir, plan, mesh: the arguments of `__init__`.
      step: the number of finished optimiser steps.
      is_evaluated: True if the restored checkpoint has been evaluated.
      training_sets: the training clips of each member, including those of `config.init_from`.
      next_save: the time at which the next checkpoint is due, in seconds of `time.monotonic()`.
    """

    def __init__(
        self, config: Config, workdir: Path, data: Dataset, plan: RunPlan, mesh: Mesh, *,
        began: float,
    ):  # fmt: skip
        """Restores the newest checkpoint, or makes the state of step 0.

        `began` is the time of `time.monotonic()` at which the process started.
        """
        self.config, self.workdir, self.plan, self.mesh = config, workdir, plan, mesh
        self._system = plan.system
        self._eval_step = eval_step.make_eval_step(self._system, mesh)
        self._num_members = len(plan.training_sets.members)
        self._data_digests = digests.hash_data(config, data)
        state, self.training_sets, manifest, self._facts = resume.start(
            config, workdir, data, plan, mesh
        )
        self.step = int(state.step)
        self.is_evaluated = bool(manifest.get("evaluated"))
        self._seconds_before, self._began = manifest.get("seconds", 0.0), began
        self.next_save = time.monotonic() + config.checkpoint_every_seconds
        if self.step:
            say(f"resuming at step {self.step} of {plan.task.total_steps}")

        layout = resident.make_resident_plan(data, plan.batches, list_splits(config))
        mode, size, train_loop = agree_on_placement(config, plan, layout, state, mesh, manifest)
        self._group_size = size
        self._constants = [self._replicate(part) for part in ensemble.split(plan.constants, size)]
        self._states = [self._replicate(part) for part in train_step.split_state(state, size)]
        del state  # frees its memory; the parts are copies
        self._feed, self._clips = self._make_feed(data, layout, mode, train_loop)
        self._description: dict[str, Any] = {
            **plan.task._asdict(), "data": self._data_digests, "config": config.to_dict(),
            **facts.to_json(self._facts), "mode": mode, "group_size": size,
        }  # fmt: skip
        self._lists = members_file.make_lists(data.identities, self.training_sets)
        self._compute_labels = make_relabel(config, plan, mesh)
        self._rates: list[float] = []  # clips per second of every call of `advance`
        self._train_seconds = 0.0  # sum over all calls of `advance`
        self._num_logged = 0  # number of rates that are in the log

    def _make_feed(
        self, data: Dataset, layout: resident.ResidentPlan, mode: str, loop: train_step.Loop
    ) -> tuple[feed_lib.Feed, ClipSource]:
        """Returns the reader of the training clips, and the source of clips for evaluation.

        `mode` is `streaming` (clips are read from the disk) or `resident` (clips stay on the
        devices). `layout` describes the resident clips. `loop` is the compiled training loop.
        """
        mesh, batches = self.mesh, self.plan.batches
        if mode == "streaming":
            stream = data.train_batches(batches, step=self.step)
            return feed_lib.StreamingFeed(loop, mesh, stream), data
        began = time.monotonic()
        clips = resident.Resident(data, layout, mesh)
        say(
            f"clips stay on the device: {layout.nbytes / 1e6:,.0f} MB, "
            f"read in {time.monotonic() - began:.1f} s"
        )
        return feed_lib.ResidentFeed(loop, mesh, clips.train, batches, self.step), clips

    def _replicate(self, tree: Tree) -> Tree:
        return devices.replicate(self.mesh, tree)

    @property
    def seconds(self) -> float:
        """The seconds since the start of the run, without the times in which it was stopped."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def epoch(self) -> float:
        """The number of passes over the training clips up to `step`."""
        return self.step * self.config.batch_size / self.plan.batches.num_places

    @property
    def state(self) -> train_step.TrainState:
        """The state of all members (nets of the ensemble), joined from groups of members."""
        parts = [state.replace(step=None) for state in self._states]
        return ensemble.merge(parts).replace(step=self._states[0].step)

    def advance(self, stop: int) -> tuple[int, float]:
        """Trains for about a second, at most to step `stop`.

        Returns the number of clips, and the last loss, averaged over nets. Raises UserError if
        the loss or gradient of a net was not finite in three consecutive steps.
        """
        dispatched = time.monotonic()
        done = self._feed.advance(self._states, self._constants, self.step, stop - self.step)
        self._states = done.states
        num_drawn = self.plan.batches.num_drawn
        num_clips = num_drawn(self.step + done.num_steps) - num_drawn(self.step)
        self.step += done.num_steps
        seconds = time.monotonic() - dispatched
        self._train_seconds += seconds
        self._rates.append(num_clips / seconds)
        if done.bad_step is not None:
            rate = float(np.asarray(self._system.lr_schedule(done.bad_step)))
            steps = checkpoint.manifests(self.workdir)
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

        Returns a dict: `clips_per_second`, and `waited_seconds`, the seconds in which the devices
        waited for clips.
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
        """Lets each net choose new classes for distractors (clips of unknown people).

        A net chooses by its predictions, see `plan.make_relabel`.
        """
        labels = self._compute_labels(self.state, self._clips)
        self._states = [
            state.replace(labels=self._replicate(part))
            for state, part in zip(
                self._states, ensemble.split(labels, self._group_size), strict=True
            )
        ]

    def save(self, **more: float) -> None:
        """Saves a checkpoint of the present step, with the entries `more` in `manifest.json`.

        If the step already has a checkpoint, only `manifest.json` changes.
        """
        check_not_moved(self.workdir)
        info = {
            **self._description, **facts.to_json(self._facts), **more, "seconds": self.seconds,
        }  # fmt: skip
        items = train_step.convert_to_items(self.state) | self._lists
        checkpoint.save(self.workdir, self.step, items, info)
        self.next_save = time.monotonic() + self.config.checkpoint_every_seconds

    @property
    def is_stopped(self) -> bool:
        """True if `check_progress` has decided that training ends early."""
        return "early_stop" in self._facts and self._facts["early_stop"].stopped

    def check_progress(self, evaluation: Evaluation) -> None:
        """Decides after an evaluation whether training ends early (`config.early_stop`)."""
        if self.config.early_stop.patience:
            before, results = self._facts.get("early_stop"), evaluation.results
            entry = early_stop.add_evaluation(self.config, before, self.step, results)
            entry.stopped &= self.step < self.plan.task.total_steps
            self._facts["early_stop"] = entry

    def evaluate(self, check: Callable[[], None] = lambda: None) -> list[Evaluation]:
        """Ranks the clips of `config.eval.split`, and then of each split of `config.eval.splits`.

        `check` is called repeatedly. It may raise an error to end the evaluation. Returns an
        evaluation for each split.
        """
        model, each = self.trained_model(), self.config.eval.members
        splits = list_splits(self.config)
        return [score(model, split, each_member=each, check=check) for split in splits]

    def trained_model(self) -> TrainedModel:
        """Returns the model with the present weights, to score clips with it."""
        weights = [(state.params, state.model_state) for state in self._states]
        params, model_state = ensemble.merge(weights)
        return TrainedModel(
            str(self.workdir),
            self._system,
            self._eval_step,
            params,
            self._replicate(self._system.model.finalise_state(params, model_state)),
            self.training_sets,
            self._clips,
            self.mesh,
            self.config.eval.block_size,
        )

    def results(self) -> dict[str, Any]:
        """Returns the entries of `metrics.json` that describe the training."""
        steps = checkpoint.manifests(self.workdir)
        best_step = checkpoint.find_best(steps)
        best: dict[str, Any] = {}
        if best_step is not None:
            best = {"best_step": best_step, "best_map": steps[best_step]["map"]}
        rates = self._rates[1:] or self._rates  # the first steps are slower
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
            "seed": self.config.seed,
            "step": self.step,
            "finished": True,
            **facts.to_json(self._facts),
            "trained_on": self._data_digests,
            "versions": collect_versions(),
        }
