"""`--mode=evaluate`: ranks a split with the weights of a trained run."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vidjax import config_io, devices
from vidjax.analysis import analysis
from vidjax.analysis.outputs import write_results
from vidjax.config import Config
from vidjax.data.clips import ClipSource, TrainingData
from vidjax.evaluation import run_data
from vidjax.evaluation.restore import find_run, restore
from vidjax.evaluation.scoring import Evaluation, score
from vidjax.run import results as results_lib


def check_folder(config: Config, workdir: Path, given: Collection[str] = ()) -> None:
    """Reads the files that an evaluation needs and does not write, before the data is loaded.

    The user sets the fields `given`.

    Raises:
      ValueError: a file is damaged, or the user has to name the folder of the data.
      CheckpointError: there is no usable checkpoint.
    """
    run = find_run(config, workdir)
    run_data.check_named(workdir, run.manifest, config, by_user="data.dir" in given)
    results_lib.read_metrics(workdir)
    results_lib.read_data_report(workdir)
    if config.eval.report:
        results_lib.read_other_metrics(workdir)


def evaluate(
    config: Config,
    workdir: Path,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    analyse: bool = False,
) -> dict[str, Any]:
    """Ranks a split with the weights of a run, and writes the results into the run's folder.

    Args:
      config: the run's configuration, with the overrides of this evaluation.
      workdir: the run's folder.
      data: the clips; they need not be those of the training, nor have a ground truth.
      num_devices: devices to use; None for all. Scores do not depend on it.
      analyse: whether to write the analysis and the report, too.

    Returns:
      The metrics of this evaluation. `metrics.json` also keeps those of the training.

    Raises:
      ValueError: the data does not fit the run.
      CheckpointError: there is no usable checkpoint.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices, config.mesh.model)
    step, model = restore(config, workdir, data, mesh)
    split = config.eval.split
    observer = analysis.Observer([model], split, mesh) if analyse else None
    evaluation = score(
        [model],
        split,
        mesh,
        block_size=config.eval.block_size,
        each_member=config.eval.members,
        observe=observer,
    )
    return write_evaluation(
        workdir, model.data, split, evaluation, observer,
        described=data.report["data"], step=step, seconds=time.monotonic() - began,
    )  # fmt: skip


def write_evaluation(
    workdir: Path,
    data: ClipSource,
    split: str,
    evaluation: Evaluation,
    observer: analysis.Observer | None,
    *,
    described: Mapping[str, Any],
    step: int,
    seconds: float,
) -> dict[str, Any]:
    """Writes an evaluation of the clips `described` into the run's folder; returns its metrics."""
    results = evaluation.results | {
        "data": described,
        "step": step,
        "eval_seconds": seconds,
        "eval_date": results_lib.now(),
    }
    trained = config_io.load_workdir(workdir)
    write_results(
        workdir, data, evaluation, results_lib.training_metrics(workdir) | results,
        split=split, own_split=trained.eval.split,
        trained=trained.data, observer=observer,
    )  # fmt: skip
    return results
