"""Makes the analysis of an evaluation, `analysis.npz`, and writes all result files."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, distributed, ensemble
from vidjax.data.clips import TrainingData
from vidjax.evaluation import eval_step as eval_step_lib
from vidjax.evaluation import ranking
from vidjax.evaluation.analysis import measures
from vidjax.evaluation.analysis.measures import Arrays, ScoredSplit, Values
from vidjax.evaluation.restore import FoundRun, make_model
from vidjax.evaluation.scoring import (
    Evaluation,
    TrainedModel,
    count_positives,
    iterate_block_groups,
    score,
)
from vidjax.evaluation.significance import FEWEST_IDENTITIES
from vidjax.runs import config as config_lib
from vidjax.runs import results
from vidjax.runs.config import Config
from vidjax.runs.run_folder import ResultPaths, RunFolder
from vidjax.runs.signals import Interrupted
from vidjax.utils.errors import warn


def analyse(
    models: Sequence[TrainedModel],
    evaluation: Evaluation,
    mesh: Mesh,
    config: Config,
) -> tuple[Values, Arrays]:
    """Returns the values and the arrays of `analysis.npz`, see `schemas.Analysis`.

    Reads the frames of the split again, to compute their qualities and the attention between
    vectors.

    Args:
      models: the models that made the evaluation. If there are several, the analysis has the
        modalities of the first model and no attention.
      evaluation: the scores of the split.
      mesh: the devices.
      config: the configuration of the evaluation. If the data contain `data.train_splits`, the
        training clips of each identity are counted.
    """
    model, split = models[0], evaluation.split
    names = model.system.model.vector_names if len(models) == 1 else ()
    quality, matrix = measure_quality_and_attention(
        model, split.name, mesh, config.eval.block_size, attention=bool(names)
    )
    logs = model.system.scores_are_logs
    values: Values = {
        "split": split.name,
        "lead": model.modalities[0],
        "modalities": list(model.modalities),
        "logs": logs,
    }
    arrays: Arrays = {}
    if matrix is not None:
        values["vectors"], arrays["attention"] = list(names), matrix
    if evaluation.results.get("map") is None:
        return values, arrays
    pool = evaluation.clips.pool
    positives = count_positives(split, pool)
    scored = ScoredSplit(evaluation.top, split.labels, split.clips, pool, positives)
    train_clips = measures.count_train_clips(model, config.data.train_splits)
    if train_clips is not None:
        arrays["train_clips"] = train_clips
    arrays |= {"ap": scored.averages, "positives": scored.positives.astype(np.int64)}
    values |= {
        "num_others": split.num_others if pool.all() else 0,
        "worst": measures.find_worst_identities(scored),
        "wrong_clips": measures.find_wrong_clips(scored),
        "intervals": measures.compute_clip_intervals(evaluation.clips, split.labels),
        "fewest_identities": FEWEST_IDENTITIES,
        "strata": measures.measure_strata(scored, split, model.modalities, quality, train_clips),
    }
    people = len(model.data.identities)
    more = measures.measure_open_set(evaluation.clips, split.labels, people, logs=logs)
    return values | more[0], arrays | more[1]


def measure_quality_and_attention(
    model: TrainedModel, split_name: str, mesh: Mesh, block_size: int, *, attention: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the mean quality of each clip and, if `attention`, the mean attention of a model.

    Returns:
      The qualities [N] float64: the mean over the clip's frames of the primary modality, 0 for a
      clip without frames.
      The attention [V, V] float64 of the first member. Column j contains the weight of each vector
        in the attention of vector j: the mean over the clips that have vector j, or over all clips
        with `fill_missing`. If the model has no attention, or each frame is an example, it is None.
    """
    quality = np.zeros(len(model.data.split(split_name).clips))
    params, model_state = ensemble.take((model.params, model.model_state), 0)
    hidden_chunk = np.array(model.training_sets.members[0].view, np.int32)
    step = model.attention_step or eval_step_lib.make_attention_step(model.system)
    attention = attention and not model.system.frame_is_example
    total = None
    blocks = (
        block
        for (own,) in iterate_block_groups([model], split_name, block_size, mesh)
        for block in own
    )
    for block in blocks:
        frames = block.frames[model.modalities[0]]
        attended = step(params, model_state, hidden_chunk, block) if attention else None
        given, mask, clips, real, attended = devices.fetch(
            (frames.quality, frames.mask, block.clip_index, block.batch_mask, attended)
        )
        usable = np.where(mask & np.isfinite(given), given, 0.0).sum(axis=1, dtype=np.float64)
        quality[clips[real]] = (usable / np.maximum(mask.sum(axis=1), 1))[real]
        if attended is not None:
            finite = np.where(np.isfinite(attended), attended, 0.0)
            total = (0.0 if total is None else total) + finite[real].sum(axis=0, dtype=np.float64)
    if total is None:
        return quality, None
    weight = total.sum(axis=0)  # the number of clips in which vector j has attention
    return quality, total / np.where(weight > 0, weight, 1.0)


