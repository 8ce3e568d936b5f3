"""`vidjax train`: trains a system from its configuration and data."""

import contextlib
import functools
import statistics
import time
from pathlib import Path
from typing import Any

from vidjax import config as config_lib
from vidjax import devices, metrics
from vidjax.analysis import analysis
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.evaluation.scoring import Evaluation
from vidjax.run import checkpoint, signals
from vidjax.run import results as results_lib
from vidjax.run.folder import CONFIG, RunFolder, absolute, check_resumes
from vidjax.run.logs import Logs
from vidjax.run.terminal import Progress, say
from vidjax.system import make_system
from vidjax.training import training_run
from vidjax.training.plan import make_plan, make_schedule, repeated_clips
from vidjax.training.training_run import TrainingRun


def finished(folder: RunFolder, config: Config) -> dict[str, Any] | None:
    """Returns the metrics of the run in a folder, or None if something is left to do for `config`.

    Refuses a configuration with which the run may not go on.
    """
    if not folder.has(CONFIG):
        return None
    recorded, results = folder.config, folder.metrics()
    check_resumes(folder.path, recorded, absolute(config))
    # Evaluation also writes the file; what lacks a result is evaluated again.
    wanted = ["num_clips", "num_identities", "trained_on"]
    wanted += ["map", "map_kind"] if "map" in results else []
    wanted += ["best_map", "best_step"] if "best_map" in results else []
    if not results.get("finished") or any(results.get(name) is None for name in wanted):
        return None
    return results if config.num_epochs == recorded.num_epochs else None


def train(
    config: Config,
    workdir: Path,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    analyse: bool = False,
    command: str | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains a system, or resumes a run; returns the content of `metrics.json`.

    Args:
      workdir: the folder of the run, locked by `workdir.lock`.
      num_devices: number of devices to use; None for all.
      analyse: True to write `analysis.npz` and `report.html` at the end.
      command: command line that repeats the run, for `metrics.json` and the report.
      began: value of `time.monotonic()` when this process started; None: this call.

    Raises:
      ValueError: The configuration does not fit the data or the run in the folder.
      CheckpointError: The checkpoints are damaged or belong to another model.
      Interrupted: SIGINT or SIGTERM arrived; a checkpoint of the last step was saved.
    """
    began = time.monotonic() if began is None else began
    config = absolute(config)  # the run may go on from another working directory
    config_lib.check(config)
    mesh = devices.make_mesh(num_devices)
    plan = make_plan(config, data)
    schedule, total_steps = make_schedule(config, plan), plan.task.total_steps
    split = config.eval.split
    system = make_system(config.to_dict(), plan.task)
    if note := repeated_clips(config, plan.task):
        say(note)
    run = TrainingRun(config, workdir, data, plan, system, mesh, began=began)
    training_run.write_description(workdir, config, data, plan.training_sets)
    # An earlier process may have stopped between a step and its evaluation.
    evaluated, is_pending = None, run.step in schedule.evaluate and not run.is_evaluated
    with contextlib.ExitStack() as stack:
        logs = Logs(workdir, step=run.step, evaluated=not is_pending)
        stack.callback(logs.close)
        size = config.batch_size
        progress = Progress(
            total_steps * size, initial=run.step * size, unit="clip", label="train", compiles=True
        )
        stack.callback(progress.close)
        interruption = stack.enter_context(signals.catch_interruption())

        def evaluate() -> Evaluation:
            """Logs the scores, and adds them to the checkpoint of this step."""
            interruption.raise_if_asked(run.step)
            interruption.at_once = True
            evaluated = run.evaluate(lambda: interruption.raise_if_asked(run.step))
            scores = metrics.logged(evaluated.results)
            logs.metrics(run.step, {"split": split, **scores})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            say(f"step {run.step} of {total_steps}: {shown or 'ranked'}")
            if "map" in scores:
                progress.keep(f"MAP {scores['map']:.4f}")
            run.save(**scores, evaluated=True)
            interruption.at_once = False
            return evaluated

        if is_pending:
            evaluated = evaluate()
        interruption.at_once = True  # before the first step there is nothing to save
        while run.step < total_steps:
            num_steps, loss = run.advance(schedule.next_stop(run.step))
            interruption.at_once = False
            analysis.import_report(wanted=analyse)
            progress.advance(num_steps * size, f"loss {loss:.3f}")
            if run.step in schedule.log:
                run.log(logs)
            if run.step in schedule.relabel:
                run.relabel()
            asked = interruption.agree(save_due=run.is_save_due())
            if asked or run.step in schedule.evaluate:
                run.save()
            if run.step in schedule.evaluate:
                evaluated = evaluate()
            if run.step < total_steps:
                interruption.raise_if_asked(run.step)
    # An earlier process may have stopped between the last evaluation and its results.
    evaluation = evaluated or run.evaluate()
    results = {
        "data": data.report["data"],
        **evaluation.results,
        **_training_results(workdir, config, run),
    }
    if command:
        results["command"] = command
    models, folder = [run.trained_model()], RunFolder(workdir)
    analysis.write_results(
        folder, data.identities, evaluation, results, paths=folder.paths(), ends_training=True,
        analysed=functools.partial(analysis.analyse, models, evaluation, mesh, config)
        if analyse else None,
    )  # fmt: skip
    return results


def _training_results(workdir: Path, config: Config, run: TrainingRun) -> dict[str, Any]:
    steps = checkpoint.manifests(workdir)
    best_step = checkpoint.best(steps)
    best: dict[str, Any] = {}
    if best_step is not None:
        best = {"best_step": best_step, "best_map": steps[best_step]["map"]}
    rates = run.rates[1:] or run.rates  # the first dispatch compiles
    return {
        **best,
        "num_params": run.num_params,
        "num_members": run.num_members,
        "train_clips_per_second": statistics.median(rates) if rates else None,
        "mode": run.feed.mode,
        "waited_seconds": run.feed.waited,
        "train_seconds": run.train_seconds,
        "seconds": run.seconds,
        "date": results_lib.now(),
        "seed": config.seed,
        "step": run.step,
        "finished": True,
        "trained_on": run.data_digests,
        "versions": devices.versions(),
    }
