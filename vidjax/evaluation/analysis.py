"""Makes `analysis.npz`, the detailed analysis of an evaluation, and writes all result files."""

import contextlib
import functools
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, distributed, ensemble
from vidjax.data.clips import TrainingData
from vidjax.evaluation import eval_step as eval_step_lib, measures, ranking
from vidjax.evaluation.measures import Arrays, ScoredSplit
from vidjax.evaluation.scoring import (
    Evaluation,
    TrainedModel,
    count_positives,
    iterate_block_groups,
    score,
)
from vidjax.evaluation.significance import FEWEST_IDENTITIES
from vidjax.evaluation.trained_runs import FoundRun, make_model
from vidjax.runs import config as config_lib, facts, results
from vidjax.runs.config import Config
from vidjax.runs.run_folder import RunFolder
from vidjax.runs.schemas import Analysis
from vidjax.runs.signals import Interrupted
from vidjax.utils.errors import warn


def analyse(
    config: Config, models: Sequence[TrainedModel], evaluation: Evaluation, mesh: Mesh
) -> tuple[Analysis, Arrays]:
    """Returns the values and the arrays of `analysis.npz`.

    `config` is the configuration of the first model. If the model has attention, reads the frames
    of the split again. If there are several `models`, the analysis has the modalities of the first
    model, and no attention. The training clips of each identity are counted if they are in the
    data.
    """
    model, split = models[0], evaluation.split
    names = model.system.model.vector_names if len(models) == 1 else ()
    matrix = None
    if names and not model.system.frame_is_example:
        matrix = measure_attention(model, split.name, mesh, config.eval.block_size)
    logs, modalities = model.system.scores_are_logs, list(model.modalities)
    found = Analysis(split=split.name, lead=modalities[0], modalities=modalities, logs=logs)
    arrays: Arrays = {}
    if matrix is not None:
        found.vectors, arrays["attention"] = list(names), matrix
    if evaluation.results.get("map") is None:
        return found, arrays
    pool = evaluation.clips.pool
    positives = count_positives(split, pool)
    best = evaluation.clips.best
    scored = ScoredSplit(evaluation.top, best, split.labels, split.clips, pool, positives)
    train_clips = measures.count_train_clips(model, config.data.train_splits)
    if train_clips is not None:
        arrays["train_clips"] = train_clips
    arrays |= {"ap": scored.averages, "positives": scored.positives.astype(np.int64)}
    clips, labels = evaluation.clips, split.labels
    found.num_others = split.num_others if pool.all() else 0
    found.worst = measures.find_worst_identities(scored)
    found.wrong_clips = measures.find_wrong_clips(scored)
    found.pairs = measures.find_confused_pairs(clips, labels)
    found.intervals = measures.compute_clip_intervals(clips, labels)
    found.fewest_identities = FEWEST_IDENTITIES
    found.strata = measures.measure_strata(scored, split, modalities, train_clips)
    if logs and evaluation.results["map_kind"] != "in_sample":
        found.suspects = measures.measure_suspects(scored, clips)
    found.open_set = measures.open_set(clips, labels, len(model.data.identities))
    arrays |= measures.score_histograms(clips, labels)
    arrays |= measures.compute_error_curve(clips, labels)
    if logs and (calibrated := measures.measure_calibration(clips)):
        arrays["calibration"], found.calibration_error = calibrated
    return found, arrays


def measure_attention(
    model: TrainedModel, split_name: str, mesh: Mesh, block_size: int
) -> np.ndarray | None:
    """Returns the mean attention of a model, [V, V] float64, or None if it has no attention.

    The attention is between the V input vectors of the first member. Element [i, j] is the
    attention of vector j to vector i, averaged over the clips that have vector j. So each column
    sums to 1, or to 0 if no clip has the vector.
    """
    params, model_state = ensemble.take((model.params, model.model_state), 0)
    hidden_chunk = np.array(model.training_sets.members[0].view, np.int32)
    step = model.attention_step or eval_step_lib.make_attention_step(model.system, mesh)
    total = None
    groups = iterate_block_groups([model], split_name, block_size, mesh)
    for block in (block for (blocks,) in groups for block in blocks):
        attended = step(params, model_state, hidden_chunk, block)
        real, attended = devices.fetch((block.batch_mask, attended))
        if attended is None:
            return None
        finite = np.where(np.isfinite(attended), attended, 0.0)
        total = (0.0 if total is None else total) + finite[real].sum(axis=0, dtype=np.float64)
    if total is None:
        return None
    weight = total.sum(axis=0)  # the number of clips in which vector j has attention
    return total / np.where(weight > 0, weight, 1.0)


@functools.cache
def import_slow_libraries(*, report: bool) -> None:
    """Starts a thread that imports Orbax and, if `report` is True, the module of the report."""

    def load() -> None:
        # The code that needs a library reports the error. OSError: matplotlib finds no folder.
        with contextlib.suppress(ImportError, OSError):
            from orbax.checkpoint import v1  # noqa: F401

            if report:
                from vidjax.evaluation.report import run_page  # noqa: F401

    threading.Thread(target=load, daemon=True).start()