@functools.cache
def import_slow_libraries(*, report: bool) -> None:
    """Imports Orbax and, if `report`, the report in a thread: each takes over half a second."""

    def load() -> None:
        with contextlib.suppress(ImportError):  # the code that needs them reports it
            from orbax.checkpoint import v1  # noqa: F401

            if report:
                from vidjax.evaluation.report import run_page  # noqa: F401

    threading.Thread(target=load, daemon=True).start()


def write_results(
    folder: RunFolder,
    identities: Sequence[str],
    evaluation: Evaluation,
    values: Mapping[str, Any],
    *,
    paths: ResultPaths,
    analysed: Callable[[], tuple[Values, Arrays]] | None,
    ends_training: bool = False,
) -> None:
    """Writes the ranking and the metrics and, if `analysed` is given, the analysis and the report.

    Deletes the analysis and the report of an earlier evaluation of the split. All processes call
    `analysed`, and the first process writes the files. The ranking and the metrics are written
    first, so an error in the analysis or the report does not change them. `finished` is set after
    the report is written: if a process is killed before, the same command writes the report.

    Args:
      folder: the folder of the run.
      identities: the names of class columns 1..C.
      evaluation: the scores of the split.
      values: the content of `metrics.json`, see `schemas.Metrics`.
      paths: the files of the results.
      analysed: a function that returns the result of `analyse`. If it is None, no analysis and no
        report are written.
      ends_training: True if `values` are the results of a training that ends here.
    """
    if distributed.is_first():
        paths.analysis.unlink(missing_ok=True)
        paths.report.unlink(missing_ok=True)
        ranking.write_ranking(paths.ranking, identities, evaluation.split.clips, evaluation.top)
        pending = {"finished": False} if ends_training else {}
        folder.write_metrics({**values, **pending}, paths)
    if analysed:
        with describe_faults(folder.path):
            analysis = analysed()
            if distributed.is_first():
                results.save_analysis(paths.analysis, *analysis)
    if not distributed.is_first():
        return
    if analysed:
        write_report(folder)
    if ends_training:
        folder.write_metrics(values, paths)


def write_report(folder: RunFolder) -> None:
    """Writes the report of a run. An error becomes a warning."""
    # This import takes nearly a second, and many runs write no report.
    from vidjax.evaluation.report import run_page

    with describe_faults(folder.path):
        run_page.write(folder)


@contextlib.contextmanager
def describe_faults(workdir: Path) -> Iterator[None]:
    """Turns an exception into a warning, because the results are already written.

    Raises an exception of a failed write or a signal. If there are several processes, raises every
    exception.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, Interrupted)) or distributed.count() > 1:
            raise
        reason = (str(error) or "no reason given").splitlines()[0][:200]
        warn(
            f"analysis or report are not written: {type(error).__name__}: {reason}\n"
            f"the results are in '{workdir}'; to try again: vidjax evaluate --workdir={workdir}"
        )


def evaluate(
    config: Config,
    run: FoundRun,
    data: TrainingData,
    *,
    num_devices: int | None = None,
    report: bool = False,
) -> dict[str, Any]:
    """Ranks a split with the weights of a run; writes the results into its folder and returns them.

    `data` may contain other clips than the training data, with or without a ground truth.
    `metrics.json` keeps the metrics of the training. If the split is not the split of the run, or a
    changed setting changes scores, the results are written to `metrics_<split>.json` and so on.

    Args:
      config: the settings of the evaluation.
      run: the trained run.
      data: the clips.
      num_devices: the number of devices; None: all. The scores do not depend on it.
      report: if True, the analysis and the report are written, too.
    """
    began = time.monotonic()
    mesh = devices.make_mesh(num_devices)
    folder, models, spec = run.folder, [make_model(config, run, data, mesh)], config.eval
    evaluation = score(
        models, spec.split, mesh, block_size=spec.block_size, each_member=spec.members
    )
    changed = list_overrides(folder.config, config)
    trained = {name: x for name, x in folder.metrics().items() if name in results.TRAINING_KEYS}
    values = evaluation.results | {
        "data": data.report["data"],
        "step": run.manifest["step"],
        "eval_seconds": time.monotonic() - began,
        "eval_date": results.now(),
        **({"overrides": changed} if changed else {}),
    }
    write_results(
        folder, run.identities, evaluation, trained | values,
        paths=folder.paths(spec.split, apart=bool(changed)),
        analysed=functools.partial(analyse, models, evaluation, mesh, config) if report else None,
    )  # fmt: skip
    return values


# Fields that change the scores of clips only by rounding, or that select the result files.
_FREE = (
    *config_lib.MOVABLE, "data.mode", "deterministic", "eval.block_size", "eval.members",
    "eval.split",
)  # fmt: skip


def list_overrides(trained: Config, config: Config) -> dict[str, Any]:
    """Returns field -> value in `config` for the fields that differ and that change scores."""
    changed = config_lib.differences(trained, config)
    return {name: value for name, (_, value) in changed.items() if name not in _FREE}