def write_results(
    folder: RunFolder,
    config: Config,
    models: Sequence[TrainedModel],
    evaluation: Evaluation,
    values: Mapping[str, Any],
    mesh: Mesh,
    *,
    report: bool,
    ends_training: bool = False,
    is_last: bool = True,
) -> None:
    """Writes the ranking and the metrics and, if `report` is True, the analysis and the report.

    An earlier analysis and report of the split are deleted. An error in the analysis or the report
    does not change the ranking and the metrics. All processes call this function, and the first
    process writes the files.

    Args:
      config: the configuration of the first model.
      values: the metrics. If they have an entry `overrides`, the names of the files contain the
        name of the split, so that no result of the training is replaced.
      ends_training: marks the metrics as `finished` after the report is written, not before. If the
        process is killed before that, the command writes the report when it is repeated.
      is_last: False if another split of the run follows. Then the report is not yet written.
    """
    split, identities = evaluation.split, models[0].data.identities
    paths = folder.paths(split.name, apart=bool(values.get("overrides")))
    if distributed.is_first():
        paths.analysis.unlink(missing_ok=True)
        paths.report.unlink(missing_ok=True)
        ranking.write_ranking(paths.ranking, identities, split.clips, evaluation.top)
        pending = {"finished": False} if ends_training else {}
        folder.write_metrics({**values, **pending}, paths)
    if report:
        with describe_faults(folder.path, split.name):
            analysis = analyse(config, models, evaluation, mesh)
            if distributed.is_first():
                results.save_analysis(paths.analysis, *analysis)
    if not distributed.is_first():
        return
    if report and is_last:
        write_report(folder, split.name)
    if ends_training:
        folder.write_metrics(values, paths)


def write_report(folder: RunFolder, split: str) -> None:
    """Writes the report of a run. If this fails, warns with a command that ranks `split` again."""
    # This import takes nearly a second, and many runs write no report.
    from vidjax.evaluation.report import run_page

    with describe_faults(folder.path, split):
        run_page.write(folder)


@contextlib.contextmanager
def describe_faults(workdir: Path, split: str) -> Iterator[None]:
    """Turns an exception of the analysis or the report of a split into a warning.

    OSError and Interrupted are raised again. With several processes, all exceptions are raised
    again, because the other processes would wait for this one.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, Interrupted)) or distributed.count() > 1:
            raise
        reason = (str(error) or "no reason given").splitlines()[0][:200]
        warn(
            f"the analysis and the report were not written: {type(error).__name__}: {reason}\n"
            f"all other results are in '{workdir}'\n"
            f"to write the report: vidjax evaluate --workdir={shlex.quote(str(workdir))} "
            f"--config.eval.split={split}"
        )


def evaluate(
    config: Config,
    run: FoundRun,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    report: bool = False,
    is_last: bool = True,
) -> dict[str, Any]:
    """Ranks a split with a trained run, writes the results into the run's folder and returns them.

    The split is `config.eval.split`. `data` may be other clips than the training data, with or
    without a ground truth. If `config` changes the split or the scores of the run, the results are
    written to separate files such as `metrics_<split>.json`. The same applies to a checkpoint other
    than the checkpoint that training has evaluated. If `report` is True, the analysis and the
    report are written, too. `num_devices` does not change the scores. None means all devices. For
    `is_last`, see `write_results`.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    folder, models, spec = run.folder, [make_model(config, run, data, mesh)], config.eval
    evaluation = score(
        models, spec.split, mesh, block_size=spec.block_size, each_member=spec.members
    )
    changed = find_overrides(config, run)
    values = {
        **results.select_kept(folder.metrics()),
        **evaluation.results,
        **facts.to_json(run.manifest, only=False),
        "data": data.report["data"],
        "step": run.manifest["step"],
        "eval_seconds": time.monotonic() - began,
        "eval_date": results.now(),
        **({"overrides": changed} if changed else {}),
    }
    write_results(folder, config, models, evaluation, values, mesh, report=report, is_last=is_last)
    return values


def find_overrides(config: Config, run: FoundRun) -> dict[str, Any]:
    """Returns field -> value of the fields of `config` that change scores since the training.

    Training evaluates the latest checkpoint. If a finished run has lost this checkpoint, an earlier
    checkpoint is scored, and the value of `eval.checkpoint` is the step.
    """
    own, trained, step = run.folder.config, run.folder.metrics(), run.manifest["step"]
    own.eval.split = config.eval.split  # another split has other files anyway
    own.eval.checkpoint = "latest"
    differences = config_lib.differences(own, config)
    changed = {n: value for n, (_, value) in differences.items() if config_lib.changes_scores(n)}
    if trained.get("finished") and trained.get("step") != step:
        changed.setdefault("eval.checkpoint", f"step {step}")
    return changed
